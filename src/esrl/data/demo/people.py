"""People, and what they do: subjects with their cases and pronouns, clauses with their verbs."""

from __future__ import annotations

from esrl.data.demo.numbers import Draw, Pair, Phrase, english_plural

# Sex or number | nominative | accusative | dative | English. "p" is plural.
_PEOPLE = """
f|Anna|Anna|Anna|Anna
f|Lena|Lena|Lena|Lena
f|Maria|Maria|Maria|Maria
f|Sophie|Sophie|Sophie|Sophie
f|Frau Schmidt|Frau Schmidt|Frau Schmidt|Ms. Schmidt
f|Frau Keller|Frau Keller|Frau Keller|Ms. Keller
f|meine Schwester|meine Schwester|meiner Schwester|my sister
f|meine Mutter|meine Mutter|meiner Mutter|my mother
f|meine Tante|meine Tante|meiner Tante|my aunt
f|unsere Nachbarin|unsere Nachbarin|unserer Nachbarin|our neighbor
f|die Lehrerin|die Lehrerin|der Lehrerin|the teacher
f|die Ärztin|die Ärztin|der Ärztin|the doctor
m|Paul|Paul|Paul|Paul
m|Peter|Peter|Peter|Peter
m|Martin|Martin|Martin|Martin
m|Felix|Felix|Felix|Felix
m|Herr Weber|Herrn Weber|Herrn Weber|Mr. Weber
m|Herr Wagner|Herrn Wagner|Herrn Wagner|Mr. Wagner
m|mein Bruder|meinen Bruder|meinem Bruder|my brother
m|mein Vater|meinen Vater|meinem Vater|my father
m|mein Onkel|meinen Onkel|meinem Onkel|my uncle
m|unser Nachbar|unseren Nachbarn|unserem Nachbarn|our neighbor
m|der Lehrer|den Lehrer|dem Lehrer|the teacher
m|der Arzt|den Arzt|dem Arzt|the doctor
p|meine Eltern|meine Eltern|meinen Eltern|my parents
p|meine Freunde|meine Freunde|meinen Freunden|my friends
p|unsere Gäste|unsere Gäste|unseren Gästen|our guests
p|die Kinder|die Kinder|den Kindern|the children
"""

# Kind | nominative pronoun | stem of the possessive, in both languages.
_PRONOUNS = {
    "m": (("er", "he"), ("sein", "his")),
    "f": (("sie", "she"), ("ihr", "her")),
    "p": (("sie", "they"), ("ihr", "their")),
    "ich": (("ich", "I"), ("mein", "my")),
    "wir": (("wir", "we"), ("unser", "our")),
}
_NUMBER = {"ich": 0, "m": 1, "f": 1, "p": 2, "wir": 2}


def _person(row: str) -> Phrase:
    kind, nominative, accusative, dative, english = row.split("|")
    owner = english + ("'" if english.endswith("s") else "'s")
    return Phrase(
        {
            "": (nominative, english),
            "acc": (accusative, english),
            "dat": (dative, english),
            "von": (f"von {dative}", owner),
            **_pronoun_forms(kind),
        },
        _NUMBER[kind],
    )


def _pronoun_forms(kind: str) -> dict[str, Pair]:
    pronoun, (german, english) = _PRONOUNS[kind]
    endings = {"sein": "", "seine": "e", "seinen": "en", "seinem": "em", "seiner": "er"}
    return {"pron": pronoun, **{name: (german + ending, english) for name, ending in endings.items()}}


PEOPLE: tuple[Phrase, ...] = tuple(map(_person, _PEOPLE.split("\n")[1:-1]))
SUBJECTS: tuple[Phrase, ...] = PEOPLE + tuple(
    Phrase({"": _PRONOUNS[kind][0], **_pronoun_forms(kind)}, _NUMBER[kind]) for kind in ("ich", "wir", "m", "f") * 2
)
"""Who may be the subject of a sentence; "sie" in the plural is left out, since "Sie" is also "you"."""


# Object | separable prefix | infinitive without it | ich | er | participle | auxiliary (haben, sein)
# | English verb | past | participle | object.
_ACTS = """das Auto||waschen|wasche|wäscht|gewaschen|h|wash|washed|washed|the car
das Fenster||putzen|putze|putzt|geputzt|h|clean|cleaned|cleaned|the window
die Küche|auf|räumen|räume|räumt|aufgeräumt|h|tidy up|tidied up|tidied up|the kitchen
den Müll|raus|bringen|bringe|bringt|rausgebracht|h|take out|took out|taken out|the trash
die Blumen||gießen|gieße|gießt|gegossen|h|water|watered|watered|the flowers
einen Brief||schreiben|schreibe|schreibt|geschrieben|h|write|wrote|written|a letter
das Buch||lesen|lese|liest|gelesen|h|read|read|read|the book
das Abendessen||kochen|koche|kocht|gekocht|h|cook|cooked|cooked|dinner
im Supermarkt|ein|kaufen|kaufe|kauft|eingekauft|h|shop|shopped|shopped|at the supermarket
die Tür|ab|schließen|schließe|schließt|abgeschlossen|h|lock|locked|locked|the door
das Licht|aus|machen|mache|macht|ausgemacht|h|turn off|turned off|turned off|the light
die Heizung|ein|schalten|schalte|schaltet|eingeschaltet|h|turn on|turned on|turned on|the heating
das Fahrrad||reparieren|repariere|repariert|repariert|h|repair|repaired|repaired|the bicycle
ins Kino||gehen|gehe|geht|gegangen|s|go|went|gone|to the movies
nach Hause||fahren|fahre|fährt|gefahren|s|drive|drove|driven|home
den Zahnarzt|an|rufen|rufe|ruft|angerufen|h|call|called|called|the dentist
die Rechnung||bezahlen|bezahle|bezahlt|bezahlt|h|pay|paid|paid|the bill
die Großeltern||besuchen|besuche|besucht|besucht|h|visit|visited|visited|the grandparents
Fußball||spielen|spiele|spielt|gespielt|h|play|played|played|soccer
Klavier||üben|übe|übt|geübt|h|practice|practiced|practiced|the piano
an der Sitzung|teil|nehmen|nehme|nimmt|teilgenommen|h|attend|attended|attended|the meeting
das Paket|ab|holen|hole|holt|abgeholt|h|pick up|picked up|picked up|the package
die Wäsche|auf|hängen|hänge|hängt|aufgehängt|h|hang up|hung up|hung up|the laundry
den Hund||füttern|füttere|füttert|gefüttert|h|feed|fed|fed|the dog
das Zimmer||streichen|streiche|streicht|gestrichen|h|paint|painted|painted|the room
einen Film|an|sehen|sehe|sieht|angesehen|h|watch|watched|watched|a movie
im Garten||arbeiten|arbeite|arbeitet|gearbeitet|h|work|worked|worked|in the garden
im See||schwimmen|schwimme|schwimmt|geschwommen|s|swim|swam|swum|in the lake
einen Kuchen||backen|backe|backt|gebacken|h|bake|baked|baked|a cake
das Formular|aus|füllen|fülle|füllt|ausgefüllt|h|fill out|filled out|filled out|the form
die Gäste|ein|laden|lade|lädt|eingeladen|h|invite|invited|invited|the guests
den Schlüssel||suchen|suche|sucht|gesucht|h|look for|looked for|looked for|the key
"""
ACTS: tuple[tuple[str, ...], ...] = tuple(tuple(row.split("|")) for row in _ACTS.split("\n")[:-1])
_AUXILIARIES = {"h": ("habe", "hat", "haben"), "s": ("bin", "ist", "sind")}
_PAST_AUXILIARIES = {"h": ("hatte", "hatte", "hatten"), "s": ("war", "war", "waren")}


def third_person(verb: str) -> str:
    """The regular "-s" form of the first word: "wash" gives "washes", "tidy up" gives "tidies up"."""
    first, space, rest = verb.partition(" ")
    return (first + "es" if first.endswith("o") else english_plural(first)) + space + rest


def doing(draw: Draw) -> Phrase:
    """Somebody does something; the forms are the pieces of the clause, which templates put in order.

    ``""`` the subject, ``pron`` its pronoun, ``fin`` the finite verb in second place and ``rest`` what follows the
    adverbs then (object and prefix), ``obj`` the object, ``final`` the finite verb at the end, ``aux`` (``had``)
    and ``part`` the perfect, ``inf`` and ``zu`` the infinitives. In English, ``fin`` is the present, ``part`` the
    participle, ``past`` the past, ``inf`` the plain verb.
    """
    who = draw.pick(SUBJECTS)
    act = draw.pick(ACTS)
    obj, prefix, infinitive, _, _, participle, auxiliary, verb, past, english_participle, english_obj = act
    finite = (act[3], act[4], infinitive)[who.number]
    present = third_person(verb) if who.number == 1 else verb
    return Phrase(
        {
            **who.forms,
            "fin": (finite, present),
            "rest": (f"{obj} {prefix}".rstrip(), english_obj),
            "obj": (obj, english_obj),
            "final": (prefix + finite, present),
            "aux": (_AUXILIARIES[auxiliary][who.number], "has" if who.number == 1 else "have"),
            "had": (_PAST_AUXILIARIES[auxiliary][who.number], "had"),
            "part": (participle, english_participle),
            "past": (participle, past),
            "inf": (prefix + infinitive, verb),
            "zu": (f"{prefix}zu{infinitive}" if prefix else f"zu {infinitive}", verb),
        },
        who.number,
    )
