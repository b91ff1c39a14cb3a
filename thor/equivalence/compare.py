r"""When do two answers agree? The rules, with examples, over the trees that the reader makes.

Two expressions agree if they are equal for all values of their variables. `exact` decides this for rational numbers,
`identical` of numeric.py for all else. It runs in a worker process, because hostile answers may take long; in the
caller's process, `undecided` stands in for it.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator
from fractions import Fraction

from thor.equivalence.clean import clean
from thor.equivalence.names import INFINITY
from thor.equivalence.reader import read
from thor.equivalence.tree import (
    Node,
    ascending,
    children,
    negative,
    number,
    product,
    quotient,
    replace,
    variables,
    walk,
)
from thor.equivalence.units import TEXT, UNIT, canonical_unit

MAX_BITS = 1 << 13  # of the numerator and the denominator of an exact number in the caller's process
LEAST_SLACK = Fraction(8, 10**17)  # relative, of floats, which have at most 17 digits
Nodes = tuple[Node, ...]
Identical = Callable[[Node, Node, bool], bool]  # (prediction, gold, up to a positive constant factor)


class Undecided(Exception):
    """The comparison needs the values of expressions."""


class TooLarge(Exception):
    """An exact number has too many bits."""


def undecided(prediction: Node, gold: Node, up_to_factor: bool) -> bool:
    raise Undecided


# ---- texts ----

CHOICE = re.compile(
    r"(?:(?:option|choice|answer):?\s+)?(?:\(\s*((?-i:[A-J]))\s*\)|((?-i:[A-J]))(?=\s*(?:$|[.:)]|\s+\()))"
    r"(?!\s*[,;+*/^_=]|-|\s+-\s)\s*[.:)]?(.*)",  # (C)+1 and (C), 1 are no choices, (C) -5 is one
    re.DOTALL | re.IGNORECASE,
)
OTHER_CHOICE = re.compile(r"(?<!\w)\([A-J]\)|(?<!\w)[A-J][.:)]|^[A-J]$")  # in the text of a choice: (C) 12 (D) 13
THOUSANDS = re.compile(r"\d,\d{3}(?!\d)")
POWER_OF_TEN = r"10\s*\^\s*(?:\{\s*-?\d+\s*\}|-?\d+)"
NUMBER = rf"[-+]?(?:{POWER_OF_TEN}|[\d.,/]+(?:[eE][-+]?\d+|\s*(?:\\times|\\cdot|\*)\s*{POWER_OF_TEN})?)"
SHORT_UNIT = re.compile(rf"((?:\w+\s*=\s*)?(?:{NUMBER}|\({NUMBER}\)))(?:\s+|(?<=[)}}]))({UNIT.pattern})")


def equal(prediction: str, gold: str, identical: Identical) -> bool:
    """Return whether `prediction` states the answer `gold`."""
    prediction, gold = clean(prediction), clean(gold)
    (letter, rest), (gold_letter, gold_rest) = _choice(prediction), _choice(gold)
    if letter and gold_letter:
        return letter == gold_letter and (not rest or not gold_rest or _same_text(rest, gold_rest, identical))
    if _same_text(prediction, gold, identical):
        return True
    return bool(rest or gold_rest) and _same_text(rest or prediction, gold_rest or gold, identical)


def _same_text(prediction: str, gold: str, identical: Identical) -> bool:
    if not prediction or not gold:
        return False
    if _squeeze(prediction) == _squeeze(gold):
        return True
    golds = list(_readings(gold))
    return any(same(node, gold, identical) for node in _readings(prediction, short_units=True) for gold in golds)


def _squeeze(text: str) -> str:
    r"""Remove spaces, braces around an index, and around words \text and the case: x_{1} is x_1, Yes is \text{yes}."""
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)  # not those between digits: 1 1/2 is not 11/2
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", text)
    words = re.fullmatch(r"(?:\\text\{)?([A-Za-z]{2,})\}?", text)
    return words[1].casefold() if words else text


def _choice(text: str) -> tuple[str, str]:
    r"""Split the answer to a multiple-choice question: C, (C), C: 12, \text{(C) } 12 are C, with 12 or nothing."""
    match = CHOICE.fullmatch(TEXT.sub(r"\1", text, count=1).strip())
    if not match or OTHER_CHOICE.search(match[3].strip()):
        return "", ""
    return match[1] or match[2], match[3].strip()


def _readings(text: str, short_units: bool = False) -> Iterator[Node]:
    """Yield the possible trees: 1,234 is one number or two; in a prediction, "5 m" is five meters or a product."""
    match = SHORT_UNIT.fullmatch(text) if short_units else None
    unit = canonical_unit(match[2], single_letters=True) if match else None
    for reading in (text,) if unit is None else (rf"{match[1]}\text{{{unit or 'units'}}}", text):
        for commas in (True, False) if THOUSANDS.search(text) else (False,):
            node = read(reading, commas)
            if node is not None:
                yield node


# ---- lists, sets, tuples, intervals, matrices ----


def same(node: Node, gold: Node, identical: Identical) -> bool:
    """Return whether two trees agree."""
    node, gold = _expand(node), _expand(gold)
    if node == gold:
        return True
    if "rel" in (node.op, gold.op):
        return _same_relation(node, gold, identical)
    if "matrix" in (node.op, gold.op):
        rows, gold_rows = _rows(node), _rows(gold)
        if list(map(len, rows)) != list(map(len, gold_rows)):
            return False
        return bool(rows) and _same_items(sum(rows, ()), sum(gold_rows, ()), identical)
    if gold.op == "group":
        items = _ordered(node, gold)
        return items is not None and _same_items(items, gold.args[1], identical)
    if gold.op in ("list", "set", "union"):
        items = _unordered(node, gold)
        return items is not None and _same_items(items, gold.args[0], identical, any_order=True)
    return node.op not in ("list", "set", "union", "group") and _same_value(node, gold, identical)


def _expand(node: Node) -> Node:
    r"""1 \pm 2 is 3, -1, also in a list; {5} is 5."""
    is_list = node.op in ("list", "set")
    items = tuple(choice for item in (node.args[0] if is_list else (node,)) for choice in _both_signs(item))
    return items[0] if len(items) == 1 else Node(node.op if is_list else "list", (items,))


def _both_signs(node: Node) -> Nodes:
    if not any(part.op in ("pm", "mp") for part in walk(node)):
        return (node,)

    def choose(plus: str) -> Node:
        def rule(part: Node) -> Node | None:
            if part.op not in ("pm", "mp"):
                return None
            value = replace(part.args[0], rule)
            return value if part.op == plus else negative(value)

        return replace(node, rule)

    return choose("pm"), choose("mp")


def _ordered(node: Node, gold: Node) -> Nodes | None:
    """A tuple may lack its brackets, and with three or more items it may have Python's: [1, 2, 3] is (1, 2, 3)."""
    if node.op == "list":
        return node.args[0]
    brackets, gold_brackets = node.args[::2], gold.args[::2]
    python = len(gold.args[1]) > 2 and brackets in (("(", ")"), ("[", "]"))
    return node.args[1] if node.op == "group" and (python or brackets == gold_brackets) else None


def _unordered(node: Node, gold: Node) -> Nodes | None:
    """A list or set may have Python's brackets: [1, 2] is {1, 2} and 1, 2; (1, 2) is 1, 2 but not {1, 2}."""
    if node.op in ("list", "set", "union"):
        return node.args[0]
    if node.op == "group" and node.args[::2] in (("[", "]"), ("(", ")") if gold.op == "list" else None):
        return node.args[1]
    return None


def _same_items(items: Nodes, golds: Nodes, identical: Identical, any_order: bool = False) -> bool:
    if len(items) != len(golds):
        return False
    left = list(items)
    for gold in golds:
        index = next((i for i in range(len(left) if any_order else 1) if same(left[i], gold, identical)), None)
        if index is None:
            return False
        del left[index]
    return True


def _rows(node: Node) -> list[Nodes]:
    """A matrix may be written as a list of lists, and one column as a list."""
    if node.op == "matrix":
        return list(node.args[0])
    items = node.args[1] if node.op == "group" else node.args[0] if node.op == "list" else ()
    return [item.args[1] if item.op == "group" else (item,) for item in items]


# ---- equations and inequalities ----


def _same_relation(node: Node, gold: Node, identical: Identical) -> bool:
    """x = 5 is 5 if one of them is no equation; x < 5 is an interval; 2x = y is y = 2x; x = 5 is not y = 5."""
    if node.op != "rel":
        named = _is_equation(gold) and _is_name(gold.args[1][0])
        value = gold.args[1][-1] if named else _interval(gold)
        return value is not None and same(node, value, identical)
    if gold.op != "rel":
        value = node.args[1][-1] if _is_equation(node) else _interval(node)
        return value is not None and same(value, gold, identical)
    (operators, sides), (gold_operators, gold_sides) = ascending(node), ascending(gold)
    if operators != gold_operators:  # x \in (2, 5) is 2 < x < 5
        value, gold_value = _interval(node) or sides[-1], _interval(gold) or gold_sides[-1]
        return value.op == gold_value.op == "group" and same(value, gold_value, identical)
    if _same_items(sides, gold_sides, identical):
        return True
    if len(sides) > 2:
        return False
    symmetric = operators[0] in ("=", "!=")
    if symmetric and _same_items(sides[::-1], gold_sides, identical):
        return True
    if not all(map(_is_expression, sides + gold_sides)):
        return False
    difference, mirrored, gold_difference = (Node("add", (a, negative(b))) for a, b in (sides, sides[::-1], gold_sides))
    return identical(difference, gold_difference, True) or (symmetric and identical(mirrored, gold_difference, True))


def _is_equation(node: Node) -> bool:
    return set(node.args[0]) == {"="}


def _is_name(node: Node) -> bool:
    return node.op in ("sym", "text") or (node.op in ("mul", "group") and all(map(_is_name, children(node.args))))


def _interval(node: Node) -> Node | None:
    """x < 5 is (-oo, 5), and 2 < x <= 5 is (2, 5]."""
    operators, sides = ascending(node)
    if len(sides) == 2 and sides[0].op == "sym":
        operators, sides = ("<", *operators), (negative(INFINITY), *sides)
    elif len(sides) == 2:
        operators, sides = (*operators, "<"), (*sides, INFINITY)
    if len(sides) != 3 or sides[1].op != "sym" or not set(operators) <= {"<", "<="}:
        return None
    return Node("group", ("(" if operators[0] == "<" else "[", sides[::2], ")" if operators[1] == "<" else "]"))


# ---- values ----

STRUCTURES = {"group", "list", "set", "union", "matrix", "rel", "text", "base", "ratio"}
EULER_OR_OPTION = Node("sym", ("E",))  # a whole gold answer E is an option, 2*E is 2e
PYTHON_NAMES = {"I": Node("const", ("i",)), "j": Node("const", ("i",)), "E": Node("const", ("e",))}


def _is_expression(node: Node) -> bool:
    return not any(part.op in STRUCTURES for part in walk(node))


def _same_value(node: Node, gold: Node, identical: Identical) -> bool:
    """5 cm is 5 but not 5 m; 50% is 50 and 1/2; 52_8 is 52; 3 + 8*I is 3 + 8i."""
    (node, unit), (gold, gold_unit) = _quantity(node), _quantity(gold)
    if unit and gold_unit and unit != gold_unit:
        return False
    if (unit == "percent") != (gold_unit == "percent"):
        share, value = (node, gold) if unit == "percent" else (gold, node)
        return any(_same_value(product(share, number(scale)), value, identical) for scale in (1, Fraction(1, 100)))
    if node == gold:
        return True
    if gold == EULER_OR_OPTION:
        return False
    if gold.op == node.op == "ratio":
        return _same_items(_shares(node), _shares(gold), identical)
    if "base" in (node.op, gold.op):
        return node.op != gold.op and _digits(node) == _digits(gold)
    if not _is_expression(node) or not _is_expression(gold):
        return False
    node, gold = _from_python(node, variables(gold)), _from_python(gold, variables(node))
    try:
        same = same_rational(node, gold, MAX_BITS)
    except TooLarge:
        same = None
    return identical(node, gold, False) if same is None else same


def same_rational(node: Node, gold: Node, max_bits: int) -> bool | None:
    """Compare two rational numbers exactly, or return None if one of the trees is another expression.

    Raises TooLarge if the numerator or denominator of a value in between exceeds `max_bits`.
    """
    value, gold_value = exact(node, max_bits), exact(gold, max_bits)
    if value is None or gold_value is None:
        return None
    slack = tolerance(node, gold)
    if slack < LEAST_SLACK and all(pow(10, _bits(x), x.denominator) == 0 for x in (value, gold_value)):
        slack = 0  # no float prints 1.00000000000000001 for 1
    return value == gold_value or abs(value - gold_value) < slack * abs(value)


def _quantity(node: Node) -> tuple[Node, str]:
    """Split a number or expression from its unit."""
    if node.op == "quantity":
        return _quantity(node.args[0])[0], node.args[1]
    if node.op == "deg":
        return node.args[0], "degree"
    if node.op == "neg":
        value, unit = _quantity(node.args[0])
        return negative(value), unit
    return node, ""


def _digits(node: Node) -> str:
    """Return the digits of a number with a base, or of an integer that is short enough for Python to print."""
    if node.op == "num" and node.args[0].denominator == 1 and 0 <= node.args[0] < 10**100:
        return str(node.args[0])
    return node.args[0] if node.op == "base" else ""


def _shares(ratio: Node) -> Nodes:
    """Return the parts divided by their sum: 2:3:5 is 4:6:10."""
    return tuple(quotient(part, Node("add", ratio.args)) for part in ratio.args)


def _from_python(node: Node, others: set[str]) -> Node:
    """Read I, j and E as Python and sympy print them, unless the other answer has a variable of that name."""
    names = {name: value for name, value in PYTHON_NAMES.items() if name not in others}
    return replace(node, lambda part: names.get(part.args[0]) if part.op == "sym" else None)


def tolerance(node: Node, gold: Node) -> Fraction:
    """Return the relative difference to accept: 0.14285714285714285 is 1/7; two decimals of one length are exact."""
    numbers, gold_numbers = ([part.args for part in walk(tree) if part.op == "num"] for tree in (node, gold))
    if max((slack for _, slack in numbers), default=0) == max((slack for _, slack in gold_numbers), default=0):
        return Fraction(0)
    return max(slack / abs(value) for value, slack in numbers + gold_numbers if value)


def exact(node: Node, max_bits: int) -> Fraction | None:
    """Return the value of a tree of rational numbers, or None for any other tree."""
    if node.op == "num":
        return node.args[0]
    is_rational = node.op in ("add", "mul", "neg", "inv", "pow", "deg", "quantity") or node.args[0] == "factorial"
    values = [exact(child, max_bits) for child in children(node.args)] if is_rational else [None]
    if None in values:
        return None
    match node.op:
        case "add":
            return functools.reduce(lambda a, b: _checked(a + b, max_bits), values)
        case "mul":
            return functools.reduce(lambda a, b: _checked(a * b, max_bits), values)
        case "neg":
            return -values[0]
        case "inv":
            return 1 / values[0] if values[0] else None
        case "pow":
            return _power(*values, max_bits)
        case "call":
            return _factorial(values[0], max_bits)
        case _:
            return values[0]


def _power(base: Fraction, exponent: Fraction, max_bits: int) -> Fraction | None:
    if exponent.denominator != 1 or base == 0:
        return None
    if _bits(base) * abs(exponent) > max_bits:
        raise TooLarge
    return base ** int(exponent)


def _factorial(value: Fraction, max_bits: int) -> Fraction | None:
    if value.denominator != 1 or value < 0:
        return None
    if value * _bits(value) > max_bits:
        raise TooLarge
    return Fraction(math.factorial(int(value)))


def _checked(value: Fraction, max_bits: int) -> Fraction:
    if _bits(value) > max_bits:
        raise TooLarge
    return value


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())
