"""Problem loading: synthetic problems, jsonl, json and parquet files, Hugging Face data sets, named benchmarks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from thor.code_problems import code_problem
from thor.demo import synthetic_problems
from thor.text import extract_answer
from thor.trajectory import Problem

SYNTHETIC_DEFAULT = 256  # number of synthetic problems without a limit

BENCHMARKS = {  # name -> hub data set, configuration, split (None: the requested split)
    "gsm8k": ("openai/gsm8k", "main", None),
    "math500": ("HuggingFaceH4/MATH-500", None, "test"),
    "aime24": ("HuggingFaceH4/aime_2024", None, "train"),
    "aime25": ("math-ai/aime25", None, "test"),
    "amc23": ("math-ai/amc23", None, "test"),
    "minerva": ("math-ai/minervamath", None, "test"),
    "olympiadbench": ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train"),
    "svamp": ("ChilleD/SVAMP", None, None),
    "humaneval": ("openai/openai_humaneval", None, "test"),
    "humaneval+": ("evalplus/humanevalplus", None, "test"),
    "mbpp": ("google-research-datasets/mbpp", "sanitized", "test"),
    "mbpp+": ("evalplus/mbppplus", None, "test"),
}
COLUMNS = ("id", "context", "body", "question", "problem", "answer", "final_answer", "solution", "family")
THOUSANDS = re.compile(r"[-+$]*[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?")
INSTRUCTIONS = re.compile(  # those of DAPO and verl about the form of the answer; the prompt has its own
    r"\ASolve the following math problem step by step\. The last line .*\n\n"
    r"|\n\nRemember to put your answer on its own line after \"Answer:\"\.\Z"
    r"|\s*Let's think step by step and output the final answer (?:after \"####\"|within \\boxed\{\})\.\Z"
)


def split_sources(source: str) -> list[str]:
    """The sources in a text such as 'math500, aime24'. An existing path is a single source, commas or not."""
    names = [name.strip() for name in source.split(",")]
    return [source] if Path(source).exists() else [name for name in names if name] or [source]


def load_problems(source: str, split: str = "train", limit: int | None = None, seed: int = 0) -> list[Problem]:
    """Load problems in the order of their source. Their ids are unique.

    source: 'synthetic', a name in BENCHMARKS, a .jsonl, .json or .parquet file, a hub data set 'owner/name' or
        'owner/name:configuration', or several of these separated by commas. A row needs a `question` or `problem`, and
        an `answer` or a `solution` with a \\boxed{}. An answer in GSM8K's format ("... #### 42") becomes "42".
        `context` is prepended to the question. `id`, `family` and `pass_rate` (in [0, 1]) are optional. Rows of DAPO
        and verl (a chat in `prompt`, the answer in `reward_model`) and of code benchmarks (see `code_problem`) are read
        as well.
    split: 'train' or 'test' for synthetic problems (disjoint for all seeds), or the split of a hub data set. Ignored
        for files and for benchmarks with a single split.
    limit: load only the first `limit` rows of each source; later rows are not checked. None loads all (256 for
        'synthetic').
    seed: seed of the synthetic problems; other sources ignore it.

    Raises FileNotFoundError or ValueError with a one-line message that names the file and, where there is one, the
    line or row.
    """
    if limit is not None and limit <= 0:
        raise ValueError(f"limit is {limit}: must be at least 1")
    loaded = [_load(name, split, limit, seed) for name in split_sources(source)]
    labels = [problems[0].source for problems in loaded]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"{source}: two sources are named '{label}'; the results need different names")
    problems, seen = [], set()
    for problem in (problem for part in loaded for problem in part):
        if problem.id in seen:
            problem = replace(problem, id=f"{problem.source}/{problem.id}")
        seen.add(problem.id)
        problems.append(problem)
    return problems


def _load(source: str, split: str, limit: int | None, seed: int) -> list[Problem]:
    """Load the problems of a single source."""
    if source == "synthetic":
        return [replace(p, source=source) for p in synthetic_problems(split, limit or SYNTHETIC_DEFAULT, seed)]
    path = Path(source)
    suffix = path.suffix.lower()
    if source not in BENCHMARKS and (path.exists() or suffix[1:2].isalpha()):  # a hub name may end in ".5"
        if not path.exists():
            raise FileNotFoundError(f"{source}: no such file")
        if path.is_dir() or suffix not in READERS:
            raise ValueError(f"{source}: expected a {', '.join(READERS)} file")
        rows, label = READERS[suffix](path), path.stem
    else:
        rows, label = _hub_rows(source, split), source.split("/")[-1]
    problems = [_problem(row, where, label, i) for i, (where, row) in enumerate(islice(rows, limit))]
    if not problems:
        raise ValueError(f"{source}: is empty; expected rows with a question and an answer")
    seen: set[str] = set()
    for i, problem in enumerate(problems):
        if problem.id in seen:  # ids must be unique: append the row number to a repeated one
            problems[i] = replace(problem, id=f"{problem.id}/{i}")
        seen.add(problems[i].id)
    return problems


# ---- readers --------------------------------------------------------------------------------------------------------
# Each reader yields (where, row). `where` names the file and the line or row in error messages.


def read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """("path:line", value) of each line that is not blank. Raises ValueError, which names the line at fault."""
    with path.open("rb") as file:  # text mode would count a lone "\r" as a line break
        for number, raw in enumerate(file, 1):
            if raw.strip(b"\xef\xbb\xbf \t\r\n"):
                yield f"{path}:{number}", parse_json(raw, path, number)


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    raw = path.read_bytes()
    rows = parse_json(raw, path, 1) if raw.strip() else []
    if not isinstance(rows, list):
        raise ValueError(f"{path}:1: expected a list of objects (use .jsonl for one object per line)")
    yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows, 1))


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        rows = (row for batch in ParquetFile(path).iter_batches() for row in batch.to_pylist())
        yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows, 1))
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({_one_line(error)})") from None


READERS = {".jsonl": read_jsonl, ".json": _json_rows, ".parquet": _parquet_rows}


def _hub_rows(source: str, split: str) -> Iterator[tuple[str, Any]]:
    name, _, config = source.partition(":")
    if source in BENCHMARKS:
        name, config, only_split = BENCHMARKS[source]
        split = only_split or split
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        known = ", ".join(["synthetic", *BENCHMARKS])
        raise FileNotFoundError(f"{source}: no such file, not one of {known}, and not a hub data set 'owner/name'")
    from datasets import load_dataset  # a slow import

    try:
        rows = load_dataset(name, config or None, split=split)
    except Exception as error:  # the class depends on the cause: network, name, configuration or split
        raise ValueError(
            f"{source}: no such file, and cannot load split '{split}' of the hub data set {name}; check the name and "
            f"the network, or use a local .jsonl file ({_one_line(error)})"
        ) from None
    yield from ((f"{source}: row {number}", row) for number, row in enumerate(rows, 1))


def parse_json(raw: bytes, path: Path, line: int) -> Any:
    """Parse `raw`, which starts at line `line` of the file. Raises ValueError, which names the line at fault."""
    try:
        return json.loads(raw.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError as error:
        line, fault = line + raw.count(b"\n", 0, error.start), "not UTF-8"
    except json.JSONDecodeError as error:
        line, fault = line + error.lineno - 1, f"{error.msg} at column {error.colno}"
    except (RecursionError, ValueError) as error:  # nesting too deep, or an integer with more than 4,300 digits
        fault = _one_line(error)
    raise ValueError(f"{path}:{line}: invalid JSON ({fault})")


# ---- rows -----------------------------------------------------------------------------------------------------------


def _problem(row: Any, where: str, source: str, number: int) -> Problem:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with a question and an answer, found {type(row).__name__}")
    if code := code_problem(row, where):
        task, question, tests = code
        question = cell_text(question, f"{where}: 'prompt'")
        return Problem(task or f"{source}/{number}", question, source=source, tests=tests)
    row = {name.lower(): value for name, value in row.items()}  # SVAMP's names are capitalised
    cells = {column: cell_text(row.get(column), f"{where}: '{column}'") for column in COLUMNS}
    question = cells["question"] or cells["problem"] or _chat_question(row.get("prompt"), where)
    question = "\n".join(filter(None, (cells["context"], cells["body"], question)))
    answer = cells["answer"] or cells["final_answer"]  # OlympiadBench uses final_answer
    if "####" in answer:
        answer = answer.rpartition("####")[2].strip()
        answer = answer.replace(",", "") if THOUSANDS.fullmatch(answer) else answer
    if not answer and isinstance(row.get("reward_model"), dict):
        answer = cell_text(row["reward_model"].get("ground_truth"), f"{where}: 'ground_truth'")
    answer = answer or extract_answer(cells["solution"]) or ""
    if not question:
        raise ValueError(f"{where}: no question; expected text in 'question' or 'problem'")
    if not answer:
        raise ValueError(f"{where}: no answer; expected text or a number in 'answer', or \\boxed{{}} in 'solution'")
    rate = _pass_rate(row.get("pass_rate"), f"{where}: 'pass_rate'")
    return Problem(cells["id"] or f"{source}/{number}", question, answer, cells["family"], source, rate)


def _chat_question(prompt: Any, where: str) -> str:
    """The question in a chat (rows of DAPO and verl), or in a plain text, without its instructions about the answer."""
    if isinstance(prompt, list):
        turns = [m for m in prompt if isinstance(m, dict) and m.get("role") != "system"]
        if [turn.get("role") for turn in turns] != ["user"]:
            raise ValueError(f"{where}: 'prompt' must be a chat with one message of the user")
        prompt = turns[0].get("content")
    return INSTRUCTIONS.sub("", cell_text(prompt, f"{where}: 'prompt'")).strip()


def _pass_rate(value: Any, where: str) -> float | None:
    if value is None or value != value:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{where} is {value!r}, expected a number from 0 to 1")
    return float(value)


def cell_text(value: Any, where: str) -> str:
    """Convert a cell to text: None and NaN become "", 42.0 becomes "42", and lists are joined by commas.

    Raises ValueError, which starts with `where`, for other types and for an unpaired surrogate.
    """
    if value is None or value != value:
        return ""
    if isinstance(value, list):
        return ", ".join(cell_text(item, where) for item in value)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"{where} is of type {type(value).__name__}, expected text or a number")
    text = str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()
    if re.search("[\ud800-\udfff]", text):  # valid in JSON, but tokenizers and files reject them
        raise ValueError(f"{where} has an unpaired surrogate, expected valid Unicode")
    return text


def _one_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
