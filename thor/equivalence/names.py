"""The names that an answer may contain: constants, functions, relations, brackets and what Python and sympy print."""

from __future__ import annotations

from thor.equivalence.tree import Node, negative

INFINITY = Node("const", ("oo",))
CONSTANTS = {name: Node("const", (value,)) for name, value in {
    "pi": "pi", "e": "e", "i": "i", "imath": "i", "infty": "oo", "oo": "oo", "inf": "oo", "infinity": "oo",
}.items()}  # fmt: skip
REALS = Node("group", ("(", (negative(INFINITY), INFINITY), ")"))

TRIGONOMETRIC = ("sin", "cos", "tan", "cot", "sec", "csc")
FUNCTIONS = {
    f"{arc}{name}{h}": f"{arc[:1]}{name}{h}" for name in TRIGONOMETRIC for arc in ("", "a", "arc") for h in ("", "h")
}
FUNCTIONS |= {name: name for name in ("exp", "ln", "log", "abs", "floor", "ceil", "factorial", "gcd", "lcm")}
FUNCTIONS |= {name: name for name in ("max", "min", "re", "im", "conjugate", "sign")}
FUNCTIONS |= {"sgn": "sign"}
FUNCTIONS |= {"Abs": "abs", "ceiling": "ceil", "Max": "max", "Min": "min", "binomial": "binomial", "comb": "binomial"}
FUNCTIONS |= {"sqrt": "root", "cbrt": "cbrt", "root": "root", "log2": "log2", "log10": "log10"}
# What Python and sympy print with arguments in parentheses, besides functions.
PRINTED = {"Rational", "Fraction", "Integer", "Float", "float", "int", "float64", "int64", "Tuple", "tuple", "list"}
PRINTED |= {"Matrix", "ImmutableDenseMatrix", "array", "Eq", "FiniteSet", "set", "Union"}

RELATIONS = {"=": "=", "==": "=", r"\approx": "=", r"\in": "=", "<": "<", r"\lt": "<", ">": ">", r"\gt": ">"}
RELATIONS |= dict.fromkeys(["<=", r"\le", r"\leq", r"\leqslant"], "<=") | dict.fromkeys(["!=", r"\ne", r"\neq"], "!=")
RELATIONS |= dict.fromkeys([">=", r"\ge", r"\geq", r"\geqslant"], ">=")
CLOSING = {"(": r"[)\]]", "[": r"[)\]]", "{": r"\}", r"\{": r"\\\}", r"\langle": r"\\rangle", "|": r"\|"}
CLOSING |= {r"\lfloor": r"\\rfloor", r"\lceil": r"\\rceil", r"\lvert": r"\\rvert", r"\vert": r"\\vert"}
ENCLOSED = {r"\lfloor": "floor", r"\lceil": "ceil", "|": "abs", r"\lvert": "abs", r"\vert": "abs"}
UNREADABLE = {"sum", "int", "prod", "lim", "begin", "end", "iint", "oint", "over", "choose", "pmod", "mod", "bmod"}
BASES = {"b": 2, "o": 8, "x": 16, "sixteen": 16}  # 0b101 and 101_{two}
BASES |= dict(zip(("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"), range(2, 11), strict=True))
