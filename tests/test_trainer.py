"""What the trainer promises around its objective: guards, and a run that goes on where it was killed."""

import json
import os
import random
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from conftest import ScriptedEngine, byte_tokenizer, tiny_llama
from test_learning import BAD, GOOD, RIGHT, SETTINGS, WRONG, cold_start
from tqdm import tqdm

import run_rl
import run_sft
from run_rl import draw_problems, sample_trajectories, train
from thor.attention import use_layout_attention
from thor.engines import HFEngine
from thor.rollout import Sampling, solve
from thor.run_folder import Run
from thor.settings import UserError, parse_settings
from thor.training import trainer as trainer_module
from thor.training.model import load_model, save_model
from thor.training.trainer import Sample, Trainer
from thor.trajectory import ExecResult, Problem, Trajectory

ROOT = Path(__file__).parent.parent
PROBLEMS = [Problem(str(i), "q", "4") for i in range(8)]


def ledger(prompt: list[int], response: list[int]) -> Trajectory:
    trajectory = Trajectory(PROBLEMS[0], prompt)
    trajectory.append_sampled(response, [0.0] * len(response))
    return trajectory


def timeless(lines: list[dict]) -> list[dict]:
    return [{key: value for key, value in line.items() if not key.startswith("seconds")} for line in lines]


def read(folder: Path) -> list[dict]:
    return timeless([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()])


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """A model that writes right and wrong answers, and blocks that run and that fail."""
    folder = tmp_path_factory.mktemp("model")
    model, tokenizer, _ = cold_start([GOOD, BAD], [RIGHT, WRONG])
    save_model(model, tokenizer, folder)
    return folder


@pytest.fixture
def run(tmp_path) -> Run:
    run = Run(str(tmp_path / "run"), SETTINGS, resume=False)
    run.start()
    return run


def test_the_settings_of_the_papers_runs_parse():
    for name, tokens in (("paper-7b.yaml", 3200), ("paper-8b.yaml", 19200)):
        settings = parse_settings(run_rl.Settings, "", ["--config", str(ROOT / "docs" / name)])
        assert (settings.prompts, settings.group, settings.lr, settings.temperature) == (128, 16, 1e-6, 1.0)
        assert (settings.max_tokens, settings.max_rounds, settings.suffix_tokens) == (tokens, 5, 100)
        assert settings.gradient_checkpointing and settings.tree and settings.estimator == "grpo"
        longest = -(-(800 + tokens) // 64) * 64  # a slot of the engine's cache, with the prompt
        assert settings.kv_tokens - settings.kv_tokens // 4 >= settings.rows * longest  # as counted in the file


# ---- metrics --------------------------------------------------------------------------------------------------------


def documented(script: str) -> set[str]:
    """Names in the first column of the tables that docs/metrics.md has for a script; * stands for any end."""
    [section] = [part for part in (ROOT / "docs/metrics.md").read_text().split("\n## ") if part.startswith(script)]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`([a-z_*]+)`", cell)} | {"step"}


def assert_documented(written: set[str], names: set[str]) -> None:
    assert {name for name in written if not any(fnmatch(name, pattern) for pattern in names)} == set()
    assert {pattern for pattern in names if not any(fnmatch(name, pattern) for name in written)} == set()


def test_every_metric_of_rl_is_documented_and_every_documented_one_is_written(tmp_path, executor):
    names = documented("run_rl.py")
    assert {"step", "dropped_*", "groups_thin", "step_groups_*", "seconds_steps", "loss_value"} < names
    for estimator, missing in (("grpo", {"loss_value"}), ("ppo", set())):
        settings = replace(SETTINGS, iterations=1, estimator=estimator, kl_coef=0.1, entropy_coef=0.01)
        run = Run(str(tmp_path / estimator), settings, resume=False)
        run.start()
        model, tokenizer, engine = cold_start([GOOD, BAD], [RIGHT, WRONG])
        train(model, tokenizer, engine, executor, PROBLEMS, run, settings)
        [line] = run.read("metrics.jsonl")
        assert_documented(set(line), names - missing)


def test_every_metric_of_sft_is_documented_and_every_documented_one_is_written(tmp_path, tokenizer):
    run = Run(str(tmp_path / "sft"), run_sft.Settings(), resume=False)
    run.start()
    model = tiny_llama(tokenizer)
    use_layout_attention(model)
    run_sft.train(model, [ledger([1, 2], [3])], run, run_sft.Settings(epochs=1))
    [line] = run.read("metrics.jsonl")
    assert_documented(set(line), documented("run_sft.py"))


# ---- guards ---------------------------------------------------------------------------------------------------------


def poison(monkeypatch, steps: set[int]) -> None:
    """The loss of these optimizer steps is NaN."""
    step, taken = Trainer.step, [0]

    def poisoned(self, samples, loss):
        factor = float("nan") if taken[0] in steps else 1.0
        taken[0] += 1

        def poisoned_loss(batch, scores):
            value, info = loss(batch, scores)
            return factor * value, info

        return step(self, samples, poisoned_loss)

    monkeypatch.setattr(Trainer, "step", poisoned)


def test_a_skipped_step_is_counted_and_dumped(run, executor, monkeypatch):
    model, tokenizer, engine = cold_start([GOOD, BAD], [RIGHT, WRONG])
    poison(monkeypatch, {1, 2, 4})
    settings = replace(SETTINGS, iterations=3, updates=2)
    train(model, tokenizer, engine, executor, PROBLEMS, run, settings)
    assert [m["skipped"] for m in run.read("metrics.jsonl")] == [1, 1, 1]
    names = sorted(path.name for path in (run / "skipped").iterdir())
    assert names == ["000000-1-rank0.jsonl", "000001-0-rank0.jsonl", "000002-0-rank0.jsonl"]
    rows = [json.loads(line) for line in (run / "skipped" / names[0]).read_text().splitlines()]
    assert {row["level"] for row in rows} == {"trajectory", "step"}
    for row in rows:
        n = sum(row["action_mask"])
        assert [len(row[name]) for name in ("advantages", "logp_old", "logp", "logp_sampler")] == [n] * 4
        assert len(row["token_ids"]) == len(row["action_mask"]) and row["prompt_ids"]
        assert row["logp_old"] == pytest.approx(row["logp_sampler"], abs=1e-4)


def test_three_skipped_steps_in_a_row_stop_the_run_and_leave_a_good_checkpoint(run, executor, monkeypatch):
    model, tokenizer, engine = cold_start([GOOD, BAD], [RIGHT, WRONG])
    poison(monkeypatch, {1, 2, 3, 4})
    settings = replace(SETTINGS, updates=2, save_every=100)
    with pytest.raises(UserError, match=r"3 optimizer steps in a row .* not finite"):
        train(model, tokenizer, engine, executor, PROBLEMS, run, settings)
    assert [m["skipped"] for m in run.read("metrics.jsonl")] == [1, 2]
    other, _, _ = cold_start([GOOD, BAD], [RIGHT, WRONG])
    assert Trainer(other, run, settings).state["iteration"] == 2
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.isfinite(p).all() and torch.equal(p, q)


def test_sft_stops_too(tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()
    run = Run(str(tmp_path / "sft"), run_sft.Settings(), resume=False)
    run.start()
    poison(monkeypatch, {1, 3, 4, 5})
    rows = [ledger([1, 2], [3, 4 + i]) for i in range(8)]
    model = tiny_llama(tokenizer)
    HFEngine(model, tokenizer)
    with pytest.raises(UserError, match="not finite"):
        run_sft.train(model, rows, run, run_sft.Settings(batch=2))
    assert [m["skipped"] for m in run.read("metrics.jsonl")] == [0, 1, 0, 1, 1, 1]
    [*_, last] = sorted((run / "skipped").iterdir())
    rows = [json.loads(line) for line in last.read_text().splitlines()]
    assert len(rows) == 2 and all(len(row["logp"]) == 2 and row["scored"] == [2, 3] for row in rows)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_rank_without_samples_of_a_skipped_batch_writes_no_file(run, tokenizer):
    trainer = Trainer(tiny_llama(tokenizer), run, SETTINGS)
    trainer._dump([Sample(ledger([1], [2]))], {})
    assert not (run / "skipped").exists()


# ---- sampling -------------------------------------------------------------------------------------------------------


def test_a_second_draw_fills_up_the_groups_that_the_first_left(tokenizer, executor):
    """Of three problems all samples of two are right: two others are drawn for them."""
    settings = replace(SETTINGS, prompts=3, max_draws=4, min_tokens=1)
    order = [problem.id for problem in draw_problems(PROBLEMS, 0, 8, settings.seed)]
    easy = {order[0], order[2]}

    def reply(request, turn):
        name, sample = request.id.split("#")
        return RIGHT if name in easy or int(sample) % 2 else WRONG

    engine, bar = ScriptedEngine(tokenizer, reply), tqdm(disable=True)
    samples, everything, cursor, counts = sample_trajectories(engine, executor, PROBLEMS, 0, 0, settings, bar)
    assert counts["draws"] == 2 and counts["draws_capped"] == 0 and cursor == 5
    assert counts["groups_kept"] == settings.prompts and counts["groups_equal"] == 2 and counts["groups_thin"] == 0
    assert counts["sampled"] == len(everything) == counts["kept"] == 5 * settings.group
    learned = {sample.trajectory.problem.id for sample in samples}
    assert learned == {order[1], order[3], order[4]} and len(samples) == 3 * settings.group


@pytest.mark.parametrize(("updates", "extra"), [(1, 0), (2, 1)])
def test_logp_old_costs_no_pass_with_one_update_and_one_with_several(run, executor, monkeypatch, updates, extra):
    """One pass scores each action token once; the updates of an iteration together are one pass too."""
    model, tokenizer, engine = cold_start([GOOD, BAD], [RIGHT, WRONG])
    before, during = [], []  # scored tokens of each call
    score = trainer_module.score_tokens

    def counted(model, sequences, scored, *args, **kwargs):
        (during if torch.is_grad_enabled() else before).append(sum(map(len, scored)))
        return score(model, sequences, scored, *args, **kwargs)

    monkeypatch.setattr(trainer_module, "score_tokens", counted)
    settings = replace(SETTINGS, iterations=1, updates=updates, max_tokens_per_micro_batch=100_000)
    train(model, tokenizer, engine, executor, PROBLEMS, run, settings)
    assert len(during) == updates and len(before) == extra
    assert before == [sum(during)] * extra and sum(during) > 50


# ---- resume ---------------------------------------------------------------------------------------------------------


def test_checkpoints_rotate_past_one_left_by_a_killed_run(run):
    """It was written and not yet linked. It counts for none of those that are kept, and is gone with the next one."""
    model = torch.nn.Linear(2, 1)
    folder = run / "checkpoints"

    def save(number: int) -> list[str]:
        Trainer(model, run, SETTINGS).save({"iteration": number, "skipped_in_a_row": 0})
        assert Trainer(model, run, SETTINGS).state["iteration"] == number
        return sorted(path.stem for path in folder.glob("[0-9]*.pt"))

    assert save(1) == ["000001"]
    (folder / "000009.pt").write_bytes(b"of a killed run")
    assert save(2) == ["000001", "000002"]
    assert save(3) == ["000002", "000003"]


class SlowTools(ThreadPoolExecutor):
    """Code of the n-th call takes the n-th of these delays."""

    def __init__(self, delays: list[float]) -> None:
        super().__init__(len(delays))
        self.delays, self.running = delays, 0

    def submit(self, code):
        self.running += 1
        return super().submit(self.judge, self.delays.pop())

    def judge(self, delay: float) -> ExecResult:
        time.sleep(delay)
        self.running -= 1
        return ExecResult("ok", "4")


def order_of_requests(tokenizer, delays: list[float]) -> list[str]:
    def reply(request, turn):
        assert tools.running == 0
        return "x" if turn else GOOD

    engine = ScriptedEngine(tokenizer, reply)
    one = engine.step
    engine.step = lambda: [completion for _ in engine.queue[:] for completion in one()]  # all turns at once
    with SlowTools(delays) as tools:
        solve(engine, tools, PROBLEMS[:4], Sampling(max_tokens=2000), deterministic=True)
    return [request.id for request in engine.requests]


def test_a_deterministic_rollout_does_not_depend_on_how_fast_tools_are(tokenizer):
    order = order_of_requests(tokenizer, [0.0, 0.05, 0.1, 0.15])
    assert order == order_of_requests(tokenizer, [0.15, 0.1, 0.05, 0.0]) and len(order) == 8


def test_a_resumed_run_may_compute_in_another_way_but_not_learn_another_thing(run):
    ways = dict(device="cuda", rows=3, kv_tokens=999, tree=False, gradient_checkpointing=True, rank_timeout=9.0)
    ways |= dict(max_tokens_per_micro_batch=7, iterations=99, save_every=5, keep=1, evaluate=True, report_to="none")
    assert {*ways, "out"} == set(Run.MAY_CHANGE)
    Run(str(run.folder), replace(SETTINGS, **ways), resume=True)
    for change in ({"lr": 1.0}, {"updates": 2}, {"temperature": 0.7}, {"sampler": "vllm"}, {"seed": 1}, {"group": 4}):
        with pytest.raises(UserError, match=f"--resume: {next(iter(change))} was"):
            Run(str(run.folder), replace(SETTINGS, **change), resume=True)


# Runs a script's main in a fork, which kills itself at the n-th time that it comes to a chosen point. To fork saves the
# seconds of importing everything for each of the kills.
KILLER = r"""
import json, os, pathlib, signal, sys
import torch
torch.set_num_threads(1)
import run_rl, run_sft, thor.training.trainer, thor.run_folder
from thor.engines import HFEngine

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def arm(owner, name, nth, partly=None):
    whole, calls = getattr(owner, name), [0]
    def armed(*args, **kwargs):
        calls[0] += 1
        if calls[0] == nth:
            if partly:
                partly(*args, **kwargs)
            die()
        return whole(*args, **kwargs)
    setattr(owner, name, armed)

def half_a_file(state, path):
    pathlib.Path(path).write_bytes(b"PK half a checkpoint")

def half_a_line(run, name, record):
    with (run / name).open("a") as file:
        file.write(json.dumps(record)[:20])

POINTS = {
    "sampling": lambda n: arm(HFEngine, "step", n),
    "update": lambda n: arm(thor.training.trainer, "score_tokens", n),
    "checkpoint": lambda n: arm(torch, "save", n, half_a_file),
    "rename": lambda n: arm(os, "replace", n),
    "link": lambda n: arm(pathlib.Path, "symlink_to", n),
    "log": lambda n: arm(thor.run_folder.Run, "append", n, half_a_line),
}
main = {"rl": run_rl.main, "sft": run_sft.main}[sys.argv[1]]
for point, nth, flags in json.loads(sys.argv[2]):
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        if point:
            POINTS[point](nth)
        main(flags)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print("status", status, point, nth, flush=True)
"""


def killed_and_whole(tmp_path, script: str, flags: list[str], kills: list[tuple[str, int]]):
    """Metrics of a run killed at these points and resumed each time, and of one that nothing happened to."""
    cut, whole = str(tmp_path / "cut"), str(tmp_path / "whole")
    runs = [("", 0, [*flags, "--out", whole])]
    runs += [(point, nth, [*flags, "--out", cut, "--resume"]) for point, nth in [*kills, ("", 0)]]
    done = subprocess.run(
        [sys.executable, "-c", KILLER, script, json.dumps(runs)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    statuses = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("status")]
    assert statuses == [0, *[-9] * len(kills), 0], done.stdout + done.stderr[-2000:]
    return read(Path(cut)), read(Path(whole)), Path(cut)


def test_a_run_killed_ten_times_gives_the_same_metrics_bit_for_bit(tmp_path, model_folder):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"question": f"q{i}", "answer": "4"}) + "\n" for i in range(6)))
    flags = ["--data", str(data), "--model", str(model_folder), "--device", "cpu", "--evaluate", "False"]
    flags += ["--prompts", "3", "--group", "4", "--max_tokens", "150", "--max_rounds", "1", "--min_tokens", "2"]
    flags += ["--iterations", "16", "--updates", "2", "--save_every", "2", "--lr", "1e-3"]
    rng = random.Random(0)
    most = {"sampling": 20, "update": 6, "checkpoint": 1, "rename": 6, "link": 2, "log": 40}  # a few iterations
    kills = [(point, rng.randint(1, nth)) for point, nth in most.items()]
    kills += [(point, rng.randint(1, most[point])) for point in rng.choices(list(most), k=4)]
    rng.shuffle(kills)
    cut, whole, folder = killed_and_whole(tmp_path, "rl", flags, kills)
    assert cut == whole and len(whole) == 16
    assert any(m.get("tokens_step") for m in whole) and any(m.get("tokens_trajectory") for m in whole)
    assert sorted(p.name for p in (folder / "checkpoints").glob("*.pt")) == ["000014.pt", "000016.pt", "latest.pt"]
    load_model(str(folder / "final"), "cpu")


def test_a_killed_sft_gives_the_same_metrics_bit_for_bit(tmp_path, model_folder):
    data = tmp_path / "tir.jsonl"
    rows = [
        {"id": i, "question": "q" * i, "answer": "4", "segments": [{"text": f"{GOOD} {i} {RIGHT}", "sampled": True}]}
        for i in range(7)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--data", str(data), "--model", str(model_folder), "--device", "cpu", "--evaluate", "False"]
    flags += ["--batch", "2", "--save_every", "3", "--max_tokens_per_micro_batch", "60"]
    kills = [("update", 9), ("checkpoint", 1), ("log", 5), ("rename", 4), ("link", 2)]
    cut, whole, _ = killed_and_whole(tmp_path, "sft", flags, kills)
    assert cut == whole and len(whole) == 12
