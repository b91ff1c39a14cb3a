"""Which problems a run works on: those of its shard that are not also in a test set; and its tries at them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from thor.demo import nearest_demonstrations
from thor.settings import UserError
from thor.tirgen.critic import CJK
from thor.tirgen.roles import FEW_SHOT
from thor.trajectory import Problem

NGRAM = 13  # words


def normalize(question: str) -> list[str]:
    """The words, numbers and operators of a question in lower case. Each character of Chinese is a word.

    Other punctuation, hyphens in words and the backslashes of LaTeX commands have no effect.
    """
    text = re.sub(r"(?<=[^\W\d_])-(?=[^\W\d_])", " ", question.lower())
    return re.findall(rf"[{CJK}]|(?:(?![{CJK}])[^\W_])+|[-+*/^=<>]", text)


class Overlap:
    """Finds problems whose question has the same words as one of a test set, or 13 words in a row from one.

    Rows that occur in several questions are set phrases, such as how to write the answer, and do not count.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.questions: set[int] = set()
        counts: Counter[int] = Counter()
        for problem in problems:
            words = normalize(problem.question)
            if hash(tuple(words)) not in self.questions:
                counts.update(ngrams(words))
            self.questions.add(hash(tuple(words)))
        self.ngrams = {ngram for ngram, count in counts.items() if count == 1}

    def __contains__(self, problem: Problem) -> bool:
        words = normalize(problem.question)
        return hash(tuple(words)) in self.questions or not self.ngrams.isdisjoint(ngrams(words))


def ngrams(words: list[str]) -> set[int]:
    return {hash(tuple(words[i : i + NGRAM])) for i in range(len(words) - NGRAM + 1)}


def exclude(
    problems: list[Problem], names: str, load: Callable[[str], list[Problem]]
) -> tuple[list[Problem], dict[str, int]]:
    """Leave out the problems that are also in one of the test sets `names`. Returns the others, and counts by name."""
    counts = {}
    for name in filter(None, map(str.strip, names.split(","))):
        overlap = Overlap(load(name))
        kept = [problem for problem in problems if problem not in overlap]
        counts[name], problems = len(problems) - len(kept), kept
    return problems, counts


def take_shard(problems: list[Problem], shard: str) -> list[Problem]:
    """Every n-th problem from the i-th, for the shard "i/n". Raises UserError."""
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--shard {shard}: must be i/n with i from 1 to n, such as 1/8")
    return problems[int(match[1]) - 1 :: int(match[2])]


def list_tries(problems: list[Problem], settings: Any) -> Iterator[tuple[str, Problem, bool]]:
    """(name, problem, whether it is plain reasoning) of all tries.

    Those of a problem, and of problems with the same demonstrations, are neighbours, so that their common prefix stays
    in the engine's cache.
    """
    if settings.actor_prompt == FEW_SHOT:
        problems = sorted(problems, key=lambda p: [d.question for d in nearest_demonstrations(p.question)])
    for problem in problems:
        yield from ((f"{problem.id}#{k}", problem, False) for k in range(settings.tries))
        yield from ((f"{problem.id}#plain{k}", problem, True) for k in range(settings.plain_tries))
