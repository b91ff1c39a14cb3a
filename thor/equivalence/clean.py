r"""The first stage of `verify`: rewrite an answer in the one notation that the reader knows.

Models write LaTeX with layout commands, Unicode and Python. Each rule has an example beside it, which
tests/test_verify.py checks.
"""

from __future__ import annotations

import re
import unicodedata

GREEK = """
    alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau upsilon phi chi
    psi omega hbar
""".split()  # noqa: SIM905


def _greek_letters() -> dict[str, str]:
    r"""Map each Greek letter to its LaTeX command. Unicode calls lambda "lamda"."""
    letters = {}
    for code in (*range(0x391, 0x3AA), *range(0x3B1, 0x3CA)):
        _, size, *_, name = unicodedata.name(chr(code), "- - -").replace("LAMDA", "LAMBDA").lower().split()
        letters[chr(code)] = f"\\{name.capitalize() if size == 'capital' else name} "
    return letters


CHARACTERS = str.maketrans(
    dict.fromkeys("\u2010\u2011\u2012\u2013\u2212", "-")
    | dict.fromkeys("·⋅∙•", r"\cdot ")
    | {letter: rf"\mathbb{{{name}}}" for letter, name in zip("ℕℤℚℝℂ", "NZQRC", strict=True)}
    | {"\u2044": "/", "÷": "/", "Å": r"\AA ", "×": r"\times ", "∗": "*"}
    | {"∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∈": r"\in ", "±": r"\pm "}
    | {"∪": r"\cup ", "∅": r"\emptyset ", "′": "'", "\0": " ", "∠": r"\angle ", "ℏ": r"\hbar "}
    | {"√": r"\sqrt ", "∛": r"\sqrt[3] ", "∜": r"\sqrt[4] "}
    | {"⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil "}
    | _greek_letters()
)
SUPERSCRIPTS, SUBSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱˣᵃᵇᵏᵐᵗ", "₀₁₂₃₄₅₆₇₈₉₊₋ₙₓᵢⱼₖₘₐ"
SCALES = {"dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
SCALES |= {f"{name}s": value for name, value in SCALES.items()}
END = r"(?![A-Za-z])"  # of the name of a LaTeX command
QUOTED = r"\\text\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}"
FUNCTION = "(a?(?:sin|cos|tan|cot|sec|csc)h?|arc(?:sin|cos|tan|cot|sec|csc)|ln|log|exp|lcm|gcd|max|min|sgn)"
TH = r"(?:st|nd|rd|th)"
ORDINAL = rf"(?:\^?\s*\\text\{{{TH}\}}|\^\{{\s*\\text\{{{TH}\}}\s*\}}|\^\{{{TH}\}}|{TH}\b)"

RULES: list[tuple[str, str, str, str]] = [  # pattern, replacement, example before, example after
    # layout
    (r"^\s*\*\*([^*]+)\*\*\s*$", r"\1", "**12**", "12"),
    (rf"\\(?:left|right|[bB]igg?[lrm]?|limits|displaystyle|textstyle){END}\.?", "", r"\left(1\right)", "(1)"),
    (r"(?<!\\)\\[()\[\]]", " ", r"\(1\)", "1"),
    (rf"\\[dtc]frac{END}", r"\\frac", r"\dfrac12", r"\frac12"),
    (r"\\(?:[mh]box|operatorname\*?|text[a-z]{2,6}|math(?:rm|bf|it|sf|tt))\s*\{", r"\\text{", r"\mbox{m}", r"\text{m}"),
    (r"\{\s*\\rm\s+([^{}]*)\}", r"\\text{\1}", r"5 {\rm J}", r"5 \text{J}"),
    (r"\\text\s*\{([ied])\}", r" \1 ", r"2+3\text{i}", "2+3 i"),
    (rf"\\text\s*\{{\s*{FUNCTION}\s*\}}", r"\\\1 ", r"\text{asin}(x)", r"\asin (x)"),
    (rf"\\text\s*\{{\s*({'|'.join(SCALES)})\b([^{{}}]*)\}}", r" \1\2 ", r"5\text{ million}", "5 million"),
    # separators: of thousands, and of the items of a list
    (r"(?<=\d)\\text\s*\{\s*,\s*\}(?=\d{3}(?!\d))", "", r"10\text{,}080", "10080"),
    (r"(?<=\d)_(?=\d{3}(?:_\d{3})*$)", "", "10_080", "10080"),
    (
        r"(?<=\d)(?:(?:\\!\s*)?(?:\{,\}|,)\s*\\!\s*|\\!\s*,|\{,\}|\\[,;: !]\s*|~)(?=\d{3}(?!\d))",
        "",
        r"10,\!080",
        "10080",
    ),
    (r"(?<=\d)(?<!\d{4}) (?=\d{3}(?![\d/]))", "", "1 000 000", "1000000"),
    (r"^\{(\d{1,3}(?:,\d{3})+)\}$", r"\1", "{4,250}", "4,250"),
    (r",\s*(?=[)\]])", "", "(5,)", "(5)"),
    (r"([<>][^()|]*\)+)\s*\|\s*(?=\()", r"\1; ", "(x < 2) | (x > 3)", "(x < 2); (x > 3)"),
    (r",?\s*\\text\s*\{\s*,?\s*(?:and|or)\s*\}|,?\s*\b(?:and|or)\b|\\(?:lor|vee)" + END, "; ", "1, 2 or 3", "1, 2;  3"),
    (r"(?<!\\)\\(?:[!,;: ]|q?quad(?![A-Za-z]))|~|(?<!\\)\$", " ", r"5\,x", "5 x"),
    # numbers and symbols
    (r"([A-Za-z])\^(\d|\{[^{}]*\})_(\w|\{[^{}]*\})", r"\1_\3^\2", "x^2_1", "x_1^2"),
    (r"(?<![\w)}\]])\^\{(\d)\}\s*\\sqrt(?!\[)", r"\\sqrt[\1]", r"^{3}\sqrt8", r"\sqrt[3]8"),
    (r"(?<=\d)\s*x\s*(?=10\s*\^)", r" \\times ", "4.5 x 10^3", r"4.5 \times 10^3"),
    (r"(?:\(|\\text\s*\{|\{)\s*([0-9A-Z]*\d[0-9A-Z]*)\s*[)}]\s*_", r"\1_", "(52)_8", "52_8"),
    (r"_\s*(\{)?\s*(?:\(|\\text\s*\{)\s*(\d+|[A-Za-z]+)\s*[)}](?(1)\s*\})", r"_{\2}", r"52_{\text{8}}", "52_{8}"),
    (
        r"\b(\d[0-9A-Z]*)(?:_\{)?\s*(?:\\text\s*\{\s*|\s)(?:\(|in )?base[\s}]+(\d+)[)}]?",
        r"\1_{\2}",
        "52 base 8",
        "52_{8}",
    ),
    (r"(?<=[\d.])\{\s*(\\overline\s*\{[^{}]*\})\s*\}", r"\1", r"0.{\overline{6}}", r"0.\overline{6}"),
    (r"\\dot\{?(\d)\}?(\d*)\\dot\{?(\d)\}?", r"\\overline{\1\2\3}", r"0.\dot12\dot3", r"0.\overline{123}"),
    (rf"(?<=\d){ORDINAL}", "", r"5^{\text{th}}", "5"),
    (rf"\^\s*(?:\\circ{END}|\{{\s*\\circ\s*\}})|\\degree{END}", "°", r"90^{\circ}", "90°"),
    (r"°\s*(?:\\text\s*\{\s*([CF])\s*\}|([CF])\b)", r"\\text{degree \1\2}", "25°C", r"25\text{degree C}"),
    (rf"\^\s*(?:\\prime{END}|\{{\s*\\prime\s*\}})", "'", r"y^{\prime}", "y'"),
    (rf"\\(?:varnothing|emptyset){END}|\bEmptySet\b|^(?:set\(\)|\[\s*\]|\{{\s*\}})$", r"\\{\\}", r"\emptyset", r"\{\}"),
    (rf"\\([NZQRC]){END}", r"\\mathbb{\1}", r"\R", r"\mathbb{R}"),
    (rf"\\[lc]dots{END}", r"\\dots", r"1, 2, \ldots", r"1, 2, \dots"),
    (rf"\\backslash{END}", r"\\setminus", r"A \backslash B", r"A \setminus B"),
    (rf"\\(arc)?tg{END}", r"\\\1tan", r"\tg x", r"\tan x"),
    (rf"\\(arc)?ctg{END}", r"\\\1cot", r"\ctg x", r"\cot x"),
    (rf"\\lbrace{END}", r"\\{", r"\lbrace 1\}", r"\{ 1\}"),
    (rf"\\rbrace{END}", r"\\}", r"\{1\rbrace", r"\{1\}"),
    (r"\\overline(?=\s*\{[A-Za-z])", r"\\bar", r"\overline{x}", r"\bar{x}"),
    (r"\\var(?=epsilon|phi|theta|rho|sigma|pi|kappa)", r"\\", r"\varphi", r"\phi"),
    # Python
    (r"\*\*", "^", "x**2", "x^2"),
    (r"'([A-Za-z]\w*)'\s*:", r"\1:", "{'x': 1}", "{x: 1}"),
    (r"\bDecimal\('([^']*)'\)", r"\1", "Decimal('0.75')", "0.75"),
    (r"(?<=[\[(,\s])'([^'\[\](){}]*)'(?=\s*[,\])])", r"\1", "['A', 'B']", "[A, B]"),
    (r"\b(?:np|numpy|math|cmath|sp|sympy|S)\.(?=[A-Za-z])", "", "np.sqrt(2)", "sqrt(2)"),
    (r"(?<=[)\]])\s*U\s*(?=[(\[])", r" \\cup ", "(0,1) U (2,3)", r"(0,1) \cup (2,3)"),
    # the end of the sentence, but not the dots of 0.333...
    (r"(?<![.,;:\s])\s*[.,;:]\s*$", "", "5.", "5"),
]
COMPILED = [(re.compile(pattern), replacement) for pattern, replacement, *_ in RULES]


def clean(text: str) -> str:
    """Return the text in the notation of the reader, without what only concerns the layout."""
    text = text.encode("utf-8", "replace").decode()
    if not text.isascii():
        text = re.sub(
            "([⁰¹²³⁴-⁹]+)[⁄/]([₀-₉]+)", lambda match: unicodedata.normalize("NFKC", match.expand(r"{\1}/{\2}")), text
        )
        text = re.sub(r"\^([¼½¾⅐-⅞])", r"^{\1}", text)
        text = re.sub(f"[{SUPERSCRIPTS}]+", lambda match: f"^{{{match[0]}}}", text)
        text = re.sub(f"[{SUBSCRIPTS}]+", lambda match: f"_{{{match[0]}}}", text)
        text = re.sub("((?:\\d\u0305)+)", lambda match: rf"\overline{{{match[0]}}}".replace("\u0305", ""), text)
        text = re.sub("(?<=\\d)(?=[¼½¾⅐-⅞])", " ", text).translate(CHARACTERS)
        text = unicodedata.normalize("NFKC", text).translate(CHARACTERS)
    for pattern, replacement in COMPILED:
        text = pattern.sub(replacement, text)
    return text.strip()
