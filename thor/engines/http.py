"""HTTPEngine: sampling from a running `vllm serve` over HTTP."""

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

from thor.engines.base import Completion, PartialCompletion, Request, end_tokens
from thor.engines.vllm import vllm_seed
from thor.settings import UserError

MAX_ATTEMPTS = 9  # per request
BACKOFF, MAX_BACKOFF = 0.5, 30.0  # seconds before the first retry, doubled for each further one; two minutes in total
POLL_INTERVAL = 0.005  # seconds
DRAIN_TIMEOUT = 3.0  # seconds for the rest of a stream after the last token that is needed
RETRY_STATUSES = (429, 500, 502, 503, 504)
REJECT_STATUSES = (400, 413, 422)  # the fault is in this request; others, such as 401 or 404, would hit every request


class ServerError(UserError, ConnectionError):
    """The server is not reachable, is not a suitable vLLM server, or failed too often. The message is one line."""


class RequestRejected(ServerError):
    """The server rejects one request, and would reject it again."""

    def __init__(self, message: str, request_id: str) -> None:
        super().__init__(message)
        self.request_id = request_id


class HTTPEngine:
    """Samples with the completions API of a running `vllm serve`. It cannot update the weights of the server.

    url: 'http://host:port', or 'http://host:port#name' to require that the server serves the model `name`.
    rows: maximum number of requests in flight.
    timeout: seconds without any data after which a request is retried. A second timeout is an error, because a server
        that hangs would otherwise cost MAX_ATTEMPTS timeouts.

    Log-probs are those of the distribution that is sampled from only if the server was started with
    `--logprobs-mode processed_logprobs`: vLLM's default ignores the temperature. Stop rules run in a thread of this
    engine. A retried request starts over with the same seed and a copy of its stop rule. All server errors raise
    ServerError.
    """

    reproducible = False

    def __init__(self, url: str, rows: int = 64, timeout: float = 600.0) -> None:
        base, _, name = url.partition("#")
        self.url = base.rstrip("/").removesuffix("/v1")
        served = self._served_model(name)
        self.model, self.context = served["id"], served["max_model_len"]
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(served["root"])
            self.eos = end_tokens(served["root"], self.tokenizer)
        except (OSError, ValueError) as error:
            raise ServerError(
                f"{self.url}: serves {served['root']}, whose tokenizer is needed on this machine, but is neither a "
                "local folder nor on the hub"
            ) from error
        self.client = httpx2.AsyncClient(
            timeout=httpx2.Timeout(timeout, connect=10.0),
            limits=httpx2.Limits(max_connections=rows, max_keepalive_connections=rows),
        )
        self.max_rows, self.slots = rows, asyncio.Semaphore(rows)
        self.last_step = -POLL_INTERVAL  # end of the last step, by time.monotonic
        self.in_flight: set[Future[Completion]] = set()
        self.finished: queue.Queue[Future[Completion]] = queue.Queue()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name=f"HTTPEngine {self.url}", daemon=True)
        self.thread.start()

    def add(self, request: Request) -> None:
        limit = request.token_limit(self.context)
        future = asyncio.run_coroutine_threadsafe(self._complete(request, limit), self.loop)
        self.in_flight.add(future)
        future.add_done_callback(self.finished.put)

    def step(self) -> list[Completion]:
        """Return the finished completions, or raise the error of one request. The next step returns the others.

        Waits for a completion until POLL_INTERVAL after the last call. So a caller with nothing else to do does not
        spin, and a caller that also steps another engine does not wait.
        """
        futures, wait = [], self.last_step + POLL_INTERVAL - time.monotonic()
        with contextlib.suppress(queue.Empty):
            futures.append(self.finished.get(wait > 0, wait))
            while True:
                futures.append(self.finished.get_nowait())
        self.last_step = time.monotonic()
        if failed := [future for future in futures if future.exception()][:1]:
            for future in set(futures) - set(failed):
                self.finished.put(future)
            futures = failed
        self.in_flight.difference_update(futures)
        return [future.result() for future in futures]

    def has_work(self) -> bool:
        return bool(self.in_flight)

    def drop(self) -> None:
        """Close the connections, which makes the server abort the requests."""
        # a new queue, because dropped requests may still add to the old one
        dropped, self.in_flight, self.finished = self.in_flight, set(), queue.Queue()
        for future in dropped:
            future.cancel()

    def log_probs(self, token_ids: list[int]) -> list[float]:
        body = {"model": self.model, "prompt": token_ids, "max_tokens": 1, "prompt_logprobs": 0}
        try:
            response = httpx2.post(f"{self.url}/v1/completions", json=body, timeout=self.client.timeout)
            response.raise_for_status()
            [choice] = response.json()["choices"]
            found = choice["prompt_logprobs"][1:]
            return [entry[str(token)]["logprob"] for entry, token in zip(found, token_ids[1:], strict=True)]
        except (httpx2.HTTPError, ValueError, KeyError, TypeError) as error:
            fault = f"{type(error).__name__} {error}".strip()
            raise ServerError(f"{self.url}: gave no log-probs of a prompt ({' '.join(fault.split())})") from error

    def update_weights(self, named_parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        raise RuntimeError(f"{self.url}: cannot update the weights of a server; train with sampler 'hf' or 'vllm'")

    def sleep(self) -> None: ...  # sampling uses the memory of the server

    def close(self) -> None:
        """Drop all requests, close the connections and end the thread. Idempotent. Also happens at process exit."""
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

    def _served_model(self, name: str) -> dict:
        """The entry of /v1/models for `name`, or the first one if `name` is empty."""
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
            raise ServerError(f"{self.url}: responds, but not like `vllm serve`") from error
        if not entries or (name and name not in names):
            raise ServerError(f"{self.url}: serves {', '.join(names) or 'nothing'}, not {name or 'a model'}")
        entry = entries[names.index(name) if name else 0]
        if not (entry.get("root") and entry.get("max_model_len")):
            raise ServerError(f"{self.url}: does not report `root` and `max_model_len` of its model; is it vLLM?")
        return entry

    def _body(self, request: Request, limit: int) -> dict:
        return {
            "model": self.model,
            "prompt": request.token_ids,
            "max_tokens": limit,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": request.top_k,
            "repetition_penalty": 1.0,  # by default the server takes it from the model's generation_config.json
            "min_p": 0.0,  # the same
            "seed": vllm_seed(request.seed),
            "stop_token_ids": sorted(self.eos),
            "ignore_eos": True,  # stop_token_ids contains them all
            "logprobs": 0,  # of the sampled token
            "return_token_ids": True,
            "stream": True,  # so that the stop rule can end the request
        }

    async def _complete(self, request: Request, limit: int) -> Completion:
        """Sample one request, with retries."""
        body, unused_stop, timeouts = self._body(request, limit), copy.copy(request.stop), 0
        for attempt in range(MAX_ATTEMPTS):
            if attempt:
                pause = min(BACKOFF * 2 ** (attempt - 1), MAX_BACKOFF)
                await asyncio.sleep(pause * random.uniform(0.75, 1.25))  # jitter, so that requests retry one by one
                request = replace(request, stop=copy.copy(unused_stop))
            partial, completion = PartialCompletion(request, limit, self.eos, self.tokenizer), None
            try:
                async with self.slots, self.client.stream("POST", f"{self.url}/v1/completions", json=body) as response:
                    if response.status_code == 200:
                        lines = _lines(response)
                        completion, fault = await self._read(lines, partial)
                        if completion and completion.finish != "stop":
                            with contextlib.suppress(asyncio.TimeoutError):
                                # read the stream to its end, which is near, so that the connection can be reused
                                await asyncio.wait_for(_drain(lines), DRAIN_TIMEOUT)
                    else:
                        fault = f"{response.status_code}: {_error_message(await response.aread())}"
                        message = f"{self.url}: rejected the request with {fault}"
                        if response.status_code in REJECT_STATUSES:
                            raise RequestRejected(message, request.id)
                        if response.status_code not in RETRY_STATUSES:
                            raise ServerError(message)
            except httpx2.RequestError as error:
                fault = f"{type(error).__name__} {error}".strip()
                timeouts += isinstance(error, (httpx2.ReadTimeout, httpx2.WriteTimeout))
            if completion:  # complete even if the rest of its stream failed
                return completion
            if timeouts == 2:
                break
        raise ServerError(f"{self.url}: request {request.id} failed {attempt + 1} times, last with {fault}")

    async def _read(self, lines: AsyncIterator[bytes], partial: PartialCompletion) -> tuple[Completion | None, str]:
        """Read a stream until the completion is finished. Returns it, or None and an error message."""
        async for line in lines:
            if not line.startswith(b"data: {"):
                continue
            data = line.removeprefix(b"data: ")
            try:
                chunk = json.loads(data)
                if "error" in chunk:
                    return None, _error_message(data)
                tokens = _tokens(chunk)
            except (ValueError, KeyError, TypeError) as error:
                raise ServerError(
                    f"{self.url}: sent no token ids with log-probs; is it a vLLM that supports `return_token_ids`? "
                    + _error_message(data)
                ) from error
            for token, logp in tokens:
                if completion := partial.push(token, logp):
                    return completion, ""
        return None, "the stream ended early"


async def _lines(response: httpx2.Response) -> AsyncIterator[bytes]:
    """The complete lines of a stream.

    `response.aiter_lines` would also split at U+0085, U+2028 and U+2029, which vLLM does not escape inside strings.
    """
    rest = b""
    async for data in response.aiter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield line


async def _drain(lines: AsyncIterator[bytes]) -> None:
    async for _ in lines:
        pass


def _tokens(chunk: dict) -> list[tuple[int, float | None]]:
    """The tokens of a chunk and their log-probs. Raises ValueError, KeyError or TypeError if the chunk is malformed."""
    pairs: list[tuple[int, float | None]] = []
    for choice in chunk["choices"]:  # empty in a chunk that reports usage
        if choice["token_ids"] != []:  # otherwise log-probs may be null
            pairs += zip(choice["token_ids"], choice["logprobs"]["token_logprobs"], strict=True)
    for token, logp in pairs:
        valid = type(token) is int and 0 <= token < 2**31  # larger values overflow in the tokenizer
        if not valid or not isinstance(logp, (float, int, type(None))):
            raise TypeError(f"token {token} with log-prob {logp}")
    return pairs


def _error_message(body: bytes) -> str:
    """The message of an error response, in one line."""
    text = body.decode(errors="replace")
    with contextlib.suppress(ValueError, KeyError, TypeError):
        text = str(json.loads(text)["error"]["message"])
    return " ".join(text.split())[:300]
