"""`esrl demo` from start to report, with numbers so small that nothing is learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import esrl.demo as demo_module
from esrl.settings import merge

TINY: dict[str, dict[str, Any]] = {
    "mle.toml": {
        "model": {"vocab_size": 160},
        "development": {"decoding": {"max_new_tokens": 5}},
        "likelihood": {"batch_tokens": 200},
        "training": {"max_steps": 2, "eval_steps": 2},
    },
    "rl.toml": {
        "data": {"limit": 8},
        "development": {"decoding": {"max_new_tokens": 5}},
        "step": {"batch_size": 4},
        "sampling": {"max_new_tokens": 5},
        "allocation": {"max_samples": 2},
        "training": {"max_steps": 2, "eval_steps": 2},
    },
}
COLUMNS = ["model", "BLEU", "BLEU gain", "exact match %", "exact gain", "training s", "peak MB"]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = demo_module._settings
    monkeypatch.setattr(demo_module, "_settings", lambda name: merge(settings(name), TINY[name]))
    for name, number in (("NUM_TRAIN", 60), ("NUM_DEV", 4), ("NUM_TEST", 6)):
        monkeypatch.setattr(demo_module, name, number)
    # the page of each run is drawn by tests/test_cli.py; the demo's own, of all three, is drawn here
    monkeypatch.setattr("esrl.commands.write_report", lambda runs, path: path.touch() or path)


def test_the_demo_ends_with_a_table_a_result_and_a_report(tiny, tmp_path, capsys):
    folder = tmp_path / "demo"
    result = demo_module.demo(demo_module.DemoConfig(output_dir=folder))
    names = ["MLE (the start)", "MLE, trained on as long as ESRL", "ESRL"]
    assert [row["model"] for row in result["table"]] == names
    assert all(list(row) == COLUMNS for row in result["table"])
    assert result["table"][0]["BLEU gain"] == "" and " to " in result["table"][2]["BLEU gain"]
    saved = json.loads((folder / "esrl" / "result.json").read_bytes())
    assert saved == {"table": result["table"], "note": result["note"]}
    assert [list(row) for row in saved["table"]] == [COLUMNS] * 3  # in this order, for the report shows it
    page = Path(result["report"]).read_text(encoding="utf-8")
    assert Path(result["report"]) == folder / "report.html" and all(name in page for name in names)
    assert len((folder / "data" / "test.tsv").read_text(encoding="utf-8").splitlines()) == 1 + 6
    demo_module.show_demo(result)
    said = capsys.readouterr().out
    assert "6 unseen sentences" in said and "ESRL" in said
    # a demo that was stopped goes on; of one that is done nothing is trained again
    logs = [(folder / run / "metrics.jsonl").read_bytes() for run in ("mle", "esrl", "mle-longer")]
    again = demo_module.demo(demo_module.DemoConfig(output_dir=folder, resume=True))
    assert again == result
    assert logs == [(folder / run / "metrics.jsonl").read_bytes() for run in ("mle", "esrl", "mle-longer")]
