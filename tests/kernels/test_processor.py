"""What processor it is, and whose."""

from __future__ import annotations

import pytest

from esrl.kernels import processor

CPUINFO = """\
processor\t: 0
vendor_id\t: {vendor}
model name\t: One: the first

processor\t: 1
vendor_id\t: {vendor}
model name\t: The other
"""


@pytest.fixture(autouse=True)
def _asked_anew():
    processor.facts.cache_clear()
    yield
    processor.facts.cache_clear()


@pytest.mark.parametrize(("vendor", "intels"), [("GenuineIntel", True), ("AuthenticAMD", False)])
def test_whose_processor_it_is(vendor, intels, monkeypatch):
    monkeypatch.setattr(processor.Path, "read_text", lambda *_, **__: CPUINFO.format(vendor=vendor))
    assert processor.is_intels() == intels
    assert processor.facts()["model name"] == "One: the first"


@pytest.mark.parametrize(("vendor", "intels"), [("GenuineIntel", True), ("AuthenticAMD", False)])
def test_where_linux_says_nothing(vendor, intels, monkeypatch):
    def nowhere(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(processor.Path, "read_text", nowhere)
    monkeypatch.setattr(processor.platform, "processor", lambda: f"Family 6 Model 167, {vendor}")
    assert processor.is_intels() == intels
    assert processor.facts() == {}
