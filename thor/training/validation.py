"""Validation on held-out problems before, during and after training, with the sampling limits of the run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from tqdm import tqdm
from transformers import PreTrainedModel

from thor.data import load_problems, read_jsonl, split_sources
from thor.distributed import gather, rank, world_size
from thor.engines import Engine
from thor.evaluation import evaluate
from thor.metrics import mean_interval, summarize, table
from thor.prompts import Prompt
from thor.rollout import Sampling
from thor.run_folder import Run, finite
from thor.sandbox import Executor
from thor.settings import UserError, derive_seed, user_errors
from thor.training.model import policy_parameters, save_model
from thor.training.trainer import TrainSettings
from thor.trajectory import Problem

# settings that determine the scores of a model
SAME_SCORES = ("prompt", "max_tokens", "max_rounds", "memory_mb", "seed")
SAME_SCORES += ("eval_limit", "eval_samples", "eval_temperature")
MISSING = object()
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


def last_validation(settings: TrainSettings) -> dict[str, dict]:
    """By source, the validation after the last step of the run whose final/ is --model, if its settings were the same.

    RL starts with the model and the problems that SFT has ended with.
    """
    run = Path(settings.model).resolve().parent
    files = [run / name for name in ("config.json", "metrics.jsonl", "validation.jsonl")]
    if Path(settings.model).name != "final" or not all(map(Path.is_file, files)):
        return {}
    config = json.loads(files[0].read_text())
    metrics, records = ([record for _, record in read_jsonl(file)] for file in files[1:])
    if not metrics or any(config.get(name, MISSING) != getattr(settings, name) for name in SAME_SCORES):
        return {}
    return {record["data"]: record for record in records if record["step"] == metrics[-1]["step"] + 1}


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

    def __call__(self, model: PreTrainedModel, step: int, state: dict) -> None:
        """Evaluate `model` after `step` iterations. Ranks share the problems. Updates state['best'] = [accuracy, step].

        accuracy: mean over the sources. With --eval_every, a model that is better than all before is saved in best/.
        """
        if not self.sources:
            return
        self.engine.update_weights(policy_parameters(model))
        known = gather(last_validation(self.settings) if step == 0 else {})[0]
        means = []
        for name, problems in self.sources.items():
            if name in known:
                record = {**known[name], "step": 0}
                tqdm.write(f"{name}, step 0: as the run of {self.settings.model} measured it") if rank() == 0 else None
            else:
                record = self.measure(name, problems, step)
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
