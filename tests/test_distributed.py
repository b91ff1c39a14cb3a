"""Tests of several ranks (gloo on the CPU): results equal those of one process, and a failing rank ends all ranks."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_learning import BAD, GOOD, RIGHT, WRONG, cold_start
from test_trainer import read_log, read_metrics

from thor.training.model import save_model

ROOT = Path(__file__).parent.parent


RUN_RL, RUN_SFT, RUN_TIRGEN = (str(ROOT / f"run_{name}.py") for name in ("rl", "sft", "tirgen"))


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
            "PYTHONFAULTHANDLER": "1",  # a rank that crashes says where
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )


def torchrun(ranks: int, *command: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run `command` on this number of ranks. A single rank is an ordinary process without a launcher."""
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"] if ranks > 1 else []
    return python(*launcher, *command, cwd=cwd)


def accelerate_launch(ranks: int, *command: str, cwd: Path) -> subprocess.CompletedProcess:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = ["--multi_gpu", "--num_processes", str(ranks), "--num_machines", "1", "--mixed_precision", "no"]
    flags += ["--dynamo_backend", "no", "--main_process_port", str(port)]
    return python("-m", "accelerate.commands.launch", *flags, *command, cwd=cwd)


def assert_same_metrics(actual: list[dict], expected: list[dict], tolerance: float = 1e-5) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert a.keys() == b.keys()
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with problems, rows of run_tirgen.py, and a model with tied input and output embeddings."""
    folder = tmp_path_factory.mktemp("work")
    model, tokenizer, _ = cold_start([GOOD, BAD], [RIGHT, WRONG], tie_word_embeddings=True)
    save_model(model, tokenizer, folder / "model")
    problems = [json.dumps({"question": "q", "answer": "4"}) for _ in range(7)]
    (folder / "data.jsonl").write_text("\n".join(problems) + "\n")
    rows = [
        {"id": i, "question": "q" * i, "answer": "4", "segments": [{"text": f"{GOOD} {i} {RIGHT}", "sampled": True}]}
        for i in range(5)
    ]
    (folder / "tir.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


RL = ["--data", "data.jsonl", "--model", "model", "--device", "cpu", "--evaluate", "False", "--prompts", "3"]
RL += ["--group", "4", "--max_tokens", "150", "--max_rounds", "1", "--min_tokens", "2", "--iterations", "3"]
RL += ["--lr", "1e-3", "--max_tokens_per_micro_batch", "60", "--save_every", "1"]
VALIDATE = ["--evaluate", "True", "--eval_data", "data.jsonl", "--eval_samples", "2", "--eval_every", "2"]
VALIDATE += ["--max_tokens", "150"]


def assert_same_validations(work: Path, one: str, other: str, steps: list[int]) -> None:
    """Also that each of the 7 problems has two rewards, and that not all are equal."""
    expected = read_log(work / one / "validation.jsonl")
    assert read_log(work / other / "validation.jsonl") == expected
    assert [record["step"] for record in expected] == steps
    rewards = [rewards for record in expected for rewards in record["rewards"]]
    assert [len(pair) for pair in rewards] == [2] * 7 * len(steps) and {r for pair in rewards for r in pair} == {0, 1}


@pytest.fixture(scope="module")
def one_rank(work) -> list[dict]:
    """Metrics of an RL run in a single process. Validation does not change them."""
    done = torchrun(1, RUN_RL, *RL, *VALIDATE, "--out", "rl1", cwd=work)
    assert done.returncode == 0, done.stderr[-3000:]
    return read_metrics(work / "rl1")


GRADIENTS = """
import random, sys, torch
from dataclasses import replace
from functools import partial
from conftest import byte_tokenizer, tiny_model
from run_rl import Settings, add_old_scores, hierarchical_loss
from run_sft import sft_loss
from test_objective import PROBLEM, samples, trainer_of
from thor.distributed import end_ranks, rank, start_ranks
from thor.training.model import add_value_head
from thor.training.trainer import Sample, TrainSettings
from thor.trajectory import Trajectory

class Gradient(torch.optim.SGD):
    def step(self):
        parts = [p.grad for p in self.param_groups[0]["params"]]
        self.vector = torch.cat([(g.full_tensor() if hasattr(g, "full_tensor") else g).ravel() for g in parts])

def trainer(settings, family="llama", value_head=False):
    model = tiny_model(family, byte_tokenizer())
    if value_head:
        add_value_head(model)
        torch.nn.init.normal_(model.value_head.weight, generator=torch.Generator().manual_seed(0))
    made = trainer_of(model, settings)
    made.optimizer = Gradient(model.parameters(), lr=0.0)
    return made

def record(name, trainer, batch, loss):
    metrics = trainer.step(batch, loss)
    assert metrics["skipped"] == 0
    found[name] = torch.cat([trainer.optimizer.vector, torch.tensor([metrics["loss"]])])

def random_batch(rng):
    ids, batch = lambda: rng.choices([1, 2, 3], k=rng.randint(1, 12)), []
    for _ in range(rng.randint(1, 8)):
        t = Trajectory(PROBLEM, ids(), finish="stop", reward=float(rng.random() < 0.5))
        for turn in range(rng.randint(0, 3)):
            tokens = ids()
            t.append_observation(tokens) if turn == 1 else t.append_sampled(tokens, [-5.5] * len(tokens))
        batch.append(Sample(t, rng.choice([-1.5, 0.5, 2.0]), rng.choice(["trajectory", "step"])))
    return batch

ranks, path = int(sys.argv[1]), sys.argv[2]
start_ranks("cpu", 60.0)
found = {}
six = samples()
for name, batch in {"both": six, "trajectories": six[:3], "one step": six[3:4], "all masked": six[5:]}.items():
    level = "sequence" if name == "one step" else "token"  # then other ranks have no sample
    settings = Settings(max_tokens_per_micro_batch={1: 1000, 2: 9, 3: 1000}[ranks], is_level=level)
    record(name, trainer(settings), batch, partial(hierarchical_loss, settings=settings))
for seed in range(8):  # random samples, and a random budget that depends on the number of ranks
    batch, budget = random_batch(random.Random(seed)), random.Random(f"{seed} on {ranks}").randint(1, 60)
    settings = Settings(max_tokens_per_micro_batch=budget, estimator=("grpo", "ppo")[seed % 2], step_coef=0.7)
    made = trainer(settings, value_head=seed % 2)
    add_old_scores(made, batch, settings)
    record(f"random {seed}", made, batch, partial(hierarchical_loss, settings=settings))
    batch = [Sample(s.trajectory) for s in batch]
    record(f"sft {seed}", trainer(TrainSettings(max_tokens_per_micro_batch=budget)), batch, sft_loss)
for family in ("llama", "qwen2", "qwen3"):
    for observations in (True, False):
        for tree in (True, False):
            batch = samples()
            for t in (s.trajectory for s in batch if not observations):
                t.action_mask = [True] * len(t)
                t.logp_sampler = [-1.0] * len(t)
            settings = Settings(max_tokens_per_micro_batch=20, tree=tree)
            loss = partial(hierarchical_loss, settings=settings)
            record((family, observations, tree), trainer(settings, family), batch, loss)
if rank() == 0:
    torch.save(found, path)
end_ranks()
"""


@pytest.fixture(scope="module")
def gradients(work) -> dict[int, dict]:
    """For each number of ranks: name of a batch -> vector of its gradient and, last, its loss."""
    (work / "gradients.py").write_text(GRADIENTS)
    for ranks in (1, 2, 3):
        done = torchrun(ranks, "gradients.py", str(ranks), f"{ranks}.pt", cwd=work)
        assert done.returncode == 0, done.stderr
    return {ranks: torch.load(work / f"{ranks}.pt") for ranks in (1, 2, 3)}


def assert_equal(one: torch.Tensor, other: torch.Tensor, name: object) -> None:
    """Compare two vectors of a gradient and, last, the loss."""
    assert one.shape == other.shape and (one - other)[:-1].norm() <= 1e-5 * one[:-1].norm(), name
    assert one[-1].item() == pytest.approx(other[-1].item(), rel=1e-5, abs=1e-6), name


def test_gradient_does_not_depend_on_the_number_of_ranks(gradients):
    """Also with uneven numbers of tokens, one level only, fewer samples than ranks, or no action tokens."""
    one = gradients[1]
    assert len(one) == 4 + 8 + 8 + 12 and sum(bool(vector.any()) for vector in one.values()) > 25
    for ranks in (2, 3):
        assert gradients[ranks].keys() == one.keys()
        for name, vector in one.items():
            assert_equal(vector, gradients[ranks][name], (ranks, name))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_gradients_with_and_without_tree_are_equal_when_sharded(gradients, ranks):
    for name, vector in gradients[ranks].items():
        if name[-1] is True:
            assert_equal(vector, gradients[ranks][(*name[:-1], False)], (ranks, name))
    assert sum(name[-1] is True for name in gradients[ranks]) == 6


RESHARD = """
import torch
from conftest import byte_tokenizer, tiny_llama
from run_rl import Settings
from test_objective import samples
from thor.distributed import end_ranks, rank, start_ranks
from thor.run_folder import Run
from thor.training.model import prepare, reference_copy
from thor.training.trainer import Trainer
from torch.distributed.tensor import DTensor

start_ranks("cpu", 60.0)
model, settings = tiny_llama(byte_tokenizer()), Settings(report_to="none")
prepare(model)
trainer = Trainer(model, Run("never written", settings, resume=True), settings, reference=reference_copy(model))
policy = trainer.score(samples())
for scored in (trainer.reference, trainer.model):
    found = trainer.score(samples(), scored)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(found, policy, strict=True))
    assert all(isinstance(p, DTensor) for p in scored.parameters())
print(f"rank {rank()} is done")
end_ranks()
"""


def test_scoring_leaves_no_parameter_gathered(work):
    """Neither of the policy nor of the reference, whose log-probs are equal at first."""
    (work / "reshard.py").write_text(RESHARD)
    done = torchrun(2, "reshard.py", cwd=work)
    assert done.returncode == 0 and "rank 0 is done" in done.stdout, done.stderr[-3000:]


@pytest.mark.parametrize("ranks", [2, 3])
def test_rl_on_several_ranks_gives_the_metrics_of_one_process(work, one_rank, ranks):
    done = torchrun(ranks, RUN_RL, *RL, *VALIDATE, "--out", f"rl{ranks}", cwd=work)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_metrics(read_metrics(work / f"rl{ranks}"), one_rank)
    assert_same_validations(work, "rl1", f"rl{ranks}", [0, 2, 3])
    # only rank 0 prints
    assert done.stdout.count("iteration 0: reward") == done.stdout.count("last model:") == 1
    many, one = (load_file(work / name / "final/model.safetensors") for name in (f"rl{ranks}", "rl1"))
    assert many.keys() == one.keys()
    for name in one:
        torch.testing.assert_close(many[name], one[name], rtol=1e-3, atol=1e-4)
    configs = [json.loads((work / name / "final/config.json").read_text()) for name in (f"rl{ranks}", "rl1")]
    assert configs[0] == configs[1]


def test_a_problem_drawn_twice_gets_other_samples_on_many_ranks_too(work):
    """One rank numbers all samples of a problem. On two, their seeds would be equal, and so would the samples."""
    for ranks in (1, 2):
        flags = ["--limit", "1", "--iterations", "2", "--out", f"twice{ranks}"]  # 3 prompts an iteration
        done = torchrun(ranks, RUN_RL, *RL, *flags, cwd=work)
        assert done.returncode == 0, done.stderr[-3000:]
    assert_same_metrics(read_metrics(work / "twice2"), read_metrics(work / "twice1"))


def test_accelerate_launch_gives_the_metrics_of_one_process(work, one_rank):
    done = accelerate_launch(2, RUN_RL, *RL, "--out", "accelerate", cwd=work)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_metrics(read_metrics(work / "accelerate"), one_rank)
    assert done.stdout.count("iteration 0: reward") == 1  # two ranks, of which only rank 0 prints


def test_ppo_with_several_updates_on_two_ranks_gives_the_metrics_of_one_process(work):
    flags = [*RL, "--estimator", "ppo", "--updates", "2", "--gradient_checkpointing", "True", "--kl_coef", "0.1"]
    for ranks in (1, 2):
        done = torchrun(ranks, RUN_RL, *flags, "--out", f"ppo{ranks}", cwd=work)
        assert done.returncode == 0, done.stderr[-3000:]
    assert_same_metrics(read_metrics(work / "ppo2"), read_metrics(work / "ppo1"))
    checkpoint = torch.load(work / "ppo2/checkpoints/latest.pt")["model"]
    assert checkpoint["value_head.weight"].shape == (2, 32) and checkpoint["value_head.weight"].any()
    assert not any("value_head" in name for name in load_file(work / "ppo2/final/model.safetensors"))


def test_sft_on_two_ranks_gives_the_metrics_of_one_process(work):
    flags = ["--data", "tir.jsonl", "--model", "model", "--device", "cpu", *VALIDATE, "--batch", "2"]
    flags += ["--eval_every", "0", "--max_rounds", "1"]
    for ranks in (1, 2):
        done = torchrun(ranks, RUN_SFT, *flags, "--out", f"sft{ranks}", cwd=work)
        assert done.returncode == 0, done.stderr[-3000:]
    assert_same_metrics(read_metrics(work / "sft2"), read_metrics(work / "sft1"))
    assert_same_validations(work, "sft1", "sft2", [0, 9])
    assert len(read_metrics(work / "sft1")) == 9


@pytest.mark.parametrize(("ranks", "ranks_after"), [(2, 1), (1, 2)])
def test_resume_on_another_number_of_ranks(work, one_rank, ranks, ranks_after):
    """Samples are seeded by problem and sample number, not by rank.

    The resumed run may also change how many requests decode at once, and how the update is computed.
    """
    script = "import sys, run_rl\n"
    script += "import os, signal\n"
    script += "count = [0]\n"
    script += "def step(*args, original=run_rl.Trainer.step):\n"
    script += "    count[0] += 1\n"
    script += "    if count[0] == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
    script += "    return original(*args)\n"
    script += "run_rl.Trainer.step = step\n"
    script += "run_rl.run_main(run_rl.main, many_ranks=True)\n"
    (work / "killed.py").write_text(script)
    out = f"from {ranks} to {ranks_after}"
    done = torchrun(ranks, "killed.py", *RL, "--out", out, cwd=work)
    assert done.returncode != 0 and len(read_metrics(work / out)) == 2
    other = ["--rows", "5", "--tree", "False", "--gradient_checkpointing", "True"] if ranks_after == 2 else []
    done = torchrun(ranks_after, RUN_RL, *RL, *other, "--out", out, "--resume", cwd=work)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_metrics(read_metrics(work / out), one_rank)


FAULTY = """
import run_rl
from thor.distributed import rank

count = -1
FAULTS = {1: "loss", 3: "gradient", 5: "loss", 6: "gradient", 7: "loss"}  # by number of the optimizer step

def step_with_fault(trainer, samples, loss, original=run_rl.Trainer.step):
    global count
    count += 1

    def loss_with_fault(batch, scores):
        value, info = loss(batch, scores)
        if rank() != 1 or count not in FAULTS:
            return value, info
        if FAULTS[count] == "loss":
            return value * float("nan"), info
        zero = value - value.detach()  # the gradient of its square root is infinite
        return value + zero.sqrt(), info

    return original(trainer, samples, loss_with_fault)

run_rl.Trainer.step = step_with_fault
run_rl.run_main(run_rl.main, many_ranks=True)
"""


def test_non_finite_step_of_one_rank_is_skipped_by_all_ranks(work):
    """Rank 1 has NaN losses, and infinite gradients of finite losses. The last three in a row stop the run."""
    (work / "faulty.py").write_text(FAULTY)
    flags = [*RL, "--updates", "2", "--iterations", "5", "--out", "faulty"]
    done = torchrun(2, "faulty.py", *flags, cwd=work)
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert done.returncode != 0 and len(errors) == 1 and "3 optimizer steps in a row" in errors[0], done.stderr[-3000:]
    lines = read_metrics(work / "faulty")
    assert [line["skipped"] for line in lines] == [1, 1, 1, 2]
    # an iteration logs its last step: 1, 3, 5 and 7
    assert [line["loss"] is None for line in lines] == [True, False, True, True]
    assert [line["grad_norm"] for line in lines] == [None] * 4
    dumps = [path.name for path in (work / "faulty/skipped").iterdir()]
    assert {name[:8] for name in dumps} == {"000000-1", "000001-1", "000002-1", "000003-0", "000003-1"}
    checkpoint = torch.load(work / "faulty/checkpoints/latest.pt")
    assert checkpoint["state"]["iteration"] == 4
    assert all(torch.isfinite(p).all() for p in checkpoint["model"].values())
    done = torchrun(1, RUN_RL, *flags, "--resume", cwd=work)
    assert done.returncode == 0 and read_metrics(work / "faulty")[4]["skipped"] == 0, done.stderr[-3000:]


def test_failing_rank_ends_all_ranks_with_its_traceback(work):
    script = "import run_rl\nfrom thor.distributed import rank\n"
    script += "def step(*args, original=run_rl.Trainer.step):\n"
    script += "    if rank() == 1: raise RuntimeError('the disk of rank one is full')\n"
    script += "    return original(*args)\n"
    script += "run_rl.Trainer.step = step\n"
    script += "run_rl.run_main(run_rl.main, many_ranks=True)\n"
    (work / "fails.py").write_text(script)
    done = torchrun(2, "fails.py", *RL, "--out", "fails", cwd=work)
    assert done.returncode != 0 and "rank 1: RuntimeError: the disk of rank one is full" in done.stderr
    assert "rank 0: " not in done.stderr and not (work / "fails/final").exists()


def test_hanging_rank_ends_the_run_after_the_timeout(work):
    script = "import time, run_rl\nfrom thor.distributed import rank\n"
    script += "def step(*args, original=run_rl.Trainer.step):\n"
    script += "    if rank() == 1: time.sleep(1000)\n"
    script += "    return original(*args)\n"
    script += "run_rl.Trainer.step = step\n"
    script += "run_rl.run_main(run_rl.main, many_ranks=True)\n"
    (work / "hangs.py").write_text(script)
    done = torchrun(2, "hangs.py", *RL, "--out", "hangs", "--rank_timeout", "15", cwd=work)
    assert done.returncode != 0 and "rank 0: RuntimeError" in done.stderr, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("script", "faulty_ranks", "line"),
    [
        ("rl", [0, 1], "error: --data missing.jsonl"),
        ("rl", [0], "error: --data missing.jsonl"),
        ("sft", [1], "error: rank 1: --data missing.jsonl"),
    ],
)
def test_bad_input_of_any_rank_is_a_one_line_error(work, script, faulty_ranks, line):
    """A file may be missing on one node only. No rank aborts (-6): each exits, or torchrun terminates it (-15)."""
    code = f"import sys, run_{script}\nfrom thor.distributed import rank\n"
    code += f"if rank() in {faulty_ranks}: sys.argv[sys.argv.index('--data') + 1] = 'missing.jsonl'\n"
    code += f"run_{script}.run_main(run_{script}.main, many_ranks=True)\n"
    (work / "missing.py").write_text(code)
    flags = ["--data", "data.jsonl" if script == "rl" else "tir.jsonl", "--model", "model", "--device", "cpu"]
    done = torchrun(2, "missing.py", *flags, "--out", "bad", cwd=work)
    errors = [text for text in done.stderr.splitlines() if "error:" in text]
    assert done.returncode != 0 and len(errors) == 1 and line in errors[0], done.stderr[-3000:]
    codes = set(re.findall(r"exitcode +: (-?\d+)", done.stderr))
    assert "2" in codes and codes <= {"2", "-15"}, done.stderr[-3000:]
    assert not (work / "bad").exists()


def test_tirgen_rejects_several_ranks(work):
    done = torchrun(2, RUN_TIRGEN, "--actor", "model", cwd=work)
    assert done.returncode != 0 and "started as 2 processes, but supports one only" in done.stderr
