"""Building the kernels: once, and without harm where it cannot be done."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from esrl.kernels import build, native
from esrl.kernels.build import CannotBuildError, library


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    native._load.cache_clear()
    yield tmp_path / "cache" / "esrl"
    native._load.cache_clear()


def compiler(folder: Path, script: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def needs_compiler() -> str:
    found = shutil.which("g++")
    if found is None:
        pytest.skip("no g++")
    return found


def test_they_are_built_once(empty_cache, tmp_path, monkeypatch):
    real = needs_compiler()
    calls = tmp_path / "calls"
    monkeypatch.setenv("CXX", compiler(tmp_path, f'echo "$@" >> {calls}\nexec {real} "$@"'))
    built = library()
    assert built.parent == empty_cache and os.listdir(empty_cache) == [built.name]
    assert library() == built
    lines = calls.read_text().splitlines()
    assert sum(" -c " in line for line in lines) == 1 and lines[-1] == "--version"


def test_the_allocator_is_built_for_this_pytorch(empty_cache, monkeypatch):
    needs_compiler()
    first = build.allocator()
    assert build.allocator() == first and first.name.startswith("allocator-")
    monkeypatch.setattr(build.torch, "__version__", "another")
    assert build.allocator() != first


def test_a_pytorch_without_headers(empty_cache, tmp_path, monkeypatch):
    needs_compiler()
    monkeypatch.setattr(build.torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    with pytest.raises(CannotBuildError, match=r"CPUAllocator\.h"):
        build.allocator()
    assert os.listdir(empty_cache) == []


def test_another_compiler_version_builds_anew(empty_cache, tmp_path, monkeypatch):
    real = needs_compiler()
    names = set()
    for version in ("1", "2"):
        script = f'if [ "$1" = --version ]; then echo {version}; else exec {real} "$@"; fi'
        monkeypatch.setenv("CXX", compiler(tmp_path, script))
        names.add(library().name)
    assert len(names) == 2


@pytest.mark.parametrize(("file", "function"), [(library, "esrl_draw"), (build.allocator, "esrl_serve")])
def test_a_damaged_library_is_built_anew(empty_cache, file, function):
    needs_compiler()
    built = file()
    built.write_bytes(built.read_bytes()[:100])
    assert hasattr(build.load(file), function)
    assert native.kernels() is not None and native.why_not() is None


def test_without_a_compiler(empty_cache, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(CannotBuildError, match=r"no C\+\+ compiler \(/nowhere/g\+\+\) was found"):
        library()
    assert native.kernels() is None
    assert native.why_not() == "no C++ compiler (/nowhere/g++) was found"
    assert native.operations() == 0


def test_a_compiler_that_fails_leaves_nothing(empty_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", compiler(tmp_path, 'echo "x.h:1: error: no such thing" >&2\nexit 1'))
    with pytest.raises(CannotBuildError, match="error: no such thing"):
        library()
    assert os.listdir(empty_cache) == []


def test_a_compiler_that_hangs(empty_cache, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "SECONDS", 0.5)
    monkeypatch.setenv("CXX", compiler(tmp_path, '[ "$1" = --version ] || exec sleep 60'))
    with pytest.raises(CannotBuildError, match="timed out"):
        library()


def test_folders_that_cannot_be_written_to(empty_cache, tmp_path, monkeypatch):
    needs_compiler()
    for name in ("cache", "temporary"):
        (tmp_path / name).write_text("a file")
    with pytest.raises(CannotBuildError, match="set XDG_CACHE_HOME"):
        library()


def test_another_cache_where_the_first_is_no_folder(empty_cache, tmp_path, monkeypatch):
    needs_compiler()
    (tmp_path / "cache").write_text("a file")
    assert library().parent.parent == tmp_path / "temporary"


def test_a_library_that_others_could_have_made_is_not_loaded(empty_cache):
    needs_compiler()
    built = library()
    empty_cache.chmod(0o777)
    assert library().parent != built.parent
    empty_cache.chmod(0o700)
    assert library() == built


def test_they_can_be_turned_off(empty_cache, monkeypatch):
    monkeypatch.setenv("ESRL_KERNELS", "off")
    assert native.kernels() is None and native.why_not() == "ESRL_KERNELS is off"
    assert not empty_cache.exists()


@pytest.mark.parametrize("intels", [True, False])
def test_what_is_faster_on_intels_processors_is_for_them(intels, monkeypatch):
    monkeypatch.setattr(build, "is_intels", lambda: intels)
    assert ("-DESRL_FETCH_NEXT" in build._flags()) == intels
