"""Stop strings: where an answer ends that is told to stop at certain text.

What counts: the answer's tokens run up to and including the one that completes the first stop string to be completed.
That token was sampled and so belongs to the objective, as an end-of-sequence token does; the tokens after it never
happened. The answer's text ends before the stop string, wherever in that last token it began.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Decode = Callable[[list[int]], str]


def cut_text(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the earliest stop string, and whether there was one."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def tokens_until_stop(tokens: Sequence[int], decode: Decode, stops: Sequence[str]) -> int | None:
    """How many tokens there are up to and including the one that completes a stop string; None: none does.

    Args:
        decode: ids to text; the text of a beginning must be a beginning of the text, but for a last character that is
            still incomplete, as it is with byte-level and sentence-piece tokenizers.

    Found by bisection, so a row of T tokens is decoded about log2 T times.
    """
    ids = list(tokens)

    def stopped(count: int) -> bool:
        return cut_text(decode(ids[:count]), stops)[1]

    if not stops or not stopped(len(ids)):
        return None
    low, high = 0, len(ids)  # not stopped after low tokens, stopped after high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if stopped(middle) else (middle, high)
    return high


def stop_rows(tokens: Tensor, mask: Tensor, decode: Decode, stops: Sequence[str]) -> tuple[Tensor, Tensor, list[str]]:
    """Cut sampled rows at their stop strings.

    Args:
        tokens: (R, T) int64; mask: (R, T) bool, True where there is a token, from the left.

    Returns:
        the new mask (R, T); (R,) True where a stop string ended the row, which so counts as finished; the R texts.
    """
    check_stops(stops)
    kept, stopped, texts = mask.clone(), [], []
    for row in range(len(tokens)):
        ids = tokens[row, mask[row]].tolist()
        count = tokens_until_stop(ids, decode, stops)
        stopped.append(count is not None)
        if count is not None:
            kept[row, count:] = False
            ids = ids[:count]
        texts.append(cut_text(decode(ids), stops)[0])
    return kept, torch.tensor(stopped, dtype=torch.bool, device=mask.device), texts


def check_stops(stops: Sequence[str]) -> None:
    """Refuse an empty stop string, which every text holds at once.

    Raises:
        ValueError: there is one, or a single text in place of a list.
    """
    if isinstance(stops, str) or any(not stop for stop in stops):
        raise ValueError(f"stop strings are {stops!r}; give a list of texts, none of them empty.")
