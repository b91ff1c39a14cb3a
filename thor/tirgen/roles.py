"""Actor and critic: the prompts that each gets, where its turns stop, and what ends a solution.

Methods that return a prompt return (token ids, number of leading ids that other requests share).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from thor.attention import common_prefix
from thor.demo import few_shot_actor, few_shot_critic, few_shot_plain
from thor.engines import StopRule
from thor.prompts import QUESTION, TIRGEN_PROMPTS, Prompt, load_prompt, opened_thought
from thor.settings import UserError
from thor.text import FenceParser, encode, start_ids
from thor.tirgen.critic import first_block, numbers, show_parts, split_parts
from thor.tirgen.draft import THINK, Draft

FEW_SHOT = "few-shot"  # name of the prompts for small base models
FIELDS = (QUESTION, "{solution}", "{step}")  # what a prompt of the critic must contain


def critic_sampling(settings: Any) -> Any:
    """The settings with the critic's temperature, top_p and top_k in place of the actor's."""
    own = {name: getattr(settings, f"critic_{name}") for name in ("temperature", "top_p", "top_k")}
    return replace(settings, **{name: value for name, value in own.items() if value is not None})


class StepStop(FenceParser):
    """Stop rule of the actor: a code block closes, or `max_tokens` tokens that are not inside a block.

    It also stops where the actor opens an ```output block, because only the interpreter may write that.
    one_line: stop at the end of the first line, unless it opens a block.
    """

    def __init__(self, max_tokens: int, one_line: bool = False) -> None:
        super().__init__()
        self.max_tokens, self.one_line, self.tokens = max_tokens, one_line, 0

    def feed(self, piece: str) -> bool:
        self.tokens += 1
        if super().feed(piece) or self.open_at >= 0:
            return self.closed
        line_ended = self.one_line and "\n" in self.text.lstrip()
        recent = max(0, len(self.text) - len(piece) - len("``` output"))
        return line_ended or self.tokens >= self.max_tokens or bool(CLAIMED_OUTPUT.search(self.text, recent))


CLAIMED_OUTPUT = re.compile(r"^\s*```\s*output", re.MULTILINE | re.IGNORECASE)


class Prompts(NamedTuple):
    """The prompts of actor, critic, and the critic's first call if it has two: FEW_SHOT, or a chat prompt."""

    actor: Prompt | str
    critic: Prompt | str
    judge: Prompt | str


def load_prompts(actor_prompt: str, critic_prompt: str, judge_prompt: str) -> Prompts:
    """The prompts that these flags name: FEW_SHOT, a built-in one, or a YAML file. Raises UserError."""
    flags = {"actor_prompt": actor_prompt, "critic_prompt": critic_prompt, "judge_prompt": judge_prompt}
    prompts = []
    for flag, name in flags.items():
        known = dict(TIRGEN_PROMPTS) if flag == "judge_prompt" else {FEW_SHOT: FEW_SHOT, **TIRGEN_PROMPTS}
        try:
            prompt = known[name] if name in known else load_prompt(name)
        except ValueError as error:
            more = f", {', '.join(known)}" if "no such file" in str(error) else ""  # `load_prompt` lists the others
            raise UserError(f"--{flag} {error}{more}") from error
        missing = [] if flag == "actor_prompt" or prompt == FEW_SHOT else [f for f in FIELDS if f not in prompt.user]
        if missing:
            raise UserError(f"--{flag} {name}: user: must contain {', '.join(missing)}")
        if flag == "actor_prompt" and prompt != FEW_SHOT and FIELDS[-1] in prompt.user:
            raise UserError(f"--{flag} {name}: is a prompt of the critic, because it contains {FIELDS[-1]}")
        prompts.append(prompt)
    return Prompts(*prompts)


# ---- what the actor wrote -------------------------------------------------------------------------------------------


@dataclass
class Step:
    """What the actor wrote in one turn. code: the block that it wrote by itself after `prose`."""

    prose: str
    code: str | None
    ended: bool  # this is the end of its solution


def read_step(draft: Draft, text: str, ended: bool) -> Step:
    """Split what the actor wrote into prose and its own block. Drops the draft if nothing is left.

    Text that the length limit cut off ends at its last newline. An output that the actor claims is cut off.
    """
    block = first_block(text)
    prose, code = text, block.code
    if block.open_at >= 0:
        prose = text[: block.open_at].rstrip(" \t")  # without the indentation of the block
    claimed = CLAIMED_OUTPUT.search(prose)
    if claimed:
        prose, code, fault = prose[: claimed.start()], None, "claimed_output"
    elif block.open_at >= 0:
        fault = "block_too_long"
    else:
        fault = "empty_step"
        whole_lines = prose[: prose.rfind("\n") + 1]
        if not ended and whole_lines.replace(THINK, "").strip():
            prose = whole_lines
    ended = ended and not claimed and block.open_at < 0
    if not (prose.strip() or code is not None or ended or draft.dropped):
        draft.dropped = fault
    return Step(prose.rstrip() if ended else prose, code, ended)


# ---- actor ----------------------------------------------------------------------------------------------------------


class FewShotActor:
    """Continues demonstrations in plain text. A step is one line, and the line with the box is the last."""

    opened, one_line = "", True

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer

    def prompt(self, question: str) -> tuple[list[int], int]:
        return self._prompt(few_shot_actor(question), question)

    def plain_prompt(self, question: str) -> tuple[list[int], int]:
        return self._prompt(few_shot_plain(question), question)

    def _prompt(self, shared: str, question: str) -> tuple[list[int], int]:
        ids = start_ids(self.tokenizer) + encode(self.tokenizer, shared)
        return ids + encode(self.tokenizer, f"Question: {question}\n"), len(ids)

    def stop(self, max_tokens: int) -> StopRule:
        return StepStop(max_tokens, one_line=True)

    def is_last(self, text: str, finish: str) -> bool:
        return finish == "eos" or "\\boxed" in text


class ChatActor:
    """Answers a chat prompt until EOS. A step is a window of the reply.

    opened: what the chat template has already written of the thought, such as "<think>" and a newline.
    """

    one_line = False

    def __init__(self, tokenizer, prompt: Prompt) -> None:
        self.tokenizer, self._actor = tokenizer, prompt
        self._plain = replace(load_prompt("plain"), chat_kwargs=prompt.chat_kwargs)
        self.opened = opened_thought(tokenizer, prompt.render(tokenizer, "?"))

    def prompt(self, question: str) -> tuple[list[int], int]:
        ids = self._actor.render(self.tokenizer, question)
        return ids, len(ids) - 1

    def plain_prompt(self, question: str) -> tuple[list[int], int]:
        ids = self._plain.render(self.tokenizer, question)
        return ids, len(ids) - 1

    def stop(self, max_tokens: int) -> StopRule:
        return StepStop(max_tokens)

    def is_last(self, text: str, finish: str) -> bool:
        return finish == "eos"


def make_actor(tokenizer, prompt: Prompt | str) -> FewShotActor | ChatActor:
    return FewShotActor(tokenizer) if prompt == FEW_SHOT else ChatActor(tokenizer, prompt)


def encode_segments(tokenizer, segments: list[tuple[str, bool]], opened: str = "") -> list[int]:
    """Encode each segment by itself, as a rollout would. Only in the actor's own text is "</think>" a token.

    opened: the start of the first segment that the chat template writes, which is left out.
    """
    text = "".join(text for text, _ in segments[:1]).removeprefix(opened)
    return [i for text, own in [(text, True), *segments[1:]] for i in encode(tokenizer, text, added_tokens=own)]


# ---- critic ---------------------------------------------------------------------------------------------------------


class FewShotCritic:
    """Continues demonstrations of rewrites. A step is one part. Feedback is ignored: the next try has another seed.

    adds_reasoning: whether it can say what a block without prose computes.
    """

    thinks = adds_reasoning = False

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer

    def split(self, text: str) -> list[str]:
        return [text]

    def can_judge(self, text: str, observed: str) -> bool:
        """False for an answer that only repeats outputs: a model as small as this rewrites whatever it is shown."""
        return "\\boxed" not in text or not numbers(text) <= numbers(observed)

    def prompt(self, question: str, solution: str, parts: list[str], feedback: str = "") -> tuple[list[int], int]:
        step = show_parts(parts)
        shared = start_ids(self.tokenizer) + encode(self.tokenizer, few_shot_critic(question, step))
        return shared + encode(self.tokenizer, f"Question: {question}\nStep: {step}\nRewrite:"), len(shared)


class ChatCritic:
    """Answers a chat prompt that shows question, solution so far, and the parts of the next step.

    thinks: the rendered prompt opens a thought.
    """

    adds_reasoning = True

    def __init__(self, tokenizer, prompt: Prompt) -> None:
        self.tokenizer, self._template = tokenizer, prompt.user
        self._prompt = replace(prompt, user=QUESTION)  # the whole user turn is plain text, also a "</think>" in it
        self.thinks = bool(opened_thought(tokenizer, self._prompt.render(tokenizer, "?")))

    def split(self, text: str) -> list[str]:
        return split_parts(text)

    def can_judge(self, text: str, observed: str) -> bool:
        return True

    def prompt(self, question: str, solution: str, parts: list[str], feedback: str = "") -> tuple[list[int], int]:
        return self._render(question, solution or "(nothing yet)", show_parts(parts), feedback), self._shared

    def _render(self, *values: str) -> list[int]:
        fields = dict(zip(FIELDS, values, strict=False))
        text = re.sub("|".join(map(re.escape, fields)), lambda match: fields[match[0]], self._template)
        return self._prompt.render(self.tokenizer, text + values[-1])

    @cached_property
    def _shared(self) -> int:
        return common_prefix(self._render("1", "1", "1", ""), self._render("a", "a", "a", ""))


def make_critic(tokenizer, prompt: Prompt | str) -> FewShotCritic | ChatCritic:
    return FewShotCritic(tokenizer) if prompt == FEW_SHOT else ChatCritic(tokenizer, prompt)


def feedback(reply: str, reason: str) -> str:
    """What a critic whose reply could not be used is told."""
    shown = f"Your last answer was:\n{reply.strip()}\n\nIt" if reply.strip() else "Your last answer"
    return f"\n\n{shown} cannot be used: {reason}. Answer again, in the same form."
