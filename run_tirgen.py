"""Stage 1, TIRGen: build tool-integrated trajectories with an actor, a critic and a filter (paper, section 3.1).

    python run_tirgen.py                                  # synthetic problems, demo model, ~4 minutes on 2 CPU cores
    python run_tirgen.py --data problems.jsonl --actor Qwen/Qwen3-8B --critic Qwen/Qwen3-32B --template instruct

The actor writes one reasoning step. The critic decides whether code can do part of it. If so, it extracts the pure
reasoning and writes the code, the code is executed, and reasoning, code and output replace the step. The actor then
continues from there until it gives an answer or reaches a limit. A multi-stage filter selects the training data.

Writes <out>/tir.jsonl (one trajectory per line), drafts.jsonl (all trajectories before the filter) and funnel.json.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from tqdm import tqdm

from thor.data import load_problems
from thor.demo import DEMO_MODEL, few_shot_actor, few_shot_critic
from thor.engines import Engine, Request, is_reproducible, load_engine
from thor.prompts import ACTOR_INSTRUCT, CRITIC_INSTRUCT, observation_text, render_chat, tir_step
from thor.rollout import Ask, Task, drive
from thor.run_folder import Run, write_atomic
from thor.sandbox import Executor
from thor.settings import derive_seed, parse_settings, run_main, setting, user_errors
from thor.text import FenceParser, decode, encode, extract_answer
from thor.trajectory import Problem
from thor.verify import verify


@dataclass(frozen=True)
class Settings:
    """Flags of run_tirgen.py."""

    data: str = setting("synthetic", "problems: 'synthetic', a json/jsonl/parquet file, or a hub data set", "data")
    split: str = setting("train", "split of 'synthetic' or of a hub data set", "data")
    limit: int = setting(128, "number of problems to load", "data", min=1)
    actor: str = setting(
        DEMO_MODEL,
        "model that reasons (paper: Qwen3-8B): demo model, folder, hub id, vllm:NAME, or URL of a vLLM server",
        "model",
    )
    critic: str = setting("", "model that writes code (paper: Qwen3-32B); empty: the actor", "model")
    template: Literal["few-shot", "instruct"] = setting(
        "few-shot", "prompts: few-shot for small models, instruct for capable chat models", "model"
    )
    tries: int = setting(2, "trajectories per problem", "sampling", min=1)
    code_tries: int = setting(2, "maximum attempts to get working code for a step", "sampling", min=1)
    max_steps: int = setting(4, "maximum reasoning steps per trajectory", "sampling", min=1)
    step_tokens: int = setting(48, "maximum tokens per reasoning step, L_step (paper: 4,096)", "sampling", min=1)
    code_tokens: int = setting(128, "maximum tokens per reply of the critic", "sampling", min=1)
    max_tokens: int = setting(512, "maximum tokens per trajectory", "sampling", min=1)
    temperature: float = setting(0.5, "sampling temperature of actor and critic", "sampling", min=0)
    min_substantial: float = setting(0.0, "filter: minimum share of non-trivial code blocks (paper: 0.6)", "data")
    keep_one_call: float = setting(1.0, "filter: share of one-call trajectories to keep (official run: 0.5)", "data")
    rows: int = setting(128, "cache rows of the engine; half as many trajectories run at once", "memory", min=2)
    timeout: float = setting(5.0, "maximum seconds per code block", "run")
    memory_mb: int = setting(1024, "memory limit of a code block in MiB", "run", min=1)
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "'auto' is a GPU if there is one", "model")
    seed: int = setting(0, "random seed of problems, sampling and filter", "run")
    out: str = setting("runs/tirgen", "run folder to write", "run")
    resume: bool = setting(False, "resume the run in --out", "run")


@dataclass
class Draft:
    """A trajectory as text, independent of any tokenizer."""

    problem: Problem
    segments: list[tuple[str, bool]] = field(default_factory=list)  # (text, whether a model wrote it)
    statuses: list[str] = field(default_factory=list)  # execution status of each code block
    codes: list[str] = field(default_factory=list)
    finished: bool = False  # the actor ended it, it was not cut off
    dropped: str = ""  # reason for giving up: 'no_code' | 'code_failed' | 'too_long' | 'infra'

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.segments)

    @property
    def policy_text(self) -> str:
        """The text without tool output."""
        return "".join(text for text, own in self.segments if own)

    @classmethod
    def from_record(cls, record: dict, problem: Problem) -> Draft:
        """Restore a draft from its line in drafts.jsonl."""
        segments = [(text, own) for text, own in record["segments"]]
        return cls(problem, segments, *(record[name] for name in ("statuses", "codes", "finished", "dropped")))


# ---- prompt templates -----------------------------------------------------------------------------------------------


class LineStop:
    """Stop rule of the few-shot actor: a step is one line."""

    def __init__(self) -> None:
        self.seen = False

    def feed(self, piece: str) -> bool:
        self.seen |= bool(piece.strip())
        return self.seen and "\n" in piece


class CriticStop(FenceParser):
    """Stop rule of the critic: the code block closes, or the reply starts with "none"."""

    def feed(self, piece: str) -> bool:
        return super().feed(piece) or says_none(self.text)


def says_none(reply: str) -> bool:
    """Return True if the critic decided that code cannot help with this step."""
    return bool(re.match(r"\s*none\b", reply, re.IGNORECASE))


class FewShot:
    """Plain-text prompts for small models. Methods return (token ids, length of the prefix that requests share)."""

    actor_stop = LineStop

    def actor(self, tokenizer, question: str, solution: str) -> tuple[list[int], int]:
        shared = encode(tokenizer, few_shot_actor(question))
        return shared + encode(tokenizer, f"Question: {question}\n{solution}"), len(shared)

    def critic(self, tokenizer, question: str, solution: str, step: str) -> tuple[list[int], int]:
        shared = encode(tokenizer, few_shot_critic(question))
        return shared + encode(tokenizer, f"Question: {question}\nStep: {step}\nRewrite:"), len(shared)

    def is_last(self, step: str, finish: str) -> bool:
        return finish == "eos" or "\\boxed" in step


class Instruct:
    """Chat prompts for capable models. The output of a reasoning model is processed in windows inside <think>."""

    actor_stop = None  # a window has step_tokens tokens and is then cut at its last newline

    def actor(self, tokenizer, question: str, solution: str) -> tuple[list[int], int]:
        prompt = render_chat(tokenizer, question, ACTOR_INSTRUCT)
        return prompt + encode(tokenizer, solution), len(prompt) - 1

    def critic(self, tokenizer, question: str, solution: str, step: str) -> tuple[list[int], int]:
        text = CRITIC_INSTRUCT.format(question=question, solution=solution or "(nothing yet)", step=step)
        return render_chat(tokenizer, text), 0

    def is_last(self, step: str, finish: str) -> bool:
        return finish == "eos"


TEMPLATES = {"few-shot": FewShot(), "instruct": Instruct()}


# ---- actor and critic -----------------------------------------------------------------------------------------------


class ActorCritic:
    """The actor-critic loop (paper, section 3.1). Its generators are tasks for `thor.rollout.drive`."""

    def __init__(self, actor: Engine, critic: Engine, settings: Settings) -> None:
        self.actor, self.critic, self.settings = actor, critic, settings
        self.template = TEMPLATES[settings.template]

    def generate(self, problem: Problem, name: str) -> Task:
        """Generate one trajectory and return its Draft. `name` identifies its requests and determines its seeds."""
        draft, budget = Draft(problem), self.settings.max_tokens
        for number in range(self.settings.max_steps):
            step, finish, used = yield from self.actor_step(draft, name, number, budget)
            if draft.dropped:
                break
            budget -= used
            last = self.template.is_last(step, finish)
            if last or not step.strip() or after_think(draft.text + step):  # nothing to rewrite
                draft.segments.append((step.rstrip() if last else step, True))
                draft.finished = last
            else:
                budget -= yield from self.critic_step(draft, name, number, step)
            if draft.finished or draft.dropped or budget <= 0 or not step.strip():
                break
        return draft

    def actor_step(self, draft: Draft, name: str, number: int, budget: int) -> Task:
        """Sample one reasoning step of at most L_step tokens. Return (text, finish reason, number of tokens)."""
        tokenizer, settings = self.actor.tokenizer, self.settings
        ids, shared = self.template.actor(tokenizer, draft.problem.question, draft.text)
        if len(ids) >= self.actor.context:
            draft.dropped = "too_long"
            return "", "", 0
        stop = self.template.actor_stop and self.template.actor_stop()
        seed = derive_seed(settings.seed, name, number, "actor")
        room = min(settings.step_tokens, budget)
        request = Request(f"{name}/actor", ids, room, settings.temperature, seed=seed, stop=stop, shared=shared)
        completion = yield Ask(self.actor, request)
        step = decode(tokenizer, completion.token_ids)
        if completion.finish == "length" and "\n" in step.strip():
            step = step[: step.rstrip().rfind("\n") + 1]  # cut the window at its last newline
        return step, completion.finish, len(completion.token_ids)

    def critic_step(self, draft: Draft, name: str, number: int, step: str) -> Task:
        """Append the step as reasoning, code and output, or unchanged if code cannot help.

        Returns the number of tokens that the code costs. Sets `draft.dropped` if no attempt yields working code.
        """
        critic, settings, failure = self.critic, self.settings, ""
        ids, shared = self.template.critic(critic.tokenizer, draft.problem.question, draft.text, step.strip())
        if len(ids) >= critic.context:
            draft.dropped = "too_long"
            return 0
        for attempt in range(settings.code_tries):
            seed, stop = derive_seed(settings.seed, name, number, attempt), CriticStop()
            request = Request(
                f"{name}/critic", ids, settings.code_tokens, settings.temperature, seed=seed, stop=stop, shared=shared
            )
            completion = yield Ask(critic, request)
            reply = FenceParser()
            reply.feed(decode(critic.tokenizer, completion.token_ids))
            if says_none(reply.text):
                draft.segments.append((step, True))
                return 0
            if not reply.closed:
                failure = "no_code"
                continue
            result = yield reply.code
            if result.status == "infra":
                failure = "infra"
                break
            if result.passed:
                text = tir_step(reply.text[: reply.open_at].strip(), reply.code.rstrip("\n"))
                observed = observation_text(result.observation(), text)
                draft.segments += [(text, True), (observed, False)]
                draft.statuses.append(result.status)
                draft.codes.append(reply.code)
                return len(completion.token_ids) + len(encode(self.actor.tokenizer, observed))
            failure = "code_failed"
        draft.dropped = failure
        return 0


def after_think(text: str) -> bool:
    """Return True if a reasoning model has closed its <think> block, after which there must be no code."""
    return "<think>" in text and "</think>" in text


# ---- filter: each stage maps drafts to the drafts that it keeps -----------------------------------------------------


def keep_correct(drafts: list[Draft]) -> list[Draft]:
    """Stage 1: every code block passed, and the answer is correct."""
    return [draft for draft in drafts if is_correct(draft)]


def is_correct(draft: Draft) -> bool:
    if draft.dropped or any(status != "ok" for status in draft.statuses):
        return False
    answer = extract_answer(draft.policy_text)
    return answer is not None and verify(answer, draft.problem.answer)


def keep_well_formed(drafts: list[Draft], min_chars: int = 20, max_chars: int = 60_000) -> list[Draft]:
    r"""Stage 2: finished, one non-empty \boxed, paired $, at most one closed <think>, no code after it, one script."""

    def well_formed(draft: Draft) -> bool:
        text, own = draft.text, draft.policy_text
        prose = re.sub(r"```.*?```", "", own, flags=re.DOTALL)
        opened, closed = own.count("<think>"), own.count("</think>")
        return (
            draft.finished
            and own.count("\\boxed") == 1
            and bool(extract_answer(own))
            and prose.replace("\\$", "").count("$") % 2 == 0
            and opened == closed <= 1
            and "```python" not in own.partition("</think>")[2]
            and has_one_script(prose)
            and min_chars <= len(text) <= max_chars
        )

    return [draft for draft in drafts if well_formed(draft)]


def has_one_script(text: str) -> bool:
    """Return False if the text mixes Latin letters with CJK or Cyrillic ones, beyond 5% of all letters."""
    letters = [c for c in re.sub(r"\\[A-Za-z]+", "", text) if c.isalpha()]  # without LaTeX commands
    foreign = sum(
        1 for c in letters if "\u0400" <= c <= "\u04ff" or "\u3040" <= c <= "\u9fff" or "\uac00" <= c <= "\ud7af"
    )
    return not letters or min(foreign, len(letters) - foreign) <= 0.05 * len(letters)


def keep_unrepetitive(drafts: list[Draft], n: int = 20, max_count: int = 20) -> list[Draft]:
    """Stage 3: no substring of n characters occurs more than `max_count` times."""

    def highest_count(text: str) -> int:
        return max(Counter(text[i : i + n] for i in range(len(text) - n + 1)).values(), default=0)

    return [draft for draft in drafts if highest_count(draft.text) <= max_count]


SUBSTANTIAL = re.compile(r"^\s*(import|from)\s|\b(for|while|if|def|lambda)\b|\b(?!print\b)[A-Za-z_]\w*\(", re.MULTILINE)


def keep_substantial_code(drafts: list[Draft], share: float = 0.6) -> list[Draft]:
    """Stage 4: at least `share` of the code blocks call a function or use control flow. Keeps drafts without code."""
    return [d for d in drafts if sum(bool(SUBSTANTIAL.search(code)) for code in d.codes) >= share * len(d.codes)]


def keep_one_per_problem(drafts: list[Draft]) -> list[Draft]:
    """Stage 5: the shortest draft of each problem, in the order of the problems."""
    shortest: dict[str, Draft] = {}
    for draft in drafts:
        other = shortest.setdefault(draft.problem.id, draft)
        if len(draft.text) < len(other.text):
            shortest[draft.problem.id] = draft
    return list(shortest.values())


def keep_balanced(drafts: list[Draft], easy: set[str], keep_one_call: float, seed: int) -> list[Draft]:
    """Stage 6: a random half of the easy problems, and a random share of the trajectories with one tool call."""
    kept = []
    for draft in drafts:
        share = (0.5 if draft.problem.id in easy else 1.0) * (keep_one_call if len(draft.codes) == 1 else 1.0)
        if random.Random(derive_seed(seed, "balance", draft.problem.id)).random() < share:
            kept.append(draft)
    return kept


def easy_problems(drafts: list[Draft]) -> set[str]:
    """Return the ids of problems with at least two trajectories without code, all of them correct."""
    correct: dict[str, list[bool]] = {}
    for draft in drafts:
        if not draft.codes and not draft.dropped:
            correct.setdefault(draft.problem.id, []).append(is_correct(draft))
    return {problem for problem, marks in correct.items() if len(marks) >= 2 and all(marks)}


def filter_drafts(drafts: list[Draft], settings: Settings) -> tuple[list[Draft], dict[str, int]]:
    """Apply all stages. Return the remaining drafts and the funnel: how many drafts remain after each stage."""
    easy = easy_problems(drafts)
    stages = {
        "correct, code passed": keep_correct,
        "format": keep_well_formed,
        "no repetition": keep_unrepetitive,
        "code quality": lambda drafts: keep_substantial_code(drafts, settings.min_substantial),
        "one per problem": keep_one_per_problem,
        "balance": lambda drafts: keep_balanced(drafts, easy, settings.keep_one_call, settings.seed),
    }
    funnel = {"tried": len(drafts)}
    for name, stage in stages.items():
        drafts = stage(drafts)
        funnel[name] = len(drafts)
    return drafts, funnel


# ---- script ---------------------------------------------------------------------------------------------------------


def load_engines(settings: Settings) -> tuple[Engine, Engine]:
    """Load actor and critic; they are the same engine if they are the same model."""
    if settings.critic in ("", settings.actor):
        actor = load_engine(settings.actor, settings.device, settings.rows, share=0.5)
        return actor, actor
    names = settings.actor, settings.critic
    actor, critic = (load_engine(name, settings.device, settings.rows, share=0.25) for name in names)
    return actor, critic


def sample_drafts(loop: ActorCritic, problems: list[Problem], executor: Executor, run: Run) -> list[Draft]:
    """Generate all trajectories that drafts.jsonl does not have yet. Return all drafts in the order of the problems."""
    settings = loop.settings
    # Neighbours in this order have similar prompts, so that their shared prefix stays in the engine's cache.
    similar = sorted(problems, key=lambda p: loop.template.actor(loop.actor.tokenizer, p.question, "")[0])
    names = {f"{p.id}#{k}": p for p in similar for k in range(settings.tries)}
    records = [record for record in run.read("drafts.jsonl") if record["name"] in names]
    drafts = {record["name"]: Draft.from_record(record, names[record["name"]]) for record in records}
    todo = [name for name in names if name not in drafts]
    correct = 0

    def done(i: int, draft: Draft) -> None:
        nonlocal correct
        drafts[todo[i]] = draft
        run.append("drafts.jsonl", {"name": todo[i], **dataclasses.asdict(draft)})
        correct += is_correct(draft)
        bar.update()
        bar.set_postfix(correct=correct)

    with tqdm(total=len(names), initial=len(drafts), desc="tirgen", unit="try") as bar:
        tasks = [loop.generate(names[name], name) for name in todo]
        in_flight = max(1, settings.rows // 2)  # half of the rows: the actor's cache is kept while the critic samples
        deterministic = is_reproducible(loop.actor, loop.critic)
        drive(tasks, loop.actor, executor, done, in_flight=in_flight, deterministic=deterministic)
    return [drafts[f"{p.id}#{k}"] for p in problems for k in range(settings.tries)]


def histogram(values: list) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values).items())}


def funnel_report(drafts: list[Draft], kept: list[Draft], funnel: dict[str, int]) -> dict:
    """Return the contents of funnel.json."""
    correct = Counter(draft.problem.id for draft in keep_correct(drafts))
    return {
        "funnel": funnel,
        "dropped": histogram([d.dropped for d in drafts if d.dropped]),
        "code_ratio": sum(bool(d.codes) for d in kept) / max(1, len(kept)),
        "calls": histogram([len(d.codes) for d in kept]),
        "characters": histogram([len(d.text) // 100 * 100 for d in kept]),
        "right_of_tries": histogram([correct[problem] for problem in {d.problem.id for d in drafts}]),
    }


def to_row(draft: Draft) -> dict:
    """Return a line of tir.jsonl. It holds text, so that run_sft.py can use any model's tokenizer."""
    segments = [{"text": text, "sampled": own} for text, own in draft.segments]
    problem = draft.problem
    return {"id": problem.id, "question": problem.question, "answer": problem.answer, "segments": segments}


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(Settings, __doc__, argv)
    with user_errors():
        run = Run(settings.out, settings, settings.resume)
    with user_errors("--data"):
        problems = load_problems(settings.data, split=settings.split, limit=settings.limit, seed=settings.seed)
    with Executor(timeout=settings.timeout, memory_mb=settings.memory_mb) as executor:
        with user_errors():
            loop = ActorCritic(*load_engines(settings), settings)
            run.start()
        drafts = sample_drafts(loop, problems, executor, run)
    kept, funnel = filter_drafts(drafts, settings)
    report = funnel_report(drafts, kept, funnel)
    run.write_json("funnel.json", report)
    width = max(map(len, funnel))
    print("\n".join(f"{name:{width}s} {count:6d}" for name, count in funnel.items()))
    print(f"dropped: {report['dropped']}, code ratio of the kept trajectories: {report['code_ratio']:.2f}")
    if not kept:
        raise SystemExit(f"run_tirgen.py: no trajectory passed the filter; see {run / 'funnel.json'}")
    write_atomic(run / "tir.jsonl", "".join(json.dumps(to_row(d), ensure_ascii=False) + "\n" for d in kept))
    print(f"{len(kept)} trajectories in {run / 'tir.jsonl'}")


if __name__ == "__main__":
    run_main(main)
