"""A draft: one try at a trajectory, as text that does not depend on a tokenizer.

The text of a reasoning model starts with its <think>, even if the chat template writes that in the prompt.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field

from thor.prompts import Prompt, load_prompt, observation_text, opened_thought
from thor.text import encode, extract_answer
from thor.trajectory import ExecResult, Problem, Trajectory
from thor.verify import verify

THINK, END_THINK = "<think>", "</think>"


@dataclass
class Draft:
    """One try at one problem. Its lines in drafts.jsonl are `to_record`."""

    problem: Problem
    name: str = ""  # unique in a run; requests are named and seeded by it
    plain: bool = False  # plain reasoning, sampled only to estimate the difficulty of the problem
    # (text, whether the policy is to learn it): its text and tool output alternate
    segments: list[tuple[str, bool]] = field(default_factory=list)
    codes: list[str] = field(default_factory=list)
    statuses: list[str] = field(default_factory=list)  # execution status of each entry of `codes`
    finished: bool = False  # the actor ended it
    # why it was given up: 'code_failed' | 'block_too_long' | 'claimed_output' | 'empty_step' | 'empty_thought' |
    # 'too_long' | 'infra' | 'rejected' (by the model server)
    dropped: str = ""
    correct: bool = False  # finished, and the answer is verified
    rejected: Counter[str] = field(default_factory=Counter)  # replies of the critic that broke its contract, by reason
    errors: Counter[str] = field(default_factory=Counter)  # runs of code that failed, by type of error
    tokens: Counter[str] = field(default_factory=Counter)  # tokens sampled, by 'actor' and 'critic'
    requests: int = 0  # to actor and critic

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.segments)

    @property
    def policy_text(self) -> str:
        """The text without tool output."""
        return "".join(text for text, own in self.segments if own)

    @property
    def observed(self) -> str:
        """The tool output."""
        return "".join(text for text, own in self.segments if not own)

    @property
    def answer(self) -> str | None:
        return extract_answer(self.policy_text)

    def grade(self) -> None:
        """Verify the answer."""
        answer = self.answer if self.finished and not self.dropped else None
        self.correct = answer is not None and verify(answer, self.problem.answer)

    def has_prose(self, text: str) -> bool:
        """Whether a block that follows `text` at the end of the draft has prose before it, after the last output."""
        before = self.segments[-1][0] if self.segments and self.segments[-1][1] else ""
        return any(character.isalnum() for character in (before + text).replace(THINK, ""))

    def append(self, text: str) -> None:
        """Append text that the policy is to learn."""
        if self.segments and self.segments[-1][1]:
            self.segments[-1] = (self.segments[-1][0] + text, True)
        elif text:
            self.segments.append((text, True))

    def append_block(self, text: str, code: str, result: ExecResult) -> None:
        """Append text that ends with a code block, and the observation of its run."""
        self.append(text)
        self.segments.append((observation_text(result.observation(), text), False))
        self.codes.append(code)
        self.statuses.append(result.status)

    def to_record(self) -> dict:
        return {**vars(self), "problem": dataclasses.asdict(self.problem)}

    @classmethod
    def from_record(cls, record: dict) -> Draft:
        counters = {name: Counter(record[name]) for name in ("rejected", "errors", "tokens")}
        segments = [(text, own) for text, own in record["segments"]]
        return cls(**{**record, **counters, "segments": segments, "problem": Problem(**record["problem"])})


def thought_span(before: str, text: str) -> tuple[int, int]:
    """Where the critic may work in `text`, which the actor wrote after `before`: (start, end).

    This is the inside of the thought, if there is one; nothing if it has ended; and everything if the actor has none.
    """
    if END_THINK in before:
        return len(text), len(text)
    start = text.find(THINK)
    start = start + len(THINK) if start >= 0 else 0
    end = text.find(END_THINK, start)
    return start, end if end >= 0 else len(text)


def to_ledger(
    problem: Problem, segments: list[tuple[str, bool]], tokenizer, prompt: Prompt | None = None
) -> Trajectory:
    """Encode each segment separately, as a rollout would. segments: (text, was it written by the policy?).

    A row starts with the whole thought, from "<think>" on. A start that the prompt ends with is not repeated.
    """
    prompt_ids = (prompt or load_prompt("tool")).render(tokenizer, problem.question)
    trajectory = Trajectory(problem, prompt_ids, finish="stop", reward=1.0)
    opened = opened_thought(tokenizer, prompt_ids)
    for i, (text, sampled) in enumerate(segments):
        if i == 0:
            text = text.removeprefix(opened if text.startswith(opened) else opened.rstrip())
        ids = encode(tokenizer, text, added_tokens=sampled)
        if sampled:
            trajectory.append_sampled(ids, [0.0] * len(ids))
        else:
            trajectory.append_observation(ids)
    trajectory.append_sampled([tokenizer.eos_token_id], [0.0])
    return trajectory
