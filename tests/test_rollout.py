"""Tests of the token ledger, self-correction, step regeneration, and the event loop."""

import base64
import dataclasses
import json
import struct

import pytest
from conftest import ScriptedEngine, ScriptedExecutor, passes_unless_bad
from hypothesis import given, settings
from hypothesis import strategies as st

from thor.prompts import observation_text, render_prompt
from thor.rollout import INFRA_TRIES, Sampling, drive, regenerate_step, solve, split_think
from thor.run_folder import to_line
from thor.settings import derive_seed
from thor.text import decode
from thor.trajectory import ExecResult, Problem, Step, Trajectory

PROBLEM = Problem("p", "What?", "4")


def turns(*texts):
    """A reply function for ScriptedEngine: the n-th text on the n-th turn, and the last text on all later turns."""
    return lambda request, turn: texts[min(turn, len(texts) - 1)]


ROOMY = Sampling(max_tokens=2000)


def solve_scripted(tokenizer, reply, sampling=ROOMY, judge=passes_unless_bad, **options):
    """Solve PROBLEM with scripted replies. Returns (trajectory, engine, executor)."""
    engine, executor = ScriptedEngine(tokenizer, reply), ScriptedExecutor(judge)
    [trajectory] = solve(engine, executor, [PROBLEM], sampling, **options)
    return trajectory, engine, executor


# ---- token ledger ---------------------------------------------------------------------------------------------------

thoughts = st.text(alphabet="ab ü\n`", max_size=12)
code = st.sampled_from(["print(1)", "bad", "x = 1\nprint('```')", "é", ""])
closing = st.sampled_from(["", "\n", "\n\nmore"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(thoughts, code, closing), max_size=4), thoughts)
def test_ledger_over_several_rounds(tokenizer, blocks, last):
    texts = [f"{think}\n```python\n{source}\n```{tail}" for think, source, tail in blocks] + [last]
    trajectory, engine, executor = solve_scripted(tokenizer, turns(*texts), Sampling(max_tokens=2000, max_rounds=9))

    # the masked tokens are exactly those that the engine reported, in order and with its log-probs
    reported = [(token, lp) for c in engine.completions for token, lp in zip(c.token_ids, c.logps, strict=True)]
    ledger = zip(trajectory.token_ids, trajectory.logp_sampler, trajectory.action_mask, strict=True)
    assert [(token, lp) for token, lp, sampled in ledger if sampled] == reported
    # observation spans decode to the observation text
    for step in trajectory.steps:
        own = decode(tokenizer, trajectory.token_ids[step.think_start : step.observe_start])
        seen = decode(tokenizer, trajectory.token_ids[step.observe_start : step.end])
        assert seen == (observation_text(step.result.observation(), own) if step.result else "")
        # the act starts with the token in which the fence opens
        if step.code is not None:
            act = decode(tokenizer, trajectory.token_ids[step.act_start : step.observe_start])
            assert act.startswith("```python")
    assert [s.code for s in trajectory.steps if s.code is not None] == executor.codes
    # each request extends the previous one
    for before, after in zip(engine.requests, engine.requests[1:], strict=False):
        assert after.token_ids[: len(before.token_ids)] == before.token_ids
    # a JSON round trip changes nothing
    copy = Trajectory.from_dict(json.loads(json.dumps(trajectory.to_dict())))
    assert copy == trajectory


def test_views_of_a_ledger_of_two_turns_by_hand():
    trajectory = Trajectory(PROBLEM, [7, 8])
    trajectory.append_sampled([10, 11], [-0.5, -1.5])
    trajectory.append_observation([20, 21, 22])
    trajectory.append_sampled([12], [-2.5])
    assert trajectory.all_token_ids == [7, 8, 10, 11, 20, 21, 22, 12]
    assert trajectory.action_positions == [2, 3, 7]
    assert trajectory.action_logps == [-0.5, -1.5, -2.5]
    assert [trajectory.all_token_ids[i] for i in trajectory.action_positions] == [10, 11, 12]
    assert trajectory.num_sampled == 3 and len(trajectory) == 6


logps = st.floats(-30, 0) | st.floats(-30, 0, width=32) | st.just(float("nan"))


@given(st.lists(st.tuples(st.booleans(), logps), max_size=12))
def test_ledger_in_a_file_is_exact_for_any_mask_and_log_probs(tokens):
    trajectory = Trajectory(PROBLEM, [1], reward=0.5, finish="stop", discarded=3, corrections=1)
    for token, (sampled, logp) in enumerate(tokens):
        trajectory.append_sampled([token], [logp]) if sampled else trajectory.append_observation([token])
    copy = Trajectory.from_dict(json.loads(json.dumps(trajectory.to_dict(), allow_nan=False)))
    assert str(copy) == str(trajectory)  # not ==, because of NaN


def test_file_of_a_long_ledger_is_compact():
    trajectory = Trajectory(PROBLEM, [1])
    for _ in range(3):
        trajectory.append_sampled([12345] * 1000, [-0.5] * 1000)
        trajectory.append_observation([12345] * 100)
    record = trajectory.to_dict()
    assert record["mask_runs"] == [1000, 100] * 3 and "action_mask" not in record and "logp_sampler" not in record
    assert len(to_line(record)) / len(trajectory) < 12  # 6 bytes of the id, 16 / 3 of the log-prob
    record["logp_base64"] = base64.b64encode(struct.pack("<3000d", *[-0.1] * 3000)).decode()
    assert Trajectory.from_dict(record).action_logps == [-0.1] * 3000


def test_long_output_of_a_snippet_is_cut_in_a_file():
    result = ExecResult("error", "x" * 65536, "y" * 8192, 1.5)
    trajectory = Trajectory(PROBLEM, [1], steps=[Step(0, 0, 0, 0, "code", result), Step(0, 0, 0, 0)])
    kept = Trajectory.from_dict(trajectory.to_dict())
    assert kept.steps == [Step(0, 0, 0, 0, "code", ExecResult("error", "x" * 1000, "y" * 1000, 1.5)), Step(0, 0, 0, 0)]
    assert trajectory.results == [result]


def test_ledger_check_rejects_inconsistent_entries():
    trajectory = Trajectory(PROBLEM, [1])
    with pytest.raises(AssertionError):
        trajectory.append_sampled([1, 2], [0.0])
    trajectory.append_sampled([1, 2], [-1.0, -1.0])
    trajectory.append_observation([3])
    trajectory.steps = [Step(0, 1, 3, 3)]  # includes the observation in the act
    with pytest.raises(AssertionError):
        trajectory.check()
    trajectory.steps = [dataclasses.replace(trajectory.steps[0], observe_start=2, code="x", result=ExecResult("ok"))]
    trajectory.check()


# ---- trajectories ---------------------------------------------------------------------------------------------------


def test_eos_is_appended_only_when_sampled(tokenizer):
    stopped, _, _ = solve_scripted(tokenizer, turns("done"))
    assert stopped.finish == "stop" and stopped.token_ids[-1] == tokenizer.eos_token_id and stopped.action_mask[-1]
    cut, _, _ = solve_scripted(tokenizer, turns("too long for this"), Sampling(max_tokens=4))
    assert cut.finish == "length" and tokenizer.eos_token_id not in cut.token_ids and len(cut) == 4


def test_block_cut_by_the_token_limit_is_not_run(tokenizer):
    text = "a\n```python\nprint(1)\n```"
    whole, _, executor = solve_scripted(tokenizer, turns(text), Sampling(max_tokens=len(text)))
    assert executor.codes == ["print(1)\n"] and whole.finish == "length"
    cut, _, executor = solve_scripted(tokenizer, turns(text), Sampling(max_tokens=len(text) - 1))
    assert executor.codes == [] and cut.finish == "length" and cut.steps[-1].code is None


def test_rounds_are_limited(tokenizer):
    trajectory, _, executor = solve_scripted(
        tokenizer, turns("```python\nprint(1)\n```"), Sampling(max_tokens=900, max_rounds=2)
    )
    assert trajectory.finish == "rounds" and len(executor.codes) == 2 and len(trajectory.steps) == 3


def test_stop_on_failure_ends_the_trajectory_at_the_failed_block(tokenizer):
    trajectory, _, _ = solve_scripted(tokenizer, turns("```python\nbad\n```", "x"), stop_on_failure=True)
    assert trajectory.finish == "failed_code" and len(trajectory.steps) == 1 and trajectory.steps[0].failed


def test_context_length_of_the_model_ends_a_trajectory(tokenizer):
    prompt = len(render_prompt(tokenizer, PROBLEM.question))
    for context, sampled in ((prompt + 5, 5), (prompt, 0), (3, 0)):
        engine = ScriptedEngine(tokenizer, turns("a long answer"), context=context)
        [trajectory] = solve(engine, ScriptedExecutor(passes_unless_bad), [PROBLEM], ROOMY)
        assert trajectory.finish == "length" and trajectory.num_sampled == sampled


def test_observation_fence_starts_a_line():
    assert observation_text("1", "x\n```") == "\n```output\n1\n```\n"
    assert observation_text("1", "x\n```\n") == "```output\n1\n```\n"


def test_long_observation_is_truncated_in_the_middle():
    assert ExecResult("ok", "a" * 200 + "b" * 200).observation(256) == "a" * 128 + "..." + "b" * 128
    assert ExecResult("ok", "x" * 256 + "\n").observation(256) == "x" * 256
    assert ExecResult("no_output", "", "no output: use print()").observation() == "no output: use print()"


@pytest.mark.parametrize(("suffix", "kept"), [(4, "abcdef"), (100, ""), (0, "abcdefghij")])
def test_self_correction_backtracks_to_r_pre(tokenizer, suffix, kept):
    good = "klm\n```python\nprint(1)\n```"
    first = "abcdefghij\n```python\nbad\n```"
    suffix += bool(suffix)  # the newline before the fence is the thought's last token
    trajectory, _, executor = solve_scripted(tokenizer, turns(first, good, "end"), self_correct=2, suffix_tokens=suffix)
    assert executor.codes == ["bad\n", "print(1)\n"]
    kept += "\n" if suffix == 0 else ""
    assert trajectory.text(tokenizer, policy_only=True).startswith(kept + "klm")
    assert trajectory.corrections == 1 and trajectory.discarded == len(first) - len(kept)
    assert len(trajectory.results) == 1 and trajectory.finish == "stop"
    assert trajectory.steps[0].think_start == 0 and trajectory.steps[0].act_start == len(kept) + len("klm\n")


def test_trajectory_continues_when_self_corrections_are_used_up(tokenizer):
    trajectory, _, executor = solve_scripted(
        tokenizer, lambda r, t: "```python\nbad\n```" if t < 4 else "end", self_correct=3
    )
    assert len(executor.codes) == 4 and trajectory.corrections == 3
    assert [s.failed for s in trajectory.steps] == [True, False] and trajectory.finish == "stop"


def test_fence_within_a_line_after_backtracking_opens_no_block(tokenizer):
    replies = turns("abc\n```python\nbad\n```", "```python\nprint(1)\n```\nno block", "end")
    trajectory, _, executor = solve_scripted(tokenizer, replies, self_correct=1, suffix_tokens=2)
    assert trajectory.text(tokenizer).startswith("ab```python") and executor.codes == ["bad\n"]


def test_infra_is_retried_and_then_reported(tokenizer):
    trajectory, _, executor = solve_scripted(
        tokenizer, turns("```python\n1\n```"), judge=lambda code: ExecResult("infra")
    )
    assert trajectory.finish == "infra" and len(executor.codes) == INFRA_TRIES
    results = iter([ExecResult("infra"), ExecResult("ok", "1")])
    trajectory, _, _ = solve_scripted(tokenizer, turns("```python\n1\n```", "end"), judge=lambda code: next(results))
    assert trajectory.finish == "stop" and trajectory.steps[0].result.passed


# ---- step regeneration ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "cut"), [(2, 8), (5, 5), (6, 5), (100, 5)])
def test_split_think_keeps_the_suffix_within_the_thought(suffix, cut):
    assert split_think(Step(think_start=5, act_start=10, observe_start=14, end=20), suffix) == cut


def test_split_think_without_a_thought():
    assert split_think(Step(0, 0, 5, 9), 100) == 0


def two_failures(tokenizer) -> Trajectory:
    """A trajectory whose first two steps failed."""
    replies = turns("one\n```python\nbad1\n```", "second thought\n```python\nbad2\n```", "end")
    return solve_scripted(tokenizer, replies)[0]


def test_regenerates_either_of_two_failed_steps(tokenizer):
    trajectory = two_failures(tokenizer)
    failed = [step for step in trajectory.steps if step.failed]
    assert len(failed) == 2
    for step, suffix, r_pre in ((failed[0], 100, ""), (failed[1], 4, "second thou")):
        engine = ScriptedEngine(tokenizer, turns("X\n```python\nprint(1)\n```"))
        task = regenerate_step(engine, trajectory, step, "s", Sampling(max_tokens=2000), suffix)
        [sample] = drive([task], engine, ScriptedExecutor(passes_unless_bad))
        before = decode(tokenizer, trajectory.token_ids[: step.think_start])
        prompt = decode(tokenizer, sample.prompt_ids)
        assert prompt == decode(tokenizer, trajectory.prompt_ids) + before + r_pre
        assert decode(tokenizer, sample.token_ids) == "X\n```python\nprint(1)\n```" and all(sample.action_mask)
        assert sample.reward == 1.0 and sample.steps[0].act_start == 2


def test_regeneration_without_a_block_or_with_infra_is_none(tokenizer):
    trajectory = two_failures(tokenizer)
    step = trajectory.steps[0]
    engine = ScriptedEngine(tokenizer, turns("no block"))
    assert drive([regenerate_step(engine, trajectory, step, "s", Sampling(), 9)], engine, ScriptedExecutor(None)) == [
        None
    ]
    engine = ScriptedEngine(tokenizer, turns("```python\n1\n```"))
    infra = ScriptedExecutor(lambda code: ExecResult("infra"))
    sampling = Sampling(max_tokens=900)
    assert drive([regenerate_step(engine, trajectory, step, "s", sampling, 9)], engine, infra) == [None]


def test_regenerated_step_that_fails_has_reward_0(tokenizer):
    trajectory = two_failures(tokenizer)
    engine = ScriptedEngine(tokenizer, turns("```python\nbad\n```"))
    task = regenerate_step(engine, trajectory, trajectory.steps[0], "s", Sampling(max_tokens=900), 9)
    [sample] = drive([task], engine, ScriptedExecutor(passes_unless_bad))
    assert sample.reward == 0.0


# ---- seeds ----------------------------------------------------------------------------------------------------------


def test_derived_seeds_are_distinct_and_repeatable():
    assert derive_seed(1, 2, "a") == derive_seed(1, 2, "a")
    assert len({derive_seed(s, i, n) for s in range(5) for i in range(5) for n in "ab"}) == 50


def test_seeds_of_a_problem_do_not_depend_on_the_other_problems(tokenizer):
    others = [Problem(str(i), "What?", "") for i in range(3)]
    seeds = []
    for problems in ([*others, PROBLEM, PROBLEM], [PROBLEM, others[0], PROBLEM]):
        engine = ScriptedEngine(tokenizer, turns("x"))
        solve(engine, ScriptedExecutor(passes_unless_bad), problems, ROOMY)
        seeds.append(sorted(r.seed for r in engine.requests if r.id.startswith("p#")))
    assert seeds[0] == seeds[1] and len(set(seeds[0])) == 2
