"""Tests of whole runs with scripted models: resuming, shards, lost servers, test sets, summary and previews."""

import io
import json
import os
import random
import re
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import ScriptedEngine, ScriptedExecutor, byte_tokenizer, full_disk

import run_tirgen
from run_tirgen import Settings, main, resolve
from thor.demo import DEMO_MODEL
from thor.engines import RequestRejected, ServerError
from thor.rollout import Sampling
from thor.settings import UserError, parse_settings
from thor.tirgen import report
from thor.tirgen.alignment import policy_alignment
from thor.tirgen.draft import Draft
from thor.tirgen.filters import Candidate, Selection
from thor.tirgen.problems import Overlap, exclude, take_shard
from thor.tirgen.store import read_drafts, read_names, write_rows
from thor.trajectory import ExecResult, Problem

PROBLEMS = 6


def reply(request, turn) -> str:
    """Solves "What is a + b?", rightly in half of the tries."""
    [(a, b)] = re.findall(r"What is (\d+) \+ (\d+)\?", request_text(request).rpartition("Question:")[2])
    wrong = random.Random(request.id.rpartition("/")[0]).random() < 0.5
    if request.id.endswith("critic"):
        return "none\n" if turn else f"Add the numbers.\n```python\nprint({a} + {b})\n```"
    if turn or "#plain" in request.id:
        return f"The answer is \\boxed{{{int(a) + int(b) + wrong}}}.\n"
    return f"Add the numbers: {int(a) + int(b)}.\n"


def request_text(request) -> str:
    return TOKENIZER.decode(request.token_ids)


TOKENIZER = byte_tokenizer()


def adds(code: str) -> ExecResult:
    return ExecResult("ok", f"{eval(code.strip().removeprefix('print'))}\n")


class Tools(ScriptedExecutor):
    """Stands in for the Executor, also as a context manager."""

    def __init__(self, **_) -> None:
        super().__init__(adds)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None: ...


@pytest.fixture(autouse=True)
def scripted(monkeypatch, tmp_path):
    """Replace engines and sandbox, and go to a folder with problems.jsonl."""
    engines = []

    def load(settings):
        engines.append(ScriptedEngine(TOKENIZER, reply))
        return engines[-1], engines[-1]

    monkeypatch.setattr(run_tirgen, "load_engines", load)
    monkeypatch.setattr(run_tirgen, "Executor", Tools)
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"What is {10 + i} + {20 + i}?", "answer": str(30 + 2 * i)} for i in range(PROBLEMS)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return engines


FLAGS = ["--data", "problems.jsonl", "--tries", "3", "--plain_tries", "1", "--step_tokens", "400"]
FLAGS += ["--code_tokens", "400", "--max_tokens", "4000", "--alignment", "0"]


def summary_of(run: str) -> dict:
    return json.loads(Path(run, "summary.json").read_text())


def lines(path: str) -> list[str]:
    with open(path, encoding="utf-8") as file:
        return sorted(file)


def test_a_run_writes_rows_drafts_and_a_summary(capsys):
    main([*FLAGS, "--out", "run", "--preview", "1"])
    drafts = [draft for _, draft in read_drafts([Path("run/drafts.jsonl")])]
    assert len(drafts) == PROBLEMS * 4 and sum(draft.plain for draft in drafts) == PROBLEMS
    rows = [json.loads(line) for line in lines("run/tir.jsonl")]
    summary = summary_of("run")
    assert 2 <= len(rows) <= PROBLEMS and len(rows) == summary["kept"]["trajectories"]
    by_problem = {p.id: [d for d in drafts if d.problem.id == p.id] for p in (d.problem for d in drafts)}
    for row in rows:
        tries = [d for d in by_problem[row["id"]] if not d.plain]
        assert row["pass_rate"] == sum(d.correct for d in tries) / 3
        assert row["plain_pass_rate"] == sum(d.correct for d in by_problem[row["id"]] if d.plain)
        assert row["calls"] == 1 and [s["sampled"] for s in row["segments"]] == [True, False, True]
    assert summary["funnel"]["tried"] == PROBLEMS * 3
    left = summary["funnel"]["tried"] - sum(sum(reasons.values()) for reasons in summary["dropped"].values())
    assert left == summary["funnel"]["code quality"]
    assert summary["tokens"]["actor"] == sum(d.tokens["actor"] for d in drafts)
    printed = capsys.readouterr().out
    assert f"{len(rows)} trajectories in run/tir.jsonl" in printed and "wrong" in printed
    assert "```output" in printed and "\033" not in printed


def test_a_finished_run_is_filtered_again_without_a_model(scripted):
    main([*FLAGS, "--out", "run"])
    rows = lines("run/tir.jsonl")
    main([*FLAGS, "--out", "run", "--resume"])
    assert lines("run/tir.jsonl") == rows and len(scripted) == 1, "no engine was loaded"
    main([*FLAGS, "--merge", "run", "--out", "again", "--keep_easy", "0"])
    assert len(lines("again/tir.jsonl")) <= len(rows)


def test_shards_add_up_to_the_whole_run():
    main([*FLAGS, "--out", "whole"])
    for i in (1, 2, 3):
        main([*FLAGS, "--out", f"shard{i}", "--shard", f"{i}/3"])
    main([*FLAGS, "--merge", "shard1, shard2,shard3", "--out", "merged"])
    assert lines("merged/tir.jsonl") == lines("whole/tir.jsonl")
    assert summary_of("merged") == summary_of("whole")


def test_merging_a_shard_twice_is_refused(capsys):
    main([*FLAGS, "--out", "run"])
    with pytest.raises(SystemExit) as stop:
        main([*FLAGS, "--merge", "run,run", "--out", "merged"])
    assert stop.value.code == 2 and "--merge run/drafts.jsonl: has the try" in capsys.readouterr().err


def test_runs_that_have_not_ended_and_missing_shards_are_not_merged(capsys):
    for i in (1, 3):
        main([*FLAGS, "--shard", f"{i}/3", "--out", f"part{i}"])
    with pytest.raises(SystemExit) as stop:
        main([*FLAGS, "--merge", "part1,part3", "--out", "merged"])
    assert stop.value.code == 2 and "--merge part1, part3: without shard 2/3" in capsys.readouterr().err
    os.remove("part1/summary.json")
    with pytest.raises(SystemExit) as stop:
        main([*FLAGS, "--merge", "part1,part3", "--out", "merged"])
    assert stop.value.code == 2 and "--merge part1: has no summary.json" in capsys.readouterr().err


def run_slowly(out: str) -> None:
    """Resume a run with an engine whose steps take 5 ms, with two tries in flight."""
    engine = ScriptedEngine(TOKENIZER, reply)
    step = engine.step
    engine.step = lambda: time.sleep(0.005) or step()
    run_tirgen.load_engines = lambda settings: (engine, engine)
    main([*FLAGS, "--out", out, "--resume", "--rows", "4"])


def test_a_run_killed_ten_times_loses_no_try_and_repeats_none():
    main([*FLAGS, "--out", "whole"])
    path, rng, counts = Path("killed/drafts.jsonl"), random.Random(os.getpid()), [0]
    for _ in range(10):
        child = os.fork()
        if child == 0:
            try:
                run_slowly("killed")
            finally:
                os._exit(0)
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if path.exists() and path.read_bytes().count(b"\n") > counts[-1]:
                time.sleep(rng.uniform(0, 0.005))
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                break
            time.sleep(0.001)
        counts.append(path.read_bytes().count(b"\n"))
    assert sum(0 < count < PROBLEMS * 4 for count in counts) >= 3, "these kills hit the middle of the run"
    main([*FLAGS, "--out", "killed", "--resume"])
    for name in ("drafts.jsonl", "tir.jsonl", "summary.json"):
        assert lines(f"killed/{name}") == lines(f"whole/{name}")


INVENTED = "987"


def inventing(request, turn) -> str:
    """An actor and a critic that claim outputs, in many forms."""
    [(a, b)] = re.findall(r"What is (\d+) \+ (\d+)\?", request_text(request).rpartition("Question:")[2])
    block = f"Add the numbers.\n```python\nprint({a} + {b})\n```\n"
    claims = [
        f"{fence}\n{INVENTED}\n{fence.partition('o')[0]}\n"
        for fence in ("```output", "   ``` Output", "~~~output", "> ```output")
    ]
    claims += [f"Inline ```output {INVENTED}``` it is.\n", f"Output:\n{INVENTED}\n", f"The code prints {INVENTED}.\n"]
    claimed = (f"print({a} + {b})  # Output: {INVENTED}", f"print({a} + {b})  # {INVENTED}")
    claims += [f"Add the numbers.\n```python\n{code}\n```\n" for code in claimed]
    rng = random.Random(f"{request.id} {turn}")
    if request.id.endswith("critic"):
        return rng.choice(["none\n", block + rng.choice(claims), f"It is {INVENTED}.\n{block}"])
    answer = f"The answer is \\boxed{{{int(a) + int(b)}}}.\n"
    text = rng.choice([block, "Add the numbers.\n"]) + rng.choice([*claims, "```text\n987\n```\n", *[""] * 12]) + answer
    return text.partition("\n")[2] if turn and "few-shot" in request.id else text


@pytest.mark.parametrize("prompts", ["few-shot", "chat"])
def test_no_output_that_a_model_invents_is_learned(monkeypatch, prompts):
    rows = [{"question": f"What is {10 + i} + {20 + i}?", "answer": str(30 + 2 * i)} for i in range(40)]
    rows = [row | {"id": f"{prompts} {i}"} for i, row in enumerate(rows)]
    Path("problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    engine = ScriptedEngine(TOKENIZER, inventing)
    monkeypatch.setattr(run_tirgen, "load_engines", lambda settings: (engine, engine))
    chat = ["--actor_prompt", "actor", "--critic_prompt", "critic"] if prompts == "chat" else []
    main([*FLAGS, *chat, "--out", "run"])
    assert sum(INVENTED in TOKENIZER.decode(c.token_ids) for c in engine.completions) > 20
    kept = [json.loads(line) for line in lines("run/tir.jsonl")]
    assert len(kept) > 10 and sum(row["calls"] for row in kept) > 10
    for row in kept:
        learned = "".join(s["text"] for s in row["segments"] if s["sampled"])
        assert INVENTED not in learned and "```output" not in learned.lower()
        assert learned.count("```python") == row["calls"]
        observed = [s["text"] for s in row["segments"] if not s["sampled"]]
        assert observed == [f"```output\n{row['answer']}\n```\n"] * row["calls"]


def test_rows_that_a_full_disk_refuses_are_a_one_line_error(tmp_path):
    """The row is small enough to be written on closing only."""
    drafts = tmp_path / "drafts.jsonl"
    drafts.write_text(json.dumps(Draft(Problem("p", "?" * 4000), "p#0").to_record()) + "\n")
    [(where, _)] = read_drafts([drafts])
    selection = Selection(kept=[Candidate("p#0", "p", 0, where)])
    with full_disk(1000), pytest.raises(UserError, match="tir.jsonl: cannot be written"):
        write_rows(tmp_path / "tir.jsonl", selection)
    assert not list(tmp_path.glob("tir.jsonl*"))


def test_a_cut_off_line_is_removed(tmp_path):
    path = tmp_path / "drafts.jsonl"
    whole = json.dumps(Draft(Problem("p", "?"), "p#0").to_record()) + "\n"
    for rest in ("", '{"na', "x" * 100_000):
        path.write_text(whole + rest)
        assert read_names(path) == {"p#0"} and path.read_text() == whole
    path.write_text("x" * 100_000)
    assert read_names(path) == set() and path.read_text() == ""
    assert read_names(tmp_path / "missing") == set()


@pytest.mark.parametrize(
    "line",
    [b"5", b"null", b"{}", b"[", b"\xff", b'"name"', {"segments": None}, {"segments": [["a"]]}, {"problem": 1}]
    + [{"segments": [[5, True]]}, {"segments": [["a", "false"]]}, {"color": "red"}],
)
def test_line_that_is_no_draft_is_named(tmp_path, line):
    path, draft = tmp_path / "drafts.jsonl", Draft(Problem("p", "?"), "p#0").to_record()
    bad = json.dumps(draft | line).encode() if isinstance(line, dict) else line
    path.write_bytes(json.dumps(draft).encode() + b"\n" + bad + b"\n")
    for read in (read_names, lambda path: list(read_drafts([path]))):
        with pytest.raises(UserError, match=f"{path}:2: not a draft of run_tirgen.py"):
            read(path)


def test_a_lost_server_is_tried_again(monkeypatch, scripted):
    main([*FLAGS, "--out", "whole"])
    pauses = []

    def load(settings):
        engine = ScriptedEngine(TOKENIZER, reply)
        step, calls = engine.step, iter(range(1000))

        def failing_step():
            if next(calls) in (5, 6, 30):
                raise ServerError("http://critic: no answer")
            return step()

        engine.step = failing_step
        return engine, engine

    monkeypatch.setattr(run_tirgen, "load_engines", load)
    monkeypatch.setattr(run_tirgen.time, "sleep", pauses.append)
    main([*FLAGS, "--out", "lost"])
    assert pauses == [run_tirgen.RETRY_SECONDS] * 3
    assert lines("lost/tir.jsonl") == lines("whole/tir.jsonl")
    with pytest.raises(ServerError):
        main([*FLAGS, "--out", "impatient", "--patience", "0"])


def rejecting(monkeypatch, names) -> list:
    """Make the engine reject the requests of these tries, once the others have a few steps. Returns all requests."""
    requests = []

    def load(settings):
        engine = ScriptedEngine(TOKENIZER, reply)
        step, engine.requests = engine.step, requests

        def rejecting_step():
            for request in engine.queue if len(engine.requests) > 4 else ():
                if names(request.id):
                    engine.queue.remove(request)
                    raise RequestRejected("http://critic: rejected the request with 400: too long", request.id)
            return step()

        engine.step = rejecting_step
        return engine, engine

    monkeypatch.setattr(run_tirgen, "load_engines", load)
    return requests


def test_a_request_that_the_server_rejects_costs_its_try_only(monkeypatch, capsys):
    requests = rejecting(monkeypatch, lambda name: False)
    main([*FLAGS, "--out", "whole"])
    expected = Counter(request.id.rpartition("/")[0] for request in requests)
    lost = {json.loads(line)["name"] for line in lines("whole/drafts.jsonl")[:2]}
    requests = rejecting(monkeypatch, lambda name: name.rpartition("/")[0] in lost)
    main([*FLAGS, "--out", "rejected"])
    asked = Counter(request.id.rpartition("/")[0] for request in requests)
    assert {name: n for name, n in asked.items() if name not in lost} == {
        name: n for name, n in expected.items() if name not in lost
    }, "a try of which nothing was rejected started again"
    assert capsys.readouterr().out.count("rejected the request with 400: too long; ") == len(lost)
    drafts = {draft.name: draft for _, draft in read_drafts([Path("rejected/drafts.jsonl")])}
    assert {name for name, draft in drafts.items() if draft.dropped} == lost and len(drafts) == PROBLEMS * 4
    assert [line for line in lines("whole/drafts.jsonl") if json.loads(line)["name"] not in lost] == [
        line for line in lines("rejected/drafts.jsonl") if json.loads(line)["name"] not in lost
    ]


def test_a_server_that_rejects_every_request_ends_the_run(monkeypatch):
    """The tries that it rejected are not saved, so that the run can be resumed once the server is right."""
    monkeypatch.setattr(run_tirgen, "MAX_REJECTED", 3)
    rejecting(monkeypatch, lambda name: True)
    with pytest.raises(RequestRejected):
        main([*FLAGS, "--out", "rejected"])
    assert not Path("rejected/drafts.jsonl").exists() or lines("rejected/drafts.jsonl") == []


def test_rows_are_written_before_the_alignment_is_measured(monkeypatch):
    def lost(*_):
        raise ServerError("http://actor: no answer")

    monkeypatch.setattr(run_tirgen, "policy_alignment", lost)
    with pytest.raises(ServerError):
        main([*FLAGS[:-1], "2", "--out", "run"])
    assert lines("run/tir.jsonl")


# ---- policy alignment -----------------------------------------------------------------------------------------------


def test_alignment_is_the_mean_log_prob_of_the_tokens_that_are_learned(tokenizer):
    drafts = []
    for i, text in enumerate(("So 4.", "So it is surely 4.")):
        draft = Draft(Problem(str(i), f"What is 1 + {i}?", "4"), f"{i}#0")
        draft.append_block("Add.\n```python\nprint(4)\n```\n", "print(4)\n", ExecResult("ok", "4"))
        draft.append(text)
        drafts.append(draft)
    engine = ScriptedEngine(tokenizer, lambda request, turn: "So 4." if turn else "A.\n```python\nprint(2 + 2)\n```")
    engine.log_probs = lambda ids: [-float(token) for token in ids[1:]]
    result = policy_alignment(engine, engine, Tools(), drafts, Sampling(4000))
    learned = [tokenizer.encode(d.policy_text) + [tokenizer.eos_token_id] for d in drafts]
    assert result["trajectories"] == pytest.approx(-sum(map(sum, learned)) / sum(map(len, learned)))
    own = tokenizer.encode("A.\n```python\nprint(2 + 2)\n```" + "So 4.") + [tokenizer.eos_token_id]
    assert result["critic_solutions"] == pytest.approx(-sum(own) / len(own))
    assert (result["trajectories_scored"], result["critic_solutions_scored"]) == (2, 2)
    engine.reply = lambda request, turn: "x" * 5000  # no solution ends
    assert policy_alignment(engine, engine, Tools(), drafts, Sampling(40))["critic_solutions"] is None

    def reject():
        raise RequestRejected("http://critic: rejected the request with 400", engine.queue.pop(0).id)

    engine.step = reject
    rejected = policy_alignment(engine, engine, Tools(), drafts, Sampling(4000))
    assert rejected == result | {"critic_solutions": None, "critic_solutions_scored": 0}


def test_alignment_is_in_the_summary_of_a_run_that_sampled(monkeypatch, capsys):
    def measure(actor, critic, executor, drafts, sampling):
        means = {"trajectories": -0.5, "critic_solutions": None}
        return means | {"n": len(drafts), "limit": sampling.max_tokens}

    monkeypatch.setattr(run_tirgen, "policy_alignment", measure)
    main([*FLAGS[:-1], "2", "--out", "run"])
    alignment = summary_of("run")["alignment"]
    assert (alignment["n"], alignment["limit"]) == (2, 4000)
    assert "under the actor: trajectories -0.50, critic solutions none" in capsys.readouterr().out
    main([*FLAGS[:-1], "2", "--out", "run", "--resume"])
    assert summary_of("run")["alignment"] == alignment, "a finished run is not measured again"


# ---- problems -------------------------------------------------------------------------------------------------------

LONG = "A train leaves the station at noon and drives for four hours at sixty miles per hour to the sea"


def test_problems_of_test_sets_are_found():
    overlap = Overlap([Problem("a", "What is $2+2$?"), Problem("b", f"{LONG}. How far is it?")])
    assert Problem("x", "what is 2 + 2") in overlap, "punctuation, spaces and case have no effect"
    assert Problem("x", "What is 2 + 3?") not in overlap
    assert Problem("x", f"Yesterday: {LONG.upper()}! How long is that?") in overlap, "13 words in a row"
    assert Problem("x", " ".join(LONG.split()[:12]) + " then stops") not in overlap, "12 words in a row"


def test_operators_and_set_phrases_of_test_sets():
    phrase = "where m and n are relatively prime positive integers, then find the sum m + n"
    overlap = Overlap(
        [Problem("a", "What is 2 + 2?"), Problem("b", "Solve x^2 - 5x + 6 = 0")]
        + [Problem(str(i), f"The probability for {i} dice is m/n, {phrase}.") for i in (3, 5, 5)]
        + [Problem("c", "小明四月卖了48个夹子，五月卖了一半。一共卖了多少？")]
    )
    assert Problem("x", "What is 2 - 2?") not in overlap and Problem("x", "Solve $x^2-5x+6=0$.") in overlap
    assert Problem("x", "Solve x^2 + 5x - 6 = 0") not in overlap
    assert Problem("x", f"The area of a square is m/n, {phrase}.") not in overlap, "in two test questions"
    assert Problem("x", f"The probability for 5 dice is m/n, {phrase}.") in overlap
    assert Problem("x", "昨天：小明四月卖了48个夹子，五月卖了一半。为什么？") in overlap


def test_excluded_problems_are_counted_by_test_set():
    problems = [Problem(str(i), f"What is {i}?") for i in range(10)]
    sets = {"one": problems[:3], "two": problems[2:5]}
    kept, counts = exclude(problems, "one, two", sets.__getitem__)
    assert kept == problems[5:] and counts == {"one": 3, "two": 2}
    assert exclude(problems, "", sets.__getitem__) == (problems, {})


def test_excluded_problems_are_in_the_summary(capsys):
    with open("test.jsonl", "w") as file:
        file.write(json.dumps({"question": "WHAT IS 10+20", "answer": "30"}) + "\n")
    main([*FLAGS, "--exclude", "test.jsonl", "--out", "run"])
    summary = summary_of("run")
    assert summary["excluded_problems"] == {"test.jsonl": 1} and summary["problems"] == PROBLEMS - 1
    with pytest.raises(SystemExit) as stop:
        main([*FLAGS, "--exclude", "problems.jsonl", "--out", "empty"])
    assert stop.value.code == 2 and "--exclude problems.jsonl: no problem is left" in capsys.readouterr().err


def test_every_problem_is_in_one_shard():
    problems = [Problem(str(i), "?") for i in range(10)]
    shards = [take_shard(problems, f"{i}/3") for i in (1, 2, 3)]
    assert sorted((p for shard in shards for p in shard), key=lambda p: int(p.id)) == problems
    for shard in ("0/3", "4/3", "1", "a/b", "1/0", "-1/3"):
        with pytest.raises(UserError, match=f"--shard {shard}: must be"):
            take_shard(problems, shard)


# ---- settings and reports -------------------------------------------------------------------------------------------


def test_defaults_of_the_demo_model_are_not_those_of_others(capsys):
    demo = resolve(Settings())
    assert (demo.tries, demo.step_tokens, demo.limit, demo.actor_prompt) == (1, 48, 160, "few-shot")
    assert (demo.min_substantial, demo.keep_one_call) == (0.0, 1.0)
    assert demo.critic_calls == 1 and resolve(Settings(critic="x/7b", critic_prompt="few-shot")).critic_calls == 1
    capsys.readouterr()
    demo = resolve(Settings())
    assert capsys.readouterr().out == ""
    other = resolve(Settings(actor="Qwen/Qwen3-8B"))
    assert (other.tries, other.step_tokens, other.limit, other.top_k) == (8, 4096, None, 30)
    assert (other.min_substantial, other.keep_one_call) == (0.6, 0.5)  # the paper's filter
    assert other.actor_prompt == "actor" and other.critic_prompt == "critic" and other.critic == "Qwen/Qwen3-8B"
    line = capsys.readouterr().out
    assert "Qwen/Qwen3-8B is not the demo model" in line and "step_tokens 4096" in line and "limit all" in line
    mixed = resolve(Settings(actor=DEMO_MODEL, critic="Qwen/Qwen3-32B", step_tokens=7))
    assert (mixed.code_tokens, mixed.code_tries, mixed.tries, mixed.limit) == (4096, 3, 1, 160)
    assert mixed.critic_calls == other.critic_calls == 2
    line = "Qwen/Qwen3-32B is not the demo model, so the defaults are: critic_calls 2, code_tries 3, code_tokens"
    assert line in capsys.readouterr().out
    other_way = resolve(Settings(actor="Qwen/Qwen3-8B", critic=DEMO_MODEL))
    assert (other_way.code_tokens, other_way.step_tokens, other_way.critic_prompt) == (128, 4096, "few-shot")
    assert mixed.actor_prompt == "few-shot" and mixed.critic_prompt == "critic" and mixed.step_tokens == 7
    given = resolve(parse_settings(Settings, "", ["--actor", "x/7b", "--code_tokens", "128", "--tries", "1"]))
    assert (given.code_tokens, given.tries, given.code_tries) == (128, 1, 3)  # what is given stays


def test_a_dry_run_loads_no_model_and_writes_nothing(scripted, capsys):
    main([*FLAGS, "--dry_run", "--out", "dry"])
    printed = capsys.readouterr().out
    assert "6 problems, 18 tries, and 6 of plain reasoning" in printed and "What is 10 + 20?" in printed
    assert not scripted and not os.path.exists("dry")
    Path("full").mkdir()
    Path("full/something").touch()
    main([*FLAGS, "--dry_run", "--out", "full"])  # writes nothing, so it may name a folder that is in use
    capsys.readouterr()
    main([*FLAGS, "--dry_run", "--shard", "8/8"])
    assert "0 problems, 0 tries" in capsys.readouterr().out
    main([*FLAGS, "--dry_run", "--merge", "run"])
    assert "{question}" in capsys.readouterr().out


def test_a_resumed_run_may_report_other_things(capsys):
    main([*FLAGS, "--out", "run"])
    main([*FLAGS, "--out", "run", "--resume", "--preview", "1", "--patience", "5", "--alignment", "9", "--rows", "7"])
    with pytest.raises(SystemExit):
        main([*FLAGS, "--out", "run", "--resume", "--temperature", "1"])
    assert "--resume: temperature was 0.3" in capsys.readouterr().err


def test_merging_a_run_that_was_killed_names_the_line(capsys):
    main([*FLAGS, "--out", "run"])
    with open("run/drafts.jsonl", "a") as file:
        file.write('{"problem"')
    with pytest.raises(SystemExit) as stop:
        main([*FLAGS, "--merge", "run", "--out", "merged"])
    assert stop.value.code == 2
    assert f"--merge run/drafts.jsonl:{PROBLEMS * 4 + 1}: not a draft of run_tirgen.py" in capsys.readouterr().err


def test_the_critic_has_one_call_or_two(capsys):
    with pytest.raises(SystemExit) as stop:
        main([*FLAGS, "--critic_calls", "3"])
    assert stop.value.code == 2 and "--critic_calls 3" in capsys.readouterr().err
    given = resolve(parse_settings(Settings, "", ["--actor", "x/7b", "--critic_calls", "1"]))
    assert given.critic_calls == 1


def test_configs_of_the_paper_have_its_settings(capsys):
    for name, window, tokens in (("qwen2.5-7b", 512, 3200), ("qwen3-8b", 4096, 20_000)):
        path = Path(__file__).parents[1] / "docs/configs" / f"tirgen-{name}.yaml"
        settings = resolve(parse_settings(Settings, "", ["--config", str(path)]))
        assert (settings.tries, settings.temperature, settings.top_k) == (8, 0.6, 30)
        assert (settings.step_tokens, settings.max_tokens, settings.min_substantial) == (window, tokens, 0.6)
        assert settings.keep_one_call == 0.5 and (settings.actor_prompt, settings.critic_prompt) == ("actor", "critic")
        assert settings.limit is None and settings.critic != settings.actor and settings.critic_calls == 2


def test_a_preview_has_colours_in_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    draft = Draft(Problem("p", "What?", "4"), "p#0")
    draft.append_block("Add.\n```python\nprint(4)\n```\n", "print(4)\n", ExecResult("ok", "4"))
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal, plain = Terminal(), io.StringIO()
    report.preview([draft], terminal)
    report.preview([draft], plain)
    assert "\033[36m```python" in terminal.getvalue() and "\033[32m```output" in terminal.getvalue()
    assert "\033" not in plain.getvalue()


def test_the_libraries_that_code_imports():
    assert report.imported("import numpy as np, math\nfrom sympy.ntheory import factorint\nx = 1") == {
        "numpy",
        "math",
        "sympy",
    }


def test_histograms_have_bins_that_grow():
    assert [report._bin(n) for n in (0, 99, 100, 199, 200, 499, 500, 1000, 1999, 10**6)] == [
        0,
        0,
        100,
        100,
        200,
        200,
        500,
        1000,
        1000,
        10**6,
    ]
