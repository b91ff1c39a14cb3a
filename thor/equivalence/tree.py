r"""Answers as trees, made of `Node(op, args)`.

    num       value (a Fraction), slack          sym   name
    add, mul  terms or factors                   neg, inv  x, for -x and 1/x
    pow       base, exponent                     call  function, arguments
    const     'pi' | 'e' | 'i' | 'oo'            text  words
    pm, mp    x, as in 1 \pm x                   deg   x, for x degrees
    base      digits, base                       quantity  x, unit
    ratio     parts, three or more
    list, set, union  (items)                    matrix  (rows)
    group     opening bracket, (items), closing bracket: a tuple or an interval
    rel       (operators), (sides), with the operators = != < <= > >=

`slack` says by how much a number may be off: 0, or 8 units of the last digit of a printed float such as
0.14285714285714285. One ulp of a float64 is up to 6 of these units, and 9 or more would change the last digit but one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import NamedTuple


class Node(NamedTuple):
    op: str
    args: tuple


def number(value: int | Fraction, slack: Fraction = Fraction(0)) -> Node:
    return Node("num", (Fraction(value), slack))


def negative(node: Node) -> Node:
    return Node("neg", (node,))


def product(*factors: Node) -> Node:
    return factors[0] if len(factors) == 1 else Node("mul", factors)


def quotient(node: Node, divisor: Node) -> Node:
    return product(node, Node("inv", (divisor,)))


def children(args: tuple) -> Iterator[Node]:
    """Yield the nodes in `args`, also those in tuples, but not what is below them."""
    for arg in args:
        if isinstance(arg, Node):
            yield arg
        elif isinstance(arg, tuple):
            yield from children(arg)


def walk(node: Node) -> Iterator[Node]:
    """Yield the node and all nodes below it."""
    yield node
    for child in children(node.args):
        yield from walk(child)


def replace(node: Node, rule: Callable[[Node], Node | None]) -> Node:
    """Return the tree with each node replaced for which the rule returns another one."""

    def apply(arg):
        if isinstance(arg, Node):
            return replace(arg, rule)
        return tuple(map(apply, arg)) if isinstance(arg, tuple) else arg

    return rule(node) or Node(node.op, tuple(map(apply, node.args)))


def ascending(relation: Node) -> tuple[tuple[str, ...], tuple[Node, ...]]:
    """Return the operators and sides of a relation: x > 5 as 5 < x, and a = b = c as a = c."""
    operators, sides = relation.args
    if set(operators) == {"="}:
        return ("=",), (sides[0], sides[-1])
    if set(operators) <= {">", ">="}:
        return tuple(operator.replace(">", "<") for operator in operators[::-1]), sides[::-1]
    return operators, sides


def chained(*relations: Node) -> Node | None:
    """Join 2 < x and x < 3 to 2 < x < 3, in any order, if that is possible."""
    if all(relation.op == "rel" for relation in relations):
        for (operators, sides), (more, last) in itertools.permutations(map(ascending, relations)):
            if sides[-1] == last[0]:
                return Node("rel", (operators + more, sides + last[1:]))
    return None


def variables(node: Node) -> set[str]:
    return {part.args[0] for part in walk(node) if part.op == "sym"}
