"""What a person sees while a run goes on: a progress bar with rate and time left, and a line per evaluation."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_PLAIN_INTERVAL = 30.0


def say(text: object) -> None:
    """A line on standard error. Whoever reads it may have gone, and a run does not end for that."""
    try:
        print(text, file=sys.stderr, flush=True)
    except BrokenPipeError:
        silence(sys.stderr)
    except OSError:  # a full disk or a lost terminal; it may come back
        pass


def silence(stream: TextIO) -> None:
    """Send a stream whose reader has gone to nowhere: flushing it again, as Python does at its end, would fail."""
    with suppress(OSError):  # a stream without a file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class Display:
    """A progress bar on a terminal; a plain line now and then where standard error is a file. That it cannot be shown
    ends no run."""

    def __init__(self, total_steps: int | None, max_seconds: float | None, enabled: bool) -> None:
        self.console = Console(stderr=True)
        self.enabled = enabled
        self.total_steps = total_steps
        self.max_seconds = max_seconds
        self._last_line = 0.0
        by_time = max_seconds is not None
        columns = [TextColumn("{task.description}"), BarColumn()]
        columns += [] if by_time else [MofNCompleteColumn()]
        columns += [TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TextColumn("<"), TimeRemainingColumn()]
        columns += [TextColumn("{task.fields[shown]}")]
        self.progress = Progress(*columns, console=self.console, disable=not enabled or not sys.stderr.isatty())

    def __enter__(self) -> Display:
        with suppress(OSError):
            self.progress.start()
        total = self.max_seconds if self.max_seconds is not None else self.total_steps
        self.bar = self.progress.add_task("training", total=total, rate="", shown="")
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self.progress.stop()

    def step(self, step: int, seconds: float, metrics: dict[str, Any]) -> None:
        """Show where training stands; ``seconds`` of training so far."""
        if not self.enabled:
            return
        names = {"reward_mean": "reward", "loss": "loss", "num_samples_mean": "k"}
        shown = "  ".join(f"{label} {metrics[name]:.3g}" for name, label in names.items() if name in metrics)
        rate = f"{metrics['seconds_total']:.2f} s/step"
        done = seconds if self.max_seconds is not None else step
        self.progress.update(self.bar, completed=done, rate=rate, shown=shown)
        now = time.monotonic()
        if self.progress.disable and now - self._last_line > _PLAIN_INTERVAL:
            self._last_line = now
            say(f"step {step}{self._left(step, seconds)}  {rate}  {shown}")

    def evaluation(self, line: dict[str, Any]) -> None:
        """Show an evaluation."""
        if not self.enabled:
            return
        scores = "  ".join(f"{name} {value:.2f}" for name, value in line.items() if name.startswith("dev_"))
        best = "  (best so far)" if line["best"] else ""
        text = f"step {line['step']}, epoch {line['epoch']:.2f}: {scores}{best}"
        if self.progress.disable:
            say(text)
        else:
            with suppress(OSError):
                self.progress.console.print(text, highlight=False, markup=False)

    def _left(self, step: int, seconds: float) -> str:
        if self.max_seconds is not None:
            return f"  {max(0.0, self.max_seconds - seconds):.0f} s left"
        if self.total_steps is None or step == 0:
            return ""
        return f"/{self.total_steps}  {seconds / step * (self.total_steps - step):.0f} s left"
