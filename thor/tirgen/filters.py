"""The multi-stage filter (paper, section 3.1): which drafts become training data, and why the others do not.

Stages 1 to 4 judge one draft at a time. Stages 5 and 6 choose among small records of those that passed, so that memory
does not grow with the length of the drafts.
"""

from __future__ import annotations

import ast
import random
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from thor.settings import by_model, derive_seed, setting
from thor.tirgen.critic import CJK, NUMBER, first_block, is_plain_call, numbers, parse_nodes, remarked_outputs
from thor.tirgen.draft import END_THINK, THINK, Draft


@dataclass(frozen=True)
class FilterSettings:
    """Flags of the filter."""

    min_chars: int = setting(20, "minimum characters of a trajectory", "filter", min=0)
    max_chars: int = setting(70_000, "maximum characters of a trajectory", "filter", min=1)
    min_substantial: float = by_model(
        0.0,
        0.6,
        "minimum share of blocks with a library call or control flow (paper: 0.6)",
        "filter",
        min=0,
        max=1,
    )
    code_free_share: float = setting(
        0.1, "maximum share without code; and of problems that prefer one without", "filter", min=0, max=1
    )
    keep_one_call: float = by_model(
        1.0, 0.5, "share to keep of one-call trajectories (official: 0.5)", "filter", min=0, max=1
    )
    keep_easy: float = setting(0.5, "share to keep of problems plain reasoning always solves", "filter", min=0, max=1)
    seed: int = setting(0, "random seed of problems, sampling and filter", "run")


# ---- stages 1 to 4: each returns why a draft is dropped, or "" ------------------------------------------------------


def answer_fault(draft: Draft, settings: FilterSettings) -> str:
    """Stage 1: the answer is correct, and every code block passed."""
    if draft.dropped or any(status != "ok" for status in draft.statuses):
        return draft.dropped or "code_failed"
    return "" if draft.correct else "no_answer" if draft.answer is None else "wrong"


def format_fault(draft: Draft, settings: FilterSettings) -> str:
    """Stage 2: the actor ended it, its thought is complete, only executed code, balanced math, one language, length."""
    own = draft.policy_text
    prose = re.sub(r"^```.*?^```", "", own, flags=re.DOTALL | re.MULTILINE)
    opened, closed = own.count(THINK), own.count(END_THINK)
    faults = {
        "unfinished": not draft.finished,
        "thought": not opened == closed <= 1 or own.find(THINK) > own.find(END_THINK),
        "code_after_thought": "```" in own.partition(END_THINK)[2],
        "math": not has_balanced_math(prose),
        "language": not has_one_language(prose),
        "short": len(draft.text) < settings.min_chars,
        "long": len(draft.text) > settings.max_chars,
    }
    reason = next((reason for reason, fault in faults.items() if fault), "")
    reason = reason or block_fault(draft.segments) or claim_fault(draft)
    shown = [first_block(text).code for text, own in draft.segments if own]
    ran = [code.rstrip() for code in draft.codes]
    return reason or ("" if [code.rstrip() for code in shown if code is not None] == ran else "other_code")


def block_fault(segments: list[tuple[str, bool]]) -> str:
    """No output is learned that was not observed: each block was run, has prose before it, and is the only fence."""
    for i, (text, own) in enumerate(segments):
        observed = i + 1 < len(segments) and not segments[i + 1][1]
        block = first_block(text)
        if not own or not (observed or FENCE.search(text)):
            continue
        if not observed or not block.closed or text[block.close_end :].strip():
            return "stray_fence"
        if FENCE.search(text[: block.open_at]) or FENCE_LINE.search(block.code):
            return "stray_fence"
        if not re.search(r"\w", text[: block.open_at].replace(THINK, "")):
            return "empty_thought"
    return ""


FENCE_LINE = re.compile(r"^\s*(```|~~~)", re.MULTILINE)
FENCE = re.compile(r"^[\s>*+-]*(```|~~~)|```\s*output", re.MULTILINE | re.IGNORECASE)  # in prose also quoted


def claim_fault(draft: Draft) -> str:
    """Prose, comments and strings call no number an output that no run before them had."""
    known = numbers(draft.problem.question)
    for text, own in draft.segments:
        if not own:
            known |= numbers(text)
            continue
        block = first_block(text)
        prose = text if block.open_at < 0 else text[: block.open_at]
        claimed = numbers(" ; ".join(PROSE_CLAIM.findall(prose))) | remarked_outputs(block.code or "")
        if claimed - known:
            return "claimed_output"
    return ""


PROSE_CLAIM = re.compile(  # "Output: 5", "The code prints 5"
    rf"(?:^\W*(?:the\s+)?output|\b(?:code|program|script|it)\b[^.\n]{{0,20}}\b(?:prints?|outputs?))\W{{0,6}}({NUMBER.pattern})",
    re.IGNORECASE | re.MULTILINE,
)


def repetition_fault(draft: Draft, settings: FilterSettings) -> str:
    """Stage 3: no substring of 20 characters occurs more than 20 times. Tool output does not count."""
    return "repetition" if highest_count(draft.policy_text, 20) > 20 else ""


def code_fault(draft: Draft, settings: FilterSettings) -> str:
    """Stage 4: enough of the blocks call a library or use control flow. A draft without code passes."""
    substantial = sum(map(is_substantial, draft.codes))
    return "trivial_code" if substantial < settings.min_substantial * len(draft.codes) else ""


STAGES = {
    "correct, code passed": answer_fault,
    "format": format_fault,
    "no repetition": repetition_fault,
    "code quality": code_fault,
}


def first_fault(draft: Draft, settings: FilterSettings) -> tuple[str, str]:
    """(stage, reason) of the first of these stages that drops the draft, or ("", "")."""
    for stage, fault in STAGES.items():
        if reason := fault(draft, settings):
            return stage, reason
    return "", ""


def has_balanced_math(prose: str) -> bool:
    r"""Whether \( \), \[ \], environments, $$ and $ are paired. A dollar sign next to a number may be a currency sign.

    $ does not pair across a blank line. If an odd number of signs cannot be currency, one of them needs a partner among
    the others: one before a number to the left, or one after a number to the right.
    """
    for opening, closing in ((r"\(", r"\)"), (r"\[", r"\]")):
        # a double backslash is a line break, so that "\\[2pt]" opens nothing
        signs = re.findall(r"\\\\|\\[()\[\]]", prose)
        depth = 0
        for sign in signs:
            depth += (sign == opening) - (sign == closing)
            if depth not in (0, 1):
                return False
        if depth:
            return False
    open_environments: list[str] = []
    for kind, name in re.findall(r"\\(begin|end)\s*\{([^{}]*)\}", prose):
        if kind == "begin":
            open_environments.append(name)
        elif not open_environments or open_environments.pop() != name:
            return False
    prose = re.sub(r"\\.", "", prose, flags=re.DOTALL)  # "\$" is a dollar sign in math and in prose
    if open_environments or prose.count("$$") % 2:
        return False
    return all(_has_paired_dollars(part) for part in re.split(r"\n\s*\n", prose.replace("$$", "")))


def _has_paired_dollars(paragraph: str) -> bool:
    signs = list(re.finditer(r"\$", paragraph))
    before = [bool(re.match(r"\s?[-+]?\.?\d", paragraph[sign.end() : sign.end() + 4])) for sign in signs]  # as in $5
    after = [bool(re.search(r"\d\s?$", paragraph[max(0, sign.start() - 2) : sign.start()])) for sign in signs]  # 5$
    certain = [i for i in range(len(signs)) if not before[i] and not after[i]]
    if len(certain) % 2 == 0:
        return True
    return any(before[: certain[-1]]) or any(after[certain[0] + 1 :])


def has_one_language(prose: str) -> bool:
    """Whether at most a twentieth of the letters is of another script than the others.

    Formulas, LaTeX commands and Latin words of up to three letters (variables, sin, cm) belong to no language, and
    Greek letters are mathematics.
    """
    text = re.sub(r"\$[^$]*\$|\\\(.*?\\\)|\\\[.*?\\\]|\\[A-Za-z]+(\{[^{}]*\})?", " ", prose, flags=re.DOTALL)
    latin = sum(map(len, re.findall(r"[A-Za-z\u00c0-\u024f]{4,}", text)))
    others = (len(re.findall(f"[{script}]", text)) for script in SCRIPTS)
    *rest, most = sorted([latin, *others])
    return sum(rest) <= 0.05 * (sum(rest) + most)


SCRIPTS = ("\u0400-\u052f", "\u0530-\u0e7f", CJK, "\uac00-\ud7af")  # Cyrillic; Armenian to Thai; CJK; Hangul


def highest_count(text: str, n: int) -> int:
    """How often the most frequent substring of n characters occurs, with overlaps. Linear time, by 64-bit hashes."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    count = len(codes) - n + 1
    if count < 1:
        return 0
    hashes = np.zeros(count, np.uint64)
    for i in range(n):  # a polynomial in an odd constant, modulo 2**64
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + codes[i : i + count]
    hashes.sort()
    ends = np.flatnonzero(np.append(hashes[1:] != hashes[:-1], True))
    return int(np.diff(ends, prepend=-1).max())


CONTROL_FLOW = (ast.For, ast.While, ast.If, ast.IfExp, ast.FunctionDef, ast.Lambda, ast.ClassDef, ast.Try, ast.With)
CONTROL_FLOW += (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Match)


def is_substantial(code: str) -> bool:
    """Whether code uses control flow, or calls more than what prints and converts values. Judged on its syntax tree."""
    nodes = parse_nodes(code) or []
    return any(isinstance(n, CONTROL_FLOW) or (isinstance(n, ast.Call) and not is_plain_call(n)) for n in nodes)


# ---- stages 5 and 6: choose among those that passed -----------------------------------------------------------------


class Candidate(NamedTuple):
    """A draft that passed stages 1 to 4. where: anything that finds the draft again."""

    name: str
    problem: str
    calls: int
    where: Any


@dataclass
class Rates:
    """How often the tries at one problem were correct, with code and by plain reasoning."""

    tries: int = 0
    correct: int = 0
    plain_tries: int = 0
    plain_correct: int = 0

    def count(self, draft: Draft) -> None:
        if draft.dropped in ("infra", "rejected"):  # says nothing about the problem
            return
        if draft.plain:
            self.plain_tries += 1
            self.plain_correct += draft.correct
        else:
            self.tries += 1
            self.correct += draft.correct

    @property
    def pass_rate(self) -> float | None:
        return self.correct / self.tries if self.tries else None

    @property
    def plain_pass_rate(self) -> float | None:
        return self.plain_correct / self.plain_tries if self.plain_tries else None


def one_per_problem(candidates: list[Candidate], settings: FilterSettings) -> list[Candidate]:
    """Stage 5: a random candidate of each problem, in the order of their names.

    Those with code are preferred, or at `code_free_share` of the problems, chosen at random, those without.
    """
    groups: dict[str, list[Candidate]] = {}
    for candidate in sorted(candidates, key=lambda c: natural_key(c.name)):
        groups.setdefault(candidate.problem, []).append(candidate)
    kept = []
    for problem, group in groups.items():
        rng = random.Random(derive_seed(settings.seed, "one per problem", problem))
        without_code = rng.random() < settings.code_free_share
        kept.append(rng.choice([c for c in group if (c.calls == 0) == without_code] or group))
    return kept


def balance(candidates: list[Candidate], rates: dict[str, Rates], settings: FilterSettings) -> list[Candidate]:
    """Stage 6: thin one-call trajectories and easy problems, within each stratum of calls and difficulty."""
    strata: dict[Hashable, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        strata[min(candidate.calls, 3), difficulty(rates[candidate.problem].plain_pass_rate)].append(candidate)
    kept: set[str] = set()
    for (calls, level), stratum in strata.items():
        share = (settings.keep_one_call if calls == 1 else 1.0) * (settings.keep_easy if level == "always" else 1.0)
        kept |= {candidate.name for candidate in thin(stratum, share, settings.seed)}
    return [candidate for candidate in candidates if candidate.name in kept]


def limit_code_free(candidates: list[Candidate], settings: FilterSettings) -> list[Candidate]:
    """The end of stage 6: trajectories without code are at most `code_free_share` of the result."""
    plain = [candidate for candidate in candidates if candidate.calls == 0]
    wanted = settings.code_free_share * (len(candidates) - len(plain)) / max(1e-9, 1 - settings.code_free_share)
    kept = {c.name for c in thin(plain, min(1.0, wanted / max(1, len(plain))), settings.seed, exact=True)}
    return [candidate for candidate in candidates if candidate.calls or candidate.name in kept]


def thin(candidates: list[Candidate], share: float, seed: int, exact: bool = False) -> list[Candidate]:
    """A random `share` of the candidates. What is left over of a whole number is rounded at random, unless `exact`."""
    order = sorted(candidates, key=lambda c: derive_seed(seed, "thin", c.name))
    spare = 0.0 if exact or not order else random.Random(derive_seed(seed, "round", order[0].name)).random()
    return order[: int(share * len(order) + spare + 1e-9)]


def difficulty(plain_pass_rate: float | None) -> str:
    """The stratum of a problem by how often plain reasoning solves it."""
    if plain_pass_rate is None:
        return "unknown"
    return {0.0: "never", 1.0: "always"}.get(plain_pass_rate, "seldom" if plain_pass_rate <= 0.5 else "often")


def natural_key(name: str) -> list:
    """Sorts numbers inside names by value."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"(\d+)", name)]


# ---- all stages -----------------------------------------------------------------------------------------------------


@dataclass
class Selection:
    """What the filter chose, and its counts."""

    kept: list[Candidate] = field(default_factory=list)
    funnel: dict[str, int] = field(default_factory=dict)  # stage -> drafts that are left after it
    reasons: dict[str, Counter[str]] = field(default_factory=dict)  # stage -> reason -> drafts dropped
    rates: dict[str, Rates] = field(default_factory=lambda: defaultdict(Rates))  # problem -> its pass rates
    rejected: Counter[str] = field(default_factory=Counter)  # of all tries, as in Draft
    errors: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)


def select(drafts: Iterable[tuple[Any, Draft]], settings: FilterSettings) -> Selection:
    """Apply all stages to pairs (where, draft). Holds one draft at a time, and a small record of each that passes."""
    result = Selection(funnel={"tried": 0}, reasons={stage: Counter() for stage in STAGES})
    candidates, rates = [], result.rates
    for where, draft in drafts:
        rates[draft.problem.id].count(draft)
        result.rejected += draft.rejected
        result.errors += draft.errors
        result.tokens += draft.tokens
        if draft.plain:
            continue
        result.funnel["tried"] += 1
        stage, reason = first_fault(draft, settings)
        if stage:
            result.reasons[stage][reason] += 1
        else:
            candidates.append(Candidate(draft.name, draft.problem.id, len(draft.codes), where))
    left = result.funnel["tried"]
    for stage, reasons in result.reasons.items():
        left -= reasons.total()
        result.funnel[stage] = left
    for stage, choose in {
        "one per problem": lambda c: one_per_problem(c, settings),
        "balance": lambda c: balance(c, rates, settings),
        "code-free share": lambda c: limit_code_free(c, settings),
    }.items():
        candidates = choose(candidates)
        result.funnel[stage] = len(candidates)
    result.kept = candidates
    return result
