"""Stage one's contestants, as a worker process runs them: prompts in, samples out, tokens counted alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from esrl.benchmark.workloads import as_prompts
from esrl.models.causal import CausalPolicy
from esrl.models.load import load_policy
from esrl.models.seq2seq import MarianPolicy
from esrl.sampling.engine import EngineSampler, SamplingConfig
from esrl.types import Prompts, SamplingPlan

JobKind = Literal["sample", "step", "language-step"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a worker is told to build; crosses the pipe as JSON."""

    contestant: str
    kind: JobKind
    folder: str  # the model, in the contestant's own format
    source: list[list[int]]
    samples: int
    max_new_tokens: int
    threads: int


class Contestant(Protocol):
    """One way of sampling, its model loaded."""

    def run(self, seed: int, num_prompts: int | None = None) -> Callable[[], list[int]]:
        """Draw all samples of the first prompts, all by default; returns how to learn the samples' lengths.

        All work but the counting is done, on the device too, when it returns. A length counts real tokens, the
        end-of-sequence token included.
        """
        ...


class Engine:
    """Our sampler; unlike the others it also records log-probabilities and decodes the samples to text."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.policy = load_model(job)
        self.sampler = EngineSampler(self.policy, SamplingConfig(max_new_tokens=job.max_new_tokens), seed=1)

    def run(self, seed: int, num_prompts: int | None = None) -> Callable[[], list[int]]:
        source = self.job.source[:num_prompts]
        plan = SamplingPlan(
            num_samples=torch.full((len(source),), self.job.samples),
            temperature=torch.ones(len(source), dtype=torch.float64),
        )
        rollouts = self.sampler.sample(as_prompts(source), plan, epoch=seed)
        wait()
        return rollouts.lengths.tolist


class Generate:
    """Hugging Face's ``generate`` with its cache, sampling from the whole distribution."""

    def __init__(self, job: Job) -> None:
        self.job = job
        policy = load_model(job)
        assert isinstance(policy, MarianPolicy), "what comes behind the start token is counted"
        self.policy = policy

    def run(self, seed: int, num_prompts: int | None = None) -> Callable[[], list[int]]:
        tokens = self.tokens(self.policy, as_prompts(self.job.source[:num_prompts]), self.job, seed)
        wait()
        # what stands behind EOS is PAD, which is never sampled
        return (tokens != self.policy.pad_token).sum(1).tolist

    @staticmethod
    @torch.no_grad()
    def tokens(policy: MarianPolicy, prompts: Prompts, job: Job, seed: int) -> Tensor:
        """(R, T) new tokens, PAD behind EOS."""
        torch.manual_seed(seed)
        # no bad_words_ids: the model's bias already keeps PAD away, and the processor would cost time
        output: Tensor = policy.model.generate(
            input_ids=prompts.input_ids.to(policy.device),
            attention_mask=prompts.mask.to(policy.device),
            max_new_tokens=job.max_new_tokens,
            max_length=None,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=job.samples,
        )
        return output[:, 1:]


class CTranslate2:
    """CTranslate2's greedy search with random sampling; the model's format decides between float32 and int8.

    Its generator is seeded once, when its first thread starts; ``run`` goes on from where the last one left it.
    """

    def __init__(self, job: Job) -> None:
        import ctranslate2

        self.job = job
        ctranslate2.set_random_seed(1)
        device = "cuda" if ctranslate2.get_cuda_device_count() else "cpu"
        self.translator = ctranslate2.Translator(
            job.folder, device=device, inter_threads=1, intra_threads=job.threads, compute_type="default"
        )
        words = ctranslate2_pieces(Path(job.folder))
        self.source = [[words[token] for token in row] for row in job.source]

    def run(self, seed: int, num_prompts: int | None = None) -> Callable[[], list[int]]:
        results = self.translate(self.source[:num_prompts], sampling_topk=0, num_hypotheses=self.job.samples)
        return lambda: [len(tokens) for result in results for tokens in result.hypotheses]

    def translate(self, source: list[list[str]], **options: Any) -> Any:
        """One batch under the workload's rules."""
        return self.translator.translate_batch(
            source,
            beam_size=1,
            max_input_length=0,
            min_decoding_length=0,  # by default the first token cannot be EOS
            max_decoding_length=self.job.max_new_tokens,
            return_end_token=True,
            **options,
        )


CONTESTANTS: dict[str, Callable[[Job], Contestant]] = {
    "esrl": Engine,
    "generate": Generate,
    "ctranslate2-float32": CTranslate2,
    "ctranslate2-int8": CTranslate2,
}


def ctranslate2_pieces(folder: Path) -> list[str]:
    """The vocabulary of a converted model, by token."""
    pieces: list[str] = json.loads((folder / "shared_vocabulary.json").read_text(encoding="utf-8"))
    return pieces


def load_model(job: Job) -> MarianPolicy | CausalPolicy:
    """The job's model, on its device, with the job's threads."""
    torch.set_num_threads(job.threads)
    policy = load_policy(job.folder)
    for parameter in policy.model.parameters():
        parameter.data = parameter.data.clone()  # weights still in a mapped file would count as memory of the first run
    if torch.cuda.is_available():
        policy.model.cuda()
    return policy


def wait() -> None:
    """For the device to finish what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
