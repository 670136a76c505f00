"""What the contestants are measured on: random models whose samples end by a known law, and random prompts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from esrl.models.causal import CausalPolicy, new_causal
from esrl.models.seq2seq import PRESETS, MarianPolicy, Preset, load_policy, new_policy
from esrl.models.tokenizer import EOS, PAD, UNK
from esrl.types import Prompts

_SPECIAL_PIECES = 3
# far below every logit, yet finite: a bias of -inf is what nobody's kernels are tested with
_NEVER = -1e9
_CALIBRATION_ROWS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkModel:
    """A model's size, and how long its samples are."""

    sizes: Preset
    vocabulary: int
    mean_length: float
    """1 / p(EOS): what a sample's length would be on average without a limit."""
    family: Literal["marian", "llama"] = "marian"


MODELS = {
    # the vocabulary of the paper's IWSLT models
    "small": BenchmarkModel(sizes=PRESETS["small"], vocabulary=10000, mean_length=20),
    "base": BenchmarkModel(sizes=PRESETS["base"], vocabulary=12000, mean_length=11),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One thing to be measured: every contestant gets the same model, prompts, k and limit on length."""

    name: str  # of the model
    model: BenchmarkModel
    samples: int
    prompts: int = 16
    source_tokens: int = 20
    max_new_tokens: int = 60
    seed: int = 1

    @property
    def max_length(self) -> int:
        """Positions the model needs."""
        return max(self.source_tokens, self.max_new_tokens) + 1

    @property
    def expected_length(self) -> float:
        """The mean of min(geometric, limit): (1 - (1 - p) ** limit) / p."""
        end = 1 / self.model.mean_length
        return (1 - (1 - end) ** self.max_new_tokens) / end

    def describe(self, parameters: int) -> str:
        """One line that says what was measured."""
        return (
            f"random {self.model.family.capitalize()} model of {parameters / 1e6:.1f} M parameters "
            f"(vocabulary {self.model.vocabulary}), "
            f"{self.prompts} prompts of {self.source_tokens} tokens x {self.samples} samples of at most "
            f"{self.max_new_tokens} tokens, temperature 1, geometric lengths (mean {self.expected_length:.1f})"
        )

    def source(self) -> list[list[int]]:
        """The prompts' tokens: random pieces, then EOS."""
        generator = torch.Generator().manual_seed(self.seed)
        pieces = (self.prompts, self.source_tokens - 1)
        tokens = torch.randint(_SPECIAL_PIECES, self.model.vocabulary, pieces, generator=generator)
        # a causal model would take the end of the prompt for the end of the text
        return [[*row, 1 if self.model.family == "marian" else _SPECIAL_PIECES] for row in tokens.tolist()]


def as_prompts(source: list[list[int]]) -> Prompts:
    """Prompts of equal length."""
    ids = torch.tensor(source)
    return Prompts(
        example_ids=tuple(f"prompt-{i}" for i in range(len(source))),
        input_ids=ids,
        mask=torch.ones_like(ids, dtype=torch.bool),
    )


def whole_word_tokenizer(vocabulary: int, max_length: int) -> Any:
    """PAD, EOS, UNK and as many made-up words as it takes: a random model needs no more."""
    words = [PAD, EOS, UNK, *(f"w{i}" for i in range(_SPECIAL_PIECES, vocabulary))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNK))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=PAD, eos_token=EOS, unk_token=UNK, model_max_length=max_length
    )


def random_policy(workload: Workload) -> MarianPolicy:
    """A random model that never says PAD and ends a sample with probability 1 / mean_length at every step.

    Both are built into its weights, for every contestant alike: EOS has no embedding, so its logit is its bias b, and
    p(EOS) = exp(b) / (exp(b) + Z), Z the others' sum, which hardly varies for thousands of random logits. b is set
    from the mean log Z along random targets, which is what such a model samples.
    """
    model = workload.model
    tokenizer = whole_word_tokenizer(model.vocabulary, workload.max_length)
    policy = new_policy(model.sizes, tokenizer, workload.max_length, workload.seed)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    with torch.no_grad():
        policy.model.lm_head.weight[eos] = 0
        state = policy.encode(as_prompts(workload.source()[:_CALIBRATION_ROWS]))
        shape = (len(state.mask), workload.max_new_tokens)
        generator = torch.Generator().manual_seed(workload.seed)
        inputs = torch.randint(_SPECIAL_PIECES, model.vocabulary, shape, generator=generator)
        inputs[:, 0] = policy.start_token
        hidden = policy.hidden_states(state, torch.arange(shape[0]), inputs).flatten(0, 1)
        logits = hidden @ policy.model.lm_head.weight.T
        logits[:, [eos, pad]] = -torch.inf
        log_others = float(logits.logsumexp(1).mean())
        end = 1 / model.mean_length
        policy.model.final_logits_bias[0, eos] = log_others + math.log(end / (1 - end))
        policy.model.final_logits_bias[0, pad] = _NEVER
    policy.model.generation_config.bad_words_ids = None  # the bias does it; `generate` need not do it again
    return policy


def random_llama(workload: Workload) -> CausalPolicy:
    """A random causal model that ends a sample with probability 1 / mean_length at every step.

    Its logits hardly differ, and one token in ``mean_length`` ends a sample: a list of ends, as Hugging Face has it.
    """
    model = workload.model
    # a prompt and its answer, in one sequence
    tokenizer = whole_word_tokenizer(model.vocabulary, workload.source_tokens + workload.max_new_tokens)
    llama = new_causal(model.sizes, tokenizer, workload.source_tokens + workload.max_new_tokens, workload.seed).model
    ends = round(model.vocabulary / model.mean_length)
    llama.generation_config.eos_token_id = [
        tokenizer.eos_token_id,
        *range(model.vocabulary - ends + 1, model.vocabulary),
    ]
    return CausalPolicy(llama, tokenizer)


def convert_to_ctranslate2(model: Path, folder: Path, quantization: str) -> None:
    """Write the model folder as CTranslate2 loads it, in "float32" or "int8".

    CTranslate2's own converter for Marian models takes PAD for the last piece and a decoder that starts from a zero
    embedding, as Helsinki-NLP's have it. Ours starts from PAD's embedding, which is what its converter for BART does;
    the rest of the decoder is the same, post-norm.

    Raises:
        ImportError: ctranslate2 is not installed.
    """
    from ctranslate2.converters.transformers import BartLoader

    policy = load_policy(model)
    policy.model.config.normalize_before, policy.model.config.normalize_embedding = False, False
    with torch.no_grad():
        spec = BartLoader()(policy.model, policy.tokenizer)
    spec.config.bos_token = EOS  # this family has none, and a missing one is refused
    spec.validate()
    spec.optimize(quantization=quantization)
    folder.mkdir()
    spec.save(str(folder))
