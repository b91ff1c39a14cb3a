"""Answer equivalence, and the reward: does a prediction state the same mathematical object as the gold answer?"""

from __future__ import annotations

from thor.equivalence.compare import equal, undecided
from thor.equivalence.workers import pool
from thor.text import extract_answer
from thor.trajectory import Trajectory

MAX_CHARS = 2000  # longer answers are compared as text only
BOXES = (r"\boxed", r"\fbox")


def verify(prediction: str, gold: str, timeout: float = 5.0) -> bool:
    r"""Return whether `prediction` states the answer `gold`, by the rules of MATH-like benchmarks.

    Each argument is either a bare answer or a text that contains it in \boxed{}. 1/2, 0.5, \frac{1}{2} and 50% are
    equal. Units, degrees and "x =" may be missing on one side. Lists and sets are unordered, tuples are ordered.
    "1 or 2" is not "1". Decimals are exact, except those with ten or more digits, as programs print them. The relation
    is not symmetric: an equation is reduced to its right-hand side only if the gold answer is not an equation.

    timeout: seconds for one comparison; a comparison that takes longer returns False and is counted in `timeouts`.
    Blocks until it is decided, so an event loop calls it in a thread. Thread-safe, and usable after a fork. Raises
    RuntimeError if no worker process can be started, but never because of the content of the texts.
    """
    prediction, gold = _answer(prediction), _answer(gold)
    if max(len(prediction), len(gold)) > MAX_CHARS:
        return prediction.strip() == gold.strip()
    try:
        return equal(prediction, gold, undecided)
    except Exception:  # undecided, or a text that the rules fail on, which is False in a worker
        return pool.compare(prediction, gold, timeout)


def timeouts() -> int:
    """Return the number of comparisons of this process that took longer than their timeout."""
    return pool.timeouts


def grade(trajectory: Trajectory, tokenizer) -> float | None:
    r"""The reward R, whose mean is evaluation's accuracy: 1.0 if the last \boxed answer is correct, else 0.0.

    None if the gold answer is not known.
    """
    if not trajectory.problem.answer:
        return None
    answer = extract_answer(trajectory.text(tokenizer, policy_only=True))
    return float(answer is not None and verify(answer, trajectory.problem.answer))


def _answer(text: str) -> str:
    return (extract_answer(text) or "") if any(box in text for box in BOXES) else text
