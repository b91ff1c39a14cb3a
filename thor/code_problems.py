"""Code benchmarks: problems whose answer is a Python function, which tests check in the executor.

`Problem.tests` is JSON: the `name` of the function, code to run before it (`setup`) and after it (`tests`). With a
`reference` solution there are also `inputs`, on which both must agree up to `atol`. `run_tests` and the functions that
it calls run in the sandbox, which receives their source code.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json

from thor.text import FenceParser

QUESTION = (
    "Write this Python function. The last Python block that defines `{name}` is tested, so it must hold the whole "
    "function and its imports.\n\n{task}"
)


# ---- rows -----------------------------------------------------------------------------------------------------------


def code_problem(row: dict, where: str) -> tuple[str, str, str] | None:
    """Read a row of a code benchmark. Returns (id or '', question, tests), or None if it is another kind of row.

    HumanEval(+): `prompt`, `entry_point`, and `test`, which defines check(candidate).
    MBPP(+): `prompt` or `text`, `code`, and asserts in `test_list`, or also a stricter `test`; perhaps `test_imports`.
    Files that EvalPlus releases: `prompt`, `entry_point`, `canonical_solution`, and inputs in `base_input` and
    `plus_input`, for which both functions must return the same; perhaps `assertion` and `atol`.
    Raises ValueError, which starts with `where`, if a column is not of the right type.
    """
    try:
        if {"entry_point", "test"} <= row.keys():
            name, setup = row["entry_point"], row["prompt"]
            task, tests = row["prompt"], {"tests": row["test"] + f"\ncheck({name})\n"}
        elif {"code", "test_list"} <= row.keys():
            asserts = list(row["test_list"])
            name = tested_function(row["code"], asserts[0])
            setup = "\n".join([*(row.get("test_imports") or []), row.get("test_setup_code") or ""])
            task = f"{(row.get('prompt') or row['text']).strip()}\n{asserts[0]}"
            tests = {"tests": row.get("test") or "\n".join(asserts)}
        elif {"entry_point", "canonical_solution", "plus_input"} <= row.keys():
            name, setup, task = row["entry_point"], row["prompt"], row["prompt"]
            tests = {"tests": "import math\n" + (row.get("assertion") or ""), "atol": row.get("atol") or 0}
            tests |= {"reference": row["prompt"] + row["canonical_solution"]}
            tests |= {"inputs": [*row["base_input"], *row["plus_input"]]}
        else:
            return None
        if not name.isidentifier():
            raise TypeError(f"{name!r} is not the name of a function")
        task = f"```python\n{task.strip()}\n```" if f"def {name}" in task else task.strip().strip('"').strip()
    except (TypeError, AttributeError, LookupError, SyntaxError, StopIteration) as error:
        kind = f"{type(error).__name__}: {error}"
        raise ValueError(f"{where}: not a row of HumanEval, MBPP or EvalPlus ({kind})") from None
    tests = json.dumps({"name": name, "setup": setup, **tests})
    id = row.get("task_id")
    return "" if id is None else str(id), QUESTION.format(name=name, task=task), tests


def tested_function(code: str, test: str) -> str:
    """The function of `code` that `test` calls."""
    names = {node.id for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Name)}
    return next(node.name for node in ast.parse(code).body[::-1] if getattr(node, "name", None) in names)


# ---- solutions ------------------------------------------------------------------------------------------------------


def code_blocks(text: str) -> list[str]:
    """The Python blocks of a text, in order. A block at the end may lack its closing fence."""
    blocks = []
    while True:
        parser = FenceParser()
        parser.feed(text)
        if not parser.closed:
            return blocks + ([text[parser.code_at :]] if parser.code_at >= 0 else [])
        blocks.append(parser.code)
        text = text[parser.close_end :]


def grading_program(tests: str, blocks: list[str], timeout: float) -> tuple[str, str]:
    """A program for an executor that tests the last of `blocks` that defines the function.

    timeout: limit of that executor in seconds. A reference solution gets a quarter of it.
    Returns (program, last line that it prints if the tests pass). A solution does not know that line, so it cannot pass
    by ending the process.
    """
    secret = hashlib.blake2b(json.dumps([tests, blocks]).encode(), digest_size=16).hexdigest()
    source = "\n\n".join(inspect.getsource(part) for part in SANDBOXED)
    call = f"run_tests({blocks!r}, {secret!r}, {timeout / 4}, __import__('json').loads({tests!r}))"
    return f"{source}\n\n{call}\n", secret


# ---- in the sandbox: these functions are sent as source code and import what they use --------------------------------


def run_tests(blocks, secret, seconds, problem):
    """Define and test the function. Raises if it is wrong, else prints `secret`. Other output is discarded."""
    import copy
    import io
    import re
    import sys

    class Discard(io.TextIOBase):
        def write(self, text):
            return len(text)

    stdout, sys.stdout = sys.stdout, Discard()
    name = problem["name"]
    cases, view = reference_cases(problem, seconds) if "reference" in problem else ([], None)
    defines = re.compile(rf"^(?:(?:async )?def|class) {name}\b|^{name}\s*=", re.MULTILINE)
    scope = {"__name__": "solution"}
    exec(problem["setup"], scope)
    exec(([block for block in blocks if defines.search(block)] or blocks)[-1], scope)
    solution = scope[name]
    for arguments, expected in cases:
        result = view(solution(*copy.deepcopy(arguments)))
        assert same(result, expected, problem["atol"]), f"wrong result for {arguments}"
    exec(problem["tests"], scope)
    sys.stdout = stdout
    print(f"\n{secret}")


def reference_cases(problem, seconds):
    """Run the reference solution on the inputs. Returns ([(arguments, expected view of the result)], view).

    The view is how the asserts look at a result: as it is, as a set, or only whether it is true. Inputs that the
    reference does not solve within the memory limit are left out, and all inputs after the first `seconds`.
    """
    import ast
    import copy
    import signal

    scope, calls, cases = {"__name__": "reference"}, [], []
    exec(problem["reference"], scope)
    name, solve = problem["name"], scope[problem["name"]]

    def recorder(*arguments):
        calls.append(copy.deepcopy(arguments))
        return solve(*arguments)

    exec(problem["tests"], {**scope, name: recorder})

    def is_call(node, function):
        return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == function

    nodes = list(ast.walk(ast.parse(problem["tests"])))
    as_set = any(is_call(node, "set") and node.args and is_call(node.args[0], name) for node in nodes)
    as_bool = any(isinstance(node, ast.Assert) and is_call(node.test, name) for node in nodes)
    view = set if as_set else bool if as_bool else lambda result: result

    def stop(*_):
        raise TimeoutError

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        for values in problem["inputs"]:
            arguments = typed_arguments(values, calls)
            try:
                cases.append((arguments, view(solve(*copy.deepcopy(arguments)))))
            except MemoryError:
                continue
    except TimeoutError:
        pass
    signal.setitimer(signal.ITIMER_REAL, 0)
    return cases, view


def typed_arguments(values, calls):
    """Give arguments from JSON the types that they have in `calls`. A text in place of a number is a complex number."""
    import contextlib

    typed = []
    for i, value in enumerate(values):
        examples = [call[i] for call in calls if i < len(call)]
        if isinstance(value, str) and examples and all(isinstance(x, (int, float, complex)) for x in examples):
            with contextlib.suppress(ValueError):
                value = complex(value)
        typed.append(convert(value, examples))
    return typed


def convert(value, examples, deeper=None):
    """Give a JSON value the types of the examples: tuple, set, or integers as the keys of a dict.

    deeper: type of a list inside of lists that is nested deeper than in all examples.
    """
    kinds = {type(example) for example in examples}
    if isinstance(value, list):
        items = [item for example in examples if isinstance(example, (list, tuple, set)) for item in example]
        kind = next((kind for kind in (list, tuple, set) if kind in kinds), deeper or list)
        return kind(convert(item, items, kind if deeper else list) for item in value)
    if isinstance(value, dict):
        items = [item for example in examples if isinstance(example, dict) for item in example.items()]
        as_int = items and all(isinstance(key, int) for key, _ in items)
        return {int(k) if as_int else k: convert(v, [x for _, x in items]) for k, v in value.items()}
    return value


def same(a, b, atol):
    """Whether two results are equal, with a tolerance for floats, also inside of lists, tuples and dicts."""
    import cmath

    if isinstance(a, (int, float, complex)) and isinstance(b, (int, float, complex)):
        return a == b or (a != a and b != b) or cmath.isclose(a, b, rel_tol=1e-7, abs_tol=atol or 1e-6)
    if type(a) is type(b) and isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y, atol) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key], atol) for key in a)
    return bool(a == b)


SANDBOXED = (run_tests, reference_cases, typed_arguments, convert, same)
