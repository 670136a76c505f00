"""Whose processor it is."""

from __future__ import annotations

import pytest

from esrl.kernels import processor


@pytest.mark.parametrize(
    ("described", "intels"), [("vendor_id\t: GenuineIntel\n", True), ("vendor_id\t: AuthenticAMD\n", False)]
)
def test_whose_processor_it_is(described, intels, monkeypatch):
    monkeypatch.setattr(processor.Path, "read_text", lambda *_, **__: described)
    assert processor.is_intels.__wrapped__() == intels

    def nowhere(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(processor.Path, "read_text", nowhere)
    monkeypatch.setattr(processor.platform, "processor", lambda: f"Family 6 Model 167, {described}")
    assert processor.is_intels.__wrapped__() == intels
