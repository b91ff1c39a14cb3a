"""Tests of code benchmarks: rows, the choice of a block, and test programs in the executor."""

import json

import pytest

from thor.code_problems import code_blocks, convert, grading_program, same, typed_arguments
from thor.data import load_problems

HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'from typing import List\n\n\ndef double(n: int) -> int:\n    """Return 2 n."""\n    return 2 * n\n\n\n'
    'def doubled(numbers: List[int]) -> List[int]:\n    """Double each number."""\n',
    "entry_point": "doubled",
    "canonical_solution": "    return [double(n) for n in numbers]\n",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == [double(1), 4]\n    assert candidate([]) == []\n",
}
MBPP = {  # as in MBPP and in the MBPP+ of the hub; without `test` the asserts are the tests
    "task_id": 7,
    "prompt": "Write a function that adds two numbers.",
    "code": "def helper():\n    pass\ndef plus(a, b):\n    return a + b",
    "test_imports": ["import math"],
    "test_list": ["assert math.isclose(plus(1, 2), 3)", "assert plus(-1, 1) == 0"],
}
EVALPLUS = {
    "task_id": "Mbpp/2",
    "prompt": '"""\nWrite a function to find the shared elements.\nassert set(shared((1, 2), (2, 3))) == {2}\n"""\n',
    "entry_point": "shared",
    "canonical_solution": "\ndef shared(a, b):\n    return tuple(set(a) & set(b))\n",
    "base_input": [[[1, 2], [2, 3]]],
    "plus_input": [[[], []], [[5, 6, 7], [7, 6]]],
    "assertion": "assert set(shared((1, 2), (2, 3))) == {2}",
    "atol": 0,
}


@pytest.fixture
def problem_of(tmp_path):
    def load(row):
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps(row) + "\n")
        return load_problems(str(path))[0]

    return load


@pytest.fixture
def passes(executor, problem_of):
    def run(row, *blocks) -> bool:
        program, secret = grading_program(problem_of(row).tests, list(blocks), executor.timeout)
        [result] = executor.run([program])
        return result.passed and result.stdout.endswith(secret + "\n")

    return run


def test_rows_become_problems_that_name_the_function(problem_of):
    problem = problem_of(HUMANEVAL)
    assert (problem.id, problem.source, problem.answer) == ("HumanEval/0", "rows", "")
    assert "`doubled`" in problem.question and "```python\nfrom typing import List" in problem.question
    problem = problem_of(MBPP)
    assert problem.id == "7" and "`plus`" in problem.question
    assert problem.question.endswith("Write a function that adds two numbers.\nassert math.isclose(plus(1, 2), 3)")
    problem = problem_of(EVALPLUS)
    assert problem.question.endswith("shared elements.\nassert set(shared((1, 2), (2, 3))) == {2}")


def test_humaneval_runs_check_with_the_helpers_of_the_prompt(passes):
    right = "def doubled(numbers: List[int]):\n    return [double(n) for n in numbers]"
    assert passes(HUMANEVAL, right)
    assert passes(HUMANEVAL, HUMANEVAL["prompt"] + HUMANEVAL["canonical_solution"])
    for wrong in (
        right.replace("double(n)", "n"),
        right.replace("doubled", "other"),  # the stub in the prompt returns None
        "def doubled(numbers):",  # a syntax error
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "print('passed')\nraise SystemExit",
    ):
        assert not passes(HUMANEVAL, wrong), wrong


def test_mbpp_runs_the_asserts_or_the_stricter_test(passes):
    right = "def plus(a, b):\n    return a + b"
    wrong = "def plus(a, b):\n    return {(1, 2): 3}.get((a, b), 0)"
    assert passes(MBPP, right) and passes(MBPP, wrong)
    stricter = {**MBPP, "test": "for i in range(5):\n    assert plus(i, i) == 2 * i"}
    assert passes(stricter, right) and not passes(stricter, wrong)


def test_evalplus_compares_with_the_reference_as_the_asserts_do(passes):
    assert passes(EVALPLUS, EVALPLUS["canonical_solution"])
    assert passes(EVALPLUS, "def shared(a, b):\n    return [x for x in sorted(a) if x in b]")  # another order
    assert not passes(EVALPLUS, "def shared(a, b):\n    return [x for x in a if x in b][:1]")  # the asserts alone pass
    changes = "def shared(a, b):\n    assert type(a) is tuple\n    return set(a) & set(b)"
    assert passes(EVALPLUS, changes)
    truth = {**EVALPLUS, "assertion": "assert shared((1, 2), (2, 3))\nassert not shared((1,), (2,))"}
    assert passes(truth, "def shared(a, b):\n    return any(x in b for x in a)")


def test_solution_cannot_change_the_inputs_of_the_tests(passes):
    row = {**EVALPLUS, "assertion": "assert shared([1, 2], [2]) == (2,)", "base_input": [[[1, 2], [2]]]}
    assert passes(row, "def shared(a, b):\n    out = tuple(set(a) & set(b))\n    a.clear()\n    return out")


def test_inputs_that_are_too_much_for_the_reference_are_left_out(passes):
    slow = "\ndef shared(a, b):\n    while len(a) > 2:\n        pass\n    return tuple(set(a) & set(b))\n"
    assert passes({**EVALPLUS, "canonical_solution": slow}, EVALPLUS["canonical_solution"])
    greedy = slow.replace("        pass", "        a = list(a) * 1000")
    row = {**EVALPLUS, "canonical_solution": greedy, "plus_input": [[[1, 2, 3], [1]], [[1, 2], [1]]]}
    assert passes(row, EVALPLUS["canonical_solution"])
    assert not passes(row, "def shared(a, b):\n    return {2}")  # the last input counts


FUNCTIONS = [  # (header, body, (arguments, result) of the first test, arguments of others, wrong bodies)
    ("def total(xs):", "return sum(xs)", ("[1, 2]", "3"), [[[]], [[-1, 5, 5]]], ["return 3", "return sum(xs[:2])"]),
    (
        "def flip(s):",
        "return s[::-1]",
        ("'ab'", "'ba'"),
        [["xyz"], [""]],
        ["return s", "return ''.join(sorted(s, key=ord))"],
    ),
    (
        "def split(n, k):",
        "return n // k, n % k",
        ("7, 2", "(3, 1)"),
        [[-7, 2], [9, 3]],
        ["return n // k, n", "return int(n / k), abs(n) % k"],
    ),
    ("def half(x):", "return x / 2", ("3", "1.5"), [[5], [0.5]], ["return x // 2", "return x / 2 + 0.001", "pass"]),
    ("def tally(s):", "return {c: s.count(c) for c in s}", ("'aba'", "{'a': 2, 'b': 1}"), [["zz"]], ["return {}"]),
]


def in_each_format(header, body, test, inputs):
    """The same problem as a row of HumanEval, of MBPP and of a file of EvalPlus."""
    name = header[4 : header.index("(")]
    code = f"{header}\n    {body}\n"
    results = [(test[0], test[1]), *((repr(x)[1:-1], repr(call(code, name, x))) for x in inputs)]
    asserts = [f"assert candidate({arguments}) == {result}" for arguments, result in results]
    check = "".join(f"    {line}\n" for line in asserts)
    asserts = [line.replace("candidate", name, 1) for line in asserts]
    signature, solution = f'{header}\n    """Do it."""\n', f"    {body}\n"
    yield {"prompt": signature, "entry_point": name, "test": f"def check(candidate):\n{check}", "task_id": "H/0"}
    yield {"task_id": 1, "prompt": "Do it.", "code": code, "test_list": asserts}
    yield {
        **{"task_id": "M/0", "entry_point": name, "prompt": signature, "canonical_solution": solution},
        **{"base_input": [list(eval(f"({test[0]},)"))], "plus_input": inputs, "assertion": asserts[0], "atol": 0},
    }


def call(code, name, arguments):
    scope = {}
    exec(code, scope)
    return scope[name](*arguments)


@pytest.mark.parametrize(("header", "body", "test", "inputs", "wrong"), FUNCTIONS)
def test_right_solutions_pass_and_wrong_ones_fail_in_each_format(passes, header, body, test, inputs, wrong):
    for row in in_each_format(header, body, test, inputs):
        assert passes(row, f"{header}\n    {body}\n"), row
        for other in (*wrong, "return None", "return [[]]", "raise ValueError"):
            assert not passes(row, f"{header}\n    {other}\n"), (other, row)


def test_last_block_that_defines_the_function_is_tested(passes):
    right = "def plus(a, b):\n    return a + b"
    assert passes(MBPP, "def plus(a, b):\n    return 0", right, "print(plus(1, 2))")
    assert not passes(MBPP, right, "def plus(a, b):\n    return 0", "plus_one = plus(1, 1)")
    assert passes(MBPP, "plus = lambda a, b: a + b", "print(plus(1, 2))")
    assert not passes(MBPP, "print(3)")


def test_printing_does_not_disturb_the_tests(passes):
    assert passes(MBPP, "print('x' * 10 ** 6)\ndef plus(a, b):\n    print(a)\n    return a + b")
    assert passes(MBPP, "def plus(a, b):\n    return a + b\nif __name__ == '__main__':\n    raise ValueError")


def test_code_blocks_are_found_and_the_last_may_be_open():
    assert code_blocks("a\n```python\nx = 1\n```\nb\n```\nno\n```\n```python\ny\n```") == ["x = 1\n", "y\n"]
    assert code_blocks("```python\nx = 1\n```\nthen\n```python\ny = 2\nz") == ["x = 1\n", "y = 2\nz"]
    assert code_blocks("nothing") == []


@pytest.mark.parametrize(
    ("value", "examples", "expected"),
    [
        ([1, 2], [(3, 4)], (1, 2)),
        ([[1], [2, 3]], [[(0,)]], [(1,), (2, 3)]),
        ([1, [2, [3, [4, [5]]]]], [(1, (2, (3,)))], (1, (2, (3, (4, (5,)))))),  # deeper than the examples
        ([[1], [2]], [(3, 4)], ([1], [2])),  # of what is inside, the examples say nothing
        ([[1, 2], []], [[{3}]], [{1, 2}, set()]),
        ({"1": "a"}, [{2: "b"}], {1: "a"}),
        ({"1": ["a"]}, [{"2": ("b",)}], {"1": ("a",)}),
        ([1, 2], [], [1, 2]),
        (5, [(3, 4)], 5),
    ],
)
def test_json_values_get_the_types_of_the_examples(value, examples, expected):
    assert repr(convert(value, examples)) == repr(expected)


def test_text_in_place_of_a_number_is_complex():
    assert typed_arguments(["(1+2j)", "x"], [(1, "a"), (2.5, "b")]) == [1 + 2j, "x"]
    assert typed_arguments(["apple"], [(1,)]) == ["apple"]
    assert typed_arguments([[1], 2, 3], [((1,), 2)]) == [(1,), 2, 3]  # more arguments than in the example


def test_results_are_compared_with_a_tolerance_for_floats():
    assert same([0.1 + 0.2, {"a": (1, 2.0)}], [0.3, {"a": (1, 2)}], 0)
    assert same(100.0001, 100.0, 1e-3) and not same(100.0001, 100.0, 0)
    assert same(float("nan"), float("nan"), 0) and same(1 + 2j, 1 + 2.000000001j, 0)
    for a, b in (([1], (1,)), ([1], [1, 2]), ({"a": 1}, {"b": 1}), ("1", 1), (None, 0), (1, 2)):
        assert not same(a, b, 0)
