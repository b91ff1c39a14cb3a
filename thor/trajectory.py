"""Records that every stage shares: problems, execution results, and the token ledger of a trajectory.

A trajectory is tau = (r1, a1, o1, ..., rn): the policy thinks (r), acts in one Python block (a), and the interpreter's
output is observed (o). The ledger holds token ids in the order in which they came to be. Text is derived from ids,
never the other way round, so what the trainer scores is exactly what the engine sampled.

Shapes, here and in every file: B sequences, T tokens, V vocabulary, G group size, P problems.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from thor.text import decode


@dataclass(frozen=True)
class Problem:
    """A question with its gold answer (an empty `answer` means that nobody knows it)."""

    id: str
    question: str
    answer: str = ""
    family: str = ""  # kind of problem, where the source tells one


@dataclass(frozen=True)
class ExecResult:
    """What running one snippet gave.

    status: 'ok' | 'error' | 'no_output' | 'timeout' | 'memory' | 'blocked' | 'infra'. The first says that the
    code passed, the last that the sandbox itself failed (never held against the code), the rest are failures.
    """

    status: str
    stdout: str = ""
    error: str = ""  # last line of the traceback, or one sentence; empty when status is 'ok'
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return self.status == "ok"

    def observation(self, limit: int = 256) -> str:
        """Text shown to the model: stdout, or the error; over `limit` characters its two ends around '...'."""
        text = (self.stdout if self.passed else self.error).strip("\n")
        half = limit // 2
        return text if len(text) <= limit else text[:half] + "..." + text[-half:]


@dataclass
class Step:
    """One (think, act, observe) with token offsets into the *whole* response.

    think [think_start, act_start)   act [act_start, observe_start)   observe [observe_start, end)
    Without a closed block (the last step) act_start == observe_start == end. A block that was not run (no rounds left,
    or the sandbox failed) has no code and no result either.
    """

    think_start: int
    act_start: int
    observe_start: int
    end: int
    code: str | None = None
    result: ExecResult | None = None

    @property
    def failed(self) -> bool:
        return self.result is not None and not self.result.passed and self.result.status != "infra"


@dataclass
class Trajectory:
    """The token ledger of one response (see the module's docstring).

    finish: '' while running | 'stop' (EOS sampled) | 'length' | 'rounds' (tool budget spent) | 'failed_code' |
    'infra' (the sandbox failed: to be dropped, never scored).
    """

    problem: Problem
    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    action_mask: list[bool] = field(default_factory=list)  # True exactly on tokens that the policy sampled
    logp_sampler: list[float] = field(default_factory=list)  # 0.0 on observation tokens
    steps: list[Step] = field(default_factory=list)
    finish: str = ""
    reward: float | None = None
    discarded: int = 0  # tokens sampled and cut away again by self-correction
    corrections: int = 0  # how often that happened

    def __len__(self) -> int:
        return len(self.token_ids)

    def append_sampled(self, token_ids: list[int], logps: list[float]) -> None:
        """Append what the engine sampled, with its log-probs."""
        assert len(token_ids) == len(logps), f"{len(token_ids)} tokens but {len(logps)} log-probs"
        self._append(token_ids, True, logps)

    def append_observation(self, token_ids: list[int]) -> None:
        """Append the interpreter's output, encoded on its own."""
        self._append(token_ids, False, [0.0] * len(token_ids))

    def _append(self, token_ids: list[int], sampled: bool, logps: list[float]) -> None:
        self.token_ids += token_ids
        self.action_mask += [sampled] * len(token_ids)
        self.logp_sampler += logps
        assert len(self.token_ids) == len(self.action_mask) == len(self.logp_sampler)

    def cut(self, length: int) -> None:
        """Self-correction at inference: drop everything behind `length`, counting the sampled tokens that go."""
        self.discarded += sum(self.action_mask[length:])
        self.corrections += 1
        del self.token_ids[length:], self.action_mask[length:], self.logp_sampler[length:]
        self.steps = [step for step in self.steps if step.end <= length]

    def check(self) -> None:
        """Assert every invariant of the ledger (cheap; the rollout calls it on each finished trajectory)."""
        assert len(self.token_ids) == len(self.action_mask) == len(self.logp_sampler)
        at = 0
        for step in self.steps:
            assert at == step.think_start <= step.act_start <= step.observe_start <= step.end <= len(self)
            assert all(self.action_mask[at : step.observe_start]), "the policy sampled all of think and act"
            assert not any(self.action_mask[step.observe_start : step.end]), "and nothing of the observation"
            assert (step.code is None) == (step.result is None)
            at = step.end
        assert at == len(self), "steps tile the response"
        assert all(m or lp == 0.0 for m, lp in zip(self.action_mask, self.logp_sampler, strict=True))

    # ---- derived ----

    @property
    def results(self) -> list[ExecResult]:
        """What each executed block gave, in order."""
        return [step.result for step in self.steps if step.result is not None]

    @property
    def num_sampled(self) -> int:
        """Tokens that the policy sampled and that stand in the response."""
        return sum(self.action_mask)

    def text(self, tokenizer, policy_only: bool = False) -> str:
        """The response as text; with `policy_only` without the observations (the answer is looked for there)."""
        spans = []
        for step in self.steps:
            spans.append(decode(tokenizer, self.token_ids[step.think_start : step.observe_start]))
            if not policy_only:
                spans.append(decode(tokenizer, self.token_ids[step.observe_start : step.end]))
        return "".join(spans)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, record: dict) -> Trajectory:
        """Back from `to_dict`; other keys of the record (its text, the iteration) are passed over."""
        names = {f.name for f in dataclasses.fields(cls)}
        steps = [
            Step(**{**step, "result": ExecResult(**step["result"]) if step["result"] else None})
            for step in record["steps"]
        ]
        own = {name: value for name, value in record.items() if name in names}
        return cls(**{**own, "problem": Problem(**record["problem"]), "steps": steps})
