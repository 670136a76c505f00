"""Reward models: the loss by hand, runs that resume to the bit, plain folders, every kind of classifier."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from language_helpers import VOCABULARY, causal_model, classifier, preferences, tokenizer
from run_helpers import bits, evaluations_of, steps_of
from tokenizer_helpers import bert_like
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    MarianConfig,
    MarianMTModel,
    RobertaConfig,
    RobertaForMaskedLM,
    pipeline,
)

from esrl.data.encoding import PromptConfig
from esrl.data.examples import Example, number_examples
from esrl.data.preferences import collate, score_encoder
from esrl.errors import Interrupted
from esrl.models.adapters import LoraSettings
from esrl.rewards.loading import load_reward_model
from esrl.training.loop import Loop
from esrl.training.loop_config import LoopConfig
from esrl.training.optimization import OptimizerConfig
from esrl.training.reward_model import (
    SETTINGS,
    PairwiseConfig,
    RewardModelTask,
    load_classifier,
    pairwise_loss,
    rewards_of,
    score_rows,
    set_padding,
)
from esrl.training.run_folder import RunFolder

PAIRS = preferences()


def make_task(
    kind: str = "llama",
    dtype: torch.dtype = torch.float64,
    pad: bool = True,
    examples: list[Example] = PAIRS,
    **config: Any,
) -> RewardModelTask:
    words = tokenizer(bos=True, pad=pad)
    encoder = score_encoder(words, PromptConfig())
    settings = PairwiseConfig(**config)
    return RewardModelTask(classifier(kind, dtype), words, encoder, examples, settings, 1, development=PAIRS[:5])


def gradients_of(task: RewardModelTask) -> dict[str, torch.Tensor]:
    return {name: value.grad for name, value in task.model.named_parameters()}


def test_the_loss_by_hand():
    # differences 2 and -1, less a margin of 0.5; sums 4 and 3
    chosen, rejected = torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0])
    expected = math.log1p(math.exp(-1.5)) + math.log1p(math.exp(1.5)) + 0.1 * (16 + 9)
    assert float(pairwise_loss(chosen, rejected, 0.5, 0.1)) == pytest.approx(expected, rel=1e-6)
    assert float(pairwise_loss(chosen, rejected)) == pytest.approx(math.log1p(math.exp(-2)) + math.log1p(math.e))


def alone(task: RewardModelTask, fields: dict[str, list[int]]) -> torch.Tensor:
    """A reward by Hugging Face, without a batch."""
    return task.model(**{name: torch.tensor([ids]) for name, ids in fields.items()}).logits[0, 0]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "phi"])
@pytest.mark.parametrize("pad", [True, False])
def test_a_step_is_the_sum_over_pairs_scored_alone(kind, pad, gradients):
    """Batched by length and padded, with and without a PAD token of the tokenizer's own."""
    examples = [Example(e.id, e.columns | {"gap": str(i / 4)}) for i, e in enumerate(PAIRS)]
    config = {"margin": 0.25, "margin_column": "gap", "centering": 0.02, "micro_batch_tokens": 200}
    task = make_task(kind, pad=pad, examples=examples, **config)
    assert task.num_batches(0) == 1 and len(task._split(range(8), 200)) > 2

    def by_hand() -> float:
        total = torch.zeros((), dtype=torch.float64)
        for i, (c, r) in enumerate(zip(task.chosen, task.rejected, strict=True)):
            one, two = alone(task, c), alone(task, r)
            total = total - torch.nn.functional.logsigmoid(one - two - 0.25 - i / 4) + 0.02 * (one + two) ** 2
        total.backward()
        return float(total.detach())

    losses = []
    expected = gradients(task.model, lambda: losses.append(by_hand()))
    update = task.compute(0, 0)
    assert update.loss == pytest.approx(losses[0], rel=1e-9) and update.denominator == 8
    for name, value in expected.items():
        torch.testing.assert_close(gradients_of(task)[name], value, rtol=1e-8, atol=1e-8, msg=name)


def test_without_pad_the_score_stands_at_the_answers_last_token():
    task = make_task(pad=False)
    assert task.encoder.pad_token == task.tokenizer.eos_token_id == task.model.config.pad_token_id
    (row,) = task.encoder.encode(PAIRS[:1], ["Hello there!"])
    with torch.no_grad():
        states = task.model.model(torch.tensor([row["input_ids"]])).last_hidden_state[0]
        expected = task.model.score(states)[-2, 0]  # the last is the end token
        padded = collate([row, {"input_ids": row["input_ids"] * 2}], task.encoder.pad_token)
        assert float(rewards_of(task.model, padded)[0]) == pytest.approx(float(expected), rel=1e-9)


def test_the_report_is_of_rewards_without_dropout():
    task = make_task("gpt2", use_dropout=True, micro_batch_tokens=40)
    task.model.train()
    report = task.report()
    assert task.model.training  # the mode is as it was
    task.model.eval()
    with torch.no_grad():
        chosen = [float(alone(task, row)) for row in task.chosen[:5]]
        rejected = [float(alone(task, row)) for row in task.rejected[:5]]
    assert report is not None and report.pairs == 5
    assert report.margin == pytest.approx((sum(chosen) - sum(rejected)) / 5, rel=1e-9)
    assert report.accuracy == sum(c > r for c, r in zip(chosen, rejected, strict=True)) / 5
    assert task.evaluate()["dev_length_accuracy"] == report.length_accuracy
    assert score_rows(task.model, task.chosen[:5], task.encoder.pad_token, 1) == pytest.approx(chosen, rel=1e-9)


def run_loop(folder: Path, task: RewardModelTask, steps: int = 6, resume: bool = False) -> Path:
    config = LoopConfig(max_steps=steps, eval_steps=2, save_steps=1, metric_for_best_model="dev_accuracy")
    run = RunFolder(folder, resume=resume)
    with run:
        Loop(task, config, OptimizerConfig(learning_rate=3e-3), run, 1, {}).run()
        run.write_json("result.json", {})
    return folder


@pytest.mark.parametrize("dropout", [False, True])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, dropout):
    def task() -> RewardModelTask:
        return make_task("gpt2", torch.float32, batch_size=3, use_dropout=dropout)

    whole = run_loop(tmp_path / "whole", task())
    part = task()
    real, calls = part.compute, []

    def compute(epoch: int, batch: int) -> Any:
        calls.append(batch)
        if len(calls) == 5:
            raise Interrupted(15)
        return real(epoch, batch)

    part.compute = compute  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        run_loop(tmp_path / "parts", part)
    run_loop(tmp_path / "parts", task(), resume=True)
    assert bits(tmp_path / "parts") == bits(whole)
    rows = steps_of(whole)
    assert [row["pairs"] for row in rows] == [3, 3, 2] * 2 and all(0 <= row["accuracy"] <= 1 for row in rows)


def test_it_learns_and_its_folder_is_plain(tmp_path):
    """Right answers against wrong ones; then anybody's classifier code gives the same score."""
    task = make_task(dtype=torch.float32, pad=False)
    run = run_loop(tmp_path / "run", task, steps=20)
    assert steps_of(run)[-1]["loss"] < 0.1 and evaluations_of(run)[-1]["dev_accuracy"] == 1.0
    folder = run / "model"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    words = AutoTokenizer.from_pretrained(folder)
    assert model.config.num_labels == 1 and model.config.pad_token_id == words.pad_token_id == words.eos_token_id
    best = load_classifier(folder, seed=9)[0]  # a trained head is not made anew
    text = "Say hello.Hello there!<eos>"
    classify = pipeline("text-classification", model=model, tokenizer=words, function_to_apply="none")
    (row,) = task.encoder.encode(PAIRS[1:2], ["Hello there!"])
    with torch.no_grad():
        expected = float(best(torch.tensor([row["input_ids"]])).logits[0, 0])
    assert classify(text)[0]["score"] == pytest.approx(expected, rel=1e-5)
    settings = json.loads((folder / SETTINGS).read_text())
    assert PromptConfig(**settings) == task.encoder.config


def test_an_encoder_is_trained_on_pairs():
    words = bert_like()
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    config.num_labels = 1
    torch.manual_seed(1)
    model = BertForSequenceClassification(config).double()
    rows = [("a b", "c", "d"), ("c a b d", "e f", "g"), ("b", "a b c", "h a")]
    pairs = list(number_examples({"source": s, "reference": c, "rejected": r} for s, c, r in rows))
    task = RewardModelTask(model, words, score_encoder(words, PromptConfig()), pairs, PairwiseConfig(), 1)
    update = task.compute(0, 0)
    total = 0.0
    with torch.no_grad():
        for source, chosen, rejected in rows:
            scores = [model(**words(source, answer, return_tensors="pt")).logits[0, 0] for answer in (chosen, rejected)]
            total -= float(torch.nn.functional.logsigmoid(scores[0] - scores[1]))
    assert update.loss == pytest.approx(total, rel=1e-9)
    assert task.evaluate() == {}


def save(folder: Path, model: Any, words: Any) -> Path:
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def test_a_language_model_gets_a_head_that_the_seed_decides(tmp_path):
    folder = save(tmp_path, causal_model(dtype=torch.float32), tokenizer(bos=True))
    before = torch.get_rng_state()
    one, again, other = (load_classifier(folder, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert one.score.weight.shape == (1, 32)
    assert torch.equal(one.score.weight, again.score.weight) and not torch.equal(one.score.weight, other.score.weight)
    assert torch.equal(one.model.embed_tokens.weight, other.model.embed_tokens.weight)


def test_two_labels_and_models_without_a_classifier_are_refused(tmp_path):
    model = classifier(dtype=torch.float32)
    model.config.num_labels = 2
    model.score = torch.nn.Linear(32, 2, bias=False)
    save(tmp_path / "two", model, tokenizer())
    with pytest.raises(ValueError, match="two classifies into 2 labels, but a reward model gives one score; start"):
        load_classifier(tmp_path / "two", 1)
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 1, "decoder_attention_heads": 1, "vocab_size": 310, "pad_token_id": 0}
    save(tmp_path / "marian", MarianMTModel(MarianConfig(**sizes, **heads, decoder_start_token_id=0)), tokenizer())
    with pytest.raises(ValueError, match="marian models have no classifier"):
        load_classifier(tmp_path / "marian", 1)
    with pytest.raises(ValueError, match="no model folder"):
        load_classifier(tmp_path / "nothing", 1)


def adapted_task(folder: Path, **settings: Any) -> RewardModelTask:
    """The pairwise step with adapters on a folder's model."""
    model, words = load_classifier(folder, 1, torch.float32, LoraSettings(rank=2, **settings))
    encoder = score_encoder(words, PromptConfig())
    return RewardModelTask(model, words, encoder, PAIRS, PairwiseConfig(batch_size=3), 1, development=PAIRS[:5])


@pytest.fixture
def language_model(tmp_path) -> Path:
    return save(tmp_path / "language-model", causal_model(dtype=torch.float32), tokenizer(bos=True))


@pytest.fixture
def encoder_model(tmp_path) -> Path:
    words = tokenizer(bos=True)
    words.cls_token, words.sep_token = words.bos_token, words.eos_token
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(1)
    model = RobertaForMaskedLM(RobertaConfig(vocab_size=VOCABULARY, pad_token_id=words.pad_token_id, **sizes))
    return save(tmp_path / "encoder", model, words)


def start_of(folder: Path, task: RewardModelTask) -> Any:
    """What the adapters were put on."""
    model = load_classifier(folder, 1)[0]
    set_padding(model, task.tokenizer, task.encoder.pad_token)
    return model


def scores_of(task: RewardModelTask, model: Any = None) -> list[float]:
    return score_rows(model or task.model, task.chosen, task.encoder.pad_token, 500)


def trained_by_a_step(task: RewardModelTask) -> set[str]:
    task.compute(0, 0)
    reached = {name for name, p in task.model.named_parameters() if p.grad is not None}
    assert reached == {name for name, p in task.model.named_parameters() if p.requires_grad}
    return reached


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_adapters_and_the_head_are_trained_and_the_rest_is_left_alone(kind, tmp_path):
    folder = save(tmp_path, causal_model(kind, torch.float32), tokenizer(bos=True))
    task = adapted_task(folder)
    assert scores_of(task) == pytest.approx(scores_of(task, start_of(folder, task)))  # the same head, adapters of 0
    trained = trained_by_a_step(task)
    head = "base_model.model.score.modules_to_save.default.weight"
    assert head in trained and len(trained) > 5 and all("lora_" in name for name in trained - {head})


def test_an_encoders_new_head_is_trained_whole(encoder_model):
    trained = trained_by_a_step(adapted_task(encoder_model))
    head = {name for name in trained if "lora_" not in name}
    layers = {f"classifier.modules_to_save.default.{part}" for part in ("dense", "out_proj")}
    assert head == {f"base_model.model.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert any("roberta.encoder.layer.1.attention.self.query.lora_A" in name for name in trained)


def test_what_an_encoders_folder_lacks_is_trained_whole(tmp_path):
    words = bert_like()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    folder = save(tmp_path, BertForMaskedLM(BertConfig(vocab_size=len(words), **sizes)), words)
    trained = trained_by_a_step(adapted_task(folder))
    whole = {name.partition(".modules_to_save")[0] for name in trained if "lora_" not in name}
    assert whole == {"base_model.model.classifier", "base_model.model.bert.pooler.dense"}


@pytest.mark.parametrize("kind", ["language_model", "encoder_model"])
def test_a_run_with_adapters_resumes_to_the_bit_and_its_folder_is_plain(kind, tmp_path, request):
    folder = request.getfixturevalue(kind)
    whole = run_loop(tmp_path / "whole", adapted_task(folder))
    run_loop(tmp_path / "parts", adapted_task(folder), steps=4)
    task = adapted_task(folder)
    run_loop(tmp_path / "parts", task, resume=True)
    assert bits(tmp_path / "parts") == bits(whole)
    (tmp_path / "exported").mkdir()
    task._export(tmp_path / "exported")
    files = {path.name for path in (tmp_path / "exported").iterdir()}
    assert "model.safetensors" in files and "adapter_model.safetensors" not in files
    read, _, _ = load_reward_model(tmp_path / "exported", torch.float32, torch.device("cpu"))
    start = start_of(folder, task)
    assert [(n, p.shape) for n, p in read.named_parameters()] == [(n, p.shape) for n, p in start.named_parameters()]
    assert scores_of(task, read) == pytest.approx(scores_of(task), rel=1e-4, abs=1e-5)
    assert scores_of(task, read) != pytest.approx(scores_of(task, start), rel=1e-2, abs=1e-3)


def test_wrong_adapters_are_refused(language_model, tmp_path):
    with pytest.raises(ValueError, match=r"lora names 'pooler', and this llama model has no such module"):
        adapted_task(language_model, modules_to_save=("pooler",))
    with pytest.raises(ValueError, match="lora names 'query', and this llama model"):
        adapted_task(language_model, target_modules=("query",))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"this holds adapters, no whole model; join them .*esrl merge"):
        load_classifier(tmp_path, 1)


def test_what_is_no_preference_is_refused():
    bare = list(number_examples([{"source": "Hi", "reference": "Hello"}]))
    with pytest.raises(ValueError, match=r'example 1 is no preference.*data.format = "preferences"'):
        make_task(examples=bare)


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 0), ("micro_batch_tokens", 0), ("margin", -0.1), ("centering", float("nan"))],
)
def test_settings_out_of_bounds_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}; it must"):
        PairwiseConfig(**{name: value})
