"""What a run is put together from, and what its user is told of it."""

from __future__ import annotations

import pytest
import torch

from esrl import building
from esrl.building import tell_notice
from esrl.kernels import why_not
from esrl.training import run_folder
from esrl.training.run_folder import environment


@pytest.mark.parametrize("show", [True, False])
def test_a_run_says_why_it_has_no_kernels(make_policy, monkeypatch, capsys, show):
    monkeypatch.setattr(building, "why_not", lambda: "no C++ compiler (g++) was found")
    tell_notice(make_policy(torch.float32), show)
    said = capsys.readouterr().err
    assert ("without compiled kernels" in said and "no C++ compiler (g++) was found." in said) == show


def test_a_run_with_kernels_says_nothing(make_policy, monkeypatch, capsys):
    monkeypatch.setattr(building, "why_not", lambda: None)
    tell_notice(make_policy(torch.float32), True)
    assert capsys.readouterr().err == ""


def test_the_environment_says_whether_there_are_kernels(monkeypatch):
    assert (environment()["kernels"] == "compiled kernels") == (why_not() is None)
    monkeypatch.setattr(run_folder, "why_not", lambda: "ESRL_KERNELS is off")
    assert environment()["kernels"] == "no compiled kernels: ESRL_KERNELS is off"
