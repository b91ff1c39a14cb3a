"""Units behind a number. An answer may lack its unit, but two different units are never equal."""

from __future__ import annotations

import re

from thor.equivalence.clean import SCALES
from thor.equivalence.names import FUNCTIONS

# Name, abbreviations, other spellings. Plurals are looked up without their "s".
SPELLINGS = """
    meter metre m; centimeter centimetre cm; millimeter millimetre mm; kilometer kilometre km; inch inche in; foot feet
    ft; yard yd; mile mi; gram gramme g; kilogram kilo kg; milligram mg; pound lb; ounce oz; second sec s; minute min;
    hour hr h; milliliter millilitre ml mL; liter litre L; newton N; joule J; watt W; volt V; ampere amp A; kelvin K;
    hertz Hz; pascal Pa; mole mol; coulomb C; tesla T; dollar usd USD; cent penny pennie; degree deg; day; week; month;
    year yr; percent percentage pct; am a.m; pm p.m; kW; kJ; kPa; kHz; MHz; GHz; nm; eV; keV; MeV; GeV; erg; dB; unit;
    mile/hour mph; kilometer/hour kph kmh kmph; square sq; cubic cu; per
    radian rad; ton; atm; rpm; ppm; man men; kid; boy; cup; bag; box; jar; egg; pie; toy; pen; car; cat; dog; cow; hen
"""
NAMES = {spelling: line.split()[0] for line in SPELLINGS.split(";") for spelling in line.split()}
NOT_BARE = {"mg"}  # rather m times g
NOT_UNITS = {"squared", "cubed", "mod", "plus", "minus", "where", "with", "for", "if", "when", "such", "to", "or"}
NOT_UNITS |= {"and", "not", "but", "more", "less", "fewer", "maybe", "union", "choose", *SCALES}
NOT_UNITS |= {name for name in FUNCTIONS if len(name) > 3}  # not min and sec
NOT_UNITS |= set("january february march april june july august september october november december".split())  # noqa: SIM905

WORD = r"(?:\\text\s*\{[^{}]*\}|[A-Za-z]+(?:\.[a-z]\b)?\.?)"
POWER = r"(?:\s*\^\s*(?:\{\s*-?\d\s*\}|-?\d)|[23](?!\d))?"
UNIT = re.compile(
    rf"\s*(?:\\?%|{WORD}{POWER}(?:(?:\s*(?:/|\\cdot|\*)\s*|\s+|(?=\\)){WORD}{POWER}){{0,4}})"  # limits the time, too
)
TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")


def canonical_unit(text: str) -> str | None:
    r"""Return the same spelling for the same unit, "" for "units", or None if the text is not a unit.

    "km/hr", "kilometers per hour", "\text{km}/\text{h}" are "kilometer/hour". Everything in \text is a unit. Outside,
    a unit consists of known abbreviations and of words with at least four letters, because "2ab" is a product; single
    letters count only in a fraction such as "m/s".
    """
    if text.strip() in ("%", r"\%"):
        return "percent"
    for word in re.findall("[A-Za-z]+", TEXT.sub(" ", text).replace(r"\cdot", " ")):
        if not (
            len(word) > 3 or (_name(word) in NAMES.values() and (len(word) > 1 or "/" in text) and word not in NOT_BARE)
        ):
            return None
    flat = TEXT.sub(r" \1 ", text).replace(r"\cdot", " ").replace("*", " ")
    flat = re.sub(r"[{}]|\.(?!\w)|\s+(?=\^)|(?<=\^)\s+", "", flat)
    flat = re.sub(r"\s*(?:/|\bper\b)\s*", "/", flat)
    flat = re.sub(r"\b(?:square|sq)\s+([A-Za-z]+)", r"\1^2", flat)
    flat = re.sub(r"\b(?:cubic|cu)\s+([A-Za-z]+)", r"\1^3", flat)
    flat = re.sub(r"(?<=[a-z]) squared", "^2", flat)
    flat = re.sub(r"(?<=[a-z]) cubed", "^3", flat)
    flat = re.sub(r"(?<=[A-Za-z])([23])(?!\d)", r"^\1", flat)
    if not NOT_UNITS.isdisjoint(re.findall("[a-z]+", flat.lower())):
        return None
    unit = re.sub(r"[A-Za-z.]+", lambda match: _name(match[0]), " ".join(flat.split()))
    return "" if re.fullmatch(r"unit(\^\d)?", unit) else unit


def _name(word: str) -> str:
    for spelling in (word, word.lower() if len(word) > 2 else word):
        for singular in (spelling, spelling.removesuffix("s")):
            if singular in NAMES:
                return NAMES[singular]
    return word.lower().removesuffix("s") if len(word) > 3 else word
