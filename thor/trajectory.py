"""Data types that every stage shares: problems, execution results, and the token ledger of a trajectory.

A trajectory is tau = (r1, a1, o1, ..., rn): the policy thinks (r), acts by writing one Python block (a), and observes
what the interpreter returned (o). The ledger is an append-only list of token ids. Text is derived from ids, never the
reverse, so the trainer scores exactly what the engine sampled.

Shapes, in all files: B sequences, T tokens, V vocabulary, G group size, P problems.
"""

from __future__ import annotations

import base64
import dataclasses
import struct
from dataclasses import dataclass, field
from itertools import groupby

from thor.text import decode, find_boxes, special_ids

LOGGED = 1000  # characters of a snippet's stdout and of its error that files keep; the sandbox keeps up to 64 KiB


@dataclass(frozen=True)
class Problem:
    """A question with its gold answer, which is empty if it is not known."""

    id: str  # unique among the problems that are loaded together
    question: str
    answer: str = ""
    family: str = ""  # kind of problem, if the source has one
    source: str = ""  # the benchmark or file that it is from
    pass_rate: float | None = None  # share of solved samples, in [0, 1], if the source has one
    tests: str = ""  # of a code problem, whose answer is a program: see thor/code_problems.py


@dataclass(frozen=True)
class ExecResult:
    """The result of running one snippet.

    status: 'ok' | 'error' | 'no_output' | 'timeout' | 'memory' | 'blocked' | 'infra'. 'ok' means that the code passed:
    it ended normally and printed something. 'infra' means that the sandbox itself failed. All others are failures.
    """

    status: str
    stdout: str = ""
    error: str = ""  # last line of the traceback, or one sentence; empty when status is 'ok'
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return self.status == "ok"

    def observation(self, limit: int = 256) -> str:
        """What the model sees: stdout, and after a failure the error on the next line.

        Over `limit` characters, the middle is replaced by '...'.
        """
        printed = self.stdout.strip("\n") if self.stdout.strip() else ""
        error = "" if self.passed else self.error or self.status.replace("_", " ")
        text = f"{printed}\n{error}" if printed and error else printed or error
        half = max(0, limit) // 2
        return text if len(text) <= limit else text[:half] + "..." + text[len(text) - half :]


@dataclass
class Step:
    """One (think, act, observe), with token offsets into the whole response.

    think [think_start, act_start)   act [act_start, observe_start)   observe [observe_start, end)
    Without a closed block (the last step) act_start == observe_start == end. A block that was not run, because no
    round was left or the sandbox failed, has neither code nor result.
    retries: how often self-correction sampled the step again.
    """

    think_start: int
    act_start: int
    observe_start: int
    end: int
    code: str | None = None
    result: ExecResult | None = None
    retries: int = 0

    @property
    def failed(self) -> bool:
        return self.result is not None and not self.result.passed and self.result.status != "infra"


@dataclass
class Trajectory:
    """The token ledger of one response.

    finish: '' while sampling | 'stop' (EOS) | 'length' | 'rounds' (the model wrote code again after it had read that
    no round is left) | 'failed_code' | 'infra' (the sandbox failed; drop the trajectory, never score it).
    """

    problem: Problem
    prompt_ids: list[int]  # context, never trained on; of a regenerated step, everything before the suffix
    token_ids: list[int] = field(default_factory=list)
    action_mask: list[bool] = field(default_factory=list)  # per response token: True if the policy sampled it
    logp_sampler: list[float] = field(default_factory=list)  # 0.0 on observation tokens
    steps: list[Step] = field(default_factory=list)
    finish: str = ""
    reward: float | None = None  # R or R', in [0, 1]; None until graded, and for 'infra'
    discarded: int = 0  # sampled tokens that self-correction removed
    corrections: int = 0  # number of those removals

    def __len__(self) -> int:
        return len(self.token_ids)

    def append_sampled(self, token_ids: list[int], logps: list[float]) -> None:
        """Append what the engine sampled, with its log-probs."""
        assert len(token_ids) == len(logps), f"{len(token_ids)} tokens but {len(logps)} log-probs"
        self._append(token_ids, True, logps)

    def append_observation(self, token_ids: list[int]) -> None:
        """Append the interpreter's output, which was encoded separately."""
        self._append(token_ids, False, [0.0] * len(token_ids))

    def _append(self, token_ids: list[int], sampled: bool, logps: list[float]) -> None:
        self.token_ids += token_ids
        self.action_mask += [sampled] * len(token_ids)
        self.logp_sampler += logps

    def cut(self, length: int) -> None:
        """Self-correction: remove everything after `length` tokens, and count the sampled tokens removed."""
        self.discarded += sum(self.action_mask[length:])
        self.corrections += 1
        del self.token_ids[length:], self.action_mask[length:], self.logp_sampler[length:]
        self.steps = [step for step in self.steps if step.end <= length]

    def check(self) -> None:
        """Assert every invariant of the ledger. The rollout calls this on each finished trajectory."""
        assert len(self.token_ids) == len(self.action_mask) == len(self.logp_sampler)
        at = 0
        for step in self.steps:
            assert at == step.think_start <= step.act_start <= step.observe_start <= step.end <= len(self)
            assert all(self.action_mask[at : step.observe_start]), "think and act consist of sampled tokens"
            assert not any(self.action_mask[step.observe_start : step.end]), "an observation has no sampled tokens"
            assert (step.code is None) == (step.result is None)
            at = step.end
        assert self.corrections == sum(step.retries for step in self.steps)
        assert at == len(self), "the steps cover the response without gaps"
        assert all(m or lp == 0.0 for m, lp in zip(self.action_mask, self.logp_sampler, strict=True))

    # ---- views ----

    @property
    def all_token_ids(self) -> list[int]:
        """Prompt and response."""
        return self.prompt_ids + self.token_ids

    @property
    def action_positions(self) -> list[int]:
        """Positions of the action tokens in `all_token_ids`. Only these are ever trained on."""
        return [i for i, sampled in enumerate(self.action_mask, len(self.prompt_ids)) if sampled]

    @property
    def action_logps(self) -> list[float]:
        """logp_sampler of the action tokens."""
        return [lp for lp, sampled in zip(self.logp_sampler, self.action_mask, strict=True) if sampled]

    @property
    def num_sampled(self) -> int:
        """Number of action tokens."""
        return sum(self.action_mask)

    @property
    def results(self) -> list[ExecResult]:
        """Results of the executed blocks, in order."""
        return [step.result for step in self.steps if step.result is not None]

    def text(self, tokenizer, policy_only: bool = False, end: int | None = None) -> str:
        """The response as text.

        policy_only: without observations, each of which becomes a line break; the answer is extracted from this.
        end: number of tokens to decode. By default all but the end token.
        """
        if end is None:  # the end token may be another one than the tokenizer's EOS
            ended = self.finish == "stop" and self.token_ids[-1:] and self.token_ids[-1] in special_ids(tokenizer)
            end = len(self) - bool(ended)
        text = ""
        for step in self.steps:
            text += decode(tokenizer, self.token_ids[step.think_start : min(step.observe_start, end)])
            observation = self.token_ids[step.observe_start : min(step.end, end)]
            if not policy_only:
                text += decode(tokenizer, observation)
            elif observation and not text.endswith("\n"):
                text += "\n"
        return text

    def has_box_near_end(self, tokenizer, window: int) -> bool:
        """Whether the last box of the policy's prose ends within the last `window` tokens of the response.

        What counts is where the box ends, because a long answer, such as a matrix, is not a reason to reject it.
        """
        boxes = find_boxes(self.text(tokenizer, policy_only=True))
        before_window = self.text(tokenizer, policy_only=True, end=max(0, len(self) - window))
        return bool(boxes) and boxes[-1][1] > len(before_window)

    def to_dict(self) -> dict:
        """The ledger as compact JSON data. Exact, except that stdout and error are cut to LOGGED characters.

        Instead of action_mask: `mask_runs`, the lengths of its runs, of which the first, third... are sampled.
        Instead of logp_sampler: `logp_base64`, those of the sampled tokens as little-endian float32, which is what
        engines report, or as float64 if float32 would change one of them.
        """
        steps = [dataclasses.asdict(step) for step in self.steps]
        record = dict(vars(self), problem=dict(vars(self.problem)), steps=steps)
        del record["action_mask"], record["logp_sampler"]
        runs = [len(list(run)) for _, run in groupby(self.action_mask)]
        record["mask_runs"] = [0, *runs] if self.action_mask[:1] == [False] else runs
        logps = self.action_logps
        packed = struct.pack(f"<{len(logps)}f", *logps)
        if any(a != b == b for a, (b,) in zip(logps, struct.iter_unpack("<f", packed), strict=True)):  # NaN is NaN
            packed = struct.pack(f"<{len(logps)}d", *logps)
        record["logp_base64"] = base64.b64encode(packed).decode("ascii")
        for result in (step["result"] for step in record["steps"] if step["result"]):
            result |= {name: result[name][:LOGGED] for name in ("stdout", "error")}
        return record

    @classmethod
    def from_dict(cls, record: dict) -> Trajectory:
        """Inverse of `to_dict`. Ignores other keys, such as the text and the iteration."""
        names = {f.name for f in dataclasses.fields(cls)}
        own = {name: value for name, value in record.items() if name in names}
        own["problem"] = Problem(**record["problem"])
        own["steps"] = [
            Step(**{**step, "result": ExecResult(**step["result"]) if step["result"] else None})
            for step in record["steps"]
        ]
        mask = [i % 2 == 0 for i, length in enumerate(record["mask_runs"]) for _ in range(length)]
        packed = base64.b64decode(record["logp_base64"])
        logps = struct.iter_unpack("<f" if len(packed) == 4 * sum(mask) else "<d", packed)
        return cls(**own, action_mask=mask, logp_sampler=[next(logps)[0] if sampled else 0.0 for sampled in mask])
