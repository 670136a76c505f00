"""The sentences of the built-in task: templates, and the slots in them.

A slot is ``{kind}`` or ``{kind2}`` for a second one, always with another choice than the first; ``{kind.form}`` asks
for a form, and ``{kind|a|b|c}`` writes a, b or c for "ich", a singular or a plural. German and English name the same
slots, so a sentence and its translation cannot drift apart; both get a capital letter.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from esrl.data.demo.numbers import (
    Draw,
    Pair,
    Phrase,
    arithmetic,
    english_ordinal,
    fraction,
    german_number,
    german_ordinal,
    number_phrase,
    phone,
    phrase,
    price,
    price_drop,
    small_price,
    temperature,
)
from esrl.data.demo.people import PEOPLE, SUBJECTS, doing
from esrl.data.demo.things import CITIES, PLACES, count, noun_forms, quantity, thing
from esrl.data.demo.times import WEEKDAYS, clock, date, duration, future, habit, hours, opening_days, past, year

TEMPLATES: tuple[Pair, ...] = (
    # Trains and trips
    (
        "Der Zug nach {city} fährt {at} von Gleis {label} ab.",
        "The train to {city} leaves from platform {label} {at}.",
    ),
    ("{at} fährt der nächste Bus nach {city} ab.", "The next bus to {city} leaves {at}."),
    (
        "{who} {who|bin|ist|sind} in Eile, weil der Zug nach {city} {at} abfährt.",
        "{who} {who|am|is|are} in a hurry because the train to {city} leaves {at}.",
    ),
    (
        "Der Flug aus {city} landet {at}, wenn er pünktlich ist.",
        "The flight from {city} lands {at} if it is on time.",
    ),
    ("Die Fahrt von {city} nach {city2} dauert {span}.", "The trip from {city} to {city2} takes {span}."),
    (
        "Der Zug aus {city} hat heute {minutes} Minuten Verspätung.",
        "The train from {city} is {minutes} minutes late today.",
    ),
    (
        "{who} {who|bin|ist|sind} {past} mit dem Zug von {city} nach {city2} gefahren.",
        "{who} took the train from {city} to {city2} {past}.",
    ),
    ("Von {city} nach {city2} sind es {big} Kilometer.", "It is {big} kilometers from {city} to {city2}."),
    ("{who} {who|komme|kommt|kommen} {future} in {city} an.", "{who} will arrive in {city} {future}."),
    (
        "{future} {who|fahre|fährt|fahren} {who} für {days} Tage nach {city}.",
        "{who} will go to {city} for {days} days {future}.",
    ),
    (
        "Wegen des Regens ist der Zug von {city} nach {city2} erst {at} angekommen.",
        "Because of the rain, the train from {city} to {city2} did not arrive until {at.bare}.",
    ),
    (
        "Der Bus nach {city} fährt alle {minutes} Minuten, das letzte Mal {at}.",
        "The bus to {city} runs every {minutes} minutes, the last time {at}.",
    ),
    # Dates and years
    (
        "{who} {who|wurde|wurde|wurden} {date.full} in {city} geboren.",
        "{who} {who|was|was|were} born in {city} {date.full}.",
    ),
    ("{one} hat {date} Geburtstag.", "{one.von} birthday is {date}."),
    ("{who} {who|werde|wird|werden} {date} {age} Jahre alt.", "{who} will turn {age} {date}."),
    (
        "Der Vertrag läuft vom {date.bare} bis zum {date2.bare}.",
        "The contract runs from {date.bare} to {date2.bare}.",
    ),
    ("{place.der} wurde {year.in} gebaut.", "{place.der} was built {year.in}."),
    (
        "Seit {year} ist {place.der} geschlossen, weil es kein Geld gibt.",
        "{place.der} has been closed since {year} because there is no money.",
    ),
    (
        "Die Sitzung wurde vom {date.bare} auf den {date2.bare} verschoben.",
        "The meeting was moved from {date.bare} to {date2.bare}.",
    ),
    (
        "Die Prüfung findet am {weekday}, dem {date.bare}, {at} statt.",
        "The exam takes place on {weekday}, {date.bare}, {at}.",
    ),
    (
        "{who} {who|wohne|wohnt|wohnen} seit {year.month} in {city}.",
        "{who} {who|have|has|have} lived in {city} since {year.month}.",
    ),
    ("Heute ist {weekday}, {date.der}.", "Today is {weekday}, {date.der}."),
    (
        "Als {who} {age} Jahre alt {who|war|war|waren}, {who|zog|zog|zogen} {who.pron} nach {city}.",
        "When {who} {who|was|was|were} {age} years old, {who.pron} moved to {city}.",
    ),
    # Appointments and calls
    (
        "{who} {who|habe|hat|haben} {future} einen Termin beim Zahnarzt.",
        "{who} {who|have|has|have} a dentist appointment {future}.",
    ),
    ("Können wir uns {future} vor {place.dem} treffen?", "Can we meet in front of {place.dem} {future}?"),
    ("{who} {who|treffe|trifft|treffen} {future} {person.acc}.", "{who} will meet {person} {future}."),
    ("Ich rufe {person.acc} {future} an.", "I will call {person} {future}."),
    ("Bitte rufen Sie {person.acc} unter der Nummer {phone} an.", "Please call {person} at {phone}."),
    ("Die Nummer {person.von} ist {phone}.", "{person.von} number is {phone}."),
    (
        "Wenn {who} {future} Zeit {who|habe|hat|haben}, {who|besuche|besucht|besuchen} {who.pron} {person.acc}.",
        "If {who} {who|have|has|have} time {future}, {who.pron} will visit {person}.",
    ),
    (
        "Der Termin {future} muss leider ausfallen, weil {person} krank {person||ist|sind}.",
        "Unfortunately, the appointment {future} has to be canceled because {person} {person||is|are} ill.",
    ),
    # Opening hours
    ("{place.der} ist {opening} {hours} geöffnet.", "{place.der} is open {opening} {hours}."),
    ("{weekdays} schließt {place.der} {at}.", "{weekdays}, {place.der} closes {at}."),
    (
        "Weil heute {weekday} ist, hat {place.der} nur bis {at.bare} geöffnet.",
        "Because today is {weekday}, {place.der} is open only until {at.bare}.",
    ),
    (
        "Wissen Sie, ob {place.der} {opening} {at} öffnet?",
        "Do you know whether {place.der} opens {at} {opening}?",
    ),
    # Shopping and prices
    ("{thing.der} kostet {price}.", "{thing.der} costs {price}."),
    (
        "{who} {who|habe|hat|haben} {past} {thing.einen} für {price} gekauft.",
        "{who} bought {thing.einen} for {price} {past}.",
    ),
    (
        "{thing.der} kostet {price}, und trotzdem {who|möchte|möchte|möchten} {who} {thing.ihn} kaufen.",
        "{thing.der} costs {price}, and still {who} {who|want|wants|want} to buy it.",
    ),
    ("Ich hätte gern {quantity} und {quantity2}, bitte.", "I would like {quantity} and {quantity2}, please."),
    ("Für {quantity} bezahlt man in {city} {cheap}.", "In {city}, you pay {cheap} for {quantity}."),
    (
        "{who} {who|brauche|braucht|brauchen} {quantity} für das Rezept.",
        "{who} {who|need|needs|need} {quantity} for the recipe.",
    ),
    (
        "Statt {drop} kostet {thing.der} jetzt nur noch {drop.new}.",
        "Instead of {drop}, {thing.der} now costs only {drop.new}.",
    ),
    (
        "{who} {who|habe|hat|haben} {person.dat} {past} {thing.einen} geschenkt.",
        "{who} gave {person} {thing.einen} {past}.",
    ),
    ("In der Kiste liegen {count} und {count2}.", "There are {count} and {count2} in the box."),
    ("{who} {who|habe|hat|haben} {count} für {price} bestellt.", "{who} ordered {count} for {price}."),
    (
        "Wenn {thing.der} weniger als {price} kostet, {who|kaufe|kauft|kaufen} {who} {thing.ihn} sofort.",
        "If {thing.der} costs less than {price}, {who} will buy it immediately.",
    ),
    (
        "{thing.der}, {thing.rel} {who} {past} gekauft {who|habe|hat|haben}, ist schon kaputt.",
        "{thing.der} that {who} bought {past} is already broken.",
    ),
    (
        "Mit {thing.einem} für {price} {who|wäre|wäre|wären} {who} zufrieden.",
        "{who} would be happy with {thing.einem} for {price}.",
    ),
    ("Haben Sie {thing.einen} für weniger als {price}?", "Do you have {thing.einen} for less than {price}?"),
    # Weather
    ("{future} werden es in {city} {temperature}.", "It will be {temperature} in {city} {future}."),
    ("{past} waren es in {city} nur {temperature}.", "It was only {temperature} in {city} {past}."),
    (
        "Wenn es {future} regnet, {who|bleibe|bleibt|bleiben} {who} zu Hause.",
        "If it rains {future}, {who} will stay at home.",
    ),
    (
        "Obwohl es nur {temperature} waren, {who|bin|ist|sind} {who} {past} im See geschwommen.",
        "Although it was only {temperature}, {who} swam in the lake {past}.",
    ),
    # What people do: tense from the adverb, verbs in second place, at the end, and in two parts
    ("{doing} {doing.fin} {habit} {doing.rest}.", "{doing} {doing.fin} {doing.obj} {habit}."),
    ("{future} {doing.fin} {doing} {doing.rest}.", "{doing} will {doing.inf} {doing.obj} {future}."),
    ("{doing} {doing.aux} {past} {doing.obj} {doing.part}.", "{doing} {doing.past} {doing.obj} {past}."),
    (
        "{person} {person||sagt|sagen}, dass {doing} {future} {doing.obj} {doing.final}.",
        "{person} {person||says|say} that {doing} will {doing.inf} {doing.obj} {future}.",
    ),
    (
        "Weil {doing} {past} {doing.obj} {doing.part} {doing.aux}, {doing|bin|ist|sind} {doing.pron} heute müde.",
        "Because {doing} {doing.past} {doing.obj} {past}, {doing.pron} {doing|am|is|are} tired today.",
    ),
    (
        "{doing} {doing|muss|muss|müssen} {future} {doing.obj} {doing.inf}.",
        "{doing} {doing|have|has|have} to {doing.inf} {doing.obj} {future}.",
    ),
    (
        "{doing} {doing|stehe|steht|stehen} {at} auf, um {doing.obj} {doing.zu}.",
        "{doing} {doing|get|gets|get} up {at} to {doing.inf} {doing.obj}.",
    ),
    (
        "{doing|werde|wird|werden} {doing} {future} {doing.obj} {doing.inf}?",
        "Will {doing} {doing.inf} {doing.obj} {future}?",
    ),
    (
        "Bevor {doing} {doing.obj} {doing.final}, {doing|schlafe|schläft|schlafen} {doing.pron} {span}.",
        "Before {doing} {doing.fin} {doing.obj}, {doing.pron} {doing|sleep|sleeps|sleep} for {span}.",
    ),
    (
        "Nachdem {doing} {doing.obj} {doing.part} {doing.had}, {doing|ging|ging|gingen} {doing.pron} {at} ins Bett.",
        "After {doing} had {doing.part} {doing.obj}, {doing.pron} went to bed {at}.",
    ),
    (
        "Seit {span.dat} {who|warte|wartet|warten} {who} auf {person.acc}.",
        "{who} {who|have|has|have} been waiting for {person} for {span.dat}.",
    ),
    (
        "{doing} {doing|habe|hat|haben} {past} vergessen, {doing.obj} {doing.zu}.",
        "{doing} forgot to {doing.inf} {doing.obj} {past}.",
    ),
    ("{doing.aux} {doing} {doing.obj} schon {doing.part}?", "{doing.aux} {doing} already {doing.part} {doing.obj}?"),
    (
        "Ich glaube nicht, dass {doing} vor {at.bare} {doing.obj} {doing.final}.",
        "I do not think that {doing} will {doing.inf} {doing.obj} before {at.bare}.",
    ),
    (
        "{person} {person||hat|haben} {person2.acc} gebeten, {future} {doing.obj} {doing.zu}.",
        "{person} asked {person2} to {doing.inf} {doing.obj} {future}.",
    ),
    # Numbers
    ("{fraction} Schülern haben die Prüfung bestanden.", "{fraction} students passed the exam."),
    ("{arithmetic}.", "{arithmetic}."),
    (
        "{year.in} kamen {minutes} Prozent der Besucher aus {city}.",
        "{year.in}, {minutes} percent of the visitors came from {city}.",
    ),
    (
        "Das Zimmer im {floor} Stock kostet {price} pro Nacht.",
        "The room on the {floor} floor costs {price} per night.",
    ),
    ("Das Dorf hat {big} Einwohner und {place.einen}.", "The village has {big} inhabitants and {place.einen}."),
    (
        "Der Kuchen muss {minutes} Minuten bei {heat} Grad backen.",
        "The cake has to bake for {minutes} minutes at {heat} degrees.",
    ),
    (
        "{who} {who|bin|ist|sind} {age} Jahre alt und {who|wohne|wohnt|wohnen} in der Goethestraße {label}.",
        "{who} {who|am|is|are} {age} years old and {who|live|lives|live} at Goethestraße {label}.",
    ),
    (
        "Das Paket wiegt {minutes} Kilo, und der Versand kostet {cheap}.",
        "The package weighs {minutes} kilos, and shipping costs {cheap}.",
    ),
    ("Der Film beginnt {at} und dauert {span}.", "The movie starts {at} and lasts {span}."),
)


def _label(draw: Draw) -> Phrase:
    """A number that names something, such as a platform: always digits in English."""
    n = draw.between(2, 40)
    return phrase(str(n) if draw.chance(0.25) else german_number(n), str(n))


def _floor(draw: Draw) -> Phrase:
    n = draw.between(1, 12)
    return phrase(german_ordinal(n, "en"), english_ordinal(n))


def _weekdays(draw: Draw) -> Phrase:
    german, english = draw.pick(WEEKDAYS)
    return phrase(f"{german.lower()}s", f"on {english}s")


SLOTS: dict[str, Callable[[Draw], Phrase]] = {
    "age": lambda draw: number_phrase(draw, 16, 99),
    "arithmetic": arithmetic,
    "at": clock,
    "big": lambda draw: number_phrase(draw, 102, draw.pick((999, 999, 9999))),
    "cheap": small_price,
    "city": lambda draw: phrase(*draw.pick(CITIES)),
    "count": count,
    "date": date,
    "days": lambda draw: number_phrase(draw, 2, 30),
    "doing": doing,
    "drop": price_drop,
    "floor": _floor,
    "fraction": fraction,
    "future": future,
    "habit": habit,
    "heat": lambda draw: number_phrase(draw, 150, 240),
    "hours": hours,
    "label": _label,
    "minutes": lambda draw: number_phrase(draw, 2, 99),
    "one": lambda draw: draw.pick([person for person in PEOPLE if person.number == 1]),
    "opening": opening_days,
    "past": past,
    "person": lambda draw: draw.pick(PEOPLE),
    "phone": phone,
    "place": lambda draw: Phrase(noun_forms(draw.pick(PLACES), None)),
    "price": price,
    "quantity": quantity,
    "span": duration,
    "temperature": temperature,
    "thing": thing,
    "weekday": lambda draw: phrase(*draw.pick(WEEKDAYS)),
    "weekdays": _weekdays,
    "who": lambda draw: draw.pick(SUBJECTS),
    "year": year,
}


@dataclass(frozen=True, slots=True)
class _Slot:
    name: str
    form: str
    endings: tuple[str, ...]

    def fill(self, choice: Phrase, side: int) -> str:
        return self.endings[choice.number] if self.endings else choice.forms[self.form][side]


_SLOT = re.compile(r"\{(\w+)(?:\.(\w+))?((?:\|[^|}]*)*)\}")


def _parse(text: str) -> tuple[str | _Slot, ...]:
    pieces: list[str | _Slot] = []
    end = 0
    for match in _SLOT.finditer(text):
        pieces += [text[end : match.start()], _Slot(match[1], match[2] or "", tuple(match[3].split("|")[1:]))]
        end = match.end()
    return (*pieces, text[end:])


_PARSED = tuple((_parse(german), _parse(english)) for german, english in TEMPLATES)


def sentence(draw: Draw) -> Pair:
    """One sentence and its translation."""
    sides = draw.pick(_PARSED)
    choices: dict[str, Phrase] = {}
    taken: set[str] = set()
    for piece in sides[0]:
        if isinstance(piece, _Slot) and piece.name not in choices:
            make = SLOTS[piece.name.rstrip("2")]
            choice = make(draw)
            while choice.forms[""][1] in taken:  # "Anna meets Anna", "from Rome to Rome"
                choice = make(draw)
            choices[piece.name] = choice
            taken.add(choice.forms[""][1])
    german, english = (
        "".join(p if isinstance(p, str) else p.fill(choices[p.name], side) for p in pieces)
        for side, pieces in enumerate(sides)
    )
    if english.endswith(".."):  # "5:45 p.m." at the end has its full stop already
        english = english[:-1]
    return german[0].upper() + german[1:], english[0].upper() + english[1:]
