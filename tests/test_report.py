"""The report: what it shows, what it leaves out, that nothing from the data becomes markup, and how long it takes."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esrl.errors import StorageError
from esrl.report import write_report
from esrl.report.figures import _spread_out, smooth, thin
from esrl.report.markup import duration, element, escape, number, plain, visible
from esrl.report.runs import read_run

SIGNATURE = "esrl|method:esrl|cap:bleu|k:20|beta:0.3|tau:0.6-1.0|base:fifo-1000|alpha:0.005|seed:1|v:0.1.0"
SENTENCES = (
    ("ein mann fährt mit dem rad durch die stadt .", "a man rides his bike through the city ."),
    ("zwei kinder spielen im schnee .", "two children are playing in the snow ."),
    ("eine frau liest auf einer bank ein buch .", "a woman is reading a book on a bench ."),
    ("drei hunde laufen über eine grüne wiese .", "three dogs run across a green meadow ."),
    ("ein junge springt in das kalte wasser .", "a boy jumps into the cold water ."),
)


def make_run(path: Path, *, steps: int = 600, seed: int = 1, steps_per_epoch: int = 120, k_max: int = 20) -> Path:
    """A realistic RL run: reward and capability rise, the plan spreads as it learns the prompts, noise throughout."""
    rng = random.Random(seed)
    path.mkdir(parents=True)
    lines = [{"step": 0, "epoch": 0.0, "kind": "evaluation", "dev_bleu": 35.3, "dev_chrf": 58.0, "best": True}]
    best = 35.3
    for step in range(1, steps + 1):
        lines.append(_training_line(rng, step, steps, step / steps_per_epoch, k_max))
        if step % max(1, steps // 10) == 0:
            score = 35.3 + (2.0 + 0.4 * seed) * (1 - math.exp(-3 * step / steps)) + rng.gauss(0, 0.25)
            line = {"step": step, "epoch": step / steps_per_epoch, "kind": "evaluation", "seconds_total": 31.0}
            lines.append(line | {"dev_bleu": score, "dev_chrf": 22 + score, "best": score > best})
            best = max(best, score)
    _write_lines(path / "metrics.jsonl", lines)
    _write_lines(path / "samples.jsonl", _sample_records(rng, steps, steps_per_epoch))
    config = f'method = "esrl"\nseed = {seed}\n\n[allocation]\nmax_samples = {k_max}\nelimination_ratio = 0.3\n'
    (path / "config.toml").write_text(config, encoding="utf-8")
    environment = {"signature": SIGNATURE, "torch": "2.13.0", "device": {"name": "cpu", "threads": 2}, "commit": None}
    (path / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    return path


def _training_line(rng: random.Random, step: int, steps: int, epoch: float, k_max: int) -> dict[str, object]:
    progress = 1 - math.exp(-3 * step / steps)
    counts: dict[str, int] = {}
    for _ in range(64):
        share = min(1.0, max(0.0, rng.gauss(0.27, 0.10 + 0.15 * min(1.0, epoch))))
        k = str(max(1, round(k_max * (1 - share))))
        counts[k] = counts.get(k, 0) + 1
    mean = sum(int(k) * count for k, count in counts.items()) / 64
    seconds = {"seconds_sample": 3.1 * mean / k_max, "seconds_reward": 0.25, "seconds_score": 2.2 * mean / k_max}
    seconds = {name: value * rng.uniform(0.85, 1.2) for name, value in seconds.items()}
    return {
        "step": step,
        "epoch": epoch,
        "reward_mean": 0.34 + 0.06 * progress + rng.gauss(0, 0.012),
        "reward_std": 0.16 + rng.gauss(0, 0.01),
        "num_samples_mean": mean,
        "num_samples_histogram": counts,
        "temperature_mean": 0.6 + 0.4 * mean / k_max,
        "budget_used": mean / k_max + (0.05 if epoch <= 1 else 0),
        "planned_from_memory": 0.0 if epoch <= 1 else 1.0,
        "capability_mean": 0.33 + 0.07 * progress + rng.gauss(0, 0.01),
        "unique_share": 0.93 - 0.2 * progress + rng.gauss(0, 0.01),
        "truncated_share": max(0.0, 0.02 - 0.02 * progress + rng.gauss(0, 0.003)),
        "mrt_prompts": 64 - counts.get("1", 0),
        "reinforce_prompts": counts.get("1", 0),
        "tokens_sampled": int(mean * 64 * 14),
        **seconds,
        "seconds_total": sum(seconds.values()) + 0.4,
        "peak_memory_mb": 2100 + min(600, step * 4),
        "loss": rng.gauss(0, 0.3) - 0.4 * progress,
        "grad_norm": abs(rng.gauss(1.1, 0.25)) + (6 if rng.random() < 0.004 else 0),
        "learning_rate": 1e-5 * min(1.0, step / 60) * min(1.0, (60 / step) ** 0.5),
    }


def _sample_records(rng: random.Random, steps: int, steps_per_epoch: int) -> list[dict[str, object]]:
    records = []
    for step in (1, steps_per_epoch + 1, max(steps - 10, 1)):
        for i, (prompt, reference) in enumerate(SENTENCES):
            words = reference.split()
            samples = []
            for j in range(8):
                kept = [word for word in words if rng.random() < 0.75 + 0.2 * step / steps]
                samples.append({"text": " ".join(kept), "reward": len(kept) / len(words), "count": 1 + (j == 0) * 3})
            record = {"step": step, "epoch": step / steps_per_epoch, "example_id": f"id{i}", "prompt": prompt}
            plan = {"num_samples": 14, "temperature": 0.88, "capability": 0.3 + 0.1 * step / steps}
            records.append(record | {"reference": reference, "samples": samples} | plan)
    return records


def make_mle_run(path: Path, *, steps: int = 400) -> Path:
    rng = random.Random(7)
    path.mkdir(parents=True)
    lines: list[dict[str, object]] = []
    for step in range(1, steps + 1):
        loss = 2.1 + 5 * math.exp(-4 * step / steps) + rng.gauss(0, 0.05)
        line = {"step": step, "epoch": step / 100, "loss": loss, "tokens": 4000, "seconds_total": 0.8}
        rate = 5e-4 * min(step / 80, (80 / step) ** 0.5)
        lines.append(line | {"peak_memory_mb": 1500, "grad_norm": 1 + math.exp(-step / 50), "learning_rate": rate})
        if step % 100 == 0:
            lines.append({"step": step, "epoch": step / 100, "kind": "evaluation", "dev_bleu": 35.3 * step / steps})
    _write_lines(path / "metrics.jsonl", lines)
    return path


def _write_lines(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


# --- reading the page back -------------------------------------------------------------------------------------------

PAGE_TAGS = """html head meta title style body main h1 h2 h3 p section div span b code pre ul ol li dl dt dd figure
    figcaption table thead tbody tr th td details summary"""
SVG_TAGS = "svg g path text defs use clippath rect tspan"
PAGE_ATTRIBUTES = "lang charset name content http-equiv class scope style dir open"
SVG_ATTRIBUTES = "viewbox role aria-label d style id x y width height clip-path href transform clip-rule"
TAGS = {*PAGE_TAGS.split(), *SVG_TAGS.split()}
ATTRIBUTES = {*PAGE_ATTRIBUTES.split(), *SVG_ATTRIBUTES.split()}


class Page(HTMLParser):
    """Collects every element, its attributes, and the text; ``tables`` is cells by row."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            return
        self.texts.append(data)
        if self.rows and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    def headings(self) -> list[str]:
        return re.findall(r"<h2>(.*?)</h2>", self.source)

    def assert_harmless(self) -> None:
        assert not self.open
        for tag, attributes in self.elements:
            assert tag in TAGS, tag
            unknown = set(attributes) - ATTRIBUTES
            assert not unknown, (tag, unknown)
            assert attributes.get("href", "#").startswith("#"), attributes
            assert "url(" not in attributes.get("style", ""), attributes
            assert re.fullmatch(r"(url\(#\w+\))?", attributes.get("clip-path", "")), attributes
        ids = [attributes["id"] for _, attributes in self.elements if "id" in attributes]
        assert len(ids) == len(set(ids)), "two elements share an id"
        hidden = re.findall("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", self.source)
        assert not hidden, [hex(ord(char)) for char in hidden]


def report(*runs: Path) -> Page:
    page = Page(write_report(runs, runs[0].parent / "report.html"))
    page.assert_harmless()
    return page


# --- what it shows ---------------------------------------------------------------------------------------------------


def test_a_run_is_shown_in_full(tmp_path):
    run = make_run(tmp_path / "esrl-k20", steps=60, steps_per_epoch=20)
    page = report(run)
    assert page.headings() == [
        "Did it get better?",
        "Optimisation",
        "Where the samples went",
        "How capability moved",
        "Time and memory",
        "Samples to read",
        "Configuration and environment",
    ]
    assert SIGNATURE in page.text
    assert "elimination_ratio = 0.3" in page.text
    assert "device.threads" in page.text
    best = read_run(run).best_evaluation
    tile = re.search(r"dev bleu (\S+) (\S+) since step 0, best at step (\d+)", page.text)
    assert tile is not None
    assert tile.groups() == (f"{best['dev_bleu']:.2f}", f"+{best['dev_bleu'] - 35.3:.2f}", str(best["step"]))
    assert "the snow" in page.text
    assert "epoch 1 · step 1 · k = 14 · τ = 0.88 · capability 0.30" in page.text


def test_summary_numbers_worked_by_hand(tmp_path):
    # Tokens 100 + 300; seconds 1.5 + 2 + 6.5 of evaluation = 10; peak max(700, 900); budget (.8 + .6) / 2 = 70 %.
    # Reward: the first and the last tenth of two lines are a line each.
    run = tmp_path / "run"
    run.mkdir()
    one = {"step": 1, "epoch": 0.5, "reward_mean": 0.25, "num_samples_mean": 8, "budget_used": 0.8}
    two = {"step": 2, "epoch": 1.0, "reward_mean": 0.5, "num_samples_mean": 6, "budget_used": 0.6}
    lines = [
        one | {"tokens_sampled": 100, "seconds_total": 1.5, "peak_memory_mb": 700},
        two | {"tokens_sampled": 300, "seconds_total": 2.0, "peak_memory_mb": 900},
        {"step": 2, "epoch": 1.0, "kind": "evaluation", "dev_bleu": 30.0, "best": True, "seconds_total": 6.5},
    ]
    _write_lines(run / "metrics.jsonl", lines)
    text = report(run).text
    for expected in [
        "Reinforcement learning, 2 steps, 1 epochs, 1 evaluation.",
        "tokens sampled 400",
        "time 10.0 s of it 6.5 s in evaluations",
        "peak memory 900 MB",
        "samples per prompt 7 70 % of the budget used",
        "reward, at the end 0.5 0.25 at the start (+0.25)",
    ]:
        assert expected in text, expected


def test_several_runs_are_compared(tmp_path):
    runs = [make_run(tmp_path / "esrl", steps=40), make_run(tmp_path / "uniform", steps=40, seed=2)]
    runs.append(make_mle_run(tmp_path / "mle", steps=100))
    page = report(*runs)
    header = page.rows[0]
    assert header[:3] == ["", "run", "best dev_bleu"]
    assert header[-2:] == ["hours", "peak MB"]
    by_name = {row[1]: dict(zip(header, row, strict=True)) for row in page.rows[1:4]}
    assert by_name["mle"]["best dev_bleu"] == "35.3"  # 35.3 * 100 / 100, the only evaluation
    assert by_name["mle"]["tokens sampled"] == "–"
    assert by_name["mle"]["hours"] == "0.02222"  # 100 steps of 0.8 s / 3600
    tokens = read_run(runs[0]).total("tokens_sampled")
    assert by_name["esrl"]["tokens sampled"] == f"{int(tokens):,}"
    # Labels at the ends of the curves, inside the figures.
    assert {"A", "B", "C"} <= set(re.findall(r"<text[^>]*>(\w)</text>", page.source))


def test_alarms_are_listed_once_and_marked(tmp_path):
    run, calm = make_run(tmp_path / "run", steps=40), make_run(tmp_path / "calm", steps=40)
    before = report(run)
    assert "Alarms" not in before.text
    said = [
        (30, "KL blow-up: the policy is far away"),
        (7, "something else"),
        (30, "KL blow-up: the policy is far away"),
    ]
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        for step, text in said:
            file.write(json.dumps({"step": step, "epoch": 0.5, "kind": "alarm", "alarm": text}) + "\n")
        file.write('{"kind": "alarm", "alarm": "of no step"}\n{"step": 3, "kind": "alarm", "alarm": 5}\n')
    assert read_run(run).training == read_run(calm).training
    page = report(run)
    assert [row for row in page.rows if "KL blow-up" in row] == [["30", "KL blow-up", "the policy is far away"]]
    assert ["7", "", "something else"] in page.rows
    # bleu, chrf and the reward: two triangles each
    assert page.source.count("<use ") - before.source.count("<use ") == 6
    assert ["A", "30", "KL blow-up", "the policy is far away"] in report(run, calm).rows


def test_many_alarms_are_cut_short(tmp_path):
    run = make_run(tmp_path / "run", steps=8)
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        for number_said in range(60):
            file.write(json.dumps({"step": 5, "kind": "alarm", "alarm": f"x: {number_said}"}) + "\n")
    page = report(run)
    assert sum(row[1:2] == ["x"] for row in page.rows) == 50 and ["", "", "and 10 more"] in page.rows


def test_final_results_are_a_table(tmp_path):
    run = make_run(tmp_path / "run", steps=5)
    rows = [{"system": "MLE", "bleu": 33.774}, {"system": "ESRL", "bleu": 34.95, "p": 0.004}]
    result = {"table": rows, "note": "greedy decoding", "test": {"segments": 1000}}
    (run / "result.json").write_text(json.dumps(result), encoding="utf-8")
    page = report(run)
    assert page.rows[:3] == [["system", "bleu", "p"], ["MLE", "33.77", ""], ["ESRL", "34.95", "0.004"]]
    assert ["test.segments", "1,000"] in page.rows
    assert "greedy decoding" in page.text


def test_the_same_run_gives_the_same_bytes(tmp_path):
    run = make_run(tmp_path / "run", steps=30)
    first = write_report([run], tmp_path / "a.html").read_bytes()
    assert write_report([run], tmp_path / "b.html").read_bytes() == first


# --- what is missing or damaged --------------------------------------------------------------------------------------


def test_an_mle_run_has_no_empty_sections(tmp_path):
    page = report(make_mle_run(tmp_path / "mle", steps=100))
    assert page.headings() == ["Did it get better?", "Optimisation", "Time and memory", "Not in this report"]
    assert "Maximum likelihood training, 100 steps" in page.text
    assert "capability_mean" in page.text  # named as never logged


def test_damaged_lines_are_passed_over_and_noted(tmp_path):
    run = make_run(tmp_path / "run", steps=20)
    before = read_run(run)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'[1, 2]\n{"step": 21, "loss": \xff}\n{"step": 22, "loss": 0.1, "rew')
    after = read_run(run)
    assert after.training == before.training
    assert "metrics.jsonl has 3 damaged lines, passed over" in report(run).text


def test_a_step_logged_again_after_a_resume_counts_once(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    rows = [{"step": 1, "tokens": 5}, {"step": 2, "tokens": 7}, {"step": 1, "tokens": 6}, {"tokens": 99}]
    _write_lines(run / "metrics.jsonl", rows)
    assert read_run(run).column("tokens")[1].tolist() == [6, 7]


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "config.toml", "environment.json"])
def test_a_missing_file_is_named(tmp_path, name):
    run = make_run(tmp_path / "run", steps=8)
    (run / name).unlink()
    assert f"{name} is missing" in report(run).text


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} is no run folder")):
        write_report([tmp_path], tmp_path / "report.html")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'none'} is not a folder")):
        write_report([tmp_path / "none"], tmp_path / "report.html")
    with pytest.raises(ValueError, match="no run is given"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(ValueError, match="is a folder; name the report's file"):
        write_report([make_run(tmp_path / "run", steps=2)], tmp_path)


def test_a_report_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    run = make_run(tmp_path / "run", steps=2)
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(StorageError, match=r"report\.html cannot be written"):
        write_report([run], tmp_path / "file" / "report.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([10**400, -1e308]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
LOGGED = """step epoch kind dev_bleu best reward_mean reward_std num_samples_histogram loss prompt seconds_sample
    seconds_total capability_mean samples example_id table note signature alarm"""
KEYS = st.sampled_from(LOGGED.split())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.dictionaries(KEYS, JSON_VALUES, max_size=8), max_size=5), steps=st.booleans())
def test_any_json_gives_a_page(tmp_path_factory, rows, steps):
    run = tmp_path_factory.mktemp("any") / "run"
    run.mkdir()
    if steps:
        rows = [row | {"step": i} for i, row in enumerate(rows)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "metrics.jsonl").write_text(lines, encoding="utf-8")
    (run / "samples.jsonl").write_text(lines, encoding="utf-8")
    for name in ("environment.json", "result.json"):
        (run / name).write_text(json.dumps(rows[0] if rows else []), encoding="utf-8")
    report(run)


# --- nothing from the data becomes markup ----------------------------------------------------------------------------

PAYLOADS = [
    "<script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    "</title><img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "' onmouseover='alert(1)",
    "</pre></details><iframe src=//example.org></iframe>",
    "<!-- ]]> --><base href=//example.org>",
    "&lt;script&gt;&#60;b&#62;",
    "$\\frac{1}{2$ $x^$ \\unknown{",
    "\x1b[31mred\x1b]0;title\x07",
    "\u202egnp.exe\u2066 \u200e\ufeff",
    "\ud800 lone \udfff",
    "\x00 \x85 \u2028 \ufffe",
]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_payloads_stay_text(tmp_path, payload):
    run, other = tmp_path / "run", tmp_path / "other"
    for folder in (run, other):
        folder.mkdir()
        _write_lines(folder / "metrics.jsonl", [{"step": 1, "reward_mean": 0.1}])
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 4, "kind": "evaluation", f"dev_{payload}": 1.5, "best": True}) + "\n")
        file.write(json.dumps({"step": 1, "kind": "alarm", "alarm": payload}) + "\n")
    sample = {"text": payload, "reward": 0.5, "count": 2}
    record = {"step": 1, "epoch": 1, "example_id": payload, "prompt": payload, "reference": payload}
    (run / "samples.jsonl").write_text(json.dumps(record | {"samples": [sample]}) + "\n", encoding="utf-8")
    (run / "config.toml").write_text(payload, encoding="utf-8", errors="replace")
    facts = {"signature": payload, payload: {payload: [payload]}}
    (run / "environment.json").write_text(json.dumps(facts), encoding="utf-8")
    (run / "result.json").write_text(json.dumps({"table": [{payload: payload}], "note": payload}), encoding="utf-8")
    named = tmp_path / ("run " + re.sub(r"[/\x00\ud800-\udfff]", "_", payload))
    run.rename(named)
    for runs in ([named], [named, other]):
        page = report(*runs)
        assert page.text.count(visible(payload).strip()) >= 5  # sample, prompt, signature, configuration, result


def test_hidden_characters_become_visible():
    assert visible("a\u202eb\x1b\ud800") == "a⟨U+202E⟩b⟨U+001B⟩⟨U+D800⟩"
    kept = "zwei\nZeilen\tها\u200cی 👩\u200d🔬"
    assert visible(kept) == kept
    assert element("p", "<b>", class_='"') == '<p class="&quot;">&lt;b&gt;</p>'


@given(st.text())
def test_escaping_leaves_no_markup_and_loses_nothing(text):
    page = HTMLParser(convert_charrefs=True)
    found: list[str] = []
    page.handle_data = found.append  # type: ignore[method-assign]
    page.handle_starttag = lambda tag, attrs: pytest.fail(f"an element {tag}")  # type: ignore[method-assign]
    page.feed(escape(text))
    page.close()
    assert "".join(found) == visible(text)


# --- numbers and curves ----------------------------------------------------------------------------------------------


def test_numbers_are_readable():
    assert [number(x) for x in (1234567, 0.00004, 12.3456, 1234.5, 3.0, math.nan)] == [
        "1,234,567", "4e-05", "12.35", "1,234", "3", "–",
    ]  # fmt: skip
    assert [duration(x) for x in (12.34, 250, 11_550)] == ["12.3 s", "4 min 10 s", "3 h 12 min"]
    assert plain({"a": [1, None, True]}) == "a: 1, –, yes"


def test_thinning_keeps_means():
    # Ten points into five: neighbours 0, 1 -> 0.5 and so on; y = 2x.
    x = np.arange(10.0)
    thinned_x, thinned_y = thin(x, 2 * x, limit=5)
    assert thinned_x.tolist() == [0.5, 2.5, 4.5, 6.5, 8.5]
    assert thinned_y.tolist() == [1, 5, 9, 13, 17]
    # A window of 60 / 20 = 3 leaves a line alone but for its ends, which average two points.
    line = smooth(np.arange(60.0))
    assert line[:3].tolist() == [0.5, 1, 2]
    assert line[-1] == 58.5


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8))
def test_labels_do_not_overlap_and_keep_their_order(positions):
    placed = _spread_out(positions, 9.5)
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    for below, above in itertools.pairwise(order):
        assert placed[above] - placed[below] >= 9.5 - 1e-9
    # On the whole they stay where their lines end.
    assert sum(placed) == pytest.approx(sum(positions), abs=1e-6)


def test_a_long_run_is_quick_and_small(tmp_path):
    run = make_run(tmp_path / "long", steps=10_000, steps_per_epoch=1000)
    start = time.perf_counter()
    page = write_report([run], tmp_path / "report.html")
    assert time.perf_counter() - start < 5
    assert page.stat().st_size < 3_000_000


def benchmark_results() -> dict:
    """What `esrl benchmark --json` prints, in short; names with markup, as a contestant's failure may have."""
    place = {"model": "base", "samples": 15, "workload": "random model, 16 prompts <b>", "parameters": 50}
    rate = {"median": 2000.0, "min": 1900.0, "max": 2100.0}
    step = {
        **place,
        "prompts": 16,
        "rows": 240,
        "vocabulary": 12000,
        "max_new_tokens": 60,
        "seconds": rate,
        "seconds_per_token": 2e-3,
        "peak_memory_mb": 411.0,
        "esrl_speedup": 1.0,
    }
    return {
        "stage_one": [
            {
                **place,
                "contestant": name,
                "source_tokens": 20,
                "tokens_per_second": rate,
                "peak_memory_mb": 80.0,
                "esrl_speedup": speedup,
            }
            for name, speedup in (("esrl", 1.0), ("generate", 7.25))
        ],
        "step": [step | {"contestant": "esrl"}, step | {"contestant": "naive", "esrl_speedup": 5.5}],
        "memory": [
            step | {"contestant": "esrl", "varied": "samples", "samples": k, "peak_memory_mb": 400.0 + k}
            for k in (4, 16, 64)
        ],
        "scale": [
            step | {"contestant": "esrl", "varied": "prompts", "prompts": count, "rows": 8 * count} for count in (8, 64)
        ],
        "rewards": [
            {
                "metric": "rouge_l",
                "words": 12.4,
                "reference": "rouge-score",
                "sentences_per_second": rate,
                "reference_per_second": rate,
                "ratio": 61.0,
                "largest_difference": 0.0,
            }
        ],
        "limit": [{"quantity": "stage two, base", "giga_per_second": 143.2, "unit": "operations", "share": 0.65}],
        "not_run": [
            {"contestant": "ctranslate2-int8", "model": "base", "samples": 15, "reason": "<script>no</script>"}
        ],
        "machine": {"platform": "Linux", "packages": {"torch": "2.13.0"}},
    }


def test_a_benchmark_has_its_page(tmp_path):
    results = tmp_path / "results.json"
    results.write_text(json.dumps(benchmark_results()))
    page = write_report([results], tmp_path / "results.html").read_text()
    for title in ("Stage one", "A whole optimizer step", "Peak memory", "Scale", "Rewards", "The limit", "Not run"):
        assert title in page
    for figure in ("7.25", "5.5", "464", "143.2", "0.65", "rouge-score", "2.13.0"):
        assert figure in page
    assert page.count("<svg") == 4  # stage one, step, memory by samples, scale by prompts
    assert "samples a prompt of 20 tokens" in page  # what tells a long source from a short one
    assert "<script" not in page and "16 prompts &lt;b&gt;" in page
    # sections that were not asked for are simply not there
    results.write_text(json.dumps({"machine": {}, "rewards": benchmark_results()["rewards"], "not_run": []}))
    page = write_report([results], tmp_path / "results.html").read_text()
    assert "Rewards" in page and "Stage one" not in page and "Not run" not in page


@pytest.mark.parametrize(("text", "message"), [("{", "no readable JSON"), ("[]", "is no benchmark"), ("{}", "machine")])
def test_another_file_is_no_benchmark(tmp_path, text, message):
    results = tmp_path / "results.json"
    results.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        write_report([results], tmp_path / "page.html")
    assert "results.json" in str(error.value)
