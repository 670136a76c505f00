"""Small RL runs in one and in two processes: ``python rank_worker.py OUTPUT EXAMPLES...``.

For each number of examples three processes are forked (the imports are made once): one on its own, and two that form
a group. Each writes what it ends with, or the traceback it ends by, and the test compares. Then pairs of processes run
the loop itself, one of them with a reward that fails.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from language_helpers import causal_model, classifier, preferences
from language_helpers import examples as questions
from language_helpers import tokenizer as byte_level
from safetensors.torch import save_file
from torch import nn

from esrl.algorithm.allocation import AllocationConfig
from esrl.algorithm.baselines import BaselineConfig
from esrl.algorithm.capability import CapabilityConfig
from esrl.algorithm.objectives import ObjectiveConfig
from esrl.data.demo import make_examples
from esrl.data.encoding import Encoder, PromptConfig
from esrl.data.examples import Example
from esrl.data.preferences import score_encoder
from esrl.errors import RewardError
from esrl.evaluation.decode import DecodingConfig
from esrl.evaluation.development import Development
from esrl.models.causal import CausalPolicy
from esrl.models.seq2seq import MarianPolicy, Preset, new_policy
from esrl.models.tokenizer import train_tokenizer
from esrl.rewards.calling import RewardConfig, build_reward
from esrl.rewards.model import ModelRewardConfig
from esrl.rewards.reading import ReadingConfig
from esrl.sampling.engine import SamplingConfig
from esrl.training.checkpoint import CheckpointStore
from esrl.training.gradient import GradientConfig
from esrl.training.loop import Loop
from esrl.training.loop_config import LoopConfig
from esrl.training.optimization import Optimizer, OptimizerConfig
from esrl.training.processes import Processes
from esrl.training.reward_model import PairwiseConfig, RewardModelTask
from esrl.training.rl import Method, RLTask, StepConfig
from esrl.training.run_folder import RunFolder
from esrl.training.sft import SFTConfig, SFTTask

BATCH = 7
METHODS: dict[str, tuple[ObjectiveConfig, BaselineConfig, StepConfig]] = {
    "grpo": (
        ObjectiveConfig(kind="grpo", normalise="token", std_normalise="batch"),
        BaselineConfig(kind="prompt_mean", queue_size=20),
        StepConfig(batch_size=BATCH, updates_per_batch=2),
    ),
    "rloo": (
        ObjectiveConfig(kind="rloo", kl_coefficient=0.2, kl_target=0.05, kl_horizon=50),
        BaselineConfig(kind="leave_one_out", queue_size=20),
        StepConfig(batch_size=BATCH),
    ),
    "ppo": (
        ObjectiveConfig(kind="ppo", kl_coefficient=0.2),
        BaselineConfig(kind="none", queue_size=20),
        StepConfig(batch_size=BATCH, updates_per_batch=2),
    ),
}
ESRL = (ObjectiveConfig(alpha=0.1), BaselineConfig(queue_size=20), StepConfig(batch_size=BATCH))
REWARDS = ("normalised", "model")
"""Kinds of ESRL with other rewards."""
CAUSAL = ("causal-two_stage", "causal-grpo", "causal-ppo")
"""ESRL, GRPO and PPO of a decoder-only model."""
LANGUAGE = ("sft", "pairs")


def reward_config(kind: str, output: Path) -> RewardConfig:
    if kind == "normalised":
        return RewardConfig(names=("chrf", "rouge_l"), weights=(1.0, 2.0), normalise="each")
    if kind == "model":
        reading = ReadingConfig(form="template", template="{prompt} {completion}")
        model = ModelRewardConfig(path=output / "reward-model", reading=reading, device="cpu")
        return RewardConfig(names=("model",), model=model)
    return RewardConfig(names=("chrf",))


def make_policy(examples: list[Example], *, causal: bool) -> tuple[MarianPolicy | CausalPolicy, Encoder | None]:
    """A random model whose samples end early, and what makes its prompts."""
    if causal:
        model = causal_model()
        model.generation_config.eos_token_id = [0, *range(100, 140)]
        words = byte_level(bos=True)
        return CausalPolicy(model, words), Encoder(words, PromptConfig())
    tokenizer = train_tokenizer([text for example in examples for text in example.columns.values()], 100, 60)
    policy = new_policy(Preset(width=32, layers=1, heads=2, inner_width=48), tokenizer, 60, 3)
    policy.model.to(torch.float64)
    policy.model.final_logits_bias[0, tokenizer.eos_token_id] += 2.5
    return policy, None


def make_task(kind: str, num_examples: int, output: Path) -> RLTask:
    examples = make_examples(num_examples, 1, "train")
    policy, encoder = make_policy(examples, causal=kind in CAUSAL)
    objective, baseline, step = METHODS.get(kind.removeprefix("causal-"), ESRL)
    return RLTask(
        policy,
        examples,
        Method(
            allocation=AllocationConfig(max_samples=5, elimination_ratio=0.5),
            capability=CapabilityConfig(estimator="reward" if kind == "model" else "metric"),
            objective=objective,
            baseline=baseline,
        ),
        step,
        SamplingConfig(max_new_tokens=10),
        GradientConfig(kind="graph" if kind == "graph" else "two_stage", micro_batch_tokens=40),
        build_reward(reward_config(kind, output)),
        Development([], (), DecodingConfig()),
        seed=4,
        encoder=encoder,
    )


def run(kind: str, num_examples: int, output: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Two epochs of two steps, or one of two batches and four updates: what was logged and remembered, and every step's
    summed gradient."""
    task, tensors = make_task(kind, num_examples, output), {}
    optimizer = Optimizer(task.model, OptimizerConfig(learning_rate=1e-3))
    record: dict[str, Any] = {"steps": []}
    several = task.config.num_updates > 1
    for number, (epoch, batch) in enumerate([(0, 0), (0, 1), *([(0, 2), (0, 3)] if several else [(1, 0), (1, 1)])]):
        optimizer.zero_grad()
        update = task.compute(epoch, batch)
        task.processes.sum_gradients(optimizer.parameters)
        gradients = zip(optimizer.names, optimizer.parameters, strict=True)
        tensors |= {f"{number}.{name}": p.grad.clone() for name, p in gradients if p.grad is not None}
        denominator = task.processes.sum(update.denominator)
        optimizer.scale_and_clip(denominator)
        optimizer.step(1e-3)
        metrics = {name: value for name, value in update.metrics.items() if not name.startswith("seconds_")}
        loss = task.processes.sum(update.loss)
        record["steps"].append({"metrics": metrics, "lines": update.commit(), "loss": loss, "prompts": denominator})
    record["state"] = task.state_dict()
    tensors |= {f"final.{name}": p.detach().clone() for name, p in task.model.named_parameters()}
    return record, tensors


def language_task(kind: str) -> SFTTask | RewardModelTask:
    """Fine-tuning on packed rows, or pairs: a batch of seven and one of one."""
    words, prompts = byte_level(bos=True), PromptConfig()
    if kind == "sft":
        # seven examples of this epoch have 122 tokens, the last one 30
        config = SFTConfig(batch_tokens=140, micro_batch_tokens=100, row_tokens=50)
        rows = questions()
        return SFTTask(causal_model(), Encoder(words, prompts), rows, config, 1, development=rows[:1])
    pairs, settings = preferences(), PairwiseConfig(batch_size=BATCH, micro_batch_tokens=200, centering=0.01)
    return RewardModelTask(
        classifier(), words, score_encoder(words, prompts), pairs, settings, 1, development=pairs[:1]
    )


def run_language(kind: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """An epoch: what was logged, each step's summed gradient, and what it ends with."""
    task, tensors = language_task(kind), {}
    optimizer = Optimizer(task.model, OptimizerConfig(learning_rate=1e-3))
    record: dict[str, Any] = {"steps": []}
    for batch in range(task.num_batches(0)):
        optimizer.zero_grad()
        update = task.compute(0, batch)
        task.processes.sum_gradients(optimizer.parameters)
        gradients = zip(optimizer.names, optimizer.parameters, strict=True)
        tensors |= {f"{batch}.{name}": p.grad.clone() for name, p in gradients if p.grad is not None}
        denominator, loss = task.processes.sum(update.denominator), task.processes.sum(update.loss)
        optimizer.scale_and_clip(denominator)
        optimizer.step(1e-3)
        empty = task.processes.any(update.denominator == 0)
        record["steps"].append({"metrics": update.metrics, "loss": loss, "denominator": denominator, "empty": empty})
    record["scores"] = task.evaluate()
    tensors |= {f"final.{name}": p.detach().clone() for name, p in task.model.named_parameters()}
    return record, tensors


def primitives() -> dict[str, Any]:
    """What ``Processes`` itself promises."""
    processes = Processes()
    rank = processes.rank
    everywhere, here, nowhere = (nn.Parameter(torch.zeros(2, 2)) for _ in range(3))
    everywhere.grad = torch.full((2, 2), 1.0 + rank)
    if rank == processes.size - 1:
        here.grad = torch.full((2, 2), 5.0)
    processes.sum_gradients([everywhere, here, nowhere])
    return {
        "rank": rank,
        "size": processes.size,
        "is_main": processes.is_main,
        "shards": {str(count): list(processes.shard(count)) for count in (0, 1, 2, 7)},
        "gather": processes.gather([f"{rank}-{i}" for i in range(rank + 1)]),
        "gather_nothing_from_0": processes.gather([] if rank == 0 else ["x"]),
        "sum": processes.sum(0.1 + rank),
        "any": [processes.any(False), processes.any(rank == 0)],
        "gradients": [None if p.grad is None else p.grad.tolist() for p in (everywhere, here, nowhere)],
    }


def join(store: Path, rank: int, size: int) -> None:
    if size > 1:
        limit = timedelta(seconds=60)
        dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=size, timeout=limit)


def rank_main(rank: int, size: int, num_examples: int, output: Path) -> None:
    name = f"{num_examples}-{rank}-of-{size}"
    join(output / f"{num_examples}-store", rank, size)
    record: dict[str, Any] = {"primitives": primitives()}
    for kind in ("two_stage", "graph", *METHODS, *REWARDS, *CAUSAL):
        record[kind], tensors = run(kind, num_examples, output)
        save_file(tensors, output / f"{name}-{kind}.safetensors")
    for kind in LANGUAGE:
        record[kind], tensors = run_language(kind)
        save_file(tensors, output / f"{name}-{kind}.safetensors")
    (output / f"{name}.json").write_text(json.dumps(record))
    if size > 1:
        dist.destroy_process_group()


def train(rank: int, folder: Path, store: Path, *, fails: bool) -> None:
    """Four steps in the loop, resumed where there is something to resume; with ``fails`` the reward of rank 1 raises
    in the third one."""
    join(store, rank, 2)
    task = make_task("two_stage", 9, folder)
    if fails and rank == 1:
        real = task.reward.score

        def score(*arguments: Any) -> Any:
            if arguments[-1]["global_step"] == 2:
                raise RewardError("broken on purpose")
            return real(*arguments)

        task.reward.score = score
    config = LoopConfig(max_steps=4, eval_on_start=False, eval_steps=100, save_steps=100)
    with RunFolder(folder, resume=True, is_main=rank == 0) as opened:
        dist.barrier()
        Loop(task, config, OptimizerConfig(learning_rate=1e-3), opened, 1, {"what": "ranks"}).run()
    dist.destroy_process_group()


def train_both(output: Path) -> None:
    """A run undisturbed; one whose reward fails on rank 1, and its second part."""
    record = {}
    for name, folder, fails in (("whole", "whole", False), ("failed", "broken", True), ("resumed", "broken", False)):
        started = time.monotonic()
        pids = [
            forked(
                lambda rank=rank, folder=folder, name=name, fails=fails: train(
                    rank, output / folder, output / f"{name}-store", fails=fails
                ),
                output / f"{name}-{rank}.error",
            )
            for rank in (0, 1)
        ]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        saved = CheckpointStore(output / folder / "checkpoints").latest()
        step = -1 if saved is None else saved.step
        record[name] = {"codes": codes, "seconds": time.monotonic() - started, "saved": step}
    (output / "training.json").write_text(json.dumps(record))


def forked(work: Callable[[], None], error: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:  # noqa: BLE001 - the test reads and shows it
        error.write_text(traceback.format_exc())
    finally:
        os._exit(code)


def main() -> None:
    torch.set_num_threads(1)
    output = Path(sys.argv[1])
    classifier(dtype=torch.float32).save_pretrained(output / "reward-model")
    byte_level().save_pretrained(output / "reward-model")
    for num_examples in map(int, sys.argv[2:]):
        pids = [
            forked(
                lambda rank=rank, size=size, num_examples=num_examples: rank_main(rank, size, num_examples, output),
                output / f"{num_examples}-{rank}-of-{size}.error",
            )
            for rank, size in ((0, 1), (0, 2), (1, 2))
        ]
        for pid in pids:
            os.waitpid(pid, 0)
    train_both(output)


if __name__ == "__main__":
    main()
