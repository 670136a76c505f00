"""Our Marian decoder against Hugging Face's, and what a policy promises besides."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from causal_models import join
from transformers import AutoTokenizer, MarianMTModel

from esrl.models import cached_decoder, seq2seq
from esrl.models.attention import PaddedAttention, _merge_heads, split_heads
from esrl.models.policy import PromptState
from esrl.models.seq2seq import MarianPolicy, Preset, load_policy, new_policy
from esrl.models.tokenizer import train_tokenizer
from esrl.types import Prompts


def decoder_inputs(policy: MarianPolicy, rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """(R, T) random inputs, the start token first."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randint(0, policy.vocabulary, (rows, width), generator=generator)
    inputs[:, 0] = policy.start_token
    return inputs


PROMPT_INDEX = torch.tensor([0, 0, 0, 2, 3, 3, 4, 5, 6, 6, 6, 6, 9])  # ragged; prompts 1, 7 and 8 have no row


@pytest.fixture(params=["products", "fused"])
def each_attention(request, monkeypatch):
    """Both ways in which stage one computes attention on CPUs, whatever the number of queries."""
    monkeypatch.setattr(cached_decoder, "FEW_QUERIES", 0 if request.param == "products" else 10**6)
    monkeypatch.setattr(seq2seq, "fitting_kernels", lambda part: None)  # else the compiled decoder's, where heads fit


@pytest.mark.parametrize(
    ("dtype", "layers", "activation", "tolerance"),
    [
        (torch.float64, 1, "relu", 1e-10),
        (torch.float64, 3, "relu", 1e-10),
        (torch.float64, 2, "swish", 1e-10),  # what the OPUS models use
        (torch.float32, 3, "relu", 1e-4),
    ],
)
def test_parallel_forward_is_hugging_faces(make_policy, prompts, dtype, layers, activation, tolerance):
    policy = make_policy(dtype, layers=layers)
    if activation == "swish":
        for layer in [*policy.model.model.encoder.layers, *policy.model.model.decoder.layers]:
            layer.activation_fn = torch.nn.SiLU()
    inputs = decoder_inputs(policy, len(PROMPT_INDEX), 21)
    with torch.no_grad():
        ours = policy.projection().logits(policy.hidden_states(policy.encode(prompts), PROMPT_INDEX, inputs))
        theirs = policy.model(
            input_ids=prompts.input_ids[PROMPT_INDEX],
            attention_mask=prompts.mask[PROMPT_INDEX],
            decoder_input_ids=inputs,
        ).logits
    assert not bool(prompts.mask.all())  # or the source mask would not be tested
    assert policy.suppressed == [policy.pad_token]
    assert bool((ours[..., policy.pad_token] == -torch.inf).all())
    real = [token for token in range(policy.vocabulary) if token != policy.pad_token]
    assert float(theirs.std()) > 1  # the tolerance means something
    torch.testing.assert_close(ours[..., real], theirs[..., real], rtol=0, atol=tolerance)


def test_gradient_of_the_parallel_forward_is_hugging_faces(random64, prompts, gradients):
    inputs = decoder_inputs(random64, len(PROMPT_INDEX), 9)
    weights = torch.randn(len(PROMPT_INDEX), 9, random64.vocabulary, dtype=torch.float64)
    real = [token for token in range(random64.vocabulary) if token != random64.pad_token]

    def ours() -> None:
        logits = random64.projection().logits(random64.hidden_states(random64.encode(prompts), PROMPT_INDEX, inputs))
        (logits * weights)[..., real].sum().backward()

    def theirs() -> None:
        logits = random64.model(
            input_ids=prompts.input_ids[PROMPT_INDEX],
            attention_mask=prompts.mask[PROMPT_INDEX],
            decoder_input_ids=inputs,
        ).logits
        (logits * weights)[..., real].sum().backward()

    expected, found = gradients(random64.model, theirs), gradients(random64.model, ours)
    assert expected.keys() == found.keys() == {name for name, p in random64.model.named_parameters() if p.requires_grad}
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-10, msg=name)


def test_encoding_does_not_depend_on_padding(random64, prompts):
    together = random64.encode(prompts)
    for i in range(len(prompts)):
        alone = random64.encode(prompts.select([i]))
        length = int(prompts.mask[i].sum())
        for a, b in zip(alone.tensors, together.tensors, strict=True):
            torch.testing.assert_close(a[0], b[i, :, :length], rtol=0, atol=1e-12)


def test_encoding_holds_the_projected_encoder_states(random64, prompts):
    state = random64.encode(prompts)
    encoder, decoder = random64.model.get_encoder(), random64.model.get_decoder()
    states = encoder(input_ids=prompts.input_ids, attention_mask=prompts.mask).last_hidden_state
    for layer, key, value in zip(decoder.layers, state.keys, state.values, strict=True):
        # by hand: head h of 4 holds columns 8h..8h+7 of W x + b
        for head in range(4):
            part = slice(8 * head, 8 * head + 8)
            attention = layer.encoder_attn
            expected = states @ attention.k_proj.weight[part].T + attention.k_proj.bias[part]
            torch.testing.assert_close(key[:, head], expected, rtol=0, atol=1e-12)
            expected = states @ attention.v_proj.weight[part].T + attention.v_proj.bias[part]
            torch.testing.assert_close(value[:, head], expected, rtol=0, atol=1e-12)
    assert torch.equal(state.mask, prompts.mask)


def test_encoding_in_parts_equals_the_whole(random32, prompts, monkeypatch):
    with torch.enable_grad():
        whole = random32.encode(prompts)  # with a graph: all at once, plain layers
    monkeypatch.setattr(seq2seq, "_ENCODED_TOKENS", 2 * prompts.mask.shape[1])
    with torch.no_grad():
        parts = random32.encode(prompts)
    assert torch.equal(parts.mask, whole.mask)
    real = prompts.mask[:, None, :, None]
    for one, other in zip(parts.tensors, whole.tensors, strict=True):
        torch.testing.assert_close(one * real, other.detach() * real, rtol=0, atol=2e-4)


def test_dropout_in_the_encoder_is_the_same_with_and_without_a_graph(make_policy, prompts, monkeypatch):
    """Stage two replays it: what is scored must be what is differentiated."""
    policy = make_policy(torch.float64)
    monkeypatch.setattr(seq2seq, "_ENCODED_TOKENS", 2 * prompts.mask.shape[1])
    policy.set_dropout(0.3)
    torch.manual_seed(5)
    with torch.no_grad():
        scored = policy.encode(prompts)
    torch.manual_seed(5)
    for one, other in zip(scored.tensors, policy.encode(prompts).tensors, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=0, atol=1e-12)


def test_prompt_state_is_selected_and_rebuilt(random64, prompts):
    state = random64.encode(prompts)
    rebuilt = state.with_tensors(state.tensors)
    assert all(a is b for a, b in zip(rebuilt.keys + rebuilt.values, state.keys + state.values, strict=True))
    picked = state.select(torch.tensor([4, 1]))
    assert isinstance(picked, PromptState)
    assert torch.equal(picked.values[1], torch.stack([state.values[1][4], state.values[1][1]]))
    assert torch.equal(picked.mask, torch.stack([state.mask[4], state.mask[1]]))


def test_heads_split_and_merge():
    states = torch.arange(24.0).view(1, 2, 12)
    split = split_heads(states, 3)
    assert split[0, 1].tolist() == [[4, 5, 6, 7], [16, 17, 18, 19]]  # head 1: columns 4-7 of both positions
    assert torch.equal(_merge_heads(split), states)


def cached_logits(policy: MarianPolicy, prompts: Prompts, index: torch.Tensor, inputs: torch.Tensor, keep_at: dict):
    """Step through ``inputs``; ``keep_at[position]`` (rows of the original batch) are kept before that position."""
    decoder = policy.frozen_decoder().start(policy.encode(prompts), index)
    alive = torch.arange(len(index))
    seen: dict[tuple[int, int], torch.Tensor] = {}
    for position in range(inputs.shape[1]):
        if position in keep_at:
            local = torch.tensor([alive.tolist().index(row) for row in keep_at[position]])
            decoder.keep(local.tolist())
            alive = alive[local]
        hidden = decoder.step(inputs[alive, position])
        seen |= {(row, position): hidden[i] for i, row in enumerate(alive.tolist())}
    return seen, decoder


@pytest.mark.usefixtures("each_attention")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-4)])
def test_cached_steps_equal_the_parallel_forward(make_policy, prompts, dtype, tolerance):
    """37 positions: the cache starts with room for 8 and grows to 16, 24, 32, 48. Meanwhile rows and prompts leave."""
    policy = make_policy(dtype, layers=3)
    inputs = decoder_inputs(policy, len(PROMPT_INDEX), 37)
    keep_at = {
        5: [0, 1, 2, 3, 5, 6, 7, 8, 9, 11, 12],  # single rows leave
        18: [1, 5, 9, 11, 12],  # prompts 2, 4 and 5 are done: fewer than 3/4 are left, the shared state shrinks
        30: [5, 12],
        33: [12],
    }
    with torch.no_grad():
        parallel = policy.hidden_states(policy.encode(prompts), PROMPT_INDEX, inputs)
        seen, decoder = cached_logits(policy, prompts, PROMPT_INDEX, inputs, keep_at)
    assert len(seen) == 13 * 5 + 11 * 13 + 5 * 12 + 2 * 3 + 1 * 4
    assert decoder.waves.waves[0].cache.state.mask.shape[0] == 1
    worst = max(float((parallel[row, position] - value).abs().max()) for (row, position), value in seen.items())
    assert worst < tolerance


@pytest.mark.usefixtures("each_attention")
def test_waves_side_by_side_equal_the_parallel_forward(random64, prompts):
    """Rows that begin at steps 0, 3 and 10, each wave with its own prompts; rows leave, then a whole wave."""
    begins = {0: [0, 1, 2, 3, 4], 3: [5, 6, 7, 8], 10: [9, 10, 11, 12]}
    stays = {6: [[0, 4, 2], [5, 8]], 14: [[], [8], [9, 12, 11]], 20: [[8], [9, 11]]}
    inputs = decoder_inputs(random64, len(PROMPT_INDEX), 25)
    frozen, decoder, waves, position = random64.frozen_decoder(), None, [], {}
    with torch.no_grad():
        state = random64.encode(prompts)
        parallel = random64.hidden_states(state, PROMPT_INDEX, inputs)
    for step in range(25):
        if step in begins:
            decoder = join(frozen, decoder, state, PROMPT_INDEX[begins[step]])
            waves.append(begins[step])
            position |= dict.fromkeys(begins[step], 0)
        if step in stays:
            kept = [[wave.index(row) for row in rows] for wave, rows in zip(waves, stays[step], strict=True)]
            decoder.keep(*kept)
            waves = [rows for rows in stays[step] if rows]
        rows = [row for wave in waves for row in wave]
        hidden = decoder.step(torch.stack([inputs[row, position[row]] for row in rows]))
        for row, state_of_row in zip(rows, hidden, strict=True):
            expected = parallel[row, position[row]]
            torch.testing.assert_close(state_of_row, expected, rtol=0, atol=1e-11, msg=f"{row} at {step}")
            position[row] += 1
    assert position[8] == 22 and position[0] == 14 and position[11] == 15


@pytest.mark.usefixtures("each_attention")
def test_cached_steps_without_source_padding_and_with_full_groups(random64, prompts):
    """No mask and no gaps: the branches without padding, where every prompt has the same number of rows."""
    same = prompts.select([i for i in range(len(prompts)) if int(prompts.mask[i].sum()) == int(prompts.mask[0].sum())])
    assert bool(same.mask.all())
    index = torch.arange(len(same)).repeat_interleave(3)
    inputs = decoder_inputs(random64, len(index), 6)
    with torch.no_grad():
        parallel = random64.hidden_states(random64.encode(same), index, inputs)
        seen, decoder = cached_logits(random64, same, index, inputs, {})
    assert decoder.waves.waves[0].groups.slots is None and decoder.waves.waves[0].source_mask is None
    worst = max(float((parallel[row, position] - value).abs().max()) for (row, position), value in seen.items())
    assert worst < 1e-11


def test_rows_of_uneven_prompts_get_their_own_copies_where_groups_would_take_more_room(random64, prompts):
    """40 rows of one prompt and one of each other: in groups, that is 40 * 10 slots for 49 rows."""
    index = torch.tensor([0] * 40 + list(range(1, 10)))
    inputs = decoder_inputs(random64, len(index), 4)
    state = random64.encode(prompts)
    assert PaddedAttention(state, index, 4).groups.ranks == 1
    assert PaddedAttention(state, torch.tensor([0, 0, 1, 2, 2]), 4).groups.ranks == 2
    with torch.no_grad():
        together = random64.hidden_states(state, index, inputs)
        for row, prompt in enumerate(index.tolist()):
            alone = random64.hidden_states(
                random64.encode(prompts.select([prompt])), torch.tensor([0]), inputs[row : row + 1]
            )
            torch.testing.assert_close(together[row], alone[0], rtol=0, atol=1e-11)


def test_decoding_follows_the_weights_of_the_moment(make_policy, prompts):
    """The fused projection is a copy: a decoder made after an update must see it."""
    policy = make_policy()
    inputs = decoder_inputs(policy, len(PROMPT_INDEX), 4)
    with torch.no_grad():
        policy.frozen_decoder().start(policy.encode(prompts), PROMPT_INDEX).step(inputs[:, 0])
        policy.model.model.decoder.layers[0].self_attn.v_proj.weight.mul_(-1.5)
        parallel = policy.hidden_states(policy.encode(prompts), PROMPT_INDEX, inputs)
        seen, _ = cached_logits(policy, prompts, PROMPT_INDEX, inputs, {})
    assert max(float((parallel[row, at] - value).abs().max()) for (row, at), value in seen.items()) < 1e-11


def test_suppressed_tokens_come_from_the_generation_config(random64):
    model = copy.deepcopy(random64.model)
    model.generation_config.bad_words_ids = [[0], [5], [7, 8], [1]]
    policy = MarianPolicy(model, random64.tokenizer)
    # PAD (0) and the single bad word 5; a sequence of two is not one token; EOS (1) must stay sayable, as in `generate`
    assert policy.suppressed == [0, 5]
    bias = policy.projection().bias
    assert [i for i, value in enumerate(bias.tolist()) if value == -float("inf")] == [0, 5]
    assert bool(torch.isfinite(model.final_logits_bias).all())  # the model's own buffer is left alone


def test_several_end_tokens_and_the_start_token(random64):
    model = copy.deepcopy(random64.model)
    model.generation_config.eos_token_id = [1, 9]
    model.generation_config.decoder_start_token_id = 1
    policy = MarianPolicy(model, random64.tokenizer)
    assert policy.eos_tokens == (1, 9)
    assert policy.start_token == 1
    assert random64.eos_tokens == (1,) and random64.start_token == 0  # Marian starts with PAD


def test_dropout_is_set_everywhere_and_off_at_0(make_policy, prompts):
    policy = make_policy()
    inputs = decoder_inputs(policy, 10, 6)
    index = torch.arange(10)

    def states() -> torch.Tensor:
        with torch.no_grad():
            return policy.hidden_states(policy.encode(prompts), index, inputs)

    plain = states()
    for layer in policy.model.model.encoder.layers:
        layer.activation_dropout = 0.5  # a pretrained model's configuration may hold any of these
    policy.model.model.encoder.layerdrop = policy.model.model.decoder.layerdrop = 0.9
    policy.set_dropout(0.3)
    first, second = states(), states()
    assert float((first - second).abs().max()) > 0.1
    torch.manual_seed(3)
    first = states()
    torch.manual_seed(3)
    assert torch.equal(first, states())
    policy.set_dropout(0.0)
    assert torch.equal(states(), plain)
    assert policy.model.model.encoder.layerdrop == policy.model.model.decoder.layerdrop == 0
    assert not policy.model.training


def test_dropout_rate_by_frequency(make_policy, prompts):
    """The embeddings' dropout zeroes a share `rate` of the entries and scales the others by 1 / (1 - rate)."""
    policy = make_policy()
    policy.set_dropout(0.25)
    hidden = torch.ones(200, 500, dtype=torch.float64)
    dropped = policy._drop(hidden, policy.model.model.decoder.dropout)
    # 100,000 entries: the standard deviation of the share is sqrt(.25 * .75 / 1e5) = .0014; five of them
    assert abs(float((dropped == 0).double().mean()) - 0.25) < 0.007
    assert sorted(set(dropped.flatten().tolist())) == [0.0, 1 / 0.75]


def test_new_policy_is_a_function_of_its_seed(tokenizer):
    preset = Preset(width=16, layers=1, heads=2, inner_width=24)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (new_policy(preset, tokenizer, 20, seed).model.state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)  # the global generator is left where it was
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.shared.weight"], other["model.shared.weight"])


def test_new_policy_starts_as_its_docstring_says(tokenizer):
    policy = new_policy(Preset(width=64, layers=1, heads=2, inner_width=128), tokenizer, 20, 0)
    model = policy.model
    # 160 * 64 entries around 64 ** -.5 = .125: relative error of a standard deviation is 1 / sqrt(2 * 10240) = .7 %
    assert float(model.model.shared.weight.detach().std()) == pytest.approx(0.125, rel=0.035)
    fc1 = model.model.decoder.layers[0].fc1.weight.detach()
    bound = (6 / (64 + 128)) ** 0.5  # Glorot: uniform in +-sqrt(6 / (in + out))
    assert 0.98 * bound < float(fc1.abs().max()) <= bound
    assert model.lm_head.weight is model.model.shared.weight is model.model.decoder.embed_tokens.weight
    # sinusoids, not random: position 0 is sin 0 = 0 in the first half, cos 0 = 1 in the second
    assert model.model.decoder.embed_positions.weight[0].tolist() == [0.0] * 32 + [1.0] * 32


def test_saved_folder_loads_back_the_same(random32, prompts, tmp_path: Path):
    random32.save(tmp_path / "model")
    loaded = load_policy(tmp_path / "model")
    inputs = decoder_inputs(random32, 10, 8)
    with torch.no_grad():
        before = random32.hidden_states(random32.encode(prompts), torch.arange(10), inputs)
        after = loaded.hidden_states(loaded.encode(prompts), torch.arange(10), inputs)
    assert torch.equal(before, after)
    assert torch.equal(loaded.projection().bias, random32.projection().bias)
    assert torch.equal(loaded.projection().weight, random32.projection().weight)
    assert loaded.model.generation_config.bad_words_ids == [[0]]
    assert (loaded.suppressed, loaded.start_token, loaded.eos_tokens, loaded.max_length) == ([0], 0, (1,), 40)
    text = "Zwei Hunde, drei Männer: »Eis«!"
    assert loaded.tokenizer(text)["input_ids"] == random32.tokenizer(text)["input_ids"]
    # and without us: anyone's from_pretrained
    theirs = MarianMTModel.from_pretrained(tmp_path / "model")
    assert torch.equal(theirs.lm_head.weight, random32.model.lm_head.weight)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "model")) == random32.vocabulary


def test_loading_as_float64(random32, tmp_path: Path):
    random32.save(tmp_path / "model")
    loaded = load_policy(tmp_path / "model", dtype=torch.float64)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float64}
    # the positions are computed, not stored: float32 values or better
    weight = loaded.model.model.decoder.embed_positions.weight
    torch.testing.assert_close(weight.float(), random32.model.model.decoder.embed_positions.weight)


@pytest.fixture(scope="session")
def model_folder(random32, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    random32.save(folder)
    return folder


def edit_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def only_pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Canary(folder / "CANARY")))


class _Canary:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.write_text, (self.path, "pickle")


def remote_code(folder: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(folder / 'CANARY')!r}, 'w').close()\nclass Evil: pass\n")
    names = dict.fromkeys(("AutoConfig", "AutoModelForSeq2SeqLM", "AutoTokenizer"), "evil.Evil")
    edit_config(folder, model_type="evil", auto_map=names)


def half_of_the_weights(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def larger_tokenizer(folder: Path) -> None:
    texts = ["Ein ganz anderer Text, 1 2 3 4 5 6 7 8 9 0.", *(chr(i) for i in range(0x400, 0x4B0))]
    train_tokenizer(texts, 204, 40).save_pretrained(folder)


def no_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda folder: (folder / "config.json").unlink(), ["no config.json", "give a model folder"]),
        (lambda folder: (folder / "config.json").write_text("{"), ["no readable configuration", "save_pretrained"]),
        (lambda folder: edit_config(folder, model_type="t5"), ["'t5'", "supported here: marian"]),
        (lambda folder: edit_config(folder, model_type="nonsense"), ["nonsense", "save_pretrained"]),
        (only_pickled_weights, ["no readable safetensors weights", "model.safetensors"]),
        (half_of_the_weights, ["no readable safetensors weights", "model.safetensors"]),
        (remote_code, ["custom code", "save_pretrained"]),
        (lambda folder: edit_config(folder, decoder_layers=3), ["26 tensors", "layers.2.", "same save_pretrained"]),
        (lambda folder: edit_config(folder, decoder_layers=1), ["26 tensors", "layers.1.", "same save_pretrained"]),
        (lambda folder: edit_config(folder, d_model=64), ["of another size", "same save_pretrained"]),
        (larger_tokenizer, ["204 pieces", "vocabulary 160"]),
        (no_tokenizer, ["no readable tokenizer", "tokenizer's files"]),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), ["no readable tokenizer"]),
    ],
)
def test_wrong_folders_are_refused_by_name(model_folder, tmp_path, damage, parts):
    """26 tensors in a decoder layer: q, k, v, out of two attentions and two linear maps, 10 weights and 10 biases, and
    three norms with weight and bias."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    damage(folder)
    with pytest.raises(ValueError) as caught:
        load_policy(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder}: ")
    for part in parts:
        assert part in message
    assert "\n" not in message
    assert not (folder / "CANARY").exists()


def test_missing_folder_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere/model: no such folder. Give the folder of a Marian-type model"):
        load_policy(tmp_path / "nowhere" / "model")


def test_the_pickle_of_these_tests_would_run(tmp_path):
    """Or its canary would prove nothing."""
    (tmp_path / "model.safetensors").touch()
    only_pickled_weights(tmp_path)
    pickle.loads((tmp_path / "pytorch_model.bin").read_bytes())
    assert (tmp_path / "CANARY").read_text() == "pickle"
