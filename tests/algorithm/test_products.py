"""Linear layers in our kernels, in oneDNN and in MKL against PyTorch's own (the slow twin), gradients included."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from esrl.algorithm import products
from esrl.algorithm.products import FastLinear, accumulating, input_gradient, linear, takes_room, weight_gradient
from esrl.kernels import kernels, why_not

WIDTH, OUTPUTS = 300, 260


@pytest.fixture(autouse=True)
def _on_any_processor(monkeypatch):
    """Also where MKL is the faster one."""
    monkeypatch.setattr(products, "faster_here", lambda: True)


def choose(way, monkeypatch):
    """Where products are computed from now on."""
    if way == "mkl":
        monkeypatch.setattr(products, "faster_here", lambda: False)
    elif way == "onednn":
        monkeypatch.setattr(products, "kernels", lambda: None)
    elif kernels() is None:
        pytest.skip(f"no compiled kernels: {why_not()}")


@pytest.fixture(params=["kernels", "onednn", "mkl"])
def way(request, monkeypatch):
    choose(request.param, monkeypatch)
    return request.param


@pytest.fixture(params=["kernels", "onednn"])
def calls(request, monkeypatch):
    """Counts the products of each way, so that a test cannot pass by falling back."""
    choose(request.param, monkeypatch)
    counted: list[tuple[int, ...]] = []
    plain = products._product

    def counting(hidden, weight, bias, *, transposed=False, room=None):
        counted.append(tuple(weight.shape)[:: -1 if transposed else 1])
        return plain(hidden, weight, bias, transposed=transposed, room=room)

    monkeypatch.setattr(products, "_product", counting)
    return counted


def tensors(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(*size, generator=generator) for size in ((*shape, WIDTH), (OUTPUTS, WIDTH), (OUTPUTS,))]
    return [part.to(dtype).requires_grad_() for part in made]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (7,), (130,), (3, 5), (2, 3, 4)])
def test_values_and_gradients_equal_the_plain_ones(shape, with_bias, calls):
    fast, slow = tensors(shape), tensors(shape)
    chosen = slice(None) if with_bias else slice(2)
    found, expected = linear(*fast[chosen]), functional.linear(*slow[chosen])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    outer = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    found.backward(outer)
    expected.backward(outer)
    for ours, plain in zip(fast[chosen], slow[chosen], strict=True):
        assert plain.grad is not None and float(plain.grad.abs().max()) > 1
        torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-5, atol=1e-4)
    assert calls == [(OUTPUTS, WIDTH), (WIDTH, OUTPUTS)]


def test_a_gradient_that_is_not_contiguous(calls):
    (hidden, weight, bias), slow = tensors((6, 4)), tensors((6, 4))
    linear(hidden, weight, bias).transpose(0, 1).flatten(1).pow(2).sum().backward()
    functional.linear(*slow).transpose(0, 1).flatten(1).pow(2).sum().backward()
    for ours, plain in zip((hidden, weight, bias), slow, strict=True):
        torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-4, atol=1e-1)
    assert len(calls) == 2


@pytest.mark.parametrize("learns", range(3))
def test_only_what_learns_gets_a_gradient(learns, calls):
    parts = tensors((5,))
    for i, part in enumerate(parts):
        part.requires_grad_(i == learns)
    linear(*parts).sum().backward()
    assert [part.grad is not None for part in parts] == [i == learns for i in range(3)]
    assert len(calls) == (2 if learns == 0 else 1)  # the product for the input's gradient is spared, too


def test_without_a_graph_nothing_is_kept(calls):
    with torch.no_grad():
        found = linear(*tensors((5,)))
    assert not found.requires_grad and len(calls) == 1


def test_suppressed_tokens_stay_impossible(calls):
    hidden, weight, bias = (part.detach() for part in tensors((5,)))
    bias[[0, 70]] = -torch.inf
    assert (linear(hidden, weight, bias) == -torch.inf).nonzero()[:, 1].tolist() == [0, 70] * 5
    assert calls


@pytest.mark.parametrize(
    ("processor", "intels", "tiles", "mkl", "faster"),
    [
        ("AVX2", False, False, True, False),
        ("AVX2", True, False, True, False),
        ("AVX2", False, False, False, True),
        ("AVX512", False, False, True, True),
        ("AVX512", True, False, True, False),
        ("AVX512", True, True, True, True),
        ("AVX512", True, False, False, True),
    ],
)
def test_where_others_are_faster_than_mkl(processor, intels, tiles, mkl, faster, monkeypatch):
    monkeypatch.undo()
    if (native := kernels()) is None:
        pytest.skip(f"no compiled kernels: {why_not()}")
    monkeypatch.setattr(native, "tiles", tiles)
    monkeypatch.setattr(products, "is_intels", lambda: intels)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: processor)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    assert products.faster_here.__wrapped__() == faster
    monkeypatch.setattr(products, "kernels", lambda: None)
    assert products.faster_here.__wrapped__() == (faster and not tiles)


def test_where_mkl_is_faster_pytorch_is_left_alone(calls, monkeypatch):
    monkeypatch.setattr(products, "faster_here", lambda: False)
    parts = tensors((5,))
    assert torch.equal(linear(*parts), functional.linear(*parts)) and not calls


def test_what_onednn_is_not_for_is_left_to_pytorch(calls, monkeypatch):
    def equal(*parts):
        return torch.equal(linear(*parts), functional.linear(*parts))

    assert equal(*tensors((5,), torch.float64)) and equal(*tensors((5,), torch.bfloat16))
    assert equal(*tensors((0,)))
    hidden, weight, bias = tensors((5,))
    with torch.autocast("cpu", torch.bfloat16):
        assert equal(hidden, weight, bias)
        assert linear(hidden, weight, bias).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False), monkeypatch.context() as without:
        without.setattr(products, "kernels", lambda: None)
        assert equal(hidden, weight, bias)
    monkeypatch.setattr(products, "MIN_WEIGHTS", weight.numel() + 1)
    assert equal(hidden, weight, bias)
    assert not calls


def test_every_module_takes_it_within_the_mode(calls):
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Linear(WIDTH, OUTPUTS), nn.ReLU(), nn.Linear(OUTPUTS, WIDTH))
    hidden = torch.randn(9, WIDTH)
    expected = layers(hidden)
    assert not calls
    with FastLinear():
        found = layers(hidden)
        again = checkpoint(layers, hidden, use_reentrant=False)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-5)
    assert calls == [(OUTPUTS, WIDTH), (WIDTH, OUTPUTS)] * 2
    functional.linear(hidden, layers[0].weight)
    assert len(calls) == 4  # outside all is as it was


def test_kernels_of_onednn_are_made_for_few_numbers_of_rows(monkeypatch):
    monkeypatch.setattr(products, "kernels", lambda: None)
    rows = set()

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.mkldnn._linear_pointwise.default:
                rows.add(args[0].shape[0])
            return func(*args, **(kwargs or {}))

    hidden, weight, bias = tensors((100,))
    with Seen():
        for count in range(1, 101):
            linear(hidden[:count], weight, bias).sum().backward()
    assert rows == {*range(1, 8), *range(8, 65, 8), 96, 128}


def test_gradients_by_themselves(way):
    hidden, weight, _ = (part.detach() for part in tensors((50,)))
    gradient = torch.randn(50, OUTPUTS, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(input_gradient(gradient, weight), gradient @ weight, rtol=1e-5, atol=1e-4)
    expected = gradient.t() @ hidden
    torch.testing.assert_close(weight_gradient(gradient, hidden), expected, rtol=1e-5, atol=1e-4)
    total = weight.clone()
    assert weight_gradient(gradient, hidden, total) is total
    torch.testing.assert_close(total, weight + expected, rtol=1e-5, atol=1e-4)
    apart = torch.zeros(WIDTH, OUTPUTS).t()  # not contiguous
    torch.testing.assert_close(weight_gradient(gradient, hidden, apart), expected, rtol=1e-5, atol=1e-4)


def test_layers_add_to_the_gradient_that_is_there(way):
    """Called twice, with what was there before; a layer without a gradient gets one, and autograd's own way is left."""
    (hidden, weight, bias), slow = tensors((40,)), tensors((40,))
    before = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    weight.grad, slow[1].grad = before.clone(), before.clone()
    place = weight.grad.data_ptr()
    with accumulating():
        found = linear(hidden, weight, bias) + linear(2 * hidden, weight)
    (functional.linear(*slow) + functional.linear(2 * slow[0], slow[1])).pow(2).sum().backward()
    found.pow(2).sum().backward()
    for ours, plain in zip((hidden, weight, bias), slow, strict=True):
        torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-4, atol=2)
    assert weight.grad.data_ptr() == place

    weight.grad = None
    with accumulating():
        found = linear(hidden, weight, bias)
    found.pow(2).sum().backward()
    assert weight.grad is not None
    (asked,) = torch.autograd.grad(linear(hidden, weight, bias).pow(2).sum(), weight)
    torch.testing.assert_close(asked, weight.grad, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("given", [slice(3), slice(2)], ids=["bias", "no bias"])
def test_a_result_lies_in_the_room_that_is_given(way, given):
    hidden, weight, bias = (part.detach() for part in tensors((5,)))
    room = torch.full((6 * OUTPUTS,), torch.nan)
    with torch.no_grad():
        found = linear(hidden, weight, bias if given.stop == 3 else None, room)
    torch.testing.assert_close(found, functional.linear(*(hidden, weight, bias)[given]), rtol=1e-5, atol=1e-4)
    assert takes_room(weight) == (way != "onednn")
    assert not takes_room(weight.double())
    if takes_room(weight):
        assert found.data_ptr() == room.data_ptr() and bool(room[5 * OUTPUTS :].isnan().all())


@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_a_result_may_be_changed_in_place(way, shape):
    """As an activation does, or the addition of a residual."""
    fast, slow = tensors(shape), tensors(shape)
    with accumulating():
        found = torch.relu_(linear(*fast)) + linear(*fast).add_(1)
    found.pow(2).sum().backward()
    plain = functional.linear(*slow)
    (torch.relu(plain) + plain + 1).pow(2).sum().backward()
    for ours, plain in zip(fast, slow, strict=True):
        torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-4, atol=1e-2)
