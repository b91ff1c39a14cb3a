"""Memory of scoring 16,384 tokens with a vocabulary of 151,936 (Qwen's), forward and backward.

    python tests/benchmarks/bench_memory.py

The logits dominate: 9.3 GiB in float32, and plain autograd holds several copies of them. The model is therefore tiny (2
layers of hidden size 64), so that little else counts: the activations of a larger one grow with layers and hidden size,
not with the vocabulary. All tokens but the first of one sequence are scored. Peaks are resident memory on the CPU above
what the model and its gradients take, each measured in a separate process. The plain way (logits, their log-softmax and
its gradient at the same time, as autograd keeps them) is measured at a length that fits, and extrapolated. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from thor.training.model import prepare
from thor.training.scoring import score_tokens

VOCABULARY, TOKENS, PLAIN_TOKENS = 151_936, 16_384, 1_024
MIB = 2**20


def body() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def resident(field: str) -> float:
    """MiB: VmRSS is the current value, VmHWM the peak since the last `reset_peak`."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def child(way: str, tokens: int) -> None:
    model = body()
    model.requires_grad_(True)
    rng = random.Random(0)
    ids = [rng.randrange(VOCABULARY) for _ in range(tokens)]
    for parameter in model.parameters():  # allocate weights and gradients, and touch them so that they are resident
        parameter.grad = torch.ones_like(parameter)
    if way == "ours":
        prepare(model)
    before = resident("VmRSS")
    reset_peak()
    start = time.perf_counter()
    if way == "ours":
        logp = score_tokens(model, [ids], [list(range(1, tokens))], 1.0).logp
    else:
        logits = model(torch.tensor([ids[:-1]]), use_cache=False).logits[0]
        logp = torch.log_softmax(logits.float(), -1).gather(-1, torch.tensor(ids[1:])[:, None])
    (-logp.mean()).backward()
    seconds = time.perf_counter() - start
    print(json.dumps({"gib": round((resident("VmHWM") - before) / 1024, 2), "seconds": round(seconds, 1)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=2, metavar=("WAY", "TOKENS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if args.child:
        child(args.child[0], int(args.child[1]))
        return
    about = {"cpus": len(os.sched_getaffinity(0)), "torch": torch.__version__, "python": platform.python_version()}
    about |= {"vocabulary": VOCABULARY, "model_mib": round(2 * 4 * sum(p.numel() for p in body().parameters()) / MIB)}
    print(about, flush=True)
    found = {}
    for way, tokens in ("ours", TOKENS), ("ours", PLAIN_TOKENS), ("plain", PLAIN_TOKENS):
        command = [sys.executable, __file__, "--child", way, str(tokens)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found[f"{way}_{tokens}"] = run = json.loads(output.splitlines()[-1])
        print(f"{way}, {tokens:,} tokens: peak {run['gib']} GiB above the model's own, {run['seconds']} s", flush=True)
    logits = TOKENS * VOCABULARY * 4 / 2**30
    plain = found[f"plain_{PLAIN_TOKENS}"]["gib"] * TOKENS / PLAIN_TOKENS
    print(f"plain, {TOKENS:,} tokens: {logits:.1f} GiB for each copy of the logits, {plain:.0f} GiB in proportion")
    print(json.dumps(about | found | {"plain_in_proportion_gib": round(plain, 1)}))


if __name__ == "__main__":
    main()
