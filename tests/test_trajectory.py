"""Tests of observations, of the text of a trajectory, and of where its last box is."""

import pytest
from conftest import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from thor.prompts import observation_text
from thor.text import decode, encode, extract_answer
from thor.trajectory import ExecResult, Problem, Step, Trajectory

PROBLEM = Problem("p", "What?", "4")

# ---- observations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (ExecResult("ok", "\n1\n2\n"), "1\n2"),
        (ExecResult("ok", "  x\n", "not shown"), "  x"),
        (ExecResult("error", "", "NameError: x (line 1)"), "NameError: x (line 1)"),
        (ExecResult("error", "1\n2\n", "NameError: x (line 3)"), "1\n2\nNameError: x (line 3)"),
        (ExecResult("error", "1", "NameError: x (line 3)"), "1\nNameError: x (line 3)"),
        (
            ExecResult("timeout", "step 1\n\n", "TimeoutError: no result within 5 s"),
            "step 1\nTimeoutError: no result within 5 s",
        ),
        (ExecResult("no_output", "", "no output: use print()"), "no output: use print()"),
        (ExecResult("no_output", " \n\t\n", "no output: use print()"), "no output: use print()"),
        (ExecResult("no_output"), "no output"),  # a failure is never an empty text
        (ExecResult("memory"), "memory"),
    ],
)
def test_observation_is_what_was_printed_and_then_the_error(result, text):
    assert result.observation() == text


def test_long_observation_keeps_half_of_the_limit_at_both_ends():
    result = ExecResult("ok", "a" * 200 + "b" * 200)
    assert result.observation(256) == "a" * 128 + "..." + "b" * 128
    assert result.observation(400) == "a" * 200 + "b" * 200 and len(result.observation(399)) == 199 + 3 + 199
    assert result.observation(3) == "a...b" and result.observation(1) == result.observation(0) == "..."
    assert ExecResult("ok", "1").observation(1) == "1"


def test_error_stays_visible_after_a_long_output():
    text = ExecResult("error", "x" * 5000, "ValueError: too long (line 2)").observation()
    assert len(text) == 259 and text.startswith("xxx") and text.endswith("...") is False
    assert text.endswith("xxx\nValueError: too long (line 2)")


@given(st.text(max_size=20), st.text(max_size=20), st.integers(0, 50))
def test_observation_is_within_its_limit(stdout, error, limit):
    assert len(ExecResult("error", stdout, error).observation(limit)) <= limit + 3


# ---- text -----------------------------------------------------------------------------------------------------------


def trajectory_of(tokenizer, *turns: str, finish: str = "stop", end: tuple[int, ...] | None = None) -> Trajectory:
    """A ledger of turns: each turn but the last is followed by the observation "4"."""
    trajectory = Trajectory(PROBLEM, encode(tokenizer, "Q"), finish=finish)
    for i, turn in enumerate(turns):
        start, ids = len(trajectory), tokenizer.encode(turn, add_special_tokens=False)
        if i == len(turns) - 1:
            ids += (tokenizer.eos_token_id,) if end is None else end
        trajectory.append_sampled(ids, [-1.0] * len(ids))
        observe, code, result = len(trajectory), None, None
        if i < len(turns) - 1:
            code, result = "print(4)\n", ExecResult("ok", "4\n")
            trajectory.append_observation(encode(tokenizer, observation_text(result.observation(), turn)))
        trajectory.steps.append(Step(start, observe, observe, len(trajectory), code, result))
    trajectory.check()
    return trajectory


def test_observation_without_room_is_the_mark_of_what_is_missing():
    for limit in (0, 1, -3):
        assert ExecResult("ok", "abcdef\n").observation(limit) == "..."
    assert ExecResult("ok", "abcdef\n").observation(2) == "a...f"
    assert ExecResult("ok", "abcdef\n").observation(6) == "abcdef"


BLOCK = "so\n```python\nprint(4)\n```"


def test_text_of_a_trajectory_with_and_without_observations(tokenizer):
    trajectory = trajectory_of(tokenizer, BLOCK, f"then {BLOCK}\n", r"It is \boxed{4}.")
    output = "```output\n4\n```\n"
    assert trajectory.text(tokenizer) == f"{BLOCK}\n{output}then {BLOCK}\n{output}" + r"It is \boxed{4}."
    assert trajectory.text(tokenizer, policy_only=True) == f"{BLOCK}\nthen {BLOCK}\n" + r"It is \boxed{4}."
    assert extract_answer(trajectory.text(tokenizer, policy_only=True)) == "4"
    assert trajectory.text(tokenizer, policy_only=True, end=2) == "so" and trajectory.text(tokenizer, end=0) == ""


def test_only_the_end_token_is_left_out_of_the_text():
    tokenizer = byte_tokenizer(("<think>",))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|stop|>"]})
    eos, other = tokenizer.convert_tokens_to_ids(["<|end|>", "<|stop|>"])
    for end, finish, text in [
        ((eos,), "stop", "a"),
        ((other,), "stop", "a"),  # a model can have other end tokens than its tokenizer
        ((other, eos), "stop", "a<|stop|>"),
        ((other, other), "stop", "a<|stop|>"),
        ((other,), "length", "a<|stop|>"),
        ((), "stop", "a"),  # as in a regenerated step
        (tuple(encode(tokenizer, "b")), "stop", "ab"),
        ((tokenizer.convert_tokens_to_ids("<think>"),), "stop", "a<think>"),
    ]:
        trajectory = trajectory_of(tokenizer, "a", finish=finish, end=end)
        assert trajectory.text(tokenizer) == trajectory.text(tokenizer, policy_only=True) == text


def test_box_in_code_or_tool_output_is_no_answer(tokenizer):
    code = "so\n```python\n# \\boxed{4}\nprint('\\\\boxed{4}')\n```"
    trajectory = trajectory_of(tokenizer, code, "Done.")
    assert extract_answer(trajectory.text(tokenizer, policy_only=True)) is None
    assert not trajectory.has_box_near_end(tokenizer, 1000)


# ---- position of the box --------------------------------------------------------------------------------------------
# The tokenizer has one token per byte, and the end token counts.


@pytest.mark.parametrize(
    ("text", "window"),
    [
        (r"\boxed{4}", 2),  # "}" and the end token
        (r"\boxed{4}.", 3),
        (r"\boxed{\begin{pmatrix}" + "1 & 2 & 3 " * 30 + r"\end{pmatrix}}", 2),  # where a long box starts is irrelevant
        (r"so \boxed{4}. That is the answer, as was to be shown.", 43),
        (r"\boxed{4} or \boxed{} here", 19),  # an empty box is none
        (r"\fbox{4} here", 7),
    ],
)
def test_smallest_window_that_holds_the_end_of_the_box(tokenizer, text, window):
    trajectory = trajectory_of(tokenizer, BLOCK, text)
    assert trajectory.has_box_near_end(tokenizer, window) and not trajectory.has_box_near_end(tokenizer, window - 1)


def test_window_counts_tokens_and_not_characters():
    tokenizer = byte_tokenizer((" This is a long closing sentence in one token.",))
    trajectory = trajectory_of(tokenizer, r"\boxed{4} This is a long closing sentence in one token.")
    assert trajectory.has_box_near_end(tokenizer, 3) and not trajectory.has_box_near_end(tokenizer, 2)


def test_window_reaches_across_a_tool_call(tokenizer):
    trajectory = trajectory_of(tokenizer, r"\boxed{4} " + BLOCK, "ok")
    after = len(trajectory) - len(r"\boxed{4}")
    assert trajectory.has_box_near_end(tokenizer, after + 1) and not trajectory.has_box_near_end(tokenizer, after)
    assert trajectory.has_box_near_end(tokenizer, 10**6)


def test_no_box_is_near_the_end_without_a_box(tokenizer):
    assert not trajectory_of(tokenizer, "4").has_box_near_end(tokenizer, 100)
    assert not Trajectory(PROBLEM, [1], finish="length").has_box_near_end(tokenizer, 100)


@given(st.lists(st.sampled_from(["é", "a ", r"\boxed{5}", BLOCK + "\n"]), min_size=1, max_size=6), st.integers(0, 60))
def test_window_agrees_with_counting(parts, window):
    """One turn without blocks, and bytes counted by hand."""
    tokenizer, text = byte_tokenizer(), "".join(part for part in parts if part != BLOCK + "\n")
    trajectory = trajectory_of(tokenizer, text)
    after = len(text[text.rfind("}") + 1 :].encode()) + 1
    assert trajectory.has_box_near_end(tokenizer, window) == ("}" in text and after < window)
    assert decode(tokenizer, trajectory.token_ids) == text
