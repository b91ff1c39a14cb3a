"""Attention for HFEngine and the trainer, plugged into the model code of transformers.

Both run a model on one row of T tokens [1, T] without padding. A layout object, which the model passes down as a
keyword argument, decides which token attends to which: HFEngine's layout reads its KV cache (thor/engines/kv_cache.py),
the trainer's is the `Tree` below. Layouts get keys that are already rotated by position, and transformers' own cache
classes, which change between versions, are not used.

Shapes: B sequences, T tokens of the row, H query heads, K key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel

UNSUPPORTED = ("softcap", "s_aux", "position_bias")  # arguments that change attention scores


def use_layout_attention(model: PreTrainedModel) -> None:
    """Switch `model` to the attention of this module. Every forward pass then needs the argument `layout`. Idempotent.

    Raises ValueError for a model that is not supported: if it has layers other than full or sliding attention, or if
    its logits for a short text change, for example because it scales or caps them outside of `base_model`.
    """
    config, name = model.config.get_text_config(), type(model).__name__
    if config._attn_implementation == "thor":
        return
    layers, known = config.num_hidden_layers, {"full_attention", "sliding_attention"}
    if others := sorted(set(getattr(config, "layer_types", None) or []) - known):
        raise ValueError(f"{name} is not supported, it has {', '.join(others)}")
    if "longrope" in str(getattr(config, "rope_parameters", None)):  # its angles depend on the longest sequence
        raise ValueError(f"{name} is not supported, it uses longrope")
    ids = [i % config.vocab_size for i in range(1, 49)]
    probe, inputs = _Probe([ids]), torch.tensor([ids], device=model.device)
    implementation, training, problem = config._attn_implementation, model.training, ""
    try:
        with torch.inference_mode():
            expected = model.eval()(inputs, use_cache=False).logits[0]
            model.set_attn_implementation("thor")
            hidden = model.base_model(inputs, use_cache=False, layout=probe).last_hidden_state[0]
            difference = (model.get_output_embeddings()(hidden) - expected).abs().max().item()
        if probe.layers != set(range(layers)):
            problem = f"only {len(probe.layers)} of its {layers} layers use attention"
        elif not difference <= max(1e-3, 8 * torch.finfo(model.dtype).eps) * expected.abs().max().item():
            problem = f"its logits would differ by {difference:.2g}"
    except (TypeError, AttributeError, ValueError) as error:
        problem = str(error)
    model.train(training)
    if problem:
        model.set_attn_implementation(implementation)
        raise ValueError(f"{name} is not supported: {problem}")


def _attend(module, query, key, value, attention_mask, scaling, dropout=0.0, layout=None, **kwargs):
    """Attention function for transformers: query [1, H, T, D], key and value [1, K, T, D] -> [1, T, H, D]."""
    if layout is None:
        raise ValueError(f"{type(module).__name__} got no layout: its model does not pass keyword arguments down")
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"{type(module).__name__} uses {name}, which thor.attention does not implement")
    out = layout.attend(module.layer_idx, query[0], key[0], value[0], scaling, kwargs.get("sliding_window"))
    return out.transpose(0, 1).unsqueeze(0), None


AttentionInterface.register("thor", _attend)


def causal_sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, window: int | None = None
) -> torch.Tensor:
    """Causal attention of the last t of n positions: query [H, t, D], key and value [K, n, D] -> [H, t, D].

    window: size of the sliding window. A position attends to itself and the window - 1 positions before it.
    """
    t, n = query.shape[1], key.shape[1]
    mask = None
    if window and n > window:
        mask = torch.ones(t, n, dtype=torch.bool, device=query.device).tril(n - t).triu(n - t - window + 1)
    elif 1 < t < n:
        mask = torch.ones(t, n, dtype=torch.bool, device=query.device).tril(n - t)
    if mask is not None and query.is_cuda:  # grouped heads with a mask have no fused kernel, which saves memory
        key, value = (x.repeat_interleave(query.shape[0] // x.shape[0], 0) for x in (key, value))
    return F.scaled_dot_product_attention(
        query[None], key[None], value[None], mask, is_causal=mask is None and t > 1, scale=scaling, enable_gqa=True
    )[0]


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

    def attend(self, layer: int, query, key, value, scaling: float, window: int | None) -> torch.Tensor:
        """query [H, T, D], key and value [K, T, D] -> [H, T, D]."""
        # split and not slices, because the gradient of each slice would be as large as the row
        queries, keys, values = (x.split(self.sizes, 1) for x in (query, key, value))
        outputs = []
        for q, lineage in zip(queries, self.lineages, strict=True):
            k, v = (torch.cat([x[i] for i in lineage], 1) for x in (keys, values))
            outputs.append(causal_sdpa(q, k, v, scaling, window))
        return torch.cat(outputs, 1)


class _Probe(Tree):
    """A tree that records which layers use it."""

    def __init__(self, sequences: list[list[int]]) -> None:
        super().__init__(sequences)
        self.layers: set[int] = set()

    def attend(self, layer: int, *args) -> torch.Tensor:
        self.layers.add(layer)
        return super().attend(layer, *args)


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
