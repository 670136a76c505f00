"""Attention of samples to their prompt's keys and values, shared, and to their own: one function for any Hugging Face
causal model.

Hugging Face's models send queries, keys and values through an interface that takes functions by name, and hand keys and
values to whatever cache they are given. So the model's own code runs, and what is read and what is kept is ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

from esrl.models.causal_support import CannotShareError
from esrl.models.groups import PromptGroups
from esrl.models.policy import PromptState
from esrl.models.row_cache import RowCache, Waves

IMPLEMENTATION = "esrl"
Settings = tuple[float, int | None, float | None]
"""Scale of the scores, sliding window, soft cap."""
_HARMLESS = {"position_ids", "use_cache", "is_causal", "output_attentions", "output_hidden_states", "return_dict"}


class SharedPrefix:
    """The prompts' keys and values as the rows of a batch read them: once for all rows of a prompt.

    Where prompts have very different numbers of rows, filling up the groups would take more room than copies: then
    each row gets its own.

    Args:
        prompt_index: (R,) int64, each row's prompt.
        length: T, queries a row has at a time.
    """

    def __init__(self, state: PromptState, prompt_index: Tensor, length: int) -> None:
        used, local = torch.unique(prompt_index, return_inverse=True)
        groups = PromptGroups.of(local, len(used))
        room = groups.num_prompts * groups.ranks * length
        if length > 1 and room > len(prompt_index) * (length + state.mask.shape[1]):
            used, groups = prompt_index, PromptGroups(len(prompt_index), 1, None)
        everything = len(used) == len(state.mask) and bool((used == torch.arange(len(used), device=used.device)).all())
        self.state, self.groups, self.used = state, groups, None if everything else used
        self.width = state.mask.shape[1]
        lengths = state.mask.sum(1)
        self.start = lengths[prompt_index]  # (R,) the position of each row's first own token
        self.longest = int(lengths.max()) if len(lengths) else 0
        self.mask = None if bool(state.mask.all()) else state.mask[prompt_index]  # (R, S)
        self.masks: dict[tuple[int, int, int | None], Tensor | None] = {}

    def keys(self, layer: int) -> Tensor:
        return self._used(self.state.keys[layer])

    def values(self, layer: int) -> Tensor:
        return self._used(self.state.values[layer])

    def product(self, rows: Tensor, shared: Tensor) -> Tensor:
        """(R, H, N, X) @ (P, H, X, Y) -> (R, H, N, Y), each row with its prompt's matrix."""
        heads, positions = rows.shape[1:3]
        spread = self.groups.spread(rows).transpose(1, 2).flatten(2, 3)  # (P, H, ranks * N, X)
        result = torch.matmul(spread, shared).view(spread.shape[0], heads, self.groups.ranks, positions, -1)
        return self.groups.collect(result.transpose(1, 2))

    def _used(self, tensor: Tensor) -> Tensor:
        return tensor if self.used is None else tensor.index_select(0, self.used)


class CausalRows:
    """Rows that have begun together: what they have decoded (``cache``), and how they read their prompts (``prefix``).

    Args:
        state: the shared prompt state.
        prompt_index: (R,) int64, each row's prompt.
        max_length: positions of the model.
    """

    def __init__(self, state: PromptState, prompt_index: Tensor, max_length: int) -> None:
        self.cache = RowCache(state, prompt_index)
        self.max_length = max_length
        self._place()

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, in this order."""
        self.cache.keep(rows)
        self._place()

    def _place(self) -> None:
        self.prefix = SharedPrefix(self.cache.state, self.cache.prompt_index, length=1)

    def positions(self) -> Tensor:
        """(R,) the present position of each row, the prompt counted; the last one for rows that ended there."""
        return (self.prefix.start + self.cache.position).clamp_max(self.max_length - 1)

    def attend(self, layer: int, settings: Settings, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(R, H, 1, d) queries, (R, H', 1, d) keys and values of the present position -> (R, H, 1, d)."""
        return joint_attention(query, *self.cache.write(layer, key, value), self.prefix, layer, settings)


class CausalWaves(Waves[CausalRows]):
    """Waves of a causal model."""

    def positions(self) -> Tensor:
        """(R,)"""
        return torch.cat([wave.positions() for wave in self.waves])

    def attend(self, layer: int, settings: Settings, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As that of ``CausalRows``, for all rows."""
        return self.each(lambda wave, *own: wave.attend(layer, settings, *own), query, key, value)


class KeyValueCache(Protocol):
    """What Hugging Face's layers ask of a cache."""

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keep a layer's new keys and values; gives all that the queries may look at."""
        ...

    def get_seq_length(self, *_: Any) -> int: ...


class RecordedKeys:
    """A cache that keeps each layer's keys and values as they come, graph included."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        assert layer == len(self.keys)
        self.keys.append(key)
        self.values.append(value)
        return key, value

    def get_seq_length(self, *_: Any) -> int:
        return 0


@dataclass(slots=True)
class Attending:
    """What the attention function must know besides its arguments, and what it saw."""

    prefix: SharedPrefix | None = None  # stage two's
    waves: CausalWaves | None = None  # stage one's; neither while the prompts themselves are run
    layers: int = 0  # layers that have attended
    windowed: bool = False  # whether any of them has a sliding window


_ACTIVE: ContextVar[Attending | None] = ContextVar("esrl_attending", default=None)


@contextmanager
def attending(config: Any, prefix: SharedPrefix | None = None, waves: CausalWaves | None = None) -> Iterator[Attending]:
    """Send the attention of the model with this configuration through ``attend``; afterwards all is as before.

    Raises:
        CannotShareError: on leaving, if not every layer came by exactly once.
    """
    active = Attending(prefix, waves)
    before, token = config._attn_implementation, _ACTIVE.set(active)
    config._attn_implementation = IMPLEMENTATION
    try:
        yield active
    finally:
        config._attn_implementation = before
        _ACTIVE.reset(token)
    if active.layers != config.num_hidden_layers:
        raise CannotShareError(
            config, f"of its {config.num_hidden_layers} layers {active.layers} attend through Hugging Face's interface"
        )


def attend(  # noqa: PLR0913 - the signature is Hugging Face's
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of (R, H, T, d) queries to their prompts' keys and to (R, H', n, d) own ones, causally: (R, T, H, d').

    Dropout on attention weights is left out, as in the encoder-decoder policies.

    Raises:
        CannotShareError: the model asks for something else in its attention (biases, sinks).
    """
    active = _ACTIVE.get()
    assert active is not None, "attention outside of `attending`"
    asked = sorted(name for name, given in others.items() if name not in _HARMLESS and given is not None)
    if attention_mask is not None:
        asked.append("attention_mask")
    if asked:
        raise CannotShareError(
            module.config, f"its attention asks for {', '.join(asked)}, which shared keys do not give"
        )
    active.windowed |= sliding_window is not None
    layer, active.layers = active.layers, active.layers + 1
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    settings = (scale, sliding_window, softcap)
    if active.waves is not None:
        mixed = active.waves.attend(layer, settings, query, key, value)
    elif active.prefix is None and softcap is None and (sliding_window is None or sliding_window >= key.shape[2]):
        mixed = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=key.shape[1] != query.shape[1]
        )
    else:
        mixed = joint_attention(query, key, value, active.prefix, layer, settings)
    return mixed.transpose(1, 2), None


AttentionInterface.register(IMPLEMENTATION, attend)


def joint_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: SharedPrefix | None,
    layer: int,
    settings: Settings,
) -> Tensor:
    """One softmax over the scores of the prompt's keys and of the own ones: (R, H, T, d')."""
    scale, window, softcap = settings
    rows, heads, length, _ = query.shape
    groups, own_length = heads // key.shape[1], key.shape[2]
    # the queries of the heads that share a key/value head are rows of one product
    query = query.reshape(rows, key.shape[1], groups * length, -1) * scale
    scores = torch.matmul(query, key.transpose(2, 3))
    width = 0
    if prefix is not None and prefix.width:
        width = prefix.width
        scores = torch.cat([prefix.product(query, prefix.keys(layer).transpose(2, 3)), scores], 3)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    mask = hidden_from(prefix, length, own_length, window, query.device)
    if mask is not None:
        scores = scores.view(rows, heads, length, -1).masked_fill(mask, -torch.inf).view(scores.shape)
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = torch.softmax(scores, 3, dtype=wide).to(value.dtype)
    mixed = torch.matmul(weights[..., width:], value)
    if prefix is not None and width:
        mixed = mixed + prefix.product(weights[..., :width], prefix.values(layer))
    return mixed.view(rows, heads, length, -1)


def hidden_from(
    prefix: SharedPrefix | None, length: int, own_length: int, window: int | None, device: torch.device
) -> Tensor | None:
    """Where ``length`` queries at the end of ``own_length`` own tokens may not look, the same for all layers of a kind.

    Returns:
        (R or 1, 1, T, S + n), or None where they may look everywhere.
    """
    if prefix is None:
        return _hidden_from(None, length, own_length, window, device)
    key = (length, own_length, window)
    if key not in prefix.masks:
        # one kind of layer follows the other, and the next token has masks of its own
        prefix.masks = {kept: mask for kept, mask in prefix.masks.items() if kept[:2] == key[:2]}
        prefix.masks[key] = _hidden_from(prefix, length, own_length, window, device)
    return prefix.masks[key]


def _hidden_from(
    prefix: SharedPrefix | None, length: int, own_length: int, window: int | None, device: torch.device
) -> Tensor | None:
    """Positions are real ones: the prompt's tokens at 0, 1, ..., then the own ones."""
    longest = 0 if prefix is None else prefix.longest
    window = None if window is None or window >= longest + own_length else window
    if length == 1 and window is None and (prefix is None or prefix.mask is None):
        return None
    own = torch.arange(own_length, device=device)
    now = own[own_length - length :, None]
    hidden = own > now
    if window is not None:
        hidden |= now - own >= window
    hidden = hidden[None, None]
    if prefix is None or not prefix.width:
        return hidden
    rows = len(prefix.start)
    absent = torch.zeros(rows, 1, 1, prefix.width, dtype=torch.bool, device=device)
    if prefix.mask is not None:
        absent = ~prefix.mask[:, None, None]
    if window is not None:
        place = torch.arange(prefix.width, device=device)
        absent = absent | (prefix.start[:, None, None, None] + now - place >= window)
    return torch.cat([absent.expand(-1, -1, length, -1), hidden.expand(rows, -1, -1, -1)], 3)
