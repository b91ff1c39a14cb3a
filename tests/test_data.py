"""Tests of problem loading and of the synthetic problems."""

import json
import math
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thor.data import BENCHMARKS, load_problems
from thor.demo.problems import FAMILIES
from thor.trajectory import Problem
from thor.verify import verify

# ---- files ----------------------------------------------------------------------------------------------------------


def write(path, *lines):
    path.write_bytes(b"".join(lines))
    return str(path)


def test_jsonl_may_have_bom_crlf_blank_lines_and_unicode(tmp_path):
    source = write(
        tmp_path / "set.jsonl",
        b"\xef\xbb\xbf" + json.dumps({"question": "1+1?", "answer": 2}).encode() + b"\r\n",
        b"\r\n \n",
        json.dumps({"problem": "Wie groß ist π \u2028 ungefähr?", "answer": 3.5, "id": 7}, ensure_ascii=False).encode()
        + b"\n",
        json.dumps({"question": " x ", "answer": 4.0, "family": "toy", "other": {"ignored": 1}}).encode(),
    )
    assert load_problems(source) == [
        Problem("set/0", "1+1?", "2", source="set"),
        Problem("7", "Wie groß ist π \u2028 ungefähr?", "3.5", source="set"),
        Problem("set/2", "x", "4", "toy", "set"),
    ]
    assert len(load_problems(source, split="whatever", limit=2, seed=9)) == 2


def test_answer_formats_of_gsm8k_math_and_olympiadbench(tmp_path):
    rows = [
        {"question": "q", "answer": "48 + 24 = <<48+24=72>>72\n#### 1,072"},
        {"problem": "p", "solution": r"so \boxed{1}, no, \boxed{\frac{1}{2}}."},
        {"context": "Let c.", "question": "q", "final_answer": ["1", "2"]},
        {"question": "q", "answer": 0},
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    problems = load_problems(str(path))
    assert [p.answer for p in problems] == ["1072", r"\frac{1}{2}", "1, 2", "0"]
    assert problems[2].question == "Let c.\nq"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Add. #### 1,250", "1250"),
        ("#### -1,234,567.5", "-1234567.5"),
        ("#### $12,000 ", "$12000"),
        ("Divide. #### 0,1", "0,1"),  # a decimal comma
        ("#### 0,125", "0,125"),
        ("#### 12,50", "12,50"),
        ("#### 1,2,3", "1,2,3"),  # a list
        ("#### (1,250)", "(1,250)"),  # a pair
        ("#### 1,250, 3", "1,250, 3"),
    ],
)
def test_only_thousands_separators_are_removed_from_answers(tmp_path, answer, expected):
    source = write(tmp_path / "a.jsonl", json.dumps({"question": "q", "answer": answer}).encode())
    assert load_problems(source)[0].answer == expected


def chat_row(content, truth="42", **more):
    message = {"role": "user", "content": content}
    return {"prompt": [message], "reward_model": {"ground_truth": truth, "style": "rule"}, **more}


def test_rows_of_dapo_and_verl_lose_their_instructions(tmp_path):
    dapo = (
        "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
        "$Answer (without quotes) where $Answer is the answer to the problem.\n\nWhat is\n\n6*7?\n\n"
        'Remember to put your answer on its own line after "Answer:".'
    )
    verl = "What is 6*7? Let's think step by step and output the final answer "
    rows = [
        chat_row("What is 6*7?"),
        chat_row(dapo, data_source="math_dapo"),
        chat_row(verl + 'after "####".'),
        chat_row(verl + "within \\boxed{}."),
        chat_row("What is 6*7?", 42),
        {**chat_row(""), "prompt": "What is 6*7?"},
    ]
    rows[0]["prompt"].insert(0, {"role": "system", "content": "You are a calculator."})
    source = write(tmp_path / "a.jsonl", *(json.dumps(row).encode() + b"\n" for row in rows))
    problems = load_problems(source)
    assert {p.answer for p in problems} == {"42"}
    assert [p.question for p in problems] == ["What is 6*7?", "What is\n\n6*7?"] + ["What is 6*7?"] * 4


def test_rows_of_svamp_have_capitalised_columns(tmp_path):
    row = {"ID": "chal-1", "Body": "Ann has 3 pens.", "Question": "How many pens?", "Answer": "3.0"}
    source = write(tmp_path / "a.jsonl", json.dumps(row).encode())
    assert load_problems(source) == [Problem("chal-1", "Ann has 3 pens.\nHow many pens?", "3.0", source="a")]


def test_pass_rate_is_optional(tmp_path):
    rows = [{"question": "q", "answer": "1", "pass_rate": rate} for rate in (0, 0.25, 1.0, None)]
    source = write(tmp_path / "a.jsonl", *(json.dumps(row).encode() + b"\n" for row in rows))
    assert [p.pass_rate for p in load_problems(source)] == [0.0, 0.25, 1.0, None]


def test_several_sources_are_loaded_in_order_with_unique_ids(tmp_path):
    for name, answers in (("one", [1, 2, 3]), ("two", [4, 5])):
        rows = [json.dumps({"question": "q", "answer": a, "id": a % 2}).encode() + b"\n" for a in answers]
        write(tmp_path / f"{name}.jsonl", *rows)
    source = f"{tmp_path / 'one.jsonl'}, {tmp_path / 'two.jsonl'}"
    problems = load_problems(source)
    assert [(p.source, p.answer) for p in problems] == [("one", a) for a in "123"] + [("two", a) for a in "45"]
    assert [p.id for p in problems] == ["1", "0", "1/2", "two/0", "two/1"]
    assert [p.answer for p in load_problems(source, limit=1)] == ["1", "4"]
    with pytest.raises(ValueError, match="two sources are named 'synthetic'"):
        load_problems("synthetic,synthetic", limit=2)
    with pytest.raises(FileNotFoundError, match="missing"):
        load_problems(f"{tmp_path / 'one.jsonl'},missing")


def test_parquet_rows_are_loaded(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "set.parquet"
    table = {"question": ["a", "b", "c"], "answer": [1.0, 2.5, None], "id": ["x", None, "z"]}
    parquet.write_table(pyarrow.table(table), path)
    assert load_problems(str(path), limit=2) == [
        Problem("x", "a", "1", source="set"),
        Problem("set/1", "b", "2.5", source="set"),
    ]
    with pytest.raises(ValueError, match=r"set\.parquet: row 3: no answer"):
        load_problems(str(path))


GOOD = b'{"question": "q", "answer": "1"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", r"a\.jsonl: is empty"),
        ("a.jsonl", b"\xef\xbb\xbf\n \n", r"a\.jsonl: is empty"),
        ("a.json", b"", r"a\.json: is empty"),
        ("a.json", b"[]", r"a\.json: is empty"),
        ("a.jsonl", GOOD + b"\n{'question': 1}\n", r"a\.jsonl:3: invalid JSON"),
        ("a.jsonl", GOOD + b'{"question": "q", "ans', r"a\.jsonl:2: invalid JSON"),
        ("a.jsonl", GOOD + b"\xff\xfe\n", r"a\.jsonl:2: .*not UTF-8"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: invalid JSON"),
        ("a.jsonl", b'{"question": "q", "answer": ' + b"9" * 5000 + b"}", r"a\.jsonl:1: invalid JSON"),
        ("a.jsonl", GOOD + b"[1]\n", r"a\.jsonl:2: expected an object .* found list"),
        ("a.jsonl", GOOD + b'{"answer": 1}\n', r"a\.jsonl:2: no question"),
        ("a.jsonl", GOOD + b'{"question": "  ", "answer": 1}\n', r"a\.jsonl:2: no question"),
        ("a.jsonl", GOOD + b'{"question": "q"}\n', r"a\.jsonl:2: no answer"),
        ("a.jsonl", GOOD + b'{"question": "q", "answer": null}\n', r"a\.jsonl:2: no answer"),
        ("a.jsonl", GOOD + b'{"question": "q", "answer": ""}\n', r"a\.jsonl:2: no answer"),
        ("a.jsonl", GOOD + b'{"question": "q", "answer": NaN}\n', r"a\.jsonl:2: no answer"),
        ("a.jsonl", GOOD + b'{"question": "q", "solution": "none"}\n', r"a\.jsonl:2: no answer"),
        ("a.jsonl", GOOD + b'{"question": {}, "answer": 1}\n', r"a\.jsonl:2: 'question' is of type dict"),
        ("a.jsonl", GOOD + b'{"question": "q", "answer": true}\n', r"a\.jsonl:2: 'answer' is of type bool"),
        ("a.jsonl", GOOD + b'{"question": "\\ud800", "answer": 1}\n', r"a\.jsonl:2: 'question' has an unpaired"),
        ("a.jsonl", GOOD + b'{"question": "q", "answer": 1, "pass_rate": 2}\n', r"a\.jsonl:2: 'pass_rate' is 2"),
        ("a.jsonl", GOOD + b'{"question": "q", "answer": 1, "pass_rate": "0"}\n', r"a\.jsonl:2: 'pass_rate' is '0'"),
        ("a.jsonl", GOOD + b'{"prompt": [], "answer": 1}\n', r"a\.jsonl:2: 'prompt' must be a chat"),
        ("a.jsonl", GOOD + b'{"prompt": [{"role": "assistant"}], "answer": 1}\n', r"a\.jsonl:2: 'prompt' must be"),
        ("a.jsonl", GOOD + b'{"entry_point": "f", "test": "", "prompt": null}\n', r"a\.jsonl:2: not a row of"),
        ("a.jsonl", GOOD + b'{"code": "def f(): 1", "test_list": []}\n', r"a\.jsonl:2: not a row of HumanEval"),
        ("a.jsonl", GOOD + b'{"entry_point": 5, "test": "", "prompt": "p"}\n', r"a\.jsonl:2: not a row of"),
        ("a.jsonl", GOOD + b'{"entry_point": "f", "test": null, "prompt": "p"}\n', r"a\.jsonl:2: not a row of"),
        ("a.jsonl", GOOD + b'{"entry_point": "f", "test": "", "prompt": "\\ud800"}\n', r"a\.jsonl:2: 'prompt' has an"),
        ("a.json", b'[{"question": "q",\n "answer": 1},\n oops]', r"a\.json:3: invalid JSON"),
        ("a.json", b'{"question": "q", "answer": 1}', r"a\.json:1: expected a list"),
        ("a.json", GOOD + GOOD, r"a\.json:2: invalid JSON"),
        ("a.json", b'[{"question": "q", "answer": 1}, {"question": "q"}]', r"a\.json: row 2: no answer"),
        ("a.parquet", b"PAR1 not really", r"a\.parquet: not a readable parquet file"),
        ("a.parquet", b"", r"a\.parquet: not a readable parquet file"),
        ("a.csv", b"question,answer\n", r"a\.csv: expected a \.jsonl, \.json, \.parquet file"),
        ("noext", GOOD, r"noext: expected a \.jsonl"),
    ],
)
def test_invalid_files_give_one_line_errors_with_line_numbers(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_problems(write(tmp_path / name, content))
    assert "\n" not in str(caught.value)


def test_rows_after_the_limit_are_not_read(tmp_path):
    source = write(tmp_path / "a.jsonl", GOOD, GOOD, b"broken\n")
    assert len(load_problems(source, limit=2)) == 2
    with pytest.raises(ValueError, match=r"a\.jsonl:3"):
        load_problems(source, limit=3)


def test_invalid_sources_limits_and_splits_are_rejected(tmp_path):
    for source in (str(tmp_path / "missing.jsonl"), "missing.csv", "synthetics", "not a name"):
        with pytest.raises(FileNotFoundError, match="no such file") as caught:
            load_problems(source)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="expected a"):
        load_problems(str(tmp_path))
    for limit in (0, -3):
        with pytest.raises(ValueError, match="limit"):
            load_problems("synthetic", limit=limit)
    with pytest.raises(ValueError, match="'train' and 'test'"):
        load_problems("synthetic", split="validation")


def test_hub_data_sets_are_loaded_with_configuration_and_split(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, config=None, split=None):
        asked.append((name, config, split))
        if name == "no/body":
            raise ConnectionError("no network\nat all")
        return [{"question": "q", "problem": "q", "answer": "1", "final_answer": ["1"]}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_problems("gsm8k", split="test") == [Problem("gsm8k/0", "q", "1", source="gsm8k")]
    assert load_problems("aime24", split="test") == [Problem("aime24/0", "q", "1", source="aime24")]
    [problem] = load_problems("some/set-v1.5:extra")
    assert problem == Problem("set-v1.5:extra/0", "q", "1", source="set-v1.5:extra")
    assert asked == [
        ("openai/gsm8k", "main", "test"),
        ("HuggingFaceH4/aime_2024", None, "train"),
        ("some/set-v1.5", "extra", "train"),
    ]
    mathematics = {"gsm8k", "math500", "aime24", "aime25", "amc23", "minerva", "olympiadbench", "svamp"}
    assert set(BENCHMARKS) == mathematics | {"humaneval", "humaneval+", "mbpp", "mbpp+"}
    with pytest.raises(ValueError, match=r"no/body.*check the name and the network.*\(no network\)") as caught:
        load_problems("no/body")
    assert "\n" not in str(caught.value)


# ---- synthetic problems ---------------------------------------------------------------------------------------------


def primes(low, high):
    return [n for n in range(max(low, 2), high) if all(n % d for d in range(2, math.isqrt(n) + 1))]


def divisors(n):
    return [d for d in range(1, n + 1) if n % d == 0]


def in_base(n, base):
    return (in_base(n // base, base) if n >= base else "") + str(n % base)


def roots(b, c):
    root = math.isqrt(b * b - 4 * c)
    return (-b - root) // 2, (-b + root) // 2


def sequence(first, k, c, n):
    return sequence(k * first + c, k, c, n - 1) if n > 1 else first


def evaluate(expression):
    return eval(re.sub(r"(\d+)!", r"math.factorial(\1)", expression.replace("the binomial coefficient C", "math.comb")))


NUM, E = r"(-?\d+)", r"([^?|]+?)"  # an integer, an expression
# The meaning of each question, implemented independently of the generators.
READINGS = [
    (rf"(?:What is|Multiply|Find the product of) {NUM} (?:\*|by|and) {NUM}[?.]", lambda a, b: a * b),
    (rf"(?:What is|Multiply) {NUM} (?:\*|by) {NUM} (?:-|and subtract) {NUM}[?.]", lambda a, b, c: a * b - c),
    (rf"What is the remainder when {E} is divided by {NUM}\?", lambda e, m: evaluate(e) % m),
    (rf"(?:Find|Compute) {E} mod(?:ulo)? {NUM}\.", lambda e, m: evaluate(e) % m),
    (rf".*(?:greatest common divisor|gcd) of {E}[?.]", lambda e: math.gcd(*map(int, re.findall(r"\d+", e)))),
    (
        rf".* positive divisors of the least common multiple of {NUM} and {NUM}[?.]",
        lambda a, b: len(divisors(math.lcm(a, b))),
    ),
    (
        rf"(?!.*divisors).*(?:least common multiple|lcm) of {E}[?.]",
        lambda e: math.lcm(*map(int, re.findall(r"\d+", e))),
    ),
    (rf".* multiples of {NUM} from {NUM} to {NUM}[?.]", lambda k, a, b: sum(n for n in range(a, b + 1) if n % k == 0)),
    (rf".* squares of all integers from {NUM} to {NUM}[?.]", lambda a, b: sum(n**2 for n in range(a, b + 1))),
    (rf".* cubes of all integers from {NUM} to {NUM}[?.]", lambda a, b: sum(n**3 for n in range(a, b + 1))),
    (rf".* primes (?:are less than|below) {NUM}[?.]", lambda n: len(primes(2, n))),
    (rf".* number of primes (?:between|from) {NUM} (?:and|to) {NUM}[?.]", lambda a, b: len(primes(a, b + 1))),
    (rf".* sum of primes (?:between|from) {NUM} (?:and|to) {NUM}[?.]", lambda a, b: sum(primes(a, b + 1))),
    (rf".* {NUM}\*x \+ {NUM} = {NUM}( for x)?[?.]", lambda a, b, e, _: (e - b) // a),
    (rf".* {NUM}\*x \+ {NUM} = {NUM}\*x \+ {NUM}( for x)?[?.]", lambda a, b, c, d, _: (d - b) // (a - c)),
    (
        rf".* {NUM}\*x \+ {NUM}\*y = {NUM} and {NUM}\*x \+ {NUM}\*y = {NUM}(, what is x \+ y)?[?.]",
        lambda a, b, e, c, d, f, _: ((e * d - b * f) + (a * f - e * c)) // (a * d - b * c),
    ),
    (rf".* larger root of .*?x\*\*2 {NUM}\*x {NUM} = 0[?.]", lambda b, c: max(roots(b, c))),
    (rf".* smaller root of .*?x\*\*2 {NUM}\*x {NUM} = 0[?.]", lambda b, c: min(roots(b, c))),
    (
        rf".* sum of the cubes of the roots of .*?x\*\*2 {NUM}\*x {NUM} = 0[?.]",
        lambda b, c: sum(r**3 for r in roots(b, c)),
    ),
    (rf"What is the base {NUM} number {NUM} in decimal\?", lambda base, n: int(str(n), base)),
    (rf"Convert {NUM} from base {NUM} to decimal\.", lambda n, base: int(str(n), base)),
    (
        rf"(?:Write the decimal number|Convert) {NUM} (?:from decimal to|in) base {NUM}\.",
        lambda n, base: in_base(n, base),
    ),
    (rf".*sum of the digits of {NUM} in base {NUM}\?", lambda n, base: sum(map(int, in_base(n, base)))),
    (rf"Write {NUM} in base {NUM} and add up its digits\.", lambda n, base: sum(map(int, in_base(n, base)))),
    (rf".* digits of the product of {NUM} and {NUM}[?.]", lambda a, b: sum(map(int, str(a * b)))),
    (
        rf".* {NUM} to the power s, if .* digits of {NUM} \* {NUM}\?",
        lambda c, a, b: c ** sum(map(int, str(a * b))),
    ),
    (rf".* digits of {NUM} \* {NUM}, what is {NUM} to the power s\?", lambda a, b, c: c ** sum(map(int, str(a * b)))),
    (rf".* digits of {NUM}\*\*{NUM}[?.]", lambda a, n: sum(map(int, str(a**n)))),
    (rf".* (?:digit|equal to) {NUM} (?:occur )?in {NUM}\*\*{NUM}[?.]", lambda d, a, n: str(a**n).count(str(d))),
    (rf"In how many ways can you choose {NUM} of {NUM} people\?", lambda k, n: math.comb(n, k)),
    (rf"What is the binomial coefficient C\({NUM}, {NUM}\)\?", math.comb),
    (rf".* number of positive divisors of {NUM}[?.]", lambda n: len(divisors(n))),
    (rf".* sum of all positive divisors of {NUM}[?.]", lambda n: sum(divisors(n))),
    (rf".* largest prime factor of {NUM}[?.]", lambda n: max(d for d in divisors(n) if primes(d, d + 1))),
    (rf".* from {NUM} to {NUM} are divisible by {NUM}[?.]", lambda a, b, k: sum(n % k == 0 for n in range(a, b + 1))),
    (
        rf".* from {NUM} to {NUM} are divisible by {NUM} or {NUM}[?.]",
        lambda a, b, k, m: sum(n % k == 0 or n % m == 0 for n in range(a, b + 1)),
    ),
    (
        rf".* from {NUM} to {NUM} are divisible by {NUM} but not by {NUM}[?.]",
        lambda a, b, k, m: sum(n % k == 0 and n % m > 0 for n in range(a, b + 1)),
    ),
    (rf".* starts with {NUM}, and .* {NUM} times .* plus {NUM}\. .* term number {NUM}[?.]", sequence),
    (
        rf".* starts with {NUM}, and .* {NUM} times .* plus {NUM}\. .* term number {NUM} modulo {NUM}[?.]",
        lambda first, k, c, n, m: sequence(first, k, c, n) % m,
    ),
    (
        rf"\w+ buys {NUM} .* at {NUM} .* and {NUM} .* at {NUM} dollars each\. .* total.*",
        lambda a, p, b, q: a * p + b * q,
    ),
    (
        rf"\w+ buys {NUM} .* at {NUM} .* and {NUM} .* at {NUM} .* pays with {NUM} .* change .*",
        lambda a, p, b, q, paid: paid - a * p - b * q,
    ),
    (rf"\w+ has {NUM} .* buys {NUM} .* at {NUM} .* How many .* at {NUM} .*", lambda t, a, p, q: (t - a * p) // q),
    (rf"A car drives {NUM} hours at {NUM} km/h and then {NUM} hours at {NUM} km/h.*", lambda u, v, s, w: u * v + s * w),
    (rf"Two cyclists {NUM} km apart .* at {NUM} km/h and {NUM} km/h.*", lambda d, v, w: d // (v + w)),
    (rf"One pump .* {NUM} minutes, another in {NUM} minutes.*", lambda a, b: 60 * a * b // (a + b)),
]


def independent_answer(question):
    question = re.sub(r"([-+]) (\d+)(\*x| =)", r"\1\2\3", question) if "x**2" in question else question
    question = question.replace("+", "") if "x**2" in question else question
    found = [(r, match) for pattern, r in READINGS if (match := re.fullmatch(pattern, question))]
    assert len(found) == 1, (question, len(found))
    reading, match = found[0]
    return str(reading(*(int(g) if g and re.fullmatch(r"-?\d+", g) else g for g in match.groups())))


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_match_independent_computation(split):
    for problem in load_problems("synthetic", split=split, limit=600, seed=1):
        assert independent_answer(problem.question) == problem.answer, problem


@settings(max_examples=15, deadline=None)
@given(st.integers(-(2**40), 2**40), st.sampled_from(["train", "test"]), st.integers(64, 200))
def test_synthetic_problems_are_balanced_short_and_reproducible(seed, split, limit):
    problems = load_problems("synthetic", split=split, limit=limit, seed=seed)
    assert problems == load_problems("synthetic", split=split, limit=limit + 7, seed=seed)[:limit]
    assert [p.id for p in problems] == [f"synthetic/{split}/{i}" for i in range(limit)]
    assert len({p.question for p in problems}) == limit
    counts = [sum(p.family == family.__name__ for p in problems[:64]) for family in FAMILIES]
    assert len(FAMILIES) >= 10 and min(counts) >= 64 // len(FAMILIES)
    for p in problems:
        assert len(p.question.split()) <= 35 and p.question.count("?") + p.question.count(". ") <= 2
        assert re.fullmatch(r"-?\d+", p.answer) and verify(p.answer, p.answer)


def test_train_and_test_are_disjoint_for_every_seed():
    numbers = {"train": set(), "test": set()}
    for split, seen in numbers.items():
        for seed in range(6):
            problems = load_problems("synthetic", split=split, limit=400, seed=seed)
            seen |= {(p.family, p.question) for p in problems}
    assert not numbers["train"] & numbers["test"]
    first = load_problems("synthetic", seed=0)
    assert len(first) == 256
    assert first != load_problems("synthetic", seed=1)


def test_phrasings_of_a_problem_are_in_the_same_split():
    def computes(problem):  # identifies the computation, whatever the phrasing
        return problem.family, tuple(sorted(re.findall(r"\d+", problem.question)))

    splits = [
        {computes(p) for seed in range(8) for p in load_problems("synthetic", split, limit=300, seed=seed)}
        for split in ("train", "test")
    ]
    shared = splits[0] & splits[1]
    # Different operations on the same numbers (a gcd and an lcm) may be in both splits.
    assert len(shared) < 0.02 * len(splits[1])


def test_generation_is_fast():
    load_problems("synthetic", limit=30)
    start = time.perf_counter()
    load_problems("synthetic", limit=500)
    assert time.perf_counter() - start < 10  # takes about 0.3 s on an idle core


def test_repeated_ids_get_the_row_number_appended(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"id": "a", "question": "q", "answer": "1"}\n' * 3)
    assert [p.id for p in load_problems(str(path))] == ["a", "a/1", "a/2"]
