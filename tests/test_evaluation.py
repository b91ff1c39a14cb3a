"""Tests of evaluate and of its log: grading, several samples, interruptions, many ranks."""

import json
from types import SimpleNamespace

import pytest
from conftest import ScriptedEngine, ScriptedExecutor, passes_unless_bad
from test_tirgen import SlowTools, batch_steps

from thor.data import load_problems
from thor.evaluation import Grader, ScoreLog, evaluate
from thor.metrics import Score, summarize
from thor.rollout import Sampling
from thor.trajectory import ExecResult, Problem

PROBLEMS = [Problem(f"p{i}", f"What is {i} + 2?", "4", source="sums") for i in range(4)]
SAMPLING = Sampling(max_tokens=2000)
TOOL = "Add.\n```python\nprint(2 + 2)\n```"


def reply(request, turn):
    return "The answer is \\boxed{4}." if turn else TOOL


def run(tokenizer, problems, reply=reply, executor=None, **options):
    """Returns (summary, trajectories by problem id, what was saved: (scores, trajectories) of each problem)."""
    saved = []
    engine = ScriptedEngine(tokenizer, reply)
    executor = executor or ScriptedExecutor(passes_unless_bad)
    scores = evaluate(engine, executor, problems, SAMPLING, "test", lambda *group: saved.append(group), **options)
    assert scores == [score for group, _ in saved for score in group]
    return summarize(scores), {group[0].problem.id: group for _, group in saved}, saved


def test_order_of_requests_is_independent_of_tool_speed(tokenizer):
    def order_of_requests(delays: list[float]) -> list[str]:
        engine = batch_steps(ScriptedEngine(tokenizer, reply))
        with SlowTools(delays) as tools:
            evaluate(engine, tools, PROBLEMS, SAMPLING, "test")
        return [request.id for request in engine.requests]

    delays = [0.0, 0.05, 0.1, 0.15]
    order = order_of_requests(delays)
    assert order == order_of_requests(delays[::-1]) and len(order) == 8


def test_each_problem_is_saved_once_with_all_of_its_samples(tokenizer):
    answers = {"p0#0": "4", "p0#1": "\\frac{8}{2}", "p0#2": "5", "p1#0": "4", "p1#1": "4", "p1#2": "4"}
    repeated = [problem for problem in PROBLEMS[:2] for _ in range(3)]
    summary, trajectories, saved = run(
        tokenizer, repeated, lambda request, turn: f"It is \\boxed{{{answers[request.id]}}}."
    )
    rewards = {id: [t.reward for t in group] for id, group in trajectories.items()}
    assert len(saved) == 2 and rewards == {"p0": [1, 1, 0], "p1": [1, 1, 1]}
    [scores] = [scores for scores, _ in saved if scores[0].id == "p0"]
    assert [(s.sample, s.answer, s.vote, s.reward) for s in scores] == [
        (0, "4", 0, 1.0),
        (1, "\\frac{8}{2}", 0, 1.0),  # equal to the first, though not as text
        (2, "5", 1, 0.0),
    ]
    assert summary["accuracy"][0] == pytest.approx(5 / 6) and summary["maj@3"][0] == summary["pass@2"][0] == 1
    assert (summary["problems"], summary["samples"]) == (2, 3)


def test_scores_hold_what_the_trajectory_cost(tokenizer):
    def fails_once(request, turn):
        return (TOOL.replace("2 + 2", "bad"), TOOL, "It is \\boxed{4}.")[turn]

    _, _, [([score], [trajectory])] = run(tokenizer, PROBLEMS[:1], fails_once, self_correct=1, suffix_tokens=100)
    assert score == Score(
        source="sums",
        id="p0",
        sample=0,
        reward=1.0,
        answer="4",
        vote=0,
        finish="stop",
        tokens=trajectory.num_sampled,
        discarded=len(TOOL) - len("2 + 2") + len("bad"),
        corrections=1,
        calls=["ok"],
    )


def test_sample_whose_sandbox_fails_has_no_reward(tokenizer):
    executor = ScriptedExecutor(lambda code: ExecResult("infra"))
    with pytest.raises(ValueError, match="the sandbox failed in every sample"):
        run(tokenizer, PROBLEMS[:1], executor=executor)
    script = {"p0#0": "\\boxed{4}"}
    summary, trajectories, saved = run(
        tokenizer, PROBLEMS[:2], lambda request, turn: script.get(request.id, TOOL), executor
    )
    rewards = {id: t.reward for id, [t] in trajectories.items()}
    assert rewards == {"p0": 1, "p1": None} and (summary["problems"], summary["infra"]) == (1, 1)
    assert {scores[0].id: (scores[0].reward, scores[0].vote) for scores, _ in saved} == {"p0": (1, 0), "p1": (None, -1)}


def test_error_while_saving_ends_the_evaluation(tokenizer):
    def save(*_):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        evaluate(ScriptedEngine(tokenizer, reply), ScriptedExecutor(passes_unless_bad), PROBLEMS, SAMPLING, "t", save)


def test_code_problems_are_graded_by_their_tests(tokenizer, tmp_path):
    row = {"prompt": "Add.", "code": "def plus(a, b):\n    return a + b", "test_list": ["assert plus(1, 2) == 3"]}
    (tmp_path / "code.jsonl").write_text("".join(json.dumps({**row, "task_id": i}) + "\n" for i in range(5)))
    problems = load_problems(str(tmp_path / "code.jsonl"))
    solution = "Here:\n```python\ndef plus(a, b):\n    return a + b\n```\n"
    replies = {
        "0#0": (solution, "Done."),  # run as a tool, then tested
        "1#0": (solution.replace("a + b\n```", "a - b\n```"), "\\boxed{1}"),
        "2#0": ("No code.",),
        "3#0": (TOOL, solution.removesuffix("```\n")),  # cut off in the last block
        "4#0": (solution, TOOL, "Done."),
    }
    summary, trajectories, saved = run(
        tokenizer, problems, lambda request, turn: replies[request.id.split("/")[-1]][turn]
    )
    assert [trajectories[p.id][0].reward for p in problems] == [1, 0, 0, 1, 1]
    assert all(scores[0].vote is None and scores[0].answer is None for scores, _ in saved)
    assert summary["accuracy"][0] == 0.6


def test_failing_sandbox_of_the_tests_gives_no_reward(tokenizer):
    from concurrent.futures import Future

    future = Future()
    future.set_result(ExecResult("infra"))
    with Grader() as grader:
        grader._executor = SimpleNamespace(submit=lambda program: future, close=lambda: None)
        problem = Problem("c", "q", tests='{"name": "f", "setup": "", "tests": ""}')
        _, _, [(_, [t])] = run(
            tokenizer, [Problem("c", "q", "1")], lambda request, turn: "```python\ndef f(): ...\n```" * (1 - turn)
        )
        assert grader(t, tokenizer) == 0.0
        t.problem = problem
        assert grader(t, tokenizer) is None


# ---- the log --------------------------------------------------------------------------------------------------------


@pytest.fixture
def graded(tokenizer):
    """(scores, trajectories) of two samples of each problem."""
    return run(tokenizer, [p for p in PROBLEMS for _ in range(2)])[2]


def test_log_merges_the_files_of_all_ranks_in_the_order_of_the_problems(tmp_path, tokenizer, graded, monkeypatch):
    for number, group in enumerate(reversed(graded)):
        monkeypatch.setenv("RANK", str(number % 3))
        ScoreLog(tmp_path).write(*group, tokenizer)
    monkeypatch.setenv("RANK", "0")
    names = ["trajectories.1.jsonl", "trajectories.2.jsonl", "trajectories.jsonl"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    log = ScoreLog(tmp_path)
    before = log.read()
    assert log.merge(PROBLEMS, 2) == {"p0", "p1", "p2", "p3"} and log.read() == before
    assert [p.name for p in tmp_path.iterdir()] == ["trajectories.jsonl"]
    records = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [(r["id"], r["sample"]) for r in records] == [(p.id, i) for p in PROBLEMS for i in range(2)]
    assert records[0]["text"].startswith("Add.") and records[0]["gold"] == "4" and "0 + 2" in records[0]["question"]
    assert log.scores() == [Score.from_dict(r) for r in records]


def test_log_keeps_only_problems_with_all_samples(tmp_path, tokenizer, graded):
    log = ScoreLog(tmp_path)
    for group in graded:
        log.write(*group, tokenizer)
    text = log.path.read_text()
    log.path.write_text(text[: text.rindex('"sample":1') + 5])  # a crash in the middle of a line
    last = graded[-1][0][0].id
    assert len(log.read()[last]) == 1
    assert log.merge(PROBLEMS, 2) == {p.id for p in PROBLEMS} - {last}
    assert log.merge(PROBLEMS[:2], 2) == {"p0", "p1"} - {last}


def test_log_can_leave_problems_without_a_score_to_be_solved_again(tmp_path, tokenizer, graded):
    log = ScoreLog(tmp_path)
    scores, trajectories = graded[0]
    failed = [Score(**{**vars(score), "reward": None}) for score in scores]
    log.write([failed[0], scores[1]], trajectories, tokenizer)
    log.write(*graded[1], tokenizer)
    assert len(log.merge(PROBLEMS, 2)) == 2
    assert log.merge(PROBLEMS, 2, retry=True) == {graded[1][0][0].id}
