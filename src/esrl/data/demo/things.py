"""Things, places and amounts, with the endings that gender, case and number ask for."""

from __future__ import annotations

from dataclasses import dataclass

from esrl.data.demo.numbers import (
    Draw,
    Pair,
    Phrase,
    english_number,
    english_plural,
    german_number,
    number_phrase,
    phrase,
)


@dataclass(frozen=True, slots=True)
class Noun:
    """A thing: its gender, singular and plural in both languages."""

    gender: str
    german: str
    german_plural: str
    english: str
    english_plural: str


def _noun(row: str) -> Noun:
    german, english = (side.split(",") for side in row.split("="))
    gender, _, singular = german[0].partition(" ")
    return Noun(gender, singular, german[1], english[0], english[1] if len(english) > 1 else english_plural(english[0]))


def with_article(words: str) -> str:
    """ "a" or "an" before the words; by the letter, which is right for every word in the tables."""
    return ("an " if words[0] in "aeiou" else "a ") + words


_THINGS = """der Koffer,Koffer=suitcase
der Mantel,Mäntel=coat
der Stuhl,Stühle=chair
der Tisch,Tische=table
der Regenschirm,Regenschirme=umbrella
der Rucksack,Rucksäcke=backpack
der Teppich,Teppiche=carpet
der Hut,Hüte=hat
die Lampe,Lampen=lamp
die Tasche,Taschen=bag
die Jacke,Jacken=jacket
die Uhr,Uhren=watch
die Kamera,Kameras=camera
die Gitarre,Gitarren=guitar
die Vase,Vasen=vase
die Decke,Decken=blanket
das Fahrrad,Fahrräder=bicycle
das Hemd,Hemden=shirt
das Kleid,Kleider=dress
das Sofa,Sofas=sofa
das Regal,Regale=shelf,shelves
das Bild,Bilder=picture
das Radio,Radios=radio
das Messer,Messer=knife,knives"""
_COUNTED = """der Apfel,Äpfel=apple
der Teller,Teller=plate
der Löffel,Löffel=spoon
der Brief,Briefe=letter
die Birne,Birnen=pear
die Orange,Orangen=orange
die Tomate,Tomaten=tomato,tomatoes
die Zwiebel,Zwiebeln=onion
die Tasse,Tassen=cup
die Gabel,Gabeln=fork
die Kerze,Kerzen=candle
die Schachtel,Schachteln=box
das Ei,Eier=egg
das Brötchen,Brötchen=roll
das Glas,Gläser=glass
das Heft,Hefte=notebook
das Messer,Messer=knife,knives
das Buch,Bücher=book"""
THINGS = tuple(map(_noun, _THINGS.split("\n")))
COUNTED = tuple(map(_noun, _COUNTED.split("\n")))
ADJECTIVES: tuple[Pair, ...] = (
    ("alt", "old"),
    ("blau", "blue"),
    ("braun", "brown"),
    ("grün", "green"),
    ("groß", "big"),
    ("klein", "small"),
    ("neu", "new"),
    ("rot", "red"),
    ("schwarz", "black"),
    ("schön", "beautiful"),
    ("weiß", "white"),
)

# Article with the noun's gender, and the ending of an adjective after it (weak after "der", mixed after "ein").
_ARTICLES = {
    "der": {"der": ("der", "e"), "die": ("die", "e"), "das": ("das", "e")},
    "den": {"der": ("den", "en"), "die": ("die", "e"), "das": ("das", "e")},
    "dem": {"der": ("dem", "en"), "die": ("der", "en"), "das": ("dem", "en")},
    "ein": {"der": ("ein", "er"), "die": ("eine", "e"), "das": ("ein", "es")},
    "einen": {"der": ("einen", "en"), "die": ("eine", "e"), "das": ("ein", "es")},
    "einem": {"der": ("einem", "en"), "die": ("einer", "en"), "das": ("einem", "en")},
}
_IT = {"der": ("er", "ihn", "den"), "die": ("sie", "sie", "die"), "das": ("es", "es", "das")}


def noun_forms(noun: Noun, adjective: Pair | None) -> dict[str, Pair]:
    """The noun with each article: forms "der", "den", "dem", "ein", "einen", "einem"; "er" and "ihn" for "it",
    "rel" for the relative pronoun in the accusative."""
    english = noun.english if adjective is None else f"{adjective[1]} {noun.english}"
    forms = {}
    for form, by_gender in _ARTICLES.items():
        article, ending = by_gender[noun.gender]
        middle = "" if adjective is None else f"{adjective[0]}{ending} "
        forms[form] = (
            f"{article} {middle}{noun.german}",
            f"the {english}" if form.startswith("d") else with_article(english),
        )
    nominative, accusative, relative = _IT[noun.gender]
    return {"": forms["der"], **forms, "er": (nominative, "it"), "ihn": (accusative, "it"), "rel": (relative, "that")}


def thing(draw: Draw) -> Phrase:
    """Something with a price, with an adjective or without."""
    adjective = draw.pick(ADJECTIVES) if draw.chance(0.6) else None
    return Phrase(noun_forms(draw.pick(THINGS), adjective))


def count(draw: Draw) -> Phrase:
    """Two or more of something: "dreiundzwanzig rote Äpfel" (nominative and accusative)."""
    noun, (german, english) = draw.pick(COUNTED), number_phrase(draw, 2, 99).forms[""]
    adjective = draw.pick(ADJECTIVES[4:6] + ADJECTIVES[7:]) if draw.chance(0.3) else None
    if adjective is not None:
        german, english = f"{german} {adjective[0]}e", f"{english} {adjective[1]}"
    return Phrase({"": (f"{german} {noun.german_plural}", f"{english} {noun.english_plural}")}, 2)


_SOLIDS: tuple[Pair, ...] = (
    ("Mehl", "flour"),
    ("Zucker", "sugar"),
    ("Reis", "rice"),
    ("Käse", "cheese"),
    ("Kartoffeln", "potatoes"),
    ("Tomaten", "tomatoes"),
    ("Kirschen", "cherries"),
    ("Kaffee", "coffee"),
)
_LIQUIDS: tuple[Pair, ...] = (
    ("Milch", "milk"),
    ("Wasser", "water"),
    ("Apfelsaft", "apple juice"),
    ("Orangensaft", "orange juice"),
    ("Olivenöl", "olive oil"),
)
# Article (accusative), singular, plural, English; units of measure have no plural in German.
_SOLID_UNITS = (
    ("ein", "Kilo", "Kilo", "kilo"),
    ("ein", "Pfund", "Pfund", "pound"),
    ("eine", "Tüte", "Tüten", "bag"),
    ("eine", "Packung", "Packungen", "package"),
)
_LIQUID_UNITS = (
    ("einen", "Liter", "Liter", "liter"),
    ("eine", "Flasche", "Flaschen", "bottle"),
    ("eine", "Kiste", "Kisten", "crate"),
)


def quantity(draw: Draw) -> Phrase:
    """So much of something, in the accusative: "anderthalb Liter Milch"."""
    solid = draw.chance(0.6)
    stuff = draw.pick(_SOLIDS if solid else _LIQUIDS)
    if solid and draw.chance(0.25):
        grams = draw.between(2, 19) * 50
        words = draw.chance(0.6)
        de, en = (german_number(grams), english_number(grams)) if words else (str(grams), str(grams))
        return phrase(f"{de} Gramm {stuff[0]}", f"{en} grams of {stuff[1]}")
    article, singular, plural, unit = draw.pick(_SOLID_UNITS if solid else _LIQUID_UNITS)
    n = draw.between(1, 12)
    if n == 1:
        amount = (f"{article} {singular}", f"a {unit}")
    elif singular == plural and n < 5:
        half = {"ein": "ein halbes", "einen": "einen halben"}[article]
        amount = draw.pick(
            ((f"{half} {singular}", f"half a {unit}"), (f"anderthalb {plural}", f"one and a half {unit}s"))
        )
    else:
        amount = (f"{german_number(n)} {plural}", f"{english_number(n)} {unit}s")
    return phrase(f"{amount[0]} {stuff[0]}", f"{amount[1]} of {stuff[1]}")


CITIES: tuple[Pair, ...] = (
    *((name, name) for name in ("Berlin", "Hamburg", "Leipzig", "Dresden", "Stuttgart", "Bremen", "Paris", "London")),
    ("München", "Munich"),
    ("Köln", "Cologne"),
    ("Nürnberg", "Nuremberg"),
    ("Wien", "Vienna"),
    ("Zürich", "Zurich"),
    ("Genf", "Geneva"),
    ("Rom", "Rome"),
    ("Mailand", "Milan"),
    ("Prag", "Prague"),
    ("Warschau", "Warsaw"),
    ("Brüssel", "Brussels"),
    ("Kopenhagen", "Copenhagen"),
)
_PLACES = """der Bahnhof,-=train station
der Supermarkt,-=supermarket
der Zoo,-=zoo
die Bäckerei,-=bakery
die Apotheke,-=pharmacy
die Bibliothek,-=library
die Post,-=post office
die Bank,-=bank
das Museum,-=museum
das Rathaus,-=town hall
das Schwimmbad,-=swimming pool
das Restaurant,-=restaurant
das Kino,-=movie theater"""
PLACES = tuple(map(_noun, _PLACES.split("\n")))
