"""Token ids of prompts and answers: BOS once, the answer behind the very ids the model is asked with, one end token."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_helpers import CHATML, LLAMA, byte_level

from esrl.data.encoding import (
    Encoder,
    PromptConfig,
    limit_prompts,
    make_causal_prompts,
    prompt_text,
    special_prefix,
    within_positions,
)
from esrl.data.examples import Example, number_examples

PLAIN = PromptConfig()
MESSAGES = [{"role": "user", "content": "Say hello."}]


def example(source: str = "Say hello.", **columns: str) -> Example:
    return next(number_examples([{"source": source, **columns}]))


def chat(messages: list[dict[str, str]] = MESSAGES) -> Example:
    return example("ignored", messages=json.dumps(messages))


def ids_of(encoder: Encoder, one: Example, answer: str) -> tuple[list[int], list[int]]:
    return encoder.prompt_ids([one])[0], encoder.answer_ids([one], [answer])[0]


@pytest.mark.parametrize(("bos", "append_eos"), [(False, False), (True, False), (True, True), (False, True)])
def test_bos_comes_once_and_no_eos_ends_the_prompt(bos, append_eos):
    tokenizer = byte_level(bos=bos, append_eos=append_eos)
    prompt, answer = ids_of(Encoder(tokenizer, PLAIN), example(), "Hello there!")
    assert prompt.count(tokenizer.eos_token_id) == 0 and answer[-1] == tokenizer.eos_token_id
    assert prompt[: int(bos)] == ([tokenizer.bos_token_id] if bos else [])
    assert (prompt + answer).count(tokenizer.eos_token_id) == 1
    if bos:
        assert (prompt + answer).count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(prompt[int(bos) :]) == "Say hello." and tokenizer.decode(answer[:-1]) == "Hello there!"
    assert special_prefix(tokenizer) == prompt[: int(bos)]


@given(st.text(max_size=12), st.text(max_size=12))
def test_the_answer_does_not_change_the_prompts_ids(source, answer):
    """Tokenized as one text, "ca" + "pital" would be one piece where the prompt alone ends in another."""
    encoder = SHARED
    one = example("The ca" + source)
    prompt, row = ids_of(encoder, one, answer)
    assert encoder.prompt_ids([one]) == [prompt]
    assert SHARED.tokenizer.decode(prompt[1:]) == "The ca" + source
    assert SHARED.tokenizer.decode(row[:-1]) == answer


SHARED = Encoder(byte_level(bos=True), PLAIN)


def test_tokenizing_both_as_one_would_change_the_prompt():
    """Why they are tokenized apart."""
    encoder = Encoder(byte_level(), PLAIN)
    prompt, answer = ids_of(encoder, example("The capital of Fra"), "nce")
    joint = encoder.tokenizer("The capital of France", add_special_tokens=False)["input_ids"]
    assert joint[: len(prompt)] != prompt
    assert encoder.tokenizer.decode(prompt + answer[:-1]) == "The capital of France"


def test_a_tokenizer_without_pad_works():
    tokenizer = byte_level(pad=False)
    assert tokenizer.pad_token_id is None
    prompts = make_causal_prompts([example(), example("Add 23 and 48:")], Encoder(tokenizer, PLAIN))
    assert tokenizer.pad_token_id is None  # and is not changed
    for row, text in enumerate(("Say hello.", "Add 23 and 48:")):
        assert tokenizer.decode(prompts.input_ids[row][prompts.mask[row]]) == text
    assert prompts.columns["source"] == ["Say hello.", "Add 23 and 48:"]


def test_the_models_chat_template_and_its_end_of_turn():
    tokenizer = byte_level(bos=True, chat=CHATML)
    encoder = Encoder(tokenizer, PLAIN)
    prompt, answer = ids_of(encoder, chat(), "Hello there!")
    expected = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    assert prompt == expected  # ids as the model was trained with: this template has no BOS
    assert answer[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>") == encoder.chat_end_token
    assert encoder.end_token == tokenizer.eos_token_id != encoder.chat_end_token
    whole = tokenizer.apply_chat_template([*MESSAGES, {"role": "assistant", "content": "Hello there!"}])["input_ids"]
    assert whole[: len(prompt + answer)] == prompt + answer


def test_bos_is_not_doubled_by_a_chat_template_that_writes_it():
    tokenizer = byte_level(bos=True, chat=LLAMA)
    prompt, answer = ids_of(Encoder(tokenizer, PLAIN), chat(), "Hello")
    assert prompt.count(tokenizer.bos_token_id) == 1 and prompt[0] == tokenizer.bos_token_id
    assert answer[-1] == tokenizer.eos_token_id  # the template ends no turn


def test_a_missing_chat_template_names_the_remedy_and_the_generic_one_serves():
    tokenizer = byte_level(bos=True)
    with pytest.raises(ValueError, match=r'no chat template.*chat_template = "generic"'):
        Encoder(tokenizer, PLAIN).prompt_ids([chat()])
    encoder = Encoder(tokenizer, PromptConfig(chat_template="generic"))
    prompt, answer = ids_of(encoder, chat(), "Hello")
    assert prompt[0] == tokenizer.bos_token_id and answer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(prompt[1:]) == "### User:\nSay hello.\n\n### Assistant:\n"
    # a template at hand is passed over when the generic one is asked for
    other = Encoder(byte_level(bos=True, chat=CHATML), PromptConfig(chat_template="generic"))
    assert other.tokenizer.decode(other.prompt_ids([chat()])[0][1:]) == tokenizer.decode(prompt[1:])


def test_plain_text_can_become_a_chat():
    tokenizer = byte_level(chat=CHATML)
    config = PromptConfig(as_chat=True)
    assert prompt_text(example(), tokenizer, config) == prompt_text(chat(), tokenizer, config)
    assert prompt_text(example(), tokenizer, PLAIN) == "Say hello."


def test_an_empty_conversation_is_plain_text():
    """The column of an example in a table where others are conversations."""
    tokenizer = byte_level(chat=CHATML)
    assert prompt_text(example(messages=""), tokenizer, PLAIN) == "Say hello."


def test_control_tokens_written_in_an_answer_are_text():
    encoder = Encoder(byte_level(), PLAIN)
    _, answer = ids_of(encoder, example(), "Write <eos> here")
    assert answer.count(encoder.end_token) == 1 and answer[-1] == encoder.end_token
    assert encoder.tokenizer.decode(answer[:-1]) == "Write <eos> here"


def test_a_prompt_without_tokens_and_a_tokenizer_without_eos_are_refused():
    with pytest.raises(ValueError, match="prompt without tokens"):
        Encoder(byte_level(), PLAIN).prompt_ids([example("")])
    tokenizer = byte_level()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        Encoder(tokenizer, PLAIN)


def lengths(encoder: Encoder, examples: list[Example]) -> list[int]:
    return [len(ids) for ids in encoder.prompt_ids(examples)]


EXAMPLES = [example("Say hello.", reference="Hi"), example("Say hello. " * 5, reference="Hi")]
EXAMPLES.append(example("Say hello!", reference="Hello " * 20))


def test_over_long_prompts_are_left_out_and_counted():
    encoder = Encoder(byte_level(bos=True), PromptConfig(max_source_tokens=20, max_target_tokens=15))
    short, long, _ = lengths(encoder, EXAMPLES)
    assert short <= 20 < long
    kept, report = limit_prompts(EXAMPLES, encoder, with_answers=False)
    assert [e.id for e in kept] == [EXAMPLES[0].id, EXAMPLES[2].id]
    assert (report.long_sources, report.long_references, report.skipped) == (1, 0, 1)
    kept, report = limit_prompts(EXAMPLES, encoder, with_answers=True)
    assert [e.id for e in kept] == [EXAMPLES[0].id]
    assert (report.long_sources, report.long_references, report.skipped) == (1, 1, 2)


def test_or_cut_at_their_beginning_and_counted():
    config = PromptConfig(max_source_tokens=20, max_target_tokens=15, overlong="truncate_left")
    encoder = Encoder(byte_level(bos=True), config)
    kept, report = limit_prompts(EXAMPLES, encoder, with_answers=True)
    # a long answer is left out all the same: its cut end would be learned as an end
    assert [e.id for e in kept] == [EXAMPLES[0].id, EXAMPLES[1].id]
    assert "1 examples skipped, sources cut at their beginning; 2 of 3 examples left" in str(report)
    whole = encoder.prompt_ids(EXAMPLES)[1]
    cut = encoder.cut(whole)
    assert len(cut) == 20 and cut == whole[:1] + whole[-19:]  # BOS stays
    prompts = make_causal_prompts(kept, encoder)
    assert prompts.input_ids[1].tolist() == cut
    assert prompts.mask.sum(1).tolist() == [len(encoder.prompt_ids(EXAMPLES)[0]), 20]


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_a_cut_keeps_the_limit_and_the_last_token(limit):
    encoder = Encoder(byte_level(bos=True), PromptConfig(max_source_tokens=limit))
    whole = encoder.prompt_ids([EXAMPLES[0]])[0]
    assert len(encoder.cut(whole)) == limit and encoder.cut(whole)[-1] == whole[-1]


def test_the_models_positions_bound_the_prompt():
    config = PromptConfig(max_source_tokens=50, max_target_tokens=30)
    assert within_positions(config, 80) == within_positions(config, None) == config
    assert within_positions(config, 64) == replace(config, max_source_tokens=34)
    with pytest.raises(ValueError, match="max_target_tokens is 30, but the model has 30 positions"):
        within_positions(config, 30)


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_source_tokens", 0), ("max_target_tokens", -1), ("overlong", "cut"), ("chat_template", "mine")],
)
def test_settings_out_of_bounds_are_refused(name, value: Any):
    with pytest.raises(ValueError, match=f"{name} is {value!r}; it must"):
        PromptConfig(**{name: value})


def test_no_examples_make_no_prompts():
    encoder = Encoder(byte_level(), PLAIN)
    assert len(make_causal_prompts([], encoder)) == 0 and encoder.answer_ids([], []) == []
