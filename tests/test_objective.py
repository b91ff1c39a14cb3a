"""The hierarchical objective against numbers worked out by hand."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import tiny_llama

from run_rl import (
    Counts,
    Example,
    Settings,
    draw_problems,
    failed_steps,
    group_advantages,
    hierarchical_loss,
    improper,
    policy_loss,
    signal,
    update,
)
from thor.engine import HFEngine
from thor.trajectory import ExecResult, Problem, Step, Trajectory

PROBLEM = Problem("p", "?", "4")


def ledger(mask: str, prompt=(1, 2), first: int = 10, **changes) -> Trajectory:
    """A trajectory whose tokens are first, first + 1, ...; mask '1' sampled, '0' observed."""
    trajectory = Trajectory(PROBLEM, list(prompt), finish="stop", reward=1.0)
    for i, char in enumerate(mask):
        if char == "1":
            trajectory.append_sampled([first + i], [-1.0])
        else:
            trajectory.append_observation([first + i])
    return replace(trajectory, **changes)


# ---- advantages and filters -----------------------------------------------------------------------------------------


def test_group_advantages_by_hand():
    # mean 1/4, variance 3/16, std sqrt(3)/4: (3/4) / (sqrt(3)/4) = sqrt(3), (-1/4) / (sqrt(3)/4) = -1/sqrt(3)
    advantages = group_advantages([1.0, 0.0, 0.0, 0.0])
    assert advantages == pytest.approx([3**0.5, *[-(3**-0.5)] * 3], abs=1e-5)
    assert group_advantages([1.0, 1.0]) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("rewards", "group", "reason"),
    [
        ([1, 0], 4, ""),
        ([1], 4, "thin"),
        ([], 4, "thin"),
        ([1, 1], 4, "equal"),
        ([0, 0, 0], 5, "equal"),
        ([1, 0], 5, "thin"),
    ],
)
def test_signal(rewards, group, reason):
    assert signal(rewards, group) == reason


def test_improper():
    settings = Settings(min_tokens=3, box_window=12)
    good = ledger("1111")
    assert improper(good, r"so \boxed{4}", settings) == ""
    assert improper(good, r"\boxed{4} and much more text", settings) == "no_box"
    assert improper(good, "", settings) == "no_box"
    assert improper(ledger("1100"), r"\boxed{4}", settings) == "short"
    assert improper(replace(good, finish="length"), r"\boxed{4}", settings) == "unfinished"
    assert improper(replace(good, finish="infra"), r"\boxed{4}", settings) == "infra"
    failed = replace(good, steps=[Step(0, 1, 2, 4, "x", ExecResult("error", "", "E"))])
    assert improper(failed, r"\boxed{4}", settings) == "failed_code"
    assert improper(failed, r"\boxed{4}", replace(settings, drop_failed_code=False)) == ""


def test_failed_steps_are_those_whose_code_failed():
    error, ok, infra = ExecResult("error"), ExecResult("ok", "1"), ExecResult("infra")
    steps = [Step(0, 1, 2, 3, "a", error), Step(3, 3, 4, 5, "b", ok), Step(5, 6, 7, 8, "c", error), Step(8, 9, 9, 9)]
    trajectory = ledger("1" * 9, steps=steps)
    assert [step.code for _, step in failed_steps([trajectory])] == ["a", "c"]
    assert failed_steps([replace(trajectory, steps=[Step(0, 1, 2, 9, "d", infra)])]) == []


def test_problems_are_drawn_without_repetition_in_an_epoch():
    problems = [Problem(str(i), "") for i in range(5)]
    drawn = [p.id for p in draw_problems(problems, 0, 12, seed=1)]
    assert sorted(drawn[:5]) == sorted(drawn[5:10]) == list("01234") and drawn[:5] != drawn[5:10]
    assert drawn[3:9] == [p.id for p in draw_problems(problems, 3, 6, seed=1)]


# ---- the loss -------------------------------------------------------------------------------------------------------

RATIOS = [1.0, 1.5, 1.5, 0.5, 0.5, 4.0, 1.1, 0.9]
ADVANTAGES = [2.0, 2.0, -2.0, 2.0, -2.0, -2.0, 1.0, -1.0]
#   1.0, A 2: -2     1.5, A 2: clipped at 1.28, -2.56     1.5, A -2: max(3, 2.56) = 3     0.5, A 2: max(-1, -1.6)
#   0.5, A -2: max(1, 1.6) = 1.6 (clipped)    4.0, A -2: 8, dual clip 3 * 2 = 6              1.1: -1.1      0.9: 0.9
LOSSES = [-2.0, -2.56, 3.0, -1.0, 1.6, 6.0, -1.1, 0.9]
CLIPPED = [False, True, False, False, True, True, False, False]


def test_clipped_and_dual_clipped_loss_by_hand():
    logp_old = torch.full((8,), -3.0)
    logp = (logp_old + torch.tensor(RATIOS).log()).requires_grad_()
    loss, info = policy_loss(logp, logp_old, torch.tensor(ADVANTAGES), 0.2, 0.28, 3.0)
    assert loss.tolist() == pytest.approx(LOSSES, abs=1e-5)
    assert info["clipped"].tolist() == CLIPPED and info["ratio"].tolist() == pytest.approx(RATIOS, abs=1e-5)
    loss.sum().backward()
    # where nothing is clipped d l / d logp = -ratio A, elsewhere 0
    expected = [0.0 if c else -r * a for r, a, c in zip(RATIOS, ADVANTAGES, CLIPPED, strict=True)]
    assert logp.grad.tolist() == pytest.approx(expected, abs=1e-5)


def test_both_levels_with_their_own_denominators_and_nll_by_hand():
    logp = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0])
    advantage = torch.tensor([1.0, -1.0, -1.0, 2.0, -2.0])
    is_step = torch.tensor([False, False, False, True, True])
    counts = Counts(trajectory=6, step=4, positive=5)  # more tokens than these: other micro-batches hold the rest
    settings = Settings(step_coef=0.5, nll_coef=0.01)
    loss, info = hierarchical_loss(
        logp, torch.zeros(5), logp.clone(), logp.clone(), advantage, is_step, counts, settings
    )
    # ratio 1: l = -A; trajectory (-1 + 1 + 1) / 6, step (-2 + 2) / 4, nll (1 + 4) / 5
    assert loss.item() == pytest.approx(1 / 6 + 0.5 * 0.0 + 0.01 * 1.0, abs=1e-6)
    assert info["loss_trajectory"] == pytest.approx(1 / 6) and info["nll"] == pytest.approx(1.0)
    assert info["mismatch_kl"] == 0.0 and info["clipped"] == 0


def test_importance_weight_is_truncated_and_unknown_is_one():
    logp = torch.tensor([-1.0, -1.0, -1.0])
    sampler = torch.tensor([-1.0 - math.log(4), -1.0 + math.log(2), float("nan")])  # weights 4 -> 2, 1/2, 1
    args = (logp, torch.zeros(3), logp.clone(), sampler, -torch.ones(3), torch.zeros(3, dtype=torch.bool))
    loss, info = hierarchical_loss(*args, Counts(3, 0, 0), Settings(is_cap=2.0))
    assert loss.item() == pytest.approx((2 + 0.5 + 1) / 3, abs=1e-6)
    assert info["logp_unknown"] == 1
    # k3: exp(d) - 1 - d with d = logp_sampler - logp_old
    d = [-math.log(4), math.log(2)]
    assert info["mismatch_kl"] == pytest.approx(sum(math.exp(x) - 1 - x for x in d), abs=1e-5)


def test_kl_and_entropy_terms_by_hand():
    logp, ref = torch.tensor([-1.0, -2.0]), torch.tensor([-1.0 + math.log(2), -2.0])
    args = (
        logp,
        torch.tensor([0.5, 1.5]),
        logp.clone(),
        logp.clone(),
        torch.zeros(2),
        torch.zeros(2, dtype=torch.bool),
    )
    loss, _ = hierarchical_loss(*args, Counts(2, 0, 0), Settings(kl_coef=0.1, entropy_coef=0.01), ref)
    # k3: ratio 2 gives 2 - 1 - log 2, ratio 1 gives 0; entropy is a bonus: its mean is 1
    assert loss.item() == pytest.approx(0.1 * (1 - math.log(2)) / 2 - 0.01 * 1.0, abs=1e-6)


# ---- the update -----------------------------------------------------------------------------------------------------


def examples() -> list[Example]:
    return [
        Example(ledger("110011"), 1.5, "trajectory"),
        Example(ledger("1101", first=10), -0.5, "trajectory"),
        Example(ledger("11111111", first=30), -1.0, "trajectory"),
        Example(ledger("111", prompt=(1, 2, 10, 11), first=50), 1.0, "step"),
        Example(ledger("11", prompt=(1, 2, 10, 11), first=60), -1.0, "step"),
        Example(ledger("0000", first=70), 1.0, "trajectory"),  # an all-masked row
    ]


def gradients(tokenizer, batch: list[Example], settings: Settings) -> tuple[list[torch.Tensor], dict]:
    """Weights' change under plain SGD is the gradient."""
    model = tiny_llama(tokenizer)
    HFEngine(model, tokenizer)
    before = [p.detach().clone() for p in model.parameters()]
    metrics = update(model, torch.optim.SGD(model.parameters(), lr=1.0), batch, replace(settings, clip=1e9))
    return [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)], metrics


@pytest.mark.parametrize("micro_tokens", [1, 9, 20])
def test_gradient_does_not_depend_on_micro_batches_or_order(tokenizer, micro_tokens):
    whole, metrics = gradients(tokenizer, examples(), Settings(micro_tokens=10_000))
    cut, cut_metrics = gradients(tokenizer, examples()[::-1], Settings(micro_tokens=micro_tokens))
    for a, b in zip(whole, cut, strict=True):
        assert (a - b).norm() <= 1e-5 * (1 + a.norm())
    for name in ("loss", "grad_norm", "entropy", "nll", "loss_step"):
        assert cut_metrics[name] == pytest.approx(metrics[name], rel=1e-4)


def test_gradient_equals_a_plain_padded_reference(tokenizer):
    """The same objective written row by row, with full logits and Python loops."""
    model, settings, batch = tiny_llama(tokenizer), Settings(), examples()
    level_tokens = {"trajectory": 4 + 3 + 8, "step": 5}
    positive = 4 + 3
    loss = torch.zeros(())
    for example in batch:
        ids = example.token_ids
        logps = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
        for p in range(1, len(ids)):
            at = p - len(example.trajectory.prompt_ids)
            if at < 0 or not example.trajectory.action_mask[at]:
                continue
            logp = logps[p - 1, ids[p]]
            weight = torch.exp(logp.detach() - example.trajectory.logp_sampler[at]).clamp(max=settings.is_cap)
            ratio = torch.exp(logp - logp.detach())
            coefficient = settings.step_coef if example.level == "step" else 1.0
            loss = loss - coefficient * weight * ratio * example.advantage / level_tokens[example.level]
            if example.advantage > 0:
                loss = loss - settings.nll_coef * logp / positive
    loss.backward()
    ours, metrics = gradients(tokenizer, batch, settings)
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-5)
    for a, p in zip(ours, model.parameters(), strict=True):
        assert (a - p.grad).norm() <= 1e-5 * (1 + p.grad.norm())


def test_all_masked_batch_changes_nothing(tokenizer):
    change, metrics = gradients(tokenizer, [Example(ledger("000"), 1.0, "trajectory")], Settings())
    assert all(torch.isfinite(c).all() and not c.any() for c in change) and metrics["skipped"] == 0.0


def test_observation_and_prompt_tokens_have_no_gradient_of_their_own(tokenizer):
    """Only the rows of the output head that score action tokens may move through targets: replacing what an
    observation *label* is (the last token, which nothing follows) changes nothing."""
    batch = [Example(ledger("1100"), 1.0, "trajectory")]
    other = [Example(replace(batch[0].trajectory, token_ids=[10, 11, 12, 99]), 1.0, "trajectory")]
    for a, b in zip(
        gradients(tokenizer, batch, Settings())[0], gradients(tokenizer, other, Settings())[0], strict=True
    ):
        assert torch.equal(a, b)
    assert batch[0].scored == [2, 3]


def test_a_loss_that_is_not_finite_skips_the_step(tokenizer):
    change, metrics = gradients(tokenizer, [Example(ledger("11"), float("nan"), "trajectory")], Settings())
    assert metrics["skipped"] == 1.0 and not any(c.any() for c in change)
