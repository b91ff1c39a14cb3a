"""The trainer that SFT and RL share: batches, the optimizer step, guards, checkpoints and the training loop's state.

Shapes: N action tokens of a micro-batch.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch.distributed.checkpoint import state_dict as full_state  # functions that gather and scatter sharded state
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import PreTrainedModel

from thor.attention import distinct_tokens, micro_batches
from thor.distributed import all_reduce_sum, barrier, gather, rank, world_size
from thor.run_folder import LOGS, Run, to_line, write_atomic, writing
from thor.settings import UserError, by_model, setting
from thor.training.model import FULL_STATE, checkpoint_gradients, reshard, shard
from thor.training.scoring import Scores, score_tokens
from thor.trajectory import Trajectory

MAX_SKIPPED = 3  # a run stops after this many consecutive skipped optimizer steps
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class TrainSettings:
    """Settings that run_sft.py and run_rl.py share."""

    device: Literal["auto", "cpu", "cuda"] = setting("auto", "'auto' is a GPU if there is one", "model")
    lr: float = setting(1e-5, "peak learning rate", "optimisation", min=0)
    lr_schedule: Literal["constant", "linear", "cosine"] = setting(
        "constant", "learning rate after the warm-up; 'linear' and 'cosine' decay to 0", "optimisation"
    )
    warmup: float = setting(0.0, "share of the run in which lr rises from 0", "optimisation", min=0, max=1)
    beta1: float = setting(0.9, "AdamW's decay of the mean gradient", "optimisation", min=0, below=1)
    beta2: float = setting(0.95, "AdamW's decay of the mean squared gradient", "optimisation", min=0, below=1)
    weight_decay: float = setting(0.0, "weight decay of AdamW", "optimisation", min=0)
    clip: float = setting(1.0, "gradient clipping norm", "optimisation", above=0)
    max_tokens_per_micro_batch: int = setting(1024, "distinct tokens in one forward and backward pass", "memory", min=1)
    tree: bool = setting(True, "compute shared prefixes once; the result is the same", "memory")
    gradient_checkpointing: bool = setting(False, "less memory for a third more compute", "memory")
    save_every: int = setting(1, "iterations between checkpoints", "run", min=1)
    keep: int = setting(2, "number of checkpoints to keep", "run", min=1)
    evaluate: bool = setting(True, "validate before and after training, and every --eval_every", "validation")
    eval_data: str = setting(
        "auto", "held-out problems, such as 'math500,aime24'; 'auto': synthetic for the demo, else none", "validation"
    )
    eval_limit: int = setting(256, "number of problems of each source, the first ones", "validation", min=1)
    eval_every: int = setting(
        0, "iterations between validations; 0: only before and after training", "validation", min=0
    )
    eval_samples: int = setting(1, "responses per problem", "validation", min=1)
    eval_temperature: float = by_model(0.4, 0.6, "sampling temperature; 0: greedy", "validation", min=0)
    rank_timeout: float = setting(3600.0, "seconds that a rank waits for the others", "run", above=0)
    seed: int = setting(0, "random seed", "run")
    report_to: str = setting("tensorboard", "trackers, such as 'tensorboard,wandb'; 'none' for none", "run")
    resume: bool = setting(False, "resume the run in --out", "run")


# ---- batches --------------------------------------------------------------------------------------------------------


OPTIONAL = ("logp_old", "logp_ref", "value_old", "returns")  # fields of a sample that only some objectives need


@dataclass
class Sample:
    """A trajectory to train on. Only its N action tokens are scored.

    advantage: one number for all of them (GRPO), or [N] (PPO). level: 'trajectory' | 'step' (a regenerated step).
    logp_old, logp_ref: [N] under the policy before the update, and under the policy at the start of the run.
    value_old, returns: [N], for PPO.
    """

    trajectory: Trajectory
    advantage: float | torch.Tensor = 1.0
    level: str = "trajectory"
    logp_old: torch.Tensor | None = None
    logp_ref: torch.Tensor | None = None
    value_old: torch.Tensor | None = None
    returns: torch.Tensor | None = None

    @property
    def token_advantages(self) -> torch.Tensor:
        """The advantage of each of the N action tokens."""
        return torch.as_tensor(self.advantage, dtype=torch.float32).expand(self.trajectory.num_sampled)


@dataclass(frozen=True)
class Counts:
    """Action tokens of a whole optimizer batch: the denominators of the loss."""

    trajectory: int
    step: int
    positive: int  # with advantage > 0

    @classmethod
    def of(cls, samples: list[Sample]) -> Counts:
        tokens = Counter(trajectory=0, step=0)
        for sample in samples:
            tokens[sample.level] += sample.trajectory.num_sampled
        return cls(**tokens, positive=sum(int((s.token_advantages > 0).sum()) for s in samples))


@dataclass
class Batch:
    """What the loss needs besides the scores of a micro-batch: tensors [N], and the counts of the optimizer batch.

    lengths: action tokens of each sample. logp_sampler is NaN where the engine reported none. The last four are None if
    the samples lack them.
    """

    counts: Counts
    lengths: list[int]
    advantage: torch.Tensor
    is_step: torch.Tensor
    logp_sampler: torch.Tensor
    logp_old: torch.Tensor | None = None
    logp_ref: torch.Tensor | None = None
    value_old: torch.Tensor | None = None
    returns: torch.Tensor | None = None


def collate(samples: list[Sample], counts: Counts, device: torch.device | str = "cpu") -> Batch:
    """Concatenate the action tokens of the samples of a micro-batch."""

    def join(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([torch.empty(0), *parts]).to(device)  # a rank may have no samples

    known = {name for name in OPTIONAL if all(getattr(s, name) is not None for s in samples)}
    return Batch(
        counts,
        [s.trajectory.num_sampled for s in samples],
        join([s.token_advantages for s in samples]),
        join([torch.full((s.trajectory.num_sampled,), s.level == "step") for s in samples]).bool(),
        join([torch.tensor(s.trajectory.action_logps) for s in samples]),
        **{name: join([getattr(s, name) for s in samples]) for name in known},
    )


def rank_batches(sequences: list[list[int]], budget: int, tree: bool = True) -> list[list[int]]:
    """This rank's micro-batches. All ranks get the same number, in order of size; some may be empty."""
    if (ranks := world_size()) == 1:
        return list(micro_batches(sequences, budget, tree))
    fair = -(-distinct_tokens(sequences, tree) // ranks)
    batches = list(micro_batches(sequences, min(budget, fair), tree))
    batches.sort(key=lambda members: -distinct_tokens([sequences[b] for b in members], tree))
    batches += [[]] * (-len(batches) % ranks)
    return batches[rank() :: ranks]


def lr_factor(step: int, total: int, schedule: str, warmup: float) -> float:
    """Learning rate of a step as a share of its peak: a linear warm-up, then `schedule`, which decays to 0 at `total`.

    step: from 0 to total - 1. warmup: share of the steps. The last step still has a rate above 0.
    """
    rising = max(1.0, warmup * total)
    if step + 1 < rising or schedule == "constant":
        return min(1.0, (step + 1) / rising)
    left = (total - step) / (total + 1 - rising)
    return left if schedule == "linear" else (1 - math.cos(math.pi * left)) / 2


# ---- the trainer ----------------------------------------------------------------------------------------------------

Loss = Callable[[Batch, Scores], tuple[torch.Tensor, dict[str, float]]]


def split_evenly(items: list, batches: int) -> list[list]:
    """The optimizer batches: at most `batches` of them, whose sizes differ by at most one, none empty."""
    return [items[b::batches] for b in range(min(batches, len(items)))]


class Trainer:
    """Owns the model, the optimizer and the state of a training run, and resumes the run's last checkpoint.

    temperature: of the softmax that scores tokens. value_lr: learning rate of the value head, if there is one.
    reference: a frozen model to score with, sharded like the policy. state: part of each checkpoint, as are the sizes
    of the run's logs, to which a resumed run cuts them.
    validate(model, step, state): called before the first iteration, every --eval_every iterations and after the last.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        run: Run,
        settings: TrainSettings,
        temperature: float = 1.0,
        value_lr: float | None = None,
        reference: PreTrainedModel | None = None,
        validate: Callable[[PreTrainedModel, int, dict], None] | None = None,
    ) -> None:
        self.model, self.run, self.settings, self.validate = model, run, settings, validate
        self.temperature, self.reference = temperature, reference
        if settings.gradient_checkpointing:
            checkpoint_gradients(model)
        kind = next(model.parameters()).device.type  # of the policy, because the reference is still on the CPU
        for sharded in (model, reference) if reference else (model,):
            shard(sharded, kind)
        head = [p for name, p in model.named_parameters() if name.startswith("value_head.")]
        body = [p for name, p in model.named_parameters() if not name.startswith("value_head.")]
        groups = [{"params": body}, *([{"params": head, "lr": value_lr}] if head else [])]
        options = {"betas": (settings.beta1, settings.beta2), "weight_decay": settings.weight_decay, "fused": True}
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, **options)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.state = {"iteration": 0, "skipped_in_a_row": 0, "log_sizes": {}} | self._restore()
        self.steps = 0  # optimizer steps of this iteration
        for name in LOGS:
            run.rewind(name, self.state["log_sizes"].get(name, 0))
        run.start_trackers(self.state["iteration"])

    def iterations(self, total: int, name: str, unit: str) -> Iterator[int]:
        """Yield the remaining iterations, show a progress bar `self.bar`, and save checkpoints.

        Raises UserError after MAX_SKIPPED skipped optimizer steps in a row, with the last good weights saved.
        """
        start, save_every, eval_every = self.state["iteration"], self.settings.save_every, self.settings.eval_every
        if self.validate and start == 0:
            self.validate(self.model, 0, self.state)
        with tqdm(total=total, initial=start, desc=name, unit=unit, disable=rank() > 0) as self.bar:
            for iteration in range(start, total):
                self.steps = 0
                factor = lr_factor(iteration, total, self.settings.lr_schedule, self.settings.warmup)
                for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
                    group["lr"] = peak * factor
                yield iteration
                self.bar.update()
                self.state["iteration"] = iteration + 1
                if self.stuck:
                    self.save(self.state | {"skipped_in_a_row": 0})
                    raise UserError(
                        f"{MAX_SKIPPED} optimizer steps in a row were skipped: loss or gradient was not finite. Their "
                        f"batches are in {self.run / 'skipped'}, the weights before them in {self.run / CHECKPOINTS}"
                    )
                last = iteration + 1 == total
                if self.validate and (last or (eval_every and (iteration + 1) % eval_every == 0)):
                    self.validate(self.model, iteration + 1, self.state)
                if last or (iteration + 1) % save_every == 0:
                    self.save(self.state)

    @property
    def stuck(self) -> bool:  # too many optimizer steps in a row were skipped
        return self.state["skipped_in_a_row"] == MAX_SKIPPED

    def step(self, samples: list[Sample], loss: Loss) -> dict[str, float]:
        """One optimizer step on `samples`, the same list on all ranks: sum the gradients, clip them, update.

        loss(batch, scores) returns what a micro-batch contributes to the loss, and sums of its metrics. It divides by
        batch.counts, which covers all samples, so the gradient does not depend on how they are cut into micro-batches.
        A loss or gradient that is not finite skips the step: the weights stay, and the samples are written to skipped/.
        Returns 'loss', 'grad_norm' (before clipping; with two levels also 'grad_norm_trajectory', 'grad_norm_step'),
        'lr', 'skipped' (0 or 1), 'tokens_trajectory', 'tokens_step' (action tokens of each level), and the sums of the
        metrics.
        """
        counts, sums, logps, norms, before = Counts.of(samples), Counter(), {}, {}, None
        for level in sorted({sample.level for sample in samples}, reverse=True):  # one after the other, for their norms
            chosen = [b for b, sample in enumerate(samples) if sample.level == level]
            for members, part, scores in self._micro_batches(self.model, [samples[b] for b in chosen]):
                value, info = loss(collate(part, counts, scores.logp.device), scores)
                (value * world_size()).backward()  # FSDP averages over ranks, but the sum is needed
                sums.update({"loss": value.item()} | info)
                logps.update(zip((chosen[i] for i in members), _split(scores.logp.detach(), part), strict=True))
            parameters = list(self.model.parameters())  # sharded again, after the backward pass
            norms[f"grad_norm_{level}"] = _norm(parameters)
            if before is None:
                before = [parameter.grad for parameter in parameters]
                self.optimizer.zero_grad(set_to_none=True)
        for parameter, gradient in zip(parameters, before or [], strict=False):
            if gradient is not None:  # as for an expert that no token of a level chose
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        metrics = all_reduce_sum(sums)
        norm = _norm(parameters) if len(norms) > 1 else sum(norms.values())
        torch.nn.utils.clip_grads_with_norm_(parameters, self.settings.clip, torch.tensor(norm))
        skipped = not (math.isfinite(metrics["loss"]) and math.isfinite(norm))
        if not skipped:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if skipped:
            self._dump(samples, logps)
        self.state["skipped_in_a_row"] = self.state["skipped_in_a_row"] + 1 if skipped else 0
        self.steps += 1
        tokens = {"tokens_trajectory": counts.trajectory, "tokens_step": counts.step}
        lr = self.optimizer.param_groups[0]["lr"]
        return {**metrics, **tokens, **norms, "grad_norm": norm, "lr": lr, "skipped": float(skipped)}

    @torch.no_grad()
    def score(self, samples: list[Sample], model: PreTrainedModel | None = None) -> list[tuple]:
        """(logp [N], value [N, 2] or None) of each sample under `model` (default: the policy), on the CPU."""
        found, model = {}, model or self.model
        for members, part, scores in self._micro_batches(model, samples):
            values = [None] * len(part) if scores.value is None else _split(scores.value.cpu(), part)
            found.update(zip(members, zip(_split(scores.logp.cpu(), part), values, strict=True), strict=True))
        reshard(model)
        found = {b: scores for part in gather(found) for b, scores in part.items()}
        return [found[b] for b in range(len(samples))]

    def _micro_batches(self, model, samples: list[Sample]) -> Iterator[tuple[list[int], list[Sample], Scores]]:
        """This rank's micro-batches: indices of the samples, the samples, and their scores under `model`."""
        ids, tree = [s.trajectory.all_token_ids for s in samples], self.settings.tree
        for members in rank_batches(ids, self.settings.max_tokens_per_micro_batch, tree):
            part = [samples[b] for b in members]
            # a rank without samples scores no token of some sequence, because a sharded forward pass needs all ranks
            sequences = [ids[b] for b in members] or [ids[0][:1]]
            scored = [s.trajectory.action_positions for s in part] or [[]]
            yield members, part, score_tokens(model, sequences, scored, self.temperature, tree=tree)

    def _dump(self, samples: list[Sample], logps: dict[int, torch.Tensor]) -> None:
        """Write what this rank computed of a skipped batch to skipped/<iteration>-<step>-rank<rank>.jsonl."""
        records = []
        for b, logp in logps.items():
            sample, trajectory = samples[b], samples[b].trajectory
            tensors = {"advantages": sample.token_advantages, "logp": logp}
            tensors |= {name: getattr(sample, name) for name in OPTIONAL if getattr(sample, name) is not None}
            lists = {name: tensor.tolist() for name, tensor in tensors.items()}
            records.append(trajectory.to_dict() | {"level": sample.level} | lists)
        if records:
            folder = self.run / "skipped"
            folder.mkdir(parents=True, exist_ok=True)  # on another node the run folder may not exist yet
            name = f"{self.state['iteration']:06d}-{self.steps}-rank{rank()}.jsonl"
            write_atomic(folder / name, "".join(map(to_line, records)))

    # ---- checkpoints ----

    def save(self, state: dict) -> None:
        """Write checkpoints/<iteration>.pt, link latest.pt to it once it is complete, and keep only the newest ones.

        Parameters and optimizer state are full and by name, so any number of ranks can resume.
        """
        saved = {
            "model": full_state.get_model_state_dict(self.model, options=FULL_STATE),
            "optimizer": None,
            "state": state | {"log_sizes": self.run.log_sizes()},
        }
        if self.optimizer.state:  # before the first step there is none, and asking for it would create some
            saved["optimizer"] = full_state.get_optimizer_state_dict(self.model, self.optimizer, options=FULL_STATE)
        if rank() == 0:
            folder = self.run / CHECKPOINTS
            path, temporary, link = (folder / f for f in (f"{state['iteration']:06d}.pt", "checkpoint.tmp", "link.tmp"))
            with writing(path, temporary):
                folder.mkdir(exist_ok=True)
                torch.save(saved, temporary)
                os.replace(temporary, path)
                link.unlink(missing_ok=True)  # left by a run that was killed here
                link.symlink_to(path.name)
                os.replace(link, folder / "latest.pt")
            found = sorted(folder.glob("[0-9]*.pt"))
            newer = found.index(path) + 1  # a killed run may have left a later checkpoint that was never linked
            for other in found[: max(0, newer - self.settings.keep)] + found[newer:]:
                other.unlink()
        barrier()  # if another rank failed meanwhile, the launcher would kill rank 0 while it writes

    def _restore(self) -> dict:
        """Load the run's checkpoint, if there is one. Returns its state, or {}."""
        path, saved = self.run / CHECKPOINTS / "latest.pt", {}
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path}: broken symlink; link it to a checkpoint in this folder, or start elsewhere")
        if rank() == 0 and path.exists():
            saved = torch.load(path, map_location="cpu", weights_only=True)
            if "log_sizes" not in saved.get("state", {}):
                raise UserError(f"{path}: not a checkpoint of this version; start in another folder")
        state, has_optimizer = gather((saved.get("state"), bool(saved.get("optimizer"))))[0]
        if state is None:
            return {}
        options = full_state.StateDictOptions(full_state_dict=True, broadcast_from_rank0=world_size() > 1)
        full_state.set_model_state_dict(self.model, saved.get("model", {}), options=options)
        if has_optimizer:
            full_state.set_optimizer_state_dict(self.model, self.optimizer, saved.get("optimizer", {}), options=options)
        return state


def _norm(parameters: list[torch.nn.Parameter]) -> float:
    """Norm of all gradients together, over all ranks."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def _split(values: torch.Tensor, samples: list[Sample]) -> tuple[torch.Tensor, ...]:
    """Split [N, ...] into one tensor per sample."""
    return values.split([s.trajectory.num_sampled for s in samples])
