"""Problems: built-in synthetic ones, jsonl/json/parquet files, Hugging Face hub data sets, named benchmarks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from thor.demo.problems import synthetic_problems
from thor.text import extract_answer
from thor.trajectory import Problem

SYNTHETIC_DEFAULT = 256  # problems, when no limit is given


BENCHMARKS = {  # name -> hub data set, configuration, split (None: the one asked for)
    "gsm8k": ("openai/gsm8k", "main", None),
    "math500": ("HuggingFaceH4/MATH-500", None, "test"),
    "aime24": ("HuggingFaceH4/aime_2024", None, "train"),
    "aime25": ("math-ai/aime25", None, "test"),
    "amc23": ("math-ai/amc23", None, "test"),
    "minerva": ("math-ai/minervamath", None, "test"),
    "olympiadbench": ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train"),
}
COLUMNS = ("id", "context", "question", "problem", "answer", "final_answer", "solution", "family")


def load_problems(source: str, split: str = "train", limit: int | None = None, seed: int = 0) -> list[Problem]:
    """Problems of `source`, in its own order.

    source: 'synthetic'; a name in BENCHMARKS; a .jsonl, .json or .parquet file; or a hub data set 'owner/name',
        'owner/name:configuration'. Rows need `question` or `problem` (after `context`, where there is one), and
        `answer` (GSM8K's "... #### 42" is "42") or a `solution` that holds a \\boxed{}; `id` and `family` are kept.
    split: 'train' or 'test' for synthetic problems (disjoint whatever the seeds); the split of a hub data set.
        Files, and benchmarks with a single split, ignore it.
    limit: the first `limit` rows; nothing after them is checked. None: all (256 synthetic ones).
    seed: of the synthetic problems; nothing else depends on it.

    Raises FileNotFoundError (no such file) or ValueError, with one line that names the file and the line at fault.
    """
    if limit is not None and limit <= 0:
        raise ValueError(f"limit is {limit}, it must be at least 1 (or None for all problems)")
    if source == "synthetic":
        return synthetic_problems(split, limit or SYNTHETIC_DEFAULT, seed)
    path = Path(source)
    suffix = path.suffix.lower()
    if source not in BENCHMARKS and (path.exists() or suffix[1:2].isalpha()):  # hub names end in "-v1.5" at most
        if not path.exists():
            raise FileNotFoundError(f"{source}: no such file")
        if path.is_dir() or suffix not in READERS:
            raise ValueError(f"{source}: expected a {', '.join(READERS)} file")
        rows, stem = READERS[suffix](path), path.stem
    else:
        rows, stem = _hub_rows(source, split), source.split("/")[-1]
    problems = [_problem(row, where, f"{stem}/{i}") for i, (where, row) in enumerate(islice(rows, limit))]
    if not problems:
        raise ValueError(f"{source}: it is empty; expected rows with a question and an answer")
    seen: set[str] = set()  # ids tell problems apart everywhere: one that comes again gets its row's number behind it
    for i, problem in enumerate(problems):
        if problem.id in seen:
            problems[i] = replace(problem, id=f"{problem.id}/{i}")
        seen.add(problems[i].id)
    return problems


# ---- rows: each reader yields (where, row), `where` naming the file and line for messages ----


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:  # text mode would also end lines at a lone "\r" and shift the line numbers
        for number, raw in enumerate(file, 1):
            if raw.strip(b"\xef\xbb\xbf \t\r\n"):
                yield f"{path}:{number}", _parse_json(raw, path, number)


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    raw = path.read_bytes()
    rows = _parse_json(raw, path, 1) if raw.strip() else []
    if not isinstance(rows, list):
        raise ValueError(f"{path}:1: expected a list of objects (one object a line belongs in a .jsonl file)")
    yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows, 1))


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        rows = (row for batch in ParquetFile(path).iter_batches() for row in batch.to_pylist())
        yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows, 1))
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({_one_line(error)})") from None


READERS = {".jsonl": _jsonl_rows, ".json": _json_rows, ".parquet": _parquet_rows}


def _hub_rows(source: str, split: str) -> Iterator[tuple[str, Any]]:
    name, _, config = source.partition(":")
    if source in BENCHMARKS:
        name, config, only_split = BENCHMARKS[source]
        split = only_split or split
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        known = ", ".join(["synthetic", *BENCHMARKS])
        raise FileNotFoundError(f"{source}: no such file, not one of {known}, and not a hub data set 'owner/name'")
    from datasets import load_dataset  # slow to import

    try:
        rows = load_dataset(name, config or None, split=split)
    except Exception as error:  # a different class for each of: no network, unknown name, configuration, split
        raise ValueError(
            f"{source}: no such file, and split '{split}' of the hub data set {name} does not load; check the name and "
            f"the network, or give a local .jsonl file ({_one_line(error)})"
        ) from None
    yield from ((f"{source}: row {number}", row) for number, row in enumerate(rows, 1))


def _parse_json(raw: bytes, path: Path, line: int) -> Any:
    """The JSON value in `raw`, bytes that begin at `line` of the file."""
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line, fault = line + raw.count(b"\n", 0, error.start), "not UTF-8"
    except json.JSONDecodeError as error:
        line, fault = line + error.lineno - 1, f"{error.msg} at column {error.colno}"
    except (RecursionError, ValueError) as error:  # nested too deeply; an integer of more than 4,300 digits
        fault = _one_line(error)
    raise ValueError(f"{path}:{line}: invalid JSON ({fault})")


def _problem(row: Any, where: str, default_id: str) -> Problem:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with a question and an answer, found {type(row).__name__}")
    cells = {column: _text(row.get(column), f"{where}: '{column}'") for column in COLUMNS}
    question = cells["question"] or cells["problem"]
    answer = cells["answer"] or cells["final_answer"]  # the latter in OlympiadBench
    if "####" in answer:
        answer = answer.rpartition("####")[2].strip().replace(",", "")
    answer = answer or extract_answer(cells["solution"]) or ""
    if not question:
        raise ValueError(f"{where}: no question; expected a text in 'question' or 'problem'")
    if not answer:
        raise ValueError(f"{where}: no answer; expected a text or number in 'answer' (or \\boxed in 'solution')")
    question = "\n".join(filter(None, (cells["context"], question)))
    return Problem(cells["id"] or default_id, question, answer, cells["family"])


def _text(value: Any, where: str) -> str:
    """A cell as text: None and NaN are empty, 42.0 is "42", lists (OlympiadBench) are joined by commas."""
    if value is None or value != value:
        return ""
    if isinstance(value, list):
        return ", ".join(_text(item, where) for item in value)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"{where} is of type {type(value).__name__}, expected a text or a number")
    text = str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()
    if re.search("[\ud800-\udfff]", text):  # JSON allows "\ud800", tokenizers and files do not
        raise ValueError(f"{where} holds half of a surrogate pair, expected valid Unicode")
    return text


def _one_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
