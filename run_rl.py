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

Each mean's denominator is counted over the whole optimizer batch before the first backward pass, so the gradient does
not depend on how it is cut into micro-batches. Deviations from the paper: std is the population's; no KL, no entropy.

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
from thor.engine import HFEngine
from thor.engine_vllm import VLLMEngine
from thor.evaluation import HELD_OUT_SAMPLING, evaluate, grade, held_out, table
from thor.executor import Executor
from thor.policy import (
    Scores,
    load_policy,
    micro_batches,
    model_source,
    optimizer_step,
    restore,
    save_checkpoint,
    save_policy,
    score_text,
    score_tokens,
)
from thor.rollout import Sampling, derive_seed, drive, regenerate_step, solve
from thor.runlog import Run, UserError, at_least, parse_settings, run_main, user_errors
from thor.trajectory import Problem, Step, Trajectory


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
    estimator: str = field(default="grpo", metadata={"help": "advantage estimator: 'grpo'"})
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
    micro_tokens: int = field(default=1024, metadata={"help": "distinct tokens in one forward and backward pass"})
    timeout: float = field(default=5.0, metadata={"help": "seconds a snippet may run"})
    save_every: int = field(default=1, metadata={"help": "iterations between checkpoints"})
    evaluate: bool = field(default=True, metadata={"help": "score held-out problems at the end"})
    device: str = field(default="auto", metadata={"help": "'cpu', 'cuda', or 'auto'"})
    seed: int = field(default=0, metadata={"help": "of problems, their order and sampling"})
    out: str = field(default="runs/rl", metadata={"help": "run folder to write"})
    resume: bool = field(default=False, metadata={"help": "go on in the run folder --out"})


# ---- filters and advantages -----------------------------------------------------------------------------------------


def improper(trajectory: Trajectory, text: str, settings: Settings) -> str:
    r"""Why a trajectory is not learned from ('' if it is): 'infra', 'unfinished', 'failed_code', 'short', 'no_box'."""
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


def signal(rewards: list[float], group: int) -> str:
    """Why a group is not learned from ('' if it is): 'thin' (under half of its samples kept) or 'equal' rewards."""
    if 2 * len(rewards) < group:
        return "thin"
    return "equal" if len(set(rewards)) < 2 else ""


def failed_steps(trajectories: list[Trajectory]) -> list[tuple[Trajectory, Step]]:
    """The step set's prompts: every failed step of every trajectory, proper or not."""
    return [(t, step) for t in trajectories if t.finish != "infra" for step in t.steps if step.failed]


@dataclass
class Example:
    """One sequence of an optimizer batch. Only tokens with action_mask 1 are ever scored.

    level: 'trajectory' | 'step'. advantage: the same for all its action tokens.
    logp_old, logp_ref: [N] under the policy before the update and the one at the start, where they are needed.
    """

    trajectory: Trajectory
    advantage: float
    level: str
    logp_old: torch.Tensor | None = None
    logp_ref: torch.Tensor | None = None

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


@dataclass(frozen=True)
class Counts:
    """Action tokens of an optimizer batch: the three denominators of the loss."""

    trajectory: int
    step: int
    positive: int

    @classmethod
    def of(cls, examples: list[Example]) -> Counts:
        def tokens(chosen) -> int:
            return sum(sum(e.trajectory.action_mask) for e in examples if chosen(e))

        return cls(
            tokens(lambda e: e.level == "trajectory"),
            tokens(lambda e: e.level == "step"),
            tokens(lambda e: e.advantage > 0),
        )


def hierarchical_loss(
    logp, entropy, logp_old, logp_sampler, advantage, is_step, counts: Counts, settings: Settings, logp_ref=None
):
    """What N tokens add to L; logp ... is_step and logp_ref are [N]. Returns (loss, info of sums over the N tokens).

    logp_sampler may hold NaN where the engine gave none: such a token has importance weight 1 and is counted.
    """
    token_loss, info = policy_loss(logp, logp_old, advantage, settings.clip_low, settings.clip_high, settings.dual_clip)
    gap = logp_old - logp_sampler
    unknown = gap.isnan()
    weight = torch.exp(gap.masked_fill(unknown, 0.0)).clamp(max=settings.is_cap)
    token_loss = token_loss * weight
    if logp_ref is not None:
        token_loss = token_loss + settings.kl_coef * (torch.exp(logp_ref - logp) - 1 - (logp_ref - logp))
    if settings.entropy_coef:
        token_loss = token_loss - settings.entropy_coef * entropy
    trajectory = token_loss[~is_step].sum() / max(1, counts.trajectory)
    step = token_loss[is_step].sum() / max(1, counts.step)
    nll = -logp[advantage > 0].sum() / max(1, counts.positive)
    loss = trajectory + settings.step_coef * step + settings.nll_coef * nll
    kl = (
        torch.exp(-gap.masked_fill(unknown, 0.0)) - 1 + gap.masked_fill(unknown, 0.0)
    )  # k3 estimate of KL(sampler, old)
    return loss, {
        "loss_trajectory": trajectory.item(),
        "loss_step": step.item(),
        "nll": nll.item(),
        "clipped": info["clipped"].sum().item(),
        "ratio": info["ratio"].sum().item(),
        "entropy": entropy.sum().item(),
        "mismatch_kl": kl.sum().item(),
        "logp_unknown": unknown.sum().item(),
    }


def update(model, optimizer, examples: list[Example], settings: Settings) -> dict[str, float]:
    """One optimizer step on both levels; returns its metrics (see docs/metrics.md)."""
    counts, sums = Counts.of(examples), Counter()
    sequences, scored = [e.token_ids for e in examples], [e.scored for e in examples]

    def loss_of(members: list[int], scores: Scores) -> torch.Tensor:
        chosen, device = [examples[b] for b in members], scores.logp.device
        sizes = torch.tensor([len(scored[b]) for b in members], device=device)

        def spread(values: list, dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=device).repeat_interleave(sizes)

        # with one optimizer step per iteration logp_old is logp itself, and costs no forward pass of its own
        known = all(e.logp_old is not None for e in chosen)
        logp_old = torch.cat([e.logp_old for e in chosen]) if known else scores.logp.detach()
        logp_sampler = torch.tensor([lp for e in chosen for lp in e.logp_sampler], device=device)
        loss, info = hierarchical_loss(
            scores.logp,
            scores.entropy,
            logp_old,
            logp_sampler,
            spread([e.advantage for e in chosen], torch.float32),
            spread([e.level == "step" for e in chosen], torch.bool),
            counts,
            settings,
            torch.cat([e.logp_ref for e in chosen]) if settings.kl_coef else None,
        )
        sums.update(info)
        return loss

    metrics = optimizer_step(
        model, optimizer, sequences, scored, loss_of, settings.micro_tokens, settings.clip, settings.temperature
    )
    tokens = max(1, counts.trajectory + counts.step)
    per_token = {"clipped": "clip_fraction", "ratio": "ratio", "entropy": "entropy", "mismatch_kl": "mismatch_kl"}
    return {
        **metrics,
        **{name: sums[key] / tokens for key, name in per_token.items()},
        **{key: sums[key] for key in ("loss_trajectory", "loss_step", "nll", "logp_unknown")},
        "tokens_trajectory": counts.trajectory,
        "tokens_step": counts.step,
    }


@torch.no_grad()
def fill_logps(model, examples: list[Example], name: str, settings: Settings) -> None:
    """Log-probs of all action tokens under `model`, into the field `name` of each example."""
    for members in micro_batches([e.token_ids for e in examples], settings.micro_tokens):
        chosen = [examples[b] for b in members]
        scores = score_tokens(model, [e.token_ids for e in chosen], [e.scored for e in chosen], settings.temperature)
        for example, logp in zip(chosen, scores.logp.split([len(e.scored) for e in chosen]), strict=True):
            setattr(example, name, logp)


# ---- sampling -------------------------------------------------------------------------------------------------------


def draw_problems(problems: list[Problem], cursor: int, count: int, seed: int) -> list[Problem]:
    """`count` problems from `cursor` on, through a new seeded order of all of them in each epoch."""
    drawn = []
    for at in range(cursor, cursor + count):
        epoch, i = divmod(at, len(problems))
        order = list(range(len(problems)))
        random.Random(derive_seed(seed, "order", epoch)).shuffle(order)
        drawn.append(problems[order[i]])
    return drawn


def sample_trajectories(engine, executor, problems, cursor: int, iteration: int, settings: Settings, bar):
    """Trajectory level of one iteration: draw, sample, grade, filter, until P groups carry a signal or the cap.

    Returns (examples, all trajectories, new cursor, counts of what happened).
    """
    examples: list[Example] = []
    everything: list[Trajectory] = []
    counts: Counter = Counter()
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
            counts["sampled"] += 1
            bar.set_postfix_str(f"sampled {counts['sampled']}", refresh=False)
            bar.update(0)

        batch = [problem for problem in drawn for _ in range(settings.group)]
        sampled = solve(engine, executor, batch, sampling, stop_on_failure=settings.drop_failed_code, done=done)
        everything += sampled
        for g in range(len(drawn)):
            kept = []
            for trajectory in sampled[g * settings.group : (g + 1) * settings.group]:
                reason = improper(trajectory, trajectory.text(engine.tokenizer, policy_only=True), settings)
                counts[f"dropped_{reason}" if reason else "kept"] += 1
                if not reason:
                    kept.append(trajectory)
            rewards = [t.reward for t in kept]
            reason = signal(rewards, settings.group)
            counts[f"groups_{reason}" if reason else "groups_kept"] += 1
            if not reason:
                pairs = zip(kept, group_advantages(rewards), strict=True)
                examples += [Example(trajectory, advantage, "trajectory") for trajectory, advantage in pairs]
    return examples, everything, cursor, counts


def sample_steps(engine, executor, trajectories: list[Trajectory], iteration: int, settings: Settings):
    """Step level of one iteration: G new suffixes and blocks for each failed step; returns (examples, counts)."""
    failed = failed_steps(trajectories)
    random.Random(derive_seed(settings.seed, iteration, "steps")).shuffle(failed)
    failed = failed[: settings.step_prompts or settings.prompts]
    sampling = Sampling(settings.max_tokens, settings.temperature, seed=derive_seed(settings.seed, iteration, "step"))
    tasks = [
        regenerate_step(engine, trajectory, step, f"step {s}#{g}", sampling, settings.suffix_tokens)
        for s, (trajectory, step) in enumerate(failed)
        for g in range(settings.group)
    ]
    samples = drive(tasks, engine, executor)
    examples: list[Example] = []
    counts: Counter = Counter(step_prompts=len(failed), step_samples=sum(s is not None for s in samples))
    for s in range(len(failed)):
        kept = [sample for sample in samples[s * settings.group : (s + 1) * settings.group] if sample is not None]
        rewards = [sample.reward for sample in kept]
        counts["step_passed"] += int(sum(rewards))
        reason = signal(rewards, settings.group)
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
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=settings.weight_decay
    )
    reference = copy.deepcopy(model) if settings.kl_coef else None  # before a checkpoint is loaded
    progress = restore(run, model, optimizer) or {"iteration": 0, "cursor": 0}
    start, cursor = progress["iteration"], progress["cursor"]
    engine.update_weights(model.named_parameters())  # those of the checkpoint
    for name in ("metrics.jsonl", "trajectories.jsonl"):
        run.rewind(name, lambda record: record["step"] < start)
    bar = tqdm(total=settings.iterations, initial=start, desc="rl", unit="iteration")
    for iteration in range(start, settings.iterations):
        clock = [time.perf_counter()]
        examples, trajectories, cursor, counts = sample_trajectories(
            engine, executor, problems, cursor, iteration, settings, bar
        )
        clock.append(time.perf_counter())
        if settings.step_coef:
            bar.set_postfix_str("steps")
            steps, step_counts = sample_steps(engine, executor, trajectories, iteration, settings)
            examples, counts = examples + steps, counts + step_counts
        clock.append(time.perf_counter())
        bar.set_postfix_str("updating")
        metrics: dict[str, float] = {}
        if examples:
            if settings.sampler == "vllm":
                engine.sleep()  # until the new weights come: its memory is the trainer's meanwhile
            random.Random(derive_seed(settings.seed, iteration, "batches")).shuffle(examples)
            if settings.updates > 1:
                fill_logps(model, examples, "logp_old", settings)
            if settings.kl_coef:
                fill_logps(reference, examples, "logp_ref", settings)
            size = -(-len(examples) // settings.updates)
            for u in range(0, len(examples), size):
                metrics = update(model, optimizer, examples[u : u + size], settings)
            engine.update_weights(model.named_parameters())
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
        if (iteration + 1) % settings.save_every == 0:
            save_checkpoint(run, model, optimizer, {"iteration": iteration + 1, "cursor": cursor})
    bar.close()


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(Settings, __doc__, argv)
    with user_errors():
        if settings.estimator != "grpo":
            raise UserError(f"--estimator {settings.estimator}: only 'grpo' is there")
        if settings.sampler not in ("hf", "vllm"):
            raise UserError(f"--sampler {settings.sampler}: 'hf' or 'vllm'")
        at_least(
            settings, iterations=1, prompts=1, group=2, updates=1, max_draws=1, rows=1, micro_tokens=1, save_every=1
        )
        if settings.temperature <= 0:
            raise UserError(f"--temperature {settings.temperature}: above 0 is wanted, RL needs samples")
        run = Run(settings.out, settings, settings.resume)
    with user_errors("--data"):
        problems = load_problems(settings.data, split=settings.split, limit=settings.limit, seed=settings.seed)
    with Executor(timeout=settings.timeout) as executor:
        with user_errors():
            model, tokenizer = load_policy(settings.model, settings.device)
            if settings.sampler == "vllm":
                engine = VLLMEngine(model_source(settings.model), settings.rows, score=partial(score_text, model))
            else:
                engine = HFEngine(model, tokenizer, max_rows=settings.rows)
            run.start()
        train(model, tokenizer, engine, executor, problems, run, settings)
        with run.whole_folder("final") as folder:
            save_policy(model, tokenizer, folder)
        print(f"model in {run / 'final'}")
        if settings.evaluate:
            summary, _ = evaluate(engine, executor, held_out(), HELD_OUT_SAMPLING, "after RL")
            run.write_json("eval.json", summary)
            print(table([("after RL", summary)]))


if __name__ == "__main__":
    run_main(main)
