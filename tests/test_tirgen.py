"""Tests of the actor-critic loop with scripted models, for plain, chat and reasoning actors."""

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from conftest import ScriptedEngine, ScriptedExecutor, byte_tokenizer

from run_tirgen import ActorCritic, Settings, critic_sampling, resolve, sample_drafts
from thor.demo import synthetic_problems
from thor.demo.few_shot import DEMONSTRATIONS, few_shot_critic, nearest_demonstrations
from thor.engines import RequestRejected
from thor.prompts import TIRGEN_PROMPTS
from thor.rollout import drive
from thor.run_folder import Run
from thor.text import decode
from thor.tirgen.draft import Draft, to_ledger
from thor.tirgen.filters import FilterSettings, Rates, first_fault
from thor.tirgen.roles import Prompts
from thor.tirgen.store import read_drafts, to_row
from thor.trajectory import ExecResult, Problem

PROBLEM = Problem("p", "What is 2 + 2?", "4")
BLOCK = "Add the numbers.\n```python\nprint(2 + 2)\n```"
# The shape of Qwen3's chat template; `OPENS` is that of models whose template opens the thought.
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)
OPENS = QWEN3 + "{% if enable_thinking is not defined %}<think>\n{% endif %}"


def chat_tokenizer(template: str = QWEN3):
    tokenizer = byte_tokenizer(("<think>", "</think>"))
    tokenizer.chat_template = template
    return tokenizer


def adds(code: str) -> ExecResult:
    """A judge for ScriptedExecutor that evaluates `print(...)`; code that contains 'bad' fails."""
    if "bad" in code:
        return ExecResult("error", "", "NameError: name 'bad' is not defined (line 1)")
    return ExecResult("ok", f"{eval(code.strip().removeprefix('print'))}\n")


def build(tokenizer, actor_replies, critic_replies, prompts="few-shot", judge=adds, **settings):
    """Generate one draft with an engine that plays both actor and critic. Returns (draft, engine)."""

    def reply(request, turn):
        replies = actor_replies if request.id.endswith("/actor") else critic_replies
        return replies[min(turn, len(replies) - 1)]

    engine, executor = ScriptedEngine(tokenizer, reply), ScriptedExecutor(judge)
    limits = {"step_tokens": 4000, "code_tokens": 4000, "max_tokens": 20_000}
    settings = resolve(Settings(**limits | settings))
    chat = Prompts(*(TIRGEN_PROMPTS[name] for name in ("actor", "critic", "judge")))
    chosen = chat if prompts == "chat" else Prompts("few-shot", "few-shot", TIRGEN_PROMPTS["judge"])
    loop = ActorCritic(engine, engine, chosen, settings)
    [draft] = drive([loop.generate(PROBLEM, "p#0")], engine, executor, grade=Draft.grade)
    return draft, engine


def asked(engine, who: str) -> list[str]:
    """The prompts that actor or critic got, as text."""
    requests = [r for r in engine.requests if r.id.endswith(who)]
    return [engine.tokenizer.decode(r.token_ids) for r in requests]


def test_demonstrations_print_their_recorded_output(executor):
    steps = [step for demonstration in DEMONSTRATIONS for step in demonstration.steps]
    for step, result in zip(steps, executor.run([step.code for step in steps]), strict=True):
        assert result.passed and result.observation() == step.output, step
    assert {len(demonstration.steps) for demonstration in DEMONSTRATIONS} == {1, 2, 3}


def test_a_step_of_a_demonstration_computes_with_the_output_of_the_one_before():
    for demonstration in DEMONSTRATIONS:
        for before, step in pairwise(demonstration.steps):
            assert before.output in step.logic and before.output in step.code
            assert before.output not in demonstration.question


def test_no_demonstration_is_a_problem():
    problems = {p.question for split in ("train", "test") for p in synthetic_problems(split, 1500, 0)}
    assert not problems & {d.question for d in DEMONSTRATIONS}


def test_most_similar_demonstration_comes_last():
    assert "lcm" in nearest_demonstrations("What is the least common multiple of 6 and 8?")[-1].steps[0].code
    assert "primerange" in nearest_demonstrations("Count the primes between 5 and 77.")[-1].steps[0].code


def test_problems_of_several_steps_get_such_demonstrations():
    wanted = {"product_digits": 2, "lcm_divisors": 2, "digits_power": 3}
    for problem in synthetic_problems("train", 200, 0):
        first, last = (len(demonstration.steps) for demonstration in nearest_demonstrations(problem.question))
        assert last == wanted.get(problem.family, 1) and (first == last or last == 1), problem


def test_the_critic_sees_the_demonstrated_step_that_is_most_like_the_one_at_hand():
    question = "What is the sum of the digits of the product of 12 and 34?"
    assert few_shot_critic(question, "Multiply 12 by 34.").count("\nprint(sum(") == 0
    second = few_shot_critic(question, "Add up the digits of 408.")
    assert second.count("\nprint(sum(") == 2 and "318 * 467" not in second


# ---- steps of one line ----------------------------------------------------------------------------------------------


def test_code_replaces_the_step_and_the_actor_continues_from_it(tokenizer):
    draft, engine = build(tokenizer, ["Add the numbers: 5.\n", "The answer is \\boxed{4}.\n"], [BLOCK, "none\n"])
    assert draft.segments == [
        ("Add the numbers.\n```python\nprint(2 + 2)\n```\n", True),
        ("```output\n4\n```\n", False),
        ("The answer is \\boxed{4}.", True),
    ]
    assert draft.finished and draft.correct and not draft.dropped
    [*_, last] = asked(engine, "actor")
    assert last.endswith(draft.segments[0][0] + draft.segments[1][0])


def test_step_is_kept_if_the_critic_says_none(tokenizer):
    draft, _ = build(tokenizer, ["Think.\n", "So \\boxed{4}.\n"], [" none\n"])
    assert draft.text == "Think.\nSo \\boxed{4}." and draft.codes == [] and draft.finished


def test_the_critic_judges_the_first_and_the_last_step(tokenizer):
    draft, engine = build(tokenizer, ["Add the numbers: \\boxed{4}\n", "So \\boxed{4}.\n"], [BLOCK, "none\n"])
    assert draft.codes == ["print(2 + 2)\n"] and draft.text.endswith("So \\boxed{4}.") and draft.finished
    draft, engine = build(tokenizer, ["Add the numbers.\n", "So \\boxed{5}.\n"], [BLOCK, "none\n"])
    assert len(asked(engine, "critic")) == 2


def test_an_answer_that_repeats_the_output_is_not_shown_to_a_few_shot_critic(tokenizer):
    draft, engine = build(tokenizer, ["Add the numbers.\n", "So \\boxed{4}.\n"], [BLOCK])
    assert draft.finished and draft.correct and len(asked(engine, "critic")) == 1


@pytest.mark.parametrize("reply", ["none", "None.", "**none**", "<think>\nShall I? ```python\n1\n```\n</think>\nnone"])
def test_a_decision_against_code_takes_many_forms(reply):
    draft, _ = build(chat_tokenizer(), ["It is \\boxed{4}."], [reply], "chat")
    assert draft.text == "It is \\boxed{4}." and draft.finished and not draft.rejected


def test_none_as_the_first_word_of_a_sentence_before_a_block_is_no_decision_against_code():
    reply = "None of the numbers needs care, add:\n```python\nprint(2 + 2)\n```"
    draft, _ = build(
        chat_tokenizer(), ["Add the numbers, none needs care: 4.\n", "\\boxed{4}"], [reply, "none"], "chat"
    )
    assert draft.codes == ["print(2 + 2)\n"] and draft.correct


def test_failed_code_goes_back_to_the_critic_with_its_error():
    bad = "Add the numbers.\n```python\nprint(bad + 2)\n```"
    draft, engine = build(chat_tokenizer(), ["Add the numbers: 4.\n", "\\boxed{4}"], [bad, BLOCK, "none"], "chat")
    assert draft.codes == ["print(2 + 2)\n"] and draft.errors == {"NameError": 1} and draft.correct
    first, second, _ = asked(engine, "critic")
    assert "NameError" not in first and "name 'bad' is not defined" in second and "print(bad + 2)" in second


def test_a_draft_whose_code_never_works_is_dropped(tokenizer):
    bad = "Add the numbers.\n```python\nprint(bad + 2)\n```"
    draft, engine = build(tokenizer, ["Add the numbers.\n"], [bad], code_tries=3)
    assert draft.dropped == "code_failed" and draft.errors == {"NameError": 3} and len(asked(engine, "critic")) == 3


def test_a_rewrite_that_breaks_the_contract_is_counted_and_the_step_is_kept(tokenizer):
    claims = "Add the numbers, which gives 4.\n```python\nprint(2 + 2)\n```"
    draft, _ = build(tokenizer, ["Add the numbers.\n", "\\boxed{4}\n"], [claims, "no block", "none\n"], code_tries=2)
    assert draft.text == "Add the numbers.\n\\boxed{4}" and not draft.dropped
    assert draft.rejected == {"predicts_output": 1, "no_code": 1}


def test_a_claim_of_the_real_output_is_found_after_the_run(tokenizer):
    claims = "Subtract 30 from 70, or 40 from 80.\n```python\nprint(70 - 30 + 0 * 40 * 80)\n```"
    draft, _ = build(tokenizer, ["Subtract 30 from 70.\n", "\\boxed{4}\n"], [claims, claims, "none\n"])
    assert draft.rejected == {"predicts_output": 2} and draft.codes == []


def test_infra_faults_drop_the_draft(tokenizer):
    draft, _ = build(tokenizer, ["Add the numbers.\n"], [BLOCK], judge=lambda code: ExecResult("infra"))
    assert draft.dropped == "infra" and not draft.correct


def test_prompt_longer_than_the_context_drops_the_draft(tokenizer):
    engine = ScriptedEngine(tokenizer, lambda request, turn: "x\n", context=100)
    loop = ActorCritic(engine, engine, Prompts("few-shot", "few-shot", TIRGEN_PROMPTS["judge"]), resolve(Settings()))
    [draft] = drive([loop.generate(PROBLEM, "p#0")], engine, ScriptedExecutor(adds))
    assert draft.dropped == "too_long" and not engine.requests


def test_a_step_that_does_not_fit_into_the_critic_is_kept():
    def reply(request, turn):
        return "So it is \\boxed{4}."

    actor = ScriptedEngine(chat_tokenizer(), reply)
    critic = ScriptedEngine(chat_tokenizer(), reply, context=100)
    chat = Prompts(*(TIRGEN_PROMPTS[name] for name in ("actor", "critic", "judge")))
    loop = ActorCritic(actor, critic, chat, resolve(Settings(step_tokens=400, code_tokens=400, max_tokens=4000)))
    [draft] = drive([loop.generate(PROBLEM, "p#0")], actor, ScriptedExecutor(adds), grade=Draft.grade)
    assert draft.correct and draft.rejected == {"too_long": 1} and not critic.requests


def test_actor_and_critic_sample_with_settings_of_their_own(tokenizer):
    _, engine = build(tokenizer, ["Add the numbers.\n", "\\boxed{4}\n"], [BLOCK, "none\n"], temperature=0.6, top_k=30)
    assert {(r.temperature, r.top_k) for r in engine.requests} == {(0.6, 30)}
    own = {"critic_temperature": 0.0, "critic_top_k": 0, "critic_top_p": 0.9}
    _, engine = build(tokenizer, ["Add.\n", "\\boxed{4}\n"], [BLOCK, "none\n"], temperature=0.6, top_k=30, **own)
    for request in engine.requests:
        expected = (0.6, 30, 1.0) if request.id.endswith("actor") else (0.0, 0, 0.9)
        assert (request.temperature, request.top_k, request.top_p) == expected
    assert critic_sampling(Settings(temperature=0.3)).temperature == 0.3


# ---- blocks and outputs that the actor writes by itself -------------------------------------------------------------

OWN = "Add the numbers.\n```python\nprint(2 + 2)\n```\n```output\n5\n```\nSo it is \\boxed{5}."


@pytest.mark.parametrize("prompts", ["few-shot", "chat"])
def test_a_block_that_the_actor_writes_is_run_and_its_claimed_output_is_cut(prompts):
    actor = [OWN, "So it is \\boxed{4}."]
    if prompts == "few-shot":  # a step is one line
        actor = ["Add the numbers.\n", OWN.partition("\n")[2], "So it is \\boxed{4}."]
    draft, _ = build(chat_tokenizer(), actor, ["none\n"], prompts)
    assert draft.segments == [
        ("Add the numbers.\n```python\nprint(2 + 2)\n```\n", True),
        ("```output\n4\n```\n", False),
        ("So it is \\boxed{4}.", True),
    ]
    assert draft.correct and draft.finished and first_fault(draft, FilterSettings()) == ("", "")


def test_a_failed_block_of_the_actor_goes_to_the_critic():
    own = "Add the numbers.\n```python\nprint(bad + 2)\n```"
    draft, engine = build(chat_tokenizer(), [own, "\\boxed{4}"], [BLOCK, "none"], "chat")
    assert draft.codes == ["print(2 + 2)\n"] and draft.errors == {"NameError": 1} and draft.correct
    [prompt, _] = asked(engine, "critic")
    assert "print(bad + 2)" in prompt and "is not defined" in prompt


def test_a_try_whose_judgement_the_server_rejects_ends_there():
    """The block that the actor wrote after that is not run, and nothing more is asked."""
    own = "Look at it.\nAdd the numbers.\n```python\nprint(bad + 2)\n```"
    engine = ScriptedEngine(chat_tokenizer(), lambda request, turn: own)
    step = engine.step

    def rejecting_step():
        if engine.queue[0].id.endswith("critic"):
            raise RequestRejected("http://critic: rejected the request with 400", engine.queue.pop(0).id)
        return step()

    engine.step = rejecting_step
    chat = Prompts(*(TIRGEN_PROMPTS[name] for name in ("actor", "critic", "judge")))
    loop = ActorCritic(engine, engine, chat, resolve(Settings(critic_calls=2, step_tokens=400, max_tokens=4000)))
    executor = ScriptedExecutor(adds)
    [draft] = drive([loop.generate(PROBLEM, "p#0")], engine, executor, grade=Draft.grade)
    assert draft.dropped == "rejected" and draft.codes == [] and not draft.errors and len(engine.requests) == 2
    assert str(loop.rejections["p#0"]).startswith("http://critic")


def test_a_block_of_the_actor_without_prose_gets_its_reasoning_from_the_critic():
    own = "```python\nprint(2 + 2)\n```"
    draft, engine = build(chat_tokenizer(), [own, "So it is \\boxed{4}."], [BLOCK, "none"], "chat")
    assert draft.text.startswith(f"{BLOCK}\n```output") and draft.rejected == {"no_reasoning": 1} and draft.correct
    assert own in asked(engine, "critic")[0] and "no reasoning before the block" in asked(engine, "critic")[0]
    assert first_fault(draft, FilterSettings()) == ("", "")


def test_a_few_shot_critic_is_not_asked_for_the_reasoning_of_a_block(tokenizer):
    draft, engine = build(tokenizer, ["```python\nprint(2 + 2)\n```", "So it is \\boxed{4}."], [BLOCK])
    assert draft.dropped == "empty_thought" and draft.codes == [] and len(engine.requests) == 1
    assert first_fault(draft, FilterSettings()) == ("correct, code passed", "empty_thought")


def test_the_line_before_a_block_of_the_actor_is_not_replaced_by_code_too():
    own = "First, look at it.\nAdd the numbers.\n```python\nprint(2 + 2)\n```"
    draft, engine = build(chat_tokenizer(), [own, "\\boxed{4}"], ["none"], "chat")
    assert draft.codes == ["print(2 + 2)\n"]
    assert "Add the numbers" not in asked(engine, "critic")[0].rpartition("Next step:")[2]


def test_an_output_without_a_block_is_cut():
    actor = ["It is easy.\n```output\n5\n```\nSo \\boxed{5}", "So it is \\boxed{4}."]
    draft, _ = build(chat_tokenizer(), actor, ["none"], "chat")
    assert draft.text == "It is easy.\nSo it is \\boxed{4}." and draft.correct
    draft, _ = build(chat_tokenizer(), ["```output\n5\n```\nSo \\boxed{5}"], ["none"], "chat")
    assert draft.dropped == "claimed_output"


def test_a_block_may_be_longer_than_a_step():
    code = "print(" + "1 + " * 50 + "0)"
    actor = [f"Add the numbers.\n```python\n{code}\n```", "\\boxed{4}"]
    draft, _ = build(chat_tokenizer(), actor, ["none"], "chat", step_tokens=40, code_tokens=400)
    assert draft.codes == [f"{code}\n"]
    draft, _ = build(chat_tokenizer(), [f"```python\n{code}\n```"], ["none"], "chat", step_tokens=40, code_tokens=40)
    assert draft.dropped == "block_too_long"


# ---- windows --------------------------------------------------------------------------------------------------------

WINDOW = "Let me see.\nFirst 17 * 3 is 51. Then 51 + 9 = 60, good.\nWait, is that all? Yes.\nThe sum is \\boxed{60}."
TWO_SPANS = (
    "[2] Multiply the first two: 17 * 3.\n```python\nprint(17 * 3)\n```\n"
    "[3] Then add 9 to 51.\n```python\nprint(51 + 9)\n```\n"
)


def test_several_spans_of_a_window_are_replaced_and_the_rest_stays_word_for_word():
    draft, engine = build(chat_tokenizer(), [WINDOW], [TWO_SPANS], "chat")
    assert "[1] Let me see.\n[2] First 17 * 3 is 51.\n[3] Then" in asked(engine, "critic")[0]
    assert draft.text == (
        "Let me see.\nMultiply the first two: 17 * 3.\n```python\nprint(17 * 3)\n```\n```output\n51\n```\n"
        "Then add 9 to 51.\n```python\nprint(51 + 9)\n```\n```output\n60\n```\n"
        "Wait, is that all? Yes.\nThe sum is \\boxed{60}."
    )
    assert draft.finished and len(draft.codes) == 2


def test_two_calls_judge_and_then_rewrite_each_span():
    rewrites = [part.partition("] ")[2] for part in TWO_SPANS.split("[")[1:]]
    draft, engine = build(chat_tokenizer(), [WINDOW], ["2, 3", *rewrites], "chat", critic_calls=2)
    one_call, _ = build(chat_tokenizer(), [WINDOW], [TWO_SPANS], "chat")
    assert draft.text == one_call.text and len(asked(engine, "critic")) == 3
    draft, engine = build(chat_tokenizer(), [WINDOW], ["none"], "chat", critic_calls=2)
    assert draft.text == WINDOW and len(asked(engine, "critic")) == 1


def test_text_that_builds_on_another_result_is_cut_and_the_actor_continues():
    wrong = WINDOW.replace("51", "41").replace("60", "50")
    first = TWO_SPANS[: TWO_SPANS.index("[3]")]
    draft, engine = build(chat_tokenizer(), [wrong, "So \\boxed{60}."], [first, "none"], "chat")
    assert draft.text == (
        "Let me see.\nMultiply the first two: 17 * 3.\n```python\nprint(17 * 3)\n```\n```output\n51\n```\n"
        "So \\boxed{60}."
    )
    assert draft.finished and len(asked(engine, "actor")) == 2


def test_text_that_states_the_output_later_is_kept():
    window = "First compute 17 * 3.\nIt is 51.\nThen 51 - 47 is 4.\nThe answer is \\boxed{4}."
    reply = "1. [1] Compute 17 * 3.\n```python\nprint(17 * 3)\n```"
    draft, _ = build(chat_tokenizer(), [window], [reply], "chat")
    assert draft.finished and draft.text.endswith("51\n```\n" + window.partition("\n")[2]) and draft.correct


def test_a_span_whose_code_breaks_the_contract_is_asked_for_again_alone():
    claims = TWO_SPANS.replace("Then add 9 to 51", "Then add 9 to 51, which is 60")
    again = "Then add 9 to 51.\n```python\nprint(51 + 9)\n```"
    draft, engine = build(chat_tokenizer(), [WINDOW], [claims, again], "chat")
    assert len(draft.codes) == 2 and draft.rejected == {"predicts_output": 1} and draft.finished
    assert asked(engine, "critic")[1].rpartition("Next step:\n")[2].startswith("Then 51 + 9 = 60, good.")


def test_windows_end_at_a_newline():
    actor = ["line one\nline tw", "line two\nSo the answer", "So \\boxed{4}"]
    draft, _ = build(chat_tokenizer(), actor, ["none"], "chat", step_tokens=len("line one\nline tw"))
    assert draft.text == "line one\nline two\nSo \\boxed{4}"


# ---- reasoning models -----------------------------------------------------------------------------------------------

THOUGHT = "<think>\nAdd the numbers: 4.\nThat is all.\n</think>\n\nThe answer is \\boxed{4}."
SPAN = "[1] Add the numbers.\n```python\nprint(2 + 2)\n```"
RESULT = (
    "<think>\nAdd the numbers.\n```python\nprint(2 + 2)\n```\n```output\n4\n```\n"
    "That is all.\n</think>\n\nThe answer is \\boxed{4}."
)


def test_the_thought_survives_a_rewrite_and_what_stands_behind_it_is_not_judged():
    draft, engine = build(chat_tokenizer(), [THOUGHT], [SPAN], "chat")
    assert draft.text == RESULT and draft.finished and draft.correct
    assert first_fault(draft, FilterSettings()) == ("", "")
    [prompt] = asked(engine, "critic")
    step = prompt.rpartition("Next step:\n")[2]
    assert "[2] That is all." in step and "boxed" not in step and "<think>\nAdd" not in step


def test_a_thought_that_the_template_opens_is_rendered_once():
    draft, engine = build(chat_tokenizer(OPENS), [THOUGHT.removeprefix("<think>\n")], [SPAN], "chat")
    assert draft.text == RESULT and draft.finished
    assert first_fault(draft, FilterSettings()) == ("", "")
    [prompt] = asked(engine, "actor")
    assert prompt.endswith("assistant\n<think>\n") and prompt.count("<think>") == 1


def test_a_first_window_of_one_line_keeps_its_think():
    window = "<think>\nAdd the numbers: 5.\n"
    actor = [window, "That is all.\n</think>\nThe answer"]
    tokens = len(window) - len("<think>") + 1
    draft, _ = build(chat_tokenizer(), [*actor, "\\boxed{4}"], [BLOCK, "none"], "chat", step_tokens=tokens)
    assert draft.text.startswith("<think>\nAdd the numbers.\n```python") and draft.finished
    assert first_fault(draft, FilterSettings()) == ("", "")


def test_the_thought_is_one_token_where_the_tokenizer_has_it():
    tokenizer = chat_tokenizer()
    draft, engine = build(
        tokenizer,
        ["<think>\nAdd the numbers: 5.\n", "x\n</think>\n\\boxed{4}"],
        [BLOCK, "none"],
        "chat",
        step_tokens=22,
    )
    *_, last = (r for r in engine.requests if r.id.endswith("actor"))
    assert last.token_ids.count(tokenizer.convert_tokens_to_ids("<think>")) == 1 and "<think>" in draft.text


BAD = "```python\nprint(bad)\n```"


@pytest.mark.parametrize(
    ("first", "reply", "text"),
    [
        (f"<think>Add.\n{BAD}", BLOCK, f"<think>{BLOCK}\n"),
        (f"<think>\n{BLOCK[BLOCK.index('`') :]}", BLOCK, f"<think>\n{BLOCK}\n"),
        (f"<think>Hm.\nAdd.\n{BAD}", BLOCK, f"<think>Hm.\n{BLOCK}\n"),
        (f"<think>Add.\n{BAD}", "none", "<think>"),
        (f"<think>Hm.\nDone.</think>\n{BAD}", "none", "<think>Hm.\nDone.</think>\n"),
    ],
)
def test_the_tags_of_the_thought_survive_the_rewrite_of_a_block(first, reply, text):
    rest = "Good, that is all.\n</think>\nThe answer is \\boxed{4}."
    replies = ["none", reply, "none"] if "Hm" in first else [reply, "none"]
    draft, _ = build(chat_tokenizer(), [first, rest], replies, "chat")
    assert draft.segments[0][0].startswith(text) and draft.policy_text.startswith("<think>") and draft.finished
    assert first_fault(draft, FilterSettings())[1] == ("thought" if "Done" in first else "")


def test_an_indented_block_of_the_actor_is_learned_as_it_ran():
    own = "1. Add them:\n   ```python\n   print(2 +\n     2)\n   ```"
    draft, _ = build(chat_tokenizer(), [own, "So it is \\boxed{4}."], ["none"], "chat")
    assert draft.segments[0][0] == "1. Add them:\n```python\nprint(2 +\n  2)\n```\n"
    assert draft.codes == ["print(2 +\n  2)\n"] and first_fault(draft, FilterSettings()) == ("", "")


def test_a_draft_that_a_limit_ends_is_not_correct():
    draft, _ = build(chat_tokenizer(), ["So \\boxed{4}.\n" * 9], ["none"], "chat", step_tokens=60, max_steps=2)
    assert draft.answer == "4" and not draft.finished and not draft.correct


def test_thinking_of_the_critic_is_switched_off():
    _, engine = build(chat_tokenizer(OPENS), [THOUGHT.removeprefix("<think>\n")], [SPAN], "chat")
    assert asked(engine, "critic")[0].endswith("assistant\n<think>\n\n</think>\n\n")


def test_blocks_in_the_thought_of_the_critic_are_not_run():
    thought = "<think>\nMaybe\n```python\nprint(bad + 2)\n```\nor not.\n</think>\n"
    draft, _ = build(chat_tokenizer(), ["Add the numbers: 4.\n", "\\boxed{4}"], [thought + BLOCK, "none"], "chat")
    assert draft.codes == ["print(2 + 2)\n"] and not draft.errors and "Maybe" not in draft.text
    draft, _ = build(
        chat_tokenizer(), ["Add the numbers: 4. \\boxed{4}"], ["<think>\nHm" + BLOCK], "chat", code_tries=2
    )
    assert draft.rejected == {"thought_unfinished": 2} and draft.codes == []


# ---- runs -----------------------------------------------------------------------------------------------------------


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


def few_shot_loop(engine, **settings) -> ActorCritic:
    settings = resolve(Settings(**{"step_tokens": 400, "code_tokens": 400, "max_tokens": 4000} | settings))
    return ActorCritic(engine, engine, Prompts("few-shot", "few-shot", TIRGEN_PROMPTS["judge"]), settings)


def test_order_of_requests_is_independent_of_tool_speed(tokenizer, tmp_path):
    def sample(name: str, delays: list[float]):
        engine = batch_steps(ScriptedEngine(tokenizer, reply))
        loop = few_shot_loop(engine, tries=1, out=str(tmp_path / name))
        run = Run(loop.settings.out, loop.settings, resume=False)
        run.start()
        with SlowTools(delays) as tools:
            sample_drafts(loop, problems, tools, run)
        return [request.id for request in engine.requests], [d for _, d in read_drafts([run / "drafts.jsonl"])]

    def reply(request, turn):
        if request.id.endswith("/critic"):
            return "none\n" if turn else BLOCK
        return "The answer is \\boxed{4}.\n" if turn else "Add the numbers.\n"

    problems = [Problem(f"p{i}", f"What is {i} + 2?", str(i + 2)) for i in range(4)]
    delays = [0.0, 0.05, 0.1, 0.15]
    order, drafts = sample("fast first", delays)
    other_order, other_drafts = sample("slow first", delays[::-1])
    assert order == other_order and len(order) == 12
    assert {d.problem for d in drafts} == set(problems) and len(drafts) == 4
    assert sorted(map(repr, drafts)) == sorted(map(repr, other_drafts))


def test_plain_reasoning_is_sampled_for_the_difficulty(tokenizer, tmp_path):
    def reply(request, turn):
        return (
            "The answer is \\boxed{4}.\n"
            if "#plain0" in request.id
            else "Add.\n"
            if "#plain" in request.id
            else "\\boxed{5}\n"
        )

    engine = ScriptedEngine(tokenizer, lambda r, turn: "none\n" if r.id.endswith("/critic") else reply(r, turn))
    loop = few_shot_loop(engine, tries=1, plain_tries=2, out=str(tmp_path / "run"))
    run = Run(loop.settings.out, loop.settings, resume=False)
    run.start()
    sample_drafts(loop, [PROBLEM], ScriptedExecutor(adds), run)
    drafts = {draft.name: draft for _, draft in read_drafts([run / "drafts.jsonl"])}
    assert set(drafts) == {"p#0", "p#plain0", "p#plain1"}
    assert drafts["p#plain0"].correct and drafts["p#plain0"].plain and not drafts["p#plain1"].correct
    assert not any("critic" in r.id for r in engine.requests if "plain" in r.id)
    assert drafts["p#plain1"].text == "Add.\n" * loop.settings.max_steps


def test_plain_reasoning_goes_on_behind_a_block_that_is_not_run():
    text = "I could run\n```python\nprint(4)\n```\nbut 2 + 2 = 4: \\boxed{4}."
    engine = ScriptedEngine(chat_tokenizer(), lambda request, turn: text)
    settings = Settings(actor_prompt="actor", critic_prompt="critic")
    loop = ActorCritic(engine, engine, Prompts(*map(TIRGEN_PROMPTS.get, ("actor", "critic", "judge"))), settings)
    [draft] = drive([loop.plain(PROBLEM, "p#plain0")], engine, ScriptedExecutor(adds))
    assert draft.text == text and draft.finished and not draft.codes


# ---- training data --------------------------------------------------------------------------------------------------


def test_sft_trains_on_the_policy_text_only(tokenizer):
    draft, _ = build(tokenizer, ["Add the numbers.\n", "The answer is \\boxed{4}.\n"], [BLOCK, "none\n"])
    row = to_row(draft, Rates(tries=4, correct=1))
    assert row["pass_rate"] == 0.25 and row["plain_pass_rate"] is None and row["calls"] == 1
    ledger = to_ledger(PROBLEM, [(s["text"], s["sampled"]) for s in row["segments"]], tokenizer)
    learned = [token for token, m in zip(ledger.token_ids, ledger.action_mask, strict=True) if m]
    assert decode(tokenizer, learned) == draft.policy_text and learned[-1] == tokenizer.eos_token_id
    assert decode(tokenizer, ledger.token_ids) == draft.text


def test_drafts_survive_their_file():
    draft, _ = build(chat_tokenizer(), [THOUGHT], [SPAN], "chat")
    assert Draft.from_record(draft.to_record()) == draft
