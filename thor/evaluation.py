"""Scores of a set of trajectories, with bootstrap intervals, and the table that the scripts close with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from tqdm import tqdm

from thor.data import load_problems
from thor.engines import Engine
from thor.rollout import Sampling, solve
from thor.sandbox import Executor
from thor.trajectory import Problem, Trajectory
from thor.verify import grade

HELD_OUT = 64  # synthetic test problems that every stage of the quick start is scored on


def bootstrap_interval(statistic: Callable, samples: np.ndarray, rounds: int = 1000) -> tuple[float, float]:
    """95% percentile bootstrap of `statistic(samples)` over the rows of samples [P, ...]; seeded, so reproducible."""
    rng = np.random.default_rng(0)
    values = [statistic(samples[rng.integers(len(samples), size=len(samples))]) for _ in range(rounds)]
    low, high = np.nanpercentile(values, [2.5, 97.5]) if not np.isnan(values).all() else (np.nan, np.nan)
    return float(low), float(high)


def summarize(trajectories: list[Trajectory]) -> dict[str, list[float] | int]:
    """Metrics as [value, low, high]; trajectories whose sandbox failed are left out and counted in 'infra'.

    accuracy: mean reward. code_ratio: share with at least one executed block. code_pass_rate: passed / executed blocks.
    tokens: sampled tokens that stand in the response. discarded: sampled tokens that self-correction cut away.
    """
    kept = [t for t in trajectories if t.finish != "infra"]
    if not kept:
        raise ValueError(
            "nothing to score: every trajectory was lost to a failing sandbox" if trajectories else "no trajectories"
        )
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
    finished: list[Trajectory] | None = None,
    save: Callable[[Trajectory], None] | None = None,
    **options,
) -> tuple[dict, list[Trajectory]]:
    """Solve and grade each problem once, behind a bar called `name`; `options` go to `solve`.

    finished: graded trajectories of an earlier, interrupted call, counted in; `save` is called with each new one.
    """
    finished = finished or []
    right = sum(t.reward for t in finished)
    bar = tqdm(total=len(problems) + len(finished), initial=len(finished), desc=name, unit="problem")

    def done(i: int, trajectory: Trajectory) -> None:
        nonlocal right
        trajectory.reward = grade(trajectory, engine.tokenizer)
        right += trajectory.reward
        if save:
            save(trajectory)
        bar.update()
        bar.set_postfix(right=int(right))

    with bar:
        trajectories = finished + solve(engine, executor, problems, sampling, done=done, **options)
    return summarize(trajectories), trajectories


def held_out() -> list[Problem]:
    """The problems of the quick start's table."""
    return load_problems("synthetic", split="test", limit=HELD_OUT)


HELD_OUT_SAMPLING = Sampling(max_tokens=144, temperature=0.4, max_rounds=2)


def table(rows: list[tuple[str, dict]]) -> str:
    """One line a stage: accuracy, code ratio and pass rate in percent, tokens a problem, 95% intervals in brackets."""

    def cell(triple: list[float], scale: float = 100) -> str:
        value, low, high = (x * scale for x in triple)
        return "     -      " if value != value else f"{value:5.1f} [{low:.0f}-{high:.0f}]"

    lines = [f"{'':24s} {'accuracy %':16s} {'code ratio %':16s} {'code pass %':16s} {'tokens':16s} discarded"]
    for name, s in rows:
        percents = "".join(f" {cell(s[key]):16s}" for key in ("accuracy", "code_ratio", "code_pass_rate"))
        lines.append(f"{name:24s}{percents} {cell(s['tokens'], 1):16s} {s['discarded'][0]:.1f}")
    return "\n".join(lines)
