"""Folders to policies: by family, strictly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_models import make_causal, make_prompts, random_answers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel, T5Config

from esrl.models.causal import CausalPolicy
from esrl.models.load import load_policy
from esrl.models.seq2seq import MarianPolicy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    path = tmp_path_factory.mktemp("causal") / "model"
    policy = make_causal("qwen3", tokenizer, torch.float32)
    policy.model.generation_config.eos_token_id = [1, 5]
    policy.save(path)
    return path


def test_a_saved_folder_comes_back_as_it_was(folder, tokenizer):
    policy, start = load_policy(folder), make_causal("qwen3", tokenizer, torch.float32)
    assert isinstance(policy, CausalPolicy)
    assert policy.eos_tokens == (1, 5) and policy.max_length == 48 and policy.vocabulary == 160
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    for name, value in start.model.state_dict().items():
        assert torch.equal(policy.model.state_dict()[name], value) and torch.equal(theirs.state_dict()[name], value)
    assert policy.model.lm_head.weight is policy.model.get_input_embeddings().weight  # tied
    prompts, index = make_prompts([5, 1]), torch.tensor([0, 1])
    with torch.no_grad():
        states = [p.hidden_states(p.encode(prompts), index, random_answers(2, 4)) for p in (policy, start)]
    assert torch.equal(*states)
    assert load_policy(folder, torch.bfloat16).model.dtype == torch.bfloat16


def test_the_configuration_says_which_family(random32, tmp_path):
    random32.save(tmp_path / "marian")
    assert isinstance(load_policy(tmp_path / "marian"), MarianPolicy)


def edit_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def drop_a_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def one_layer(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=1, layer_types=["full_attention"])


def bert(folder: Path) -> None:
    """Which Hugging Face loads as a causal model."""
    config = BertConfig(
        vocab_size=160, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertLMHeadModel(config).save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda folder: (folder / "config.json").unlink(), ["no config.json"]),
        (
            lambda folder: T5Config().save_pretrained(folder),
            ["'t5'", "marian, and causal language models such as llama"],
        ),
        (bert, ["'bert' is not supported: it has no body and lm_head"]),
        (lambda folder: edit_config(folder, model_type="mamba"), ["no readable configuration"]),
        (lambda folder: (folder / "model.safetensors").unlink(), ["no readable safetensors weights"]),
        (drop_a_tensor, ["1 tensors", "layers.0.mlp.up_proj.weight", "same save_pretrained"]),
        (lambda folder: edit_config(folder, num_hidden_layers=1), ["no readable configuration"]),
        (one_layer, ["layers.1.", "same save_pretrained"]),
        (lambda folder: edit_config(folder, vocab_size=100), ["of another size"]),
        (lambda folder: edit_config(folder, final_logit_softcapping=3.0), ["'qwen3' is not supported: logits differ"]),
        (lambda folder: (folder / "tokenizer.json").unlink(), ["no readable tokenizer"]),
    ],
)
def test_wrong_folders_are_refused_by_name(folder, tmp_path, damage, parts):
    mine = tmp_path / "model"
    shutil.copytree(folder, mine)
    damage(mine)
    with pytest.raises(ValueError) as caught:
        load_policy(mine)
    message = str(caught.value)
    assert message.startswith(f"{mine}: ") and "\n" not in message
    for part in parts:
        assert part in message


def test_a_missing_folder_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"model: no such folder. Give the folder of a Marian-type or causal"):
        load_policy(tmp_path / "nowhere" / "model")
