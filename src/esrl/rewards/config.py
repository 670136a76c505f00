"""Which rewards, and with what settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from typing import Any

from esrl.rewards.combining import Normalise
from esrl.rewards.model import ModelRewardConfig
from esrl.rewards.text import BLEU, ChrF, ExactMatch, ExactMatchConfig, RougeL
from esrl.rewards.timed import JsonSchemaConfig, RegexConfig
from esrl.rewards.verifiable import GSM8K

METRICS: dict[str, Callable[[], Any]] = {
    "bleu": BLEU,
    "chrf": ChrF,
    "rouge_l": RougeL,
    "rouge_l_unicode": partial(RougeL, tokenizer="unicode"),
    "exact_match": ExactMatch,
    "gsm8k": GSM8K,
}
"""Scores of one text against its reference, which make corpus scores, too."""

BUILT_IN = (*METRICS, "regex", "json_schema", "model")
"""Every reward with a short name."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Which reward functions, and what happens when one has nothing to say or hangs."""

    names: tuple[str, ...] = ("bleu",)
    """``bleu``, ``chrf``, ``rouge_l``, ``exact_match``, ``gsm8k``, ``regex``, ``json_schema``, ``model`` (a reward
    model), ``package.module:name`` or ``path/to/file.py:name``; with several, their weighted sum. The paper trains with
    BLEU, with ROUGE-L, and with reward models."""

    weights: tuple[float, ...] = ()
    """One for each name; empty: 1 each."""

    normalise: Normalise = "none"
    """With ``each``, every function's rewards become z-scores over the batch before they are weighted and summed: the
    weights then say how much each counts, whatever its scale. With ``sum``, the weighted sum does."""

    timeout_seconds: float | None = None
    """Time limit of one call of one function, which then runs in a process of its own, all of them at once (built-in
    ones never do; ``regex`` and ``json_schema`` have limits of their own). A call that hangs or crashes is tried once
    more; then its samples abstain. None: no limit, no extra process."""

    max_abstain_share: float = 0.5
    """The run stops when a larger share of samples abstained, on average over ``abstain_window`` steps. Steps not
    made yet count as 0, so a few early abstentions do not stop a run; 1 never does."""

    abstain_window: int = 20
    """Steps over which ``max_abstain_share`` is judged."""

    exact_match: ExactMatchConfig = field(default_factory=ExactMatchConfig)
    """What ``exact_match`` looks over."""

    regex: RegexConfig = field(default_factory=RegexConfig)
    """What ``regex`` looks for."""

    json_schema: JsonSchemaConfig = field(default_factory=JsonSchemaConfig)
    """What ``json_schema`` asks for."""

    model: ModelRewardConfig = field(default_factory=ModelRewardConfig)
    """Which reward model ``model`` is."""

    def __post_init__(self) -> None:
        self._check_names()
        if self.weights and len(self.weights) != len(self.names):
            raise ValueError(f"{len(self.weights)} weights for {len(self.names)} rewards; give one each, or none.")
        if not all(map(math.isfinite, self.weights)):
            raise ValueError(f"weights is {self.weights}; every weight must be finite.")
        if self.timeout_seconds is not None and not 0 < self.timeout_seconds < math.inf:
            raise ValueError(f"timeout_seconds is {self.timeout_seconds}; it must be above 0, or none.")
        if not 0 <= self.max_abstain_share <= 1:
            raise ValueError(f"max_abstain_share is {self.max_abstain_share}; it must lie in [0, 1].")
        if self.abstain_window < 1:
            raise ValueError(f"abstain_window is {self.abstain_window}; it must be 1 or more.")
        if self.normalise not in ("none", "each", "sum"):
            raise ValueError(f"normalise is {self.normalise!r}; choose none, each or sum.")

    def _check_names(self) -> None:
        if not self.names:
            raise ValueError(
                f"names is empty; name at least one reward: {', '.join(BUILT_IN)}, or package.module:name."
            )
        for name in self.names:
            if name not in BUILT_IN and ":" not in name and "." not in name:
                near = get_close_matches(name, BUILT_IN, n=1, cutoff=0.4)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(BUILT_IN)}"
                raise ValueError(f"unknown reward {name!r}; {hint} (an own function: package.module:name).")
            if name.endswith(".py"):
                raise ValueError(f"reward {name!r} is a file; name the function in it: {name}:function.")
