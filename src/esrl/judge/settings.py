"""The settings of `esrl judge`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from esrl.judge.prompts import Mode

TEMPLATES: dict[str, tuple[str, str]] = {
    "single": ("single-v1", "single-math-v1"),
    "pairwise": ("pair-v2", "pair-math-v1"),
}
"""FastChat's templates for a mode: without and with a reference answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestConfig:
    """How the judge is asked."""

    concurrency: int = 4
    """Requests under way at once."""
    timeout_seconds: float = 120.0
    """For one request from its start to its last byte; then it is tried again."""
    max_attempts: int = 6
    """Of one request, the first included."""
    min_delay_seconds: float = 1.0
    """Wait before the second attempt; it doubles with each, and between half and all of it is waited, at random. What
    the server asks for in Retry-After is waited at least."""
    max_delay_seconds: float = 60.0
    """The longest such wait."""
    max_retry_after_seconds: float = 300.0
    """A server that asks for more ends the run; what is done is kept."""
    max_failures: int = 5
    """Requests given up one after the other, with none answered between them, end the run."""
    temperature: float | None = 0.0
    """0 asks for the likeliest reply; unset (`false` in TOML): not sent, for models that refuse it."""
    max_tokens: int = 2048
    """Longest reply. One cut off before its score counts as unparsed."""
    max_tokens_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the endpoint calls that; OpenAI's reasoning models want the second."""

    def __post_init__(self) -> None:
        for name in ("concurrency", "max_attempts", "max_failures", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        if not self.timeout_seconds > 0:
            raise ValueError(f"timeout_seconds is {self.timeout_seconds}; it must be above 0, 120 is usual.")
        if not 0 <= self.min_delay_seconds <= self.max_delay_seconds:
            raise ValueError(
                f"min_delay_seconds is {self.min_delay_seconds} and max_delay_seconds {self.max_delay_seconds}; "
                "they must be 0 or more, and the first at most the second."
            )
        if self.max_retry_after_seconds < 0 or (self.temperature is not None and not self.temperature >= 0):
            raise ValueError("max_retry_after_seconds and temperature must be 0 or more.")


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeConfig:
    """`esrl judge`: answers judged by a language model behind an OpenAI-compatible endpoint.

    Where it is, and its key, come from the environment: ESRL_JUDGE_URL and ESRL_JUDGE_KEY, or OPENAI_BASE_URL and
    OPENAI_API_KEY.
    """

    output_dir: Path
    """Where replies and result go. Replies that are there already are not asked for again."""
    questions: Path
    """JSONL: question_id, the text (prompt, text, question or instruction), category, reference answer."""
    answers: tuple[Path, ...]
    """One or two JSONL files: question_id (or prompt) and answer."""
    templates: Path
    """JSONL of judge templates in FastChat's form."""
    judge: str
    """The model that judges, as its endpoint calls it."""
    mode: Literal["single", "pairwise"] = "single"
    """single: each answer gets a rating from 1 to 10; pairwise: two answers are compared."""
    swap: bool = True
    """Pairwise: ask in both orders; verdicts that contradict each other are a tie."""
    names: tuple[str, ...] = ()
    """What the systems are called; the files' names if empty."""
    template: str | None = None
    """The template's name; unset: single-v1 or pair-v2."""
    reference_template: str | None = None
    """The template for questions with a reference answer; unset: single-math-v1 or pair-math-v1."""
    use_references: bool = True
    """Show reference answers to the judge where there are any."""
    limit: int | None = None
    """Judge the first questions only."""
    ask_again: bool = False
    """Ask again where the reply that is there holds no score."""
    allow_missing: bool = False
    """Give a result though some requests were given up; their questions are left out, and counted."""
    num_resamples: int = 10_000
    """Of the bootstrap over questions."""
    seed: int = 1
    """Of the bootstrap."""
    json: bool = False
    """Print one JSON object instead of tables."""
    request: RequestConfig = field(default_factory=RequestConfig)
    """How the judge is asked."""

    def __post_init__(self) -> None:
        if not isinstance(self.answers, tuple) or not isinstance(self.judge, str):
            return  # not given yet: flags still follow
        systems = len(self.answers)
        if systems not in (1, 2) or (self.mode == "pairwise" and systems != 2):
            needed = "two" if self.mode == "pairwise" else "one or two"
            raise ValueError(f"answers names {systems} files; mode {self.mode!r} needs {needed}.")
        if self.names and len(self.names) != systems:
            raise ValueError(f"names has {len(self.names)} entries for {systems} files; give a name for each, or none.")
        if len(set(self.system_names)) < systems:
            raise ValueError(f"both systems are called {self.system_names[0]!r}; tell them apart by `names`.")
        if not self.judge.strip():
            raise ValueError('judge is empty; name the model that judges, as its endpoint calls it: judge = "gpt-4".')
        for name in ("limit", "num_resamples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be 1 or more.")

    @property
    def system_names(self) -> tuple[str, ...]:
        return self.names or tuple(path.name.removesuffix(".gz").removesuffix(".jsonl") for path in self.answers)

    def template_names(self, mode: Mode) -> tuple[str, str]:
        """The template's name without and with a reference answer."""
        plain, reference = TEMPLATES[mode]
        return self.template or plain, self.reference_template or reference
