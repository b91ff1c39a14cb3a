r"""Text and tokens: code blocks, boxed answers, and the conversion between text and token ids.

A code block opens with a line "```python" and closes with a line "```". The tag may also be "py" or "python3", in any
case, after spaces and before other words; both lines may be indented, as in a list. All other fences are text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

FENCE = "```"
OPENING = re.compile(r"```[^\S\n]*(?:python3?|py)(?:[^\S\n][^`\n]*)?", re.IGNORECASE)
NOT_BLANK = re.compile(r"\S")


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
        self._first = -1  # its first character that is not blank
        self._indent = ""  # before the opening fence

    @property
    def closed(self) -> bool:
        return self.close_end >= 0

    @property
    def code(self) -> str | None:
        """Source code of the block, without the indentation of its fence, or None until the block is closed."""
        if not self.closed:
            return None
        code, width = self.text[self.code_at : self.code_end].replace("\r\n", "\n"), len(self._indent.expandtabs(4))
        if width:
            code = re.sub(r"^[ \t]+", lambda blanks: blanks[0].expandtabs(4)[width:], code, flags=re.MULTILINE)
        return code

    def feed(self, piece: str) -> bool:
        """Parse the next piece of text. Return True once the block is closed, where the policy's turn ends."""
        text, self.text = self.text, ""
        at = len(text)
        text += piece  # with one reference to the text, CPython appends in place, in time O(piece)
        self.text = text
        while not self.closed:
            newline = text.find("\n", at)
            end = newline if newline >= 0 else len(text)
            if self._first < 0 and (found := NOT_BLANK.search(text, at, end)):
                self._first = found.start()
            if self._first >= 0 and text.startswith(FENCE, self._first, end):
                self._parse_fence(end, complete=newline >= 0)
            if newline < 0:
                break
            self._line, self._first, at = newline + 1, -1, newline + 1
        return self.closed

    def _parse_fence(self, end: int, complete: bool) -> None:
        """Parse a line that starts with a fence and whose known text ends at `end`."""
        if self.code_at >= 0:
            if not NOT_BLANK.search(self.text, self._first + len(FENCE), end):
                self.code_end, self.close_end = self._line, self._first + len(FENCE)
        elif complete and OPENING.fullmatch(self.text, self._first, end):
            self._indent = self.text[self._line : self._first]
            self.open_at, self.code_at = self._first, end + 1


# ---- answers --------------------------------------------------------------------------------------------------------

# a fenced block with a tag other than those of mathematical text, up to its closing fence, "</think>" or the end
CODE_BLOCK = re.compile(
    r"^[^\S\n]*```[^\S\n]*(?!(?:latex|tex|math|markdown|md|te?xt|plaintext)\b)\w[^`\n]*(?:\n|\Z)"
    r"(?:.*\n)*?(?:[^\S\n]*```[^\S\n]*$|(?=</think>)|.*\Z)",
    re.IGNORECASE | re.MULTILINE,
)
THOUGHT = re.compile(r"\A.*?</think>|<think>.*?(?:</think>|\Z)|</think>", re.DOTALL)
BOX_TOKENS = re.compile(
    r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\boxed\s*(?P<bare>[-+]?\d[\d.,/]*|(?<=\s)[A-Za-z]\b)|\\.|[{}]", re.DOTALL
)
EMPTY = re.compile(r"(?:[\s~${}]|\\[,;:! ]|\\(?:q?quad|text|mathrm|mbox)(?![A-Za-z]))*")
HALF_SPACE = re.compile(r"(?<!\\)\\\Z")  # what `strip` leaves of "\\ "
MARKUP = re.compile(r"\s|[~$*{}]|(?<!\\)\\[()\[\],;:! ]|\\(?:text|mathrm|mbox)(?![A-Za-z])")
# between the boxes of a list, without MARKUP
LINK = re.compile(r"(?:[,;&，、]|\\\\|\\(?:q?quad|enspace|hspace[\w.]*|lor|vee)|and|or|和|或)+")


def prose(text: str) -> str:
    """The text with null characters in place of each character that belongs to a code block or a finished thought.

    Tool output is a block with the tag "output". Text without "</think>" has no finished thought.
    """

    def hide(match: re.Match) -> str:
        return "\0" * len(match[0])

    text = CODE_BLOCK.sub(hide, text)
    return THOUGHT.sub(hide, text) if "</think>" in text else text


def find_boxes(text: str) -> list[tuple[int, int, str]]:
    r"""(start, end, stripped contents) of each complete \boxed{...}, \fbox{...} or "\boxed 5" in the prose of a text.

    Braces are matched; escaped braces are ignored. Of nested boxes, only the innermost counts. Empty boxes do not.
    """
    text, boxes = prose(text), []
    open_braces: list[tuple[int, int] | None] = []  # of a box: start, and start of the contents; None for other braces
    for token in BOX_TOKENS.finditer(text):
        if token["bare"]:
            boxes.append((token.start(), token.end(), token["bare"].rstrip(".,/")))
        elif token["box"]:
            open_braces.append(token.span())
        elif token[0] == "{":
            open_braces.append(None)
        elif token[0] == "}" and open_braces and (box := open_braces.pop()):
            contents = text[box[1] : token.start()]
            if not EMPTY.fullmatch(contents) and not (boxes and boxes[-1][0] > box[0]):
                boxes.append((box[0], token.end(), HALF_SPACE.sub("", contents.strip())))
    return boxes


def extract_answer(text: str) -> str | None:
    r"""Return the contents of the last box in the prose of a text (see `find_boxes`), or None if it has no box.

    Boxes that only commas, "and", "or", \quad and the like separate are one list: "\boxed{2} and \boxed{9}" is "2, 9".
    """
    boxes = find_boxes(text)
    first = len(boxes) - 1
    while first > 0 and LINK.fullmatch(MARKUP.sub("", text[boxes[first - 1][1] : boxes[first][0]])):
        first -= 1
    return ", ".join(contents for _, _, contents in boxes[first:]) or None


# ---- tokens ---------------------------------------------------------------------------------------------------------


class TextStream:
    """Incremental decoder of token ids. It holds back a character until all of its bytes have arrived.

    Some tokenizers decode the first token of a text differently. Each piece is therefore decoded together with the
    tokens of the piece before it. `before` holds the tokens that precede the stream; only the last ones are used.
    """

    def __init__(self, tokenizer, before: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self._context: list[int] = []
        self._pending: list[int] = []
        self._shown = 0  # length of the text of `_context` that was returned
        for token_id in before[-8:]:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        """Return the text that this token completes; empty if it ends within a character. Invalid bytes are U+FFFD."""
        self._pending.append(token_id)
        text = _text(self.tokenizer, self._context + self._pending)
        end = len(text.rstrip("\ufffd"))  # an incomplete character decodes to U+FFFD, one or several
        held = len(text) - end
        if held and end <= self._shown:
            if len(self._pending) < 4:
                return ""
            # a character has at most four tokens, so the first of these four holds invalid bytes
            done, self._pending = self._pending[:1], self._pending[1:]
            text, held = _text(self.tokenizer, self._context + done), 0
            end = len(text)
        else:  # a character that is still incomplete starts in this token, or nothing would have become complete
            done, self._pending = self._pending[-1:] if held else self._pending, []
        piece, self._context = text[self._shown : end], done
        self._shown = len(_text(self.tokenizer, done)) - held
        return piece


def _text(tokenizer, token_ids: list[int]) -> str:
    """Text of token ids, special tokens included. An id without a token becomes U+FFFD."""
    text, start, options = "", 0, {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    for i, token in enumerate(tokenizer.convert_ids_to_tokens(token_ids)):
        if token is None:
            text += tokenizer.decode(token_ids[start:i], **options) + "\ufffd"
            start = i + 1
    return text + tokenizer.decode(token_ids[start:], **options)


def decode(tokenizer, token_ids: Sequence[int]) -> str:
    """Text of token ids, in which every token is visible, special tokens too, except for one EOS at the end."""
    ids = list(token_ids)
    return _text(tokenizer, ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids)


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
        plain = type(backend)(backend.model)  # shares the model, but has no added tokens
        plain.normalizer, plain.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
        ids = plain.encode(text, add_special_tokens=False).ids
    control = special_ids(tokenizer) if added_tokens else control_ids(tokenizer)
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


def unknown_ids(tokenizer) -> set[int]:
    """The unknown token, which any text may contain. Tokenizers of bytes need none (GPT-2's names its EOS)."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    return set() if getattr(model, "unk_token", "any") is None else {tokenizer.unk_token_id}


def special_ids(tokenizer) -> set[int]:
    """Ids of the special tokens, except for the unknown token."""
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(i for i, token in added if token.special)} - unknown_ids(tokenizer)


def control_ids(tokenizer) -> set[int]:
    """Ids of special and other added tokens, except for the unknown token and whitespace."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    return special_ids(tokenizer) | (added - unknown_ids(tokenizer))


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

    control, parts = control_ids(tokenizer), [encoded(piece) for piece in pieces]
    ids = encoded(inserted.join(pieces))
    if [i for i in ids if i in control] == [i for part in parts for i in part if i in control]:
        return ids
    ids = parts[0]
    for part in parts[1:]:
        ids = ids + encode(tokenizer, inserted) + part
    return ids
