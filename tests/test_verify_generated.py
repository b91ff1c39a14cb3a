r"""Answer equivalence on generated answers: other spellings of an answer are equal to it, altered answers are not.

The answers have the forms of the gold answers of GSM8K, MATH, Minerva and OlympiadBench.
"""

import re

import pytest
import sympy

from thor.verify import verify

GOLDS = r"""
    17 | -23 | 0.045 | 7.25 | 3,\!600 | 84,250 | 6.1e5 | 2.38e-7 | 1e-4 | \frac{7}{12} | -\frac{19}{8}
    \dfrac{3}{50} | \frac 57 | \frac25 | 2\frac{3}{7} | 5\sqrt{17} | \sqrt{37} | -\sqrt{6} | \frac{5\sqrt{2}}{6}
    3 + 4\sqrt{7} | 4 - \sqrt{15} | 5 \sqrt[3]{9} | \frac{-3+\sqrt{13}}{2} | 12\pi | \frac{5\pi}{6} | 25-4\pi
    \frac{400}{\pi} | \pi | e^{3} | \ln 5 | 4 - 9i | 2+\sqrt{5} i | 3^{1012} | \frac{50!}{2^{25}}
    \frac{\log 3}{\log 3-\log 5} | \binom{12}{5} | 431_5 | 2056_{7} | 40^\circ | \$14.50 | 31\% | 17.5%
    8.2 \text{ cents} | 48\mbox{ cm}^2 | \text{(B)} | \text{Olivia} | \text{west} | x^3+4x-9 | 5r^4 | 7k | 3n-8
    (a+4)(b+7) | \frac{13+8a}{21} | \frac{n(n+1)(n+2)}{6} | 2^{n}-n-3 | \frac{1}{3-\omega^{2}}
    \frac{\cos (3 t)}{8} | t^{2} e^{-4 t} | \sqrt{3} \cos (3 t-\pi / 6) | \frac{m v^{2}}{R}
    \lambda_{0} / \sqrt{3} | m n-\lfloor m / 3\rfloor | \lceil n / 4\rceil+2 | C_{1} e^{2t}+C_{2} e^{-t}
    I(0) e^{-\frac{t}{L C}} | x=9 | y = 3x - 8 | 3x - 8y + 12z + 5 = 0 | k=n+7 | f(x)=x-6 | x \in [-3,8]
    k \geqslant 4 | m \frac{d v}{d t}+c v=f | 5,-8 | 4, 6, 9 | $\frac{1}{6}$,$7$ | 2 \pm \sqrt{23}
    \{2\pm\sqrt{3},-7\} | (4,-5) | \left( 5, \frac{\pi}{3} \right) | (2,7,-1) | (1,4,9), (2,3,8) | (3,8]
    (-\infty, 6) | \left[ \frac{3}{4}, 9\right) | (0,4) \cup (4,25) | (-\infty, 3) \cup\{7\}
    \begin{pmatrix} -4 \\ 7/3 \end{pmatrix} | \begin{pmatrix} 2 & 0 \\ 0 & -5 \end{pmatrix}
    $(45^{\circ}, 30^{\circ})$
"""
LATEX = [gold.strip() for gold in re.split(r" \| |\n", GOLDS) if gold.strip()]


def spellings(gold):
    """Other ways to write the same answer."""
    yield gold
    yield f" {gold}. "
    if "$" not in gold:
        yield f"${gold}$"
        yield rf"\({gold}\)"
        yield "= " + gold
    yield gold.replace(r"\frac", r"\dfrac")
    yield gold.replace(r"\dfrac", r"\tfrac")
    yield re.sub(r"\\(left|right)(?![a-z])", "", gold)
    yield re.sub(r"(?<!\\)([-+=])(?!\d*[5-7]?$|4$)", r"\\,\1\\; ", gold) if "e-" not in gold else gold
    yield re.sub(r"(?<![A-Za-z\d])\s+|\s+(?![A-Za-z\d])", "", gold)
    yield re.sub(r"\^\{?\\circ\}?", "°", gold)
    yield re.sub(r"\^\{?\\circ\}?", "", gold)
    yield re.sub(r"\s*\\(text|mbox)\{ [a-z]+\}(\^2)?|\\\$", "", gold)
    yield gold.replace(r"\pi", "π").replace("-", "−").replace(r"\infty", "∞").replace(r"\omega", "ω")
    yield re.sub(r"\\sqrt\{(\d+)\}", r"√\1", gold)
    yield re.sub(r"(\d) ?(\\sqrt|\\pi)", r"\1 \\cdot \2", gold)
    if re.fullmatch(r"-?\d+", gold):
        yield from (
            gold + ".0",
            rf"\frac{{{gold}}}{{1}}",
            gold + " apples",
            rf"\${gold}",
            gold + r"\text{ cm}",
            "x = " + gold,
        )
    if match := re.fullmatch(r"([\d.]+)e(-?\d+)", gold):
        mantissa, exponent = match.groups()
        for form in (
            r"{} \times 10^{{{}}}",
            r"{} \cdot 10^{{{}}} \text{{ J}}",
            "{} * 10**{}",
            "{}*10^{}",
            "{} × 10^{} m",
            r"{}\times10^{{{}}}\,\mathrm{{m/s}}",
        ):
            yield form.format(mantissa, exponent)
        yield repr(float(gold))


def alterations(gold):
    """Answers that differ in a digit, a sign, an entry, a bracket, a unit or a letter."""
    for match in re.finditer(r"\d", gold):
        for step in (1, 9):
            yield gold[: match.start()] + str((int(match[0]) + step) % 10) + gold[match.end() :]
    for match in re.finditer(r"(?<![e{^])[-+]", gold):
        yield gold[: match.start()] + ("+" if match[0] == "-" else "-") + gold[match.end() :]
    if not re.search(r"[=,]|in|geq|[A-Z]{2}|text\{|matrix", gold):
        yield f"-({gold.strip('$')})"
        yield f"{gold} + 1"
    for match in re.finditer(r",(?!\\!|250)", gold):
        entry = re.match(r",[^,()\[\]\\]*", gold[match.start() :])[0]
        yield gold[: match.start()] + entry + gold[match.start() :]
        if entry.strip(", "):
            yield gold[: match.start()] + gold[match.start() + len(entry) :]
    if re.fullmatch(r"(\\left)?[(\[][^()]*,[^()]*[)\]]", gold):
        for match in re.finditer(r"[()\[\]]", gold):
            yield gold[: match.start()] + "[(])"["([)]".index(match[0])] + gold[match.end() :]
    for old, new in (
        ("cents", "dollars"),
        ("cm", "m"),
        ("^2", "^3"),
        (r"\$", r"\text{cents }"),
        ("circ", r"circ \text{C}"),
        ("%", " cm"),
    ):
        if re.search(r"text\{ |mbox|circ|%|\\\$", gold) and old in gold:
            yield gold.replace(old, new)
    for match in re.finditer(r"(?<![A-Za-z\\{])[a-z](?![A-Za-z])", gold):
        if "e-" not in gold and not re.search(r"\de\d", gold):
            yield gold[: match.start()] + ("q" if match[0] != "q" else "w") + gold[match.end() :]
    if not re.search(r"text|mbox|= 0|\d$", gold):
        yield gold.strip("$") + " h"
    for old, new in (
        (r"\cos", r"\sin"),
        (r"\sqrt", ""),
        (r"\pi", "3.14"),
        (r"\ln", ""),
        (r"\lfloor m / 3\rfloor", "m / 3"),
        ("west", "east"),
        ("Olivia", "Livia"),
        ("(B)", "(D)"),
    ):
        if old in gold:
            yield gold.replace(old, new, 1)


@pytest.mark.parametrize("gold", LATEX)
def test_other_spellings_are_equal(gold):
    assert [text for text in spellings(gold) if not verify(text, gold)] == []


@pytest.mark.parametrize("gold", LATEX)
def test_altered_answers_are_unequal(gold):
    altered = set(alterations(gold)) - {gold}
    assert altered or gold in (r"\pi",)
    assert [text for text in altered if verify(text, gold)] == []


X, Y, N, T = sympy.symbols("x y n t", positive=True)
OMEGA, C1 = sympy.symbols("omega C1", positive=True)
EXPRESSIONS = [
    sympy.Rational(-7, 12),
    1 + sympy.sqrt(7),
    (1 - sympy.sqrt(5)) / 2,
    sympy.sqrt(2) / 2,
    sympy.cbrt(9) * 5,
    sympy.sqrt(2 + sympy.sqrt(3)),
    3 + 8 * sympy.I,
    sympy.I,
    -sympy.sqrt(3) * sympy.I / 2,
    5 * sympy.pi / 6,
    sympy.E**3,
    sympy.log(5),
    sympy.log(3) / sympy.log(2),
    sympy.oo,
    X**2 + 2 * X * Y - 7,
    (X + 1) ** 3,
    X**3 / (X + Y),
    sympy.sqrt(X**2 + 1),
    X ** sympy.Rational(2, 3),
    sympy.exp(-2 * T) * sympy.cos(3 * T),
    sympy.sin(X) ** 2 * sympy.cot(X),
    sympy.atan(X),
    C1 * sympy.exp(OMEGA * T),
    sympy.binomial(N, 3),
    sympy.factorial(N) / 2,
    sympy.floor(N / 2) + 1,
    sympy.Abs(X - 3),
    sympy.log(X) / X,
    sympy.Matrix([[1, 2], [sympy.Rational(-1, 3), sympy.sqrt(2)]]),
    sympy.Matrix([3, sympy.pi]),
    sympy.Interval(0, 1),
    sympy.Interval.open(-sympy.oo, 5),
    sympy.Interval.Lopen(sympy.Rational(1, 2), 8),
    sympy.Union(sympy.Interval.open(0, 9), sympy.Interval.open(9, 36)),
    sympy.FiniteSet(1, sympy.sqrt(3)),
    sympy.Eq(Y, 2 * X + 3),
    sympy.Lt(X, 5),
    sympy.Ge(X, sympy.Rational(1, 2)),
    (3, sympy.pi / 2),
    (1, 2, -4),
    [-sympy.sqrt(3), sympy.sqrt(3)],
    [(1, 2), (3, 4)],
]


@pytest.mark.parametrize("expression", EXPRESSIONS, ids=str)
def test_what_sympy_prints_is_equal_to_its_latex(expression):
    printed, latex = str(expression), sympy.latex(expression)
    assert verify(printed, latex) and verify(latex, printed) and verify(f"${latex}$", latex)


@pytest.mark.parametrize("expression", [e for e in EXPRESSIONS if isinstance(e, sympy.Expr) and e.is_finite], ids=str)
def test_other_forms_of_an_expression_are_equal_and_its_neighbours_are_not(expression):
    latex = sympy.latex(expression)
    for form in (sympy.factor, sympy.expand, sympy.together):
        assert verify(str(form(expression)), latex) and verify(sympy.latex(form(expression)), latex)
    for neighbour in (
        expression + 1,
        -expression,
        expression * 2,
        1 / expression,
        expression + sympy.Rational(1, 10**20),
    ):
        assert not verify(str(neighbour), latex) and not verify(sympy.latex(neighbour), latex)


@pytest.mark.parametrize(
    "expression", [e for e in EXPRESSIONS if isinstance(e, sympy.Expr) and e.is_number and e.is_finite], ids=str
)
def test_printed_floats_are_equal_and_rounded_ones_are_not(expression):
    latex = sympy.latex(expression)
    value = complex(expression)
    assert verify(str(sympy.N(expression)), latex)
    assert verify(repr(value if value.imag else value.real), latex)
    if expression not in (sympy.I, 3 + 8 * sympy.I):
        assert not verify(str(sympy.N(expression, 6)), latex)
