"""torchrun with gloo on the CPU: more ranks change nothing but who computes what, and one that fails ends all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_learning import BAD, GOOD, RIGHT, WRONG, cold_start
from test_trainer import read

from thor.policy import save_policy

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
    save_policy(model, tokenizer, folder / "model")
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
import sys, torch
from conftest import byte_tokenizer, tiny_llama
from run_rl import Settings, update
from test_objective import examples
from thor.attention import use_layout_attention
from thor.policy import shard
from thor.ranks import end_ranks, rank, start_ranks

class Gradient(torch.optim.SGD):
    def step(self):
        parts = [p.grad for p in self.param_groups[0]["params"]]
        self.vector = torch.cat([(g.full_tensor() if hasattr(g, "full_tensor") else g).ravel() for g in parts])

start_ranks("cpu", 60.0)
found = {}
six = examples()
for name, batch in {"both": six, "trajectories": six[:3], "one step": six[3:4], "all masked": six[5:]}.items():
    model = tiny_llama(byte_tokenizer())
    use_layout_attention(model)
    shard(model)
    optimizer = Gradient(model.parameters(), lr=0.0)
    update(model, optimizer, batch, Settings(clip=1e9, max_tokens_per_micro_batch=int(sys.argv[2])))
    found[name] = optimizer.vector
if rank() == 0:
    torch.save(found, sys.argv[1])
end_ranks()
"""


def test_gradient_does_not_depend_on_the_number_of_ranks(work):
    """Uneven numbers of tokens; ranks with samples of one level only, with none, and with masked ones."""
    (work / "gradients.py").write_text(GRADIENTS)
    for ranks, budget in ((1, 1000), (2, 9), (3, 1000)):
        done = torchrun(ranks, "gradients.py", f"{ranks}.pt", str(budget), cwd=work)
        assert done.returncode == 0, done.stderr[-3000:]
    one, *others = (torch.load(work / f"{ranks}.pt") for ranks in (1, 2, 3))
    for other in others:
        for name, vector in one.items():
            assert (vector - other[name]).norm() <= 1e-5 * vector.norm(), name


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


def test_a_run_goes_on_with_another_number_of_ranks(work, one_rank):
    """Killed on two ranks, resumed on one: the samples are seeded by problem and number, not by rank."""
    script = "import sys, run_rl, thor.policy\n"
    script += "import os, signal\n"
    script += "count = [0]\n"
    script += "def update(*args, whole=run_rl.update):\n"
    script += "    count[0] += 1\n"
    script += "    if count[0] == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
    script += "    return whole(*args)\n"
    script += "run_rl.update = update\n"
    script += "run_rl.run_main(run_rl.main, many_ranks=True)\n"
    (work / "killed.py").write_text(script)
    done = torchrun(2, "killed.py", *RL, "--out", "other", cwd=work)
    assert done.returncode != 0 and len(read(work / "other")) == 2
    done = torchrun(1, str(ROOT / "run_rl.py"), *RL, "--out", "other", "--resume", cwd=work)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(read(work / "other"), one_rank)


def test_a_failing_rank_ends_all_with_its_message(work):
    script = "import run_rl\nfrom thor.ranks import rank\n"
    script += "def update(*args, whole=run_rl.update):\n"
    script += "    if rank() == 1: raise RuntimeError('the disk of rank one is full')\n"
    script += "    return whole(*args)\n"
    script += "run_rl.update = update\n"
    script += "run_rl.run_main(run_rl.main, many_ranks=True)\n"
    (work / "fails.py").write_text(script)
    done = torchrun(2, "fails.py", *RL, "--out", "fails", cwd=work)
    assert done.returncode != 0 and "rank 1: RuntimeError: the disk of rank one is full" in done.stderr
    assert "rank 0: " not in done.stderr and not (work / "fails/final").exists()


def test_a_rank_that_hangs_is_given_up(work):
    script = "import time, run_rl\nfrom thor.ranks import rank\n"
    script += "def update(*args, whole=run_rl.update):\n"
    script += "    if rank() == 1: time.sleep(1000)\n"
    script += "    return whole(*args)\n"
    script += "run_rl.update = update\n"
    script += "run_rl.run_main(run_rl.main, many_ranks=True)\n"
    (work / "hangs.py").write_text(script)
    done = torchrun(2, "hangs.py", *RL, "--out", "hangs", "--rank_timeout", "15", cwd=work)
    assert done.returncode != 0 and "rank 0: RuntimeError" in done.stderr, done.stderr[-3000:]


def test_bad_input_is_one_line_for_all_ranks(work):
    done = torchrun(2, str(ROOT / "run_rl.py"), "--data", "missing.jsonl", "--out", "bad", cwd=work)
    errors = [line for line in done.stderr.splitlines() if "run_rl.py: error:" in line]
    assert done.returncode != 0 and len(errors) == 1 and "missing.jsonl" in errors[0], done.stderr[-3000:]
    assert not (work / "bad").exists()


def test_other_scripts_refuse_many_ranks(work):
    done = torchrun(2, str(ROOT / "run_infer.py"), "question?", "--model", "model", cwd=work)
    assert done.returncode != 0 and "started as 2 processes, one is supported" in done.stderr
