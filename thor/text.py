r"""Where a step's code block opens and closes, and where the answer stands, in text that arrives piece by piece.

A block opens at a line that starts with "```python" and closes at a line that is "```" alone. Any other fence
("```output", "```py", backticks inside a line) is text like any other. See DESIGN: the text of a step.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

OPEN, CLOSE = "```python", "```"
BOX_TOKENS = re.compile(r"\\boxed\s*\{|\\boxed\s*(?P<bare>[-+]?\d[\d.,/]*|[A-Za-z]\b)|\\.|[{}]", re.DOTALL)


class FenceParser:
    r"""Incremental parser of one turn of the policy; it is also the stop rule that an engine feeds.

    The block counts as closed as soon as its last line reads "```": waiting for the newline would cost a token in every
    block. So a piece that ends in "\n```" closes it even where more was to come on that line, while the same text in
    one piece does not. Text after the closing line in the same piece is left alone.

    Attributes (character offsets into all text fed so far; -1 until known):
        open_at: start of the line "```python"    code_at: first character of the code
        code_end: end of the code                 close_end: just behind the closing backticks
    """

    def __init__(self) -> None:
        self.text = ""
        self.open_at = self.code_at = self.code_end = self.close_end = -1
        self._line = 0  # start of the line being read

    @property
    def closed(self) -> bool:
        return self.close_end >= 0

    @property
    def is_open(self) -> bool:
        return self.code_at >= 0 and not self.closed

    @property
    def code(self) -> str | None:
        """Source of the closed block, None while there is none."""
        return self.text[self.code_at : self.code_end].replace("\r\n", "\n") if self.closed else None

    def feed(self, piece: str) -> bool:
        """Take the next piece of text; True once the block is closed (the policy's turn ends there)."""
        self.text += piece
        while not self.closed:
            newline = self.text.find("\n", self._line)
            line = self.text[self._line : newline if newline >= 0 else len(self.text)]
            if self.code_at >= 0 and line.rstrip() == CLOSE:
                self.code_end, self.close_end = self._line, self._line + len(CLOSE)
            if newline < 0:
                break
            if self.code_at < 0 and opens_block(line):
                self.open_at, self.code_at = self._line, newline + 1
            self._line = newline + 1
        return self.closed


def opens_block(line: str) -> bool:
    """True for a line that opens a Python block: "```python", alone or with an info string behind white space."""
    return line.startswith(OPEN) and not line[len(OPEN) : len(OPEN) + 1].strip()


def extract_answer(text: str) -> str | None:
    r"""Contents of the last complete \boxed{...} (or "\boxed 5"), stripped; None where there is none.

    Braces are balanced, "\{" and "\}" do not count. Of nested boxes the innermost is taken.
    """
    answer, answer_start = None, -1
    open_braces: list[int | None] = []  # where the contents of a box begin; None for other braces
    for token in BOX_TOKENS.finditer(text):
        if token["bare"]:
            answer, answer_start = token["bare"].rstrip(".,/"), token.start()
        elif token[0] in ("{", "}") or token[0].startswith(r"\boxed"):
            if token[0] != "}":
                open_braces.append(None if token[0] == "{" else token.end())
            elif open_braces:
                start = open_braces.pop()
                if start is not None and start > answer_start:
                    answer, answer_start = text[start : token.start()].strip(), start
    return answer


class TextStream:
    """Text of a growing list of token ids, piece by piece; a character split over tokens waits for its last byte.

    Each piece is what `decode` says beyond the text of the previous piece's tokens, which stay in view as context:
    some tokenizers treat the first token of a text differently. before: the tokens that the list continues.
    """

    def __init__(self, tokenizer, before: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self._context = list(before[-1:])
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        self._pending.append(token_id)
        before, after = decode(self.tokenizer, self._context), decode(self.tokenizer, self._context + self._pending)
        if after.endswith("\ufffd"):
            return ""
        self._context, self._pending = self._pending, []
        return after[len(before) :]


def decode(tokenizer, token_ids: list[int]) -> str:
    """Text of ids, character for character, without special tokens."""
    return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def encode(tokenizer, text: str) -> list[int]:
    """Ids of a text on its own; text that looks like a special token (tool output may) stays ordinary text."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
