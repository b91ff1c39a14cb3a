"""Tests of the actor-critic loop with scripted models, and of each filter stage."""

import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ScriptedEngine, ScriptedExecutor, passes_unless_bad

from run_sft import to_ledger
from run_tirgen import (
    ActorCritic,
    Draft,
    Settings,
    easy_problems,
    filter_drafts,
    keep_balanced,
    keep_correct,
    keep_one_per_problem,
    keep_substantial_code,
    keep_unrepetitive,
    keep_well_formed,
    sample_drafts,
    says_none,
    to_row,
)
from thor.demo.few_shot import DEMONSTRATIONS, nearest_demonstrations
from thor.rollout import drive
from thor.run_folder import Run
from thor.text import decode
from thor.trajectory import ExecResult, Problem

PROBLEM = Problem("p", "What is 2 + 2?", "4")


def test_demonstrations_print_their_recorded_output(executor):
    results = executor.run([d.code for d in DEMONSTRATIONS])
    for demonstration, result in zip(DEMONSTRATIONS, results, strict=True):
        assert result.passed and result.observation() == demonstration.output, demonstration.question


def test_most_similar_demonstration_comes_last():
    assert "lcm" in nearest_demonstrations("What is the least common multiple of 6 and 8?")[-1].code
    assert "primerange" in nearest_demonstrations("Count the primes between 5 and 77.")[-1].code


# ---- actor and critic -----------------------------------------------------------------------------------------------


def build(tokenizer, actor_replies, critic_replies, **settings):
    """Generate one draft with an engine that plays both actor and critic."""

    def reply(request, turn):
        replies = actor_replies if request.id.endswith("/actor") else critic_replies
        return replies[min(turn, len(replies) - 1)]

    engine, executor = ScriptedEngine(tokenizer, reply), ScriptedExecutor(passes_unless_bad)
    settings = Settings(**{"step_tokens": 400, "code_tokens": 400, "max_tokens": 4000, **settings})
    [draft] = drive([ActorCritic(engine, engine, settings).generate(PROBLEM, "p#0")], engine, executor)
    return draft, engine


BLOCK = "Add.\n```python\nprint(2 + 2)\n```"


def test_code_replaces_the_step_and_the_actor_continues_from_it(tokenizer):
    draft, engine = build(tokenizer, ["We get 5.\n", "The answer is \\boxed{4}.\n"], [BLOCK])
    assert [own for _, own in draft.segments] == [True, False, True] and draft.finished and not draft.dropped
    assert draft.segments[0][0] == "Add.\n```python\nprint(2 + 2)\n```\n"
    assert "We get 5" not in draft.text  # the actor's own result is removed
    last = engine.requests[-1]
    assert decode(tokenizer, last.token_ids).endswith(draft.segments[0][0] + draft.segments[1][0])
    assert keep_correct([draft]) == [draft]


def test_step_is_kept_if_the_critic_says_none(tokenizer):
    draft, _ = build(tokenizer, ["Think.\n", "So \\boxed{4}.\n"], [" none"])
    assert draft.text == "Think.\nSo \\boxed{4}." and draft.codes == []


def test_failing_code_is_retried_before_the_draft_is_dropped(tokenizer):
    bad = "Add.\n```python\nbad\n```"
    draft, _ = build(tokenizer, ["x\n", "\\boxed{4}\n"], [bad, BLOCK], code_tries=2)
    assert draft.codes == ["print(2 + 2)\n"] and not draft.dropped
    draft, engine = build(tokenizer, ["x\n"], [bad], code_tries=2)
    assert draft.dropped == "code_failed" and sum(r.id.endswith("critic") for r in engine.requests) == 2
    draft, _ = build(tokenizer, ["x\n"], ["no block here"], code_tries=2)
    assert draft.dropped == "no_code"


def test_windows_of_a_reasoning_model_end_at_a_newline_and_inside_think(tokenizer):
    actor = ["<think>\nline one\nline tw", "line two\n</think>\nThe answer is \\boxed{4}"]
    draft, _ = build(tokenizer, actor, ["none"], template="instruct", step_tokens=len(actor[0]))
    assert draft.text.startswith("<think>\nline one\nline two") and "line twline" not in draft.text
    draft, engine = build(tokenizer, ["<think>\nx\n</think>\n\\boxed{4}"], [BLOCK], template="instruct")
    assert not any(r.id.endswith("critic") for r in engine.requests) and draft.finished


def test_says_none_matches_the_first_word_only():
    assert says_none(" None.") and says_none("none\n") and not says_none("nonesuch") and not says_none("Add none")


def test_none_after_a_failed_attempt_keeps_the_draft(tokenizer):
    draft, _ = build(tokenizer, ["Think.\n", "So \\boxed{4}.\n"], ["no block here", "none"], code_tries=2)
    assert not draft.dropped and draft.text == "Think.\nSo \\boxed{4}."


def test_window_that_closes_think_is_not_rewritten(tokenizer):
    actor = "<think>\nx\n</think>\nThe sum is\nfour and mo"
    draft, engine = build(tokenizer, [actor, "\\boxed{4}"], [BLOCK], template="instruct", step_tokens=len(actor))
    assert draft.text == "<think>\nx\n</think>\nThe sum is\n\\boxed{4}"
    assert not any(r.id.endswith("critic") for r in engine.requests)


def test_prompt_longer_than_the_context_drops_the_draft(tokenizer):
    engine = ScriptedEngine(tokenizer, lambda request, turn: "x\n", context=100)
    task = ActorCritic(engine, engine, Settings()).generate(PROBLEM, "p#0")
    [draft] = drive([task], engine, ScriptedExecutor(passes_unless_bad))
    assert draft.dropped == "too_long" and not engine.requests


class SlowTools(ThreadPoolExecutor):
    """Executor whose n-th code block takes the n-th of the given delays, in seconds."""

    def __init__(self, delays: list[float]) -> None:
        super().__init__(len(delays))
        self.delays = delays[::-1]

    def submit(self, code):
        return super().submit(self.judge, self.delays.pop())

    def judge(self, delay: float) -> ExecResult:
        time.sleep(delay)
        return ExecResult("ok", "4")


def batch_steps(engine: ScriptedEngine) -> ScriptedEngine:
    """Make each step of the engine finish all of its requests, and mark it as reproducible."""
    step, engine.reproducible = engine.step, True
    engine.step = lambda: [completion for _ in engine.queue[:] for completion in step()]
    return engine


def test_order_of_requests_is_independent_of_tool_speed(tokenizer, tmp_path):
    def sample(name: str, delays: list[float]):
        engine = batch_steps(ScriptedEngine(tokenizer, reply))
        settings = Settings(step_tokens=400, code_tokens=400, max_tokens=4000, tries=1, out=str(tmp_path / name))
        run = Run(settings.out, settings, resume=False)
        run.start()
        with SlowTools(delays) as tools:
            drafts = sample_drafts(ActorCritic(engine, engine, settings), problems, tools, run)
        return [request.id for request in engine.requests], drafts

    def reply(request, turn):
        return BLOCK if request.id.endswith("/critic") else ("The answer is \\boxed{4}." if turn else "Think.\n")

    problems = [Problem(f"p{i}", f"What is {i} + 2?", str(i + 2)) for i in range(4)]
    delays = [0.0, 0.05, 0.1, 0.15]
    order, drafts = sample("fast first", delays)
    assert (order, drafts) == sample("slow first", delays[::-1]) and len(order) == 12
    assert [draft.problem for draft in drafts] == problems


def test_order_of_the_drafts_file_does_not_matter(tokenizer, tmp_path):
    def reply(request, turn):
        return random.Random(request.id).choice(["So \\boxed{4}.", "So \\boxed{5}."])

    problems = [Problem(f"p{i}", f"What is {i} + 2?", "4") for i in range(4)]
    engine, settings = ScriptedEngine(tokenizer, reply), Settings(out=str(tmp_path / "run"))
    run, loop = Run(settings.out, settings, resume=False), ActorCritic(engine, engine, settings)
    run.start()
    executor = ScriptedExecutor(passes_unless_bad)
    drafts = sample_drafts(loop, problems, executor, run)
    lines = (run / "drafts.jsonl").read_text().splitlines(keepends=True)
    (run / "drafts.jsonl").write_text("".join(lines[:2:-1]))
    assert sample_drafts(loop, problems, executor, run) == drafts


# ---- filter ---------------------------------------------------------------------------------------------------------


def draft(text="The answer is surely \\boxed{4}.", codes=(), problem=PROBLEM, finished=True, **changes) -> Draft:
    return Draft(problem, [(text, True)], ["ok"] * len(codes), list(codes), finished, **changes)


def test_stage_1_keeps_correct_drafts_whose_code_passed():
    good, wrong = draft(), draft("\\boxed{5}")
    failed = draft(codes=["x"])
    failed.statuses = ["error"]
    assert keep_correct([good, wrong, failed, draft("no box"), draft(dropped="infra")]) == [good]
    observed = draft("none of it")
    observed.segments.append(("\\boxed{4}", False))  # the answer is in tool output only
    assert keep_correct([observed]) == []


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("The answer is surely \\boxed{4}.", True),
        ("The answer is \\boxed{4}, again \\boxed{4}.", False),
        ("The answer is surely \\boxed{}.", False),
        ("It costs $x$, so that is \\boxed{4}.", True),
        ("It costs $x, so that is \\boxed{4}.", False),
        ("It costs \\$5, so that is \\boxed{4}.", True),
        ("<think>hm hm hm</think> so \\boxed{4}", True),
        ("<think>hm hm hm, so \\boxed{4}", False),
        ("<think>a</think>\n```python\nprint(4)\n```\n\\boxed{4}", False),
        ("```python\ns = '$'\n```\nso it is \\boxed{4}", True),  # a $ in code does not delimit math
        ("所以答案是 the final answer \\boxed{4}", False),
        ("所以答案是四四四四四四四四四四四四四四四四四四四四 \\(x\\) \\boxed{4}", True),
        ("\\boxed{4}", False),  # too short
    ],
)
def test_stage_2_checks_the_format(text, kept):
    assert bool(keep_well_formed([draft(text)])) is kept


def test_stage_2_drops_unfinished_drafts():
    assert keep_well_formed([draft(finished=False)]) == []


def test_stage_3_drops_repetitive_text():
    twenty = "abcdefghijklmnopqrst"
    assert keep_unrepetitive([draft(twenty * 20)]) and not keep_unrepetitive([draft(twenty * 21 + "a")])


@pytest.mark.parametrize(
    ("codes", "kept"),
    [
        ([], True),
        (["print(2 + 2)"], False),
        (["print(pow(2, 3, 5))"], True),
        (["import math\nprint(2)"], True),
        (["for i in x:\n    print(i)"], True),
        (["print(1)", "print(1)", "import a", "import a", "import a"], True),  # 60%
        (["print(1)", "print(1)", "print(1)", "import a", "import a"], False),
    ],
)
def test_stage_4_drops_trivial_code(codes, kept):
    assert bool(keep_substantial_code([draft(codes=codes)])) is kept


def test_stage_5_keeps_the_shortest_draft_per_problem():
    other = Problem("q", "?", "4")
    long, short, second = draft("x" * 30), draft("x" * 20), draft(problem=other)
    assert keep_one_per_problem([long, short, second]) == [short, second]


def test_stage_6_thins_easy_problems_and_single_calls():
    problems = [Problem(str(i), "?", "4") for i in range(400)]
    plain, single = [draft(problem=p) for p in problems], [draft(codes=["x"], problem=p) for p in problems]
    double = [draft(codes=["x", "y"], problem=p) for p in problems]
    assert len(keep_balanced(plain + double, set(), 0.5, 0)) == 800
    assert 160 < len(keep_balanced(single, set(), 0.5, 0)) < 240
    assert 160 < len(keep_balanced(plain, {p.id for p in problems}, 0.5, 0)) < 240
    assert keep_balanced(single, set(), 0.5, 0) == keep_balanced(single, set(), 0.5, 0)


def test_easy_problems_have_two_correct_drafts_without_code():
    assert easy_problems([draft(), draft()]) == {"p"}
    assert easy_problems([draft()]) == easy_problems([draft(), draft("\\boxed{5}")]) == set()


def test_funnel_counts_every_stage():
    drafts = [draft(), draft("\\boxed{5}"), draft(finished=False), draft()]
    kept, funnel = filter_drafts(drafts, Settings())
    counts = list(funnel.values())
    assert counts[:6] == [4, 3, 2, 2, 2, 1] and len(kept) == counts[-1]


# ---- training data --------------------------------------------------------------------------------------------------


def test_sft_trains_on_the_policy_text_only(tokenizer):
    draft_, _ = build(tokenizer, ["x\n", "The answer is \\boxed{4}.\n"], [BLOCK])
    row = to_row(draft_)
    ledger = to_ledger(PROBLEM, [(s["text"], s["sampled"]) for s in row["segments"]], tokenizer)
    learned = [token for token, m in zip(ledger.token_ids, ledger.action_mask, strict=True) if m]
    assert decode(tokenizer, learned) == draft_.policy_text and learned[-1] == tokenizer.eos_token_id
    assert decode(tokenizer, ledger.token_ids) == draft_.text
