"""Answer equivalence: does a prediction state the same mathematical object as the gold answer?

Equal texts, plain numbers and words are settled here, exactly. Everything else goes to math-verify in a helper
process: a prediction is whatever a model wrote, so comparing it may run for ever, eat all memory or crash, and
math-verify's own time limit works on the main thread only. The helper is started at the first such comparison and kept.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from fractions import Fraction
from functools import partial

from thor.text import extract_answer
from thor.trajectory import Trajectory

MAX_CHARS = 2000  # a longer answer is compared as text only
MEMORY_BYTES = 1 << 30  # address space of the helper
STARTUP_SECONDS = 120  # importing sympy on a busy machine


def verify(prediction: str, gold: str, timeout: float = 5.0) -> bool:
    r"""Whether `prediction` states the answer `gold`, as MATH-like benchmarks judge it.

    Either may be the answer alone or a text with a \boxed{} in it. 1/2, 0.5, \frac{1}{2} and 50% agree; units,
    degrees and "x =" may be missing on one side; lists and sets have no order, tuples have one; "1 or 2" is not "1".
    Not symmetric: an equation is reduced to its right side only where the gold answer is none.

    timeout: seconds for one comparison, after which the answer is False. Safe in threads and after a fork. Never
    raises for what is in the texts; RuntimeError if math-verify cannot be started.
    """
    if r"\boxed" in prediction:
        prediction = extract_answer(prediction) or ""
    if r"\boxed" in gold:
        gold = extract_answer(gold) or ""
    if max(len(prediction), len(gold)) > MAX_CHARS:
        return prediction.strip() == gold.strip()
    prediction, gold = _clean(prediction), _clean(gold)
    plain, plain_gold = _plain(prediction), _plain(gold)
    if not plain or not plain_gold:
        return False
    if _squeeze(plain) == _squeeze(plain_gold):
        return True
    values, gold_values = _number(plain), _number(plain_gold)
    if values and gold_values:
        if len(values) == len(gold_values):  # both percentages or neither: no choice of readings
            return values[0] == gold_values[0]
        return not set(values).isdisjoint(gold_values)
    # math-verify reads words as products of letters, for which Carla is Clara, and drops the base of a numeral.
    if WORDS.fullmatch(plain_gold) or (BASED.fullmatch(plain) and BASED.fullmatch(plain_gold)):
        return _squeeze(plain).casefold() == _squeeze(plain_gold).casefold()
    if TUPLE.fullmatch(plain_gold):  # math-verify would take it for a set: keep its order, brackets may be missing
        if plain.startswith(r"\{"):
            return False
        if not re.search(r"[()\[\]]", plain):
            prediction = plain_gold[0] + prediction + plain_gold[-1]
    return _helper.compare(prediction, gold, timeout)


def grade(trajectory: Trajectory, tokenizer) -> float:
    r"""Reward R of a trajectory: 1.0 if the last \boxed of the policy's own text answers the problem, else 0.0."""
    answer = extract_answer(trajectory.text(tokenizer, policy_only=True))
    return float(answer is not None and verify(answer, trajectory.problem.answer))


# ---- the cheap part ----

CHARACTERS = str.maketrans(  # minus, en dash, middle dot, times, divided by, pi, infinity, degree, <=, >=, union
    {"\u2212": "-", "\u2013": "-", "\xb7": r"\cdot ", "\xd7": r"\times ", "\xf7": "/", "\u03c0": r"\pi "}
    | {"\u221e": r"\infty ", "\xb0": r"^\circ ", "\u2264": r"\le ", "\u2265": r"\ge ", "\u222a": r"\cup ", "\0": " "}
)
SPACING = re.compile(r"(?<!\\)\\(?:(?:left|right|displaystyle|q?quad)(?![A-Za-z])|[!,;: ()\[\]])|~|\\?\$|\{,\}")
PYTHON = re.compile(r"(?<![A-Za-z\\])(pi|sin|cos|tan|ln|log|exp|infty|infinity|inf|oo)(?![A-Za-z])")
TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
DEGREES = re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree")
WORDS = re.compile(r"[A-Za-z]{4,}(?:[ '-][A-Za-z]+)*")
BASED = re.compile(r"\w+_\{?\d+\}?")
TUPLE = re.compile(r"[(\[][^()\[\]]*,[^()\[\]]*[)\]]")
FRACTION = re.compile(r"\\frac\s*(?:\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d)\s*(\d))")
DECIMAL = r"\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+\.?\d*|\.\d+"
NOT_UNITS = "or|and|mod|times|plus|minus|sqrt|squared|cubed|dozen|hundred|thousand|[mb]illion|trillion|factorial"
NUMBER = re.compile(
    rf"([-+]?)\s*(?:(\d+)\s+(?=[^/]+/))?({DECIMAL})(?:\s*/\s*({DECIMAL}))?"  # sign, 1 of 1 1/2, top, bottom
    r"(?:(?:[eE]|\s*\\times\s*10\s*\^)\s*\{?([-+]?\d{1,3})\}?)?\s*(\\?%|percent)?"  # power of ten, percent
    rf"(?:\s+(?!(?:{NOT_UNITS})\b)[A-Za-z]{{3,}}(?:\s[A-Za-z]+){{0,2}})?"  # a unit in words; math-verify knows the rest
)


def _clean(text: str) -> str:
    """LaTeX without spacing commands and dollars; the Python ways to write powers, constants and functions undone."""
    text = text.translate(CHARACTERS).encode("utf-8", "replace").decode().replace("**", "^")
    text = SPACING.sub(lambda match: "," if match[0] == "{,}" else " ", text)
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text).strip().rstrip(".").strip()
    return PYTHON.sub(lambda match: r"\infty " if match[1][0] in "io" else f"\\{match[1]} ", text)


def _plain(text: str) -> str:
    """Further stripped to what is compared as text: no \\text, degrees, multiple spaces, or brackets round a letter."""
    text = " ".join(DEGREES.sub("", TEXT.sub(r"\1", text)).split())
    return re.sub(r"^\(([A-Za-z])\)$", r"\1", text)


def _squeeze(text: str) -> str:
    """Without the spaces that mean nothing: all but those of "1 1/2"."""
    return re.sub(r"(?<!\d) | (?!\d)", "", text)


def _number(plain: str) -> list[Fraction]:
    """Exact readings of a numeral: its value, and a hundredth of it for a percentage; none for anything else."""
    match = NUMBER.fullmatch(FRACTION.sub(r" \1\3/\2\4", plain).strip())
    if not match:
        return []
    sign, whole, top, bottom, power, percent = match.groups()
    top, bottom = (Fraction(x.replace(",", "").rstrip(".")) for x in (top, bottom or "1"))
    if bottom == 0:
        return []
    value = (int(whole or 0) + top / bottom) * Fraction(10) ** int(power or 0)
    value = -value if sign == "-" else value
    return [value, value / 100] if percent else [value]


# ---- the helper process ----


class _Helper:
    """Owner of at most one helper. Requests are JSON lines; the reply is one byte, or none if the helper died."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen | None = None

    def compare(self, prediction: str, gold: str, timeout: float) -> bool:
        request = json.dumps([prediction, gold, max(timeout, 0.001)]).encode() + b"\n"
        with self.lock:
            try:
                if self.process is None or self.process.poll() is not None:
                    self._start()
                self.process.stdin.write(request)
                reply = self.process.stdout.read(1)
            except BaseException:  # such as Ctrl-C: the reply under way must not be taken for that of the next request
                self.close()
                raise
            if not reply:
                self.close()
            return reply == b"1"

    def _start(self) -> None:
        # "-c" with our own sys.path: neither the user's __main__ nor a package that is not installed gets in the way.
        code = f"import sys; sys.path[:] = {sys.path!r}; import thor.verify; thor.verify._serve()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for us; the helper ends when its stdin does
        )
        if self.process.stdout.read(1) != b"R":
            self.close()
            raise RuntimeError("math-verify could not be started (see above); is 'math-verify>=0.9' installed?")

    def close(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.stdin.close()
            process.stdout.close()
            process.wait()


def _serve() -> None:
    """Main loop of the helper. The kernel ends it when a comparison is too long, even if the parent has gone."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    signal.setitimer(signal.ITIMER_REAL, STARTUP_SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    replies, silence = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)  # parsers print
    from math_verify import LatexExtractionConfig, parse
    from math_verify import verify as equal

    logging.disable(logging.CRITICAL)
    os.dup2(silence, 2)  # only what went wrong before here is worth showing
    # The answer as one box, read in no other way: else math-verify falls back on any number that it finds in the text.
    box = [LatexExtractionConfig(boxed_match_priority=0)]
    read = partial(parse, fallback_mode="no_fallback", extraction_mode="first_match", parsing_timeout=None)
    signal.setitimer(signal.ITIMER_REAL, 0)
    os.write(replies, b"R")
    for line in sys.stdin:
        *answers, timeout = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, timeout)
        try:
            prediction, gold = (read("\\boxed{" + answer + "}", box) for answer in answers)
            same = equal(gold, prediction, timeout_seconds=None)
        except Exception:  # includes MemoryError and RecursionError
            same = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(replies, b"1" if same else b"0")


_helper = _Helper()
os.register_at_fork(after_in_child=_helper.__init__)  # the helper and its lock are the parent's
atexit.register(lambda: _helper.close())
