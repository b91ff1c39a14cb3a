"""Engines sample token ids from token ids. The contract, and the engine that runs in process on a transformers model.

HFEngine batches continuously: requests join and leave at every step, a finished one frees its place at once, and a
trajectory that waits for its tool keeps its keys and values, so that afterwards only the new tokens are computed.
A prefix shared by many requests (the prompt of a group, a few-shot preamble) is computed and stored once.

Shapes: R rows that sample, T tokens of one forward pass, V vocabulary, H/K/D query heads, key heads, head size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from thor.attention import causal_sdpa, use_layout_attention
from thor.fences import TextStream


class StopRule(Protocol):
    """Fed with the sampled text as it arrives; True ends the turn. `fences.FenceParser` is one."""

    def feed(self, piece: str) -> bool: ...


@dataclass
class Request:
    """One turn to sample. A request with the `id` of an earlier one continues it from whatever prefix they share."""

    id: str
    token_ids: list[int]
    max_tokens: int
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    seed: int = 0  # the same request with the same seed samples the same tokens, whatever its batch-mates are
    stop: StopRule | None = None
    shared: int = 0  # leading tokens that other requests share: a hint, what to compute once


@dataclass
class Completion:
    """A finished turn. logps: log-prob of each token under the distribution it was drawn from."""

    id: str
    token_ids: list[int]
    logps: list[float]
    finish: str  # 'eos' | 'stop' (the stop rule) | 'length'


class Engine(Protocol):
    """What the rollout loop drives: requests go in, `step` samples on, finished turns come out, in any order."""

    tokenizer: object
    context: int  # tokens that the model takes: a request must have fewer

    def add(self, request: Request) -> None: ...

    def step(self) -> list[Completion]:
        """Sample on; returns the turns that finished since the last call."""

    def has_work(self) -> bool: ...

    def update_weights(self, named_parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take new weights and forget every cached prefix."""


class _Store:
    """Keys and values of sequences in slots: per layer `keys[layer]` and `values[layer]`, each [slots, K, capacity, D].

    Written in place. Zeros, not garbage, beyond what is written: a masked weight of 0 times a NaN would be NaN.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        self.layers = config.num_hidden_layers
        self.key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.dtype, self.device = model.dtype, model.device
        self.bytes_per_token = 2 * self.layers * self.key_heads * self.head_dim * self.dtype.itemsize
        self.clear()

    def clear(self) -> None:
        self.slots = self.capacity = 0
        self.keys, self.values = ([self._zeros(0, 0) for _ in range(self.layers)] for _ in "kv")

    def _zeros(self, slots: int, capacity: int) -> torch.Tensor:
        return torch.zeros(slots, self.key_heads, capacity, self.head_dim, dtype=self.dtype, device=self.device)

    def resize(self, slots: int, capacity: int, keep: list[int]) -> None:
        """Other sizes; the contents of the slots `keep` become those of the first slots."""
        length = min(capacity, self.capacity)
        for tensors in (self.keys, self.values):
            for layer in range(self.layers):  # one at a time: old and new of all layers might not fit
                new = self._zeros(slots, capacity)
                if keep:
                    new[: len(keep), :, :length] = tensors[layer][keep, :, :length]
                tensors[layer] = new
        self.slots, self.capacity = slots, capacity

    def swap(self, i: int, j: int, length: int) -> None:
        for tensor in (*self.keys, *self.values):
            tensor[[i, j], :, :length] = tensor[[j, i], :, :length]


@dataclass(eq=False)
class _Prefix:
    """Leading tokens that several requests share, in one slot of their own store."""

    token_ids: tuple[int, ...]
    cached: int = 0
    used: int = 0  # step of the last use

    @property
    def pending(self) -> int:
        return len(self.token_ids) - self.cached


@dataclass(eq=False)
class _Row:
    """A request in one slot: the keys and values of its first tokens are those of `prefix`, `cached` more are there."""

    request: Request
    prefix: _Prefix | None
    token_ids: list[int]  # everything so far
    cached: int = 0
    sampled: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    text: TextStream | None = None
    running: bool = True
    used: int = 0  # step of the last use

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
class _Chunk:
    """Pending tokens of one sequence, computed in one forward pass; their keys and values go to store[slot][start:]."""

    token_ids: list[int]
    position: int  # of the first of them in the whole text
    store: _Store
    slot: int
    start: int
    prefix: int | None  # the slot in the store of prefixes that they also see
    row: _Row | None = None  # sampled from after this chunk


class _CacheLayout:
    """Who sees what in one forward pass over [decoding rows 0..R-1, one token each | chunks, several tokens each].

    A decoding row sees its prefix and its own slot. Both parts are computed for all rows at once: P prefixes in use,
    each with at most m rows, so that what a group shares is read once.
    """

    def __init__(self, rows: _Store, prefixes: _Store, decoding: list[_Row], shared: list, chunks) -> None:
        self.rows, self.prefixes, self.chunks, device = rows, prefixes, chunks, rows.device
        self.R = len(decoding)
        self.lengths = torch.tensor([row.cached + 1 for row in decoding], device=device)
        self.row_index = torch.arange(self.R, device=device)
        self.longest = max((row.cached + 1 for row in decoding), default=0)
        self.P, self.longest_prefix = 0, 0
        members: list[list[int]] = [[] for _ in shared]
        slot_of = {id(prefix): slot for slot, prefix in enumerate(shared) if prefix}
        for i, row in enumerate(decoding):
            if row.prefix:
                members[slot_of[id(row.prefix)]].append(i)
        members = members[: max((p + 1 for p, rows_ in enumerate(members) if rows_), default=0)]
        if members:
            self.P, m = len(members), max(map(len, members))
            self.longest_prefix = max(len(prefix.token_ids) for prefix in shared[: self.P])
            # members [P, m]: a row, or R where there is none; place [R]: where each row stands in there, or P * m
            self.members = torch.tensor([rows_ + [self.R] * (m - len(rows_)) for rows_ in members], device=device)
            place = [self.P * m] * self.R
            for p, rows_ in enumerate(members):
                for j, i in enumerate(rows_):
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
            outputs.append(self._decode(layer, query[:, : self.R] * scaling, key.shape[0], window))
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

    def _decode(self, layer: int, query, K: int, window: int | None) -> torch.Tensor:
        """Softmax over [shared prefix | own slot] in two parts, merged by their maxima and sums."""
        H, R, D = query.shape
        own, shared = self._masks(window)
        q = query.transpose(0, 1).reshape(R, K, H // K, D)
        keys, values = (x[layer][:R, :, : self.longest] for x in (self.rows.keys, self.rows.values))
        top, total, out = _softmax_part(q, keys, values, own[:, None, None])
        if self.P:
            keys, values = (
                x[layer][: self.P, :, : self.longest_prefix] for x in (self.prefixes.keys, self.prefixes.values)
            )
            m = self.members.shape[1]
            grouped = F.pad(q, (0, 0) * 3 + (0, 1))[self.members].transpose(1, 2).reshape(self.P, K, -1, D)
            mask = shared[:, None] if shared.shape[1] == 1 else shared.repeat_interleave(H // K, 1)[:, None]
            part = _softmax_part(grouped, keys, values, mask)
            ptop, ptotal, pout = (
                x.reshape(self.P, K, m, H // K, -1).transpose(1, 2).reshape(self.P * m, K, H // K, -1) for x in part
            )
            # rows without a prefix take the appended part, whose weight is zero
            ptop = F.pad(ptop, (0, 0) * 3 + (0, 1), value=HIDDEN)[self.place]
            ptotal, pout = (F.pad(x, (0, 0) * 3 + (0, 1))[self.place] for x in (ptotal, pout))
            both = torch.maximum(top, ptop)
            mine, other = (top - both).exp_(), (ptop - both).exp_()
            total = total * mine + ptotal * other
            out = out * mine.to(out.dtype) + pout * other.to(out.dtype)
        return (out / total.to(out.dtype)).reshape(R, H, D).transpose(0, 1)


HIDDEN = -1e30  # score of a key that is not seen; finite, since a part may consist of nothing else


def _softmax_part(q, keys, values, hidden):
    """Unnormalised softmax(q keys^T) values, with the maximum and the sum that normalise it: parts can merge."""
    scores = (q @ keys.transpose(-1, -2)).float().masked_fill_(hidden, HIDDEN)
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    return top, weights.sum(-1, keepdim=True), weights.to(values.dtype) @ values


class HFEngine:
    """Samples from a transformers model in this process; in training it shares the trainer's weights.

    max_rows: requests that sample at once. prefill_tokens: prompt tokens that one step computes at most, beside the
    decoding rows. kv_tokens: tokens of keys and values kept at once, idle and shared ones included (default: half of
    the memory that is free now); requests for which there is no room wait in a queue.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer,
        max_rows: int = 64,
        prefill_tokens: int = 2048,
        kv_tokens: int | None = None,
    ) -> None:
        use_layout_attention(model)
        self.model, self.tokenizer = model, tokenizer
        self.max_rows, self.prefill_tokens = max_rows, prefill_tokens
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
        eos = model.generation_config.eos_token_id
        self.eos = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
        self.queue: deque[Request] = deque()
        self.row_store, self.prefix_store = _Store(model), _Store(model)
        if kv_tokens is None:
            cuda = model.device.type == "cuda"
            free = torch.cuda.mem_get_info(model.device)[0] if cuda else psutil.virtual_memory().available
            kv_tokens = free // 2 // self.row_store.bytes_per_token
        self.prefix_tokens = kv_tokens // 4
        self.row_tokens = kv_tokens - self.prefix_tokens
        self._forget()

    # ---- the contract ----

    def add(self, request: Request) -> None:
        length = len(request.token_ids)
        if not length:
            raise ValueError(f"request {request.id} has no tokens")
        if length >= self.context:
            raise ValueError(f"request {request.id} has {length} tokens, the model takes {self.context}")
        if length + self._room(request) > self.row_tokens:
            raise ValueError(
                f"request {request.id} may grow to {length + self._room(request)} tokens, "
                f"there is room for {self.row_tokens} (kv_tokens)"
            )
        if request.shared:
            self.sharers.setdefault(hash(_shared(request)), set()).add(request.id)
        self.queue.append(request)

    def has_work(self) -> bool:
        return bool(self.queue) or any(row and row.running for row in self.rows)

    def update_weights(self, named_parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        assert not self.has_work(), "weights changed while requests were being sampled"
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, parameter in named_parameters:
                if own[name].data_ptr() != parameter.data_ptr():
                    own[name].copy_(parameter)
        self._forget()

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        self.clock += 1
        self._admit()
        _compact(self.rows, self.row_store, lambda row: row.ready and row.pending == 1, lambda row: row.cached)
        decoding = [row for row in self.rows if row and row.ready and row.pending == 1]
        in_use = {id(row.prefix) for row in decoding}
        _compact(self.prefixes, self.prefix_store, lambda p: id(p) in in_use, lambda p: p.cached)
        chunks = self._chunks()
        if not decoding and not chunks:
            return []
        R, ids, positions = len(decoding), [], []
        for row in decoding:
            ids.append(row.token_ids[-1])
            positions.append(len(row.token_ids) - 1)
        batch, last = list(decoding), list(range(R))
        for chunk in chunks:
            ids += chunk.token_ids
            positions += range(chunk.position, chunk.position + len(chunk.token_ids))
            if chunk.row:
                batch.append(chunk.row)
                last.append(len(ids) - 1)
        device = self.model.device
        hidden = self.model.base_model(
            input_ids=torch.tensor([ids], device=device),
            position_ids=torch.tensor([positions], device=device),
            use_cache=False,
            layout=_CacheLayout(self.row_store, self.prefix_store, decoding, self.prefixes, chunks),
        ).last_hidden_state[0]
        for row in decoding:
            row.cached, row.used = row.cached + 1, self.clock
        if not batch:
            return []
        logits = self.model.get_output_embeddings()(hidden[torch.tensor(last, device=device)])
        return self._sample(batch, logits)

    # ---- rows and prefixes ----

    def _forget(self) -> None:
        self.rows: list[_Row | None] = []
        self.prefixes: list[_Prefix | None] = []
        self.sharers: dict[int, set[str]] = {}  # hash of a prefix -> the requests that begin with it
        self.row_store.clear()
        self.prefix_store.clear()
        self.clock = 0

    def _room(self, request: Request) -> int:
        """How many tokens this request may still sample."""
        return min(request.max_tokens, self.context - len(request.token_ids))

    def _admit(self) -> None:
        """Give waiting requests a row: their own from before, a free one, or the one that has idled longest."""
        wanted = {request.id for request in self.queue}
        while self.queue:
            request, ids = self.queue[0], self.queue[0].token_ids
            mine = next((r for r in self.rows if r and r.request.id == request.id and not r.running), None)
            if mine and (len(ids) <= mine.offset or ids[: mine.offset] != mine.token_ids[: mine.offset]):
                mine = None
            prefix = mine.prefix if mine else self._prefix(request)
            offset = len(prefix.token_ids) if prefix else 0
            if not self._reserve(len(ids) - offset + self._room(request)):
                return
            free = [i for i, row in enumerate(self.rows) if row is None or not row.running]
            if not free:
                return

            def cost(i: int, own: _Row | None = mine) -> tuple:  # that nobody in the queue asks for, the longest idle
                row = self.rows[i]
                if row is None or row is own:
                    return (row is None, False, 0)
                return (True, row.request.id in wanted, row.used + 1)

            at = min(free, key=cost)
            cached = 0
            if mine and self.rows[at] is mine:
                kept = mine.token_ids[offset : offset + mine.cached]
                cached = next(
                    (i for i, (x, y) in enumerate(zip(kept, ids[offset:-1], strict=False)) if x != y),
                    min(len(kept), len(ids) - 1 - offset),
                )
            if prefix:
                prefix.used = self.clock
            self.rows[at] = _Row(request, prefix, list(ids), cached, text=TextStream(self.tokenizer), used=self.clock)
            self.queue.popleft()

    def _reserve(self, length: int) -> bool:
        """Make the rows long enough, as many as then fit; False while too many are in use for that."""
        if length <= self.row_store.capacity:
            return True
        capacity = min(max(_rounded(length), self.row_store.capacity * 3 // 2), self.row_tokens)
        slots = min(self.max_rows, self.row_tokens // capacity)
        running = [i for i, row in enumerate(self.rows) if row and row.running]
        if len(running) >= slots:
            return False
        idle = [i for i, row in enumerate(self.rows) if row and not row.running]
        keep = (running + sorted(idle, key=lambda i: -self.rows[i].used))[:slots]
        self.row_store.resize(slots, capacity, keep)
        self.rows = [self.rows[i] for i in keep] + [None] * (slots - len(keep))
        return True

    def _prefix(self, request: Request) -> _Prefix | None:
        """The stored prefix that this request shares with others; None where it is alone, or where there is no room."""
        ids = _shared(request)
        for prefix in self.prefixes:
            if prefix and prefix.token_ids == ids:
                return prefix
        if not ids or len(self.sharers[hash(ids)]) < 2 or len(ids) > self.prefix_tokens:
            return None
        in_use = {id(row.prefix) for row in self.rows if row}
        used = [i for i, prefix in enumerate(self.prefixes) if prefix and id(prefix) in in_use]
        if len(ids) > self.prefix_store.capacity:
            capacity = min(_rounded(len(ids)), self.prefix_tokens)
            slots = min(self.max_rows, self.prefix_tokens // capacity)
            if len(used) >= slots:
                return None
            self.prefix_store.resize(slots, capacity, used)
            self.prefixes = [self.prefixes[i] for i in used] + [None] * (slots - len(used))
            used = list(range(len(used)))
        free = [i for i in range(len(self.prefixes)) if i not in used]
        if not free:
            return None
        at = min(free, key=lambda i: self.prefixes[i].used + 1 if self.prefixes[i] else 0)
        self.prefixes[at] = _Prefix(ids)
        return self.prefixes[at]

    def _chunks(self) -> list[_Chunk]:
        """What this step computes of prompts and observations, at most `prefill_tokens`; shared prefixes come first."""
        chunks, budget = [], self.prefill_tokens
        slot_of = {id(prefix): slot for slot, prefix in enumerate(self.prefixes)}
        for slot, prefix in enumerate(self.prefixes):
            if prefix and prefix.pending and budget:
                start, count = prefix.cached, min(prefix.pending, budget)
                ids = list(prefix.token_ids[start : start + count])
                chunks.append(_Chunk(ids, start, self.prefix_store, slot, start, None))
                prefix.cached += count
                budget -= count
        fresh = {chunk.slot for chunk in chunks}  # rows that see these start with the next step
        for slot, row in enumerate(self.rows):
            if row and row.ready and row.pending > 1 and budget:
                shared = slot_of[id(row.prefix)] if row.prefix else None
                if shared in fresh:
                    continue
                start, count = row.offset + row.cached, min(row.pending, budget)
                chunk = _Chunk(row.token_ids[start : start + count], start, self.row_store, slot, row.cached, shared)
                chunk.row = row if count == row.pending else None
                chunks.append(chunk)
                row.cached, row.used = row.cached + count, self.clock
                budget -= count
        return chunks

    # ---- sampling ----

    def _sample(self, batch: list[_Row], logits: torch.Tensor) -> list[Completion]:
        requests = [row.request for row in batch]
        uniforms = uniform([r.seed for r in requests], [len(row.sampled) for row in batch])
        token_ids, logps = sample(
            logits,
            [r.temperature for r in requests],
            [r.top_p for r in requests],
            [r.top_k for r in requests],
            torch.from_numpy(uniforms).to(logits.device),
        )
        finished = []
        # both in one transfer: reading from a GPU waits for it
        for row, token, logp in zip(batch, *torch.stack([token_ids.double(), logps.double()]).tolist(), strict=True):
            token = int(token)
            row.token_ids.append(token)
            row.sampled.append(token)
            row.logps.append(logp)
            finish = ""
            if token in self.eos:
                finish = "eos"
            elif row.request.stop and row.request.stop.feed(row.text.push(token)):
                finish = "stop"
            elif len(row.sampled) >= self._room(row.request):
                finish = "length"
            if finish:
                row.running = False
                finished.append(Completion(row.request.id, row.sampled, row.logps, finish))
        return finished


def _shared(request: Request) -> tuple[int, ...]:
    return tuple(request.token_ids[: min(request.shared, len(request.token_ids) - 1)])


def _rounded(length: int) -> int:
    return -(-length // 64) * 64


def _compact(items: list, store: _Store, wanted: Callable[[Any], bool], length: Callable[[Any], int]) -> None:
    """Move the wanted items to the first slots, so that attention reads one view of them and no other."""
    front = [bool(item and wanted(item)) for item in items]
    i, j = 0, len(items) - 1
    while True:
        while i < j and front[i]:
            i += 1
        while i < j and not front[j]:
            j -= 1
        if i >= j:
            return
        store.swap(i, j, max(length(item) for item in (items[i], items[j]) if item))
        items[i], items[j] = items[j], items[i]
        front[i], front[j] = True, False


def uniform(seeds: list[int], counts: list[int]) -> np.ndarray:
    """One float32 in (0, 1) for each (seed, count): a hash, not a stream, so it does not depend on batch-mates.

    The mixing steps are those of splitmix64 (Steele, Lea and Flood 2014), applied to the seed and then the count.
    """

    def mix(x: np.ndarray) -> np.ndarray:
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    hashed = mix(mix(np.array([s & (2**64 - 1) for s in seeds], np.uint64)) + np.array(counts, np.uint64))
    return ((hashed >> np.uint64(41)).astype(np.float32) + np.float32(0.5)) / np.float32(2**23)


def sample(logits, temperatures, top_ps, top_ks, uniforms) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token a row by inverting the cumulative distribution: logits [R, V] -> ids [R], log-probs [R].

    The log-probs are those of the distribution drawn from, after temperature, top-k and top-p. Greedy rows
    (temperature 0) report log-probs at temperature 1.
    """
    temperature = torch.tensor(temperatures, dtype=torch.float32, device=logits.device)
    greedy = temperature == 0
    logps = torch.log_softmax(logits.float() / torch.where(greedy, 1.0, temperature)[:, None], -1)
    if any(top_ks) or any(p < 1 for p in top_ps):
        ordered, order = logps.sort(-1, descending=True)
        rank = torch.arange(logps.shape[1], device=logits.device)
        k = torch.tensor([k or logps.shape[1] for k in top_ks], device=logits.device)[:, None]
        p = torch.tensor(top_ps, device=logits.device)[:, None]
        mass_before = ordered.exp().cumsum(-1) - ordered.exp()
        drop = (rank >= k) | (mass_before >= p)
        drop[:, 0] = False
        drop = torch.zeros_like(drop).scatter(-1, order, drop)
        logps = torch.where(greedy[:, None], logps, torch.log_softmax(logps.masked_fill(drop, float("-inf")), -1))
    cumulative = logps.exp().cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:]).squeeze(1)
    token_ids = torch.where(greedy, logps.argmax(-1), drawn.clamp_(max=logps.shape[1] - 1))
    return token_ids, logps.gather(-1, token_ids[:, None]).squeeze(1)
