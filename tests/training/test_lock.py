"""One run per folder, with real processes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from esrl.errors import LockedError, StorageError
from esrl.training.lock import RunLock


@contextmanager
def holder(folder: Path, with_worker: bool = False) -> Iterator[tuple[int, int]]:
    """(pid, pid of its worker or 0) of another process that holds the lock until it is killed."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with RunLock(folder):
                worker = os.fork() if with_worker else 0
                if with_worker and worker == 0:
                    time.sleep(30)  # outlives its parent
                os.write(writer, json.dumps([os.getpid(), worker]).encode())
                time.sleep(30)
        finally:
            os._exit(1)
    own, worker = json.loads(os.read(reader, 100))
    assert own == pid
    os.close(reader)
    os.close(writer)
    try:
        yield pid, worker
    finally:
        for child in (pid, worker):
            if child:
                os.kill(child, signal.SIGKILL)  # a zombie until waited for, so the id is still ours
        os.waitpid(pid, 0)


def test_second_process_is_refused_and_told_who_holds_it(tmp_path):
    with holder(tmp_path / "run") as (pid, _):
        start = time.monotonic()
        with (
            pytest.raises(LockedError, match=rf"run is in use by process {pid} on {os.uname().nodename}.*output_dir"),
            RunLock(tmp_path / "run"),
        ):
            pytest.fail("two hold it")
        assert time.monotonic() - start < 5
        assert LockedError.exit_code == 7


def test_lock_is_free_right_after_sigkill_and_the_new_holder_is_named(tmp_path):
    with holder(tmp_path) as (first, _):
        os.kill(first, signal.SIGKILL)
        os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == first  # the file stays
        with holder(tmp_path) as (second, _), pytest.raises(LockedError, match=f"process {second} "), RunLock(tmp_path):
            pytest.fail("two hold it")


def test_a_worker_that_outlives_its_killed_run_does_not_keep_the_lock(tmp_path):
    with holder(tmp_path, with_worker=True) as (pid, worker):
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        os.kill(worker, 0)  # it lives
        with RunLock(tmp_path):
            assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_lock_is_exclusive_within_a_process_and_can_be_taken_again(tmp_path):
    for _ in range(3):
        with (
            RunLock(tmp_path),
            pytest.raises(LockedError, match=f"process {os.getpid()} "),
            RunLock(tmp_path),
        ):
            pytest.fail("two hold it")
    with pytest.raises(ZeroDivisionError), RunLock(tmp_path):
        _ = 1 / 0
    with RunLock(tmp_path):
        signature = json.loads((tmp_path / ".lock").read_text())
    assert signature.keys() == {"pid", "host", "started"}


def test_a_refused_start_leaves_no_file_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    with RunLock(tmp_path):
        for _ in range(5):
            with pytest.raises(LockedError), RunLock(tmp_path):
                pytest.fail("two hold it")
    assert len(os.listdir("/proc/self/fd")) == before


def test_one_of_many_processes_that_start_at_once_gets_the_lock(tmp_path):
    gate, opener = os.pipe()
    children = []
    for _ in range(8):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.close(opener)
                os.read(gate, 1)  # returns when the gate is closed
                try:
                    with RunLock(tmp_path):
                        time.sleep(0.5)
                        code = 0
                except LockedError as error:
                    code = 7 if "process unknown" not in str(error) else 1
            finally:
                os._exit(code)
        children.append(pid)
    os.close(gate)
    os.close(opener)
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children)
    assert codes == [0] + [7] * 7


def test_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)  # no such file system at hand
    with (
        pytest.raises(StorageError, match=r"\.lock: this file system has no file locks.*local disk"),
        RunLock(tmp_path),
    ):
        pytest.fail("nothing is held")


def test_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file.*File exists"), RunLock(tmp_path / "file"):
        pytest.fail("nothing is held")
