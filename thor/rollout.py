"""The think-act-observe loop, step regeneration and self-correction, on any engine.

Each trajectory is a generator that reads like the algorithm: it yields a `Request` and gets a `Completion` back, or
yields source code and gets an `ExecResult` back. `drive` runs many of them at once: it steps the engine, submits each
closed block to the executor, and goes on stepping for the others, so that decoding never waits for a tool.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from typing import Any

from thor.attention import common_prefix
from thor.engines import Completion, Engine, Request
from thor.prompts import observation_text, render_prompt
from thor.sandbox import Executor
from thor.settings import derive_seed
from thor.text import FenceParser, TextStream, encode
from thor.trajectory import ExecResult, Problem, Step, Trajectory

INFRA_TRIES = 3  # a snippet whose sandbox failed this often is given up, and its sample dropped

Listener = Callable[[str, str], None]  # (kind, text) with kind 'text' | 'output' | 'correction'
Task = Generator["Request | Ask | str", "Completion | ExecResult", Any]


@dataclass(frozen=True)
class Sampling:
    """How to sample a trajectory, and where it ends."""

    max_tokens: int = 256  # response limit in tokens, observations included
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0  # training needs 1 (importance ratios are over the full distribution)
    top_k: int = 0  # training needs 0: off
    seed: int = 0
    max_rounds: int = 3  # tool calls of one trajectory
    observation_limit: int = 256  # characters of tool output shown to the model


@dataclass
class Ask:
    """A request to another engine than the default one (TIRGen's actor and critic are two models)."""

    engine: Engine
    request: Request


# ---- the event loop -------------------------------------------------------------------------------------------------


def drive(
    tasks: Iterable[Task],
    engine: Engine,
    executor: Executor,
    done: Callable[[int, Any], None] | None = None,
    in_flight: int | None = None,
    deterministic: bool = False,
) -> list[Any]:
    """Run all tasks to their end; returns their return values in order. `done(index, value)` is called as each ends.

    in_flight: tasks under way at once (default: all); with fewer, an engine keeps what each has computed so far.
    deterministic: wait for all submitted code before each step of the engine. Which requests share a batch, and with it
    the rounding of every float, then depends on the tasks alone and not on how fast tools answer.
    """
    tasks = list(tasks)
    values: list[Any] = [None] * len(tasks)
    waiting: dict[tuple[int, str], int] = {}  # (engine, request id) -> task
    running: dict[Future, tuple[int, str, int]] = {}  # future -> (task, code, tries)
    engines: dict[int, Engine] = {}
    fresh = deque(range(len(tasks)))

    def resume(i: int, message: Completion | ExecResult | None) -> None:
        try:
            wish = tasks[i].send(message)
        except StopIteration as stop:
            values[i] = stop.value
            if done:
                done(i, stop.value)
            return
        if isinstance(wish, str):
            running[executor.submit(wish)] = (i, wish, 1)
            return
        ask = wish if isinstance(wish, Ask) else Ask(engine, wish)
        key = (id(ask.engine), ask.request.id)
        assert key not in waiting, f"two requests named {ask.request.id} at once"
        engines[id(ask.engine)] = ask.engine
        waiting[key] = i
        ask.engine.add(ask.request)

    try:
        while fresh or waiting or running:
            while fresh and (in_flight is None or len(waiting) + len(running) < in_flight):
                resume(fresh.popleft(), None)
            busy = [e for e in engines.values() if e.has_work()]
            for e in busy:
                for completion in e.step():
                    if (id(e), completion.id) in waiting:  # else the request was added by someone else
                        resume(waiting.pop((id(e), completion.id)), completion)
            while running:
                patience = None if deterministic or not busy else 0
                finished = wait(running, patience, ALL_COMPLETED if deterministic else FIRST_COMPLETED).done
                for future in sorted(finished, key=lambda f: running[f][0]):
                    i, code, tries = running.pop(future)
                    result = future.result()
                    if result.status == "infra" and tries < INFRA_TRIES:
                        running[executor.submit(code)] = (i, code, tries + 1)
                    else:
                        resume(i, result)
                if not deterministic:
                    break
    finally:
        for task in tasks:
            task.close()
        for e in engines.values():  # work is left where an exception broke off; a later drive must not get these turns
            if e.has_work() and hasattr(e, "drop"):
                e.drop()
    return values


# ---- trajectories ---------------------------------------------------------------------------------------------------


class Turn(FenceParser):
    """Stop rule of one turn of the policy; tells a listener what is sampled as it arrives.

    before: text of the step that is there already (r_pre), without which a fence might seem to open a line.
    """

    def __init__(self, before: str = "", listener: Listener | None = None) -> None:
        super().__init__()
        super().feed(before)
        self.listener = listener

    def feed(self, piece: str) -> bool:
        if self.listener and piece:
            self.listener("text", piece)
        return super().feed(piece)


def parse_step(tokenizer, token_ids: list[int], before: Sequence[int] = ()) -> tuple[int, FenceParser]:
    """Find the block in the sampled ids of one step: (index of the token in which "```python" begins, parser).

    Without a closed block the index is len(token_ids). The ids are what counts, not the text that an engine streamed.
    before: the tokens that the step continues.
    """
    stream, parser, lengths = TextStream(tokenizer, before), FenceParser(), []
    for token in token_ids:
        parser.feed(stream.push(token))
        lengths.append(len(parser.text))
    act = bisect_right(lengths, parser.open_at) if parser.closed else len(token_ids)
    return act, parser


def sample_step(
    engine: Engine,
    name: str,
    context: list[int],
    r_pre: list[int],
    room: int,
    sampling: Sampling,
    seed: int,
    shared: int,
    listener: Listener | None = None,
):
    """Sample from the policy, behind `context` and the part `r_pre` of a thought, until a block closes, EOS, or `room`.

    Returns (completion, index of the block's first token in r_pre + sampled, parser of that text).
    """
    stream = TextStream(engine.tokenizer, context)
    turn = Turn("".join(map(stream.push, r_pre)), listener)
    ids = context + r_pre
    completion = yield Request(
        name, ids, room, sampling.temperature, sampling.top_p, sampling.top_k, seed, turn, shared
    )
    act, parser = parse_step(engine.tokenizer, r_pre + completion.token_ids, context)
    return completion, act, parser


def split_think(step: Step, suffix_tokens: int) -> int:
    """Where the suffix of r_t begins: its last `suffix_tokens` tokens, never before r_t itself (paper: L_suffix)."""
    return max(step.think_start, step.act_start - suffix_tokens)


def think_act_observe(
    engine: Engine,
    problem: Problem,
    prompt_ids: list[int],
    shared: int,
    name: str,
    sampling: Sampling,
    self_correct: int,
    suffix_tokens: int,
    stop_on_failure: bool,
    listener: Listener | None,
) -> Task:
    """One trajectory, see `solve`. name tells it from all others that the engine serves.

    shared: leading tokens of the prompt that other trajectories have as well.
    """
    trajectory = Trajectory(problem, prompt_ids)
    rounds = tries = 0
    while not trajectory.finish:
        used = len(trajectory.prompt_ids) + len(trajectory)
        room = min(sampling.max_tokens - len(trajectory), engine.context - used)
        if room <= 0:
            trajectory.finish = "length"
            break
        start = trajectory.steps[-1].end if trajectory.steps else 0
        context, r_pre = trajectory.prompt_ids + trajectory.token_ids[:start], trajectory.token_ids[start:]
        seed = derive_seed(sampling.seed, name, len(trajectory), trajectory.corrections)
        completion, act, parser = yield from sample_step(
            engine, name, context, r_pre, room, sampling, seed, shared, listener
        )
        trajectory.append_sampled(completion.token_ids, completion.logps)
        end = len(trajectory)
        trajectory.steps.append(Step(start, start + act, end, end))
        if not parser.closed:
            trajectory.finish = "stop" if completion.finish == "eos" else "length"
            break
        if rounds == sampling.max_rounds:
            trajectory.finish = "rounds"
            break
        result = yield parser.code
        if result.status == "infra":
            trajectory.finish = "infra"
            break
        text = observation_text(result.observation(sampling.observation_limit), parser.text)
        if not result.passed and tries < self_correct:
            # back to r_pre: the suffix of the thought and the block are sampled anew; that costs no tool round
            tries += 1
            trajectory.cut(split_think(trajectory.steps.pop(), suffix_tokens))
            if listener:
                listener("correction", text)
            continue
        trajectory.append_observation(encode(engine.tokenizer, text))
        step = trajectory.steps[-1]
        step.code, step.result, step.end = parser.code, result, len(trajectory)
        rounds, tries = rounds + 1, 0
        if listener:
            listener("output", text)
        if stop_on_failure and not result.passed:
            trajectory.finish = "failed_code"
    if not trajectory.steps or trajectory.steps[-1].end < len(trajectory):  # cut back, and no room to go on
        start = trajectory.steps[-1].end if trajectory.steps else 0
        trajectory.steps.append(Step(start, len(trajectory), len(trajectory), len(trajectory)))
    trajectory.check()
    return trajectory


def solve(
    engine: Engine,
    executor: Executor,
    problems: list[Problem],
    sampling: Sampling,
    *,
    max_rounds: int | None = None,
    self_correct: int = 0,
    suffix_tokens: int = 100,
    stop_on_failure: bool = False,
    listener: Listener | None = None,
    done: Callable[[int, Trajectory], None] | None = None,
    deterministic: bool = False,
) -> list[Trajectory]:
    """One trajectory for each entry of `problems` (repeat an entry G times for a group), in their order.

    max_rounds: overrides the one of `sampling`.
    self_correct: tries per step; when a block fails and tries remain, the response is cut back to r_pre (all but the
    last `suffix_tokens` tokens of the thought) and sampled on from there. When they are spent, the failed output
    stays and the model goes on. Discarded tokens and corrections are counted in the trajectory.
    stop_on_failure: a failed block (after the tries) ends the trajectory, finish 'failed_code'.
    A trajectory whose sandbox failed has finish 'infra': drop it, it says nothing about the policy.
    `done(index, trajectory)` is called as each one ends. deterministic: see `drive`.
    """
    if max_rounds is not None:
        sampling = replace(sampling, max_rounds=max_rounds)
    prompts = {problem.question: render_prompt(engine.tokenizer, problem.question) for problem in problems}
    preamble = common_prefix(min(prompts.values()), max(prompts.values())) if len(prompts) > 1 else 0
    groups = Counter(problem.id for problem in problems)
    seen: Counter[str] = Counter()
    tasks = []
    for problem in problems:  # named, and so seeded, by id and repetition: not by what else is solved beside it
        name = f"{problem.id}#{seen[problem.id]}"
        seen[problem.id] += 1
        prompt_ids = prompts[problem.question]
        shared = len(prompt_ids) - 1 if groups[problem.id] > 1 else preamble
        tasks.append(
            think_act_observe(
                engine,
                problem,
                prompt_ids,
                shared,
                name,
                sampling,
                self_correct,
                suffix_tokens,
                stop_on_failure,
                listener,
            )
        )
    return drive(tasks, engine, executor, done, deterministic=deterministic)


# ---- step level -----------------------------------------------------------------------------------------------------


def regenerate_step(
    engine: Engine, trajectory: Trajectory, step: Step, name: str, sampling: Sampling, suffix_tokens: int
) -> Task:
    """Sample the suffix of one failed step and its block anew (paper: step-level episode level optimisation).

    Returns a Trajectory whose prompt is everything up to r_pre, whose response is suffix and block, and whose reward
    is 1.0 if the block passed, else 0.0; None when no block closed or the sandbox failed.
    """
    cut = split_think(step, suffix_tokens)
    context = trajectory.prompt_ids + trajectory.token_ids[: step.think_start]
    r_pre = trajectory.token_ids[step.think_start : cut]
    sample = Trajectory(trajectory.problem, context + r_pre, finish="stop")
    room = min(sampling.max_tokens - cut, engine.context - len(sample.prompt_ids))
    seed, shared = derive_seed(sampling.seed, name), len(sample.prompt_ids) - 1
    completion, act, parser = yield from sample_step(engine, name, context, r_pre, room, sampling, seed, shared)
    if not parser.closed:
        return None
    result = yield parser.code
    if result.status == "infra":
        return None
    sample.append_sampled(completion.token_ids, completion.logps)
    end = len(sample)
    sample.steps = [Step(0, max(0, act - len(r_pre)), end, end, parser.code, result)]
    sample.reward = float(result.passed)
    sample.check()
    return sample
