"""torchrun with gloo on the CPU: more ranks change nothing but who computes what, and one that fails ends all."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_learning import BAD, GOOD, RIGHT, WRONG, cold_start
from test_trainer import read

from thor.training.model import save_model

ROOT = Path(__file__).parent.parent


def torchrun(ranks: int, *command: str, cwd: Path) -> subprocess.CompletedProcess:
    """`command` on so many ranks; on one as a plain process."""
    start = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"] if ranks > 1 else []
    return subprocess.run(
        [sys.executable, *start, *command],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def assert_same(ours: list[dict], theirs: list[dict], tolerance: float = 1e-5) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with a model whose input and output embeddings are tied, problems, and rows of run_tirgen.py."""
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


@pytest.fixture(scope="module")
def one_rank(work) -> list[dict]:
    done = torchrun(1, str(ROOT / "run_rl.py"), *RL, "--out", "rl1", cwd=work)
    assert done.returncode == 0, done.stderr[-3000:]
    return read(work / "rl1")


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

def note(name, trainer, batch, loss):
    metrics = trainer.step(batch, loss)
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
    settings = Settings(max_tokens_per_micro_batch={1: 1000, 2: 9, 3: 1000}[ranks])
    note(name, trainer(settings), batch, partial(hierarchical_loss, settings=settings))
for seed in range(8):  # random samples in random micro-batches: all ranks, and only they, must draw the same
    batch, budget = random_batch(random.Random(seed)), random.Random(f"{seed} on {ranks}").randint(1, 60)
    settings = Settings(max_tokens_per_micro_batch=budget, estimator=("grpo", "ppo")[seed % 2], step_coef=0.7)
    made = trainer(settings, value_head=seed % 2)
    add_old_scores(made, batch, settings)
    note(f"random {seed}", made, batch, partial(hierarchical_loss, settings=settings))
    batch = [Sample(s.trajectory) for s in batch]
    batch += [] if any(s.trajectory.num_sampled for s in batch) else [six[0]]  # else the mean is over no tokens
    note(f"sft {seed}", trainer(TrainSettings(max_tokens_per_micro_batch=budget)), batch, sft_loss)
for family in ("llama", "qwen2", "qwen3"):
    for observations in (True, False):
        for tree in (True, False):
            batch = samples()
            for t in (s.trajectory for s in batch if not observations):
                t.action_mask = [True] * len(t)
                t.logp_sampler = [-1.0] * len(t)
            settings = Settings(max_tokens_per_micro_batch=20, tree=tree)
            loss = partial(hierarchical_loss, settings=settings)
            note((family, observations, tree), trainer(settings, family), batch, loss)
if rank() == 0:
    torch.save(found, path)
end_ranks()
"""


@pytest.fixture(scope="module")
def gradients(work) -> dict[int, dict]:
    """Gradient and loss, in one vector, of many batches under their name; for each number of ranks."""
    (work / "gradients.py").write_text(GRADIENTS)
    for ranks in (1, 2, 3):
        done = torchrun(ranks, "gradients.py", str(ranks), f"{ranks}.pt", cwd=work)
        assert done.returncode == 0, done.stderr[-3000:]
    return {ranks: torch.load(work / f"{ranks}.pt") for ranks in (1, 2, 3)}


def assert_equal(one: torch.Tensor, other: torch.Tensor, name: object) -> None:
    """Of two vectors of a gradient and, last, the loss."""
    assert one.shape == other.shape and (one - other)[:-1].norm() <= 1e-5 * one[:-1].norm(), name
    assert one[-1].item() == pytest.approx(other[-1].item(), rel=1e-5, abs=1e-6), name


def test_gradient_does_not_depend_on_the_number_of_ranks(gradients):
    """Uneven numbers of tokens; ranks with samples of one level only, with none, and with masked ones; random ones."""
    one = gradients[1]
    assert len(one) == 4 + 8 + 8 + 12 and sum(bool(vector.any()) for vector in one.values()) > 25
    for ranks in (2, 3):
        assert gradients[ranks].keys() == one.keys()
        for name, vector in one.items():
            assert_equal(vector, gradients[ranks][name], (ranks, name))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_tree_equals_the_plain_way_when_sharded(gradients, ranks):
    for name, vector in gradients[ranks].items():
        if name[-1] is True:
            assert_equal(vector, gradients[ranks][(*name[:-1], False)], (ranks, name))
    assert sum(name[-1] is True for name in gradients[ranks]) == 6


@pytest.mark.parametrize("ranks", [2, 3])
def test_rl_on_many_ranks_gives_the_metrics_of_one(work, one_rank, ranks):
    done = torchrun(ranks, str(ROOT / "run_rl.py"), *RL, "--out", f"rl{ranks}", cwd=work)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(read(work / f"rl{ranks}"), one_rank)
    assert done.stdout.count("iteration 0: reward") == 1  # only rank 0 prints
    whole, one = (load_file(work / name / "final/model.safetensors") for name in (f"rl{ranks}", "rl1"))
    assert whole.keys() == one.keys()
    for name in one:
        torch.testing.assert_close(whole[name], one[name], rtol=1e-3, atol=1e-4)
    configs = [json.loads((work / name / "final/config.json").read_text()) for name in (f"rl{ranks}", "rl1")]
    assert configs[0] == configs[1]


def test_ppo_and_several_updates_on_two_ranks(work):
    flags = [*RL, "--estimator", "ppo", "--updates", "2", "--gradient_checkpointing", "True", "--kl_coef", "0.1"]
    for ranks in (1, 2):
        done = torchrun(ranks, str(ROOT / "run_rl.py"), *flags, "--out", f"ppo{ranks}", cwd=work)
        assert done.returncode == 0, done.stderr[-3000:]
    assert_same(read(work / "ppo2"), read(work / "ppo1"))
    checkpoint = torch.load(work / "ppo2/checkpoints/latest.pt")["model"]
    assert checkpoint["value_head.weight"].shape == (2, 32) and checkpoint["value_head.weight"].any()
    assert not any("value_head" in name for name in load_file(work / "ppo2/final/model.safetensors"))


def test_sft_on_two_ranks_gives_the_metrics_of_one(work):
    flags = ["--data", "tir.jsonl", "--model", "model", "--device", "cpu", "--evaluate", "False", "--batch", "2"]
    for ranks in (1, 2):
        done = torchrun(ranks, str(ROOT / "run_sft.py"), *flags, "--out", f"sft{ranks}", cwd=work)
        assert done.returncode == 0, done.stderr[-3000:]
    assert_same(read(work / "sft2"), read(work / "sft1"))
    assert len(read(work / "sft1")) == 9


@pytest.mark.parametrize(("ranks", "then"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(work, one_rank, ranks, then):
    """Killed on so many, resumed on others: the samples are seeded by problem and number, not by rank.

    Nor does it matter how many requests decode at once, and how the update is computed.
    """
    script = "import sys, run_rl\n"
    script += "import os, signal\n"
    script += "count = [0]\n"
    script += "def step(*args, whole=run_rl.Trainer.step):\n"
    script += "    count[0] += 1\n"
    script += "    if count[0] == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
    script += "    return whole(*args)\n"
    script += "run_rl.Trainer.step = step\n"
    script += "run_rl.run_main(run_rl.main, many_ranks=True)\n"
    (work / "killed.py").write_text(script)
    out = f"from {ranks} to {then}"
    done = torchrun(ranks, "killed.py", *RL, "--out", out, cwd=work)
    assert done.returncode != 0 and len(read(work / out)) == 2
    way = ["--rows", "5", "--tree", "False", "--gradient_checkpointing", "True"] if then == 2 else []
    done = torchrun(then, str(ROOT / "run_rl.py"), *RL, *way, "--out", out, "--resume", cwd=work)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(read(work / out), one_rank)


POISONED = """
import run_rl
from thor.distributed import rank

taken = -1
FAULTS = {1: "loss", 3: "gradient", 5: "loss", 6: "gradient", 7: "loss"}  # of these optimizer steps

def poisoned(trainer, samples, loss, whole=run_rl.Trainer.step):
    global taken
    taken += 1

    def loss_of_rank(batch, scores):
        value, info = loss(batch, scores)
        if rank() != 1 or taken not in FAULTS:
            return value, info
        if FAULTS[taken] == "loss":
            return value * float("nan"), info
        zero = value - value.detach()  # its square root has an infinite slope
        return value + zero.sqrt(), info

    return whole(trainer, samples, loss_of_rank)

run_rl.Trainer.step = poisoned
run_rl.run_main(run_rl.main, many_ranks=True)
"""


def test_what_is_not_finite_on_one_rank_is_skipped_by_all_and_stops_all(work):
    """NaN losses, and infinite gradients of finite losses, on rank 1 alone; the last three in a row."""
    (work / "poisoned.py").write_text(POISONED)
    flags = [*RL, "--updates", "2", "--iterations", "5", "--out", "poisoned"]
    done = torchrun(2, "poisoned.py", *flags, cwd=work)
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert done.returncode != 0 and len(errors) == 1 and "3 optimizer steps in a row" in errors[0], done.stderr[-3000:]
    lines = read(work / "poisoned")
    assert [line["skipped"] for line in lines] == [1, 1, 1, 2]
    # logged is an iteration's last step: 1, 3, 5 and 7
    assert [line["loss"] is None for line in lines] == [True, False, True, True]
    assert [line["grad_norm"] for line in lines] == [None] * 4
    dumps = [path.name for path in (work / "poisoned/skipped").iterdir()]
    assert {name[:8] for name in dumps} == {"000000-1", "000001-1", "000002-1", "000003-0", "000003-1"}
    checkpoint = torch.load(work / "poisoned/checkpoints/latest.pt")
    assert checkpoint["state"]["iteration"] == 4
    assert all(torch.isfinite(p).all() for p in checkpoint["model"].values())
    done = torchrun(1, str(ROOT / "run_rl.py"), *flags, "--resume", cwd=work)
    assert done.returncode == 0 and read(work / "poisoned")[4]["skipped"] == 0, done.stderr[-3000:]


def test_a_failing_rank_ends_all_with_its_message(work):
    script = "import run_rl\nfrom thor.distributed import rank\n"
    script += "def step(*args, whole=run_rl.Trainer.step):\n"
    script += "    if rank() == 1: raise RuntimeError('the disk of rank one is full')\n"
    script += "    return whole(*args)\n"
    script += "run_rl.Trainer.step = step\n"
    script += "run_rl.run_main(run_rl.main, many_ranks=True)\n"
    (work / "fails.py").write_text(script)
    done = torchrun(2, "fails.py", *RL, "--out", "fails", cwd=work)
    assert done.returncode != 0 and "rank 1: RuntimeError: the disk of rank one is full" in done.stderr
    assert "rank 0: " not in done.stderr and not (work / "fails/final").exists()


def test_a_rank_that_hangs_is_given_up(work):
    script = "import time, run_rl\nfrom thor.distributed import rank\n"
    script += "def step(*args, whole=run_rl.Trainer.step):\n"
    script += "    if rank() == 1: time.sleep(1000)\n"
    script += "    return whole(*args)\n"
    script += "run_rl.Trainer.step = step\n"
    script += "run_rl.run_main(run_rl.main, many_ranks=True)\n"
    (work / "hangs.py").write_text(script)
    done = torchrun(2, "hangs.py", *RL, "--out", "hangs", "--rank_timeout", "15", cwd=work)
    assert done.returncode != 0 and "rank 0: RuntimeError" in done.stderr, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("script", "lacking", "line"),
    [
        ("rl", [0, 1], "error: --data missing.jsonl"),
        ("rl", [0], "error: --data missing.jsonl"),
        ("sft", [1], "error: rank 1: --data missing.jsonl"),
    ],
)
def test_bad_input_of_any_rank_is_one_line_for_all(work, script, lacking, line):
    """A node may lack what others have. No rank is aborted (-6): each ends by itself, or torchrun ends it (-15)."""
    start = f"import sys, run_{script}\nfrom thor.distributed import rank\n"
    start += f"if rank() in {lacking}: sys.argv[sys.argv.index('--data') + 1] = 'missing.jsonl'\n"
    start += f"run_{script}.run_main(run_{script}.main, many_ranks=True)\n"
    (work / "lacks.py").write_text(start)
    flags = ["--data", "data.jsonl" if script == "rl" else "tir.jsonl", "--model", "model", "--device", "cpu"]
    done = torchrun(2, "lacks.py", *flags, "--out", "bad", cwd=work)
    errors = [text for text in done.stderr.splitlines() if "error:" in text]
    assert done.returncode != 0 and len(errors) == 1 and line in errors[0], done.stderr[-3000:]
    codes = set(re.findall(r"exitcode +: (-?\d+)", done.stderr))
    assert "2" in codes and codes <= {"2", "-15"}, done.stderr[-3000:]
    assert not (work / "bad").exists()


def test_other_scripts_refuse_many_ranks(work):
    done = torchrun(2, str(ROOT / "run_infer.py"), "question?", "--model", "model", cwd=work)
    assert done.returncode != 0 and "started as 2 processes, but supports one only" in done.stderr
