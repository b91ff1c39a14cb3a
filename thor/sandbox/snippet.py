"""Run one snippet in a child process and report how it ended."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import socket
import sys
import threading
import traceback
import types

from thor.sandbox.protocol import EXIT_BLOCKED, EXIT_ERROR, EXIT_MEMORY

SNIPPET = "<snippet>"  # file name of the user's code in tracebacks


class CappedRaw(io.RawIOBase):
    """Stdout that discards everything after the first `left` bytes, so that endless printing costs little.

    It is not buffered, so what was printed before a timeout or a crash arrives.
    """

    def __init__(self, left: int):
        self.left = left

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 1

    def write(self, data) -> int:
        data = memoryview(data).cast("B")
        kept = data[: self.left]
        self.left -= len(kept)
        while kept:
            kept = kept[os.write(1, kept) :]
        return len(data)


def describe(error: BaseException) -> str:
    """Return the last line of the traceback and the line number in the snippet where the error occurred."""
    lines = traceback.format_exception_only(type(error), error)
    text, line = "".join(lines)[:2000].replace("\n", " "), None
    if isinstance(error, SyntaxError):  # its other lines repeat the source
        text, line = lines[-1], error.lineno
    if isinstance(error, ImportError):  # a module that is built into one Python is a file of another
        text = text.replace(f" ({error.path or 'unknown location'})", "")
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == SNIPPET:
            line = trace.tb_lineno
        trace = trace.tb_next
    return text.strip() + (f" (line {line})" if line else "")


def was_blocked(error: BaseException | None) -> bool:
    """Whether the sandbox refused an operation: this error or one that caused it (urllib, for example, wraps them)."""
    for _ in range(20):
        refused = isinstance(error, OSError) and error.errno in (errno.EPERM, errno.EACCES, errno.EROFS)
        if refused or isinstance(error, socket.gaierror):
            return True
        error = error and (error.__cause__ or error.__context__)
    return False


def run_snippet(source: bytes, channel: int, cap: int) -> int:
    """Run `source` as `__main__`, write the error line to the descriptor `channel` and return the exit status.

    cap: bytes of stdout to pass on.
    """
    out = io.TextIOWrapper(CappedRaw(cap), encoding="utf-8", errors="replace", write_through=True)
    sys.stdout = sys.__stdout__ = out
    sys.modules["__main__"] = module = types.ModuleType("__main__")
    status, text = 0, ""
    try:
        try:
            exec(compile(source.decode("utf-8", "surrogatepass"), SNIPPET, "exec"), module.__dict__)
        finally:
            for thread in threading.enumerate():  # the interpreter does the same at exit
                if thread is not threading.main_thread() and not thread.daemon:
                    thread.join()
    except SystemExit as error:
        if error.code not in (None, 0):
            status, text = EXIT_ERROR, f"SystemExit: {error.code}"
    except BaseException as error:
        status = EXIT_MEMORY if isinstance(error, MemoryError) else EXIT_BLOCKED if was_blocked(error) else EXIT_ERROR
        try:
            text = describe(error)
        except BaseException:  # a hostile __str__, or no memory left
            text = type(error).__name__
    with contextlib.suppress(Exception):
        os.write(channel, text.encode("utf-8", "replace"))
    return status
