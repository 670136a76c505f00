from __future__ import annotations

import re
from collections import Counter
from itertools import islice

import pytest

from esrl.data.demo import make_examples, part_of
from esrl.data.demo.numbers import (
    Draw,
    _price,
    english_number,
    english_plural,
    german_number,
    german_ordinal,
    german_year,
    number_phrase,
    phone,
)
from esrl.data.demo.people import ACTS, PEOPLE, SUBJECTS, third_person
from esrl.data.demo.sentences import SLOTS, TEMPLATES, sentence
from esrl.data.demo.things import ADJECTIVES, COUNTED, THINGS, noun_forms, with_article
from esrl.data.demo.times import twelve_hours
from esrl.data.examples import content_digest

NUMBERS = {
    0: ("null", "zero"),
    1: ("eins", "one"),
    7: ("sieben", "seven"),
    10: ("zehn", "ten"),
    11: ("elf", "eleven"),
    12: ("zwölf", "twelve"),
    16: ("sechzehn", "sixteen"),
    17: ("siebzehn", "seventeen"),
    20: ("zwanzig", "twenty"),
    21: ("einundzwanzig", "twenty-one"),
    30: ("dreißig", "thirty"),
    37: ("siebenunddreißig", "thirty-seven"),
    66: ("sechsundsechzig", "sixty-six"),
    70: ("siebzig", "seventy"),
    99: ("neunundneunzig", "ninety-nine"),
    100: ("hundert", "one hundred"),
    101: ("hunderteins", "one hundred one"),
    111: ("hundertelf", "one hundred eleven"),
    200: ("zweihundert", "two hundred"),
    611: ("sechshundertelf", "six hundred eleven"),
    999: ("neunhundertneunundneunzig", "nine hundred ninety-nine"),
    1000: ("tausend", "one thousand"),
    1001: ("tausendeins", "one thousand one"),
    2026: ("zweitausendsechsundzwanzig", "two thousand twenty-six"),
    9999: ("neuntausendneunhundertneunundneunzig", "nine thousand nine hundred ninety-nine"),
}
YEARS = {
    1100: "elfhundert",
    1871: "achtzehnhunderteinundsiebzig",
    1901: "neunzehnhunderteins",
    1989: "neunzehnhundertneunundachtzig",
    1999: "neunzehnhundertneunundneunzig",
    2000: "zweitausend",
    2001: "zweitausendeins",
    2026: "zweitausendsechsundzwanzig",
}
ORDINALS = {1: "ersten", 2: "zweiten", 3: "dritten", 7: "siebten", 8: "achten", 16: "sechzehnten", 19: "neunzehnten"}
ORDINALS |= {20: "zwanzigsten", 21: "einundzwanzigsten", 30: "dreißigsten", 31: "einunddreißigsten"}


def german_value(word: str) -> int:
    """The number a German word says, read backwards from the grammar: [X]tausend[Y]hundert[unit und ten | small]."""
    small = {"ein": 1, "eins": 1, "zwei": 2, "drei": 3, "vier": 4, "fünf": 5, "sechs": 6, "sieben": 7, "acht": 8}
    small |= {"neun": 9, "zehn": 10, "elf": 11, "zwölf": 12, "sechzehn": 16, "siebzehn": 17, "": 0, "null": 0}
    small |= {f"{unit}zehn": small[unit] + 10 for unit in ("drei", "vier", "fünf", "acht", "neun")}
    tens = {"zwanzig": 20, "dreißig": 30, "vierzig": 40, "fünfzig": 50}
    tens |= {"sechzig": 60, "siebzig": 70, "achtzig": 80, "neunzig": 90}
    for name, size in (("tausend", 1000), ("hundert", 100)):
        if name in word:
            before, after = word.split(name)
            return (german_value(before) if before else 1) * size + german_value(after)
    for ten, value in tens.items():
        if word.endswith(ten):
            return value + small[word.removesuffix(ten).removesuffix("und")]
    return small[word]


@pytest.mark.parametrize("number", NUMBERS)
def test_number_words(number):
    assert (german_number(number), english_number(number)) == NUMBERS[number]


def test_every_number_word_says_its_number():
    for n in (*range(1000), *range(1000, 10_000, 37)):
        assert german_value(german_number(n)) == n
    assert len({english_number(n) for n in range(10_000)}) == 10_000


def test_years_and_ordinals():
    assert {year: german_year(year) for year in YEARS} == YEARS
    assert {day: german_ordinal(day, "en") for day in ORDINALS} == ORDINALS


def test_times_of_the_day():
    times = {(0, 5): "12:05 a.m.", (9, 0): "9 a.m.", (11, 59): "11:59 a.m.", (12, 0): "12 p.m.", (12, 30): "12:30 p.m."}
    times |= {(13, 0): "1 p.m.", (17, 45): "5:45 p.m.", (23, 5): "11:05 p.m."}
    assert {time: twelve_hours(*time) for time in times} == times


def drawn(make, tries: int = 4000) -> dict[str, str]:
    """German to English for what a slot makes; fails when one German has two translations."""
    draw, found = Draw("test"), {}
    for _ in range(tries):
        german, english = make(draw).forms[""]
        assert found.setdefault(german, english) == english
    return found


SPOKEN = {
    "um ein Uhr": "at one o'clock",
    "um zwölf Uhr": "at twelve o'clock",
    "um halb vier": "at half past three",
    "um halb eins": "at half past twelve",
    "um Viertel nach neun": "at a quarter past nine",
    "um Viertel vor eins": "at a quarter to one",
    "um zehn vor acht": "at ten to eight",
    "um zwanzig nach eins": "at twenty past one",
    "um fünf vor halb drei": "at twenty-five past two",
    "um fünf nach halb drei": "at twenty-five to three",
    "um 17.45 Uhr": "at 5:45 p.m.",
    "um siebzehn Uhr fünfundvierzig": "at 5:45 p.m.",
    "um neun Uhr zwanzig": "at 9:20 a.m.",
    "um achtzehn Uhr": "at 6 p.m.",
}
DATES = {
    "am dritten Oktober": "on October 3",
    "am 3. Oktober": "on October 3",
    "am ersten Mai": "on May 1",
    "am einunddreißigsten Dezember": "on December 31",
}
DAYS = {
    "übermorgen": "the day after tomorrow",
    "morgen früh": "tomorrow morning",
    "nächsten Dienstag": "next Tuesday",
    "am Freitagabend": "on Friday evening",
    "in drei Wochen": "in three weeks",
}
PAST_DAYS = {
    "vorgestern": "the day before yesterday",
    "letzten Sonntag": "last Sunday",
    "vor zwei Jahren": "two years ago",
}
HABITS = {"montags": "on Mondays", "jeden Montag": "every Monday", "jedes Jahr im März": "every year in March"}
AMOUNTS = {
    "ein Kilo Mehl": "a kilo of flour",
    "ein halbes Pfund Käse": "half a pound of cheese",
    "anderthalb Liter Milch": "one and a half liters of milk",
    "einen halben Liter Wasser": "half a liter of water",
    "zwei Flaschen Wasser": "two bottles of water",
    "zweihundertfünfzig Gramm Reis": "two hundred fifty grams of rice",
    "zwölf Tüten Kaffee": "twelve bags of coffee",
}
SPANS = {"eine halbe Stunde": "half an hour", "anderthalb Stunden": "an hour and a half", "zwei Stunden": "two hours"}


GOLDEN = {"at": SPOKEN, "date": DATES, "future": DAYS, "past": PAST_DAYS, "habit": HABITS, "quantity": AMOUNTS}
GOLDEN["span"] = SPANS


@pytest.mark.parametrize("slot", GOLDEN)
def test_pieces_of_grammar_by_hand(slot):
    golden, found = GOLDEN[slot], drawn(SLOTS[slot], 20_000)
    assert {german: found.get(german) for german in golden} == golden


def test_prices_by_hand():
    golden = {
        "3,50 Euro": "€3.50",
        "zwölf Euro neunzig": "€12.90",
        "einundzwanzig Euro": "€21",
        "1.250 Euro": "€1,250",
        "neunundneunzig Euro neunundneunzig": "€99.99",
        "hundert Euro": "€100",
    }
    found: dict[str, str] = {}
    for euros in (3, 12, 21, 99, 100, 1250):
        found |= drawn(lambda draw, euros=euros: _price(draw, euros), 300)
    assert {german: found.get(german) for german in golden} == golden


def test_phone_numbers_say_their_digits():
    names = {german_number(digit): str(digit) for digit in range(10)}
    for german, english in drawn(phone, 300).items():
        said = "".join(names.get(word, word) for word in german.replace(",", "").split())
        assert said == english.replace(" ", "")


def test_counted_numbers_avoid_what_is_said_in_two_ways():
    for german, english in drawn(lambda draw: number_phrase(draw, 102, 999)).items():
        assert not german.endswith("ein")
        assert german.isdecimal() == english.isdecimal()


def test_articles_adjectives_and_pronouns_agree():
    nouns = {noun.german: noun for noun in (*THINGS, *COUNTED)}
    red, old = ("rot", "red"), ("alt", "old")
    suitcase = {
        "": ("der rote Koffer", "the red suitcase"),
        "der": ("der rote Koffer", "the red suitcase"),
        "den": ("den roten Koffer", "the red suitcase"),
        "dem": ("dem roten Koffer", "the red suitcase"),
        "ein": ("ein roter Koffer", "a red suitcase"),
        "einen": ("einen roten Koffer", "a red suitcase"),
        "einem": ("einem roten Koffer", "a red suitcase"),
        "er": ("er", "it"),
        "ihn": ("ihn", "it"),
        "rel": ("den", "that"),
    }
    assert noun_forms(nouns["Koffer"], red) == suitcase
    lamp, dress = noun_forms(nouns["Lampe"], old), noun_forms(nouns["Kleid"], old)
    assert [lamp[form][0] for form in ("der", "den", "dem", "ein", "einen", "einem", "ihn")] == [
        *("die alte Lampe", "die alte Lampe", "der alten Lampe", "eine alte Lampe", "eine alte Lampe"),
        *("einer alten Lampe", "sie"),
    ]
    assert [dress[form][0] for form in ("der", "den", "dem", "ein", "einen", "einem", "ihn")] == [
        *("das alte Kleid", "das alte Kleid", "dem alten Kleid", "ein altes Kleid", "ein altes Kleid"),
        *("einem alten Kleid", "es"),
    ]
    assert lamp["ein"][1] == "an old lamp"
    assert noun_forms(nouns["Regenschirm"], None)["einen"] == ("einen Regenschirm", "an umbrella")
    assert with_article("beautiful umbrella") == "a beautiful umbrella"


def test_english_endings():
    plurals = {
        "box": "boxes",
        "watch": "watches",
        "dress": "dresses",
        "cherry": "cherries",
        "day": "days",
        "cup": "cups",
    }
    assert {noun: english_plural(noun) for noun in plurals} == plurals
    verbs = {"wash": "washes", "tidy up": "tidies up", "go": "goes", "pay": "pays", "take out": "takes out"}
    assert {verb: third_person(verb) for verb in verbs} == verbs


def test_people_agree_in_case_and_number():
    by_name = {person.forms[""][0]: person for person in PEOPLE}
    neighbor = by_name["unser Nachbar"]
    assert [neighbor.forms[form][0] for form in ("acc", "dat", "pron", "seinem")] == [
        *("unseren Nachbarn", "unserem Nachbarn", "er", "seinem")
    ]
    assert neighbor.forms["von"] == ("von unserem Nachbarn", "our neighbor's")
    assert by_name["meine Eltern"].forms["von"] == ("von meinen Eltern", "my parents'")
    assert {
        person.forms[""][0]: person.number for person in SUBJECTS if person.forms[""][0] in ("ich", "wir", "er")
    } == {
        "ich": 0,
        "wir": 2,
        "er": 1,
    }


def test_verb_tables_are_whole():
    for obj, prefix, infinitive, first, third, participle, auxiliary, *english in ACTS:
        assert infinitive.endswith("n") and first.endswith("e") and third.endswith("t"), infinitive
        assert participle.startswith(prefix) and participle.endswith(("t", "en")), participle
        assert auxiliary in "hs" and len(english) == 4 and all(english) and obj


# What the templates make of the pieces; found among the sentences of a fixed seed, checked by hand.
SENTENCES = [
    (r"Der Zug nach \w+ fährt .* von Gleis drei ab\.", r"The train to \w+ leaves from platform 3 at "),
    (r"Wir sind in Eile, weil der Zug .* abfährt\.", r"We are in a hurry because the train to \w+ leaves at"),
    (r"Meine Eltern haben .* die Küche aufgeräumt\.", r"My parents tidied up the kitchen"),
    (r"Er räumt jeden \w+ die Küche auf\.", r"He tidies up the kitchen every \w+\.$"),
    (r"Übermorgen \w+ ich .*\.", r"I will .* the day after tomorrow\.$"),
    (r".* sagt, dass wir .* an der Sitzung teilnehmen\.", r" says that we will attend the meeting"),
    (r".* steht um .* auf, um im Supermarkt einzukaufen\.", r" gets up at .* to shop at the supermarket\.$"),
    (r"Nachdem er nach Hause gefahren war, ging er .* ins Bett\.", r"After he had driven home, he went to bed at"),
    (r"Bevor die Kinder .*, schlafen sie .*\.", r"Before the children .*, they sleep for"),
    (r"Die \w+ Lampe, die .* gekauft hat, ist schon kaputt\.", r"The \w+ lamp that .* bought .* is already broken\.$"),
    (r"Anna hat am .* Geburtstag\.", r"Anna's birthday is on \w+ \d+\.$"),
    (r".* wurde am .* neunzehnhundert\w+ in \w+ geboren\.", r" was born in \w+ on \w+ \d+, 19\d\d\.$"),
]


def test_whole_sentences_of_every_kind():
    draw = Draw("sentences")
    pairs = [sentence(draw) for _ in range(60_000)]
    for german, english in SENTENCES:
        matching = [pair for pair in pairs if re.fullmatch(german, pair[0])]
        assert matching, german
        for pair in matching:
            assert re.search(english, pair[1]), pair


def test_sentences_are_well_formed_and_have_one_translation():
    draw, translations = Draw("raw"), {}
    singular = {noun.english for noun in COUNTED}
    plural = {noun.english_plural for noun in COUNTED}
    adjectives = {english for _, english in ADJECTIVES}
    for german, english in (sentence(draw) for _ in range(60_000)):
        assert translations.setdefault(german, english) == english
        for text in (german, english):
            assert text[0].isupper() or text[0].isdecimal(), text
            assert text.endswith((".", "?")) and ".." not in text and "  " not in text and "{" not in text, text
        for article, word in re.findall(r"\b([Aa]n?) ([a-z]+)", english):
            assert (article.lower() == "an") == (word[0] in "aeiou" or word == "hour"), english
        counted = re.search(r"^There are (\S+) (.*) and (\S+) (.*) in the box\.$", english)
        for words in (counted[2], counted[4]) if counted else ():
            *before, noun = words.split()
            assert noun in plural and noun not in singular and set(before) <= adjectives, english
        assert not re.search(r"\b(I|[Ww]e|they|[Tt]he children|[Mm]y parents) (has|is|goes|wants|needs)\b", english)
        assert not re.search(r"\b([Ww]e|they|[Tt]he children|[Mm]y parents) (am|was)\b", english)
        if not english.startswith(("Will ", "Has ", "Have ")):  # "Will Anna go": an infinitive
            assert not re.search(r"\b([Ss]?[Hh]e|Anna|Paul|[Mm]y brother) (am|have|are|were|go|want|need)\b", english)


def test_there_are_many_templates_and_both_sides_name_the_same_slots():
    assert len(TEMPLATES) >= 40
    used = set()
    for german, english in TEMPLATES:
        names = set(re.findall(r"\{(\w+)", german))
        assert set(re.findall(r"\{(\w+)", english)) <= names
        endings = re.findall(r"\{\w+((?:\|[^|}]*)+)\}", german + english)
        assert all(choices.count("|") == 3 for choices in endings)  # for "ich", a singular and a plural
        used |= {name.rstrip("2") for name in names}
    assert used == set(SLOTS)


def test_parts_are_disjoint_whatever_the_seed():
    texts = {
        part: {e.source for seed in (1, 2) for e in make_examples(600, seed, part)} for part in ("train", "dev", "test")
    }
    for part, sources in texts.items():
        assert {part_of(source) for source in sources} == {part}
    assert not texts["train"] & texts["dev"] and not texts["dev"] & texts["test"] and not texts["train"] & texts["test"]


def test_parts_have_their_shares():
    # 20,000 draws at 0.90: standard deviation sqrt(.9 * .1 / 20,000) = 0.0021; at 0.05: 0.0015. Five of them allowed.
    draw = Draw("shares")
    shares = Counter(part_of(sentence(draw)[0]) for _ in range(20_000))
    assert abs(shares["train"] / 20_000 - 0.90) < 0.0106
    assert abs(shares["dev"] / 20_000 - 0.05) < 0.0077


def test_the_same_seed_makes_the_same_examples_and_another_one_others():
    first = make_examples(300, 7, "train")
    assert make_examples(300, 7, "train") == first
    assert make_examples(100, 7, "train") == first[:100]
    shared = {e.source for e in first} & {e.source for e in make_examples(300, 8, "train")}
    assert len(shared) < 60


def test_the_stream_is_the_same_on_every_machine():
    # Frozen: a change here changes what every seed of the demo means, and belongs in the changelog.
    examples = make_examples(1000, 1, "dev")
    text = "\n".join(f"{e.source}\t{e.reference}" for e in examples)
    assert content_digest({"text": text}) == "8c0ccd551d94bf9422db"


def test_a_hundred_thousand_different_examples_of_a_sensible_length():
    examples = make_examples(100_000, 1, "train")
    assert len({e.source for e in examples}) == len({e.id for e in examples}) == 100_000
    lengths = [len(e.source.split()) for e in examples]
    assert 8 <= sum(lengths) / len(lengths) <= 14
    assert max(lengths) <= 30
    numbers = [e for e in islice(examples, 10_000) if re.search("hundert|zehn|zwanzig|dreißig|[ftbn]zig", e.source)]
    assert len(numbers) > 4000  # number words are what there is to learn


def test_make_examples_refuses():
    with pytest.raises(ValueError, match="count is -1"):
        make_examples(-1, 1, "train")
    with pytest.raises(ValueError, match="part is 'valid'"):
        make_examples(1, 1, "valid")  # type: ignore[arg-type]


def test_asking_for_more_than_there_is_ends(monkeypatch):
    monkeypatch.setattr("esrl.data.demo.sentence", lambda draw: (str(draw.below(50)), "x"))
    with pytest.raises(ValueError, match="different train sentences found for count 60; ask for fewer"):
        make_examples(60, 1, "train")
