"""Runs untrusted Python snippets; see `executor.py`."""

from thor.sandbox.executor import Executor

__all__ = ["Executor"]
