r"""Text and tokens: code blocks, boxed answers, and decoding of token ids.

A code block opens with a line that starts with "```python" and closes with a line that contains only "```". All other
fences ("```output", "```py", backticks inside a line) are ordinary text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tokenizers import Tokenizer

OPEN, CLOSE = "```python", "```"
BOX_TOKENS = re.compile(r"\\boxed\s*\{|\\boxed\s*(?P<bare>[-+]?\d[\d.,/]*|[A-Za-z]\b)|\\.|[{}]", re.DOTALL)


class FenceParser:
    r"""Incremental parser that finds the first code block of a text. Engines use it as a stop rule.

    The block closes as soon as its last line reads "```", without waiting for a newline, which would cost one more
    token per block. The result can therefore depend on how a line is split: a piece that ends in "\n```" closes the
    block even if the next piece continues that line. `text` includes what follows the closing fence in the last piece.

    Attributes (character offsets into `text`, the text fed so far; -1 while unknown):
        open_at: start of the opening fence     code_at: start of the code
        code_end: end of the code               close_end: end of the closing fence
    """

    def __init__(self) -> None:
        self.text = ""
        self.open_at = self.code_at = self.code_end = self.close_end = -1
        self._line = 0  # start of the current line

    @property
    def closed(self) -> bool:
        return self.close_end >= 0

    @property
    def code(self) -> str | None:
        """Source code of the block, or None until the block is closed."""
        return self.text[self.code_at : self.code_end].replace("\r\n", "\n") if self.closed else None

    def feed(self, piece: str) -> bool:
        """Parse the next piece of text. Return True once the block is closed, where the policy's turn ends."""
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
    """Return True if the line opens a Python block: "```python", alone or followed by whitespace and any text."""
    return line.startswith(OPEN) and not line[len(OPEN) : len(OPEN) + 1].strip()


def extract_answer(text: str) -> str | None:
    r"""Return the stripped contents of the last complete \boxed{...} (or "\boxed 5"), or None if there is none.

    Braces are matched; escaped braces are ignored. Of nested boxes, the innermost is returned.
    """
    answer, answer_start = None, -1
    open_braces: list[int | None] = []  # where a box's contents start; None for any other brace
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
    """Incremental decoder of token ids. It holds back a character until all of its bytes have arrived.

    Some tokenizers decode the first token of a text differently. Each piece is therefore decoded together with the
    tokens of the piece before it. `before` holds the tokens that precede the stream; only the last one is used.
    """

    def __init__(self, tokenizer, before: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self._context = list(before[-1:])
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """Return the text that this token completes; empty if it ends within a character."""
        self._pending.append(token_id)
        before, after = decode(self.tokenizer, self._context), decode(self.tokenizer, self._context + self._pending)
        if after.endswith("\ufffd"):
            return ""
        self._context, self._pending = self._pending, []
        return after[len(before) :]


def decode(tokenizer, token_ids: list[int]) -> str:
    """Decode token ids without special tokens and without cleaning up spaces."""
    return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def encode(tokenizer, text: str, added_tokens: bool = False) -> list[int]:
    """Encode text as plain text: without BOS or EOS, and never as a special token, whatever the text looks like.

    added_tokens: False, for text from outside (questions, tool output), which then contains no added token either.
    True, for text that the policy wrote, where "</think>" is the token of that name if the tokenizer has one.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)  # only fast tokenizers have one
    if backend is None or added_tokens:  # split_special_tokens makes slow tokenizers split all added tokens
        split = backend is not None or not added_tokens
        ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=split)
    else:
        plain = Tokenizer(backend.model)  # shares the model, but has no added tokens
        plain.normalizer, plain.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
        ids = plain.encode(text, add_special_tokens=False).ids
    control = control_ids(tokenizer, special_only=added_tokens)
    if control.isdisjoint(ids):
        return ids
    plain_ids = []  # the vocabulary itself can contain control tokens (Unigram): use their characters instead
    for token_id in ids:
        if token_id not in control:
            plain_ids.append(token_id)
            continue
        characters = list(tokenizer.convert_ids_to_tokens(token_id))
        if backend is None:
            plain_ids += tokenizer.convert_tokens_to_ids(characters)
        else:
            plain_ids += [token.id for character in characters for token in backend.model.tokenize(character)]
    return plain_ids


def control_ids(tokenizer, special_only: bool = False) -> set[int]:
    """Ids of special tokens and, unless `special_only`, of other added tokens that are not whitespace.

    The unknown token is not among them, because any text may contain it.
    """
    ids = set(tokenizer.all_special_ids)
    for token_id, token in tokenizer.added_tokens_decoder.items():
        if token.special or (not special_only and token.content.strip()):
            ids.add(token_id)
    return ids - {tokenizer.unk_token_id}


def start_ids(tokenizer) -> list[int]:
    """The tokens that the tokenizer puts before every text: BOS, or none."""
    whole, bare = (tokenizer.encode("a", add_special_tokens=added) for added in (True, False))
    return whole[: next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)]


def encode_around(tokenizer, pieces: Sequence[str], inserted: str) -> list[int]:
    """Encode `inserted.join(pieces)`, where only `pieces` can contain control tokens.

    This is the tokenizer's usual encoding of the whole text, unless `inserted` would add control tokens to it. Then
    the parts are encoded separately.
    """

    def encoded(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    def count(ids: list[int]) -> int:
        return sum(token_id in control for token_id in ids)

    control, parts = control_ids(tokenizer), [encoded(piece) for piece in pieces]
    ids = encoded(inserted.join(pieces))
    if count(ids) == sum(map(count, parts)):
        return ids
    ids = parts[0]
    for part in parts[1:]:
        ids = ids + encode(tokenizer, inserted) + part
    return ids
