"""A claimed folder is refused or locked and otherwise untouched, until the run begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from esrl.errors import LockedError, StorageError
from esrl.training.lock import RunLock
from esrl.training.run_folder import RunFolder


def begun(folder: Path, *lines: dict[str, object]) -> None:
    """A run that has logged these lines and saved nothing."""
    with RunFolder(folder, resume=True) as run:
        for line in lines:
            run.logs["metrics.jsonl"].append(line)


def test_where_no_run_is_nothing_is_made(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("missing", "empty"):
        with RunFolder(tmp_path / name).claim():
            pass
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "empty"]


def test_an_old_run_is_deleted_when_the_new_one_begins_and_no_one_else_gets_in(tmp_path):
    begun(tmp_path)
    (tmp_path / "old").touch()
    run = RunFolder(tmp_path, overwrite=True)
    with run.claim():
        assert (tmp_path / "old").exists()
        with pytest.raises(LockedError), RunLock(tmp_path):
            pytest.fail("two hold it")
        with run:
            assert not (tmp_path / "old").exists() and run.logs
            with pytest.raises(LockedError), RunLock(tmp_path):
                pytest.fail("two hold it")
    with RunLock(tmp_path):
        pass


def test_a_claim_that_ends_without_a_run_frees_the_folder(tmp_path):
    begun(tmp_path)
    (tmp_path / "old").touch()
    with pytest.raises(ZeroDivisionError), RunFolder(tmp_path, overwrite=True).claim():
        _ = 1 / 0
    with pytest.raises(ValueError, match="Continue that run with --resume"), RunFolder(tmp_path).claim():
        pytest.fail("it holds a run")
    assert (tmp_path / "old").exists()
    with RunLock(tmp_path):
        pass


def test_a_run_killed_before_it_signed_its_lock_can_be_begun_again(tmp_path):
    (tmp_path / ".lock").touch()
    with RunFolder(tmp_path, resume=True).claim():
        pass
    with RunLock(tmp_path):
        signed = (tmp_path / ".lock").read_text()
    (tmp_path / "thesis.txt").touch()
    (tmp_path / ".lock").write_text(signed + "of a longer one\n")  # killed before it cut that off
    with RunFolder(tmp_path, resume=True).claim():
        pass
    (tmp_path / ".lock").write_text("")
    with pytest.raises(ValueError, match="no run of ours"), RunFolder(tmp_path, resume=True).claim():
        pytest.fail("somebody else's")


def test_what_appeared_since_the_claim_is_not_written_into(tmp_path):
    folder = tmp_path / "run"
    run = RunFolder(folder)
    with run.claim():
        folder.mkdir()
        (folder / "thesis.txt").touch()
        with pytest.raises(ValueError, match="no run of ours"), run:
            pytest.fail("begun")
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_a_run_that_trained_is_not_resumed_without_its_checkpoints(tmp_path):
    begun(tmp_path, {"step": 0, "kind": "evaluation"})
    with RunFolder(tmp_path, resume=True).claim():  # killed before its first checkpoint: there is nothing to lose
        pass
    begun(tmp_path, {"step": 1, "loss": 0.5})
    with pytest.raises(StorageError, match="checkpoints are gone"), RunFolder(tmp_path, resume=True).claim():
        pytest.fail("it would start over")
    with RunFolder(tmp_path, overwrite=True).claim():
        pass
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "result.json").touch()
    with pytest.raises(StorageError, match="checkpoints are gone"), RunFolder(tmp_path, resume=True):
        pytest.fail("it would start over")
