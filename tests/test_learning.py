"""Tests that RL learns: right answers from the trajectory level, and code that runs from the step level.

The model is tiny and random. Whole code blocks and whole answers are single tokens of its vocabulary, so a few seconds
of training are enough.
"""

from dataclasses import replace

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama

import run_rl
from run_rl import REJECTED, Settings, train
from run_sft import sft_loss, to_ledger
from thor.engines import HFEngine
from thor.prompts import observation_text
from thor.run_folder import Run
from thor.settings import derive_seed
from thor.training.trainer import Sample, Trainer, TrainSettings
from thor.trajectory import ExecResult, Problem

GOOD, BAD = "\n```python\nprint(4)\n```\n", "\n```python\nprint(x)\n```\n"
RIGHT, WRONG = "\\boxed{4}", "\\boxed{5}"
OUTPUTS = {GOOD: "4", BAD: ExecResult("error", "", "NameError: name 'x' is not defined (line 1)").observation()}
SETTINGS = Settings(
    iterations=8,
    prompts=4,
    group=8,
    lr=1.5e-3,
    kl_coef=0.0,  # the default of all models but the demo's
    min_tokens=2,
    max_tokens=150,
    max_rounds=1,
    max_tokens_per_micro_batch=4000,
    evaluate=False,
)


def cold_start(blocks: list[str], answers: list[str], **changes):
    """A model that writes 'a', one of `blocks` and one of `answers`, with equal probabilities."""
    tokenizer = byte_tokenizer((GOOD, BAD, RIGHT, WRONG))
    model = tiny_llama(tokenizer, initializer_range=0.05, **changes)
    engine = HFEngine(model, tokenizer)
    rows = []
    for block in blocks:
        for answer in answers:
            segments = [("a" + block, True), (observation_text(OUTPUTS[block], block), False), (answer, True)]
            rows.append(to_ledger(Problem("p", "q"), segments, tokenizer))
    settings = TrainSettings(max_tokens_per_micro_batch=4000, report_to="none")
    trainer = Trainer(model, Run("never written", settings, resume=True), settings)
    trainer.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        assert trainer.step([Sample(row) for row in rows], sft_loss)["skipped"] == 0
    return model, tokenizer, engine


def learn(tmp_path, executor, blocks, answers, settings=SETTINGS) -> list[dict]:
    """Train a cold-started model with RL. Returns the metrics of each iteration."""
    model, tokenizer, engine = cold_start(blocks, answers)
    run = Run(str(tmp_path / "rl"), settings, resume=False)
    run.start()
    train(model, tokenizer, engine, executor, [Problem(str(i), "q", "4") for i in range(8)], run, settings)
    return run.read("metrics.jsonl")


def rise(metrics: list[dict], name: str) -> float:
    """Mean of the last three iterations minus the first, which is sampled before any update."""
    return sum(m[name] for m in metrics[-3:]) / 3 - metrics[0][name]


def test_trajectory_level_raises_the_reward(tmp_path, executor):
    metrics = learn(tmp_path, executor, [GOOD], [RIGHT, WRONG])
    assert rise(metrics, "reward") > 0.25
    assert all(m.get("tokens_step", 0) == 0 for m in metrics)  # no block fails
    learned = [m for m in metrics if "ratio" in m]
    # with one update per iteration, training is on-policy, and sampler and trainer agree
    assert all(m["ratio"] == pytest.approx(1, abs=1e-4) and m["clip_fraction"] == 0 for m in learned)
    assert all(abs(m["mismatch_kl"]) < 1e-4 for m in learned)


def test_ppo_raises_the_reward_and_lowers_the_value_loss(tmp_path, executor):
    settings = replace(SETTINGS, estimator="ppo", value_lr=0.03, iterations=10)
    metrics = learn(tmp_path, executor, [GOOD], [RIGHT, WRONG], settings)
    assert rise(metrics, "reward") > 0.25
    assert sum(m["loss_value"] for m in metrics[-3:]) / 3 < 0.7 * metrics[0]["loss_value"]
    assert all(m["groups_kept"] == 4 for m in metrics)  # groups of equal rewards carry a signal too
    assert all(m["ratio"] == pytest.approx(1, abs=1e-4) for m in metrics)


def test_ppo_step_level_raises_the_code_pass_rate(tmp_path, executor):
    settings = replace(SETTINGS, estimator="ppo", value_lr=0.03)
    metrics = learn(tmp_path, executor, [GOOD, BAD], [RIGHT], settings)
    assert rise(metrics, "code_pass_rate") > 0.25


@pytest.mark.parametrize("blocks", [[GOOD], [GOOD, BAD]], ids=["trajectory level", "both levels"])
@pytest.mark.parametrize("changes", [{}, {"lr": 3e-3}, {"estimator": "ppo", "value_lr": 0.03}], ids=str)
def test_learning_lasts(tmp_path, executor, blocks, changes):
    """For 30 iterations. If improper responses are dropped, the policy learns and then drifts to responses cut off."""
    metrics = learn(tmp_path, executor, blocks, [RIGHT, WRONG], replace(SETTINGS, iterations=30, **changes))
    last = metrics[-3:]
    assert sum(m["reward"] for m in last) / 3 >= 0.9 and sum(m["code_pass_rate"] for m in last) / 3 >= 0.9
    assert sum(m["truncated"] for m in last) / 3 <= 0.05
    assert all(m["groups_kept"] >= 3 or m["reward"] >= 0.9 for m in metrics)  # groups lose their signal to success only


def test_step_level_raises_the_code_pass_rate(tmp_path, executor):
    metrics = learn(tmp_path, executor, [GOOD, BAD], [RIGHT])
    assert rise(metrics, "code_pass_rate") > 0.25
    assert all(m.get("tokens_trajectory", 0) == 0 for m in metrics)  # all answers are right: no signal


def test_code_pass_rate_does_not_rise_without_the_step_level(tmp_path, executor):
    metrics = learn(tmp_path, executor, [GOOD, BAD], [RIGHT], replace(SETTINGS, step_coef=0.0))
    assert rise(metrics, "code_pass_rate") < 0.15 and all("step_prompts" not in m for m in metrics)


def test_each_random_choice_depends_on_the_seed(tmp_path, executor, monkeypatch):
    parts = []
    monkeypatch.setattr(run_rl, "derive_seed", lambda *of: parts.append(of) or derive_seed(*of))
    learn(tmp_path, executor, [GOOD, BAD], [RIGHT, WRONG], replace(SETTINGS, iterations=2, seed=7))
    assert all(of[:2] in ((7, 0), (7, 1)) for of in parts)  # seed and iteration
    assert {of[2] for of in parts} == {1, "steps", "step", "batches"}  # 1: the first draw


def test_iteration_without_a_signal_prints_a_message(tmp_path, executor, capsys):
    settings = replace(SETTINGS, iterations=1, max_draws=3)
    [metrics] = learn(tmp_path, executor, [GOOD], [RIGHT], settings)
    assert "no group carries a signal after 3 draws" in capsys.readouterr().out
    assert metrics["groups_equal"] == 12 and metrics["draws"] == 3 and metrics["draws_capped"] == 1
    assert "loss" not in metrics
    zeros = {"skipped", "groups_kept", "groups_thin", "step_groups_kept", *(f"rejected_{why}" for why in REJECTED)}
    assert all(metrics[name] == 0 for name in zeros)  # counts of zero are written too


@pytest.mark.parametrize("changes", [{}, dict(estimator="ppo", kl_coef=0.1, gradient_checkpointing=True, whiten=True)])
def test_resumed_run_repeats_the_metrics_with_several_updates(tmp_path, executor, changes):
    """Also with a value head, its optimizer state and learning rate, and a reference model, which is not saved."""
    settings = replace(SETTINGS, iterations=4, updates=2, lr=1e-3, **changes)
    uninterrupted = learn(tmp_path / "uninterrupted", executor, [GOOD, BAD], [RIGHT, WRONG], settings)

    class Killed(BaseException):
        """Not an Exception, so that nothing catches it, like KeyboardInterrupt."""

    model, tokenizer, engine = cold_start([GOOD, BAD], [RIGHT, WRONG])
    problems = [Problem(str(i), "q", "4") for i in range(8)]
    run = Run(str(tmp_path / "killed"), settings, resume=False)
    run.start()
    append, written = run.append, []

    def append_then_die(name, record):
        append(name, record)
        written.append(name)
        if written.count("metrics.jsonl") == 3:  # the third iteration is logged but not saved
            raise Killed

    run.append = append_then_die
    with pytest.raises(Killed):
        train(model, tokenizer, engine, executor, problems, run, settings)
    model, tokenizer, engine = cold_start([GOOD, BAD], [RIGHT, WRONG])
    resumed = Run(str(tmp_path / "killed"), settings, resume=True)
    resumed.start()
    train(model, tokenizer, engine, executor, problems, resumed, settings)

    for again, once in zip(resumed.read("metrics.jsonl"), uninterrupted, strict=True):
        reproducible = [key for key in once if not key.startswith("seconds")]
        assert {key: again[key] for key in reproducible} == {key: once[key] for key in reproducible}
    steps = [record["step"] for record in resumed.read("trajectories.jsonl")]
    assert steps == sorted(steps) and set(steps) == set(range(4))
