"""Which problems the next groups are sampled for: each epoch in a new order, without problems that carry no signal."""

from __future__ import annotations

import random

from thor.settings import UserError, derive_seed
from thor.trajectory import Problem


def pass_rates(text: str) -> tuple[float, float]:
    """The two numbers of --pass_rate_range. Raises UserError."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low <= high <= 1:
        raise UserError(f"--pass_rate_range {text}: must be two numbers between 0 and 1 in order, such as 0.1,0.9")
    return low, high


REVISIT = 0.25  # share of the problems outside the pass rate range that are drawn all the same, because rates change


class ProblemQueue:
    """Draws problems by seed, and remembers their pass rates. `state` is part of the checkpoint.

    low, high: a problem with a last pass rate outside [low, high] is skipped in three of four epochs. A group in which
    all or no answers are right has no advantage, so its samples are wasted. A problem that was never sampled is always
    drawn, unless its row has a pass rate.
    """

    def __init__(self, problems: list[Problem], seed: int, low: float = 0.0, high: float = 1.0) -> None:
        self.problems, self.seed, self.low, self.high = problems, seed, low, high
        self.state: dict = {"cursor": 0, "pass_rates": {}}
        self._epoch, self._order = -1, list(range(len(problems)))

    def draw(self, count: int) -> list[Problem]:
        """The next `count` problems."""
        drawn: list[Problem] = []
        while len(drawn) < count:
            epoch, i = divmod(self.state["cursor"], len(self.problems))
            if epoch != self._epoch:
                self._epoch, self._order = epoch, list(range(len(self.problems)))
                random.Random(derive_seed(self.seed, "order", epoch)).shuffle(self._order)
            self.state["cursor"] += 1
            problem = self.problems[self._order[i]]
            rate = self.state["pass_rates"].get(problem.id, problem.pass_rate)
            revisit = random.Random(derive_seed(self.seed, "revisit", epoch, problem.id)).random() < REVISIT
            if rate is None or self.low <= rate <= self.high or revisit:
                drawn.append(problem)
        return drawn

    def record(self, problem: Problem, rewards: list[float]) -> None:
        """Remember the pass rate of a group."""
        if rewards:
            self.state["pass_rates"][problem.id] = sum(rewards) / len(rewards)
