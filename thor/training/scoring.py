"""Log-probs of chosen tokens, with gradients.

Shapes: B sequences, T distinct tokens of their tree, N scored tokens, V vocabulary.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from functools import partial

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from thor.attention import Tree

LOGITS = 1 << 26  # logits that exist at once; in float32 they take 256 MiB
CACHED = 1 << 22  # of them, those that a CPU passes over at a time; in float32 they take 16 MiB
# of a function: keep its arguments, and compute it again in the backward pass; there is no dropout to repeat
recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


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
