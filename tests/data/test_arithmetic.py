"""The arithmetic task: right answers, disjoint parts, the same everywhere."""

from __future__ import annotations

import json
import operator

import pytest

from esrl.data.arithmetic import ArithmeticConfig, make_arithmetic, write_examples
from esrl.data.readers import DataConfig, load_examples

SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def test_sums_are_right():
    config = ArithmeticConfig(kinds=("addition", "subtraction", "multiplication"), largest=30)
    examples = make_arithmetic(300, 1, "train", config)
    for example in examples:
        left, sign, right, _ = example.source.split()
        result = SIGNS[sign](int(left), int(right))
        assert example.reference == str(result) and result >= 0
        assert max(int(left), int(right)) <= 30
    assert {example.columns["kind"] for example in examples} == set(config.kinds)


def test_numbers_in_words_and_back():
    known = {"13 in words:": "thirteen", "742 in words:": "seven hundred forty-two", "forty in digits:": "40"}
    config = ArithmeticConfig(kinds=("words", "digits"), largest=999)
    found = {e.source: e.reference for part in ("train", "dev", "test") for e in make_arithmetic(80, 1, part, config)}
    config = ArithmeticConfig(kinds=("words", "digits"), largest=999)
    # every fact at hand is checked, wherever the draw put it
    everything = {e.source: e.reference for e in make_arithmetic(1700, 1, "train", config)} | found
    assert all(everything[source] == answer for source, answer in known.items() if source in everything)
    assert len(known.keys() & everything.keys()) >= 2
    there = {int(s.split()[0]): r for s, r in everything.items() if s.endswith("in words:")}
    back = {s.removesuffix(" in digits:"): int(r) for s, r in everything.items() if s.endswith("in digits:")}
    both = [n for n, words in there.items() if words in back]
    assert len(both) > 500 and all(back[there[n]] == n for n in both)


def test_parts_are_disjoint_whatever_the_seeds():
    # 100 x 100 sums: 90 % of them are training problems
    train = {e.source for seed in (1, 2) for e in make_arithmetic(3000, seed, "train")}
    test = {e.source for e in make_arithmetic(300, 3, "test")}
    dev = {e.source for e in make_arithmetic(300, 4, "dev")}
    assert not train & test and not train & dev and not test & dev
    assert len(test) == 300 and len(train) > 3000


def test_the_seed_decides_and_a_smaller_count_is_a_beginning():
    first = make_arithmetic(50, 1, "train")
    assert make_arithmetic(20, 1, "train") == first[:20]
    assert [e.source for e in make_arithmetic(50, 2, "train")] != [e.source for e in first]
    assert first[0].source == make_arithmetic(1, 1, "train", ArithmeticConfig(largest=99))[0].source


def test_too_many_are_refused():
    # of 5 x 5 = 25 sums, 90 % or so are training problems
    with pytest.raises(ValueError, match=r"only \d\d different train problems found for count 26"):
        make_arithmetic(26, 1, "train", ArithmeticConfig(largest=4))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kinds": ()}, "kinds is"),
        ({"kinds": ("division",)}, "kinds is"),
        ({"largest": 0}, "largest is 0"),
        ({"kinds": ("words",), "largest": 10_000}, "end at 9999"),
    ],
)
def test_settings_out_of_bounds_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        ArithmeticConfig(**config)


def test_what_is_written_is_read_again(tmp_path):
    examples = make_arithmetic(10, 1, "test")
    path = tmp_path / "test.jsonl"
    write_examples(examples, path)
    assert json.loads(path.read_text().splitlines()[0])["kind"] == "addition"
    assert list(load_examples(DataConfig(path=str(path))).examples) == examples
