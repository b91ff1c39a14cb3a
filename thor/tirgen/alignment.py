"""Policy alignment (paper, section 3.1): does the actor find the trajectories likely that it is to learn?"""

from __future__ import annotations

from thor.engines import Engine, RequestRejected, is_reproducible
from thor.rollout import Sampling, solve
from thor.sandbox import Executor
from thor.text import decode
from thor.tirgen.draft import Draft, to_ledger
from thor.trajectory import Trajectory


def policy_alignment(
    actor: Engine, critic: Engine, executor: Executor, drafts: list[Draft], sampling: Sampling
) -> dict[str, float | int | None]:
    """Mean log-prob per token under the actor, of the drafts and of the critic's own solutions of the same problems.

    The critic solves each problem once, with the default prompt and the tools of the policy. Solutions that a limit
    ended, and texts longer than the actor's context, are left out. Tool output is not scored. None if nothing is left.
    """
    deterministic = is_reproducible(critic)
    problems = [draft.problem for draft in drafts]
    try:
        solutions = solve(critic, executor, problems, sampling, deterministic=deterministic)
    except RequestRejected as error:  # it would be again, and a resumed run would end here too
        print(f"{error}; the critic's own solutions are not scored")
        solutions = []
    texts = {
        "trajectories": [(draft.problem, draft.segments) for draft in drafts],
        "critic_solutions": [(s.problem, to_segments(s, critic.tokenizer)) for s in solutions if s.finish == "stop"],
    }
    result: dict[str, float | int | None] = {}
    for name, rows in texts.items():
        ledgers = [to_ledger(problem, segments, actor.tokenizer) for problem, segments in rows]
        logps = [logp for t in ledgers if len(t.all_token_ids) < actor.context for logp in action_logps(actor, t)]
        result[name] = sum(logps) / len(logps) if logps else None
        result[f"{name}_scored"] = len(ledgers)
    return result


def action_logps(actor: Engine, trajectory: Trajectory) -> list[float]:
    """Log-probs under the actor of the tokens that the policy learns."""
    logps = actor.log_probs(trajectory.all_token_ids)
    return [logps[position - 1] for position in trajectory.action_positions]


def to_segments(trajectory: Trajectory, tokenizer) -> list[tuple[str, bool]]:
    """A sampled trajectory as text, in segments as those of a draft. Without the final EOS."""
    ids, segments = trajectory.token_ids, []
    for step in trajectory.steps:
        own = ids[step.think_start : step.observe_start]
        if step.end == len(trajectory) and own[-1:] == [tokenizer.eos_token_id]:
            own = own[:-1]
        segments += [(decode(tokenizer, own), True), (decode(tokenizer, ids[step.observe_start : step.end]), False)]
    return [segment for segment in segments if segment[0]]
