"""Compare the throughput of HFEngine, transformers' `generate` and vLLM (if installed) on the CPU.

    python tests/benchmarks/bench_engine.py                 run all four workloads
    python tests/benchmarks/bench_engine.py --only a,b      run some of them
    python tests/benchmarks/bench_engine.py --vllm-python .venv-vllm/bin/python      use vLLM from another environment

(a) 64 prompts of 20 to 80 tokens, 128 new tokens each
(b) 8 prompts of 500 tokens, 8 samples each, 96 new tokens (like a group in RL)
(c) 32 trajectories of 3 rounds: 16 to 96 sampled tokens, a sympy snippet in the executor, 24 tokens of output.
    With `generate`, all rows sample a round together, then all snippets run, then the whole text is prefilled again.
(d) as (c), but each snippet sleeps for 0.5 s first, and the executor has a worker for each trajectory

All engines sample at temperature 1 from the same prompts, and the number of new tokens is fixed. HFEngine and vLLM also
return the log-prob of each token. The throughput limit counts only the matrix products that no implementation can
avoid: linear layers and vocabulary projection of each new token, at the rate of the fastest matmul measured here
(PyTorch's, or that of the model's own layers). The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import random
import resource
import subprocess
import sys
import time
import warnings

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, StoppingCriteria

from thor.engines import HFEngine, Request
from thor.rollout import drive
from thor.sandbox import Executor
from thor.training import load_model, model_source

ROUNDS, OUTPUT = 3, 24
SNIPPET = "from sympy import *\nx = symbols('x')\nprint(solve(x**2 - {}*x + {}, x))"


# ---- workloads ------------------------------------------------------------------------------------------------------


def random_tokens(rng: random.Random, vocabulary: int, count: int) -> list[int]:
    return [rng.randrange(100, vocabulary) for _ in range(count)]


def workload(name: str, vocabulary: int, scale: float) -> dict:
    """A workload.

    prompts: list of token ids. new: for each prompt the number of new tokens per round, or one such list for all.
    group: number of equal prompts in a row. sleep: seconds that each snippet sleeps.
    scale: size relative to the full workload. The seed depends on it, so that the warm-up uses other prompts.
    """
    rng = random.Random(f"{name}{scale}")

    def n(count: int) -> int:
        return max(1, round(count * scale))

    if name == "a":
        return {"prompts": [random_tokens(rng, vocabulary, rng.randint(20, 80)) for _ in range(n(64))], "new": [[128]]}
    if name == "b":
        prompts = [random_tokens(rng, vocabulary, 500) for _ in range(n(8))]
        return {"prompts": [p for p in prompts for _ in range(8)], "new": [[96]], "group": 8}
    prompts = [random_tokens(rng, vocabulary, rng.randint(40, 120)) for _ in range(n(32))]
    rng = random.Random(scale)  # the same for (c) and (d)
    new = [[rng.randint(16, 96) for _ in range(ROUNDS)] for _ in prompts]
    return {"prompts": prompts, "new": new, "sleep": 0.5 if name == "d" else 0.0}


def snippet(i: int, round_: int, sleep: float) -> str:
    return f"import time\ntime.sleep({sleep})\n" * bool(sleep) + SNIPPET.format(i + 5, round_ + 2)


def output_tokens(i: int, round_: int, vocabulary: int) -> list[int]:
    return random_tokens(random.Random(i * 8 + round_), vocabulary, OUTPUT)


# ---- running a workload ---------------------------------------------------------------------------------------------


class FixedLengths(StoppingCriteria):
    """Stops each row of `generate` after a given number of tokens."""

    def __init__(self, prompt_length: int, counts: list[int]) -> None:
        self.ends = torch.tensor([prompt_length + count for count in counts])

    def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
        return input_ids.shape[1] >= self.ends


def generate(model, prompts: list[list[int]], counts: list[int], samples: int = 1) -> list[list[int]]:
    """Sample new tokens for a padded batch of prompts with transformers."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        ids,
        attention_mask=mask,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max(counts),
        eos_token_id=None,
        pad_token_id=0,
        num_return_sequences=samples,
        stopping_criteria=[FixedLengths(width, counts)],
    )
    rows = out[:, width:].tolist()
    return [row[:count] for row, count in zip(rows, counts, strict=True)]


@torch.inference_mode()
def run_with_generate(model, load: dict, executor: Executor) -> int:
    """Run all trajectories in lockstep, and prefill the whole text in each round. Returns the number of new tokens."""
    group, vocabulary = load.get("group", 1), model.config.vocab_size
    prompts = load["prompts"][::group]
    if len(load["new"]) == 1:
        [[count]] = load["new"]
        return sum(map(len, generate(model, prompts, [count] * len(load["prompts"]), group)))
    texts, total = [list(p) for p in prompts], 0
    for round_ in range(ROUNDS):
        rows = generate(model, texts, [new[round_] for new in load["new"]])
        executor.run([snippet(i, round_, load["sleep"]) for i in range(len(texts))])
        for i, row in enumerate(rows):
            texts[i] += row + output_tokens(i, round_, vocabulary)
            total += len(row)
    return total


def run_with_engine(engine, load: dict, executor: Executor, vocabulary: int) -> int:
    """Run all trajectories with the rollout loop. Returns the number of new tokens."""

    def trajectory(i: int):
        ids, total, shared = list(load["prompts"][i]), 0, len(load["prompts"][i]) - 1
        counts = load["new"][i] if len(load["new"]) > 1 else load["new"][0]
        for round_, count in enumerate(counts):
            completion = yield Request(str(i), ids, count, seed=i * 8 + round_, shared=shared)
            ids, total = ids + completion.token_ids, total + len(completion.token_ids)
            if len(counts) > 1:
                result = yield snippet(i, round_, load["sleep"])
                assert result.passed, result
                ids = ids + output_tokens(i, round_, vocabulary)
        return total

    return sum(drive([trajectory(i) for i in range(len(load["prompts"]))], engine, executor))


# ---- measuring ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def matmul_rates(model) -> tuple[dict[str, float], float]:
    """FLOP/s of the linear layers at 512 rows with PyTorch's matmul and with their own, and FLOP for one new token."""
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    flop = sum(2 * layer.weight.numel() for layer in layers)
    inputs = {layer.in_features: torch.randn(512, layer.in_features) for layer in layers}
    rates = {}
    for name, matmul in {
        "torch": lambda layer, x: torch.nn.functional.linear(x, layer.weight),
        "model": lambda layer, x: layer(x),
    }.items():
        best = float("inf")
        for _ in range(4):
            start = time.perf_counter()
            for layer in layers:
                matmul(layer, inputs[layer.in_features])
            best = min(best, time.perf_counter() - start)
        rates[name] = 512 * flop / best
    return rates, flop


def peak_rss() -> float:
    """Peak resident memory of this process, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(which: str, source: str, names: list[str]) -> dict:
    """Run workloads with one engine in this process."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    if which == "vllm":
        from thor.engines import VLLMEngine

        vocabulary, start = AutoConfig.from_pretrained(source).vocab_size, peak_rss()
        engine = VLLMEngine(source)
        engine.eos = set()
    else:
        model, tokenizer = load_model(source, "cpu")
        vocabulary = model.config.vocab_size
        if which == "generate":
            model = AutoModelForCausalLM.from_pretrained(source, dtype=model.dtype).eval()
        start = peak_rss()
        if which != "generate":
            engine = HFEngine(model, tokenizer)
            engine.eos = set()

    def run(name: str, scale: float, executor: Executor) -> int:
        load = workload(name, vocabulary, scale)
        if which == "generate":
            return run_with_generate(model, load, executor)
        return run_with_engine(engine, load, executor, vocabulary)

    results: dict = {}
    with Executor(workers=2, timeout=10) as two, Executor(workers=32, timeout=10, preload=("sympy",)) as many:
        for name in names:
            executor = many if name == "d" else two
            run(name, 1 / 8, executor)  # warm-up
            began = time.perf_counter()
            tokens = run(name, 1, executor)
            seconds = time.perf_counter() - began
            results[name] = {"tokens": tokens, "seconds": round(seconds, 2), "tokens_per_s": round(tokens / seconds, 1)}
            print(f"({name}) {which:9} {results[name]}", flush=True)
    results["peak_mib"] = round(peak_rss() - start)  # above the loaded weights (vLLM: above the imported libraries)
    print(f"    {which:9} peak memory {results['peak_mib']} MiB", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="name of the demo model, folder or hub id")
    parser.add_argument("--only", default="a,b,c,d", help="workloads to run")
    parser.add_argument(
        "--engines",
        default="generate,ours,vllm",
        help="engines to compare ('ours' is HFEngine); vllm is skipped if it is not installed",
    )
    parser.add_argument("--vllm-python", default=sys.executable, help="Python interpreter of an environment with vLLM")
    parser.add_argument("--child", action="store_true", help="(internal) measure one engine in this process")
    args = parser.parse_args()
    source, names = model_source(args.model), args.only.split(",")
    if args.child:
        print(json.dumps(measure(args.engines, source, names)))
        return
    model, _ = load_model(source, "cpu")
    rates, flop = matmul_rates(model)
    del model
    about = {"model": args.model, "cpus": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads()}
    about |= {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}
    about |= {
        "load": [round(x, 1) for x in os.getloadavg()],
        "gflops": {k: round(r / 1e9, 1) for k, r in rates.items()},
    }
    limit = about["limit_tokens_per_s"] = round(max(rates.values()) / flop)
    print(about, flush=True)
    results: dict = {}
    for which in args.engines.split(","):  # each in its own process, which keeps threads and memory peaks apart
        if which != "vllm" or args.vllm_python != sys.executable or importlib.util.find_spec("vllm"):
            python = args.vllm_python if which == "vllm" else sys.executable
            command = [python, __file__, "--child", "--model", source, "--only", args.only, "--engines", which]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
                for line in child.stdout:
                    if line.startswith("{"):
                        results[which] = json.loads(line)
                    else:
                        print(line, end="", flush=True)
            if child.returncode:
                raise SystemExit(f"{which} failed, see the output above")
    ours = results.get("ours", {})
    for name in names if ours else ():
        for which in results.keys() - {"ours"}:
            ratio = about[f"{name}_over_{which}"] = round(results[which][name]["seconds"] / ours[name]["seconds"], 2)
            print(f"({name}) HFEngine is {ratio} times as fast as {which}")
        share = ours[name]["tokens_per_s"] / limit
        print(f"({name}) HFEngine reaches {share:.0%} of the throughput limit of {limit} tokens/s")
    if "c" in ours and "d" in ours:
        about["d_over_c"] = round(ours["d"]["seconds"] / ours["c"]["seconds"], 3)
        print(f"(d) takes {about['d_over_c']} times as long as (c)")
    print(json.dumps(about | results))


if __name__ == "__main__":
    main()
