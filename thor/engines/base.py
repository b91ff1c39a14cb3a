"""The engine interface: requests of token ids go in, completions of token ids come out.

A completion is one turn of a trajectory: the tokens that the model samples until a stop rule, an end token or a length
limit ends it.
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
    """Decides where a turn ends, for example `thor.text.FenceParser`."""

    def feed(self, piece: str) -> bool:
        """Take the next piece of sampled text. True ends the turn."""


@dataclass
class Request:
    """A turn to sample. If an earlier request had the same `id`, an engine may reuse its cache for the common prefix.

    Attributes:
        token_ids: the whole context, not only what is new since the last request.
        temperature: 0 is greedy decoding.
        top_k: 0 is off.
        seed: equal seeds sample equal tokens, except that the other requests of the batch may change the rounding of
            the logits.
        shared: number of leading tokens that other requests share. A hint to compute them once.
    """

    id: str
    token_ids: list[int]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: StopRule | None = None
    shared: int = 0

    def token_limit(self, context: int) -> int:
        """The number of tokens to sample at most, given the context length of the model.

        Raises ValueError if no engine could serve the request.
        """
        length = len(self.token_ids)
        if not length:
            raise ValueError(f"request {self.id} has no tokens")
        if self.max_tokens < 1 or self.top_k < 0 or self.temperature < 0:
            raise ValueError(f"request {self.id}: max_tokens must be at least 1, top_k and temperature at least 0")
        if length >= context:
            raise ValueError(f"request {self.id} has {length} tokens, but the context length of the model is {context}")
        return min(self.max_tokens, context - length)


@dataclass
class Completion:
    """A finished turn.

    Attributes:
        logps: log-prob of each token under the distribution that it was sampled from.
        finish: 'eos', 'stop' (the stop rule) or 'length'.
    """

    id: str
    token_ids: list[int]
    logps: list[float]
    finish: str


class PartialCompletion:
    """The tokens of a request sampled so far. Every engine uses it to decide where a turn ends.

    limit: maximum number of tokens. eos: tokens that end the turn.
    """

    def __init__(self, request: Request, limit: int, eos: set[int], tokenizer) -> None:
        self.request, self.limit, self.eos = request, limit, eos
        self.text = TextStream(tokenizer, request.token_ids)
        self.token_ids: list[int] = []
        self.logps: list[float] = []

    def push(self, token: int, logp: float | None) -> Completion | None:
        """Append a sampled token, and return the completion if this token ends it. A missing log-prob becomes NaN."""
        self.token_ids.append(token)
        self.logps.append(math.nan if logp is None else logp)
        if token in self.eos:
            finish = "eos"
        elif self.request.stop and self.request.stop.feed(self.text.push(token)):
            finish = "stop"
        elif len(self.token_ids) >= self.limit:
            finish = "length"
        else:
            return None
        return Completion(self.request.id, self.token_ids, self.logps, finish)


class Engine(Protocol):
    """Samples completions for requests. The rollout loop calls `step` while `has_work` is true.

    What a completion contains (`PartialCompletion` takes care of it, so engines should use it):
    - A turn ends with an end token, else where the request's stop rule says so, else at the token limit. That last
      token is part of the completion, with its log-prob, and no later one is.
    - Log-probs are those of the distribution that was sampled from, after temperature, top-k and top-p. Greedy requests
      report them at temperature 1. An unknown log-prob is NaN.

    An id can be used again once its completion was returned or dropped. With many ranks, `add` and `step` must not wait
    for other ranks, which have other requests. An exception that users can fix should derive from UserError.
    """

    tokenizer: object  # a Hugging Face tokenizer
    context: int  # context length of the model: a request must be shorter

    @property
    def max_rows(self) -> int:
        """Number of requests to sample at once. The cache of that many trajectories is kept while their tools run.

        The event loop starts no more trajectories at once. Without this attribute, it starts all.
        """

    @property
    def reproducible(self) -> bool:
        """Whether equal requests, added before equal steps, give completions that are equal bit for bit.

        True on the CPU for HFEngine and VLLMEngine. False on a GPU, where kernels sum in no fixed order, and for HTTP.
        """

    def add(self, request: Request) -> None:
        """Queue a request. Raises ValueError if the engine cannot serve it."""

    def step(self) -> list[Completion]:
        """Advance sampling a little, and return the completions finished since the last call, in any order.

        May raise RequestRejected for a single request, which has ended with that. The others are not affected.
        """

    def has_work(self) -> bool:
        """Whether `step` has not returned the completion of some request yet."""

    def release(self, request_id: str) -> None:
        """Take note that no further request continues `request_id`, so that its cache can be evicted first.

        Optional, for engines that manage their own cache.
        """

    def drop(self) -> None:
        """Abort all requests, and clear all caches, because an interrupted step may have left them incomplete."""

    def log_probs(self, token_ids: list[int]) -> list[float]:
        """Log-probs of all tokens but the first, at temperature 1, while no request is sampled."""

    def update_weights(self, named_parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load new weights, clear all caches, and wake the engine up. Raises RuntimeError while requests are sampled.

        named_parameters: full tensors under their Hugging Face names, tied parameters once. With many ranks, all of
            them must iterate to the end. An engine that cannot update its weights raises RuntimeError.
        """

    def sleep(self) -> None:
        """Free the memory that only sampling needs, while a trainer uses the device, until `update_weights`."""


def is_reproducible(*engines: Engine) -> bool:
    """Whether all engines are `reproducible`: then a `deterministic` rollout gives the same results in every run.

    An engine that does not say so is not.
    """
    return all(getattr(engine, "reproducible", False) for engine in engines)


def end_tokens(source: str, tokenizer) -> set[int]:
    """The tokenizer's end token and those of generation_config.json, or of config.json if the former is missing."""
    try:
        eos = GenerationConfig.from_pretrained(source).eos_token_id
    except OSError:
        eos = AutoConfig.from_pretrained(source).get_text_config().eos_token_id
    return {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
