"""Where decoding takes place, and where its outputs end."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from esrl.data.demo import make_examples
from esrl.evaluation.decode import DecodingConfig, decode, on_device


@pytest.mark.parametrize(("available", "device"), [(True, "cuda"), (False, "cpu")])
def test_a_policy_goes_where_the_gpu_is(monkeypatch, available, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    seen: list[str] = []
    policy: Any = SimpleNamespace(model=SimpleNamespace(to=seen.append))
    assert on_device(policy) is policy and seen == [device]


@pytest.mark.parametrize("beam_size", [1, 3])
def test_outputs_end_before_their_stop_string(random64, beam_size):
    """The same outputs as without it, up to there; the most frequent letter is the stop string."""
    examples = make_examples(6, 1, "dev")
    whole = decode(random64, examples, DecodingConfig(beam_size=beam_size, max_new_tokens=12))
    stop = Counter("".join(text[1:] for text in whole).replace(" ", "")).most_common(1)[0][0]
    cut = decode(random64, examples, DecodingConfig(beam_size=beam_size, max_new_tokens=12, stop_strings=(stop,)))
    assert cut == [text.partition(stop)[0] for text in whole]
    assert cut != whole and any(cut)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="none of them empty"):
        DecodingConfig(stop_strings=("a", ""))
