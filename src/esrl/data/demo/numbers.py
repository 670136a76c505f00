"""Numbers, prices and sums of the built-in task: how they are said in German and written in English.

Every function gives one English text for a German one. Counts, ages, temperatures and sums: words stay words, digits
stay digits (``1.250`` becomes ``1,250``). Years, prices and phone numbers: words become digits.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

Pair = tuple[str, str]
"""German, English."""

T = TypeVar("T")


class Draw:
    """A stream of choices from a text key; uses only what Python promises to keep the same in all versions."""

    def __init__(self, key: str) -> None:
        self._random = random.Random(key)

    def below(self, bound: int) -> int:
        return int(self._random.random() * bound)

    def between(self, low: int, high: int) -> int:
        """Both ends included."""
        return low + self.below(high - low + 1)

    def pick(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability


@dataclass(frozen=True, slots=True)
class Phrase:
    """One choice for a slot, in the forms that templates ask for; the form ``""`` is the plain one.

    ``number`` picks among a template's endings: 0 for "ich", 1 for singular, 2 for plural.
    """

    forms: dict[str, Pair]
    number: int = 1


def phrase(german: str, english: str, **forms: Pair) -> Phrase:
    return Phrase({"": (german, english), **forms})


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_DE_SMALL = words(
    "null ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn siebzehn "
    "achtzehn neunzehn"
)
_DE_TENS = words("zehn zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig")
_EN_SMALL = words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_EN_TENS = words("ten twenty thirty forty fifty sixty seventy eighty ninety")
_EN_ORDINALS = words("zeroth first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth")


def german_number(n: int) -> str:
    """0 to 9999 in words, as said alone ("eins", "hunderteins")."""
    words = _german_joined(n)
    return words + "s" if n % 100 == 1 else words


def _german_joined(n: int) -> str:
    """As said before another word: with "ein" for a final one."""
    if n < 20:
        return _DE_SMALL[n]
    if n < 100:
        tens, ones = divmod(n, 10)
        return (_DE_SMALL[ones] + "und" if ones else "") + _DE_TENS[tens - 1]
    size, name = (100, "hundert") if n < 1000 else (1000, "tausend")
    count, rest = divmod(n, size)
    return (_german_joined(count) if count > 1 else "") + name + (_german_joined(rest) if rest else "")


def english_number(n: int) -> str:
    """0 to 9999 in American words, without "and"."""
    if n < 20:
        return _EN_SMALL[n]
    if n < 100:
        tens, ones = divmod(n, 10)
        return _EN_TENS[tens - 1] + (f"-{_EN_SMALL[ones]}" if ones else "")
    size, name = (100, "hundred") if n < 1000 else (1000, "thousand")
    count, rest = divmod(n, size)
    return f"{english_number(count)} {name}" + (f" {english_number(rest)}" if rest else "")


def german_ordinal(n: int, ending: str) -> str:
    """1 to 99: "erste", "dritten", "einundzwanzigster"."""
    stem = {1: "erst", 3: "dritt", 7: "siebt", 8: "acht"}.get(n)
    return (stem or german_number(n) + ("t" if n < 20 else "st")) + ending


def english_ordinal(n: int) -> str:
    """1 to 12 in words."""
    return _EN_ORDINALS[n]


def german_year(year: int) -> str:
    """A year in words: hundreds from 1100 to 1999, a plain number otherwise."""
    if 1100 <= year < 2000:
        hundreds, rest = divmod(year, 100)
        return german_number(hundreds) + "hundert" + (german_number(rest) if rest else "")
    return german_number(year)


def english_plural(noun: str) -> str:
    """The regular plural."""
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def number_phrase(draw: Draw, low: int, high: int, digits: float = 0.25) -> Phrase:
    """A number of 2 or more with a noun after it; ``digits`` is how often it is in digits."""
    n = draw.between(low, high)
    if n % 100 == 1 and n > 100:
        n += 1  # "hunderteins Kilometer" and "hundertein Kilometer" are both said
    if draw.chance(digits) or n > 9999:
        return phrase(f"{n:,}".replace(",", "."), f"{n:,}")
    return phrase(_german_joined(n), english_number(n))


def price(draw: Draw) -> Phrase:
    """Euros, in digits or words, up to 1999."""
    return _price(draw, draw.pick((draw.between(2, 30), draw.between(2, 99), draw.between(100, 1999))))


def _price(draw: Draw, euros: int) -> Phrase:
    if euros > 100 and euros % 100 == 1:
        euros += 1
    cents = draw.pick((0, 0, 10, 20, 25, 40, 49, 50, 60, 75, 80, 90, 95, 99)) if euros < 100 else 0
    english = f"€{euros:,}" + (f".{cents:02d}" if cents else "")
    if draw.chance(0.4):
        return phrase(f"{euros:,}".replace(",", ".") + (f",{cents:02d}" if cents else "") + " Euro", english)
    return phrase(f"{_german_joined(euros)} Euro" + (f" {german_number(cents)}" if cents else ""), english)


def small_price(draw: Draw) -> Phrase:
    """Below 100 euros."""
    return _price(draw, draw.between(2, 99))


def price_drop(draw: Draw) -> Phrase:
    """The form ``""`` is the old price, ``new`` a lower one."""
    old = draw.between(20, 300)
    return Phrase({"": _price(draw, old).forms[""], "new": _price(draw, draw.between(5, old - 3)).forms[""]})


def phone(draw: Draw) -> Phrase:
    """Digits said one by one, two groups."""
    groups = [[0, 1, *(draw.below(10) for _ in range(2))], [draw.below(10) for _ in range(draw.between(3, 5))]]
    english = " ".join("".join(map(str, group)) for group in groups)
    if draw.chance(0.25):
        return phrase(english, english)
    return phrase(", ".join(" ".join(german_number(digit) for digit in group) for group in groups), english)


def temperature(draw: Draw) -> Phrase:
    """From minus 15 to 38 degrees, never 1."""
    degrees = draw.between(-15, 38)
    degrees = 2 if abs(degrees) == 1 else degrees
    sign = ("minus ", "minus ") if degrees < 0 else ("", "")
    if draw.chance(0.25):
        return phrase(f"{sign[0]}{abs(degrees)} Grad", f"{sign[1]}{abs(degrees)} degrees")
    return phrase(f"{sign[0]}{german_number(abs(degrees))} Grad", f"{sign[1]}{english_number(abs(degrees))} degrees")


def arithmetic(draw: Draw) -> Phrase:
    """A true sum, difference or product in words."""
    a, b = draw.between(2, 60), draw.between(2, 39)
    if draw.chance(0.33):
        a, b = draw.between(2, 20), draw.between(2, 12)
        words, result = ("mal", "times"), a * b
    elif draw.chance(0.5):
        words, result = ("plus", "plus"), a + b
    else:
        a += b
        words, result = ("minus", "minus"), a - b
    return phrase(
        f"{german_number(a)} {words[0]} {german_number(b)} ist {german_number(result)}",
        f"{english_number(a)} {words[1]} {english_number(b)} is {english_number(result)}",
    )


def fraction(draw: Draw) -> Phrase:
    """ "dreizehn von siebenundzwanzig", the first the smaller."""
    whole = draw.between(12, 99)
    part = draw.between(2, whole - 1)
    return phrase(
        f"{german_number(part)} von {german_number(whole)}", f"{english_number(part)} of {english_number(whole)}"
    )
