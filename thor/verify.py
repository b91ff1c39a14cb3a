"""Answer equivalence: does a prediction state the same mathematical object as the gold answer?

Identical texts, plain numbers and words are compared here, exactly. math-verify compares everything else, in a helper
process: a prediction is arbitrary model output, so its comparison may run forever, exhaust the memory or crash, and the
time limit of math-verify works only in the main thread. The helper starts at the first such comparison and is reused.
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

MAX_CHARS = 2000  # longer answers are compared as text only
MEMORY_BYTES = 1 << 30  # limit on the address space of the helper process
STARTUP_SECONDS = 120  # limit on the start of the helper process: importing sympy is slow on a busy machine


def verify(prediction: str, gold: str, timeout: float = 5.0) -> bool:
    r"""Return whether `prediction` states the answer `gold`, by the rules of MATH-like benchmarks.

    Each argument is either a bare answer or a text that contains it in \boxed{}. 1/2, 0.5, \frac{1}{2} and 50% are
    equal. Units, degrees and "x =" may be missing on one side. Lists and sets are unordered, tuples are ordered.
    "1 or 2" is not "1". The relation is not symmetric: an equation is reduced to its right-hand side only if the gold
    answer is not an equation.

    timeout: seconds for one comparison; a comparison that takes longer returns False.
    Thread-safe, and usable after a fork. Raises RuntimeError if math-verify cannot be started, but never because of
    the content of the texts.
    """
    if r"\boxed" in prediction:
        prediction = extract_answer(prediction) or ""
    if r"\boxed" in gold:
        gold = extract_answer(gold) or ""
    if max(len(prediction), len(gold)) > MAX_CHARS:
        return prediction.strip() == gold.strip()
    prediction, gold = _normalize(prediction), _normalize(gold)
    plain, plain_gold = _strip_formatting(prediction), _strip_formatting(gold)
    if not plain or not plain_gold:
        return False
    if _remove_spaces(plain) == _remove_spaces(plain_gold):
        return True
    values, gold_values = _parse_number(plain), _parse_number(plain_gold)
    if values and gold_values:
        if len(values) == len(gold_values):  # both or neither are percentages: compare the values themselves
            return values[0] == gold_values[0]
        return not set(values).isdisjoint(gold_values)
    # math-verify reads words as products of letters (Carla equals Clara) and ignores the base of a numeral.
    if WORDS.fullmatch(plain_gold) or (NUMERAL_WITH_BASE.fullmatch(plain) and NUMERAL_WITH_BASE.fullmatch(plain_gold)):
        return _remove_spaces(plain).casefold() == _remove_spaces(plain_gold).casefold()
    if TUPLE.fullmatch(plain_gold):  # without brackets, math-verify would compare unordered sets
        if plain.startswith(r"\{"):
            return False
        if not re.search(r"[()\[\]]", plain):
            prediction = plain_gold[0] + prediction + plain_gold[-1]
    return _helper.compare(prediction, gold, timeout)


def grade(trajectory: Trajectory, tokenizer) -> float | None:
    r"""The reward R, whose mean is evaluation's accuracy: 1.0 if the last \boxed answer is correct, else 0.0.

    None if the gold answer is not known.
    """
    if not trajectory.problem.answer:
        return None
    answer = extract_answer(trajectory.text(tokenizer, policy_only=True))
    return float(answer is not None and verify(answer, trajectory.problem.answer))


# ---- normalization and numbers ----

CHARACTERS = str.maketrans(  # minus, en dash, middle dot, times, divided by, pi, infinity, degree, <=, >=, union
    {"\u2212": "-", "\u2013": "-", "\xb7": r"\cdot ", "\xd7": r"\times ", "\xf7": "/", "\u03c0": r"\pi "}
    | {"\u221e": r"\infty ", "\xb0": r"^\circ ", "\u2264": r"\le ", "\u2265": r"\ge ", "\u222a": r"\cup ", "\0": " "}
)
SPACING = re.compile(r"(?<!\\)\\(?:(?:left|right|displaystyle|q?quad)(?![A-Za-z])|[!,;: ()\[\]])|~|\\?\$|\{,\}")
PYTHON_NAME = re.compile(r"(?<![A-Za-z\\])(pi|sin|cos|tan|ln|log|exp|infty|infinity|inf|oo)(?![A-Za-z])")
TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
DEGREES = re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree")
WORDS = re.compile(r"[A-Za-z]{4,}(?:[ '-][A-Za-z]+)*")
NUMERAL_WITH_BASE = re.compile(r"\w+_\{?\d+\}?")
TUPLE = re.compile(r"[(\[][^()\[\]]*,[^()\[\]]*[)\]]")
FRACTION = re.compile(r"\\frac\s*(?:\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d)\s*(\d))")
DECIMAL = r"\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+\.?\d*|\.\d+"
NOT_UNITS = "or|and|mod|times|plus|minus|sqrt|squared|cubed|dozen|hundred|thousand|[mb]illion|trillion|factorial"
NUMBER = re.compile(
    rf"([-+]?)\s*(?:(\d+)\s+(?=[^/]+/))?"  # sign, integer part of a mixed number such as 1 1/2
    rf"({DECIMAL})(?:\s*/\s*({DECIMAL}))?"  # numerator, denominator
    r"(?:(?:[eE]|\s*\\times\s*10\s*\^)\s*\{?([-+]?\d{1,3})\}?)?\s*(\\?%|percent)?"  # power of ten, percent
    rf"(?:\s+(?!(?:{NOT_UNITS})\b)[A-Za-z]{{3,}}(?:\s[A-Za-z]+){{0,2}})?"  # unit in words; math-verify knows the others
)


def _normalize(text: str) -> str:
    """Remove LaTeX spacing commands and dollar signs, and rewrite Python powers, constants and functions as LaTeX."""
    text = text.translate(CHARACTERS).encode("utf-8", "replace").decode().replace("**", "^")
    text = SPACING.sub(lambda match: "," if match[0] == "{,}" else " ", text)
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text).strip().rstrip(".").strip()
    return PYTHON_NAME.sub(lambda match: r"\infty " if match[1][0] in "io" else f"\\{match[1]} ", text)


def _strip_formatting(text: str) -> str:
    """Remove \\text, degree signs, repeated spaces and parentheses around a single letter, for comparison as text."""
    text = " ".join(DEGREES.sub("", TEXT_COMMAND.sub(r"\1", text)).split())
    return re.sub(r"^\(([A-Za-z])\)$", r"\1", text)


def _remove_spaces(text: str) -> str:
    """Remove all spaces except those between digits, as in "1 1/2"."""
    return re.sub(r"(?<!\d) | (?!\d)", "", text)


def _parse_number(plain: str) -> list[Fraction]:
    """Return the possible values of a number, exactly: 50% is 50 or 1/2. Returns [] if `plain` is not a number."""
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


# ---- helper process ----


class _Helper:
    """Owns at most one helper process. A request is a line of JSON, the reply one byte, or none if the helper died."""

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
            except BaseException:  # such as Ctrl-C: the pending reply must not be read as the reply to the next request
                self.close()
                raise
            if not reply:
                self.close()
            return reply == b"1"

    def _start(self) -> None:
        # "-c" with this sys.path: does not run the user's __main__ again, and works if thor is not installed.
        code = f"import sys; sys.path[:] = {sys.path!r}; import thor.verify; thor.verify._serve()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # no Ctrl-C for the helper; it exits when its stdin is closed
        )
        if self.process.stdout.read(1) != b"R":
            self.close()
            raise RuntimeError("math-verify could not be started, see stderr (is 'math-verify>=0.9' installed?)")

    def close(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.stdin.close()
            process.stdout.close()
            process.wait()


def _serve() -> None:
    """Run the main loop of the helper. SIGALRM kills it if a comparison exceeds its timeout, even without a parent."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    signal.setitimer(signal.ITIMER_REAL, STARTUP_SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    replies, silence = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)  # the parsers print to stdout
    from math_verify import LatexExtractionConfig, parse
    from math_verify import verify as equal

    logging.disable(logging.CRITICAL)
    os.dup2(silence, 2)  # only errors during the start are shown
    # Parse the answer as one \boxed expression only: otherwise math-verify falls back to any number in the text.
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
os.register_at_fork(after_in_child=_helper.__init__)  # the helper and its lock belong to the parent
atexit.register(lambda: _helper.close())
