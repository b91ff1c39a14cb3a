"""The optimizer step over micro-batches, guards and checkpoints."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from thor.attention import common_prefix
from thor.distributed import all_reduce_sum, barrier, gather, rank, world_size
from thor.run_folder import Run, write_atomic
from thor.settings import UserError
from thor.training.model import WHOLE
from thor.training.scoring import Scores, score_tokens


def micro_batches(sequences: list[list[int]], budget: int, tree: bool = True) -> Iterator[list[int]]:
    """Indices in batches of at most `budget` distinct tokens (a longer sequence goes alone), like prefixes together.

    A prefix tree over the budget is thereby split into sub-trees, each with a copy of what they share.
    tree=False: nothing is shared, every token counts.
    """
    batch: list[int] = []
    tokens, last = 0, []
    for b in sorted(range(len(sequences)), key=sequences.__getitem__):
        new = sequences[b]
        shared = common_prefix(last, new) if tree else 0
        if batch and tokens + len(new) - shared > budget:
            yield batch
            batch, tokens, shared = [], 0, 0
        batch.append(b)
        tokens += len(new) - shared
        last = new
    if batch:
        yield batch


def distinct_tokens(sequences: list[list[int]], tree: bool = True) -> int:
    """Tokens of the row that `sequences` are laid out in."""
    ordered = sorted(sequences)
    shared = sum(common_prefix(a, b) for a, b in pairwise(ordered)) if tree else 0
    return sum(map(len, ordered)) - shared


def rank_batches(sequences: list[list[int]], budget: int, tree: bool = True) -> list[list[int]]:
    """This rank's micro-batches. All ranks get equally many, of similar size at a time; some may get empty ones."""
    ranks = world_size()
    if ranks == 1:
        return list(micro_batches(sequences, budget, tree))
    fair = -(-distinct_tokens(sequences, tree) // ranks)
    batches = list(micro_batches(sequences, min(budget, fair), tree))
    batches.sort(key=lambda members: -distinct_tokens([sequences[b] for b in members], tree))
    batches += [[]] * (-len(batches) % ranks)
    return batches[rank() :: ranks]


def optimizer_step(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    sequences: list[list[int]],
    scored: list[list[int]],
    loss_of: Callable[[list[int], Scores], torch.Tensor],
    max_tokens_per_micro_batch: int,
    clip: float,
    temperature: float = 1.0,
    tree: bool = True,
) -> dict[str, float]:
    """One step on all `sequences` (the same list on all ranks): gradients are summed, then clipped, then applied.

    `loss_of(members, scores)` is the part of the loss that the sequences `members` add, already divided by what is
    counted over the whole batch, so that the gradient does not depend on how the batch is cut. A rank that is left
    without work calls it with no members, so that it joins in what the ranks do together. A loss or gradient that is
    not finite skips the step: 'skipped' is 1.0 and the weights stay.
    """
    total = 0.0
    for members in rank_batches(sequences, max_tokens_per_micro_batch, tree):
        rows = [sequences[b] for b in members] or [sequences[0][:1]]
        scores = score_tokens(model, rows, [scored[b] for b in members] or [[]], temperature, tree=tree)
        loss = loss_of(members, scores)
        (loss * world_size()).backward()  # FSDP takes the mean over ranks, wanted is the sum
        total += loss.item()
    total = all_reduce_sum({"loss": total})["loss"]
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    skipped = not (math.isfinite(total) and math.isfinite(norm))
    if not skipped:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"loss": total, "grad_norm": norm, "skipped": float(skipped)}


# ---- guards and checkpoints -----------------------------------------------------------------------------------------

MAX_SKIPPED = 3  # optimizer steps in a row, then a run stops
CHECKPOINTS = "checkpoints"


def dump_skipped(run: Run, name: str, records: list[dict]) -> None:
    """The batch of a skipped step, to look at: skipped/<name>-rank<r>.jsonl with what this rank had of it, if any."""
    if not records:
        return
    folder = run / "skipped"
    folder.mkdir(parents=True, exist_ok=True)  # on a node of its own it is not there yet
    write_atomic(folder / f"{name}-rank{rank()}.jsonl", "".join(json.dumps(r) + "\n" for r in records))


def not_finite(run: Run) -> UserError:
    return UserError(
        f"{MAX_SKIPPED} optimizer steps in a row had a loss or gradient that is not finite, and were left out; "
        f"their batches are in {run / 'skipped'}, the weights before them in {run / CHECKPOINTS}"
    )


def save_checkpoint(
    run: Run, model: PreTrainedModel, optimizer: torch.optim.Optimizer, number: int, progress: dict, keep: int
) -> None:
    """checkpoints/<number>.pt: all that a resumed run needs; the newest `keep` stay, latest.pt links to the last.

    Parameters and optimizer state are whole in it, by name, so that any number of ranks can load it. A file and then
    the link get their names when they are whole: wherever a run is killed, latest.pt is a good checkpoint.
    """
    state = {
        "model": get_model_state_dict(model, options=WHOLE),
        # without a step taken there is no state, and asking for it would make some
        "optimizer": get_optimizer_state_dict(model, optimizer, options=WHOLE) if optimizer.state else None,
        "progress": progress,
    }
    if rank() == 0:
        folder = run / CHECKPOINTS
        folder.mkdir(exist_ok=True)
        path, temporary, link = folder / f"{number:06d}.pt", folder / "checkpoint.tmp", folder / "link.tmp"
        torch.save(state, temporary)
        os.replace(temporary, path)
        link.unlink(missing_ok=True)  # of a run that was killed here
        link.symlink_to(path.name)
        os.replace(link, folder / "latest.pt")
        there = sorted(folder.glob("[0-9]*.pt"))
        newer = there.index(path) + 1  # later numbers are left of a run that was killed before they were linked
        for other in there[: max(0, newer - keep)] + there[newer:]:
            other.unlink()
    barrier()  # a rank that went on and then failed would have torchrun end rank 0 in here


def restore(run: Run, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict:
    """Load the run's checkpoint, if there is one; returns its progress (empty for a fresh run)."""
    path, state = run / CHECKPOINTS / "latest.pt", {}
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path}: leads to no file; link it to a checkpoint beside it, or begin in another folder")
    if rank() == 0 and path.exists():
        state = torch.load(path, map_location="cpu", weights_only=True)
    progress, stepped = gather((state.get("progress"), bool(state.get("optimizer"))))[0]
    if progress is None:
        return {}
    whole = StateDictOptions(full_state_dict=True, broadcast_from_rank0=world_size() > 1)
    set_model_state_dict(model, state.get("model", {}), options=whole)
    if stepped:
        set_optimizer_state_dict(model, optimizer, state.get("optimizer", {}), options=whole)
    return progress
