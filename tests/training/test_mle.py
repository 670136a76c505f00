"""Maximum likelihood: the loss by hand, accumulation that changes nothing, batches that cover an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from run_helpers import NUM_TRAIN, bits, mle_config, steps_of
from torch import Tensor
from torch.nn import functional

from esrl import commands
from esrl.algorithm.log_probs import Projection
from esrl.data.batching import pad, token_batches
from esrl.data.examples import Example
from esrl.data.readers import DataConfig, load_examples
from esrl.errors import OutOfMemoryError
from esrl.evaluation.decode import DecodingConfig
from esrl.evaluation.development import Development
from esrl.models.adapters import LoraSettings, add_adapter
from esrl.models.seq2seq import load_policy
from esrl.training.mle import LikelihoodConfig, MLETask, smoothed_loss


@pytest.fixture(scope="module")
def examples(assets: Path) -> Sequence[Example]:
    return load_examples(DataConfig(path=str(assets / "train.jsonl"))).examples


def make_task(
    assets: Path,
    examples: Sequence[Example],
    dtype: torch.dtype = torch.float64,
    lora: LoraSettings | None = None,
    **config: Any,
) -> MLETask:
    policy = load_policy(assets / "model", dtype=dtype)
    if lora is not None:
        policy = add_adapter(policy, lora)
    return MLETask(policy, examples, LikelihoodConfig(**config), Development((), (), DecodingConfig()), seed=1)


def gradients(task: MLETask) -> dict[str, Tensor]:
    return {name: value.grad for name, value in task.model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_the_loss_of_one_pair_by_hand(assets, examples, smoothing):
    """sum over target tokens of (1 - e) * -log p(y_t) + e * mean over the vocabulary of -log p, by Hugging Face."""
    task = make_task(assets, examples[:1], label_smoothing=smoothing, dropout=0.0, batch_tokens=1000)
    update = task.compute(0, 0)
    policy = task.policy
    source = torch.tensor([task.sources[0]])
    target = torch.tensor([task.targets[0]])
    assert target[0, -1] in policy.eos_tokens
    inputs = torch.cat([torch.tensor([[policy.start_token]]), target[:, :-1]], 1)
    with torch.no_grad():
        logits = policy.model(input_ids=source, decoder_input_ids=inputs).logits
    log_probs = logits.log_softmax(-1)[0]
    expected = sum(
        -(1 - smoothing) * log_probs[t, token] - smoothing * log_probs[t].mean() for t, token in enumerate(target[0])
    )
    assert update.loss == pytest.approx(float(expected), rel=1e-12)
    assert update.denominator == target.shape[1] == update.metrics["tokens"]


def test_padding_takes_no_part(assets, examples):
    """The loss and gradient of a batch are the sums of those of its pairs, whose lengths differ."""
    together = make_task(assets, examples, dropout=0.0, batch_tokens=10**6, micro_batch_tokens=10**6)
    assert len(set(together.lengths)) > 3
    update = together.compute(0, 0)
    alone = make_task(assets, examples, dropout=0.0, batch_tokens=1)
    assert alone.num_batches(0) == NUM_TRAIN
    updates = [alone.compute(0, batch) for batch in range(NUM_TRAIN)]  # gradients add up
    assert update.loss == pytest.approx(sum(one.loss for one in updates), rel=1e-12)
    assert update.denominator == sum(one.denominator for one in updates)
    for name, gradient in gradients(together).items():
        assert torch.allclose(gradient, gradients(alone)[name], rtol=0, atol=1e-10), name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_micro_batches_do_not_change_the_gradient(assets, examples, dtype, tolerance):
    """Summed over about 400 target tokens: 1e-10 in float64; float32 has 1e-6 of gradients up to some tens."""
    found = []
    for tokens in (10**6, 120, 1):
        task = make_task(assets, examples, dtype, dropout=0.0, batch_tokens=10**6, micro_batch_tokens=tokens)
        update = task.compute(0, 0)
        found.append((update.loss, update.denominator, gradients(task)))
    for loss, denominator, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6) and denominator == found[0][1]
        for name, value in found[0][2].items():
            assert torch.allclose(gradient[name], value, rtol=1e-5, atol=tolerance), name


@pytest.mark.parametrize("whole", [(), ("final_layer_norm",)])
def test_adapters_get_the_gradient_of_pefts_own_forward(assets, examples, whole):
    """By cross_entropy over whole logits; the weights under the adapters get none."""
    torch.manual_seed(3)
    lora = LoraSettings(rank=2, alpha=4.0, modules_to_save=whole)
    task = make_task(assets, examples, lora=lora, dropout=0.0, batch_tokens=10**6, micro_batch_tokens=120)
    trained = {name: value for name, value in task.model.named_parameters() if value.requires_grad}
    assert all(".lora_" in name or ".final_layer_norm." in name for name in trained)
    for name, value in trained.items():
        if "lora_B" in name:  # 0 at first, and lora_A would get no gradient
            torch.nn.init.normal_(value, std=0.3)
    update = task.compute(0, 0)
    found = gradients(task)
    assert found.keys() == trained.keys() and all(float(value.abs().max()) > 0 for value in found.values())
    task.model.zero_grad(set_to_none=True)
    source, source_mask = pad(task.sources, task.policy.pad_token)
    target, target_mask = pad(task.targets, task.policy.pad_token)
    inputs = torch.cat([torch.full_like(target[:, :1], task.policy.start_token), target[:, :-1]], 1)
    logits = task.model(input_ids=source, attention_mask=source_mask, decoder_input_ids=inputs).logits
    smoothing = task.config.label_smoothing
    loss = functional.cross_entropy(
        logits[target_mask], target[target_mask], reduction="sum", label_smoothing=smoothing
    )
    loss.backward()
    assert update.loss == pytest.approx(float(loss.detach()), rel=1e-12) and smoothing > 0
    for name, expected in gradients(task).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-9, msg=name)


def test_dropout_is_on_where_it_is_asked_for(assets, examples):
    task = make_task(assets, examples, dropout=0.3, batch_tokens=10**6)
    losses = set()
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        losses.add(task.compute(0, 0).loss)
    assert len(losses) == 2  # the same seed gives the same loss
    task = make_task(assets, examples, dropout=0.0, batch_tokens=10**6)
    assert len({task.compute(0, 0).loss for _ in range(3)}) == 1


def test_the_loss_falls(assets, tmp_path):
    """From about ln 160 = 5.08 per token, smoothing aside, within 30 steps on the same 24 pairs."""
    run = tmp_path / "run"
    training = {"training": {"max_steps": 30, "num_epochs": False, "eval_steps": 100, "save_steps": 100}}
    optimizer = {"optimizer": {"learning_rate": 5e-3, "lr_scheduler": "constant"}}
    commands.mle(mle_config(assets, run, training, optimizer))
    losses = [row["loss"] for row in steps_of(run)]
    assert len(losses) == 30
    assert losses[0] > 5 and sum(losses[-5:]) / 5 < losses[0] - 1
    assert steps_of(run)[0].keys() == {
        *("step", "epoch", "tokens", "loss", "grad_norm", "learning_rate", "seconds_total", "peak_memory_mb")
    }


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    limit=st.integers(1, 100),
    epoch=st.integers(0, 3),
)
@settings(max_examples=100, deadline=None)
def test_token_batches_cover_the_epoch_once_within_the_limit(lengths, limit, epoch):
    batches = token_batches(lengths, limit, 7, epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert len(batch) * longest <= limit or len(batch) == 1  # a longer one stands alone


def test_an_epoch_sees_every_target_token_once_and_the_next_one_in_another_order(assets, examples):
    task = make_task(assets, examples, dropout=0.0, batch_tokens=150)
    total = sum(map(len, task.targets))
    orders = []
    for epoch in (0, 1):
        updates = [task.compute(epoch, batch) for batch in range(task.num_batches(epoch))]
        assert sum(update.denominator for update in updates) == total
        orders.append([update.denominator for update in updates])
    assert orders[0] != orders[1]


def test_from_scratch_the_start_is_kept_and_the_seed_decides(assets, tmp_path):
    model = {"model": {"path": False, "preset": "demo", "vocab_size": 150, "max_length": 90}}
    short = {"training": {"max_steps": 1, "num_epochs": False}}
    runs = {}
    for name, seed in (("one", 1), ("two", 2), ("again", 1)):
        run = tmp_path / name
        commands.mle(mle_config(assets, run, model, short, {"seed": seed}))
        start = load_policy(run / "start")
        assert (start.vocabulary, start.max_length) == (150, 90)
        runs[name] = ((run / "start" / "model.safetensors").read_bytes(), bits(run)["model.safetensors"])
    assert runs["one"] == runs["again"]
    assert runs["one"][0] != runs["two"][0] and runs["one"][1] != runs["two"][1]


def test_what_is_too_long_is_left_out_and_said(assets, tmp_path, capsys):
    lengths = sorted(make_task(assets, load_examples(DataConfig(path=str(assets / "train.jsonl"))).examples).lengths)
    limit = lengths[-4]  # leaves out those that are longer
    likelihood = {"likelihood": {"max_source_tokens": limit, "max_target_tokens": limit, "batch_tokens": 10**6}}
    commands.mle(mle_config(assets, tmp_path / "run", likelihood, {"training": {"max_steps": 1}}))
    kept = sum(length <= limit for length in lengths)
    assert f"{NUM_TRAIN - kept} examples skipped; {kept} of {NUM_TRAIN} examples left" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_tokens", 0), ("micro_batch_tokens", -1), ("label_smoothing", 1.0), ("dropout", -0.1), ("dropout", 1.0)],
)
def test_settings_out_of_bounds_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}; it must"):
        LikelihoodConfig(**{name: value})


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_chunked_loss_is_torchs_own(smoothing):
    """Value and gradients of cross_entropy over whole logits, which are never made here."""
    generator = torch.Generator().manual_seed(1)
    sizes = (7, 4), (11, 4), (11,)
    hidden, weight, bias = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    targets = torch.randint(11, (7,), generator=generator)
    found, expected = [], []
    for result, chunked in ((found, True), (expected, False)):
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
        if chunked:
            loss = smoothed_loss(leaves[0], targets, Projection(leaves[1], leaves[2]), smoothing)
        else:
            logits = functional.linear(*leaves)
            loss = functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
        loss.backward()
        result += [loss.detach(), *(leaf.grad for leaf in leaves)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_out_of_memory_halves_the_micro_batch_and_begins_the_step_again(assets, examples, monkeypatch):
    """24 examples at once, 12, 6, then 3: what had been added to the gradient by then is taken back."""
    at_once = {"dropout": 0.0, "batch_tokens": 10**6, "micro_batch_tokens": 10**6}
    whole, task = (make_task(assets, examples, **at_once) for _ in range(2))
    expected = whole.compute(0, 0)
    real = task._backward

    def backward(indices: Sequence[int]) -> tuple[float, int]:
        result = real(indices)
        if len(indices) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return result

    monkeypatch.setattr(task, "_backward", backward)
    update = task.compute(0, 0)
    assert update.loss == pytest.approx(expected.loss, rel=1e-12) and update.denominator == expected.denominator
    for name, gradient in gradients(whole).items():
        assert torch.allclose(gradient, gradients(task)[name], rtol=0, atol=1e-10), name
    # a resumed run goes on with what fits
    assert task.state_dict() == {"micro_batch_tokens": 3 * max(task.lengths)}
    whole.load_state_dict(task.state_dict())
    assert whole.state_dict() == task.state_dict()


def test_one_example_too_large_for_the_memory_is_an_error_of_its_own(assets, examples, monkeypatch):
    task = make_task(assets, examples, dropout=0.0, batch_tokens=10**6)
    failure: list[Exception] = [MemoryError()]

    def backward(indices: Sequence[int]) -> tuple[float, int]:
        raise failure[0]

    monkeypatch.setattr(task, "_backward", backward)
    with pytest.raises(OutOfMemoryError, match="out of memory with one example per micro-batch"):
        task.compute(0, 0)
    failure[0] = RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError, match="shapes do not match"):
        task.compute(0, 0)
