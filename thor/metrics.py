"""Metrics of an evaluation, with bootstrap intervals over problems: pure functions of graded samples, and tables.

For P problems with n samples each, c of them right:

    accuracy   avg@n: mean of c / n
    pass@k     mean of 1 - C(n - c, k) / C(n, k), an unbiased estimate of P(at least one of k samples is right)
    maj@n      share of problems whose most frequent answer is right; equal answers are those that `verify` calls equal
    bon@n      best of n: share of problems where the sample is right whose code passed most often

Of maj@n and bon@n, ties count as the mean of what is tied. bon@n is selection without the gold answer (paper: BoN).
Every metric is one sum over problems divided by another, so one bootstrap over problems serves all of them.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from thor.settings import derive_seed

ROUNDS = 1000  # bootstrap replicates
AVERAGE = "average"  # of all sources, each with the same weight

Summary = dict[str, Any]  # metric -> [value, low, high] with NaN where it is undefined, and counts


@dataclass(frozen=True)
class Score:
    """What the metrics need to know about one graded sample."""

    source: str  # benchmark or file
    id: str  # of the problem
    sample: int  # number among the samples of the problem
    reward: float | None  # 1.0 if right, else 0.0; None if the sandbox failed: such a sample does not count
    answer: str | None  # contents of the last box
    vote: int | None  # class of equal answers within the problem; -1 without an answer, None for code problems
    finish: str
    tokens: int  # sampled tokens of the response
    discarded: int  # sampled tokens that self-correction removed
    corrections: int
    calls: list[str]  # status of each executed block

    @classmethod
    def from_dict(cls, record: dict) -> Score:
        """Read a record of trajectories.jsonl, which has other fields too."""
        return cls(**{field.name: record[field.name] for field in fields(cls)})


# ---- one problem ----------------------------------------------------------------------------------------------------


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of the chance that k samples contain a right one, from n samples of which c are right."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def equal_classes(answers: Sequence[str | None], equal: Callable[[str, str], bool]) -> list[int]:
    """Number the classes of equal answers in order of appearance; None is -1.

    An answer is compared with the first one of each class, both ways, because `equal` may not be symmetric.
    """
    firsts: list[str] = []

    def find(answer: str) -> int:
        for i, first in enumerate(firsts):
            if answer == first or equal(answer, first) or equal(first, answer):
                return i
        firsts.append(answer)
        return len(firsts) - 1

    return [-1 if answer is None else find(answer) for answer in answers]


def majority(samples: Sequence[Score]) -> float:
    """Reward of the most frequent answer; the mean over all that are. 0.0 if no sample has an answer."""
    counts = Counter(s.vote for s in samples if s.vote >= 0)
    most = max(counts.values(), default=0)
    rewards = [np.mean([s.reward for s in samples if s.vote == vote]) for vote, n in counts.items() if n == most]
    return float(np.mean(rewards)) if rewards else 0.0


def best_of_n(samples: Sequence[Score]) -> float:
    """Mean reward of the samples with the highest share of blocks that passed; 0 for a sample without code."""
    rates = [s.calls.count("ok") / max(1, len(s.calls)) for s in samples]
    return float(np.mean([s.reward for s, rate in zip(samples, rates, strict=True) if rate == max(rates)]))


def sizes(n: int) -> list[int]:
    """The k of pass@k: powers of two and n itself, above 1."""
    return sorted({2**i for i in range(1, n.bit_length()) if 2**i <= n} | {n}) if n > 1 else []


def ratios(samples: Sequence[Score], n: int) -> dict[str, tuple[float, float]]:
    """The terms (numerator, denominator) of one problem for each metric. n: number of samples of a problem.

    samples: those of the problem that count, at least one. Denominators that are 0 leave the problem out of a metric.
    """
    count, right = len(samples), sum(s.reward for s in samples)
    rewards: dict[str, list[float]] = {"all_passed": [], "some_failed": [], "no_code": []}
    for s in samples:
        passed = all(status == "ok" for status in s.calls)
        rewards["no_code" if not s.calls else "all_passed" if passed else "some_failed"].append(s.reward)

    def mean(values: Iterable[float]) -> tuple[float, float]:
        return sum(values) / count, 1.0

    several = {f"pass@{k}": (pass_at_k(count, round(right), k), 1.0) if k <= count else (0.0, 0.0) for k in sizes(n)}
    if n > 1:
        several[f"maj@{n}"] = (majority(samples), 1.0) if samples[0].vote is not None else (0.0, 0.0)
        several[f"bon@{n}"] = (best_of_n(samples), 1.0)
    return {
        "accuracy": (right / count, 1.0),
        **several,
        "code_ratio": mean(bool(s.calls) for s in samples),
        "code_pass_rate": (sum(s.calls.count("ok") for s in samples), sum(len(s.calls) for s in samples)),
        **{f"accuracy_{kind}": (sum(values), len(values)) for kind, values in rewards.items()},
        "truncated": mean(s.finish in ("length", "rounds") for s in samples),
        "tokens": mean(s.tokens for s in samples),
        "discarded": mean(s.discarded for s in samples),
        "corrections": mean(s.corrections for s in samples),
    }


# ---- many problems --------------------------------------------------------------------------------------------------
# An estimate is an array [1 + ROUNDS]: the value of a metric, then its bootstrap replicates. Averages and differences
# of estimates are estimates.

Estimates = dict[str, np.ndarray]


def by_problem(scores: Iterable[Score]) -> dict[str, dict[str, list[Score]]]:
    """source -> id -> the samples that count. Sources in order of appearance, ids sorted."""
    groups: dict[str, dict[str, list[Score]]] = {}
    for score in scores:
        samples = groups.setdefault(score.source, {}).setdefault(score.id, [])
        if score.reward is not None:
            samples.append(score)
    return {
        source: {id: sorted(group[id], key=lambda s: s.sample) for id in sorted(group) if group[id]}
        for source, group in groups.items()
    }


def estimate(source: str, problems: dict[str, list[Score]]) -> Estimates:
    """Estimates of every metric over the problems of a source.

    The draws depend on the source and the number of problems only: two runs over the same problems use the same ones,
    so the difference of their estimates is that of paired samples.
    """
    if not problems:
        return {}
    n = max(map(len, problems.values()))
    terms = [ratios(samples, n) for samples in problems.values()]
    values = bootstrap(np.array([list(row.values()) for row in terms], dtype=float), source)
    return {name: values[:, i] for i, name in enumerate(terms[0])}


def bootstrap(terms: np.ndarray, seed: str = "") -> np.ndarray:
    """Sum of numerators / sum of denominators over problems, of all problems and of ROUNDS samples of them.

    terms [P, M, 2]: numerator and denominator of each problem for M metrics. Returns [1 + ROUNDS, M].
    """
    rng = np.random.default_rng(derive_seed("bootstrap", seed))
    draws = rng.multinomial(len(terms), np.full(len(terms), 1 / len(terms)), size=ROUNDS)
    sums = np.einsum("rp,pmt->trm", np.vstack([np.ones(len(terms)), draws]), terms)
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[0] / sums[1]


def average(estimates: Sequence[Estimates]) -> Estimates:
    """Mean of each metric over the sources for which it is defined."""
    names = dict.fromkeys(name for part in estimates for name in part)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean of nothing but NaN is NaN
        return {name: np.nanmean([part[name] for part in estimates if name in part], axis=0) for name in names}


def interval(estimate: np.ndarray) -> list[float]:
    """[value, low, high]: the 95% percentile bootstrap interval."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # replicates may all be NaN
        return [float(estimate[0]), *(float(x) for x in np.nanpercentile(estimate[1:], [2.5, 97.5]))]


def mean_interval(values: Sequence[float | None]) -> list[float]:
    """[mean, low, high] of one value per problem. None leaves a problem out."""
    terms = [[[0.0 if value is None else value, float(value is not None)]] for value in values]
    return interval(bootstrap(np.array(terms))[:, 0])


def summarize(scores: Sequence[Score]) -> Summary:
    """Each metric as [value, low, high], and counts: `problems` with a score, `samples` of each, `infra` without one.

    Metrics are averages over the sources, in which each has the same weight. `sources` has the summary of each.
    Raises ValueError if no sample has a score.
    """
    parts = {source: estimate(source, problems) for source, problems in by_problem(scores).items()}
    if not any(parts.values()):
        raise ValueError(f"nothing to score: {'the sandbox failed in every sample' if scores else 'no samples'}")

    def summary(estimates: Estimates, chosen: Sequence[Score]) -> Summary:
        problems = Counter((s.source, s.id) for s in chosen if s.reward is not None)
        return {name: interval(values) for name, values in estimates.items()} | {
            "problems": len(problems),
            "samples": max(problems.values(), default=0),
            "infra": sum(s.reward is None for s in chosen),
        }

    sources = {source: summary(part, [s for s in scores if s.source == source]) for source, part in parts.items()}
    return summary(average([part for part in parts.values() if part]), scores) | {"sources": sources}


def compare(first: Sequence[Score], second: Sequence[Score]) -> dict[str, Summary]:
    """Paired differences second - first over the problems that both have: source -> {metric: [value, low, high]}.

    Each summary has the number of `problems`, and `first` and `second`, the values of each run on these problems. With
    several sources there is also their average. Raises ValueError if there is no common problem.
    """
    groups = by_problem(first), by_problem(second)
    counts, parts = {}, {}  # by source; parts: estimates of the first run, the second, and the difference
    for source in groups[0]:
        common = sorted(groups[0][source].keys() & groups[1].get(source, {}).keys())
        if common:
            a, b = (estimate(source, {id: group[source][id] for id in common}) for group in groups)
            counts[source], parts[source] = len(common), (a, b, {name: b[name] - a[name] for name in a if name in b})
    if not parts:
        raise ValueError("the runs have no problem in common")
    if len(parts) > 1:
        counts[AVERAGE] = sum(counts.values())
        parts[AVERAGE] = tuple(average(column) for column in zip(*parts.values(), strict=True))
    result = {}
    for source, columns in parts.items():
        a, b, change = ({name: interval(values) for name, values in part.items()} for part in columns)
        result[source] = {**change, "first": a, "second": b, "problems": counts[source]}
    return result


# ---- tables ---------------------------------------------------------------------------------------------------------

TITLES = {  # metric -> (title, factor, digits); others are shown in percent
    "problems": ("problems", 1, 0),
    "accuracy": ("accuracy %", 100, 1),
    "code_ratio": ("code ratio %", 100, 1),
    "code_pass_rate": ("code pass %", 100, 1),
    "accuracy_all_passed": ("all code passed %", 100, 1),
    "accuracy_some_failed": ("some failed %", 100, 1),
    "accuracy_no_code": ("no code %", 100, 1),
    "truncated": ("truncated %", 100, 1),
    "tokens": ("tokens", 1, 1),
    "discarded": ("discarded", 1, 1),
    "corrections": ("corrections", 1, 2),
}
STAGE_COLUMNS = ("problems", "accuracy", "code_ratio", "code_pass_rate", "tokens", "discarded")
CODE_COLUMNS = ("code_ratio", "code_pass_rate", "accuracy_all_passed", "accuracy_some_failed", "accuracy_no_code")
COST_COLUMNS = ("truncated", "tokens", "discarded", "corrections")


def table(rows: Sequence[tuple[str, Summary]], columns: Sequence[str] = STAGE_COLUMNS) -> str:
    """Format summaries as a Markdown table: percentages and tokens per problem, with 95% intervals in brackets."""
    titles = [title(name) for name in columns]
    return markdown([["", *titles], *([name, *(cell(s.get(c), c) for c in columns)] for name, s in rows)])


def title(metric: str) -> str:
    return TITLES[metric][0] if metric in TITLES else f"{metric} %"


def cell(value: Sequence[float | None] | int | None, metric: str, difference: bool = False) -> str:
    """Format a count, or [value, low, high] of a metric, "-" if it is undefined. A difference shows its signs."""
    if isinstance(value, int):
        return str(value)
    if value is None or any(x is None or math.isnan(x) for x in value):
        return "-"
    _, factor, digits = TITLES.get(metric, ("", 100, 1))
    mean, low, high = (x * factor for x in value)
    if difference:
        return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"{mean:.{digits}f} [{low:.{digits - 1}f}-{high:.{digits - 1}f}]"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned, so that it is readable as text too. The first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def results_tables(name: str, summary: Summary) -> str:
    """Two tables of a run: answers, and code and cost. Rows are the sources and their average, or just `name`."""
    rows = [*summary["sources"].items(), (AVERAGE, summary)] if len(summary["sources"]) > 1 else [(name, summary)]
    answers = ["problems", "accuracy", *(metric for metric in summary if "@" in metric)]
    return "\n\n".join(table(rows, c) for c in (answers, (*CODE_COLUMNS, *COST_COLUMNS)))


def accuracy_table(rows: Sequence[tuple[str, Summary]]) -> str:
    """Accuracy in the layout of the paper's tables: a row for each run, a column for each source and their average."""
    sources = list(dict.fromkeys(source for _, summary in rows for source in summary["sources"]))
    lines = [["accuracy %", *sources, AVERAGE]]
    for name, summary in rows:
        parts = [*(summary["sources"].get(source, {}) for source in sources), summary]
        lines.append([name, *(cell(part.get("accuracy"), "accuracy") for part in parts)])
    return markdown(lines)


def comparison_table(differences: dict[str, Summary], first: str, second: str) -> str:
    """Both runs and their paired difference: the accuracy of each source, and all metrics of the average."""
    *_, last = differences
    lines = [["", "problems", "metric", first, second, "difference"]]
    for source, summary in differences.items():
        for metric in summary["first"]:
            if metric in summary["second"] and (metric == "accuracy" or source == last):
                values = cell(summary["first"][metric], metric), cell(summary["second"][metric], metric)
                change = cell(summary[metric], metric, difference=True)
                lines.append([source, str(summary["problems"]), title(metric), *values, change])
    return markdown(lines)
