"""Shared fixtures: small Marian policies over a real tokenizer, in float64 and float32.

``random64/32``  random weights, scaled up until the distributions are peaked, EOS likely enough for ragged lengths.
``trained64/32`` the same architecture after a few seconds of maximum likelihood: its samples end by EOS.
``toy_policy``   a vocabulary of seven tokens, whose distribution over short sequences can be enumerated.

The policies are shared by all tests: whoever changes one takes a copy first (``copy.deepcopy``).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from esrl.data.batching import make_prompts, pad
from esrl.data.examples import Example, number_examples
from esrl.models.seq2seq import MarianPolicy, Preset, new_policy
from esrl.models.tokenizer import train_tokenizer
from esrl.types import Prompts, Rollouts, SamplingPlan

PAIRS = (
    ("Ein Hund läuft über die Wiese.", "A dog runs across the meadow."),
    ("Zwei Kinder spielen im Garten.", "Two children are playing in the garden."),
    ("Der Mann liest eine Zeitung.", "The man is reading a newspaper."),
    ("Eine Frau kauft frisches Brot.", "A woman buys fresh bread."),
    ("Drei Männer sitzen auf einer Bank im Park.", "Three men are sitting on a bench in the park."),
    ("Das Mädchen trägt einen roten Mantel.", "The girl is wearing a red coat."),
    ("Ein Junge wirft den Ball.", "A boy throws the ball."),
    ("Die Leute warten auf den Bus.", "The people are waiting for the bus."),
    ("Eine Katze schläft auf dem Sofa neben dem Fenster.", "A cat sleeps on the sofa next to the window."),
    ("Er trinkt Kaffee.", "He drinks coffee."),
    ("Sie singt.", "She sings."),
    ("Zwei Hunde schwimmen im See.", "Two dogs swim in the lake."),
    ("Der alte Mann füttert die Vögel.", "The old man feeds the birds."),
    ("Ein Zug fährt durch den Tunnel.", "A train goes through the tunnel."),
    ("Die Kinder essen Eis am Strand.", "The children eat ice cream on the beach."),
    ("Eine Gruppe von Touristen fotografiert die alte Kirche.", "A group of tourists photographs the old church."),
)

MAX_LENGTH = 40


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def examples() -> list[Example]:
    return list(number_examples({"source": source, "reference": target} for source, target in PAIRS))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return train_tokenizer([text for pair in PAIRS for text in pair], vocab_size=160, max_length=MAX_LENGTH)


MakePolicy = Callable[..., MarianPolicy]


@pytest.fixture(scope="session")
def make_policy(tokenizer: Any) -> MakePolicy:
    """A fresh random policy: ``make_policy(dtype=..., layers=..., eos_bias=...)``."""

    def make(
        dtype: torch.dtype = torch.float64,
        layers: int = 2,
        peaked: bool = True,
        eos_bias: float = 4.5,
        seed: int = 7,
        vocabulary: Any = tokenizer,
    ) -> MarianPolicy:
        policy = new_policy(Preset(width=32, layers=layers, heads=4, inner_width=48), vocabulary, MAX_LENGTH, seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in policy.model.named_parameters():
                if name.endswith("bias"):  # 0 at first, and then nobody would notice one that is left out
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
                elif peaked and parameter.dim() == 2 and ("attn" in name or "fc" in name):
                    parameter *= 4
            if peaked:  # logits with a spread of 1.7, from embeddings small enough for tokens not to repeat themselves
                policy.model.model.shared.weight *= 0.7
                policy.model.model.decoder.layers[-1].final_layer_norm.weight *= 1.7 / 0.7
            bias = policy.model.final_logits_bias
            bias += 0.1 * torch.randn(bias.shape, generator=generator)
            bias[0, vocabulary.eos_token_id] += eos_bias
        policy.model.to(dtype)
        return policy

    return make


@pytest.fixture(scope="session")
def random64(make_policy: MakePolicy) -> MarianPolicy:
    return make_policy(torch.float64)


@pytest.fixture(scope="session")
def random32(make_policy: MakePolicy) -> MarianPolicy:
    return make_policy(torch.float32)


@pytest.fixture(scope="session")
def trained64(make_policy: MakePolicy, examples: list[Example]) -> MarianPolicy:
    """Learns half of the pairs by heart, so it is sure of some prompts and not of others."""
    policy = make_policy(torch.float32, peaked=False, eos_bias=0.0)
    _learn(policy, examples[:8], steps=120)
    policy.model.to(torch.float64)
    return policy


@pytest.fixture(scope="session")
def trained32(make_policy: MakePolicy, trained64: MarianPolicy) -> MarianPolicy:
    policy = make_policy(torch.float32, peaked=False, eos_bias=0.0)
    policy.model.load_state_dict(trained64.model.state_dict())
    return policy


def _learn(policy: MarianPolicy, examples: list[Example], steps: int) -> None:
    tokenizer = policy.tokenizer
    source, mask = pad(tokenizer([e.source for e in examples])["input_ids"], tokenizer.pad_token_id)
    target, _ = pad(tokenizer([e.columns["reference"] for e in examples])["input_ids"], -100)
    adam = torch.optim.Adam(policy.model.parameters(), lr=3e-3)
    for _ in range(steps):
        adam.zero_grad()
        policy.model(input_ids=source, attention_mask=mask, labels=target).loss.backward()
        adam.step()


@pytest.fixture(scope="session")
def toy_vocabulary() -> Any:
    """Seven tokens: PAD, which is never said, EOS, and five others."""
    words = ["<pad>", "</s>", "<unk>", "a", "b", "c", "d"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def toy_policy(make_policy: MakePolicy, toy_vocabulary: Any) -> MarianPolicy:
    return make_policy(torch.float64, peaked=False, eos_bias=0.5, vocabulary=toy_vocabulary)


@pytest.fixture(scope="session")
def prompts(examples: list[Example], tokenizer: Any) -> Prompts:
    """Ten prompts of very different lengths, padded to the longest."""
    chosen = [examples[i] for i in (0, 10, 4, 9, 8, 15, 2, 6, 11, 3)]
    batch = make_prompts(chosen, tokenizer, MAX_LENGTH)
    assert len(set(batch.mask.sum(1).tolist())) >= 5
    return batch


@pytest.fixture(scope="session")
def make_plan() -> Callable[..., SamplingPlan]:
    """``make_plan([3, 0, 5], [0.6, 1.0, 0.8])``."""

    def make(num_samples: list[int], temperature: list[float] | float) -> SamplingPlan:
        heat = [temperature] * len(num_samples) if isinstance(temperature, float) else temperature
        return SamplingPlan(num_samples=torch.tensor(num_samples), temperature=torch.tensor(heat, dtype=torch.float64))

    return make


@pytest.fixture(scope="session")
def uneven_plan(make_plan: Callable[..., SamplingPlan]) -> SamplingPlan:
    """Different k and tau for each of the ten prompts, one of them left out."""
    return make_plan([4, 1, 0, 3, 6, 2, 5, 1, 3, 4], [0.9, 0.6, 1.0, 1.0, 0.7, 1.3, 0.8, 1.0, 0.65, 1.0])


@pytest.fixture(scope="session")
def reference_logits() -> Callable[[MarianPolicy, Prompts, Rollouts], Tensor]:
    """(R, T, V) logits by Hugging Face's own model, with its graph, suppressed tokens at -inf."""

    def compute(policy: MarianPolicy, prompts: Prompts, rollouts: Rollouts) -> Tensor:
        start = torch.full_like(rollouts.tokens[:, :1], policy.start_token)
        logits = policy.model(
            input_ids=prompts.input_ids[rollouts.prompt_index],
            attention_mask=prompts.mask[rollouts.prompt_index],
            decoder_input_ids=torch.cat([start, rollouts.tokens[:, :-1]], 1),
        ).logits
        suppressed = torch.zeros(policy.vocabulary, dtype=torch.bool)
        suppressed[policy.suppressed] = True
        return logits.masked_fill(suppressed, -torch.inf)

    return compute


@pytest.fixture
def gradients() -> Callable[[nn.Module, Callable[[], object]], dict[str, Tensor]]:
    """The gradient that ``work`` leaves in the module's parameters, by name."""

    def collect(module: nn.Module, work: Callable[[], object]) -> dict[str, Tensor]:
        module.zero_grad(set_to_none=True)
        work()
        found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        module.zero_grad(set_to_none=True)
        return found

    return collect


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--n", type=int, default=None, help="how many random kills (-m kill)")
