"""Units behind a number. An answer may lack its unit, but two different units are never equal."""

from __future__ import annotations

import re

from thor.equivalence.clean import END, QUOTED, SCALES
from thor.equivalence.names import FUNCTIONS

# Name, abbreviations, other spellings. Plurals are looked up without their "s".
SPELLINGS = """
    meter metre m; centimeter centimetre cm; millimeter millimetre mm; kilometer kilometre km; inch inche in; foot feet
    ft; yard yd; mile mi; gram gramme g; kilogram kilo kg; milligram mg; pound lb; ounce oz; second sec s; minute min;
    hour hr h; milliliter millilitre ml mL; liter litre L; newton N; joule J; watt W; volt V; ampere amp A; kelvin K;
    hertz Hz; pascal Pa; mole mol; coulomb C; tesla T; dollar usd USD; cent penny pennie; degree deg; day; week; month;
    year yr; percent percentage pct; am a.m; pm p.m; kW; kJ; kPa; kHz; MHz; GHz; nm; eV; keV; MeV; GeV; erg; dB; unit;
    mile/hour mph; kilometer/hour kph kmh kmph; square sq; cubic cu; per
    angstrom; AU au; parsec pc; farad F; henry H; molar M; ohm;
    radian rad; ton; atm; rpm; ppm; man men; kid; boy; cup; bag; box; jar; egg; pie; toy; pen; car; cat; dog; cow; hen
"""
NAMES = {spelling: line.split()[0] for line in SPELLINGS.split(";") for spelling in line.split()}
NOT_BARE = {"mg", "pc"}  # rather m times g
NOT_UNITS = {"squared", "cubed", "mod", "plus", "minus", "where", "with", "for", "if", "when", "such", "to", "or"}
NOT_UNITS |= {"and", "not", "but", "more", "less", "fewer", "maybe", "union", "choose", *SCALES}
NOT_UNITS |= {f"{name}s" for name in ("quadrillion", "lakh", "crore", "third", "fourth", "fifth", "sixth", "tenth")}
NOT_UNITS |= {"quadrillion", "lakh", "crore", "half", "halves", "repeating", "recurring", "reciprocal", "inverse"}
NOT_UNITS |= {name for name in FUNCTIONS if len(name) > 3}  # not min and sec
NOT_UNITS |= set("january february march april june july august september october november december".split())  # noqa: SIM905

SYMBOLS = [  # LaTeX in units, as letters
    (rf"(?<=[LMR])_(?:\\odot{END}|\{{\s*\\odot\s*\}})", "sun"), (rf"\\mu{END}\s*(?=[A-Za-z])", "micro"),
    (rf"\\Omega{END}", "ohm"), (rf"\\AA{END}", "angstrom"), (r"\\frac\s*\{(.*)\}\s*\{(.*)\}", r"\1/\2"),
]  # fmt: skip
SUN, MICRO, OHM, ANGSTROM = (pattern for pattern, _ in SYMBOLS[:4])
WORD = rf"(?:(?:\\mu\s*)?{QUOTED}|[LMR]{SUN}|{OHM}|{ANGSTROM}|(?:{MICRO})?[A-Za-z]+(?:\.[a-z]\b)?\.?)"
POWER = r"(?:\s*\^\s*(?:\{\s*-?\d\s*\}|-?\d)|[23](?!\d))?"
PRODUCT = rf"{WORD}{POWER}(?:(?:\s*(?:/|\\cdot|\*)\s*|\s+|(?=\\)){WORD}{POWER}){{0,4}}"  # limits the time, too
UNIT = re.compile(rf"\s*(?:\\?%|\\frac\s*\{{{PRODUCT}\}}\s*\{{{PRODUCT}\}}|{PRODUCT})")
TEXT = re.compile(QUOTED)


def canonical_unit(text: str, single_letters: bool = False) -> str | None:
    r"""Return the same spelling for the same unit, "" for "units", or None if the text is not a unit.

    "km/hr", "kilometers per hour", "\text{km} \text{h}^{-1}" are "kilometer hour^-1". Everything in \text is a unit,
    but for NOT_UNITS. Outside, a unit consists of known abbreviations and of words with at least four letters, because
    "2ab" is a product. With `single_letters`, these and \Omega count, otherwise only letters in a fraction as "m/s".
    """
    if text.strip() in ("%", r"\%"):
        return "percent"
    text = re.sub(r"\\mu\s*\\text\s*\{\s*", r"\\text{micro", text)
    outside = TEXT.sub(" ", text).replace(r"\cdot", " ")
    if "\\" in outside and not single_letters:
        return None
    for pattern, replacement in SYMBOLS:
        outside, text = re.sub(pattern, replacement, outside), re.sub(pattern, replacement, text)
    for word in re.findall("[A-Za-z]+", outside):
        bare = (len(word) > 1 or "/" in text) and word not in NOT_BARE
        if not (len(word) > 3 or (_name(word) in NAMES.values() and (bare or single_letters))):
            return None
    flat = TEXT.sub(r" \1 ", text).replace(r"\cdot", " ").replace("*", " ")
    flat = re.sub(r"[{}]|\.(?!\w)|\s+(?=\^)|(?<=\^)\s+", "", flat)
    flat = re.sub(r"\s*(?:/|\bper\b)\s*", "/", flat)
    flat = re.sub(r"\b(?:square|sq)\s+([A-Za-z]+)", r"\1^2", flat)
    flat = re.sub(r"\b(?:cubic|cu)\s+([A-Za-z]+)", r"\1^3", flat)
    flat = re.sub(r"(?<=[a-z]) squared", "^2", flat)
    flat = re.sub(r"(?<=[a-z]) cubed", "^3", flat)
    flat = re.sub(r"(?<=[A-Za-z])([23])(?!\d)", r"^\1", flat)
    if not NOT_UNITS.isdisjoint(re.findall("[a-z]+", flat.lower())) or re.search(r"(?<![-^])\d", flat):
        return None
    unit = re.sub(r"[A-Za-z.]+", lambda match: _name(match[0]), " ".join(flat.split()))
    return "" if re.fullmatch(r"unit(\^\d)?", unit) else _powers(unit)


def _powers(unit: str) -> str:
    """Write m/s as m s^-1, and s^-1 m as m s^-1."""
    if not re.fullmatch(r"(?:[/ ]?[A-Za-z]+(?:\^-?\d)?)+", unit):
        return unit
    powers: dict[str, int] = {}
    for slash, word, power in re.findall(r"(/?)([A-Za-z]+)(?:\^(-?\d))?", unit):
        powers[word] = powers.get(word, 0) + int(power or 1) * (-1 if slash else 1)
    ordered = sorted(powers.items(), key=lambda item: (item[1] < 0, item[0]))
    return " ".join(word if power == 1 else f"{word}^{power}" for word, power in ordered)


def _name(word: str) -> str:
    for spelling in (word, word.lower() if len(word) > 2 else word):
        for singular in (spelling, spelling.removesuffix("s")):
            if singular in NAMES:
                return NAMES[singular]
    return word.lower().removesuffix("s") if len(word) > 3 else word
