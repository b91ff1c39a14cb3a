"""Tests of the multi-stage filter: each stage, the choice among what passed, and whole data sets."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thor.text import FenceParser
from thor.tirgen.draft import Draft
from thor.tirgen.filters import (
    Candidate,
    FilterSettings,
    Rates,
    answer_fault,
    balance,
    block_fault,
    code_fault,
    difficulty,
    first_fault,
    format_fault,
    has_balanced_math,
    has_one_language,
    highest_count,
    is_substantial,
    limit_code_free,
    natural_key,
    one_per_problem,
    repetition_fault,
    select,
    thin,
)
from thor.trajectory import ExecResult, Problem

PROBLEM = Problem("p", "What is 2 + 2?", "4")
SETTINGS = FilterSettings()
CODE = "print(2 + 2)\n"


def draft(text="The answer is surely \\boxed{4}.", codes=(), name="p#0", problem=PROBLEM, **changes) -> Draft:
    """A correct, finished draft with these blocks, and then this text."""
    new = Draft(problem, name, **{"finished": True, "correct": True} | changes)
    for code in codes:
        new.append_block(f"Compute it.\n```python\n{code}```\n", code, ExecResult("ok", "4\n"))
    new.append(text)
    return new


# ---- stages 1 to 4 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"correct": False}, "wrong"),
        ({"correct": False, "text": "no box"}, "no_answer"),
        ({"dropped": "infra"}, "infra"),
        ({"statuses": ["error"]}, "code_failed"),
    ],
)
def test_stage_1_keeps_correct_drafts_whose_code_passed(changes, reason):
    assert answer_fault(draft(**changes), SETTINGS) == reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("The answer is surely \\boxed{4}.", ""),
        ("I was asked to use \\boxed{}, so it is \\boxed{4}, that is \\boxed{4}.", ""),  # more than one box
        ("<think>The box will be \\boxed{4}.</think> So it is \\boxed{4}", ""),
        ("<think>hm hm hm</think> so it is \\boxed{4}", ""),
        ("<think>hm hm hm, so it is \\boxed{4}", "thought"),
        ("hm hm hm</think> so it is \\boxed{4}", "thought"),  # its start is lost
        ("hm</think> and <think> so it is \\boxed{4}", "thought"),
        ("<think>a</think> <think>b</think> so it is \\boxed{4}", "thought"),
        ("<think>a</think>\n```python\nprint(4)\n```\n\\boxed{4}", "code_after_thought"),
        ("It costs $x, so that is \\boxed{4}.", "math"),
        ("所以答案是 the final answer \\boxed{4}, surely", "language"),
        ("\\boxed{4}", "short"),
        ("x" * 70_000 + "\\boxed{4}", "long"),
    ],
)
def test_stage_2_checks_the_format(text, reason):
    assert format_fault(draft(text), SETTINGS) == reason


def test_stage_2_drops_unfinished_drafts():
    assert format_fault(draft(finished=False), SETTINGS) == "unfinished"


@pytest.mark.parametrize(
    ("prose", "balanced"),
    [
        ("7 tickets at $7 are $49.", True),
        ("7 tickets at $7 are a lot.", True),
        ("He pays $1,250.50, so $x = 1250.5$ and $ 3 are left", True),
        ("It costs 5$ and no more, where $x$ is 5.", True),
        ("A loss of $-5 or -$5.", True),
        ("It costs \\$5, and $x$ as well.", True),
        ("Let $x = 5$ and $y=7$.", True),
        ("Let $x = 5.", False),
        ("Let $x be what it costs.", False),
        ("Let $x be. It costs $5.", False),  # the sign before 5 opens nothing that closes x
        ("It costs $5x + 3$ in all.", True),
        ("Let $x$ be $y.\n\nThen $z is it.", False),  # not across paragraphs
        ("$$x = 5$$ and $y$", True),
        ("$$x = 5 and $y$", False),
        ("\\(x\\) and \\[y\\]", True),
        ("\\(x", False),
        ("x\\)", False),
        ("\\[x\\)", False),
        ("\\\\[2pt] is a line break", True),
        ("\\begin{align}x\\end{align}", True),
        ("\\begin{align}x", False),
        ("\\begin{a}\\begin{b}\\end{a}\\end{b}", False),
    ],
)
def test_dollars_of_prices_are_no_math(prose, balanced):
    assert has_balanced_math(prose) is balanced


@pytest.mark.parametrize(
    ("prose", "one"),
    [
        ("The answer is four.", True),
        ("所以答案是四。因为 sin x + cos y = 2, \\(x\\) \\boxed{four}", True),
        ("所以答案是 the final answer 四", False),
        ("Let α and β be the roots, Δ = 5, and ∑ is 3π.", True),
        ("Поэтому ответ: $x + y = \\text{four}$", True),
        ("Поэтому the answer is 4", False),
        ("所以答案是四。Поэтому ответ четыре", False),
        ("答えは四です。そして五です。", True),
        ("Thus the answer is 4. " * 20 + "好的", True),  # a word in twenty sentences
        ("", True),
    ],
)
def test_formulas_and_variables_are_no_language(prose, one):
    assert has_one_language(prose) is one


@pytest.mark.parametrize(
    ("segments", "reason"),
    [
        ([("Add.\n```python\nprint(4)\n```\n", True), ("```output\n4\n```\n", False), ("So 4.", True)], ""),
        ([("Add.\n```python\nprint(4)\n```\n", True)], "stray_fence"),  # never run
        ([("Add.\n```output\n4\n```\n", True)], "stray_fence"),  # never observed
        ([("Add.\n   ```py\nprint(4)\n   ```\n", True)], "stray_fence"),
        ([("Add.\n```python\n1\n```\n```python\n2\n```\n", True), ("```output\n2\n```\n", False)], "stray_fence"),
        ([("```text\n1\n```\n```python\n2\n```\n", True), ("```output\n2\n```\n", False)], "stray_fence"),
        ([("Add.\n```python\n2\n```\nIt is 3.", True), ("```output\n2\n```\n", False)], "stray_fence"),
        ([("Add.\n```py\nx = 1\n``````output\n1\n```\n", True), ("```output\n1\n```\n", False)], "stray_fence"),
        ([("Add.", True), ("```output\n2\n```\n", False)], "stray_fence"),
        ([("\n```python\nprint(4)\n```\n", True), ("```output\n4\n```\n", False)], "empty_thought"),
        ([("<think>\n```python\nprint(4)\n```\n", True), ("```output\n4\n```\n", False)], "empty_thought"),
        ([("An inline `x`, and ``` in a line", True)], ""),
    ],
)
def test_only_blocks_that_ran_are_kept(segments, reason):
    assert block_fault(segments) == reason


def test_the_blocks_that_are_learned_are_those_that_ran():
    whole = draft(codes=[CODE, CODE])
    assert format_fault(whole, SETTINGS) == ""
    whole.codes[1] = "print(3 + 1)\n"
    assert format_fault(whole, SETTINGS) == "other_code"


PIECES = [
    "Add. ",
    "\n",
    "```python\nprint(1)\n```\n",
    "```output\n1\n```\n",
    "```py\nx\n```",
    "``` ",
    "<think>",
    "x = 1\n",
]


@given(st.lists(st.tuples(st.lists(st.sampled_from(PIECES), max_size=4).map("".join), st.booleans()), max_size=6))
def test_what_passes_shows_no_output_that_was_not_observed(pieces):
    draft = Draft(PROBLEM)
    for text, own in pieces:
        if own:
            draft.append(text)
        elif draft.segments and draft.segments[-1][1]:
            draft.segments.append(("```output\n1\n```\n", False))
    if block_fault(draft.segments):
        return
    for i, (text, own) in enumerate(draft.segments):
        if own:
            parser = FenceParser()
            parser.feed(text)
            assert "```output" not in text.replace("``` ", "")
            assert parser.closed == (i + 1 < len(draft.segments)), "each block is followed by its observation"


def test_stage_3_drops_repetitive_text():
    twenty = "abcdefghijklmnopqrst"
    assert not repetition_fault(draft(twenty * 20), SETTINGS)
    assert repetition_fault(draft(twenty * 21), SETTINGS) == "repetition"
    long_output = draft()
    long_output.append_block("A.\n```python\nprint(10**60)\n```\n", "print(10**60)", ExecResult("ok", str(10**60)))
    assert not repetition_fault(long_output, SETTINGS), "zeros in tool output are no repetition of the policy"


@given(st.text("ab", max_size=200), st.integers(1, 5))
def test_the_highest_count_is_that_of_a_slow_count(text, n):
    slow = Counter(text[i : i + n] for i in range(len(text) - n + 1))
    assert highest_count(text, n) == max(slow.values(), default=0)


@pytest.mark.parametrize(
    ("code", "substantial"),
    [
        ("print(2 + 2)", False),
        ("x = 3\nprint(x * 2)", False),
        ("print('for x in range(3): sum')", False),  # words in a string
        ("import math\nprint(2)", False),  # imported, but not used
        ("print(round(float('3.5')))", False),
        ("print('{}'.format(2 + 2), str(4).zfill(3), f'{4}'.strip())", False),
        ("import math\nprint(math.gcd(4, 6))", True),
        ("from sympy import symbols, solve\nx = symbols('x')\nprint(solve(x - 1, x))", True),
        ("print(pow(2, 3, 5))", True),
        ("for i in x:\n    print(i)", True),
        ("print([i for i in x])", True),
        ("print(1 if x else 2)", True),
        ("def f(x):\n    return x\nprint(f(2))", True),
        ("while n:\n    n //= 2", True),
        ("print(", False),  # not Python
    ],
)
def test_substantial_code_calls_a_library_or_has_control_flow(code, substantial):
    assert is_substantial(code) is substantial


@pytest.mark.parametrize(
    ("trivial", "substantial", "reason"), [(0, 0, ""), (1, 0, "trivial_code"), (2, 3, ""), (3, 2, "trivial_code")]
)
def test_stage_4_needs_60_percent_of_substantial_blocks(trivial, substantial, reason):
    codes = [CODE] * trivial + ["print(pow(2, 3, 5))\n"] * substantial
    assert code_fault(draft(codes=codes), FilterSettings(min_substantial=0.6)) == reason


# ---- stages 5 and 6 -------------------------------------------------------------------------------------------------


def candidates(calls: int, count: int, start: int = 0) -> list[Candidate]:
    return [Candidate(f"p{i}#0", f"p{i}", calls, None) for i in range(start, start + count)]


def test_stage_5_chooses_at_random_among_those_with_code():
    tries = [Candidate(f"p{i}#{k}", f"p{i}", k % 2, None) for i in range(300) for k in range(6)]
    kept = one_per_problem(tries, FilterSettings(code_free_share=0.0))
    assert [c.problem for c in kept] == [f"p{i}" for i in range(300)] and all(c.calls for c in kept)
    names = Counter(c.name.partition("#")[2] for c in kept)
    assert set(names) == {"1", "3", "5"} and min(names.values()) > 70
    assert kept == one_per_problem(tries[::-1], FilterSettings(code_free_share=0.0)), "the order of tries has no effect"
    assert kept != one_per_problem(tries, FilterSettings(code_free_share=0.0, seed=1))
    without = sum(c.calls == 0 for c in one_per_problem(tries, FilterSettings(code_free_share=0.3)))
    assert 60 < without < 120  # 90 expected
    assert len(one_per_problem(candidates(0, 5), FilterSettings(code_free_share=0.0))) == 5, "better than nothing"


def test_stage_6_thins_one_call_trajectories_and_easy_problems_by_strata():
    single, double = candidates(1, 400), candidates(2, 400, start=400)
    rates = {f"p{i}": Rates(4, 2, 4, (0, 2, 4)[i % 3]) for i in range(800)}

    def counts(kept):
        return Counter((c.calls, difficulty(rates[c.problem].plain_pass_rate)) for c in kept)

    before = counts(single + double)
    kept = counts(balance(single + double, rates, FilterSettings(keep_one_call=0.5, keep_easy=0.25)))
    for (calls, level), count in before.items():
        share = {1: 0.5, 2: 1.0}[calls] * {"always": 0.25}.get(level, 1.0)
        assert abs(kept[calls, level] - share * count) < 1
    everything = balance(single + double, rates, FilterSettings(keep_one_call=1.0, keep_easy=1.0))
    assert everything == single + double


def test_trajectories_without_code_get_at_most_their_share():
    mixed = candidates(0, 50) + candidates(1, 90, start=50)
    for share, expected in ((0.0, 0), (0.1, 10), (0.25, 30), (1.0, 50)):
        kept = limit_code_free(mixed, FilterSettings(code_free_share=share))
        assert sum(c.calls == 0 for c in kept) == expected and sum(c.calls == 1 for c in kept) == 90


@given(st.integers(0, 20), st.floats(0, 1), st.integers(0, 5))
def test_thinning_keeps_the_share_up_to_rounding(count, share, seed):
    assert abs(len(thin(candidates(1, count), share, seed)) - share * count) < 1


def test_difficulty_and_order_of_names():
    rates = (None, 0.0, 0.25, 0.5, 0.75, 1.0)
    assert list(map(difficulty, rates)) == ["unknown", "never", "seldom", "seldom", "often", "always"]
    assert sorted(["p/10#1", "p/9#2", "p/9#10"], key=natural_key) == ["p/9#2", "p/9#10", "p/10#1"]


# ---- all stages -----------------------------------------------------------------------------------------------------


def test_funnel_counts_every_stage_and_reason():
    other = Problem("q", "?", "4")
    drafts = [
        draft(codes=[CODE], name="p#0"),
        draft(correct=False, name="p#1"),
        draft(finished=False, name="p#2"),
        draft(codes=[CODE], name="p#3"),
        draft(name="q#0", problem=other, codes=["print(pow(2, 3, 5))\n"]),
        draft(name="q#1", problem=other, correct=False, dropped="infra"),
        draft(name="q#plain0", problem=other, plain=True),
        draft(name="q#plain1", problem=other, plain=True, correct=False),
    ]
    selection = select(enumerate(drafts), FilterSettings(code_free_share=0.0))
    assert list(selection.funnel.values()) == [6, 4, 3, 3, 3, 2, 2, 2]
    assert selection.reasons["correct, code passed"] == {"wrong": 1, "infra": 1}
    assert selection.reasons["format"] == {"unfinished": 1}
    assert {c.problem for c in selection.kept} == {"p", "q"} and all(
        drafts[c.where].name == c.name for c in selection.kept
    )
    assert selection.rates["p"].pass_rate == 0.75 and selection.rates["p"].plain_pass_rate is None
    assert selection.rates["q"].pass_rate == 1.0 and selection.rates["q"].plain_pass_rate == 0.5, "infra does not count"


def test_kept_trajectories_pass_all_stages_whatever_is_drafted():
    rng = random.Random(0)
    texts = [
        "So \\boxed{4}, as computed.",
        "```output\n5\n```\n\\boxed{4}",
        "$x \\boxed{4} is the answer",
        "Thus \\boxed{4} it is.",
    ]
    drafts = [
        draft(
            rng.choice(texts),
            [CODE] * rng.randint(0, 2),
            f"p{i}#{k}",
            Problem(f"p{i}", "?", "4"),
            correct=rng.random() < 0.7,
        )
        for i in range(100)
        for k in range(4)
    ]
    selection = select(enumerate(drafts), SETTINGS)
    kept = [drafts[c.where] for c in selection.kept]
    assert len({d.problem.id for d in kept}) == len(kept) > 50
    assert all(first_fault(d, SETTINGS) == ("", "") and d.correct for d in kept)
    assert all("output" not in d.policy_text for d in kept)
