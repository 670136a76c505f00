"""Prompts encoded in one compiled call (``kernels/encoder.h``); Hugging Face's encoder is its slow twin."""

from __future__ import annotations

from ctypes import POINTER, Structure, addressof, c_double, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from esrl.kernels import Native
from esrl.kernels.native import LinearStruct
from esrl.models.compiled import LaidOutWeights, NormStruct, activation
from esrl.models.policy import PromptState
from esrl.types import Prompts

_LINEARS = ("query", "key", "value", "mixed", "inner", "outer")
_NORMS = ("norm", "final_norm")


class _Layer(Structure):
    _fields_ = (*((name, LinearStruct) for name in _LINEARS), *((name, NormStruct) for name in _NORMS))


class _Encoder(Structure):
    _fields_ = (
        ("embedding", c_void_p),
        ("positions", c_void_p),
        ("scale", c_double),
        ("width", c_int64),
        ("heads", c_int64),
        ("inner", c_int64),
        ("num_layers", c_int64),
        ("num_readers", c_int64),
        ("layers", POINTER(_Layer)),
        ("keys", POINTER(LinearStruct)),
        ("values", POINTER(LinearStruct)),
    )


class _Sources(Structure):
    _fields_ = (
        ("tokens", c_void_p),
        ("positions", c_void_p),
        ("starts", c_void_p),
        ("prompts", c_int64),
        ("length", c_int64),
    )


class CompiledMarianEncoder:
    """A Marian encoder's weights as they are now, laid out for the compiled call, and of all cross-attentions.

    Args:
        native: the kernels.
        encoder: Hugging Face's encoder module, one that ``fitting_kernels`` takes.
        readers: the cross-attention of each of the decoder's layers.
    """

    @torch.no_grad()
    def __init__(self, native: Native, encoder: Any, readers: list[Any]) -> None:
        self._native = native
        self._weights = weights = LaidOutWeights(native, tiles=True)
        self._heads = encoder.layers[0].self_attn.num_heads
        self._width = encoder.embed_tokens.weight.shape[1]
        layers = (_Layer * len(encoder.layers))(*(self._layer(layer) for layer in encoder.layers))
        each = LinearStruct * len(readers)
        self._struct = _Encoder(
            weights.at(encoder.embed_tokens.weight),
            weights.at(encoder.embed_positions.weight),
            encoder.embed_scale,
            self._width,
            self._heads,
            encoder.layers[0].fc1.weight.shape[0],
            len(layers),
            len(readers),
            layers,
            each(*(weights.linear(reader.k_proj) for reader in readers)),
            each(*(weights.linear(reader.v_proj) for reader in readers)),
        )

    def __call__(self, prompts: Prompts) -> PromptState:
        """Encode each prompt; keys and values of padding are 0.

        Raises:
            MemoryError: there is no memory for it.
        """
        count, length = prompts.mask.shape
        shape = (2, self._struct.num_readers, count, self._heads, length, self._width // self._heads)
        both = torch.empty(shape)
        if not bool(prompts.mask.all()):
            both.zero_()
        keys, values = ([*part] for part in both)
        tokens, positions = prompts.input_ids[prompts.mask], prompts.mask.nonzero()[:, 1].contiguous()
        starts = torch.nn.functional.pad(prompts.mask.sum(1).cumsum(0), (1, 0))
        sources = _Sources(tokens.data_ptr(), positions.data_ptr(), starts.data_ptr(), count, length)
        structs, library = (addressof(self._struct), addressof(sources)), self._native.library
        room = torch.empty(library.esrl_encode_room(*structs, torch.get_num_threads()))
        places = (room.data_ptr(), _addresses(keys), _addresses(values))
        done = library.esrl_encode(*structs, *places, torch.get_num_threads())
        if not done:
            raise MemoryError("there is no memory for a batch of prompts; set a lower sampling.max_prompt_tokens.")
        return PromptState(keys=tuple(keys), values=tuple(values), mask=prompts.mask)

    def _layer(self, layer: Any) -> _Layer:
        attention, weights = layer.self_attn, self._weights
        linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj)
        return _Layer(
            *(weights.linear(part) for part in linears),
            weights.linear(layer.fc1, activation(layer) or "none"),
            weights.linear(layer.fc2),
            *map(weights.norm, (layer.self_attn_layer_norm, layer.final_layer_norm)),
        )


def _addresses(tensors: list[Tensor]) -> Any:
    return (c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
