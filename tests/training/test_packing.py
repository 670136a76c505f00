"""Packed rows: the loss and gradient of rows of one example each, for every kind of model that can."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from language_helpers import causal_model
from torch import nn
from torch.nn import functional

from esrl.training.packing import (
    pack,
    pack_rows,
    packed_log_probs,
    packed_loss,
    packs_exactly,
    vocabulary_projection,
)

PACKING = ["llama", "llama-tied", "qwen3", "gpt2", "gemma3", "gemma2", "phi"]
generator = torch.Generator().manual_seed(3)
PROMPTS = [torch.randint(5, 300, (n,), generator=generator).tolist() for n in (3, 1, 7, 2, 12, 4)]
ANSWERS = [torch.randint(5, 300, (n,), generator=generator).tolist() for n in (2, 5, 1, 9, 3, 1)]
LENGTHS = [len(p) + len(a) for p, a in zip(PROMPTS, ANSWERS, strict=True)]  # 5 6 8 11 15 5


def test_first_fit_decreasing_by_hand():
    # 15 opens a bin, 11 the second, which 8 joins (19 of 20); 6 opens the third; one 5 joins 15, the other joins 6
    assert pack(LENGTHS, 20) == [[4, 0], [3, 2], [1, 5]]
    assert pack([], 5) == []
    assert pack([5, 5], 5) == [[0], [1]]


@given(st.lists(st.integers(1, 30), max_size=60), st.integers(30, 70))
def test_bins_hold_everything_once_within_their_capacity(lengths, capacity):
    bins = pack(lengths, capacity)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    sizes = [sum(lengths[i] for i in members) for members in bins]
    assert max(sizes, default=0) <= capacity
    # first fit: two bins that would fit into one are never both opened
    assert all(sizes[i] + sizes[j] > capacity for j in range(len(sizes)) for i in range(j))


@pytest.mark.parametrize("length", [0, 6])
def test_what_does_not_fit_is_refused(length):
    with pytest.raises(ValueError, match=rf"length {length} of item 1 does not lie in \[1, 5\]"):
        pack([3, length], 5)


def test_rows_by_hand():
    rows = pack_rows([[1, 0], [2]], [[1, 2], [3], [4]], [[5], [6, 7], [8]], pad_token=9)
    assert rows.tokens.tolist() == [[3, 6, 7, 1, 2, 5], [4, 8, 9, 9, 9, 9]]
    assert rows.positions.tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3]]
    assert rows.answer.int().tolist() == [[0, 1, 1, 0, 0, 1], [0, 1, 0, 0, 0, 0]]


def alone(model: nn.Module) -> torch.Tensor:
    """The loss by Hugging Face's own forward, an example at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total = total + functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")
    return total


@pytest.mark.parametrize("kind", PACKING)
def test_the_packed_loss_and_gradient_are_those_of_the_examples_alone(kind, gradients):
    """Gemma's window of 4 is shorter than its examples; Gemma 2 caps its logits, so its own forward makes them.

    Gemma's norms go through float32 whatever the model's type, and rounding there depends on the last bit before.
    """
    model = causal_model(kind)
    tolerance = 1e-5 if kind.startswith("gemma") else 1e-9
    assert packs_exactly(model)
    head = vocabulary_projection(model)
    assert (head is None) == (kind == "gemma2")
    expected = gradients(model, lambda: alone(model).backward())
    for bins in ([[4, 0], [3, 2], [1, 5]], [[i] for i in range(6)], [[0, 1, 2, 3, 4, 5]]):
        rows = pack_rows(bins, PROMPTS, ANSWERS, 0)
        with torch.no_grad():
            loss = pytest.approx(float(alone(model)), rel=tolerance)
            assert float(packed_loss(model, rows, head)) == loss
            assert -float(packed_log_probs(model, rows, head).sum()) == loss
        found = gradients(model, lambda rows=rows: packed_loss(model, rows, head).backward())
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=name)


def test_a_recurrent_model_is_found_out_and_is_right_without_packing():
    model = causal_model("mamba")
    assert not packs_exactly(model)
    rows = pack_rows([[i] for i in range(6)], PROMPTS, ANSWERS, 0)
    with torch.no_grad():
        loss = packed_loss(model, rows, vocabulary_projection(model), packed=False)
        assert float(loss) == pytest.approx(float(alone(model)), rel=1e-6)  # Mamba's logits are float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
def test_the_probe_is_not_misled_by_rounding(kind, dtype):
    model = causal_model(kind, dtype).train()
    assert packs_exactly(model) and vocabulary_projection(model) is not None
    assert model.training


def test_the_probe_sees_a_leak_and_wrong_positions(monkeypatch):
    """A model that ignores positions, as one would that looks at everything in its row."""
    model = causal_model("llama")
    real = model.base_model.forward
    monkeypatch.setattr(model.base_model, "forward", lambda position_ids=None, **options: real(**options))
    assert not packs_exactly(model)


def test_the_projection_is_the_models_own_or_none():
    model = causal_model("gpt2")
    head = vocabulary_projection(model)
    assert head is not None and head.weight is model.lm_head.weight
    model = causal_model("llama", torch.float32)
    model.config.logit_scale = 0.5
    assert vocabulary_projection(model) is None
    model = causal_model("llama", torch.float32)
    real = model.lm_head.forward
    model.lm_head.forward = lambda hidden: real(hidden).tanh()
    assert vocabulary_projection(model) is None
