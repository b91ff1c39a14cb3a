"""Trajectories in a terminal: colours, and no control sequences from text that a model or a tool wrote."""

from __future__ import annotations

import os
import sys

COLOURS = {"question": "1", "code": "36", "output": "32", "correction": "33"}  # SGR codes of the styles
# a printed escape sequence could rename the window, move the cursor or hide text
_VISIBLE = {c: f"\\x{c:02x}" for c in (*range(32), *range(127, 160)) if chr(c) not in "\n\t"}


def printable(text: str) -> str:
    r"""The text with control characters but line breaks and tabs as `\x1b` and the like."""
    return text.translate(_VISIBLE)


class Terminal:
    """Writes text in the colour of its style, if the stream is a terminal and NO_COLOR is not set."""

    def __init__(self, stream=None) -> None:
        self.stream = stream or sys.stdout
        self.colour = self.stream.isatty() and "NO_COLOR" not in os.environ

    def write(self, style: str, text: str) -> None:
        """Write a piece of text at once. Control characters are made visible."""
        text = printable(text)
        coloured = self.colour and text and style in COLOURS
        self.stream.write(f"\033[{COLOURS[style]}m{text}\033[0m" if coloured else text)
        self.stream.flush()
