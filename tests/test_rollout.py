"""Tests of the token ledger, self-correction, step regeneration, and the event loop."""

import base64
import dataclasses
import json
import struct

import pytest
from conftest import ScriptedEngine, ScriptedExecutor, passes_unless_bad
from hypothesis import given, settings
from hypothesis import strategies as st

from thor.prompts import NO_ROUNDS, PROMPTS, observation_text
from thor.rollout import Sampling, drive, regenerate_step, solve, split_think
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
    for trajectory in (stopped, cut):  # without a block, all is thought
        assert trajectory.steps == [Step(0, *[len(trajectory)] * 3)]


def test_block_cut_by_the_token_limit_is_not_run(tokenizer):
    text = "a\n```python\nprint(1)\n```"
    whole, _, executor = solve_scripted(tokenizer, turns(text), Sampling(max_tokens=len(text)))
    assert executor.codes == ["print(1)\n"] and whole.finish == "length"
    cut, _, executor = solve_scripted(tokenizer, turns(text), Sampling(max_tokens=len(text) - 1))
    assert executor.codes == [] and cut.finish == "length" and cut.steps[-1].code is None


BLOCK = "```python\nprint(1)\n```"


@pytest.mark.parametrize("max_rounds", [0, 1, 2])
def test_model_may_answer_when_no_round_is_left(tokenizer, max_rounds):
    replies = turns(*[BLOCK] * (max_rounds + 1), "then \\boxed{4}")
    limits = Sampling(max_tokens=900, max_rounds=max_rounds)
    trajectory, _, executor = solve_scripted(tokenizer, replies, limits)
    assert trajectory.finish == "stop" and trajectory.reward == 1.0
    assert len(executor.codes) == len(trajectory.results) == max_rounds
    *_, refused, answer = trajectory.steps
    assert (refused.code, refused.result, refused.failed) == (None, None, False)
    notice = decode(tokenizer, trajectory.token_ids[refused.observe_start : refused.end])
    assert notice == f"\n```output\n{NO_ROUNDS}\n```\n"
    assert not any(trajectory.action_mask[refused.observe_start : refused.end])
    assert NO_ROUNDS not in trajectory.text(tokenizer, policy_only=True)
    assert answer.observe_start == answer.end == len(trajectory)


@pytest.mark.parametrize("max_rounds", [0, 1, 2])
@pytest.mark.parametrize("self_correct", [0, 3])
def test_code_after_the_notice_ends_the_trajectory(tokenizer, max_rounds, self_correct):
    limits = Sampling(max_tokens=9000, max_rounds=max_rounds)
    trajectory, engine, executor = solve_scripted(tokenizer, turns(BLOCK), limits, self_correct=self_correct)
    assert trajectory.finish == "rounds" and trajectory.reward == 0.0
    assert len(executor.codes) == max_rounds and len(engine.requests) == len(trajectory.steps) == max_rounds + 2
    assert trajectory.text(tokenizer).count(NO_ROUNDS) == 1 and trajectory.text(tokenizer).endswith(BLOCK)


def test_rounds_are_limited_to_three_by_default(tokenizer):
    trajectory, _, executor = solve_scripted(tokenizer, turns(BLOCK))
    assert len(executor.codes) == 3 and trajectory.finish == "rounds"


def test_stop_on_failure_ends_the_trajectory_at_the_failed_block(tokenizer):
    replies = turns(BLOCK, "```python\nbad\n```", "x")
    trajectory, _, _ = solve_scripted(tokenizer, replies, stop_on_failure=True)
    assert trajectory.finish == "failed_code" and [step.failed for step in trajectory.steps] == [False, True]
    corrected, _, _ = solve_scripted(
        tokenizer, turns("```python\nbad\n```", BLOCK, "x"), stop_on_failure=True, self_correct=1
    )
    assert corrected.finish == "stop" and corrected.corrections == 1


def test_context_length_of_the_model_ends_a_trajectory(tokenizer):
    prompt = len(PROMPTS["tool"].render(tokenizer, PROBLEM.question))
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


def test_suffix_has_100_tokens_by_default(tokenizer):
    replies = turns("a" * 150 + "\n```python\nbad\n```", "\n" + BLOCK, "end")
    trajectory, _, _ = solve_scripted(tokenizer, replies, self_correct=1)
    assert trajectory.text(tokenizer).startswith("a" * 51 + "\n```python\nprint(1)")


def test_listener_hears_text_output_and_corrections_in_order(tokenizer):
    heard = []

    def listener(kind, text):
        if heard and heard[-1][0] == kind == "text":
            text = heard.pop()[1] + text
        heard.append((kind, text))

    bad, replies = "a\n```python\nbad\n```", turns("a\n```python\nbad\n```", "b\n" + BLOCK, "end")
    _, _, executor = solve_scripted(tokenizer, replies, self_correct=1, listener=listener)
    results = [executor.judge(code) for code in executor.codes]
    failed, output = (observation_text(result.observation(), "") for result in results)
    assert heard == [
        ("text", bad),
        ("correction", failed),
        ("text", "b\n" + BLOCK),
        ("output", output),
        ("text", "end"),
    ]


def test_trajectory_continues_when_self_corrections_are_used_up(tokenizer):
    trajectory, _, executor = solve_scripted(
        tokenizer, lambda r, t: "```python\nbad\n```" if t < 4 else "end", self_correct=3
    )
    assert len(executor.codes) == 4 and trajectory.corrections == 3
    assert [s.failed for s in trajectory.steps] == [True, False] and trajectory.finish == "stop"


def test_each_step_has_all_tries_and_corrections_cost_no_round(tokenizer):
    """Two steps with two failures each, and then no round is left."""
    bad = "```python\nbad\n```"
    replies = turns("one\n" + bad, bad, BLOCK, "two\n" + bad, bad, BLOCK, BLOCK, "end")
    limits = Sampling(max_tokens=9000, max_rounds=2)
    trajectory, _, executor = solve_scripted(tokenizer, replies, limits, self_correct=2, suffix_tokens=0)
    assert executor.codes == ["bad\n", "bad\n", "print(1)\n"] * 2
    assert [step.retries for step in trajectory.steps] == [2, 2, 0, 0] and trajectory.corrections == 4
    assert [result.passed for result in trajectory.results] == [True, True] and trajectory.finish == "stop"


steps_of_tries = st.lists(
    st.tuples(st.lists(thoughts, max_size=4), thoughts), max_size=4
)  # per step: the thoughts of failed tries and of the one that passes


@settings(max_examples=60, deadline=None)
@given(steps_of_tries, st.integers(0, 4), st.integers(0, 9), st.sampled_from([2000, 300, 60]))
def test_self_correction_counts_every_token(tokenizer, steps, self_correct, suffix, max_tokens):
    texts = []
    for failed, passed in steps:
        texts += [f"{think}\n```python\nbad\n```" for think in failed]
        texts.append(f"{passed}\n```python\nprint(1)\n```")
    limits = Sampling(max_tokens=max_tokens, max_rounds=99)
    options = {"self_correct": self_correct, "suffix_tokens": suffix}
    trajectory, engine, executor = solve_scripted(tokenizer, turns(*texts, "end"), limits, **options)

    sampled = sum(len(completion.token_ids) for completion in engine.completions)
    assert trajectory.num_sampled + trajectory.discarded == sampled
    assert trajectory.corrections == len(executor.codes) - len(trajectory.results)
    assert all(step.retries <= self_correct for step in trajectory.steps)
    assert all(step.retries == self_correct for step in trajectory.steps if step.failed)
    # each request continues the one before it, or starts from a part of it
    kept = list(trajectory.prompt_ids)
    for request, completion in zip(engine.requests, engine.completions, strict=True):
        assert request.token_ids[: len(trajectory.prompt_ids)] == trajectory.prompt_ids
        common = min(len(kept), len(request.token_ids))
        assert request.token_ids[:common] == kept[:common]
        kept = request.token_ids + completion.token_ids
        assert request.max_tokens == max_tokens - len(request.token_ids) + len(trajectory.prompt_ids)
    assert trajectory.all_token_ids[: len(kept)] == kept[: len(trajectory.all_token_ids)]
    seeds = [request.seed for request in engine.requests]
    assert len(set(seeds)) == len(seeds)


def sampled_from(request):
    """All that determines what an engine samples for a request."""
    return dataclasses.replace(request, stop=None)


def test_without_corrections_it_is_plain_inference(tokenizer):
    replies = turns("a\n```python\nprint(1)\n```", "b\n```python\nbad\n```", BLOCK, "end")
    plain, engine, _ = solve_scripted(tokenizer, replies)
    off, engine_off, _ = solve_scripted(tokenizer, replies, self_correct=0, suffix_tokens=7)
    assert off == plain and list(map(sampled_from, engine_off.requests)) == list(map(sampled_from, engine.requests))
    on, engine_on, _ = solve_scripted(tokenizer, replies, self_correct=1)
    assert on.corrections == 1  # and the requests are the same until the first failure
    assert list(map(sampled_from, engine_on.requests[:2])) == list(map(sampled_from, engine.requests[:2]))


def test_correction_without_room_for_a_new_block(tokenizer):
    first = "abcdefghij\n```python\nbad\n```"
    limits = Sampling(max_tokens=len(first))
    cut, _, _ = solve_scripted(tokenizer, turns(first, "x" * 99), limits, self_correct=1, suffix_tokens=3)
    assert cut.finish == "length" and cut.text(tokenizer) == "abcdefgh" + "x" * (len(first) - 8)
    # each try ends at the limit, so that nothing is left to sample but the observation of the last one
    engine = ScriptedEngine(tokenizer, turns(first, "\n```python\nbad\n```" + "\n" * 9), context=10**6)
    spent, _, executor = solve_scripted(tokenizer, engine.reply, limits, self_correct=1, suffix_tokens=3)
    assert spent.finish == "length" and len(executor.codes) == 2 and spent.steps[-1].failed


def test_fence_within_a_line_after_backtracking_opens_no_block(tokenizer):
    replies = turns("abc\n```python\nbad\n```", "```python\nprint(1)\n```\nno block", "end")
    trajectory, _, executor = solve_scripted(tokenizer, replies, self_correct=1, suffix_tokens=2)
    assert trajectory.text(tokenizer) == "ab```python\nprint(1)\n```\nno block" and executor.codes == ["bad\n"]
    assert trajectory.finish == "stop"


def test_infra_is_retried_and_then_reported(tokenizer):
    trajectory, _, executor = solve_scripted(
        tokenizer, turns("```python\n1\n```"), judge=lambda code: ExecResult("infra")
    )
    assert trajectory.finish == "infra" and len(executor.codes) == 3
    assert (trajectory.steps[0].code, trajectory.steps[0].result) == (None, None)
    results = iter([ExecResult("infra"), ExecResult("ok", "1")])
    trajectory, _, _ = solve_scripted(tokenizer, turns("```python\n1\n```", "end"), judge=lambda code: next(results))
    assert trajectory.finish == "stop" and trajectory.steps[0].result.passed


# ---- plain reasoning ------------------------------------------------------------------------------------------------


def test_prompt_without_tools_runs_no_code(tokenizer):
    heard = []
    text = f"so\n{BLOCK}\nand \\boxed{{4}}"
    options = {"prompt": PROMPTS["plain"], "listener": lambda kind, piece: heard.append((kind, piece))}
    trajectory, engine, executor = solve_scripted(tokenizer, turns(text), **options)
    assert trajectory.text(tokenizer) == text and trajectory.finish == "stop" and trajectory.reward == 1.0
    assert executor.codes == [] and len(engine.requests) == 1
    [step] = trajectory.steps
    assert (step.act_start, step.observe_start, step.code) == (len(trajectory), len(trajectory), None)
    assert {kind for kind, _ in heard} == {"text"} and "".join(piece for _, piece in heard) == text
    assert trajectory.prompt_ids == PROMPTS["plain"].render(tokenizer, PROBLEM.question)


def test_default_prompt_is_that_of_the_tool(tokenizer):
    trajectory, _, _ = solve_scripted(tokenizer, turns("x"))
    assert trajectory.prompt_ids == PROMPTS["tool"].render(tokenizer, PROBLEM.question)


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


def test_limits_and_prefix_of_a_regenerated_step(tokenizer):
    """It may become as long as its trajectory could, and shares all of its prompt but the last token."""
    trajectory = two_failures(tokenizer)
    step = trajectory.steps[1]
    kept = step.act_start - 4
    for context, max_tokens in ((10**6, 300), (len(trajectory.prompt_ids) + kept + 20, 1000)):
        engine = ScriptedEngine(tokenizer, turns("x"), context=context)
        drive([regenerate_step(engine, trajectory, step, "s", Sampling(max_tokens), 4)], engine, ScriptedExecutor(None))
        [request] = engine.requests
        assert request.token_ids == trajectory.all_token_ids[: len(trajectory.prompt_ids) + kept]
        assert request.max_tokens == min(max_tokens - kept, context - len(request.token_ids)) > 0
        assert request.shared == len(request.token_ids) - 1


def test_regenerated_block_that_starts_within_r_pre(tokenizer):
    """The thought "``" is kept, and the sample completes the fence."""
    trajectory = solve_scripted(tokenizer, turns("a\n``x\n```python\nbad\n```", "end"))[0]
    engine = ScriptedEngine(tokenizer, turns("`python\nprint(1)\n```"))
    task = regenerate_step(engine, trajectory, trajectory.steps[0], "s", ROOMY, 2)
    [sample] = drive([task], engine, ScriptedExecutor(passes_unless_bad))
    assert sample.prompt_ids == trajectory.prompt_ids + trajectory.token_ids[:4]
    [step] = sample.steps
    assert (step.think_start, step.act_start, step.observe_start, step.end) == (0, 0, len(sample), len(sample))
    assert step.code == "print(1)\n" and sample.finish == "stop" and sample.reward == 1.0


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


# ---- requests and seeds ---------------------------------------------------------------------------------------------


def test_defaults_of_sampling():
    expected = {"max_tokens": 256, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 0}
    assert dataclasses.asdict(Sampling()) == expected | {"max_rounds": 3, "observation_limit": 256}


def test_each_request_has_the_settings_of_the_sampling(tokenizer):
    sampling = Sampling(max_tokens=70, temperature=0.7, top_p=0.9, top_k=5)
    trajectory, engine, _ = solve_scripted(tokenizer, turns(BLOCK, "end"), sampling)
    again = ScriptedEngine(tokenizer, turns(BLOCK))
    task = regenerate_step(again, trajectory, trajectory.steps[0], "s", sampling, 9)
    drive([task], again, ScriptedExecutor(passes_unless_bad))
    for request in engine.requests + again.requests:
        assert (request.temperature, request.top_p, request.top_k) == (0.7, 0.9, 5)
    length = trajectory.steps[0].end
    assert [request.max_tokens for request in engine.requests] == [70, 70 - length]


def test_observation_has_the_length_of_the_sampling(tokenizer):
    def prints_much(code):
        return ExecResult("ok", "x" * 999)

    for limit in (10, 20):
        sampling = Sampling(max_tokens=2000, observation_limit=limit)
        trajectory, _, _ = solve_scripted(tokenizer, turns(BLOCK, "end"), sampling, prints_much)
        assert trajectory.text(tokenizer).count("x") == limit


def requests_of(tokenizer, problems, reply=None, sampling=ROOMY, **options):
    engine = ScriptedEngine(tokenizer, reply or turns("x"))
    solve(engine, ScriptedExecutor(passes_unless_bad), problems, sampling, **options)
    return engine.requests


def test_shared_prefix_is_the_prompt_of_a_group_or_what_all_prompts_share(tokenizer):
    questions = [Problem(name, question) for name, question in [("a", "Why 1?"), ("b", "Why 23?"), ("c", "What?")]]
    [alone] = requests_of(tokenizer, questions[:1])
    assert alone.shared == 0
    for problems, common in ((questions[:2], "Why "), (questions, "Wh")):
        for request in requests_of(tokenizer, problems):
            text = decode(tokenizer, request.token_ids[: request.shared])
            assert text == decode(tokenizer, PROMPTS["tool"].render(tokenizer, "Why")).partition("Why")[0] + common
    group = requests_of(tokenizer, [questions[0], questions[1], questions[0]])
    assert [request.shared for request in group if request.id != "b#0"] == [len(alone.token_ids) - 1] * 2
    [single] = [request for request in group if request.id == "b#0"]
    assert 0 < single.shared < len(single.token_ids) - 1


def test_derived_seeds_are_distinct_and_repeatable():
    assert derive_seed(1, 2, "a") == derive_seed(1, 2, "a")
    assert len({derive_seed(s, i, n) for s in range(5) for i in range(5) for n in "ab"}) == 50


def test_every_turn_and_every_correction_has_a_seed_that_depends_on_the_seed_and_the_name(tokenizer):
    bad = "```python\nbad\n```"  # its corrections start from the same tokens
    problems = [PROBLEM, PROBLEM, Problem("q", PROBLEM.question)]
    seeds = []
    for seed in (0, 1):
        sampling = Sampling(max_tokens=900, seed=seed)
        requests = requests_of(tokenizer, problems, turns(bad, bad, bad, "end"), sampling, self_correct=2)
        seeds += [request.seed for request in requests]
    assert len(seeds) == len(set(seeds)) == 2 * 3 * 4


def test_seeds_of_a_problem_do_not_depend_on_the_other_problems(tokenizer):
    others = [Problem(str(i), "What?", "") for i in range(3)]
    seeds = []
    for problems in ([*others, PROBLEM, PROBLEM], [PROBLEM, others[0], PROBLEM]):
        requests = requests_of(tokenizer, problems)
        seeds.append(sorted(r.seed for r in requests if r.id.startswith("p#")))
    assert seeds[0] == seeds[1] and len(set(seeds[0])) == 2


def test_seed_of_a_regenerated_step_depends_on_the_seed_and_the_name(tokenizer):
    trajectory = two_failures(tokenizer)
    engine = ScriptedEngine(tokenizer, turns("x"))
    tasks = [
        regenerate_step(engine, trajectory, trajectory.steps[0], name, Sampling(seed=seed), 9)
        for name in "ab"
        for seed in (0, 1)
    ]
    for task in tasks:
        drive([task], engine, ScriptedExecutor(None))
    assert len({request.seed for request in engine.requests}) == 4
