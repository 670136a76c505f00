"""Checkpoints: one intact at every instant, damage never silent, the same bytes for the same state."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esrl.errors import NumericsError, StorageError
from esrl.training.checkpoint import CheckpointStore, pack_json, pack_tensors, unpack_json, unpack_tensors

OPERATIONS = ("open", "write", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "ftruncate")


def files_of(step: int) -> dict[str, bytes]:
    return {"model.safetensors": bytes([step]) * 300, "state.json": b'{"step": %d}' % step, "empty": b""}


def killed_at(operation: int, work: Callable[[], object], torn: bool = False) -> bool:
    """Run ``work`` in a child that kills itself before its n-th operation; False if it has fewer and ends well."""
    pid = os.fork()
    if pid == 0:
        count = 0

        def wrap(name: str, real: Callable) -> Callable:
            def counted(*args, **kwargs):
                nonlocal count
                # os.open for reading changes nothing: not an operation of the save
                if name == "open" and not args[1] & (os.O_CREAT | os.O_DIRECTORY):
                    return real(*args, **kwargs)
                if count == operation:
                    if torn and name == "write":
                        real(args[0], args[1][: len(args[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
                return real(*args, **kwargs)

            return counted

        code = 1
        try:
            for name in OPERATIONS:
                setattr(os, name, wrap(name, getattr(os, name)))
            work()
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


@pytest.mark.parametrize("torn", [False, True])
def test_save_killed_before_every_operation_leaves_old_or_new(tmp_path, torn):
    found = []
    operation = 0
    while True:
        store = CheckpointStore(tmp_path / f"{operation}", save_total_limit=1)
        store.save(1, files_of(1))
        killed = killed_at(operation, lambda store=store: store.save(2, files_of(2)), torn)
        for _ in range(2):  # before and after the start of the next run
            checkpoint = store.latest()
            assert checkpoint is not None and checkpoint.skipped == ()
            assert checkpoint.files == files_of(checkpoint.step)
            store.clean()
        assert all(path.name.startswith("step-") for path in store.folder.iterdir())
        found.append(checkpoint.step)
        store.save(3, files_of(3))  # and the next save works and tidies up
        assert [path.name for path in store.folder.iterdir()] == ["step-00000003"]
        if not killed:
            break
        operation += 1
    # mkdir, 4 x (open, write, fsync) less one write for the empty file, open + fsync of the folder, rename (number
    # 14), open + fsync of the parent, rename to .delete, 4 unlinks, rmdir: 1 + 11 + 2 + 1 + 2 + 1 + 4 + 1
    assert operation == 23
    assert found == [1] * 15 + [2] * 9


def test_save_of_the_same_step_killed_before_every_operation_leaves_old_or_new(tmp_path):
    found = []
    operation = 0
    while True:
        store = CheckpointStore(tmp_path / f"{operation}", save_total_limit=1)
        store.save(5, files_of(1))
        killed = killed_at(operation, lambda store=store: store.save(5, files_of(2)))
        for _ in range(2):
            checkpoint = store.latest()
            assert checkpoint is not None and checkpoint.step == 5 and checkpoint.skipped == ()
            assert checkpoint.files in (files_of(1), files_of(2))
            store.clean()
        assert [path.name for path in store.folder.iterdir()] == ["step-00000005"]
        found.append(1 if checkpoint.files == files_of(1) else 2)
        if not killed:
            break
        operation += 1
    assert operation == 24  # as above and the rename of the old one
    assert found == [1] * 16 + [2] * 9


def test_first_save_killed_leaves_none_or_all(tmp_path):
    found = []
    operation = 0
    while True:
        store = CheckpointStore(tmp_path / f"{operation}" / "checkpoints")
        killed = killed_at(operation, lambda store=store: store.save(7, files_of(7)))
        checkpoint = store.latest()
        assert checkpoint is None or checkpoint.files == files_of(7)
        found.append(checkpoint is not None)
        store.clean()
        store.save(7, files_of(7))
        assert [path.name for path in store.folder.iterdir()] == ["step-00000007"]
        if not killed:
            break
        operation += 1
    # two folders made (mkdir, open, fsync each), then the 15 operations up to the rename, open + fsync of the parent
    assert found == [False] * 21 + [True] * 3


def test_identical_save_writes_nothing(tmp_path):
    store = CheckpointStore(tmp_path, save_total_limit=2)
    path = store.save(3, files_of(3))
    before = {file.name: file.stat().st_ino for file in path.iterdir()}
    assert not killed_at(0, lambda: store.save(3, files_of(3)))  # not one operation before which to die
    assert store.save(3, files_of(3)) == path
    assert {file.name: file.stat().st_ino for file in path.iterdir()} == before


def test_limit_keeps_the_newest(tmp_path):
    store = CheckpointStore(tmp_path, save_total_limit=2)
    for step in (9, 10, 100, 123456789):  # by number, not by name: the last has nine digits
        store.save(step, files_of(1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000100", "step-123456789"]
    assert store.latest().step == 123456789
    with pytest.raises(ValueError, match="save_total_limit is 0"):
        CheckpointStore(tmp_path, save_total_limit=0)


def test_run_taken_up_before_a_damaged_checkpoint_drops_it_and_keeps_the_intact_ones(tmp_path):
    store = CheckpointStore(tmp_path, save_total_limit=2)
    store.save(10, files_of(10))
    store.save(20, files_of(20))
    (tmp_path / "step-00000020" / "state.json").unlink()
    checkpoint = store.latest()
    assert checkpoint.step == 10
    assert checkpoint.skipped == ("step-00000020: state.json: No such file or directory",)
    store.save(15, files_of(15))  # the damaged one must not push 10 out, nor win over 15
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000015"]
    assert store.latest().skipped == ()


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory) -> Path:
    store = CheckpointStore(tmp_path_factory.mktemp("two"))
    generator = torch.Generator().manual_seed(1)
    tensors = {"weight": torch.randn(20, 30, generator=generator), "step": torch.tensor(3)}
    for step in (1, 2):
        store.save(
            step, {"model.safetensors": pack_tensors(tensors), "state.json": pack_json({"step": step, "x": 0.1})}
        )
    return store.folder


def assert_falls_back(folder: Path, culprit: str) -> None:
    checkpoint = CheckpointStore(folder).latest()
    assert checkpoint is not None and checkpoint.step == 1
    assert unpack_json(checkpoint.files["state.json"]) == {"step": 1, "x": 0.1}
    assert len(checkpoint.skipped) == 1
    assert checkpoint.skipped[0].startswith("step-00000002: ") and culprit in checkpoint.skipped[0]


def test_every_flipped_byte_is_detected(two_checkpoints):
    rng = random.Random(1)
    names = ("manifest.json", "state.json", "model.safetensors")
    for trial in range(150):
        name = names[trial % 3]
        file = two_checkpoints / "step-00000002" / name
        intact = file.read_bytes()
        damaged = bytearray(intact)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        assert_falls_back(two_checkpoints, name)
        file.write_bytes(intact)
    assert CheckpointStore(two_checkpoints).latest().step == 2


def test_every_flipped_byte_of_the_manifest_is_damage_and_never_another_format(two_checkpoints):
    file = two_checkpoints / "step-00000002" / "manifest.json"
    intact = file.read_bytes()
    for place in range(len(intact)):
        file.write_bytes(intact[:place] + bytes([intact[place] ^ 1]) + intact[place + 1 :])
        assert_falls_back(two_checkpoints, "manifest.json")
    file.write_bytes(intact)


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["emptied", "cut", "longer", "deleted", "folder", "pipe", "link", "other's"])
def test_every_damage_is_detected(two_checkpoints, tmp_path, name, damage):
    root = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, root)
    file = root / "step-00000002" / name
    data = file.read_bytes()
    file.unlink()
    if damage == "emptied":
        file.write_bytes(b"")
    elif damage == "cut":
        file.write_bytes(data[:-1])
    elif damage == "longer":
        file.write_bytes(data + b"\0")
    elif damage == "folder":
        file.mkdir()
    elif damage == "pipe":
        os.mkfifo(file)  # reading it would wait for ever
    elif damage == "link":
        (tmp_path / "elsewhere").write_bytes(data)  # the very same content
        file.symlink_to(tmp_path / "elsewhere")
    elif damage == "other's":
        other = (root / "step-00000001" / name).read_bytes()
        if other == data:
            other = bytes(len(data))
        file.write_bytes(other)
    assert_falls_back(root, name)


def test_linked_checkpoint_folder_is_passed_over(two_checkpoints, tmp_path):
    root = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, root)
    (root / "step-00000002").rename(tmp_path / "elsewhere")
    (root / "step-00000002").symlink_to(tmp_path / "elsewhere")
    assert_falls_back(root, "is a link")


def seal(manifest: object) -> bytes:
    """A manifest somebody made on purpose: with a valid checksum."""
    head = json.dumps(manifest).removesuffix("}")
    return (head + f', "checksum": "{hashlib.sha256(head.encode()).hexdigest()}"}}\n').encode()


@pytest.mark.parametrize("name", ["../../secret", "/etc/hostname", "..", "deep/file", ""])
def test_manifest_that_leaves_the_folder_is_refused(two_checkpoints, tmp_path, name):
    root = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, root)
    (tmp_path / "secret").write_bytes(b"secret")
    entry = {"sha256": hashlib.sha256(b"secret").hexdigest(), "size": 6}
    manifest = seal({"format_version": 1, "step": 2, "files": {name: entry}})
    (root / "step-00000002" / "manifest.json").write_bytes(manifest)
    assert_falls_back(root, "not a file of this folder")


@pytest.mark.parametrize(
    "manifest",
    [
        {"format_version": 1, "step": 2},
        {"format_version": 1, "step": 2, "files": ["state.json"]},
        {"format_version": 1, "step": 2, "files": {"state.json": 3}},
        {"format_version": 1, "step": 1, "files": {}},
        {"format_version": 1, "step": 2, "files": {"state.json": {"sha256": None, "size": "many"}}},
    ],
)
def test_malformed_manifest_is_damage_and_no_traceback(two_checkpoints, tmp_path, manifest):
    root = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, root)
    (root / "step-00000002" / "manifest.json").write_bytes(seal(manifest))
    assert_falls_back(root, "")


def test_another_format_stops_and_names_the_expected_one(two_checkpoints, tmp_path):
    root = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, root)
    (root / "step-00000002" / "manifest.json").write_bytes(seal({"format_version": 2, "step": 2, "weights": []}))
    with pytest.raises(StorageError, match=r"step-00000002 has checkpoint format 2; .* expects format 1"):
        CheckpointStore(root).latest()


def test_none_intact_is_an_error_and_none_saved_is_not(two_checkpoints, tmp_path):
    assert CheckpointStore(tmp_path / "missing").latest() is None
    root = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, root)
    for step in (1, 2):
        (root / f"step-0000000{step}" / "state.json").write_bytes(b"")
    with pytest.raises(StorageError, match=r"no intact checkpoint .*step-00000002: state.json has 0 bytes .*00000001"):
        CheckpointStore(root).latest()


def test_foreign_files_are_left_alone(tmp_path):
    store = CheckpointStore(tmp_path, save_total_limit=1)
    for name in ("step-12", "step-00000012x", "notes"):
        (tmp_path / name).mkdir()
    store.save(1, files_of(1))
    store.save(2, files_of(2))
    store.clean()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step-00000002", "step-00000012x", "step-12"]
    assert store.latest().step == 2


@pytest.mark.parametrize("name", ["manifest.json", "../x", "a/b", ""])
def test_save_refuses_such_file_names(tmp_path, name):
    with pytest.raises(ValueError, match=r"manifest\.json is written|leaves the folder"):
        CheckpointStore(tmp_path).save(1, {name: b"x"})
    assert CheckpointStore(tmp_path).latest() is None


def test_full_disk_keeps_the_last_checkpoint_and_the_save_can_be_repeated(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", save_total_limit=1)
    store.save(1, files_of(1))
    big = {"small": b"x" * 10, "model.safetensors": bytes(3_000_000)}
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
            try:
                store.save(2, big)
            except StorageError as error:
                (tmp_path / "told").write_text(str(error))
                code = error.exit_code
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 6
    told = (tmp_path / "told").read_text()
    assert "model.safetensors (3000000 bytes to write): File too large." in told and "\n" not in told
    assert [path.name for path in store.folder.iterdir()] == ["step-00000001"]  # what was written is freed at once
    assert store.latest().files == files_of(1)
    store.save(2, big)
    assert store.latest().files == big


def test_tensors_round_trip_to_the_bit():
    nan = torch.tensor([math.nan, -math.inf, -0.0, 1e-45])
    tensors = {
        "bfloat16": torch.tensor([1.5, -2.25], dtype=torch.bfloat16),
        "bool": torch.tensor([[True, False]]),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "empty too": torch.empty(0, 3),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "random state": torch.get_rng_state(),
        "special": nan,
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    back = unpack_tensors(pack_tensors(tensors, {"format": "pt"}))
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
        assert torch.equal(back[name], tensor.detach()) or name == "special"
    assert back["special"].view(torch.int32).tolist() == nan.view(torch.int32).tolist()


def test_tied_tensors_are_stored_once_and_views_each():
    weight = torch.arange(1000.0).reshape(100, 10)
    tied = {"embed": weight, "head": weight, "rows": weight[10:20], "flat": weight.view(-1)}
    data = pack_tensors(tied)
    # 1,000 floats for embed and head together, 100 for rows, 1,000 for flat: 8,400 bytes and a header
    assert 8_400 < len(data) < 9_000
    back = unpack_tensors(data)
    for name, tensor in tied.items():
        assert torch.equal(back[name], tensor)
    assert back["embed"] is back["head"]
    back["flat"].zero_()
    assert torch.equal(back["rows"], weight[10:20])  # the views are on their own now


def test_equal_state_gives_equal_bytes():
    weight = torch.arange(5.0)
    notes = dict.fromkeys("abcdefgh", "x")  # safetensors itself writes these in 8! orders
    packed = {
        pack_tensors({"one": weight, "two": weight, "three": weight * 2}, notes),
        *(pack_tensors({"three": weight * 2, "two": weight, "one": weight}, notes) for _ in range(5)),
    }
    assert len(packed) == 1
    assert pack_json({"b": 1, "a": {"d": 2, "c": 3}}) == b'{"a": {"c": 3, "d": 2}, "b": 1}\n'


@settings(max_examples=100, deadline=None)
@given(
    value=st.dictionaries(
        st.text(), st.lists(st.floats(allow_nan=False, allow_infinity=False)) | st.integers() | st.text()
    )
)
def test_json_state_round_trips_exactly(value):
    back = unpack_json(pack_json(value))
    assert back == value
    assert repr(sorted(back.items())) == repr(sorted(value.items()))


def test_unreadable_state_is_a_storage_error():
    with pytest.raises(StorageError, match="no safetensors file"):
        unpack_tensors(b"\xff" * 20)
    with pytest.raises(StorageError, match="no JSON"):
        unpack_json(b'{"a": ')
    with pytest.raises(NumericsError, match=r"state\['queue'\]\[1\] is nan"):
        pack_json({"queue": [0.0, math.nan]})
