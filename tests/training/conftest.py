"""Fixtures of the training tests: a small data set and model, and a process to fork runs from."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parent.parent / "models"))  # the causal models serve here too

import pytest
from fork_server import ForkServer
from run_helpers import VARIANTS, Reference, bits, make_assets, values_of, write_config


def pytest_addoption(parser: pytest.Parser) -> None:
    with contextlib.suppress(ValueError):  # a conftest above may have it, for runs that start there
        parser.addoption("--n", type=int, default=None, help="how many random kills (-m kill)")


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train.jsonl``, ``dev.jsonl`` and ``model``."""
    return make_assets(tmp_path_factory.mktemp("assets"))


@pytest.fixture(scope="session")
def server(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    with ForkServer(tmp_path_factory.mktemp("children"), assets / "model") as running:
        yield running


@pytest.fixture(scope="session")
def references(server: ForkServer, assets: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    """Undisturbed runs, with what they end with and how long they take."""
    found = {}
    for name, (kind, changes) in VARIANTS.items():
        folder = tmp_path_factory.mktemp(name)
        config = write_config(folder / "run.toml", values_of(kind, assets, folder / "run", changes))
        code, output = server.run(kind, config)
        assert code == 0, output
        started = time.monotonic()
        assert server.run(kind, config, "--overwrite")[0] == 0  # the second run is no longer slowed by anything new
        found[name] = Reference(kind, changes, folder / "run", time.monotonic() - started, bits(folder / "run"))
    return found


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report takes as long to draw as these runs; tests/test_cli.py has one drawn."""

    def touch(runs: object, path: Path) -> Path:
        path.touch()
        return path

    monkeypatch.setattr("esrl.commands.write_report", touch)
