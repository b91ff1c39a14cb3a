"""Make what a snippet prints the same on every machine, so that a model reads the same tokens everywhere."""

from __future__ import annotations

import re
from collections.abc import Iterable

PREFIX, LIBRARIES, TEMPORARY = "/usr", "/usr/lib/python3", "/box/tmp"
ADDRESS = re.compile(r"( at 0x)[0-9a-fA-F]{6,16}(?=[>,;:])")  # as in <function f at 0x7f3b5c1d2e80>


class Portable:
    """Replaces paths of this machine's Python and of the temporary folders, and the addresses of objects.

    prefixes: where Python is installed; shown as PREFIX. libraries: folders that it imports from; shown as LIBRARIES.
    folder: parent of the temporary folders, each of which is shown as TEMPORARY; '' if they are there already.
    """

    def __init__(self, prefixes: Iterable[str], libraries: Iterable[str], folder: str = ""):
        names = {re.escape(path.rstrip("/")): PREFIX for path in prefixes}
        names |= {re.escape(path.rstrip("/")): LIBRARIES for path in libraries}
        names |= {re.escape(folder) + r"/\w+": TEMPORARY} if folder else {}
        names.pop("", None)
        paths = sorted(names, key=len, reverse=True)  # the folder of a library before the prefix that contains it
        self.names = [names[path] for path in paths]
        self.pattern = re.compile(rf"(?<!\w)(?:{'|'.join(f'({path})' for path in paths)})(?!\w)")

    def __call__(self, text: str) -> str:
        text = self.pattern.sub(lambda match: self.names[match.lastindex - 1], text)
        return ADDRESS.sub(r"\g<1>7f0000000000", text)
