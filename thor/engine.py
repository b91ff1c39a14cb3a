"""Engines sample token ids from token ids. The contract, and the engine that runs in process on a transformers model.

HFEngine batches continuously: requests join and leave at every step, a finished one frees its place at once, and a
trajectory that waits for its tool keeps its keys and values, so that afterwards only the new tokens are computed.
A prefix shared by many requests (the prompt of a group, a few-shot preamble) is computed and stored once.

Shapes: R rows that sample, T tokens of one forward pass, V vocabulary, H/K/D query heads, key heads, head size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
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


@dataclass(eq=False)
class _Prefix:
    """A shared prefix in the cache: per layer keys and values [K, L, D]."""

    token_ids: tuple[int, ...]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    used: int = 0  # step of the last use


@dataclass(eq=False)
class _Row:
    """A request in one row of the cache. Its first len(prefix) tokens are cached there, then `cached` in the row."""

    request: Request
    prefix: _Prefix | None
    token_ids: list[int]  # everything so far
    cached: int = 0
    sampled: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    text: TextStream | None = None
    running: bool = True
    used: int = 0

    @property
    def offset(self) -> int:
        return len(self.prefix.token_ids) if self.prefix else 0

    @property
    def pending(self) -> int:
        """Tokens whose keys and values are not cached yet."""
        return len(self.token_ids) - self.offset - self.cached


class _CacheLayout:
    """Who sees what in one forward pass over [decoding rows, one token each | prefills, several tokens each].

    decoding: rows 0..R-1 of the cache. prefills: (keys, values, start, count, prefix): per layer the target tensors
    [K, L, D], where in them the new tokens go, how many they are, and the shared prefix that they also see.
    """

    def __init__(self, keys, values, decoding: list[_Row], prefills: list[tuple], device) -> None:
        self.keys, self.values, self.prefills = keys, values, prefills
        self.R = len(decoding)
        self.lengths = torch.tensor([row.cached + 1 for row in decoding], device=device)
        self.longest = max((row.cached + 1 for row in decoding), default=0)
        self.hidden = torch.arange(self.longest, device=device) >= self.lengths[:, None]  # [R, L]
        self.rows = torch.arange(self.R, device=device)
        groups: dict[int, tuple[_Prefix, list[int]]] = {}
        for i, row in enumerate(decoding):
            if row.prefix:
                groups.setdefault(id(row.prefix), (row.prefix, []))[1].append(i)
        self.groups = [(prefix, torch.tensor(rows, device=device)) for prefix, rows in groups.values()]

    def attend(self, layer: int, query, key, value, scaling: float) -> torch.Tensor:
        """query [H, T, D], key and value [K, T, D] of the new tokens -> [H, T, D]."""
        outputs = []
        if self.R:
            self.keys[layer][self.rows, :, self.lengths - 1] = key[:, : self.R].transpose(0, 1)
            self.values[layer][self.rows, :, self.lengths - 1] = value[:, : self.R].transpose(0, 1)
            outputs.append(self._decode(layer, query[:, : self.R] * scaling, key.shape[0]))
        at = self.R
        for keys, values, start, count, prefix in self.prefills:
            keys[layer][:, start : start + count] = key[:, at : at + count]
            values[layer][:, start : start + count] = value[:, at : at + count]
            k, v = keys[layer][:, : start + count], values[layer][:, : start + count]
            if prefix:
                k, v = torch.cat([prefix.keys[layer], k], 1), torch.cat([prefix.values[layer], v], 1)
            outputs.append(causal_sdpa(query[:, at : at + count], k, v, scaling))
            at += count
        return torch.cat(outputs, 1)

    def _decode(self, layer: int, query, K: int) -> torch.Tensor:
        """Softmax over [shared prefix | own row] in two parts, merged by their maxima and sums."""
        H, R, D = query.shape
        q = query.transpose(0, 1).reshape(R, K, H // K, D)
        k, v = self.keys[layer][:R, :, : self.longest], self.values[layer][:R, :, : self.longest]
        scores = (q @ k.transpose(-1, -2)).float().masked_fill_(self.hidden[:, None, None], float("-inf"))
        top, total, out = _softmax_part(scores, v)
        for prefix, rows in self.groups:
            shared = q[rows].permute(1, 0, 2, 3).reshape(K, -1, D)  # [K, rows * H/K, D]
            part = _softmax_part((shared @ prefix.keys[layer].transpose(-1, -2)).float(), prefix.values[layer])
            ptop, ptotal, pout = (x.reshape(K, len(rows), H // K, -1).transpose(0, 1) for x in part)
            both = torch.maximum(top[rows], ptop)
            own, other = (top[rows] - both).exp(), (ptop - both).exp()
            total[rows] = total[rows] * own + ptotal * other
            out[rows] = out[rows] * own.to(out.dtype) + pout * other.to(out.dtype)
        return (out / total.to(out.dtype)).reshape(R, H, D).transpose(0, 1)


def _softmax_part(scores, v):
    """Unnormalised softmax(scores) @ v with the maximum and the sum that normalise it, so that parts can be merged."""
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top).exp_()
    return top, weights.sum(-1, keepdim=True), weights.to(v.dtype) @ v


class HFEngine:
    """Samples from a transformers model in this process; in training it shares the trainer's weights.

    max_rows: requests that sample at once, more wait in a queue. The cache takes max_rows * longest request tokens.
    prefill_tokens: how many prompt tokens one step computes at most beside the decoding ones.
    """

    def __init__(self, model: PreTrainedModel, tokenizer, max_rows: int = 64, prefill_tokens: int = 2048) -> None:
        use_layout_attention(model)
        self.model, self.tokenizer = model, tokenizer
        self.max_rows, self.prefill_tokens = max_rows, prefill_tokens
        config = model.config.get_text_config()
        self.context = getattr(config, "max_position_embeddings", None) or 1 << 30
        self.layers = config.num_hidden_layers
        self.key_heads = config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        eos = model.generation_config.eos_token_id
        self.eos = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
        self.queue: deque[Request] = deque()
        self.rows: list[_Row | None] = [None] * max_rows
        self.prefixes: dict[tuple[int, ...], _Prefix] = {}
        self.keys = self.values = [self._empty(max_rows, 0) for _ in range(self.layers)]
        self.clock = 0

    # ---- the contract ----

    def add(self, request: Request) -> None:
        if not request.token_ids:
            raise ValueError(f"request {request.id} has no tokens")
        if len(request.token_ids) >= self.context:
            raise ValueError(
                f"request {request.id} has {len(request.token_ids)} tokens, the model takes {self.context}"
            )
        self.queue.append(request)

    def has_work(self) -> bool:
        return bool(self.queue) or any(row and row.running for row in self.rows)

    def update_weights(self, named_parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, parameter in named_parameters:
                if own[name].data_ptr() != parameter.data_ptr():
                    own[name].copy_(parameter)
        self.prefixes.clear()
        self.rows = [row if row and row.running else None for row in self.rows]
        assert not any(self.rows), "weights changed while requests were being sampled"

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        self.clock += 1
        self._admit()
        self._compact()
        running = [row for row in self.rows if row and row.running]
        decoding = [row for row in running if row.pending == 1]
        batch, prefills, budget = list(decoding), [], self.prefill_tokens
        for i, row in enumerate(self.rows):
            if row and row.running and row.pending > 1 and (budget >= row.pending or not prefills):
                prefills.append(self._prefill_into_row(i))
                batch.append(row)
                budget -= row.pending
        if not batch:
            return []
        hidden = self._forward(batch, [row.token_ids[-row.pending :] for row in batch], decoding, prefills)
        for row in batch:
            row.cached += row.pending
            row.used = self.clock
        logits = self.model.get_output_embeddings()(hidden)
        return self._sample(batch, logits)

    # ---- rows and prefixes ----

    def _empty(self, rows: int, capacity: int) -> torch.Tensor:
        # zeros, not garbage: a masked weight of 0 times a NaN would be NaN
        shape = (rows, self.key_heads, capacity, self.head_dim)
        return torch.zeros(shape, dtype=self.model.dtype, device=self.model.device)

    def _admit(self) -> None:
        """Give waiting requests a row: their own from before, a free one, or the one that has idled longest."""
        fresh: list[_Prefix] = []
        waiting = {request.id for request in self.queue}
        while self.queue:
            request = self.queue[0]
            mine = [i for i, row in enumerate(self.rows) if row and row.request.id == request.id and not row.running]
            idle = [i for i, row in enumerate(self.rows) if row is None or not row.running]
            if not (mine or idle):
                break

            def cost(i: int) -> tuple:  # free rows first, then the longest idle that nobody in the queue asks for
                row = self.rows[i]
                return (row is not None, row is not None and row.request.id in waiting, row.used if row else 0)

            at = mine[0] if mine else min(idle, key=cost)
            self.queue.popleft()
            old = self.rows[at] if mine else None
            prefix, cached = None, 0
            ids = request.token_ids
            if (
                old
                and tuple(ids[: old.offset]) == (old.prefix.token_ids if old.prefix else ())
                and len(ids) > old.offset
            ):
                prefix, kept = old.prefix, old.token_ids[: old.offset + old.cached]
                while (
                    old.offset + cached < min(len(kept), len(ids) - 1)
                    and kept[old.offset + cached] == ids[old.offset + cached]
                ):
                    cached += 1
            elif shared := min(request.shared, len(ids) - 1):
                prefix = self.prefixes.get(tuple(ids[:shared]))
                if prefix is None:
                    fresh.append(prefix := self._new_prefix(tuple(ids[:shared])))
            if prefix:
                prefix.used = self.clock
            row = _Row(request, prefix, list(ids), cached, text=TextStream(self.tokenizer), used=self.clock)
            self.rows[at] = row
            self._grow(len(ids) - row.offset + self._room(request))
        while fresh:  # in parts of at most prefill_tokens
            part = [fresh.pop(0)]
            while fresh and sum(len(p.token_ids) for p in part) + len(fresh[0].token_ids) <= self.prefill_tokens:
                part.append(fresh.pop(0))
            self._forward(
                [], [list(p.token_ids) for p in part], [], [(p.keys, p.values, 0, len(p.token_ids), None) for p in part]
            )

    def _room(self, request: Request) -> int:
        """How many tokens this request may still sample."""
        return min(request.max_tokens, self.context - len(request.token_ids))

    def _new_prefix(self, token_ids: tuple[int, ...]) -> _Prefix:
        """Room for a shared prefix; those that no row uses any more make way when there are more than rows."""
        in_use = {id(row.prefix) for row in self.rows if row and row.prefix}
        old = [p for p in self.prefixes.values() if id(p) not in in_use and p.used < self.clock]
        for prefix in sorted(old, key=lambda p: p.used)[: max(0, len(self.prefixes) - self.max_rows)]:
            del self.prefixes[prefix.token_ids]
        shape = (2, self.layers, self.key_heads, len(token_ids), self.head_dim)
        both = torch.empty(shape, dtype=self.model.dtype, device=self.model.device)
        self.prefixes[token_ids] = _Prefix(token_ids, list(both[0]), list(both[1]))
        return self.prefixes[token_ids]

    def _grow(self, length: int) -> None:
        """Make every row long enough for `length` tokens."""
        capacity = self.keys[0].shape[2]
        if length <= capacity:
            return
        longer = max(-(-length // 64) * 64, capacity * 3 // 2)
        for name in ("keys", "values"):
            grown = []
            for old in getattr(self, name):
                new = self._empty(self.max_rows, longer)
                new[:, :, :capacity] = old
                grown.append(new)
            setattr(self, name, grown)

    def _compact(self) -> None:
        """Move the decoding rows to the front of the cache, so that attention reads one view and no idle row."""
        decoding = [bool(row and row.running and row.pending == 1) for row in self.rows]
        i, j = 0, len(self.rows) - 1
        while True:
            while i < j and decoding[i]:
                i += 1
            while i < j and not decoding[j]:
                j -= 1
            if i >= j:
                return
            for tensors in (self.keys, self.values):
                for tensor in tensors:
                    length = max(row.cached for row in (self.rows[i], self.rows[j]) if row)
                    tensor[[i, j], :, :length] = tensor[[j, i], :, :length]
            self.rows[i], self.rows[j] = self.rows[j], self.rows[i]
            decoding[i], decoding[j] = True, False

    def _prefill_into_row(self, i: int) -> tuple:
        row = self.rows[i]
        return [k[i] for k in self.keys], [v[i] for v in self.values], row.cached, row.pending, row.prefix

    # ---- computing ----

    def _forward(self, rows: list[_Row], tokens: list[list[int]], decoding: list[_Row], prefills: list[tuple]):
        """Run the model over the pending tokens, all in one row; hidden state of the last token of each [R, hidden].

        `rows` is empty when shared prefixes are computed: those begin at position 0 and nothing is sampled from them.
        """
        device = self.model.device
        starts = [len(row.token_ids) - row.pending for row in rows] or [0] * len(tokens)
        positions = [p for start, ids in zip(starts, tokens, strict=True) for p in range(start, start + len(ids))]
        layout = _CacheLayout(self.keys, self.values, decoding, prefills, device)
        hidden = self.model.base_model(
            input_ids=torch.tensor([[t for ids in tokens for t in ids]], device=device),
            position_ids=torch.tensor([positions], device=device),
            use_cache=False,
            layout=layout,
        ).last_hidden_state[0]
        return hidden[torch.tensor([len(ids) for ids in tokens], device=device).cumsum(0) - 1]

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
        for row, token, logp in zip(batch, token_ids.tolist(), logps.tolist(), strict=True):
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
