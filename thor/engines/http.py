"""A running `vllm serve` over HTTP, for sampling alone. It fulfils the contract of `thor.engines.base.Engine`."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import queue
import random
import threading
import time
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import Future
from dataclasses import replace

import httpx2
import torch
from transformers import AutoTokenizer

from thor.engines.base import Completion, OpenTurn, Request, end_tokens, signed
from thor.settings import UserError

# tries of one turn; seconds before the second, doubled before each further one, but never more: two minutes in all
TRIES, BACKOFF, LONGEST = 9, 0.5, 30.0
PERIOD = 0.005  # seconds between two looks at what has finished
DRAIN = 3.0  # seconds for the rest of a stream whose turn is complete
PASSING = (429, 500, 502, 503, 504)  # statuses that are worth another try


class ServerError(UserError, ConnectionError):
    """A server is down, is not what it should be, or failed too often; the message is one line."""


class HTTPEngine:
    """The completions route of a running `vllm serve`, for sampling alone: a server keeps its weights.

    url: "http://host:port", or "http://host:port#name" where the server must serve a model of that name.
    rows: requests in flight, others wait. silence: seconds without a byte after which a request is tried again, but
    only once: a server that takes connections and hangs would else cost TRIES times as much.

    Log-probs are of the distribution drawn from if the server was started with `--logprobs-mode processed_logprobs`;
    vLLM's default ignores the temperature. Stop rules are fed on a thread of this engine. A turn that is retried starts
    anew with the same seed, and a listener hears it twice. Every fault of the server is a ServerError.
    """

    def __init__(self, url: str, rows: int = 64, silence: float = 600.0) -> None:
        base, _, name = url.partition("#")
        self.url = base.rstrip("/").removesuffix("/v1")
        served = self._served(name)
        self.model, self.context = served["id"], served["max_model_len"]
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(served["root"])
            self.eos = end_tokens(served["root"], self.tokenizer)
        except (OSError, ValueError) as error:
            raise ServerError(
                f"{self.url}: serves {served['root']}, whose tokenizer is needed here and is neither a folder of this "
                "machine nor on the hub"
            ) from error
        self.client = httpx2.AsyncClient(
            timeout=httpx2.Timeout(silence, connect=10.0),
            limits=httpx2.Limits(max_connections=rows, max_keepalive_connections=rows),
        )
        self.slots = asyncio.Semaphore(rows)
        self.stepped = -PERIOD  # when the last step ended, in the time of time.monotonic
        self.under_way: set[Future[Completion]] = set()
        self.finished: queue.Queue[Future[Completion]] = queue.Queue()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name=f"HTTPEngine {self.url}", daemon=True)
        self.thread.start()

    def add(self, request: Request) -> None:
        room = request.room(self.context)
        future = asyncio.run_coroutine_threadsafe(self._complete(request, room), self.loop)
        self.under_way.add(future)
        future.add_done_callback(self.finished.put)

    def step(self) -> list[Completion]:
        """The turns that finished; waits for one until PERIOD has passed since the last call.

        So a caller with nothing else to do does not spin, and one that steps a slower engine beside is not held up.
        """
        futures, patience = [], self.stepped + PERIOD - time.monotonic()
        with contextlib.suppress(queue.Empty):
            futures.append(self.finished.get(patience > 0, patience))
            while True:
                futures.append(self.finished.get_nowait())
        self.stepped = time.monotonic()
        self.under_way.difference_update(futures)
        return [future.result() for future in futures]

    def has_work(self) -> bool:
        return bool(self.under_way)

    def drop(self) -> None:
        """Connections are closed, upon which the server aborts what it samples."""
        dropped, self.under_way, self.finished = self.under_way, set(), queue.Queue()  # theirs go to the old queue
        for future in dropped:
            future.cancel()

    def update_weights(self, named_parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        raise RuntimeError(f"{self.url}: a server keeps its weights; train with the sampler 'hf' or 'vllm'")

    def sleep(self) -> None: ...  # what it samples with is not this machine's memory

    def close(self) -> None:
        """Drop what is under way and end connections and thread, as the end of the process does.

        Calling it twice does no harm.
        """
        if self.loop.is_closed():
            return
        self.drop()

        async def end() -> None:
            await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()}, return_exceptions=True)
            await self.client.aclose()
            await self.loop.shutdown_asyncgens()

        asyncio.run_coroutine_threadsafe(end(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    def _served(self, name: str) -> dict:
        """The entry of /v1/models for `name`, or the first one."""
        try:
            response = httpx2.get(f"{self.url}/v1/models", timeout=10.0)
            response.raise_for_status()
            entries = response.json()["data"]
            names = [entry["id"] for entry in entries]
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise ServerError(
                f"{self.url}: no answer ({' '.join(str(error).split())}); is `vllm serve` running there?"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise ServerError(f"{self.url}: answers, but not as `vllm serve` does") from error
        if not entries or (name and name not in names):
            raise ServerError(f"{self.url}: serves {', '.join(names) or 'nothing'}, not {name or 'a model'}")
        entry = entries[names.index(name) if name else 0]
        if not (entry.get("root") and entry.get("max_model_len")):
            raise ServerError(f"{self.url}: does not say `root` and `max_model_len` of its model; is it vLLM?")
        return entry

    async def _complete(self, request: Request, room: int) -> Completion:
        body = {
            "model": self.model,
            "prompt": request.token_ids,
            "max_tokens": room,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": request.top_k,
            "repetition_penalty": 1.0,  # else the server takes it from the model's generation_config.json
            "min_p": 0.0,  # the same
            "seed": signed(request.seed),
            "stop_token_ids": sorted(self.eos),
            "ignore_eos": True,  # all of them stand in stop_token_ids
            "logprobs": 0,  # of the sampled token
            "return_token_ids": True,
            "stream": True,  # so that a turn can end where its stop rule says
        }
        untouched, silent = copy.copy(request.stop), 0
        for attempt in range(TRIES):
            if attempt:
                pause = min(BACKOFF * 2 ** (attempt - 1), LONGEST)
                await asyncio.sleep(pause * random.uniform(0.75, 1.25))  # not all requests at the same moment
                request = replace(request, stop=copy.copy(untouched))
            turn, completion = OpenTurn(request, room, self.eos, self.tokenizer), None
            try:
                async with self.slots, self.client.stream("POST", f"{self.url}/v1/completions", json=body) as response:
                    if response.status_code == 200:
                        lines = _lines(response)
                        completion, fault = await self._read(lines, turn)
                        if completion and completion.finish != "stop":
                            with contextlib.suppress(asyncio.TimeoutError):
                                # to its end, which is near: the connection serves the next turn
                                await asyncio.wait_for(_drain(lines), DRAIN)
                    else:
                        fault = f"{response.status_code}: {_message(await response.aread())}"
                        if response.status_code not in PASSING:
                            raise ServerError(f"{self.url}: refused the request with {fault}")
            except httpx2.RequestError as error:
                fault = f"{type(error).__name__} {error}".strip()
                silent += isinstance(error, (httpx2.ReadTimeout, httpx2.WriteTimeout))
            if completion:  # whole, even where the rest of its stream is torn
                return completion
            if silent == 2:
                break
        raise ServerError(f"{self.url}: request {request.id} failed {attempt + 1} times, at last with {fault}")

    async def _read(self, lines: AsyncIterator[bytes], turn: OpenTurn) -> tuple[Completion | None, str]:
        """Feed the stream to the turn: its completion, or why there is none. Left unread, the server aborts it."""
        async for line in lines:
            if not line.startswith(b"data: {"):
                continue
            data = line.removeprefix(b"data: ")
            try:
                chunk = json.loads(data)
                if "error" in chunk:
                    return None, _message(data)
                sampled = _sampled(chunk)
            except (ValueError, KeyError, TypeError) as error:
                raise ServerError(
                    f"{self.url}: sent no token ids with log-probs; is it a vLLM with `return_token_ids`? "
                    + _message(data)
                ) from error
            for token, logp in sampled:
                if completion := turn.push(token, logp):
                    return completion, ""
        return None, "the stream ended early"


async def _lines(response: httpx2.Response) -> AsyncIterator[bytes]:
    """Lines of a stream; one that its end cuts off is left out.

    `response.aiter_lines` would split at U+0085, U+2028 and U+2029 too, which vLLM writes as they are inside strings.
    """
    rest = b""
    async for data in response.aiter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield line


async def _drain(lines: AsyncIterator[bytes]) -> None:
    async for _ in lines:
        pass


def _sampled(chunk: dict) -> list[tuple[int, float | None]]:
    """Tokens of a chunk with their log-probs; ValueError, KeyError or TypeError where it is not what vLLM sends."""
    pairs: list[tuple[int, float | None]] = []
    for choice in chunk["choices"]:  # none in a chunk that reports usage
        if choice["token_ids"] != []:  # beside none, log-probs may be null
            pairs += zip(choice["token_ids"], choice["logprobs"]["token_logprobs"], strict=True)
    for token, logp in pairs:
        known = type(token) is int and 0 <= token < 2**31  # a greater one overflows in the tokenizer
        if not known or not isinstance(logp, (float, int, type(None))):
            raise TypeError(f"token {token} with log-prob {logp}")
    return pairs


def _message(body: bytes) -> str:
    """What an error response says, in one line."""
    text = body.decode(errors="replace")
    with contextlib.suppress(ValueError, KeyError, TypeError):
        text = str(json.loads(text)["error"]["message"])
    return " ".join(text.split())[:300]
