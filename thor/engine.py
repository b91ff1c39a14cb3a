"""Engines sample token ids from token ids. The contract, and the engine that runs in process on a transformers model.

HFEngine batches continuously: requests join and leave at every step, a finished one frees its place at once, and a
trajectory that waits for its tool keeps its keys and values, so that afterwards only the new tokens are computed.
A prefix shared by many requests (the prompt of a group, a few-shot preamble) is computed and stored once.

Shapes: R rows that sample, T tokens of one forward pass, V vocabulary, H/K/D query heads, key heads, head size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import psutil
import torch
from transformers import PreTrainedModel

from thor.attention import use_layout_attention
from thor.fences import TextStream
from thor.kvcache import CacheLayout, Chunk, Prefix, Row, Store, compact


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
        self.row_store, self.prefix_store = Store(model), Store(model)
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
        compact(self.rows, self.row_store, lambda row: row.ready and row.pending == 1, lambda row: row.cached)
        decoding = [row for row in self.rows if row and row.ready and row.pending == 1]
        in_use = {id(row.prefix) for row in decoding}
        compact(self.prefixes, self.prefix_store, lambda p: id(p) in in_use, lambda p: p.cached)
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
            layout=CacheLayout(self.row_store, self.prefix_store, decoding, self.prefixes, chunks),
        ).last_hidden_state[0]
        for row in decoding:
            row.cached, row.used = row.cached + 1, self.clock
        if not batch:
            return []
        logits = self.model.get_output_embeddings()(hidden[torch.tensor(last, device=device)])
        return self._sample(batch, logits)

    # ---- rows and prefixes ----

    def _forget(self) -> None:
        for store in (self.row_store, self.prefix_store):
            if store.slots < self.max_rows:  # few, as they had to be long; perhaps that is no longer so
                store.clear()
        self.rows: list[Row | None] = [None] * self.row_store.slots
        self.prefixes: list[Prefix | None] = [None] * self.prefix_store.slots
        self.sharers: dict[int, set[str]] = {}  # hash of a prefix -> the requests that begin with it
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

            def cost(i: int, own: Row | None = mine) -> tuple:  # that nobody in the queue asks for, the longest idle
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
            self.rows[at] = Row(request, prefix, list(ids), cached, text=TextStream(self.tokenizer), used=self.clock)
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

    def _prefix(self, request: Request) -> Prefix | None:
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
        self.prefixes[at] = Prefix(ids)
        return self.prefixes[at]

    def _chunks(self) -> list[Chunk]:
        """What this step computes of prompts and observations, at most `prefill_tokens`; shared prefixes come first."""
        chunks, budget = [], self.prefill_tokens
        slot_of = {id(prefix): slot for slot, prefix in enumerate(self.prefixes)}
        for slot, prefix in enumerate(self.prefixes):
            if prefix and prefix.pending and budget:
                start, count = prefix.cached, min(prefix.pending, budget)
                ids = list(prefix.token_ids[start : start + count])
                chunks.append(Chunk(ids, start, self.prefix_store, slot, start, None))
                prefix.cached += count
                budget -= count
        fresh = {chunk.slot for chunk in chunks}  # rows that see these start with the next step
        for slot, row in enumerate(self.rows):
            if row and row.ready and row.pending > 1 and budget:
                shared = slot_of[id(row.prefix)] if row.prefix else None
                if shared in fresh:
                    continue
                start, count = row.offset + row.cached, min(row.pending, budget)
                chunk = Chunk(row.token_ids[start : start + count], start, self.row_store, slot, row.cached, shared)
                chunk.row = row if count == row.pending else None
                chunks.append(chunk)
                row.cached, row.used = row.cached + count, self.clock
                budget -= count
        return chunks

    # ---- sampling ----

    def _sample(self, batch: list[Row], logits: torch.Tensor) -> list[Completion]:
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
    greedy = torch.tensor([t == 0 for t in temperatures], device=logits.device)
    logits = logits.float()
    if any(t not in (0, 1) for t in temperatures):
        logits = logits / torch.tensor([t or 1.0 for t in temperatures], device=logits.device)[:, None]
    best, token_ids = logits.max(-1, keepdim=True)
    if any(top_ks) or any(p < 1 for p in top_ps):
        ordered, order = logits.sort(-1, descending=True)
        rank = torch.arange(logits.shape[1], device=logits.device)
        k = torch.tensor([k or logits.shape[1] for k in top_ks], device=logits.device)[:, None]
        p = torch.tensor(top_ps, device=logits.device)[:, None]
        mass = ordered.masked_fill(rank >= k, float("-inf")).softmax(-1)  # top-p is of what top-k leaves
        drop = ((rank >= k) | (mass.cumsum(-1) - mass >= p)) & ~greedy[:, None]
        drop[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), float("-inf"))
    cumulative = (logits - best).exp_().cumsum(-1)
    total = cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, uniforms[:, None] * total).clamp_(max=logits.shape[1] - 1)
    token_ids = torch.where(greedy[:, None], token_ids, drawn)
    return token_ids.squeeze(1), (logits.gather(-1, token_ids) - best - total.log()).squeeze(1)
