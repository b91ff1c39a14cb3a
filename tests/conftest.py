"""Shared fixtures and helpers: tiny random models, a byte-level tokenizer, and scripted engines and executors."""

from __future__ import annotations

import contextlib
import random
import resource
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import hypothesis
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from thor.engines import Completion, Request
from thor.sandbox import Executor
from thor.text import TextStream
from thor.trajectory import ExecResult

torch.set_num_threads(1)  # with tiny models, more threads only add overhead
hypothesis.settings.register_profile(  # no time limits, which would depend on the machine
    "thor", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("thor")

CHAT = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}<|assistant|>"


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Refuse to write more than `size` bytes to a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def byte_tokenizer(words: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each byte, one for each of `words`, and two special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(list(words))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    fast.chat_template = CHAT
    return fast


def tiny_settings(tokenizer) -> dict:
    """Arguments of the config of a tiny model."""
    return dict(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=2048,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        tie_word_embeddings=False,
    )


def tiny_llama(tokenizer, seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**tiny_settings(tokenizer) | changes)).eval()


FAMILIES = ("llama", "qwen2", "qwen3", "gemma3", "mistral")


def tiny_model(family: str, tokenizer, seed: int = 0, **changes) -> PreTrainedModel:
    """A random model of two layers. gemma3 (first layer only) and mistral use sliding windows of 16 tokens.

    `family` is one of FAMILIES, or 'qwen3_moe' or 'mixtral', which have experts (the former in its second layer only).
    """
    if family == "llama":
        return tiny_llama(tokenizer, seed, **changes)
    more = {
        "qwen2": {},
        "qwen3": {},
        "gemma3": {
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 8,
        },
        "mistral": {"sliding_window": 16},
        "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 80, "mlp_only_layers": [0]},
        "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    }[family]
    config_class, model_class = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
        "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
        "mixtral": (MixtralConfig, MixtralForCausalLM),
    }[family]
    torch.manual_seed(seed)
    return model_class(config_class(**tiny_settings(tokenizer) | more | changes)).eval()


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="session")
def executor():
    with Executor(workers=2, timeout=5) as ex:
        yield ex


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A saved tiny model with a byte-level tokenizer. A block and two answers are single tokens."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer(("\n```python\nprint(4)\n```\n", "\\boxed{4}", "\\boxed{5}"))
    tiny_llama(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def complete(engine, requests: list[Request]) -> dict[str, Completion]:
    """Run the engine until it has no work. Returns all completions by request id, earlier requests included."""
    for request in requests:
        engine.add(request)
    completions: dict[str, Completion] = {}
    while engine.has_work():
        for completion in engine.step():
            assert completion.id not in completions
            completions[completion.id] = completion
    return completions


def interrupt(module: torch.nn.Module):
    """Make forward passes of `module` raise KeyboardInterrupt until the returned hook is removed."""

    def raise_interrupt(*_):
        raise KeyboardInterrupt

    return module.register_forward_pre_hook(raise_interrupt)


class ScriptedEngine:
    """An engine that answers with the text `reply(request, turn)`, where `turn` counts the requests of an id.

    Stop rules and length limits apply as in a real engine. Records all requests and completions.
    """

    def __init__(self, tokenizer, reply, context: int = 1 << 30) -> None:
        self.tokenizer, self.reply, self.context = tokenizer, reply, context
        self.queue: list[Request] = []
        self.requests: list[Request] = []
        self.completions: list[Completion] = []
        self.turns: dict[str, int] = {}

    def add(self, request: Request) -> None:
        request.token_limit(self.context)  # raises ValueError if no engine could serve the request
        self.queue.append(request)
        self.requests.append(request)

    def has_work(self) -> bool:
        return bool(self.queue)

    def drop(self) -> None:
        self.queue.clear()

    def update_weights(self, named_parameters) -> None: ...

    def sleep(self) -> None: ...

    def step(self) -> list[Completion]:
        request = self.queue.pop(0)
        turn = self.turns.get(request.id, 0)
        self.turns[request.id] = turn + 1
        ids = self.tokenizer.encode(self.reply(request, turn), add_special_tokens=False) + [self.tokenizer.eos_token_id]
        stream, taken, finish = TextStream(self.tokenizer), [], "length"
        for token in ids[: request.max_tokens]:
            taken.append(token)
            if token == self.tokenizer.eos_token_id:
                finish = "eos"
            elif request.stop and request.stop.feed(stream.push(token)):
                finish = "stop"
            if finish != "length":
                break
        rng = random.Random(f"{request.id}{turn}")
        completion = Completion(request.id, taken, [-rng.random() for _ in taken], finish)
        self.completions.append(completion)
        return [completion]


class ScriptedExecutor:
    """An executor that runs nothing: results come from `judge(code) -> ExecResult`."""

    def __init__(self, judge) -> None:
        self.judge = judge
        self.codes: list[str] = []

    def submit(self, code: str) -> Future:
        self.codes.append(code)
        future: Future = Future()
        future.set_result(self.judge(code))
        return future


def passes_unless_bad(code: str) -> ExecResult:
    """A judge for ScriptedExecutor: code that contains 'bad' fails, all other code passes."""
    if "bad" in code:
        return ExecResult("error", "", "NameError: name 'bad' is not defined (line 1)")
    return ExecResult("ok", f"ran {len(code)} é\n")
