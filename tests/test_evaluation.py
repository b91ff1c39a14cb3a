"""Tests of evaluate: its results must not depend on the speed of tools or on interruptions."""

from conftest import ScriptedEngine, ScriptedExecutor, passes_unless_bad
from test_tirgen import SlowTools, batch_steps

from thor.evaluation import evaluate
from thor.rollout import Sampling
from thor.trajectory import Problem

PROBLEMS = [Problem(f"p{i}", f"What is {i} + 2?", "4") for i in range(4)]
SAMPLING = Sampling(max_tokens=2000)


def reply(request, turn):
    return "The answer is \\boxed{4}." if turn else "Add.\n```python\nprint(2 + 2)\n```"


def test_order_of_requests_is_independent_of_tool_speed(tokenizer):
    def order_of_requests(delays: list[float]) -> list[str]:
        engine = batch_steps(ScriptedEngine(tokenizer, reply))
        with SlowTools(delays) as tools:
            evaluate(engine, tools, PROBLEMS, SAMPLING, "test")
        return [request.id for request in engine.requests]

    delays = [0.0, 0.05, 0.1, 0.15]
    order = order_of_requests(delays)
    assert order == order_of_requests(delays[::-1]) and len(order) == 8


def test_resumed_evaluation_gives_the_same_summary(tokenizer):
    def run(problems, **options):
        engine, executor = ScriptedEngine(tokenizer, reply), ScriptedExecutor(passes_unless_bad)
        summary, trajectories = evaluate(engine, executor, problems, SAMPLING, "test", **options)
        return summary, trajectories, engine

    saved = []
    summary, trajectories, _ = run(PROBLEMS, save=saved.append)
    assert saved == trajectories and [t.problem for t in trajectories] == PROBLEMS
    resumed = run(PROBLEMS, finished=[saved[3], saved[1]])
    assert resumed[:2] == (summary, trajectories)
    assert {request.id for request in resumed[2].requests} == {"p0#0", "p2#0"}


def test_repeated_problems_are_separate_samples(tokenizer):
    engine, executor = ScriptedEngine(tokenizer, reply), ScriptedExecutor(passes_unless_bad)
    summary, trajectories = evaluate(engine, executor, [PROBLEMS[0]] * 3, SAMPLING, "test")
    assert summary["problems"] == 3 and len({id(t) for t in trajectories}) == 3
    assert {request.id for request in engine.requests} == {"p0#0", "p0#1", "p0#2"}
