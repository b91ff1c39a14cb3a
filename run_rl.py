r"""Stage 3, hierarchical RL: whole trajectories for the answer, single steps for code that runs.

    python run_rl.py                                      # the demo model, from runs/sft/final
    python run_rl.py --model runs/sft-7b/final --data dapo.jsonl --prompts 128 --group 16 --lr 1e-6 ...

One iteration, with policy pi_theta (paper, section 3.2):

    sample      G trajectories tau_i for each of P problems;  R_i = 1 if the answer is right else 0
    filter      improper trajectories, thin groups, groups of one reward (others are drawn for those, capped)
    A_i         = (R_i - mean(R)) / (std(R) + eps)                     on all action tokens of tau_i
    step set    each failed step: its last L_suffix thought tokens and its block sampled G times anew;  R' = 1 if it ran
    A'_j        = the same normalisation of R'                         on suffix and block only
    ratio       = exp(logp - logp_old)
    l           = -min(ratio A, clip(ratio, 1 - eps_low, 1 + eps_high) A), for A < 0 at most -c A  (dual clip)
    L           = mean_trajectory_tokens(l) + step_coef mean_step_tokens(l) + nll_coef mean_{A > 0}(-logp)

With --estimator ppo, A comes from GAE on a value head, token by token, and each l gets value_coef times a value loss.

Each mean's denominator is counted over the whole optimizer batch before the first backward pass, so the gradient does
not depend on how it is cut into micro-batches. Deviations from the paper: std is the population's; no KL, no entropy.

Many GPUs: torchrun --nproc_per_node=8 run_rl.py ... (see thor/ranks.py; docs/paper-*.yaml hold the paper's settings).
On the CPU a run repeats bit for bit, also when it is killed and resumed (set --kv_tokens where memory is so scarce that
it limits how many requests decode at once). On GPUs it does not: kernels add in any order.

Shapes: P problems, G group size, N action tokens of a micro-batch.
"""

from __future__ import annotations

import copy
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch
from tqdm import tqdm

from thor.data import load_problems
from thor.distributed import all_reduce_sum, barrier, gather, rank, start_ranks, workers, world_size
from thor.engines import HFEngine, VLLMEngine
from thor.evaluation import HELD_OUT_SAMPLING, evaluate, held_out, table
from thor.rollout import Sampling, drive, regenerate_step, solve
from thor.run_folder import Run
from thor.sandbox import Executor
from thor.settings import UserError, at_least, derive_seed, parse_settings, run_main, user_errors
from thor.training.model import (
    add_value_head,
    checkpoint_gradients,
    load_model,
    model_source,
    policy_parameters,
    sampling_copy,
    save_model,
    shard,
)
from thor.training.scoring import Scores, score_text, score_tokens
from thor.training.trainer import (
    MAX_SKIPPED,
    dump_skipped,
    not_finite,
    optimizer_step,
    rank_batches,
    restore,
    save_checkpoint,
)
from thor.trajectory import Problem, Step, Trajectory
from thor.verify import grade


@dataclass(frozen=True)
class Settings:
    """Flags of run_rl.py."""

    data: str = field(default="synthetic", metadata={"help": "problems: 'synthetic', a file, or a hub data set"})
    split: str = field(default="train", metadata={"help": "split of 'synthetic' or of a hub data set"})
    limit: int = field(default=512, metadata={"help": "number of problems, the first ones of a file"})
    model: str = field(default="runs/sft/final", metadata={"help": "demo name, folder or hub id"})
    iterations: int = field(default=3, metadata={"help": "iterations of sampling and updating"})
    prompts: int = field(default=4, metadata={"help": "P, problems of an iteration (paper: 128)"})
    group: int = field(default=8, metadata={"help": "G, trajectories of a problem, and samples of a step (paper: 16)"})
    estimator: str = field(default="grpo", metadata={"help": "of advantages: 'grpo' (groups) or 'ppo' (value head)"})
    gamma: float = field(default=1.0, metadata={"help": "ppo: discount of an action token"})
    gae_lambda: float = field(default=0.95, metadata={"help": "ppo: lambda of GAE"})
    value_coef: float = field(default=0.5, metadata={"help": "ppo: weight of the value loss"})
    value_clip: float = field(default=0.2, metadata={"help": "ppo: a value moves at most so far from the old one"})
    value_lr: float = field(default=1e-3, metadata={"help": "ppo: learning rate of the value head, which starts at 0"})
    whiten: bool = field(default=False, metadata={"help": "ppo: advantages of each level to mean 0 and std 1"})
    updates: int = field(default=1, metadata={"help": "optimizer steps per iteration"})
    lr: float = field(default=2e-5, metadata={"help": "learning rate, constant (paper: 1e-6)"})
    weight_decay: float = field(default=0.0, metadata={"help": "of AdamW"})
    clip: float = field(default=1.0, metadata={"help": "largest gradient norm"})
    clip_low: float = field(default=0.2, metadata={"help": "eps_low: ratio is clipped below 1 - this"})
    clip_high: float = field(default=0.28, metadata={"help": "eps_high: ratio is clipped above 1 + this"})
    dual_clip: float = field(default=3.0, metadata={"help": "c: for A < 0 the loss is at most -c A"})
    step_coef: float = field(default=1.0, metadata={"help": "weight of the step level; 0 switches it off"})
    nll_coef: float = field(default=0.01, metadata={"help": "weight of the NLL of tokens with A > 0 (paper: 0.01)"})
    kl_coef: float = field(default=0.0, metadata={"help": "weight of the KL to the model at the start, k3 (paper: 0)"})
    entropy_coef: float = field(default=0.0, metadata={"help": "weight of an entropy bonus on the loss (paper: 0)"})
    is_cap: float = field(default=2.0, metadata={"help": "cap of the weight exp(logp_old - logp_sampler)"})
    suffix_tokens: int = field(default=100, metadata={"help": "L_suffix: thought tokens sampled anew (paper: 100)"})
    step_prompts: int = field(default=0, metadata={"help": "failed steps of an iteration, at most; 0: as --prompts"})
    drop_failed_code: bool = field(default=True, metadata={"help": "trajectories with failed code end and are dropped"})
    min_tokens: int = field(default=8, metadata={"help": "shorter responses are improper, in tokens"})
    box_window: int = field(default=100, metadata={"help": "the last \\boxed must open in so many last characters"})
    max_draws: int = field(
        default=2, metadata={"help": "draws of problems in an iteration, at most (dynamic sampling)"}
    )
    max_tokens: int = field(default=144, metadata={"help": "longest response in tokens (paper: 3,200)"})
    max_rounds: int = field(default=2, metadata={"help": "tool calls of a trajectory (paper: 5)"})
    temperature: float = field(default=1.0, metadata={"help": "of sampler and trainer (paper: 1.0)"})
    sampler: str = field(
        default="hf", metadata={"help": "engine: 'hf' shares the trainer's weights, 'vllm' gets them each iteration"}
    )
    rows: int = field(default=64, metadata={"help": "requests that decode at once"})
    kv_tokens: int = field(default=0, metadata={"help": "room for keys and values, in tokens; 0: half of free memory"})
    max_tokens_per_micro_batch: int = field(
        default=1024, metadata={"help": "distinct tokens in one forward and backward pass"}
    )
    tree: bool = field(default=True, metadata={"help": "compute shared prefixes once in training; the result is equal"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "less memory for a third more computing"})
    timeout: float = field(default=5.0, metadata={"help": "seconds a snippet may run"})
    save_every: int = field(default=1, metadata={"help": "iterations between checkpoints"})
    keep: int = field(default=2, metadata={"help": "checkpoints that are kept, the newest"})
    evaluate: bool = field(default=True, metadata={"help": "score held-out problems at the end"})
    device: str = field(default="auto", metadata={"help": "'cpu', 'cuda', or 'auto'"})
    rank_timeout: float = field(default=3600.0, metadata={"help": "seconds a rank waits for the others, at most"})
    seed: int = field(default=0, metadata={"help": "of problems, their order and sampling"})
    out: str = field(default="runs/rl", metadata={"help": "run folder to write"})
    resume: bool = field(default=False, metadata={"help": "go on in the run folder --out"})


# ---- filters and advantages -----------------------------------------------------------------------------------------


IMPROPER = ("infra", "failed_code", "unfinished", "short", "no_box")


def improper(trajectory: Trajectory, text: str, settings: Settings) -> str:
    """Why a trajectory is not learned from, one of IMPROPER, or '' if it is."""
    if trajectory.finish == "infra":
        return "infra"
    if settings.drop_failed_code and any(step.failed for step in trajectory.steps):
        return "failed_code"
    if trajectory.finish != "stop":
        return "unfinished"
    if trajectory.num_sampled < settings.min_tokens:
        return "short"
    return "" if "\\boxed" in text[-settings.box_window :] else "no_box"


def group_advantages(rewards: list[float], eps: float = 1e-6) -> list[float]:
    """A_i = (R_i - mean(R)) / (std(R) + eps), with the population's std."""
    mean = sum(rewards) / len(rewards)
    std = (sum((r - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5
    return [(r - mean) / (std + eps) for r in rewards]


def signal(rewards: list[float], group: int, estimator: str = "grpo") -> str:
    """Why a group is not learned from ('' if it is): 'thin' (under half of its samples kept) or 'equal' rewards.

    PPO's baseline is the value head and not the group, so that every sample carries a signal there, and a group of
    equal rewards as well; one is 'thin' only with no sample at all.
    """
    if estimator == "ppo":
        return "" if rewards else "thin"
    if 2 * len(rewards) < group:
        return "thin"
    return "equal" if len(set(rewards)) < 2 else ""


def failed_steps(trajectories: list[Trajectory]) -> list[tuple[Trajectory, Step]]:
    """The step set's prompts: every failed step of every trajectory, proper or not."""
    return [(t, step) for t in trajectories if t.finish != "infra" for step in t.steps if step.failed]


def gae(rewards: torch.Tensor, values: torch.Tensor, gamma: float, lam: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016) over the N action tokens of one sample, which then ends.

    delta_i = r_i + gamma V_{i+1} - V_i,   A_i = delta_i + gamma lam A_{i+1},   with V_N = A_N = 0

    rewards, values [N] -> (advantages, returns = advantages + values) [N]. V_i belongs to the state in which token i
    was sampled. Observations are no entries here: credit flows across a tool call as across one token boundary.
    """
    r, v = rewards.tolist(), values.tolist()  # element by element, plain numbers are faster
    advantages, after, value_after = [0.0] * len(v), 0.0, 0.0
    for i in reversed(range(len(v))):
        advantages[i] = after = r[i] + gamma * value_after - v[i] + gamma * lam * after
        value_after = v[i]
    result = torch.tensor(advantages)
    return result, result + values


@dataclass
class Example:
    """One sequence of an optimizer batch. Only its N tokens with action_mask 1 are ever scored.

    advantage: one number for all of them (GRPO), or [N] (PPO). level: 'trajectory' | 'step'.
    logp_old, logp_ref: [N] under the policy before the update and the one at the start, where they are needed.
    value_old, returns: [N], PPO. logp: [N] of the last forward pass, to look at when a step was skipped.
    """

    trajectory: Trajectory
    advantage: float | torch.Tensor
    level: str
    logp_old: torch.Tensor | None = None
    logp_ref: torch.Tensor | None = None
    value_old: torch.Tensor | None = None
    returns: torch.Tensor | None = None
    logp: torch.Tensor | None = None

    @property
    def token_ids(self) -> list[int]:
        return self.trajectory.prompt_ids + self.trajectory.token_ids

    @property
    def scored(self) -> list[int]:
        """Positions in token_ids of the action tokens."""
        offset = len(self.trajectory.prompt_ids)
        return [offset + i for i, sampled in enumerate(self.trajectory.action_mask) if sampled]

    @property
    def logp_sampler(self) -> list[float]:
        return [
            lp for lp, sampled in zip(self.trajectory.logp_sampler, self.trajectory.action_mask, strict=True) if sampled
        ]

    def to_dict(self) -> dict:
        """Plain lists, to dump."""
        t, tensors = self.trajectory, ("advantages", "logp_old", "logp", "value_old", "returns")
        return {
            "level": self.level,
            "prompt_ids": t.prompt_ids,
            "token_ids": t.token_ids,
            "action_mask": t.action_mask,
            "logp_sampler": self.logp_sampler,
            **{name: value.tolist() for name in tensors if (value := getattr(self, name)) is not None},
        }

    @property
    def advantages(self) -> torch.Tensor:
        """[N]"""
        return torch.as_tensor(self.advantage, dtype=torch.float32).expand(self.trajectory.num_sampled)


# ---- the objective --------------------------------------------------------------------------------------------------


def policy_loss(logp, logp_old, advantage, clip_low: float, clip_high: float, dual_clip: float):
    """l = -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), for A < 0 at most -dual_clip A; all [N].

    Returns (l, info) with info: ratio [N], and clipped [N], where the gradient is cut off.
    """
    ratio = torch.exp(logp - logp_old)
    unclipped, clipped = -ratio * advantage, -ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
    loss = torch.maximum(unclipped, clipped)
    bound = -dual_clip * advantage
    dual = (advantage < 0) & (loss > bound)
    loss = torch.where(dual, bound, loss)
    return loss, {"ratio": ratio.detach(), "clipped": (clipped > unclipped) | dual}


def value_loss(value, value_old, returns, clip: float):
    """max((V - R)^2, (V_clipped - R)^2) / 2 with V_clipped within `clip` of the old value; all [N]."""
    clipped = value_old + (value - value_old).clamp(-clip, clip)
    return torch.maximum((value - returns) ** 2, (clipped - returns) ** 2) / 2


@dataclass(frozen=True)
class Counts:
    """Action tokens of an optimizer batch: the three denominators of the loss."""

    trajectory: int
    step: int
    positive: int

    @classmethod
    def of(cls, examples: list[Example]) -> Counts:
        return cls(
            sum(e.trajectory.num_sampled for e in examples if e.level == "trajectory"),
            sum(e.trajectory.num_sampled for e in examples if e.level == "step"),
            sum(int((e.advantages > 0).sum()) for e in examples),
        )


def hierarchical_loss(
    logp,
    entropy,
    logp_old,
    logp_sampler,
    advantage,
    is_step,
    counts: Counts,
    settings: Settings,
    logp_ref=None,
    values=None,
):
    """What N tokens add to L; logp ... is_step and logp_ref are [N]. Returns (loss, info of sums over the N tokens).

    logp_sampler may hold NaN where the engine gave none: such a token has importance weight 1 and is counted.
    values: (value with gradients, value_old, returns), each [N], for PPO.
    """
    token_loss, info = policy_loss(logp, logp_old, advantage, settings.clip_low, settings.clip_high, settings.dual_clip)
    unknown = logp_sampler.isnan()
    gap = (logp_old - logp_sampler).masked_fill(unknown, 0.0)
    weight = torch.exp(gap).clamp(max=settings.is_cap)
    token_loss = token_loss * weight
    if logp_ref is not None:
        token_loss = token_loss + settings.kl_coef * (torch.exp(logp_ref - logp) - 1 - (logp_ref - logp))
    if settings.entropy_coef:
        token_loss = token_loss - settings.entropy_coef * entropy
    value_errors = 0.0
    if values is not None:
        errors = value_loss(*values, settings.value_clip)
        token_loss = token_loss + settings.value_coef * errors
        value_errors = errors.sum().item()
    trajectory = token_loss[~is_step].sum() / max(1, counts.trajectory)
    step = token_loss[is_step].sum() / max(1, counts.step)
    nll = -logp[advantage > 0].sum() / max(1, counts.positive)
    loss = trajectory + settings.step_coef * step + settings.nll_coef * nll
    kl = torch.exp(-gap) - 1 + gap  # k3 estimate of KL(sampler, old)
    return loss, {
        "loss_trajectory": trajectory.item(),
        "loss_step": step.item(),
        "nll": nll.item(),
        "clipped": info["clipped"].sum().item(),
        "ratio": info["ratio"].sum().item(),
        "entropy": entropy.sum().item(),
        "mismatch_kl": kl.sum().item(),
        "value": value_errors,
        "logp_unknown": unknown.sum().item(),
    }


def update(model, optimizer, examples: list[Example], settings: Settings) -> dict[str, float]:
    """One optimizer step on both levels; returns its metrics (see docs/metrics.md)."""
    counts, sums = Counts.of(examples), Counter()
    sequences, scored = [e.token_ids for e in examples], [e.scored for e in examples]

    def loss_of(members: list[int], scores: Scores) -> torch.Tensor:
        chosen, device = [examples[b] for b in members], scores.logp.device
        sizes = [len(scored[b]) for b in members]
        for example, logp in zip(chosen, scores.logp.detach().split(sizes), strict=True):
            example.logp = logp.cpu()

        def join(parts: list[torch.Tensor]) -> torch.Tensor:
            return torch.cat([torch.empty(0), *parts]).to(device)  # a rank may be left without examples

        is_step = join([torch.full((n,), e.level == "step") for e, n in zip(chosen, sizes, strict=True)]).bool()
        # with one optimizer step per iteration logp_old is logp itself, and costs no forward pass of its own
        known = all(e.logp_old is not None for e in chosen)
        logp_old = join([e.logp_old for e in chosen]) if known else scores.logp.detach()
        values = None
        if settings.estimator == "ppo":
            value = torch.where(is_step, scores.value[:, 1], scores.value[:, 0])
            values = value, join([e.value_old for e in chosen]), join([e.returns for e in chosen])
        loss, info = hierarchical_loss(
            scores.logp,
            scores.entropy,
            logp_old,
            join([torch.tensor(e.logp_sampler) for e in chosen]),
            join([e.advantages for e in chosen]),
            is_step,
            counts,
            settings,
            join([e.logp_ref for e in chosen]) if settings.kl_coef else None,
            values,
        )
        sums.update(info)
        return loss

    metrics = optimizer_step(
        model,
        optimizer,
        sequences,
        scored,
        loss_of,
        settings.max_tokens_per_micro_batch,
        settings.clip,
        settings.temperature,
        settings.tree,
    )
    sums = all_reduce_sum(sums)
    tokens = max(1, counts.trajectory + counts.step)
    per_token = {"clipped": "clip_fraction", "ratio": "ratio", "entropy": "entropy", "mismatch_kl": "mismatch_kl"}
    if settings.estimator == "ppo":
        per_token["value"] = "loss_value"
    return {
        **metrics,
        **{name: sums[key] / tokens for key, name in per_token.items()},
        **{key: sums[key] for key in ("loss_trajectory", "loss_step", "nll", "logp_unknown")},
        "tokens_trajectory": counts.trajectory,
        "tokens_step": counts.step,
    }


def split_evenly(examples: list[Example], updates: int) -> list[list[Example]]:
    """The optimizer batches of an iteration: `updates` of them, of sizes that differ by one at most, none empty."""
    return [examples[u::updates] for u in range(min(updates, len(examples)))]


@torch.no_grad()
def fill_logps(model, examples: list[Example], name: str, settings: Settings) -> None:
    """Log-probs of all action tokens under `model` into the field `name` of each example; values into `value_old`."""
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for members in rank_batches([e.token_ids for e in examples], settings.max_tokens_per_micro_batch, settings.tree):
        chosen = [examples[b] for b in members]
        rows = [e.token_ids for e in chosen] or [examples[0].token_ids[:1]]
        scores = score_tokens(model, rows, [e.scored for e in chosen] or [[]], settings.temperature, tree=settings.tree)
        sizes = [e.trajectory.num_sampled for e in chosen]
        values = torch.zeros(sum(sizes), 2) if scores.value is None else scores.value.cpu()
        for b, logp, value in zip(members, scores.logp.cpu().split(sizes), values.split(sizes), strict=True):
            found[b] = logp, value[:, int(examples[b].level == "step")]
    for part in gather(found):
        for b, (logp, value) in part.items():
            setattr(examples[b], name, logp)
            if settings.estimator == "ppo" and name == "logp_old":
                examples[b].value_old = value


def fill_advantages(examples: list[Example], settings: Settings) -> None:
    """PPO: advantages and returns of each example from its values; its reward comes with its last action token."""
    for example in examples:
        rewards = torch.zeros_like(example.value_old)
        rewards[-1:] = example.trajectory.reward
        example.advantage, example.returns = gae(rewards, example.value_old, settings.gamma, settings.gae_lambda)
    for level in ("trajectory", "step") if settings.whiten else ():
        chosen = [e for e in examples if e.level == level]
        everything = torch.cat([torch.empty(0), *(e.advantage for e in chosen)])
        mean, std = everything.mean(), everything.std(correction=0)
        for example in chosen:
            example.advantage = (example.advantage - mean) / (std + 1e-6)


# ---- sampling -------------------------------------------------------------------------------------------------------


def draw_problems(problems: list[Problem], cursor: int, count: int, seed: int) -> list[Problem]:
    """`count` problems from `cursor` on, through a new seeded order of all of them in each epoch."""
    drawn, shuffled = [], -1
    for at in range(cursor, cursor + count):
        epoch, i = divmod(at, len(problems))
        if epoch != shuffled:
            order, shuffled = list(range(len(problems))), epoch
            random.Random(derive_seed(seed, "order", epoch)).shuffle(order)
        drawn.append(problems[order[i]])
    return drawn


def sample_trajectories(
    engine, executor, problems, cursor: int, iteration: int, settings: Settings, bar, deterministic: bool = False
):
    """Trajectory level of one iteration: draw, sample, grade, filter, until P groups carry a signal or the cap.

    Each rank samples whole groups, so that a prompt is computed once, and all ranks get all of them.
    Returns (examples, all trajectories, new cursor, counts of what happened).
    """
    examples: list[Example] = []
    everything: list[Trajectory] = []
    names = ("kept", *(f"dropped_{reason}" for reason in IMPROPER), "groups_kept", "groups_equal", "groups_thin")
    counts = Counter(dict.fromkeys(names, 0))  # a count of zero is a number too
    ended: Counter = Counter()  # on this rank, for the bar
    while counts["groups_kept"] < settings.prompts and counts["draws"] < settings.max_draws:
        drawn = draw_problems(problems, cursor, settings.prompts - counts["groups_kept"], settings.seed)
        cursor += len(drawn)
        counts["draws"] += 1
        sampling = Sampling(
            settings.max_tokens,
            settings.temperature,
            seed=derive_seed(settings.seed, iteration, counts["draws"]),
            max_rounds=settings.max_rounds,
        )

        def done(i: int, trajectory: Trajectory) -> None:
            trajectory.reward = None if trajectory.finish == "infra" else grade(trajectory, engine.tokenizer)
            ended["trajectories"] += 1
            bar.set_postfix_str(f"draw {counts['draws']}, {ended['trajectories']} sampled", refresh=False)
            bar.update(0)

        ids = list(dict.fromkeys(problem.id for problem in drawn))  # one drawn twice stays on one rank, which counts it
        first = counts["draws"]  # the few groups of a later draw are not always those of rank 0
        mine = [g for g, problem in enumerate(drawn) if (first + ids.index(problem.id)) % world_size() == rank()]
        sampled = solve(
            engine,
            executor,
            [drawn[g] for g in mine for _ in range(settings.group)],
            sampling,
            stop_on_failure=settings.drop_failed_code,
            done=done,
            deterministic=deterministic,
        )
        groups = {g: sampled[i * settings.group : (i + 1) * settings.group] for i, g in enumerate(mine)}
        groups = {g: group for part in gather(groups) for g, group in part.items()}
        for g in range(len(drawn)):
            everything += groups[g]
            kept = []
            for trajectory in groups[g]:
                reason = improper(trajectory, trajectory.text(engine.tokenizer, policy_only=True), settings)
                counts[f"dropped_{reason}" if reason else "kept"] += 1
                if not reason:
                    kept.append(trajectory)
            rewards = [t.reward for t in kept]
            reason = signal(rewards, settings.group, settings.estimator)
            counts[f"groups_{reason}" if reason else "groups_kept"] += 1
            if not reason:
                pairs = zip(kept, group_advantages(rewards), strict=True)
                examples += [Example(trajectory, advantage, "trajectory") for trajectory, advantage in pairs]
    counts["draws_capped"] = int(counts["groups_kept"] < settings.prompts)
    counts["sampled"] = len(everything)
    return examples, everything, cursor, counts


def sample_steps(
    engine,
    executor,
    trajectories: list[Trajectory],
    iteration: int,
    settings: Settings,
    deterministic: bool = False,
):
    """Step level of one iteration: G new suffixes and blocks for each failed step; returns (examples, counts)."""
    failed = failed_steps(trajectories)
    random.Random(derive_seed(settings.seed, iteration, "steps")).shuffle(failed)
    failed = failed[: settings.step_prompts or settings.prompts]
    sampling = Sampling(settings.max_tokens, settings.temperature, seed=derive_seed(settings.seed, iteration, "step"))
    mine = range(rank(), len(failed), world_size())
    tasks = [
        regenerate_step(engine, *failed[s], f"step {s}#{g}", sampling, settings.suffix_tokens)
        for s in mine
        for g in range(settings.group)
    ]
    samples = drive(tasks, engine, executor, deterministic=deterministic)
    groups = {s: samples[i * settings.group : (i + 1) * settings.group] for i, s in enumerate(mine)}
    groups = {s: group for part in gather(groups) for s, group in part.items()}
    examples: list[Example] = []
    names = ("step_samples", "step_passed", "step_groups_kept", "step_groups_equal", "step_groups_thin")
    counts = Counter({"step_prompts": len(failed), **dict.fromkeys(names, 0)})
    for s in range(len(failed)):
        kept = [sample for sample in groups[s] if sample is not None]
        counts["step_samples"] += len(kept)
        rewards = [sample.reward for sample in kept]
        counts["step_passed"] += int(sum(rewards))
        reason = signal(rewards, settings.group, settings.estimator)
        counts[f"step_groups_{reason}" if reason else "step_groups_kept"] += 1
        if not reason:
            pairs = zip(kept, group_advantages(rewards), strict=True)
            examples += [Example(sample, advantage, "step") for sample, advantage in pairs]
    return examples, counts


def rollout_metrics(trajectories: list[Trajectory]) -> dict[str, float]:
    """Means over everything that was sampled in an iteration, before any filter."""
    scored = [t for t in trajectories if t.finish != "infra"]
    results = [r for t in scored for r in t.results]
    return {
        "reward": sum(t.reward for t in scored) / max(1, len(scored)),
        "code_ratio": sum(bool(t.results) for t in scored) / max(1, len(scored)),
        "code_pass_rate": sum(r.passed for r in results) / len(results) if results else float("nan"),
        "tokens": sum(t.num_sampled for t in scored) / max(1, len(scored)),
        "truncated": sum(t.finish in ("length", "rounds") for t in scored) / max(1, len(scored)),
    }


# ---- the script -----------------------------------------------------------------------------------------------------


def train(model, tokenizer, engine, executor, problems: list[Problem], run: Run, settings: Settings) -> None:
    """All iterations, from the run's checkpoint if there is one."""
    reference = copy.deepcopy(model) if settings.kl_coef else None  # before a checkpoint is loaded
    if settings.estimator == "ppo":
        add_value_head(model)
    if settings.gradient_checkpointing:
        checkpoint_gradients(model)
    for sharded in (model, reference) if reference else (model,):
        shard(sharded)
    head = [p for name, p in model.named_parameters() if name.startswith("value_head.")]
    body = [p for name, p in model.named_parameters() if not name.startswith("value_head.")]
    optimizer = torch.optim.AdamW(
        [{"params": body}, *([{"params": head, "lr": settings.value_lr}] if head else [])],
        lr=settings.lr,
        betas=(0.9, 0.95),
        weight_decay=settings.weight_decay,
        fused=True,
    )
    progress = restore(run, model, optimizer) or {"iteration": 0, "cursor": 0, "skipped_in_a_row": 0}
    start, cursor, in_a_row = progress["iteration"], progress["cursor"], progress["skipped_in_a_row"]
    for name in ("metrics.jsonl", "trajectories.jsonl"):
        run.rewind(name, lambda record: record["step"] < start)
    deterministic = model.device.type == "cpu"  # kernels on a GPU do not repeat bit for bit anyway
    bar = tqdm(total=settings.iterations, initial=start, desc="rl", unit="iteration", disable=rank() > 0)
    for iteration in range(start, settings.iterations):
        clock = [time.perf_counter()]
        engine.update_weights(policy_parameters(model))  # without an update too: a resumed run has an empty cache here
        examples, trajectories, cursor, counts = sample_trajectories(
            engine, executor, problems, cursor, iteration, settings, bar, deterministic
        )
        clock.append(time.perf_counter())
        if settings.step_coef:
            bar.set_postfix_str("steps")
            steps, step_counts = sample_steps(engine, executor, trajectories, iteration, settings, deterministic)
            examples += steps
            counts.update(step_counts)
        clock.append(time.perf_counter())
        bar.set_postfix_str("updating")
        metrics: dict[str, float] = {"skipped": 0}
        engine.sleep()  # until the new weights come: its memory is the trainer's meanwhile
        if examples:
            random.Random(derive_seed(settings.seed, iteration, "batches")).shuffle(examples)
            if settings.updates > 1 or settings.estimator == "ppo":
                fill_logps(model, examples, "logp_old", settings)
            if settings.estimator == "ppo":
                fill_advantages(examples, settings)
            if settings.kl_coef:
                fill_logps(reference, examples, "logp_ref", settings)
            skipped = 0
            for u, batch in enumerate(split_evenly(examples, settings.updates)):
                metrics = update(model, optimizer, batch, settings)
                in_a_row = in_a_row + 1 if metrics["skipped"] else 0
                if metrics["skipped"]:
                    skipped += 1
                    dump_skipped(run, f"{iteration:06d}-{u}", [e.to_dict() for e in batch if e.logp is not None])
                if in_a_row == MAX_SKIPPED:
                    break
            metrics["skipped"] = skipped
        else:
            tqdm.write(
                f"iteration {iteration}: no group carries a signal after {counts['draws']} draws of problems "
                f"({dict(counts)}); nothing to learn, going on. Easier or harder problems, or a larger --group, help."
            )
        clock.append(time.perf_counter())
        phases = ("seconds_sampling", "seconds_steps", "seconds_update")
        seconds = {name: b - a for name, (a, b) in zip(phases, pairwise(clock), strict=True)}
        rollout = rollout_metrics(trajectories)
        run.log(iteration, {**rollout, **counts, **metrics, **seconds})
        run.write_trajectories("trajectories.jsonl", trajectories, tokenizer, step=iteration)
        bar.update()
        groups = counts["groups_kept"] + counts["groups_equal"] + counts["groups_thin"]
        tqdm.write(
            f"iteration {iteration}: reward {rollout['reward']:.3f}  code pass {rollout['code_pass_rate']:.3f}  "
            f"groups {counts['groups_kept']}/{groups}  "
            f"step groups {counts['step_groups_kept']}/{counts['step_prompts']}  "
            f"seconds {' + '.join(f'{s:.0f}' for s in seconds.values())}"
        )
        stop = in_a_row == MAX_SKIPPED
        if stop or (iteration + 1) % settings.save_every == 0 or iteration + 1 == settings.iterations:
            progress = {"iteration": iteration + 1, "cursor": cursor, "skipped_in_a_row": 0 if stop else in_a_row}
            save_checkpoint(run, model, optimizer, iteration + 1, progress, settings.keep)
        if stop:
            raise not_finite(run)
    bar.close()


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(Settings, __doc__, argv)
    with user_errors():
        device = start_ranks(settings.device, settings.rank_timeout)
        if settings.estimator not in ("grpo", "ppo"):
            raise UserError(f"--estimator {settings.estimator}: 'grpo' or 'ppo' is wanted")
        if settings.sampler not in ("hf", "vllm"):
            raise UserError(f"--sampler {settings.sampler}: 'hf' or 'vllm' is wanted")
        at_least(settings, iterations=1, prompts=1, group=2 if settings.estimator == "grpo" else 1, updates=1)
        at_least(settings, max_draws=1, max_tokens=1, suffix_tokens=0, step_prompts=0, max_rounds=0, rows=1)
        at_least(settings, kv_tokens=0, max_tokens_per_micro_batch=1, save_every=1, keep=1)
        if settings.temperature <= 0:
            raise UserError(f"--temperature {settings.temperature}: above 0 is wanted, RL needs samples")
        run = Run(settings.out, settings, settings.resume)
    with user_errors("--data"):
        problems = load_problems(settings.data, split=settings.split, limit=settings.limit, seed=settings.seed)
    with Executor(workers=workers(), timeout=settings.timeout) as executor:
        with user_errors():
            model, tokenizer = load_model(settings.model, device)
            if settings.sampler == "vllm":
                engine = VLLMEngine(model_source(settings.model), settings.rows, score=partial(score_text, model))
            else:
                engine = HFEngine(sampling_copy(model), tokenizer, settings.rows, kv_tokens=settings.kv_tokens or None)
            run.start()
        train(model, tokenizer, engine, executor, problems, run, settings)
        with run.whole_folder("final") as folder:
            save_model(model, tokenizer, folder)
        print(f"model in {run / 'final'}")
        if settings.evaluate:
            engine.update_weights(policy_parameters(model))
            barrier()
            if rank() == 0:
                summary, _ = evaluate(engine, executor, held_out(), HELD_OUT_SAMPLING, "after RL")
                run.write_json("eval.json", summary)
                print(table([("after RL", summary)]))


if __name__ == "__main__":
    run_main(main, many_ranks=True)
