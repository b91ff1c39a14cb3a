"""Validation on held-out problems before, during and after training, with the sampling limits of the run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from tqdm import tqdm
from transformers import PreTrainedModel

from thor.data import load_problems, split_sources
from thor.distributed import gather, rank, world_size
from thor.engines import Engine
from thor.evaluation import evaluate
from thor.metrics import mean_interval, summarize, table
from thor.prompts import Prompt
from thor.rollout import Sampling
from thor.run_folder import Run, finite, write_atomic
from thor.sandbox import Executor
from thor.settings import UserError, derive_seed, user_errors
from thor.training.model import policy_parameters, save_model
from thor.training.trainer import TrainSettings
from thor.trajectory import Problem

SCORES = "validation.json"  # in the folder of a model: its scores, by `Validation.key`
LOGGED = ("accuracy", "code_ratio", "code_pass_rate", "truncated", "tokens")  # means that the trackers get


def load_validation(settings: TrainSettings, demo: bool) -> dict[str, list[Problem]]:
    """The problems of each source in --eval_data. demo: the run trains the demo, whose held-out problems are known.

    Wrong settings end the script, see `user_errors`.
    """
    sources = split_sources(settings.eval_data) if settings.evaluate else []
    if sources == ["auto"]:
        sources = ["synthetic"] if demo else []
    with user_errors():
        if sources and settings.eval_temperature == 0 and settings.eval_samples > 1:
            raise UserError("--eval_temperature 0: greedy samples would all be equal; use --eval_samples 1")
    with user_errors("--eval_data"):
        return {name: load_problems(name, split="test", limit=settings.eval_limit) for name in sources}


class Validation:
    """Evaluates a model that is trained, keeps the curve in validation.jsonl and the best model in best/.

    sources: problems by name, see `load_validation`; none switches validation off.
    sampling: the limits of the run; temperature and seed are replaced.
    """

    def __init__(
        self,
        run: Run,
        settings: TrainSettings,
        sources: dict[str, list[Problem]],
        engine: Engine,
        executor: Executor,
        sampling: Sampling,
        prompt: Prompt,
    ) -> None:
        self.run, self.settings, self.sources, self.prompt = run, settings, sources, prompt
        self.engine, self.executor = engine, executor
        seed = derive_seed(settings.seed, "validation")  # the same each time: less noise between validations
        self.sampling = replace(sampling, temperature=settings.eval_temperature, seed=seed)
        self.last: dict[str, dict] = {}  # the last record of each source

    def __call__(self, model: PreTrainedModel, step: int, state: dict) -> None:
        """Evaluate `model` after `step` iterations. Ranks share the problems. Updates state['best'] = [accuracy, step].

        At step 0, scores that were saved with the model under the same conditions are taken over: RL starts with the
        model and the problems that SFT has ended with. accuracy: mean over the sources. With --eval_every, a model that
        is better than all before is saved in best/.
        """
        if not self.sources:
            return
        self.engine.update_weights(policy_parameters(model))
        saved = Path(self.settings.model) / SCORES
        known = json.loads(saved.read_text()) if step == 0 and rank() == 0 and saved.is_file() else {}
        known, means = gather(known)[0], []
        for name, problems in self.sources.items():
            if record := known.get(self.key(name)):
                record = {**record, "step": 0}
                if rank() == 0:
                    tqdm.write(f"{name}, step 0: the scores that were saved in {self.settings.model}")
            else:
                record = self.measure(name, problems, step)
            self.last[name] = record
            self.run.append("validation.jsonl", record)
            # with the last iteration before it, because a resumed run hides the points of later ones
            self.run.track(max(0, step - 1), {f"validation/{name}/{key}": record[key][0] for key in LOGGED})
            means.append(record["accuracy"][0])
        accuracy = sum(means) / len(means)
        if accuracy > state.get("best", [-1.0])[0]:
            state["best"] = [accuracy, step]
            if self.settings.eval_every and step:
                with self.run.whole_folder("best") as folder:
                    save_model(model, self.engine.tokenizer, folder, self.prompt)
        self.engine.sleep()

    def measure(self, name: str, problems: list[Problem], step: int) -> dict:
        """Sample and grade the problems of a source. Returns its line of validation.jsonl."""
        mine = [p for p in problems[rank() :: world_size()] for _ in range(self.settings.eval_samples)]
        label = f"{name}, step {step}"
        part = evaluate(self.engine, self.executor, mine, self.sampling, label, prompt=self.prompt)
        scores = [score for part in gather(part) for score in part]
        rewards: dict[str, list[float]] = {problem.id: [] for problem in problems}
        for score in scores:
            rewards[score.id] += [] if score.reward is None else [score.reward]
        return finite({"step": step, "data": name, **summarize(scores), "rewards": list(rewards.values())})

    def key(self, name: str) -> str:
        """Identifies what the scores of a model on a source depend on, besides the model."""
        tools = type(self.engine).__name__, self.executor.timeout, self.executor.memory_mb
        what = self.sources[name], self.settings.eval_samples, self.sampling, self.prompt, tools
        return hashlib.sha256(repr(what).encode()).hexdigest()

    def save_scores(self, folder: Path) -> None:
        """Write the last scores into the folder of the model that they are of."""
        if self.last and rank() == 0:
            write_atomic(folder / SCORES, json.dumps({self.key(name): r for name, r in self.last.items()}) + "\n")

    def report(self) -> str:
        """Where the models are; for each source the table of its first and last validation, and the paired difference.

        A source that was validated only once has no table. Empty on other ranks than 0, which may not see the run.
        """
        if rank():
            return ""
        lines, records = [f"last model: {self.run / 'final'}"], self.run.read("validation.jsonl")
        best = self.run / "best"
        if records and self.settings.eval_every:
            lines.append(f"best model: {best if best.exists() else 'the initial one'}")
        for name in self.sources:
            found = [record for record in records if record["data"] == name]
            if len(found) < 2:  # the run began with --evaluate False
                continue
            first, last = found[0], found[-1]
            rows = [(f"{name}, step {record['step']}", record) for record in (first, last)]
            # the same problems in the same order: differences within problems have far less noise than two means
            change = [
                fmean(after) - fmean(before) if before and after else None
                for before, after in zip(first["rewards"], last["rewards"], strict=True)
            ]
            mean, low, high = mean_interval(change)
            lines += [table(rows), f"change {mean:+.1%} [{low:+.1%}, {high:+.1%}]"]
        return "\n".join(lines)
