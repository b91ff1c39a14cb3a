"""Decide whether two expressions are equal for all values of their variables, by their values at a few points.

Different expressions agree at a random point with negligible probability. This is faster than to simplify their
difference, and decides more. Variables are positive, as lengths, counts and masses are: sqrt(x^2) is x.
"""

from __future__ import annotations

import math
import random
from fractions import Fraction

from mpmath import mp

from thor.equivalence.compare import TooLarge, same_rational, tolerance
from thor.equivalence.names import TRIGONOMETRIC
from thor.equivalence.tree import Node, children, variables, walk

mp.dps = 100  # decimal digits of the values
EPSILON = Fraction(1, 10**80)  # relative difference that counts as equal
MAX_BITS = 1 << 18  # of exact numbers; 2024! has 19,000
MAX_EXPONENT = 100_000  # values above 2^100000 or below 2^-100000 are not used; some functions would take long
POINTS, ENOUGH = 12, 6  # points to try, and how many at which both expressions have a value decide
ROUNDED_POINTS, ROUNDED_ENOUGH = (
    60,
    40,
)  # the same for expressions with floor or ceil, which differ at few integers only

CONSTANTS = {"pi": mp.pi, "e": mp.e, "i": mp.mpc(0, 1), "oo": mp.inf}
FUNCTIONS = {
    "re": mp.re, "im": mp.im, "conjugate": mp.conj, "sign": mp.sign, "abs": abs, "floor": mp.floor, "ceil": mp.ceil,
    "exp": mp.exp, "ln": mp.ln, "factorial": mp.factorial, "binomial": mp.binomial, "max": max, "min": min,
    "gcd": lambda *args: math.gcd(*map(int, args)), "lcm": lambda *args: math.lcm(*map(int, args)),
}  # fmt: skip


def identical(node: Node, gold: Node, up_to_factor: bool = False) -> bool:
    """Return whether two expressions are equal, or with `up_to_factor` equal up to a positive constant factor."""
    try:
        same = same_rational(node, gold, MAX_BITS)
    except TooLarge:
        return False
    if same is not None and not up_to_factor:
        return same
    parts = [part.args for part in (*walk(node), *walk(gold)) if part.op == "call"]
    rounds = any(args[0] in ("floor", "ceil") for args in parts)
    bare_log = any(args[0] == "log" and len(args) == 2 for args in parts)
    bases = (mp.e, mp.mpf(10)) if bare_log else (mp.e,)  # \\log may be the natural or the decimal logarithm
    return any(_agree(node, gold, up_to_factor, rounds, base) for base in bases)


def _agree(node: Node, gold: Node, up_to_factor: bool, rounds: bool, log_base) -> bool:
    names = sorted(variables(node) | variables(gold))
    epsilon = _real(max(EPSILON, tolerance(node, gold)))
    points, enough = (ROUNDED_POINTS, ROUNDED_ENOUGH) if rounds else (POINTS, ENOUGH)
    if not names:
        points = enough = 1
    factor, valid = None, 0
    for point in range(points):
        values = _values(names, point, rounds)
        try:
            value, gold_value = evaluate(node, values, log_base), evaluate(gold, values, log_base)
        except (ArithmeticError, ValueError, TypeError):  # undefined or too large at this point
            continue
        if up_to_factor and gold_value != 0:
            factor = value / gold_value if factor is None else factor
            gold_value *= factor
        if not _close(value, gold_value, epsilon):
            return False
        valid += 1
        if valid == enough:
            return not up_to_factor or (bool(names) and factor is not None and mp.im(factor) == 0 and factor > 0)
    return False


def _values(names: list[str], point: int, rounds: bool) -> dict[str, mp.mpf]:
    """Return integers at the first points, then numbers between 0.2 and 3.

    rounds: use more integers, and only integers for variables with the names i to n.
    """
    rng, values = random.Random(point), {}
    for name in names:
        whole = point < (ROUNDED_POINTS // 2 if rounds else 3) or (rounds and name[0] in "ijklmnIJKLMN")
        values[name] = mp.mpf(rng.randint(2, 30)) if whole else mp.mpf(rng.randint(200, 3000)) / 1000
    if names and values[names[0]] == int(values[names[0]]):
        values[names[0]] = mp.mpf(point + 2)  # one integer after the other, so that none is left out
    return values


def _close(value, gold_value, epsilon) -> bool:
    if value == gold_value or mp.isinf(value) or mp.isinf(gold_value):
        return value == gold_value
    if gold_value == 0:
        return abs(value) < mp.mpf(10) ** -90  # a rounding error
    return abs(value - gold_value) <= epsilon * abs(gold_value)


def evaluate(node: Node, values: dict[str, mp.mpf], log_base):
    """Return the value of an expression, a real or complex number of mpmath.

    Raises ValueError, TypeError or an ArithmeticError if the expression has no value there, or a too large one.
    """
    match node.op:
        case "num":
            return _real(node.args[0])
        case "sym":
            return values[node.args[0]]
        case "const":
            return +CONSTANTS[node.args[0]]
    args = [evaluate(arg, values, log_base) for arg in children(node.args)]
    match node.op:
        case "add":
            value = mp.fsum(args)
        case "mul":
            value = mp.fprod(args)
        case "neg":
            value = -args[0]
        case "inv":
            value = 1 / args[0]
        case "pow":
            value = _power(*args)
        case "call":
            in_degrees = any(part.op == "deg" or part.args[1:] == ("degree",) for part in walk(node))
            value = _call(node.args[0], args, in_degrees, log_base)
        case "deg" | "quantity":
            value = args[0]
        case _:
            raise ValueError(node.op)
    if mp.isnan(value) or (mp.isfinite(value) and value != 0 and abs(mp.mag(value)) > MAX_EXPONENT):
        raise ValueError("no value")
    return mp.mpmathify(value)


def _real(value: Fraction):
    return mp.mpf(value.numerator) / value.denominator


def _power(base, exponent):
    if base != 0 and mp.isfinite(base) and abs(exponent) * abs(mp.mag(base)) > 2 * MAX_EXPONENT:
        raise ValueError("too large")
    return mp.power(base, exponent)


def _call(name: str, args: list, in_degrees: bool, log_base):
    first = args[0]
    if name == "root":
        odd = args[1] % 2 == 1 and mp.im(first) == 0 and mp.re(first) < 0
        return -_power(-first, 1 / args[1]) if odd else _power(first, 1 / args[1])
    if name == "log":
        return mp.ln(first) / mp.ln(args[1] if len(args) > 1 else log_base)
    if name in FUNCTIONS:
        return FUNCTIONS[name](*args)
    if name in TRIGONOMETRIC and in_degrees:
        first *= mp.pi / 180
    return getattr(mp, name)(first)
