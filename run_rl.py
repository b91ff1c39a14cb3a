r"""Stage 3, hierarchical RL: whole trajectories are rewarded for the answer, single steps for code that passes.

    python run_rl.py                                      # the demo model, from runs/sft/final
    python run_rl.py --model runs/sft-7b/final --data dapo.jsonl --prompts 128 --group 16 --lr 1e-6 ...
    torchrun --nproc_per_node=8 run_rl.py ...             # many GPUs; `accelerate launch` works too

One iteration, with policy pi_theta (paper, section 3.2):

    sample      G trajectories tau_i for each of P problems;  R_i = 1 if the answer is right, else 0; improper ones
                (cut off, no box near the end, too short) get 0 or are dropped, see --improper
    filter      drop groups with too few samples, and groups of equal rewards (then draw other problems)
    A_i         = (R_i - mean(R)) / (std(R) + eps)                     on all action tokens of tau_i  (population's std)
    step set    for at most P failed steps, see --step_problems: regenerate the last L_suffix tokens of the thought
                and the block G times;  R' = 1 if the block passed, else 0 (no block: dropped)
    A'_j        = the same normalisation of R'                         on suffix and block only (see regenerate_step)
    ratio       = exp(logp - logp_old)
    l           = -min(ratio A, clip(ratio, 1 - eps_low, 1 + eps_high) A),  at most -c A where A < 0  (dual clip),
                times the importance weight min(exp(logp_old - logp_sampler), is_cap) of the token or sequence
    L           = mean_trajectory_tokens(l) + step_coef mean_step_tokens(l) + nll_coef mean_{A > 0, both levels}(-logp)

With --estimator ppo, A comes from GAE on a value head, token by token, and value_coef times a value loss is added to l.
With --kl_coef, so is a KL to the initial model: groups of equal rewards have no gradient that would keep it close.

With HFEngine on the CPU a run is reproducible bit for bit, also when it is killed and resumed (set --kv_tokens if
scarce memory limits how many requests decode at once). On GPUs it is not, because kernels sum in no fixed order.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from tqdm import tqdm

from thor.data import load_problems
from thor.demo import DEMO_MODEL
from thor.distributed import cpu_workers, gather, rank, start_ranks, world_size
from thor.engines import HFEngine, VLLMEngine, is_reproducible
from thor.prompts import PROMPTS, Prompt
from thor.rollout import Sampling, drive, regenerate_step, solve
from thor.run_folder import Run, base_model, spread
from thor.sandbox import Executor
from thor.settings import (
    PROMPT_HELP,
    UserError,
    by_model,
    derive_seed,
    fill_defaults,
    parse_settings,
    prompt_for,
    run_main,
    setting,
    user_errors,
)
from thor.training import load_model, model_source
from thor.training.model import add_value_head, policy_parameters, reference_copy, sampling_copy, save_model
from thor.training.ppo import ppo_advantages, value_loss
from thor.training.problems import ProblemQueue, pass_rates
from thor.training.scoring import Scores, score_text
from thor.training.trainer import Batch, Sample, Trainer, TrainSettings, split_evenly
from thor.training.validation import Validation, load_validation
from thor.trajectory import Step, Trajectory


@dataclass(frozen=True)
class Settings(TrainSettings):
    """Flags of run_rl.py, in addition to those of TrainSettings."""

    data: str = setting("synthetic", "problems: 'synthetic', a file, a benchmark or a hub data set", "data")
    split: str = setting("train", "split of 'synthetic' or of a hub data set", "data")
    limit: int | None = by_model(128, None, "number of problems, the first ones of a file", "data", min=1)
    model: str = setting("runs/sft/final", "name of the demo model, folder or hub id", "model")
    prompt: str = setting("", PROMPT_HELP, "model")
    sampler: Literal["hf", "vllm"] = setting("hf", "engine: 'hf' is HFEngine, 'vllm' is vLLM in this process", "model")
    prompts: int = setting(8, "P, problems, and maximum failed steps, per iteration (paper: 128)", "sampling", min=1)
    group: int = setting(8, "G, trajectories per problem and samples per failed step (paper: 16)", "sampling", min=1)
    pass_rate_range: str = setting(
        "0.05,0.95", "skip most problems with another pass rate; 0,1: skip none (paper)", "sampling"
    )
    max_draws: int = setting(3, "maximum number of times that problems are drawn per iteration", "sampling", min=1)
    max_tokens: int = by_model(144, 3200, "maximum response length in tokens (paper: 3,200)", "sampling", min=1)
    max_rounds: int = by_model(3, 5, "maximum tool calls per trajectory (paper: 5)", "sampling", min=0)
    temperature: float = setting(1.0, "sampling temperature, also used in training (paper: 1.0)", "sampling", above=0)
    suffix_tokens: int = setting(100, "L_suffix, thought tokens to regenerate (paper: 100)", "sampling", min=0)
    timeout: float = setting(5.0, "seconds a snippet may run", "sampling", above=0)
    memory_mb: int = setting(1024, "memory limit of a snippet in MiB", "sampling", min=1)
    estimator: Literal["grpo", "ppo"] = setting("grpo", "advantages from groups or from a value head", "objective")
    step_coef: float = setting(1.0, "weight of the step level; 0 disables it", "objective", min=0)
    nll_coef: float = setting(0.01, "weight of the NLL of tokens with A > 0 (paper: 0.01)", "objective", min=0)
    clip_low: float = setting(0.2, "eps_low: the ratio is clipped below 1 - eps_low", "objective", min=0, max=1)
    clip_high: float = setting(0.28, "eps_high: the ratio is clipped above 1 + eps_high", "objective", min=0)
    dual_clip: float = setting(3.0, "c: where A < 0 the loss is at most -c A", "objective", above=1)
    is_cap: float = setting(2.0, "cap of the importance weight exp(logp_old - logp_sampler)", "objective", above=0)
    is_level: Literal["token", "sequence"] = setting("token", "weight per token, or a sequence's product", "objective")
    kl_coef: float = by_model(0.05, 0.0, "weight of the KL to the initial model, k3 (paper: 0)", "objective", min=0)
    entropy_coef: float = setting(0.0, "weight of an entropy bonus (paper: 0)", "objective")
    improper: Literal["zero", "drop"] = setting("zero", "improper responses: reward 0, or drop (official)", "objective")
    failed_code: Literal["continue", "drop"] = setting(
        "continue", "after a block that fails, continue, or end and drop the trajectory (official run)", "objective"
    )
    step_problems: Literal["all", "solved"] = setting(
        "solved", "failed steps to regenerate: of all problems (paper), or of those with a right answer", "objective"
    )
    step_mean: Literal["separate", "joint"] = setting(
        "separate", "token means of the levels: one each, or a joint one (official code)", "objective"
    )
    min_tokens: int = setting(8, "shorter responses are improper, in tokens", "objective", min=0)
    box_window: int = setting(100, "a last \\boxed further from the end is improper, in tokens", "objective", min=1)
    gamma: float = setting(1.0, "ppo: discount per action token", "objective", min=0, max=1)
    gae_lambda: float = setting(0.95, "ppo: lambda of GAE", "objective", min=0, max=1)
    value_coef: float = setting(0.5, "ppo: weight of the value loss", "objective", min=0)
    value_clip: float = setting(0.2, "ppo: clip range of the value function", "objective", min=0)
    whiten: bool = setting(False, "ppo: scale the advantages of each level to mean 0 and std 1", "objective")
    iterations: int = by_model(6, 200, "iterations of sampling and updating", "optimisation", min=1)
    updates: int = setting(1, "optimizer steps per iteration", "optimisation", min=1)
    lr: float = by_model(4e-5, 1e-6, "peak learning rate (paper: 1e-6)", "optimisation", min=0)
    value_lr: float = setting(1e-3, "ppo: learning rate of the value head (initialised to 0)", "optimisation", min=0)
    rows: int = setting(64, "requests that decode at once", "memory", min=1)
    kv_tokens: int = setting(0, "size of the KV cache in tokens; 0: half of the free memory", "memory", min=0)
    log_trajectories: int = setting(64, "trajectories of each iteration to write to trajectories.jsonl", "run", min=0)
    out: str = setting("runs/rl", "run folder to write", "run")


# ---- filters and advantages -----------------------------------------------------------------------------------------

IMPROPER = ("unfinished", "short", "no_box")
REJECTED = ("infra", "failed_code", *IMPROPER)


def reject_reason(trajectory: Trajectory, tokenizer, settings: Settings) -> str:
    """Why a trajectory is not rewarded for its answer, one of REJECTED, or '' if it is. See --improper."""
    if trajectory.finish in ("infra", "failed_code"):
        return trajectory.finish
    if trajectory.finish != "stop":
        return "unfinished"
    if trajectory.num_sampled < settings.min_tokens:
        return "short"
    return "" if trajectory.has_box_near_end(tokenizer, settings.box_window) else "no_box"


def no_signal_reason(rewards: list[float], group: int, estimator: str = "grpo") -> str:
    """Why a group is not used for training: 'thin' (under half of its samples are proper), 'equal' rewards, or ''.

    PPO's baseline is the value head, so every sample carries a signal, also in a group of equal rewards.
    """
    if estimator == "ppo":
        return "" if rewards else "thin"
    if 2 * len(rewards) < group:
        return "thin"
    return "equal" if len(set(rewards)) < 2 else ""


def group_advantages(rewards: list[float], eps: float = 1e-6) -> list[float]:
    """A_i = (R_i - mean(R)) / (std(R) + eps), with the population's std."""
    mean = sum(rewards) / len(rewards)
    std = (sum((r - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5
    return [(r - mean) / (std + eps) for r in rewards]


def samples_of(
    mine: list[int], sampled: list[Trajectory | None], level: str, reject: Callable[..., str], settings: Settings
) -> tuple[list[Sample], list[list[Trajectory | None]], Counter]:
    """Gather the groups of all ranks, filter them, and give each sample its group advantage, at either level.

    mine: numbers of the groups that this rank sampled. sampled: their trajectories, G for each group.
    reject: why a trajectory is not rewarded, or ''. Returns (samples, all groups in order, counts).
    """
    size, samples, counts = settings.group, [], Counter(groups_kept=0, groups_equal=0, groups_thin=0, kept=0)
    own = {g: sampled[i * size : (i + 1) * size] for i, g in enumerate(mine)}
    groups = dict(sorted(item for part in gather(own) for item in part.items()))
    for group in groups.values():
        reasons = [reject(trajectory) for trajectory in group]
        counts.update(f"rejected_{reason}" for reason in reasons if reason)
        kept = []
        for trajectory, reason in zip(group, reasons, strict=True):
            if reason in IMPROPER and settings.improper == "zero":
                trajectory.reward = 0.0  # without this, nothing keeps the policy from becoming improper
                reason = ""
            if not reason:
                kept.append(trajectory)
        counts["kept"] += len(kept)
        rewards = [trajectory.reward for trajectory in kept]
        reason = no_signal_reason(rewards, size, settings.estimator)
        counts[f"groups_{reason or 'kept'}"] += 1
        if not reason:  # PPO replaces these advantages by those of its value head
            samples += [Sample(t, a, level) for t, a in zip(kept, group_advantages(rewards), strict=True)]
    return samples, list(groups.values()), counts


# ---- the objective --------------------------------------------------------------------------------------------------


def policy_loss(logp, logp_old, advantage, clip_low: float, clip_high: float, dual_clip: float):
    """l = -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), at most -dual_clip A where A < 0; all [N].

    Returns (l, info) with info: ratio [N], and clipped [N], true where a clip stops the gradient.
    """
    ratio = torch.exp(logp - logp_old)
    unclipped, clipped = -ratio * advantage, -ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
    loss = torch.maximum(unclipped, clipped)
    bound = -dual_clip * advantage
    dual = (advantage < 0) & (loss > bound)
    loss = torch.where(dual, bound, loss)
    return loss, {"ratio": ratio.detach(), "clipped": (clipped > unclipped) | dual}


PER_TOKEN = ("clip_fraction", "ratio", "entropy", "mismatch_kl", "loss_value")  # metrics that are means over tokens


def hierarchical_loss(batch: Batch, scores: Scores, settings: Settings) -> tuple[torch.Tensor, dict[str, float]]:
    """The contribution of a micro-batch's N action tokens to L. Returns (loss, info of sums over the N tokens).

    Prompt and tool output are not among them. Each mean divides by `batch.counts`, of the whole optimizer batch.
    """
    logp, advantage, counts = scores.logp, batch.advantage, batch.counts
    # with one optimizer step per iteration logp_old is logp itself, and needs no forward pass of its own
    logp_old = logp.detach() if batch.logp_old is None else batch.logp_old
    clips = settings.clip_low, settings.clip_high, settings.dual_clip
    token_loss, clip = policy_loss(logp, logp_old, advantage, *clips)
    unknown = batch.logp_sampler.isnan()  # the engine reported no log-prob: weight 1
    gap = (logp_old - batch.logp_sampler).masked_fill(unknown, 0.0)
    weight = torch.exp(gap)
    if settings.is_level == "sequence":
        weight = torch.cat([gap[:0], *(part.sum().exp().expand(len(part)) for part in gap.split(batch.lengths))])
    token_loss = token_loss * weight.clamp(max=settings.is_cap)
    info = {}
    if batch.logp_ref is not None:
        token_loss = token_loss + settings.kl_coef * (torch.exp(batch.logp_ref - logp) - 1 - (batch.logp_ref - logp))
    if settings.entropy_coef:
        token_loss = token_loss - settings.entropy_coef * scores.entropy
    if settings.estimator == "ppo":
        value = torch.where(batch.is_step, scores.value[:, 1], scores.value[:, 0])
        errors = value_loss(value, batch.value_old, batch.returns, settings.value_clip)
        token_loss = token_loss + settings.value_coef * errors
        info["loss_value"] = errors.sum().item()
    tokens = counts.trajectory, counts.step
    if settings.step_mean == "joint":
        tokens = sum(tokens), sum(tokens)
    loss_trajectory = token_loss[~batch.is_step].sum() / max(1, tokens[0])
    loss_step = token_loss[batch.is_step].sum() / max(1, tokens[1])
    nll = -logp[advantage > 0].sum() / max(1, counts.positive)
    loss = loss_trajectory + settings.step_coef * loss_step + settings.nll_coef * nll
    return loss, info | {
        "loss_trajectory": loss_trajectory.item(),
        "loss_step": loss_step.item(),
        "nll": nll.item(),
        "clip_fraction": clip["clipped"].sum().item(),
        "ratio": clip["ratio"].sum().item(),
        "entropy": scores.entropy.sum().item(),
        "mismatch_kl": (torch.exp(gap.clamp(max=20)) - 1 - gap).sum().item(),  # k3 estimate of KL(sampler, old)
        "logp_unknown": unknown.sum().item(),
    }


def per_token(metrics: dict[str, float]) -> dict[str, float]:
    """Divide those of the summed metrics that are means by the action tokens of the optimizer batch."""
    tokens = max(1, metrics.get("tokens_trajectory", 0) + metrics.get("tokens_step", 0))
    return {name: value / tokens if name in PER_TOKEN else value for name, value in metrics.items()}


def add_old_scores(trainer: Trainer, samples: list[Sample], settings: Settings) -> None:
    """Set what the loss compares new scores with: logp_old, logp_ref, and for PPO values, advantages and returns."""
    if settings.updates > 1 or settings.estimator == "ppo":
        for sample, (logp, value) in zip(samples, trainer.score(samples), strict=True):
            sample.logp_old = logp
            sample.value_old = None if value is None else value[:, int(sample.level == "step")]
    if settings.estimator == "ppo":
        ppo_advantages(samples, settings)
    if trainer.reference:
        for sample, (logp, _) in zip(samples, trainer.score(samples, trainer.reference), strict=True):
            sample.logp_ref = logp


# ---- sampling -------------------------------------------------------------------------------------------------------


def sample_trajectories(engine, executor, queue: ProblemQueue, iteration: int, settings: Settings, bar, prompt: Prompt):
    """Trajectory level: draw problems, sample and filter, until P groups carry a signal or the draws are used up.

    Each rank samples whole groups, so that a prompt is computed once, and then gets those of all ranks.
    Returns (samples, all trajectories, counts).
    """
    samples: list[Sample] = []
    everything: list[Trajectory] = []
    counts = Counter({f"rejected_{reason}": 0 for reason in REJECTED} | {"groups_kept": 0, "draws": 0})
    tokenizer, finished = engine.tokenizer, Counter()  # on this rank, for the bar

    def done(i: int, trajectory: Trajectory) -> None:
        finished["trajectories"] += 1
        bar.set_postfix_str(f"draw {counts['draws']}, {finished['trajectories']} sampled", refresh=False)
        bar.update(0)

    reject = partial(reject_reason, tokenizer=tokenizer, settings=settings)
    while counts["groups_kept"] < settings.prompts and counts["draws"] < settings.max_draws:
        drawn = queue.draw(settings.prompts - counts["groups_kept"])
        counts["draws"] += 1
        seed = derive_seed(settings.seed, iteration, counts["draws"])
        sampling = Sampling(settings.max_tokens, settings.temperature, seed=seed, max_rounds=settings.max_rounds)
        # a problem drawn twice stays on one rank, which numbers its samples; each draw starts with another rank
        ids = list(dict.fromkeys(problem.id for problem in drawn))
        mine = [g for g, p in enumerate(drawn) if (counts["draws"] + ids.index(p.id)) % world_size() == rank()]
        repeated = [drawn[g] for g in mine for _ in range(settings.group)]
        options = {"stop_on_failure": settings.failed_code == "drop", "deterministic": is_reproducible(engine)}
        sampled = solve(engine, executor, repeated, sampling, prompt=prompt, done=done, **options)
        new, groups, group_counts = samples_of(mine, sampled, "trajectory", reject, settings)
        samples += new
        everything += [trajectory for group in groups for trajectory in group]
        counts.update(group_counts)
        for problem, group in zip(drawn, groups, strict=True):
            queue.record(problem, [t.reward for t in group if t.finish != "infra"])
    counts["groups"] = counts["groups_kept"] + counts["groups_equal"] + counts["groups_thin"]
    counts["draws_capped"] = int(counts["groups_kept"] < settings.prompts)
    counts["sampled"] = len(everything)
    return samples, everything, counts


def failed_steps(trajectories: list[Trajectory], source: str = "all") -> list[tuple[Trajectory, Step]]:
    """The prompts of the step level: every failed step of every trajectory, proper or not.

    source: 'all', or 'solved' for problems with a right answer in this iteration. A block that runs is worth something
    only if it helps to solve the problem. On problems out of reach nothing else is rewarded, so that the policy learns
    to write blocks that run and compute something easier.
    """
    solved = {t.problem.id for t in trajectories if t.reward}
    chosen = [t for t in trajectories if t.finish != "infra" and (source == "all" or t.problem.id in solved)]
    return [(t, step) for t in chosen for step in t.steps if step.failed]


def sample_steps(engine, executor, trajectories: list[Trajectory], iteration: int, settings: Settings):
    """Step level: regenerate suffix and block of each failed step G times. Returns (samples, counts)."""
    failed = failed_steps(trajectories, settings.step_problems)
    random.Random(derive_seed(settings.seed, iteration, "steps")).shuffle(failed)
    failed = failed[: settings.prompts]
    sampling = Sampling(settings.max_tokens, settings.temperature, seed=derive_seed(settings.seed, iteration, "step"))
    mine = list(range(rank(), len(failed), world_size()))
    tasks = [
        regenerate_step(engine, *failed[s], f"step {s}#{g}", sampling, settings.suffix_tokens)
        for s in mine
        for g in range(settings.group)
    ]
    sampled = drive(tasks, engine, executor, deterministic=is_reproducible(engine))
    samples, groups, counts = samples_of(mine, sampled, "step", lambda s: "no_block" if s is None else "", settings)
    return samples, {
        "step_prompts": len(failed),
        "step_samples": counts["kept"],
        "step_passed": sum(r.passed for group in groups for sample in group if sample for r in sample.results),
        **{f"step_groups_{what}": counts[f"groups_{what}"] for what in ("kept", "equal", "thin")},
    }


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


def train(
    model, tokenizer, engine, executor, problems, run: Run, settings: Settings, prompt=PROMPTS["tool"], validate=None
) -> None:
    """All iterations, from the run's checkpoint if there is one. validate: see Trainer."""
    reference = reference_copy(model) if settings.kl_coef else None  # before the checkpoint is loaded
    if settings.estimator == "ppo":
        add_value_head(model)
    trainer = Trainer(model, run, settings, settings.temperature, settings.value_lr, reference, validate)
    queue = ProblemQueue(problems, settings.seed, *pass_rates(settings.pass_rate_range))
    queue.state = trainer.state.setdefault("queue", queue.state)
    loss = partial(hierarchical_loss, settings=settings)
    for iteration in trainer.iterations(settings.iterations, "rl", "iteration"):
        clock = [time.perf_counter()]
        engine.update_weights(policy_parameters(model))  # in the first iteration too: a resumed run has an empty cache
        samples, trajectories, counts = sample_trajectories(
            engine, executor, queue, iteration, settings, trainer.bar, prompt
        )
        clock.append(time.perf_counter())
        if settings.step_coef:
            trainer.bar.set_postfix_str("steps")
            step_samples, step_counts = sample_steps(engine, executor, trajectories, iteration, settings)
            samples += step_samples
            counts.update(step_counts)
        clock.append(time.perf_counter())
        trainer.bar.set_postfix_str("updating")
        engine.sleep()  # until the next update_weights, the trainer can use its memory
        random.Random(derive_seed(settings.seed, iteration, "batches")).shuffle(samples)
        add_old_scores(trainer, samples, settings)
        metrics, skipped = {}, 0
        for batch in split_evenly(samples, settings.updates):
            metrics = trainer.step(batch, loss)
            skipped += int(metrics["skipped"])
            if trainer.stuck:
                break
        clock.append(time.perf_counter())
        log(run, iteration, trajectories, counts, {**metrics, "skipped": skipped}, clock)
        chosen = spread(trajectories, settings.log_trajectories)
        run.write_trajectories("trajectories.jsonl", chosen, tokenizer, step=iteration)


def log(run: Run, iteration: int, trajectories, counts: Counter, metrics: dict, clock: list[float]) -> None:
    """Write the metrics of an iteration (docs/metrics.md), and print a summary."""
    phases = ("seconds_sampling", "seconds_steps", "seconds_update")
    seconds = {name: b - a for name, (a, b) in zip(phases, pairwise(clock), strict=True)}
    rollout = rollout_metrics(trajectories)
    run.log(iteration, {**rollout, **counts, **per_token(metrics), **seconds})
    if "loss" not in metrics:
        tqdm.write(
            f"iteration {iteration}: no update, because no group carries a signal after {counts['draws']} draws "
            f"({dict(counts)}). Try easier or harder problems, or a larger --group."
        )
    tqdm.write(
        f"iteration {iteration}: reward {rollout['reward']:.3f}  code pass {rollout['code_pass_rate']:.3f}  "
        f"groups {counts['groups_kept']}/{counts['groups']}  "
        f"step groups {counts['step_groups_kept']}/{counts['step_prompts']}  "
        f"seconds {' + '.join(f'{s:.0f}' for s in seconds.values())}"
    )


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(Settings, __doc__, argv)
    with user_errors():
        device = start_ranks(settings.device, settings.rank_timeout)
        settings = fill_defaults(settings, base_model(settings.model), DEMO_MODEL)
        if settings.estimator == "grpo" and settings.group < 2:
            raise UserError(f"--group {settings.group}: must be at least 2 with --estimator grpo")
        run, prompt = Run(settings.out, settings, settings.resume), prompt_for(settings.prompt, settings.model)
    with user_errors("--data"):
        problems = load_problems(settings.data, split=settings.split, limit=settings.limit, seed=settings.seed)
        if unknown := [problem.id for problem in problems if not problem.answer]:
            raise UserError(f"{settings.data}: {unknown[0]} has no answer; RL rewards answers, not the tests of code")
    held_out = load_validation(settings, demo=settings.data == "synthetic")
    with run, Executor(cpu_workers(), settings.timeout, settings.memory_mb) as executor:
        with user_errors():
            model, tokenizer = load_model(settings.model, device)
            prompt.render(tokenizer, "?")  # the chat template may refuse it
            if settings.sampler == "vllm":
                engine = VLLMEngine(model_source(settings.model), settings.rows, score=partial(score_text, model))
            else:
                engine = HFEngine(sampling_copy(model), tokenizer, settings.rows, kv_tokens=settings.kv_tokens or None)
            run.start()
        sampling = Sampling(settings.max_tokens, max_rounds=settings.max_rounds)
        validate = Validation(run, settings, held_out, engine, executor, sampling, prompt)
        train(model, tokenizer, engine, executor, problems, run, settings, prompt, validate)
        with run.whole_folder("final") as folder:
            save_model(model, tokenizer, folder, prompt)
            validate.save_scores(folder)
        print(validate.report())


if __name__ == "__main__":
    run_main(main, many_ranks=True)
