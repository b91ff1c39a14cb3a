"""HFEngine: sampling from a transformers model in this process.

Batching is continuous: requests join and leave the batch at every step, and a finished request frees its row at once.
While a trajectory waits for its tool, its keys and values stay cached, so that afterwards only the new tokens are
computed. A prefix shared by many requests (the prompt of a group, a few-shot preamble) is computed and stored once.

Shapes: R sampled rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from functools import partial

import numpy as np
import torch
from transformers import PreTrainedModel

from thor.attention import check_logits, common_prefix, empty_keys_and_values, hidden_states, use_layout_attention
from thor.distributed import free_memory
from thor.engines.base import Completion, PartialCompletion, Request
from thor.engines.kv_cache import CacheLayout, Chunk, Prefix, Row, Store, bytes_per_token, cached_logits, round_up
from thor.settings import UserError
from thor.training import score_text

# A prefix waits until another prefix has computed their common tokens, if that saves at least this many.
MIN_TOKENS_TO_WAIT_FOR = 64
# Eviction priority is the step of the last use, plus these bonuses.
LIVE = 2**30  # a later request may continue the row, or a row with this prefix
REQUESTED = 2**35  # a waiting request continues the row, or a row with this prefix
SAME_REQUEST = 2**40  # the request that needs the slot continues the row
IN_USE = math.inf  # never evicted


class NoRoomError(UserError, ValueError):
    """A request is longer than the whole KV cache, or no memory is left for one."""


class HFEngine:
    """Samples from a transformers model in this process. In training it shares the model with the trainer.

    Load the model with `load_model`, which also optimises it for the CPU.

    max_rows: number of requests to sample at once. Requests wait while no row or no cache is free.
    prefill_tokens: maximum number of prompt tokens that one step computes in addition to the decoding rows.
    kv_tokens: size of the KV cache in tokens, counted as slots * longest request. A quarter is for shared prefixes.
    share: fraction of the memory that is free now, used for the KV cache if kv_tokens is None. The rest is left to a
        trainer or to another engine. The ranks of a machine divide its memory.

    Raises UnsupportedModelError, with the reason, for a model that would not compute what its own forward pass does,
    and NoRoomError if no memory is left for the cache.
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
        free = free_memory(model.device)  # before the check packs weights for the CPU, see thor/fast_cpu.py
        check_logits(model, partial(cached_logits, model), "its KV cache")
        self.model, self.tokenizer = model, tokenizer
        self.prefill_tokens = prefill_tokens
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
        eos = model.generation_config.eos_token_id
        self.eos = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
        empty = empty_keys_and_values(model)
        if kv_tokens is None:
            if model.device.type == "cpu":
                free -= sum(p.nbytes for p in model.parameters())  # room for a second copy of the weights
            kv_tokens = int(share * free) // bytes_per_token(empty)
        if kv_tokens < 1:
            raise NoRoomError("no memory is left for a KV cache beside the model; free memory, or use a smaller model")
        self.queue: deque[Request] = deque()
        self.rows = Store(empty, max_rows, kv_tokens - kv_tokens // 4)
        self.prefixes = Store(empty, max_rows, kv_tokens // 4)
        self.sharing: dict[int, set[str]] = {}  # hash of a prefix -> ids of the queued requests that start with it
        self.steps = 0

    # ---- Engine interface ----

    @property
    def reproducible(self) -> bool:
        return self.model.device.type == "cpu"

    @property
    def max_rows(self) -> int:
        """Number of slots for the longest request that is queued or whose row is live."""
        live = [row.request for row in self.rows.items if row and row.live]
        lengths = [
            len(r.token_ids) - len(_shared_tokens(r)) + r.token_limit(self.context) for r in (*self.queue, *live)
        ]
        return min(self.rows.max_slots, self.rows.tokens // min(round_up(max(lengths, default=1)), self.rows.tokens))

    def add(self, request: Request) -> None:
        length = len(request.token_ids) + request.token_limit(self.context)
        if length > self.rows.tokens:
            raise NoRoomError(
                f"--kv_tokens: request {request.id} may need {length} tokens, but the KV cache has only "
                f"{self.rows.tokens}, and a third as many for shared prefixes"
            )
        self.sharing.setdefault(hash(_shared_tokens(request)), set()).add(request.id)
        if any(row and row.request.id == request.id for row in self.rows.items):
            self.queue.appendleft(request)  # before other requests evict its row
        else:
            self.queue.append(request)

    def has_work(self) -> bool:
        return bool(self.queue) or any(row and row.running for row in self.rows.items)

    def release(self, request_id: str) -> None:
        for row in self.rows.items:
            if row and row.request.id == request_id:
                row.live = False

    def drop(self) -> None:
        self.queue.clear()
        self.sharing.clear()
        self._clear_cache()  # an interrupted step has counted tokens as cached that it did not compute

    def log_probs(self, token_ids: list[int]) -> list[float]:
        return score_text(self.model, token_ids)

    def update_weights(self, named_parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        if self.has_work():
            raise RuntimeError("cannot update weights while requests are being sampled")
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, parameter in named_parameters:
                if own[name].data_ptr() != parameter.data_ptr():
                    own[name].copy_(parameter)
        self._clear_cache()

    def sleep(self) -> None:
        """Free the KV cache. The next step allocates it again."""
        if self.has_work():
            raise RuntimeError("cannot sleep while requests are being sampled")
        self._clear_cache()

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        self.steps += 1
        self._admit()
        self.rows.compact(lambda row: row.ready and row.pending == 1)
        decoding = [row for row in self.rows.items if row and row.ready and row.pending == 1]
        in_use = {id(row.prefix) for row in decoding}
        self.prefixes.compact(lambda prefix: id(prefix) in in_use)
        chunks = self._prefix_chunks(self.prefill_tokens)
        chunks += self._row_chunks(self.prefill_tokens - sum(len(chunk.token_ids) for chunk in chunks), chunks)
        if not decoding and not chunks:
            return []
        token_ids, positions, sampled, last = _model_inputs(decoding, chunks)
        # Create all inputs before the model runs: on a GPU, a later transfer would wait for the model.
        device = self.model.device
        last = torch.tensor(last, device=device, dtype=torch.long)
        settings = _sampling_settings(sampled, device)
        layout = CacheLayout(self.rows, self.prefixes, decoding, chunks)
        hidden = hidden_states(self.model, token_ids, positions, layout)
        for row in decoding:
            row.cached, row.last_used = row.cached + 1, self.steps
        if not sampled:
            return []
        new_ids, logps = sample(self.model.get_output_embeddings()(hidden[last]), *settings)
        # One transfer for both, because reading from a GPU waits for it.
        new_ids, logps = torch.stack([new_ids.double(), logps.double()]).tolist()
        if any(map(math.isnan, logps)):  # the tokens are meaningless, and NaN would pass for an unknown log-prob
            raise UserError("the model's logits are NaN or infinite: its weights are damaged, or overflow in its dtype")
        return self._append(sampled, new_ids, logps)

    # ---- scheduling ----

    def _clear_cache(self) -> None:
        self.rows.clear()
        self.prefixes.clear()

    def _admit(self) -> None:
        """Assign rows to queued requests until there is no room for the next one."""
        requested = {request.id for request in self.queue}
        self._shrink_slots()
        while self.queue:
            if not self._start(self.queue[0], requested):
                return
            self.queue.popleft()
        self.sharing.clear()

    def _shrink_slots(self) -> None:
        """Make room for more and shorter slots, if an earlier long request has left few long ones."""
        rows = self.rows
        running = [i for i, row in enumerate(rows.items) if row and row.running]
        if len(running) + len(self.queue) > rows.tokens // max(1, rows.capacity) < rows.max_slots:
            requests = [*self.queue, *(rows.items[i].request for i in running)]
            longest = round_up(max(len(r.token_ids) + r.token_limit(self.context) for r in requests))
            if longest < rows.capacity:
                rows.resize(min(rows.max_slots, rows.tokens // longest), longest, running)

    def _start(self, request: Request, requested: set[str]) -> bool:
        """Assign a row to a request: its row from before, a free one, or the one with the lowest priority.

        requested: ids of the requests that were queued when this step began. Returns False if there is no room.
        """
        rows, ids = self.rows, request.token_ids
        own = self._row_to_continue(request)
        prefix = own.prefix if own else self._prefix(request, requested)
        offset = len(prefix.token_ids) if prefix else 0
        limit = request.token_limit(self.context)
        length = len(ids) - offset + limit

        def priority(row: Row) -> float:
            return row.last_used + _bonus(row, requested) + (row is own) * SAME_REQUEST

        if own and length <= rows.capacity:
            slot = rows.items.index(own)
        elif (slot := rows.allocate(length, priority)) is None:
            return False
        elif own and own in rows.items:
            slot = rows.items.index(own)
        cached = 0
        if own and rows.items[slot] is own:
            kept = own.token_ids[offset : offset + own.cached]
            cached = min(common_prefix(kept, ids[offset:]), len(ids) - 1 - offset)
        if prefix:
            prefix.last_used = self.steps
        partial = PartialCompletion(request, limit, self.eos, self.tokenizer)
        rows.items[slot] = Row(partial, prefix, list(ids), cached, last_used=self.steps)
        return True

    def _row_to_continue(self, request: Request) -> Row | None:
        """The idle row of an earlier request with the same id, unless the shared prefix saves at least as much."""
        ids = request.token_ids
        idle = [row for row in self.rows.items if row and row.request.id == request.id and not row.running]
        row = max(idle, key=lambda row: common_prefix(row.token_ids, ids), default=None)
        if row and common_prefix(row.token_ids, ids) <= max(row.offset, len(_shared_tokens(request))):
            return None
        return row

    def _prefix(self, request: Request, requested: set[str]) -> Prefix | None:
        """The stored prefix of a request, added if needed; None if no other request shares it or there is no room."""
        ids, prefixes = _shared_tokens(request), self.prefixes
        for prefix in prefixes.items:
            if prefix and prefix.token_ids == ids:
                return prefix
        if not ids or len(ids) > prefixes.tokens:
            return None
        in_rows = any(row and _shared_tokens(row.request) == ids for row in self.rows.items)
        if len(self.sharing[hash(ids)]) < 2 and not in_rows:
            return None
        bonus: dict[int, float] = {}
        for row in self.rows.items:
            if row:
                bonus[id(row.prefix)] = max(bonus.get(id(row.prefix), 0), _bonus(row, requested))

        def priority(prefix: Prefix) -> float:
            return prefix.last_used + bonus.get(id(prefix), 0)

        before = [prefix for prefix in prefixes.items if prefix]
        slot = prefixes.allocate(len(ids), priority)
        if slot is None:
            return None
        prefixes.items[slot] = new = Prefix(ids)
        evicted = {id(prefix) for prefix in before} - {id(prefix) for prefix in prefixes.items}
        self.rows.items = [None if row and id(row.prefix) in evicted else row for row in self.rows.items]
        self._copy_cached(new)
        return new

    def _copy_cached(self, new: Prefix) -> None:
        """Copy the longest cached start of a prefix from other slots.

        A step that is sampled again starts like its trajectory, and a prompt like other prompts of the same template.
        """
        rows, prefixes = self.rows, self.prefixes

        def cached(row: Row) -> int:
            prefix_cached = row.prefix is None or not row.prefix.pending
            return common_prefix(row.token_ids[: row.offset + row.cached], new.token_ids) if prefix_cached else 0

        sources = [(common_prefix(p.token_ids[: p.cached], new.token_ids), p, None) for p in prefixes.items if p]
        sources += [(cached(row), row.prefix, slot) for slot, row in enumerate(rows.items) if row]
        new.cached, prefix, row_slot = max(sources, key=lambda source: source[0])
        slot, from_prefix = prefixes.items.index(new), min(new.cached, len(prefix.token_ids) if prefix else 0)
        if from_prefix:
            prefixes.copy_from(prefixes, prefixes.items.index(prefix), slot, 0, from_prefix)
        if new.cached > from_prefix:
            prefixes.copy_from(rows, row_slot, slot, from_prefix, new.cached - from_prefix)

    def _prefix_chunks(self, budget: int) -> list[Chunk]:
        """Pending tokens of shared prefixes to compute in this step, at most `budget`."""
        pending: list[tuple[int, Prefix]] = []
        for slot, prefix in enumerate(self.prefixes.items):
            if not prefix or not prefix.pending:
                continue
            if not prefix.started:
                enough = prefix.cached + MIN_TOKENS_TO_WAIT_FOR
                if any(common_prefix(other.token_ids, prefix.token_ids) >= enough for _, other in pending):
                    continue  # a later step copies what the other prefix has computed by then
                self._copy_cached(prefix)
                prefix.started = True
            pending.append((slot, prefix))
        chunks = []
        for slot, prefix in pending:
            if prefix.pending and budget:
                start, count = prefix.cached, min(prefix.pending, budget)
                ids = list(prefix.token_ids[start : start + count])
                chunks.append(Chunk(ids, start, self.prefixes, slot, start, None))
                prefix.cached += count
                budget -= count
        return chunks

    def _row_chunks(self, budget: int, prefix_chunks: list[Chunk]) -> list[Chunk]:
        """Pending tokens of rows to compute in this step, at most `budget`."""
        chunks = []
        slot_of = {id(prefix): slot for slot, prefix in enumerate(self.prefixes.items)}
        in_progress = {chunk.slot for chunk in prefix_chunks}  # rows with these prefixes start in the next step
        waiting = [(slot, row) for slot, row in enumerate(self.rows.items) if row and row.ready and row.pending > 1]
        for slot, row in sorted(waiting, key=lambda pair: pair[1].last_used):  # the longest wait first
            prefix_slot = slot_of[id(row.prefix)] if row.prefix else None
            if budget and prefix_slot not in in_progress:
                start, count = row.offset + row.cached, min(row.pending, budget)
                chunk = Chunk(row.token_ids[start : start + count], start, self.rows, slot, row.cached, prefix_slot)
                chunk.row = row if count == row.pending else None
                chunks.append(chunk)
                row.cached, row.last_used = row.cached + count, self.steps
                budget -= count
        return chunks

    def _append(self, sampled: list[Row], token_ids: list[float], logps: list[float]) -> list[Completion]:
        """Append the sampled tokens to their rows, and return the completions that they finish."""
        finished = []
        for row, token, logp in zip(sampled, map(int, token_ids), logps, strict=True):
            row.token_ids.append(token)
            if completion := row.partial.push(token, logp):
                row.running = False
                finished.append(completion)
        return finished


def _bonus(row: Row, requested: set[str]) -> float:
    """What a row adds to its own eviction priority and to that of its prefix."""
    return IN_USE if row.running else row.live * LIVE + (row.request.id in requested) * REQUESTED


def _shared_tokens(request: Request) -> tuple[int, ...]:
    """The tokens of the shared prefix. At least one token of a request is left to its own row."""
    return tuple(request.token_ids[: min(request.shared, len(request.token_ids) - 1)])


def _model_inputs(decoding: list[Row], chunks: list[Chunk]) -> tuple[list[int], list[int], list[Row], list[int]]:
    """Token ids and positions of one forward pass, the rows to sample from, and the index of each row's last token."""
    ids = [row.token_ids[-1] for row in decoding]
    positions = [len(row.token_ids) - 1 for row in decoding]
    sampled, last = list(decoding), list(range(len(decoding)))
    for chunk in chunks:
        ids += chunk.token_ids
        positions += range(chunk.position, chunk.position + len(chunk.token_ids))
        if chunk.row:
            sampled.append(chunk.row)
            last.append(len(ids) - 1)
    return ids, positions, sampled, last


# ---- sampling -------------------------------------------------------------------------------------------------------


def _sampling_settings(rows: list[Row], device: torch.device) -> tuple:
    """The arguments of `sample` after the logits, on the device. top_ps and top_ks are None if no row uses them."""
    requests = [row.request for row in rows]
    temperatures = torch.tensor([r.temperature for r in requests], dtype=torch.float32, device=device)
    counts = [len(row.partial.token_ids) for row in rows]
    uniforms = torch.from_numpy(uniform([r.seed for r in requests], counts)).to(device)
    if not any(r.top_k or r.top_p < 1 for r in requests):
        return temperatures, None, None, uniforms
    top_ps = torch.tensor([r.top_p for r in requests], dtype=torch.float32, device=device)
    return temperatures, top_ps, torch.tensor([r.top_k for r in requests], device=device), uniforms


def uniform(seeds: list[int], counts: list[int]) -> np.ndarray:
    """One float32 in (0, 1) for each (seed, count).

    It is a hash and not a random stream, so that it does not depend on the other requests of the batch. The seed and
    then the count are mixed as in splitmix64 (Steele, Lea and Flood 2014).
    """

    def mix(x: np.ndarray) -> np.ndarray:
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    hashed = mix(mix(np.array([s & (2**64 - 1) for s in seeds], np.uint64)) + np.array(counts, np.uint64))
    return ((hashed >> np.uint64(41)).astype(np.float32) + np.float32(0.5)) / np.float32(2**23)


def sample(logits: torch.Tensor, temperatures, top_ps, top_ks, uniforms) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample one token per row by inverting the cumulative distribution.

    logits [R, V]; temperatures, top_ps, top_ks, uniforms [R], with top_ps and top_ks both None if they are off
    -> token ids [R] and log-probs [R].

    top-p applies to the distribution that top-k leaves. Log-probs are those of the distribution that is sampled from;
    those of greedy rows (temperature 0) are at temperature 1.
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
    # A GPU needs float64, because its parallel float32 cumsum may not be monotonic. A CPU sums in float64 anyway.
    exact = torch.float64 if logits.is_cuda else None
    cumulative = (logits - best).exp_().cumsum(-1, dtype=exact)
    total = cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, uniforms * total).clamp_(max=logits.shape[1] - 1)
    token_ids = torch.where(greedy, token_ids, drawn)
    return token_ids.squeeze(1), (logits.gather(-1, token_ids) - best - total.log()).squeeze(1)
