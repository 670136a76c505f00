"""Commands run in processes that are forked from one which has imported everything, so that a trial costs no import.

As a script: reads requests from standard input, one JSON object a line, and answers each with one.

    {"argv": [...], "output": path, "hook": [name, argument...]}  ->  {"pid": n}
    {"wait": pid, "seconds": limit}                               ->  {"status": wait status}, null at the limit
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

OPERATIONS = ("open", "write", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "ftruncate")


class Child:
    """A command that runs. ``output`` is what it has written to standard output and error."""

    def __init__(self, server: ForkServer, pid: int, path: Path) -> None:
        self.server, self.pid, self.path = server, pid, path

    def send(self, number: int) -> None:
        os.kill(self.pid, number)  # it stays a zombie until it is waited for, so the number is its own

    def wait(self, seconds: float = 60) -> int:
        """The exit code, or minus the signal that killed it."""
        status = self.server.ask({"wait": self.pid, "seconds": seconds})["status"]
        assert status is not None, f"still running after {seconds} s and killed; it said: {self.output[-2000:]}"
        return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

    @property
    def output(self) -> str:
        return self.path.read_text(encoding="utf-8")


class ForkServer:
    """The test's side. Use as a context manager."""

    def __init__(self, folder: Path, warm_up: Path) -> None:
        """
        Args:
            folder: where the children's output goes.
            warm_up: a model folder; loading it once imports what is imported late.
        """
        self.folder = folder
        self.number = 0
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TMPDIR": str(folder),  # where a killed export leaves its scratch folder
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(warm_up)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def start(self, *argv: str | Path, hook: tuple[Any, ...] = ()) -> Child:
        """Run ``esrl ARGV...``; ``hook`` names a function of this file that prepares the process."""
        self.number += 1
        path = self.folder / f"output-{self.number}.txt"
        request = {"argv": [str(word) for word in argv], "output": str(path), "hook": [str(part) for part in hook]}
        return Child(self, self.ask(request)["pid"], path)

    def run(self, *argv: str | Path, hook: tuple[Any, ...] = ()) -> tuple[int, str]:
        """Run to the end: exit code and output."""
        child = self.start(*argv, hook=hook)
        return child.wait(), child.output

    def killed_after(self, seconds: float, *argv: str | Path, hook: tuple[Any, ...] = ()) -> bool:
        """Whether SIGKILL, sent after so many seconds, was what ended it; the alternative is a good end."""
        child = self.start(*argv, hook=hook)
        time.sleep(seconds)
        child.send(signal.SIGKILL)
        code = child.wait()
        assert code in (0, -signal.SIGKILL), child.output
        return code == -signal.SIGKILL


# ---- hooks: they run in the child, before the command ----


def mark(path: str) -> None:
    Path(path).touch()


def no_hook() -> None:
    """The command as it is."""


def at_operations(step: int, act: Callable[[int], None]) -> None:
    """Call ``act(n)`` before the n-th file operation of a step's evaluation (with its export) and save."""
    from esrl.training.loop import Loop

    counted, inside = [0], [False]

    def count(name: str) -> None:
        real = getattr(os, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if inside[0]:
                inside[0] = False  # what `act` does is none of the run's operations
                act(counted[0])
                counted[0] += 1
                inside[0] = True
            return real(*args, **kwargs)

        setattr(os, name, wrapped)

    def watch(name: str) -> None:
        real = getattr(Loop, name)

        def wrapped(loop: Any, *args: Any) -> Any:
            inside[0] = loop.state.step == step
            try:
                return real(loop, *args)
            finally:
                inside[0] = False

        setattr(Loop, name, wrapped)

    for name in OPERATIONS:
        count(name)
    watch("_evaluate")
    watch("_save")


def kill_before_operation(step: str, operation: str) -> None:
    """SIGKILL before the n-th file operation of a step."""

    def act(number: int) -> None:
        if number == int(operation):
            os.kill(os.getpid(), signal.SIGKILL)

    at_operations(int(step), act)


def copy_before_operations(step: str, run: str, copies: str) -> None:
    """Copy the run folder before every file operation of a step: what SIGKILL would leave, without the kill."""
    at_operations(int(step), lambda number: shutil.copytree(run, Path(copies) / str(number)) and None)


def pause_in(what: str, marker: str, seconds: str) -> None:
    """Leave a marker and wait, in the second step, evaluation or save of the process."""
    from esrl.evaluation.development import Development
    from esrl.sampling.engine import EngineSampler
    from esrl.training.checkpoint import CheckpointStore
    from esrl.training.gradient import StageTwo

    owner, name = {
        "sampling": (EngineSampler, "sample"),
        "gradient": (StageTwo, "backward"),
        "evaluation": (Development, "evaluate"),
        "save": (CheckpointStore, "save"),
    }[what]
    real, calls = getattr(owner, name), [0]

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            mark(marker)
            time.sleep(float(seconds))
        return real(self, *args, **kwargs)

    setattr(owner, name, wrapped)


def wait_in_step(marker: str) -> None:
    """Like ``pause_in`` with no end, for a process that is to hold its folder."""
    pause_in("gradient", marker, "600")


HOOKS: dict[str, Callable[..., None]] = {
    hook.__name__: hook for hook in (no_hook, kill_before_operation, copy_before_operations, pause_in, wait_in_step)
}


def child(request: dict[str, Any]) -> int:
    """Run a command; the exit code."""
    # SIGKILL loses nothing that was written, synced or not, so waiting for the disk would test nothing here
    os.fsync = lambda fd: None
    from esrl import cli, commands

    # the report is drawn when all is saved, and takes as long as the run
    commands.write_report = lambda runs, path: path.touch() or path  # type: ignore[assignment]
    name, *arguments = request["hook"] or ["no_hook"]
    HOOKS[name](*arguments)
    return cli.main(request["argv"])


def fork(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        code = child(request)
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def wait(pid: int, seconds: float) -> int | None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status
        time.sleep(0.004)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def serve(model: str) -> None:
    import torch

    torch.set_num_threads(1)
    import tyro

    import esrl.commands
    from esrl.cli import _quiet
    from esrl.models.seq2seq import load_policy
    from esrl.training.task import export_folder

    _quiet()
    export_folder(load_policy(model).save)
    assert esrl.commands and tyro
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer: dict[str, Any] = {"status": wait(request["wait"], request["seconds"])}
        else:
            answer = {"pid": fork(request)}
        print(json.dumps(answer), file=replies, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
