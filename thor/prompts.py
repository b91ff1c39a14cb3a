"""Every text that a model is given: the policy's prompt, observations, and TIRGen's templates for actor and critic."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass

from thor.text import encode

SYSTEM = "Solve the problem. Python blocks are run and their output is shown. Put the final answer in \\boxed{}."


def render_prompt(tokenizer, question: str) -> list[int]:
    """Ids of the policy's prompt: the chat template, rendered once; a tokenizer without one gets plain text."""
    if not tokenizer.chat_template:
        return encode(tokenizer, f"{SYSTEM}\n\nQuestion: {question}\nAnswer:\n")
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def observation_text(output: str, before: str) -> str:
    """The fenced output block that follows a code block; `before` is the sampled text that it is appended to."""
    return ("" if before.endswith("\n") else "\n") + f"```output\n{output}\n```\n"


# ---- TIRGen ---------------------------------------------------------------------------------------------------------
# Two templates. 'instruct' tells a capable chat model what to do. 'few-shot' shows a small one the demonstrations most
# like its question: plain text to complete, one line a reasoning step, a blank line where a solution ends. Both
# critics answer in the same form: the word "none", or a line of pure reasoning and one Python block.

ACTOR_INSTRUCT = """You solve mathematics problems in natural language, one small step after another. Do not write \
code: when a step needs exact computation, say what has to be computed and how; a program may then be inserted for \
you with its output, on which you can rely. When the answer is known, state it once in \\boxed{} and stop."""

CRITIC_INSTRUCT = """Below is a problem, its solution so far, and the next step of that solution. Decide whether \
the next step holds something that Python can do exactly: arithmetic, solving equations, enumeration, or a check.
If it does not, answer with the single word: none
If it does, answer with
1. the reasoning of the step alone, in one or two sentences, without any computed result;
2. one block that opens with ```python and closes with ```, complete in itself (imports included; nothing carries over
   from earlier blocks), with numpy and sympy at hand, that prints the result the step needs.

Problem: {question}

Solution so far:
{solution}

Next step:
{step}
"""


@dataclass(frozen=True)
class Example:
    """A demonstration: question, the actor's step, what the critic makes of it (reasoning, code), and the output."""

    question: str
    step: str
    logic: str
    code: str
    output: str


NO_CODE = Example("Is 2 even?", "Read the question carefully.", "", "", "")

FEW_SHOT = [
    Example(
        "What is 417 * 86 + 5039?",
        "Multiply 417 by 86 and add 5039: 35862 + 5039 = 40901.",
        "Multiply 417 by 86 and add 5039.",
        "print(417 * 86 + 5039)",
        "40901",
    ),
    Example(
        "Multiply 318 by 467.",
        "Multiply 318 by 467.",
        "Multiply 318 by 467.",
        "print(318 * 467)",
        "148506",
    ),
    Example(
        "What is the remainder when 17**45 is divided by 97?",
        "Raise 17 to the power 45 and reduce it modulo 97, which gives 12.",
        "Raise 17 to the power 45 and reduce it modulo 97.",
        "print(pow(17, 45, 97))",
        "20",
    ),
    Example(
        "Compute (12**31 + 8) mod 505.",
        "Compute 12**31, add 8 and reduce the sum modulo 505.",
        "Compute 12**31, add 8 and reduce the sum modulo 505.",
        "print((12**31 + 8) % 505)",
        "111",
    ),
    Example(
        "Find the greatest common divisor of 252 and 198.",
        "The greatest common divisor of 252 and 198 is 36.",
        "Compute the gcd of 252 and 198.",
        "from math import gcd\nprint(gcd(252, 198))",
        "18",
    ),
    Example(
        "What is the least common multiple of 84, 90 and 33?",
        "Compute the lcm of 84, 90 and 33.",
        "Compute the lcm of 84, 90 and 33.",
        "from math import lcm\nprint(lcm(84, 90, 33))",
        "13860",
    ),
    Example(
        "Add up the squares of all integers from 5 to 30.",
        "Add k**2 for every k from 5 to 30.",
        "Add k**2 for every k from 5 to 30.",
        "print(sum(k**2 for k in range(5, 30 + 1)))",
        "9425",
    ),
    Example(
        "What is the sum of the multiples of 7 from 20 to 150?",
        "Add up those k from 20 to 150 that 7 divides.",
        "Add up those k from 20 to 150 that 7 divides.",
        "print(sum(k for k in range(20, 150 + 1) if k % 7 == 0))",
        "1596",
    ),
    Example(
        "Count the primes between 100 and 300.",
        "List the primes from 100 to 300 and count them.",
        "List the primes from 100 to 300 and count them.",
        "from sympy import primerange\nprint(len(list(primerange(100, 300 + 1))))",
        "37",
    ),
    Example(
        "What is the sum of primes below 90?",
        "List the primes below 90 and add them up: the sum is 900.",
        "List the primes below 90 and add them up.",
        "from sympy import primerange\nprint(sum(primerange(2, 90)))",
        "963",
    ),
    Example(
        "Find x such that 7*x + 12 = 3*x + 80.",
        "Solve the equation for x.",
        "Solve the equation for x.",
        "from sympy import symbols, solve\nx = symbols('x')\nprint(solve(7*x + 12 - (3*x + 80), x)[0])",
        "17",
    ),
    Example(
        "If 3*x + 5*y = 61 and 7*x + 2*y = 36, what is x + y?",
        "Solve both equations for x and y and add them.",
        "Solve both equations for x and y and add them.",
        "from sympy import symbols, solve\nx, y = symbols('x y')\n"
        "s = solve([3*x + 5*y - 61, 7*x + 2*y - 36], [x, y])\nprint(s[x] + s[y])",
        "13",
    ),
    Example(
        "What is the larger root of x**2 - 9*x - 52 = 0?",
        "Solve the equation for x and take the larger root, x = 12.",
        "Solve the equation for x and take the larger root.",
        "from sympy import symbols, solve\nx = symbols('x')\nprint(max(solve(x**2 - 9*x - 52, x)))",
        "13",
    ),
    Example(
        "Find the sum of the squares of the roots of x**2 - 8*x + 15 = 0.",
        "Solve the equation for x and add the squares of the roots.",
        "Solve the equation for x and add the squares of the roots.",
        "from sympy import symbols, solve\nx = symbols('x')\nprint(sum(r**2 for r in solve(x**2 - 8*x + 15, x)))",
        "34",
    ),
    Example(
        "Write the decimal number 500 in base 6.",
        "Divide 500 by 6 again and again and collect the remainders.",
        "Divide 500 by 6 again and again and collect the remainders.",
        "n, digits = 500, ''\nwhile n:\n    digits = str(n % 6) + digits\n    n //= 6\nprint(digits)",
        "2152",
    ),
    Example(
        "Convert 20112 from base 3 to decimal.",
        "Read 20112 as a number in base 3.",
        "Read 20112 as a number in base 3.",
        "print(int('20112', 3))",
        "176",
    ),
    Example(
        "What is the sum of the digits of 3**50?",
        "Compute 3**50 and add up its digits.",
        "Compute 3**50 and add up its digits.",
        "print(sum(int(d) for d in str(3**50)))",
        "144",
    ),
    Example(
        "How many times does the digit 4 occur in 7**25?",
        "Compute 7**25 and count the digit 4.",
        "Compute 7**25 and count the digit 4.",
        "print(str(7**25).count('4'))",
        "2",
    ),
    Example(
        "In how many ways can you choose 4 of 20 books?",
        "This is the binomial coefficient C(20, 4) = 4845.",
        "Compute the binomial coefficient C(20, 4).",
        "from math import comb\nprint(comb(20, 4))",
        "4845",
    ),
    Example(
        "What is the remainder when 25! is divided by 641?",
        "Compute 25! and reduce it modulo 641.",
        "Compute 25! and reduce it modulo 641.",
        "from math import factorial\nprint(factorial(25) % 641)",
        "202",
    ),
    Example(
        "Find the number of positive divisors of 3600.",
        "List the divisors of 3600 and count them.",
        "List the divisors of 3600 and count them.",
        "from sympy import divisors\nprint(len(divisors(3600)))",
        "45",
    ),
    Example(
        "What is the largest prime factor of 8190?",
        "Factor 8190 and take the largest prime, 91.",
        "Factor 8190 and take the largest prime.",
        "from sympy import primefactors\nprint(max(primefactors(8190)))",
        "13",
    ),
    Example(
        "How many integers from 20 to 400 are divisible by 7 but not by 3?",
        "Count the integers from 20 to 400 that 7 divides and 3 does not.",
        "Count the integers from 20 to 400 that 7 divides and 3 does not.",
        "print(sum(1 for n in range(20, 400 + 1) if n % 7 == 0 and n % 3 != 0))",
        "36",
    ),
    Example(
        "A list starts with 4, and each next term is 3 times the one before plus 5. Find term number 8.",
        "Start with 4 and apply the rule 8 - 1 times.",
        "Start with 4 and apply the rule 8 - 1 times.",
        "a = 4\nfor _ in range(8 - 1):\n    a = 3 * a + 5\nprint(a)",
        "14213",
    ),
    Example(
        "Anna buys 34 chairs at 27 dollars each and 12 tables at 85 dollars each, and pays with 2000"
        " dollars. How much change is due, in dollars?",
        "Subtract the prices of the chairs and of the tables from 2000: 2000 - 918 - 1020 = 162.",
        "Subtract the prices of the chairs and of the tables from 2000.",
        "print(2000 - 34 * 27 - 12 * 85)",
        "62",
    ),
    Example(
        "Leo has 900 dollars and buys 14 bags at 25 dollars each. How many caps at 13 dollars each can Leo still buy?",
        "Subtract the price of the bags from 900 and divide by 13.",
        "Subtract the price of the bags from 900 and divide by 13.",
        "print((900 - 14 * 25) // 13)",
        "42",
    ),
    Example(
        "A train drives 4 hours at 52 km/h and then 3 hours at 75 km/h. How many km in all?",
        "Multiply the hours by the speeds and add: 208 + 225 = 433.",
        "Multiply the hours by the speeds and add.",
        "print(4 * 52 + 3 * 75)",
        "433",
    ),
    Example(
        "Two boats 270 km apart move towards each other at 12 km/h and 18 km/h. After how many hours do they meet?",
        "Divide the distance by the sum of the speeds.",
        "Divide the distance by the sum of the speeds.",
        "print(270 // (12 + 18))",
        "9",
    ),
    Example(
        "One tap fills a pool in 120 minutes, another in 180 minutes. How many minutes do both need together?",
        "In a minute both fill 1/120 + 1/180 of the pool.",
        "In a minute both fill 1/120 + 1/180 of the pool.",
        "from sympy import Rational\nprint(1 / (Rational(1, 120) + Rational(1, 180)))",
        "72",
    ),
]


def words(text: str) -> set[str]:
    """What two questions are compared by: words and operators, but no numbers."""
    return set(re.findall(r"[a-z]+|[*+/=!^-]+", text.lower()))


RARITY = Counter(word for example in FEW_SHOT for word in words(example.question))


def nearest_examples(question: str, k: int = 2) -> list[Example]:
    """The k demonstrations most like the question (shared words, rare ones count more), the nearest last."""

    def likeness(example: Example) -> float:
        own = words(example.question)
        weight = sum(1 / RARITY[word] for word in own)
        return sum(1 / RARITY[word] for word in own & words(question)) / math.sqrt(weight)

    return sorted(FEW_SHOT, key=likeness)[-k:]


def tir_step(logic: str, code: str) -> str:
    """Reasoning and block as they stand in a trajectory."""
    return f"{logic}\n```python\n{code}\n```\n"


def few_shot_actor(question: str) -> str:
    """Preamble of the small actor: whole solutions, in the form in which its own will be continued."""
    return "".join(
        f"Question: {e.question}\n{tir_step(e.logic, e.code)}```output\n{e.output}\n```\n"
        f"The answer is \\boxed{{{e.output}}}.\n\n"
        for e in nearest_examples(question)
    )


def few_shot_critic(question: str) -> str:
    """Preamble of the small critic: steps of an actor, and what to make of them."""
    return f"Question: {NO_CODE.question}\nStep: {NO_CODE.step}\nRewrite: none\n\n" + "".join(
        f"Question: {e.question}\nStep: {e.step}\nRewrite: {tir_step(e.logic, e.code)}\n"
        for e in nearest_examples(question)
    )
