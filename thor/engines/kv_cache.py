"""Keys and values of the tokens that HFEngine has seen, and the attention of one forward pass over them.

Two stores of the same kind: one slot a request, and one slot a prefix that several requests share. A request's first
tokens are those of its prefix, the rest stands in its own slot.

Shapes: R rows that decode, T tokens of one forward pass, P prefixes in use, H/K/D query heads, key heads, head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from thor.attention import causal_sdpa

HIDDEN = -1e30  # score of a key that is not seen; finite, since a part of a softmax may consist of nothing else


class Store:
    """Keys and values of sequences in slots: per layer `keys[layer]` and `values[layer]`, each [slots, K, capacity, D].

    items: what stands in each slot, or None. tokens: slots * capacity is at most this. Tensors grow by doubling and are
    written in place. Zeros, not garbage, beyond what is written: a masked weight of 0 times a NaN would be NaN.
    """

    def __init__(self, model: PreTrainedModel, max_slots: int, tokens: int) -> None:
        config = model.config.get_text_config()
        self.shape = config.num_hidden_layers, *_head_shape(config)
        self.dtype, self.device = model.dtype, model.device
        self.max_slots, self.tokens = max_slots, tokens
        self.clear()

    def clear(self) -> None:
        self.capacity, self.items = 0, []
        self.keys, self.values = ([self._zeros(0, 0) for _ in range(self.shape[0])] for _ in "kv")

    def _zeros(self, slots: int, capacity: int) -> torch.Tensor:
        _, heads, size = self.shape
        return torch.zeros(slots, heads, capacity, size, dtype=self.dtype, device=self.device)

    def place(self, length: int, worth: Callable[[Any], float]) -> int | None:
        """A slot for `length` tokens (at most `self.tokens`); its item, if it has one, is to make way.

        worth(item): what its keys and values are still worth, infinite where they are in use. The least worth makes
        way, when there are as many slots as there may be. None where too many are in use.
        """
        capacity = max(self.capacity, min(-(-length // 64) * 64, self.tokens))
        most = min(self.max_slots, self.tokens // capacity)
        kept = sorted((i for i, item in enumerate(self.items) if item), key=lambda i: -worth(self.items[i]))
        if sum(worth(self.items[i]) == math.inf for i in kept) >= most:
            return None
        if capacity > self.capacity or (len(kept) == len(self.items) < most):
            kept = kept[:most]
            self.resize(min(most, max(len(kept) + 1, 2 * len(self.items))), capacity, kept)
        if None in self.items:
            return self.items.index(None)
        return min(range(len(self.items)), key=lambda i: worth(self.items[i]))

    def resize(self, slots: int, capacity: int, keep: list[int]) -> None:
        """Other slots, of another length, that begin with the items `keep`; the others are lost."""
        length = min(capacity, self.capacity)
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):  # one at a time: old and new of all layers might not fit
                tensors[layer] = self._zeros(slots, capacity)
                if keep:
                    tensors[layer][: len(keep), :, :length] = old[keep, :, :length]
        self.capacity, self.items = capacity, [self.items[i] for i in keep] + [None] * (slots - len(keep))

    def copy(self, slot: int, start: int, source: Store, other: int, count: int) -> None:
        """The first `count` tokens of the slot `other` of `source`, to `start` in `slot`."""
        for mine, theirs in zip((*self.keys, *self.values), (*source.keys, *source.values), strict=True):
            mine[slot, :, start : start + count] = theirs[other, :, :count]

    def compact(self, wanted: Callable[[Any], bool]) -> None:
        """Move the wanted items to the first slots, so that attention reads one view of them and no other."""
        front = [bool(item and wanted(item)) for item in self.items]
        i, j = 0, len(self.items) - 1
        while True:
            while i < j and front[i]:
                i += 1
            while i < j and not front[j]:
                j -= 1
            if i >= j:
                return
            length = max(item.cached for item in (self.items[i], self.items[j]) if item)
            for tensor in (*self.keys, *self.values):  # slices: an index tensor would be a transfer to the GPU each
                moved = tensor[i, :, :length].clone()
                tensor[i, :, :length] = tensor[j, :, :length]
                tensor[j, :, :length] = moved
            self.items[i], self.items[j] = self.items[j], self.items[i]
            front[i], front[j] = True, False


def _head_shape(config) -> tuple[int, int]:
    """K and D."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def bytes_per_token(model: PreTrainedModel) -> int:
    """Memory of one token's keys and values in all layers."""
    config = model.config.get_text_config()
    heads, size = _head_shape(config)
    return 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize


@dataclass(eq=False)
class Prefix:
    """Leading tokens that several requests share, in one slot of their own store."""

    token_ids: tuple[int, ...]
    cached: int = 0
    begun: bool = False  # whether any of it was computed; before, it can only be copied
    used: int = 0  # step of the last use

    @property
    def pending(self) -> int:
        return len(self.token_ids) - self.cached


@dataclass(eq=False)
class Row:
    """A request in one slot: the keys and values of its first tokens are those of `prefix`, `cached` more are there."""

    turn: Any  # engine.OpenTurn
    prefix: Prefix | None
    token_ids: list[int]  # everything so far
    cached: int = 0
    running: bool = True
    used: int = 0  # step of the last use

    @property
    def request(self) -> Any:
        return self.turn.request

    @property
    def offset(self) -> int:
        return len(self.prefix.token_ids) if self.prefix else 0

    @property
    def pending(self) -> int:
        """Tokens whose keys and values are not cached yet."""
        return len(self.token_ids) - self.offset - self.cached

    @property
    def ready(self) -> bool:
        return self.running and not (self.prefix and self.prefix.pending)


@dataclass
class Chunk:
    """Pending tokens of one sequence, computed in one forward pass; their keys and values go to store[slot][start:]."""

    token_ids: list[int]
    position: int  # of the first of them in the whole text
    store: Store
    slot: int
    start: int
    prefix: int | None  # the slot in the store of prefixes that they also see
    row: Row | None = None  # sampled from after this chunk


class CacheLayout:
    """Who sees what in one forward pass over [decoding rows 0..R-1, one token each | chunks, several tokens each].

    A decoding row sees its prefix and its own slot. Both parts are computed for all rows at once: P prefixes in use,
    each with at most m rows, so that what a group shares is read once.
    """

    def __init__(
        self,
        rows: Store,
        prefixes: Store,
        decoding: list[Row],
        chunks: list[Chunk],
    ) -> None:
        self.rows, self.prefixes, self.chunks, device = rows, prefixes, chunks, rows.device
        self.R = len(decoding)
        self.lengths = torch.tensor([row.cached + 1 for row in decoding], device=device)
        self.row_index = torch.arange(self.R, device=device)
        self.longest = max((row.cached + 1 for row in decoding), default=0)
        self.P, self.longest_prefix = 0, 0
        shared = prefixes.items
        members: list[list[int]] = [[] for _ in shared]
        slot_of = {id(prefix): slot for slot, prefix in enumerate(shared) if prefix}
        for i, row in enumerate(decoding):
            if row.prefix:
                members[slot_of[id(row.prefix)]].append(i)
        members = members[: max((p + 1 for p, group in enumerate(members) if group), default=0)]
        if members:
            self.P, m = len(members), max(map(len, members))
            self.longest_prefix = max(len(prefix.token_ids) for prefix in shared[: self.P])
            # members [P, m]: a row, or R where there is none; place [R]: where each row stands in there, or P * m
            self.members = torch.tensor([group + [self.R] * (m - len(group)) for group in members], device=device)
            place = [self.P * m] * self.R
            for p, group in enumerate(members):
                for j, i in enumerate(group):
                    place[i] = p * m + j
            self.place = torch.tensor(place, device=device)
            self.prefix_lengths = torch.tensor([len(prefix.token_ids) for prefix in shared[: self.P]], device=device)
            self.offsets = torch.tensor([row.offset for row in decoding], device=device)
        self.hidden: dict[int | None, tuple] = {}  # window -> masks of keys that are not seen

    def attend(self, layer: int, query, key, value, scaling: float, window: int | None) -> torch.Tensor:
        """query [H, T, D], key and value [K, T, D] of the new tokens -> [H, T, D]."""
        outputs = []
        if self.R:
            self.rows.keys[layer][self.row_index, :, self.lengths - 1] = key[:, : self.R].transpose(0, 1)
            self.rows.values[layer][self.row_index, :, self.lengths - 1] = value[:, : self.R].transpose(0, 1)
            outputs.append(self._decode(layer, query[:, : self.R], key.shape[0], scaling, window))
        at = self.R
        for chunk in self.chunks:
            count, end = len(chunk.token_ids), chunk.start + len(chunk.token_ids)
            keys, values = chunk.store.keys[layer][chunk.slot], chunk.store.values[layer][chunk.slot]
            keys[:, chunk.start : end] = key[:, at : at + count]
            values[:, chunk.start : end] = value[:, at : at + count]
            k, v = keys[:, :end], values[:, :end]
            if chunk.prefix is not None:
                shared = slice(chunk.position - chunk.start)
                k = torch.cat([self.prefixes.keys[layer][chunk.prefix, :, shared], k], 1)
                v = torch.cat([self.prefixes.values[layer][chunk.prefix, :, shared], v], 1)
            outputs.append(causal_sdpa(query[:, at : at + count], k, v, scaling, window))
            at += count
        return torch.cat(outputs, 1)

    def _masks(self, window: int | None):
        """Keys a decoding row does not see: in its slot [R, longest], in its prefix [P, m or 1, longest_prefix]."""
        if window not in self.hidden:
            at = torch.arange(self.longest, device=self.lengths.device)
            own = at >= self.lengths[:, None]
            prefix = None
            if window:
                own |= at < self.lengths[:, None] - window
            if self.P:
                at = torch.arange(self.longest_prefix, device=self.lengths.device)
                prefix = (at >= self.prefix_lengths[:, None])[:, None]
                if window:
                    positions = F.pad(self.offsets + self.lengths - 1, (0, 1))[self.members]  # [P, m]
                    prefix = prefix | (at <= positions[..., None] - window)
            self.hidden[window] = (own, prefix)
        return self.hidden[window]

    def _decode(self, layer: int, query, K: int, scaling: float, window: int | None) -> torch.Tensor:
        """Softmax over [shared prefix | own slot] in two parts, merged by their maxima and sums."""
        H, R, D = query.shape
        own, shared = self._masks(window)
        q = query.transpose(0, 1).reshape(R, K, H // K, D)
        keys, values = (x[layer][:R, :, : self.longest] for x in (self.rows.keys, self.rows.values))
        top, total, out = _softmax_part(q, keys, values, scaling, own[:, None, None])
        if self.P:
            keys, values = (
                x[layer][: self.P, :, : self.longest_prefix] for x in (self.prefixes.keys, self.prefixes.values)
            )
            m = self.members.shape[1]
            grouped = F.pad(q, (0, 0) * 3 + (0, 1))[self.members].transpose(1, 2).reshape(self.P, K, -1, D)
            mask = shared[:, None] if shared.shape[1] == 1 else shared.repeat_interleave(H // K, 1)[:, None]
            part = _softmax_part(grouped, keys, values, scaling, mask)
            ptop, ptotal, pout = (
                x.reshape(self.P, K, m, H // K, -1).transpose(1, 2).reshape(self.P * m, K, H // K, -1) for x in part
            )
            # rows without a prefix take the appended part, whose weight is zero
            ptop = F.pad(ptop, (0, 0) * 3 + (0, 1), value=HIDDEN)[self.place]
            ptotal, pout = (F.pad(x, (0, 0) * 3 + (0, 1))[self.place] for x in (ptotal, pout))
            both = torch.maximum(top, ptop)
            mine, other = (top - both).exp_(), (ptop - both).exp_()
            total = total * mine + ptotal * other
            out = out * mine + pout * other
        return (out / total).to(query.dtype).reshape(R, H, D).transpose(0, 1)


def _softmax_part(q, keys, values, scaling: float, hidden):
    """Unnormalised softmax(scaling q keys^T) values [P, K, q, D], with the maximum and the sum that normalise it, all
    in float32: parts can merge. q [P, K, q, D], keys and values [P, K, L, D]."""
    scores = _float_product(q, keys.transpose(-1, -2)).mul_(scaling).masked_fill_(hidden, HIDDEN)
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    return top, weights.sum(-1, keepdim=True), _float_product(weights.to(values.dtype), values)


def _float_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [P, K, m, n] @ b [P, K, n, o] in float32, whatever their type: in bfloat16, scores would be off by percents."""
    if a.is_cuda and a.dtype.itemsize == 2:  # without copies in float32; a CPU has no such product
        return torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32).unflatten(0, a.shape[:2])
    return a.float() @ b.float()
