"""Reward functions of every kind, good and bad; test_reward_calling.py names them by this file's path."""

import asyncio
import os
import re
import signal
import sys
import time

import numpy as np


def lengths(completions, **kwargs):
    return [float(len(text)) for text in completions]


def as_tuple(completions):
    return tuple(len(text) for text in completions)


def as_numpy(completions):
    return np.array([len(text) for text in completions], dtype=np.float32)


def as_tensor(completions):
    import torch

    return torch.tensor([len(text) for text in completions], requires_grad=False)


def as_numpy_scalars(completions):
    return [np.float32(len(text)) for text in completions]


def as_bools(completions):
    return [len(text) > 1 for text in completions]


async def asynchronous(completions, **kwargs):
    await asyncio.sleep(0)
    return [float(len(text)) for text in completions]


class Scorer:
    def __call__(self, completions, **kwargs):
        return [float(len(text)) for text in completions]


def abstains_from_empty(completions):
    return [float(len(text)) if text else None for text in completions]


def always_abstains(completions):
    return [None] * len(completions)


def too_few(completions):
    return [1.0] * (len(completions) - 1)


def too_many(completions):
    return [1.0] * (len(completions) + 1)


def strings(completions):
    return [1.0] + ["0.5"] * (len(completions) - 1)


def one_number(completions):
    return 1.0


def nothing(completions):
    return None


def a_dict(completions):
    return dict.fromkeys(completions, 1.0)


def two_dimensional(completions):
    return np.zeros((len(completions), 1))


def nested(completions):
    return [[1.0]] * len(completions)


def not_a_number(completions):
    return [1.0, float("nan"), 1.0]


def infinite(completions):
    return [1.0, 1.0, float("-inf")]


def too_large(completions):
    return [10**400] * len(completions)


def raises(completions):
    return [1 / (len(text) - 1) for text in completions]


def exits(completions):
    sys.exit(0)


def misuses_log_extra(completions, log_extra):
    log_extra("column", [1])
    return [0.0] * len(completions)


def logs(prompts, completions, completion_ids, source, trainer_state, log_metric, log_extra):
    log_metric("step_seen", trainer_state["global_step"])
    log_extra("pair", [p + c + s for p, c, s in zip(prompts, completions, source, strict=True)])
    return [sum(ids) for ids in completion_ids]


def reads_the_state(completions, trainer_state):
    assert trainer_state.global_step == trainer_state["global_step"]
    assert not hasattr(trainer_state, "max_steps")
    return [trainer_state.global_step] * len(completions)


def spoils_its_lists(prompts, completions, completion_ids, reference):
    for values in (prompts, completions, completion_ids, reference):
        values.clear()
    return [0.0, 0.0, 0.0]


def positional_only(completions, /):
    return [0.0] * len(completions)


def hold_the_lock():
    re.match(r"(a+)+$", "a" * 60 + "b")  # exponential, and inside C: no other thread runs


def leave_a_child():
    os.fork()
    time.sleep(60)


DEEDS = {
    "sleep": lambda: time.sleep(60),
    "hold the lock": hold_the_lock,
    "leave a child": leave_a_child,
    "be killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda: os._exit(3),
}


def obeys(prompts, completions, source=None, log_metric=None):
    """Does what the first completion says."""
    order = completions[0]
    print("what a function prints must not end up among the replies")
    if order in DEEDS:
        DEEDS[order]()
    if order == "exit once" and not os.path.exists(prompts[0]):
        open(prompts[0], "w").close()
        os._exit(3)
    if order == "raise":
        raise KeyError("no such thing")
    if order == "nan":
        return [float("nan")] * len(completions)
    if order == "pid":
        log_metric("pid", os.getpid())
    return [None if text == "abstain" else float(len(text)) for text in completions]


LOOPS = set()


async def remembers_its_loop(completions):
    LOOPS.add(id(asyncio.get_running_loop()))
    return [float(len(LOOPS))] * len(completions)


class AsyncScorer:
    async def __call__(self, completions, **kwargs):
        await asyncio.sleep(0)
        return [float(len(text)) for text in completions]


async def waits(completions):
    await asyncio.sleep(0.5)
    return [1.0] * len(completions)


async def waits_too(completions):
    await asyncio.sleep(0.5)
    return [2.0] * len(completions)


def blocks(completions):
    time.sleep(0.5)
    return [3.0] * len(completions)


async def never_ends(completions):
    await asyncio.sleep(3600)


async def raises_later(completions):
    await asyncio.sleep(0)
    return 1 / 0


async def exits_later(completions):
    sys.exit(3)


async def asynchronous_nan(completions):
    return [float("nan")] * len(completions)


async def asynchronous_too_few(completions):
    return [1.0] * (len(completions) - 1)
