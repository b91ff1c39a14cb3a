"""Evaluation: solve problems, grade the samples, and log each problem once all its samples are graded.

The metrics and tables are in thor/metrics.py.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from thor.code_problems import code_blocks, grading_program
from thor.data import load_problems
from thor.distributed import cpu_workers, rank
from thor.engines import Engine, is_reproducible
from thor.metrics import Score, equal_classes
from thor.rollout import Sampling, solve
from thor.run_folder import to_line, write_atomic, writing
from thor.sandbox import Executor
from thor.settings import UserError
from thor.text import decode, extract_answer
from thor.trajectory import Problem, Trajectory
from thor.verify import grade, verify

HELD_OUT = 256  # synthetic problems on which all stages of the quick start are evaluated; as --eval_limit
TEST_TIMEOUT, TEST_MEMORY_MB = 30.0, 2048  # limits of the tests of one solution


def held_out() -> list[Problem]:
    """Return the problems on which every stage of the quick start is evaluated."""
    return load_problems("synthetic", split="test", limit=HELD_OUT)


# ---- grading --------------------------------------------------------------------------------------------------------


class Grader:
    """Grades trajectories for `solve`: answers with `verify`, code with its tests in an executor of their own.

    timeout: limit in seconds for all tests of one solution. The executor starts with the first of them.
    """

    def __init__(self, timeout: float = TEST_TIMEOUT) -> None:
        self.timeout = timeout
        self._executor: Executor | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_) -> None:
        if self._executor:
            self._executor.close()

    def __call__(self, trajectory: Trajectory, tokenizer) -> float | None:
        """The reward: 1.0 for a right answer or a solution that passes its tests, else 0.0.

        None if it is not known, because there is no gold answer or the sandbox failed.
        """
        if not trajectory.problem.tests:
            return grade(trajectory, tokenizer)
        ends = [(step.think_start, step.observe_start) for step in trajectory.steps]
        blocks = [block for a, b in ends for block in code_blocks(decode(tokenizer, trajectory.token_ids[a:b]))]
        if not blocks:
            return 0.0
        program, last_line = grading_program(trajectory.problem.tests, blocks, self.timeout)
        with self._lock:
            if not self._executor:
                self._executor = Executor(cpu_workers(), self.timeout, TEST_MEMORY_MB)
        result = self._executor.submit(program).result()
        passed = result.passed and result.stdout.endswith(f"{last_line}\n")
        return None if result.status == "infra" else float(passed)


def score_problem(trajectories: Sequence[Trajectory], tokenizer) -> list[Score]:
    """The scores of the graded samples of one problem, whose answers are compared with each other."""
    answers = [
        None if t.reward is None or t.problem.tests else extract_answer(t.text(tokenizer, policy_only=True))
        for t in trajectories
    ]
    votes = equal_classes(answers, verify)
    return [
        Score(
            source=t.problem.source,
            id=t.problem.id,
            sample=i,
            reward=t.reward,
            answer=answers[i],
            vote=None if t.problem.tests else votes[i],
            finish=t.finish,
            tokens=t.num_sampled,
            discarded=t.discarded,
            corrections=t.corrections,
            calls=[result.status for result in t.results],
        )
        for i, t in enumerate(trajectories)
    ]


# ---- evaluation -----------------------------------------------------------------------------------------------------


def evaluate(
    engine: Engine,
    executor: Executor,
    problems: list[Problem],
    sampling: Sampling,
    name: str,
    save: Callable[[list[Score], list[Trajectory]], None] | None = None,
    test_timeout: float = TEST_TIMEOUT,
    **options,
) -> list[Score]:
    """Solve and grade `problems`. Return the scores of all samples, for `summarize` and `compare`.

    problems: repeat an entry n times for n samples of that problem.
    name: label of the progress bar.
    save: called with the scores and the trajectories of each problem, once all its samples are graded. The order of
        the problems depends on when trajectories end.
    test_timeout: limit in seconds for the tests of one solution of a code problem.
    options: passed to `solve`.
    """
    trajectories: list[Trajectory | None] = [None] * len(problems)
    members: dict[str, list[int]] = defaultdict(list)
    for i, problem in enumerate(problems):
        members[problem.id].append(i)
    scores: list[Score] = []
    finished: deque[Future] = deque()
    graded = right = 0

    def finish(samples: list[Trajectory]) -> None:
        new = score_problem(samples, engine.tokenizer)
        scores.extend(new)
        if save:
            save(new, samples)

    def done(i: int, trajectory: Trajectory) -> None:
        nonlocal graded, right
        trajectories[i] = trajectory
        samples = [trajectories[j] for j in members[problems[i].id]]
        if None not in samples:
            finished.append(thread.submit(finish, samples))
        while finished and finished[0].done():
            finished.popleft().result()  # raises what `finish` raised
        graded, right = graded + (trajectory.reward is not None), right + (trajectory.reward or 0)
        bar.set_postfix_str(f"accuracy {100 * right / max(1, graded):.1f}%", refresh=False)
        bar.update()

    with (
        tqdm(total=len(problems), desc=name, unit="sample", disable=rank() > 0) as bar,
        Grader(test_timeout) as grader,
        ThreadPoolExecutor(1) as thread,  # compares the answers of a problem and saves them, beside the event loop
    ):
        options = {"grade": grader, "done": done, "deterministic": is_reproducible(engine), **options}
        solve(engine, executor, problems, sampling, **options)
        for future in finished:
            future.result()
    return scores


class ScoreLog:
    """trajectories.jsonl of an evaluation: a line for each sample, with its `Score`, question, gold answer and text.

    The lines of a problem are written at once. Each rank has its own file, and `merge` joins them.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.path = self.folder / f"trajectories{f'.{rank()}' if rank() else ''}.jsonl"

    def write(self, scores: list[Score], trajectories: list[Trajectory], tokenizer) -> None:
        """Append the samples of one problem."""
        lines = [
            to_line(
                dataclasses.asdict(score)
                | {"question": t.problem.question, "gold": t.problem.answer, "text": t.text(tokenizer)}
            )
            for score, t in zip(scores, trajectories, strict=True)
        ]
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))

    def read(self) -> dict[str, list[dict]]:
        """problem id -> the records of its samples in order, of all ranks. A line that a crash cut off is left out.

        Raises UserError for any other line that does not hold a sample.
        """
        groups: dict[str, dict[int, dict]] = defaultdict(dict)
        for path in sorted(self.folder.glob("trajectories*.jsonl")):
            for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
                try:
                    score = Score.from_dict(record := json.loads(line))
                    groups[score.id][score.sample] = record
                except (ValueError, KeyError, TypeError) as error:
                    fault = f"no {error}" if isinstance(error, KeyError) else error
                    raise UserError(f"{path}:{number}: not a sample of run_infer.py ({fault})") from error
        return {id: [group[i] for i in sorted(group)] for id, group in groups.items()}

    def scores(self) -> list[Score]:
        """The scores of all ranks."""
        return [Score.from_dict(record) for group in self.read().values() for record in group]

    def merge(self, problems: Sequence[Problem], samples: int, retry: bool = False) -> set[str]:
        """Join the files of all ranks in the order of `problems`, and return the ids of those that are in it.

        Problems of which a sample is missing are removed, and with `retry` also those of which one has no score. Call
        it on rank 0 only, while no rank writes.
        """
        groups = self.read()
        kept = {
            problem.id: groups[problem.id]
            for problem in problems
            if len(groups.get(problem.id, ())) == samples
            and not (retry and any(record["reward"] is None for record in groups[problem.id]))
        }
        text = "".join(to_line(record) for group in kept.values() for record in group)
        write_atomic(self.folder / "trajectories.jsonl", text)
        for path in self.folder.glob("trajectories.*.jsonl"):
            path.unlink()
        return set(kept)
