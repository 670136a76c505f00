"""Chunked log-probabilities and their gradient against one full log_softmax and autograd (the slow twin)."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from esrl.algorithm import products
from esrl.algorithm.log_probs import (
    Projection,
    exponential,
    room_for_logits,
    token_log_probs,
    weighted_log_prob_sum,
)
from esrl.kernels import kernels, why_not

N, D, V = 23, 5, 11
SUPPRESSED = [0, 7]
# one position a chunk (also when not even one fits), 2, 3, 7 of 23 with a shorter last chunk, and all at once
CHUNKS = [1, V, 2 * V, 3 * V + 5, 7 * V, N * V, 1 << 22]


def problem(bias: str, hot: bool, dtype: torch.dtype = torch.float64) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    values: dict[str, Tensor | None] = {"hidden": normal(N, D), "weight": normal(V, D), "bias": None}
    if bias != "none":
        offset = normal(V)
        offset[SUPPRESSED] = -torch.inf if bias == "suppressed" else offset[SUPPRESSED]
        values["bias"] = offset
    allowed = torch.tensor([v for v in range(V) if v not in SUPPRESSED])
    values["targets"] = allowed[torch.randint(len(allowed), (N,), generator=generator)]
    weights = normal(N)
    weights[4] = 0.0  # an abstained sample's token
    values["weights"] = weights
    values["temperature"] = (0.6 + 0.4 * torch.rand(N, generator=generator, dtype=torch.float64)) if hot else None
    return values


def leaves(values: dict[str, Tensor | None]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Fresh copies of hidden, weight and bias that require a gradient."""
    hidden, weight, bias = (
        None if values[name] is None else values[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")
    )
    assert hidden is not None and weight is not None
    return hidden, weight, bias


def full(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, values: dict[str, Tensor | None], cap: float | None = None
) -> Tensor:
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    if cap is not None:
        logits = torch.where(logits.isinf(), logits, cap * torch.tanh(logits / cap))
    if values["temperature"] is not None:
        logits = logits / values["temperature"][:, None]
    return logits.log_softmax(1)[torch.arange(N), values["targets"]]


def close(actual: Tensor | None, expected: Tensor | None) -> None:
    assert actual is not None and expected is not None
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("max_logits", CHUNKS)
@pytest.mark.parametrize("bias", ["none", "plain", "suppressed"])
@pytest.mark.parametrize("hot", [False, True])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_both_equal_the_full_softmax_and_its_gradient(max_logits: int, bias: str, hot: bool, cap: float | None):
    values = problem(bias, hot)
    inputs = leaves(values)
    expected = full(*inputs, values, cap)
    (expected * values["weights"]).sum().backward()

    chunked = leaves(values)
    log_probs = token_log_probs(
        chunked[0],
        values["targets"],
        Projection(chunked[1], chunked[2], cap),
        temperature=values["temperature"],
        max_logits=max_logits,
    )
    close(log_probs, expected)
    (log_probs * values["weights"]).sum().backward()

    fused = leaves(values)
    total = weighted_log_prob_sum(
        fused[0],
        values["targets"],
        values["weights"],
        Projection(fused[1], fused[2], cap),
        temperature=values["temperature"],
        max_logits=max_logits,
    )
    close(total, (expected * values["weights"]).sum())
    (3 * total).backward()  # what comes after the sum scales its gradient

    for slow, twin, third in zip(inputs, chunked, fused, strict=True):
        if slow is None:
            continue
        finite = torch.where(slow.isfinite(), slow.grad, 0.0)  # a suppressed token's bias is a constant
        close(torch.where(slow.isfinite(), twin.grad, 0.0), finite)
        close(third.grad, 3 * finite)
    assert float(fused[0].grad[4].abs().max()) == 0


def test_exponential_by_way_of_powers_of_two():
    values = torch.tensor([0.0, -1.0, -20.0, -87.0, -745.0, -torch.inf])
    torch.testing.assert_close(exponential(values.double()), values.double().exp(), rtol=1e-13, atol=0)
    # the product with log2(e) is rounded: 2 ** -24 of it, so 20 * log2(e) * 2 ** -24 * ln(2) = 1.2e-6 at -20
    torch.testing.assert_close(exponential(values)[:3], values.double().exp().float()[:3], rtol=1.5e-6, atol=0)


@pytest.mark.parametrize("begun", [False, True])
def test_the_gradient_of_the_projection_is_added_where_it_belongs(begun: bool):
    """In place, on top of what is there; and the hidden states' comes as before."""
    values = problem("plain", True)
    slow, fast = leaves(values), leaves(values)
    for inputs in (slow, fast):
        inputs[1].grad = torch.full_like(inputs[1], 0.5) if begun else None
    before = fast[1].grad
    for inputs, accumulate in ((slow, False), (fast, True)):
        weighted_log_prob_sum(
            inputs[0],
            values["targets"],
            values["weights"],
            Projection(inputs[1], inputs[2]),
            temperature=values["temperature"],
            max_logits=3 * V,
            accumulate=accumulate,
        ).backward()
    assert fast[1].grad is before or not begun
    for twin, expected in zip(fast, slow, strict=True):
        close(twin.grad, expected.grad)


@pytest.mark.parametrize("cap", [None, 3.0])
def test_logits_in_a_room_that_is_used_again(monkeypatch, cap: float | None):
    """Chunks of 7 positions in float32, one after another in the same place, against one chunk in float64."""
    if kernels() is None:
        pytest.skip(f"no compiled kernels: {why_not()}")
    monkeypatch.setattr(products, "faster_here", lambda: True)
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(30, 260, generator=generator), 0.1 * torch.randn(300, 260, generator=generator)
    targets = torch.randint(300, (30,), generator=generator)
    weights = torch.randn(30, generator=generator, dtype=torch.float64)
    outcomes = []
    for dtype, max_logits in ((torch.float64, 10**6), (torch.float32, 7 * 300)):
        parts = [part.to(dtype).requires_grad_() for part in (hidden, weight)]
        projection = Projection(parts[1], None, cap)
        room = room_for_logits(projection, 25, max_logits)
        assert (room is None) == (dtype == torch.float64)
        total = weighted_log_prob_sum(parts[0], targets, weights, projection, max_logits=max_logits, room=room)
        total.backward()
        outcomes.append([total.detach(), *(part.grad for part in parts)])
    assert room is not None and len(room) == 7 * 300
    for found, expected in zip(*reversed(outcomes), strict=True):
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-4)


def test_a_suppressed_token_has_no_probability():
    values = problem("suppressed", False)
    hidden, weight, bias = values["hidden"], values["weight"], values["bias"]
    everything = torch.stack(
        [token_log_probs(hidden, torch.full((N,), v), Projection(weight, bias), max_logits=4 * V) for v in range(V)]
    )
    assert bool((everything[SUPPRESSED] == -torch.inf).all())
    # and the others share all of it
    close(everything.exp().sum(0), torch.ones(N, dtype=torch.float64))
    assert bool(everything[[v for v in range(V) if v not in SUPPRESSED]].isfinite().all())


@pytest.mark.parametrize(("max_logits", "hot"), [(4 * V, True), (N * V, False)])
def test_gradcheck(max_logits: int, hot: bool):
    values = problem("plain", hot)

    def total(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return weighted_log_prob_sum(
            hidden,
            values["targets"],
            values["weights"],
            Projection(weight, bias),
            temperature=values["temperature"],
            max_logits=max_logits,
        )

    assert torch.autograd.gradcheck(total, leaves(values))


@pytest.mark.parametrize("learns", [(True, False), (False, True)])
def test_only_what_learns_gets_a_gradient(learns: tuple[bool, bool]):
    values = problem("suppressed", True)
    inputs = leaves(values)
    (full(*inputs, values) * values["weights"]).sum().backward()
    hidden = values["hidden"].clone().requires_grad_(learns[0])
    weight = values["weight"].clone().requires_grad_(learns[1])
    projection = Projection(weight, values["bias"])
    weighted_log_prob_sum(
        hidden, values["targets"], values["weights"], projection, temperature=values["temperature"], max_logits=50
    ).backward()
    for leaf, twin, wanted in ((hidden, inputs[0], learns[0]), (weight, inputs[1], learns[1])):
        if wanted:
            close(leaf.grad, twin.grad)
        else:
            assert leaf.grad is None


def test_gradients_of_several_micro_batches_add_up():
    values = problem("none", True)
    inputs = leaves(values)
    (full(*inputs, values) * values["weights"]).sum().backward()
    hidden, weight, _ = leaves(values)
    for part in (slice(0, 4), slice(4, 5), slice(5, N)):
        weighted_log_prob_sum(
            hidden[part],
            values["targets"][part],
            values["weights"][part],
            Projection(weight),
            temperature=values["temperature"][part],
            max_logits=2 * V,
        ).backward()
    close(hidden.grad, inputs[0].grad)
    close(weight.grad, inputs[1].grad)


def test_no_positions():
    weight = torch.randn(V, D, requires_grad=True)
    hidden = torch.zeros(0, D, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    assert token_log_probs(hidden, none, Projection(weight)).tolist() == []
    total = weighted_log_prob_sum(hidden, none, torch.zeros(0), Projection(weight))
    total.backward()
    assert float(total.detach()) == 0 and float(weight.grad.abs().max()) == 0


def test_extreme_logits_stay_finite():
    # logits of +-1e4: log p is 0 or -2e4, its gradient (onehot - p) h is 0 or +-h
    hidden = torch.tensor([[1e4], [1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    targets = torch.tensor([0, 1])
    assert token_log_probs(hidden, targets, Projection(weight)).tolist() == [0, -2e4]
    weighted_log_prob_sum(hidden, targets, torch.tensor([5.0, 1.0]), Projection(weight)).backward()
    assert hidden.grad.flatten().tolist() == [0, -2]
    assert weight.grad.flatten().tolist() == [-1e4, 1e4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_do_not_depend_on_the_number_of_chunks(dtype: torch.dtype):
    # 2,048 positions add up to sums whose last bfloat16 digit is far larger than what a position adds
    generator = torch.Generator().manual_seed(0)
    size, width, vocabulary = 2048, 8, 32
    hidden = torch.randn(size, width, generator=generator).to(dtype)
    weight = (0.3 * torch.randn(vocabulary, width, generator=generator)).to(dtype)
    targets = torch.randint(vocabulary, (size,), generator=generator)
    weights = torch.rand(size, generator=generator)
    exact = weight.double().requires_grad_()
    log_probs = (hidden.double() @ exact.T).log_softmax(1)[torch.arange(size), targets]
    (log_probs * weights).sum().backward()
    for chunk in (1, 64, size):
        leaf = weight.clone().requires_grad_()
        total = weighted_log_prob_sum(hidden, targets, weights, Projection(leaf), max_logits=chunk * vocabulary)
        total.backward()
        assert leaf.grad.dtype == dtype and total.dtype == torch.float32
        error = (leaf.grad.double() - exact.grad).norm() / exact.grad.norm()
        assert float(error) < torch.finfo(dtype).eps
        computed = token_log_probs(hidden, targets, Projection(weight), max_logits=chunk * vocabulary)
        assert computed.dtype == torch.float32


def test_a_second_derivative_is_refused():
    # d2/dh2 of total^2 is 2 (dtotal/dh)^2 + 2 total d2total/dh2, and the second term is not known: no silent half
    values = problem("none", False)
    hidden, weight, _ = leaves(values)
    total = weighted_log_prob_sum(hidden, values["targets"], values["weights"], Projection(weight))
    (gradient,) = torch.autograd.grad(total**2, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_one_chunk_of_logits_exists_at_a_time():
    # 64 positions a chunk of 4,096: no tensor as large as two chunks may outlive or accompany them, except the inputs
    size, width, vocabulary, chunk = 4096, 4, 512, 64
    hidden, weight = torch.randn(size, width, requires_grad=True), torch.randn(vocabulary, width, requires_grad=True)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for value in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(value, Tensor):
                    largest = max(largest, value.numel())
            return result

    with Watch():
        weighted_log_prob_sum(
            hidden,
            torch.zeros(size, dtype=torch.int64),
            torch.ones(size),
            Projection(weight),
            max_logits=chunk * vocabulary,
        ).backward()
    gc.collect()
    assert largest == chunk * vocabulary
