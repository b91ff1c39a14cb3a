"""Log-probs and entropies of chosen tokens, with gradients and without ever holding all logits.

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

from thor.attention import Tree, hidden_states

MAX_LOGITS = 1 << 26  # logits that exist at the same time; 256 MiB in float32
CACHE_LOGITS = 1 << 22  # logits that a CPU processes at a time; 16 MiB in float32, so that they stay in its cache
# run a function now and again in the backward pass instead of keeping its intermediates; there is no dropout to repeat
recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


@dataclass
class Scores:
    """Scores of N tokens, sequence after sequence, in float32 with gradients.

    logp, entropy: [N]. value: [N, 2], one per level, of the state before each token, if the model has a value head.
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
    """log p(token | tokens before it) at `temperature`, for the tokens at positions `scored[b]` (>= 1) of sequence b.

    tree: merge the sequences into a prefix tree, so that a shared prefix is computed once; the result is the same.
    chunk: hidden states that are projected to the vocabulary at a time (default: MAX_LOGITS / V). Only states that
    predict a scored token are projected, and all chunks but the last one are recomputed in the backward pass.
    """
    layout = Tree(sequences, share=tree)
    pairs = [(layout.index[b][p - 1], sequences[b][p]) for b, positions in enumerate(scored) for p in positions]
    pairs = torch.tensor(pairs, device=model.device, dtype=torch.long).reshape(-1, 2)
    # a sharded model gathers its parameters only inside its own methods, see thor.training.model.shard
    score = getattr(model, "score_pairs", None) or types.MethodType(score_pairs, model)
    chunk = chunk or max(1, MAX_LOGITS // model.config.get_text_config().vocab_size)
    return Scores(*score(layout, pairs, temperature, chunk))


@torch.no_grad()
def score_text(model: PreTrainedModel, token_ids: list[int]) -> list[float]:
    """Log-probs of all tokens but the first at temperature 1. VLLMEngine verifies weight updates with it."""
    return score_tokens(model, [token_ids], [list(range(1, len(token_ids)))], 1.0).logp.tolist()


def score_pairs(model: PreTrainedModel, layout: Tree, pairs: torch.Tensor, temperature: float, chunk: int):
    """(logp, entropy, value) of `pairs` [N, 2]: (position in the row of the state that predicts, id of its target)."""
    hidden = hidden_states(model, layout.token_ids, layout.positions, layout)
    states, targets = pairs.unbind(1)
    head, value_head = model.get_output_embeddings(), getattr(model, "value_head", None)

    def project(states: torch.Tensor, targets: torch.Tensor):
        return LogProb.apply(head(states), targets, temperature)

    # at least one chunk, even if it is empty: with many ranks every parameter needs a gradient on each of them
    starts = range(0, max(1, len(pairs)), chunk)
    parts = []
    for i in starts:
        # the backward pass needs the last chunk's logits first, so they are kept; the others are recomputed
        compute = project if i == starts[-1] else partial(recompute, project)
        parts.append(compute(hidden[states[i : i + chunk]], targets[i : i + chunk]))
    logp, entropy = (torch.cat(part) for part in zip(*parts, strict=True))
    return logp, entropy, value_head(hidden[states]).float() if value_head else None


class LogProb(torch.autograd.Function):
    """logits [N, V], targets [N] -> log-probs of the targets [N] and entropies [N] at a temperature, in float32.

    Plain autograd would be slower and take several times the memory, because it writes tensors of the size of the
    logits. The forward pass here processes a few rows at a time. The backward pass overwrites the logits, which
    nothing else uses, with their gradient.
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
        d_target = torch.zeros_like(entropy) if d_logp is None else d_logp[:, None] / ctx.temperature
        for rows in _blocks(logits):
            logps = gradient[rows].float().div_(ctx.temperature).sub_(log_total[rows])
            factor = d_target[rows]
            if d_entropy is not None:
                factor = factor + (logps + entropy[rows]) * d_entropy[rows, None] / ctx.temperature
            gradient[rows] = logps.exp_().mul_(-factor).scatter_add_(1, targets[rows, None], d_target[rows])
        return gradient, None, None


def _blocks(logits: torch.Tensor) -> list[slice]:
    """Slices of as many rows as fit in a CPU's cache; a GPU takes all rows at once."""
    rows = max(1, len(logits) if logits.is_cuda else CACHE_LOGITS // logits.shape[1])
    return [slice(i, i + rows) for i in range(0, len(logits), rows)]
