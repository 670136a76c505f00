"""`esrl judge` on the command line: what is printed, what fails, and that the key is nowhere."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from judge_server import DATA, KEY, Act, JudgeServer, Seen, environ, error, grade

from esrl.cli import main
from esrl.judge import JudgeConfig
from esrl.report import write_report


@pytest.fixture
def toml(comparison: Callable[..., JudgeConfig], tmp_path: Path) -> Path:
    comparison(4)
    text = f"""
output_dir = "out"
questions = "questions.jsonl"
answers = ["ours.jsonl", "theirs.jsonl"]
templates = "{DATA / "judge_prompts.jsonl"}"
judge = "gpt-4"
num_resamples = 200
[request]
min_delay_seconds = 0.01
max_delay_seconds = 0.02
max_attempts = 2
"""
    (tmp_path / "judge.toml").write_text(text)
    return tmp_path / "judge.toml"


def use(monkeypatch: pytest.MonkeyPatch, server: JudgeServer) -> None:
    for name, value in environ(server).items():
        monkeypatch.setenv(name, value)


def test_the_command_prints_a_table_and_json(serve, toml, monkeypatch, capsys):
    server = serve(grade)
    use(monkeypatch, server)
    assert main(["judge", str(toml)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"ours +│ +32 │ +\d+\.\d to \d+\.\d │ +40 │ +8 │ +2 │ +2 ", said)
    assert "ours less theirs: +6.00 points" in said and "ours wins 2, ties 2, loses 0; win rate 75.0%" in said
    assert server.seen[0].body["model"] == "gpt-4"  # a name, not a path beside the file
    assert main(["judge", str(toml), "--json", "--limit", "2", "--request.concurrency", "1"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["questions"] == 2 and result["cost"]["reused"] == 4 and len(server.seen) == 8


def test_the_command_without_a_file(serve, toml, monkeypatch, capsys, tmp_path):
    use(monkeypatch, serve(grade))
    monkeypatch.chdir(tmp_path)
    words = ["--output-dir", "o", "--questions", "questions.jsonl", "--answers", "ours.jsonl", "theirs.jsonl"]
    words += ["--templates", str(DATA / "judge_prompts.jsonl"), "--judge", "gpt-4", "--mode", "pairwise", "--json"]
    assert main(["judge", *words]) == 0
    assert json.loads(capsys.readouterr().out)["wins"]["wins"] == 2
    assert main(["judge", *(word for word in words if word != "theirs.jsonl")]) == 2
    assert "mode 'pairwise' needs two" in capsys.readouterr().err


def test_the_command_fails_in_one_line(serve, toml, monkeypatch, capsys):
    assert main(["judge", str(toml)]) == 2
    assert "no endpoint is named; set ESRL_JUDGE_URL" in capsys.readouterr().err
    use(monkeypatch, serve(lambda seen: error(401, f"Incorrect key {KEY}")))
    assert main(["judge", str(toml), "--debug"]) == 8
    said = capsys.readouterr()
    assert "HTTP 401: Incorrect key [key]. Check the key (ESRL_JUDGE_KEY)" in said.err
    assert KEY not in said.err + said.out
    assert main(["judge", str(toml), "--judgee", "x"]) == 2
    assert "Did you mean --judge" in capsys.readouterr().err


def test_the_key_is_nowhere_on_disk_or_in_what_is_said(serve, toml, monkeypatch, capfd, caplog, tmp_path):
    caplog.set_level("DEBUG")

    def act(seen: Seen) -> Act:
        if seen.number % 3 == 0:
            return error(500, f"{KEY} is in trouble")
        return Act(text=f"{grade(seen).text} You sent {seen.headers['authorization']}.")

    server = serve(act)
    use(monkeypatch, server)
    # a third of all requests fails, some twice: the rest is asked for again
    codes = [main(["judge", str(toml), "--debug"]) for _ in range(6)]
    assert codes[-1] == 0 and set(codes) <= {0, 8}
    write_report([tmp_path / "out"], tmp_path / "report.html")
    said = capfd.readouterr()
    assert KEY not in said.out + said.err + caplog.text
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = {"judgments.jsonl", "result.json", "config.toml", "questions.jsonl", "report.html"}
    assert {path.name for path in files} >= names
    assert not [path for path in files if KEY.encode() in path.read_bytes() or b"4711" in path.read_bytes()]
    assert "You sent Bearer [key]." in (tmp_path / "out" / "judgments.jsonl").read_text()
    assert all(seen.headers["authorization"] == f"Bearer {KEY}" for seen in server.seen)


def test_a_report_shows_the_totals(serve, toml, monkeypatch, tmp_path):
    use(monkeypatch, serve(grade))
    assert main(["judge", str(toml)]) == 0
    page = write_report([tmp_path / "out"], tmp_path / "report.html").read_text()
    assert all(
        text in page for text in ("ours", "theirs", "esrl-judge|judge:gpt-4|mode:single", "The longer answer won")
    )


def test_the_written_configuration_gives_the_same_run(serve, toml, monkeypatch, tmp_path, capsys):
    server = serve(grade)
    use(monkeypatch, server)
    assert main(["judge", str(toml)]) == 0
    assert main(["judge", str(tmp_path / "out" / "config.toml")]) == 0
    assert len(server.seen) == 8
