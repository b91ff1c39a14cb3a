"""Engines sample token ids from token ids. The contract, and the engine that runs in process on a transformers model.

HFEngine batches continuously: requests join and leave at every step, a finished one frees its place at once, and a
trajectory that waits for its tool keeps its keys and values, so that afterwards only the new tokens are computed.
A prefix shared by many requests (the prompt of a group, a few-shot preamble) is computed and stored once.

Shapes: R rows that sample, T tokens of one forward pass, V vocabulary, H/K/D query heads, key heads, head size.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

import numpy as np
import torch
from transformers import PreTrainedModel

from thor.attention import common_prefix, use_layout_attention
from thor.distributed import free_memory
from thor.engines.base import Completion, OpenTurn, Request
from thor.engines.kv_cache import CacheLayout, Chunk, Prefix, Row, Store, bytes_per_token
from thor.settings import UserError

WORTH_A_STEP = 64  # tokens of a prefix for which it waits until another one has computed them


class NoRoomError(UserError, ValueError):
    """A request is longer than all the room that an engine has for keys and values."""


class HFEngine:
    """Samples from a transformers model in this process; in training it shares the trainer's weights.

    max_rows: requests that sample at once. prefill_tokens: prompt tokens that one step computes at most, beside the
    decoding rows. kv_tokens: tokens of keys and values that there is room for, as slots * longest request, a quarter of
    it for shared prefixes (default: the `share` of the memory that is free now, divided among the ranks of this
    machine; the rest is for a trainer beside it, or another engine). Requests for which there is no room wait.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer,
        max_rows: int = 64,
        prefill_tokens: int = 2048,
        kv_tokens: int | None = None,
        share: float = 0.5,
    ) -> None:
        use_layout_attention(model)
        self.model, self.tokenizer = model, tokenizer
        self.prefill_tokens = prefill_tokens
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
        eos = model.generation_config.eos_token_id
        self.eos = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
        if kv_tokens is None:
            kv_tokens = int(share * free_memory(model.device)) // bytes_per_token(model)
        self.queue: deque[Request] = deque()
        self.rows = Store(model, max_rows, kv_tokens - kv_tokens // 4)
        self.prefixes = Store(model, max_rows, kv_tokens // 4)
        self.sharers: dict[int, set[str]] = {}  # hash of a prefix -> the waiting requests that begin with it
        self.clock = 0

    # ---- the contract ----

    def add(self, request: Request) -> None:
        length = len(request.token_ids) + request.room(self.context)
        if length > self.rows.tokens:
            raise NoRoomError(
                f"--kv_tokens: request {request.id} may grow to {length} tokens, there is room for {self.rows.tokens} "
                "and a third of that for shared prefixes"
            )
        self.sharers.setdefault(hash(_shared(request)), set()).add(request.id)
        if any(row and row.request.id == request.id for row in self.rows.items):
            self.queue.appendleft(request)  # before fresh ones take the place of its keys and values
        else:
            self.queue.append(request)

    def has_work(self) -> bool:
        return bool(self.queue) or any(row and row.running for row in self.rows.items)

    def drop(self) -> None:
        self.queue.clear()
        self.sharers.clear()
        self._clear()  # wholly: a step that was broken off counts keys and values that it never wrote

    def update_weights(self, named_parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        if self.has_work():
            raise RuntimeError("weights changed while requests were being sampled")
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, parameter in named_parameters:
                if own[name].data_ptr() != parameter.data_ptr():
                    own[name].copy_(parameter)
        self._clear()

    def sleep(self) -> None:
        """Give back what only sampling needs memory for, while a trainer works; the next step makes it anew."""
        if self.has_work():
            raise RuntimeError("put to sleep while requests were being sampled")
        self._clear()

    def _clear(self) -> None:
        """Forget all that was computed with the present weights."""
        self.rows.clear()
        self.prefixes.clear()

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        self.clock += 1
        self._admit()
        self.rows.compact(lambda row: row.ready and row.pending == 1)
        decoding = [row for row in self.rows.items if row and row.ready and row.pending == 1]
        in_use = {id(row.prefix) for row in decoding}
        self.prefixes.compact(lambda prefix: id(prefix) in in_use)
        chunks = self._chunks()
        if not decoding and not chunks:
            return []
        batch, last, ids, positions = list(decoding), list(range(len(decoding))), [], []
        for row in decoding:
            ids.append(row.token_ids[-1])
            positions.append(len(row.token_ids) - 1)
        for chunk in chunks:
            ids += chunk.token_ids
            positions += range(chunk.position, chunk.position + len(chunk.token_ids))
            if chunk.row:
                batch.append(chunk.row)
                last.append(len(ids) - 1)
        # all that a GPU has to be told goes there before the model starts: later, each transfer would wait for it
        device = self.model.device
        last = torch.tensor(last, device=device, dtype=torch.long)
        settings = _sampling_settings(batch, device)
        hidden = self.model.base_model(
            input_ids=torch.tensor([ids], device=device),
            position_ids=torch.tensor([positions], device=device),
            use_cache=False,
            layout=CacheLayout(self.rows, self.prefixes, decoding, chunks),
        ).last_hidden_state[0]
        for row in decoding:
            row.cached, row.used = row.cached + 1, self.clock
        if not batch:
            return []
        token_ids, logps = sample(self.model.get_output_embeddings()(hidden[last]), *settings)
        # both in one transfer: reading from a GPU waits for it
        return self._append(batch, *torch.stack([token_ids.double(), logps.double()]).tolist())

    # ---- rows and prefixes ----

    def _admit(self) -> None:
        """Give waiting requests a row: their own from before, a free one, or the one that has idled longest."""
        rows, wanted = self.rows, {request.id for request in self.queue}
        running = [i for i, row in enumerate(rows.items) if row and row.running]
        if len(running) + len(self.queue) > rows.tokens // max(1, rows.capacity) < rows.max_slots:
            # few slots and long ones, from an earlier request; those of now can be more and shorter
            requests = [*self.queue, *(rows.items[i].request for i in running)]
            longest = -(-max(len(request.token_ids) + request.room(self.context) for request in requests) // 64) * 64
            if longest < rows.capacity:
                rows.resize(min(rows.max_slots, rows.tokens // longest), longest, running)
        while self.queue:
            request, ids = self.queue[0], self.queue[0].token_ids
            own = [row for row in rows.items if row and row.request.id == request.id and not row.running]
            mine = max(own, key=lambda row: common_prefix(row.token_ids, ids), default=None)
            if mine and common_prefix(mine.token_ids, ids) <= max(mine.offset, len(_shared(request))):
                mine = None  # the same id, another text: what it shares with others is worth more
            prefix = mine.prefix if mine else self._prefix(request, wanted)
            offset = len(prefix.token_ids) if prefix else 0
            room = request.room(self.context)
            length = len(ids) - offset + room

            def worth(row: Row, own: Row | None = mine) -> float:
                return math.inf if row.running else row.used + (row.request.id in wanted) * 2**30 + (row is own) * 2**40

            if mine and length <= rows.capacity:
                at = rows.items.index(mine)
            elif (at := rows.place(length, worth)) is None:
                return
            elif mine and mine in rows.items:
                at = rows.items.index(mine)
            cached = 0
            if mine and rows.items[at] is mine:
                kept = mine.token_ids[offset : offset + mine.cached]
                cached = min(common_prefix(kept, ids[offset:]), len(ids) - 1 - offset)
            if prefix:
                prefix.used = self.clock
            turn = OpenTurn(request, room, self.eos, self.tokenizer)
            rows.items[at] = Row(turn, prefix, list(ids), cached, used=self.clock)
            self.queue.popleft()
        self.sharers.clear()

    def _prefix(self, request: Request, wanted: set[str]) -> Prefix | None:
        """The stored prefix that this request shares with others; None where it is alone, or where there is no room."""
        ids, prefixes = _shared(request), self.prefixes
        for prefix in prefixes.items:
            if prefix and prefix.token_ids == ids:
                return prefix
        if not ids or len(ids) > prefixes.tokens:
            return None
        if len(self.sharers[hash(ids)]) < 2 and not any(r and _shared(r.request) == ids for r in self.rows.items):
            return None
        running, waiting = set(), set()
        for row in self.rows.items:
            if row and (row.running or row.request.id in wanted):
                (running if row.running else waiting).add(id(row.prefix))

        def worth(prefix: Prefix) -> float:
            return math.inf if id(prefix) in running else prefix.used + (id(prefix) in waiting) * 2**30

        before = [prefix for prefix in prefixes.items if prefix]
        at = prefixes.place(len(ids), worth)
        if at is None:
            return None
        prefixes.items[at] = new = Prefix(ids)
        gone = {id(prefix) for prefix in before} - {id(prefix) for prefix in prefixes.items}
        self.rows.items = [None if row and id(row.prefix) in gone else row for row in self.rows.items]
        self._copy_known(new)
        return new

    def _copy_known(self, new: Prefix) -> None:
        """Copy what stands elsewhere: a step sampled anew begins like its trajectory, a prompt like other prompts.

        As far as it still stands there: with more trajectories than rows, most have made way by then.
        """
        rows, prefixes = self.rows, self.prefixes

        def known(row: Row) -> int:
            ready = row.prefix is None or not row.prefix.pending
            return common_prefix(row.token_ids[: row.offset + row.cached], new.token_ids) if ready else 0

        sources = [(common_prefix(p.token_ids[: p.cached], new.token_ids), p, None) for p in prefixes.items if p]
        sources += [(known(row), row.prefix, slot) for slot, row in enumerate(rows.items) if row]
        new.cached, prefix, slot = max(sources, key=lambda source: source[0])
        at, shared = prefixes.items.index(new), min(new.cached, len(prefix.token_ids) if prefix else 0)
        if shared:
            prefixes.copy(at, 0, prefixes, prefixes.items.index(prefix), shared)
        if new.cached > shared:
            prefixes.copy(at, shared, rows, slot, new.cached - shared)

    def _chunks(self) -> list[Chunk]:
        """What this step computes of prompts and observations, at most `prefill_tokens`; shared prefixes come first."""
        chunks, budget = [], self.prefill_tokens
        slot_of = {id(prefix): slot for slot, prefix in enumerate(self.prefixes.items)}
        pending: list[Prefix] = []
        for prefix in self.prefixes.items:
            if prefix and prefix.pending:
                if not prefix.begun:
                    worth = prefix.cached + WORTH_A_STEP
                    if any(common_prefix(other.token_ids, prefix.token_ids) >= worth for other in pending):
                        continue  # later it copies what the other one has by then
                    self._copy_known(prefix)
                    prefix.begun = True
                pending.append(prefix)
        for prefix in pending:
            if prefix.pending and budget:
                slot, start, count = slot_of[id(prefix)], prefix.cached, min(prefix.pending, budget)
                ids = list(prefix.token_ids[start : start + count])
                chunks.append(Chunk(ids, start, self.prefixes, slot, start, None))
                prefix.cached += count
                budget -= count
        fresh = {chunk.slot for chunk in chunks}  # rows that see these start with the next step
        waiting = [(slot, row) for slot, row in enumerate(self.rows.items) if row and row.ready and row.pending > 1]
        for slot, row in sorted(waiting, key=lambda pair: pair[1].used):  # so that none waits for ever
            shared = slot_of[id(row.prefix)] if row.prefix else None
            if budget and shared not in fresh:
                start, count = row.offset + row.cached, min(row.pending, budget)
                chunk = Chunk(row.token_ids[start : start + count], start, self.rows, slot, row.cached, shared)
                chunk.row = row if count == row.pending else None
                chunks.append(chunk)
                row.cached, row.used = row.cached + count, self.clock
                budget -= count
        return chunks

    def _append(self, batch: list[Row], token_ids: list[float], logps: list[float]) -> list[Completion]:
        """Add the sampled tokens to their rows; returns the turns that they end."""
        finished = []
        for row, token, logp in zip(batch, map(int, token_ids), logps, strict=True):
            row.token_ids.append(token)
            if completion := row.turn.push(token, logp):
                row.running = False
                finished.append(completion)
        return finished


def _shared(request: Request) -> tuple[int, ...]:
    return tuple(request.token_ids[: min(request.shared, len(request.token_ids) - 1)])


def _sampling_settings(batch: list[Row], device: torch.device) -> tuple:
    """The arguments of `sample` behind the logits, on the device; top-p and top-k are None where no row has any."""
    requests = [row.request for row in batch]
    temperatures = torch.tensor([r.temperature for r in requests], dtype=torch.float32, device=device)
    counts = [len(row.turn.token_ids) for row in batch]
    uniforms = torch.from_numpy(uniform([r.seed for r in requests], counts)).to(device)
    if not any(r.top_k or r.top_p < 1 for r in requests):
        return temperatures, None, None, uniforms
    top_ps = torch.tensor([r.top_p for r in requests], dtype=torch.float32, device=device)
    return temperatures, top_ps, torch.tensor([r.top_k for r in requests], device=device), uniforms


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

    temperatures, top_ps, top_ks, uniforms: [R]; top_ps and top_ks both None: off. top-p is of what top-k leaves. The
    log-probs are those of the distribution drawn from; greedy rows (temperature 0) report them at temperature 1.
    """
    temperatures, uniforms = (torch.as_tensor(x, device=logits.device)[:, None] for x in (temperatures, uniforms))
    greedy = temperatures == 0
    logits = logits.float() / torch.where(greedy, 1.0, temperatures)
    best, token_ids = logits.max(-1, keepdim=True)
    if top_ps is not None:
        p, k = (torch.as_tensor(x, device=logits.device)[:, None] for x in (top_ps, top_ks))
        ordered, order = logits.sort(-1, descending=True)
        below_k = torch.arange(logits.shape[1], device=logits.device) >= torch.where(k == 0, logits.shape[1], k)
        mass = ordered.masked_fill(below_k, float("-inf")).softmax(-1)
        drop = (below_k | (mass.cumsum(-1) - mass >= p)) & ~greedy
        drop[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), float("-inf"))
    # in float64 on a GPU, whose parallel sums of float32 need not be monotonic; a CPU adds them up in float64 anyway
    exact = torch.float64 if logits.is_cuda else None
    cumulative = (logits - best).exp_().cumsum(-1, dtype=exact)
    total = cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, uniforms * total).clamp_(max=logits.shape[1] - 1)
    token_ids = torch.where(greedy, token_ids, drawn)
    return token_ids.squeeze(1), (logits.gather(-1, token_ids) - best - total.log()).squeeze(1)
