"""Tests of what the critic is shown, how its reply is read, and the contract of a rewrite."""

import pytest
from conftest import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from thor.demo.few_shot import DEMONSTRATIONS
from thor.prompts import TIRGEN_PROMPTS, Prompt
from thor.settings import UserError
from thor.text import decode
from thor.tirgen.critic import (
    CriticStop,
    Rewrite,
    agrees,
    contract_fault,
    error_type,
    is_constant,
    numbers,
    parse_judgement,
    parse_rewrites,
    remarked_outputs,
    says_none,
    show_parts,
    skip_thought,
    split_parts,
    states_output,
)
from thor.tirgen.draft import thought_span
from thor.tirgen.roles import ChatCritic, StepStop, encode_segments, feedback, load_prompts
from thor.trajectory import ExecResult

BLOCK = "Add.\n```python\nprint(2 + 2)\n```"


def read_until(stop, text: str) -> str:
    """What a stop rule has read of a text, one character at a time, when it stops."""
    for end in range(1, len(text) + 1):
        if stop.feed(text[end - 1]):
            return text[:end]
    return text


# ---- parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("48/2 = 24. 24 + 48 = 72.\n", ["48/2 = 24. 24 + 48 = 72.\n"]),  # one short line
        ("A is 2.\nB is 3. C? Yes!\n\nD", ["A is 2.\n", "B is 3. ", "C? ", "Yes!\n\n", "D"]),
        ("1. Add 2.5 to x.\n2. Halve it.", ["1. Add 2.5 to x.\n", "2. Halve it."]),
        ("So\n\\[ x = 1.\n y = 2 \\]\nholds.", ["So\n", "\\[ x = 1.\n y = 2 \\]\n", "holds."]),
        ("So\n$$ x = 1.\n y = 2 $$\nholds.", ["So\n", "$$ x = 1.\n y = 2 $$\n", "holds."]),
        (
            "So\n\\begin{align}\nx &= 1 \\\\\ny &= 2\n\\end{align}\nB.",
            ["So\n", "\\begin{align}\nx &= 1 \\\\\ny &= 2\n\\end{align}\n", "B."],
        ),
        ("Has \\( x =\n3 \\). So\nit.", ["Has \\( x =\n3 \\). ", "So\n", "it."]),
        ("So $x = 1. 5 + 2$ and. C\nd", ["So $x = 1. 5 + 2$ and. ", "C\n", "d"]),
        ("At $7 each. Then $x. 5\nd", ["At $7 each. ", "Then $x. 5\n", "d"]),
        ("x" * 400 + ". y", ["x" * 400 + ". ", "y"]),  # one line, but a long one
    ],
)
def test_parts_are_sentences_and_lines(text, parts):
    assert split_parts(text) == parts


@given(st.text("ab .!?\n1$\\[]", max_size=200))
def test_parts_add_up_to_the_step(text):
    assert "".join(split_parts(text)) == text
    assert "".join(split_parts(f"{text}\n" * 9)) == f"{text}\n" * 9


def test_parts_are_numbered_if_there_are_several():
    assert show_parts([" A.\n"]) == "A." and show_parts(["A. ", "B.\n"]) == "[1] A.\n[2] B."


@pytest.mark.parametrize(
    ("before", "text", "inside"),
    [
        ("", "plain text", "plain text"),
        ("", "<think>\nhm", "\nhm"),
        ("", "<think>hm</think> so", "hm"),
        ("<think>\nhm", " more", " more"),
        ("<think>\nhm", " more</think> so", " more"),
        ("<think>\nhm</think>", " so", ""),
        ("", "<think>\n\n</think>\n\nso", "\n\n"),
    ],
)
def test_only_the_thought_is_judged_if_there_is_one(before, text, inside):
    start, end = thought_span(before, text)
    assert text[start:end] == inside


# ---- replies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply",
    [
        *("none", " None.", "**none**", "`none`", "none\n", "None. It only restates.", "NONE - no", "[none]"),
        *("None needed.", "none is required", "No code is needed.", "No Python code needed: it restates."),
        *("Answer: none", "**Answer:** none.", "The answer is none.", "There is none."),
    ],
)
def test_none_is_recognised(reply):
    assert says_none(reply)


@pytest.mark.parametrize(
    "reply",
    [
        *("", "nonesuch", "Add none", "None of this needs care", f"None is easy, but:\n{BLOCK}", f"none, {BLOCK}"),
        *(f"No code is needed to see it, but:\n{BLOCK}", f"No code needed.\n{BLOCK}", "The answer is nonzero."),
    ],
)
def test_other_replies_are_not_none(reply):
    assert not says_none(reply)


@pytest.mark.parametrize(
    ("reply", "opened", "rest"),
    [
        ("none", False, "none"),
        ("<think>a</think>none", False, "none"),
        ("\n<think>a</think>none", False, "none"),
        ("<think>a", False, None),
        ("a</think>none", True, "none"),
        ("a", True, None),
        ("<thi", False, ""),  # a thought may still begin
        ("a</think>none", False, "a</think>none"),  # no thought began
    ],
)
def test_the_thought_of_the_critic_is_skipped(reply, opened, rest):
    assert skip_thought(reply, opened) == rest


@pytest.mark.parametrize(
    ("reply", "opened", "one_block", "read"),
    [
        (f"{BLOCK}\nmore", False, True, BLOCK),
        (f"{BLOCK}\nmore", False, False, f"{BLOCK}\nmore"),
        ("none\nmore", False, False, "none\n"),
        ("None of it\nmore", False, True, "None of it\nmore"),
        (f"<think>{BLOCK}\n</think>{BLOCK}\nmore", False, True, f"<think>{BLOCK}\n</think>{BLOCK}"),
        (f"{BLOCK}\n</think>none\nmore", True, True, f"{BLOCK}\n</think>none\n"),
    ],
)
def test_where_a_reply_stops(reply, opened, one_block, read):
    assert read_until(CriticStop(opened, one_block), reply) == read


@pytest.mark.parametrize(
    "header",
    [
        *("[2-3]", "[2]-[3]", "[2] to [3]", "Parts 2-3:", "**[2-3]**", "2-3:", "Sentences 2 to 3.", "[2–3]"),
        *(
            "1. [2-3]",
            "- [2, 3]",
            "[2],[3]",
            "`[2-3]`",
            "(2-3)",
            "**Parts [2]–[3]:**",
            "### Place 1\n[2-3] -",
            "[2 and 3]",
        ),
    ],
)
def test_spans_are_named_in_many_ways(header):
    reply = f"Here you are.\n{header} Add 12 and 3.\n```python\nprint(12 + 3)\n```\n"
    assert parse_rewrites(reply, 4) == ([Rewrite(1, 2, "Add 12 and 3.", "print(12 + 3)\n")], "")


@pytest.mark.parametrize(
    "logic", ["12.5 is half of 25.", "1. Multiply (part 2).", "[2, 5] Add.", "2 - 3 apples", f"[{'9' * 5000}] Add."]
)
def test_other_numbers_name_no_span(logic):
    assert parse_rewrites(f"{logic}\n```python\nprint(12 + 3)\n```\n", 30) == ([], "no_span")


def test_spans_are_sorted_and_do_not_overlap():
    def item(span: str) -> str:
        return f"[{span}] Add.\n```python\nprint({span})\n```\n"

    rewrites, fault = parse_rewrites(item("4") + item("1-2") + item("2-3"), 4)
    assert [(r.first, r.last) for r in rewrites] == [(0, 1), (3, 3)] and not fault
    assert parse_rewrites(item("1") + item("9"), 4)[1] == "no_span"
    assert parse_rewrites(item("3-2"), 4) == ([], "no_span")
    assert parse_rewrites("Add.\n```python\nprint(1)\n```\n", 2) == ([], "no_span")
    assert parse_rewrites("[1] Add.", 2) == ([], "no_code")
    assert parse_rewrites("Add.\n```python\nprint(1)", 1) == ([], "no_code")  # not closed


def test_one_part_needs_no_number():
    assert parse_rewrites(BLOCK + "\nIt prints 4.", 1) == ([Rewrite(0, 0, "Add.", "print(2 + 2)\n")], "")


def test_a_judgement_names_parts():
    assert parse_judgement("[2-3], 5", 6) == ([Rewrite(1, 2), Rewrite(4, 4)], "")
    assert parse_judgement("5 and 2 to 3", 6) == ([Rewrite(1, 2), Rewrite(4, 4)], "")
    assert parse_judgement("Parts 2 and 3 only plan 17 * 3 = 51.\n**Answer:** [5]", 60) == ([Rewrite(4, 4)], "")
    assert parse_judgement("Part 2 holds 17 * 3 = 51.", 60) == ([], "no_span")
    assert parse_judgement("1", 1) == ([Rewrite(0, 0)], "")
    assert parse_judgement("7", 6) == ([], "no_span") and parse_judgement("yes", 6) == ([], "no_span")


# ---- contract -------------------------------------------------------------------------------------------------------

STEP = "She sold half of the 48 clips in May, which is 24, so 48 + 24 = 72 clips in all."
QUESTION = "Natalia sold 48 clips in April and half as many in May. How many in all?"


@pytest.mark.parametrize(
    ("logic", "code", "fault"),
    [
        ("Halve the 48 clips sold in April and add both months.", "print(48 + 48 // 2)", ""),
        ("1. Halve the 48 clips and add.", "print(48 + 48 // 2)", ""),  # a list marker is no result
        (
            "A year has 12 months, so multiply the clips sold by 12.",
            "print(48 * 12)",
            "",
        ),  # a number that the code uses
        ("", "print(48 + 24)", "no_reasoning"),
        ("...", "print(48 + 24)", "no_reasoning"),
        ("Half of the 48 clips is 24.", "print(48 + 48 // 2)", "predicts_output"),
        ("Add the clips sold: 72 in all.", "print(48 + 48 // 2)", "predicts_output"),
        ("Add the clips sold in May.", "print(72)", "predicts_output"),  # nothing is computed
        ("Add the clips sold in May.", "x = 72\nprint(f'{x}')", "predicts_output"),
        ("Add the clips, which are 3.", "print(48 % 5)", "predicts_output"),
        ("Add the clips sold in May.", "print(int('72'))", "predicts_output"),
        ("Add the clips sold in May.", "print(round(72.0))", "predicts_output"),
        ("Add the clips sold in May.", "print('{}'.format(72))", "predicts_output"),
        ("Add the clips sold in May.", "t = 48\nt += 24\nprint(t)", ""),
        ("Add the clips sold in May.", "print('48'[::-1])", ""),
        ("Add the clips sold in May.", "print(not 48)", ""),
        ("Add the clips sold in May.", "print(int('1001000', 2))", ""),
        ("Take 50% of the 48 clips and add.", "print(48 + 0.5 * 48)", ""),
        ("Increase the 48 clips by 50\\%.", "print(48 * 1.5)", ""),
        ("Take 60% of the 48 clips and add.", "print(48 + 0.5 * 48)", "predicts_output"),
        ("Add the clips. The answer is \\boxed{72}.", "print(48 + 24)", "goes_on"),
        ("Add the clips.", "print('\\\\boxed{', 48 + 24, '}')", "goes_on"),
        ("Add the clips.\n```output\n72\n```", "print(48 + 24)", "goes_on"),
        ("Add the clips.</think>", "print(48 + 24)", "goes_on"),
        ("Add the clips sold. " * 30, "print(48 + 24)", "goes_on"),
        ("Consider a triangle whose angles satisfy trigonometric identities.", "print(48 + 24)", "changes_reasoning"),
    ],
)
def test_the_contract_of_a_rewrite(logic, code, fault):
    assert contract_fault(Rewrite(0, 0, logic, code), STEP, QUESTION) == fault


def test_demonstrations_keep_the_contract():
    for demonstration in DEMONSTRATIONS:
        known = demonstration.question
        for step in demonstration.steps:
            assert contract_fault(Rewrite(0, 0, step.logic, step.code), step.step, known) == "", step
            assert not states_output(step.logic, step.output, known)
            known += step.output


def test_a_stated_output_is_one_that_was_not_known_before():
    assert states_output("The sum of 20 and 30, namely 50.", "50.0\n", "")
    assert not states_output("The sum of 20 and 30.", "50\n", "") and not states_output("It is 50.", "50\n", "50 clips")


@pytest.mark.parametrize(
    ("logic", "output", "stated"),
    [
        ("It is x - y.", "x - y\n", True),
        ("Subtract, so that it is True.", "True\n", True),
        ("Check whether it is true.", "True\n", False),
        ("Simplify the sum of x and y.", "x - y\n", False),
        ("It is", "\n", False),
    ],
)
def test_an_output_without_numbers_may_be_stated_too(logic, output, stated):
    assert states_output(logic, output, "") is stated


def test_a_paraphrase_in_chinese_keeps_the_contract():
    question = "小明四月卖了48个夹子，五月卖了一半。一共卖了多少？"
    step = "五月卖出的是48的一半，也就是24个，所以一共是48+24=72个。"
    rewrite = Rewrite(0, 0, "计算四月的48个与五月卖出的一半之和。", "print(48 + 48 // 2)")
    assert contract_fault(rewrite, step, question) == ""
    other = Rewrite(0, 0, "考虑三角形内角满足恒等式", "print(48 + 48 // 2)")
    assert contract_fault(other, step, question) == "changes_reasoning"


def test_a_critic_without_an_answer_is_not_shown_one():
    assert feedback(" ", "it did not end") == (
        "\n\nYour last answer cannot be used: it did not end. Answer again, in the same form."
    )
    assert "was:\nx\n\nIt cannot be used" in feedback("x\n", "it did not end")


def test_numbers_have_one_spelling():
    assert numbers("1,200 and 1200.0, 007 and 0.50, x2") == {"1200", "7", ".5", "2"}


@pytest.mark.parametrize(
    ("output", "replaced", "same"),
    [
        ("72\n", "48 + 24 = 72.", True),
        ("72.0\n", "so 72", True),
        ("1,200", "is 1200 dollars", True),
        ("73\n", "48 + 24 = 72.", False),
        ("24\n72\n", "24, then 72", True),
        ("24\n71\n", "24, then 72", False),
        ("True\n", "that is true", True),
        ("x + y", "we get x+y", True),
        ("False\n", "that is true", False),
    ],
)
def test_an_output_agrees_with_the_text_that_already_has_it(output, replaced, same):
    assert agrees(output, replaced) is same


@pytest.mark.parametrize(
    ("output", "replaced", "same"),
    [
        ("-5\n", "so x = 5", False),
        ("-5\n", "so x = -5", True),
        ("-5\n", "so $x = −5$", True),
        ("5\n", "10-5 is 5", True),
        ("3\n", "Divide 12 by 3 to get 5.", False),
        ("3\n", "Subtract 3 from 6, which gives 3.", True),  # a known number, but also the result
        ("7\n", "We add: 7 + 6 = 14.", False),
        ("7\n", "We get 14 = 7 + 7 = 14.", False),
        ("0.6666666666666666\n", "which is about 0.667", True),
        ("0.6666666666666666\n", "which is about 0.66", False),
        ("51.4\n", "which is 51", False),
        ("x\n", "The extra box", False),
    ],
)
def test_known_numbers_are_no_results(output, replaced, same):
    assert agrees(output, replaced, "The numbers 3, 6, 7, 10 and 12.") is same


@pytest.mark.parametrize(
    ("rest", "same"),
    [
        (["Good.", "It is 51.", "So 52."], True),
        (["Good.", "It is 52."], False),
        (["Good.", "Then 51 + 9 is 60."], True),
        (["1. Good."], True),  # nothing to contradict
        ([], True),
    ],
)
def test_the_result_may_stand_behind_the_text_that_code_replaced(rest, same):
    assert agrees("51\n", "First compute 17 * 3.", "print(17 * 3)", rest) is same


def test_types_of_errors():
    assert error_type(ExecResult("error", "", "NameError: name 'x' is not defined (line 1)")) == "NameError"
    assert error_type(ExecResult("timeout", "", "took longer than 5 s")) == "timeout"
    assert error_type(ExecResult("no_output", "", "printed nothing")) == "no_output"


# ---- prompts --------------------------------------------------------------------------------------------------------


def test_the_critic_sees_question_solution_and_step_as_plain_text():
    tokenizer = byte_tokenizer(("<think>", "</think>"))
    critic = ChatCritic(tokenizer, TIRGEN_PROMPTS["critic"])
    ids, shared = critic.prompt("What {step} is\\1?", "</think> {question}", ["A. ", "B."], " told")
    text = decode(tokenizer, ids)
    assert (
        "Problem: What {step} is\\1?" in text and "far:\n</think> {question}" in text and "[1] A.\n[2] B. told" in text
    )
    assert tokenizer.convert_tokens_to_ids("</think>") not in ids
    other, _ = critic.prompt("?", "", ["C."])
    assert ids[:shared] == other[:shared] and decode(tokenizer, ids[:shared]).endswith("Problem: ")


def test_prompts_come_from_names_and_files(tmp_path):
    path = tmp_path / "critic.yaml"
    path.write_text("user: '{question} {solution} {step}'\nchat_kwargs: {enable_thinking: true}\n")
    prompts = load_prompts("few-shot", str(path), "judge")
    assert prompts.actor == "few-shot" and prompts.judge == TIRGEN_PROMPTS["judge"]
    assert prompts.critic == Prompt(user="{question} {solution} {step}", chat_kwargs={"enable_thinking": True})
    path.write_text("user: '{question} {step}'\n")
    with pytest.raises(UserError, match=r"--critic_prompt .*critic.yaml: user: must contain \{solution\}"):
        load_prompts("actor", str(path), "judge")
    with pytest.raises(UserError, match="--actor_prompt magic: no such file"):
        load_prompts("magic", "critic", "judge")
    with pytest.raises(UserError, match="--actor_prompt critic: is a prompt of the critic"):
        load_prompts("critic", "critic", "judge")
    with pytest.raises(UserError, match="--judge_prompt few-shot: no such file"):
        load_prompts("actor", "critic", "few-shot")


def test_the_opened_thought_is_not_encoded_twice():
    tokenizer = byte_tokenizer(("<think>", "</think>"))
    segments = [("<think>\nA", True), ("```output\n</think>\n```\n", False), ("</think>", True)]
    ids = encode_segments(tokenizer, segments, "<think>\n")
    assert decode(tokenizer, ids) == "A```output\n</think>\n```\n</think>"
    assert ids.count(tokenizer.convert_tokens_to_ids("</think>")) == 1, "tool output has no control tokens"
    assert encode_segments(tokenizer, []) == []


@pytest.mark.parametrize(
    ("text", "one_line", "max_tokens", "read"),
    [
        ("\nA.\nB.\n", True, 99, "\nA.\n"),
        ("A.\nB.\n", False, 99, "A.\nB.\n"),
        ("A.\nB.\n", False, 4, "A.\nB"),
        ("A.\n```python\nx = 1\n```\nB", False, 14, "A.\n```python\nx = 1\n```"),  # a block is read to its end
        ("```python\nx\n```\nB", True, 99, "```python\nx\n```"),
        ("A.\n```output\n5", False, 99, "A.\n```output"),
    ],
)
def test_where_a_step_stops(text, one_line, max_tokens, read):
    assert read_until(StepStop(max_tokens, one_line), text) == read


@pytest.mark.parametrize(
    ("code", "claimed"),
    [
        ("print(2 + 2)  # Output: 5", {"5"}),
        ("x = 7 * 6  # 42", {"42"}),
        ("print(7 * 6)  # => 42", {"42"}),
        ('"""Returns 41."""\nprint(1)', {"41"}),
        ('print("The answer is 41:", 2 + 3)', {"41"}),
        ('print("The answer is", 2 + 3)', set()),
        ("# 1. multiply\nprint(3 * 4)", set()),
        ("# the result is 12 times 30\nprint(12 * 30)", set()),
        ("print(sum(range(5)))  # the gcd of 4 and 6", set()),
    ],
)
def test_comments_and_strings_may_not_claim_an_output(code, claimed):
    assert remarked_outputs(code) == claimed
    fault = contract_fault(Rewrite(0, 0, "Multiply the numbers.", code), "Multiply the numbers.", "")
    assert (fault == "predicts_output") == (bool(claimed) or is_constant(code))
