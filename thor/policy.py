"""Models: loading, saving, and the log-probs of chosen tokens with gradients.

Shapes: B sequences, T distinct tokens of their tree, N scored tokens, V vocabulary.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as hf_logging

from thor.attention import Tree, use_layout_attention
from thor.demo_model import ModelError, demo_model
from thor.engine import Engine, HFEngine
from thor.engine_vllm import HTTPEngine, VLLMEngine
from thor.runlog import Run

DEMO_MODEL = "smollm2-135m"


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
        use_layout_attention(model)
    except ValueError as error:
        raise ModelError(f"{name}: {error}") from error
    return model.to(device).eval(), tokenizer


def load_engine(name: str, device: str, rows: int) -> Engine:
    """An engine to sample from the model `name`: 'http://host:port' is a running `vllm serve` (with '#model' behind it,
    one that serves that model), 'vllm:' before any other name is vLLM in this process, else HFEngine.

    rows: requests that sample at once. Raises ModelError, ValueError, RuntimeError or ConnectionError, each one line.
    """
    if name.startswith(("http://", "https://", "vllm:")):
        if device != "auto":
            raise ValueError(f"--device {device}: vLLM chooses its own, leave it out with {name}")
        if name.startswith("vllm:"):
            return VLLMEngine(model_source(name.removeprefix("vllm:")), rows)
        return HTTPEngine(name, rows)
    return HFEngine(*load_policy(name, device, "auto"), max_rows=rows)


def save_policy(model: PreTrainedModel, tokenizer, folder: Path) -> None:
    """Write a plain Hugging Face folder that transformers and vLLM load."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@dataclass
class Scores:
    """Log-probs and entropies [N] of the scored tokens, sequence after sequence, in float32; logp has gradients."""

    logp: torch.Tensor
    entropy: torch.Tensor


def score_tokens(
    model: PreTrainedModel, sequences: list[list[int]], scored: list[list[int]], temperature: float, chunk: int = 1024
) -> Scores:
    """log p(token | all before it) at temperature, for the tokens at positions `scored[b]` (>= 1) of sequence b.

    The sequences are merged into a tree, so that a shared prefix is computed once. Only states that predict a scored
    token are projected to the vocabulary, `chunk` of them at a time and again in the backward pass: logits [T, V] never
    exist at once.
    """
    tree, device = Tree(sequences), model.device
    hidden = model.base_model(
        input_ids=torch.tensor([tree.token_ids], device=device),
        position_ids=torch.tensor([tree.positions], device=device),
        use_cache=False,
        layout=tree,
    ).last_hidden_state[0]
    pairs = [(tree.index[b][p - 1], sequences[b][p]) for b, positions in enumerate(scored) for p in positions]
    states, targets = torch.tensor(pairs, device=device, dtype=torch.long).reshape(-1, 2).unbind(1)
    head = model.get_output_embeddings()

    def project(states: torch.Tensor, targets: torch.Tensor):
        logps = torch.log_softmax(head(states).float() / temperature, -1)
        entropy = -(logps.detach().exp() * logps.detach()).sum(-1)
        return logps.gather(-1, targets[:, None]).squeeze(1), entropy

    parts = [
        checkpoint(project, hidden[states[i : i + chunk]], targets[i : i + chunk], use_reentrant=False)
        for i in range(0, len(pairs), chunk)
    ]
    logp, entropy = (
        (torch.cat(part) for part in zip(*parts, strict=True)) if parts else (hidden.sum(-1)[:0].float(),) * 2
    )
    return Scores(logp, entropy)


@torch.no_grad()
def score_text(model: PreTrainedModel, token_ids: list[int]) -> list[float]:
    """Log-probs of a text's tokens but the first at temperature 1, to which an engine's are held (its `score`)."""
    return score_tokens(model, [token_ids], [list(range(1, len(token_ids)))], 1.0).logp.tolist()


def micro_batches(sequences: list[list[int]], budget: int) -> Iterator[list[int]]:
    """Indices in batches of at most `budget` distinct tokens (a longer sequence goes alone), like prefixes together."""
    batch: list[int] = []
    tokens, last = 0, []
    for b in sorted(range(len(sequences)), key=sequences.__getitem__):
        new = sequences[b]
        shared = next((i for i, (x, y) in enumerate(zip(last, new, strict=False)) if x != y), min(len(last), len(new)))
        if batch and tokens + len(new) - shared > budget:
            yield batch
            batch, tokens, shared = [], 0, 0
        batch.append(b)
        tokens += len(new) - shared
        last = new
    if batch:
        yield batch


def optimizer_step(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    sequences: list[list[int]],
    scored: list[list[int]],
    loss_of: Callable[[list[int], Scores], torch.Tensor],
    micro_tokens: int,
    clip: float,
    temperature: float = 1.0,
) -> dict[str, float]:
    """One step on all `sequences`: gradients are summed over micro-batches, then clipped, then applied.

    `loss_of(members, scores)` is the part of the loss that the sequences `members` add, already divided by what is
    counted over the whole batch, so that the gradient does not depend on how the batch is cut. A loss or gradient
    that is not finite skips the step: 'skipped' is 1.0 and the weights stay.
    """
    total = 0.0
    for members in micro_batches(sequences, micro_tokens):
        scores = score_tokens(model, [sequences[b] for b in members], [scored[b] for b in members], temperature)
        loss = loss_of(members, scores)
        loss.backward()
        total += loss.item()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item()
    skipped = not (math.isfinite(total) and math.isfinite(norm))
    if not skipped:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"loss": total, "grad_norm": norm, "skipped": float(skipped)}


CHECKPOINT = "checkpoints/latest.pt"


def save_checkpoint(run: Run, model: PreTrainedModel, optimizer: torch.optim.Optimizer, progress: dict) -> None:
    """Everything that a resumed run needs, in one file that takes the place of the one before when it is whole."""
    path = run / CHECKPOINT
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "progress": progress}, temporary)
    os.replace(temporary, path)


def restore(run: Run, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict:
    """Load the run's checkpoint, if there is one; returns its progress (empty for a fresh run)."""
    if not (run / CHECKPOINT).exists():
        return {}
    state = torch.load(run / CHECKPOINT, map_location=model.device, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["progress"]
