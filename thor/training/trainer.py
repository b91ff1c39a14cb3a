"""Models: loading, sharding, saving, the log-probs of chosen tokens with gradients, and the optimizer step.

Shapes: B sequences, T distinct tokens of their tree, N scored tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import json
import math
import os
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.autograd.function import once_differentiable
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as hf_logging

from thor.attention import Tree, common_prefix, use_layout_attention
from thor.cpu import keep_freed_memory, keep_less, use_onednn
from thor.demo_model import ModelError, demo_model
from thor.engine import Engine, HFEngine
from thor.engine_vllm import HTTPEngine, VLLMEngine
from thor.ranks import add_up, gather, meet, rank, world_size
from thor.runlog import Run, UserError, write_atomic

DEMO_MODEL = "smollm2-135m"
LOGITS = 1 << 26  # logits that exist at once; in float32 they take 256 MiB
CACHED = 1 << 22  # of them, those that a CPU passes over at a time; in float32 they take 16 MiB
# of a function: keep its arguments, and compute it again in the backward pass; there is no dropout to repeat
recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # gathered on rank 0, in the CPU's memory


def model_source(name: str) -> str:
    """The folder or hub id behind a model's name, the demo model fetched on first use; ModelError for a bad folder."""
    source = str(demo_model()) if name == DEMO_MODEL else name
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{name}: no config.json there; a Hugging Face model folder is wanted")
        if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
            raise ModelError(f"{name}: config.json but no weights (*.safetensors) in this model folder")
    elif folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(f"{name}: no such model folder; give '{DEMO_MODEL}', a local folder or a hub id")
    return source


def load_policy(name: str, device: str = "auto", dtype: str = "float32") -> tuple[PreTrainedModel, object]:
    """Model (in eval mode, with layout attention) and tokenizer.

    name: 'smollm2-135m' (fetched on first use), a local Hugging Face folder, or a hub id.
    device: 'auto' is a GPU where there is one. dtype: 'auto' is float32 on the CPU and bfloat16 on a GPU, for sampling
    alone; what is trained stays in float32, since small updates would be rounded away in bfloat16.
    Raises ModelError with one line that says what to do.
    """
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    dtype = ("float32" if device == "cpu" else "bfloat16") if dtype == "auto" else dtype
    source = model_source(name)
    hf_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{name}: cannot be loaded as a local folder or a hub id: {first}") from error
    try:
        prepare(model, device)
    except ValueError as error:
        raise ModelError(f"{name}: {error}") from error
    return model.to(device).eval(), tokenizer


def prepare(model: PreTrainedModel, device: str = "cpu") -> None:
    """Give `model` layout attention, and what there is to make it fast and small on the device it will be on."""
    use_layout_attention(model)
    if device == "cpu":
        use_onednn(model)
        keep_less(model)
        keep_freed_memory()


def load_engine(name: str, device: str, rows: int, share: float = 0.5) -> Engine:
    """An engine to sample from the model `name`: 'http://host:port' is a running `vllm serve` (with '#model' behind it,
    one that serves that model), 'vllm:' before any other name is vLLM in this process, else HFEngine.

    rows: requests that sample at once. share: of the free memory, what an HFEngine may fill with keys and values.
    Raises ModelError, ValueError, RuntimeError or ConnectionError, each one line.
    """
    if name.startswith(("http://", "https://", "vllm:")):
        if device != "auto":
            raise ValueError(f"--device {device}: vLLM chooses its own, leave it out with {name}")
        if name.startswith("vllm:"):
            return VLLMEngine(model_source(name.removeprefix("vllm:")), rows)
        return HTTPEngine(name, rows)
    return HFEngine(*load_policy(name, device, "auto"), max_rows=rows, share=share)


def save_policy(model: PreTrainedModel, tokenizer, folder: Path) -> None:
    """Write a plain Hugging Face folder that transformers and vLLM load: whole parameters, no value head."""
    state = get_model_state_dict(model, options=WHOLE)  # all ranks help to gather it
    if rank() == 0:
        # named_parameters has tied parameters once, under the name that transformers stores them by
        names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
        policy = {name: state[name] for name in state if name in names and not name.startswith("value_head.")}
        model.save_pretrained(folder, state_dict=policy)
        tokenizer.save_pretrained(folder)
    meet()


# ---- what training adds to a model ----------------------------------------------------------------------------------


def add_value_head(model: PreTrainedModel) -> None:
    """A critic that shares the policy's body: values = value_head(hidden state), one for each level, 0 at first.

    Trajectory and step level have rewards of different meaning (the answer is right, the block runs) at the same
    tokens, so each has its own output.
    """
    hidden = model.config.get_text_config().hidden_size
    model.value_head = torch.nn.Linear(hidden, 2, device=model.device, dtype=model.dtype)
    torch.nn.init.zeros_(model.value_head.weight)
    torch.nn.init.zeros_(model.value_head.bias)


def checkpoint_gradients(model: PreTrainedModel) -> None:
    """Keep only the layers' inputs for the backward pass and compute the rest again: less memory, a third more time."""
    for layer in decoder_layers(model):  # transformers' own switch works only in training mode, which has dropout
        layer.forward = partial(recompute, layer.forward)


def decoder_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def sampling_copy(model: PreTrainedModel) -> PreTrainedModel:
    """What HFEngine samples from: `model` itself, or, where that is going to be sharded, a whole copy on each rank.

    The copy is in bfloat16 on a GPU. `HFEngine.update_weights(policy_parameters(model))` brings it up to date.
    """
    if not dist.is_initialized():
        return model
    clone = copy.deepcopy(model)
    if model.device.type == "cuda":
        for parameter in clone.parameters():  # not clone.to(), which would round the rotary frequencies too
            parameter.data = parameter.data.to(torch.bfloat16)
    return clone


def shard(model: PreTrainedModel) -> None:
    """Divide parameters, gradients and optimizer state among the ranks (FSDP2), if there is a process group.

    On GPUs a layer computes in bfloat16; its parameters, and the sum of gradients over ranks, stay in float32. Each
    layer is gathered when it is its turn; embeddings, head and value head stay gathered from forward to backward.
    torch's own fully_shard and not accelerate, which refuses to shard on CPUs, where this is tested.
    """
    if not dist.is_initialized():
        return
    kind = model.device.type
    mesh = dist.init_device_mesh(kind, (world_size(),))
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    how = {"mesh": mesh, "mp_policy": bf16 if kind == "cuda" else MixedPrecisionPolicy()}
    for layer in decoder_layers(model):
        fully_shard(layer, **how)
    fully_shard(model, **how)
    model.score_pairs = types.MethodType(_score_pairs, model)
    register_fsdp_forward_method(model, "score_pairs")


def policy_parameters(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole parameter) without the value head, one after the other; all ranks must go through all of them."""
    for name, parameter in model.named_parameters():
        if not name.startswith("value_head."):
            yield name, parameter.detach().full_tensor() if isinstance(parameter, DTensor) else parameter


# ---- scoring --------------------------------------------------------------------------------------------------------


@dataclass
class Scores:
    """Of the scored tokens, sequence after sequence, in float32: log-probs and entropies, both [N] with gradients.

    value: [N, 2] with gradients, of the state before each token, if the model has a value head (see add_value_head).
    """

    logp: torch.Tensor
    entropy: torch.Tensor
    value: torch.Tensor | None = None


def score_tokens(
    model: PreTrainedModel,
    sequences: list[list[int]],
    scored: list[list[int]],
    temperature: float,
    chunk: int | None = None,
    tree: bool = True,
) -> Scores:
    """log p(token | all before it) at temperature, for the tokens at positions `scored[b]` (>= 1) of sequence b.

    The sequences are merged into a tree, so that a shared prefix is computed once (tree=False: they stand whole side
    by side). Only states that predict a scored token are projected to the vocabulary, `chunk` of them at a time
    (default: LOGITS / V), and all but the last chunk again in the backward pass: logits [T, V] never exist at once.
    """
    layout = Tree(sequences, share=tree)
    pairs = [(layout.index[b][p - 1], sequences[b][p]) for b, positions in enumerate(scored) for p in positions]
    pairs = torch.tensor(pairs, device=model.device, dtype=torch.long).reshape(-1, 2)
    # a sharded model is gathered only inside its own methods, see `shard`
    score = getattr(model, "score_pairs", None) or types.MethodType(_score_pairs, model)
    chunk = chunk or max(1, LOGITS // model.config.get_text_config().vocab_size)
    return Scores(*score(layout, pairs, temperature, chunk))


class _LogProb(torch.autograd.Function):
    """logits [N, V], targets [N] -> log-probs of the targets [N] and entropies [N] at temperature, in float32.

    By autograd it would be slower and take several times the memory: to write a new tensor as large as the logits
    costs more than what is computed in it. Here the forward pass makes none, but for a few rows at a time, and neither
    does the backward pass: it turns the logits themselves, which nothing else needs, into their gradient.
    """

    @staticmethod
    def forward(ctx, logits, targets, temperature):
        ctx.set_materialize_grads(False)
        columns = torch.empty(3, len(logits), 1, dtype=torch.float32, device=logits.device)
        logp, log_total, entropy = columns.unbind()
        for rows in _blocks(logits):
            scaled = logits[rows].float() / temperature
            top = scaled.amax(-1, keepdim=True)
            weights = (scaled - top).exp_()
            total = weights.sum(-1, keepdim=True)
            log_total[rows] = top + total.log()
            logp[rows] = scaled.gather(-1, targets[rows, None]) - log_total[rows]
            entropy[rows] = log_total[rows] - weights.mul_(scaled).sum(-1, keepdim=True) / total
        ctx.save_for_backward(logits, targets, log_total, entropy)
        ctx.temperature = temperature
        return logp.squeeze(1), entropy.squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_logp, d_entropy):
        """d logp / d z_j = 1[j is the target] - p_j,  d entropy / d z_j = -p_j (log p_j + entropy),  z = scaled"""
        logits, targets, log_total, entropy = ctx.saved_tensors
        gradient = logits.detach()
        pull = torch.zeros_like(entropy) if d_logp is None else d_logp[:, None] / ctx.temperature
        for rows in _blocks(logits):
            logps = gradient[rows].float().div_(ctx.temperature).sub_(log_total[rows])
            through = pull[rows]
            if d_entropy is not None:
                through = through + (logps + entropy[rows]) * d_entropy[rows, None] / ctx.temperature
            gradient[rows] = logps.exp_().mul_(-through).scatter_add_(1, targets[rows, None], pull[rows])
        return gradient, None, None


def _blocks(logits: torch.Tensor) -> list[slice]:
    """Slices of as many rows as stay in a CPU's cache while they are passed over; a GPU takes all at once."""
    rows = max(1, len(logits) if logits.is_cuda else CACHED // logits.shape[1])
    return [slice(i, i + rows) for i in range(0, len(logits), rows)]


def _score_pairs(model: PreTrainedModel, layout: Tree, pairs: torch.Tensor, temperature: float, chunk: int):
    """(logp, entropy, value) for `pairs` [N, 2] of (place of the predicting state in the row, id of its target)."""
    hidden = model.base_model(
        input_ids=torch.tensor([layout.token_ids], device=pairs.device),
        position_ids=torch.tensor([layout.positions], device=pairs.device),
        use_cache=False,
        layout=layout,
    ).last_hidden_state[0]
    states, targets = pairs.unbind(1)
    head, value_head = model.get_output_embeddings(), getattr(model, "value_head", None)

    def project(states: torch.Tensor, targets: torch.Tensor):
        return _LogProb.apply(head(states), targets, temperature)

    # one chunk even if nothing is scored: on many ranks every parameter needs a gradient on each of them
    starts = range(0, max(1, len(pairs)), chunk)
    parts = []
    for i in starts:
        # the last chunk's logits are the first that the backward pass needs: they stay, the others are computed again
        compute = project if i == starts[-1] else partial(recompute, project)
        parts.append(compute(hidden[states[i : i + chunk]], targets[i : i + chunk]))
    logp, entropy = (torch.cat(part) for part in zip(*parts, strict=True))
    return logp, entropy, value_head(hidden[states]).float() if value_head else None


@torch.no_grad()
def score_text(model: PreTrainedModel, token_ids: list[int]) -> list[float]:
    """Log-probs of a text's tokens but the first at temperature 1, to which an engine's are held (its `score`)."""
    return score_tokens(model, [token_ids], [list(range(1, len(token_ids)))], 1.0).logp.tolist()


# ---- micro-batches and the optimizer step ---------------------------------------------------------------------------


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
    total = add_up({"loss": total})["loss"]
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
    meet()  # a rank that went on and then failed would have torchrun end rank 0 in here


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
