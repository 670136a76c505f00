"""Exit codes: every failure has its own, and nobody reading what was printed is none."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors import SafetensorError

from esrl import cli
from esrl.cli import main
from esrl.errors import LockedError, NumericsError, OutOfMemoryError, RewardError, StorageError


@pytest.fixture(autouse=True)
def own_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line shortens how warnings look; the other tests keep theirs."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)


SMALLER = "Take smaller batches (likelihood.micro_batch_tokens, sampling.max_cache_tokens, --batch-size)."
DISK = "Check the disk, and the one for temporary files (TMPDIR), where models are exported first."
CODES = [
    (ValueError("a\nb"), 2, "esrl: a b"),
    (RewardError("reward"), 3, "esrl: reward"),
    (NumericsError("loss"), 4, "esrl: loss"),
    (OutOfMemoryError("memory"), 5, "esrl: memory"),
    (MemoryError(), 5, f"esrl: out of memory: MemoryError. {SMALLER}"),
    (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB. GPU 0 has a capacity of 1 MiB."),
        5,
        f"esrl: out of memory: CUDA out of memory. Tried to allocate 2 MiB. {SMALLER}",
    ),
    (OSError(errno.ENOSPC, "No space left on device"), 6, f"esrl: OSError: [Errno 28] No space left on device. {DISK}"),
    (SafetensorError("I/O error"), 6, f"esrl: SafetensorError: I/O error. {DISK}"),
    (BrokenPipeError("a worker"), 1, "esrl: BrokenPipeError: a worker (--debug shows where)."),
    (StorageError("disk"), 6, "esrl: disk"),
    (LockedError("locked"), 7, "esrl: locked"),
    (RuntimeError("nobody\nforesaw it"), 1, "esrl: RuntimeError: nobody foresaw it (--debug shows where)."),
]


@pytest.mark.parametrize(("error", "code", "line"), CODES, ids=[type(error).__name__ for error, _, _ in CODES])
def test_every_failure_has_its_exit_code_and_a_traceback_only_on_demand(monkeypatch, capsys, error, code, line):
    def fail(words: list[str]) -> int:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "rl", fail)
    assert main(["rl"]) == code
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", f"{line}\n")
    for words in (["rl", "--debug"], ["--debug", "rl"]):
        assert main(words) == code
        said = capsys.readouterr().err
        assert said.startswith("Traceback") and "in fail\n" in said and said.splitlines()[-1] == line


UNREAD = """
import sys
from esrl import cli
cli._quiet = lambda: None
cli.COMMANDS["report"] = lambda words: print("a result") or 0
cli.COMMANDS["rl"] = lambda words: cli._tell("done")
sys.exit(cli.main([sys.argv[1]]))
"""


@pytest.mark.parametrize("name", ["report", "rl"])
def test_results_that_nobody_reads_are_no_failure(name):
    reader, writer = os.pipe()
    os.close(reader)
    call = [sys.executable, "-c", UNREAD, name]
    done = subprocess.run(call, stdout=writer, stderr=subprocess.PIPE, text=True, env=os.environ.copy(), check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_interrupted_before_the_run_has_begun(monkeypatch, capsys):
    def interrupt(words: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "rl", interrupt)
    assert main(["rl"]) == 130
    assert "Traceback" not in capsys.readouterr().err
