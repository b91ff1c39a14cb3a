r"""Stage 4: answer questions with Python and self-correction, and evaluate models (paper, section 3.3).

    python run_infer.py "What is the remainder when 7**2024 is divided by 1001?"      # streams one trajectory
    python run_infer.py --data problems.jsonl --limit 50 --out runs/mine              # evaluates a file or benchmark
    python run_infer.py                                                               # the quick start's results table

Self-correction: when a code block fails, the response is cut back to r_pre, the thought without its last L_suffix
tokens, and sampling continues from there, at most --self_correct times per step. Discarded tokens are reported beside
the accuracy. An evaluation writes <out>/eval.json and <out>/trajectories.jsonl.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from thor.data import load_problems
from thor.engines import Engine, load_engine
from thor.evaluation import HELD_OUT_SAMPLING, evaluate, held_out, table
from thor.rollout import Sampling, solve
from thor.run_folder import Run
from thor.sandbox import Executor
from thor.settings import UserError, parse_settings, run_main, setting, user_errors
from thor.text import FenceParser, extract_answer
from thor.trajectory import Problem, Trajectory


@dataclass(frozen=True)
class Settings:
    """Flags of run_infer.py."""

    question: str = setting("", "a question to answer", "data")
    data: str = setting("", "problems to evaluate: a file, a benchmark, a hub data set, or 'synthetic'", "data")
    split: str = setting("test", "split of 'synthetic' or of a hub data set", "data")
    limit: int = setting(0, "number of problems to load; 0: all (256 of 'synthetic')", "data", min=0)
    model: str = setting("runs/rl/final", "demo model, folder, hub id, vllm:NAME, or URL of a vLLM server", "model")
    self_correct: int = setting(
        4, "maximum attempts per step to correct failed code (paper: 4); 0: off", "sampling", min=0
    )
    suffix_tokens: int = setting(100, "L_suffix: thought tokens to resample (paper: 100)", "sampling", min=0)
    max_tokens: int = setting(
        HELD_OUT_SAMPLING.max_tokens, "maximum tokens per response, tool output included", "sampling", min=1
    )
    max_rounds: int = setting(HELD_OUT_SAMPLING.max_rounds, "maximum tool calls per response (paper: 5)", "sampling")
    temperature: float = setting(
        HELD_OUT_SAMPLING.temperature, "sampling temperature; 0: greedy, without self-correction", "sampling", min=0
    )
    top_p: float = setting(1.0, "nucleus sampling probability", "sampling")
    observation_limit: int = setting(256, "characters of tool output that the model sees", "sampling")
    rows: int = setting(64, "requests that decode at once", "memory", min=1)
    timeout: float = setting(5.0, "maximum seconds per code block", "run")
    memory_mb: int = setting(1024, "memory limit of a code block in MiB", "run", min=1)
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "'auto' is a GPU if there is one", "model")
    seed: int = setting(0, "random seed of sampling", "run")
    out: str = setting("runs/infer", "run folder to write (not for a single question)", "run")
    resume: bool = setting(False, "resume the run in --out", "run")


# ---- a single question ----------------------------------------------------------------------------------------------

COLOURS = {"thought": "", "code": "\033[36m", "output": "\033[32m", "correction": "\033[33m"}


class Printer:
    """Listener that prints a trajectory while it is sampled. Thought, code, output and correction differ in colour."""

    def __init__(self, stream=sys.stdout) -> None:
        self.stream = stream
        self.colour = stream.isatty() and "NO_COLOR" not in os.environ
        self.parser = FenceParser()

    def __call__(self, kind: str, text: str) -> None:
        if kind == "text":
            before = len(self.parser.text)
            self.parser.feed(text)
            cut = max(0, self.parser.code_at - before) if self.parser.code_at >= 0 else len(text)
            self.show("thought", text[:cut])  # one piece can end a thought and start its code
            self.show("code", text[cut:])
            return
        self.parser = FenceParser()
        if kind == "correction":
            self.show(kind, f"\n[failed: {text.strip().splitlines()[1]}; trying again]\n")
        else:
            self.show(kind, text)

    def show(self, style: str, text: str) -> None:
        colour = COLOURS[style] if self.colour and text else ""
        self.stream.write(f"{colour}{text}\033[0m" if colour else text)
        self.stream.flush()


def answer_question(engine: Engine, executor: Executor, sampling: Sampling, settings: Settings) -> None:
    """Solve one question and stream its trajectory to stdout."""
    problem = Problem("question", settings.question)
    options = {"self_correct": settings.self_correct, "suffix_tokens": settings.suffix_tokens}
    [trajectory] = solve(engine, executor, [problem], sampling, listener=Printer(), **options)
    answer = extract_answer(trajectory.text(engine.tokenizer, policy_only=True))
    print(f"\n\nanswer: {answer if answer is not None else '(none)'}", end="")
    print(f"   [{trajectory.num_sampled} tokens, {len(trajectory.results)} calls", end="")
    print(f", {trajectory.corrections} corrections, {trajectory.discarded} tokens discarded, {trajectory.finish}]")


# ---- evaluation -----------------------------------------------------------------------------------------------------


def evaluate_model(
    engine: Engine, executor: Executor, problems: list[Problem], sampling: Sampling, settings: Settings, run: Run
) -> None:
    """Evaluate the model on all problems that the run has not solved yet, write eval.json, and print the table."""
    name = settings.model if "://" in settings.model else Path(settings.model).parent.name.upper() or settings.model
    name += " + self-correction" if settings.self_correct else ""

    def save(trajectory: Trajectory) -> None:
        if trajectory.finish != "infra":  # the sandbox failed: a resumed run tries the problem again
            run.write_trajectories("trajectories.jsonl", [trajectory], engine.tokenizer)

    summary, _ = evaluate(
        engine,
        executor,
        problems,
        sampling,
        name,
        finished=[Trajectory.from_dict(record) for record in run.read("trajectories.jsonl")],
        save=save,
        self_correct=settings.self_correct,
        suffix_tokens=settings.suffix_tokens,
    )
    run.write_json("eval.json", summary)
    print(table(([] if settings.data else lineage(settings.model)) + [(name, summary)]))


def lineage(model: str) -> list[tuple[str, dict]]:
    """Return (name, summary) of each stage that led to the model <run>/final, oldest first.

    The config.json of a run names the model that it started from.
    """
    rows: list[tuple[str, dict]] = []
    folder, seen = Path(model.removeprefix("vllm:")).parent, set()
    while folder not in seen and (folder / "eval.json").is_file() and (folder / "config.json").is_file():
        seen.add(folder)
        rows.insert(0, (f"after {folder.name.upper()}", json.loads((folder / "eval.json").read_text())))
        if (folder / "eval_base.json").is_file():
            rows.insert(0, ("base", json.loads((folder / "eval_base.json").read_text())))
        folder = Path(json.loads((folder / "config.json").read_text()).get("model", "")).parent
    return rows


# ---- script ---------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(Settings, __doc__, argv, positional="question")
    sampling = Sampling(
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=settings.seed,
        max_rounds=settings.max_rounds,
        observation_limit=settings.observation_limit,
    )
    with user_errors():
        if settings.question and settings.data:
            raise UserError("a question cannot be combined with --data")
        if settings.self_correct and settings.temperature == 0:
            raise UserError("--temperature 0: greedy sampling would repeat its failures; add --self_correct 0")
        run = None if settings.question else Run(settings.out, settings, settings.resume)
    with user_errors("--data"):
        problems = held_out()
        if settings.data:
            problems = load_problems(settings.data, settings.split, settings.limit or None, settings.seed)
    with Executor(timeout=settings.timeout, memory_mb=settings.memory_mb) as executor:
        with user_errors():
            engine = load_engine(settings.model, settings.device, settings.rows if run else 1)
            if run:
                run.start()
        if run:
            evaluate_model(engine, executor, problems, sampling, settings, run)
        else:
            answer_question(engine, executor, sampling, settings)


if __name__ == "__main__":
    run_main(main)
