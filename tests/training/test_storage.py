"""Files that are whole at every instant: killed, torn and refused at every operation of ``os``."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esrl.errors import NumericsError, StorageError
from esrl.training.storage import (
    JsonLines,
    dump_json,
    make_folder,
    recover_folder,
    remove_tree,
    replace_bytes,
    swap_folder,
    write_bytes,
)

OPERATIONS = ("open", "write", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "ftruncate")
OLD = {"a.bin": b"old a", "b.json": b"old b" * 9, "only-old": b""}
NEW = {"a.bin": b"new a" * 7, "b.json": b"new b"}


def in_child(work: Callable[[], None], prepare: Callable[[], None]) -> int:
    """The wait status of a forked child that runs ``work`` and exits 0; 1 if it raised."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            prepare()
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def killed_at(operation: int, work: Callable[[], None], torn: bool = False) -> bool:
    """Run ``work`` in a child that kills itself before its n-th operation; False if it has fewer and ends well.

    With ``torn`` a write leaves half of its bytes behind first.
    """
    counter = [0]

    def wrap(name: str) -> None:
        real = getattr(os, name)

        def counted(*args, **kwargs):
            if counter[0] == operation:
                if torn and name == "write":
                    real(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            counter[0] += 1
            return real(*args, **kwargs)

        setattr(os, name, counted)

    status = in_child(work, lambda: [wrap(name) for name in OPERATIONS] and None)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


@pytest.mark.parametrize("torn", [False, True])
def test_swap_killed_before_every_operation_leaves_old_or_new(tmp_path, torn):
    seen = []
    operation = 0
    while True:
        root = tmp_path / f"{operation}"
        root.mkdir()
        swap_folder(root / "model", OLD)
        killed = killed_at(operation, lambda root=root: swap_folder(root / "model", NEW), torn)
        # recovery itself may be killed as well, at any of its operations
        step = 0
        while killed_at(step, lambda root=root: recover_folder(root / "model")):
            step += 1
        assert [path.name for path in root.iterdir()] == ["model"]
        seen.append("old" if content(root / "model") == OLD else "new")
        assert content(root / "model") == (OLD if seen[-1] == "old" else NEW)
        if not killed:
            break
        operation += 1
    # mkdir, 2 x (open, write, fsync), open + fsync of the folder, rename, rename, open + fsync of the parent,
    # rename to .delete, 3 unlinks, rmdir = 1 + 6 + 2 + 2 + 2 + 1 + 3 + 1
    assert operation == 18
    # old until the second rename (number 10) has happened, new from then on
    assert seen == ["old"] * 11 + ["new"] * 8


def test_first_swap_killed_leaves_nothing_or_all(tmp_path):
    operation = 0
    while True:
        root = tmp_path / f"{operation}"
        root.mkdir()
        killed = killed_at(operation, lambda root=root: swap_folder(root / "model", NEW))
        recover_folder(root / "model")
        assert content(root / "model") in ({}, NEW)
        assert [path.name for path in root.iterdir()] in ([], ["model"])
        if not killed:
            break
        operation += 1
    assert content(root / "model") == NEW
    assert operation == 12  # as above, without the rename of the old folder and its deletion


@pytest.mark.parametrize("torn", [False, True])
def test_replace_killed_before_every_operation_leaves_old_or_new(tmp_path, torn):
    seen = []
    path = tmp_path / "environment.json"
    for operation in range(7):
        path.write_bytes(b"old")
        assert killed_at(operation, lambda: replace_bytes(path, b"new content"), torn) == (operation < 6)
        seen.append(path.read_bytes())
    # open, write, fsync, replace (number 3), open, fsync
    assert seen == [b"old"] * 4 + [b"new content"] * 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["environment.json"]  # a leftover was used up, not kept


def test_order_of_operations_survives_a_power_cut(tmp_path, monkeypatch):
    # SIGKILL keeps what the kernel has; a power cut keeps what was synced. So: data and folder before the rename,
    # the rename before the old content is deleted.
    swap_folder(tmp_path / "model", OLD)
    log: list[tuple[str, str]] = []
    names: dict[int, str] = {}

    def record(name: str) -> None:
        real = getattr(os, name)

        def recorded(*args, **kwargs):
            result = real(*args, **kwargs)
            if name == "open":
                names[result] = Path(args[0]).name
            log.append((name, names[args[0]] if isinstance(args[0], int) else Path(args[0]).name))
            return result

        monkeypatch.setattr(os, name, recorded)

    for name in OPERATIONS:
        record(name)
    swap_folder(tmp_path / "model", NEW)
    monkeypatch.undo()
    moved = log.index(("rename", ".tmp-model"))
    for name in NEW:
        assert log.index(("write", name)) < log.index(("fsync", name)) < log.index(("fsync", ".tmp-model")) < moved
    synced = log.index(("fsync", tmp_path.name))
    assert moved < synced < log.index(("rename", ".old-model")) < log.index(("unlink", "only-old"))


@pytest.mark.parametrize("lasting", [False, True])
def test_swap_refused_at_every_operation_leaves_old_or_new(tmp_path, monkeypatch, lasting):
    # a full disk: the n-th operation fails (lasting: and all later ones that need space)
    outcomes = []
    for refused in range(13):  # the operations up to the sync of the parent; after it the new content stands
        folder = tmp_path / f"{refused}" / "model"
        folder.parent.mkdir()
        swap_folder(folder, OLD)
        counter = [0]

        def wrap(name: str, counter: list[int] = counter, refused: int = refused) -> None:
            real = getattr(os, name)

            def refusing(*args, **kwargs):
                number, counter[0] = counter[0], counter[0] + 1
                needs_space = name in ("write", "mkdir", "fsync")
                if number == refused or (lasting and number > refused and needs_space):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return real(*args, **kwargs)

            monkeypatch.setattr(os, name, refusing)

        for name in OPERATIONS:
            wrap(name)
        with pytest.raises(StorageError, match=rf"{folder.parent}.*No space left on device.*Free 1 MB.*--resume"):
            swap_folder(folder, NEW)
        monkeypatch.undo()
        recover_folder(folder)
        outcomes.append(content(folder))
        swap_folder(folder, NEW)  # the same again once there is space
        assert content(folder) == NEW
    assert outcomes == [OLD] * 11 + [NEW] * 2


def test_size_limit_is_told_with_path_and_bytes(tmp_path):
    path, told = tmp_path / "metrics.json", tmp_path / "told"
    path.write_bytes(b"old")

    def work() -> None:
        try:
            replace_bytes(path, bytes(50_000))
        except StorageError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            told.write_text(str(error))

    limit = (10_000, resource.RLIM_INFINITY)
    assert in_child(work, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)) == 0
    message = told.read_text()
    assert str(path) in message.replace(".tmp-", "") and "50000 bytes" in message and "ulimit -f" in message
    assert path.read_bytes() == b"old"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["metrics.json", "told"]


def test_full_disk_names_the_megabytes_to_free():
    # /dev/full refuses every write with ENOSPC; 2,500,001 bytes are 3 MB, rounded up
    with pytest.raises(StorageError, match=r"^/dev/full \(2500001 bytes to write\): No space left .* Free 3 MB"):
        write_bytes(Path("/dev/full"), bytes(2_500_001))


@pytest.mark.parametrize(
    ("code", "remedy"),
    [(errno.EROFS, "writable"), (errno.EACCES, "writable"), (errno.EDQUOT, "quota"), (errno.EIO, "Check the path")],
)
def test_each_refusal_has_its_remedy(tmp_path, monkeypatch, code, remedy):
    def refuse(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError, match=rf"config\.toml.*5 bytes.*{os.strerror(code)}.*{remedy}") as caught:
        replace_bytes(tmp_path / "config.toml", b"12345")
    monkeypatch.undo()
    assert caught.value.exit_code == 6
    assert list(tmp_path.iterdir()) == []


def test_remove_tree_deletes_links_and_not_what_they_lead_to(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keep").write_text("kept")
    tree = tmp_path / "tree"
    (tree / "deep").mkdir(parents=True)
    (tree / "deep" / "file").write_text("x")
    (tree / "link").symlink_to(outside)
    (tmp_path / ".delete-tree").mkdir()  # a killed deletion's leftover
    remove_tree(tree)
    remove_tree(tree)  # nothing there: nothing happens
    assert [path.name for path in tmp_path.iterdir()] == ["outside"]
    assert (outside / "keep").read_text() == "kept"


@pytest.mark.parametrize("name", ["../escape", "a/b", "..", "", "a\\b", "a\0b"])
def test_swap_refuses_names_that_leave_the_folder(tmp_path, name):
    with pytest.raises(ValueError, match="leaves the folder"):
        swap_folder(tmp_path / "model", {name: b"x"})
    assert list(tmp_path.iterdir()) == []


def test_make_folder_refuses_a_file_in_its_place(tmp_path):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file.*File exists"):
        make_folder(tmp_path / "file")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=200, deadline=None)
@given(record=st.dictionaries(st.text(), JSON, max_size=5))
def test_json_round_trips_exactly_on_one_line_without_control_characters(record):
    text = dump_json(record, "record")
    assert text.splitlines() == [text]  # also by U+2028, U+0085 and the like
    assert not [char for char in text if char < " " or "\x7f" <= char <= "\x9f"]
    back = json.loads(text.encode())
    assert back == record
    assert repr(back) == repr(record)  # tells -0.0 from 0.0, 1 from 1.0 and True, and every bit of a float


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_refuses_what_is_not_finite_and_names_it(value):
    with pytest.raises(NumericsError, match=rf"metrics\.jsonl\['loss'\]\[1\] is {value}"):
        dump_json({"loss": [0.5, value]}, "metrics.jsonl")


def test_json_refuses_what_would_come_back_as_something_else():
    with pytest.raises(ValueError, match=r"m\['counts'\] has the key 3"):
        dump_json({"counts": {3: 1}}, "m")
    with pytest.raises(ValueError, match=r"m\['x'\] is a bytes"):
        dump_json({"x": b"raw"}, "m")


def test_lines_are_cut_back_to_the_offset_and_continued(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with JsonLines(path) as lines:
        assert lines.offset() == 0
        lines.append({"step": 1, "loss": 0.1 + 0.2})
        lines.sync()
        offset = lines.offset()
        lines.append({"step": 2, "text": "Grüße"})
    assert offset == len('{"step": 1, "loss": 0.30000000000000004}\n')
    assert path.read_text(encoding="utf-8").splitlines()[1] == '{"step": 2, "text": "Grüße"}'
    with JsonLines(path) as lines:
        lines.truncate(offset)
        lines.append({"step": 2})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1, "loss": 0.1 + 0.2}, {"step": 2}]


def test_lines_refuse_an_offset_of_another_file(tmp_path):
    with JsonLines(tmp_path / "metrics.jsonl") as lines:
        lines.append({"step": 1})  # 12 bytes with the line's end
        for offset in (13, 11, -1):  # behind the end, within a line, before the start
            with pytest.raises(StorageError, match=rf"12 bytes and no line that ends at byte {offset}"):
                lines.truncate(offset)
        assert lines.offset() == 12
        lines.truncate(12)
        lines.truncate(0)
        assert lines.offset() == 0


def test_a_refused_line_leaves_no_part_of_itself(tmp_path):
    path = tmp_path / "metrics.jsonl"

    def work() -> None:
        with JsonLines(path) as lines:
            lines.append({"text": "a" * 50})  # {"text": ""} is 12 characters: 63 of 100 bytes
            with pytest.raises(StorageError, match=r"metrics\.jsonl \(63 bytes"):
                lines.append({"text": "b" * 50})  # 37 bytes fit, then the limit
            lines.append({"text": "c"})

    assert in_child(work, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))) == 0
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == ["a" * 50, "c"]
