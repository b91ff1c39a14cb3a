"""Tests of run_sft.py's input: what a line of tir.jsonl must hold, and the error that names the line at fault."""

import json

import pytest

from run_sft import Settings, batches_of, load_trajectories
from thor.prompts import PROMPTS
from thor.settings import UserError

TEXT, OUTPUT = {"text": "Add.", "sampled": True}, {"text": "4", "sampled": False}
GOOD = {"id": "a", "question": "2 + 2?", "answer": "4", "segments": [TEXT, OUTPUT, TEXT]}


def load(tmp_path, tokenizer, line: bytes):
    path = tmp_path / "tir.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + line + b"\n")
    return load_trajectories(str(path), tokenizer, PROMPTS["tool"])


def test_rows_become_ledgers(tmp_path, tokenizer):
    first, second = load(tmp_path, tokenizer, json.dumps(GOOD | {"id": 7, "answer": 4, "calls": 1}).encode())
    assert (second.problem.id, second.problem.answer) == ("7", "4") and first.token_ids == second.token_ids
    assert first.action_mask == [True] * 4 + [False] + [True] * 5  # and EOS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": None}, "'question' is None, expected text"),
        ({"question": 5}, "'question' is 5, expected text"),
        ({"question": "\ud800"}, "'question' has an unpaired surrogate"),
        ({"answer": None}, "'answer' is None, expected text"),
        ({"answer": True}, "'answer' is of type bool"),
        ({"id": None}, "'id' is None, expected text"),
        ({"segments": None}, "'segments' must be a list"),
        ({"segments": "text"}, "'segments' must be a list"),
        ({"segments": []}, "at least one sampled segment"),
        ({"segments": [OUTPUT]}, "at least one sampled segment"),
        ({"segments": [TEXT, None]}, "segment 2 needs text"),
        ({"segments": [{"text": None, "sampled": True}]}, "segment 1 needs text"),
        ({"segments": [{"text": 5, "sampled": True}]}, "segment 1 needs text"),
        ({"segments": [{"text": "", "sampled": True}]}, "segment 1 needs text"),
        ({"segments": [{"text": "a", "sampled": "false"}]}, "true or false in 'sampled'"),
        ({"segments": [{"text": "a", "sampled": 1}]}, "true or false in 'sampled'"),
        ({"segments": [{"text": "a\udfff", "sampled": True}]}, "segment 1 has an unpaired surrogate"),
        (b"[1]", "expected an object, found list"),
        (b"\xff", "not UTF-8"),
        (b"{", "invalid JSON"),
        (b'{"id": "a"}', "'question' is None"),
    ],
)
def test_line_at_fault_is_named(tmp_path, tokenizer, change, message):
    line = change if isinstance(change, bytes) else json.dumps(GOOD | change).encode()
    with pytest.raises(UserError) as raised:
        load(tmp_path, tokenizer, line)
    assert str(raised.value).startswith(f"--data {tmp_path / 'tir.jsonl'}:3: ") and message in str(raised.value)
    assert "\n" not in str(raised.value) and str(raised.value).isprintable()


def test_each_epoch_uses_every_row_once_in_batches_of_about_one_size():
    steps = batches_of(44, Settings(epochs=2, batch=12))
    assert [len(rows) for rows in steps] == [11] * 8
    first, second = ([row for rows in epoch for row in rows] for epoch in (steps[:4], steps[4:]))
    assert sorted(first) == sorted(second) == list(range(44)) and first != second
    assert [len(rows) for rows in batches_of(13, Settings(epochs=1, batch=12))] == [7, 6]  # not 12 and 1
    assert [len(rows) for rows in batches_of(5, Settings(epochs=1, batch=12))] == [5]
