r"""Stage 4: answer questions with Python and self-correction, and evaluate models (paper, section 3.3).

    python run_infer.py "What is the remainder when 7**2024 is divided by 1001?"      # streams one trajectory
    python run_infer.py --data aime24,math500 --samples 4 --out runs/mine             # evaluates benchmarks or files
    python run_infer.py --compare runs/theirs runs/mine                               # paired differences
    python run_infer.py                                                               # the quick start's results table
    torchrun --nproc_per_node=8 run_infer.py --data math500 ...                       # divides the problems

Self-correction: when a code block fails, the response is cut back to r_pre, the thought without its last L_suffix
tokens, and sampling continues from there, at most --self_correct times per step. Discarded tokens are reported beside
the accuracy.

An evaluation writes <out>/results.json, <out>/results.md (the printed tables) and <out>/trajectories.jsonl, to which
each problem is added once all its samples are graded. If it is interrupted, it prints the tables for what is done.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from thor.data import cell_text, load_problems
from thor.demo import DEMO_MODEL
from thor.distributed import barrier, cpu_workers, gather, rank, start_ranks, world_size
from thor.engines import Engine, load_engine
from thor.evaluation import TEST_TIMEOUT, ScoreLog, evaluate, held_out
from thor.metrics import (
    Score,
    Summary,
    accuracy_table,
    compare,
    comparison_table,
    results_tables,
    summarize,
    table,
)
from thor.rollout import Sampling, solve
from thor.run_folder import Run, base_model, lineage, write_atomic
from thor.sandbox import Executor
from thor.settings import (
    PROMPT_HELP,
    UserError,
    by_model,
    fill_defaults,
    parse_settings,
    prompt_for,
    run_main,
    setting,
    user_errors,
)
from thor.terminal import Terminal, printable
from thor.text import FenceParser, extract_answer
from thor.trajectory import Problem


@dataclass(frozen=True)
class Settings:
    """Flags of run_infer.py."""

    question: str = setting("", "a question to answer", "data")
    data: str = setting(
        "", "problems: files, benchmarks, hub data sets or 'synthetic'; empty: the quick start's 256", "data"
    )
    split: str = setting("test", "split of 'synthetic' or of a hub data set", "data")
    limit: int = setting(0, "with --data: problems to load of each source; 0: all (256 of 'synthetic')", "data", min=0)
    compare: list[str] = setting([], "runs: show the differences of each to the first", "data")  # noqa: RUF009
    model: str = setting("runs/rl/final", "demo model, folder, hub id, vllm:NAME, or URL of a vLLM server", "model")
    prompt: str = setting("", PROMPT_HELP, "model")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "'auto' is a GPU if there is one", "model")
    samples: int = setting(1, "k, samples of each problem (paper: 4)", "sampling", min=1)
    self_correct: int = setting(
        4, "maximum attempts per step to correct failed code (paper: 4); 0: off", "sampling", min=0
    )
    suffix_tokens: int = setting(100, "L_suffix: thought tokens to resample (paper: 100)", "sampling", min=0)
    max_tokens: int = by_model(144, 4096, "maximum tokens per response, with tool output", "sampling", min=1)
    max_rounds: int = by_model(3, 5, "maximum tool calls per response (paper: 5)", "sampling", min=0)
    temperature: float = by_model(0.4, 0.6, "0: greedy, which needs --self_correct 0", "sampling", min=0)
    top_p: float = setting(1.0, "nucleus sampling probability", "sampling", above=0, max=1)
    top_k: int = setting(0, "sample from the k most likely tokens; 0: off", "sampling", min=0)
    observation_limit: int = setting(256, "characters of tool output that the model sees", "sampling", min=0)
    rows: int = setting(64, "requests that decode at once", "memory", min=1)
    timeout: float = setting(5.0, "maximum seconds per code block", "run", above=0)
    memory_mb: int = setting(1024, "memory limit of a code block in MiB", "run", min=1)
    test_timeout: float = setting(TEST_TIMEOUT, "maximum seconds for the tests of a code problem", "run", above=0)
    rank_timeout: float = setting(36000.0, "seconds that ranks wait for each other", "run", above=0)
    seed: int = setting(0, "random seed of sampling", "run")
    out: str = setting("runs/infer", "run folder to write (not for a single question)", "run")
    resume: bool = setting(False, "resume the run in --out", "run")


def check(settings: Settings) -> None:
    """Raise UserError for settings that contradict each other."""
    if bool(settings.question) + bool(settings.data) + bool(settings.compare) > 1:
        raise UserError("a question, --data and --compare exclude each other")
    cell_text(settings.question, "the question")  # a terminal may send bytes that are not UTF-8
    if settings.temperature == 0 and settings.self_correct:
        raise UserError("--temperature 0: greedy sampling would repeat its failures; add --self_correct 0")
    if settings.temperature == 0 and settings.samples > 1:
        raise UserError("--temperature 0: greedy samples would all be equal; use --samples 1")


# ---- a single question ----------------------------------------------------------------------------------------------


class Printer:
    """Listener that prints a trajectory while it is sampled. Thought, code, output and correction differ in colour."""

    def __init__(self, stream=None) -> None:
        self.terminal = Terminal(stream)
        self.parser = FenceParser()

    def __call__(self, kind: str, text: str) -> None:
        if kind == "text":
            before = len(self.parser.text)
            self.parser.feed(text)
            cut = max(0, self.parser.code_at - before) if self.parser.code_at >= 0 else len(text)
            self.terminal.write("thought", text[:cut])  # one piece can end a thought and start its code
            self.terminal.write("code", text[cut:])
            return
        self.parser = FenceParser()
        if kind == "correction":
            text = f"\n[failed: {text.strip().splitlines()[1]}; trying again]\n"
        self.terminal.write(kind, text)


def answer_question(
    engine: Engine, executor: Executor, sampling: Sampling, settings: Settings, options: dict[str, Any]
) -> None:
    """Solve one question and stream its trajectory to stdout."""
    problem = Problem("question", settings.question)
    [trajectory] = solve(engine, executor, [problem], sampling, listener=Printer(), **options)
    answer = extract_answer(trajectory.text(engine.tokenizer, policy_only=True))
    print(f"\n\nanswer: {printable(answer) if answer is not None else '(none)'}", end="")
    print(f"   [{trajectory.num_sampled} tokens, {len(trajectory.results)} calls", end="")
    print(f", {trajectory.corrections} corrections, {trajectory.discarded} tokens discarded, {trajectory.finish}]")


# ---- evaluation -----------------------------------------------------------------------------------------------------


class Evaluation:
    """The evaluation of one model in a run folder, divided over the ranks."""

    def __init__(self, run: Run, problems: list[Problem], settings: Settings, name: str) -> None:
        self.run, self.problems, self.settings, self.name = run, problems, settings, name
        self.log, self.started = ScoreLog(run.folder), time.monotonic()
        self.todo = problems  # those that the run has not solved yet, for all ranks

    def solve(self, engine: Engine, executor: Executor, sampling: Sampling, options: dict[str, Any]) -> None:
        """Evaluate the problems that the run has not solved yet. If this is interrupted, print the tables so far."""
        done = gather(self.log.merge(self.problems, self.settings.samples, retry=True) if rank() == 0 else None)[0]
        self.todo = [p for p in self.problems if p.id not in done]
        todo = self.todo[rank() :: world_size()]
        repeated = [problem for problem in todo for _ in range(self.settings.samples)]
        save = partial(self.log.write, tokenizer=engine.tokenizer)
        try:
            if todo:
                evaluate(engine, executor, repeated, sampling, self.name, save, self.settings.test_timeout, **options)
            barrier()
        except BaseException:
            self.report()
            raise
        self.report()

    def report(self) -> None:
        """Write results.json and results.md, and print the tables. Problems that are not done are left out."""
        if rank():
            return
        count, k, earlier = len(self.problems), self.settings.samples, self.run / "results.json"
        found = self.log.read()  # in the order of the run; with many ranks or after --resume not that of the problems
        groups = {p.id: found[p.id] for p in self.problems if len(found.get(p.id, ())) == k}
        seconds = time.monotonic() - self.started if self.todo else 0.0
        seconds += json.loads(earlier.read_text())["seconds"] if earlier.exists() else 0.0
        text = f"{self.name}: {count} problems, {k} sample{'s' * (k > 1)} of each, {seconds:.0f} s"
        if len(groups) == count:
            self.log.merge(self.problems, k)
        else:
            text += f"; interrupted, the numbers cover the {len(groups)} that are done"
        scores = [Score.from_dict(record) for records in groups.values() for record in records]
        if any(score.reward is not None for score in scores):
            summary = summarize(scores)
            rows = [] if self.settings.data else [*stages(self.settings.model), (self.name, summary)]
            text += f"\n\n{table(rows) if rows else results_tables(self.name, summary)}"
            print(text)  # before the files, which a full disk may refuse
            facts = {"name": self.name, "problems_of_run": count, "complete": len(groups) == count, "seconds": seconds}
            self.run.write_json("results.json", facts | summary)
            write_atomic(self.run / "results.md", text + "\n")
        else:
            print(text)


def run_name(settings: Settings, tools: bool) -> str:
    """The model's own name (hub id, server's model, or name of its run), and how it is used."""
    name = settings.model.removeprefix("vllm:")
    if "://" in name:
        name = name.partition("#")[2] or name
    elif Path(name).is_dir():
        path = Path(name).resolve()
        name = path.parent.name if path.name == "final" else path.name
    if not tools:
        return name + " without code"
    return name + (" + self-correction" if settings.self_correct else "")


def stages(model: str) -> list[tuple[str, Summary]]:
    """(name, summary) of the stages that led to a model, the first one first, on the synthetic problems."""
    rows: list[tuple[str, Summary]] = []
    for folder in (Path(trained).parent for trained in lineage(model)[:-1]):
        file = folder / "validation.jsonl"
        lines = file.read_text().splitlines() if file.is_file() else []
        records = [record for record in map(json.loads, lines) if record["data"] == "synthetic"]
        if records:  # the first one is from before the training
            rows = [("base", records[0]), (f"after {folder.name.upper()}", records[-1]), *rows[1:]]
    return rows


def compare_runs(folders: list[str]) -> None:
    """Print the accuracy of all runs, and the differences of each to the first. Raises UserError."""
    scores = {}
    for folder in folders:
        scores[folder] = ScoreLog(folder).scores()
        if not scores[folder]:
            raise UserError(f"{folder}: has no trajectories.jsonl of run_infer.py")
    summaries = [(folder, summarize(scores[folder])) for folder in scores]
    print(accuracy_table(summaries) if len(summaries) > 1 else results_tables(*summaries[0]))
    for folder in folders[1:]:
        try:
            differences = compare(scores[folders[0]], scores[folder])
        except ValueError as error:
            raise UserError(f"{folders[0]} {folder}: {error}") from error
        print(f"\n{comparison_table(differences, folders[0], folder)}")


# ---- script ---------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(Settings, __doc__, argv, positional="question")
    with user_errors():
        check(settings)
    if settings.compare:
        with user_errors("--compare"):
            compare_runs(settings.compare)
        return
    with user_errors():
        remote = settings.model.startswith(("http://", "https://", "vllm:"))
        device = settings.device
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            rank_device = start_ranks(settings.device, settings.rank_timeout)
            device = device if remote else rank_device
        settings = fill_defaults(settings, base_model(settings.model), DEMO_MODEL)
        prompt = prompt_for(settings.prompt, settings.model)
        run = None if settings.question else Run(settings.out, settings, settings.resume)
    with user_errors("--data"):
        problems = held_out()
        if settings.data:
            problems = load_problems(settings.data, settings.split, settings.limit or None, settings.seed)
    fields = {field.name for field in dataclasses.fields(Sampling)}
    sampling = Sampling(**{name: value for name, value in vars(settings).items() if name in fields})
    options = {"prompt": prompt, "self_correct": settings.self_correct, "suffix_tokens": settings.suffix_tokens}
    with Executor(cpu_workers(), settings.timeout, settings.memory_mb) as executor:
        with user_errors():
            engine = load_engine(settings.model, device, settings.rows if run else 1)
            prompt.render(engine.tokenizer, "?")  # the chat template may refuse it
            if run:
                run.start()
        if run:
            barrier()
            Evaluation(run, problems, settings, run_name(settings, prompt.tools)).solve(
                engine, executor, sampling, options
            )
        else:
            answer_question(engine, executor, sampling, settings, options)


if __name__ == "__main__":
    run_main(main, many_ranks=True)
