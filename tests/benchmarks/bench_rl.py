"""Compare an iteration of RL with TRL's GRPOTrainer, and with itself without each optimisation.

    python tests/benchmarks/bench_rl.py                     everything; TRL is skipped if it is not installed
    python tests/benchmarks/bench_rl.py --only steps        one workload
    python tests/benchmarks/bench_rl.py --only tiny         a check that it runs, which takes seconds

(p48)    4 prompts of 48 tokens x 8 samples x 64 new tokens
(p500)   the same with prompts of 500 tokens
(steps)  training alone, 2 step groups: prefix of 600 tokens, 8 suffixes and blocks of 100

Both sides sample from the same prompts at temperature 1 without tools. The number of new tokens is fixed, the reward is
the parity of the last token, and one optimizer step learns from all samples: beta 0, no reference model, no gradient
checkpointing, float32 on the CPU (on a GPU float32 weights and bfloat16 compute). A micro-batch is one group of 8
sequences on both sides. Each run has its own process, so that memory peaks do not mix. Its first iteration is a
warm-up; of the others, the fastest counts.

log-probs is the forward pass with the loss, backward includes recomputation, optimizer includes gradient clipping.
The limit of training is three times the multiplications of the forward pass that no implementation can avoid (linear
layers for every distinct token, the vocabulary projection for every scored one) at the measured matmul rate. mfu is the
share of that limit that is reached: mfu_training at the fastest matmul available (oneDNN on many CPUs, see
thor/fast_cpu.py), mfu_training_torch at torch's own. The last line is JSON.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[2]))  # the scripts are not part of the package

import run_rl
import thor.training.trainer
from thor.demo import DEMO_MODEL, demo_model
from thor.distributed import end_ranks, start_ranks
from thor.engines import HFEngine, Request
from thor.rollout import drive
from thor.run_folder import Run
from thor.training.model import load_model, policy_parameters, prepare, sampling_copy
from thor.training.trainer import Sample, Trainer
from thor.trajectory import Problem, Trajectory


@dataclass(frozen=True)
class Workload:
    prompts: int
    prompt_tokens: int
    group: int
    new_tokens: int

    @property
    def scored(self) -> int:
        return self.prompts * self.group * self.new_tokens

    @property
    def slots(self) -> int:
        """Tokens of all sequences, shared prefixes counted each time."""
        return self.prompts * self.group * (self.prompt_tokens + self.new_tokens)

    @property
    def distinct(self) -> int:
        return self.prompts * self.prompt_tokens + self.scored

    def distinct_of(self, sequences: int) -> int:
        """Distinct tokens of this number of sequences of one group."""
        return self.prompt_tokens + sequences * self.new_tokens


WORKLOADS = {
    "p48": Workload(4, 48, 8, 64),
    "p500": Workload(4, 500, 8, 64),
    "steps": Workload(2, 600, 8, 100),
    "tiny": Workload(2, 16, 4, 8),
}


def sides(name: str) -> dict[str, Callable[[Workload], dict]]:
    """The runs of a workload: name -> settings of run_rl; 'trl' has none."""

    def ours(load: Workload) -> dict:
        return {"max_tokens_per_micro_batch": load.distinct_of(load.group)}

    def whole_rows(load: Workload) -> dict:
        return {"max_tokens_per_micro_batch": load.group * load.distinct_of(1), "tree": False}

    if name == "steps":
        return {
            "ours": ours,
            "no tree": whole_rows,
            "row by row": lambda _: {"max_tokens_per_micro_batch": 1, "tree": False},
        }
    return {
        "trl": lambda _: {},
        "ours": ours,
        "no tree": whole_rows,
        "one micro-batch": lambda load: {"max_tokens_per_micro_batch": load.distinct},
        "2 sequences a micro-batch": lambda load: {"max_tokens_per_micro_batch": load.distinct_of(2)},
        "gradient checkpointing": lambda load: ours(load) | {"gradient_checkpointing": True},
    }


def some_prompts(tokenizer, load: Workload) -> list[list[int]]:
    """Prompts of one-token words, whose text encodes to exactly these tokens, because TRL takes text."""
    words = [i for token, i in sorted(tokenizer.get_vocab().items()) if re.fullmatch("Ġ[a-z]{4,}", token)]
    rng = random.Random(0)
    prompts = [[rng.choice(words) for _ in range(load.prompt_tokens)] for _ in range(load.prompts)]
    assert [tokenizer(tokenizer.decode(p))["input_ids"] for p in prompts] == prompts, "a prompt does not round-trip"
    return prompts


# ---- timing --------------------------------------------------------------------------------------------


class Clock:
    """Seconds per phase of each iteration. A phase is a function that both sides call, wrapped in a timer."""

    def __init__(self) -> None:
        self.phases: Counter = Counter()
        self.iterations: list[dict[str, float]] = []
        self.start = self.now()

    def now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def wrap(self, owner, name: str, phase: str) -> None:
        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args, **kwargs):
            start = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                self.phases[phase] += self.now() - start

        setattr(owner, name, timed)

    def wrap_training(self) -> None:
        self.wrap(torch.Tensor, "backward", "backward")
        self.wrap(torch.optim.AdamW, "step", "optimizer")
        self.wrap(torch.nn.utils, "clip_grads_with_norm_", "optimizer")

    def iteration_ends(self) -> None:
        end = self.now()
        self.iterations.append({"iteration": end - self.start, **self.phases})
        print(f"    { ({k: round(v, 2) for k, v in self.iterations[-1].items()}) }", file=sys.stderr, flush=True)
        self.start, self.phases = end, Counter()

    def fastest(self) -> dict[str, float]:
        best = min(self.iterations[1:], key=lambda phases: phases["iteration"])
        return {phase: round(seconds, 3) for phase, seconds in best.items()}


def peak_mib() -> float:
    """Peak resident memory of this process (getrusage would include the parent's, which a child inherits)."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


@torch.no_grad()
def matmul_rate(model, multiply: Callable, rows: int = 1024) -> float:
    """FLOP/s of multiply(layer, x) with layers like the model's own, which may be sharded."""
    dtype = torch.bfloat16 if model.device.type == "cuda" else torch.float32
    options = {"bias": False, "dtype": dtype, "device": model.device}
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    layers = [type(m)(m.in_features, m.out_features, **options) for m in linear]
    inputs = {m.in_features: torch.randn(rows, m.in_features, dtype=dtype, device=model.device) for m in layers}
    clock, best = Clock(), float("inf")
    for _ in range(5):
        start = clock.now()
        for layer in layers:
            multiply(layer, inputs[layer.in_features])
        best = min(best, clock.now() - start)
    return 2 * rows * sum(layer.weight.numel() for layer in layers) / best


def training_flop(model, load: Workload) -> float:
    weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    head = model.get_output_embeddings().weight.numel()
    return 3 * 2 * ((sum(w.numel() for w in weights) - head) * load.distinct + head * load.scored)


# ---- the two sides --------------------------------------------------------------------------------------------------


def run_ours(model_name: str, name: str, changes: dict, iterations: int) -> tuple[Clock, torch.nn.Module]:
    load, clock = WORKLOADS[name], Clock()
    settings = run_rl.Settings(nll_coef=0.0, lr=1e-6, report_to="none", **changes)
    model, tokenizer = load_model(model_name, start_ranks("auto", 60))
    engine = HFEngine(sampling_copy(model), tokenizer)
    engine.eos = set()
    trainer = Trainer(model, Run("never written", settings, resume=True), settings)
    clock.wrap_training()
    clock.wrap(thor.training.trainer, "score_tokens", "log-probs")
    clock.wrap(run_rl, "hierarchical_loss", "log-probs")
    prompts = some_prompts(tokenizer, load)
    rng = random.Random(1)

    def ask(request: Request):
        return (yield request)

    def sample() -> list[list]:
        """(tokens, log-probs) of the samples of each prompt."""
        if name == "steps":  # their sampling is that of p500
            logps = [-10.0] * load.new_tokens
            rows = [
                ([rng.randrange(100, model.config.vocab_size) for _ in logps], logps)
                for _ in range(load.prompts * load.group)
            ]
        else:
            engine.update_weights(policy_parameters(model))
            requests = [
                Request(f"{p}#{g}", prompt, load.new_tokens, seed=rng.getrandbits(63), shared=len(prompt))
                for p, prompt in enumerate(prompts)
                for g in range(load.group)
            ]
            rows = [(c.token_ids, c.logps) for c in drive(map(ask, requests), engine, None)]
        return [rows[p : p + load.group] for p in range(0, len(rows), load.group)]

    for _ in range(1 + iterations):
        before = clock.now()
        groups = sample()
        engine.sleep()
        clock.phases["sampling"] += clock.now() - before
        samples = []
        for prompt, rows in zip(prompts, groups, strict=True):
            rewards = [float(ids[-1] % 2) for ids, _ in rows]
            for (ids, logps), advantage in zip(rows, run_rl.group_advantages(rewards), strict=True):
                assert len(ids) == load.new_tokens
                trajectory = Trajectory(Problem("", ""), prompt)
                trajectory.append_sampled(ids, logps)
                samples.append(Sample(trajectory, advantage, "step" if name == "steps" else "trajectory"))
        metrics = trainer.step(samples, lambda batch, scores: run_rl.hierarchical_loss(batch, scores, settings))
        assert not metrics["skipped"]
        clock.iteration_ends()
    return clock, model


def run_trl(model_name: str, name: str, iterations: int) -> tuple[Clock, torch.nn.Module]:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    load, clock, cuda = WORKLOADS[name], Clock(), torch.cuda.is_available()
    source = str(demo_model()) if model_name == DEMO_MODEL else model_name
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    prompts = [tokenizer.decode(prompt) for prompt in some_prompts(tokenizer, load)]

    def reward(completion_ids: list[list[int]], **_) -> list[float]:
        assert {len(ids) for ids in completion_ids} == {load.new_tokens}
        return [float(ids[-1] % 2) for ids in completion_ids]

    class Ticks(transformers.TrainerCallback):
        def on_train_begin(self, *args, **kwargs) -> None:
            clock.start = clock.now()

        def on_step_end(self, *args, **kwargs) -> None:
            clock.iteration_ends()

    clock.wrap_training()
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=load.group,
            gradient_accumulation_steps=load.prompts,
            num_generations=load.group,
            max_completion_length=load.new_tokens,
            generation_kwargs={"min_new_tokens": load.new_tokens},
            beta=0.0,
            temperature=1.0,
            learning_rate=1e-6,
            max_steps=1 + iterations,
            gradient_checkpointing=False,
            bf16=cuda,
            use_cpu=not cuda,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model,
            reward,
            config,
            train_dataset=Dataset.from_list([{"prompt": text} for text in prompts]),
            processing_class=tokenizer,
            callbacks=[Ticks()],
        )
        clock.wrap(trainer, "_generate_and_score_completions", "sampling")
        clock.wrap(trainer, "compute_loss", "log-probs")
        trainer.train()
    return clock, model


def child(model_name: str, name: str, side: str, iterations: int) -> None:
    """One run in this process; the last line on stdout is its result."""
    load, settings = WORKLOADS[name], sides(name)[side](WORKLOADS[name])
    if side == "trl":
        clock, model = run_trl(model_name, name, iterations)
    else:
        clock, model = run_ours(model_name, name, settings, iterations)
    found: dict = clock.fastest()
    found["peak_mib"] = round(peak_mib())
    if torch.cuda.is_available():
        found["peak_gpu_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
    prepare(model, model.device.type)  # for TRL's model too, whose run is over: both sides get the same rates
    torch_rate = matmul_rate(model, lambda layer, x: torch.nn.functional.linear(x, layer.weight))
    rate = max(torch_rate, matmul_rate(model, lambda layer, x: layer(x)))
    training = found["log-probs"] + found["backward"]
    flop = training_flop(model, load)
    found |= {
        "new_tokens_per_s": round(load.scored / found["sampling"], 1) if name != "steps" else None,
        "trained_tokens_per_s": round(load.slots / training, 1),
        "gflops": round(rate / 1e9, 1),
        "gflops_torch": round(torch_rate / 1e9, 1),
        "mfu_training": round(flop / rate / training, 3),
        "mfu_training_torch": round(flop / torch_rate / training, 3),
        "mfu_with_optimizer": round(flop / rate / (training + found["optimizer"]), 3),
        "load": round(os.getloadavg()[0], 1),
    }
    print(json.dumps(found))
    end_ranks()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="demo model, folder or hub id")
    parser.add_argument("--only", default="p48,p500,steps", help="workloads to run")
    parser.add_argument("--sides", default="", help="sides to run, by name (default: all)")
    parser.add_argument("--iterations", type=int, default=2, help="measured iterations per run")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    if args.child:
        child(args.model, args.only, args.sides, args.iterations)
        return
    trl = importlib.util.find_spec("trl") is not None
    about = {"model": args.model, "cpus": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads()}
    about |= {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}
    about["trl"] = importlib.metadata.version("trl") if trl else None
    print(about, flush=True)
    found: dict = {}
    for name in args.only.split(","):
        print(f"({name}) {WORKLOADS[name]}", flush=True)
        for side in sides(name):
            if args.sides and side not in args.sides.split(","):
                continue
            if side == "trl" and not trl:
                print("  trl is not installed, skipped; pip install 'trl==1.16.*' into a separate environment")
                continue
            command = [sys.executable, __file__, "--child", "--only", name, "--sides", side]
            command += ["--model", args.model, "--iterations", str(args.iterations)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[f"{name} {side}"] = run = json.loads(output.splitlines()[-1])
            print(f"  {side}: {run}", flush=True)
    for key, run in found.items():
        name, side = key.split(" ", 1)
        ours = found.get(f"{name} ours")
        if ours and side != "ours":
            time_, memory = run["iteration"] / ours["iteration"], ours["peak_mib"] / run["peak_mib"]
            print(f"({name}) ours is {time_:.2f}x as fast as {side}, with {memory:.2f} of its peak memory")
            found[key] |= {"ours_faster": round(time_, 2), "ours_memory": round(memory, 2)}
    print(json.dumps(about | found))


if __name__ == "__main__":
    main()
