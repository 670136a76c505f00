"""Where decoding takes place."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from esrl.evaluation.decode import on_device


@pytest.mark.parametrize(("available", "device"), [(True, "cuda"), (False, "cpu")])
def test_a_policy_goes_where_the_gpu_is(monkeypatch, available, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    seen: list[str] = []
    policy: Any = SimpleNamespace(model=SimpleNamespace(to=seen.append))
    assert on_device(policy) is policy and seen == [device]
