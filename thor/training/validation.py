"""Validation on held-out problems before, during and after training, with the sampling limits of the run."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

from transformers import PreTrainedModel

from thor.data import load_problems, split_sources
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

    def __call__(self, model: PreTrainedModel, step: int, state: dict) -> None:
        """Evaluate `model` after `step` iterations. Ranks share the problems. Updates state['best'] = [accuracy, step].

        accuracy: mean over the sources. With --eval_every, a model that is better than all before is saved in best/.
        """
        if not self.sources:
            return
        self.engine.update_weights(policy_parameters(model))
        means = []
        for name, problems in self.sources.items():
            mine = [p for p in problems[rank() :: world_size()] for _ in range(self.settings.eval_samples)]
            label = f"{name}, step {step}"
            part = evaluate(self.engine, self.executor, mine, self.sampling, label, prompt=self.prompt)
            scores = [score for part in gather(part) for score in part]
            rewards: dict[str, list[float]] = {problem.id: [] for problem in problems}
            for score in scores:
                rewards[score.id] += [] if score.reward is None else [score.reward]
            summary = summarize(scores)
            record = {"step": step, "data": name, **summary, "rewards": list(rewards.values())}
            self.run.append("validation.jsonl", finite(record))
            # with the last iteration before it, because a resumed run hides the points of later ones
            self.run.track(max(0, step - 1), {f"validation/{name}/{key}": summary[key][0] for key in LOGGED})
            means.append(summary["accuracy"][0])
        accuracy = sum(means) / len(means)
        if accuracy > state.get("best", [-1.0])[0]:
            state["best"] = [accuracy, step]
            if self.settings.eval_every and step:
                with self.run.whole_folder("best") as folder:
                    save_model(model, self.engine.tokenizer, folder, self.prompt)
        self.engine.sleep()

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
