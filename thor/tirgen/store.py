"""The files of drafts and rows. They are read and written line by line: memory does not grow with their number."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from thor.data import cell_text, parse_json
from thor.run_folder import writing
from thor.settings import UserError
from thor.tirgen.draft import Draft
from thor.tirgen.filters import Rates, Selection
from thor.tirgen.report import KeptStatistics
from thor.trajectory import Problem


class Where(NamedTuple):
    """A line of a file of drafts."""

    path: Path
    offset: int  # in bytes


def read_drafts(paths: Iterable[Path]) -> Iterator[tuple[Where, Draft]]:
    """All drafts of some files, with their places.

    Raises UserError for a line that is not a draft, and if two drafts have the same name.
    """
    seen: set[str] = set()
    for path in paths:
        for where, draft in _drafts(path):
            if draft.name in seen:
                raise UserError(f"{path}: has the try {draft.name} a second time; merge each shard once")
            seen.add(draft.name)
            yield where, draft


def read_draft(where: Where) -> Draft:
    """The draft at a place."""
    with where.path.open("rb") as file:
        file.seek(where.offset)
        return Draft.from_record(json.loads(file.readline()))


def read_names(path: Path) -> set[str]:
    """The names of the drafts in a file, if there is one. A last line that a crash cut off is removed from the file."""
    if not path.exists():
        return set()
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        while size:  # back to the end of the last complete line
            start = max(0, size - (1 << 16))
            file.seek(start)
            size = start + file.read(size - start).rfind(b"\n") + 1
            if size > start:
                break
        file.truncate(size)
    return {draft.name for _, draft in _drafts(path)}


def _drafts(path: Path) -> Iterator[tuple[Where, Draft]]:
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                draft = Draft.from_record(parse_json(line, path, number))
                if not all(isinstance(text, str) and isinstance(own, bool) for text, own in draft.segments):
                    raise TypeError("segments must consist of a text and true or false")
            except (ValueError, TypeError, LookupError, AttributeError) as error:
                raise UserError(f"{path}:{number}: not a draft of run_tirgen.py ({error}); --resume its run") from error
            yield Where(path, offset), draft
            offset += len(line)


def read_summary(folder: Path) -> dict:
    """summary.json of a run that has ended."""
    try:
        return json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{folder}: has no summary.json; let its run end first") from error


def check_shards(folders: list[Path]) -> None:
    """Raise UserError unless all of these runs have ended and they have all parts of their --shard."""
    shards = set()
    for folder in folders:
        read_summary(folder)
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        shards.add(tuple(map(int, settings["shard"].split("/"))))
    for n in sorted({n for _, n in shards}):
        if missing := [f"{i}/{n}" for i in range(1, n + 1) if (i, n) not in shards]:
            raise UserError(f"{', '.join(map(str, folders))}: without shard {', '.join(missing)}")


def to_row(draft: Draft, rates: Rates) -> dict:
    """Return a line of tir.jsonl. It holds text, so that run_sft.py can use any model's tokenizer."""
    problem = draft.problem
    return {
        "id": problem.id,
        "question": problem.question,
        "answer": problem.answer,
        "segments": [{"text": text, "sampled": own} for text, own in draft.segments],
        "calls": len(draft.codes),
        "pass_rate": rates.pass_rate,
        "plain_pass_rate": rates.plain_pass_rate,
    }


def from_row(row: Any, where: str) -> tuple[Problem, list[tuple[str, bool]]]:
    """Problem and segments (text, was it sampled?) of a line of tir.jsonl.

    Raises ValueError, which starts with `where`, for everything that training could not use.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object, found {type(row).__name__}")
    cells = {name: cell_text(row.get(name), f"{where}: '{name}'") for name in ("id", "question", "answer")}
    for name in cells:
        if row.get(name) is None or (name == "question" and not isinstance(row[name], str)):
            raise ValueError(f"{where}: '{name}' is {row.get(name)!r}, expected text")
    found = row.get("segments")
    segments = found if isinstance(found, list) else []
    for number, segment in enumerate(segments, 1):
        text, own = (segment.get("text"), segment.get("sampled")) if isinstance(segment, dict) else (None, None)
        if not isinstance(text, str) or not text or not isinstance(own, bool):
            raise ValueError(f"{where}: segment {number} needs text in 'text', and true or false in 'sampled'")
        cell_text(text, f"{where}: segment {number}")
    if not any(segment["sampled"] for segment in segments):
        raise ValueError(f"{where}: 'segments' must be a list with at least one sampled segment")
    return Problem(**cells), [(segment["text"], segment["sampled"]) for segment in segments]


def write_rows(path: Path, selection: Selection) -> KeptStatistics:
    """Write the rows of the trajectories that the filter kept, one at a time, and count what is in them."""
    statistics, temporary = KeptStatistics(), path.with_name(f"{path.name}.tmp")
    with writing(path, temporary), temporary.open("w", encoding="utf-8") as file:  # closing it writes, too
        for candidate in selection.kept:
            draft = read_draft(candidate.where)
            statistics.add(draft, selection.rates[draft.problem.id])
            row = to_row(draft, selection.rates[draft.problem.id])
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    temporary.replace(path)
    return statistics
