"""Stage one's decoder step in one compiled call (``kernels/marian.h``), or whole samples (``kernels/decode.h``).

Their slow twins are ``cached_decoder`` and ``sampling.decoding.Decoding``.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from ctypes import POINTER, Structure, addressof, c_double, c_int64, c_void_p, pointer
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esrl.algorithm.log_probs import Projection
from esrl.kernels import Native
from esrl.kernels.native import LinearStruct
from esrl.models.compiled import LaidOutWeights, NormStruct, activation
from esrl.models.linear import FrozenProjection
from esrl.models.policy import BatchSizes, PromptState, behind_each_other

_LINEARS = ("query", "key", "value", "mixed", "cross_query", "cross_mixed", "inner", "outer")
_NORMS = ("norm", "cross_norm", "final_norm")


class _Layer(Structure):
    _fields_ = (*((name, LinearStruct) for name in _LINEARS), *((name, NormStruct) for name in _NORMS))


class _Marian(Structure):
    _fields_ = (
        ("embedding", c_void_p),
        ("positions", c_void_p),
        ("scale", c_double),
        ("width", c_int64),
        ("heads", c_int64),
        ("inner", c_int64),
        ("num_layers", c_int64),
        ("layers", POINTER(_Layer)),
    )


class _Prompts(Structure):
    _fields_ = (("keys", POINTER(c_void_p)), ("values", POINTER(c_void_p)), ("mask", c_void_p), ("length", c_int64))


_RESULTS = ("tokens", "mask", "ended", "log_probs", "sampling_log_probs", "entropy", "max_prob")
_STEPS = 16
"""Steps in one call of whole samples: a signal waits for no more than these."""


class _Sampling(Structure):
    _fields_ = (
        ("prompts", POINTER(_Prompts)),
        *((name, c_void_p) for name in ("prompt", "starts", "limits", "temperatures", "uniforms", "eos")),
        *((name, c_int64) for name in ("num_eos", "rows", "steps", "places", "together")),
        *((name, c_void_p) for name in ("logits", *_RESULTS)),
        ("begun", c_int64),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """R whole samples, and what each depends on."""

    prompt_index: Tensor  # (R,) int64
    starts: Tensor  # (R,) int64, first decoder inputs
    limits: Tensor  # (R,) int64, longest samples
    temperatures: Tensor  # (R,) float64; 0 takes the most probable token
    uniforms: Tensor | None  # (steps, R) float64; None where all temperatures are 0
    eos_tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Shared:
    """A state of prompts, and what rows point to."""

    state: PromptState
    prompts: _Prompts
    parts: tuple[Tensor | None, ...]  # what ``prompts`` points to


def _shared(state: PromptState) -> _Shared:
    keys, values = ([part.contiguous() for part in parts] for parts in (state.keys, state.values))
    mask = None if bool(state.mask.all()) else state.mask.contiguous()
    at = c_void_p * len(keys)
    prompts = _Prompts(
        at(*(part.data_ptr() for part in keys)),
        at(*(part.data_ptr() for part in values)),
        None if mask is None else mask.data_ptr(),
        state.mask.shape[1],
    )
    return _Shared(state, prompts, (*keys, *values, mask))


class CompiledMarianDecoder:
    """A Marian decoder's weights, laid out for the compiled step as they are when the first rows start.

    Args:
        native: the kernels.
        decoder: Hugging Face's decoder module, one that ``fitting_kernels`` takes.
        projection: of the vocabulary.
    """

    @torch.no_grad()
    def __init__(self, native: Native, decoder: Any, projection: Projection) -> None:
        self.native = native
        self.projection = FrozenProjection(projection)
        self.batch_sizes: BatchSizes = "any"
        self.width = decoder.embed_tokens.weight.shape[1]
        self._decoder = decoder
        self._laid_out: tuple[LaidOutWeights, _Marian] | None = None

    def struct(self) -> _Marian:
        """What the kernels take."""
        if self._laid_out is None:
            weights = LaidOutWeights(self.native)
            self._laid_out = weights, self._struct(weights)
        return self._laid_out[1]

    @torch.no_grad()
    def _struct(self, weights: LaidOutWeights) -> _Marian:
        decoder = self._decoder
        layers = (_Layer * len(decoder.layers))(*(_layer(weights, layer) for layer in decoder.layers))
        return _Marian(
            weights.at(decoder.embed_tokens.weight),
            weights.at(decoder.embed_positions.weight),
            decoder.embed_scale,
            self.width,
            decoder.layers[0].self_attn.num_heads,
            decoder.layers[0].fc1.weight.shape[0],
            len(layers),
            layers,
        )

    def start(self, state: PromptState, prompt_index: Tensor) -> CompiledDecoder:
        decoder = CompiledDecoder(self)
        decoder.join(state, prompt_index)
        return decoder

    def sample(self, state: PromptState, wanted: Wanted, places: int, logits: int, results: dict[str, Tensor]) -> None:
        """Draw whole samples without a return to Python between their tokens; the projection must be compiled.

        Args:
            places: rows decoded at a time; logits: that exist at a time.
            results: (R, steps) each, zeros: "tokens" int64; "mask", what has been drawn, and "ended", a sample's EOS,
                bool; "log_probs", "sampling_log_probs" and, to be recorded, "entropy", "max_prob" float32.
        """
        decoder = CompiledDecoder(self)
        decoder.sample(_shared(state), wanted, places, logits, results)


def _layer(weights: LaidOutWeights, layer: Any) -> _Layer:
    own, cross = layer.self_attn, layer.encoder_attn
    linears = (own.q_proj, own.k_proj, own.v_proj, own.out_proj, cross.q_proj, cross.out_proj)
    norms = (layer.self_attn_layer_norm, layer.encoder_attn_layer_norm, layer.final_layer_norm)
    return _Layer(
        *(weights.linear(part) for part in linears),
        weights.linear(layer.fc1, activation(layer) or "none"),
        weights.linear(layer.fc2),
        *map(weights.norm, norms),
    )


class CompiledDecoder:
    """Decodes rows with a key/value cache in pages.

    Args:
        weights: of the decoder.
    """

    def __init__(self, weights: CompiledMarianDecoder) -> None:
        self.weights = weights
        self._library = weights.native.library
        self._handle = self._library.esrl_decoder(addressof(weights.struct()), torch.get_num_threads())
        self._check(self._handle)
        weakref.finalize(self, self._library.esrl_free, self._handle)
        self.sizes: list[int] = []
        self.states: list[_Shared] = []  # of each wave: what its rows point to

    def join(self, state: PromptState, prompt_index: Tensor) -> None:
        """Let more rows begin, behind those that are there."""
        prompt_index = prompt_index.contiguous()
        # waves of the same prompts read them together
        shared = next((known for known in self.states if known.state is state), None) or _shared(state)
        self.sizes.append(len(prompt_index))
        self.states.append(shared)
        self._check(
            self._library.esrl_join(self._handle, addressof(shared.prompts), prompt_index.data_ptr(), len(prompt_index))
        )

    def step(self, tokens: Tensor) -> Tensor:
        """(R,) last tokens -> (R, D) states for the next ones."""
        tokens, width = tokens.contiguous(), self.weights.width
        # rows that are a power of two apart would share a few places in the processor's cache
        stride = width + self.weights.native.vector
        states = torch.empty_strided((tokens.shape[0], width), (stride, 1))
        self._check(self._library.esrl_step(self._handle, tokens.data_ptr(), states.data_ptr(), stride))
        return states

    def sample(self, shared: _Shared, wanted: Wanted, places: int, logits: int, results: dict[str, Tensor]) -> None:
        """As ``CompiledMarianDecoder.sample``; no rows have joined."""
        projection = self.weights.projection.compiled
        assert projection is not None, "told to the caller"
        rows, steps = results["tokens"].shape
        places = min(places, rows)
        together = min(places, max(1, logits // projection.outputs))
        given = [wanted.prompt_index, wanted.starts, wanted.limits, wanted.temperatures]
        given = [part.contiguous() for part in given]
        uniforms = None if wanted.uniforms is None else wanted.uniforms.contiguous()
        eos = torch.tensor(wanted.eos_tokens)
        room = projection.room(together)
        sampling = _Sampling(
            pointer(shared.prompts),
            *(part.data_ptr() for part in given),
            None if uniforms is None else uniforms.data_ptr(),
            eos.data_ptr(),
            *(len(eos), rows, steps, places, together),
            room.data_ptr(),
            *(results[name].data_ptr() if name in results else None for name in _RESULTS),
            0,
        )
        done = 0
        while not done:
            done = self._library.esrl_sample(self._handle, projection.struct, addressof(sampling), _STEPS)
            self._check(done >= 0)

    def keep(self, *rows: Sequence[int]) -> None:
        """Go on with these rows of each wave, in this order."""
        kept = behind_each_other(rows, self.sizes)
        self._check(self._library.esrl_keep(self._handle, (c_int64 * len(kept))(*kept), len(kept)))
        self.states = [state for state, part in zip(self.states, rows, strict=True) if len(part)]
        self.sizes = [len(part) for part in rows if len(part)]

    def _check(self, done: bool | int) -> None:
        if not done:
            raise MemoryError("there is no memory for more keys and values; set a lower sampling.max_cache_tokens.")
