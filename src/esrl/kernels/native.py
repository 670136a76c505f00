"""The compiled kernels as Python sees them. Structures and arguments are those of ``kernels.cpp``."""

from __future__ import annotations

import ctypes
import os
import threading
from ctypes import POINTER, Structure, c_char_p, c_double, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from esrl.kernels.build import CannotBuildError, library, load

ACTIVATIONS = {"none": 0, "relu": 1, "silu": 2}


class LinearStruct(Structure):
    """A linear layer, its weight laid out."""

    _fields_ = (
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("inputs", c_int64),
        ("outputs", c_int64),
        ("activation", c_int64),
        ("tiles", c_int64),
    )


class DrawnStruct(Structure):
    """Where a draw puts its results; the last two may be 0."""

    _fields_ = tuple((name, c_void_p) for name in ("tokens", "log_probs", "sampling_log_probs", "entropy", "max_prob"))


class Native:
    """The functions of a compiled library; float32 on CPUs.

    Args:
        library: as it has been loaded.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library: Any = library
        integer, pointer = c_int64, c_void_p
        for name, result, arguments in (
            ("vector", integer, []),
            ("block", integer, []),
            ("operations", integer, []),
            ("use_tiles", integer, [integer]),
            ("product_room", integer, [integer] * 3),
            ("gradient_room", integer, [integer] * 3),
            ("room", integer, [integer]),
            ("enter", None, []),
            ("leave", None, []),
            ("release", None, []),
            ("lay_out", None, [pointer, integer, integer, pointer, integer]),
            ("linear", None, [POINTER(LinearStruct), pointer, integer, integer, *[pointer] * 3, integer]),
            (
                "draw",
                None,
                [
                    POINTER(LinearStruct),
                    *[pointer, integer, integer, pointer, pointer, integer, pointer],
                    POINTER(DrawnStruct),
                    integer,
                ],
            ),
            (
                "product",
                None,
                [pointer, integer, integer, pointer, pointer, integer, *[integer] * 3, pointer, pointer, integer],
            ),
            (
                "weight_gradient",
                None,
                [pointer, integer, pointer, integer, *[integer] * 3, pointer, pointer, integer, integer],
            ),
            ("decoder", pointer, [pointer, integer]),
            ("free", None, [pointer]),
            ("join", integer, [pointer, pointer, pointer, integer]),
            ("keep", integer, [pointer, pointer, integer]),
            ("step", integer, [pointer, pointer, pointer, integer]),
            ("sample", integer, [pointer, POINTER(LinearStruct), pointer, integer]),
            ("rouge_l", integer, [c_char_p, c_char_p, integer, pointer]),
            ("attention", integer, [pointer, integer, integer, integer]),
            ("encode_room", integer, [pointer, pointer, integer]),
            ("encode", integer, [pointer, pointer, pointer, pointer, pointer, integer]),
        ):
            function = getattr(self.library, f"esrl_{name}")
            function.restype, function.argtypes = result, arguments
        self.tiles: bool = bool(self.library.esrl_use_tiles(True))
        self._kept = threading.local()
        self.vector: int = self.library.esrl_vector()
        self.block: int = self.library.esrl_block()

    def use_tiles(self, use: bool) -> bool:
        """From now on products in float32 are on the processor's matrix unit, or not (``tiles.h``).

        Returns:
            Whether they are: not all processors have one. At first they are where there is one.
        """
        self.tiles = bool(self.library.esrl_use_tiles(use))
        return self.tiles

    def product_room(self, inputs: int, outputs: int) -> Tensor:
        """What a product needs besides."""
        return self._scratch(self.library.esrl_product_room(inputs, outputs, torch.get_num_threads()))

    def _scratch(self, count: int) -> Tensor:
        """Numbers that mean nothing later; the same memory for each call of a thread, since new memory costs time."""
        kept: Tensor | None = getattr(self._kept, "room", None)
        if kept is None or len(kept) < count:
            self._kept.room = kept = torch.empty(count)
        return kept

    def draw(
        self,
        projection: LaidOut,
        hidden: Tensor,
        tau: Tensor,
        uniforms: Tensor,
        records: tuple[str, ...],
        together: int,
    ) -> dict[str, Tensor]:
        """Draw a token for each row.

        Args:
            hidden: (R, D) float32.
            tau: (R,) float64 temperatures, or more, which are not looked at; 0 takes the most probable token.
            uniforms: (R,) float64.
            together: rows whose logits exist at a time.

        Returns:
            (R,) each: "tokens", "log_probs", "sampling_log_probs" and the records.
        """
        rows = hidden.shape[0]
        results = {"tokens": torch.empty(rows, dtype=torch.int64)}
        results |= {name: torch.empty(rows) for name in ("log_probs", "sampling_log_probs", *records)}
        place = projection.room(min(together, rows))
        hidden, tau, uniforms = _rows(hidden), tau.contiguous(), uniforms.contiguous()
        self.library.esrl_draw(
            projection.struct,
            hidden.data_ptr(),
            hidden.stride(0),
            rows,
            tau.data_ptr(),
            uniforms.data_ptr(),
            together,
            place.data_ptr(),
            DrawnStruct(**{name: values.data_ptr() for name, values in results.items()}),
            torch.get_num_threads(),
        )
        return results

    def product(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        transposed: bool = False,
        out: Tensor | None = None,
    ) -> Tensor:
        """hidden @ weight.T + bias, (R, D) and (N, D) -> (R, N), or hidden @ weight if it is ``transposed``.

        Args:
            out: contiguous; takes the result.
        """
        rows, inputs = hidden.shape
        outputs = weight.shape[1] if transposed else weight.shape[0]
        result = torch.empty(rows, outputs) if out is None else out
        hidden, weight = _rows(hidden), _rows(weight)
        bias = None if bias is None else bias.contiguous()
        room = self.product_room(inputs, outputs)
        self.library.esrl_product(
            weight.data_ptr(),
            weight.stride(0),
            transposed,
            None if bias is None else bias.data_ptr(),
            hidden.data_ptr(),
            hidden.stride(0),
            *(rows, inputs, outputs),
            room.data_ptr(),
            result.data_ptr(),
            torch.get_num_threads(),
        )
        return result

    def weight_gradient(self, gradient: Tensor, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """gradient.T @ hidden, (R, N) and (R, D) -> (N, D), float32; added to a contiguous ``out`` if there is one."""
        (rows, outputs), inputs = gradient.shape, hidden.shape[1]
        result = torch.empty(outputs, inputs) if out is None else out
        gradient, hidden = _rows(gradient), _rows(hidden)
        threads = torch.get_num_threads()
        room = self._scratch(self.library.esrl_gradient_room(rows, inputs, threads))
        self.library.esrl_weight_gradient(
            gradient.data_ptr(),
            gradient.stride(0),
            hidden.data_ptr(),
            hidden.stride(0),
            *(rows, outputs, inputs),
            room.data_ptr(),
            result.data_ptr(),
            out is not None,
            threads,
        )
        return result

    def rouge_l(self, completions: bytes, references: bytes, pairs: int) -> list[float]:
        """ROUGE-L's F-measure of each pair of UTF-8 texts, each followed by a 0; of letters it lowers A-Z alone."""
        scores = (c_double * pairs)()
        if not self.library.esrl_rouge_l(completions, references, pairs, scores):
            raise MemoryError(f"there is no memory to score {pairs} texts; score fewer at a time.")
        return list(scores)


class LaidOut:
    """``functional.linear`` with a weight laid out for the kernels.

    Args:
        weight: (N, D) float32 on the CPU; bias: (N,).
        activation: applied to the result; one of ``ACTIVATIONS``.
        tiles: take the processor's matrix unit where there is one. The weight is then read as it is, which pays where
            there are many rows, or where it stays in a cache.
    """

    def __init__(
        self,
        native: Native,
        weight: Tensor,
        bias: Tensor | None,
        activation: str = "none",
        *,
        tiles: bool = False,
    ) -> None:
        self.native = native
        self.outputs, self.inputs = weight.shape
        blocks = -(-self.outputs // native.block)
        self._bias = torch.zeros(blocks * native.block)
        self._room: Tensor | None = None
        if bias is not None:
            self._bias[: self.outputs] = bias
        self._weight = weight.contiguous()
        tiles = tiles and native.tiles
        if not tiles:
            weight, count = self._weight, blocks * native.block * self.inputs
            self._weight = torch.empty(count)
            native.library.esrl_lay_out(
                weight.data_ptr(), self.outputs, self.inputs, self._weight.data_ptr(), torch.get_num_threads()
            )
        self.struct = LinearStruct(
            *(self._weight.data_ptr(), self._bias.data_ptr(), self.inputs, self.outputs, ACTIVATIONS[activation]), tiles
        )

    def room(self, rows: int) -> Tensor:
        """For the results of so many rows, of which nothing stays: the same memory each time.

        Allocated anew for each step, between small results that stay, it would take other memory each time: what glibc
        has freed does not serve an aligned request of the same size (docs/performance.md).
        """
        size = rows * self.native.library.esrl_room(self.outputs)
        if self._room is None or self._room.shape[0] < size:
            self._room = torch.empty(size)
        return self._room

    def __call__(self, hidden: Tensor, residual: Tensor | None = None) -> Tensor:
        """(..., D) -> (..., N); ``residual`` is added to the result, after the activation."""
        flat = _rows(hidden.reshape(-1, self.inputs))
        out = torch.empty(len(flat), self.outputs)
        add = None if residual is None else residual.reshape(-1, self.outputs).contiguous()
        room = self.native.product_room(self.inputs, self.outputs)
        self.native.library.esrl_linear(
            self.struct,
            flat.data_ptr(),
            flat.stride(0),
            len(flat),
            None if add is None else add.data_ptr(),
            room.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out.view(*hidden.shape[:-1], self.outputs)


@cache
def _load() -> Native | str:
    if os.environ.get("ESRL_KERNELS", "on") == "off":
        return "ESRL_KERNELS is off"
    try:
        return Native(load(library))
    except (CannotBuildError, OSError) as error:
        return str(error)


def kernels() -> Native | None:
    """The compiled kernels, built if need be; None where they cannot be."""
    loaded = _load()
    return loaded if isinstance(loaded, Native) else None


def operations() -> int:
    """Multiplications and additions of matrix products and attention so far; PyTorch's counter does not see them."""
    native = kernels()
    return 0 if native is None else int(native.library.esrl_operations())


def why_not() -> str | None:
    """Why there are no compiled kernels; None where there are."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def _rows(matrix: Tensor) -> Tensor:
    """(R, D), each row's numbers side by side."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()
