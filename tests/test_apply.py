"""`esrl evaluate` and `generate`: every line counts, tables by their names, faults before time is spent."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import sacrebleu

from esrl.apply import EvaluateConfig, show_evaluation
from esrl.cli import main

sys.path.insert(0, str(Path(__file__).parent / "training"))
from run_helpers import json_lines, make_assets

SHORT = ["--max-new-tokens", "6"]


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_assets(tmp_path_factory.mktemp("assets"))


@pytest.fixture(scope="module")
def pairs(assets: Path) -> tuple[list[str], list[str]]:
    """Sources and references, one of the sources empty, and one of the references."""
    rows = json_lines(assets / "dev.jsonl")[:5]
    sources, references = ([row[name] for row in rows] for name in ("source", "reference"))
    return [sources[0], "", *sources[2:]], [*references[:2], "", *references[3:]]


@pytest.fixture
def files(pairs: tuple[list[str], list[str]], tmp_path: Path) -> list[str]:
    """The flags that name them."""
    for name, lines in zip(("source", "reference"), pairs, strict=True):
        (tmp_path / name).write_text("".join(line + "\n" for line in lines))
    return ["--source", str(tmp_path / "source"), "--reference", str(tmp_path / "reference")]


def scores(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["evaluate", *words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_blank_lines_stay_in_place_and_count_as_in_sacrebleu(assets, pairs, files, tmp_path, capsys):
    model, output = str(assets / "model"), tmp_path / "output"
    found = scores(capsys, model, *files, "--output", str(output), *SHORT)
    lines = output.read_text().split("\n")[:-1]
    assert len(lines) == 5 and lines[1] == "" and any(lines)
    assert found["chrf"]["score"] == pytest.approx(sacrebleu.corpus_chrf(lines, [pairs[1]]).score, abs=1e-9)
    # generate keeps the same lines, and its file can be scored
    assert main(["generate", model, "--input", files[1], "--output", str(tmp_path / "said"), *SHORT]) == 0
    assert (tmp_path / "said").read_bytes() == output.read_bytes()
    assert scores(capsys, str(tmp_path / "said"), *files) == found
    # outputs that share words with the references: the lost reference of line 2 would cost no brevity
    good = [pairs[1][0], "", "too much", *pairs[1][3:]]
    (tmp_path / "good").write_text("\n".join(good) + "\n")
    found = scores(capsys, str(tmp_path / "good"), *files)
    assert 0 < found["bleu"]["score"] < 100
    assert found["bleu"]["score"] == pytest.approx(sacrebleu.corpus_bleu(good, [pairs[1]]).score, abs=1e-9)


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "t.tsv.gz"])
def test_tables_are_known_by_their_names_compressed_or_not(assets, tmp_path, capsys, name):
    rows = json_lines(assets / "dev.jsonl")[:3]
    lines = [json.dumps(row) for row in rows] if "jsonl" in name else ["\t".join(row.values()) for row in rows]
    lines.insert(1, "")
    if "tsv" in name:
        lines.insert(0, "\t".join(rows[0]))
    data = "".join(line + "\n" for line in lines).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    (tmp_path / "source").write_text("".join(row["source"] + "\n" for row in rows))
    model = str(assets / "model")
    for source, output in ((tmp_path / name, "a"), (tmp_path / "source", "b")):
        assert main(["generate", model, "--input", str(source), "--output", str(tmp_path / output), *SHORT]) == 0
    expected = (tmp_path / "b").read_text().split("\n")
    expected.insert(1, "")
    assert (tmp_path / "a").read_text().split("\n") == expected
    # its own outputs stand line by line beside the table
    assert "chrf" in scores(capsys, str(tmp_path / "a"), "--source", str(tmp_path / name))


WRONG = {
    "no other model": (["--against", "nosuch/at/all"], "nosuch/at/all: no such folder"),
    "another number of lines": (["--against", "{short}"], "has 1 lines, but there are 5 examples"),
    "a metric twice": (["--metrics", "bleu", "bleu"], "metrics names 'bleu' twice"),
    "no resamples": (["--num-resamples", "0"], "num_resamples is 0"),
    "no folder for the output": (["--output", "nosuch/output"], "output nosuch/output: there is no folder nosuch"),
    "a folder as the output": (["--output", "."], "output . is a folder"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_before_anything_is_decoded(assets, files, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr("esrl.apply.decode", lambda *_: pytest.fail("it was decoded"))
    (tmp_path / "short").write_text("one\n")
    words, message = WRONG[name]
    words = [word.format(short=tmp_path / "short") for word in words]
    assert main(["evaluate", str(assets / "model"), *files, *words]) == 2
    assert message in capsys.readouterr().err


def test_no_metric_is_refused():
    with pytest.raises(ValueError, match="metrics is empty"):
        EvaluateConfig(model="m", source=Path("s"), metrics=())


def test_a_full_disk_costs_no_scores_and_the_remedy_fits(pairs, files, tmp_path, capsys):
    (tmp_path / "good").write_text("".join(line + "\n" for line in pairs[1]))
    assert main(["evaluate", str(tmp_path / "good"), *files, "--output", "/dev/full", "--json"]) == 6
    said = capsys.readouterr()
    assert "bleu" in json.loads(said.out)
    assert "/dev/full" in said.err and "No space left on device" in said.err and "--resume" not in said.err


def test_sources_that_are_cut_are_counted(assets, files, capsys):
    capsys.readouterr()
    assert main(["evaluate", str(assets / "model"), *files, "--max-source-tokens", "4", *SHORT]) == 0
    # four sources are not empty, and of 160 pieces no sentence has only three
    assert "4 of 4 sources have more than 4 tokens and were cut\n" in capsys.readouterr().err


def test_names_are_shown_as_they_are(capsys):
    result = {"bleu": {"score": 1.0, "low": 0.0, "high": 2.0, "signature": "[/s]"}}
    show_evaluation(result, EvaluateConfig(model="[red]m", source=Path("[/x]")))
    said = capsys.readouterr().out
    assert "[red]m on [/x]" in said and "bleu|[/s]" in said
