"""The KV cache of HFEngine, and the attention of one forward pass over it.

There are two stores: one holds a slot per request, the other a slot per prefix that several requests share. The first
tokens of a request are in the slot of its prefix, the remaining tokens in the slot of the request.

Shapes: R decoding rows, T tokens of one forward pass, P prefixes in use, H query heads, K key/value heads, D head size
of queries and keys, E head size of values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from thor.attention import causal_sdpa, common_prefix, empty_keys_and_values, hidden_states
from thor.engines.base import PartialCompletion, Request

# Score of a masked key. Finite, because one part of a softmax may consist of masked keys only.
MASKED = -1e30
BLOCK = 64  # slot capacities are multiples of it


class Store:
    """Keys and values in slots: `keys[call]` is [slots, K, capacity, D], and `values[call]` [slots, K, capacity, E].

    Each call of attention in a forward pass has its tensors. Most models call it once per layer.

    slots * capacity never exceeds `tokens`. Tensors grow by doubling and are written in place. They are initialized
    with zeros, because a masked weight of 0 times an uninitialized NaN would be NaN.

    empty: keys and values without tokens, see `empty_keys_and_values`.

    Attributes:
        items: the Row or Prefix in each slot, or None.
    """

    def __init__(self, empty: list[tuple[torch.Tensor, torch.Tensor]], max_slots: int, tokens: int) -> None:
        self.empty, self.max_slots, self.tokens = empty, max_slots, tokens
        self.clear()

    def clear(self) -> None:
        self.capacity, self.items = 0, []
        self.keys, self.values = ([_zeros(x, 0, 0) for x in tensors] for tensors in zip(*self.empty, strict=True))

    def allocate(self, length: int, priority: Callable[[Any], float]) -> int | None:
        """Return a slot for `length` tokens, or None if too many items are in use.

        The caller overwrites the item in this slot. If no slot is free and no slot can be added, it is the slot of the
        item with the lowest priority. Longer slots may leave room for fewer of them, which evicts more items.

        length: at most `self.tokens`.
        priority: maps an item to its priority; infinity means that it is in use.
        """
        capacity = max(self.capacity, min(round_up(length), self.tokens))
        max_slots = min(self.max_slots, self.tokens // capacity)
        kept = sorted((i for i, item in enumerate(self.items) if item), key=lambda i: -priority(self.items[i]))
        if sum(priority(self.items[i]) == math.inf for i in kept) >= max_slots:
            return None
        if capacity > self.capacity or (len(kept) == len(self.items) < max_slots):
            kept = kept[:max_slots]
            self.resize(min(max_slots, max(len(kept) + 1, 2 * len(self.items))), capacity, kept)
        if None in self.items:
            return self.items.index(None)
        return min(range(len(self.items)), key=lambda i: priority(self.items[i]))

    def resize(self, slots: int, capacity: int, keep: list[int]) -> None:
        """Change the number and capacity of slots. The items in the slots `keep` move to the front, others are lost."""
        length = min(capacity, self.capacity)
        for tensors in (self.keys, self.values):
            for i, old in enumerate(tensors):  # one by one, because two copies of all might not fit
                tensors[i] = _zeros(old, slots, capacity)
                if keep:
                    tensors[i][: len(keep), :, :length] = old[keep, :, :length]
        self.capacity, self.items = capacity, [self.items[i] for i in keep] + [None] * (slots - len(keep))

    def copy_from(self, source: Store, source_slot: int, slot: int, start: int, count: int) -> None:
        """Copy the first `count` tokens of a slot of `source` to position `start` of a slot of this store."""
        for mine, theirs in zip((*self.keys, *self.values), (*source.keys, *source.values), strict=True):
            mine[slot, :, start : start + count] = theirs[source_slot, :, :count]

    def compact(self, select: Callable[[Any], bool]) -> None:
        """Move the selected items to the first slots, so that attention can read them as one contiguous view."""
        in_front = [bool(item and select(item)) for item in self.items]
        i, j = 0, len(self.items) - 1
        while True:
            while i < j and in_front[i]:
                i += 1
            while i < j and not in_front[j]:
                j -= 1
            if i >= j:
                return
            length = max(item.cached for item in (self.items[i], self.items[j]) if item)
            for tensor in (*self.keys, *self.values):  # slices, because an index tensor would need a transfer to a GPU
                moved = tensor[i, :, :length].clone()
                tensor[i, :, :length] = tensor[j, :, :length]
                tensor[j, :, :length] = moved
            self.items[i], self.items[j] = self.items[j], self.items[i]
            in_front[i], in_front[j] = True, False


def round_up(length: int) -> int:
    """The capacity of a slot for `length` tokens."""
    return -(-length // BLOCK) * BLOCK


def _zeros(like: torch.Tensor, slots: int, capacity: int) -> torch.Tensor:
    """[slots, K, capacity, D] for the K heads and the head size of `like` [..., K, tokens, D]."""
    return like.new_zeros(slots, like.shape[-3], capacity, like.shape[-1])


def bytes_per_token(empty: list[tuple[torch.Tensor, torch.Tensor]]) -> int:
    """Memory of the keys and values of one token."""
    return sum(x.shape[0] * x.shape[2] * x.itemsize for pair in empty for x in pair)


@dataclass(eq=False)
class Prefix:
    """Leading tokens that several requests share, in a slot of the prefix store.

    Attributes:
        cached: number of tokens whose keys and values are in the slot.
        started: whether computing tokens has started. Before that, tokens are only copied from other slots.
        last_used: step of the last use.
    """

    token_ids: tuple[int, ...]
    cached: int = 0
    started: bool = False
    last_used: int = 0

    @property
    def pending(self) -> int:
        """Number of tokens whose keys and values are not cached yet."""
        return len(self.token_ids) - self.cached


@dataclass(eq=False)
class Row:
    """A request in a slot of the request store.

    Attributes:
        token_ids: prompt and sampled tokens.
        cached: number of tokens after the prefix whose keys and values are in the slot.
        running: False once the completion is finished. The slot is kept for the next request with the same id.
        live: False once the caller has released the request. Other requests then get the slot first.
        last_used: step of the last use.
    """

    partial: PartialCompletion
    prefix: Prefix | None
    token_ids: list[int]
    cached: int = 0
    running: bool = True
    live: bool = True
    last_used: int = 0

    @property
    def request(self) -> Request:
        return self.partial.request

    @property
    def offset(self) -> int:
        """Number of tokens in the slot of the prefix."""
        return len(self.prefix.token_ids) if self.prefix else 0

    @property
    def pending(self) -> int:
        """Number of tokens whose keys and values are not cached yet."""
        return len(self.token_ids) - self.offset - self.cached

    @property
    def ready(self) -> bool:
        return self.running and not (self.prefix and self.prefix.pending)


@dataclass
class Chunk:
    """Pending tokens of one sequence for one forward pass. Their keys and values go to store[slot][start:].

    Attributes:
        position: position of the first token in the whole sequence.
        prefix: slot of the prefix that the tokens also attend to, if any.
        row: the row to sample from after this chunk, if any.
    """

    token_ids: list[int]
    position: int
    store: Store
    slot: int
    start: int
    prefix: int | None
    row: Row | None = None


class CacheLayout:
    """The attention of one forward pass over [decoding rows 0..R-1, one token each | chunks, several tokens each].

    A decoding row attends to its prefix and to its own slot. Both parts are computed for all rows at once. For the
    prefixes, queries are grouped into [P, m], m rows per prefix at most, so that each prefix is read only once.

    Row i of `decoding` must be in slot i, and the prefixes of these rows in the first slots (see `Store.compact`).
    """

    def __init__(self, rows: Store, prefixes: Store, decoding: list[Row], chunks: list[Chunk]) -> None:
        self.rows, self.prefixes, self.chunks, self.calls = rows, prefixes, chunks, 0
        device = rows.empty[0][0].device
        self.R = len(decoding)
        self.lengths = torch.tensor([row.cached + 1 for row in decoding], device=device)
        self.row_index = torch.arange(self.R, device=device)
        self.longest = max((row.cached + 1 for row in decoding), default=0)
        self.P, self.longest_prefix = 0, 0
        slot_of = {id(prefix): slot for slot, prefix in enumerate(prefixes.items) if prefix}
        members: list[list[int]] = [[] for _ in prefixes.items]
        for i, row in enumerate(decoding):
            if row.prefix:
                members[slot_of[id(row.prefix)]].append(i)
        members = members[: max((p + 1 for p, group in enumerate(members) if group), default=0)]
        if members:
            self.P, m = len(members), max(map(len, members))
            lengths = [len(prefix.token_ids) for prefix in prefixes.items[: self.P]]
            self.longest_prefix = max(lengths)
            # members [P, m]: rows of each prefix, padded with R. member_index [R]: where a row is in it, or P * m
            self.members = torch.tensor([group + [self.R] * (m - len(group)) for group in members], device=device)
            member_index = [self.P * m] * self.R
            for p, group in enumerate(members):
                for j, i in enumerate(group):
                    member_index[i] = p * m + j
            self.member_index = torch.tensor(member_index, device=device)
            self.prefix_lengths = torch.tensor(lengths, device=device)
            self.offsets = torch.tensor([row.offset for row in decoding], device=device)
        self.masks: dict[int | None, tuple] = {}  # by sliding window

    def attend(self, query, key, value, scaling: float, window: int | None) -> torch.Tensor:
        """query [H, T, D], key [K, T, D] and value [K, T, E] of the new tokens -> [H, T, E]."""
        outputs, call = [], self.calls
        self.calls += 1
        if self.R:
            self.rows.keys[call][self.row_index, :, self.lengths - 1] = key[:, : self.R].transpose(0, 1)
            self.rows.values[call][self.row_index, :, self.lengths - 1] = value[:, : self.R].transpose(0, 1)
            outputs.append(self._decode(call, query[:, : self.R], key.shape[0], scaling, window))
        first = self.R
        for chunk in self.chunks:
            last, end = first + len(chunk.token_ids), chunk.start + len(chunk.token_ids)
            keys, values = chunk.store.keys[call][chunk.slot], chunk.store.values[call][chunk.slot]
            keys[:, chunk.start : end] = key[:, first:last]
            values[:, chunk.start : end] = value[:, first:last]
            k, v = keys[:, :end], values[:, :end]
            if chunk.prefix is not None:
                shared = slice(chunk.position - chunk.start)
                k = torch.cat([self.prefixes.keys[call][chunk.prefix, :, shared], k], 1)
                v = torch.cat([self.prefixes.values[call][chunk.prefix, :, shared], v], 1)
            outputs.append(causal_sdpa(query[:, first:last], k, v, scaling, window))
            first = last
        return torch.cat(outputs, 1)

    def _masks(self, window: int | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Masked keys of decoding rows: in their slots [R, longest], in their prefixes [P, m or 1, longest_prefix]."""
        if window not in self.masks:
            positions = torch.arange(self.longest, device=self.lengths.device)
            own = positions >= self.lengths[:, None]
            prefix = None
            if window:
                own |= positions < self.lengths[:, None] - window
            if self.P:
                positions = torch.arange(self.longest_prefix, device=self.lengths.device)
                prefix = (positions >= self.prefix_lengths[:, None])[:, None]
                if window:
                    queries = F.pad(self.offsets + self.lengths - 1, (0, 1))[self.members]  # their positions [P, m]
                    prefix = prefix | (positions <= queries[..., None] - window)
            self.masks[window] = (own, prefix)
        return self.masks[window]

    def _decode(self, call: int, query, K: int, scaling: float, window: int | None) -> torch.Tensor:
        """Attention of the decoding rows: query [H, R, D] -> [H, R, E].

        The softmax over [prefix | own slot] is computed in two parts, which are merged by their maxima and sums.
        """
        H, R, D = query.shape
        own_mask, prefix_mask = self._masks(window)
        q = query.transpose(0, 1).reshape(R, K, H // K, D)
        keys, values = (x[call][:R, :, : self.longest] for x in (self.rows.keys, self.rows.values))
        top, total, out = _partial_softmax(q, keys, values, scaling, own_mask[:, None, None])
        if self.P:
            keys, values = (
                x[call][: self.P, :, : self.longest_prefix] for x in (self.prefixes.keys, self.prefixes.values)
            )
            m = self.members.shape[1]
            grouped = F.pad(q, (0, 0) * 3 + (0, 1))[self.members].transpose(1, 2).reshape(self.P, K, -1, D)
            if prefix_mask.shape[1] > 1:
                prefix_mask = prefix_mask.repeat_interleave(H // K, 1)
            parts = _partial_softmax(grouped, keys, values, scaling, prefix_mask[:, None])
            prefix_top, prefix_total, prefix_out = (
                x.reshape(self.P, K, m, H // K, -1).transpose(1, 2).reshape(self.P * m, K, H // K, -1) for x in parts
            )
            # rows without a prefix select the padding, whose weight is zero
            prefix_top = F.pad(prefix_top, (0, 0) * 3 + (0, 1), value=MASKED)[self.member_index]
            prefix_total, prefix_out = (
                F.pad(x, (0, 0) * 3 + (0, 1))[self.member_index] for x in (prefix_total, prefix_out)
            )
            both = torch.maximum(top, prefix_top)
            weight, prefix_weight = (top - both).exp_(), (prefix_top - both).exp_()
            total = total * weight + prefix_total * prefix_weight
            out = out * weight + prefix_out * prefix_weight
        return (out / total).to(query.dtype).reshape(R, H, -1).transpose(0, 1)


def _partial_softmax(q, keys, values, scaling: float, mask) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention over a part of the keys, in float32: maximum score, sum of weights, and unnormalized output.

    q [P, K, q, D], keys [P, K, L, D], values [P, K, L, E], mask broadcastable to [P, K, q, L] (True is masked)
    -> [P, K, q, 1], [P, K, q, 1], [P, K, q, E].
    """
    scores = _float32_matmul(q, keys.transpose(-1, -2)).mul_(scaling).masked_fill_(mask, MASKED)
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    return top, weights.sum(-1, keepdim=True), _float32_matmul(weights.to(values.dtype), values)


def _float32_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [P, K, m, n] @ b [P, K, n, o] in float32 for any input dtype. In bfloat16, scores would be off by percents."""
    if a.is_cuda and a.dtype.itemsize == 2:  # without float32 copies of the inputs; CPUs have no such kernel
        return torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32).unflatten(0, a.shape[:2])
    return a.float() @ b.float()


# ---- check when an engine is created --------------------------------------------------------------------------------


def cached_logits(model: PreTrainedModel, sequences: list[list[int]]) -> list[torch.Tensor]:
    """The logits [T, V] of three sequences, computed with a KV cache as HFEngine does, for `check_logits`.

    The prefix that the first two share comes first. Then each forward pass computes a chunk or one token of every row,
    so that chunks continue prefixes and earlier chunks, and rows of different lengths decode together.
    """
    empty, shared = empty_keys_and_values(model), common_prefix(*sequences[:2])
    rows, prefixes = Store(empty, 3, 3 * BLOCK), Store(empty, 1, BLOCK)
    prefix = Prefix(tuple(sequences[0][:shared]))
    prefixes.resize(1, BLOCK, [])
    rows.resize(3, BLOCK, [])
    prefixes.items = [prefix]
    rows.items = [Row(None, prefix, sequences[0]), Row(None, prefix, sequences[1]), Row(None, None, sequences[2])]

    def forward(tokens: list[int], positions: list[int], decoding: list[Row], chunks: list[Chunk]) -> torch.Tensor:
        layout = CacheLayout(rows, prefixes, decoding, chunks)
        return model.get_output_embeddings()(hidden_states(model, tokens, positions, layout))

    chunk = Chunk(list(prefix.token_ids), 0, prefixes, 0, 0, None)
    logits = forward(chunk.token_ids, list(range(shared)), [], [chunk])
    found = [[logits], [logits], []]
    for counts in zip((2, 1, 1, 1), (6, 5, 1, 1), (10, 8, 1, 1), strict=True):
        decoding, chunks, tokens, positions = [], [], [], []
        for slot, (row, count) in enumerate(zip(rows.items, counts, strict=True)):
            first = row.offset + row.cached
            tokens += row.token_ids[first : first + count]
            positions += range(first, first + count)
            if count == 1:
                decoding.append(row)
            else:
                chunks.append(Chunk(tokens[-count:], first, rows, slot, row.cached, 0 if row.prefix else None))
        parts = forward(tokens, positions, decoding, chunks).split(counts)
        for row, count, part, done in zip(rows.items, counts, parts, found, strict=True):
            row.cached += count
            done.append(part)
    return [torch.cat(parts) for parts in found]
