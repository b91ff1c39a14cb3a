"""Tests of the metrics: against numbers by hand, closed forms, and slow references."""

import itertools
import json
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thor.metrics import (
    ROUNDS,
    Score,
    accuracy_table,
    best_of_n,
    compare,
    comparison_table,
    equal_classes,
    majority,
    mean_interval,
    pass_at_k,
    results_tables,
    sizes,
    summarize,
    table,
)
from thor.settings import derive_seed


def score(reward, calls="", vote=0, id="p", sample=0, source="s", finish="stop", tokens=10, **more) -> Score:
    """calls: a character per executed block, "+" for one that passed."""
    statuses = ["ok" if call == "+" else "error" for call in calls]
    rest = {"answer": "1", "discarded": 0, "corrections": 0} | more
    return Score(source, id, sample, reward, vote=vote, finish=finish, tokens=tokens, calls=statuses, **rest)


def problem(id, rewards, votes=None, calls=None, **more) -> list[Score]:
    votes, calls = votes or [0] * len(rewards), calls or [""] * len(rewards)
    rows = enumerate(zip(rewards, calls, votes, strict=True))
    return [score(r, c, v, id, i, **more) for i, (r, c, v) in rows]


# ---- one problem ----------------------------------------------------------------------------------------------------


def test_pass_at_k_by_hand():
    assert pass_at_k(4, 1, 1) == 0.25 and pass_at_k(4, 1, 2) == 0.5 and pass_at_k(4, 1, 4) == 1
    assert pass_at_k(4, 2, 2) == pytest.approx(1 - 1 / 6) and pass_at_k(5, 0, 3) == 0 and pass_at_k(5, 4, 2) == 1


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(rewards, data):
    k = data.draw(st.integers(1, len(rewards)))
    subsets = list(itertools.combinations(rewards, k))
    assert pass_at_k(len(rewards), sum(rewards), k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_sizes_are_powers_of_two_and_n():
    assert [sizes(n) for n in (1, 2, 3, 4, 6, 8)] == [[], [2], [2, 3], [2, 4], [2, 4, 6], [2, 4, 8]]


@pytest.mark.parametrize(
    ("rewards", "votes", "expected"),
    [
        ([1, 1, 0], [0, 0, 1], 1.0),
        ([0, 0, 1], [0, 0, 1], 0.0),
        ([1, 0], [0, 1], 0.5),  # a tie shares the point
        ([1, 0, 0, 0], [0, 1, 2, -1], 1 / 3),
        ([0, 0, 1], [-1, -1, 0], 1.0),  # a sample without an answer has no vote
        ([0, 0], [-1, -1], 0.0),
        ([1, 0, 0], [0, 0, 1], 0.5),  # graded differently in spite of equal answers
    ],
)
def test_majority_by_hand(rewards, votes, expected):
    assert majority(problem("p", rewards, votes)) == pytest.approx(expected)


@given(st.lists(st.integers(-1, 3), min_size=1, max_size=9), st.integers(0, 3))
def test_majority_is_the_expectation_over_random_choices_among_ties(votes, right):
    samples = problem("p", [float(vote == right) for vote in votes], votes)
    answers = [vote for vote in votes if vote >= 0]
    most = max((answers.count(vote) for vote in answers), default=0)
    tied = {vote for vote in answers if answers.count(vote) == most}
    assert majority(samples) == pytest.approx((right in tied) / len(tied) if tied else 0)


def test_best_of_n_by_hand():
    assert best_of_n(problem("p", [0, 1, 0], calls=["+-", "++", "-"])) == 1
    assert best_of_n(problem("p", [1, 0, 0], calls=["++", "+", "-+"])) == 0.5  # both passed all: a tie
    assert best_of_n(problem("p", [1, 0, 1, 0], calls=["", "-", "-", "-+"])) == 0
    assert best_of_n(problem("p", [1, 0, 1, 1], calls=["", "-", "-", ""])) == 0.75  # nothing passed anywhere


def test_equal_answers_are_found_with_the_relation_and_not_by_text():
    def equal(prediction, gold):  # not symmetric, like `verify`
        return prediction.removeprefix("x=") == gold

    assert equal_classes(["5", "x=5", None, "6", "5", "x=6", "7"], equal) == [0, 0, -1, 1, 0, 1, 2]
    assert equal_classes(["x=5", "5"], equal) == [0, 0]


# ---- many problems --------------------------------------------------------------------------------------------------


def values(summary: dict) -> dict:
    return {name: v[0] for name, v in summary.items() if isinstance(v, list)}


def test_summary_by_hand():
    scores = [
        *problem("a", [1, 1, 0], [0, 0, 1], ["++", "+", "-"], tokens=10, discarded=3, corrections=1),
        *problem("b", [0, 0, 0], [0, 1, -1], ["+-", "", ""], tokens=40, finish="length"),
        *problem("c", [1, 0, 0], [0, 1, 1], ["-", "+", ""], tokens=70),
    ]
    summary = summarize(scores)
    assert values(summary) == pytest.approx(
        {
            "accuracy": (2 / 3 + 0 + 1 / 3) / 3,
            "pass@2": (1 + 0 + 2 / 3) / 3,
            "pass@3": 2 / 3,
            "maj@3": 1 / 3,
            "bon@3": (1 + 0 + 0) / 3,
            "code_ratio": (1 + 1 / 3 + 2 / 3) / 3,
            "code_pass_rate": 5 / 8,
            "accuracy_all_passed": 2 / 3,
            "accuracy_some_failed": 1 / 3,
            "accuracy_no_code": 0 / 3,
            "truncated": 1 / 3,
            "tokens": 40,
            "discarded": 1,
            "corrections": 1 / 3,
        }
    )
    assert (summary["problems"], summary["samples"], summary["infra"]) == (3, 3, 0)
    assert all(low <= value <= high for value, low, high in (summary[name] for name in values(summary)))


def test_one_sample_has_no_metrics_of_several():
    assert not any("@" in name for name in summarize(problem("a", [1])))


def test_samples_without_a_reward_do_not_count():
    scores = [*problem("a", [1, None, None]), *problem("b", [None] * 3), *problem("c", [1, 0, 1])]
    summary = summarize(scores)
    assert (summary["problems"], summary["samples"], summary["infra"]) == (2, 3, 5)
    assert summary["accuracy"][0] == pytest.approx((1 + 2 / 3) / 2)
    assert summary["pass@3"][0] == 1 and summary["pass@2"][0] == 1  # only c has that many samples
    with pytest.raises(ValueError, match="the sandbox failed in every sample"):
        summarize(problem("a", [None]))
    with pytest.raises(ValueError, match="no samples"):
        summarize([])


def test_undefined_metrics_are_nan_and_shown_as_a_dash():
    summary = summarize([*problem("a", [1, 0], [None, None]), *problem("b", [0, 0], [None, None])])
    assert all(math.isnan(x) for name in ("code_pass_rate", "accuracy_all_passed", "maj@2") for x in summary[name])
    assert "| -" in table([("x", summary)]) and "nan" not in results_tables("run", summary)


@pytest.fixture
def random_scores() -> list[Score]:
    rng = random.Random(1)
    return [
        s
        for p in range(40)
        for s in problem(
            f"p{p}", [float(rng.random() < p / 40) for _ in range(3)], calls=[rng.choice(["", "+", "-", "+-"])] * 3
        )
    ]


def test_interval_is_that_of_a_slow_bootstrap_over_problems(random_scores):
    summary = summarize(random_scores)
    groups = [list(g) for _, g in itertools.groupby(sorted(random_scores, key=lambda s: s.id), lambda s: s.id)]
    rng = np.random.default_rng(derive_seed("bootstrap", "s"))
    draws = rng.multinomial(40, [1 / 40] * 40, size=ROUNDS)
    metrics = {"accuracy": [], "code_pass_rate": [], "accuracy_some_failed": []}
    for draw in draws:
        drawn = [s for group, times in zip(groups, draw, strict=True) for s in group * times]
        calls = [call for s in drawn for call in s.calls]
        metrics["accuracy"].append(np.mean([s.reward for s in drawn]))
        metrics["code_pass_rate"].append(calls.count("ok") / len(calls))
        metrics["accuracy_some_failed"].append(np.mean([s.reward for s in drawn if "error" in s.calls]))
    for name, replicates in metrics.items():
        assert summary[name][1:] == pytest.approx(list(np.percentile(replicates, [2.5, 97.5])))


def test_interval_of_a_mean_is_the_normal_one_for_many_problems():
    _, low, high = summarize([s for i in range(400) for s in problem(f"p{i}", [i % 2])])["accuracy"]
    assert low == pytest.approx(0.5 - 1.96 * 0.5 / 20, abs=0.01)
    assert high == pytest.approx(0.5 + 1.96 * 0.5 / 20, abs=0.01)


def test_mean_interval_leaves_out_problems_without_a_value():
    assert mean_interval([0.5, None, 0.5]) == [0.5, 0.5, 0.5]
    mean, low, high = mean_interval([0.0, 1.0] * 200)
    assert mean == 0.5 and [low, high] == pytest.approx([0.45, 0.55], abs=0.01)


def test_order_of_the_scores_does_not_matter(random_scores):
    shuffled = random.Random(0).sample(random_scores, len(random_scores))
    assert summarize(shuffled) == summarize(random_scores)


def test_average_gives_each_source_the_same_weight():
    big = [s for i in range(90) for s in problem(f"p{i}", [i % 2], source="big", calls=["+"])]
    small = [s for i in range(10) for s in problem(f"q{i}", [1], source="small")]
    summary = summarize(big + small)
    assert summary["accuracy"][0] == 0.75 and summary["problems"] == 100
    assert summary["code_pass_rate"][0] == 1  # small has none
    assert list(summary["sources"]) == ["big", "small"]
    alone = {source: summarize(part)["sources"][source] for source, part in (("big", big), ("small", small))}
    assert str(summary["sources"]) == str(alone)  # NaN is not equal to NaN
    # small never varies, so the average varies half as much as big
    _, low, high = summary["sources"]["big"]["accuracy"]
    assert summary["accuracy"][1:] == pytest.approx([(low + 1) / 2, (high + 1) / 2])


def test_same_problem_ids_in_two_sources_are_two_problems():
    summary = summarize([*problem("1", [1], source="a"), *problem("1", [0], source="b")])
    assert summary["problems"] == 2 and summary["accuracy"][0] == 0.5 and summary["samples"] == 1


# ---- differences ----------------------------------------------------------------------------------------------------


def test_difference_is_paired_over_common_problems():
    first = [s for i in range(50) for s in problem(f"p{i}", [i % 2], calls=["-"])]
    second = [s for i in range(10, 60) for s in problem(f"p{i}", [1], calls=["+"])]
    difference = compare(first, second)["s"]
    assert difference["problems"] == 40
    assert difference["accuracy"][0] == 0.5 and difference["code_pass_rate"] == [1, 1, 1]
    assert difference["first"]["accuracy"][0] == 0.5 and difference["second"]["accuracy"] == [1, 1, 1]
    low, high = difference["first"]["accuracy"][1:]
    assert difference["accuracy"][1:] == pytest.approx([1 - high, 1 - low])  # the same draws


def test_runs_with_equal_differences_on_all_problems_have_no_interval():
    first = [s for i in range(30) for s in problem(f"p{i}", [i % 2, 0])]
    second = [s for i in range(30) for s in problem(f"p{i}", [i % 2, 1])]
    assert compare(first, second)["s"]["accuracy"] == pytest.approx([0.5, 0.5, 0.5])
    assert compare(first, first)["s"]["pass@2"] == [0, 0, 0]
    separate = summarize(first)["accuracy"]
    assert separate[1] < separate[0] < separate[2]


def test_differences_of_several_sources_have_an_average():
    first = problem("a", [0], source="x") + problem("b", [1], source="y") + problem("c", [1], source="only here")
    second = problem("a", [1], source="x") + problem("b", [1], source="y")
    differences = compare(first, second)
    assert list(differences) == ["x", "y", "average"]
    assert [differences[name]["accuracy"][0] for name in differences] == [1, 0, 0.5]
    assert differences["average"]["problems"] == 2
    with pytest.raises(ValueError, match="no problem in common"):
        compare(first, problem("z", [1], source="x"))


# ---- tables ---------------------------------------------------------------------------------------------------------


def cells(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]


def test_tables_by_hand():
    scores = problem("a", [1, 0], calls=["+", "-"], tokens=100) + problem("b", [0, 0], tokens=50)
    [header, row] = cells(table([("model", summarize(scores))]))
    assert header == ["", "problems", "accuracy %", "code ratio %", "code pass %", "tokens", "discarded"]
    assert row[:3] == ["model", "2", "25.0 [0-50]"] and row[5] == "75.0 [50-100]"
    text = table([("model", summarize(scores)), ("another", summarize(scores))])
    assert len({len(line) for line in text.splitlines()}) == 1 and text.splitlines()[1].replace("-", "") == "||||||||"


def test_results_have_a_row_for_each_source_and_the_average():
    scores = problem("a", [1, 0], source="x") + problem("b", [1, 1], source="y")
    answers, code = map(cells, results_tables("run", summarize(scores)).split("\n\n"))
    assert answers[0] == ["", "problems", "accuracy %", "pass@2 %", "maj@2 %", "bon@2 %"]
    assert [row[0] for row in answers] == [row[0] for row in code] == ["", "x", "y", "average"]
    assert [row[1] for row in answers[1:]] == ["1", "1", "2"]
    assert [row[2].split()[0] for row in answers[1:]] == ["50.0", "100.0", "75.0"]
    [_, single] = cells(results_tables("run", summarize(problem("a", [1]))).split("\n\n")[0])
    assert single[0] == "run" and single[2] == "100.0 [100-100]"


def test_accuracies_of_runs_have_the_layout_of_the_paper():
    both = summarize(problem("a", [1], source="x") + problem("b", [0], source="y"))
    assert cells(accuracy_table([("one", both), ("two", summarize(problem("a", [1], source="x")))])) == [
        ["accuracy %", "x", "y", "average"],
        ["one", "100.0 [100-100]", "0.0 [0-0]", "50.0 [50-50]"],
        ["two", "100.0 [100-100]", "-", "100.0 [100-100]"],
    ]


def test_comparison_has_the_accuracy_of_each_source_and_all_metrics_of_the_average():
    first = problem("a", [1], source="x") + problem("b", [0], source="y")
    rows = cells(comparison_table(compare(first, first), "r", "s"))
    assert [row[:3] for row in rows[1:4]] == [["x", "1", "accuracy %"], ["y", "1", "accuracy %"]] + [
        ["average", "2", "accuracy %"]
    ]
    assert {row[0] for row in rows[4:]} == {"average"} and "tokens" in {row[2] for row in rows[4:]}


def test_comparison_shows_signs():
    text = comparison_table(compare(problem("a", [1], tokens=5), problem("a", [0], tokens=9)), "runs/a", "runs/b")
    rows = {row[2]: row for row in cells(text)}
    assert rows["accuracy %"] == ["s", "1", "accuracy %", "100.0 [100-100]", "0.0 [0-0]", "-100.0 [-100.0, -100.0]"]
    assert rows["tokens"][-1] == "+4.0 [+4.0, +4.0]"


def test_scores_are_read_from_records_with_other_fields():
    record = {**vars(score(1.0, "+-")), "text": "..."}
    assert Score.from_dict(json.loads(json.dumps(record))) == score(1.0, "+-")
