"""Measure how far the log-probs of an engine are from those of the trainer, in bfloat16 and with a float32 head.

    .venv-vllm/bin/python tests/benchmarks/bench_mismatch.py            needs vLLM, see README
    .venv-vllm/bin/python tests/benchmarks/bench_mismatch.py --prompts 8 --tokens 32

Each sampler writes completions of the same prompts at temperature 1, and each trainer scores all of them:

    samplers    vLLM in float32, in bfloat16, and in bfloat16 with logits in float32; HFEngine in bfloat16
    trainers    float32 (as on a CPU), bfloat16 (as on GPUs), and bfloat16 with logits in float32

A float32 head multiplies the bfloat16 hidden states with the bfloat16 weights, but does not round the logits. The table
shows |difference| per sampled token, mean and maximum. The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import warnings

import torch
import transformers

from thor.data import load_problems
from thor.engines import HFEngine, Request, VLLMEngine
from thor.text import encode
from thor.training import load_model, model_source
from thor.training.scoring import score_tokens

SAMPLERS = ("vllm float32", "vllm bfloat16", "vllm bfloat16, float32 head", "hf bfloat16")
TRAINERS = ("float32", "bfloat16", "bfloat16, float32 head")


def set_head_dtype(model: torch.nn.Module) -> None:
    """Make a model of vLLM compute its logits in float32, as `--hf-overrides '{"head_dtype": "float32"}'` does."""
    model.logits_processor.head_dtype = torch.float32


def sample(name: str, source: str, prompts: list[list[int]], tokens: int) -> list[tuple[list[int], list[float]]]:
    """(new token ids, their log-probs) for each prompt."""
    kind, dtype = name.split(",")[0].split()
    if kind == "vllm":
        engine = VLLMEngine(source, dtype=dtype)
        if "float32 head" in name:
            engine.llm.apply_model(set_head_dtype)
    else:
        engine = HFEngine(*load_model(source, "cpu", dtype))
    for i, prompt in enumerate(prompts):
        engine.add(Request(str(i), prompt, tokens, seed=i))
    done = {}
    while engine.has_work():
        done |= {completion.id: completion for completion in engine.step()}
    return [(done[str(i)].token_ids, done[str(i)].logps) for i in range(len(prompts))]


@torch.no_grad()
def score(name: str, source: str, prompts: list[list[int]], samples: list) -> torch.Tensor:
    """The log-probs of all sampled tokens under a trainer."""
    model, _ = load_model(source, "cpu", name.split(",")[0])
    if "float32 head" in name:
        head = model.get_output_embeddings()
        head.forward = lambda states: torch.nn.functional.linear(states.float(), head.weight.float())
    sequences = [prompt + new for prompt, (new, _) in zip(prompts, samples, strict=True)]
    scored = [list(range(len(p), len(s))) for p, s in zip(prompts, sequences, strict=True)]
    # one by one, because long batches of small models would not be more like a trainer's
    return torch.cat([score_tokens(model, [s], [p], 1.0).logp for s, p in zip(sequences, scored, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="name of the demo model, folder or hub id")
    parser.add_argument("--prompts", type=int, default=32, help="number of prompts")
    parser.add_argument("--tokens", type=int, default=96, help="new tokens per prompt at most")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    source = model_source(args.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    prompts = [encode(tokenizer, p.question + "\n") for p in load_problems("synthetic", limit=args.prompts)]
    about = {"model": args.model, "cpus": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads()}
    about |= {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}
    print(about, flush=True)
    results = {}
    for sampler in SAMPLERS:
        samples = sample(sampler, source, prompts, args.tokens)
        sampled = torch.tensor([logp for _, logps in samples for logp in logps])
        for trainer in TRAINERS:
            gap = (score(trainer, source, prompts, samples) - sampled).abs()
            row = {"tokens": len(gap), "mean": round(gap.mean().item(), 6), "max": round(gap.max().item(), 5)}
            results[f"{sampler} / {trainer}"] = row
            print(f"{sampler:30} {trainer:24} {row}", flush=True)
    print(json.dumps({"about": about, "results": results}))


if __name__ == "__main__":
    main()
