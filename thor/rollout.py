"""The think-act-observe loop, step regeneration and self-correction, on any engine.

Each trajectory is a generator that reads like the algorithm: it yields a `Request` and receives a `Completion`, or
yields source code and receives an `ExecResult`. `drive` runs many of them at once: it steps the engine, submits each
closed block to the executor, grades what has ended in other threads, and keeps stepping for the others. Decoding never
waits for a grade, and for a tool only if the rollout is `deterministic`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from thor.attention import common_prefix
from thor.engines import Completion, Engine, Request, RequestRejected
from thor.prompts import NO_ROUNDS, PROMPTS, Prompt, observation_text
from thor.sandbox import Executor
from thor.settings import derive_seed
from thor.text import FenceParser, TextStream, encode
from thor.trajectory import ExecResult, Problem, Step, Trajectory
from thor.verify import grade as grade_answer

GRADERS = 8  # threads that grade; an answer that takes seconds to compare occupies one of them
INFRA_TRIES = 3  # runs of a snippet whose sandbox fails, before its sample is dropped

Listener = Callable[[str, str], None]  # (kind, text) with kind 'text' | 'output' | 'correction'
Task = Generator["Request | Ask | str", "Completion | ExecResult", Any]  # a yielded str is source code to run


@dataclass(frozen=True)
class Sampling:
    """How to sample a trajectory, and its limits."""

    max_tokens: int = 256  # length of the response in tokens, observations included
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0  # must be 1 in training: importance ratios are over the full distribution
    top_k: int = 0  # 0: off, which training needs
    seed: int = 0
    max_rounds: int = 3  # tool calls of a trajectory
    observation_limit: int = 256  # characters of tool output that the model sees


@dataclass
class Ask:
    """A request to an engine other than the default one. TIRGen's actor and critic are two models."""

    engine: Engine
    request: Request


# ---- event loop -----------------------------------------------------------------------------------------------------


def drive(
    tasks: Iterable[Task],
    engine: Engine,
    executor: Executor,
    done: Callable[[int, Any], None] | None = None,
    grade: Callable[[Any], None] | None = None,
    in_flight: int | None = None,
    deterministic: bool = False,
) -> list[Any]:
    """Run all tasks and return their values in order, or pass the values to `done` and return [].

    tasks: each is taken when it starts, so that a generator of tasks is never ahead by more than one.
    grade: called in another thread with the value of each task that has ended; the other tasks continue meanwhile.
    done(index, value) is called in this thread once the value is graded.
    in_flight: maximum number of tasks to run at once. There are never more than the `max_rows` of any engine in use,
    because a task that waits for its tool would lose its cache to a new one.
    deterministic: wait for all submitted code before each step of the engine. Then the tasks alone, and not the speed
    of the tools, determine which requests share a batch, and so how every float is rounded.
    A RequestRejected is raised in the task whose request it is. A task that does not catch it ends all of them.
    """
    fresh = enumerate(tasks)
    following = next(fresh, None)
    started: dict[int, Task] = {}
    values: dict[int, Any] = {}
    finish = done or values.__setitem__
    waiting: dict[tuple[int, str], int] = {}  # (engine, request id) -> task
    running: dict[Future, tuple[int, str, int]] = {}  # future -> (task, code, tries)
    grading: dict[Future, tuple[int, Any]] = {}  # future -> (task, value)
    used: dict[int, set[tuple[int, str]]] = defaultdict(set)  # task -> (engine, id) of its requests
    engines: dict[int, Engine] = {id(engine): engine}
    graders = ThreadPoolExecutor(GRADERS)

    def has_room() -> bool:
        limits = [in_flight, *(getattr(e, "max_rows", None) for e in engines.values())]
        return all(limit is None or len(waiting) + len(running) < limit for limit in limits)

    def resume(i: int, message: Completion | ExecResult | RequestRejected | None) -> None:
        task = started[i]
        try:
            wanted = task.throw(message) if isinstance(message, RequestRejected) else task.send(message)
        except StopIteration as stop:
            del started[i]
            for e, name in used.pop(i, ()):
                if hasattr(engines[e], "release"):
                    engines[e].release(name)
            if grade:
                grading[graders.submit(grade, stop.value)] = (i, stop.value)
            else:
                finish(i, stop.value)
            return
        if isinstance(wanted, str):
            running[executor.submit(wanted)] = (i, wanted, 1)
            return
        ask = wanted if isinstance(wanted, Ask) else Ask(engine, wanted)
        key = (id(ask.engine), ask.request.id)
        assert key not in waiting, f"two requests named {ask.request.id} at once"
        engines[id(ask.engine)], waiting[key] = ask.engine, i
        used[i].add(key)
        ask.engine.add(ask.request)

    def collect(futures: list[Future], timeout: float | None, return_when: str) -> None:
        ended = wait(futures, timeout, return_when).done
        for future in sorted(ended & running.keys(), key=lambda f: running[f][0]):
            i, code, tries = running.pop(future)
            result = future.result()
            if result.status == "infra" and tries < INFRA_TRIES:
                running[executor.submit(code)] = (i, code, tries + 1)
            else:
                resume(i, result)
        for future in ended & grading.keys():
            future.result()  # raises what `grade` raised
            finish(*grading.pop(future))

    try:
        while following or waiting or running or grading:
            while following and has_room():
                i, started[i] = following
                following = next(fresh, None)
                resume(i, None)
            busy = [e for e in engines.values() if e.has_work()]
            if waiting and not busy and not running:
                raise RuntimeError(f"the engine has lost requests: {sorted(name for _, name in waiting)}")
            for e in busy:
                try:
                    answers = [(completion.id, completion) for completion in e.step()]
                except RequestRejected as error:
                    answers = [(error.request_id, error)]
                for name, answer in answers:
                    if (id(e), name) in waiting:  # else the caller added the request before
                        resume(waiting.pop((id(e), name)), answer)
            timeout = 0 if busy else None  # without anything to decode, wait
            while deterministic and running:
                collect([*running], None, ALL_COMPLETED)
                timeout = 0
            collect([*running, *grading], timeout, FIRST_COMPLETED)
    finally:
        graders.shutdown(wait=False, cancel_futures=True)
        for task in started.values():
            task.close()
        for e in engines.values():  # after an exception, a later drive must not get the completions of this one
            if e.has_work() and hasattr(e, "drop"):
                e.drop()
    return [values[i] for i in sorted(values)]


# ---- one turn -------------------------------------------------------------------------------------------------------


class Turn(FenceParser):
    """Stop rule of one turn of the policy, which also passes the text to a listener as it arrives.

    before: text of the step so far (r_pre). Without it, a fence might seem to start a line.
    tools: whether a closed block ends the turn.
    """

    def __init__(self, before: str = "", listener: Listener | None = None, tools: bool = True) -> None:
        super().__init__()
        super().feed(before)
        self.listener, self.tools = listener, tools

    def feed(self, piece: str) -> bool:
        if self.listener:
            self.listener("text", piece)
        return self.tools and super().feed(piece)


def parse_step(tokenizer, token_ids: list[int], before: Sequence[int] = ()) -> tuple[int, FenceParser]:
    """Find the block in the sampled tokens of a step: (index of the token in which "```python" starts, parser).

    Without a closed block the index is len(token_ids). The ids are parsed again here, because training uses them; the
    text that an engine streamed only decides where the turn ends. before: the tokens before the step.
    """
    stream, parser, lengths = TextStream(tokenizer, before), FenceParser(), []
    for token in token_ids:
        parser.feed(stream.push(token))
        lengths.append(len(parser.text))
    act = bisect_right(lengths, parser.open_at) if parser.closed else len(token_ids)
    return act, parser


@dataclass
class TurnSampler:
    """Samples the turns of one trajectory.

    name: its name, unique in the engine. shared: number of leading tokens that other trajectories have too.
    tools: see `Turn`.
    """

    engine: Engine
    name: str
    sampling: Sampling
    shared: int
    listener: Listener | None = None
    tools: bool = True

    def turn(self, context: list[int], r_pre: list[int], room: int, seed: int) -> Task:
        """Continue `context` and the start `r_pre` of a thought until a block closes, EOS, or `room` tokens.

        Returns (completion, index of the block's first token in r_pre + sampled tokens, parser of that text). Without
        tools, no block is found.
        """
        tokenizer, s = self.engine.tokenizer, self.sampling
        stream = TextStream(tokenizer, context)
        stop = Turn("".join(map(stream.push, r_pre)), self.listener, self.tools)
        ids = context + r_pre
        completion = yield Request(self.name, ids, room, s.temperature, s.top_p, s.top_k, seed, stop, self.shared)
        if not self.tools:
            return completion, len(r_pre) + len(completion.token_ids), FenceParser()
        return completion, *parse_step(tokenizer, r_pre + completion.token_ids, context)


def split_think(step: Step, suffix_tokens: int) -> int:
    """Offset in the response of the suffix of r_t: its last `suffix_tokens` tokens (L_suffix), or all if shorter."""
    return max(step.think_start, step.act_start - suffix_tokens)


# ---- trajectories ---------------------------------------------------------------------------------------------------


def think_act_observe(
    sampler: TurnSampler, trajectory: Trajectory, self_correct: int, suffix_tokens: int, stop_on_failure: bool
) -> Task:
    """Complete one empty trajectory; see `solve` for the arguments (paper, section 3.3)."""
    engine, sampling, listener = sampler.engine, sampler.sampling, sampler.listener
    rounds = tries = 0
    while not trajectory.finish:
        start, end = trajectory.steps[-1].end if trajectory.steps else 0, len(trajectory)
        room = min(sampling.max_tokens - end, engine.context - len(trajectory.prompt_ids) - end)
        if room <= 0:
            trajectory.finish = "length"
            break
        context, r_pre = trajectory.prompt_ids + trajectory.token_ids[:start], trajectory.token_ids[start:]
        seed = derive_seed(sampling.seed, sampler.name, end, trajectory.corrections)
        completion, act, parser = yield from sampler.turn(context, r_pre, room, seed)
        trajectory.append_sampled(completion.token_ids, completion.logps)
        end = len(trajectory)
        step = Step(start, start + act, end, end, retries=tries)
        trajectory.steps.append(step)
        if not parser.closed:
            trajectory.finish = "stop" if completion.finish == "eos" else "length"
            break
        if rounds > sampling.max_rounds:  # the model already knows that no round is left
            trajectory.finish = "rounds"
            break
        output = NO_ROUNDS
        if rounds < sampling.max_rounds:
            result = yield parser.code
            if result.status == "infra":
                trajectory.finish = "infra"
                break
            output = result.observation(sampling.observation_limit)
            if not result.passed and tries < self_correct:
                # backtrack to r_pre and sample the suffix of the thought and the block again; this costs no round
                tries += 1
                trajectory.cut(split_think(trajectory.steps.pop(), suffix_tokens))
                if listener:
                    listener("correction", observation_text(output, parser.text))
                continue
            step.code, step.result = parser.code, result
        text = observation_text(output, parser.text)
        trajectory.append_observation(encode(engine.tokenizer, text))
        step.end = len(trajectory)
        rounds, tries = rounds + 1, 0
        if listener:
            listener("output", text)
        if stop_on_failure and step.failed:
            trajectory.finish = "failed_code"
    trajectory.check()
    return trajectory


def solve(
    engine: Engine,
    executor: Executor,
    problems: list[Problem],
    sampling: Sampling,
    *,
    prompt: Prompt = PROMPTS["tool"],
    self_correct: int = 0,
    suffix_tokens: int = 100,
    stop_on_failure: bool = False,
    listener: Listener | None = None,
    grade: Callable[[Trajectory, Any], float | None] = grade_answer,
    done: Callable[[int, Trajectory], None] | None = None,
    deterministic: bool = False,
) -> list[Trajectory]:
    """Sample one trajectory for each entry of `problems`, in their order. Repeat an entry G times for a group.

    prompt: how a question becomes a prompt. If prompt.tools is false, no code is run (plain reasoning).
    self_correct: tries per step. When a block fails and tries remain, backtrack to r_pre (the thought without its last
    `suffix_tokens` tokens) and sample again from there. When they are used up, the failed output stays and the model
    continues. Each step counts its retries, the trajectory all of them and the sampled tokens that they discarded.
    stop_on_failure: a failed block (after all tries) ends the trajectory with finish 'failed_code'.
    grade(trajectory, tokenizer) computes the reward, in another thread. It must be thread-safe.
    done(index, trajectory) is called once a trajectory has its reward. deterministic: see `drive`.

    A trajectory with finish 'infra' says nothing about the policy: it is not graded and must be dropped.
    """

    def set_reward(trajectory: Trajectory) -> None:
        if trajectory.finish != "infra":
            trajectory.reward = grade(trajectory, engine.tokenizer)

    prompts = {problem.question: prompt.render(engine.tokenizer, problem.question) for problem in problems}
    preamble = common_prefix(min(prompts.values()), max(prompts.values())) if len(prompts) > 1 else 0
    groups = Counter(problem.id for problem in problems)
    seen: Counter[str] = Counter()
    trajectories, tasks = [], []
    for problem in problems:  # named, and so seeded, by id and repetition: independent of the other problems
        name = f"{problem.id}#{seen[problem.id]}"
        seen[problem.id] += 1
        prompt_ids = prompts[problem.question]
        shared = len(prompt_ids) - 1 if groups[problem.id] > 1 else preamble
        sampler = TurnSampler(engine, name, sampling, shared, listener, prompt.tools)
        trajectories.append(Trajectory(problem, prompt_ids))
        tasks.append(think_act_observe(sampler, trajectories[-1], self_correct, suffix_tokens, stop_on_failure))
    drive(tasks, engine, executor, done, set_reward, deterministic=deterministic)
    return trajectories


# ---- step level -----------------------------------------------------------------------------------------------------


def regenerate_step(
    engine: Engine, trajectory: Trajectory, step: Step, name: str, sampling: Sampling, suffix_tokens: int
) -> Task:
    """Regenerate the suffix and the block of a failed step: one sample of the step level (paper, section 3.2).

    Returns a Trajectory whose prompt is everything before the suffix, whose response is suffix and block, and whose
    reward R' is 1.0 if the block passed, else 0.0. Returns None if no block closed or the sandbox failed.
    """
    cut = split_think(step, suffix_tokens)
    context = trajectory.prompt_ids + trajectory.token_ids[: step.think_start]
    r_pre = trajectory.token_ids[step.think_start : cut]
    # the shared prefix is the prompt of the new sample, so it is never trained on, see Trajectory.action_positions
    new = Trajectory(trajectory.problem, context + r_pre, finish="stop")
    room = min(sampling.max_tokens - cut, engine.context - len(new.prompt_ids))
    sampler = TurnSampler(engine, name, sampling, len(new.prompt_ids) - 1)
    completion, act, parser = yield from sampler.turn(context, r_pre, room, derive_seed(sampling.seed, name))
    if not parser.closed:
        return None
    result = yield parser.code
    if result.status == "infra":
        return None
    new.append_sampled(completion.token_ids, completion.logps)
    # a block that starts with the last characters of r_pre would have a negative offset
    new.steps = [Step(0, max(0, act - len(r_pre)), len(new), len(new), parser.code, result)]
    new.reward = float(result.passed)
    new.check()
    return new
