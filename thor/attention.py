"""One attention function for the sampler and the trainer, under transformers' own model code.

Both work on a single row of T tokens [1, T] without padding; which token sees which is told by a `layout` that
travels through the model as a keyword argument. The sampler's layout (engine.py) keeps keys and values in its cache;
the trainer's is the `Tree` below. Because the keys come rotated by position and are laid out by us, nothing depends
on transformers' cache classes, whose names change between versions.

Shapes: T tokens of the row, H query heads, K key/value heads, D head size, R rows of the cache, L cached length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel

UNSUPPORTED = ("softcap", "s_aux", "position_bias")  # would change the scores in ways not done here


def use_layout_attention(model: PreTrainedModel) -> None:
    """Switch `model` to the attention of this module; from then on it wants `layout=` in every forward.

    Raises ValueError for a model that would be computed wrongly: one with layers other than full or sliding attention,
    or whose logits on a short text are not those of its own forward pass (scaled or capped ones, for instance).
    """
    config, name = model.config.get_text_config(), type(model).__name__
    if config._attn_implementation == "thor":
        return
    layers, known = config.num_hidden_layers, {"full_attention", "sliding_attention"}
    if others := sorted(set(getattr(config, "layer_types", None) or []) - known):
        raise ValueError(f"{name} is not supported, it has {', '.join(others)}")
    if "longrope" in str(getattr(config, "rope_parameters", None)):  # its angles depend on the longest of the batch
        raise ValueError(f"{name} is not supported, it has longrope")
    ids = [i % config.vocab_size for i in range(1, 49)]
    probe, inputs = _Probe([ids]), torch.tensor([ids], device=model.device)
    implementation, training, fault = config._attn_implementation, model.training, ""
    try:
        with torch.inference_mode():
            expected = model.eval()(inputs, use_cache=False).logits[0]
            model.set_attn_implementation("thor")
            hidden = model.base_model(inputs, use_cache=False, layout=probe).last_hidden_state[0]
            difference = (model.get_output_embeddings()(hidden) - expected).abs().max().item()
        if probe.layers != set(range(layers)):
            fault = f"only {len(probe.layers)} of its {layers} layers are attention"
        elif not difference <= max(1e-3, 8 * torch.finfo(model.dtype).eps) * expected.abs().max().item():
            fault = f"its logits would be off by {difference:.2g}"
    except (TypeError, AttributeError, ValueError) as error:
        fault = str(error)
    model.train(training)
    if fault:
        model.set_attn_implementation(implementation)
        raise ValueError(f"{name} is not supported: {fault}")


def _attend(module, query, key, value, attention_mask, scaling, dropout=0.0, layout=None, **kwargs):
    """transformers' attention interface: query [1, H, T, D], key and value [1, K, T, D] -> [1, T, H, D]."""
    if layout is None:
        raise ValueError(f"{type(module).__name__} got no layout: its model does not hand keyword arguments down")
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

    window: a position sees itself and the window - 1 before it (None: all before it).
    """
    t, n = query.shape[1], key.shape[1]
    mask = None
    if window and n > window:
        mask = torch.ones(t, n, dtype=torch.bool, device=query.device).tril(n - t).triu(n - t - window + 1)
    elif 1 < t < n:
        mask = torch.ones(t, n, dtype=torch.bool, device=query.device).tril(n - t)
    if mask is not None and query.is_cuda:  # else no fused kernel would serve, and all scores would stand in memory
        key, value = (x.repeat_interleave(query.shape[0] // x.shape[0], 0) for x in (key, value))
    return F.scaled_dot_product_attention(
        query[None], key[None], value[None], mask, is_causal=mask is None and t > 1, scale=scaling, enable_gqa=True
    )[0]


class Tree:
    """B token sequences merged into one row in which every shared prefix stands, and is computed, once.

    share=False is the plain way: all sequences stand whole in the row, each sees only itself.

    What hierarchical RL trains on is such a tree: G trajectories share a prompt, the regenerated suffixes of a failed
    step share all that came before it. A token attends to its ancestors only and its position is its depth, so hidden
    states, losses and gradients equal those of the B sequences computed one by one.

    Attributes: token_ids [T], positions [T] (depth of each token), index: B lists, where each sequence's tokens stand.
    The row is a list of segments, runs of tokens without a branching: their sizes, and for each the segments that its
    tokens may see, root first and itself last.
    """

    def __init__(self, sequences: list[list[int]], share: bool = True) -> None:
        self.token_ids: list[int] = []
        self.positions: list[int] = []
        self.sizes: list[int] = []
        self.lineages: list[list[int]] = []
        self.index: list[list[int]] = [[] for _ in sequences]
        # sorting brings sequences with a common prefix together, so that each branching is a run of neighbours
        order = sorted(range(len(sequences)), key=sequences.__getitem__)
        # still to be laid out: (sequences, sorted and all equal up to a depth, that depth, the segments before it)
        branches = [(order, 0, [])] if share else [([m], 0, []) for m in reversed(order)]
        while branches:  # and not by recursion, which Python bounds: each prefix may be one of the next
            members, depth, ancestors = branches.pop()
            members = [m for m in members if len(sequences[m]) > depth]
            if not members:
                continue
            head = sequences[members[0]]
            same = [m for m in members if sequences[m][depth] == head[depth]]
            stop = common_prefix(head, sequences[same[-1]], depth)  # sorted, so what these share all share
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
        """query [H, T, D], key and value [K, T, D] -> [H, T, D]; see the class for who sees whom."""
        # split and not sliced: the gradient of a slice is a tensor of the whole row
        queries, keys, values = (x.split(self.sizes, 1) for x in (query, key, value))
        outputs = []
        for q, lineage in zip(queries, self.lineages, strict=True):
            k, v = (torch.cat([x[i] for i in lineage], 1) for x in (keys, values))
            outputs.append(causal_sdpa(q, k, v, scaling, window))
        return torch.cat(outputs, 1)


class _Probe(Tree):
    """Notes which layers ask it."""

    def __init__(self, sequences: list[list[int]]) -> None:
        super().__init__(sequences)
        self.layers: set[int] = set()

    def attend(self, layer: int, *args) -> torch.Tensor:
        self.layers.add(layer)
        return super().attend(layer, *args)


def common_prefix(a: list[int], b: list[int], start: int = 0) -> int:
    """First position from `start` on where a and b differ or one of them ends."""
    stop = min(len(a), len(b))
    while start < stop and a[start] == b[start]:
        start += 1
    return start
