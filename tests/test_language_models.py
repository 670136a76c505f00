"""Language models from start to finish, on real parts: fine-tuning, a reward model, RL by it, adapters, text."""

from __future__ import annotations

import json
import math
import shutil
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from esrl import building, commands
from esrl.cli import main
from esrl.config import METHODS, MLEConfig, RewardModelConfig, RLConfig
from esrl.data.arithmetic import ArithmeticConfig, make_arithmetic, write_examples
from esrl.data.encoding import PromptConfig
from esrl.data.readers import load_examples
from esrl.fingerprint import fingerprint
from esrl.models.adapters import has_adapter
from esrl.models.causal import CausalPolicy
from esrl.models.load import load_policy
from esrl.settings import build, merge
from esrl.training.checkpoint import unpack_tensors

sys.path.insert(0, str(Path(__file__).parent / "training"))
from run_helpers import bits, evaluations_of, json_lines, saved_state, steps_of, write_config

NUM_TRAIN, NUM_DEV = 48, 6
PROMPTS: dict[str, Any] = {"max_source_tokens": 24, "max_target_tokens": 8}
SHORT: dict[str, Any] = {"num_epochs": False, "max_steps": 2, "save_steps": 1, "eval_steps": 1}


@pytest.fixture(scope="module", autouse=True)
def no_report() -> Any:
    """A report takes longer than these runs; and the other tests keep their warnings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warnings, "formatwarning", warnings.formatwarning)  # which the command line changes
        patch.setattr("esrl.commands.write_report", lambda runs, path: path.touch() or path)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sums up to 40, and the right sums against wrong ones."""
    folder, config = tmp_path_factory.mktemp("data"), ArithmeticConfig(largest=20)
    for part, count in (("train", NUM_TRAIN), ("dev", NUM_DEV)):
        examples = make_arithmetic(count, 1, part, config)  # type: ignore[arg-type]
        write_examples(examples, folder / f"{part}.jsonl")
        rows = [(e.source, e.columns["reference"]) for e in examples]
        pairs = [{"prompt": s, "chosen": right, "rejected": str(int(right) + 1)} for s, right in rows]
        (folder / f"{part}-pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


def shared(data: Path, output: Path, kind: str = "") -> dict[str, Any]:
    return {
        "output_dir": str(output),
        "data": {"path": str(data / f"train{kind}.jsonl")},
        "development": {"data": {"path": str(data / f"dev{kind}.jsonl")}, "decoding": {"max_new_tokens": 4}},
        "prompts": PROMPTS,
        "training": SHORT,
    }


def mle_config(data: Path, output: Path, *changes: dict[str, Any]) -> MLEConfig:
    values = merge(
        shared(data, output),
        {
            "model": {"preset": "llama-tiny", "vocab_size": 40, "max_length": 48},
            "development": {"metrics": []},
            "sft": {"batch_tokens": 128},
        },
    )
    for change in changes:
        values = merge(values, change)
    return build(MLEConfig, values, "test")


def rl_config(data: Path, output: Path, model: Path, *changes: dict[str, Any]) -> RLConfig:
    values = merge(
        shared(data, output),
        {
            "model": str(model),
            "development": {"metrics": ["exact_match"]},
            "step": {"batch_size": 6},
            "allocation": {"max_samples": 3},
            "sampling": {"max_new_tokens": 4},
            "reward": {"names": ["exact_match"]},
            "training": {"metric_for_best_model": "dev_exact_match"},
        },
    )
    for change in changes:
        values = merge(values, change)
    return build(RLConfig, merge(METHODS[values.get("method", "esrl")], values), "test")


@pytest.fixture(scope="module")
def tuned(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "sft"
    result = commands.mle(mle_config(data, run))
    assert result.best_score is not None and result.best_score < 0  # a log-probability
    return run


@pytest.fixture(scope="module")
def judged(data: Path, tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `esrl reward-model`."""
    run = tmp_path_factory.mktemp("runs") / "reward"
    changes = {"model": str(tuned / "model"), "data": {"format": "preferences"}, "reward_model": {"batch_size": 16}}
    values = merge(merge(shared(data, run, "-pairs"), changes), {"development": {"data": {"format": "preferences"}}})
    assert main(["reward-model", str(write_config(run.parent / "reward-model.toml", values))]) == 0
    return run


def test_fine_tuning_goes_by_the_log_probability_where_nothing_is_decoded(tuned):
    scores = evaluations_of(tuned)
    assert [row["step"] for row in scores] == [0, 1, 2]
    for row in scores:
        assert row["dev_perplexity"] == pytest.approx(math.exp(-row["dev_log_prob"]))
        assert "dev_bleu" not in row
    assert scores[-1]["dev_log_prob"] > scores[0]["dev_log_prob"]
    assert steps_of(tuned)[0]["packed_share"] > 0.5
    # the start is kept, and what is exported is anybody's folder
    assert load_policy(tuned / "start").vocabulary == 40
    assert AutoModelForCausalLM.from_pretrained(tuned / "model").config.model_type == "llama"


def test_fine_tuning_decodes_for_the_metrics_it_is_given(data, tmp_path, tuned):
    changes = {
        "model": {"path": str(tuned / "model")},
        "development": {"metrics": ["exact_match"]},
        "training": {"max_steps": 1, "metric_for_best_model": "dev_exact_match"},
    }
    commands.mle(mle_config(data, tmp_path / "run", changes))
    assert {"dev_exact_match", "dev_log_prob"} <= evaluations_of(tmp_path / "run")[0].keys()


def test_a_resumed_fine_tuning_is_the_same_run(data, tmp_path, tuned):
    run = tmp_path / "run"
    commands.mle(mle_config(data, run, {"training": {"max_steps": 1}}))
    changes = {"resume": True, "sft": {"micro_batch_tokens": 2000, "row_tokens": 0}}  # which change no result
    commands.mle(mle_config(data, run, {"resume": True}))
    resumed, whole = bits(run), bits(tuned)
    for found in (resumed, whole):
        del found["model/tokenizer_config.json"]  # where it notes that the tokenizer came from a folder
    assert resumed == whole
    assert commands.mle(mle_config(data, run, changes)).already_complete


def test_micro_batches_are_held_where_they_decide_the_dropout_masks(data, tmp_path):
    for dropout in (False, True):
        config = mle_config(data, tmp_path, {"sft": {"use_dropout": dropout}})
        held = fingerprint(config, load_examples(config.data).examples)
        assert ("sft.micro_batch_tokens" in held) == ("sft.row_tokens" in held) == dropout


def test_a_model_without_dropout_is_trained_with_none(data, tmp_path, tuned):
    with pytest.raises(
        ValueError, match=r"sft.use_dropout is true, but this llama model's configuration has no dropou"
    ):
        commands.mle(mle_config(data, tmp_path / "run", {"sft": {"use_dropout": True}}))
    with pytest.raises(ValueError, match=r"dropout is 0.1, but model_type 'llama' has no dropout"):
        commands.rl(rl_config(data, tmp_path / "run", tuned / "model", {"gradient": {"dropout": 0.1}}))
    assert not (tmp_path / "run").exists()


def test_a_model_gets_the_dropout_of_its_configuration_back(tokenizer):
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=2, resid_pdrop=0.3, attn_pdrop=0.2)
    config.eos_token_id = config.bos_token_id = 1
    policy = CausalPolicy(GPT2LMHeadModel(config), tokenizer)
    assert {module.p for module in policy.model.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}
    building.own_dropout(policy)
    rates = {name: m.p for name, m in policy.model.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert rates["transformer.h.0.mlp.dropout"] == 0.3 and rates["transformer.h.0.attn.attn_dropout"] == 0.2


def test_an_answer_that_leaves_no_room_for_a_prompt_is_refused(data, tmp_path, tuned):
    with pytest.raises(ValueError, match="max_target_tokens is 48, but the model has 48 positions"):
        commands.mle(mle_config(data, tmp_path / "run", {"prompts": {"max_target_tokens": 48}}))
    with pytest.raises(ValueError, match="max_new_tokens is 48, but the model has 48 positions for prompt and answer"):
        commands.rl(rl_config(data, tmp_path / "run", tuned / "model", {"sampling": {"max_new_tokens": 48}}))


def test_prompts_leave_room_for_what_is_sampled(tuned):
    encoder = building.encoder_for(load_policy(tuned / "model"), PromptConfig(), 10)
    assert encoder is not None and encoder.config.max_source_tokens == 48 - 10


def test_a_reward_model_is_reported_on(judged):
    report = json.loads((judged / "reward_model.json").read_text())
    best = max(evaluations_of(judged), key=lambda row: row["dev_accuracy"])  # the first of equal ones
    assert report["pairs"] == NUM_DEV and len(report["bins"]) == 10
    assert report["accuracy"] == best["dev_accuracy"] and report["loss"] == pytest.approx(best["dev_loss"], rel=1e-5)
    assert [row["pairs"] for row in steps_of(judged)] == [16, 16]
    assert json.loads((judged / "model" / "esrl_reward.json").read_text())["max_target_tokens"] == 8


def test_a_reward_model_with_adapters_is_a_reward_as_any(data, tmp_path, tuned):
    changes = {"model": str(tuned / "model"), "data": {"format": "preferences"}, "reward_model": {"batch_size": 16}}
    values = merge(shared(data, tmp_path / "run", "-pairs"), changes)
    values = merge(values, {"development": {"data": {"format": "preferences"}}})
    file = str(write_config(tmp_path / "reward-model.toml", values))
    assert main(["reward-model", file, "--lora.rank", "2"]) == 0
    report = json.loads((tmp_path / "run" / "reward_model.json").read_text())
    best = max(evaluations_of(tmp_path / "run"), key=lambda row: row["dev_accuracy"])
    assert report["accuracy"] == best["dev_accuracy"] and report["loss"] == pytest.approx(best["dev_loss"], rel=1e-4)
    reward = {"reward": {"names": ["model"], "model": {"path": str(tmp_path / "run" / "model")}}, "method": "grpo"}
    commands.rl(rl_config(data, tmp_path / "rl", tuned / "model", reward))
    assert len({row["reward_mean"] for row in steps_of(tmp_path / "rl")}) == 2


def test_what_is_no_pair_is_refused(data, tmp_path, tuned):
    values = merge(shared(data, tmp_path / "run"), {"model": str(tuned / "model")})
    with pytest.raises(ValueError, match=r'data are no pairs .* set data.format = "preferences"'):
        commands.reward_model(build(RewardModelConfig, values, "test"))


METHOD_CHANGES: dict[str, dict[str, Any]] = {
    "esrl": {"capability": {"estimator": "entropy"}, "allocation": {"max_samples": 1, "eliminate": "prompts"}},
    "grpo": {"step": {"updates_per_batch": 2}},
    "rloo": {},
    "ppo": {"allocation": {"max_samples": 1}},
}


@pytest.mark.parametrize("method", METHOD_CHANGES)
def test_every_method_learns_from_a_reward_model(data, tmp_path, tuned, judged, method):
    reward = {"reward": {"names": ["model"], "model": {"path": str(judged / "model")}}, "method": method}
    result = commands.rl(rl_config(data, tmp_path, tuned / "model", reward, METHOD_CHANGES[method]))
    rows = steps_of(tmp_path)
    assert result.steps == len(rows) == 2 and math.isfinite(rows[0]["reward_mean"])
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert ("kl_mean" in rows[0]) == (method in ("rloo", "ppo"))
    assert isinstance(load_policy(result.model), CausalPolicy)


def test_verifiable_rewards_take_their_settings(data, tmp_path, tuned):
    names = {"names": ["exact_match", "gsm8k"], "exact_match": {"ignore_spaces": True}}
    commands.rl(rl_config(data, tmp_path, tuned / "model", {"method": "grpo", "reward": names}))
    assert all(0 <= row["reward_mean"] <= 2 for row in steps_of(tmp_path))
    metrics = commands._metrics(rl_config(data, tmp_path, tuned / "model", {"reward": names}).reward)
    assert "space:collapsed" in metrics[0].signature


def test_word_problems_by_the_number_an_answer_ends_in(tmp_path):
    """Files with GSM8K's columns through `esrl mle` and `esrl rl`, as configs/gsm8k has them. Half of the answers are 3
    and half are 7, so that a model which has learnt no more than that is right now and then."""
    rows = [{"question": f"Add {i} and {i}.", "answer": f"#### {(3, 7)[i % 2]}"} for i in range(NUM_TRAIN)]
    for part, some in (("train", rows), ("dev", rows[:NUM_DEV])):
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    formats = {"data": {"format": "gsm8k"}, "development": {"data": {"format": "gsm8k"}}}
    answers = {"prompts": {"max_target_tokens": 12}, "optimizer": {"learning_rate": 3e-3}}
    steps = {"training": {"max_steps": 20, "save_steps": 20, "eval_steps": 20}}
    commands.mle(mle_config(tmp_path, tmp_path / "sft", formats, answers, steps))
    changes = {
        "model": str(tmp_path / "sft" / "model"),
        "method": "grpo",
        "development": {"metrics": ["gsm8k"], "decoding": {"max_new_tokens": 12}},
        "step": {"batch_size": 6, "logged_prompts": NUM_TRAIN},
        "allocation": {"max_samples": 4},
        "sampling": {"max_new_tokens": 12},
        "reward": {"names": ["gsm8k"]},
        "training": {"metric_for_best_model": "dev_gsm8k"},
    }
    values = merge(merge(shared(tmp_path, tmp_path / "rl"), formats), changes)
    assert main(["rl", str(write_config(tmp_path / "rl.toml", values))]) == 0
    found = steps_of(tmp_path / "rl")
    assert len(found) == 2 and all(0 < row["reward_mean"] < 1 and row["grad_norm"] > 0 for row in found)
    assert [0 <= row["dev_gsm8k"] <= 100 for row in evaluations_of(tmp_path / "rl")] == [True] * 3
    lines, answer_of = json_lines(tmp_path / "rl" / "samples.jsonl"), {row["question"]: row["answer"] for row in rows}
    assert len(lines) == 12 and all(line["reference"] == answer_of[line["prompt"]] for line in lines)
    told = [(sample, line["reference"]) for line in lines for sample in line["samples"]]
    whole = [(each["text"] == right, each["reward"]) for each, right in told if each["text"][:-1] == "#### "]
    assert set(whole) == {(True, 1.0), (False, 0.0)}


def test_adapters_alone_are_trained_and_merge_into_a_plain_folder(data, tmp_path, tuned):
    """Their reference is the model without them: at the first step they change nothing, so the KL is 0."""
    lora = {"method": "rloo", "lora": {"rank": 2}, "optimizer": {"learning_rate": 0.1}, "reward": {"names": ["chrf"]}}
    last = {"development": {"data": False}}
    run, again = tmp_path / "run", tmp_path / "again"
    for folder in (run, again):
        commands.rl(rl_config(data, folder, tuned / "model", lora, last))
    assert bits(run) == bits(again)  # the seed decides the first weights of adapters, too
    kl = [row["kl_mean"] for row in steps_of(run)]
    assert kl[0] == pytest.approx(0, abs=1e-5) and kl[1] != kl[0]
    files = {path.name for path in (run / "model").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    assert main(["merge", str(run / "model"), str(tmp_path / "merged")]) == 0
    merged, adapted = load_policy(tmp_path / "merged"), load_policy(run / "model")
    assert has_adapter(adapted) and not has_adapter(merged)
    tokens = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        torch.testing.assert_close(merged.model(tokens).logits, adapted.model(tokens).logits, rtol=0, atol=1e-3)
    assert main(["merge", str(run / "model"), str(tmp_path / "merged")]) == 2  # it is there now
    assert main(["merge", str(tmp_path / "merged"), str(tmp_path / "twice")]) == 2  # no adapters


def adapters_config(data: Path, output: Path, model: Path, *changes: dict[str, Any]) -> RLConfig:
    lora = {"method": "ppo", "lora": {"rank": 2}, "optimizer": {"learning_rate": 0.02}, "reward": {"names": ["chrf"]}}
    return rl_config(data, output, model, lora, *changes)


def test_checkpoints_hold_what_is_trained_alone_and_resume_to_the_bit(data, tmp_path, tuned):
    commands.rl(adapters_config(data, tmp_path / "whole", tuned / "model"))
    commands.rl(adapters_config(data, tmp_path / "run", tuned / "model", {"training": {"max_steps": 1}}))
    first = saved_state(tmp_path / "run")
    commands.rl(adapters_config(data, tmp_path / "run", tuned / "model", {"resume": True}))
    assert bits(tmp_path / "run") == bits(tmp_path / "whole")
    names = unpack_tensors(first["model.safetensors"]).keys()
    assert {name.startswith("critic.") or ".lora_" in name for name in names} == {True}
    assert first["model.safetensors"] != saved_state(tmp_path / "run")["model.safetensors"]
    # rank 2 on widths of 256 and 768, times three with AdamW's two moments, against 3.2 million weights
    checkpoint = sum(len(value) for value in first.values() if isinstance(value, bytes))
    assert checkpoint < 0.1 * (tuned / "model" / "model.safetensors").stat().st_size


@pytest.mark.parametrize(("method", "precision", "updates"), [("rloo", "float32", 1), ("ppo", "bfloat16", 2)])
def test_all_weights_by_a_reward_model_resume_to_the_bit(data, tmp_path, tuned, judged, method, precision, updates):
    """The reference is a second copy of the start; the prompts come again, and answers that do keep their scores. PPO
    has a critic, and is interrupted between two updates from the same samples."""
    changes = {
        "method": method,
        "precision": precision,
        "reward": {"names": ["model"], "model": {"path": str(judged / "model"), "dtype": precision}},
        "data": {"path": str(data / "dev.jsonl")},  # six prompts, a batch
        "step": {"updates_per_batch": updates},
        "allocation": {"max_samples": 8, "fixed_temperature": 0.5},
        "optimizer": {"learning_rate": 1e-4},
        "training": {"max_steps": 2 * updates},
    }
    whole, run = tmp_path / "whole", tmp_path / "run"
    commands.rl(rl_config(data, whole, tuned / "model", changes))
    commands.rl(rl_config(data, run, tuned / "model", changes, {"training": {"max_steps": 1}}))
    first = saved_state(run)
    commands.rl(rl_config(data, run, tuned / "model", changes, {"resume": True}))
    assert bits(run) == bits(whole)
    rows, last = steps_of(run), saved_state(run)
    assert len(rows) == 2 * updates and rows[updates]["model_cached_share"] > 0.1 and rows[updates]["kl_mean"] != 0
    assert (first["state.json"]["task"]["experience"] is not None) == (updates > 1)
    before, after = (unpack_tensors(each["model.safetensors"]) for each in (first, last))
    trained = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert trained == after.keys() and ("critic.weight" in trained) == (method == "ppo")


def test_a_resumed_run_needs_the_weights_under_its_adapters(data, tmp_path, tuned):
    run, base = tmp_path / "run", tmp_path / "base"
    shutil.copytree(tuned / "model", base)
    commands.rl(adapters_config(data, run, base, {"training": {"max_steps": 1}}))
    weights = load_file(base / "model.safetensors")
    next(iter(weights.values())).view(-1)[5] += 1e-3
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"trained on top of weights of {base} .* those read from {base} now are oth"):
        commands.rl(adapters_config(data, run, base, {"resume": True}))
    moved = {"resume": True, "accept_changes": ["model"]}  # the same weights elsewhere will do
    assert commands.rl(adapters_config(data, run, tuned / "model", moved)).steps == 2


@pytest.mark.parametrize("part", ["reference", "reward model"])
def test_a_resumed_run_needs_the_reference_and_the_reward_model_it_began_with(data, tmp_path, tuned, judged, part):
    """Both are read from their folders again, and no checkpoint holds them."""
    run, base, judge = tmp_path / "run", tmp_path / "base", tmp_path / "judge"
    shutil.copytree(tuned / "model", base)
    shutil.copytree(judged / "model", judge)
    reward = {"reward": {"names": ["model"], "model": {"path": str(judge)}}}

    def config(*changes: dict[str, Any]) -> RLConfig:
        return rl_config(data, run, base, {"method": "rloo"}, reward, *changes)

    commands.rl(config({"training": {"max_steps": 1}}))
    folder, key = {"reference": (base, "reference.weights"), "reward model": (judge, "reward.model.files")}[part]
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).view(-1)[5] += 1e-3
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{key} was '[0-9a-f]+' when this run began"):
        commands.rl(config({"resume": True}))
    assert commands.rl(config({"resume": True, "accept_changes": [key]})).steps == 2


def test_fine_tuning_with_adapters(data, tmp_path, tuned):
    changes = {"model": {"path": str(tuned / "model")}, "lora": {"rank": 2}, "training": {"max_steps": 1}}
    result = commands.mle(mle_config(data, tmp_path / "run", changes))
    assert has_adapter(load_policy(result.model))
    with pytest.raises(ValueError, match="lora needs a trained model"):
        commands.mle(mle_config(data, tmp_path / "new", {"lora": {"rank": 2}}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="four bits are refused where there is no CUDA device")
def test_four_bits_are_refused_before_a_run_begins(data, tmp_path, tuned):
    model, lora = {"model": {"path": str(tuned / "model")}}, {"lora": {"load_in_4bit": True}}
    with pytest.raises(ValueError, match=r"load_in_4bit needs .*a CUDA device, missing here"):
        commands.mle(mle_config(data, tmp_path / "run", model, lora))
    with pytest.raises(ValueError, match=r"load_in_4bit needs .*a CUDA device, missing here"):
        commands.rl(rl_config(data, tmp_path / "run", tuned / "model", lora))
    assert not (tmp_path / "run").exists()
    values = merge(shared(data, tmp_path / "run"), {"model": str(tuned / "model"), **lora})
    with pytest.raises(ValueError, match="load_in_4bit is for esrl rl and mle"):
        build(RewardModelConfig, values, "test")


def test_models_that_a_run_needs_are_not_overwritten(data, tmp_path, tuned, judged):
    reward = {"reward": {"names": ["model"], "model": {"path": str(judged / "model")}}, "overwrite": True}
    with pytest.raises(ValueError, match=r"reward.* lies in .* which --overwrite deletes"):
        commands.rl(rl_config(data, judged, tuned / "model", reward))


def test_generate_and_evaluate_ask_a_causal_model(data, tmp_path, tuned, capsys):
    model, output = str(tuned / "model"), tmp_path / "answers.jsonl"
    words = ["--max-new-tokens", "4"]
    assert main(["generate", model, "--input", str(data / "dev.jsonl"), "--output", str(output), *words]) == 0
    rows, asked = json_lines(output), json_lines(data / "dev.jsonl")
    assert [row["source"] for row in rows] == [row["source"] for row in asked]
    lines = [row["answer"] for row in rows]
    policy = load_policy(model)
    for row, line in zip(asked, lines, strict=True):
        ids = torch.tensor([policy.tokenizer(row["source"], add_special_tokens=False)["input_ids"]])
        found = policy.model.generate(ids, do_sample=False, max_new_tokens=4, bad_words_ids=[[0]])
        assert policy.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True) == line
    capsys.readouterr()
    source = ["--source", str(data / "dev.jsonl"), "--metrics", "exact_match", "--json"]
    assert main(["evaluate", model, *source, *words]) == 0
    right = sum(row["reference"] == line.strip() for row, line in zip(asked, lines, strict=True))
    assert json.loads(capsys.readouterr().out)["exact_match"]["score"] == pytest.approx(100 * right / NUM_DEV)


def test_outputs_end_where_samples_do(data, tmp_path, tuned):
    """By a flag on the command line; on the development set of RL by what ends the samples, or its own."""
    output, answers = tmp_path / "answers.jsonl", []
    words = ["generate", str(tuned / "start"), "--input", str(data / "dev.jsonl"), "--output", str(output)]
    stop = "never"
    for _ in range(2):
        assert main([*words, "--max-new-tokens", "8", "--stop-strings", "zz", stop]) == 0
        answers.append([row["answer"] for row in json_lines(output)])
        stop = Counter("".join(text[1:] for text in answers[0])).most_common(1)[0][0]
    assert answers[1] == [text.partition(stop)[0] for text in answers[0]]
    assert answers[1] != answers[0]
    stops = {"step": {"stop_strings": ["1"]}}
    own = {"development": {"decoding": {"stop_strings": ["2"]}}}
    for changes, expected in (([], ()), ([stops], ("1",)), ([stops, own], ("2",))):
        with commands.make_rl_task(rl_config(data, tmp_path, tuned / "model", *changes)) as task:
            assert task.development.decoding.stop_strings == expected
