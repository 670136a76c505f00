"""Configurations: every wrong key, type or value is one clear error; files, methods and paths mean what they say."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import sys
import tomllib
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import tomli_w

import esrl
from esrl.algorithm.allocation import AllocationConfig
from esrl.algorithm.baselines import BaselineConfig
from esrl.algorithm.objectives import ObjectiveConfig
from esrl.config import (
    METHODS,
    MLEConfig,
    RewardModelConfig,
    RLConfig,
    data_of_flags,
    locate,
    pinned,
    settle,
    with_method,
)
from esrl.data.readers import DataConfig
from esrl.fingerprint import signature
from esrl.judge import JudgeConfig
from esrl.models.adapters import LoraSettings
from esrl.settings import build, merge, read_toml, to_toml

sys.path.insert(0, str(Path(__file__).parent / "training"))
from run_helpers import make_assets, mle_config, rl_config

MINIMAL: dict[str, Any] = {"output_dir": "run", "model": "model", "data": {"path": "train.jsonl"}}


def make(values: dict[str, Any] | None = None, **more: Any) -> RLConfig:
    return build(RLConfig, merge(merge(MINIMAL, values or {}), more), "the file")


WRONG = [
    ({"optimzer": {"learning_rate": 1.0}}, "the file: unknown key optimzer. Did you mean optimizer?"),
    (
        {"optimizer": {"learning_rat": 1.0}},
        "the file: unknown key optimizer.learning_rat. Did you mean optimizer.learning_rate?",
    ),
    (
        {"development": {"decoding": {"beam": 1}}},
        "the file: unknown key development.decoding.beam. Did you mean development.decoding.beam_size?",
    ),
    ({"zzz": 1}, "the file: unknown key zzz. There are: output_dir, seed, "),
    ({"seed": "1"}, "the file: seed is '1'; it must be a whole number."),
    ({"seed": True}, "the file: seed is True; it must be a whole number."),
    ({"seed": 1.0}, "the file: seed is 1.0; it must be a whole number."),
    ({"resume": 1}, "the file: resume is 1; it must be true or false."),
    ({"model": 3}, "the file: model is 3; it must be a string."),
    ({"model": False}, "the file: model is False; it must be a string."),
    ({"output_dir": 3}, "the file: output_dir is 3; it must be a path."),
    ({"objective": {"alpha": "small"}}, "the file: objective.alpha is 'small'; it must be a number."),
    ({"objective": {"alpha": math.nan}}, "the file: objective.alpha is nan; it must be finite."),
    ({"optimizer": {"max_grad_norm": math.inf}}, "the file: optimizer.max_grad_norm is inf; it must be finite."),
    ({"objective": 3}, "the file: objective is 3; it must be a table, [objective]."),
    ({"objective": {"kind": "mrs"}}, "the file: objective.kind is 'mrs'; choose one of fused, reinforce, mrt, grpo"),
    ({"objective": {"kind": ["mrt"]}}, "the file: objective.kind is ['mrt']; choose one of fused, reinforce, mrt, "),
    ({"method": "ppoo"}, "the file: method is 'ppoo'; choose one of esrl, reinforce, mrt, grpo, rloo, ppo."),
    ({"reward": {"names": "bleu"}}, "the file: reward.names is 'bleu'; it must be a list."),
    ({"reward": {"names": [1]}}, "the file: reward.names is 1; it must be a string."),
    ({"objective": {"alpha": -1.0}}, "the file: objective: alpha is -1.0; it must be above 0 and finite."),
    ({"allocation": {"max_samples": 0}}, "the file: allocation: min_samples is 1 and max_samples 0; "),
    ({"training": {"max_steps": 0}}, "the file: training: max_steps is 0; it must be above 0"),
    ({"data": {"limit": 0}}, "the file: data: data: limit is 0; it must be 1 or more"),
    ({"data": {"source": "a"}}, "the file: data: data: both of `source` and `path` given"),
]


@pytest.mark.parametrize(("values", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_wrong_value_is_named_with_the_rule(values, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        make(values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("model", 'model is missing. Set it to a model folder: model = "runs/mle/model".'),
        ("output_dir", "output_dir is missing. Set the run's folder"),
        ("data", "data is missing. Add a [data] table that says where the examples are."),
    ],
)
def test_what_is_missing_is_named_with_an_example(missing, message):
    with pytest.raises(ValueError, match=re.escape(f"the file: {message}")):
        build(RLConfig, {key: value for key, value in MINIMAL.items() if key != missing}, "the file")


def test_a_whole_number_is_a_number_and_false_unsets():
    config = make({"objective": {"alpha": 1}, "training": {"save_total_limit": False, "num_epochs": 2}})
    assert config.objective.alpha == 1.0 and isinstance(config.objective.alpha, float)
    assert config.training.save_total_limit is None
    assert make({"gradient": {"rescore": False}}).gradient.rescore is False  # where false is a value, it is that
    assert make({"data": {"reference_column": False}}).data.reference_column is None


def test_toml_errors_name_file_and_line(tmp_path):
    (tmp_path / "broken.toml").write_text('seed = 1\nmodel = "a\n')
    with pytest.raises(ValueError, match=r"broken\.toml: .*line 2"):
        read_toml(tmp_path / "broken.toml")
    (tmp_path / "latin.toml").write_bytes(b'model = "\xe9"\n')
    with pytest.raises(ValueError, match=r"latin\.toml: not UTF-8"):
        read_toml(tmp_path / "latin.toml")
    with pytest.raises(ValueError, match=r"nosuch\.toml: No such file"):
        read_toml(tmp_path / "nosuch.toml")
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(ValueError, match=r"folder\.toml: Is a directory"):
        read_toml(tmp_path / "folder.toml")


def test_a_file_beats_the_preset_of_its_own_method():
    values = {"method": "reinforce", "allocation": {"fixed_temperature": 0.8}}
    config = make(with_method(values, METHODS, None))
    assert config.allocation.fixed_temperature == 0.8  # the file's
    assert (config.allocation.allocator, config.objective.kind) == ("uniform", "reinforce")  # the preset's
    assert config.baseline.kind == "moving_average"
    assert with_method(values, METHODS, "reinforce") == with_method(values, METHODS, None)  # the flag says nothing new


def test_another_method_as_a_flag_beats_the_file():
    values = {"method": "esrl", "allocation": {"allocator": "variance", "max_samples": 7}, "objective": {"alpha": 0.1}}
    config = make(with_method(values, METHODS, "mrt"))
    assert (config.allocation.allocator, config.objective.kind) == ("uniform", "mrt")
    assert (config.allocation.max_samples, config.objective.alpha) == (7, 0.1)  # of which the preset says nothing
    back = make(with_method({"method": "reinforce", **METHODS["reinforce"]}, METHODS, "esrl"))
    assert (back.allocation.allocator, back.allocation.temperature_rule) == ("esrl", "paper")
    assert (back.objective.kind, back.baseline.kind) == ("fused", "fifo")


def test_the_esrl_preset_is_the_class_defaults():
    defaults = {"allocation": AllocationConfig(), "objective": ObjectiveConfig(), "baseline": BaselineConfig()}
    for table, values in METHODS["esrl"].items():
        for name, value in values.items():
            assert getattr(defaults[table], name) == value


@pytest.mark.parametrize("name", METHODS)
def test_presets_touch_the_same_settings(name):
    """Or changing from one method to another would leave some of the first behind."""
    keys = {table: set(values) - {"fixed_temperature"} for table, values in METHODS[name].items()}
    assert keys == {table: set(values) for table, values in METHODS["esrl"].items()}


def test_paths_start_from_the_file(tmp_path):
    folder = tmp_path / "configs"
    (folder / "runs" / "model").mkdir(parents=True)
    values = locate(
        {
            "output_dir": "../out",
            "model": "runs/model",
            "data": {"source": "a.de", "reference": "sub/a.en"},
            "development": {"data": {"path": "dev.tsv"}},
            "reward": {"names": ["bleu", "my.py:score", "package.module:name"]},
        },
        folder,
    )
    config = settle(build(RLConfig, values, "file", folder), folder)
    assert config.output_dir == tmp_path / "out"
    assert config.model == str(folder / "runs" / "model")
    assert config.data.source is not None
    assert config.data.resolve(config.data.source) == folder / "a.de"
    assert config.development.data is not None and config.development.data.path is not None
    assert config.development.data.resolve(config.development.data.path) == folder / "dev.tsv"
    assert config.reward.names == ("bleu", f"{folder}/my.py:score", "package.module:name")
    assert locate({"model": "Helsinki-NLP/opus-mt-de-en"}, folder)["model"] == "Helsinki-NLP/opus-mt-de-en"
    assert locate({"model": {"path": "runs/model"}}, folder)["model"]["path"] == str(folder / "runs" / "model")


def test_development_data_inherit_the_root(tmp_path):
    values = {"data": {"root": "../data", "path": "a.tsv"}, "development": {"data": {"path": "b.tsv"}}}
    config = settle(build(RLConfig, merge(MINIMAL, values), "file", tmp_path / "configs"), tmp_path / "configs")
    assert config.development.data is not None
    assert config.data.root == config.development.data.root == tmp_path / "data"
    own = merge(values, {"development": {"data": {"root": "dev"}}})
    config = settle(build(RLConfig, merge(MINIMAL, own), "file", tmp_path / "configs"), tmp_path / "configs")
    assert config.development.data is not None
    assert config.development.data.root == tmp_path / "configs" / "dev"


def test_paths_of_flags_start_from_the_current_folder(tmp_path, monkeypatch):
    """Even a flag that says the same as the file."""
    monkeypatch.chdir(tmp_path)
    before = build(RLConfig, merge(MINIMAL, {"data": {"path": "a.tsv"}}), "file", tmp_path / "configs")
    root = {"path": "b.tsv", "root": Path("data")}
    for data, flags, expected in (
        ({"path": "b.tsv"}, {"--data.path"}, tmp_path / "b.tsv"),
        ({"path": "a.tsv"}, {"--data.path"}, tmp_path / "a.tsv"),
        ({"path": "a.tsv"}, {"--seed"}, tmp_path / "configs" / "a.tsv"),  # the file's own
        (root, {"--data.path", "--data.root"}, Path("data") / "b.tsv"),  # a root as a flag comes first
        ({"path": None, "source": Path("c.de")}, {"--data.source", "--data.path"}, tmp_path / "c.de"),
    ):
        after = dataclasses.replace(before, data=dataclasses.replace(before.data, **data))
        settled = settle(after, tmp_path / "configs", flags).data
        assert settled.resolve(settled.path or settled.source or "") == expected
    hub = dataclasses.replace(before, data=DataConfig(path="bentrevett/multi30k"))
    assert settle(hub, tmp_path / "configs", {"--data.path"}).data.path == "bentrevett/multi30k"


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_assets(tmp_path_factory.mktemp("assets"))


LANGUAGE_MODEL: dict[str, Any] = {
    "lora": {"rank": 4, "target_modules": ["q_proj"]},
    "prompts": {"overlong": "truncate_left"},
    "reward": {"model": {"path": "reward"}, "json_schema": {"path": "schema.json"}},
}


def test_a_dumped_configuration_builds_the_same_one(assets, tmp_path, monkeypatch):
    """From another folder, too; only resume and overwrite must be asked for again."""
    changes = {
        "training": {"save_total_limit": False, "max_seconds": 3.5},
        "data": {"reference_column": False},
        "seed": 5,
        "report_to": ["tensorboard"],
        "reward": {"names": ["chrf", "rewards.py:mine"], "weights": [1, 0.25]},
        "overwrite": True,
    }
    monkeypatch.chdir(assets)
    (assets / "rewards.py").touch()
    relative = {"output_dir": "out", "model": "model", "data": {"path": "train.jsonl"}}
    for config in (
        rl_config(assets, tmp_path / "run", changes),
        rl_config(assets, Path("out"), {**changes, **relative}, {"method": "reinforce"}),
        rl_config(assets, tmp_path / "run", LANGUAGE_MODEL),
        build(RewardModelConfig, {**MINIMAL, "training": {"patience": 3}}, "test"),
        mle_config(assets, tmp_path / "run", {"training": {"patience": 3}}),
        mle_config(assets, tmp_path / "run", {"model": {"path": False, "vocab_size": 100}}),
    ):
        text = tomli_w.dumps(to_toml(pinned(config)))
        folder = tmp_path / "elsewhere"
        values = locate(tomllib.loads(text), folder)
        with monkeypatch.context() as there:
            there.chdir(tmp_path)
            values = with_method(values, METHODS, None) if isinstance(config, RLConfig) else values
            again = settle(build(type(config), values, "dumped", folder), folder)
        assert again == dataclasses.replace(pinned(config), resume=False, overwrite=False)
        assert pinned(again) == again
        assert not re.search("resume|overwrite", text)


def test_every_field_has_a_docstring_and_a_default_of_its_type():
    """``--help`` shows the docstrings; a default that ``build`` would refuse could never be written in a file."""
    seen = set()

    def visit(cls: Any) -> None:
        if cls in seen:
            return
        seen.add(cls)
        hints = get_type_hints(cls)
        source = Path(sys.modules[cls.__module__].__file__ or "").read_text(encoding="utf-8")
        for entry in dataclasses.fields(cls):
            assert re.search(rf'^    {entry.name}: .*\n    """', source, re.MULTILINE) or entry.name not in source, (
                cls,
                entry.name,
            )
            for kind in (hints[entry.name], *getattr(hints[entry.name], "__args__", ())):
                if dataclasses.is_dataclass(kind):
                    visit(kind)

    visit(RLConfig)
    visit(MLEConfig)
    visit(RewardModelConfig)
    assert len(seen) > 12
    config = make()
    assert build(RLConfig, to_toml(config), "again") == config


def test_the_signature_says_what_the_run_was():
    config = make(with_method({"method": "reinforce", "seed": 3}, METHODS, None))
    assert signature(config).startswith(
        "esrl|method:reinforce|alloc:uniform|cap:bleu|k:20|beta:0.3|tau:0.95|obj:reinforce|base:moving_average|"
        "alpha:0.005|seed:3|v:"
    )
    config = make(reward={"names": ["chrf", "rouge_l"]}, capability={"estimator": "entropy"})
    assert "|cap:entropy|k:20|beta:0.3|tau:0.6-1.0|obj:fused|base:fifo-1000|" in signature(config)


def test_a_method_in_python_brings_its_settings_and_they_may_be_overridden():
    own: dict[str, Any] = {"allocation": {"max_samples": 7}, "baseline": {"kind": "leave_one_out"}}
    config = esrl.rl_config("mrt", **MINIMAL, **own)
    assert config == make(with_method({"method": "mrt", **own}, METHODS, None))
    assert (config.method, config.objective.kind, config.allocation.allocator) == ("mrt", "mrt", "uniform")
    assert esrl.rl_config("reinforce", **MINIMAL, allocation={"allocator": "esrl"}).allocation.allocator == "esrl"
    with pytest.raises(ValueError, match="rl_config: method is 'trpo'; choose one of esrl, reinforce, mrt, grpo, rloo"):
        esrl.rl_config("trpo", **MINIMAL)
    with pytest.raises(ValueError, match=r"rl_config: unknown key alocation. Did you mean allocation?"):
        esrl.rl_config("mrt", **MINIMAL, alocation={})


def test_a_method_without_its_settings_is_refused():
    """It would train ESRL under another name."""
    parts: dict[str, Any] = {"output_dir": Path("run"), "model": "model", "data": DataConfig(path="train.jsonl")}
    with pytest.raises(ValueError, match=r"method 'mrt' needs objective.kind 'mrt', but it is 'fused'.*rl_config"):
        RLConfig(method="mrt", **parts)
    with pytest.raises(ValueError, match=r"method 'mrt' needs objective.kind 'mrt'"):
        dataclasses.replace(esrl.rl_config("mrt", **MINIMAL), objective=ObjectiveConfig(kind="reinforce"))
    with pytest.raises(ValueError, match="method is 'trpo'; choose one of esrl, reinforce, mrt, grpo, rloo, ppo"):
        RLConfig(method="trpo", **parts)  # type: ignore[arg-type]
    assert RLConfig(objective=ObjectiveConfig(kind="mrt"), **parts).method == "esrl"


def test_scoring_at_the_sampling_temperature_needs_the_whole_vocabulary():
    scored = {"objective": {"score_temperature": "sampling"}}
    assert esrl.rl_config("esrl", **MINIMAL, **scored).sampling.truncation is None
    for cut in ({"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}):
        with pytest.raises(ValueError, match=r"score_temperature is .*top_p or min_p draw from a part of it"):
            esrl.rl_config("esrl", **MINIMAL, **scored, sampling=cut)
        assert esrl.rl_config("esrl", **MINIMAL, sampling=cut).sampling.truncation is not None


def test_public_names_are_there():
    assert all(getattr(esrl, name) is not None for name in esrl.__all__)


def test_a_section_keeps_the_defaults_it_has_here():
    """A run ends after 10 epochs, whatever else is said of its training, unless that is unset."""
    assert make().training.num_epochs == 10
    assert make(training={"save_steps": 7}).training.num_epochs == 10
    unset = make(training={"num_epochs": False, "max_steps": 5})
    assert (unset.training.num_epochs, unset.training.max_steps) == (None, 5)
    assert to_toml(unset)["training"]["num_epochs"] is False
    assert build(RLConfig, to_toml(unset), "again") == unset
    with pytest.raises(ValueError, match="without any of them a run never ends"):
        make(training={"num_epochs": False})


def test_a_flag_of_one_kind_of_data_replaces_the_other_kind_of_the_file():
    text, table = {"root": "r", "source": "a.de", "reference": "a.en", "limit": 3}, {"root": "r", "path": "a.tsv"}

    def kept(values: dict[str, Any], **flags: str) -> dict[str, Any]:
        given = {f"--{name.replace('_', '.')}": value for name, value in flags.items()}
        return data_of_flags(values, given.get)

    assert kept({"data": text}, data_path="b.tsv") == {"data": {"root": "r", "limit": 3, "path": "b.tsv"}}
    assert kept({"data": table}, data_source="b.de") == {"data": {"root": "r", "source": "b.de"}}
    assert kept({"data": text}, data_source="b.de") == {"data": text}  # the flag itself replaces it
    assert kept({"data": table}, development_data_source="b.de") == {"data": table}
    development = kept({"data": table, "development": {"data": text, "metrics": []}}, development_data_path="b.tsv")
    assert development["development"] == {"data": {"root": "r", "limit": 3, "path": "b.tsv"}, "metrics": []}
    assert kept({"data": 3}, data_path="b.tsv") == {"data": 3}  # `build` says what is wrong with it


def test_a_home_folder_in_a_flag_is_found(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    before = build(RLConfig, merge(MINIMAL, {"data": {"path": "~/a.tsv"}}), "file", Path("/configs"))
    after = settle(before, Path("/configs"), {"--data.path"}).data
    assert after.resolve(after.path or "") == Path("/home/somebody/a.tsv")


def test_a_reward_s_own_paths_hold_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reward = pinned(make(LANGUAGE_MODEL)).reward  # type: ignore[attr-defined]
    assert (reward.model.path, reward.json_schema.path) == (tmp_path / "reward", tmp_path / "schema.json")
    values = merge(MINIMAL, LANGUAGE_MODEL)
    reward = build(RLConfig, values, "file", tmp_path / "configs").reward
    assert (reward.model.path, reward.json_schema.path) == (
        tmp_path / "configs" / "reward",
        tmp_path / "configs" / "schema.json",
    )


def test_a_reward_model_goes_by_its_accuracy_after_an_epoch():
    """Whatever else a file says of its training and its development data."""
    values = {"training": {"save_steps": 7}, "development": {"data": {"path": "dev.jsonl"}}}
    config = build(RewardModelConfig, merge(MINIMAL, values), "file")
    assert (config.training.num_epochs, config.training.metric_for_best_model) == (1, "dev_accuracy")
    assert config.development.metrics == ()


def test_adapters_are_part_of_the_signature():
    assert "|lora:" not in signature(make())
    assert "|lora:4|seed:1|" in signature(make(lora={"rank": 4}))
    assert "|lora:4-4bit|prec:bfloat16|" in signature(
        make(lora={"rank": 4, "load_in_4bit": True}, precision="bfloat16")
    )
    assert make(lora={}).lora == LoraSettings() and make(lora=False).lora is None


PROJECT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((PROJECT / "configs").rglob("*.toml"))
CLASSES: dict[str, Any] = {"mle": MLEConfig, "sft": MLEConfig, "reward-model": RewardModelConfig, "judge": JudgeConfig}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_configs_are_sound_and_point_into_the_project(path):
    assert len(CONFIGS) == 17
    folder = path.resolve().parent
    cls = CLASSES.get(path.stem, RLConfig)  # named after their method, else
    values = locate(read_toml(path), folder)
    if cls is RLConfig:
        values = with_method(values, METHODS, None)
    config = settle(build(cls, values, str(path), folder), folder)
    places = [config.output_dir]
    if cls is JudgeConfig:
        places += [config.questions, config.templates, *config.answers]
    else:
        places += [config.data.resolve(config.data.path or config.data.source)]
        development = config.development.data
        places += [] if development is None else [development.resolve(development.path or development.source)]
    if cls in (RLConfig, RewardModelConfig):
        places.append(Path(config.model))
    if cls is RLConfig and config.reward.model.path is not None:
        places.append(config.reward.model.path)
    for place in places:
        assert Path(os.path.normpath(place)).is_relative_to(PROJECT)
