"""Tests of the hierarchical objective: filters, advantages and losses by hand, and gradients against references."""

import math
import random
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import ScriptedEngine, ScriptedExecutor, byte_tokenizer, passes_unless_bad, tiny_llama
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from run_rl import (
    Settings,
    add_old_scores,
    failed_steps,
    group_advantages,
    hierarchical_loss,
    no_signal_reason,
    per_token,
    policy_loss,
    reject_reason,
    samples_of,
    split_evenly,
)
from run_sft import sft_loss
from thor.attention import Tree, distinct_tokens, micro_batches
from thor.engines import HFEngine
from thor.rollout import Sampling, drive, regenerate_step, solve
from thor.run_folder import Run
from thor.text import decode, encode
from thor.training import scoring
from thor.training.model import add_value_head, checkpoint_gradients, prepare
from thor.training.ppo import gae, ppo_advantages, value_loss
from thor.training.scoring import LogProb, Scores, score_tokens
from thor.training.trainer import (
    Batch,
    Counts,
    Sample,
    Trainer,
    TrainSettings,
    collate,
)
from thor.trajectory import ExecResult, Problem, Step, Trajectory

PROBLEM = Problem("p", "?", "4")


def ledger(mask: str, prompt=(1, 2), first: int = 10, **changes) -> Trajectory:
    """A trajectory with tokens first, first + 1, ...; in `mask`, '1' is a sampled and '0' an observation token."""
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
def test_no_signal_reason_of_grpo(rewards, group, reason):
    assert no_signal_reason(rewards, group) == reason


def test_reject_reason_of_each_filter():
    tokenizer = byte_tokenizer()

    def reason(text: str, **changes) -> str:
        ids = encode(tokenizer, text)
        trajectory = Trajectory(PROBLEM, [1], finish="stop")
        trajectory.append_sampled(ids, [-1.0] * len(ids))
        trajectory.steps = [Step(0, len(ids), len(ids), len(ids))]
        return reject_reason(replace(trajectory, **changes), tokenizer, Settings(min_tokens=9, box_window=12))

    assert reason(r"so \boxed{4}") == ""
    assert reason(r"so \boxed{4}, and much more text") == "no_box"
    assert reason("a long answer without a box") == "no_box"
    assert reason(r"\boxed4") == "short" and reason(r"\boxed{4}") == ""  # 7 and 9 tokens, one per byte
    assert reason(r"\boxed{4}", action_mask=[False] + [True] * 8) == "short"  # only sampled tokens count
    assert [reason(r"so \boxed{4}", finish=f) for f in ("length", "rounds")] == ["unfinished"] * 2
    assert [reason(r"so \boxed{4}", finish=f) for f in ("infra", "failed_code")] == ["infra", "failed_code"]


def rewarded(*rewards: float | str | None) -> list[Trajectory | None]:
    """A trajectory for each reward; for a string, one with that `finish`; for None, no trajectory."""
    return [
        None if r is None else ledger("1", finish=r) if isinstance(r, str) else ledger("1", reward=r) for r in rewards
    ]


def reject(trajectory: Trajectory | None) -> str:
    """The finish of a trajectory is the reason to drop it, unless it is 'stop'."""
    return "no_block" if trajectory is None else trajectory.finish.replace("stop", "")


def test_samples_of_the_trajectory_level_by_hand():
    # groups 0 and 2 are kept, group 1 has equal rewards, group 3 is thin
    groups = {
        2: rewarded(0.0, 1.0, 0.0, 0.0),
        0: rewarded("short", 1.0, "no_box", 0.0),
        3: rewarded(1.0, "failed_code", "failed_code", "infra"),
        1: rewarded(1.0, 1.0, "failed_code", 1.0),
    }
    sampled = [trajectory for group in groups.values() for trajectory in group]
    samples, in_order, counts = samples_of(list(groups), sampled, "trajectory", reject, Settings(group=4))
    assert in_order == [groups[g] for g in range(4)]
    # improper trajectories have reward 0; one of four is right, in group 0 as in group 2
    expected = [(t, 3**0.5 if i == 1 else -(3**-0.5)) for g in (0, 2) for i, t in enumerate(groups[g])]
    assert all(sample.trajectory is t for sample, (t, _) in zip(samples, expected, strict=True))
    assert [sample.advantage for sample in samples] == pytest.approx([a for _, a in expected], abs=1e-5)
    assert {sample.level for sample in samples} == {"trajectory"}
    rejected = {"rejected_short": 1, "rejected_no_box": 1, "rejected_failed_code": 3, "rejected_infra": 1}
    assert dict(counts) == {"kept": 12, "groups_kept": 2, "groups_equal": 1, "groups_thin": 1, **rejected}


@pytest.mark.parametrize("improper", ["zero", "drop"])
def test_improper_trajectories_count_as_wrong_or_are_dropped(improper):
    group = rewarded("short", 1.0, "unfinished", 0.0)
    for trajectory in group:
        trajectory.reward = trajectory.reward if trajectory.finish == "stop" else 1.0  # right, but improper
    samples, _, _ = samples_of([0], group, "trajectory", reject, Settings(group=4, improper=improper))
    by_hand = {  # {index: advantage}
        "zero": {0: -(3**-0.5), 1: 3**0.5, 2: -(3**-0.5), 3: -(3**-0.5)},  # rewards 0, 1, 0, 0
        "drop": {1: 1.0, 3: -1.0},  # rewards 1, 0
    }[improper]
    assert [sample.trajectory for sample in samples] == [group[i] for i in by_hand]
    assert [sample.advantage for sample in samples] == pytest.approx(list(by_hand.values()), abs=1e-5)


def test_ppo_rewards_an_improper_trajectory_with_0():
    [improper] = rewarded("unfinished")
    improper.reward = 1.0
    samples, _, _ = samples_of([0], [improper], "trajectory", reject, Settings(group=1, estimator="ppo"))
    samples[0].value_old = torch.zeros(1)
    ppo_advantages(samples, Settings(estimator="ppo"))
    assert samples[0].returns.tolist() == [0.0]


def test_samples_of_the_step_level_by_hand():
    groups = {1: rewarded(None, None, None, 1.0), 0: rewarded(None, 1.0, 0.0, 0.0), 2: rewarded(0.0, None, None, 0.0)}
    sampled = [trajectory for group in groups.values() for trajectory in group]
    samples, in_order, counts = samples_of(list(groups), sampled, "step", reject, Settings(group=4))
    assert in_order == [groups[g] for g in range(3)]
    assert all(sample.trajectory is t for sample, t in zip(samples, groups[0][1:], strict=True))
    # three samples: mean 1/3, std 2**0.5 / 3
    assert [sample.advantage for sample in samples] == pytest.approx([2**0.5, -(2**-0.5), -(2**-0.5)], abs=1e-5)
    assert {sample.level for sample in samples} == {"step"}
    assert dict(counts) == {"kept": 6, "rejected_no_block": 6, "groups_kept": 1, "groups_equal": 1, "groups_thin": 1}


def test_samples_of_ppo_keeps_all_groups_with_a_sample():
    groups = [rewarded(1.0, "short", "short", "short"), rewarded(0.0, 0.0, 0.0, 0.0), rewarded(*["short"] * 4)]
    settings = Settings(group=4, estimator="ppo", improper="drop")
    sampled = [trajectory for group in groups for trajectory in group]
    samples, _, counts = samples_of([0, 1, 2], sampled, "trajectory", reject, settings)
    assert len(samples) == counts["kept"] == 5
    assert (counts["groups_kept"], counts["groups_equal"], counts["groups_thin"]) == (2, 0, 1)


def test_failed_steps_excludes_passed_and_infra_steps():
    error, ok, infra = ExecResult("error"), ExecResult("ok", "1"), ExecResult("infra")
    steps = [Step(0, 1, 2, 3, "a", error), Step(3, 3, 4, 5, "b", ok), Step(5, 6, 7, 8, "c", error), Step(8, 9, 9, 9)]
    trajectory = ledger("1" * 9, steps=steps)
    assert [step.code for _, step in failed_steps([trajectory])] == ["a", "c"]
    assert failed_steps([replace(trajectory, steps=[Step(0, 1, 2, 9, "d", infra)])]) == []
    assert failed_steps([replace(trajectory, finish="infra")]) == []  # it ended before its answer


# ---- the loss -------------------------------------------------------------------------------------------------------

RATIOS = [1.0, 1.5, 1.5, 0.5, 0.5, 4.0, 1.1, 0.9]
ADVANTAGES = [2.0, 2.0, -2.0, 2.0, -2.0, -2.0, 1.0, -1.0]
#   1.0, A 2: -2     1.5, A 2: clipped at 1.28, -2.56     1.5, A -2: max(3, 2.56) = 3     0.5, A 2: max(-1, -1.6)
#   0.5, A -2: max(1, 1.6) = 1.6 (clipped)    4.0, A -2: 8, dual clip 3 * 2 = 6              1.1: -1.1      0.9: 0.9
LOSSES = [-2.0, -2.56, 3.0, -1.0, 1.6, 6.0, -1.1, 0.9]
CLIPPED = [False, True, False, False, True, True, False, False]


def test_clip_and_dual_clip_by_hand():
    logp_old = torch.full((8,), -3.0)
    logp = (logp_old + torch.tensor(RATIOS).log()).requires_grad_()
    loss, info = policy_loss(logp, logp_old, torch.tensor(ADVANTAGES), 0.2, 0.28, 3.0)
    assert loss.tolist() == pytest.approx(LOSSES, abs=1e-5)
    assert info["clipped"].tolist() == CLIPPED and info["ratio"].tolist() == pytest.approx(RATIOS, abs=1e-5)
    loss.sum().backward()
    # d l / d logp is -ratio A where nothing is clipped, else 0
    expected = [0.0 if c else -r * a for r, a, c in zip(RATIOS, ADVANTAGES, CLIPPED, strict=True)]
    assert logp.grad.tolist() == pytest.approx(expected, abs=1e-5)


def batch_of(logp, logp_sampler, advantage, is_step, counts: Counts, **more) -> Batch:
    return Batch(counts, [len(logp)], advantage, is_step, logp_sampler, logp_old=logp.clone(), **more)


def test_denominators_of_both_levels_and_nll_by_hand():
    logp = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0])
    advantage = torch.tensor([1.0, -1.0, -1.0, 2.0, -2.0])
    is_step = torch.tensor([False, False, False, True, True])
    counts = Counts(trajectory=6, step=4, positive=5)  # other micro-batches have the other tokens
    settings = Settings(step_coef=0.5, nll_coef=0.01)
    batch = batch_of(logp, logp.clone(), advantage, is_step, counts)
    loss, info = hierarchical_loss(batch, Scores(logp, torch.zeros(5)), settings)
    # ratio 1: l = -A; trajectory (-1 + 1 + 1) / 6, step (-2 + 2) / 4, nll (1 + 4) / 5
    assert loss.item() == pytest.approx(1 / 6 + 0.5 * 0.0 + 0.01 * 1.0, abs=1e-6)
    assert info["loss_trajectory"] == pytest.approx(1 / 6) and info["nll"] == pytest.approx(1.0)
    assert info["mismatch_kl"] == 0.0 and info["clip_fraction"] == 0


def test_ratio_is_to_the_policy_before_the_update_and_each_clip_has_its_setting():
    logp_old = torch.full((3,), -3.0)
    logp = logp_old + torch.tensor([1.5, 0.5, 3.0]).log()
    none = torch.zeros(3, dtype=torch.bool)
    batch = batch_of(logp, logp_old.clone(), torch.tensor([2.0, -2.0, -2.0]), none, Counts(3, 0, 1))
    settings = Settings(clip_low=0.4, clip_high=0.1, dual_clip=1.2, nll_coef=0.0)
    loss, info = hierarchical_loss(replace(batch, logp_old=logp_old), Scores(logp, torch.zeros(3)), settings)
    # clipped at 1.1: -2.2      clipped at 0.6: 1.2      max(6, 2.2) = 6, dual clip 1.2 * 2 = 2.4
    assert loss.item() == pytest.approx((-2.2 + 1.2 + 2.4) / 3, abs=1e-5)
    assert info["clip_fraction"] == 3 and info["ratio"] == pytest.approx(1.5 + 0.5 + 3.0, abs=1e-5)


def test_joint_mean_divides_both_levels_by_all_tokens():
    logp, is_step = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([False, True, True])
    batch = batch_of(logp, logp.clone(), torch.tensor([1.0, -1.0, -2.0]), is_step, Counts(6, 4, 5))
    settings = Settings(step_mean="joint", step_coef=0.5, nll_coef=0.0)
    loss, info = hierarchical_loss(batch, Scores(logp, torch.zeros(3)), settings)
    assert info["loss_trajectory"] == pytest.approx(-1 / 10) and info["loss_step"] == pytest.approx(3 / 10)
    assert loss.item() == pytest.approx(-1 / 10 + 0.5 * 3 / 10)


def test_importance_weight_is_capped_and_1_if_unknown():
    logp = torch.tensor([-1.0, -1.0, -1.0])
    sampler = torch.tensor([-1.0 - math.log(4), -1.0 + math.log(2), float("nan")])  # weights 4 -> 2, 1/2, 1
    batch = batch_of(logp, sampler, -torch.ones(3), torch.zeros(3, dtype=torch.bool), Counts(3, 0, 0))
    loss, info = hierarchical_loss(batch, Scores(logp, torch.zeros(3)), Settings(is_cap=2.0))
    assert loss.item() == pytest.approx((2 + 0.5 + 1) / 3, abs=1e-6)
    assert info["logp_unknown"] == 1
    # k3: exp(d) - 1 - d with d = logp_old - logp_sampler
    d = [math.log(4), -math.log(2)]
    assert info["mismatch_kl"] == pytest.approx(sum(math.exp(x) - 1 - x for x in d), abs=1e-5)


def test_sequence_weight_is_the_capped_product_of_the_token_weights():
    logp = torch.full((5,), -1.0)
    sampler = logp - torch.tensor([3.0, 0.5, 0.25, 2.0, 4.0]).log()  # products 3/2, 1/4 and 8, capped at 2
    batch = batch_of(logp, sampler, -torch.ones(5), torch.zeros(5, dtype=torch.bool), Counts(5, 0, 0))
    batch = replace(batch, lengths=[2, 1, 0, 2])
    loss, _ = hierarchical_loss(batch, Scores(logp, torch.zeros(5)), Settings(is_level="sequence", is_cap=2.0))
    assert loss.item() == pytest.approx((1.5 + 1.5 + 0.25 + 2 + 2) / 5, abs=1e-6)


def test_sequence_weight_of_a_rank_without_samples():
    none = torch.empty(0)
    batch = replace(batch_of(none, none, none, none.bool(), Counts(5, 0, 0)), lengths=[])
    loss, _ = hierarchical_loss(batch, Scores(none, none), Settings(is_level="sequence"))
    assert loss.item() == 0


def test_mismatch_kl_is_the_kl_of_the_sampler_and_the_trainer_in_the_mean():
    """Over tokens as often as the sampler draws them, its mean is KL(sampler, trainer), also if they differ much."""
    sampler, trainer = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.1, 0.3, 0.6])
    tokens = torch.tensor([0] * 7 + [1] * 2 + [2])
    logp, logp_sampler = trainer.log()[tokens], sampler.log()[tokens]
    batch = batch_of(logp, logp_sampler, torch.ones(10), torch.zeros(10, dtype=torch.bool), Counts(10, 0, 10))
    _, info = hierarchical_loss(batch, Scores(logp, torch.zeros(10)), Settings())
    assert info["mismatch_kl"] / 10 == pytest.approx((sampler * (sampler / trainer).log()).sum().item(), abs=1e-6)


def test_mismatch_kl_stays_finite_for_log_probs_that_are_far_apart():
    logp, sampler = torch.tensor([-1000.0, -1.0]), torch.tensor([-1.0, -1000.0])
    batch = batch_of(logp, sampler, torch.ones(2), torch.zeros(2, dtype=torch.bool), Counts(2, 0, 2))
    loss, info = hierarchical_loss(batch, Scores(logp, torch.zeros(2)), Settings())
    assert 900 < info["mismatch_kl"] < math.exp(21) and math.isfinite(loss.item())


def test_kl_and_entropy_terms_by_hand():
    logp, ref = torch.tensor([-1.0, -2.0]), torch.tensor([-1.0 + math.log(2), -2.0])
    counts, is_step = Counts(2, 0, 0), torch.zeros(2, dtype=torch.bool)
    batch = batch_of(logp, logp.clone(), torch.zeros(2), is_step, counts, logp_ref=ref)
    scores = Scores(logp, torch.tensor([0.5, 1.5]))
    loss, _ = hierarchical_loss(batch, scores, Settings(kl_coef=0.1, entropy_coef=0.01))
    # k3: 2 - 1 - log 2 for ratio 2, and 0 for ratio 1; the mean entropy is 1 and lowers the loss
    assert loss.item() == pytest.approx(0.1 * (1 - math.log(2)) / 2 - 0.01 * 1.0, abs=1e-6)


def test_each_level_has_its_own_value_and_the_value_loss_a_weight():
    logp, is_step = torch.zeros(2), torch.tensor([False, True])
    fields = {"value_old": torch.tensor([1.0, 2.0]), "returns": torch.zeros(2)}
    batch = batch_of(logp, logp.clone(), torch.zeros(2), is_step, Counts(1, 1, 0), **fields)
    scores = Scores(logp, torch.zeros(2), torch.tensor([[1.0, 9.0], [9.0, 2.0]]))  # columns: trajectory, step
    loss, info = hierarchical_loss(batch, scores, Settings(estimator="ppo", value_coef=0.1))
    # squared errors 1^2 / 2 and 2^2 / 2; the advantages are 0
    assert loss.item() == pytest.approx(0.1 * (0.5 + 2.0)) and info["loss_value"] == pytest.approx(2.5)


def test_value_is_clipped_by_its_setting():
    logp, none = torch.zeros(2), torch.zeros(2, dtype=torch.bool)
    fields = {"value_old": torch.ones(2), "returns": torch.zeros(2)}
    scores = Scores(logp, torch.zeros(2), torch.tensor([[1.5, 0.0], [0.5, 0.0]]))
    _, info = hierarchical_loss(
        batch_of(logp, logp.clone(), torch.zeros(2), none, Counts(2, 0, 0), **fields),
        scores,
        Settings(estimator="ppo", value_clip=0.3),
    )
    # max(1.5, 1.3)^2 / 2 and max(0.5, 0.7)^2 / 2
    assert info["loss_value"] == pytest.approx(1.125 + 0.245)


def test_old_scores_are_of_the_policy_and_the_level_and_those_of_the_reference_of_the_reference():
    class ScriptedTrainer:
        reference = "reference"

        def score(self, samples, model="policy"):
            logp = {"policy": -1.0, "reference": -2.0}[model]
            return [(torch.tensor([logp, logp]), torch.tensor([[0.25, 0.75]] * 2)) for _ in samples]

    samples = [Sample(ledger("11"), 0.0, level) for level in ("trajectory", "step")]
    add_old_scores(ScriptedTrainer(), samples, Settings(estimator="ppo", kl_coef=0.1))
    assert [sample.value_old.tolist() for sample in samples] == [[0.25] * 2, [0.75] * 2]
    assert all(sample.logp_old.tolist() == [-1.0] * 2 and sample.logp_ref.tolist() == [-2.0] * 2 for sample in samples)


def test_collate_joins_action_tokens_and_omits_fields_that_a_sample_lacks():
    trajectory, step = ledger("101", logp_sampler=[-1.0, 0.0, -2.0]), ledger("01", logp_sampler=[0.0, -3.0])
    samples = [Sample(trajectory, 0.5, logp_old=torch.tensor([-1.5, -2.5])), Sample(step, torch.tensor([2.0]), "step")]
    batch = collate(samples, Counts.of(samples))
    assert batch.advantage.tolist() == [0.5, 0.5, 2.0] and batch.is_step.tolist() == [False, False, True]
    assert batch.logp_sampler.tolist() == [-1.0, -2.0, -3.0] and batch.logp_old is None
    assert batch.counts == Counts(trajectory=2, step=1, positive=3)
    assert collate(samples[:1], batch.counts).logp_old.tolist() == [-1.5, -2.5]
    assert collate([], batch.counts).advantage.shape == (0,)


def test_gae_of_a_trajectory_with_two_tool_calls_by_hand():
    # observations before the 3rd and the 5th of five action tokens
    sample = Sample(ledger("11001101"), 0.0, "trajectory")
    sample.value_old = torch.tensor([0.5, 0.4, 0.6, 0.2, 0.8])
    ppo_advantages([sample], Settings(estimator="ppo", gamma=0.9, gae_lambda=0.5))
    # the next value of the 2nd token is that of the 3rd, after the tool output
    # delta: 0.9*0.4 - 0.5 = -0.14, 0.9*0.6 - 0.4 = 0.14, 0.9*0.2 - 0.6 = -0.42, 0.9*0.8 - 0.2 = 0.52, 1 - 0.8 = 0.2
    # A backwards, each delta + 0.45 A: 0.2, 0.61, -0.1455, 0.074525, -0.10646375
    expected = [-0.10646375, 0.074525, -0.1455, 0.61, 0.2]
    assert sample.advantage.tolist() == pytest.approx(expected, abs=1e-6)
    returns = [a + v for a, v in zip(expected, sample.value_old.tolist(), strict=True)]
    assert sample.returns.tolist() == pytest.approx(returns, abs=1e-6)
    assert Counts.of([sample]) == Counts(trajectory=5, step=0, positive=3)


def test_gae_with_lambda_1_is_the_return_and_with_0_the_td_error():
    rewards, values = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.3, 0.7, 0.1])
    assert gae(rewards, values, 0.5, 1.0)[1].tolist() == pytest.approx([0.25, 0.5, 1.0])
    assert gae(rewards, values, 1.0, 0.0)[0].tolist() == pytest.approx([0.4, -0.6, 0.9])
    assert gae(torch.zeros(0), torch.zeros(0), 1.0, 1.0)[0].shape == (0,)


def test_whitening_is_per_level():
    batch = [Sample(ledger("11", reward=r), 0.0, level) for level in ("trajectory", "step") for r in (0.0, 1.0)]
    for i, sample in enumerate(batch):
        sample.value_old = torch.tensor([0.1, 0.3 * i])
    ppo_advantages(batch, Settings(estimator="ppo", whiten=True))
    for level in ("trajectory", "step"):
        advantages = torch.cat([e.advantage for e in batch if e.level == level])
        assert advantages.mean().abs() < 1e-6 and (advantages.std(correction=0) - 1).abs() < 1e-4


def test_value_loss_by_hand():
    value = torch.tensor([1.0, 0.6, 0.0, 1.5], requires_grad=True)
    old, returns = torch.tensor([0.5, 0.5, 1.0, 1.0]), torch.tensor([2.0, 0.0, 1.0, 1.4])
    # clipped values 0.7, 0.6, 0.8, 1.2; larger squared errors 1.3^2, 0.6^2, 1^2 (not 0.2^2), 0.2^2 (not 0.1^2)
    loss = value_loss(value, old, returns, 0.2)
    assert loss.tolist() == pytest.approx([1.69 / 2, 0.36 / 2, 1 / 2, 0.04 / 2], abs=1e-6)
    loss.sum().backward()
    assert value.grad.tolist() == pytest.approx([0.0, 0.6, -1.0, 0.0], abs=1e-6)  # none where the clipped value is used


def test_ppo_keeps_groups_of_equal_rewards():
    assert [no_signal_reason(r, 4, "ppo") for r in ([1, 1], [1], [])] == ["", "", "thin"]


# ---- the update -----------------------------------------------------------------------------------------------------


def samples() -> list[Sample]:
    """Samples of both levels that share prefixes; one has no action tokens."""
    return [
        Sample(ledger("110011"), 1.5, "trajectory"),
        Sample(ledger("1101", first=10), -0.5, "trajectory"),
        Sample(ledger("11111111", first=30), -1.0, "trajectory"),
        Sample(ledger("111", prompt=(1, 2, 10, 11), first=50), 1.0, "step"),
        Sample(ledger("11", prompt=(1, 2, 10, 11), first=60), -1.0, "step"),
        Sample(ledger("0000", first=70), 1.0, "trajectory"),  # no action tokens
    ]


class Gradient(torch.optim.SGD):
    """Keeps the gradient as one vector and leaves the weights as they are."""

    def step(self):
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.vector = torch.cat([torch.zeros_like(p).ravel() if p.grad is None else p.grad.ravel() for p in parameters])


def trainer_of(model, settings: TrainSettings, folder: str = "never written") -> Trainer:
    """A trainer whose optimizer only keeps the gradient. It writes to `folder` only if a step is skipped."""
    prepare(model)
    settings = replace(settings, clip=1e9, report_to="none")
    temperature = getattr(settings, "temperature", 1.0)
    trainer = Trainer(model, Run(folder, settings, resume=True), settings, temperature)
    trainer.optimizer = Gradient(model.parameters(), lr=0.0)
    return trainer


def gradient(model, batch: list[Sample], settings: Settings) -> tuple[torch.Tensor, dict]:
    """(gradient of all parameters, metrics) of one optimizer step."""
    trainer = trainer_of(model, settings)
    metrics = trainer.step(batch, partial(hierarchical_loss, settings=settings))
    assert metrics["skipped"] == 0
    return trainer.optimizer.vector, per_token(metrics)


@pytest.mark.parametrize(
    ("count", "updates", "sizes"),
    [(10, 4, [3, 3, 2, 2]), (9, 4, [3, 2, 2, 2]), (8, 4, [2, 2, 2, 2]), (2, 4, [1, 1]), (5, 1, [5]), (0, 3, [])],
)
def test_samples_are_split_evenly_into_updates(count, updates, sizes):
    """Chunks of ceil(9 / 4) = 3 samples would give three updates instead of four."""
    batches = split_evenly([f"sample {i}" for i in range(count)], updates)
    assert [len(batch) for batch in batches] == sizes
    assert sorted(e for batch in batches for e in batch) == sorted(f"sample {i}" for i in range(count))


def assert_close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert (a - b).norm() <= tolerance * a.norm(), f"{(a - b).norm() / a.norm():.1e}"


@hypothesis_settings(max_examples=25)
@given(data=st.data())
def test_gradient_does_not_depend_on_micro_batches_order_or_tree(tokenizer, data):
    """The random ledgers have few distinct token ids, so that they share prefixes of every length."""
    ids = st.lists(st.integers(1, 3), min_size=1, max_size=12)
    batch = []
    for level in data.draw(st.lists(st.sampled_from(["trajectory", "step"]), min_size=1, max_size=6)):
        trajectory = Trajectory(PROBLEM, data.draw(ids), finish="stop", reward=float(data.draw(st.booleans())))
        for turn in range(data.draw(st.integers(0, 3))):
            tokens = data.draw(ids)
            trajectory.append_sampled(tokens, [-5.5] * len(tokens)) if turn != 1 else trajectory.append_observation(
                tokens
            )
        batch.append(Sample(trajectory, data.draw(st.sampled_from([-1.5, 0.5, 2.0])), level))
    if not any(e.trajectory.num_sampled for e in batch):
        return  # no gradient to compare; see test_batch_without_action_tokens_has_zero_gradient
    chosen = Settings(estimator=data.draw(st.sampled_from(["grpo", "ppo"])), step_coef=0.7, temperature=0.7)
    model = tiny_llama(tokenizer)
    if chosen.estimator == "ppo":
        add_value_head(model)
        torch.nn.init.normal_(model.value_head.weight, generator=torch.Generator().manual_seed(0))
        add_old_scores(trainer_of(model, chosen), batch, chosen)
    whole, metrics = gradient(model, batch, replace(chosen, max_tokens_per_micro_batch=10_000))
    cut = replace(chosen, max_tokens_per_micro_batch=data.draw(st.integers(1, 60)), tree=data.draw(st.booleans()))
    vector, cut_metrics = gradient(model, data.draw(st.permutations(batch)), cut)
    assert_close(whole, vector)
    assert cut_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-5)


def test_gradient_equals_a_reference_in_plain_loops(tokenizer):
    """The reference computes the objective row by row and token by token, from full logits."""
    model, settings, batch = tiny_llama(tokenizer), Settings(), samples()
    level_tokens = {"trajectory": 4 + 3 + 8, "step": 5}
    positive = 4 + 3
    loss = torch.zeros(())
    for sample in batch:
        ids = sample.trajectory.all_token_ids
        logps = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
        for p in range(1, len(ids)):
            at = p - len(sample.trajectory.prompt_ids)
            if at < 0 or not sample.trajectory.action_mask[at]:
                continue
            logp = logps[p - 1, ids[p]]
            weight = torch.exp(logp.detach() - sample.trajectory.logp_sampler[at]).clamp(max=settings.is_cap)
            ratio = torch.exp(logp - logp.detach())
            coefficient = settings.step_coef if sample.level == "step" else 1.0
            loss = loss - coefficient * weight * ratio * sample.advantage / level_tokens[sample.level]
            if sample.advantage > 0:
                loss = loss - settings.nll_coef * logp / positive
    loss.backward()
    ours, metrics = gradient(tiny_llama(tokenizer), batch, settings)
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert_close(torch.cat([p.grad.ravel() for p in model.parameters()]), ours)


CONFIGS = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
CONFIGS["qwen3"] = (Qwen3Config, Qwen3ForCausalLM)


@pytest.mark.parametrize("observations", [False, True])
@pytest.mark.parametrize("layout", CONFIGS)
def test_gradients_with_and_without_tree_equal_transformers(layout, observations):
    torch.manual_seed(1)
    config, build = CONFIGS[layout]
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8)
    model = build(config(vocab_size=90, num_key_value_heads=2, initializer_range=0.2, **sizes)).eval()
    batch = samples()[:5]
    for sample in batch if not observations else ():
        sample.trajectory.action_mask = [True] * len(sample.trajectory)
    for sample in batch:
        sample.trajectory.logp_sampler = [math.nan] * len(sample.trajectory)  # importance weight 1
    settings, counts = Settings(), Counts.of(batch)
    loss = torch.zeros(())
    for sample in batch:
        mask = torch.tensor([False] * len(sample.trajectory.prompt_ids) + sample.trajectory.action_mask)[1:]
        ids = torch.tensor(sample.trajectory.all_token_ids)
        logits = model(ids[None]).logits[0, :-1]
        logp = -F.cross_entropy(logits, ids[1:], reduction="none")[mask]
        tokens = counts.step if sample.level == "step" else counts.trajectory
        loss = loss - sample.advantage * torch.exp(logp - logp.detach()).sum() / tokens
        if sample.advantage > 0:
            loss = loss - settings.nll_coef * logp.sum() / counts.positive
    loss.backward()
    reference = torch.cat([p.grad.ravel() for p in model.parameters()])
    model.zero_grad()
    for changes in (
        {},
        {"tree": False},
        {"max_tokens_per_micro_batch": 7},
        {"max_tokens_per_micro_batch": 7, "tree": False},
    ):
        vector, metrics = gradient(model, batch, replace(settings, **changes))
        assert_close(reference, vector)
        assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-6)


def test_logits_are_computed_only_for_action_tokens(tokenizer):
    """Only the states before an action token are projected to the vocabulary."""
    model, batch = tiny_llama(tokenizer), samples()
    expected = []
    for sample in batch:
        hidden = model.model(torch.tensor([sample.trajectory.all_token_ids])).last_hidden_state[0]
        expected += [hidden[p - 1] for p in sample.trajectory.action_positions]
    prepare(model)  # before the hook: it runs a test batch, which computes logits
    rows = []
    model.lm_head.register_forward_hook(lambda module, inputs, logits: rows.append(inputs[0].detach()))
    gradient(model, batch, Settings(max_tokens_per_micro_batch=10_000))
    assert len(rows) == 2  # once for each level: the backward pass keeps these logits
    projected = torch.cat(rows)
    assert len(projected) == len(expected)
    distance = torch.cdist(projected, torch.stack(expected))  # the order differs
    assert distance.amin(0).max() < 1e-4 and distance.amin(1).max() < 1e-4


@pytest.mark.parametrize("tree", [True, False])
def test_exactly_the_action_tokens_are_targets(tokenizer, monkeypatch, tree):
    """Each is predicted from the position before it. No prompt, observation or prefix token is a target."""
    found, score = Counter(), scoring.score_pairs

    def watched(model, layout, pairs, *args):
        for place, target in pairs.tolist():
            [index] = [index for index in layout.index if place in index][:1]  # any sequence that contains this place
            found[(*(layout.token_ids[i] for i in index[: index.index(place) + 1]), target)] += 1
        return score(model, layout, pairs, *args)

    monkeypatch.setattr(scoring, "score_pairs", watched)
    gradient(tiny_llama(tokenizer), samples(), Settings(max_tokens_per_micro_batch=25, tree=tree))
    expected = Counter()  # tokens up to and including each action token, from the ledgers
    for trajectory in (e.trajectory for e in samples()):
        for i, sampled in enumerate(trajectory.action_mask):
            expected[(*trajectory.prompt_ids, *trajectory.token_ids[: i + 1])] += sampled
    assert found == +expected and found.total() == 4 + 3 + 8 + 3 + 2


def test_targets_of_a_regenerated_step_are_its_suffix_and_block(tokenizer, monkeypatch):
    """From a sampled trajectory with tool output to the loss: neither the prefix nor the output is a target."""
    think, bad, good = "one two three\n", "```python\nbad\n```", "3\n```python\nprint(1)\n```"
    first = ScriptedEngine(tokenizer, lambda request, turn: (think + bad, "end")[turn])
    [trajectory] = solve(first, ScriptedExecutor(passes_unless_bad), [PROBLEM], Sampling(max_tokens=2000))
    [step] = [step for step in trajectory.steps if step.failed]
    again = ScriptedEngine(tokenizer, lambda request, turn: good)
    task = regenerate_step(again, trajectory, step, "step", Sampling(max_tokens=2000), suffix_tokens=6)
    [regenerated] = drive([task], again, ScriptedExecutor(passes_unless_bad))
    assert decode(tokenizer, regenerated.prompt_ids).endswith("one two ")
    targets, score = [], scoring.score_pairs

    def watched(model, layout, pairs, *args):
        targets.extend(pairs[:, 1].tolist())
        return score(model, layout, pairs, *args)

    monkeypatch.setattr(scoring, "score_pairs", watched)
    gradient(tiny_llama(tokenizer), [Sample(regenerated, 1.0, "step"), Sample(trajectory, -1.0)], Settings())
    sampled = encode(tokenizer, good) + encode(tokenizer, think + bad + "end") + [tokenizer.eos_token_id]
    assert Counter(targets) == Counter(sampled)


@pytest.mark.parametrize("tree", [True, False])
def test_labels_of_tokens_that_are_not_actions_have_no_effect(tokenizer, monkeypatch, tree):
    """The model reads the true ids. The ids that targets are taken from are random wherever action_mask is 0."""
    settings, rng, true = Settings(max_tokens_per_micro_batch=25, tree=tree), random.Random(0), {}
    whole, metrics = gradient(tiny_llama(tokenizer), samples(), settings)
    batch = samples()
    for sample in batch:
        ids, t = sample.trajectory.all_token_ids, sample.trajectory
        t.prompt_ids = [rng.randrange(200) for _ in t.prompt_ids]
        t.token_ids = [
            token if sampled else rng.randrange(200) for token, sampled in zip(t.token_ids, t.action_mask, strict=True)
        ]
        true[tuple(sample.trajectory.all_token_ids)] = ids
    assert len(true) == len(batch) and all(list(labels) != ids for labels, ids in true.items())
    model = tiny_llama(tokenizer)
    prepare(model)
    monkeypatch.setattr(scoring, "Tree", lambda rows, share: Tree([true[tuple(row)] for row in rows], share=share))
    vector, same = gradient(model, batch, settings)
    assert_close(whole, vector)
    assert same == pytest.approx(metrics, rel=1e-4, abs=1e-5)


def test_backward_keeps_less_than_two_chunks_of_logits(tokenizer):
    vocabulary, tokens, chunk = 5000, 1500, 50
    model, saved = tiny_llama(tokenizer, vocab_size=vocabulary), {}
    prepare(model)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def save(x: torch.Tensor) -> torch.Tensor:
        saved[x.untyped_storage().data_ptr()] = x  # a reference, so that its memory is not reused
        return x

    model.model.register_forward_hook(lambda *_: saved.clear())  # do not count what the layers keep
    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        ids = [i % 300 for i in range(tokens)]
        scores = score_tokens(model, [ids], [list(range(1, tokens))], 1.0, chunk=chunk)
    kept = sum(x.untyped_storage().nbytes() for place, x in saved.items() if place not in weights)
    assert 0 < kept < 2 * chunk * vocabulary * 4 < tokens * vocabulary * 4 / 10
    scores.logp.sum().backward()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_and_entropies_have_the_gradients_of_log_softmax(temperature, dtype):
    torch.manual_seed(0)
    logits = (3 * torch.randn(5, 11)).to(dtype).requires_grad_()
    targets, (a, b) = torch.tensor([0, 10, 3, 3, 7]), torch.randn(2, 5)
    logps = torch.log_softmax(logits.float() / temperature, -1)
    expected = logps.gather(1, targets[:, None]).squeeze(1), -(logps.exp() * logps).sum(-1)
    for weights in ((a, b), (a, 0 * b), (0 * a, b)):
        total = sum((x * w).sum() for x, w in zip(expected, weights, strict=True))
        [reference] = torch.autograd.grad(total, logits, retain_graph=True)
        copy = logits.detach().clone().requires_grad_()
        scores = LogProb.apply(copy * 1, targets, temperature)  # a new tensor, which LogProb may overwrite
        sum((x * w).sum() for x, w in zip(scores, weights, strict=True) if w.any()).backward()
        assert_close(torch.cat(scores), torch.cat(expected))
        assert_close(copy.grad.float(), reference.float(), 1e-5 if dtype == torch.float32 else 1e-2)


def test_entropy_bonus_changes_the_gradient(tokenizer):
    model, batch = tiny_llama(tokenizer), samples()
    plain, _ = gradient(model, batch, Settings(nll_coef=0.0))
    bonus, _ = gradient(model, batch, Settings(nll_coef=0.0, entropy_coef=0.1))
    assert (bonus - plain).norm() > 1e-3 * plain.norm()


@pytest.mark.parametrize("tree", [True, False])
@given(
    sequences=st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=9), min_size=1, max_size=9),
    budget=st.integers(1, 30),
)
def test_micro_batches_contain_all_sequences_and_keep_the_budget(tree, sequences, budget):
    batches = list(micro_batches(sequences, budget, tree))
    assert sorted(b for batch in batches for b in batch) == list(range(len(sequences)))
    for batch in batches:
        rows = [sequences[b] for b in batch]
        tokens = len(Tree(rows, share=tree).token_ids)
        assert tokens == distinct_tokens(rows, tree) and (tokens <= budget or len(batch) == 1)


def test_gradient_checkpointing_recomputes_layers_with_equal_gradients(tokenizer):
    model, calls = tiny_llama(tokenizer), []
    whole, _ = gradient(model, samples(), Settings(max_tokens_per_micro_batch=10_000))
    checkpoint_gradients(model)
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    again, _ = gradient(model, samples(), Settings(max_tokens_per_micro_batch=10_000))
    assert_close(whole, again)
    assert len(calls) == 4  # for each level one forward pass, and one in the backward pass


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_on_policy_ratio_is_1_and_sampler_and_trainer_agree(tokenizer, executor, temperature):
    model = tiny_llama(tokenizer)
    engine = HFEngine(model, tokenizer)
    problems = [Problem(str(i), "why " * i) for i in range(4) for _ in range(3)]
    sampled = solve(engine, executor, problems, Sampling(max_tokens=60, temperature=temperature))
    batch = [Sample(t, (-1.0) ** i, ("trajectory", "step")[i % 2]) for i, t in enumerate(sampled)]
    settings = Settings(temperature=temperature, max_tokens_per_micro_batch=150)
    other_batches = trainer_of(model, replace(settings, max_tokens_per_micro_batch=97))
    add_old_scores(other_batches, batch, replace(settings, updates=2))
    for sample in batch:
        assert sample.logp_old.tolist() == pytest.approx(sample.trajectory.action_logps, abs=1e-4)
    _, metrics = gradient(model, batch, settings)
    assert metrics["ratio"] == pytest.approx(1, abs=1e-4) and metrics["clip_fraction"] == 0
    assert abs(metrics["mismatch_kl"]) < 1e-4 and metrics["tokens_trajectory"] > 100


def test_update_with_unknown_sampler_log_probs_by_hand(tokenizer):
    """vLLM occasionally reports NaN. Such a token has importance weight 1 and is counted."""
    model, trajectory = tiny_llama(tokenizer), ledger("11011")
    logps = torch.log_softmax(model(torch.tensor([[1, 2, *trajectory.token_ids]])).logits[0], -1)
    logp = [logps[1 + i, trajectory.token_ids[i]].item() for i in (0, 1, 3, 4)]
    # weights 1, exp(log 4) capped at 2, 1/2, 1
    known = [math.nan, logp[1] - math.log(4), logp[2] + math.log(2), math.nan]
    trajectory.logp_sampler = [*known[:2], 0.0, *known[2:]]
    vector, metrics = gradient(model, [Sample(trajectory, 1.5, "trajectory")], Settings(nll_coef=0.01, is_cap=2.0))
    expected = -1.5 * (1 + 2 + 0.5 + 1) / 4 - 0.01 * sum(logp) / 4  # ratio 1
    assert metrics["loss"] == pytest.approx(expected, abs=1e-5) and metrics["skipped"] == 0
    assert metrics["logp_unknown"] == 2 and torch.isfinite(vector).all() and vector.any()
    # k3 of d = logp_old - logp_sampler: exp(d) - 1 - d, and 0 if unknown
    k3 = (4 - 1 - math.log(4)) + (1 / 2 - 1 + math.log(2))
    assert metrics["mismatch_kl"] == pytest.approx(k3 / 4, abs=1e-4)


def test_batch_without_action_tokens_has_zero_gradient(tokenizer):
    vector, metrics = gradient(tiny_llama(tokenizer), [Sample(ledger("000"), 1.0, "trajectory")], Settings())
    assert not vector.any() and metrics["skipped"] == 0.0


@given(tokens=st.lists(st.integers(1, 200), min_size=3, max_size=3), data=st.data())
@hypothesis_settings(max_examples=10)
def test_sft_gradient_does_not_depend_on_micro_batches_order_or_masked_targets(tokenizer, tokens, data):
    model = tiny_llama(tokenizer)
    prepare(model)
    rows = [ledger(mask, first=first) for mask, first in (("11001", 10), ("111", 10), ("1011100", 20), ("0000", 60))]

    def sft_gradient(rows: list[Trajectory], max_tokens_per_micro_batch: int) -> torch.Tensor:
        settings = TrainSettings(max_tokens_per_micro_batch=max_tokens_per_micro_batch)
        trainer = trainer_of(model, settings)
        assert trainer.step([Sample(row) for row in rows], sft_loss)["skipped"] == 0
        return trainer.optimizer.vector

    whole = sft_gradient(rows, 10_000)
    assert_close(whole, sft_gradient(data.draw(st.permutations(rows)), data.draw(st.integers(1, 20))))
    # tokens after the last action token are masked as targets, and no action token attends to them
    other = [*rows[:2], replace(rows[2], token_ids=[*rows[2].token_ids[:5], *tokens[:2]]), rows[3]]
    assert_close(whole, sft_gradient(other, 10_000))


def test_non_finite_loss_skips_the_step(tokenizer, tmp_path):
    model = tiny_llama(tokenizer)
    trainer = trainer_of(model, Settings(), str(tmp_path))
    trainer.optimizer = torch.optim.AdamW(model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    metrics = trainer.step([Sample(ledger("11"), float("nan"))], partial(hierarchical_loss, settings=Settings()))
    assert metrics["skipped"] == 1.0
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
