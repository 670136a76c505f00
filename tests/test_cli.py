"""The command line: one line and its exit code for whatever can be wrong, and settings in their order of precedence."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from safetensors.torch import load_file, save_file

from esrl import cli
from esrl.cli import COMMANDS, main
from esrl.config import MLEConfig, RLConfig, pinned
from esrl.errors import EsrlError
from esrl.models.adapters import LoraSettings
from esrl.settings import merge

sys.path.insert(0, str(Path(__file__).parent / "training"))
from run_helpers import STEPS, make_assets, steps_of, values_of, write_config


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_assets(tmp_path_factory.mktemp("assets"))


@pytest.fixture(autouse=True)
def own_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line shortens how warnings look; the other tests keep theirs."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``configured("rl", words...)``: what the command would be called with."""

    def get(name: str, *words: str | Path) -> Any:
        caught = []

        def take(config: Any) -> Any:
            caught.append(config)
            raise EsrlError("stop here")

        monkeypatch.setattr(f"esrl.commands.{name}", take)
        assert main([name, *map(str, words)]) == EsrlError.exit_code
        return caught[0]

    return get


def fails(capsys: pytest.CaptureFixture[str], code: int, *words: str | Path) -> str:
    """Run it; its one line."""
    assert main([str(word) for word in words]) == code
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if " read, " not in line]  # what the data hold is said first
    assert len(lines) == 1 and lines[0].startswith("esrl: "), captured.err
    assert "Traceback" not in captured.err and captured.out == ""
    return lines[0]


TEXTS = {
    "unknown key": ("optimzer = 1", "run.toml: unknown key optimzer. Did you mean optimizer?"),
    "unknown nested key": (
        "[training]\nmax_step = 1",
        "run.toml: unknown key training.max_step. Did you mean training.max_steps?",
    ),
    "wrong type": ("[optimizer]\nlearning_rate = 'fast'", "optimizer.learning_rate is 'fast'; it must be a number."),
    "out of bounds": ("[allocation]\nelimination_ratio = 1.0", "elimination_ratio is 1.0; it must lie in [0, 1)."),
    "wrong choice": ("[baseline]\nkind = 'lifo'", "baseline.kind is 'lifo'; choose one of fifo, moving_average, "),
    "method of another type": (
        "method = ['esrl']",
        "method is ['esrl']; choose one of esrl, reinforce, mrt, grpo, rloo, ppo.",
    ),
    "unknown method": ("method = 'ppo2'", "method is 'ppo2'; choose one of"),
    "broken": ("seed = 1\n[data\npath = 3", "(at line 4, column 6)"),
    "unknown metric": ("[development]\nmetrics = ['belu']\ndata.path = 'dev.jsonl'", "did you mean 'bleu'?"),
    "unknown reward": ("[reward]\nnames = ['belu']", "unknown reward 'belu'; did you mean 'bleu'?"),
    "missing reward file": ("[reward]\nnames = ['nosuch.py:f']", "/nosuch.py"),
    "best of what is not measured": (
        "development = {metrics = ['chrf'], data = {path = 'dev.jsonl'}}\n[training]\nmax_steps = 1",
        "training.metric_for_best_model is 'dev_bleu'; development.metrics gives dev_chrf.",
    ),
    "resume and overwrite": ("resume = true\noverwrite = true", "resume and overwrite exclude each other"),
    "endless": ("[training]\nnum_epochs = false\neval_steps = 3", "without any of them a run never ends"),
    "longer than the model": (
        "[sampling]\nmax_new_tokens = 81",
        "max_new_tokens is 81, but the model has 80 positions",
    ),
    "missing data": ("[data]\npath = 'nosuch.jsonl'", "nosuch.jsonl: no such file"),
    "missing root": (
        "[data]\nroot = 'nowhere'\nsource = 'a.de'",
        "(--data.root), or fetch them there: `esrl data multi30k`",
    ),
    "missing source": ("[data]\nsource = 'nosuch.de'", "nosuch.de: no such file"),
    "bad data": ("[data]\npath = 'bad.jsonl'", "bad.jsonl:2: "),
    "missing model": ("model = 'nosuch'", "nosuch: no such folder."),
    "no model there": ("model = '.'", "no config.json here; give a model folder"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_wrong_file_is_one_line_and_exit_code_2(assets, tmp_path, capsys, case):
    text, message = TEXTS[case]
    folder = Path(shutil.copytree(assets, tmp_path / "folder"))
    (folder / "bad.jsonl").write_text('{"source": "a", "reference": "b"}\n{"source": \n')
    head = "output_dir = 'out'\n" if "model =" in text else "output_dir = 'out'\nmodel = 'model'\n"
    tail = "" if "[data]" in text else "\n[data]\npath = 'train.jsonl'\n"
    if "sampling" not in text:
        tail += "\n[sampling]\nmax_new_tokens = 10\n"
    (folder / "run.toml").write_text(head + text + tail)
    assert message in fails(capsys, 2, "rl", folder / "run.toml")
    assert not (folder / "out" / "checkpoints").exists()


FLAGS = {
    "unknown flag": (["--optimizer.learning-rat", "1"], "Did you mean --optimizer.learning-rate?"),
    "unknown word": (["again"], "Unrecognized options: again."),
    "wrong type": (["--seed", "one"], "--seed"),
    "out of bounds": (["--optimizer.learning-rate", "-1"], "learning_rate is -1.0; it must lie in (0, "),
    "not finite": (["--objective.alpha", "nan"], "alpha is nan; it must be above 0 and finite."),
    "wrong choice": (["--method", "ppo2"], "'ppo2'"),
    "method without its objective": (
        ["--method", "mrt", "--objective.kind", "fused"],
        "method 'mrt' needs objective.kind 'mrt', but it is 'fused'.",
    ),
    "missing value": (["--seed"], "--seed"),
    "given twice": (["--seed", "1", "--seed=2"], "--seed is given 2 times. Give it once; several values go behind it."),
    "given twice, spelt apart": (
        ["--accept-changes", "a", "--accept_changes", "b"],
        "--accept-changes is given 2 times",
    ),
    "missing data": (["--data.path", "nosuch.jsonl"], "nosuch.jsonl: no such file"),
    "missing model": (["--model", "nosuch"], "nosuch: no such folder."),
}


@pytest.mark.parametrize("case", FLAGS)
def test_a_wrong_flag_is_one_line_and_exit_code_2(assets, tmp_path, capsys, case):
    words, message = FLAGS[case]
    config = write_config(tmp_path / "run.toml", values_of("rl", assets, tmp_path / "out"))
    assert message in fails(capsys, 2, "rl", config, *words)
    assert not (tmp_path / "out").exists()


BOX = """\
╭─ Unrecognized options ────────────────────────────╮
│ Unrecognized options: --optimzer.learning-rate, 3 │
│ ───────────────────────────────────────────────── │
│ Perhaps you meant:                                │
│     --optimizer.learning-rate FLOAT               │
│         Peak learning rate. (default: 0.0001)     │
╰───────────────────────────────────────────────────╯
"""
PLAIN = """\
 Unrecognized options
 -----------------------------------------------------
  Unrecognized options: --optimzer.learning-rate, 3
  ---------------------------------------------------
  Perhaps you meant:
      --optimizer.learning-rate FLOAT
"""


@pytest.mark.parametrize("box", [BOX, PLAIN], ids=["box", "plain"])
def test_boxes_of_both_kinds_are_read(box):
    """Which one tyro draws depends on the encoding of the terminal."""
    expected = ("Unrecognized options: --optimzer.learning-rate, 3", "--optimizer.learning-rate")
    assert cli._unboxed(box) == expected


def test_commands_and_files_that_are_not_there(tmp_path, capsys):
    assert fails(capsys, 2, "trl") == "esrl: unknown command 'trl'. Did you mean rl?"
    assert fails(capsys, 2, "xyz") == "esrl: unknown command 'xyz'. `esrl --help` lists them."
    assert "nosuch.toml: No such file or directory" in fails(capsys, 2, "rl", tmp_path / "nosuch.toml")
    (tmp_path / "folder.toml").mkdir()
    assert "folder.toml: Is a directory" in fails(capsys, 2, "mle", tmp_path / "folder.toml")
    assert "must be a .toml file" in fails(capsys, 2, "mle", tmp_path)
    assert "--output-dir, --model must be given" in fails(capsys, 2, "rl")
    words = ["rl", "--output-dir", tmp_path / "out", "--model", "m"]
    assert "neither of `source` and `path` given" in fails(capsys, 2, *words)
    assert "what the usage has in capitals must be given" in fails(capsys, 2, "merge")


def spoil_config(model: Path) -> None:
    (model / "config.json").write_text("{")


def another_family(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "bert", "architectures": ["BertModel"]}))


def unknown_family(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "nosuch"}))


def no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def cut_weights(model: Path) -> None:
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[: len(data) // 2])


def pickled_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(1)}, model / "pytorch_model.bin")


def other_shapes(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    name = next(name for name, value in weights.items() if value.dim() == 2 and "fc1" in name)
    weights[name] = weights[name][:-1].clone()
    save_file(weights, model / "model.safetensors", {"format": "pt"})


def no_tokenizer(model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()


def broken_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text("{}")


def too_few_embeddings(model: Path) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {f"more{i}": len(vocabulary) + i for i in range(5)}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize("command", ["rl", "mle"])
@pytest.mark.parametrize(
    "spoil",
    [
        *(spoil_config, another_family, unknown_family, no_weights, cut_weights, pickled_weights, other_shapes),
        *(no_tokenizer, broken_tokenizer, too_few_embeddings),
    ],
    ids=lambda spoil: spoil.__name__,
)
def test_a_model_that_cannot_be_used_is_one_line_and_exit_code_2(assets, tmp_path, capsys, spoil, command):
    model = Path(shutil.copytree(assets / "model", tmp_path / "model"))
    spoil(model)
    changes = {"model": str(model) if command == "rl" else {"path": str(model)}}
    config = write_config(tmp_path / "run.toml", values_of(command, assets, tmp_path / "out", changes))
    assert str(model) in fails(capsys, 2, command, config)


def test_what_a_command_needs_of_the_data_is_said(assets, tmp_path, capsys):
    values = merge(values_of("mle", assets, tmp_path / "out"), {"data": {"reference_column": False}})
    config = write_config(tmp_path / "mle.toml", values)
    assert "maximum likelihood needs a reference" in fails(capsys, 2, "mle", config)
    (tmp_path / "only.txt").write_text("Ein Hund.\n")
    values = values_of("rl", assets, tmp_path / "out")
    values["data"] = {"source": str(tmp_path / "only.txt")}
    config = write_config(tmp_path / "rl.toml", values)
    assert "needs the column 'reference'" in fails(capsys, 2, "rl", config)


def test_help_and_version(capsys):
    for words in ([], ["--help"], ["help"]):
        assert main(words) == 0
        said = capsys.readouterr()
        assert said.err == "" and all(f"esrl {name}" in said.out for name in COMMANDS)
    assert main(["rl", "--help"]) == 0
    said = capsys.readouterr().out
    assert "--optimizer.learning-rate" in said and "The paper uses 1, 5, 10, 15, 20." in said
    assert main(["--version"]) == 0
    assert re.fullmatch(r"esrl \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_what_needs_no_library_loads_none():
    """The help of the program must not take the ten seconds of an import of torch."""
    code = "import sys; from esrl.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=os.environ.copy())


def test_flags_beat_the_file_which_beats_its_method_s_preset(assets, tmp_path, configured):
    values = values_of("rl", assets, tmp_path / "out")
    values |= {"method": "reinforce", "seed": 3, "baseline": {"kind": "leave_one_out"}}
    file = write_config(tmp_path / "run.toml", values)
    config = configured("rl", file)
    assert (config.seed, config.baseline.kind) == (3, "leave_one_out")  # the file's
    assert (config.objective.kind, config.allocation.fixed_temperature) == ("reinforce", 0.95)  # the preset's
    assert config.optimizer.adam_beta2 == 0.98  # the class's
    words = ["--seed", "4", "--allocation.allocator", "esrl", "--optimizer.learning-rate", "5e-5"]
    config = configured("rl", file, *words)
    assert (config.seed, config.allocation.allocator, config.optimizer.learning_rate) == (4, "esrl", 5e-5)
    for words in (["--method", "mrt"], ["--method=mrt"]):
        config = configured("rl", file, *words, "--allocation.fixed-temperature", "0.7")
        assert (config.method, config.objective.kind, config.baseline.kind) == (
            "mrt",
            "mrt",
            "none",
        )  # the flag's preset
        assert config.allocation.fixed_temperature == 0.7  # a flag beats that, too
    config = configured("rl", file, "--method", "esrl")
    assert (config.allocation.allocator, config.objective.kind, config.baseline.kind) == ("esrl", "fused", "fifo")


def test_flags_alone_are_enough(assets, tmp_path, configured, monkeypatch):
    monkeypatch.chdir(assets)
    words = ["--output-dir", "out", "--model", "model", "--data.path", "train.jsonl"]
    config = configured("rl", *words, "--training.max-steps", "2")
    assert isinstance(config, RLConfig) and config.model == "model" and config.data.path is not None
    assert config.data.resolve(config.data.path) == assets / "train.jsonl"
    config = configured("mle", "--output-dir", "out", "--data.source", "train.de", "--data.reference", "train.en")
    assert isinstance(config, MLEConfig) and config.data.source is not None
    assert config.data.resolve(config.data.source) == assets / "train.de"


def test_flags_alone_turn_adapters_on(assets, tmp_path, configured):
    file = write_config(tmp_path / "run.toml", values_of("rl", assets, tmp_path / "out"))
    assert configured("rl", file).lora is None
    assert configured("rl", file, "--lora.rank", "4").lora == LoraSettings(rank=4)


def test_a_table_as_a_flag_replaces_the_file_s_parallel_text(assets, tmp_path, configured):
    values = values_of("rl", assets, tmp_path / "out")
    for data, words in (
        ({"source": "a.de", "reference": "a.en", "limit": 3}, ["--data.path", str(assets / "train.jsonl")]),
        ({"path": "a.tsv", "limit": 3}, ["--data.source", "b.de", "--data.reference", "b.en"]),
    ):
        config = configured("rl", write_config(tmp_path / "run.toml", values | {"data": data}), *words)
        assert config.data.limit == 3
        given = [name for name in ("path", "source", "reference") if getattr(config.data, name) is not None]
        assert given == [word.removeprefix("--data.") for word in words[::2]]


def test_paths_of_the_file_start_from_it_and_those_of_flags_from_here(assets, tmp_path, configured, monkeypatch):
    folder, here = tmp_path / "configs", tmp_path / "here"
    here.mkdir()
    shutil.copytree(assets / "model", folder / "model")
    shutil.copytree(assets / "model", here / "model")
    monkeypatch.chdir(here)
    values = {
        "output_dir": "out",
        "model": "model",
        "data": {"path": "train.jsonl"},
        "development": {"data": {"path": "dev.jsonl"}},
        "reward": {"names": ["mine.py:score"]},
    }
    file = write_config(folder / "run.toml", values)

    def places(*words: str) -> list[Path]:
        config = pinned(configured("rl", Path("../configs/run.toml"), *words))
        data, dev = config.data, config.development.data
        found = [config.output_dir, Path(config.model), data.resolve(data.path or ""), dev.resolve(dev.path or "")]
        return [*found, Path(config.reward.names[0].split(":")[0])]

    names = ["out", "model", "train.jsonl", "dev.jsonl", "mine.py"]
    assert places() == [file.parent / name for name in names]
    words = ["--output-dir", "out", "--model", "model", "--data.path", "train.jsonl"]
    words += ["--development.data.path", "dev.jsonl", "--reward.names", "mine.py:score"]
    assert places(*words) == [here / name for name in names]
    root = tmp_path / "root"
    found = places("--data.root", str(root))
    assert found[2:4] == [root / "train.jsonl", root / "dev.jsonl"]  # the development data inherit it


def test_from_the_command_to_the_report_and_again_from_the_run_s_own_configuration(
    assets, tmp_path, capsys, configured
):
    file = write_config(tmp_path / "run.toml", values_of("rl", assets, tmp_path / "out"))
    assert main(["rl", str(file), "--seed", "2"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"done: {STEPS} steps in ") and said.out.endswith(f"model: {tmp_path}/out/model\n")
    assert "esrl|method:esrl|" in said.err and "|seed:2|" in said.err
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        *(".lock", "checkpoints", "config.toml", "environment.json", "metrics.jsonl", "model", "report.html"),
        *("result.json", "samples.jsonl"),
    }
    assert "<html" in (out / "report.html").read_text() and len(steps_of(out)) == STEPS
    assert main(["rl", str(out / "config.toml"), "--resume"]) == 0
    assert capsys.readouterr().out == f"already complete: {STEPS} steps, nothing to do. {out}/model\n"
    dumped = tomllib.loads((out / "config.toml").read_text())
    assert dumped["seed"] == 2 and not {"resume", "overwrite"} & dumped.keys()
    assert tomllib.loads(tomli_w.dumps(dumped)) == dumped
    # last, for `configured` replaces the command
    assert pinned(configured("rl", out / "config.toml")) == pinned(configured("rl", file, "--seed", "2"))
