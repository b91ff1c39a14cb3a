"""Tests of training runs: documented metrics, guards against non-finite steps, sampling, checkpoints and resuming."""

import json
import math
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ScriptedEngine, ScriptedExecutor, byte_tokenizer, full_disk, tiny_llama
from test_learning import BAD, GOOD, RIGHT, SETTINGS, WRONG, cold_start
from tqdm import tqdm

import run_rl
import run_sft
from run_rl import hierarchical_loss, rollout_metrics, sample_steps, sample_trajectories, train
from thor.attention import use_layout_attention
from thor.engines import HFEngine
from thor.prompts import PROMPTS, Prompt
from thor.rollout import Sampling, solve
from thor.run_folder import LOGS, Run
from thor.settings import UserError, parse_settings
from thor.training import trainer as trainer_module
from thor.training import validation as validation_module
from thor.training.model import add_value_head, load_model, save_model
from thor.training.problems import ProblemQueue, pass_rates
from thor.training.trainer import Counts, Sample, Trainer, lr_factor
from thor.training.validation import Validation, load_validation
from thor.trajectory import ExecResult, Problem, Step, Trajectory

ROOT = Path(__file__).parent.parent
PROBLEMS = [Problem(str(i), "q", "4") for i in range(8)]


def ledger(prompt: list[int], response: list[int]) -> Trajectory:
    trajectory = Trajectory(PROBLEMS[0], prompt)
    trajectory.append_sampled(response, [0.0] * len(response))
    return trajectory


def without_seconds(value):
    """JSON data without the durations in it, which differ from run to run."""
    if isinstance(value, dict):
        return {key: without_seconds(x) for key, x in value.items() if not key.startswith("seconds")}
    return [without_seconds(x) for x in value] if isinstance(value, list) else value


def read_log(path: Path) -> list[dict]:
    """The records of a log, without durations. Each line is complete."""
    return [without_seconds(json.loads(line)) for line in path.read_text().split("\n")[:-1]]


def read_metrics(folder: Path) -> list[dict]:
    return read_log(folder / "metrics.jsonl")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """A saved model that writes right and wrong answers, and blocks that pass and that fail."""
    folder = tmp_path_factory.mktemp("model")
    model, tokenizer, _ = cold_start([GOOD, BAD], [RIGHT, WRONG])
    save_model(model, tokenizer, folder)
    return folder


@pytest.fixture
def run(tmp_path) -> Run:
    run = Run(str(tmp_path / "run"), SETTINGS, resume=False)
    run.start()
    return run


def test_configs_of_the_paper_have_its_settings():
    for name, tokens in (("qwen2.5-7b.yaml", 3200), ("qwen3-8b.yaml", 19200)):
        settings = parse_settings(run_rl.Settings, "", ["--config", str(ROOT / "docs/configs" / f"rl-{name}")])
        assert (settings.prompts, settings.group, settings.lr, settings.temperature) == (128, 16, 1e-6, 1.0)
        assert (settings.max_tokens, settings.max_rounds, settings.suffix_tokens) == (tokens, 5, 100)
        assert settings.gradient_checkpointing and settings.tree and settings.estimator == "grpo"
        assert (settings.improper, settings.failed_code, settings.step_problems) == ("drop", "drop", "all")
        assert settings.pass_rate_range == "0,1" and settings.step_mean == "joint"
        assert settings.kl_coef == settings.entropy_coef == 0 and settings.nll_coef == 0.01
        longest = -(-(800 + tokens) // 64) * 64  # tokens of a cache row, prompt included
        assert settings.kv_tokens - settings.kv_tokens // 4 >= settings.rows * longest  # see the comment in the file
        sft = parse_settings(run_sft.Settings, "", ["--config", str(ROOT / "docs/configs" / f"sft-{name}")])
        assert (sft.lr, sft.batch, sft.epochs, sft.warmup, sft.max_length) == (2e-6, 128, 3, 0.05, 20000)
        assert (sft.max_tokens, sft.lr_schedule) == (tokens, "constant")


# ---- metrics --------------------------------------------------------------------------------------------------------


def documented(script: str) -> set[str]:
    """Metrics that docs/metrics.md lists for a script, in the first columns of its tables; * matches any ending."""
    [section] = [part for part in (ROOT / "docs/metrics.md").read_text().split("\n## ") if part.startswith(script)]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`([a-z_*]+)`", cell)} | {"step"}


def assert_documented(written: set[str], names: set[str]) -> None:
    """Assert that all written metrics are documented, and that all documented ones are written."""
    assert {name for name in written if not any(fnmatch(name, pattern) for pattern in names)} == set()
    assert {pattern for pattern in names if not any(fnmatch(name, pattern) for name in written)} == set()


def test_metrics_of_rl_are_documented_and_documented_ones_are_written(tmp_path, executor):
    names = documented("run_rl.py")
    assert {"step", "rejected_*", "groups_thin", "step_groups_*", "seconds_steps", "loss_value"} < names
    for estimator, missing in (("grpo", {"loss_value"}), ("ppo", set())):
        settings = replace(SETTINGS, iterations=1, estimator=estimator, kl_coef=0.1, entropy_coef=0.01)
        settings = replace(settings, log_trajectories=5)
        run = Run(str(tmp_path / estimator), settings, resume=False)
        run.start()
        model, tokenizer, engine = cold_start([GOOD, BAD], [RIGHT, WRONG])
        train(model, tokenizer, engine, executor, PROBLEMS, run, settings)
        [line] = run.read("metrics.jsonl")
        assert_documented(set(line), names - missing)
        assert len(run.read("trajectories.jsonl")) == 5


def test_metrics_of_sft_are_documented_and_documented_ones_are_written(tmp_path, tokenizer):
    run = Run(str(tmp_path / "sft"), run_sft.Settings(), resume=False)
    run.start()
    model = tiny_llama(tokenizer)
    use_layout_attention(model)
    run_sft.train(model, [ledger([1, 2], [3])], run, run_sft.Settings(epochs=1))
    [line] = run.read("metrics.jsonl")
    assert_documented(set(line), documented("run_sft.py"))


# ---- guards ---------------------------------------------------------------------------------------------------------


def make_losses_nan(monkeypatch, steps: set[int]) -> None:
    """Replace the loss of these optimizer steps, counted over the whole run, by NaN."""
    step, count = Trainer.step, [0]

    def step_with_fault(self, samples, loss):
        factor = float("nan") if count[0] in steps else 1.0
        count[0] += 1

        def loss_with_fault(batch, scores):
            value, info = loss(batch, scores)
            return factor * value, info

        return step(self, samples, loss_with_fault)

    monkeypatch.setattr(Trainer, "step", step_with_fault)


def test_skipped_steps_are_counted_and_dumped(run, executor, monkeypatch):
    model, tokenizer, engine = cold_start([GOOD, BAD], [RIGHT, WRONG])
    make_losses_nan(monkeypatch, {1, 2, 4})
    settings = replace(SETTINGS, iterations=3, updates=2)
    train(model, tokenizer, engine, executor, PROBLEMS, run, settings)
    assert [m["skipped"] for m in run.read("metrics.jsonl")] == [1, 1, 1]
    names = sorted(path.name for path in (run / "skipped").iterdir())
    assert names == ["000000-1-rank0.jsonl", "000001-0-rank0.jsonl", "000002-0-rank0.jsonl"]
    rows = [json.loads(line) for line in (run / "skipped" / names[0]).read_text().splitlines()]
    assert {row["level"] for row in rows} == {"trajectory", "step"}
    for row in rows:
        trajectory = Trajectory.from_dict(row)
        assert [len(row[name]) for name in ("advantages", "logp_old", "logp")] == [trajectory.num_sampled] * 3
        assert len(row["token_ids"]) == len(trajectory.action_mask) and row["prompt_ids"]
        assert row["logp_old"] == pytest.approx(trajectory.action_logps, abs=1e-4)


def test_three_skipped_steps_in_a_row_stop_rl_with_a_good_checkpoint(run, executor, monkeypatch):
    model, tokenizer, engine = cold_start([GOOD, BAD], [RIGHT, WRONG])
    other, _, _ = cold_start([GOOD, BAD], [RIGHT, WRONG])
    make_losses_nan(monkeypatch, {1, 2, 3, 4})
    settings = replace(SETTINGS, updates=2, save_every=100)
    with pytest.raises(UserError, match=r"3 optimizer steps in a row .* not finite"):
        train(model, tokenizer, engine, executor, PROBLEMS, run, settings)
    assert [m["skipped"] for m in run.read("metrics.jsonl")] == [1, 2]
    resumed = Trainer(other, run, settings).state
    assert resumed["iteration"] == 2 and resumed["skipped_in_a_row"] == 0  # it may skip as many again
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.isfinite(p).all() and torch.equal(p, q)


def test_three_skipped_steps_in_a_row_stop_sft(tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()
    run = Run(str(tmp_path / "sft"), run_sft.Settings(), resume=False)
    run.start()
    make_losses_nan(monkeypatch, {1, 3, 4, 5})
    rows = [ledger([1, 2], [3, 4 + i]) for i in range(8)]
    model = tiny_llama(tokenizer)
    HFEngine(model, tokenizer)
    with pytest.raises(UserError, match="not finite"):
        run_sft.train(model, rows, run, run_sft.Settings(batch=2))
    assert [m["skipped"] for m in run.read("metrics.jsonl")] == [0, 1, 0, 1, 1, 1]
    [*_, last] = sorted((run / "skipped").iterdir())
    rows = [json.loads(line) for line in last.read_text().splitlines()]
    assert len(rows) == 2 and all(len(row["logp"]) == 2 for row in rows)
    assert all(Trajectory.from_dict(row).action_positions == [2, 3] for row in rows)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize(
    "fault",
    [lambda value: value + float("inf"), lambda value: (value - value.detach()).sqrt()],
    ids=["loss", "gradient"],
)
def test_step_is_skipped_if_only_its_loss_or_only_its_gradient_is_not_finite(run, tokenizer, fault):
    model = tiny_llama(tokenizer)
    trainer = Trainer(model, run, SETTINGS)
    before = [p.detach().clone() for p in model.parameters()]
    metrics = trainer.step([Sample(ledger([1], [2]))], lambda batch, scores: (fault(-scores.logp.sum()), {}))
    assert math.isfinite(metrics["loss"]) != math.isfinite(metrics["grad_norm"])
    assert metrics["skipped"] == 1 and trainer.state["skipped_in_a_row"] == 1
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert len(list((run / "skipped").iterdir())) == 1


def test_rank_without_samples_of_a_skipped_batch_dumps_no_file(run, tokenizer):
    trainer = Trainer(tiny_llama(tokenizer), run, SETTINGS)
    trainer._dump([Sample(ledger([1], [2]))], {})
    assert not (run / "skipped").exists()


# ---- settings of the trainer ----------------------------------------------------------------------------------------


def sft_step(trainer: Trainer) -> None:
    """A step on four samples of four tokens that share the first."""
    rows = [ledger([1], [10 + i, 20, 30]) for i in range(4)]
    trainer.step([Sample(row) for row in rows], run_sft.sft_loss)


@pytest.mark.parametrize("tree", [True, False])
def test_micro_batches_have_the_size_and_layout_of_the_settings(run, tokenizer, monkeypatch, tree):
    score, calls = trainer_module.score_tokens, []

    def recorded(model, sequences, *args, tree):
        calls.append((len(sequences), tree))
        return score(model, sequences, *args, tree=tree)

    monkeypatch.setattr(trainer_module, "score_tokens", recorded)
    sft_step(Trainer(tiny_llama(tokenizer), run, replace(SETTINGS, max_tokens_per_micro_batch=8, tree=tree)))
    assert calls == [(2, tree)] * 2


def test_denominators_of_a_batch_by_hand():
    """Tokens with advantage 0 are not positive, and observation tokens count nowhere."""
    with_observation = ledger([1], [2, 3])
    with_observation.append_observation([4, 5, 6])
    samples = [
        Sample(with_observation, 1.0),
        Sample(ledger([1], [2]), 0.0),
        Sample(ledger([1], [2, 3, 4]), torch.tensor([0.5, 0.0, -1.0])),
        Sample(ledger([1], [2, 3, 4, 5]), -1.0, "step"),
        Sample(ledger([1], [2, 3, 4, 5, 6]), 2.0, "step"),
    ]
    assert Counts.of(samples) == Counts(trajectory=6, step=9, positive=2 + 1 + 5)


@pytest.mark.parametrize(("checkpointing", "calls"), [(False, 1), (True, 2)])
def test_gradient_checkpointing_runs_each_layer_twice(run, tokenizer, checkpointing, calls):
    model, found = tiny_llama(tokenizer), []
    trainer = Trainer(model, run, replace(SETTINGS, gradient_checkpointing=checkpointing))
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: found.append(1))
    sft_step(trainer)
    assert len(found) == calls


def test_score_uses_the_policy_or_the_model_that_it_is_given(run, tokenizer):
    model, reference = tiny_llama(tokenizer), tiny_llama(tokenizer, seed=1)
    trainer, sample = Trainer(model, run, SETTINGS, reference=reference), Sample(ledger([1], [10, 20]))
    [(policy, _)], [(other, _)] = trainer.score([sample]), trainer.score([sample], trainer.reference)
    [(expected, _)] = Trainer(reference, run, SETTINGS).score([sample])
    assert torch.equal(other, expected) and not torch.allclose(policy, other)


def test_trackers_of_a_resumed_run_start_at_its_iteration(run, monkeypatch):
    started = []
    monkeypatch.setattr(Run, "start_trackers", lambda self, step: started.append(step))
    model = torch.nn.Linear(2, 1)
    list(Trainer(model, run, SETTINGS).iterations(3, "test", "iteration"))
    Trainer(model, run, SETTINGS)
    assert started == [0, 3]


# ---- validation -----------------------------------------------------------------------------------------------------


def test_validation_keeps_the_curve_and_the_best_model(run, executor):
    """The scripted model answers 1, 3, 0 and then 2 of 4 problems right: the best is the second."""
    right = {"0": 1, "1": 3, "2": 0, "3": 2}
    tokenizer = byte_tokenizer((RIGHT, WRONG))
    model, problems = tiny_llama(tokenizer), [Problem(str(i), "q", "4") for i in range(4)]
    pushed = []

    def reply(request, turn):
        return RIGHT if int(request.id.split("#")[0]) < right[str(len(pushed) - 1)] else WRONG

    engine = ScriptedEngine(tokenizer, reply)
    engine.update_weights = lambda parameters: pushed.append([name for name, _ in parameters])
    settings = replace(SETTINGS, eval_every=1)
    sources = {"a": problems, "b": problems[:1]}
    validate = Validation(run, settings, sources, engine, executor, Sampling(max_tokens=20), Prompt())
    trainer = Trainer(model, run, settings, validate=validate)
    for step in trainer.iterations(3, "test", "iteration"):
        assert (run / "best").exists() == (step > 0)  # never the initial model
        run.log(step, {})
        with torch.no_grad():
            next(model.parameters()).fill_(step)
    records = run.read("validation.jsonl")
    assert [(r["step"], r["data"]) for r in records] == [(step, name) for step in range(4) for name in "ab"]
    assert [r["accuracy"][0] for r in records] == [0.25, 1.0, 0.75, 1.0, 0.0, 0.0, 0.5, 1.0]
    assert records[2]["rewards"] == [[1.0], [1.0], [1.0], [0.0]]
    assert trainer.state["best"] == [0.875, 1]
    best = load_model(str(run / "best"), "cpu")[0]
    assert next(best.parameters()).unique().tolist() == [0.0]  # after the first of three iterations
    report = validate.report()
    # a: 1 right before, 2 after, of the same 4 problems
    assert f"best model: {run / 'best'}" in report and "a, step 0" in report and "change +25.0% [" in report


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"problems": PROBLEMS[:2]},
        {"problems": [replace(PROBLEMS[0], answer="6")]},
        {"seed": 1},
        {"eval_samples": 2},
        {"eval_temperature": 0.9},
        {"max_tokens": 21},
        {"prompt": Prompt(system="s")},
        {"engine": "another"},
        {"memory_mb": 99},
        {"scores": None},
    ],
    ids=lambda changed: next(iter(changed), "the same"),
)
def test_scores_that_were_saved_with_a_model_stand_for_the_validation_before_training(tmp_path, executor, changed):
    tokenizer, model = byte_tokenizer((RIGHT, WRONG)), tmp_path / "final"
    model.mkdir()

    def validation(out, reply, problems=PROBLEMS[:1], prompt=None, max_tokens=20, engine="", memory_mb=0, **fields):
        settings = replace(SETTINGS, model=str(model), **fields)
        run = Run(str(tmp_path / out), settings, resume=False)
        run.start()
        kind = type(engine, (ScriptedEngine,), {}) if engine else ScriptedEngine
        scripted = kind(tokenizer, lambda request, turn: reply)
        tools = ScriptedExecutor(None)
        tools.timeout, tools.memory_mb = 5.0, memory_mb
        sampling = Sampling(max_tokens=max_tokens)
        return Validation(run, settings, {"a": problems}, scripted, tools, sampling, prompt or Prompt())

    before = validation("sft", RIGHT)
    before(tiny_llama(tokenizer), 7, {})
    before.save_scores(model)
    if "scores" in changed:
        (model / "validation.json").unlink()
    after = validation("rl", WRONG, **{name: value for name, value in changed.items() if name != "scores"})
    state = {}
    after(tiny_llama(tokenizer), 0, state)
    assert bool(after.engine.requests) == bool(changed) and state["best"] == [float(not changed), 0]
    after(tiny_llama(tokenizer), 1, state)
    assert after.engine.requests  # later validations are measured
    first, last = after.run.read("validation.jsonl")
    assert first["step"] == 0 and last["step"] == 1 and last["accuracy"][0] == 0.0
    assert {**first, "step": 7} == before.run.read("validation.jsonl")[0] or changed


def test_validation_uses_the_limits_of_the_run_and_equal_seeds_each_time(run, executor):
    tokenizer = byte_tokenizer((RIGHT, WRONG, GOOD))
    engine = ScriptedEngine(tokenizer, lambda request, turn: GOOD if turn < 2 else RIGHT)
    settings, sampling = replace(SETTINGS, eval_samples=3, eval_temperature=0.7), Sampling(max_tokens=99, max_rounds=1)
    validate = Validation(run, settings, {"a": PROBLEMS[:2]}, engine, executor, sampling, PROMPTS["tool-base"])
    prompt, seeds, tracked = PROMPTS["tool-base"].render(tokenizer, "q"), [], []
    run.track = lambda step, metrics: tracked.append((step, metrics["validation/a/accuracy"]))
    for step in (0, 3):
        engine.requests.clear()
        engine.turns.clear()
        validate(tiny_llama(tokenizer), step, {})
        first = [request for request in engine.requests if request.max_tokens == 99]
        assert sorted(request.id for request in first) == [f"{p}#{i}" for p in (0, 1) for i in range(3)]
        assert {request.temperature for request in engine.requests} == {0.7}
        assert all(request.token_ids[: len(prompt)] == prompt for request in engine.requests)
        assert {len([r for r in engine.requests if r.id == request.id]) for request in first} == {3}  # one more round
        seeds.append({(request.id, request.max_tokens): request.seed for request in engine.requests})
    assert seeds[0] == seeds[1] and len(set(seeds[0].values())) == 18
    assert tracked == [(0, 1.0), (2, 1.0)]  # a run that is resumed after three iterations hides step 3 of a tracker
    assert [[len(rewards) for rewards in r["rewards"]] for r in run.read("validation.jsonl")] == [[3, 3]] * 2


def test_report_needs_two_validations_and_rank_0(run, executor, monkeypatch):
    """A run that began with --evaluate False is validated once, and other nodes may not see the run folder."""
    settings, last = replace(SETTINGS, eval_every=2), f"last model: {run / 'final'}"
    validate = Validation(run, settings, {"a": PROBLEMS}, None, executor, Sampling(), Prompt())
    assert validate.report() == last
    run.append("validation.jsonl", {"step": 4, "data": "a", "rewards": []})
    assert validate.report() == f"{last}\nbest model: the initial one"
    monkeypatch.setattr(validation_module, "rank", lambda: 1)
    assert validate.report() == ""


def test_validation_sources_are_loaded_and_default_to_those_of_the_demo(tmp_path):
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps({"question": f"q{i}", "answer": "1"}) + "\n" for i in range(3)))
    settings = replace(SETTINGS, evaluate=True, eval_limit=2)
    assert [len(problems) for problems in load_validation(settings, demo=True).values()] == [2]
    assert load_validation(settings, demo=False) == {} == load_validation(replace(settings, evaluate=False), demo=True)
    named = load_validation(replace(settings, eval_data=f"{path}, synthetic"), demo=False)
    assert list(named) == [str(path), "synthetic"] and {len(problems) for problems in named.values()} == {2}
    comma = path.rename(tmp_path / "a,b.jsonl")
    assert list(load_validation(replace(settings, eval_data=str(comma)), demo=False)) == [str(comma)]


# ---- learning rate --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0.0, [1, 1, 1, 1]),
        ("constant", 0.5, [1 / 2, 1, 1, 1]),
        ("constant", 1.0, [1 / 4, 2 / 4, 3 / 4, 1]),
        ("linear", 0.0, [1, 3 / 4, 2 / 4, 1 / 4]),
        ("linear", 0.5, [1 / 2, 1, 2 / 3, 1 / 3]),
        ("cosine", 0.0, [1, (1 + 0.5**0.5) / 2, 1 / 2, (1 - 0.5**0.5) / 2]),
        ("cosine", 0.5, [1 / 2, 1, 3 / 4, 1 / 4]),
    ],
)
def test_learning_rate_schedules_by_hand(schedule, warmup, expected):
    assert [lr_factor(step, 4, schedule, warmup) for step in range(4)] == pytest.approx(expected)


def test_schedule_scales_each_parameter_group_from_its_peak(run, tokenizer):
    model = tiny_llama(tokenizer)
    add_value_head(model)
    settings = replace(SETTINGS, lr=0.1, lr_schedule="linear", weight_decay=0.5, beta1=0.8, beta2=0.9)
    trainer = Trainer(model, run, settings, value_lr=1.0)
    groups, rates = trainer.optimizer.param_groups, []
    for _ in trainer.iterations(2, "test", "iteration"):
        rates.append([group["lr"] for group in groups])
    assert rates == [[0.1, 1.0], [0.05, 0.5]]
    assert all(group["betas"] == (0.8, 0.9) and group["weight_decay"] == 0.5 for group in groups)


def test_gradient_is_clipped_to_a_norm(tokenizer):
    def update(clip: float) -> tuple[float, float]:
        """The gradient norm that is reported, and that of a step of plain gradient descent."""
        quiet = replace(SETTINGS, clip=clip, report_to="none")
        model = tiny_llama(tokenizer)
        trainer = Trainer(model, Run("never written", quiet, resume=True), quiet)
        trainer.optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        before = [p.detach().clone() for p in model.parameters()]
        loss = partial(hierarchical_loss, settings=SETTINGS)
        metrics = trainer.step([Sample(ledger([1], [5, 6, 7]))], loss)
        assert metrics["lr"] == 1.0
        moved = [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]
        return metrics["grad_norm"], torch.nn.utils.get_total_norm(moved).item()

    norm, moved = update(1e9)
    assert norm > 0 and moved == pytest.approx(norm, rel=1e-4)
    assert update(norm / 2) == (pytest.approx(norm), pytest.approx(norm / 2, rel=1e-4))


def test_gradient_norms_of_the_levels_are_those_of_each_level_alone(tokenizer):
    def norms(levels: list[str]) -> dict[str, float]:
        samples = {"trajectory": Sample(ledger([1], [5, 6, 7]), 1.0), "step": Sample(ledger([1, 5], [8]), -2.0, "step")}
        quiet = replace(SETTINGS, report_to="none")
        trainer = Trainer(tiny_llama(tokenizer), Run("never written", quiet, resume=True), quiet)
        metrics = trainer.step([samples[level] for level in levels], partial(hierarchical_loss, settings=SETTINGS))
        return {name: value for name, value in metrics.items() if name.startswith("grad_norm")}

    alone = {level: norms([level]) for level in ("trajectory", "step")}
    both = norms(["step", "trajectory"])
    for level, one in alone.items():
        assert one == {"grad_norm": pytest.approx(one[f"grad_norm_{level}"]), f"grad_norm_{level}": one["grad_norm"]}
        assert both[f"grad_norm_{level}"] == pytest.approx(one["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("level", ["trajectory", "step"])
def test_gradient_of_a_parameter_that_only_one_level_uses(tokenizer, level):
    """Like an expert that no token of the other level chose. Here it is the value head."""

    def loss(batch, scores):
        used = batch.is_step.any() == (level == "step")
        return -scores.logp.sum() + (scores.value.sum() if used else 0), {}

    def update(levels: list[str]) -> torch.Tensor:
        quiet = replace(SETTINGS, clip=1e9, report_to="none")
        model = tiny_llama(tokenizer)
        add_value_head(model)
        trainer = Trainer(model, Run("never written", quiet, resume=True), quiet, value_lr=1.0)
        trainer.optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        trainer.step([Sample(ledger([1], [5, 6, 7]), level=level) for level in levels], loss)
        return model.value_head.weight.detach()

    both = update(["trajectory", "step"])
    assert both.any() and torch.allclose(both, update([level]))


# ---- problems -------------------------------------------------------------------------------------------------------


def ids_of(problems: list[Problem]) -> list[str]:
    return [problem.id for problem in problems]


def test_each_epoch_draws_each_problem_once_and_resumes_anywhere():
    problems = [Problem(str(i), "") for i in range(5)]
    queue = ProblemQueue(problems, seed=1)
    drawn = ids_of(queue.draw(3)) + ids_of(queue.draw(9))
    assert sorted(drawn[:5]) == sorted(drawn[5:10]) == list("01234") and drawn[:5] != drawn[5:10]
    resumed = ProblemQueue(problems, seed=1)
    resumed.state = {"cursor": 3, "pass_rates": {}}
    assert ids_of(resumed.draw(9)) == drawn[3:]


def test_problems_outside_the_pass_rate_range_are_drawn_in_some_epochs():
    problems = [Problem(str(i), "") for i in range(40)]
    queue = ProblemQueue(problems, 0, 0.1, 0.9)
    assert sorted(ids_of(queue.draw(40))) == sorted(ids_of(problems))  # nothing is known yet
    for i, problem in enumerate(problems):
        queue.record(problem, [[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], []][i % 4])
    drawn = Counter(int(problem.id) % 4 for problem in queue.draw(300))
    # a quarter of the problems with rates 1 and 0, all of those with rate 1/2 and without one: 10 + 20 of 40 per epoch
    epochs = queue.state["cursor"] / 40 - 1
    assert drawn[1] == pytest.approx(10 * epochs, abs=10) and drawn[3] == pytest.approx(10 * epochs, abs=10)
    assert 0.15 < (drawn[0] + drawn[2]) / (20 * epochs) < 0.35
    known = [replace(problem, pass_rate=1.0) for problem in problems]  # rates that the rows of a file have
    assert ProblemQueue(known, 0, 0.1, 0.9).draw(9) and ProblemQueue(known[:1], 0, 0.1, 0.9).draw(2) == known[:1] * 2


@pytest.mark.parametrize("text", ["", "0.5", "0.9,0.1", "-1,1", "0,2", "a,b", "0,1,1"])
def test_invalid_pass_rate_range_is_an_error(text):
    assert pass_rates("0.1,0.9") == (0.1, 0.9)
    with pytest.raises(UserError, match="--pass_rate_range"):
        pass_rates(text)


# ---- sampling -------------------------------------------------------------------------------------------------------


def test_second_draw_replaces_groups_without_a_signal(tokenizer, executor):
    """All samples of two of three problems are right, so two other problems are drawn."""
    settings = replace(SETTINGS, prompts=3, max_draws=4, min_tokens=1)
    order = [problem.id for problem in ProblemQueue(PROBLEMS, settings.seed).draw(8)]
    easy = {order[0], order[2]}

    def reply(request, turn):
        name, sample = request.id.split("#")
        return RIGHT if name in easy or int(sample) % 2 else WRONG

    engine, bar = ScriptedEngine(tokenizer, reply), tqdm(disable=True)
    queue = ProblemQueue(PROBLEMS, settings.seed)
    samples, everything, counts = sample_trajectories(engine, executor, queue, 0, settings, bar, PROMPTS["tool"])
    assert counts["draws"] == 2 and counts["draws_capped"] == 0 and queue.state["cursor"] == 5
    expected = {name: 1.0 if name in easy else 0.5 for name in order[:5]}
    assert queue.state["pass_rates"] == expected and counts["groups"] == 5
    assert counts["groups_kept"] == settings.prompts and counts["groups_equal"] == 2 and counts["groups_thin"] == 0
    assert counts["sampled"] == len(everything) == counts["kept"] == 5 * settings.group
    learned = {sample.trajectory.problem.id for sample in samples}
    assert learned == {order[1], order[3], order[4]} and len(samples) == 3 * settings.group


def sample_once(tokenizer, settings, reply, executor, iterations=(0,)):
    """Sample trajectories of one problem. Returns (counts, trajectories, requests, queue) of all iterations."""
    engine, queue, everything, counts = ScriptedEngine(tokenizer, reply), ProblemQueue(PROBLEMS[:1], 0), [], Counter()
    for iteration in iterations:
        engine.turns.clear()
        bar = tqdm(disable=True)
        _, new, new_counts = sample_trajectories(
            engine, executor, queue, iteration, settings, bar, PROMPTS["tool-base"]
        )
        everything += new
        counts.update(new_counts)
    return counts, everything, engine.requests, queue


def test_each_draw_of_each_iteration_has_its_own_seeds_and_the_limits_of_the_settings(tokenizer, executor):
    settings = replace(SETTINGS, prompts=1, group=3, max_draws=2, max_tokens=77, temperature=0.7)
    counts, _, requests, _ = sample_once(tokenizer, settings, lambda request, turn: RIGHT, executor, (0, 1))
    assert counts["draws"] == 4 and counts["groups_equal"] == 4 and counts["draws_capped"] == 2
    assert len({request.seed for request in requests}) == len(requests) == 12
    assert {(request.max_tokens, request.temperature) for request in requests} == {(77, 0.7)}
    prompt = PROMPTS["tool-base"].render(tokenizer, "q")
    assert all(request.token_ids == prompt for request in requests)


def test_sampling_ends_at_a_failed_block_or_without_rounds_if_the_settings_say_so(tokenizer):
    def reply(request, turn):
        return BAD if turn == 0 else RIGHT

    failing = ScriptedExecutor(lambda code: ExecResult("error", error="E"))
    settings = replace(SETTINGS, prompts=1, group=2, max_draws=1, max_tokens=2000, min_tokens=1)
    _, trajectories, _, _ = sample_once(tokenizer, settings, reply, failing)
    assert [(t.finish, len(t.results), t.reward) for t in trajectories] == [("stop", 1, 1.0)] * 2
    counts, trajectories, _, _ = sample_once(tokenizer, replace(settings, failed_code="drop"), reply, failing)
    assert {t.finish for t in trajectories} == {"failed_code"} and counts["rejected_failed_code"] == 2
    _, trajectories, _, _ = sample_once(tokenizer, replace(settings, max_rounds=0), reply, failing)
    assert [(t.finish, len(t.results)) for t in trajectories] == [("stop", 0)] * 2


def test_trajectories_lost_to_the_executor_do_not_count_as_wrong(tokenizer):
    broken = ScriptedExecutor(lambda code: ExecResult("infra"))
    settings = replace(SETTINGS, prompts=1, group=2, max_draws=1, max_tokens=2000, min_tokens=1)
    counts, trajectories, _, queue = sample_once(
        tokenizer, settings, lambda request, turn: BAD if request.id.endswith("#0") and turn == 0 else RIGHT, broken
    )
    assert sorted(t.finish for t in trajectories) == ["infra", "stop"] and counts["rejected_infra"] == 1
    assert queue.state["pass_rates"] == {"0": 1.0}
    counts, _, _, queue = sample_once(tokenizer, settings, lambda request, turn: BAD, broken)
    assert queue.state["pass_rates"] == {} and counts["groups"] == counts["groups_thin"] == 1


def scripted_step_level(tokenizer, settings, iteration: int = 0):
    """Sample the step level of three problems; each has two trajectories with two failed steps.

    Problem 0 has a right answer. Returns (samples, counts, engine).
    """
    sampling, trajectories = Sampling(max_tokens=2000), []
    for i in range(3):
        replies = ["bad\n```python\nx\n```", "bad\n```python\nx\n```", RIGHT if i == 0 else WRONG]
        engine = ScriptedEngine(tokenizer, lambda request, turn, replies=replies: replies[turn])
        failing = ScriptedExecutor(lambda code: ExecResult("error", error="E"))
        problem = Problem(str(i), "q", "4")
        trajectories += solve(engine, failing, [problem] * 2, sampling, deterministic=True)
    settings = replace(settings, max_tokens=2000)
    engine = ScriptedEngine(tokenizer, lambda request, turn: "ok\n```python\nx\n```")
    rng = random.Random(0)
    tools = ScriptedExecutor(lambda code: rng.choice([ExecResult("ok", "1"), ExecResult("error", error="E")]))
    return *sample_steps(engine, tools, trajectories, iteration, settings), engine


def test_step_level_regenerates_at_most_p_failed_steps_g_times(tokenizer):
    settings = replace(SETTINGS, prompts=5, group=6, step_problems="all")
    samples, counts, engine = scripted_step_level(tokenizer, settings)
    assert counts["step_prompts"] == 5 and len(engine.requests) == 5 * 6 and counts["step_samples"] == 5 * 6
    assert len({tuple(request.token_ids) for request in engine.requests}) <= 5
    assert len({request.seed for request in engine.requests}) == 5 * 6
    assert len(samples) == 6 * counts["step_groups_kept"] and {sample.level for sample in samples} == {"step"}
    assert 0 < counts["step_passed"] < counts["step_samples"]
    one = replace(settings, prompts=1)  # a random one of the failed steps, another in each iteration
    assert len({tuple(scripted_step_level(tokenizer, one, i)[2].requests[0].token_ids) for i in range(8)}) > 1
    _, _, later = scripted_step_level(tokenizer, settings, iteration=1)
    assert {r.seed for r in later.requests}.isdisjoint(r.seed for r in engine.requests)


def test_step_level_uses_only_problems_with_a_right_answer_unless_told_otherwise(tokenizer):
    _, counts, _ = scripted_step_level(tokenizer, replace(SETTINGS, prompts=99))
    assert counts["step_prompts"] == 4  # of problem 0: two trajectories with two failed steps
    _, counts, _ = scripted_step_level(tokenizer, replace(SETTINGS, prompts=99, step_problems="all"))
    assert counts["step_prompts"] == 12


def test_step_level_uses_the_temperature_and_suffix_of_the_settings_and_drops_samples_without_a_block(tokenizer):
    problem, thought = Problem("0", "q", "4"), "a long thought"
    replies = [f"{thought}\n```python\nx\n```", RIGHT]
    failing = ScriptedExecutor(lambda code: ExecResult("error", error="E"))
    engine = ScriptedEngine(tokenizer, lambda request, turn: replies[turn])
    trajectories = solve(engine, failing, [problem], Sampling(max_tokens=2000), deterministic=True)
    for suffix_tokens, kept in ((3, "a long thoug"), (100, "")):
        settings = replace(SETTINGS, group=4, max_tokens=2000, temperature=0.7, suffix_tokens=suffix_tokens)
        engine = ScriptedEngine(
            tokenizer, lambda request, turn: "ok\n```python\nx\n```" if request.id.endswith(("0", "1")) else RIGHT
        )
        passing = ScriptedExecutor(lambda code: ExecResult("ok", "1"))
        samples, counts = sample_steps(engine, passing, trajectories, 0, settings)
        assert {request.temperature for request in engine.requests} == {0.7}
        assert all(tokenizer.decode(request.token_ids).endswith(kept) for request in engine.requests)
        assert {len(request.token_ids) for request in engine.requests} == {len(trajectories[0].prompt_ids) + len(kept)}
        assert counts["step_samples"] == counts["step_passed"] == 2 and samples == []  # equal rewards


def test_rollout_metrics_by_hand():
    passed, failed = ExecResult("ok", "1"), ExecResult("error", error="E")
    trajectories = []
    for reward, finish, tokens, results in (
        (1.0, "stop", 4, [passed, failed]),
        (0.0, "length", 6, [passed]),
        (0.0, "rounds", 2, []),
        (None, "infra", 99, [failed]),  # not counted
    ):
        trajectory = ledger([1], [5] * tokens)
        trajectory.finish, trajectory.reward = finish, reward
        trajectory.steps = [Step(0, 0, 0, 0, code="x", result=result) for result in results]
        trajectories.append(trajectory)
    assert rollout_metrics(trajectories) == pytest.approx(
        {"reward": 1 / 3, "code_ratio": 2 / 3, "code_pass_rate": 2 / 3, "tokens": 4.0, "truncated": 2 / 3}
    )


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_trainer_gets_the_temperature_and_the_reference_only_for_a_kl_term(run, executor, monkeypatch, kl_coef):
    class Called(Exception):
        pass

    def trainer(model, run, settings, temperature, value_lr, reference, validate):
        assert (temperature, value_lr, reference is not None) == (0.7, 0.03, kl_coef > 0) and reference is not model
        raise Called

    monkeypatch.setattr(run_rl, "Trainer", trainer)
    model, tokenizer, engine = cold_start([GOOD], [RIGHT])
    settings = replace(SETTINGS, temperature=0.7, value_lr=0.03, kl_coef=kl_coef)
    with pytest.raises(Called):
        train(model, tokenizer, engine, executor, PROBLEMS, run, settings)


@pytest.mark.parametrize(("updates", "extra"), [(1, 0), (2, 1)])
def test_logp_old_needs_a_forward_pass_only_with_several_updates(run, executor, monkeypatch, updates, extra):
    """The pass for logp_old and the updates of an iteration together each score all action tokens once."""
    model, tokenizer, engine = cold_start([GOOD, BAD], [RIGHT, WRONG])
    before, during, asleep = [], [], []  # tokens scored by each call, before and in the updates
    score = trainer_module.score_tokens

    def counted(model, sequences, scored, *args, **kwargs):
        (during if torch.is_grad_enabled() else before).append(sum(map(len, scored)))
        return score(model, sequences, scored, *args, **kwargs)

    monkeypatch.setattr(trainer_module, "score_tokens", counted)
    settings = replace(SETTINGS, iterations=1, updates=updates, kl_coef=0.0, max_tokens_per_micro_batch=100_000)
    engine.sleep = lambda: asleep.append(bool(before or during))
    train(model, tokenizer, engine, executor, PROBLEMS, run, settings)
    assert asleep == [False]  # frees its memory before the update
    assert len(during) == 2 * updates and len(before) == extra  # each update scores the two levels
    assert before == [sum(during)] * extra and sum(during) > 50


# ---- resume ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("eval_every", "steps", "resumed_steps"), [(2, [0, 2, 4, 5], [6, 7]), (0, [0, 5], [7])])
def test_iterations_that_are_validated_and_saved(run, eval_every, steps, resumed_steps):
    """A run of five iterations that is then extended to seven."""
    settings = replace(SETTINGS, eval_every=eval_every, save_every=3, keep=99)

    def train(total: int) -> tuple[list[int], list[int]]:
        validated = []
        trainer = Trainer(
            torch.nn.Linear(2, 1), run, settings, validate=lambda model, step, state: validated.append(step)
        )
        iterations = list(trainer.iterations(total, "test", "iteration"))
        return iterations, validated

    assert train(5) == (list(range(5)), steps)
    assert sorted(path.stem for path in (run / "checkpoints").glob("[0-9]*.pt")) == ["000003", "000005"]
    assert train(7) == ([5, 6], resumed_steps)
    assert sorted(path.stem for path in (run / "checkpoints").glob("0*.pt")) == ["000003", "000005", "000006", "000007"]
    assert train(7) == ([], [])


def test_checkpoint_that_was_never_linked_is_removed_and_not_counted(run):
    """A run that is killed between writing a checkpoint and linking it leaves such a file."""
    model = torch.nn.Linear(2, 1)
    folder = run / "checkpoints"

    def save(number: int) -> list[str]:
        Trainer(model, run, SETTINGS).save({"iteration": number, "skipped_in_a_row": 0})
        assert Trainer(model, run, SETTINGS).state["iteration"] == number
        return sorted(path.stem for path in folder.glob("[0-9]*.pt"))

    assert save(1) == ["000001"]
    (folder / "000009.pt").write_bytes(b"written by a killed run")
    assert save(2) == ["000001", "000002"]
    assert save(3) == ["000002", "000003"]


def test_interrupted_save_leaves_no_checkpoint_and_does_not_hinder_the_next(run, monkeypatch):
    def interrupted(state, path):
        Path(path).write_bytes(b"PK part of a checkpoint")
        raise KeyboardInterrupt

    trainer = Trainer(torch.nn.Linear(2, 1), run, SETTINGS)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", interrupted)
        trainer.save({"iteration": 1})
    assert list((run / "checkpoints").glob("*.pt")) == []
    (run / "checkpoints/link.tmp").symlink_to("000001.pt")  # of a run that was killed before it renamed the link
    trainer.save({"iteration": 2})
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["000002.pt", "latest.pt"]


@pytest.mark.parametrize("writes", ["log", "settings", "checkpoint", "model"])
def test_full_disk_is_a_one_line_error_and_keeps_what_is_complete(run, tokenizer, writes):
    model = tiny_llama(tokenizer)
    trainer = Trainer(model, run, SETTINGS)
    trainer.save({"iteration": 1})
    latest = (run / "checkpoints/latest.pt").read_bytes()

    def write() -> None:
        if writes == "log":
            run.append("metrics.jsonl", {"text": "x" * 20_000})
        elif writes == "settings":
            run.write_json("config.json", {"text": "x" * 20_000})
        elif writes == "checkpoint":
            trainer.save({"iteration": 2})
        else:
            with run.whole_folder("final") as folder:
                save_model(model, tokenizer, folder)

    with full_disk(10_000), pytest.raises(UserError, match=r"cannot be written \(.*\); is the disk full\?") as caught:
        write()
    assert "\n" not in str(caught.value)
    assert (run / "checkpoints/latest.pt").read_bytes() == latest
    assert not (run / "final").exists() and not list(run.folder.rglob("*.tmp")), "a partial file keeps the disk full"
    write()


def test_broken_link_to_a_checkpoint_is_refused(run):
    (run / "checkpoints").mkdir()
    (run / "checkpoints/latest.pt").symlink_to("000009.pt")
    with pytest.raises(UserError, match=r"latest.pt: broken symlink"):
        Trainer(torch.nn.Linear(2, 1), run, SETTINGS)


class SlowExecutor(ThreadPoolExecutor):
    """Runs nothing: each call takes the last unused one of `delays`, in seconds, and passes."""

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
    """Request ids of a deterministic rollout whose tools take these delays."""

    def reply(request, turn):
        assert executor.running == 0
        return "x" if turn else GOOD

    engine = ScriptedEngine(tokenizer, reply)
    step_once = engine.step
    engine.step = lambda: [completion for _ in engine.queue[:] for completion in step_once()]  # all requests at once
    with SlowExecutor(delays) as executor:
        solve(engine, executor, PROBLEMS[:4], Sampling(max_tokens=2000), deterministic=True)
    return [request.id for request in engine.requests]


def test_deterministic_rollout_does_not_depend_on_the_speed_of_tools(tokenizer):
    order = order_of_requests(tokenizer, [0.0, 0.05, 0.1, 0.15])
    assert order == order_of_requests(tokenizer, [0.15, 0.1, 0.05, 0.0]) and len(order) == 8


@pytest.mark.parametrize("reproducible", [True, False])
def test_step_level_is_deterministic_if_the_engine_is_reproducible(monkeypatch, reproducible):
    options = []
    monkeypatch.setattr(run_rl, "is_reproducible", lambda engine: reproducible)
    monkeypatch.setattr(run_rl, "drive", lambda *_, **given: options.append(given) or [])
    sample_steps(None, None, [], 0, SETTINGS)
    assert options == [{"deterministic": reproducible}]


def test_resume_accepts_only_settings_that_do_not_change_results(run):
    allowed = dict(device="cuda", rows=3, kv_tokens=999, tree=False, gradient_checkpointing=True, rank_timeout=9.0)
    allowed |= dict(max_tokens_per_micro_batch=7, iterations=99, save_every=5, keep=1, evaluate=True, report_to="none")
    allowed |= dict(log_trajectories=1)
    of_tirgen = {"preview", "patience", "alignment", "dry_run"}
    assert {*allowed, *of_tirgen, "out"} == set(Run.MAY_CHANGE)
    Run(str(run.folder), replace(SETTINGS, **allowed), resume=True)
    for change in ({"lr": 1.0}, {"updates": 2}, {"temperature": 0.7}, {"sampler": "vllm"}, {"seed": 1}, {"group": 4}):
        with pytest.raises(UserError, match=f"--resume: {next(iter(change))} was"):
            Run(str(run.folder), replace(SETTINGS, **change), resume=True)


@pytest.mark.parametrize("changes", [{"lr_schedule": "cosine"}, {"lr_schedule": "linear"}, {"warmup": 0.1}])
def test_resume_refuses_another_length_if_the_learning_rate_depends_on_it(tmp_path, changes):
    settings = replace(SETTINGS, **changes)
    Run(str(tmp_path / "run"), settings, resume=False).start()
    Run(str(tmp_path / "run"), replace(settings, rows=3), resume=True)
    with pytest.raises(UserError, match=r"iterations was 8 in .*, but now is 9; the learning rate depends on it"):
        Run(str(tmp_path / "run"), replace(settings, iterations=9), resume=True)


# Runs a script's main in a forked process, which kills itself when it reaches a chosen point for the n-th time.
# Forking saves importing everything for each kill.
KILLER = r"""
import json, os, pathlib, signal, sys
import torch
torch.set_num_threads(1)
import run_rl, run_sft, thor.training.trainer, thor.run_folder
from thor.engines import HFEngine

def kill_at_call(owner, name, nth, before=None):
    # `before` is called with the arguments of the n-th call, before the kill
    original, calls = getattr(owner, name), [0]
    def replacement(*args, **kwargs):
        calls[0] += 1
        if calls[0] == nth:
            if before:
                before(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(owner, name, replacement)

def write_part_of_checkpoint(state, path):
    pathlib.Path(path).write_bytes(b"PK part of a checkpoint")

def write_part_of_line(run, name, record):
    with (run / name).open("a") as file:
        file.write(json.dumps(record)[:20])

POINTS = {
    "sampling": (HFEngine, "step"),
    "update": (thor.training.trainer, "score_tokens"),
    "checkpoint": (torch, "save", write_part_of_checkpoint),
    "rename": (os, "replace"),
    "link": (pathlib.Path, "symlink_to"),
    "log": (thor.run_folder.Run, "append", write_part_of_line),
}
main = {"rl": run_rl.main, "sft": run_sft.main}[sys.argv[1]]
for point, nth, flags in json.loads(sys.argv[2]):
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        if point:
            owner, name, *before = POINTS[point]
            kill_at_call(owner, name, nth, *before)
        main(flags)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print("status", status, point, nth, flush=True)
"""


def run_with_kills(tmp_path, script: str, flags: list[str], kills: list[tuple[str, int]]):
    """Run a script twice: killed at the n-th call of each of these points and resumed each time, and without kills.

    Returns the folders of both runs.
    """
    killed, uninterrupted = tmp_path / "killed", tmp_path / "uninterrupted"
    runs = [("", 0, [*flags, "--out", str(uninterrupted)])]
    runs += [(point, nth, [*flags, "--out", str(killed), "--resume"]) for point, nth in [*kills, ("", 0)]]
    done = subprocess.run(
        [sys.executable, "-c", KILLER, script, json.dumps(runs)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    statuses = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("status")]
    assert statuses == [0, *[-9] * len(kills), 0], done.stdout + done.stderr[-2000:]
    return killed, uninterrupted


def test_rl_killed_ten_times_gives_the_same_logs_bit_for_bit(tmp_path, model_folder):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"question": f"q{i}", "answer": "4"}) + "\n" for i in range(6)))
    flags = ["--data", str(data), "--model", str(model_folder), "--device", "cpu", "--eval_data", str(data)]
    flags += ["--eval_every", "5", "--pass_rate_range", "0.1,0.9", "--lr_schedule", "cosine", "--min_tokens", "2"]
    flags += ["--prompts", "3", "--group", "4", "--max_tokens", "150", "--max_rounds", "1"]
    flags += ["--iterations", "16", "--updates", "2", "--save_every", "2", "--lr", "1e-3"]
    rng = random.Random(0)
    most = {"sampling": 20, "update": 6, "checkpoint": 1, "rename": 6, "link": 2, "log": 40}  # of a few iterations
    kills = [(point, rng.randint(1, nth)) for point, nth in most.items()]
    kills += [(point, rng.randint(1, most[point])) for point in rng.choices(list(most), k=4)]
    rng.shuffle(kills)
    killed, uninterrupted = run_with_kills(tmp_path, "rl", flags, kills)
    for name in LOGS:
        assert read_log(killed / name) == read_log(uninterrupted / name)
    metrics = read_metrics(killed)
    assert len(metrics) == 16
    assert any(m.get("tokens_step") for m in metrics) and any(m.get("tokens_trajectory") for m in metrics)
    assert sorted(p.name for p in (killed / "checkpoints").glob("*.pt")) == ["000014.pt", "000016.pt", "latest.pt"]
    load_model(str(killed / "final"), "cpu")


def test_sft_killed_five_times_gives_the_same_metrics_bit_for_bit(tmp_path, model_folder):
    data = tmp_path / "tir.jsonl"
    rows = [
        {"id": i, "question": "q" * i, "answer": "4", "segments": [{"text": f"{GOOD} {i} {RIGHT}", "sampled": True}]}
        for i in range(7)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--data", str(data), "--model", str(model_folder), "--device", "cpu", "--evaluate", "False"]
    flags += ["--batch", "2", "--save_every", "3", "--max_tokens_per_micro_batch", "60"]
    kills = [("update", 9), ("checkpoint", 1), ("log", 5), ("rename", 3), ("link", 1)]
    killed, uninterrupted = map(read_metrics, run_with_kills(tmp_path, "sft", flags, kills))
    assert killed == uninterrupted and len(uninterrupted) == 12


def test_checkpoint_of_another_version_is_refused_and_metrics_stay(run, tokenizer):
    run.log(0, {"loss": 1.0})
    (run / "checkpoints").mkdir()
    torch.save({"model": {}, "state": {"iteration": 5}}, run / "checkpoints/000005.pt")
    (run / "checkpoints/latest.pt").symlink_to("000005.pt")
    with pytest.raises(UserError, match=r"latest.pt: not a checkpoint of this version"):
        Trainer(tiny_llama(tokenizer), run, SETTINGS)
    assert len(run.read("metrics.jsonl")) == 1
