"""A reward function in a process of its own, which can be killed: the parent's side (the other is worker.py)."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import weakref
from typing import Any

from esrl.rewards import worker
from esrl.rewards.worker import ContractError, Parameters, Pending, Reply

START_SECONDS = 120.0
"""How long the import of a reward function may take; it does not count towards its time limit."""


class WorkerFailure(Exception):
    """The worker did not answer in time, or died; the next call starts a new one."""


class RaisedInWorker(Exception):
    """The reward function raised; the message says what and where, a note holds the traceback."""


class WorkerProcess:
    """Runs one reward function; started when first needed, replaced after a failure.

    The process is started afresh, never forked, and does not import the parent's main module. It and what it has
    started are killed together; when the parent dies it exits. Whatever crosses is JSON: tuples arrive as lists.
    """

    def __init__(self, function: str) -> None:
        self.function = function
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._kill: weakref.finalize | None = None

    @property
    def pid(self) -> int | None:
        """The process id while there is a process."""
        return None if self._process is None else self._process.pid

    def start(self) -> Parameters:
        """Start the process if there is none; returns what the function can be given.

        Raises:
            ValueError: the function cannot be imported, or not within ``START_SECONDS``.
        """
        self.stop()
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(worker.__file__)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._kill = weakref.finalize(self, _kill, self._process)
        try:
            setup = {"function": self.function, "search_path": sys.path, "seconds": START_SECONDS}
            reply = self._exchange(setup, START_SECONDS)
        except WorkerFailure as failure:
            raise ValueError(f"the worker process of reward {self.function!r} {failure} at its start.") from failure
        if "failed" in reply:
            self.stop()
            raise ValueError(reply["failed"])
        return Parameters(**reply)

    def call(self, arguments: dict[str, Any], seconds: float) -> Reply:
        """Call the function, for at most ``seconds``.

        Raises:
            WorkerFailure: time is up, or the process died.
            ContractError: the function broke the contract.
            RaisedInWorker: the function raised.
            ValueError: a new process was needed and could not start, or ``arguments`` are not JSON.
        """
        return self.begin(arguments, seconds).wait()

    def begin(self, arguments: dict[str, Any], seconds: float) -> Pending:
        """``call`` in two halves; the time runs from here on. Only one call may be under way.

        Raises:
            ValueError: as ``call``.
        """
        if self._process is None:
            self.start()
        box = self._send({"arguments": arguments, "seconds": seconds})
        deadline = time.monotonic() + seconds

        def wait() -> Reply:
            reply = self._receive(box, deadline, seconds)
            if "broken" in reply:
                raise ContractError(reply["broken"], reply["index"])
            if "raised" in reply:
                error = RaisedInWorker(reply["raised"])
                error.add_note(reply["traceback"])
                raise error
            return Reply(**reply)

        return Pending(wait, self.stop, True)

    def stop(self) -> None:
        """Kill the process, if there is one, and leave nothing behind: no zombie, no thread, no open pipe."""
        process, self._process = self._process, None
        if process is None:
            return
        assert self._kill is not None and process.stdin is not None and process.stdout is not None
        self._kill()
        if self._thread is not None:
            self._thread.join(timeout=1)  # it has read the end of the pipe by now
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # what a dead process has not read cannot be flushed
                pipe.close()

    def _exchange(self, message: dict[str, Any], seconds: float) -> dict[str, Any]:
        return self._receive(self._send(message), time.monotonic() + seconds, seconds)

    def _send(self, message: dict[str, Any]) -> queue.SimpleQueue[bytes]:
        """Begin to send; the answer will be in the box."""
        try:
            line = json.dumps(message).encode("ascii") + b"\n"
        except TypeError as error:
            raise ValueError(
                f"reward {self.function!r} runs in a process of its own, so it can only be given JSON: {error}"
            ) from error
        process, box = self._process, queue.SimpleQueue[bytes]()
        assert process is not None
        # Writing can block as long as reading: a worker that hangs does not empty its pipe.
        self._thread = threading.Thread(target=_talk, args=(process, line, box), daemon=True)
        self._thread.start()
        return box

    def _receive(self, box: queue.SimpleQueue[bytes], deadline: float, seconds: float) -> dict[str, Any]:
        process, thread = self._process, self._thread
        assert process is not None and thread is not None
        try:
            answer = box.get(timeout=max(0.0, deadline - time.monotonic()))
            if not answer.endswith(b"\n"):
                self.stop()
                raise WorkerFailure(f"died ({_fate(process)})")
        except queue.Empty:
            self.stop()
            raise WorkerFailure(f"gave no answer in {seconds:g} s") from None
        except BaseException:  # interrupted: a late answer must not be taken for the next call's
            self.stop()
            raise
        thread.join()
        return json.loads(answer)


def _talk(process: subprocess.Popen[bytes], line: bytes, box: queue.SimpleQueue[bytes]) -> None:
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(line)
        process.stdin.flush()
        box.put(process.stdout.readline())
    except (OSError, ValueError):  # the process died, or `stop` closed the pipe
        box.put(b"")


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.returncode is None:  # not waited for, so its number still is its own
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
        process.wait()


def _fate(process: subprocess.Popen[bytes]) -> str:
    code = process.returncode
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
