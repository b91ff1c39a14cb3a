r"""Read an answer, in LaTeX or as Python and sympy print it, into a tree (see thor/equivalence/tree.py)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import lru_cache

from thor.equivalence import names
from thor.equivalence.clean import END, GREEK, QUOTED, SCALES
from thor.equivalence.tree import Node, chained, negative, number, product, quotient, walk
from thor.equivalence.units import UNIT, canonical_unit

MAX_DEPTH, MAX_SIGNS = 40, 3  # of brackets, arguments and exponents; of signs in a row, as in --1 and n!!
FLOAT_DIGITS, FLOAT_DECIMALS = 10, 5  # a number with as many significant digits and decimals is a printed float


def _token(regex: str) -> re.Pattern[str]:
    return re.compile(r"\s*" + regex, re.DOTALL)


def _any(words) -> str:
    longest_first = sorted(words, key=len, reverse=True)
    return "|".join(re.escape(name) + (END if name[-1].isalpha() else "") for name in longest_first)


SEPARATOR, COLON, KEY = _token(r"[,;]\s*;?"), _token(":"), _token(r"[A-Za-z]\w*\s*:")
RELATION, UNION = _token(f"({_any(names.RELATIONS)})"), _token(rf"\\cup{END}")
LEADING_RELATION, AND = _token(rf"(?:=|\\approx{END})"), _token(rf"(?:&|\\(?:land|wedge){END})")
SIGN, POWER, SUBSCRIPT, POSTFIX = _token(rf"([-+]|\\[pm][pm]{END})"), _token(r"\^"), _token("_"), _token("(!(?!=)|°)")
TIMES, OVER = _token(rf"(?:\*|\\(?:cdot|times){END})"), _token(rf"(?:/|\\div{END})")
OPENING, PARENTHESIS, BAR = _token(f"({_any(names.CLOSING)})"), _token(r"\("), _token(r"\|")
BRACE, BRACKET, SINGLE = _token(r"\{"), _token(r"\["), _token(r"(?:(\d)|([A-Za-z]))")
# What starts a factor behind another one without a sign, as in 2\pi r.
NOT_FACTORS = [*(name for name in names.RELATIONS if name[0] == "\\"), r"\cup", r"\cap", r"\setminus", r"\pm", r"\mp"]
NOT_FACTORS += [r"\end", r"\land", r"\wedge", *(rf"\r{name}" for name in ("floor", "ceil", "vert", "angle"))]
FACTOR = _token(rf"(?=[A-Za-z(\[{{]|\\\{{|\\[A-Za-z])(?!{_any(NOT_FACTORS)})")
ITEM_END = re.compile(r"\s*(?:$|[,;)\]}=<>]|\\\}|\\[a-z])")

ARGUMENT = r"\s*(?:\{\s*(\d+)\s*\}|(\d))"
MIXED = _token(rf"(\d+)\s*(?:\\frac{ARGUMENT}{ARGUMENT}|\s(\d+)\s*/\s*(\d+)(?![\d.]))")
REPEATED = r"\\(?:overline|bar|dot)\s*(?:\{\s*(\d+)\s*\}|(\d))|\((\d+)\)|(\d{1,6}?)\6+(?:\.{3}|\\[lc]?dots)"
REPEATING = _token(rf"(\d*)\.(\d{{0,20}}?)(?:{REPEATED})")
NUMERAL = _token(
    r"(?P<digits>\d[0-9A-Z]*|[A-F]{2,}|[A-Za-z]+\d[0-9A-Za-z]*)\s*_\s*(?P<brace>\{\s*)?(?P<base>\d+|[a-z]{3,})(?(brace)\s*\})"
)
PREFIXED = _token(r"0(?P<base>[box])(?P<digits>[\dA-Fa-f]+)(?!\w)")
DECIMAL = r"(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,4}(?![\dA-Za-z]))?"
NUMBER, NUMBER_WITH_COMMAS = _token(f"({DECIMAL})"), _token(rf"(\d{{1,3}}(?:,\d{{3}})+(?!\d)(?:\.\d+)?|{DECIMAL})")

COMMAND, TEXT, CURRENCY = _token(r"\\([A-Za-z]+)"), _token(QUOTED), _token(r"(\\\$|[€£¥]|USD\b)")
WORD, LETTER = _token(r"((?:log(?:2|10)|(?:float|int)64)(?=\s*\()|[A-Za-z]+)"), _token(r"([A-Za-z])(\d*)")
WORDS = _token(r"([A-Za-z]{2,}(?:(?:\s+|['-])[A-Za-z]+)*)")
INTERVAL = _token(r"Interval(?:\.(open|Lopen|Ropen))?(?=\()")
ACCENTS = "dot|ddot|hat|vec|bar|tilde|overline|overrightarrow|widehat|underline|mathcal|mathbb"
ACCENT = _token(rf"\\({ACCENTS}){END}\s*(?:\{{([^{{}}]*)\}}|([A-Za-z]))")
INDEX = _token(r"(?:\{((?:[^{}]|\{[^{}]*\})*)\}|(\d+|[A-Za-z]{3,}|[A-Za-z]|\\[A-Za-z]+))")
PRIMES, APPLIED = re.compile("'*"), re.compile(r"(\{)?\s*\(\s*(\\?[A-Za-z]+|\d+)\s*\)(?(1)\s*\})")
MATRIX = _token(r"\\begin\s*\{([bpB]?matrix|smallmatrix|array)\}\s*(?:\{[clr|\s]*\})?(.*?)\\end\s*\{\1\}")


class NotReadable(Exception):
    """The text is not in the notation of the reader."""


@lru_cache(maxsize=256)
def read(text: str, commas: bool = False) -> Node | None:
    """Return the tree of a cleaned text, or None if it is not in the notation of the reader.

    commas: read 1,234 as one number, outside all brackets. Otherwise, it is two numbers.
    """
    try:
        return _Reader(text, commas).answer()
    except (NotReadable, RecursionError):
        return None


class _Reader:
    """Recursive descent: items, relations, unions, sums, products, powers, atoms."""

    def __init__(self, text: str, commas: bool) -> None:
        self.text, self.commas = text, commas
        self.position = self.depth = 0
        self.in_bars = False  # directly inside |...|, where another bar closes

    def answer(self) -> Node:
        items = self.items()
        if self.text[self.position :].strip():
            raise NotReadable
        return items[0] if len(items) == 1 else Node("list", (items,))

    def take(self, token: re.Pattern[str]) -> re.Match[str] | None:
        match = token.match(self.text, self.position)
        if match:
            self.position = match.end()
        return match

    def sees(self, token: re.Pattern[str]) -> bool:
        return token.match(self.text, self.position) is not None

    def expect(self, token: re.Pattern[str]) -> str:
        match = self.take(token)
        if not match:
            raise NotReadable
        return match[0].strip()

    @contextmanager
    def nested(self, in_bars: bool = False) -> Iterator[None]:
        outside, self.in_bars = self.in_bars, in_bars
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise NotReadable
        yield
        self.depth -= 1
        self.in_bars = outside

    # ---- items, relations, sums, products, powers ----

    def items(self, spaces: bool = False) -> tuple[Node, ...]:
        """Read items; `spaces` alone may separate numbers, as in the arrays that numpy prints."""
        found = [self.conjunction()]
        while self.take(SEPARATOR) or (spaces and self.sees(NUMBER)):
            found.append(self.conjunction())
        return tuple(found)

    def conjunction(self) -> Node:
        """Read (2 < x) & (x < 3), as sympy prints 2 < x < 3."""
        node = self.relation()
        while self.take(AND):
            node = chained(node, self.relation())
            if node is None:
                raise NotReadable
        return node

    def relation(self) -> Node:
        self.take(LEADING_RELATION)
        operators, sides = [], [self.union()]
        while match := self.take(RELATION):
            operators.append(names.RELATIONS[match[1]])
            sides.append(self.union())
        return Node("rel", (tuple(operators), tuple(sides))) if operators else sides[0]

    def union(self) -> Node:
        sets = [self.ratio()]
        while self.take(UNION):
            sets.append(self.ratio())
        return Node("union", (tuple(sets),)) if len(sets) > 1 else sets[0]

    def ratio(self) -> Node:
        """Read 1:2, which is 1/2, or 2:3:5. A unit at the end belongs to the whole ratio."""
        parts = [self.sum()]
        while self.take(COLON):
            parts.append(self.sum())
        if len(parts) == 1:
            return parts[0]
        last, *unit = parts[-1].args if parts[-1].op == "quantity" else (parts[-1],)
        node = quotient(parts[0], last) if len(parts) == 2 else Node("ratio", (*parts[:-1], last))
        return Node("quantity", (node, *unit)) if unit else node

    def sum(self) -> Node:
        terms = [self.product([])]
        while match := self.take(SIGN):
            terms.append(_signed(match[1], self.product(terms)))
        node = terms[0] if len(terms) == 1 else Node("add", tuple(terms))
        unit = self.unit(terms)
        return node if unit is None else Node("quantity", (node, unit))

    def product(self, terms: list[Node]) -> Node:
        """Read a product; `terms` are those in front of it in the same sum."""
        factors = [self.factor()]
        while True:
            if self.take(TIMES):
                factors.append(self.factor())
            elif self.take(OVER):
                factors.append(Node("inv", (self.factor(),)))
            elif self.starts_factor() and self.unit(terms + factors, peek=True) is None:
                factors.append(self.power())
            else:
                return product(*factors)

    def starts_factor(self) -> bool:
        if self.sees(NUMBER):  # \frac{1}{2}3 is a product, 2 3 is not
            return self.text[self.position - 1] in "})"
        return self.sees(FACTOR) or (not self.in_bars and self.sees(BAR))

    def unit(self, values: list[Node], peek: bool = False) -> str | None:
        """Read a unit behind values, which are numbers unless it is in \\text, at the end of an item."""
        match = UNIT.match(self.text, self.position)
        if not match or not ITEM_END.match(self.text, match.end()):
            return None
        if not match[0].lstrip().startswith(r"\text") and not all(map(_is_constant, values)):
            return None
        unit = canonical_unit(match[0])
        if unit is not None and not peek:
            self.position = match.end()
        return unit

    def factor(self) -> Node:
        return self.signed(self.power)

    def signed(self, operand: Callable[[], Node]) -> Node:
        signs = []
        while match := self.take(SIGN):
            signs.append(match[1])
        if len(signs) > MAX_SIGNS:
            raise NotReadable
        node = operand()
        for sign in reversed(signs):
            node = _signed(sign, node)
        return node

    def power(self) -> Node:
        node = self.postfix(self.atom())
        if self.take(POWER):
            node = self.postfix(Node("pow", (node, self.exponent())))
        return node

    def exponent(self) -> Node:
        with self.nested():
            return self.signed(self.power)

    def postfix(self, node: Node) -> Node:
        for _ in range(MAX_SIGNS):
            match = self.take(POSTFIX)
            if not match:
                break
            node = Node("call", ("factorial", node)) if match[1] == "!" else Node("deg", (node,))
        return node

    # ---- atoms ----

    def atom(self) -> Node:
        if match := self.take(MATRIX):
            rows = [row.split("&") for row in match[2].split(r"\\") if row.strip()]
            return Node("matrix", (tuple(tuple(_Reader(cell, False).answer() for cell in row) for row in rows),))
        if match := self.take(OPENING):
            return self.enclosed(match[1])
        if node := self.number():
            return node
        if match := self.take(TEXT):
            return self.quoted(match[1])
        if match := self.take(CURRENCY):
            value, currency = self.factor(), "dollar" if match[1] in (r"\$", "USD") else match[1]
            return Node("quantity", (value, f"{currency} {self.unit([value]) or ''}".strip()))  # $18 per hour
        if match := self.take(INTERVAL):
            return self.interval({"open": "()", "Lopen": "(]", "Ropen": "[)", None: "[]"}[match[1]])
        if match := self.take(ACCENT):
            name = f"{match[1]} {match[match.lastindex].strip()}"
            return names.REALS if name == "mathbb R" else self.symbol(name)
        if match := self.take(COMMAND):
            return self.command(match[1])
        return self.word()

    def enclosed(self, opening: str) -> Node:
        with self.nested(in_bars=opening == "|"):
            if opening == r"\{" and self.take(_token(r"\\\}")):
                return Node("set", ((),))
            if opening == "{" and self.sees(KEY):
                return self.dictionary()
            items = self.items(spaces=opening == "[")
            close = self.expect(_token(names.CLOSING[opening]))
        if opening in names.ENCLOSED:
            return Node("call", (names.ENCLOSED[opening], *items))
        if opening == r"\{" or (opening == "{" and len(items) > 1):  # Python prints {1, 2}
            return Node("set", (items,))
        if len(items) == 1:
            return items[0]
        return Node("group", ("(", items, ")") if opening == r"\langle" else (opening, items, close))

    def dictionary(self) -> Node:
        """Read x: 1, y: 2}, a solution that sympy prints, as x = 1, y = 2."""
        equations = []
        while not equations or self.take(SEPARATOR):
            name = self.word()
            self.expect(COLON)
            equations.append(Node("rel", (("=",), (name, self.sum()))))
        self.expect(_token(r"\}"))
        return equations[0] if len(equations) == 1 else Node("list", (tuple(equations),))

    def number(self) -> Node | None:
        start = self.position
        if match := self.take(MIXED):
            top, bottom = int(match[2] or match[3] or match[6]), int(match[4] or match[5] or match[7])
            if top < bottom:
                return number(int(match[1]) + Fraction(top, bottom))
            self.position = start
        if match := self.take(REPEATING):
            block, scale = match[3] or match[4] or match[5] or match[6], 10 ** len(match[2])
            value = Fraction(int("0" + match[1] + match[2]), scale)
            return number(value + Fraction(int(block), (10 ** len(block) - 1) * scale))
        if match := self.take(PREFIXED) or self.take(NUMERAL):
            digits, name = match["digits"].upper(), match["base"]
            base = int(name) if name.isdigit() else names.BASES.get(name, 0)
            if 2 <= base <= 36 and all(int(digit, 36) < base for digit in digits):
                return Node("base", (digits.lstrip("0") or "0", base))
            self.position = start
        match = self.take(NUMBER_WITH_COMMAS if self.commas and not self.depth else NUMBER)
        return _decimal(match[1].replace(",", "")) if match else None

    def quoted(self, content: str) -> Node:
        r"""Read the content of \text{...}, which is words or a formula."""
        if not re.fullmatch(r"\s*[A-Za-z]{2,}(?:(?:\s+|['-])[A-Za-z]+)*\W*", content):
            node = _Reader(content, self.commas).answer()
            return self.symbol(node.args[0]) if node.op == "sym" else node
        words = [content]
        while match := self.take(TEXT) or self.take(WORDS):
            words.append(match[1])
        return Node("text", (" ".join(" ".join(words).casefold().split()),))

    def command(self, name: str) -> Node:
        if name in names.UNREADABLE:
            raise NotReadable
        if name in ("frac", "binom", "dbinom", "tbinom"):
            first, second = self.argument(), self.argument()
            return quotient(first, second) if name == "frac" else Node("call", ("binomial", first, second))
        if name == "sqrt":
            degree = number(2)
            if self.take(BRACKET):
                degree = self.sum()
                self.expect(_token(r"\]"))
            return Node("call", ("root", self.number() or self.argument(), degree))
        if name in names.FUNCTIONS:
            return self.call(name)
        return names.CONSTANTS.get(name) or self.symbol(name)

    def argument(self) -> Node:
        r"""Read the argument of a LaTeX command: {...}, or one digit or symbol as in \frac12."""
        with self.nested():
            match = self.take(SINGLE)
            if not match:
                return self.atom()
            return number(int(match[1])) if match[1] else names.CONSTANTS.get(match[2]) or Node("sym", (match[2],))

    def word(self) -> Node:
        """Read a name, words, or one letter of a product of letters."""
        start = self.position
        name = self.expect(WORD)
        if name in names.PRINTED and self.sees(PARENTHESIS):
            return self.printed(name)
        if name in names.FUNCTIONS:
            return self.call(name)
        if name in names.CONSTANTS and not self.sees(SUBSCRIPT):
            return names.CONSTANTS[name]
        if name in SCALES:
            return number(SCALES[name])
        if name == "Reals":
            return names.REALS
        if name.lower() in GREEK or name == "lamda":
            return self.symbol(name.replace("lamda", "lambda"))
        self.position = start
        words = WORDS.match(self.text, start)
        if words and any(len(word) > 3 for word in re.findall("[A-Za-z]+", words[1])):
            self.position = words.end()
            return Node("text", (" ".join(words[1].casefold().split()),))
        letter = self.take(LETTER)
        if letter[2]:  # sympy prints C1 for C_1
            return Node("sym", (f"{letter[1]}_{letter[2]}",))
        return (
            names.CONSTANTS[letter[1]]
            if letter[1] in names.CONSTANTS and not self.sees(SUBSCRIPT)
            else self.symbol(letter[1])
        )

    def symbol(self, name: str) -> Node:
        """Read what belongs to a name: primes, an index, and one simple argument, as in f'(x) and u(t)."""
        name += self.take(PRIMES)[0]
        if self.take(SUBSCRIPT):
            match = self.take(INDEX)
            if not match:
                raise NotReadable
            name += "_" + re.sub(r"\\text|[{}\\\s]", "", match[match.lastindex]) + self.take(PRIMES)[0]
        match = self.take(APPLIED)
        return Node("sym", (f"{name}({match[2].lstrip(chr(92))})" if match else name,))

    # ---- functions ----

    def call(self, name: str) -> Node:
        function, base, power = names.FUNCTIONS[name], None, None
        if function == "log" and self.take(SUBSCRIPT):
            base = self.number() or self.argument()
        if self.take(POWER):
            power = self.exponent()
        arguments = self.arguments()
        if function in ("log2", "log10"):
            function, base = "log", number(int(function[3:]))
        if function in ("root", "cbrt") and len(arguments) == 1:
            function, arguments = "root", (*arguments, number(2 if name == "sqrt" else 3))
        if power == negative(number(1)) and function in names.TRIGONOMETRIC:
            function, power = "a" + function, None
        node = Node("call", (function, *arguments, *([base] if base else [])))
        return node if power is None else Node("pow", (node, power))

    def arguments(self) -> tuple[Node, ...]:
        r"""Read (x, y), {x}, or a product without brackets, as in \sin 2x."""
        with self.nested():
            if self.take(PARENTHESIS):
                items = self.items()
                self.expect(_token(r"\)"))
                return items
            if self.sees(BRACE):
                return (self.atom(),)
            factors = [self.factor()]
            while self.starts_factor() and not self.sees(PARENTHESIS) and not self.sees_function():
                factors.append(self.power())
            return (product(*factors),)

    def sees_function(self) -> bool:
        match = COMMAND.match(self.text, self.position) or WORD.match(self.text, self.position)
        return match is not None and match[1] in names.FUNCTIONS

    def interval(self, brackets: str) -> Node:
        ends = self.arguments()[:2]
        if len(ends) < 2:
            raise NotReadable
        left = "(" if ends[0] == negative(names.INFINITY) else brackets[0]
        return Node("group", (left, ends, ")" if ends[1] == names.INFINITY else brackets[1]))

    def printed(self, name: str) -> Node:
        arguments = self.arguments()
        if name in ("Rational", "Fraction") and len(arguments) == 2:
            return quotient(*arguments)
        if name == "Eq" and len(arguments) == 2:
            return Node("rel", (("=",), arguments))
        if name in ("FiniteSet", "Union"):
            return Node("set" if name == "FiniteSet" else "union", (arguments,))
        if len(arguments) > 1:
            raise NotReadable
        return arguments[0]


def _decimal(text: str) -> Node:
    mantissa, _, exponent = text.lower().partition("e")
    whole, _, decimals = mantissa.partition(".")
    unit = Fraction(10) ** (int(exponent or 0) - len(decimals))
    is_float = len(decimals) >= FLOAT_DECIMALS and len((whole + decimals).lstrip("0")) >= FLOAT_DIGITS
    return number(int(whole + decimals) * unit, 8 * unit if is_float else Fraction(0))


def _signed(sign: str, node: Node) -> Node:
    return node if sign == "+" else Node({"-": "neg", r"\pm": "pm", r"\mp": "mp"}[sign], (node,))


def _is_constant(node: Node) -> bool:
    return not any(part.op in ("sym", "text", "base", "quantity") for part in walk(node))
