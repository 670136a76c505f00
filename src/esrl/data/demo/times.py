"""Clock times, dates, spans and the days around today.

Dates and times of the 24-hour clock become digits ("siebzehn Uhr fünfzehn" is "5:15 p.m."); times of the 12-hour
clock and spans stay words ("halb vier" is "half past three").
"""

from __future__ import annotations

from esrl.data.demo.numbers import (
    Draw,
    Pair,
    Phrase,
    english_number,
    german_number,
    german_ordinal,
    german_year,
    phrase,
    words,
)

WEEKDAYS: tuple[Pair, ...] = tuple(
    zip(
        words("Montag Dienstag Mittwoch Donnerstag Freitag Samstag Sonntag"),
        words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
        strict=True,
    )
)
MONTHS: tuple[Pair, ...] = tuple(
    zip(
        words("Januar Februar März April Mai Juni Juli August September Oktober November Dezember"),
        words("January February March April May June July August September October November December"),
        strict=True,
    )
)
_MONTH_DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


def twelve_hours(hour: int, minute: int) -> str:
    """A 24-hour time in American: 17, 45 is "5:45 p.m."; a full hour has no minutes."""
    half = "a.m." if hour < 12 else "p.m."
    return f"{(hour + 11) % 12 + 1}{f':{minute:02d}' if minute else ''} {half}"


def _spoken_time(draw: Draw) -> Pair:
    """Of the 12-hour clock, as said."""
    hour = draw.between(1, 12)
    after = hour % 12 + 1
    de, de_after = ("ein Uhr" if hour == 1 else f"{german_number(hour)} Uhr"), german_number(after)
    step = draw.pick(("fünf", "zehn", "zwanzig"))
    english_step = {"fünf": "five", "zehn": "ten", "zwanzig": "twenty"}[step]
    en, en_after = english_number(hour), english_number(after)
    de_bare = german_number(hour)
    return draw.pick(
        (
            (de, f"{en} o'clock"),
            (f"halb {de_after}", f"half past {en}"),
            (f"halb {de_after}", f"half past {en}"),
            (f"Viertel nach {de_bare}", f"a quarter past {en}"),
            (f"Viertel vor {de_after}", f"a quarter to {en_after}"),
            (f"{step} nach {de_bare}", f"{english_step} past {en}"),
            (f"{step} vor {de_after}", f"{english_step} to {en_after}"),
            (f"fünf vor halb {de_after}", f"twenty-five past {en}"),
            (f"fünf nach halb {de_after}", f"twenty-five to {en_after}"),
        )
    )


def _written_time(draw: Draw) -> Pair:
    """Of the 24-hour clock, in digits or in words; in words never a full hour below 13, which is spoken time."""
    hour, minute = draw.between(5, 23), draw.pick((0, 5, 10, 12, 15, 20, 24, 30, 35, 40, 45, 48, 50, 55))
    if draw.chance(0.5):
        return (f"{hour}.{minute:02d} Uhr" if minute else f"{hour} Uhr"), twelve_hours(hour, minute)
    if hour <= 12 and not minute:
        hour += 11
    tail = f" {german_number(minute)}" if minute else ""
    return f"{german_number(hour)} Uhr{tail}", twelve_hours(hour, minute)


def clock(draw: Draw) -> Phrase:
    """A time of day: "um halb vier"; the form ``bare`` goes without "um"."""
    de, en = _spoken_time(draw) if draw.chance(0.6) else _written_time(draw)
    return phrase(f"um {de}", f"at {en}", bare=(de, en))


def hours(draw: Draw) -> Phrase:
    """Opening hours."""
    start, end = draw.between(6, 12), draw.between(13, 22)
    if draw.chance(0.6):
        german = f"von {german_number(start)} bis {german_number(end)} Uhr"
        return phrase(german, f"from {twelve_hours(start, 0)} to {twelve_hours(end, 0)}")
    minutes = [draw.pick((0, 0, 15, 30, 45)) for _ in range(2)]
    de = [f"{h}.{m:02d}" if m else f"{h}" for h, m in zip((start, end), minutes, strict=True)]
    german = f"von {de[0]} bis {de[1]} Uhr"
    return phrase(german, f"from {twelve_hours(start, minutes[0])} to {twelve_hours(end, minutes[1])}")


def date(draw: Draw) -> Phrase:
    """A day of a month: "am dritten Oktober"; ``full`` with a year, ``der`` nominative, ``bare`` without "am"."""
    month = draw.below(12)
    day = draw.between(1, _MONTH_DAYS[month])
    german_month, english_month = MONTHS[month]
    english = f"{english_month} {day}"
    in_year = draw.between(1930, 2024)
    if draw.chance(0.25):
        nominative, oblique, german_in_year = f"{day}.", f"{day}.", str(in_year)
    else:
        nominative, oblique, german_in_year = german_ordinal(day, "e"), german_ordinal(day, "en"), german_year(in_year)
    return phrase(
        f"am {oblique} {german_month}",
        f"on {english}",
        der=(f"der {nominative} {german_month}", english),
        full=(f"am {oblique} {german_month} {german_in_year}", f"on {english}, {in_year}"),
        bare=(f"{oblique} {german_month}", english),
    )


def year(draw: Draw) -> Phrase:
    """A year from 1900 to 2025, mostly in words; ``in``: "im Jahr ...", ``month``: with a month."""
    value = draw.between(1900, 2025)
    german = str(value) if draw.chance(0.25) else german_year(value)
    month = draw.pick(MONTHS)
    return phrase(
        german,
        str(value),
        month=(f"{month[0]} {german}", f"{month[1]} {value}"),
        **{"in": (f"im Jahr {german}", f"in {value}")},
    )


def duration(draw: Draw) -> Phrase:
    """A span of time; the form ``dat`` is the dative ("seit einer Stunde")."""
    n = draw.between(2, 12)
    de, en = german_number(n), english_number(n)
    minutes = draw.between(5, 55)
    fixed = (
        ("eine Stunde", "einer Stunde", "an hour"),
        ("eine halbe Stunde", "einer halben Stunde", "half an hour"),
        ("eine Viertelstunde", "einer Viertelstunde", "a quarter of an hour"),
        ("eine Dreiviertelstunde", "einer Dreiviertelstunde", "three quarters of an hour"),
        ("anderthalb Stunden", "anderthalb Stunden", "an hour and a half"),
    )
    if draw.chance(0.25):
        accusative, dative, english = draw.pick(fixed)
        return phrase(accusative, english, dat=(dative, english))
    german, english = draw.pick(
        (
            (f"{de} Stunden", f"{en} hours"),
            (f"{german_number(minutes)} Minuten", f"{english_number(minutes)} minutes"),
            (
                f"{de} Stunden und {german_number(minutes)} Minuten",
                f"{en} hours and {english_number(minutes)} minutes",
            ),
        )
    )
    return phrase(german, english, dat=(german, english))


_SPANS = (("Tagen", "days"), ("Wochen", "weeks"), ("Monaten", "months"))
_DAY_PARTS: tuple[Pair, ...] = (
    ("heute Abend", "this evening"),
    ("heute Nachmittag", "this afternoon"),
    ("morgen früh", "tomorrow morning"),
    ("morgen Abend", "tomorrow evening"),
    ("nächste Woche", "next week"),
    ("nächsten Monat", "next month"),
)
_WEEKDAY_PARTS: tuple[Pair, ...] = (("morgen", "morning"), ("nachmittag", "afternoon"), ("abend", "evening"))


def _weekday_part(draw: Draw) -> Pair:
    """ "am Freitagabend"."""
    (german, english), (german_part, english_part) = draw.pick(WEEKDAYS), draw.pick(_WEEKDAY_PARTS)
    return f"am {german}{german_part}", f"on {english} {english_part}"


def future_day(draw: Draw) -> Pair:
    """A day to come, to which a clock time can be added."""
    german, english = draw.pick(WEEKDAYS)
    return draw.pick(
        (
            ("heute", "today"),
            ("morgen", "tomorrow"),
            ("übermorgen", "the day after tomorrow"),
            (f"am {german}", f"on {english}"),
            (f"am {german}", f"on {english}"),
            (f"nächsten {german}", f"next {english}"),
            date(draw).forms[""],
        )
    )


def future(draw: Draw) -> Phrase:
    """When something will be: a day, a part of one, a day with a clock time, or "in drei Wochen"."""
    kind = draw.below(8)
    if kind < 3:
        return phrase(*future_day(draw))
    if kind < 5:
        day, time = future_day(draw), clock(draw).forms[""]
        return phrase(f"{day[0]} {time[0]}", f"{day[1]} {time[1]}")
    if kind == 5:
        n, (german, english) = draw.between(2, 12), draw.pick(_SPANS)
        return phrase(f"in {german_number(n)} {german}", f"in {english_number(n)} {english}")
    return phrase(*(draw.pick(_DAY_PARTS) if kind == 6 else _weekday_part(draw)))


def past(draw: Draw) -> Phrase:
    """When something was."""
    german, english = draw.pick(WEEKDAYS)
    n, (span, english_span) = draw.between(2, 20), draw.pick((*_SPANS, ("Jahren", "years")))
    return phrase(
        *draw.pick(
            (
                ("gestern", "yesterday"),
                ("vorgestern", "the day before yesterday"),
                ("gestern Abend", "yesterday evening"),
                (f"letzten {german}", f"last {english}"),
                _weekday_part(draw),
                ("letzte Woche", "last week"),
                (f"vor {german_number(n)} {span}", f"{english_number(n)} {english_span} ago"),
                (f"vor {german_number(n)} {span}", f"{english_number(n)} {english_span} ago"),
            )
        )
    )


def habit(draw: Draw) -> Phrase:
    """How often something is done; English puts it last."""
    german, english = draw.pick(WEEKDAYS)
    month = draw.pick(MONTHS)
    part, english_part = draw.pick(_WEEKDAY_PARTS)
    return phrase(
        *draw.pick(
            (
                (f"jeden {german}", f"every {english}"),
                (f"{german.lower()}s", f"on {english}s"),
                (f"jeden {part.capitalize()}", f"every {english_part}"),
                ("jeden Tag", "every day"),
                ("einmal im Monat", "once a month"),
                ("zweimal pro Woche", "twice a week"),
                (f"jedes Jahr im {month[0]}", f"every year in {month[1]}"),
            )
        )
    )


def opening_days(draw: Draw) -> Phrase:
    """The days on which something is open."""
    first = draw.below(5)
    last = draw.between(first + 1, 6)
    single = draw.pick(WEEKDAYS)
    return phrase(
        *draw.pick(
            (
                (
                    f"von {WEEKDAYS[first][0]} bis {WEEKDAYS[last][0]}",
                    f"from {WEEKDAYS[first][1]} to {WEEKDAYS[last][1]}",
                ),
                (f"{single[0].lower()}s", f"on {single[1]}s"),
                ("am Wochenende", "on the weekend"),
                ("jeden Tag", "every day"),
            )
        )
    )
