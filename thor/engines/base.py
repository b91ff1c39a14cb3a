"""The contract of an engine: requests of token ids go in, finished turns come out.

Shapes: T tokens of one forward pass, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import AutoConfig, GenerationConfig

from thor.text import TextStream


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
    seed: int = 0  # with the same seed it samples the same tokens; batch-mates change the last bits of a float only
    stop: StopRule | None = None
    shared: int = 0  # leading tokens that other requests share: a hint, what to compute once

    def room(self, context: int) -> int:
        """Tokens it may sample from a model that takes `context`; ValueError for what no engine can sample."""
        length = len(self.token_ids)
        if not length:
            raise ValueError(f"request {self.id} has no tokens")
        if self.max_tokens < 1 or self.top_k < 0 or self.temperature < 0:
            raise ValueError(f"request {self.id} wants max_tokens >= 1, top_k >= 0 and temperature >= 0")
        if length >= context:
            raise ValueError(f"request {self.id} has {length} tokens, the model takes {context}")
        return min(self.max_tokens, context - length)


@dataclass
class Completion:
    """A finished turn. logps: log-prob of each token under the distribution it was drawn from."""

    id: str
    token_ids: list[int]
    logps: list[float]
    finish: str  # 'eos' | 'stop' (the stop rule) | 'length'


class OpenTurn:
    """The turn of one request while its tokens arrive: where it ends is decided here, for every engine.

    room: tokens it may sample. eos: tokens that end it. token_ids, logps: what was sampled so far.
    """

    def __init__(self, request: Request, room: int, eos: set[int], tokenizer) -> None:
        self.request, self.room, self.eos = request, room, eos
        self.text = TextStream(tokenizer, request.token_ids)
        self.token_ids: list[int] = []
        self.logps: list[float] = []

    def push(self, token: int, logp: float | None) -> Completion | None:
        """Take one sampled token; the completion, once this token ends the turn. A log-prob not known becomes NaN."""
        self.token_ids.append(token)
        self.logps.append(math.nan if logp is None else logp)
        if token in self.eos:
            finish = "eos"
        elif self.request.stop and self.request.stop.feed(self.text.push(token)):
            finish = "stop"
        elif len(self.token_ids) >= self.room:
            finish = "length"
        else:
            return None
        return Completion(self.request.id, self.token_ids, self.logps, finish)


class Engine(Protocol):
    """What the rollout loop drives: requests go in, `step` samples on, finished turns come out, in any order."""

    tokenizer: object
    context: int  # tokens that the model takes: a request must have fewer

    def add(self, request: Request) -> None: ...

    def step(self) -> list[Completion]:
        """Sample on; returns the turns that finished since the last call."""

    def has_work(self) -> bool: ...

    def drop(self) -> None:
        """Forget every request under way: no later `step` returns a turn of theirs."""

    def update_weights(self, named_parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take new weights and forget every cached prefix."""

    def sleep(self) -> None:
        """Give back what only sampling needs memory for, while a trainer works."""


def end_tokens(source: str, tokenizer) -> set[int]:
    """Tokens that end a turn: the tokenizer's and those of generation_config.json, else of config.json."""
    try:
        eos = GenerationConfig.from_pretrained(source).eos_token_id
    except OSError:
        eos = AutoConfig.from_pretrained(source).get_text_config().eos_token_id
    return {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}


def signed(seed: int) -> int:
    """A seed as vLLM takes it, 63 bits: its servers read signed integers, and -1 would mean 'none'."""
    return seed & (2**63 - 1)
