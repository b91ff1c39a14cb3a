"""Demonstrations of tool-integrated reasoning, and the few-shot prompts that TIRGen builds from them.

The prompts are plain text for a small base model to continue. One line is one reasoning step; a blank line ends a
solution. Each prompt shows the demonstrations that are most similar to its question.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from thor.prompts import tir_step


class Step(NamedTuple):
    """The actor's step, the critic's rewrite of it (logic and code), and the output of the code."""

    step: str
    logic: str
    code: str
    output: str


class Demonstration(NamedTuple):
    """A question and the steps to its answer, which is the output of the last one."""

    question: str
    steps: tuple[Step, ...]

    @property
    def answer_line(self) -> str:
        return f"The answer is \\boxed{{{self.steps[-1].output}}}."


def load_demonstrations() -> list[Demonstration]:
    """Read the demonstrations that ship with the package."""
    lines = Path(__file__).with_name("few_shot.jsonl").read_text(encoding="utf-8").splitlines()
    rows = map(json.loads, lines)
    return [Demonstration(row["question"], tuple(Step(**step) for step in row["steps"])) for row in rows]


def words(text: str) -> set[str]:
    """Words and operators of a text. Numbers are excluded, because they do not indicate the type of question."""
    return set(re.findall(r"[a-z]+|[*+/=!^-]+", text.lower()))


DEMONSTRATIONS = load_demonstrations()
WORD_COUNTS = Counter(word for demonstration in DEMONSTRATIONS for word in words(demonstration.question))

# The critic also needs examples of steps for which it writes no code.
NO_CODE_EXAMPLES = "".join(
    f"Question: {question}\nStep: {step}\nRewrite: none\n\n"
    for question, step in (
        ("Is 2 even?", "Read the question carefully."),
        ("What is 12 * 12?", "The answer is \\boxed{144}."),
    )
)


def nearest_demonstrations(question: str, k: int = 2) -> list[Demonstration]:
    """Return the k demonstrations most similar to the question, the most similar last.

    The similarity is the sum of 1 / count over the shared words, divided by the square root of the same sum over all
    words of the demonstration.
    """
    asked = words(question)

    def similarity(demonstration: Demonstration) -> float:
        own = words(demonstration.question)  # fsum: the result must not depend on the iteration order of a set
        total = math.fsum(1 / WORD_COUNTS[word] for word in own)
        return math.fsum(1 / WORD_COUNTS[word] for word in own & asked) / math.sqrt(total)

    return sorted(DEMONSTRATIONS, key=similarity)[-k:]


def few_shot_actor(question: str) -> str:
    """Return the actor's few-shot prefix: complete solutions in the format in which the actor continues its own."""
    return "".join(
        f"Question: {d.question}\n"
        + "".join(f"{tir_step(s.logic, s.code)}```output\n{s.output}\n```\n" for s in d.steps)
        + f"{d.answer_line}\n\n"
        for d in nearest_demonstrations(question)
    )


def few_shot_plain(question: str) -> str:
    """Return the prefix for plain reasoning, whose solutions have no code."""
    return "".join(
        f"Question: {d.question}\n" + "".join(f"{s.logic}\n" for s in d.steps) + f"{d.answer_line}\n\n"
        for d in nearest_demonstrations(question)
    )


def few_shot_critic(question: str, step: str) -> str:
    """Return the critic's few-shot prefix: of each demonstration the step most similar to `step`, with its rewrite."""
    asked = words(step)
    steps = [
        (d.question, max(d.steps, key=lambda s: len(words(s.step) & asked))) for d in nearest_demonstrations(question)
    ]
    return NO_CODE_EXAMPLES + "".join(
        f"Question: {shown}\nStep: {s.step}\nRewrite: {tir_step(s.logic, s.code)}\n" for shown, s in steps
    )
