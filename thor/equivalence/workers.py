"""Worker processes that compare the values of expressions, within limits on time and memory.

A prediction is arbitrary model output: its value may take forever, exhaust the memory or crash the process. A worker
starts when a comparison needs one and all others are busy, and is used again. It imports neither torch nor sympy, and
ends with its parent, even if that is killed.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading

MAX_WORKERS = 8
MEMORY_BYTES = 1 << 29  # limit on the address space of each worker
STARTUP_SECONDS = 120  # limit on the start of a worker, on a busy machine


class Worker:
    """One process. A request is a line of JSON, the reply is one byte."""

    def __init__(self) -> None:
        # "-c" with this sys.path: does not run the user's __main__ again, and works if thor is not installed.
        code = f"import sys; sys.path[:] = {sys.path!r}; import thor.equivalence.workers as w; w.serve({os.getpid()})"
        pipe = subprocess.PIPE
        # A new session gets no Ctrl-C. The worker ends when its stdin is closed.
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=pipe, stdout=pipe, bufsize=0, start_new_session=True
        )
        try:
            if self.read(STARTUP_SECONDS) != b"R":
                raise RuntimeError("a worker process of thor.verify could not be started, see stderr")
        except BaseException:
            self.close()
            raise

    def read(self, timeout: float) -> bytes | None:
        """Return the reply, b"" if the process has ended, or None after `timeout` seconds."""
        poll = select.poll()
        poll.register(self.process.stdout, select.POLLIN)
        return self.process.stdout.read(1) if poll.poll(timeout * 1000) else None

    def ask(self, prediction: str, gold: str, timeout: float) -> bytes | None:
        try:
            self.process.stdin.write(json.dumps([prediction, gold, timeout]).encode() + b"\n")
        except BrokenPipeError:
            return b""
        return self.read(timeout)

    def close(self) -> None:
        self.process.kill()
        self.close_pipes()
        self.process.wait()

    def close_pipes(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()


class Pool:
    """At most `size` workers, shared by all threads."""

    def __init__(self, size: int) -> None:
        self.size, self.slots = size, threading.Semaphore(size)
        self.lock = threading.Lock()  # of the attributes below
        self.idle: list[Worker] = []
        self.timeouts = 0

    def compare(self, prediction: str, gold: str, timeout: float) -> bool:
        """Return the reply of a worker. A comparison over its limits is False, and costs one worker."""
        timeout = max(timeout, 0.001)
        with self.slots:
            for attempt in range(2):  # the first worker may have died for a reason other than this comparison
                with self.lock:
                    worker = self.idle.pop() if self.idle and attempt == 0 else None
                worker = worker or Worker()
                try:
                    reply = worker.ask(prediction, gold, timeout)
                except BaseException:  # such as Ctrl-C: this reply must not be read as that of the next comparison
                    worker.close()
                    raise
                if reply:
                    with self.lock:
                        self.idle.append(worker)
                    return reply == b"1"
                worker.close()
                if reply is None:
                    with self.lock:
                        self.timeouts += 1
                    return False
        return False

    def close(self) -> None:
        """End the idle workers."""
        with self.lock:
            workers, self.idle = self.idle, []
        for worker in workers:
            worker.close()

    def forget(self) -> None:
        """Start again without workers, in a forked child: the workers and the lock belong to its parent."""
        for worker in self.idle:
            worker.close_pipes()
            worker.process.returncode = 0  # it is not for this process to wait for it
        self.__init__(self.size)


def serve(parent: int) -> None:
    """Run the main loop of a worker, until its stdin is closed or the process `parent` is gone."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    from thor.equivalence.compare import equal
    from thor.equivalence.numeric import identical

    os.write(1, b"R")
    with contextlib.suppress(BrokenPipeError):
        while True:
            while not select.select([0], [], [], 2)[0]:  # another process may have inherited the other end of the pipe
                if os.getppid() != parent:
                    return
            line = sys.stdin.buffer.readline()
            if not line:
                return
            prediction, gold, timeout = json.loads(line)
            signal.setitimer(signal.ITIMER_REAL, timeout + 1)  # the parent kills the worker earlier, unless it is gone
            try:
                same = equal(prediction, gold, identical)
            except Exception:  # includes MemoryError and RecursionError
                same = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.write(1, b"1" if same else b"0")


pool = Pool(min(MAX_WORKERS, len(os.sched_getaffinity(0))))
os.register_at_fork(after_in_child=pool.forget)
atexit.register(pool.close)
