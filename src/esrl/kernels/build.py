"""Compiling the kernels on the user's machine, once, with the compiler that is there.

They are built for this very processor and share PyTorch's threads: a second pool of threads would fight with the first
for the cores. Without a compiler everything runs on PyTorch's own operations.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from esrl.kernels.processor import facts, is_intels

SOURCES = Path(__file__).parent
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC"),
    *(("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()),
)
SECONDS = 300
"""Longest time for a compiler to take; it needs about five."""


class CannotBuildError(Exception):
    """The kernels cannot be compiled here; says why."""


def library() -> Path:
    """The compiled kernels; they are built if need be.

    Raises:
        CannotBuildError: no compiler, another system than Linux, a PyTorch without OpenMP, or a compiler that fails.
    """
    # PyTorch's OpenMP itself, not the compiler's
    return _built("kernels", _flags(), _openmp())


def allocator() -> Path:
    """What lets PyTorch's tensors come from the kernels' pool; it is built if need be.

    Raises:
        CannotBuildError: as for the kernels, or a PyTorch without its headers.
    """
    folder = Path(torch.__file__).parent
    headers = [f"-I{folder / 'include'}", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    flags = ["-std=c++20", "-O2", "-fPIC", *headers]
    return _built("allocator", flags, folder / "lib" / "libc10.so")


def load(file: Callable[[], Path]) -> ctypes.CDLL:
    """The library that ``library`` or ``allocator`` gives; one that a power cut has damaged is built anew.

    Raises:
        CannotBuildError, OSError: it cannot be built, or not be loaded.
    """
    built = file()
    try:
        return ctypes.CDLL(str(built))
    except OSError:
        built.unlink()
        return ctypes.CDLL(str(file()))


def _built(name: str, flags: list[str], linked: Path) -> Path:
    compiler = _compiler()
    known = [*flags, _version(compiler), _processor(), str(linked), torch.__version__]
    key = hashlib.sha256("\n".join(known).encode())
    for source in sorted([*SOURCES.glob("*.h"), SOURCES / f"{name}.cpp"]):
        key.update(source.read_bytes())
    file = f"{name}-{key.hexdigest()[:16]}.so"
    for folder in _folders():
        if _is_ours(folder) and (folder / file).is_file():
            return folder / file
    to = _writable() / file
    # in a file of its own first: other processes may be about to do the same
    with tempfile.TemporaryDirectory(dir=to.parent) as temporary:
        made = Path(temporary) / to.name
        objects = str(made.with_suffix(".o"))
        _run([compiler, *flags, "-c", str(SOURCES / f"{name}.cpp"), "-o", objects])
        _run([compiler, "-shared", objects, str(linked), "-Wl,--no-undefined", "-o", str(made)])
        made.replace(to)
    return to


def _flags() -> list[str]:
    """Intel's processors fetch the next block; on AMD's something like it was slower (docs/performance.md)."""
    return [*FLAGS, "-DESRL_FETCH_NEXT"] if is_intels() else [*FLAGS]


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotBuildError(f"{command[0]}: {error}") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise CannotBuildError(f"{command[0]}: " + next((line for line in lines if "error" in line), lines[0]))


def _compiler() -> str:
    asked = os.environ.get("CXX")
    for name in [asked] if asked else ["g++", "c++"]:
        if found := shutil.which(name):
            return found
    raise CannotBuildError(f"no C++ compiler ({asked or 'g++'}) was found")


def _version(compiler: str) -> str:
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=SECONDS).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotBuildError(f"{compiler}: {error}") from error


def _processor() -> str:
    """What ``-march=native`` depends on."""
    return "\n".join(facts().get(name, "") for name in ("model name", "flags", "Features"))


def _openmp() -> Path:
    """The OpenMP that PyTorch has loaded."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise CannotBuildError("the kernels are built on Linux only") from error
    paths = {Path(line.split(maxsplit=5)[5]) for line in maps.splitlines() if line.count("/")}
    found = sorted(path for path in paths if path.name.startswith(("libgomp", "libiomp", "libomp")) and path.is_file())
    # other packages may bring one of their own
    found = [path for path in found if path.is_relative_to(Path(torch.__file__).parent)] or found
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise CannotBuildError(f"one OpenMP library should be loaded, but there are: {names}")
    return found[0]


def _folders() -> list[Path]:
    cache = os.environ.get("XDG_CACHE_HOME")
    home = Path(cache) if cache else Path(os.path.expanduser("~")) / ".cache"
    return [home / "esrl", Path(tempfile.gettempdir()) / f"esrl-{os.getuid()}"]


def _is_ours(folder: Path) -> bool:
    """Whether nobody else could have put a library there."""
    try:
        status = folder.stat()
    except OSError:
        return False
    return status.st_uid == os.getuid() and not status.st_mode & 0o022


def _writable() -> Path:
    for folder in _folders():
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        if _is_ours(folder) and os.access(folder, os.W_OK):
            return folder
    folders = ", ".join(map(str, _folders()))
    raise CannotBuildError(
        f"none of {folders} is a folder that this user can write to and others cannot; set XDG_CACHE_HOME"
    )
