"""Stage 2, cold start: supervised fine-tuning on TIRGen's trajectories.

    python run_sft.py                                   # the demo model on runs/tirgen/tir.jsonl
    python run_sft.py --data tir.jsonl --model Qwen/Qwen2.5-Math-7B --lr 2e-6 --batch 128 --out runs/sft-7b

    L = - sum over action tokens of log p(token | before) / number of action tokens of the whole batch

Tool output is read but never learned: its tokens have action_mask 0. Writes <out>/final, a Hugging Face folder, and
<out>/eval.json with the scores on 64 held-out synthetic problems, before (eval_base.json) and after.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from thor.demo.model import DEMO_MODEL
from thor.distributed import barrier, rank, start_ranks, workers
from thor.engines import HFEngine
from thor.evaluation import HELD_OUT_SAMPLING, evaluate, held_out, table
from thor.prompts import render_prompt
from thor.run_folder import Run
from thor.sandbox import Executor
from thor.settings import UserError, at_least, derive_seed, parse_settings, run_main, user_errors
from thor.text import encode
from thor.training.model import checkpoint_gradients, load_model, policy_parameters, sampling_copy, save_model, shard
from thor.training.trainer import MAX_SKIPPED, dump_skipped, not_finite, optimizer_step, restore, save_checkpoint
from thor.trajectory import Problem, Trajectory


@dataclass(frozen=True)
class Settings:
    """Flags of run_sft.py."""

    data: str = field(default="runs/tirgen/tir.jsonl", metadata={"help": "trajectories from run_tirgen.py"})
    model: str = field(default=DEMO_MODEL, metadata={"help": "demo name, folder or hub id"})
    epochs: int = field(default=3, metadata={"help": "passes over the data (paper: 3)"})
    batch: int = field(default=16, metadata={"help": "trajectories per optimizer step (paper: 128)"})
    lr: float = field(default=1e-4, metadata={"help": "learning rate, constant after the warm-up (paper: 2e-6)"})
    warmup: float = field(
        default=0.05, metadata={"help": "share of the steps over which lr rises from 0 (paper: 0.05)"}
    )
    weight_decay: float = field(default=0.0, metadata={"help": "of AdamW"})
    max_length: int = field(
        default=1024, metadata={"help": "longer trajectories are left out, in tokens (paper: 20,000)"}
    )
    clip: float = field(default=1.0, metadata={"help": "largest gradient norm"})
    max_tokens_per_micro_batch: int = field(
        default=1024, metadata={"help": "distinct tokens in one forward and backward pass"}
    )
    tree: bool = field(default=True, metadata={"help": "compute shared prefixes once; the result is equal"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "less memory for a third more computing"})
    save_every: int = field(default=10, metadata={"help": "optimizer steps between checkpoints"})
    keep: int = field(default=2, metadata={"help": "checkpoints that are kept, the newest"})
    evaluate: bool = field(default=True, metadata={"help": "score held-out problems before and after"})
    device: str = field(default="auto", metadata={"help": "'cpu', 'cuda', or 'auto'"})
    rank_timeout: float = field(default=3600.0, metadata={"help": "seconds a rank waits for the others, at most"})
    seed: int = field(default=0, metadata={"help": "of the order of the data"})
    out: str = field(default="runs/sft", metadata={"help": "run folder to write"})
    resume: bool = field(default=False, metadata={"help": "go on in the run folder --out"})


def load_trajectories(path: str, tokenizer) -> list[Trajectory]:
    """tir.jsonl as token ledgers; what the policy wrote has mask 1 and ends with EOS, tool output has mask 0."""
    trajectories = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            problem = Problem(str(row["id"]), row["question"], str(row["answer"]))
            segments = [(segment["text"], segment["sampled"]) for segment in row["segments"]]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            what = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"--data {path}:{number}: {what}; a row of run_tirgen.py is wanted") from error
        trajectories.append(to_ledger(problem, segments, tokenizer))
    if not trajectories:
        raise UserError(f"--data {path}: empty; run_tirgen.py writes it")
    return trajectories


def to_ledger(problem: Problem, segments: list[tuple[str, bool]], tokenizer) -> Trajectory:
    """Encode each segment on its own: exactly what a rollout would have appended."""
    trajectory = Trajectory(problem, render_prompt(tokenizer, problem.question), finish="stop", reward=1.0)
    for text, sampled in segments:
        ids = encode(tokenizer, text)
        if sampled:
            trajectory.append_sampled(ids, [0.0] * len(ids))
        else:
            trajectory.append_observation(ids)
    trajectory.append_sampled([tokenizer.eos_token_id], [0.0])
    return trajectory


def sft_loss(logp: torch.Tensor, tokens: int) -> torch.Tensor:
    """-sum(logp) / tokens, with logp [N] of a micro-batch and the number of action tokens in the whole batch."""
    return -logp.sum() / tokens


def batches_of(count: int, settings: Settings) -> list[list[int]]:
    """Indices of each optimizer step: a new order each epoch, all rows used, the last batch of an epoch is smaller."""
    steps = []
    for epoch in range(settings.epochs):
        order = list(range(count))
        random.Random(derive_seed(settings.seed, "order", epoch)).shuffle(order)
        steps += [order[i : i + settings.batch] for i in range(0, count, settings.batch)]
    return steps


def train(model, sequences: list[list[int]], scored: list[list[int]], run: Run, settings: Settings) -> None:
    """All optimizer steps, from the run's checkpoint if there is one. scored: positions of the action tokens."""
    if settings.gradient_checkpointing:
        checkpoint_gradients(model)
    shard(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=settings.weight_decay, fused=True
    )
    progress = restore(run, model, optimizer) or {"step": 0, "skipped_in_a_row": 0}
    start, in_a_row = progress["step"], progress["skipped_in_a_row"]
    run.rewind("metrics.jsonl", lambda record: record["step"] < start)
    steps = batches_of(len(sequences), settings)
    bar = tqdm(total=len(steps), initial=start, desc="sft", unit="step", disable=rank() > 0)
    for step in range(start, len(steps)):
        lr = settings.lr * min(1.0, (step + 1) / max(1, settings.warmup * len(steps)))
        optimizer.param_groups[0]["lr"] = lr
        batch = steps[step]
        tokens = sum(len(scored[b]) for b in batch)
        logps: dict[int, list[float]] = {}  # of what this rank computes, to look at if the step is skipped

        def loss_of(members, scores, batch=batch, tokens=tokens, logps=logps) -> torch.Tensor:
            parts = scores.logp.detach().split([len(scored[batch[i]]) for i in members])
            logps.update((batch[i], part.tolist()) for i, part in zip(members, parts, strict=True))
            return sft_loss(scores.logp, tokens)

        metrics = optimizer_step(
            model,
            optimizer,
            [sequences[b] for b in batch],
            [scored[b] for b in batch],
            loss_of,
            max_tokens_per_micro_batch=settings.max_tokens_per_micro_batch,
            clip=settings.clip,
            tree=settings.tree,
        )
        run.log(step, {**metrics, "lr": lr, "tokens": tokens})
        bar.update()
        bar.set_postfix(loss=f"{metrics['loss']:.3f}")
        in_a_row = in_a_row + 1 if metrics["skipped"] else 0
        if metrics["skipped"]:
            records = [{"token_ids": sequences[b], "scored": scored[b], "logp": logp} for b, logp in logps.items()]
            dump_skipped(run, f"{step:06d}", records)
        stop = in_a_row == MAX_SKIPPED
        if stop or (step + 1) % settings.save_every == 0 or step + 1 == len(steps):
            progress = {"step": step + 1, "skipped_in_a_row": 0 if stop else in_a_row}
            save_checkpoint(run, model, optimizer, step + 1, progress, settings.keep)
        if stop:
            raise not_finite(run)
    bar.close()


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(Settings, __doc__, argv)
    with user_errors():
        device = start_ranks(settings.device, settings.rank_timeout)
        run = Run(settings.out, settings, settings.resume)
        at_least(settings, epochs=1, batch=1, max_tokens_per_micro_batch=1, save_every=1, keep=1)
        if not Path(settings.data).is_file():  # said before the model is loaded
            raise UserError(f"--data {settings.data}: no such file; run_tirgen.py writes it")
        model, tokenizer = load_model(settings.model, device)
        everything = load_trajectories(settings.data, tokenizer)
        rows = [t for t in everything if len(t.prompt_ids) + len(t) <= settings.max_length]
        if not rows:
            raise UserError(f"--max_length {settings.max_length}: every trajectory of {settings.data} is longer")
    with user_errors():  # now that all ranks have seen that all is well
        run.start()
    sequences = [t.prompt_ids + t.token_ids for t in rows]
    scored = [[len(t.prompt_ids) + i for i, sampled in enumerate(t.action_mask) if sampled] for t in rows]
    print(f"{len(rows)} trajectories, {sum(map(len, scored))} tokens to learn, {len(everything) - len(rows)} too long")

    with Executor(workers=workers(), timeout=5.0) as executor:
        engine = HFEngine(sampling_copy(model), tokenizer) if settings.evaluate else None
        if engine and rank() == 0 and not (run / "eval_base.json").exists():
            base, _ = evaluate(engine, executor, held_out(), HELD_OUT_SAMPLING, "base model")
            run.write_json("eval_base.json", base)
            engine.sleep()
        train(model, sequences, scored, run, settings)
        with run.whole_folder("final") as folder:
            save_model(model, tokenizer, folder)
        print(f"model in {run / 'final'}")
        if engine:
            engine.update_weights(policy_parameters(model))
            barrier()
            if rank() == 0:
                after, trajectories = evaluate(engine, executor, held_out(), HELD_OUT_SAMPLING, "after SFT")
                run.rewind("trajectories.jsonl", lambda record: False)
                run.write_trajectories("trajectories.jsonl", trajectories, tokenizer)
                run.write_json("eval.json", after)
                print(table([("base", json.loads((run / "eval_base.json").read_text())), ("after SFT", after)]))


if __name__ == "__main__":
    run_main(main, many_ranks=True)
