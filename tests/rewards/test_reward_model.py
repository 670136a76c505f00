"""Reward models: real small Hugging Face models of several families, their cache, and the folders that are refused."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)

from esrl.data.encoding import PromptConfig
from esrl.data.examples import Example, number_examples
from esrl.data.preferences import SETTINGS, score_encoder
from esrl.errors import RewardError
from esrl.rewards.cache import ScoreCache
from esrl.rewards.calling import RewardConfig, RewardFunction, StepCounts, build_reward
from esrl.rewards.model import ModelRewardConfig, RewardModel, load
from esrl.rewards.reading import ReadingConfig
from esrl.training.reward_model import score_rows

NOUNS, VERBS = ["dog", "cat"], ["runs", "sleeps"]
WORDS = ["the", "a", "red", "big", *NOUNS, *VERBS, "loudly", "and", "then", "home", "user", "says", "bot"]
SPECIAL = ["<pad>", "</s>", "<s>", "<unk>"]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
PROMPTS = ["the dog", "a cat", "a big red dog", "the cat and the dog and"] * 3
ANSWERS = [" ".join(WORDS[(3 * i + j) % len(WORDS)] for j in range(1 + i)) for i in range(12)]
CHAT_TEMPLATE = "{% for message in messages %}{{ '<s> ' + message.role + ' ' + message.content + ' ' }}{% endfor %}"


def tokenizer(
    *, pad: bool = True, starts: bool = False, pair: bool = False, chat: str | None = None
) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if starts:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    if pair:  # as BERT's, with <s> for CLS and </s> for SEP
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>",
            pair="<s> $A </s> $B:1 </s>:1",
            special_tokens=[("<s>", 2), ("</s>", 1)],
        )
    names = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"} | ({"pad_token": "<pad>"} if pad else {})
    if pair:
        names |= {"cls_token": "<s>", "sep_token": "</s>", "model_input_names": ["input_ids", "token_type_ids"]}
    result = PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    result.chat_template = chat
    return result


def model_of(family: str, *, pad: bool = True, labels: int = 1) -> Any:
    torch.manual_seed(0)
    shared = {"vocab_size": len(SPECIAL + WORDS), "pad_token_id": 0 if pad else None, "num_labels": labels}
    if family == "bert":
        model = BertForSequenceClassification(BertConfig(**shared, **SIZES, max_position_embeddings=64))
    elif family == "gpt2":
        model = GPT2ForSequenceClassification(GPT2Config(**shared, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    else:
        config, cls = {
            "llama": (LlamaConfig, LlamaForSequenceClassification),
            "qwen3": (Qwen3Config, Qwen3ForSequenceClassification),
        }[family]
        sizes = SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 64}
        model = cls(config(**shared, **sizes, **({"head_dim": 8} if family == "qwen3" else {})))
    for name, weight in model.named_parameters():
        if name.startswith(("score", "classifier")):
            torch.nn.init.normal_(weight, std=1.0)  # scores that differ
    return model


def folder_of(path: Path, family: str = "llama", *, pad: bool = True, **tokenizer_options: Any) -> Path:
    model_of(family, pad=pad).save_pretrained(path)
    tokenizer(pad=pad, **tokenizer_options).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return folder_of(tmp_path_factory.mktemp("llama"), chat=CHAT_TEMPLATE)


READING = {"form": "template", "template": "{prompt} says {completion}"}


def loaded(path: Path, reading: dict[str, Any] = READING, **options: Any) -> RewardModel:
    options = {"device": "cpu"} | options
    return load(ModelRewardConfig(path=path, reading=ReadingConfig(**reading), **options))


def ids(model: RewardModel, *arguments: Any) -> list[list[int]]:
    return [row["input_ids"] for row in model.read(*arguments)[0]]


def plainly(path: Path, text: str) -> float:
    """The score as anybody would compute it with Hugging Face, one text at a time."""
    model, words = AutoModelForSequenceClassification.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    with torch.no_grad():
        return float(model(**words(text, return_tensors="pt")).logits[0, 0])


# ---- scores


@pytest.mark.parametrize(
    ("family", "pad"),
    [(family, pad) for family in ("llama", "qwen3", "gpt2") for pad in (True, False)] + [("bert", True)],
)
def test_scores_are_hugging_faces(tmp_path, family, pad):
    path = folder_of(tmp_path, family, pad=pad)
    wanted = [plainly(path, f"{prompt} says {answer}") for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    for batch_tokens in (1, 40, 16384):  # one by one, a few, all that may go together
        found = loaded(path, batch_tokens=batch_tokens)(PROMPTS, ANSWERS)
        assert found == pytest.approx(wanted, abs=1e-5)
    assert max(wanted) - min(wanted) > 0.1  # the comparison means something


def test_batches_hold_texts_of_like_lengths_within_the_limit(llama):
    model = loaded(llama, batch_tokens=30)
    rows = ids(model, PROMPTS, ANSWERS)
    parts = list(model._batches(rows))
    assert sorted(index for part in parts for index in part) == list(range(12))
    sizes = [len(rows[index]) for part in parts for index in part]
    assert sizes == sorted(sizes)
    assert all(len(part) == 1 or len(part) * max(len(rows[i]) for i in part) <= 30 for part in parts)
    assert len(parts) < 12


def test_without_a_pad_only_one_length_goes_together(tmp_path):
    model = loaded(folder_of(tmp_path, "gpt2", pad=False))
    rows = ids(model, PROMPTS, ANSWERS)
    parts = list(model._batches(rows))
    assert all(len({len(rows[i]) for i in part}) == 1 for part in parts)
    assert len(parts) == len(set(map(len, rows)))


def test_no_gradient_and_no_training_mode(llama):
    model = loaded(llama).model
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())


def test_own_precision(llama):
    exact, coarse = loaded(llama)(PROMPTS, ANSWERS), loaded(llama, dtype="bfloat16")(PROMPTS, ANSWERS)
    assert coarse != exact
    assert coarse == pytest.approx(exact, abs=0.1)


# ---- what it reads


def test_template_and_chat_template(llama):
    assert ids(loaded(llama), ["the dog"], ["runs"]) == [[4, 8, 17, 10]]
    assert ids(loaded(llama, READING | {"append_eos": True}), ["the dog"], ["runs"]) == [[4, 8, 17, 10, 1]]
    chat = loaded(llama, {"form": "chat"})
    wanted = [AutoTokenizer.from_pretrained(llama)("<s> user the dog <s> assistant runs")["input_ids"]]
    assert ids(chat, ["the dog"], ["runs"]) == wanted
    messages = [{"role": "user", "content": "the dog"}]
    assert ids(chat, [messages], [[{"role": "assistant", "content": "runs"}]]) == wanted
    assert ids(chat, ["not read"], ["runs"], [json.dumps(messages)]) == wanted


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("options", [{}, {"as_chat": True, "chat_template": "generic"}])
def test_it_reads_what_reward_models_are_trained_on(tmp_path, family, options):
    path = folder_of(tmp_path, family, starts=True, pair=family == "bert")
    examples = list(number_examples({"source": prompt} for prompt in PROMPTS))
    encoder = score_encoder(AutoTokenizer.from_pretrained(path), PromptConfig(**options))
    model = loaded(path, options)
    assert model.read(PROMPTS, ANSWERS) == (encoder.encode(examples, ANSWERS), 0)
    trained = AutoModelForSequenceClassification.from_pretrained(path)
    wanted = score_rows(trained, encoder.encode(examples, ANSWERS), encoder.pad_token, 100)
    assert model(PROMPTS, ANSWERS) == pytest.approx(wanted, abs=1e-5)
    if family == "bert":
        assert model.read(["the"], ["a"])[0][0]["token_type_ids"] == [0] * (len(ids(model, ["the"], ["a"])[0]) - 2) + [
            1,
            1,
        ]


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_it_reads_as_its_folder_says_it_was_trained(tmp_path, family):
    """Unless the settings say otherwise; here prompts of 7 tokens and answers of 5."""
    path = folder_of(tmp_path, family, starts=True, pair=family == "bert")
    generic, plain = (loaded(path, {"as_chat": chat, "chat_template": "generic"}) for chat in (True, False))
    config = PromptConfig(as_chat=True, chat_template="generic", max_source_tokens=7, max_target_tokens=5)
    (path / SETTINGS).write_text(json.dumps(asdict(config)))
    model = loaded(path, {})
    assert model.read.max_tokens == 7 + 5 + (3 if family == "bert" else 1)  # [CLS] prompt [SEP] answer [SEP]
    assert loaded(path, {"max_tokens": 60}).read(PROMPTS, ANSWERS) == generic.read(PROMPTS, ANSWERS)
    cut, number_cut = model.read(["the " * 20], ["runs"])
    assert len(cut[0]["input_ids"]) == model.read.max_tokens and number_cut == 1
    other = {"as_chat": False, "max_tokens": 60}
    assert loaded(path, other).read(PROMPTS, ANSWERS) == plain.read(PROMPTS, ANSWERS)
    assert plain.read(PROMPTS, ANSWERS) != generic.read(PROMPTS, ANSWERS)
    assert loaded(path).read.max_tokens == 64  # a template of one's own is not what it was trained with


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"as_chats": true}', '{"max_source_tokens": 0}', '{"max_source_tokens": "7"}']
)
def test_a_note_that_cannot_be_read_is_refused(tmp_path, text):
    path = folder_of(tmp_path)
    (path / SETTINGS).write_text(text)
    with pytest.raises(ValueError, match=rf"{SETTINGS} is no note of how prompts were encoded .* or delete it"):
        loaded(path, {})


def test_conversations_as_reward_models_are_trained_on(llama):
    messages = json.dumps([{"role": "user", "content": "the dog"}])
    example = Example("0", {"source": "the dog", "messages": messages})
    encoder = score_encoder(AutoTokenizer.from_pretrained(llama), PromptConfig())
    model = loaded(llama, {})
    assert model.read(["the dog"], ["runs"], [messages])[0] == encoder.encode([example], ["runs"])
    assert ids(model, ["the dog"], ["runs"]) == [[4, 8, 10, 1]]  # no conversation: prompt, answer, EOS
    assert ids(model, ["the dog"], ["runs"], [""]) == [[4, 8, 10, 1]]


def test_braces_in_texts_are_no_template(llama):
    model = loaded(llama, {"form": "template", "template": "{prompt} {completion}"})
    assert model.read._text("{completion}", None, "{prompt} {x}") == "{completion} {prompt} {x}"


@pytest.mark.parametrize("starts", [False, True], ids=["plain", "with BOS"])
@pytest.mark.parametrize("form", ["template", "trained"])
def test_long_texts_lose_their_beginning_and_are_counted(tmp_path, starts, form):
    template = {"template": "{prompt} {completion}", "append_eos": True}
    model = loaded(folder_of(tmp_path, starts=starts), template | {"form": form, "max_tokens": 6})
    logged: dict[str, float] = {}
    prompts, answers = ["the dog", "a big red dog"], ["runs home", "runs and then sleeps"]
    # BOS, which the tokenizer adds, stays; of the text itself the end
    assert ids(model, prompts, answers) == [
        [2] * starts + [4, 8, 10, 15, 1],
        [2] * starts + [8, 10, 13, 14, 11, 1][starts:],
    ]
    model(prompts, answers, log_metric=logged.__setitem__)
    assert logged == {"model_truncated_share": 0.5, "model_cached_share": 0.0}


def test_a_pair_loses_the_beginning_of_its_prompt(tmp_path):
    path = folder_of(tmp_path, "bert", pair=True)
    model = loaded(path, {"max_tokens": 6})
    row = model.read(["the big red dog"], ["runs"])[0][0]
    assert row == {"input_ids": [2, 6, 8, 1, 10, 1], "token_type_ids": [0, 0, 0, 0, 1, 1]}


def test_never_more_than_the_model_has_positions_for(tmp_path):
    model = loaded(folder_of(tmp_path, "gpt2"))
    assert model.read.max_tokens == 64
    assert len(model(["the dog"], ["runs " * 500])) == 1


def test_an_empty_text_is_refused(llama):
    with pytest.raises(ValueError, match="gives no tokens"):
        loaded(llama, {"form": "template", "template": "{completion}"})([""], [""])


# ---- the cache


def reward_of(path: Path, **options: Any) -> RewardFunction:
    options = {"reading": ReadingConfig(**READING)} | options
    return build_reward(RewardConfig(names=("model",), model=ModelRewardConfig(path=path, device="cpu", **options)))


def step(reward: RewardFunction, rows: list[int], *, ends: bool = True) -> list[float]:
    prompts, answers = [PROMPTS[i] for i in rows], [ANSWERS[i] for i in rows]
    values = reward.score(prompts, answers, [[1]] * len(rows), {}, {}).values.tolist()
    if ends:
        reward.end_step(reward.counts)
    return values


def cache_of(reward: RewardFunction) -> ScoreCache:
    return reward._components[0].model.cache


def test_equal_texts_get_equal_bits_whatever_they_are_batched_with(llama):
    reward = reward_of(llama)
    first = step(reward, [0, 5, 11])
    again = step(reward, [11, 1, 2, 3, 0, 5, 5])
    assert [again[i] for i in (4, 5, 0, 6)] == [*first, first[1]]
    assert cache_of(reward).counts == (3, 6)  # 7 rows, 6 texts, 3 of them known
    assert len(cache_of(reward)) == 6


def test_a_resumed_run_gives_the_same_bits(llama):
    """Scores with rounding that depends on the batch (bfloat16), so that a cache lost would show."""
    steps = [[0, 3, 7], [1, 3, 11, 7], [0, 1, 2, 3, 11], [7, 8]]
    whole = reward_of(llama, dtype="bfloat16")
    wanted, states = [], []
    for rows in steps:
        wanted.append(step(whole, rows))
        states.append(json.loads(json.dumps(whole.state_dict())))
    for done in range(1, len(steps)):
        resumed = reward_of(llama, dtype="bfloat16")
        resumed.load_state_dict(states[done - 1])
        assert [step(resumed, rows) for rows in steps[done:]] == wanted[done:]
        assert resumed.state_dict() == whole.state_dict()


def test_a_step_given_up_leaves_nothing(llama):
    reward = reward_of(llama)
    step(reward, [0])
    state = reward.state_dict()
    step(reward, [1, 2], ends=False)
    assert len(reward.fresh_scores) == 2
    assert reward.state_dict() == state
    reward.load_state_dict(state)
    assert reward.fresh_scores == {} and len(cache_of(reward)) == 1


def test_within_a_step_what_was_scored_is_known(llama):
    reward = reward_of(llama)
    first = step(reward, [0, 1], ends=False)
    assert step(reward, [1], ends=False) == [first[1]]
    assert cache_of(reward).counts == (1, 2)


def test_processes_share_what_they_learnt(llama):
    one, other = reward_of(llama), reward_of(llama)
    step(one, [0, 1], ends=False)
    step(other, [1, 2], ends=False)
    fresh = [one.fresh_scores, other.fresh_scores]
    for reward in (one, other):
        reward.end_step(StepCounts(4, 0, 0), fresh)
    assert one.state_dict() == other.state_dict()
    assert len(cache_of(one)) == 3
    key = next(iter(fresh[0].keys() & fresh[1].keys()))
    assert other.state_dict()["model"]["scores"][key] == fresh[0][key]  # the first process has the say


def test_the_cache_is_bounded_and_the_oldest_leave(llama):
    reward = reward_of(llama, cache_size=3)
    step(reward, [0, 1])
    step(reward, [2, 3])
    assert len(cache_of(reward)) == 3
    before = cache_of(reward).counts
    step(reward, [1, 2, 3])
    assert cache_of(reward).counts == (before.hits + 3, before.misses)
    none = reward_of(llama, cache_size=0)
    step(none, [0])
    step(none, [0])
    assert (len(cache_of(none)), cache_of(none).counts) == (0, (0, 2))


def test_scores_of_another_model_are_not_taken_over(llama, tmp_path):
    reward = reward_of(llama)
    step(reward, [0])
    shutil.copytree(llama, tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    save_file({**weights, "score.weight": weights["score.weight"] * 2}, tmp_path / "other" / "model.safetensors")
    other = reward_of(tmp_path / "other")
    other.load_state_dict(reward.state_dict())
    assert len(cache_of(other)) == 0
    assert step(other, [0]) == pytest.approx([2 * value for value in step(reward, [0])], rel=1e-6)


def test_the_cache_follows_what_is_read(llama):
    """Another template makes other texts; digests are of what the model reads."""
    plain, eos = reward_of(llama), reward_of(llama, reading=ReadingConfig())
    step(plain, [0])
    eos.load_state_dict(plain.state_dict())
    step(eos, [0])
    assert cache_of(eos).counts == (0, 1)


def test_old_states_without_a_model_load(llama):
    reward, metric = reward_of(llama), build_reward(RewardConfig())
    reward.load_state_dict(metric.state_dict())
    assert len(cache_of(reward)) == 0


# ---- what is refused


def test_a_model_that_gives_nan_is_named(tmp_path):
    path = folder_of(tmp_path)
    weights = load_file(path / "model.safetensors")
    save_file({**weights, "score.weight": weights["score.weight"] * float("nan")}, path / "model.safetensors")
    with pytest.raises(RewardError, match=r"reward 'model' returned nan; .* for completion 0 of 2"):
        step(reward_of(path), [0, 1])


def break_labels(path: Path) -> None:
    model_of("llama", labels=2).save_pretrained(path)


def break_head(path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=19)).save_pretrained(path)


def break_tokenizer(path: Path) -> None:
    for file in path.glob("*token*"):
        file.unlink()


def damage_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").write_text("{", encoding="utf-8")


def enlarge_tokenizer(path: Path) -> None:
    words = AutoTokenizer.from_pretrained(path)
    words.add_tokens(["more"])
    words.save_pretrained(path)


def lose_the_head(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    save_file({key: value for key, value in weights.items() if key != "score.weight"}, path / "model.safetensors")


def damage_weights(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"\x00" * 20)


def pickle_weights(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (break_labels, "the model has 2 labels, and which of them is the reward cannot be known"),
        (break_head, "is a LlamaForCausalLM model, which gives no score"),
        (break_tokenizer, r"there is no tokenizer \(tokenizer.json\); copy it from the run"),
        (damage_tokenizer, "the tokenizer cannot be read"),
        (enlarge_tokenizer, "the tokenizer has 20 tokens, the model 19; they do not belong together"),
        (lose_the_head, "1 tensors are missing or of another size, the first is score.weight"),
        (damage_weights, "the safetensors weights cannot be read"),
        (pickle_weights, "the safetensors weights cannot be read"),
        (lambda path: (path / "config.json").unlink(), "no config.json here"),
        (lambda path: (path / "adapter_config.json").write_text("{}"), "holds adapters.*esrl merge"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_folders_that_are_no_reward_model(llama, tmp_path, spoil, message):
    path = tmp_path / "model"
    shutil.copytree(llama, path)
    spoil(path)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with pytest.raises(ValueError, match=message) as caught:
        reward_of(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_chat_without_a_chat_template(tmp_path):
    path = folder_of(tmp_path)
    with pytest.raises(
        ValueError, match=r'form is "chat", but the reward model.s tokenizer has no chat template; put'
    ) as caught:
        loaded(path, {"form": "chat"})
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReadingConfig(template="{prompt}"), r"template is '\{prompt\}'; it must hold \{completion\}"),
        (lambda: ReadingConfig(form="text"), "form is 'text'; choose one of trained, template, chat"),
        (lambda: ReadingConfig(chat_template="own"), "chat_template is 'own'; choose one of model, generic"),
        (lambda: ReadingConfig(max_tokens=0), "max_tokens is 0"),
        (lambda: ModelRewardConfig(batch_tokens=0), "batch_tokens is 0"),
        (lambda: ModelRewardConfig(cache_size=-1), "cache_size is -1"),
        (lambda: ModelRewardConfig(dtype="int8"), "dtype is 'int8'"),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("device", ["no such device", "cuda:99"])
def test_unusable_devices(llama, device):
    with pytest.raises(ValueError, match=f"device is '{device}', which cannot be used"):
        loaded(llama, device=device)
