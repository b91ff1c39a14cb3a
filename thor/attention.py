"""Attention for HFEngine and the trainer, plugged into the model code of transformers.

Both run a model on one row of T tokens [1, T] without padding. A layout object, which the model passes down as a
keyword argument, decides which token attends to which: HFEngine's layout reads its KV cache (thor/engines/kv_cache.py),
the trainer's is the `Tree` below. Layouts get keys that are already rotated by position, and transformers' own cache
classes, which change between versions, are not used.

Not every model computes the same this way, so `check_logits` compares it with the model's own forward pass: for the
tree when a model is loaded, and for the KV cache when an engine is created. docs/models.md lists the results.

Shapes: B sequences, T tokens of the row, H query heads, K key/value heads, D head size of queries and keys, E head size
of values, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from itertools import chain, pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, PreTrainedModel

from thor.settings import UserError

CHECK_WINDOW = 8  # size of sliding windows in `check_logits`


class UnsupportedModelError(UserError, ValueError):
    """The model would not compute what its own forward pass computes."""


class Layout(Protocol):
    """Which token attends to which, in one forward pass."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int | None
    ) -> torch.Tensor:
        """query [H, T, D], key [K, T, D], value [K, T, E] -> [H, T, E]. Called in the same order in every pass."""


def use_layout_attention(model: PreTrainedModel) -> None:
    """Switch `model` to the attention of this module. Every forward pass then needs the argument `layout`. Idempotent.

    Raises UnsupportedModelError, with the reason, for a model whose logits would change.
    """
    config, name = model.config.get_text_config(), type(model).__name__
    if config._attn_implementation == "thor":
        return
    if others := sorted(set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}):
        raise UnsupportedModelError(f"{name} is not supported: it has layers of type {', '.join(others)}")
    if "longrope" in str(getattr(config, "rope_parameters", None)):  # its angles depend on the longest sequence
        raise UnsupportedModelError(f"{name} is not supported: it uses longrope")
    implementation = config._attn_implementation

    def tree_logits(sequences: list[list[int]]) -> list[torch.Tensor]:
        layers, calls = getattr(config, "num_hidden_layers", 1), len(empty_keys_and_values(model))
        if calls < layers:
            raise UnsupportedModelError(f"only {calls} of its {layers} layers use attention that can be replaced")
        tree = Tree(sequences)
        logits = model.get_output_embeddings()(hidden_states(model, tree.token_ids, tree.positions, tree))
        return [logits[index] for index in tree.index]

    try:
        check_logits(model, tree_logits, "several sequences in one row")
    except UnsupportedModelError:
        model.set_attn_implementation(implementation)
        raise


def hidden_states(model: PreTrainedModel, token_ids: list[int], positions: list[int], layout: Layout) -> torch.Tensor:
    """The last hidden states of a row of T tokens: [T, hidden size]."""
    return model.base_model(
        input_ids=torch.tensor([token_ids], device=model.device),
        position_ids=torch.tensor([positions], device=model.device),
        use_cache=False,
        layout=layout,
    ).last_hidden_state[0]


def _attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, layout=None, **kwargs):
    """Attention function for transformers: query [1, H, T, D], key [1, K, T, D], value [1, K, T, E] -> [1, T, H, E]."""
    if layout is None:
        raise UnsupportedModelError("its attention receives no `layout` argument")
    if attention_mask is not None:
        raise UnsupportedModelError("its attention receives a mask that the model creates")
    for name, argument in kwargs.items():  # such as softcap, sinks or a bias, which change the scores
        if isinstance(argument, float) or (torch.is_tensor(argument) and argument.is_floating_point()):
            raise UnsupportedModelError(f"its attention uses {name}, which is not implemented")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = layout.attend(query[0], key[0], value[0], scaling, kwargs.get("sliding_window"))
    return out.transpose(0, 1).contiguous().unsqueeze(0), None


AttentionInterface.register("thor", _attend)


# ---- checks when a model is loaded ----------------------------------------------------------------------------------


def check_logits(model: PreTrainedModel, compute: Callable[[list[list[int]]], list[torch.Tensor]], what: str) -> None:
    """Compare compute(sequences), which returns the logits [T, V] of each sequence, with the model's own forward pass.

    Leaves `model` with layout attention. The three sequences are short, and the first two share a prefix. Sliding
    windows are shortened meanwhile, so that the sequences exceed them.

    what: what `compute` tests, for the message. Raises UnsupportedModelError if the logits differ or `compute` fails.
    """
    training, head, plain_head = model.training, model.get_output_embeddings(), []
    ids = [i % model.config.get_text_config().vocab_size for i in range(1, 50)]
    sequences = [ids[:11] + ids[11:16], ids[:11] + ids[16:29], ids[29:49]]
    with torch.inference_mode(), _short_windows(model):
        try:
            model.eval().set_attn_implementation("eager")
            with head.register_forward_hook(lambda module, args, logits: plain_head.append(logits[0])):
                plain = [model(torch.tensor([s], device=model.device), use_cache=False).logits[0] for s in sequences]
            model.set_attn_implementation("thor")
            if difference := _difference(compute(sequences), plain, model.dtype):
                same_head = len(plain_head) == len(plain) and not _difference(plain_head, plain, model.dtype)
                reason = f"with {what}, its logits would differ by {difference:.2g}"
                raise UnsupportedModelError(reason if same_head else "it changes the logits after its output layer")
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reason = str(error)
            if not isinstance(error, UnsupportedModelError):
                reason = f"with {what}, it fails: {type(error).__name__}: {error}".splitlines()[0]
            raise UnsupportedModelError(f"{type(model).__name__} is not supported: {reason}") from error
        finally:
            model.set_attn_implementation("thor")
            model.train(training)


def _difference(found: list[torch.Tensor], plain: list[torch.Tensor], dtype: torch.dtype) -> float:
    """The largest difference between two lists of logits, or 0 if rounding in `dtype` explains it."""
    tolerance = max(1e-3, 8 * torch.finfo(dtype).eps) * max(p.abs().max().item() for p in plain)
    difference = torch.stack([(f - p).abs().max() for f, p in zip(found, plain, strict=True)]).max().item()
    return 0.0 if difference <= tolerance else difference  # NaN stays NaN, which is true


@contextlib.contextmanager
def _short_windows(model: PreTrainedModel) -> Iterator[None]:
    """Set the sliding windows of all layers to CHECK_WINDOW, except those that the longest context does not exceed."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    modules = list(model.modules())
    owners = {id(owner): owner for owner in chain(modules, (m.config for m in modules if hasattr(m, "config")))}
    changed = [
        (owner, name, value)
        for owner in owners.values()
        for name, value in vars(owner).items()
        if "window" in name and type(value) is int and CHECK_WINDOW < value < context
    ]
    try:
        for owner, name, _ in changed:
            setattr(owner, name, CHECK_WINDOW)
        yield
    finally:
        for owner, name, value in changed:
            setattr(owner, name, value)


def empty_keys_and_values(model: PreTrainedModel) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys [K, 0, D] and values [K, 0, E] of each call of attention, to create caches like them.

    Most models call attention once per layer, some more often, and sizes may differ between layers.
    """
    found = []

    class Recorder(Tree):
        def attend(self, query, key, value, *args) -> torch.Tensor:
            found.append(tuple(x.new_empty(x.shape[0], 0, x.shape[2]) for x in (key, value)))
            return super().attend(query, key, value, *args)

    with torch.inference_mode():
        hidden_states(model, [1], [0], Recorder([[1]]))
    return found


# ---- attention ------------------------------------------------------------------------------------------------------


def causal_sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int | None = None
) -> torch.Tensor:
    """Causal attention of the last t of n positions: query [H, t, D], key [K, n, D], value [K, n, E] -> [H, t, E].

    window: size of the sliding window. A position attends to itself and the window - 1 positions before it.
    """
    t, n, cuda = query.shape[1], key.shape[1], query.is_cuda
    mask, dense = None, bool(window and n > window)
    if dense:
        mask = query.new_ones(t, n, dtype=torch.bool).tril(n - t).triu(n - t - window + 1)
    elif 1 < t < n:  # flash kernels know this mask
        mask = causal_lower_right(t, n) if cuda else query.new_ones(t, n, dtype=torch.bool).tril(n - t)
    if cuda and (dense or query.dtype == torch.float32 or query.shape[-1] > 256):
        # No flash kernel. The memory-efficient one does not group heads, and without it all scores exist at once.
        key, value = (x.repeat_interleave(query.shape[0] // x.shape[0], 0) for x in (key, value))
    query, key, value = (x.unsqueeze(0) for x in (query, key, value))
    is_causal = mask is None and t > 1
    out = F.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal, scale=scaling, enable_gqa=True)
    return out.squeeze(0)


class Tree:
    """B token sequences merged into one row, in which every shared prefix is stored and computed once.

    Hierarchical RL trains on such trees: the G trajectories of a problem share its prompt, and the regenerated suffixes
    of a failed step share everything before it. A token attends to its ancestors and itself, and its position is its
    depth. Hidden states, losses and gradients therefore equal those of the B sequences computed one by one.

    The row consists of segments, which are runs of tokens without a branch.

    share: if False, sequences are not merged, and each attends only to itself.

    Attributes:
        token_ids: [T].
        positions: [T], the depth of each token.
        index: B lists with the place of each token of a sequence in the row.
        sizes: length of each segment.
        lineages: for each segment, the segments that its tokens attend to, from the root to itself.
    """

    def __init__(self, sequences: list[list[int]], share: bool = True) -> None:
        self.token_ids: list[int] = []
        self.positions: list[int] = []
        self.sizes: list[int] = []
        self.lineages: list[list[int]] = []
        self.index: list[list[int]] = [[] for _ in sequences]
        # sorted, so that sequences with a common prefix are neighbours
        order = sorted(range(len(sequences)), key=sequences.__getitem__)
        # stack of subtrees to lay out: (sorted sequences that are equal up to a depth, this depth, segments before it)
        branches = [(order, 0, [])] if share else [([m], 0, []) for m in reversed(order)]
        while branches:  # no recursion, because the depth of the tree may exceed Python's limit
            members, depth, ancestors = branches.pop()
            members = [m for m in members if len(sequences[m]) > depth]
            if not members:
                continue
            head = sequences[members[0]]
            same = [m for m in members if sequences[m][depth] == head[depth]]
            stop = common_prefix(head, sequences[same[-1]], depth)  # shared by all, because they are sorted
            start = len(self.token_ids)
            lineage = [*ancestors, len(self.sizes)]
            self.sizes.append(stop - depth)
            self.lineages.append(lineage)
            self.token_ids += head[depth:stop]
            self.positions += range(depth, stop)
            for m in same:
                self.index[m] += range(start, start + stop - depth)
            branches += [(members[len(same) :], depth, ancestors), (same, stop, lineage)]

    def attend(self, query, key, value, scaling: float, window: int | None) -> torch.Tensor:
        """query [H, T, D], key [K, T, D], value [K, T, E] -> [H, T, E]."""
        # split and not slices, because the gradient of each slice would be as large as the row
        queries, keys, values = (x.split(self.sizes, 1) for x in (query, key, value))
        outputs = []
        for q, lineage in zip(queries, self.lineages, strict=True):
            k, v = (torch.cat([x[i] for i in lineage], 1) for x in (keys, values))
            outputs.append(causal_sdpa(q, k, v, scaling, window))
        return torch.cat(outputs, 1)


def micro_batches(sequences: list[list[int]], budget: int, tree: bool = True) -> Iterator[list[int]]:
    """Indices of `sequences` in batches of at most `budget` distinct tokens; a longer sequence is a batch by itself.

    Sequences with a common prefix are neighbours. A prefix tree over the budget is split into sub-trees, each with a
    copy of the tokens that they share. tree=False: nothing is shared, every token counts.
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
    """Length of the row of a `Tree`, without building it."""
    ordered = sorted(sequences)
    shared = sum(common_prefix(a, b) for a, b in pairwise(ordered)) if tree else 0
    return sum(map(len, ordered)) - shared


def common_prefix(a: list[int], b: list[int], start: int = 0) -> int:
    """Length of the common prefix of a and b, given that they are equal up to `start`."""
    stop = min(len(a), len(b))
    while start < stop and a[start] == b[start]:
        start += 1
    return start
