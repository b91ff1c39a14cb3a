"""Stage 1, TIRGen: an actor reasons, a critic turns what code can do into code, and a multi-stage filter picks.

    python run_tirgen.py                                  # synthetic problems, demo model, ~4 minutes on 2 CPU cores
    python run_tirgen.py --data problems.jsonl --actor Qwen/Qwen3-8B --critic Qwen/Qwen3-32B --template instruct

For each try at a problem (paper, section 3.1): the actor writes one reasoning step; the critic judges whether code can
do some of it and, if so, extracts the pure reasoning and writes the code; the code is run for real, and reasoning,
code and output replace the step; the actor goes on from there until it is done or out of room.
Writes <out>/tir.jsonl, one trajectory a line, and beside it drafts.jsonl (all of them) and funnel.json.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from tqdm import tqdm

from thor.data import load_problems
from thor.demo import DEMO_MODEL, few_shot_actor, few_shot_critic
from thor.engines import Request, load_engine
from thor.prompts import ACTOR_INSTRUCT, CRITIC_INSTRUCT, observation_text, render_chat, tir_step
from thor.rollout import Ask, drive
from thor.run_folder import Run, write_atomic
from thor.sandbox import Executor
from thor.settings import UserError, at_least, derive_seed, parse_settings, run_main, user_errors
from thor.text import FenceParser, decode, encode, extract_answer
from thor.trajectory import Problem
from thor.verify import verify


@dataclass(frozen=True)
class Settings:
    """Flags of run_tirgen.py."""

    data: str = field(
        default="synthetic", metadata={"help": "problems: 'synthetic', a json/jsonl/parquet file, or a hub data set"}
    )
    split: str = field(default="train", metadata={"help": "split of 'synthetic' or of a hub data set"})
    limit: int = field(default=128, metadata={"help": "number of problems, the first ones of a file"})
    actor: str = field(
        default=DEMO_MODEL,
        metadata={
            "help": "model that reasons (paper: Qwen3-8B): demo name, folder or hub id; 'vllm:' before it: by vLLM; or "
            "'http://host:port' of a vllm serve"
        },
    )
    critic: str = field(
        default="", metadata={"help": "model that writes code (paper: Qwen3-32B), the same forms; empty: the actor's"}
    )
    template: str = field(
        default="few-shot", metadata={"help": "'few-shot' for small models, 'instruct' for capable chat models"}
    )
    tries: int = field(default=2, metadata={"help": "trajectories tried per problem"})
    code_tries: int = field(
        default=2, metadata={"help": "tries to get a step's code to run before its trajectory is dropped"}
    )
    max_steps: int = field(default=4, metadata={"help": "reasoning steps of a trajectory"})
    step_tokens: int = field(
        default=48, metadata={"help": "longest reasoning step in tokens, L_step (paper: to 4,096 for reasoning models)"}
    )
    code_tokens: int = field(default=128, metadata={"help": "longest answer of the critic in tokens"})
    max_tokens: int = field(default=512, metadata={"help": "longest trajectory in tokens of the actor's tokenizer"})
    temperature: float = field(default=0.5, metadata={"help": "of actor and critic"})
    min_substantial: float = field(
        default=0.0, metadata={"help": "least share of blocks beyond bare arithmetic (paper: 0.6; easy sums need none)"}
    )
    keep_one_call: float = field(
        default=1.0, metadata={"help": "share kept of the trajectories with one code call (official run: 0.5)"}
    )
    rows: int = field(default=128, metadata={"help": "rows of the cache; half as many tries are under way at once"})
    timeout: float = field(default=5.0, metadata={"help": "seconds a snippet may run"})
    device: str = field(default="auto", metadata={"help": "'cpu', 'cuda', or 'auto'"})
    seed: int = field(default=0, metadata={"help": "of problems, sampling and thinning"})
    out: str = field(default="runs/tirgen", metadata={"help": "run folder to write"})
    resume: bool = field(default=False, metadata={"help": "go on in the run folder --out"})


# ---- actor and critic -----------------------------------------------------------------------------------------------


@dataclass
class Draft:
    """A trajectory as text, before it is tied to a tokenizer. segments: (text, is it the policy's own?)."""

    problem: Problem
    segments: list[tuple[str, bool]] = field(default_factory=list)
    statuses: list[str] = field(default_factory=list)  # of each block that stands in it
    codes: list[str] = field(default_factory=list)
    finished: bool = False  # the actor ended it (EOS), it was not cut off
    dropped: str = ""  # why it was given up: 'no_code' | 'code_failed' | 'too_long' | 'infra'

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.segments)

    @property
    def policy_text(self) -> str:
        return "".join(text for text, own in self.segments if own)


class LineStop:
    """Stop rule of the few-shot actor: one line is one step."""

    def __init__(self) -> None:
        self.seen = False

    def feed(self, piece: str) -> bool:
        self.seen |= bool(piece.strip())
        return self.seen and "\n" in piece


class CriticStop(FenceParser):
    """Stop rule of the critic: the block closes, or the first line says "none"."""

    def feed(self, piece: str) -> bool:
        return super().feed(piece) or says_none(self.text)


def says_none(reply: str) -> bool:
    """The critic's verdict that code can do nothing for this step."""
    return bool(re.match(r"\s*none\b", reply, re.IGNORECASE))


class FewShot:
    """Prompts for a small model: it continues plain text. Each is (ids, how many of them other requests share)."""

    def __init__(self, actor_tokenizer, critic_tokenizer) -> None:
        self.actor_tokenizer, self.critic_tokenizer = actor_tokenizer, critic_tokenizer

    def actor(self, question: str, solution: str) -> tuple[list[int], int]:
        shared = encode(self.actor_tokenizer, few_shot_actor(question))
        return shared + encode(self.actor_tokenizer, f"Question: {question}\n{solution}"), len(shared)

    def critic(self, question: str, solution: str, step: str) -> tuple[list[int], int]:
        shared = encode(self.critic_tokenizer, few_shot_critic(question))
        own = encode(self.critic_tokenizer, f"Question: {question}\nStep: {step}\nRewrite:")
        return shared + own, len(shared)

    actor_stop = LineStop

    def is_last(self, step: str, finish: str) -> bool:
        return finish == "eos" or "\\boxed" in step


class Instruct:
    """Prompts for capable chat models; a reasoning model is worked on in windows cut at a newline, inside <think>."""

    def __init__(self, actor_tokenizer, critic_tokenizer) -> None:
        self.actor_tokenizer, self.critic_tokenizer = actor_tokenizer, critic_tokenizer

    def actor(self, question: str, solution: str) -> tuple[list[int], int]:
        prompt = render_chat(self.actor_tokenizer, question, ACTOR_INSTRUCT)
        return prompt + encode(self.actor_tokenizer, solution), len(prompt) - 1

    def critic(self, question: str, solution: str, step: str) -> tuple[list[int], int]:
        text = CRITIC_INSTRUCT.format(question=question, solution=solution or "(nothing yet)", step=step)
        return render_chat(self.critic_tokenizer, text), 0

    actor_stop = None  # the window is as long as step_tokens, then cut at its last newline

    def is_last(self, step: str, finish: str) -> bool:
        return finish == "eos"


def actor_critic(problem: Problem, name: str, actor, critic, template, settings: Settings):
    """One try at a problem, as a task for `thor.rollout.drive`; returns a Draft."""
    draft, budget = Draft(problem), settings.max_tokens
    for number in range(settings.max_steps):
        # the actor writes one reasoning step of at most L_step tokens
        ids, shared = template.actor(problem.question, draft.text)
        stop = template.actor_stop() if template.actor_stop else None
        room = min(settings.step_tokens, budget)
        if len(ids) >= actor.context:
            draft.dropped = "too_long"
            return draft
        seed = derive_seed(settings.seed, name, number, "actor")
        said = yield Ask(
            actor, Request(f"{name}/actor", ids, room, settings.temperature, seed=seed, stop=stop, shared=shared)
        )
        step = decode(actor.tokenizer, said.token_ids)
        if said.finish == "length" and "\n" in step.strip():
            step = step[: step.rstrip().rfind("\n") + 1]  # a window ends at a newline
        budget -= len(said.token_ids)
        last = template.is_last(step, said.finish)
        whole = draft.text + step
        thinking = "<think>" not in whole or "</think>" not in whole  # no code behind </think>
        if last or not thinking or not step.strip():
            draft.segments.append((step.rstrip() if last else step, True))
            draft.finished = last
            if last or budget <= 0 or not step.strip():
                return draft
            continue
        # the critic judges it, extracts the reasoning and writes the code; the executor runs it
        for attempt in range(settings.code_tries):
            ids, shared = template.critic(problem.question, draft.text, step.strip())
            seed = derive_seed(settings.seed, name, number, attempt)
            if len(ids) >= critic.context:
                draft.dropped = "too_long"
                return draft
            stop = CriticStop()
            said = yield Ask(
                critic,
                Request(
                    f"{name}/critic",
                    ids,
                    settings.code_tokens,
                    settings.temperature,
                    seed=seed,
                    stop=stop,
                    shared=shared,
                ),
            )
            reply = FenceParser()
            reply.feed(decode(critic.tokenizer, said.token_ids))
            if says_none(reply.text):
                draft.segments.append((step, True))
                draft.dropped = ""
                break
            if not reply.closed:
                draft.dropped = "no_code"
                continue
            result = yield reply.code
            if result.status == "infra":
                draft.dropped = "infra"
                return draft
            if result.passed:
                text = tir_step(reply.text[: reply.open_at].strip(), reply.code.rstrip("\n"))
                observed = observation_text(result.observation(), text)
                draft.segments += [(text, True), (observed, False)]
                draft.statuses.append(result.status)
                draft.codes.append(reply.code)
                draft.dropped = ""
                budget -= len(said.token_ids) + len(encode(actor.tokenizer, observed))
                break
            draft.dropped = "code_failed"
        if draft.dropped or budget <= 0:
            return draft
    return draft


# ---- multi-stage filter: each stage maps drafts to the drafts it keeps ----------------------------------------------


def keep_correct(drafts: list[Draft]) -> list[Draft]:
    """Stage 1: every block ran, and the answer is right."""
    kept = []
    for draft in drafts:
        answer = extract_answer(draft.policy_text)
        passed = not draft.dropped and all(status == "ok" for status in draft.statuses)
        if passed and answer is not None and verify(answer, draft.problem.answer):
            kept.append(draft)
    return kept


def keep_well_formed(drafts: list[Draft], shortest: int = 20, longest: int = 60_000) -> list[Draft]:
    r"""Stage 2: ended by the model; one full \boxed, paired $, whole think block, no code behind it, one script."""

    def good(draft: Draft) -> bool:
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
            and one_script(prose)
            and shortest <= len(text) <= longest
        )

    return [draft for draft in drafts if good(draft)]


def one_script(text: str) -> bool:
    """False when the letters mix a Latin text with more than a few CJK or Cyrillic ones, or the other way round."""
    letters = [c for c in re.sub(r"\\[A-Za-z]+", "", text) if c.isalpha()]  # LaTeX commands belong to no language
    foreign = sum(
        1 for c in letters if "\u0400" <= c <= "\u04ff" or "\u3040" <= c <= "\u9fff" or "\uac00" <= c <= "\ud7af"
    )
    return not letters or min(foreign, len(letters) - foreign) <= 0.05 * len(letters)


def keep_unrepetitive(drafts: list[Draft], n: int = 20, most: int = 20) -> list[Draft]:
    """Stage 3: no run of n characters occurs more than `most` times."""

    def worst(text: str) -> int:
        return max(Counter(text[i : i + n] for i in range(len(text) - n + 1)).values(), default=0)

    return [draft for draft in drafts if worst(draft.text) <= most]


def keep_substantial_code(drafts: list[Draft], share: float = 0.6) -> list[Draft]:
    """Stage 4: at least `share` of the blocks call a library or use control flow; drafts without blocks pass."""

    def substantial(code: str) -> bool:
        return bool(
            re.search(
                r"^\s*(import|from)\s|\b(for|while|if|def|lambda)\b|\b(?!print\b)[A-Za-z_]\w*\(", code, re.MULTILINE
            )
        )

    return [d for d in drafts if not d.codes or sum(map(substantial, d.codes)) >= share * len(d.codes)]


def keep_one_per_problem(drafts: list[Draft]) -> list[Draft]:
    """Stage 5: the shortest draft of each problem, in the order of the problems."""
    best: dict[str, Draft] = {}
    for draft in drafts:
        old = best.get(draft.problem.id)
        if old is None or len(draft.text) < len(old.text):
            best[draft.problem.id] = draft
    return list(best.values())


def keep_balanced(drafts: list[Draft], easy: set[str], keep_one_call: float, seed: int) -> list[Draft]:
    """Stage 6: half of the problems that plain reasoning always solves, and a share of the one-call trajectories."""
    kept = []
    for draft in drafts:
        share = (0.5 if draft.problem.id in easy else 1.0) * (keep_one_call if len(draft.codes) == 1 else 1.0)
        if random.Random(derive_seed(seed, "balance", draft.problem.id)).random() < share:
            kept.append(draft)
    return kept


def always_plain(drafts: list[Draft]) -> set[str]:
    """Problems tried without code at least twice, and right each time."""
    right: dict[str, list[bool]] = {}
    for draft in drafts:
        if not draft.codes and not draft.dropped:
            right.setdefault(draft.problem.id, []).append(bool(keep_correct([draft])))
    return {problem for problem, marks in right.items() if len(marks) >= 2 and all(marks)}


def filter_drafts(drafts: list[Draft], settings: Settings) -> tuple[list[Draft], list[tuple[str, int]]]:
    """All stages in order; returns what is left and the funnel [(stage, drafts behind it)]."""
    easy = always_plain(drafts)
    stages: list[tuple[str, Callable[[list[Draft]], list[Draft]]]] = [
        ("correct, code passed", keep_correct),
        ("format", keep_well_formed),
        ("no repetition", keep_unrepetitive),
        ("code quality", lambda d: keep_substantial_code(d, settings.min_substantial)),
        ("one per problem", keep_one_per_problem),
        ("balance", lambda d: keep_balanced(d, easy, settings.keep_one_call, settings.seed)),
    ]
    funnel = [("tried", len(drafts))]
    for name, stage in stages:
        drafts = stage(drafts)
        funnel.append((name, len(drafts)))
    return drafts, funnel


# ---- the script -----------------------------------------------------------------------------------------------------


def to_row(draft: Draft) -> dict:
    """A line of tir.jsonl: text segments, so that any model's tokenizer can be used on it (run_sft.py)."""
    segments = [{"text": text, "sampled": own} for text, own in draft.segments]
    problem = draft.problem
    return {"id": problem.id, "question": problem.question, "answer": problem.answer, "segments": segments}


def histogram(values: list[float]) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values).items())}


def main(argv: list[str] | None = None) -> None:
    settings = parse_settings(Settings, __doc__, argv)
    with user_errors():
        at_least(settings, tries=1, code_tries=1, max_steps=1, step_tokens=1, code_tokens=1, rows=2)
        if settings.template not in TEMPLATES:
            raise UserError(f"--template {settings.template}: one of {', '.join(TEMPLATES)}")
        run = Run(settings.out, settings, settings.resume)
    with user_errors("--data"):
        problems = load_problems(settings.data, split=settings.split, limit=settings.limit, seed=settings.seed)
    with Executor(timeout=settings.timeout) as executor:
        with user_errors():
            two = settings.critic not in ("", settings.actor)
            share = 0.25 if two else 0.5
            actor = critic = load_engine(settings.actor, settings.device, settings.rows, share)
            if two:
                critic = load_engine(settings.critic, settings.device, settings.rows, share)
            run.start()
        template = TEMPLATES[settings.template](actor.tokenizer, critic.tokenizer)
        # tries whose prompts begin alike stand together, so that what they share is in the engine's cache
        problems_alike = sorted(problems, key=lambda p: template.actor(p.question, "")[0])
        names = {f"{p.id}#{k}": p for p in problems_alike for k in range(settings.tries)}
        drafts = {
            record["name"]: draft_from(record, names) for record in run.read("drafts.jsonl") if record["name"] in names
        }
        todo = [name for name in names if name not in drafts]
        bar = tqdm(total=len(names), initial=len(drafts), desc="tirgen", unit="try")
        right = 0

        def done(i: int, draft: Draft) -> None:
            nonlocal right
            drafts[todo[i]] = draft
            run.append("drafts.jsonl", {"name": todo[i], **dataclasses.asdict(draft)})
            right += len(keep_correct([draft]))
            bar.update()
            bar.set_postfix(right=right)

        with bar:
            tasks = [actor_critic(names[name], name, actor, critic, template, settings) for name in todo]
            # half of the rows: an actor's cache stays where it is while the critic works
            drive(tasks, actor, executor, done, in_flight=max(1, settings.rows // 2))
    ordered = [drafts[f"{p.id}#{k}"] for p in problems for k in range(settings.tries)]
    kept, funnel = filter_drafts(ordered, settings)
    report = {
        "funnel": dict(funnel),
        "dropped": histogram([d.dropped for d in ordered if d.dropped]),
        "code_ratio": sum(bool(d.codes) for d in kept) / max(1, len(kept)),
        "calls": histogram([len(d.codes) for d in kept]),
        "characters": histogram([len(d.text) // 100 * 100 for d in kept]),
        "right_of_tries": histogram(
            [sum(bool(keep_correct([drafts[f"{p.id}#{k}"]])) for k in range(settings.tries)) for p in problems]
        ),
    }
    run.write_json("funnel.json", report)
    width = max(len(name) for name, _ in funnel)
    print("\n".join(f"{name:{width}s} {count:6d}" for name, count in funnel))
    print(f"dropped on the way: {report['dropped']}  code ratio of what is kept: {report['code_ratio']:.2f}")
    if not kept:
        raise SystemExit(f"run_tirgen.py: no trajectory passed the filters; see {run / 'funnel.json'}")
    write_atomic(run / "tir.jsonl", "".join(json.dumps(to_row(d), ensure_ascii=False) + "\n" for d in kept))
    print(f"{len(kept)} trajectories in {run / 'tir.jsonl'}")


def draft_from(record: dict, problems: dict[str, Problem]) -> Draft:
    """A draft back from its line in drafts.jsonl."""
    segments = [(text, own) for text, own in record["segments"]]
    fields = {key: record[key] for key in ("statuses", "codes", "finished", "dropped")}
    return Draft(problems[record["name"]], segments, **fields)


TEMPLATES = {"few-shot": FewShot, "instruct": Instruct}


if __name__ == "__main__":
    run_main(main)
