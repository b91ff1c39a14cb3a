"""Stage 2, cold start: supervised fine-tuning on TIRGen's trajectories.

    python run_sft.py                                   # the demo model on runs/tirgen/tir.jsonl
    python run_sft.py --data tir.jsonl --model Qwen/Qwen2.5-Math-7B --lr 2e-6 --batch 128 --out runs/sft-7b

    L = - sum over action tokens of log p(token | tokens before it) / number of action tokens of the whole batch

The model reads tool output but never learns it: those tokens have action_mask 0. Writes <out>/final, a Hugging Face
folder, and validation.jsonl, the scores on held-out problems.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch

from thor.data import read_jsonl
from thor.demo import DEMO_MODEL
from thor.distributed import cpu_workers, start_ranks
from thor.engines import HFEngine
from thor.prompts import Prompt
from thor.rollout import Sampling
from thor.run_folder import Run, base_model
from thor.sandbox import Executor
from thor.settings import (
    PROMPT_HELP,
    UserError,
    by_model,
    derive_seed,
    fill_defaults,
    parse_settings,
    prompt_for,
    run_main,
    setting,
    user_errors,
)
from thor.tirgen.draft import to_ledger
from thor.tirgen.store import from_row
from thor.training.model import load_model, sampling_copy, save_model
from thor.training.scoring import Scores
from thor.training.trainer import Batch, Sample, Trainer, TrainSettings, split_evenly
from thor.training.validation import Validation, load_validation
from thor.trajectory import Trajectory


@dataclass(frozen=True)
class Settings(TrainSettings):
    """Flags of run_sft.py, in addition to those of TrainSettings."""

    data: str = setting("runs/tirgen/tir.jsonl", "trajectories from run_tirgen.py", "data")
    max_length: int = by_model(1024, 20_000, "skip longer trajectories, in tokens (paper: 20,000)", "data", min=1)
    model: str = setting(DEMO_MODEL, "name of the demo model, folder or hub id", "model")
    prompt: str = setting("", PROMPT_HELP, "model")
    epochs: int = by_model(2, 3, "passes over the data (paper: 3)", "optimisation", min=1)
    batch: int = by_model(12, 128, "trajectories per optimizer step (paper: 128)", "optimisation", min=1)
    lr: float = by_model(1e-4, 2e-6, "peak learning rate (paper: 2e-6)", "optimisation", min=0)
    warmup: float = setting(0.05, "share of the steps in which lr rises (paper: 0.05)", "optimisation", min=0, max=1)
    eval_every: int = setting(0, "steps between validations; 0: only first and last", "validation", min=0)
    max_tokens: int = by_model(144, 4096, "maximum response length in validation, in tokens", "validation", min=1)
    max_rounds: int = by_model(3, 5, "maximum tool calls per response in validation (paper: 5)", "validation", min=0)
    save_every: int = setting(10, "optimizer steps between checkpoints", "run", min=1)
    memory_mb: int = setting(1024, "memory limit of a code block in MiB", "validation", min=1)
    out: str = setting("runs/sft", "run folder to write", "run")


def load_trajectories(path: str, tokenizer, prompt: Prompt) -> list[Trajectory]:
    """tir.jsonl as token ledgers. Raises UserError, which names the line at fault."""
    try:
        rows = [from_row(row, where) for where, row in read_jsonl(Path(path))]
    except ValueError as error:
        raise UserError(f"--data {error}; must be a row of run_tirgen.py") from error
    if not rows:
        raise UserError(f"--data {path}: is empty; run_tirgen.py writes it")
    return [to_ledger(problem, segments, tokenizer, prompt) for problem, segments in rows]


def sft_loss(batch: Batch, scores: Scores) -> tuple[torch.Tensor, dict[str, float]]:
    """-sum(logp) / action tokens of the optimizer batch, for the N tokens of a micro-batch. Returns (loss, {})."""
    return -scores.logp.sum() / max(1, batch.counts.trajectory), {}


def batches_of(count: int, settings: Settings) -> list[list[int]]:
    """Row numbers of each optimizer step. Each epoch has a new order and all rows, in batches of about one size."""
    steps, batches = [], -(-count // settings.batch)
    for epoch in range(settings.epochs):
        order = list(range(count))
        random.Random(derive_seed(settings.seed, "order", epoch)).shuffle(order)
        steps += split_evenly(order, batches)
    return steps


def train(model, trajectories: list[Trajectory], run: Run, settings: Settings, validate=None) -> None:
    """All optimizer steps, from the run's checkpoint if there is one."""
    trainer = Trainer(model, run, settings, validate=validate)
    steps = batches_of(len(trajectories), settings)
    for step in trainer.iterations(len(steps), "sft", "step"):
        metrics = trainer.step([Sample(trajectories[i]) for i in steps[step]], sft_loss)
        logged = {name: metrics[name] for name in ("loss", "grad_norm", "skipped", "lr")}
        run.log(step, logged | {"tokens": metrics["tokens_trajectory"]})
        trainer.bar.set_postfix(loss=f"{metrics['loss']:.3f}")


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(Settings, __doc__, argv)
    with user_errors():
        device = start_ranks(settings.device, settings.rank_timeout)
        settings = fill_defaults(settings, base_model(settings.model), DEMO_MODEL)
        prompt = prompt_for(settings.prompt, settings.model)
        run = Run(settings.out, settings, settings.resume)
        if not Path(settings.data).is_file():  # before the model is loaded
            raise UserError(f"--data {settings.data}: no such file; run_tirgen.py writes it")
        model, tokenizer = load_model(settings.model, device)
        everything = load_trajectories(settings.data, tokenizer, prompt)
        rows = [t for t in everything if len(t.all_token_ids) <= settings.max_length]
        if not rows:
            raise UserError(f"--max_length {settings.max_length}: every trajectory of {settings.data} is longer")
    held_out = load_validation(settings, demo=settings.model == DEMO_MODEL)
    with user_errors():  # after all ranks have checked their input
        run.start()
    tokens = sum(t.num_sampled for t in rows)
    print(f"{len(rows)} trajectories, {tokens} tokens to train on, {len(everything) - len(rows)} skipped as too long")

    with run, Executor(workers=cpu_workers(), timeout=5.0, memory_mb=settings.memory_mb) as executor:
        engine = HFEngine(sampling_copy(model), tokenizer) if held_out else None
        sampling = Sampling(settings.max_tokens, max_rounds=settings.max_rounds)
        validate = Validation(run, settings, held_out, engine, executor, sampling, prompt)
        train(model, rows, run, settings, validate)
        with run.whole_folder("final") as folder:
            save_model(model, tokenizer, folder, prompt)
            validate.save_scores(folder)
        print(validate.report())


if __name__ == "__main__":
    run_main(main, many_ranks=True)
