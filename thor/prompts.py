"""Prompts and templates: the text that a model receives, apart from the few-shot demonstrations (`thor.demo`)."""

from __future__ import annotations

from thor.text import encode

SYSTEM = "Solve the problem. Python blocks are run and their output is shown. Put the final answer in \\boxed{}."


# ---- policy ---------------------------------------------------------------------------------------------------------


def render_prompt(tokenizer, question: str) -> list[int]:
    """Return the token ids of the policy's prompt. A tokenizer without a chat template gets plain text."""
    if not tokenizer.chat_template:
        return encode(tokenizer, f"{SYSTEM}\n\nQuestion: {question}\nAnswer:\n")
    return render_chat(tokenizer, question, SYSTEM)


def render_chat(tokenizer, user: str, system: str = "") -> list[int]:
    """Return the token ids of a chat up to the point where the assistant's reply begins."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": user})
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def observation_text(output: str, before: str) -> str:
    """Return the fenced block that shows tool output to the model; `before` is the text that it is appended to."""
    return ("" if before.endswith("\n") else "\n") + f"```output\n{output}\n```\n"


def tir_step(logic: str, code: str) -> str:
    """Return one step of a trajectory: a line of reasoning and a Python block."""
    return f"{logic}\n```python\n{code}\n```\n"


# ---- TIRGen: instructions for chat models ---------------------------------------------------------------------------
# The critic replies with the word "none", or with a line of pure reasoning and one Python block. Few-shot prompts
# (thor/demo/few_shot.py) ask for the same format.

ACTOR_INSTRUCT = """You solve mathematics problems in natural language, one small step after another. Do not write \
code: when a step needs exact computation, say what has to be computed and how; a program may then be inserted for \
you with its output, on which you can rely. When the answer is known, state it once in \\boxed{} and stop."""

CRITIC_INSTRUCT = """Below is a problem, its solution so far, and the next step of that solution. Decide whether \
the next step holds something that Python can do exactly: arithmetic, solving equations, enumeration, or a check.
If it does not, answer with the single word: none
If it does, answer with
1. the reasoning of the step alone, in one or two sentences, without any computed result;
2. one block that opens with ```python and closes with ```, complete in itself (imports included; nothing carries over
   from earlier blocks), with numpy and sympy at hand, that prints the result the step needs.

Problem: {question}

Solution so far:
{solution}

Next step:
{step}
"""
