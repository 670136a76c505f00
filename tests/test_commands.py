"""`esrl mle` and `esrl rl` as functions: what is refused and when, what --overwrite and --resume leave of a run."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from esrl import commands
from esrl.apply import EvaluateConfig, MergeConfig, evaluate, merge
from esrl.data.readers import load_examples
from esrl.errors import LockedError, StorageError
from esrl.evaluation.decode import DecodingConfig
from esrl.fingerprint import fingerprint
from esrl.models.adapters import has_adapter
from esrl.models.load import load_policy
from esrl.training.checkpoint import unpack_tensors
from esrl.training.lock import RunLock

sys.path.insert(0, str(Path(__file__).parent / "training"))
from run_helpers import bits, every_file, make_assets, mle_config, rl_config, saved_state, steps_of

SHORT: dict[str, Any] = {
    "training": {"max_steps": 2, "num_epochs": False, "save_steps": 1},
    "development": {"data": False},
}
ADAPTERS: dict[str, Any] = {
    "lora": {"rank": 2},
    "optimizer": {"learning_rate": 0.02},
    "training": {"max_steps": 3, "num_epochs": False, "eval_steps": 1, "save_steps": 1},
}
ENDLESS: dict[str, Any] = {
    "optimizer": {"lr_scheduler": "linear"},
    "training": {"max_steps": False, "max_seconds": 1.0},
}


def longer(steps: int, **changes: Any) -> dict[str, Any]:
    return {"training": {"max_steps": steps}, "resume": True, **changes}


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report takes longer than these runs."""
    monkeypatch.setattr("esrl.commands.write_report", lambda runs, path: path.touch() or path)


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_assets(tmp_path_factory.mktemp("assets"))


@pytest.fixture(scope="module")
def two_steps(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("esrl.commands.write_report", lambda runs, path: path.touch() or path)
        commands.rl(rl_config(assets, folder, SHORT))
    return folder


@pytest.fixture
def finished(two_steps: Path, tmp_path: Path) -> Path:
    """A copy of a run of two steps."""
    return Path(shutil.copytree(two_steps, tmp_path / "run"))


FAULTS: dict[str, dict[str, Any]] = {
    "no data": {"data": {"path": "nosuch.jsonl"}},
    "no model": {"model": "nosuch/at/all"},
    "no reward": {"reward": {"names": ["nosuch.py:reward"]}},
    "a schedule without an end": ENDLESS,
}


@pytest.mark.parametrize("name", FAULTS)
def test_an_overwrite_that_cannot_begin_leaves_the_old_run(assets, finished, name):
    before = every_file(finished)
    with pytest.raises(ValueError):
        commands.rl(rl_config(assets, finished, SHORT, FAULTS[name], {"overwrite": True}))
    assert every_file(finished) == before


def test_a_run_that_cannot_begin_leaves_no_folder(assets, tmp_path):
    with pytest.raises(ValueError, match="falls to 0 at the last step"):
        commands.rl(rl_config(assets, tmp_path / "rl", SHORT, ENDLESS))
    new = {"model": {"path": False, "preset": "demo", "vocab_size": 160, "max_length": 80}}
    with pytest.raises(ValueError, match="falls to 0 at the last step"):
        commands.mle(mle_config(assets, tmp_path / "mle", SHORT, ENDLESS, new))
    assert list(tmp_path.iterdir()) == []


def test_a_budget_of_sampled_tokens_ends_a_run_that_samples_and_is_refused_elsewhere(assets, tmp_path):
    budget: dict[str, Any] = {"training": {"num_epochs": False, "max_sampled_tokens": 301}}
    commands.rl(rl_config(assets, tmp_path / "rl", {"development": {"data": False}}, budget))
    drawn = [step["tokens_sampled"] for step in steps_of(tmp_path / "rl")]
    # a step draws 6 x (4 + 1) x 10 at most
    assert len(drawn) > 1 and sum(drawn[:-1]) < 301 <= sum(drawn)
    with pytest.raises(ValueError, match="only `esrl rl` samples"):
        commands.mle(mle_config(assets, tmp_path / "mle", budget))
    assert [path.name for path in tmp_path.iterdir()] == ["rl"]


def test_overwriting_begins_anew(assets, finished):
    (finished / "stray").touch()
    result = commands.rl(rl_config(assets, finished, SHORT, {"overwrite": True, "training": {"max_steps": 1}}))
    assert (result.steps, len(steps_of(finished))) == (1, 1)
    assert not (finished / "stray").exists()


def test_a_model_is_not_overwritten_by_what_starts_from_it(assets, finished):
    before = every_file(finished)
    model = str(finished / "model")
    with pytest.raises(ValueError, match=r"lies in .* which --overwrite deletes"):
        commands.rl(rl_config(assets, finished, SHORT, {"overwrite": True, "model": model}))
    with pytest.raises(ValueError, match=r"lies in .* which --overwrite deletes"):
        commands.mle(mle_config(assets, finished, SHORT, {"overwrite": True, "model": {"path": model}}))
    assert every_file(finished) == before


def test_what_can_be_refused_at_once_is_refused_before_the_data_are_read(assets, finished, monkeypatch):
    monkeypatch.setattr("esrl.commands.load_examples", lambda data: pytest.fail("the data were read"))
    with pytest.raises(ValueError, match="Continue that run with --resume"):
        commands.rl(rl_config(assets, finished, SHORT))
    with pytest.raises(ValueError, match="resume and overwrite exclude each other"):
        commands.rl(rl_config(assets, finished, SHORT, {"resume": True, "overwrite": True}))
    wrong = {"development": {"data": {"path": "dev.jsonl"}}, "training": {"metric_for_best_model": "dev_bleu"}}
    with pytest.raises(ValueError, match="metric_for_best_model is 'dev_bleu'"):
        commands.rl(rl_config(assets, finished, SHORT, wrong, {"resume": True}))
    with RunLock(finished), pytest.raises(LockedError):
        commands.rl(rl_config(assets, finished, SHORT, {"overwrite": True}))
    with RunLock(finished):
        pass  # none of the refused ones holds it


def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew(assets, finished):
    shutil.rmtree(finished / "checkpoints")
    before = every_file(finished)
    with pytest.raises(StorageError, match=r"checkpoints are gone.*--overwrite"):
        commands.rl(rl_config(assets, finished, SHORT, {"resume": True}))
    assert every_file(finished) == before


def test_a_run_extended_and_killed_before_its_result_gets_the_new_one(assets, finished, monkeypatch):
    def steps() -> int:
        return int(json.loads((finished / "result.json").read_bytes())["steps"])

    config = rl_config(assets, finished, SHORT, longer(3))
    with monkeypatch.context() as killed:
        killed.setattr("esrl.commands._finish", lambda *_: None)
        assert commands.rl(config).steps == 3
    assert steps() == 2
    assert commands.rl(config).already_complete
    assert steps() == 3


def test_what_changes_no_result_may_change(assets, finished):
    changes = {
        "sampling": {"max_cache_tokens": 500, "compaction_share": 0.5},
        "gradient": {"micro_batch_tokens": 40, "max_prompt_tokens": 999},
        "reward": {"timeout_seconds": 60.0, "max_abstain_share": 1.0},
        "step": {"logged_prompts": 1},
    }
    assert commands.rl(rl_config(assets, finished, SHORT, longer(3, **changes))).steps == 3


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_micro_batch_s_size_is_held_where_it_decides_the_dropout_masks(assets, tmp_path, dropout):
    config = rl_config(assets, tmp_path, {"gradient": {"dropout": dropout}})
    held = fingerprint(config, load_examples(config.data).examples)
    assert ("gradient.micro_batch_tokens" in held) == (dropout > 0)
    assert "gradient.max_logits" not in held and "objective.alpha" in held
    config = mle_config(assets, tmp_path, {"likelihood": {"dropout": dropout}})
    held = fingerprint(config, load_examples(config.data).examples)
    assert ("likelihood.micro_batch_tokens" in held) == (dropout > 0)


def test_an_accepted_change_holds_from_then_on(assets, finished, capsys):
    alpha = {"objective": {"alpha": 0.1}}
    with pytest.raises(ValueError, match=r"objective.alpha was 0.005 when this run began and is 0.1 now"):
        commands.rl(rl_config(assets, finished, SHORT, alpha, longer(3)))
    with pytest.raises(ValueError, match=r"accept_changes names 'objective.alfa' \(nearest: \"objective.alpha\"\)"):
        commands.rl(rl_config(assets, finished, SHORT, alpha, longer(3, accept_changes=["objective.alfa"])))
    with pytest.raises(ValueError, match=r"objective.alpha was 0.005"):
        commands.rl(rl_config(assets, finished, SHORT, alpha, longer(3, accept_changes=["seed"])))
    capsys.readouterr()
    commands.rl(rl_config(assets, finished, SHORT, alpha, longer(3, accept_changes=["objective.alpha"])))
    assert "accepted: objective.alpha was 0.005 and is 0.1 from here on" in capsys.readouterr().err
    assert "accept_changes" not in (finished / "config.toml").read_text()
    assert commands.rl(rl_config(assets, finished, SHORT, alpha, longer(4))).steps == 4
    with pytest.raises(ValueError, match=r"objective.alpha was 0.1"):
        commands.rl(rl_config(assets, finished, SHORT, longer(5)))


def test_fewer_data_begin_the_next_epoch(assets, finished):
    """Two of four batches of 6 were done; of 6 examples there is one batch, so what comes next is epoch 1."""
    changes = longer(4, accept_changes=["data"], data={"limit": 6})
    commands.rl(rl_config(assets, finished, SHORT, changes))
    assert [row["epoch"] for row in steps_of(finished)] == [0.25, 0.5, 2.0, 3.0]


def test_a_tracker_that_is_not_installed_is_refused(assets, tmp_path, monkeypatch):
    monkeypatch.setattr("esrl.commands.get_available_trackers", list)
    with pytest.raises(ValueError, match="report_to names 'tensorboard', whose package is not installed"):
        commands.rl(rl_config(assets, tmp_path / "run", SHORT, {"report_to": ["tensorboard"]}))
    assert not (tmp_path / "run").exists()


def test_adapters_of_an_encoder_decoder_are_trained_and_taken_up_again(assets, tmp_path):
    lora = {"lora": {"rank": 2}, "objective": {"kl_coefficient": 0.1}}
    commands.rl(rl_config(assets, tmp_path, SHORT, lora))
    assert (tmp_path / "model" / "adapter_model.safetensors").is_file()
    assert commands.rl(rl_config(assets, tmp_path, SHORT, lora, longer(3))).steps == 3
    assert steps_of(tmp_path)[0]["kl_mean"] == pytest.approx(0, abs=1e-4)  # new adapters change nothing


def test_likelihood_trains_adapters_alone_and_resumes_to_the_bit(assets, tmp_path):
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(assets / "model", base)
    model = {"model": {"path": str(base)}}
    commands.mle(mle_config(assets, tmp_path / "whole", ADAPTERS, model))
    commands.mle(mle_config(assets, run, ADAPTERS, model, {"training": {"max_steps": 1}}))
    first = saved_state(run)
    names = unpack_tensors(first["model.safetensors"]).keys()
    assert names and all(".lora_" in name for name in names)
    assert {name.partition(".")[2] for name in unpack_tensors(first["optimizer.safetensors"])} == names
    commands.mle(mle_config(assets, run, ADAPTERS, model, {"resume": True}))
    assert bits(run) == bits(tmp_path / "whole")
    assert first["model.safetensors"] != saved_state(run)["model.safetensors"]
    weights = load_file(base / "model.safetensors")
    weights["model.encoder.layers.0.fc1.weight"][0, 0] += 1e-3
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"trained on top of weights of {base} .* those read from {base} now are oth"):
        commands.mle(mle_config(assets, run, ADAPTERS, model, longer(4)))


def test_adapters_learnt_by_likelihood_are_a_model_as_any(assets, tmp_path):
    """Scored as in their run, merged into a plain folder, trained further; no second ones go on top."""
    result = commands.mle(mle_config(assets, tmp_path / "run", ADAPTERS))
    assert result.best_step > 0  # what is exported are not the adapters of the start, which change nothing
    decoding = DecodingConfig(max_new_tokens=10)
    source = assets / "dev.jsonl"
    scored = evaluate(EvaluateConfig(model=str(result.model), source=source, metrics=("chrf",), decoding=decoding))
    assert scored["chrf"]["score"] == pytest.approx(result.best_score)
    plain = merge(MergeConfig(adapter=str(result.model), output=tmp_path / "merged"))
    adapted, merged, start = (load_policy(folder) for folder in (result.model, plain, assets / "model"))
    assert has_adapter(adapted) and not has_adapter(merged)
    tokens = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        one, other, before = (
            policy.model(input_ids=tokens, decoder_input_ids=tokens).logits for policy in (adapted, merged, start)
        )
    torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    assert float((one - before).abs().max()) > 0.1
    further = {"model": {"path": str(result.model)}}
    commands.mle(mle_config(assets, tmp_path / "further", SHORT, further))
    commands.rl(rl_config(assets, tmp_path / "rl", SHORT, {"model": str(result.model)}))
    for run in ("further", "rl"):
        saved = unpack_tensors(saved_state(tmp_path / run)["model.safetensors"])
        assert saved and all(".lora_" in name for name in saved)
    with pytest.raises(ValueError, match="adapters already; merge them first"):
        commands.mle(mle_config(assets, tmp_path / "twice", ADAPTERS, further))
