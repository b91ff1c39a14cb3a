r"""Stage 4: answer questions with Python and self-correction; evaluate.

    python run_infer.py "What is the remainder when 7**2024 is divided by 1001?"      # streams one trajectory
    python run_infer.py --data problems.jsonl --limit 50 --out runs/mine              # scores a file or a benchmark
    python run_infer.py                                                               # the quick start's table

Self-correction (paper, section 3.3): when a block fails, the response is cut back to r_pre, the thought without its
last L_suffix tokens, and sampled on from there, at most --self_correct times a step. Tokens that are thrown away are
counted and reported beside the accuracy. Writes <out>/eval.json and <out>/trajectories.jsonl.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from thor.data import load_problems
from thor.engines import load_engine
from thor.evaluation import HELD_OUT_SAMPLING, evaluate, held_out, table
from thor.rollout import Sampling, solve
from thor.run_folder import Run
from thor.sandbox import Executor
from thor.settings import UserError, at_least, parse_settings, run_main, user_errors
from thor.text import FenceParser, extract_answer
from thor.trajectory import Problem, Trajectory


@dataclass(frozen=True)
class Settings:
    """Flags of run_infer.py."""

    question: str = field(default="", metadata={"help": "one question to answer (also as the first word, without --)"})
    data: str = field(default="", metadata={"help": "problems to score: a file, a benchmark's name, or 'synthetic'"})
    split: str = field(default="test", metadata={"help": "split of 'synthetic' or of a hub data set"})
    limit: int = field(default=0, metadata={"help": "number of problems, the first ones; 0: all (64 of 'synthetic')"})
    model: str = field(
        default="runs/rl/final",
        metadata={
            "help": "demo name, folder or hub id; 'vllm:' before it: by vLLM; or 'http://host:port' of a vllm serve"
        },
    )
    self_correct: int = field(default=4, metadata={"help": "tries per step to correct failed code (paper: 4); 0: off"})
    suffix_tokens: int = field(default=100, metadata={"help": "L_suffix: thought tokens sampled anew (paper: 100)"})
    max_tokens: int = field(
        default=HELD_OUT_SAMPLING.max_tokens, metadata={"help": "longest response in tokens, tool output included"}
    )
    max_rounds: int = field(default=HELD_OUT_SAMPLING.max_rounds, metadata={"help": "tool calls (paper: 5)"})
    temperature: float = field(
        default=HELD_OUT_SAMPLING.temperature, metadata={"help": "0 is greedy, and then nothing can be corrected"}
    )
    top_p: float = field(default=1.0, metadata={"help": "sample from the most likely tokens of this total probability"})
    observation_limit: int = field(default=256, metadata={"help": "characters of tool output shown to the model"})
    rows: int = field(default=64, metadata={"help": "requests that decode at once"})
    timeout: float = field(default=5.0, metadata={"help": "seconds a snippet may run"})
    device: str = field(default="auto", metadata={"help": "'cpu', 'cuda', or 'auto'"})
    seed: int = field(default=0, metadata={"help": "of sampling"})
    out: str = field(default="runs/infer", metadata={"help": "run folder to write (not for a single question)"})
    resume: bool = field(default=False, metadata={"help": "go on in the run folder --out"})


COLOURS = {"thought": "", "code": "\033[36m", "output": "\033[32m", "correction": "\033[33m"}


class Printer:
    """Listener that shows a trajectory as it comes to be: thought, code, output, correction, each in its colour."""

    def __init__(self, stream=sys.stdout) -> None:
        self.stream = stream
        self.colour = stream.isatty() and "NO_COLOR" not in os.environ
        self.parser = FenceParser()

    def __call__(self, kind: str, text: str) -> None:
        if kind == "text":
            before = len(self.parser.text)
            self.parser.feed(text)
            cut = max(0, self.parser.code_at - before) if self.parser.code_at >= 0 else len(text)
            self.show("thought", text[:cut])  # a piece may hold the end of a thought and the start of its code
            self.show("code", text[cut:])
            return
        self.parser = FenceParser()
        if kind == "correction":
            self.show(kind, f"\n[failed: {text.strip().splitlines()[1]}; going back and trying again]\n")
        else:
            self.show(kind, text)

    def show(self, style: str, text: str) -> None:
        colour = COLOURS[style] if self.colour and text else ""
        self.stream.write(f"{colour}{text}\033[0m" if colour else text)
        self.stream.flush()


def answer_question(engine, executor, sampling: Sampling, settings: Settings) -> Trajectory:
    """Stream the trajectory of one question to stdout."""
    problem = Problem("question", settings.question)
    [trajectory] = solve(
        engine,
        executor,
        [problem],
        sampling,
        self_correct=settings.self_correct,
        suffix_tokens=settings.suffix_tokens,
        listener=Printer(),
    )
    answer = extract_answer(trajectory.text(engine.tokenizer, policy_only=True))
    print(f"\n\nanswer: {answer if answer is not None else '(none)'}", end="")
    print(f"   [{trajectory.num_sampled} tokens, {len(trajectory.results)} calls", end="")
    print(f", {trajectory.corrections} corrections, {trajectory.discarded} tokens discarded, {trajectory.finish}]")
    return trajectory


def lineage(model: str) -> list[tuple[str, dict]]:
    """Scores of the stages that led to <run>/final, first to last, found through the config.json of each run."""
    rows: list[tuple[str, dict]] = []
    folder, seen = Path(model.removeprefix("vllm:")).parent, set()
    while folder not in seen and (folder / "eval.json").is_file() and (folder / "config.json").is_file():
        seen.add(folder)
        rows.insert(0, (f"after {folder.name.upper()}", json.loads((folder / "eval.json").read_text())))
        if (folder / "eval_base.json").is_file():
            rows.insert(0, ("base", json.loads((folder / "eval_base.json").read_text())))
        folder = Path(json.loads((folder / "config.json").read_text()).get("model", "")).parent
    return rows


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(Settings, __doc__, argv, positional="question")
    sampling = Sampling(
        settings.max_tokens,
        settings.temperature,
        settings.top_p,
        seed=settings.seed,
        max_rounds=settings.max_rounds,
        observation_limit=settings.observation_limit,
    )
    with user_errors():
        at_least(settings, max_tokens=1, rows=1, self_correct=0, suffix_tokens=0)
        if settings.question and settings.data:
            raise UserError("a question and --data: give one of them")
        if settings.self_correct and settings.temperature == 0:
            raise UserError("--temperature 0: greedy sampling repeats its failures; use --self_correct 0 with it")
        run = None if settings.question else Run(settings.out, settings, settings.resume)
    with user_errors("--data"):
        problems = held_out()
        if settings.data:
            problems = load_problems(
                settings.data, split=settings.split, limit=settings.limit or None, seed=settings.seed
            )
    with Executor(timeout=settings.timeout) as executor:
        with user_errors():
            engine = load_engine(settings.model, settings.device, settings.rows if run else 1)
            if run:
                run.start()
        if not run:
            answer_question(engine, executor, sampling, settings)
            return
        run.rewind("trajectories.jsonl", lambda record: record["finish"] != "infra")  # those are tried again
        finished = [Trajectory.from_dict(record) for record in run.read("trajectories.jsonl")]
        known = {t.problem.id for t in finished}
        name = settings.model if "://" in settings.model else Path(settings.model).parent.name.upper() or settings.model
        name += " + self-correction" if settings.self_correct else ""
        summary, _ = evaluate(
            engine,
            executor,
            [p for p in problems if p.id not in known],
            sampling,
            name,
            finished=finished,
            save=lambda trajectory: run.write_trajectories("trajectories.jsonl", [trajectory], engine.tokenizer),
            self_correct=settings.self_correct,
            suffix_tokens=settings.suffix_tokens,
        )
    run.write_json("eval.json", summary)
    print(table(([] if settings.data else lineage(settings.model)) + [(name, summary)]))


if __name__ == "__main__":
    run_main(main)
