"""Prompts: the text that a model receives, apart from the few-shot demonstrations (`thor.demo`)."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jinja2 import TemplateError

from thor.text import decode, encode_around, start_ids

QUESTION = "{question}"  # where the question goes in `Prompt.user`
MARK = "\ue000"  # stands for the question while a chat template is rendered
PROMPT_FILE = "prompt.yaml"  # in a model folder: the prompt that the model was trained with


# ---- policy ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """A prompt template, and what it implies for the rollout. Each field is a key of a prompt file."""

    system: str = ""
    user: str = QUESTION
    chat: bool = True  # use the tokenizer's chat template
    chat_kwargs: dict[str, Any] = field(default_factory=dict)  # for the chat template, such as enable_thinking: false
    tools: bool = True  # run Python blocks; false: plain reasoning

    def render(self, tokenizer, question: str) -> list[int]:
        """Return the token ids of the prompt, up to the point where the model's response begins.

        With `chat`, the chat template renders system and user turn. If it has no system role, the system text becomes
        the start of the user turn. Without `chat`, the prompt is the system text, a blank line and the user text, after
        BOS if the tokenizer adds one. A tokenizer without a chat template gets the same, with the user text in the
        layout of the base prompts.

        The question is always plain text: what looks like a special or added token in it does not become one.
        Raises ValueError if the chat template fails or leaves out the user's text.
        """
        marked = self.user.replace(QUESTION, MARK)
        if self.chat and tokenizer.chat_template:
            text, start = self._render_chat(tokenizer, marked), []
        else:
            user = BASE_USER.replace(QUESTION, marked) if self.chat else marked
            text, start = (f"{self.system}\n\n{user}" if self.system else user), start_ids(tokenizer)
        ids = encode_around(tokenizer, text.split(MARK), question.strip())
        return ids if ids[: len(start)] == start else start + ids

    def _render_chat(self, tokenizer, user: str) -> str:
        """Text of the rendered chat template. `user` contains MARK, and so does the text."""

        def render(*messages: tuple[str, str]) -> str:
            chat = [{"role": role, "content": content} for role, content in messages]
            return tokenizer.apply_chat_template(
                chat, **self.chat_kwargs | {"tokenize": False, "add_generation_prompt": True}
            )

        try:
            text = render(("user", user))
            if self.system:
                without = text
                text = render(("user", f"{self.system}\n\n{user}"))
                with contextlib.suppress(TemplateError):  # the template refuses a system role
                    if (full := render(("system", self.system), ("user", user))) != without:  # or leaves it out
                        text = full
        except TemplateError as error:
            raise ValueError(f"the tokenizer's chat template cannot render the prompt: {error}") from error
        if MARK not in text:
            raise ValueError("the tokenizer's chat template leaves out the text of the user turn")
        return text

    def save(self, folder: str | Path) -> None:
        """Write the prompt into a model folder."""
        text = yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True, width=120)
        Path(folder, PROMPT_FILE).write_text(text, encoding="utf-8")


TOOL_SYSTEM = (
    "Solve the problem. Each ```python block is run by itself, must print its result, and is followed by its output. "
    "Put the final answer in \\boxed{}."
)
PLAIN_SYSTEM = "Solve the problem step by step. Put the final answer in \\boxed{}."
BASE_USER = f"Question: {QUESTION}\nAnswer:\n"
PROMPTS = {  # built-in prompts by name
    "tool": Prompt(TOOL_SYSTEM),
    "plain": Prompt(PLAIN_SYSTEM, tools=False),
    "tool-base": Prompt(TOOL_SYSTEM, BASE_USER, chat=False),
    "plain-base": Prompt(PLAIN_SYSTEM, BASE_USER, chat=False, tools=False),
}
TYPE_NAMES = {str: "text", bool: "true or false", dict: "a mapping"}


def load_prompt(name_or_file: str | Path) -> Prompt:
    """Return a built-in prompt by name, or read a YAML file with fields of `Prompt`.

    A name without a value keeps its default. Raises ValueError with one line that names the file and what is wrong.
    """
    if name_or_file in PROMPTS:
        return PROMPTS[name_or_file]
    try:
        values = yaml.safe_load(Path(name_or_file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{name_or_file}: no such file, nor one of the prompts {', '.join(PROMPTS)}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{name_or_file}: {' '.join(str(error).split())}") from error
    fields = {f.name: f for f in dataclasses.fields(Prompt)}
    if not isinstance(values, dict) or not values:
        raise ValueError(f"{name_or_file}: must consist of 'name: value' lines with the names {', '.join(fields)}")
    for name, value in values.items():
        if name not in fields:
            raise ValueError(f"{name_or_file}: no field is named {name!r}; the fields are {', '.join(fields)}")
        wanted = type(getattr(PROMPTS["tool"], name))
        if value is not None and not isinstance(value, wanted):
            raise ValueError(f"{name_or_file}: {name}: must be {TYPE_NAMES[wanted]}, not {value!r}")
        if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
            raise ValueError(f"{name_or_file}: {name}: has an unpaired surrogate, which is not valid Unicode")
    prompt = Prompt(**{name: value for name, value in values.items() if value is not None})
    if QUESTION not in prompt.user:
        raise ValueError(f"{name_or_file}: user: must contain {QUESTION}")
    return prompt


def opened_thought(tokenizer, prompt_ids: list[int]) -> str:
    """The start of a thought with which a rendered prompt ends, such as "<think>" and a newline, or ""."""
    match = re.search(r"<think>\s*$", decode(tokenizer, prompt_ids[-16:]))
    return match[0] if match else ""


def observation_text(output: str, before: str) -> str:
    """Return the fenced block that shows tool output to the model; `before` is the text that it is appended to."""
    return ("" if before.endswith("\n") else "\n") + f"```output\n{output}\n```\n"


NO_ROUNDS = "Not run: no tool calls are left. Answer without code."  # instead of the output of a further block


def tir_step(logic: str, code: str) -> str:
    """Return one step of a trajectory: a line of reasoning and a Python block."""
    return f"{logic}\n```python\n{code}\n```\n"


# ---- TIRGen ---------------------------------------------------------------------------------------------------------
# The critic replies with the word "none", or with a line of pure reasoning and one Python block for each place where
# code helps. Few-shot prompts (thor/demo/few_shot.py) ask for the same format.

ACTOR_SYSTEM = """You solve mathematics problems in natural language, one small step after another. Do not write \
code: when a step needs exact computation, say what has to be computed and how; a program may then be inserted for \
you with its output, on which you can rely. When the answer is known, state it once in \\boxed{} and stop."""

CRITIC_USER = """Below are a problem, its solution so far, and the next step of that solution. Find the places in the \
next step where Python can do the work exactly: arithmetic, solving equations, enumeration, or a check.
If there is none, answer with the single word: none
Otherwise, write for each such place
- its reasoning alone, taken from the step, in one or two sentences: what to compute and why, without any result;
- one block that opens with ```python and closes with ```. It must be complete in itself (imports included; nothing \
carries over from earlier blocks), may use numpy and sympy, and must compute and print the result that the step needs.
If the step has numbered parts, start the reasoning with the numbers of the parts that it and the block replace, such \
as [2] or [2-4]. All other parts stay as they are. Do not write the output of a block, and do not continue the solution.

Problem: {question}

Solution so far:
{solution}

Next step:
{step}"""

JUDGE_USER = """Below are a problem, its solution so far, and the next step of that solution. Find the parts of the \
next step that hold work that Python can do exactly: arithmetic, solving equations, enumeration, or a check. A part \
that only plans, explains, or repeats a known result holds none.
Answer with the numbers of these parts, neighbours that belong to one computation as a range, such as: 2-4, 7
A step without numbers is part 1. If there is no such part, answer with the single word: none

Problem: {question}

Solution so far:
{solution}

Next step:
{step}"""

NO_THOUGHT = {"enable_thinking": False}  # for chat templates that know it; others ignore it
TIRGEN_PROMPTS = {  # by name, beside PROMPTS
    "actor": Prompt(ACTOR_SYSTEM),
    "critic": Prompt(user=CRITIC_USER, chat_kwargs=NO_THOUGHT),
    "judge": Prompt(user=JUDGE_USER, chat_kwargs=NO_THOUGHT),
}
