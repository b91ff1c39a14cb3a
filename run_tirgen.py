"""Stage 1, TIRGen: build tool-integrated trajectories with an actor, a critic and a filter (paper, section 3.1).

    python run_tirgen.py                                  # synthetic problems, demo model, a few minutes on 2 CPU cores
    python run_tirgen.py --config docs/configs/tirgen-qwen3-8b.yaml --data problems.jsonl --out runs/tir-8b

The actor writes one reasoning step. The critic decides whether code can do part of it. If so, it extracts the pure
reasoning and writes the code, the code is executed, and reasoning, code and output replace that part. The actor then
continues until it ends its solution or reaches a limit. A multi-stage filter selects the training data.

Writes <out>/tir.jsonl (one trajectory per line), drafts.jsonl (all tries, before the filter) and summary.json.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from thor.data import load_problems
from thor.demo import DEMO_MODEL
from thor.engines import Engine, Request, RequestRejected, ServerError, is_reproducible, load_engine
from thor.rollout import Ask, Sampling, Task, drive
from thor.run_folder import Run, spread
from thor.sandbox import Executor
from thor.settings import (
    UserError,
    by_model,
    derive_seed,
    fill_defaults,
    parse_settings,
    run_main,
    setting,
    user_errors,
)
from thor.text import decode
from thor.tirgen import critic as contract
from thor.tirgen import report
from thor.tirgen.alignment import policy_alignment
from thor.tirgen.critic import FAULTS, CriticStop, Rewrite
from thor.tirgen.draft import Draft, thought_span
from thor.tirgen.filters import FilterSettings, Selection, first_fault, select
from thor.tirgen.problems import exclude, list_tries, take_shard
from thor.tirgen.roles import (
    FEW_SHOT,
    Prompts,
    Step,
    critic_sampling,
    encode_segments,
    feedback,
    load_prompts,
    make_actor,
    make_critic,
    read_step,
)
from thor.tirgen.store import check_shards, read_draft, read_drafts, read_names, read_summary, write_rows
from thor.trajectory import Problem

RETRY_SECONDS = 60  # pause after a model server was lost
MAX_REJECTED = 20  # tries in a row whose request the server rejects, before the run ends
OF_CRITIC = ("critic_calls", "code_tries", "code_tokens")  # settings whose default depends on the critic


@dataclass(frozen=True)
class Settings(FilterSettings):
    """Flags of run_tirgen.py, in addition to those of the filter."""

    data: str = setting("synthetic", "problems: 'synthetic', a file, a benchmark or a hub data set", "data")
    split: str = setting("train", "split of 'synthetic' or of a hub data set", "data")
    limit: int | None = by_model(160, None, "number of problems to load", "data", min=1)
    exclude: str = setting("", "test sets, separated by commas: problems that are also in them are dropped", "data")
    shard: str = setting("1/1", "i/n: only every n-th problem, from the i-th; see --merge", "data")
    merge: str = setting("", "run folders, separated by commas: filter all of their tries, and sample none", "data")
    actor: str = setting(
        DEMO_MODEL,
        "model that reasons (paper: Qwen3-8B): demo model, folder, hub id, vllm:NAME, or URL of a vLLM server",
        "model",
    )
    critic: str = setting("", "model that writes code (paper: Qwen3-32B); empty: the actor", "model")
    actor_prompt: str = setting("", "few-shot, actor or a YAML file; empty: few-shot for the demo model", "model")
    critic_prompt: str = setting("", "few-shot, critic or a YAML file; empty: few-shot for the demo model", "model")
    judge_prompt: str = setting(
        "judge", "judge or a YAML file: prompt of the first call, with --critic_calls 2", "model"
    )
    critic_calls: int = by_model(1, 2, "1: the critic judges and rewrites in 1 call; 2: in 2", "model", min=1, max=2)
    tries: int = by_model(1, 8, "trajectories per problem", "sampling", min=1)
    plain_tries: int = by_model(0, 4, "samples of plain reasoning, to measure difficulty", "sampling", min=0)
    code_tries: int = by_model(2, 3, "maximum attempts to get working code for a step", "sampling", min=1)
    max_steps: int = by_model(6, 60, "maximum reasoning steps per trajectory", "sampling", min=1)
    step_tokens: int = by_model(48, 4096, "maximum tokens per step, L_step (paper: 4,096)", "sampling", min=1)
    code_tokens: int = by_model(128, 4096, "maximum tokens per reply of the critic", "sampling", min=1)
    max_tokens: int = by_model(512, 20_000, "maximum tokens per trajectory", "sampling", min=1)
    temperature: float = by_model(0.3, 0.6, "sampling temperature of the actor", "sampling", min=0)
    top_p: float = setting(1.0, "nucleus sampling of the actor", "sampling", above=0, max=1)
    top_k: int = by_model(0, 30, "top-k of the actor; 0 is off", "sampling", min=0)
    critic_temperature: float | None = setting(None, "the critic's; empty: the actor's", "sampling", min=0)
    critic_top_p: float | None = setting(None, "the critic's; empty: the actor's", "sampling", above=0, max=1)
    critic_top_k: int | None = setting(None, "the critic's; empty: the actor's", "sampling", min=0)
    rows: int = setting(128, "requests that an engine samples at once", "memory", min=2)
    timeout: float = setting(5.0, "maximum seconds per code block", "run", above=0)
    memory_mb: int = setting(1024, "memory limit of a code block in MiB", "run", min=1)
    patience: float = setting(60.0, "minutes to wait for a model server that does not answer", "run", min=0)
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "'auto' is a GPU if there is one", "model")
    alignment: int = by_model(8, 64, "number of trajectories to score under the actor", "run", min=0)
    preview: int = setting(0, "number of kept trajectories to print, in colour", "run", min=0)
    dry_run: bool = setting(False, "only print the prompts and the number of tries, without a model", "run")
    out: str = setting("runs/tirgen", "run folder to write", "run")
    resume: bool = setting(False, "resume the run in --out", "run")


# ---- actor and critic -----------------------------------------------------------------------------------------------


class ActorCritic:
    """The actor-critic loop (paper, section 3.1). Its generators are tasks for `thor.rollout.drive`."""

    def __init__(self, actor: Engine, critic: Engine, prompts: Prompts, settings: Settings) -> None:
        self.actor, self.critic, self.settings = actor, critic, settings
        self.actor_role = make_actor(actor.tokenizer, prompts.actor)
        self.critic_role = make_critic(critic.tokenizer, prompts.critic)
        self.judge_role = make_critic(critic.tokenizer, prompts.judge)
        self.rejections: dict[str, RequestRejected] = {}  # name of a try -> why it was dropped

    def generate(self, problem: Problem, name: str) -> Task:
        """Generate one trajectory and return its Draft. `name` identifies its requests and determines its seeds."""
        draft = Draft(problem, name)
        draft.append(self.actor_role.opened)
        for _ in range(self.settings.max_steps):
            step = yield from self.actor_step(draft)
            if not draft.dropped:
                yield from self.critic_step(draft, step)
            if draft.finished or draft.dropped:
                break
        return draft

    def plain(self, problem: Problem, name: str) -> Task:
        """Solve a problem by plain reasoning, without critic and code, and return the Draft."""
        draft, role = Draft(problem, name, plain=True), self.actor_role
        prompt, shared = role.plain_prompt(problem.question)
        for _ in range(self.settings.max_steps if role.one_line else 1):
            said = encode_segments(self.actor.tokenizer, draft.segments)
            room = self.settings.max_tokens - len(said)
            stop = role.stop(room) if role.one_line else None  # a block, which is not run, ends nothing
            text, finish = yield from self.ask(draft, "actor", (prompt + said, shared), room, stop)
            draft.append(text)
            draft.finished = role.is_last(text, finish)
            if draft.finished or draft.dropped:
                break
        return draft

    def actor_step(self, draft: Draft) -> Task:
        """Sample one reasoning step of at most L_step tokens, or up to the end of the actor's own code block."""
        settings, role = self.settings, self.actor_role
        prompt, shared = role.prompt(draft.problem.question)
        said = encode_segments(self.actor.tokenizer, draft.segments, role.opened)
        room = min(settings.max_tokens - len(said), settings.step_tokens + settings.code_tokens)
        stop = role.stop(settings.step_tokens)
        text, finish = yield from self.ask(draft, "actor", (prompt + said, shared), room, stop)
        return read_step(draft, text, role.is_last(text, finish))

    def critic_step(self, draft: Draft, step: Step) -> Task:
        """Append a step to the draft, with its computations replaced by reasoning, code and output.

        If an output differs from what the actor had worked out, the rest of the step builds on that, and is left out.
        """
        start, end = thought_span(draft.policy_text, step.prose)
        cut = len(step.prose)
        if step.code is not None and end == cut:  # the last line introduces the actor's block
            cut = end = max(start, step.prose.rstrip().rfind("\n") + 1)
        prose, own = step.prose[:cut], step.prose[cut:]
        draft.append(prose[:start])
        parts, at = self.critic_role.split(prose[start:end]), 0
        rewrites = yield from self.judge(draft, parts)
        if draft.dropped:
            return
        for rewrite in rewrites:
            draft.append("".join(parts[at : rewrite.first]))
            at = rewrite.last + 1
            replaced = "".join(parts[rewrite.first : at])
            known, rest = f"{draft.problem.question}\n{draft.text}", [*parts[at:], prose[end:] + own]
            output = yield from self.rewrite(draft, rewrite, replaced)
            if draft.dropped:
                return
            if output is None:
                draft.append(replaced)
            elif not "".join(rest).strip() or not contract.agrees(output, replaced, known + draft.codes[-1], rest):
                return  # the actor continues from the output
        draft.append("".join(parts[at:]) + prose[end:])
        if step.code is not None:
            block = f"{own}```python\n{step.code.rstrip()}\n```\n"
            yield from self.rewrite(draft, Rewrite(0, 0, own, step.code), block, is_own=True)
        elif step.ended and not draft.dropped:
            draft.finished = True

    def judge(self, draft: Draft, parts: list[str]) -> Task:
        """Which of the parts code replaces: a list of Rewrite, which have no code yet if the critic has two calls."""
        if not self.critic_role.can_judge(text := "".join(parts), draft.observed) or not text.strip():
            return []
        two_calls, told = self.settings.critic_calls == 2, ""
        if len(parts) == 1 and not two_calls:
            return [Rewrite(0, 0)]
        for _ in range(self.settings.code_tries):
            rewrites, fault, reply = yield from self.ask_critic(draft, parts, told, judge=two_calls)
            if fault:
                draft.rejected[fault] += 1
                told = feedback(reply, FAULTS[fault])
            if rewrites or not fault or draft.dropped:
                break
        return rewrites

    def rewrite(self, draft: Draft, rewrite: Rewrite, replaced: str, is_own: bool = False) -> Task:
        """Append reasoning, code and output in place of the text `replaced`. Returns the output.

        Returns None and appends nothing if the critic says that code cannot help, or if no reply keeps the contract.
        Code that fails is shown to the critic with its error. Sets `draft.dropped` if none works in the end.
        is_own: the actor wrote the block, which need not keep the contract.
        """
        known = f"{draft.problem.question}\n{draft.text}"
        indent = replaced[: len(replaced) - len(replaced.lstrip())]
        reply, told, fault = "", "", ""
        if is_own and not draft.has_prose(rewrite.logic):  # the critic has to say what the block computes
            fault = "no_reasoning"
            if not self.critic_role.adds_reasoning:
                draft.dropped = "empty_thought"
                return None
        for attempt in range(self.settings.code_tries):
            if asked := attempt or not rewrite.code:
                rewrites, fault, reply = yield from self.ask_critic(draft, [replaced], told)
                if not fault and not rewrites:  # "none", or dropped
                    return None
                rewrite, is_own = (rewrites[0] if rewrites else rewrite), False
            text = rewrite.logic if is_own else f"{indent}{rewrite.logic}\n"
            text = f"{text}```python\n{rewrite.code.rstrip()}\n```\n"
            if not is_own:
                fault = fault or contract.contract_fault(rewrite, replaced, known)
            if not fault:
                result = yield rewrite.code
                if result.status == "infra":
                    draft.dropped = "infra"
                    return None
                if result.passed and (is_own or not contract.states_output(rewrite.logic, result.stdout, known)):
                    draft.append_block(text, rewrite.code, result)
                    return result.stdout
                fault = "predicts_output" if result.passed else "code_failed"
            if fault == "code_failed":
                draft.errors[contract.error_type(result)] += 1
                told = feedback(text, f"its code failed with {result.observation()}")
            else:
                draft.rejected[fault] += 1
                told = feedback(reply if asked else text, FAULTS[fault])
        if fault == "code_failed":
            draft.dropped = fault
        return None

    def ask_critic(self, draft: Draft, parts: list[str], told: str, judge: bool = False) -> Task:
        """Show the critic a step. Returns (rewrites, fault, reply); neither rewrites nor a fault if it says none."""
        role = self.judge_role if judge else self.critic_role
        prompt = role.prompt(draft.problem.question, draft.text, parts, told)
        if len(prompt[0]) >= self.critic.context:
            draft.rejected["too_long"] += 1
            return [], "", ""
        stop = CriticStop(role.thinks, one_block=len(parts) == 1 and not judge)
        reply, _ = yield from self.ask(draft, "critic", prompt, self.settings.code_tokens, stop)
        answer = contract.skip_thought(reply, role.thinks)
        if draft.dropped or (answer and contract.says_none(answer)):
            return [], "", reply
        if answer is None:
            return [], "thought_unfinished", ""
        parse = contract.parse_judgement if judge else contract.parse_rewrites
        return *parse(answer, len(parts)), answer

    def ask(self, draft: Draft, who: str, prompt: tuple[list[int], int], room: int, stop) -> Task:
        """Sample one turn of at most `room` tokens. Returns (text without EOS, finish), or drops the draft."""
        engine, s = (self.actor, self.settings) if who == "actor" else (self.critic, critic_sampling(self.settings))
        ids, shared = prompt
        if min(room, engine.context - len(ids)) <= 0:
            draft.dropped = "too_long"
            return "", "length"
        seed = derive_seed(s.seed, draft.name, who, draft.requests)
        request = Request(f"{draft.name}/{who}", ids, room, s.temperature, s.top_p, s.top_k, seed, stop, shared)
        try:
            completion = yield Ask(engine, request)
        except RequestRejected as error:
            draft.dropped, self.rejections[draft.name] = "rejected", error.with_traceback(None)
            return "", "length"
        draft.requests += 1
        draft.tokens[who] += len(completion.token_ids)
        sampled = completion.token_ids[:-1] if completion.finish == "eos" else completion.token_ids
        return decode(engine.tokenizer, sampled), completion.finish


# ---- sampling -------------------------------------------------------------------------------------------------------


def load_engines(settings: Settings) -> tuple[Engine, Engine]:
    """Load actor and critic; they are the same engine if they are the same model."""
    if settings.critic in ("", settings.actor):
        actor = load_engine(settings.actor, settings.device, settings.rows, share=0.5)
        return actor, actor
    names = settings.actor, settings.critic
    actor, critic = (load_engine(name, settings.device, settings.rows, share=0.25) for name in names)
    return actor, critic


def sample_drafts(loop: ActorCritic, problems: list[Problem], executor: Executor, run: Run) -> None:
    """Generate all tries that drafts.jsonl does not have yet. Each is appended when it has ended.

    If a model server stops answering, what is in flight is lost, and sampled again once it answers. A try whose request
    it rejects is dropped. Raises ServerError after --patience, or if many tries in a row are rejected, which it does
    not save.
    """
    settings = loop.settings
    done = read_names(run / "drafts.jsonl")
    total = len(problems) * (settings.tries + settings.plain_tries)
    shared = loop.actor is loop.critic  # half of the rows: the actor's cache is kept while the critic samples
    rows = max(1, settings.rows // 2 if shared else settings.rows)
    counts = {"kept": 0, "drafts": 0, "tokens": 0}
    start, lost = time.monotonic(), None  # lost: since when no server has answered
    unsaved: list[Draft] = []  # rejected tries, until another one is not rejected
    most_rejected = max(MAX_REJECTED, 2 * (settings.tries + settings.plain_tries))  # more than those of one problem

    def save() -> None:
        for draft in unsaved:
            run.append("drafts.jsonl", draft.to_record())
            done.add(draft.name)
            counts["drafts"] += not draft.plain
            counts["kept"] += not draft.plain and not first_fault(draft, settings)[0]
            counts["tokens"] += draft.tokens.total()
            bar.update()
        unsaved.clear()

    def end(_: int, draft: Draft) -> None:
        nonlocal lost
        unsaved.append(draft)
        if draft.dropped == "rejected":
            error = loop.rejections.pop(draft.name)
            tqdm.write(f"{error}; {draft.name} is dropped")
            if len(unsaved) == most_rejected:
                raise error
            return
        lost = None
        save()
        share, speed = counts["kept"] / max(1, counts["drafts"]), counts["tokens"] / (time.monotonic() - start)
        bar.set_postfix_str(f"yield {share:.0%}, {speed:.0f} tokens/s", refresh=False)

    with tqdm(total=total, initial=len(done), desc="tirgen", unit="try") as bar:
        while len(done) < total:
            tasks = (
                loop.plain(problem, name) if plain else loop.generate(problem, name)
                for name, problem, plain in list_tries(problems, settings)
                if name not in done
            )
            try:
                drive(tasks, loop.actor, executor, end, Draft.grade, rows, is_reproducible(loop.actor, loop.critic))
                save()
            except ServerError as error:
                lost = lost or time.monotonic()
                if isinstance(error, RequestRejected) or time.monotonic() - lost >= 60 * settings.patience:
                    raise
                unsaved.clear()
                tqdm.write(f"{error}; trying again in {RETRY_SECONDS} seconds")
                time.sleep(RETRY_SECONDS)


# ---- script ---------------------------------------------------------------------------------------------------------


def resolve(settings: Settings) -> Settings:
    """Fill in the defaults that depend on the models."""
    critic = settings.critic or settings.actor
    names = {
        "actor_prompt": settings.actor_prompt or (FEW_SHOT if settings.actor == DEMO_MODEL else "actor"),
        "critic_prompt": settings.critic_prompt or (FEW_SHOT if critic == DEMO_MODEL else "critic"),
    }
    of_actor = [field.name for field in fields(settings) if field.name not in OF_CRITIC]
    of_critic = OF_CRITIC[1:] if names["critic_prompt"] == FEW_SHOT else OF_CRITIC  # few-shot: one call
    settings = fill_defaults(settings, settings.actor, DEMO_MODEL, of_actor)
    settings = fill_defaults(settings, critic, DEMO_MODEL, of_critic)
    return replace(settings, critic=critic, **names)


def prepare_problems(settings: Settings) -> tuple[list[Problem], dict[str, int]]:
    """Load the problems of this shard. Returns them, and how many are left out by test set."""
    with user_errors("--data"):
        problems = load_problems(settings.data, split=settings.split, limit=settings.limit, seed=settings.seed)
    with user_errors("--exclude"):
        problems, excluded = exclude(problems, settings.exclude, lambda name: load_problems(name, split="test"))
    with user_errors():
        if not problems:
            raise UserError(f"--exclude {settings.exclude}: no problem is left")
        return take_shard(problems, settings.shard), excluded


def select_drafts(folders: list[Path], settings: Settings) -> Selection:
    """Filter the drafts of some runs."""
    with user_errors("--merge" if settings.merge else ""):
        if settings.merge:
            check_shards(folders)
        return select(read_drafts(folder / "drafts.jsonl" for folder in folders), settings)


def measure_alignment(loop: ActorCritic, executor: Executor, selection: Selection) -> dict | None:
    """Policy alignment of the first trajectories that were kept."""
    settings = critic_sampling(loop.settings)
    drafts = [read_draft(candidate.where) for candidate in spread(selection.kept, settings.alignment)]
    if not drafts:
        return None
    sampling = Sampling(settings.max_tokens, settings.temperature, settings.top_p, settings.top_k, settings.seed)
    return policy_alignment(loop.actor, loop.critic, executor, drafts, sampling)


def main(argv: list[str] | None = None) -> None:
    settings = resolve(parse_settings(Settings, __doc__, argv))
    with user_errors():
        prompts = load_prompts(settings.actor_prompt, settings.critic_prompt, settings.judge_prompt)
        run = None if settings.dry_run else Run(settings.out, settings, settings.resume)
    problems, excluded = ([], {}) if settings.merge else prepare_problems(settings)
    if settings.dry_run:
        print(report.dry_run(problems, excluded, prompts, settings))
        return
    alignment, total = None, len(problems) * (settings.tries + settings.plain_tries)
    if settings.merge:
        folders = [Path(name.strip()) for name in settings.merge.split(",")]
        selection, excluded = select_drafts(folders, settings), read_summary(folders[0])["excluded_problems"]
        run.start()
    elif (run / "summary.json").exists() and len(read_names(run / "drafts.jsonl")) == total:
        selection, alignment = select_drafts([run.folder], settings), read_summary(run.folder)["alignment"]
    else:
        with Executor(timeout=settings.timeout, memory_mb=settings.memory_mb) as executor:
            with user_errors():
                loop = ActorCritic(*load_engines(settings), prompts, settings)
                run.start()
            sample_drafts(loop, problems, executor, run)
            selection = select_drafts([run.folder], settings)
            write_rows(run / "tir.jsonl", selection)  # the next line may lose a model server
            alignment = measure_alignment(loop, executor, selection)
    statistics = write_rows(run / "tir.jsonl", selection)
    summary = report.summary(selection, statistics, excluded) | {"alignment": alignment}
    run.write_json("summary.json", summary)
    print(report.table(summary))
    report.preview(read_draft(candidate.where) for candidate in selection.kept[: settings.preview])
    if not selection.kept:
        raise SystemExit(f"run_tirgen.py: no trajectory passed the filter; see {run / 'summary.json'}")
    print(f"{len(selection.kept)} trajectories in {run / 'tir.jsonl'}")


if __name__ == "__main__":
    run_main(main)
