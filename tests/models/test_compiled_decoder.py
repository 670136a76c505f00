"""The compiled decoder step against the one of PyTorch's operations, its slow twin."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from compiled_models import make, with_adapter
from torch import nn

from esrl.errors import NumericsError
from esrl.kernels import LaidOut, kernels, memory, operations, why_not
from esrl.models import attention, seq2seq
from esrl.models.cached_decoder import FrozenMarianDecoder
from esrl.models.compiled import fitting_kernels
from esrl.models.compiled_decoder import CompiledMarianDecoder
from esrl.models.policy import PromptState
from esrl.models.seq2seq import MarianPolicy
from esrl.sampling import engine
from esrl.sampling.decoding import Decoding, decode
from esrl.sampling.engine import EngineSampler, SamplingConfig
from esrl.types import Prompts

STEPS = 20


def pair(policy: MarianPolicy) -> tuple[CompiledMarianDecoder, FrozenMarianDecoder]:
    """The compiled decoder and its twin in float64."""
    compiled = policy.frozen_decoder()
    if kernels() is None:
        pytest.skip(f"no compiled kernels: {why_not()}")
    assert isinstance(compiled, CompiledMarianDecoder)  # else the fast way was not tried at all
    wide = copy.deepcopy(policy.model).double()
    return compiled, FrozenMarianDecoder(wide.model.decoder, MarianPolicy(wide, policy.tokenizer).projection())


def state64(state: PromptState) -> PromptState:
    return state.with_tensors(tuple(part.double() for part in state.tensors))


def tokens(rows: int, step: int) -> torch.Tensor:
    return torch.randint(5, 150, (rows,), generator=torch.Generator().manual_seed(step))


# heads of one, two, four and eight vectors of 16 numbers, twice as many of 8 where there is no AVX-512
@pytest.mark.parametrize(("width", "heads"), [(64, 4), (64, 2), (128, 2), (256, 2)])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_a_step_is_the_twins(tokenizer, prompts, width, heads, activation):
    """With masks, rows of a prompt not side by side, more than four of one, and several pages."""
    policy = make(tokenizer, width, heads, activation=activation)
    compiled, twin = pair(policy)
    state = policy.encode(prompts)
    assert not bool(state.mask.all())
    index = torch.tensor([0, 0, 0, 0, 0, 0, 3, 9, 5, 5, 0, 3, 1])
    fast, slow = compiled.start(state, index), twin.start(state64(state), index)
    for step in range(STEPS):
        found, expected = fast.step(tokens(13, step)), slow.step(tokens(13, step))
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)
    logits = compiled.projection.logits(found)
    torch.testing.assert_close(logits.double(), twin.projection.logits(expected), rtol=0, atol=1e-4)


def test_rows_leave_and_others_begin(tokenizer, prompts):
    """Two waves with prompts of their own; rows change places, a wave ends, pages are used again."""
    policy = make(tokenizer)
    compiled, twin = pair(policy)
    first, second = policy.encode(prompts), policy.encode(prompts.select([2, 4]))
    fast = compiled.start(first, torch.tensor([1, 1, 2, 7, 8, 8]))
    slow = twin.start(state64(first), torch.tensor([1, 1, 2, 7, 8, 8]))
    rows = 6

    def steps(start: int, count: int) -> None:
        for step in range(start, start + count):
            found, expected = fast.step(tokens(rows, step)), slow.step(tokens(rows, step))
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)

    steps(0, 9)
    for decoder in (fast, slow):
        decoder.keep([0, 5, 2, 3])
    rows = 4
    steps(9, 3)
    fast.join(second, torch.tensor([1, 0, 0]))
    slow.join(state64(second), torch.tensor([1, 0, 0]))
    rows = 7
    steps(12, 7)
    for decoder in (fast, slow):
        decoder.keep([3, 1], [0, 2])
    rows = 4
    steps(19, 2)
    for decoder in (fast, slow):
        decoder.keep([], [1])
    rows = 1
    gc.collect()  # the first wave's prompts are gone now
    steps(21, 10)


def test_waves_read_the_same_prompts_together_to_the_bit(tokenizer, prompts):
    """As if each wave had prompts of its own; the first one to have them is the first to go."""
    policy = make(tokenizer)
    compiled, _ = pair(policy)
    state = policy.encode(prompts)
    waves = [torch.tensor(index) for index in ([1, 1, 2], [2, 1, 8, 0], [2, 2])]

    def run(states: list[PromptState]) -> list[torch.Tensor]:
        decoder, found = compiled.start(states[0], waves[0]), []
        found += [decoder.step(tokens(3, step)) for step in range(9)]
        decoder.join(states[1], waves[1])
        assert (decoder.states[0] is decoder.states[1]) == (states[0] is states[1])  # read once, if they are the same
        found += [decoder.step(tokens(7, step)) for step in range(3)]
        decoder.keep([], [3, 1, 0])
        gc.collect()
        decoder.join(states[2], waves[2])
        return [*found, *(decoder.step(tokens(5, step)) for step in range(STEPS))]

    apart = [state.select(torch.arange(10)) for _ in waves]
    for found, expected in zip(run([state] * 3), run(apart), strict=True):
        assert torch.equal(found, expected)


def test_a_row_does_not_depend_on_the_others_to_the_bit(tokenizer, prompts):
    policy = make(tokenizer)
    compiled, _ = pair(policy)
    state = policy.encode(prompts)
    index = torch.tensor([0, 0, 0, 3, 3, 3, 3, 3, 6])
    decoder = compiled.start(state, index)
    together = [decoder.step(tokens(9, step)) for step in range(STEPS)]
    for row in range(9):
        alone = compiled.start(state, index[row : row + 1])
        for step in range(STEPS):
            assert torch.equal(alone.step(tokens(9, step)[row : row + 1])[0], together[step][row])


def test_samples_do_not_depend_on_batch_size_places_or_compaction_to_the_bit(
    tokenizer, prompts, uneven_plan, monkeypatch
):
    policy = make(tokenizer)
    pair(policy)
    tight = prompts.select(
        [i for i in range(len(prompts)) if int(prompts.mask[i].sum()) == int(prompts.mask.sum(1).mode().values)]
    )
    plan = type(uneven_plan)(
        num_samples=torch.full((len(tight),), 7), temperature=torch.full((len(tight),), 0.9).double()
    )

    def draw(twin: bool = False, **config) -> tuple[torch.Tensor, torch.Tensor]:
        monkeypatch.setattr(engine, "decode", (lambda *args: Decoding(*args).run()) if twin else decode)
        settings = SamplingConfig(max_new_tokens=30, **config)
        rollouts = EngineSampler(policy, settings, seed=5).sample(tight, plan)
        return rollouts.tokens, rollouts.log_probs

    expected = draw()
    for config in (
        {"max_cache_tokens": 30 * 3},
        {"compaction_share": 1.0},
        {"compaction_share": 0.0, "max_cache_tokens": 30 * 5, "max_logits": 400},
    ):
        for twin in (False, True):  # the loop in Python, with the compiled step
            found = draw(twin, **config)
            assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_samples_are_those_of_pytorchs_operations(tokenizer, prompts, uneven_plan, monkeypatch):
    policy = make(tokenizer)
    pair(policy)
    sampler = EngineSampler(policy, SamplingConfig(max_new_tokens=30), seed=5)
    found = sampler.sample(prompts, uneven_plan, records=("entropy", "max_prob"))
    monkeypatch.setattr(seq2seq, "fitting_kernels", lambda decoder: None)
    monkeypatch.setattr("esrl.models.linear.kernels", lambda: None)
    expected = sampler.sample(prompts, uneven_plan, records=("entropy", "max_prob"))
    assert torch.equal(found.tokens, expected.tokens) and found.texts == expected.texts
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=0, atol=2e-5)
    for name, values in expected.records.items():
        torch.testing.assert_close(found.records[name], values, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "name", ["self_attn.k_proj", "self_attn.v_proj", "encoder_attn.q_proj", "fc1", "final_layer_norm"]
)
def test_weights_that_are_not_numbers_are_found(tokenizer, prompts, make_plan, name):
    policy = make(tokenizer)
    pair(policy)
    with torch.no_grad():
        policy.model.get_parameter(f"model.decoder.layers.1.{name}.weight").view(-1)[3] = torch.nan
    sampler = EngineSampler(policy, SamplingConfig(max_new_tokens=30), seed=5)
    for temperature in (1.0, 0.0):
        with pytest.raises(NumericsError, match="is nan"):
            sampler.sample(prompts, make_plan([2] * 10, temperature))


def test_no_token_behind_the_vocabulary_is_the_most_probable_one(tokenizer, prompts):
    """Where logits are not numbers, what a row is filled up with is more than they are."""
    compiled, _ = pair(make(tokenizer))
    projection = compiled.projection.compiled
    assert projection is not None
    hidden = torch.full((3, 64), torch.nan)
    for vocabulary in (projection.outputs, 128 - 16, 128 - 17):  # filled up with whole vectors, and with less
        layer = LaidOut(projection.native, torch.randn(vocabulary, 64), None)
        zeros = torch.zeros(3).double()
        drawn = projection.native.draw(layer, hidden, zeros, zeros, (), 3)
        assert drawn["tokens"].tolist() == [0] * 3 and bool(drawn["log_probs"].isnan().all())


def test_adapters_count(tokenizer, prompts):
    adapted = with_adapter(make(tokenizer))
    compiled = adapted.frozen_decoder()
    assert isinstance(compiled, CompiledMarianDecoder)
    state, index = adapted.encode(prompts), torch.arange(10)
    inputs = torch.stack([tokens(10, step) for step in range(4)], 1)
    with torch.no_grad():
        expected = adapted.hidden_states(state, index, inputs)
    decoder = compiled.start(state, index)
    for step in range(4):
        # float32 on both sides
        torch.testing.assert_close(decoder.step(inputs[:, step]), expected[:, step], rtol=0, atol=1e-4)


@pytest.mark.parametrize("change", ["float64", "gelu", "width", "autocast", "off"])
def test_others_take_pytorchs_operations(tokenizer, change, monkeypatch):
    policy = make(tokenizer, width=36 if change == "width" else 64)
    decoder = policy.model.model.decoder
    if change == "float64":
        policy.model.double()
    if change == "gelu":
        for layer in decoder.layers:
            layer.activation_fn = nn.GELU()
    if change == "off":
        monkeypatch.setattr(attention, "kernels", lambda: None)
    with torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
        assert fitting_kernels(decoder) is None
        assert isinstance(policy.frozen_decoder(), FrozenMarianDecoder)


def test_operations_of_a_step_are_counted(tokenizer, prompts: Prompts):
    policy = make(tokenizer, width=64, inner=72)
    compiled, _ = pair(policy)
    state = policy.encode(prompts)
    decoder, before = compiled.start(state, torch.zeros(3, dtype=torch.int64)), operations()
    decoder.step(tokens(3, 0))
    # a layer: six 64 x 64 products, two 64 x 72 ones; one own key and the prompt's, each 64 wide, twice
    a_row = 6 * 64 * 64 + 2 * 64 * 72 + 2 * 64 * (1 + prompts.mask.shape[1])
    assert operations() - before == 2 * 2 * 3 * a_row


def test_what_rows_have_decoded_is_in_the_pool(tokenizer, prompts):
    """A page of 8 positions, two layers 256 wide, is 32 KB; what is given back serves the next rows."""
    if memory._pool() is None:
        pytest.skip("PyTorch has no pool here")
    policy, rows = make(tokenizer, 256), torch.zeros(100, dtype=torch.int64)

    def top() -> int:
        """Behind all that is in the pool."""
        return torch.empty(1 << 28).data_ptr()

    tops = []
    with memory.stage(policy.device), torch.no_grad():
        state, compiled = policy.encode(prompts), policy.frozen_decoder()
        for _ in range(2):
            decoding = compiled.start(state, rows)
            decoding.step(rows)
            tops.append(top())
            for _ in range(8):
                decoding.step(rows)
            tops.append(top())
            decoding.keep(range(50))
            del decoding
    assert tops[1] - tops[0] >= 100 << 15
    assert tops[2:] == tops[:2]
