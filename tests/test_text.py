"""Tests of the fence parser, boxed answers, and incremental decoding."""

import time

import pytest
from conftest import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_zoo import ADDED, CONTROL, ZOO

from thor.text import FenceParser, TextStream, control_ids, decode, encode, extract_answer


def parse(text: str) -> FenceParser:
    parser = FenceParser()
    parser.feed(text)
    return parser


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("think\n```python\nprint(1)\n```\n", "print(1)\n"),
        ("```python\nprint(1)\n```", "print(1)\n"),  # at the start, no newline after the closing fence
        ("I use python\n```\nnot code\n```\n", None),  # a plain fence after the word python
        ("see ```python here\nprint(1)\n```\n", None),  # the fence is not at the start of its line
        ("```py\nprint(1)\n```\n", None),
        ("```python3\nprint(1)\n```\n", None),
        ("```python\nprint('```')\n```\n", "print('```')\n"),  # backticks inside a line
        ("```python\ns = '''\n``` x\n'''\n```\n", "s = '''\n``` x\n'''\n"),  # more text after the fence on its line
        ("```python\nprint(1)", None),  # no closing fence
        ("```python\nprint(1)\n``", None),
        ("```python\r\nprint(1)\r\n```\r\n", "print(1)\n"),  # CRLF
        ("```python \nprint(1)\n```  \n", "print(1)\n"),  # trailing blanks
        ("```output\n1\n```\n```python\n2\n```", "2\n"),
        ("```python\n```\n", ""),
        ("``` python\n1\n```\n", None),
        ("  ```python\n1\n```\n", None),
    ],
)
def test_parser_finds_the_code_of_a_closed_block(text, code):
    assert parse(text).code == code


def test_offsets_delimit_fences_and_code():
    text = "think\n```python\nx\n```\nmore"
    parser = parse(text)
    assert text[parser.open_at :].startswith("```python") and text[parser.code_at : parser.code_end] == "x\n"
    assert text[: parser.close_end].endswith("\n```") and parser.text == text


def test_later_blocks_are_ignored():
    parser = parse("```python\n1\n```\n```python\n2\n```\n")
    assert parser.code == "1\n"


@given(st.lists(st.sampled_from(["a", "python", "```", "```python", "\n", " ", "\r\n", "print('```')"]), max_size=12))
def test_result_is_independent_of_how_whole_lines_are_grouped(parts):
    """Only splits within a line can matter, since "```" closes a block before its line is complete."""
    text = "".join(parts)
    parser = FenceParser()
    for line in text.splitlines(keepends=True):
        if parser.feed(line):
            break
    assert parser.code == parse(text).code


def test_block_closes_without_a_newline():
    parser = FenceParser()
    closed = [parser.feed(char) for char in "```python\n1\n```"]
    assert closed == [False] * (len(closed) - 1) + [True]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1} no, \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{5} and \boxed{6", "5"),
        (r"\boxed 7 .", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a\}", None),
        ("no box", None),
        (r"\boxed{}", ""),
        (r"\boxed { 3 }", "3"),
        (r"\boxed{1} then \boxed{ 2 }", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{a \\ b}", r"a \\ b"),
        (r"line \\ \boxed {7}", "7"),
        (r"\boxed 5 and more", "5"),
        (r"$\boxed 1{,}000$ or \boxed -2.", "-2"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed{3 so { \boxed{4}", "4"),
        (r"\boxed{\boxed{6}}", "6"),
        (r"{{ \boxed{8}", "8"),
        (r"} \boxed{9}", "9"),
        ("\\boxed{two\nlines}", "two\nlines"),
        (r"use \boxed notation", None),
        (r"\boxed{2", None),
        (r"\fbox{2}", None),
        ("boxed{2}", None),
        ("", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


balanced = st.recursive(
    st.text(st.sampled_from(r"1x+ ,=^_"), max_size=6) | st.sampled_from([r"\{", r"\}", r"\\ ", r"\frac"]),
    lambda inner: st.lists(inner, max_size=3).map("".join) | inner.map(lambda body: "{" + body + "}"),
    max_leaves=12,
)


@given(st.text(), balanced, st.text(st.characters(exclude_characters="\\{}")))
def test_extract_answer_finds_last_complete_box(before, body, after):
    text = before.replace("\\", "") + r" \boxed{" + body + "}" + after
    assert extract_answer(text) == body.strip()
    assert extract_answer(text + r" \boxed{unfinished") == body.strip()


@given(st.text(st.sampled_from("\\boxed{}[]$ 1ab\n")))
def test_extract_answer_returns_a_substring_and_never_raises(text):
    answer = extract_answer(text)
    assert answer is None or answer in text


def test_extract_answer_takes_linear_time():
    start = time.perf_counter()
    assert extract_answer("\\boxed{" * 200_000) is None
    assert time.perf_counter() - start < 10


@given(st.text(alphabet=st.characters(blacklist_categories=("Cs",)), max_size=30))
def test_text_stream_equals_decoding_at_once(tokenizer, text):
    ids = encode(tokenizer, text)
    stream = TextStream(tokenizer)
    assert "".join(stream.push(i) for i in ids) == decode(tokenizer, ids) == text


# ---- encoding -------------------------------------------------------------------------------------------------------

control_text = st.lists(st.sampled_from([*CONTROL, "the sum", " ", "\n", "<", "s>", "think>", "42"]), max_size=8).map(
    "".join
)


@given(st.sampled_from(sorted(ZOO)), control_text)
def test_encoded_text_contains_no_control_token(zoo, text):
    tokenizer = ZOO[zoo]
    ids = encode(tokenizer, text)
    assert control_ids(tokenizer).isdisjoint(ids)
    if zoo in ("byte_level", "slow"):  # the others cannot represent every text
        assert tokenizer.decode(ids) == text


@given(st.sampled_from(sorted(ZOO)), control_text)
def test_added_tokens_are_kept_on_request_but_never_special_ones(zoo, text):
    tokenizer = ZOO[zoo]
    ids = encode(tokenizer, text, added_tokens=True)
    assert control_ids(tokenizer, special_only=True).isdisjoint(ids)
    for token, token_id in zip(ADDED, tokenizer.convert_tokens_to_ids(list(ADDED)), strict=True):
        assert ids.count(token_id) == text.count(token)


@pytest.mark.parametrize("zoo", ZOO)
@pytest.mark.parametrize("text", ["the sum is 42", " print(1)\n  x = 2 < 3\n", "```python\n", "é 数 🙂", ""])
def test_ordinary_text_is_encoded_as_usual(zoo, text):
    assert encode(ZOO[zoo], text) == ZOO[zoo].encode(text, add_special_tokens=False)


def test_added_whitespace_is_no_control_token():
    tokenizer = byte_tokenizer(("  ", "</think>"))
    assert control_ids(tokenizer) == {tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer) - 3}
