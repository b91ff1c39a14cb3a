"""Tests of the fence parser, boxed answers, and incremental decoding."""

import re

import pytest
from conftest import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_zoo import ADDED, CONTROL, SPECIAL, ZOO
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from thor.demo import ModelError, demo_model
from thor.text import (
    EMPTY,
    FenceParser,
    TextStream,
    control_ids,
    decode,
    encode,
    extract_answer,
    find_boxes,
    prose,
)


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
        ("```py\nprint(1)\n```\n", "print(1)\n"),
        ("So:\n```python3\nprint(1)\n```", "print(1)\n"),
        ("Let us compute.\n```Python\nprint(1)\n```", "print(1)\n"),
        ("Let us compute.\n``` python\nprint(1)\n```", "print(1)\n"),
        ("```   PY3\nprint(1)\n```\n```\tPYTHON3\n2\n```", "2\n"),
        ('```python title="sum.py" {1,2}\nprint(1)\n```', "print(1)\n"),
        ("```python print(1)```\nprint(2)\n```", None),  # code within a line
        ("```pythonic\n1\n```", None),
        ("```python-repl\n1\n```", None),
        ("```pycon\n>>> 1\n```", None),
        ("```json\n{}\n```\n", None),
        ("We write python code:\nprint(1)\n", None),
        ("```output\n5\n```\nDone, \\boxed{5}.", None),
        ("The output was\n```\n5\n```\nNow\n```python\nprint(5)\n```", "print(5)\n"),
        ("````python\n1\n````\n", None),
        ("````\n```python\n1\n```", "1\n"),
        ("```python\nprint(1)\n````\n```", "print(1)\n````\n"),
        ("~~~python\n1\n~~~", None),
        ("```python\nprint('```')\n```\n", "print('```')\n"),  # backticks inside a line
        ("```python\ns = '''\n``` x\n'''\n```\n", "s = '''\n``` x\n'''\n"),  # more text after the fence on its line
        ("```python\nprint(1)", None),  # no closing fence
        ("```python\nprint(1)\n``", None),
        ("```python\r\nprint(1)\r\n```\r\n", "print(1)\n"),  # CRLF
        ("```python \nprint(1)\n```  \n", "print(1)\n"),  # trailing blanks
        ("```output\n1\n```\n```python\n2\n```", "2\n"),
        ("```python\n```\n", ""),
        # an indented block, which loses the indentation of its fence
        ("1. Add them:\n   ```python\n   a = 2\n   if a:\n       print(a)\n   ```", "a = 2\nif a:\n    print(a)\n"),
        ("- so\n\t```python\n\tif x:\n\t\ty\n\t```", "if x:\n    y\n"),
        ("- so\n\t```python\n    if x:\n        y\n    ```", "if x:\n    y\n"),  # a tab is as wide as four spaces
        ("  ```python\n  a\n\n b\nc\n      ```\n", "a\n\nb\nc\n"),  # lines with less indentation
        ("  ```python\r\n  1\r\n  ```\r\n", "1\n"),
        ("```python\n  a\n\tb\n  ```", "  a\n\tb\n"),
    ],
)
def test_parser_finds_the_code_of_a_closed_block(text, code):
    assert parse(text).code == code


@pytest.mark.parametrize("indent", ["", "   ", "\t"])
def test_offsets_delimit_fences_and_code(indent):
    text = f"think\n{indent}```python\n{indent}x\n{indent}```\nmore"
    parser = parse(text)
    assert text[: parser.open_at] == f"think\n{indent}" and text[parser.open_at :].startswith("```python")
    assert text[parser.code_at : parser.code_end] == f"{indent}x\n" and parser.code == "x\n"
    assert text[parser.code_end : parser.close_end] == f"{indent}```" and parser.text == text


def test_later_blocks_are_ignored():
    parser = parse("```python\n1\n```\n```python\n2\n```\n")
    assert parser.code == "1\n"


def slow_reference(text: str) -> str | None:
    """Code of the first block, found line by line in the whole text."""
    lines, opened = text.split("\n"), None
    for i, line in enumerate(lines):
        words = line.strip().removeprefix("```").split(None, 1)
        is_tag = bool(words) and words[0].lower() in ("py", "python", "python3") and "`" not in " ".join(words)
        if opened is None and line.strip().startswith("```") and is_tag and i + 1 < len(lines):
            opened = i
        elif opened is not None and line.strip() == "```":
            indent = len(lines[opened]) - len(lines[opened].lstrip())
            code = [line.rstrip("\r") for line in lines[opened + 1 : i]]
            return "".join(f"{x[min(indent, len(x) - len(x.lstrip(' '))) :]}\n" for x in code)
    return None


parts = st.sampled_from(
    ["a", "python", "py ", "```", "```python\n", "```Py3\n", "\n", "\n", "  ", "\r\n", "print('```')", "`"]
)


@given(st.lists(parts, max_size=12).map("".join))
def test_parser_agrees_with_a_slow_reference(text):
    assert parse(text).code == slow_reference(text)


@given(st.lists(parts, max_size=12).map("".join))
def test_result_is_independent_of_how_whole_lines_are_grouped(text):
    """Only splits within a line can matter, since "```" closes a block before its line is complete."""
    parser = FenceParser()
    for line in text.splitlines(keepends=True):
        if parser.feed(line):
            break
    assert parser.code == parse(text).code


@given(st.lists(parts, max_size=12).map("".join))
def test_character_by_character_closes_no_later(text):
    parser = FenceParser()
    for char in text:
        if parser.feed(char):
            break
    whole = parse(text)
    assert parser.closed or not whole.closed
    if parser.closed and whole.closed:
        assert parser.close_end <= whole.close_end and parser.open_at == whole.open_at


@pytest.mark.parametrize("piece", ["x", " ", "\n", "`", "```python\n"])
def test_parser_scans_each_character_once(piece):
    class Counted(str):
        scanned = 0

        def __add__(self, other):
            return Counted(str.__add__(self, other))

        def find(self, wanted, start):
            found = str.find(self, wanted, start)
            Counted.scanned += (found + 1 if found >= 0 else len(self)) - start
            return found

    parser = FenceParser()
    parser.text = Counted()
    for _ in range(500):
        parser.feed(piece)
    assert isinstance(parser.text, Counted) and Counted.scanned == 500 * len(piece)


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
        (r"\boxed{}", None),
        (r"\boxed{ }, \boxed{\,}, \boxed{$ $}, \boxed{\quad}, \fbox{\text{ }}, \boxed{{}}", None),
        (r"It is \boxed{12}, given in \boxed{} as asked.", "12"),
        (r"It is \boxed{12}, given in \boxed{\ } as asked.", "12"),
        (r"\boxed{\ }, \boxed{ \ \: }", None),
        (r"\boxed{12\ }", "12"),
        (r"\boxed{a \\ }", r"a \\"),
        (r"So it is \boxed{12}, boxed a single time: \boxed{} holds it.", "12"),
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
        (r"\fbox{42}", "42"),
        (r"\boxed{1}, no: \fbox{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\framebox{2} \boxedx{3}", None),
        # boxes that are one list
        (r"The roots are \boxed{2} and \boxed{9}.", "2, 9"),
        (r"$x = \boxed{2}$, $\boxed{3}$, or $\boxed{5}$", "2, 3, 5"),
        (r"\[ \boxed{2} \quad \boxed{9} \]", "2, 9"),
        (r"\(\boxed{2}\)\text{ and }\(\fbox{9}\)", "2, 9"),
        (r"\boxed{2}\ ,\ \boxed{3} \\ \boxed{5} \hspace{1.5cm} \boxed{7} \lor \boxed{9}", "2, 3, 5, 7, 9"),
        (r"\boxed{2} & \boxed{3};~\boxed{5}、\boxed{7} 和 \boxed{9}", "2, 3, 5, 7, 9"),
        (r"**\boxed{A}** and **\boxed{C}**", "A, C"),
        (r"\boxed{1} so. Then \boxed{2}, \boxed{}, \boxed{3}", "3"),
        (r"A first guess is \boxed{2}. That fails the check, so it is \boxed{9}.", "9"),
        (r"$\boxed{9}$" + "\n\n" + r"$\boxed{9}$", "9"),  # the same answer again
        (r"\boxed{2}. \boxed{9}.", "9"),
        (r"\boxed{2} and then \boxed{9}", "9"),
        ("boxed{2}", None),
        ("", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


BLOCK = "```python\n# \\boxed{7}\nprint(r'\\boxed{8}')\n```\n"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (BLOCK, None),
        (BLOCK + r"so \boxed{4}", "4"),
        (r"so \boxed{4}" + "\n" + BLOCK, "4"),
        (r"\boxed{4} and" + "\n" + BLOCK + r"\boxed{5}", "5"),  # no list across a block
        ("``` Python3 x\n# \\boxed{7}\n```", None),
        ("1. So\n   ```py\n   # \\boxed{7}\n   ```\n   \\boxed{4}", "4"),
        ("\\boxed{4}\n```python\n# \\boxed{7}", "4"),  # a block without an end
        ("\\boxed{4}\n```python\n# \\boxed{7}\n``", "4"),
        ("```python", None),
        ("\\boxed{4}\n```output\n\\boxed{7}\n```\nDone.", "4"),
        ("```cpp\n// \\boxed{7}\n```", None),
        ("```\n\\boxed{4}\n```", "4"),  # other fences are text
        ("```latex\n\\boxed{4}\n```", "4"),
        ("```\nx\n```\n```\nThe answer: \\boxed{4}", "4"),
        ("use `\\boxed{4}` as asked", "4"),
        # thoughts
        (r"<think>maybe \boxed{7}</think>", None),
        (r"maybe \boxed{7}</think> It is \boxed{4}.", "4"),
        (r"<think>\boxed{7}</think> It is \boxed{4}. <think>\boxed{8}</think> Done.", "4"),
        (r"<think>\boxed{7}</think> It is \boxed{4}. <think>or \boxed{8}", "4"),
        (r"<think>\boxed{7}</think> It is \boxed{4} </think>", "4"),
        (r"<think>so \boxed{7}", "7"),  # the thought has no end
        ("<think>\n```python\n# </think>\n```\n\\boxed{7}", "7"),  # an end of thought within code is none
        ("<think>\n```python\nx\n</think>\n\\boxed{4}", "4"),  # code that the thought did not close
    ],
)
def test_answer_comes_from_prose_only(text, answer):
    assert extract_answer(text) == answer


@given(
    st.lists(st.sampled_from(["a", "\n", "```", "```python\n", "```\n", "<think>", "</think>", " ", "é"]), max_size=12)
)
def test_prose_keeps_offsets_and_hides_nothing_else(parts):
    text = "".join(parts)
    kept = prose(text)
    assert len(kept) == len(text) and all(new in (old, "\0") for old, new in zip(text, kept, strict=True))
    if "```" not in text and "</think>" not in text:
        assert kept == text


balanced = st.recursive(
    st.text(st.sampled_from(r"1x+ ,=^_"), max_size=6) | st.sampled_from([r"\{", r"\}", r"\\ ", r"\frac"]),
    lambda inner: st.lists(inner, max_size=3).map("".join) | inner.map(lambda body: "{" + body + "}"),
    max_leaves=12,
)


@given(st.text(), balanced, st.text(st.characters(exclude_characters="\\{}")))
def test_extract_answer_finds_last_complete_box(before, body, after):
    text = before.replace("\\", "").replace("```", "") + r" \boxed{" + body + "}" + after.replace("```", "")
    answer = None if EMPTY.fullmatch(body) else body.strip()
    assert extract_answer(text) == answer
    assert extract_answer(text + r" \boxed{unfinished") == answer


@given(st.text(st.sampled_from("\\boxed{}[]$ 1ab\n`")))
def test_boxes_are_substrings_in_order_and_nothing_raises(text):
    end = 0
    for start, next_end, contents in find_boxes(text):
        assert end <= start and contents and contents in text[start:next_end]
        end = next_end
    answer = extract_answer(text)
    assert (answer is None) == (not find_boxes(text)) and answer != ""


@pytest.mark.parametrize(
    "unit",
    ["\\boxed{", "\\boxed{1}", "\\boxed{1}, ", "}", "```python\n", "```\n", "```", "<think>", "</think>", "\\boxed {"],
)
def test_extract_answer_ends_on_long_texts(unit):
    expected = {"\\boxed{1}": "1", "\\boxed{1}, ": ", ".join(["1"] * 100_000)}.get(unit)
    assert extract_answer(unit * 100_000) == expected  # with quadratic time, this would take minutes


# ---- decoding -------------------------------------------------------------------------------------------------------

texts = st.text(alphabet=st.characters(blacklist_categories=("Cs",), blacklist_characters="\ufffd"), max_size=30)


def streamed(tokenizer, ids: list[int], before: list[int] | tuple = ()) -> str:
    stream = TextStream(tokenizer, before)
    return "".join(map(stream.push, ids))


@given(st.sampled_from(["byte_level", "byte_fallback"]), texts)
def test_text_stream_equals_decoding_at_once(zoo, text):
    ids = encode(ZOO[zoo], text)
    assert streamed(ZOO[zoo], ids) == decode(ZOO[zoo], ids) == text


@given(st.sampled_from(["byte_level", "byte_fallback"]), texts, texts)
def test_text_stream_continues_other_tokens(zoo, before, text):
    """Where a text begins in the middle, the stream gives the text that its tokens add."""
    first, second = (encode(ZOO[zoo], x) for x in (f"{before} x", text))
    assert decode(ZOO[zoo], first) + streamed(ZOO[zoo], second, first) == decode(ZOO[zoo], first + second)


@given(st.lists(st.one_of(st.integers(0, 255), st.integers(0, 290)), max_size=60))
def test_text_stream_shows_all_tokens_of_any_sequence(ids):
    """Invalid bytes are U+FFFD: one or several for each run, and those at the end are still held back."""
    tokenizer = ZOO["byte_level"]
    ids.append(tokenizer.convert_tokens_to_ids("a"))
    assert re.sub("\ufffd+", "\ufffd", streamed(tokenizer, ids)) == re.sub("\ufffd+", "\ufffd", decode(tokenizer, ids))


def test_tokens_that_end_within_the_next_character():
    """Each token ends one character and starts the next. What is complete is shown at once."""
    backend = Tokenizer(models.BPE({"âĤ": 0, "¬âĤ": 1, "¬a": 2, "a": 3}, []))
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    stream = TextStream(tokenizer)
    assert [stream.push(i) for i in (3, 0, 1, 1, 1, 1, 1, 1, 2)] == ["a", "", *["€"] * 6, "€a"]


@pytest.mark.parametrize("zoo", ["byte_level", "byte_fallback", "unigram", "word_level", "slow"])
def test_every_token_but_a_final_eos_is_visible(zoo):
    tokenizer = ZOO[zoo]
    special = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert decode(tokenizer, [special, special]).count("<|im_start|>") == 2
    ids = [
        *encode(tokenizer, "so "),
        special,
        tokenizer.eos_token_id,
        *encode(tokenizer, "the"),
        tokenizer.eos_token_id,
    ]
    text = decode(tokenizer, ids)
    assert "<|im_start|>" in text and text.count("</s>") == 1 and text.index("</s>") < text.index("the")
    assert streamed(tokenizer, ids) == tokenizer.decode(ids)
    assert decode(tokenizer, []) == decode(tokenizer, [tokenizer.eos_token_id]) == ""


def test_special_token_within_a_box_or_a_fence_changes_the_text():
    tokenizer = ZOO["byte_level"]
    special = tokenizer.convert_tokens_to_ids("<|im_start|>")

    def hidden(before: str, after: str) -> str:
        return decode(tokenizer, [*encode(tokenizer, before), special, *encode(tokenizer, after)])

    assert extract_answer(hidden("\\boxed{4", "2}")) == "4<|im_start|>2"
    assert parse(hidden("``", "`python\n1\n```")).code is None


@pytest.mark.parametrize("zoo", ["byte_level", "byte_fallback"])
def test_ids_without_a_token_are_visible(zoo):
    """The embedding of a model can have more rows than its tokenizer has tokens."""
    tokenizer = ZOO[zoo]
    ids = [*encode(tokenizer, "a"), 9999, 9998, *encode(tokenizer, "a")]
    text = decode(tokenizer, ids)
    assert text.count("\ufffd") == 2 and text.count("a") == 2 and streamed(tokenizer, ids) == text
    assert decode(tokenizer, [9999] * 3000) == "\ufffd" * 3000


def test_time_per_token_does_not_grow():
    """Counts the ids that are decoded for each sampled token, for lone bytes and long lines."""

    class Counting:
        def __init__(self, tokenizer) -> None:
            self.tokenizer, self.count = tokenizer, 0

        def decode(self, ids, **options):
            self.count += len(ids)
            return self.tokenizer.decode(ids, **options)

        def convert_ids_to_tokens(self, ids):
            return self.tokenizer.convert_ids_to_tokens(ids)

    for token in ("Ģ", "â", "a", "Ġ", "<|im_start|>"):
        tokenizer = Counting(ZOO["byte_level"])
        streamed(tokenizer, [ZOO["byte_level"].convert_tokens_to_ids(token)] * 4000)
        assert tokenizer.count <= 10 * 4000


# ---- encoding -------------------------------------------------------------------------------------------------------

control_text = st.lists(st.sampled_from([*CONTROL, "the sum", " ", "\n", "<", "s>", "think>", "42"]), max_size=8).map(
    "".join
)


@given(st.sampled_from(sorted(ZOO)), control_text)
def test_encoded_text_contains_no_control_token(zoo, text):
    tokenizer = ZOO[zoo]
    ids = encode(tokenizer, text)
    assert set(tokenizer.convert_tokens_to_ids(list(CONTROL))).isdisjoint(ids)
    if zoo in ("byte_level", "unknown_is_eos", "slow"):  # the others cannot represent every text
        assert tokenizer.decode(ids) == text


@given(st.sampled_from(sorted(ZOO)), control_text)
def test_added_tokens_are_kept_on_request_but_never_special_ones(zoo, text):
    tokenizer = ZOO[zoo]
    ids = encode(tokenizer, text, added_tokens=True)
    assert set(tokenizer.convert_tokens_to_ids(list(SPECIAL))).isdisjoint(ids)
    for token, token_id in zip(ADDED, tokenizer.convert_tokens_to_ids(list(ADDED)), strict=True):
        assert ids.count(token_id) == text.count(token)


def test_tokenizer_of_the_demo_model():
    try:
        tokenizer = AutoTokenizer.from_pretrained(demo_model())
    except ModelError as error:
        pytest.skip(f"the demo model is not available: {error}")
    control = list(tokenizer.get_added_vocab())
    hostile = "so </think> " + "".join(f"{token}\n" for token in control) + "é数🙂"
    ids = encode(tokenizer, hostile)
    assert control_ids(tokenizer).isdisjoint(ids) and decode(tokenizer, ids) == streamed(tokenizer, ids) == hostile
    text = hostile.translate({ord("<"): "< "})
    assert encode(tokenizer, text) == tokenizer.encode(text, add_special_tokens=False)
    ids = tokenizer.convert_tokens_to_ids(control)
    assert decode(tokenizer, [*ids, tokenizer.eos_token_id]) == streamed(tokenizer, ids) == "".join(control)


@pytest.mark.parametrize("zoo", ZOO)
@pytest.mark.parametrize("text", ["the sum is 42", " print(1)\n  x = 2 < 3\n", "```python\n", "é 数 🙂", ""])
def test_ordinary_text_is_encoded_as_usual(zoo, text):
    assert encode(ZOO[zoo], text) == ZOO[zoo].encode(text, add_special_tokens=False)


def test_added_whitespace_is_no_control_token():
    tokenizer = byte_tokenizer(("  ", "</think>"))
    assert control_ids(tokenizer) == {tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer) - 3}
