"""Templates: what is filled in, once, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esrl.data.templates import ALPACA, ALPACA_NO_INPUT, fill, generic_chat, placeholders


def test_the_alpaca_template_is_stanfords():
    # tatsu-lab/stanford_alpaca, train.py, PROMPT_DICT
    assert ALPACA.startswith("Below is an instruction that describes a task, paired with an input that provides")
    assert fill(ALPACA, {"instruction": "Add.", "input": "1 2"}, "x").endswith(
        "completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:"
    )
    assert placeholders(ALPACA) == ("instruction", "input") and placeholders(ALPACA_NO_INPUT) == ("instruction",)


def test_values_are_put_in_once_and_braces_are_text():
    assert fill("{a}{{x}}{b}{a}", {"a": "{b}", "b": "}"}, "x") == "{b}{x}}{b}"


@given(st.text(), st.text())
def test_any_text_can_be_a_value(left, right):
    assert fill("<{a}|{b}>", {"a": left, "b": right}, "x") == f"<{left}|{right}>"


@pytest.mark.parametrize("template", ["{a", "a}", "{a}}", "{{a}", "{a{b}}"])
def test_a_single_brace_is_refused(template):
    with pytest.raises(ValueError, match="single brace"):
        placeholders(template)


def test_an_unknown_placeholder_is_named_with_the_nearest_column():
    with pytest.raises(ValueError, match=r"f:3: the template names \{instrucion\} \(nearest: \"instruction\"\)"):
        fill("{instrucion}", {"instruction": "a", "input": ""}, "f:3")
    with pytest.raises(ValueError, match=r"has \{\}"):
        placeholders("a {} b")


def test_the_generic_chat_is_open_for_the_answer():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert generic_chat(messages) == "### System:\nBe brief.\n\n### User:\nHi\n\n### Assistant:\n"
