"""The compiled kernels against PyTorch's own operations, their slow twin."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional

from esrl.algorithm.log_probs import Projection
from esrl.kernels import LaidOut, Native, kernels, operations, why_not
from esrl.models.linear import FrozenProjection
from esrl.sampling.draw import Drawn, Temperature, draw_tokens

RECORDS = ("entropy", "max_prob")


@pytest.fixture(scope="module", params=["vectors", "tiles"])
def native(request) -> Iterator[Native]:
    found = kernels()
    if found is None:
        pytest.skip(f"no compiled kernels: {why_not()}")
    tiles = request.param == "tiles"
    if found.use_tiles(tiles) != tiles:
        pytest.skip("this processor has no matrix unit for bfloat16")
    yield found
    found.use_tiles(True)


def layer(native: Native, *args) -> LaidOut:
    """In tiles where they are used."""
    return LaidOut(native, *args, tiles=True)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# outputs: less than a block of 32, whole blocks, and one more; inputs: one, less and more than a chain of 128
@pytest.mark.parametrize("outputs", [1, 31, 32, 70, 321])
@pytest.mark.parametrize("inputs", [1, 48, 128, 300, 1100])
@pytest.mark.parametrize("rows", [1, 12, 13, 50])
def test_a_linear_layer(native, rows, inputs, outputs):
    weight, bias, hidden = random(outputs, inputs), random(outputs, seed=1), random(rows, inputs, seed=2)
    exact = functional.linear(hidden.double(), weight.double(), bias.double())
    found = layer(native, weight, bias)(hidden)
    # sums of size sqrt(inputs), up to four times that, in float32: PyTorch itself is off by 2e-6 * sqrt(inputs)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-6 * (inputs**0.5 + 1))


# outputs and inputs as above, and more inputs than are laid out at a time; rows: more than are summed in one chain
@pytest.mark.parametrize("outputs", [1, 31, 70, 321])
@pytest.mark.parametrize("inputs", [1, 48, 300, 1100])
@pytest.mark.parametrize("rows", [1, 13, 50, 600])
def test_products_with_weights_as_they_are(native, rows, inputs, outputs):
    weight, bias, hidden = random(outputs, inputs), random(outputs, seed=1), random(rows, inputs, seed=2)
    gradient, before = random(rows, outputs, seed=3), random(outputs, inputs, seed=4)
    tolerance = {"rtol": 0, "atol": 2e-6 * (max(rows, inputs, outputs) ** 0.5 + 1)}
    exact = functional.linear(hidden.double(), weight.double(), bias.double())
    torch.testing.assert_close(native.product(hidden, weight, bias).double(), exact, **tolerance)
    torch.testing.assert_close(native.product(hidden, weight).double(), exact - bias, **tolerance)
    exact = gradient.double() @ weight.double()
    torch.testing.assert_close(native.product(gradient, weight, transposed=True).double(), exact, **tolerance)
    exact = gradient.double().T @ hidden.double()
    torch.testing.assert_close(native.weight_gradient(gradient, hidden).double(), exact, **tolerance)
    total = before.clone()
    assert native.weight_gradient(gradient, hidden, total) is total
    torch.testing.assert_close(total.double(), before + exact, **tolerance)


# numbers whose products cancel, or are of very different sizes
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e15])
def test_products_are_as_exact_as_pytorchs(native, size):
    weight, hidden = random(96, 512), size * random(64, 512, seed=1) * 10 ** random(64, 512, seed=2)
    weight[::2, 1::2] = weight[::2, ::2]
    hidden[:, 1::2] = -hidden[:, ::2] * (1 + 1e-3 * random(64, 256, seed=3))
    exact, among = hidden.double() @ weight.double().T, hidden.double().abs() @ weight.double().abs().T
    found, plain = (
        (product.double() - exact).abs() / among for product in (native.product(hidden, weight), hidden @ weight.T)
    )
    assert float(found.max()) < 3 * float(plain.max())
    assert float(found.square().mean().sqrt()) < 2 * float(plain.square().mean().sqrt())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_products_hide_nothing_that_is_not_finite(native, bad):
    weight, hidden, gradient = random(40, 64), random(50, 64, seed=1), random(50, 40, seed=2)
    hidden[7, 3] = gradient[7, 3] = bad
    assert native.product(hidden, weight).isfinite().logical_not().nonzero()[:, 0].tolist() == [7] * 40
    transposed = native.product(gradient, weight, transposed=True)
    assert transposed.isfinite().logical_not().nonzero()[:, 0].tolist() == [7] * 64
    wrong = native.weight_gradient(gradient, hidden).isfinite().logical_not().nonzero().tolist()
    assert wrong == [[n, d] for n in range(40) for d in range(64) if n == 3 or d == 3]


def test_products_of_parts_of_matrices(native):
    weight, hidden, gradient = random(90, 200)[:, 30:130], random(40, 150, seed=1)[:, :100], random(90, 40, seed=2).T
    there = (hidden.contiguous(), weight.contiguous())
    assert torch.equal(native.product(hidden, weight), native.product(*there))
    assert torch.equal(
        native.product(gradient, weight, transposed=True),
        native.product(gradient.contiguous(), there[1], transposed=True),
    )
    assert torch.equal(
        native.weight_gradient(gradient, hidden), native.weight_gradient(gradient.contiguous(), there[0])
    )


@pytest.mark.parametrize("threads", [1, 2, 3, 40])
def test_products_do_not_depend_on_threads_or_other_rows_to_the_bit(native, threads):
    weight, hidden, gradient = random(450, 1100), random(70, 1100, seed=1), random(70, 450, seed=2)
    expected = native.product(hidden, weight), native.product(gradient, weight, transposed=True)
    of_weight = native.weight_gradient(gradient, hidden)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for rows in (1, 11, 70):
            assert torch.equal(native.product(hidden[:rows], weight), expected[0][:rows])
            assert torch.equal(native.product(gradient[:rows], weight, transposed=True), expected[1][:rows])
        assert torch.equal(native.weight_gradient(gradient, hidden), of_weight)
    finally:
        torch.set_num_threads(before)


def test_operations_of_products_are_counted(native):
    before = operations()
    native.product(random(7, 30), random(40, 30))
    native.product(random(7, 40), random(40, 30), transposed=True)
    native.weight_gradient(random(7, 40), random(7, 30))
    assert operations() - before == 3 * 2 * 7 * 30 * 40


@pytest.mark.parametrize(
    ("name", "function"), [("none", lambda x: x), ("relu", functional.relu), ("silu", functional.silu)]
)
def test_activation_then_residual(native, name, function):
    weight, hidden, residual = random(45, 64), 3 * random(20, 64, seed=1), random(20, 45, seed=2)
    before = residual.clone()
    found = layer(native, weight, None, name)(hidden, residual)
    expected = function(hidden.double() @ weight.double().T) + residual
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=3e-5)
    assert torch.equal(residual, before)


def test_silu_far_from_zero(native):
    hidden = torch.tensor([-1e4, -120.0, -87.5, -50.0, 0.0, 50.0, 120.0, 1e4])[:, None]
    found = layer(native, torch.ones(1, 1), None, "silu")(hidden)
    torch.testing.assert_close(found, functional.silu(hidden), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("name", ["none", "relu", "silu"])
def test_what_is_not_a_number_is_not_hidden(native, name):
    hidden = random(3, 20)
    hidden[1, 4] = torch.nan
    found = layer(native, random(40, 20), None, name)(hidden)
    assert torch.isnan(found).all(1).tolist() == [False, True, False] == torch.isnan(found).any(1).tolist()


def test_rows_that_lie_apart_and_more_dimensions(native):
    linear = layer(native, random(40, 30), random(40, seed=1))
    wide = random(9, 64, seed=2)
    assert torch.equal(linear(wide[:, :30]), linear(wide[:, :30].contiguous()))
    assert torch.equal(linear(wide[:, ::2][:, :30]), linear(wide[:, ::2][:, :30].contiguous()))
    batch = random(2, 5, 30, seed=3)
    assert torch.equal(linear(batch), linear(batch.view(10, 30)).view(2, 5, 40))
    assert linear(batch[:0]).shape == (0, 5, 40)


def test_a_row_does_not_depend_on_the_others_to_the_bit(native):
    linear, hidden = layer(native, random(100, 700), random(100, seed=1)), random(61, 700, seed=2)
    together = linear(hidden)
    for rows in (1, 2, 5, 11, 12, 13, 30):
        assert torch.equal(torch.cat([linear(part) for part in hidden.split(rows)]), together)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_nor_on_the_number_of_threads(native, threads):
    weight, hidden = random(100, 60), random(61, 60, seed=2)
    expected, before = layer(native, weight, None)(hidden), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(layer(native, weight, None)(hidden), expected)
    finally:
        torch.set_num_threads(before)


def test_operations_are_counted(native):
    linear, before = LaidOut(native, random(10, 20), None), operations()
    linear(random(3, 20))
    assert operations() - before == 2 * 3 * 20 * 10


class Twin:
    """A projection that PyTorch computes."""

    def __init__(self, projection: Projection) -> None:
        self.projection, self.vocabulary = projection, projection.vocabulary

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.projection.logits(hidden)


def both(
    hidden: torch.Tensor,
    projection: Projection,
    tau: torch.Tensor,
    uniforms: torch.Tensor,
    records=RECORDS,
    chunk=1 << 22,
) -> tuple[Drawn, Drawn]:
    frozen = FrozenProjection(projection)
    assert frozen.compiled is not None  # else the fast way was not tried at all
    temperature = Temperature.of(tau)
    return (
        draw_tokens(hidden, frozen, temperature, uniforms, records, chunk),
        draw_tokens(hidden.double(), Twin(wide(projection)), temperature, uniforms, records, 1 << 22),
    )


def wide(projection: Projection) -> Projection:
    bias = projection.bias
    return Projection(projection.weight.double(), None if bias is None else bias.double())


def assert_same(found: Drawn, expected: Drawn) -> None:
    assert torch.equal(found.tokens, expected.tokens)
    for name in ("log_probs", "sampling_log_probs"):
        torch.testing.assert_close(getattr(found, name).double(), getattr(expected, name), rtol=1e-5, atol=1e-5)
    for name in expected.records:
        torch.testing.assert_close(found.records[name].double(), expected.records[name], rtol=1e-5, atol=1e-5)


# below a block of 128 tokens, whole ones, and one more
@pytest.mark.parametrize("vocabulary", [2, 127, 128, 129, 1000])
@pytest.mark.parametrize("tau", [[1.0] * 3, [0.0] * 3, [0.0, 0.6, 1.3]])
@pytest.mark.parametrize("records", [(), RECORDS])
@pytest.mark.parametrize("chunk", [1, 1 << 22])
def test_draws(native, vocabulary, tau, records, chunk):
    bias = random(vocabulary, seed=1)
    bias[0] = -torch.inf  # suppressed
    projection = Projection(2 * random(vocabulary, 24), bias)
    temperature = torch.tensor(tau, dtype=torch.float64).repeat(20)
    uniforms = torch.rand(60, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found, expected = both(random(60, 24, seed=3), projection, temperature, uniforms, records, chunk)
    assert_same(found, expected)
    assert set(found.records) == set(records) and bool((found.tokens > 0).all())


def test_draws_at_both_ends(native):
    """u = 0 takes the first token that can be drawn, u close to 1 the last; suppressed ones at either end never."""
    bias = torch.zeros(300)
    bias[[*range(130), *range(257, 300)]] = -torch.inf
    frozen = FrozenProjection(Projection(torch.zeros(300, 16), bias))
    uniforms = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    drawn = draw_tokens(torch.zeros(2, 16), frozen, Temperature.of(torch.ones(2)), uniforms, (), 1 << 20)
    assert drawn.tokens.tolist() == [130, 256]
    torch.testing.assert_close(drawn.log_probs, torch.full((2,), -4.8441871), rtol=0, atol=1e-6)  # ln 127


def test_draws_follow_the_distribution(native):
    """Uniform numbers at equal distances give each token its share of them, to one draw."""
    logits, count = torch.tensor([0.0, 1.0, -2.0, 3.0]), 10_000
    frozen = FrozenProjection(Projection(logits[:, None], None))
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    for tau in (1.0, 0.7):
        drawn = draw_tokens(
            torch.ones(count, 1), frozen, Temperature.of(torch.full((count,), tau)), uniforms, (), 1 << 20
        )
        share = torch.bincount(drawn.tokens, minlength=4) / count
        torch.testing.assert_close(share, torch.softmax(logits / tau, 0), rtol=0, atol=1.5 / count)


def test_a_draw_does_not_depend_on_the_batch_to_the_bit(native):
    projection = FrozenProjection(Projection(random(500, 40), None))
    hidden, uniforms = random(50, 40, seed=1), torch.rand(50, dtype=torch.float64)
    temperature = torch.linspace(0.5, 1.5, 50)

    def draws(rows: list[slice]) -> list[torch.Tensor]:
        parts = [
            draw_tokens(hidden[each], projection, Temperature.of(temperature[each]), uniforms[each], RECORDS, 3500)
            for each in rows
        ]
        columns = [[part.tokens, part.log_probs, part.sampling_log_probs, *part.records.values()] for part in parts]
        return [torch.cat(column) for column in zip(*columns, strict=True)]

    for found, expected in zip(draws([slice(i, i + 1) for i in range(50)]), draws([slice(0, 50)]), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_show_in_the_log_probability(native, bad):
    projection = FrozenProjection(Projection(random(200, 16), None))
    hidden = random(2, 16, seed=1)
    hidden[1, 3] = bad
    drawn = draw_tokens(hidden, projection, Temperature.of(torch.ones(2)), torch.full((2,), 0.5), (), 1 << 20)
    assert torch.isfinite(drawn.log_probs).tolist() == [True, False]
    assert bool((drawn.tokens < 200).all())


def test_every_number_of_rows_in_a_chunk(native):
    projection, hidden = Projection(random(150, 16), None), random(30, 16, seed=1)
    uniforms = torch.rand(30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for rows, chunk in itertools.product((1, 7, 30), (150, 450, 150 * 31)):
        found, expected = both(hidden[:rows], projection, torch.ones(rows), uniforms[:rows], (), chunk)
        assert_same(found, expected)


def test_draws_use_the_same_memory_each_time(native):
    """More rows than before take more; fewer lie in what is there."""
    linear, hidden = LaidOut(native, random(40, 30), None), random(7, 30)

    def place(rows: int) -> torch.Tensor | None:
        halves = torch.full((rows,), 0.5, dtype=torch.float64)
        native.draw(linear, hidden[:rows], halves, halves, (), rows)
        return linear._room

    first = place(4)
    assert first is not None
    assert place(2) is first and place(4) is first
    more = place(7)
    assert more is not first and len(more) > len(first) and place(4) is more
