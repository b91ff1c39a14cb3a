"""Sandboxed execution of untrusted Python snippets. `executor.py` documents the threat model."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from thor.sandbox.executor import Executor

__all__ = ["Executor"]


# The server process imports this package for `server.py` alone. A lazy import keeps the executor and its dependencies
# out of that process. Putting this folder on the server's sys.path would do so too, but then the modules would have two
# names (`thor.sandbox.kernel` and `kernel`), and the short ones could hide a library that snippets import.
def __getattr__(name: str) -> type[Executor]:
    if name != "Executor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from thor.sandbox.executor import Executor

    return Executor
