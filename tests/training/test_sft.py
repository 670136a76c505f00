"""Fine-tuning on answers: packing changes nothing but the time, a resumed run is the same run, the model learns."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from language_helpers import causal_model, examples, tokenizer
from peft import LoraConfig, get_peft_model
from run_helpers import bits, evaluations_of, steps_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from esrl.data.encoding import Encoder, PromptConfig
from esrl.errors import Interrupted
from esrl.training.loop import Loop
from esrl.training.loop_config import LoopConfig
from esrl.training.optimization import OptimizerConfig
from esrl.training.run_folder import RunFolder
from esrl.training.sft import SFTConfig, SFTTask, fill_batches, micro_batches

EXAMPLES = examples()


def make_task(kind: str = "llama", dtype: torch.dtype = torch.float64, **config: Any) -> SFTTask:
    encoder = Encoder(tokenizer(bos=True), PromptConfig())
    config = {"batch_tokens": 10**6} | config
    return SFTTask(causal_model(kind, dtype), encoder, EXAMPLES, SFTConfig(**config), 1, development=EXAMPLES[:3])


def gradients_of(task: SFTTask) -> dict[str, torch.Tensor]:
    return {name: value.grad for name, value in task.model.named_parameters()}


def test_the_loss_is_that_of_the_answer_tokens_alone_end_token_included():
    task = make_task()
    expected, count = 0.0, 0
    for prompt, answer in zip(task.prompts, task.answers, strict=True):
        assert answer[-1] == task.encoder.tokenizer.eos_token_id
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.no_grad():
            mean = task.model(input_ids=torch.tensor([prompt + answer]), labels=labels).loss
        expected += float(mean) * len(answer)
        count += len(answer)
    update = task.compute(0, 0)
    # Hugging Face takes its loss of logits in float32
    assert update.loss == pytest.approx(expected, rel=1e-6)
    assert update.denominator == count == update.metrics["tokens"]
    dev = task.evaluate()
    assert dev["dev_perplexity"] == pytest.approx(math.exp(-dev["dev_log_prob"]))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mamba"])
def test_rows_and_micro_batches_do_not_change_the_gradient(kind):
    whole = make_task(kind, row_tokens=0, micro_batch_tokens=10**6)
    assert whole.num_batches(0) == 1
    expected = whole.compute(0, 0)
    tolerance = 1e-5 if kind == "mamba" else 1e-9  # Mamba makes float32 of its logits
    for config in ({"row_tokens": 100}, {"row_tokens": 60, "micro_batch_tokens": 130}, {"micro_batch_tokens": 1}):
        task = make_task(kind, **config)
        update = task.compute(0, 0)
        assert update.loss == pytest.approx(expected.loss, rel=tolerance) and update.denominator == expected.denominator
        for name, value in gradients_of(task).items():
            torch.testing.assert_close(value, gradients_of(whole)[name], rtol=tolerance, atol=tolerance, msg=name)
        assert task.evaluate() == pytest.approx(whole.evaluate(), rel=tolerance)
        assert (task.warning is None) == (kind != "mamba")


def test_packing_leaves_less_padding():
    # 8 examples of 5 to 30 tokens; in one padded batch the longest decides
    padded = make_task(row_tokens=0).compute(0, 0).metrics["packed_share"]
    packed = make_task(row_tokens=64).compute(0, 0).metrics["packed_share"]
    assert padded < 0.7 < 0.85 < packed <= 1


@given(st.lists(st.integers(1, 40), max_size=40), st.integers(1, 120), st.integers(0, 90))
def test_micro_batches_hold_everything_once_within_the_limit(lengths, max_tokens, row_tokens):
    indices = list(range(0, len(lengths), 2))
    batches = micro_batches(lengths, indices, max_tokens, row_tokens)
    assert sorted(i for rows in batches for row in rows for i in row) == indices
    for rows in batches:
        longest = max(sum(lengths[i] for i in row) for row in rows)
        assert len(rows) * longest <= max_tokens or len(rows) == 1
        assert row_tokens or all(len(row) == 1 for row in rows)


def test_batches_are_filled_in_order():
    assert fill_batches([2, 0, 1, 3], [4, 9, 3, 5], 8) == [[2, 0], [1], [3]]  # 3 + 4; 9 stands alone; 5


def test_an_epoch_sees_every_answer_token_once_and_the_next_one_in_another_order():
    task = make_task(batch_tokens=40)
    orders = [[task.compute(epoch, b).denominator for b in range(task.num_batches(epoch))] for epoch in (0, 1)]
    assert sum(orders[0]) == sum(orders[1]) == sum(map(len, task.answers))
    assert orders[0] != orders[1] and len(orders[0]) > 3


def run_loop(folder: Path, task: SFTTask, steps: int = 6, resume: bool = False) -> Path:
    config = LoopConfig(max_steps=steps, eval_steps=2, save_steps=1, metric_for_best_model="dev_log_prob")
    run = RunFolder(folder, resume=resume)
    with run:
        Loop(task, config, OptimizerConfig(learning_rate=3e-3), run, 1, {}).run()
        run.write_json("result.json", {})
    return folder


def test_a_resumed_run_ends_with_the_same_bits_and_the_folder_is_plain(tmp_path):
    whole = run_loop(tmp_path / "whole", make_task(dtype=torch.float32, batch_tokens=60))
    task = make_task(dtype=torch.float32, batch_tokens=60)
    real, calls = task.compute, []

    def compute(epoch: int, batch: int) -> Any:
        calls.append(batch)
        if len(calls) == 4:
            raise Interrupted(15)
        return real(epoch, batch)

    task.compute = compute  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        run_loop(tmp_path / "parts", task)
    run_loop(tmp_path / "parts", make_task(dtype=torch.float32, batch_tokens=60), resume=True)
    assert bits(tmp_path / "parts") == bits(whole)
    model = AutoModelForCausalLM.from_pretrained(whole / "model")
    assert AutoTokenizer.from_pretrained(whole / "model").eos_token == "<eos>"
    assert set(model.state_dict()) == set(task.model.state_dict())


def test_the_model_learns_its_answers_by_heart(tmp_path):
    task = make_task(dtype=torch.float32)
    run = run_loop(tmp_path / "run", task, steps=40)
    assert steps_of(run)[-1]["loss"] < 0.3 < 3 < steps_of(run)[0]["loss"]
    assert evaluations_of(run)[-1]["dev_log_prob"] > -0.3
    task.model.eval()
    prompt, answer = task.prompts[3], task.answers[3]
    found = task.model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=20, eos_token_id=answer[-1])
    assert found[0, len(prompt) :].tolist() == answer


def test_adapters_are_trained_in_place_and_the_base_is_left_alone():
    """A fresh LoRA changes nothing, so the loss is the base model's; its gradient packed is that unpacked."""
    found = []
    for row_tokens in (0, 64):
        task = make_task(row_tokens=row_tokens)
        base = task.compute(0, 0).loss
        torch.manual_seed(1)
        model = get_peft_model(causal_model(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).double()
        task = SFTTask(model, task.encoder, EXAMPLES, task.config, 1)
        assert task.packs == (row_tokens > 0) and task.has_projection
        assert task.compute(0, 0).loss == pytest.approx(base, rel=1e-9)
        trained = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert trained and all("lora_" in name for name in trained)
        found.append(trained)
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-9, atol=1e-9, msg=name)


def test_dropout_is_on_where_it_is_asked_for():
    def losses(**config: Any) -> set[float]:
        task = make_task("gpt2", **config)
        found = set()
        for seed in (1, 2, 1):
            torch.manual_seed(seed)
            found.add(task.compute(0, 0).loss)
        return found

    assert len(losses(use_dropout=True)) == 2 and len(losses()) == 1


def test_out_of_memory_halves_the_micro_batch(monkeypatch):
    expected, task = make_task(), make_task()
    update = expected.compute(0, 0)
    real = task._backward

    def backward(bins: Any) -> tuple[float, float]:
        result = real(bins)
        if sum(len(row) for row in bins) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return result

    monkeypatch.setattr(task, "_backward", backward)
    assert task.compute(0, 0).loss == pytest.approx(update.loss, rel=1e-9)
    for name, value in gradients_of(expected).items():
        torch.testing.assert_close(gradients_of(task)[name], value, rtol=1e-9, atol=1e-9, msg=name)
    assert task.state_dict()["micro_batch_tokens"] < 60


@pytest.mark.parametrize(("name", "value"), [("batch_tokens", 0), ("micro_batch_tokens", 0), ("row_tokens", -1)])
def test_settings_out_of_bounds_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}; it must"):
        SFTConfig(**{name: value})


def test_an_example_without_an_answer_is_refused():
    encoder = Encoder(tokenizer(), PromptConfig())
    bare = [type(EXAMPLES[0])("x-0", {"source": "Hi"})]
    with pytest.raises(ValueError, match="example 1 has no reference"):
        SFTTask(causal_model(), encoder, bare, SFTConfig(), 1)
