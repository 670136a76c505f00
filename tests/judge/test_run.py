"""`esrl judge` as a whole over real HTTP: what is asked, kept, resumed and reported."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
from judge_server import DATA, KEY, Act, Seen, environ, error, grade, kept, write_lines

from esrl.errors import LockedError, StorageError
from esrl.judge import JudgeError, run_judge
from esrl.training.lock import RunLock


def test_single_scores_of_two_systems(serve, comparison):
    server = serve(grade)
    config = comparison(6)
    result = run_judge(config, environ(server))
    ours, theirs = result["systems"]
    # questions 1, 3, 5: 9 and 6; 2, 4, 6: 7 and 7
    assert (ours["name"], ours["total"], ours["of"], ours["mean"]) == ("ours", 48, 60, 8)
    assert (theirs["name"], theirs["total"]) == ("theirs", 39)
    assert ours["categories"]["odd"] == {"judged": 3, "total": 27, "mean": 9}
    assert ours["mean_words"] == 9 and theirs["mean_words"] == 3
    difference, wins = result["difference"], result["wins"]
    assert difference["difference"] == 9 and difference["low"] >= 0
    assert (wins["wins"], wins["ties"], wins["losses"], wins["win_rate"]) == (3, 3, 0, 0.75)
    assert wins["longer_won"] == 1.0 and "The longer answer won 100% of 3" in result["note"]
    assert result["signature"].startswith("esrl-judge|judge:judge-7b|mode:single|template:single-v1|temperature:0|")
    assert len(server.seen) == 12 and result["cost"]["asked"] == 12 and result["cost"]["prompt_tokens"] == 1200
    assert all(seen.body["temperature"] == 0 and seen.body["model"] == "judge-7b" for seen in server.seen)
    rows = [json.loads(line) for line in (config.output_dir / "questions.jsonl").read_text().splitlines()]
    assert rows[0] == {"question_id": "1", "category": "odd", "scores": [9.0, 6.0]}
    assert json.loads((config.output_dir / "result.json").read_text()) == result


def test_one_system_alone(serve, comparison):
    server = serve(grade)
    both = comparison(4)
    result = run_judge(dataclasses.replace(both, answers=both.answers[:1]), environ(server))
    assert [system["total"] for system in result["systems"]] == [32] and "wins" not in result
    assert len(server.seen) == 4


def test_pairs_are_asked_in_both_orders(serve, comparison):
    server = serve(grade)
    result = run_judge(comparison(6, mode="pairwise"), environ(server))
    assert len(server.seen) == 12
    orders = Counter(tuple(answer.split()[0] for answer in seen.answers) for seen in server.seen)
    assert orders == {("ours", "theirs"): 6, ("theirs", "ours"): 6}
    wins = result["wins"]
    assert (wins["wins"], wins["ties"], wins["losses"]) == (3, 3, 0)
    assert result["position"]["consistent"] == 1.0 and result["position"]["bias"] == 0.0
    assert "swap:yes" in result["signature"] and "template:pair-v2|" in result["signature"]


def test_a_judge_that_takes_whatever_comes_first_decides_nothing(serve, comparison):
    server = serve(lambda seen: Act(text="[[A]]"))
    result = run_judge(comparison(6, mode="pairwise"), environ(server))
    assert (result["wins"]["wins"], result["wins"]["ties"], result["wins"]["losses"]) == (0, 6, 0)
    position = result["position"]
    assert (position["consistent"], position["always_first"], position["bias"]) == (0.0, 6, 1.0)
    assert position["sign_test_p"] == 2 / 2**6
    fooled = run_judge(comparison(6, mode="pairwise", swap=False), environ(server))
    assert fooled["wins"]["wins"] == 6 and "position" not in fooled and fooled["cost"]["asked"] == 0


def test_questions_with_a_reference_take_the_other_template(serve, comparison, tmp_path):
    server = serve(grade)
    config = comparison(2)
    rows = [json.loads(line) for line in config.questions.read_text().splitlines()]
    rows[1]["reference_gpt4"] = "forty-two"
    write_lines(config.questions, rows)
    run_judge(config, environ(server))
    assert Counter("forty-two" in seen.prompt for seen in server.seen) == {True: 2, False: 2}
    result = run_judge(dataclasses.replace(config, use_references=False), environ(server))
    assert result["cost"]["asked"] == 2 and "forty-two" not in server.seen[-1].prompt


def test_the_recorded_reviews_through_the_whole_path(serve, comparison, tmp_path):
    """GPT-4 of March 2023 behind the endpoint: its published total comes out."""
    with gzip.open(DATA / "vicuna80_reviews.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if row["model_1"] == "alpaca-13b"]
    reviews = {str(row["question_id"]): row["review"] for row in rows}
    prompt = "[Question]\n{question}\n[Assistant 1]\n{answer_a}\n[Assistant 2]\n{answer_b}\n[System]\nTwo values."
    template = {"name": "v1", "type": "pairwise", "prompt_template": prompt, "output_format": "two scores"}
    answers = tuple(
        write_lines(tmp_path / f"{name}.jsonl", [{"question_id": n, "text": f"{name} #{n}."} for n in reviews])
        for name in ("alpaca-13b", "vicuna-13b")
    )

    def act(seen: Seen) -> Act:
        found = re.search(r"alpaca-13b #(\d+)\.", seen.prompt)
        assert found is not None
        return Act(text=reviews[found[1]])

    config = comparison(
        answers=answers, questions=DATA / "vicuna80_questions.jsonl.gz", mode="pairwise", swap=False, template="v1",
        templates=write_lines(tmp_path / "templates.jsonl", [template]), use_references=False,
    )  # fmt: skip
    result = run_judge(config, environ(serve(act)))
    assert [system["total"] for system in result["systems"]] == [583, 704]
    assert result["difference"]["difference"] == -121
    assert set(result["systems"][0]["categories"]) >= {"coding", "math", "writing", "fermi"}


# Faults


def misbehave(seen: Seen) -> Act:
    """Each of the first requests meets another fault."""
    faults = [
        error(429, "slow down", Retry_After="0.05"),
        error(500, "oh no"),
        Act(body=b'{"choices": [{"mess'),
        Act(close=True),
        Act(text="[[8]]", delay=0.8),
        Act(text="[[8]]", lose=5),
    ]
    return faults[seen.number] if seen.number < len(faults) else grade(seen)


def test_through_every_passing_fault(serve, comparison, patient):
    server = serve(misbehave)
    config = comparison(6, request=dataclasses.replace(patient, timeout_seconds=0.5, concurrency=2))
    result = run_judge(config, environ(server))
    assert result["systems"][0]["total"] == 48
    assert len(server.seen) == 12 + 6 and result["cost"]["retries"] == 6
    assert 1 < server.most_at_once <= 3  # one that was given up by the client may still be asleep in the server


def test_no_more_requests_at_once_than_allowed(serve, comparison, patient):
    server = serve(lambda seen: Act(text="[[8]]", delay=0.05))
    run_judge(comparison(10, request=dataclasses.replace(patient, concurrency=3)), environ(server))
    assert server.most_at_once == 3 and len(server.seen) == 20


def test_replies_without_a_score_are_left_out_named_and_asked_again_on_demand(serve, comparison):
    silent = True

    def act(seen: Seen) -> Act:
        return Act(text="I would rather not say.") if silent and "ours to 3" in seen.prompt else grade(seen)

    server = serve(act)
    config = comparison(4)
    result = run_judge(config, environ(server))
    ours, theirs = result["systems"]
    assert (ours["judged"], ours["unjudged"], ours["total"]) == (3, 1, 9 + 7 + 7)
    assert (theirs["judged"], theirs["total"]) == (4, 26) and result["unjudged"] == ["3"]
    assert result["difference"]["questions"] == 3 and "1 of 4 questions lack a judgment" in result["note"]
    silent = False
    assert run_judge(config, environ(server))["cost"]["asked"] == 0
    again = run_judge(dataclasses.replace(config, ask_again=True), environ(server))
    assert again["cost"]["asked"] == 1 and again["systems"][0]["total"] == 32 and again["unjudged"] == []
    assert len(server.seen) == 9


def test_a_question_that_is_refused_stops_the_result_but_not_the_others(serve, comparison):
    def act(seen: Seen) -> Act:
        return error(400, "too long for me") if "Question 2" in seen.prompt else grade(seen)

    server = serve(act)
    config = comparison(6)
    with pytest.raises(JudgeError, match="2 of 12 judgments are missing: HTTP 400: too long for me") as caught:
        run_judge(config, environ(server))
    assert "--allow-missing" in str(caught.value) and not (config.output_dir / "result.json").exists()
    assert len(kept(config)) == 10
    result = run_judge(dataclasses.replace(config, allow_missing=True), environ(server))
    assert result["missing"] == 2 and result["unjudged"] == ["2"] and result["systems"][0]["judged"] == 5
    assert len(server.seen) == 12 + 2


@pytest.mark.parametrize(
    ("act", "said", "most"),
    [
        (error(401, "no"), "HTTP 401: no. Check the key", 2),  # one for each request that was under way
        (error(400, "never"), "HTTP 400: never", 3 + 1),  # max_failures, and the other one under way
        (error(503, "down"), "HTTP 503: down (4 attempts)", 4 * (3 + 1)),
    ],
)
def test_an_endpoint_that_does_not_work_ends_the_run(serve, comparison, patient, act, said, most):
    server = serve(lambda seen: act)
    config = comparison(40, request=dataclasses.replace(patient, concurrency=2, max_failures=3))
    with pytest.raises(JudgeError) as caught:
        run_judge(config, environ(server))
    assert said in str(caught.value) and "80 of 80 judgments are missing" in str(caught.value)
    assert len(server.seen) <= most and caught.value.exit_code == 8


def test_faults_between_answers_do_not_end_the_run(serve, comparison, patient):
    server = serve(lambda seen: error(400, "odd") if seen.number % 2 else grade(seen))
    config = comparison(10, request=dataclasses.replace(patient, concurrency=1, max_failures=2))
    with pytest.raises(JudgeError, match="10 of 20 judgments are missing"):
        run_judge(config, environ(server))
    assert len(server.seen) == 20


# Resuming


def test_what_is_judged_is_not_asked_for_again_unless_it_changed(serve, comparison):
    server = serve(grade)
    config = comparison(4)
    first = run_judge(config, environ(server))
    again = run_judge(config, {})  # not even an endpoint is needed
    assert len(server.seen) == 8 and (again["cost"]["asked"], again["cost"]["reused"]) == (0, 8)
    assert {**again, "cost": 0} == {**first, "cost": 0}
    rows = [json.loads(line) for line in config.answers[0].read_text().splitlines()]
    rows[0]["answer"] = "ours to 1 anew"
    write_lines(config.answers[0], rows)
    run_judge(config, environ(server))
    assert len(server.seen) == 9 and "ours to 1 anew" in server.seen[-1].prompt
    run_judge(dataclasses.replace(config, judge="judge-70b"), environ(server))
    assert len(server.seen) == 9 + 8
    # the other mode keeps its judgments beside them
    run_judge(dataclasses.replace(config, mode="pairwise"), environ(server))
    assert len(server.seen) == 17 + 8 and len(kept(config)) == 25


def test_equal_answers_are_asked_about_once(serve, comparison):
    server = serve(lambda seen: Act(text="[[5]]"))
    config = comparison(3)
    config.answers[1].write_text(config.answers[0].read_text())
    result = run_judge(config, environ(server))
    assert len(server.seen) == 3 and result["difference"]["p_value"] == 1.0 and result["wins"]["ties"] == 3


CHILD = """
import json, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs the tests in the background has it ignored
from pathlib import Path
from esrl.judge import JudgeConfig, run_judge
from esrl.settings import build
run_judge(build(JudgeConfig, json.loads(sys.argv[1]), "test"))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_killed_run_goes_on_with_what_is_missing(serve, comparison, number):
    """The signal comes from the server, in the middle of the sixth request."""
    config = comparison(6)
    values = {
        "output_dir": str(config.output_dir), "questions": str(config.questions), "templates": str(config.templates),
        "answers": [str(path) for path in config.answers], "judge": config.judge, "request": {"concurrency": 1},
    }  # fmt: skip
    child: list[subprocess.Popen[bytes]] = []

    def act(seen: Seen) -> Act:
        if seen.number == 5:
            os.kill(child[0].pid, number)
            child[0].wait()
        return grade(seen)

    server = serve(act)
    words = [sys.executable, "-c", CHILD, json.dumps(values)]
    child.append(subprocess.Popen(words, env={**os.environ, **environ(server)}, stderr=subprocess.PIPE))
    _, said = child[0].communicate(timeout=60)
    assert child[0].returncode != 0 and len(server.seen) == 6, said
    assert len(kept(config)) == 5 and not (config.output_dir / "result.json").exists()
    asked = [seen.prompt for seen in server.seen[:5]]
    result = run_judge(config, environ(server))
    assert len(server.seen) == 6 + 7 and not {seen.prompt for seen in server.seen[6:]} & set(asked)
    assert result["systems"][0]["total"] == 48 and result["cost"]["reused"] == 5
    assert KEY.encode() not in said


@pytest.mark.parametrize("tail", [b'{"key": "ab', b'{"key": "0123", "te\n', b"\0\0\0\n", b"{}\n"])
def test_a_torn_last_line_is_cut_off_and_asked_for_again(serve, comparison, capsys, tail):
    server = serve(grade)
    config = comparison(3)
    run_judge(config, environ(server))
    file = config.output_dir / "judgments.jsonl"
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:-1]) + tail)
    result = run_judge(config, environ(server))
    assert len(server.seen) == 7 and result["systems"][0]["judged"] == 3
    assert "judgments.jsonl:6: the last line is torn" in capsys.readouterr().err
    assert len(kept(config)) == 6 and [line["key"] for line in kept(config)] == [json.loads(x)["key"] for x in lines]


def test_a_damaged_line_in_the_middle_is_not_passed_over(serve, comparison):
    server = serve(grade)
    config = comparison(3)
    run_judge(config, environ(server))
    file = config.output_dir / "judgments.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([lines[0], b"{\n", *lines[2:]]))
    with pytest.raises(StorageError, match=r"judgments.jsonl:2 is damaged; delete that line"):
        run_judge(config, environ(server))
    assert len(server.seen) == 6


def test_strange_text_survives_the_file(serve, comparison):
    text = "a\u2028b\u0085c\x00\r\n\ud83d\ude00 \ud800 [[8]]"
    config = comparison(2)
    server = serve(lambda seen: Act(text=text))
    run_judge(config, environ(server))
    assert run_judge(config, {})["systems"][0]["total"] == 16
    assert len(config.output_dir.joinpath("judgments.jsonl").read_bytes().split(b"\n")) == 5


def test_two_runs_do_not_share_a_folder(serve, comparison):
    config = comparison(2)
    with RunLock(config.output_dir), pytest.raises(LockedError):
        run_judge(config, environ(serve(grade)))


def test_inside_a_running_event_loop(serve, comparison):
    """As in a notebook."""
    import asyncio

    server = serve(grade)

    async def cell() -> dict[str, Any]:
        return run_judge(comparison(2), environ(server))

    assert asyncio.run(cell())["systems"][0]["total"] == 16
