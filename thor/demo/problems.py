"""Synthetic math problems for a model with about 135M parameters.

Each problem is one or two short sentences. A few lines of Python solve it; mental arithmetic does not.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from random import Random
from typing import Any

import sympy
from sympy import Integer

from thor.trajectory import Problem


def synthetic_problems(split: str, count: int, seed: int) -> list[Problem]:
    """Return the first `count` problems of a split.

    Every block of consecutive problems has one problem of each family in random order, and levels alternate, so every
    prefix is balanced. A hash of the phrasings assigns a quarter of all problems to the test split. It does not depend
    on the seed, so the splits are disjoint across seeds, and all phrasings of a problem are in the same split.

    Raises ValueError for an unknown split, or if a family has too few distinct problems.
    """
    if split not in ("train", "test"):
        raise ValueError(f"synthetic problems have the splits 'train' and 'test', not '{split}'")
    problems: list[Problem] = []
    seen: set[str] = set()
    for index in range(count):
        block, position = divmod(index, len(FAMILIES))
        which = Random(f"{seed}/{split}/block {block}").sample(range(len(FAMILIES)), len(FAMILIES))[position]
        family, level = FAMILIES[which], (block + which) % 3 + 1
        rng = Random(f"{seed}/{split}/{index}")
        for _ in range(1000):
            phrasings, gold = family(rng, level)
            is_test = hashlib.blake2b(phrasings.encode()).digest()[0] < 64
            if is_test == (split == "test") and phrasings not in seen:
                break
        else:
            raise ValueError(f"a limit of {count} is too high: family '{family.__name__}' has no more problems")
        seen.add(phrasings)
        question = rng.choice(phrasings.split("|"))
        problems.append(Problem(f"synthetic/{split}/{index}", question, str(gold()), family.__name__))
    return problems


# ---- families -------------------------------------------------------------------------------------------------------
# A family is a function of a random generator and a level from 1 to 3. It returns the phrasings of one question,
# separated by "|", and a function that computes the answer. Only questions that are kept have their answer computed.

Candidate = tuple[str, Callable[[], Any]]
X, INDEX = sympy.symbols("x i")


def product(rng: Random, level: int) -> Candidate:
    a, b, c = (rng.randint(10 ** (level + 1), 10 ** (level + 2)) for _ in range(3))
    if level < 3:
        return f"What is {a} * {b}?|Multiply {a} by {b}.|Find the product of {a} and {b}.", lambda: Integer(a) * b
    return f"What is {a} * {b} - {c}?|Multiply {a} by {b} and subtract {c}.", lambda: Integer(a) * b - c


def remainder(rng: Random, level: int) -> Candidate:
    a, n, m = rng.randint(2, 20 * level), rng.randint(20, 40 * 4**level), rng.randint(7, 10 ** (level + 1))
    b, c = rng.randint(10**6, 10**9), rng.randint(2, 99)
    what = (f"{b} * {c}", f"{a}**{n}", f"{a}**{n} + {c}")[level - 1]
    text = f"What is the remainder when {what} is divided by {m}?|Compute ({what}) mod {m}.|Find ({what}) modulo {m}."
    return text, lambda: sympy.Mod((Integer(b) * c, Integer(a) ** n, Integer(a) ** n + c)[level - 1], m)


def gcd_lcm(rng: Random, level: int) -> Candidate:
    factor = rng.randint(2, 60 * level)
    numbers = [factor * k for k in rng.sample(range(2, 30 * level), 3 if level == 3 else 2)]
    listed = " and ".join(", ".join(map(str, numbers)).rsplit(", ", 1))
    name, short, value = ("greatest common divisor", "gcd", sympy.gcd_list)
    if level > 1:
        name, short, value = ("least common multiple", "lcm", sympy.lcm_list)
    return f"What is the {name} of {listed}?|Find the {short} of {listed}.", lambda: value(numbers)


def series(rng: Random, level: int) -> Candidate:
    low, k = rng.randint(2, 100), rng.randint(3, 40)
    high = low + rng.randint(100, 2000)
    what = (f"multiples of {k}", "squares of all integers", "cubes of all integers")[level - 1]
    text = f"What is the sum of the {what} from {low} to {high}?|Add up the {what} from {low} to {high}."
    if level == 1:
        return text, lambda: k * sympy.summation(INDEX, (INDEX, -(-low // k), high // k))
    return text, lambda: sympy.summation(INDEX**level, (INDEX, low, high))


def primes(rng: Random, level: int) -> Candidate:
    low = 2 * rng.randint(5, 500 * level)  # even bounds are not prime, so it does not matter if they count
    high = low + 2 * rng.randint(50, 500 * level)
    if level == 1:
        return f"How many primes are less than {high}?|Count the primes below {high}.", lambda: sympy.primepi(high - 1)
    what, total = ("number", len) if level == 2 else ("sum", sum)
    text = f"What is the {what} of primes between {low} and {high}?|Find the {what} of primes from {low} to {high}."
    return text, lambda: total(list(sympy.primerange(low, high)))


def linear(rng: Random, level: int) -> Candidate:
    a, b, c, d = (rng.randint(3, 30 * level) for _ in range(4))
    u, v = rng.randint(2, 100 * level), rng.randint(2, 100 * level)  # the solution
    if level < 3:
        c = c if level == 2 else 0
        equation = f"{a + c}*x + {b} = {f'{c}*x + ' if c else ''}{a * u + b}"
        text = f"Solve {equation} for x.|What is x if {equation}?|Find x such that {equation}."
        return text, lambda: sympy.solve((a + c) * X + b - (c * X + a * u + b), X)[0]
    a, d = a + c, b + d  # makes the determinant positive, so the solution is unique
    system = f"{a}*x + {b}*y = {a * u + b * v} and {c}*x + {d}*y = {c * u + d * v}"
    matrix, right = sympy.Matrix([[a, b], [c, d]]), sympy.Matrix([a * u + b * v, c * u + d * v])
    return f"If {system}, what is x + y?|Find x + y, where {system}.", lambda: sum(matrix.LUsolve(right))


def quadratic(rng: Random, level: int) -> Candidate:
    p = rng.randint(2, 40 * level)
    q = rng.choice([q for q in range(-40 * level, 40 * level) if abs(q) not in (0, p - 1, p, p + 1)])  # roots p, q
    equation = f"x**2 {-p - q:+}*x {p * q:+} = 0".replace("+", "+ ").replace("-", "- ")
    asked = ("larger root", "smaller root", "sum of the cubes of the roots")[level - 1]
    aggregate = (max, min, lambda roots: sum(root**3 for root in roots))[level - 1]
    text = f"What is the {asked} of {equation}?|Find the {asked} of the equation {equation}."
    return text, lambda: aggregate(sympy.real_roots(sympy.Poly([1, -p - q, p * q], X)))


def digits(n: int, base: int) -> list[int]:
    """Return the digits of n, most significant first."""
    return sympy.ntheory.digits(n, base)[1:]


def bases(rng: Random, level: int) -> Candidate:
    n, base = rng.randint(10 ** (level + 1), 10 ** (level + 3)), rng.randint(2, 9)
    text = "".join(map(str, digits(n, base)))
    if level == 1:
        question = f"What is the base {base} number {text} in decimal?|Convert {text} from base {base} to decimal."
        return question, lambda: sympy.Poly([int(digit) for digit in text], X).eval(base)
    if level == 2:
        return f"Write the decimal number {n} in base {base}.|Convert {n} from decimal to base {base}.", lambda: text
    question = f"What is the sum of the digits of {n} in base {base}?|Write {n} in base {base} and add up its digits."
    return question, lambda: sum(digits(n, base))


def digit_sum(rng: Random, level: int) -> Candidate:
    a, n, d = rng.randint(2, 40 * level), rng.randint(6, 12 * 3**level), rng.randint(0, 9)
    if level < 3:
        text = f"What is the sum of the digits of {a}**{n}?|Add up the decimal digits of {a}**{n}."
        return text, lambda: sum(digits(Integer(a) ** n, 10))
    text = f"How many times does the digit {d} occur in {a}**{n}?|Count the digits equal to {d} in {a}**{n}."
    return text, lambda: digits(Integer(a) ** n, 10).count(d)


def factorials(rng: Random, level: int) -> Candidate:
    n = rng.randint(15 * level, 60 * level)
    k, m = rng.randint(3, n - 3), sympy.nextprime(rng.randint(n, 1000 * level))  # m is prime and > n: never 0
    if level == 1:
        text = f"In how many ways can you choose {k} of {n} people?|What is the binomial coefficient C({n}, {k})?"
        return text, lambda: sympy.binomial(n, k)
    what, value = f"{n}!", sympy.factorial(n)
    if level == 3:
        what, value = f"the binomial coefficient C({n}, {k})", sympy.binomial(n, k)
    return f"What is the remainder when {what} is divided by {m}?|Find {what} modulo {m}.", lambda: sympy.Mod(value, m)


def divisors(rng: Random, level: int) -> Candidate:
    n = math.prod(rng.randint(2, 15 * level) for _ in range(4))
    asked, value = (
        ("number of positive divisors", sympy.divisor_count),
        ("sum of all positive divisors", sympy.divisor_sigma),
        ("largest prime factor", lambda n: max(sympy.primefactors(n))),
    )[level - 1]
    return f"What is the {asked} of {n}?|Find the {asked} of {n}.", lambda: value(n)


def counting(rng: Random, level: int) -> Candidate:
    k = rng.randint(3, 20 * level)
    m = rng.choice([m for m in range(3, 20 * level) if k % m])  # otherwise "k but not m" has no solutions
    low = rng.randint(10, 500)
    high = low + rng.randint(200, 1000 * level)
    what = f"from {low} to {high} are divisible by {k}" + ("", f" or {m}", f" but not by {m}")[level - 1]
    by_k, by_m = (set(sympy.Range(-(-low // d) * d, high + 1, d)) for d in (k, m))
    text = f"How many integers {what}?|Count how many integers {what}."
    return text, lambda: len((by_k, by_k | by_m, by_k - by_m)[level - 1])


def recurrence(rng: Random, level: int) -> Candidate:
    first, k, c, n = rng.randint(1, 20), rng.randint(2, 2 * level + 1), rng.randint(1, 30), rng.randint(6, 8 * level)
    m, term = rng.randint(11, 999), Integer(first)
    for _ in range(n - 1):
        term = k * term + c
    rule = f"starts with {first}, and each next term is {k} times the one before plus {c}"
    which = f"term number {n} modulo {m}" if level == 3 else f"term number {n}"
    text = f"A sequence {rule}. What is {which}?|A list {rule}. Find {which}."
    return text, lambda: term % m if level == 3 else term


def shopping(rng: Random, level: int) -> Candidate:
    (a, b), (p, q) = rng.sample(range(12, 99), 2), rng.sample(range(3, 60), 2)
    total = Integer(a) * p + b * q
    paid = total + rng.randint(1, 500)
    who, (one, two) = rng.choice(("Ana", "Ben", "Mia", "Omar")), rng.sample(("pens", "mugs", "lamps", "books"), 2)
    basket = f"{a} {one} at {p} dollars each and {b} {two} at {q} dollars each"
    if level == 1:
        return f"{who} buys {basket}. What is the total price in dollars?", lambda: total
    if level == 2:
        text = f"{who} buys {basket}, and pays with {paid} dollars. How much change is due, in dollars?"
        return text, lambda: paid - total
    text = f"{who} has {total} dollars and buys {a} {one} at {p} dollars each."
    text += f" How many {two} at {q} dollars each can {who} still buy?"
    return text, lambda: sympy.solve(a * p + q * X - total)[0]


def rates(rng: Random, level: int) -> Candidate:
    u, v, t = (rng.randint(2, 12 * level) for _ in range(3))
    if level == 1:
        text = f"A car drives {u} hours at {40 + t} km/h and then {v} hours at {71 - t} km/h. How many km in all?"
        return text, lambda: Integer(u) * (40 + t) + v * (71 - t)
    if level == 2:
        text = f"Two cyclists {(u + v) * t} km apart ride towards each other at {u} km/h and {v} km/h."
        return f"{text} After how many hours do they meet?", lambda: sympy.solve(u * X + v * X - (u + v) * t)[0]
    a, b = u * (u + v), v * (u + v)
    text = f"One pump fills a tank in {a} minutes, another in {b} minutes. How many seconds do both need together?"
    return text, lambda: 60 * sympy.solve(X / a + X / b - 1)[0]


# The last three want several blocks of code, in which one computes with the output of another.


def product_digits(rng: Random, level: int) -> Candidate:
    a, b = rng.randint(10 ** (level + 1), 10 ** (level + 2)), rng.randint(12, 10 ** (level + 1))
    what = f"the sum of the digits of the product of {a} and {b}"
    return f"What is {what}?|Find {what}.", lambda: sum(digits(Integer(a) * b, 10))


def lcm_divisors(rng: Random, level: int) -> Candidate:
    factor = rng.randint(2, 30 * level)
    a, b = (factor * k for k in rng.sample(range(2, 30 * level), 2))
    what = f"the number of positive divisors of the least common multiple of {a} and {b}"
    return f"What is {what}?|Find {what}.", lambda: sympy.divisor_count(sympy.lcm(a, b))


def digits_power(rng: Random, level: int) -> Candidate:
    a, b, c = rng.randint(12, 99 * level), rng.randint(12, 99), rng.randint(2, 3)
    what, rule = f"what is {c} to the power s", f"s is the sum of the digits of {a} * {b}"
    return f"W{what[1:]}, if {rule}?|If {rule}, {what}?", lambda: Integer(c) ** sum(digits(Integer(a) * b, 10))


FAMILIES = (product, remainder, gcd_lcm, series, primes, linear, quadratic, bases)
FAMILIES += (digit_sum, factorials, divisors, counting, recurrence, shopping, rates)
FAMILIES += (product_digits, lcm_divisors, digits_power)
