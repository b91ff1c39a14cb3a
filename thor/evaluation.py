"""Evaluation: metrics with bootstrap intervals, the held-out problems of the quick start, and its results table."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from tqdm import tqdm

from thor.data import load_problems
from thor.engines import Engine, is_reproducible
from thor.rollout import Sampling, solve
from thor.sandbox import Executor
from thor.trajectory import Problem, Trajectory

HELD_OUT = 64  # number of held-out synthetic problems; all stages of the quick start are evaluated on them
HELD_OUT_SAMPLING = Sampling(max_tokens=144, temperature=0.4, max_rounds=2)


def held_out() -> list[Problem]:
    """Return the problems on which every stage of the quick start is evaluated."""
    return load_problems("synthetic", split="test", limit=HELD_OUT)


def bootstrap_interval(statistic: Callable, samples: np.ndarray, rounds: int = 1000) -> tuple[float, float]:
    """Return the 95% percentile bootstrap interval of `statistic(samples)` over the rows of samples [P, ...].

    The random seed is fixed, so the interval is reproducible for the same rows in the same order.
    """
    rng = np.random.default_rng(0)
    values = [statistic(samples[rng.integers(len(samples), size=len(samples))]) for _ in range(rounds)]
    low, high = np.nanpercentile(values, [2.5, 97.5]) if not np.isnan(values).all() else (np.nan, np.nan)
    return float(low), float(high)


def summarize(trajectories: list[Trajectory]) -> dict[str, list[float] | int]:
    """Return each metric as [value, low, high], and the numbers of trajectories.

    accuracy: mean reward. code_ratio: share of trajectories with at least one executed block.
    code_pass_rate: passed / executed blocks. tokens: mean sampled tokens in the response.
    discarded: mean sampled tokens that self-correction removed.
    problems: trajectories with a score. infra: trajectories without one, because their sandbox failed.

    Raises ValueError if no trajectory has a score.
    """
    kept = [t for t in trajectories if t.finish != "infra"]
    if not kept:
        reason = "the sandbox failed in every trajectory" if trajectories else "no trajectories"
        raise ValueError(f"nothing to score: {reason}")
    columns = np.array(
        [
            [t.reward, bool(t.results), sum(r.passed for r in t.results), len(t.results), t.num_sampled, t.discarded]
            for t in kept
        ],
        dtype=float,
    )

    def pass_rate(rows: np.ndarray) -> float:
        return rows[:, 2].sum() / rows[:, 3].sum() if rows[:, 3].sum() else float("nan")

    statistics = {
        "accuracy": lambda rows: rows[:, 0].mean(),
        "code_ratio": lambda rows: rows[:, 1].mean(),
        "code_pass_rate": pass_rate,
        "tokens": lambda rows: rows[:, 4].mean(),
        "discarded": lambda rows: rows[:, 5].mean(),
    }
    summary: dict = {name: [float(f(columns)), *bootstrap_interval(f, columns)] for name, f in statistics.items()}
    return {**summary, "problems": len(kept), "infra": len(trajectories) - len(kept)}


def evaluate(
    engine: Engine,
    executor: Executor,
    problems: list[Problem],
    sampling: Sampling,
    name: str,
    finished: Sequence[Trajectory] = (),
    save: Callable[[Trajectory], None] | None = None,
    **options,
) -> tuple[dict, list[Trajectory]]:
    """Solve and grade each problem once. Return the summary, and the trajectories in the order of the problems.

    name: label of the progress bar.
    finished: graded trajectories of an interrupted evaluation. Their problems are not solved again.
    save: called with each new trajectory once it is graded. The order depends on when trajectories end.
    options: passed to `solve`.
    """
    known: dict[str, list[Trajectory]] = {}
    for trajectory in finished:
        known.setdefault(trajectory.problem.id, []).append(trajectory)
    trajectories = [known[p.id].pop(0) if known.get(p.id) else None for p in problems]
    todo = [i for i, trajectory in enumerate(trajectories) if trajectory is None]
    correct = sum(trajectory.reward or 0 for trajectory in finished)

    def done(i: int, trajectory: Trajectory) -> None:
        nonlocal correct
        trajectories[todo[i]] = trajectory
        correct += trajectory.reward or 0  # None without a gold answer, and if the sandbox failed
        if save:
            save(trajectory)
        bar.update()
        bar.set_postfix(correct=int(correct))

    deterministic = is_reproducible(engine)
    with tqdm(total=len(problems), initial=len(problems) - len(todo), desc=name, unit="problem") as bar:
        new = [problems[i] for i in todo]
        solve(engine, executor, new, sampling, done=done, deterministic=deterministic, **options)
    return summarize(trajectories), trajectories


def table(rows: list[tuple[str, dict]]) -> str:
    """Format summaries as a table: percentages and tokens per problem, with 95% intervals in brackets."""

    def cell(triple: list[float], scale: float = 100) -> str:
        value, low, high = (x * scale for x in triple)
        return "     -      " if value != value else f"{value:5.1f} [{low:.0f}-{high:.0f}]"

    lines = [f"{'':24s} {'accuracy %':16s} {'code ratio %':16s} {'code pass %':16s} {'tokens':16s} discarded"]
    for name, s in rows:
        percents = "".join(f" {cell(s[key]):16s}" for key in ("accuracy", "code_ratio", "code_pass_rate"))
        lines.append(f"{name:24s}{percents} {cell(s['tokens'], 1):16s} {s['discarded'][0]:.1f}")
    return "\n".join(lines)
