"""Sandboxed execution of untrusted Python snippets, each in a fresh restricted process, with millisecond latency.

A separate server process (`server.py`) has the math libraries loaded and keeps a pool of forked children that wait for
a snippet.

Threat model: as far as `Executor.protection` reports it (Linux), a snippet cannot
- read or modify files, apart from reading those of Python itself;
- use the network, or signal and inspect other processes;
- leave processes, files or state behind;
- exceed its limits on time, memory, output, files and threads;
- fake success: the status of a result comes from the exit status that the kernel reports. The output and the error text
  are under the control of the snippet.

Out of scope: kernel bugs, side channels (timing, caches, load), and the use of the CPU time and memory that a snippet
is granted. So are systems without the protection layers (macOS has few of them): a warning names each missing layer,
and `require=` makes a layer mandatory. Against a determined attacker, run everything in a virtual machine.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from concurrent.futures import Future
from pathlib import Path

from thor.sandbox.portable import Portable
from thor.sandbox.protection import LAYERS, check_protection, protection_status
from thor.sandbox.protocol import CHILD, EXIT_BLOCKED, EXIT_ERROR, EXIT_MEMORY, KILL, RECORD
from thor.trajectory import ExecResult

OUTPUT_CAP = 2**16  # bytes of stdout kept
ERROR_CAP = 2**13  # bytes of the error text kept
MAX_READS = 64  # reads of a pipe after the end of its child
START_TIMEOUT = 180.0  # seconds for the server to import and warm up
KILL_GRACE = 0.25  # seconds after a kill until the result is delivered even if the server has not reported the exit
STALL_TIMEOUT = 30.0  # seconds without a response, or without a free child for a queued snippet: the server is broken
MAX_RESTARTS = 3  # restarts without any result in between, after which queued snippets get 'infra'
SIGNALS = {int(number): number.name for number in signal.Signals}
_executors: weakref.WeakSet[Executor] = weakref.WeakSet()


class Job:
    """A snippet and the future of its result."""

    def __init__(self, code: str):
        self.source, self.future, self.tries = code.encode("utf-8", "surrogatepass"), Future(), 0


class Child:
    """The executor's view of one forked child.

    channel: socket that carries the code to the child and the error line back. out: descriptor of its stdout.
    """

    def __init__(self, pid: int, channel: socket.socket, out: int):
        self.pid, self.channel, self.out = pid, channel, out
        channel.setblocking(False)
        os.set_blocking(out, False)
        self.job: Job | None = None
        self.ready = self.killed = self.answered = False
        self.unsent = memoryview(b"")
        self.stdout, self.error = bytearray(), bytearray()
        self.started = self.deadline = 0.0


class Executor:
    """A thread-safe pool of restricted Python interpreters. Use it as a context manager, or call `close()`.

    workers: number of snippets that run in parallel (default: the CPUs available to this process).
    timeout: limit of a snippet in seconds, for wall clock time and for CPU time.
    memory_mb: limit on the address space of a snippet in MiB, in addition to the loaded libraries.
    preload: modules that the server imports in advance; modules that are not installed are skipped.
    require: names in `protection` that must be available.

    `protection` maps the names in `protection.GUARANTEES` and `protection.LAYERS` to whether each is in force.

    Raises ValueError for arguments out of range or unknown names in `require`, and RuntimeError if the server does not
    start or a required protection is not available.
    """

    _layers = tuple(LAYERS)  # tests and benchmarks use fewer

    def __init__(
        self,
        workers: int | None = None,
        timeout: float = 10.0,
        memory_mb: int = 1024,
        preload: tuple[str, ...] = ("numpy", "sympy", "mpmath", "scipy.optimize", "scipy.integrate"),
        require: tuple[str, ...] = (),
    ):
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.workers, self.timeout, self.memory_mb = cpus if workers is None else workers, timeout, memory_mb
        if min(self.workers, timeout, memory_mb) <= 0:
            raise ValueError(f"workers, timeout and memory_mb must be positive: {workers}, {timeout}, {memory_mb}")
        self._require = (require,) if isinstance(require, str) else tuple(require)
        self.protection: dict[str, bool] = {}
        self._config = {
            "timeout": timeout,
            "memory_mb": memory_mb,
            "preload": tuple(preload),
            "output_cap": OUTPUT_CAP + 1,  # one byte more, to detect that there was more
            "children": 2 * self.workers + 1,
            "layers": self._layers,
            "caller": os.getpid(),  # unused by the server; identifies this process in process lists
        }
        self._queue: deque[Job] = deque()
        self._children: dict[int, Child] = {}
        self._idle: deque[Child] = deque()
        self._running = self._restarts = 0
        self._closing, self._alive = False, True
        self._starved = 0.0  # time since when queued snippets lack a free child; 0 if they do not
        self._process: subprocess.Popen | None = None
        self._folder = ""
        self._lock = threading.Lock()  # guards appends to _queue, and _closing; the loop thread owns everything else
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_read, selectors.EVENT_READ, lambda: os.read(self._wake_read, 4096))
        self._thread = threading.Thread(target=self._loop, name="thor-executor", daemon=True)
        try:
            self._start_server()
        except BaseException:
            self._shut_down()
            raise
        self._thread.start()
        _executors.add(self)

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def run(self, codes: list[str]) -> list[ExecResult]:
        """Run the snippets concurrently and return their results in the order of `codes`."""
        return [future.result() for future in [self.submit(code) for code in codes]]

    def submit(self, code: str) -> Future[ExecResult]:
        """Queue one snippet. The future always receives an ExecResult, never an exception.

        Raises RuntimeError if the executor is closed.
        """
        job = Job(code)
        with self._lock:
            if self._closing:
                raise RuntimeError("this Executor is closed")
            self._queue.append(job)
            self._wake()
        return job.future

    def close(self) -> None:
        """Kill running snippets, stop the server and wait for both. Unfinished snippets get 'infra'. Idempotent."""
        with self._lock:
            if not self._closing:
                self._closing = True
                self._wake()
        self._thread.join()

    # ---- event loop (runs in its thread) ----

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # the pipe is full, so the loop will wake anyway
            os.write(self._wake_write, b"w")

    def _loop(self) -> None:
        try:
            while not self._closing:
                if not self._alive and (self._queue or self._restarts < MAX_RESTARTS):
                    self._restart_server()
                self._dispatch()
                starved = bool(self._queue) and not self._idle and self._running < self.workers
                self._starved = (self._starved or time.monotonic()) if starved else 0.0
                for key, _ in self._selector.select(self._next_deadline()):
                    if self._selector.get_map().get(key.fd) is key:  # an earlier event may have closed it
                        key.data()
                self._check_deadlines()
        finally:  # resolve all futures, whatever happens
            self._shut_down()

    def _next_deadline(self) -> float | None:
        """Seconds until the next deadline, or None."""
        deadlines = [child.deadline for child in self._children.values() if child.job]
        deadlines += [self._starved + STALL_TIMEOUT] if self._starved else []
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _dispatch(self) -> None:
        """Hand queued snippets to idle children, up to the number of workers."""
        while self._queue and self._idle and self._running < self.workers:
            job = self._queue.popleft()
            if job.tries == 0 and not job.future.set_running_or_notify_cancel():
                continue
            job.tries += 1
            child = self._idle.popleft()
            child.job, child.unsent, child.started = job, memoryview(job.source), time.monotonic()
            child.deadline = child.started + self.timeout
            self._running += 1
            self._send(child)

    def _watch(self, child: Child, events: int) -> None:
        self._selector.modify(child.channel, events, lambda: self._on_channel(child))

    def _unwatch(self, fileobj: socket.socket | int) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(fileobj)

    def _send(self, child: Child) -> None:
        try:
            while child.unsent:
                child.unsent = child.unsent[child.channel.send(child.unsent) :]
            child.channel.shutdown(socket.SHUT_WR)
            self._watch(child, selectors.EVENT_READ)
        except BlockingIOError:
            self._watch(child, selectors.EVENT_READ | selectors.EVENT_WRITE)
        except OSError:  # the child ended; the server will report how
            child.unsent = memoryview(b"")

    def _read(self, fileobj: socket.socket | int, fd: int) -> bytes:
        """Return the data that is available now. At end of file, stop watching `fileobj`."""
        try:
            data = os.read(fd, 2**16)
        except BlockingIOError:
            return b""
        except OSError:
            data = b""
        if not data:
            self._unwatch(fileobj)
        return data

    def _on_channel(self, child: Child) -> None:
        if child.unsent:
            self._send(child)
        data = self._read(child.channel, child.channel.fileno())
        if data and not child.ready:  # the first byte is READY
            child.ready, data = True, data[1:]
            self._idle.append(child)
        child.error += data[: ERROR_CAP - len(child.error)]

    def _on_out(self, child: Child) -> None:
        data = self._read(child.out, child.out)
        child.stdout += data[: OUTPUT_CAP + 1 - len(child.stdout)]

    def _on_control(self) -> None:
        try:
            record, fds, _, _ = socket.recv_fds(self._control, RECORD.size, 2, getattr(socket, "MSG_CMSG_CLOEXEC", 0))
        except OSError:
            record, fds = b"", []
        if len(record) < RECORD.size:
            self._server_died()
            return
        kind, pid, status, cpu, peak = RECORD.unpack(record)
        if kind == CHILD:
            child = self._children[pid] = Child(pid, socket.socket(fileno=fds[0]), fds[1])
            self._selector.register(child.channel, selectors.EVENT_READ, lambda: self._on_channel(child))
            self._selector.register(child.out, selectors.EVENT_READ, lambda: self._on_out(child))
        else:
            self._on_exit(self._children[pid], status, cpu, peak)

    def _on_exit(self, child: Child, status: int, cpu: float, peak: int) -> None:
        for fileobj, read in ((child.channel, self._on_channel), (child.out, self._on_out)):
            for _ in range(MAX_READS):  # drain the pipe, but do not wait for its end: a descendant may hold it open
                if fileobj in self._selector.get_map():
                    read(child)
        if child.job:
            self._restarts = 0
            self._finish(child, self._result(child, status, cpu, peak))
        elif child in self._idle:
            self._idle.remove(child)
        self._forget(child)
        if not child.ready:
            print(f"Executor: a child failed to apply its restrictions (wait status {status})", file=sys.stderr)
            self._server_died()

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        if self._starved and now > self._starved + STALL_TIMEOUT:
            self._server_died()
        for child in [c for c in self._children.values() if c.job and c.deadline <= now]:
            if not child.killed:
                child.killed, child.deadline = True, now + KILL_GRACE
                with contextlib.suppress(OSError):  # _on_control notices a dead server
                    self._control.sendall(RECORD.pack(KILL, child.pid, 0, 0.0, 0))
            elif not child.answered:
                child.deadline = now + STALL_TIMEOUT
                self._finish(child, self._result(child, 0, 0.0, 0))
            else:
                self._server_died()
                return

    # ---- results ----

    def _result(self, child: Child, status: int, cpu: float, peak: int) -> ExecResult:
        """Derive the result from how the process ended. `child.stdout` and `child.error` cannot fake a success.

        status: wait status. cpu: seconds. peak: resident memory in KiB.
        """
        stdout = child.stdout[:OUTPUT_CAP].decode("utf-8", "replace")
        if len(child.stdout) > OUTPUT_CAP:
            stdout += f"\n... (output cut after {OUTPUT_CAP} bytes)\n"
        text = child.error.decode("utf-8", "replace")
        code = os.waitstatus_to_exitcode(status)
        if child.killed or (code == -signal.SIGKILL and cpu > math.ceil(self.timeout) - 0.1):  # or by RLIMIT_CPU
            kind, text = "timeout", f"TimeoutError: no result within {self.timeout:g} s"
        elif code == EXIT_MEMORY or (code == -signal.SIGKILL and peak > self.memory_mb * 512):
            kind, text = "memory", text or "MemoryError"
        elif code == EXIT_BLOCKED:
            kind, text = "blocked", text or "PermissionError"
        elif code < 0:
            kind, text = "error", f"the interpreter crashed: {SIGNALS.get(-code, -code)}"
        elif code:
            kind, text = "error", text if code == EXIT_ERROR and text else f"SystemExit: {code}"
        elif stdout.strip():
            kind, text = "ok", ""
        else:
            kind, text = "no_output", "no output: use print()"
        return ExecResult(kind, self._portable(stdout), self._portable(text), time.monotonic() - child.started)

    def _finish(self, child: Child, result: ExecResult) -> None:
        if not child.answered:
            child.answered = True
            child.job.future.set_result(result)

    def _forget(self, child: Child) -> None:
        self._unwatch(child.channel)
        self._unwatch(child.out)
        child.channel.close()
        os.close(child.out)
        self._running -= child.job is not None
        del self._children[child.pid]

    def _fail_queue(self, reason: str) -> None:
        while self._queue:
            job = self._queue.popleft()
            if job.tries or job.future.set_running_or_notify_cancel():
                job.future.set_result(ExecResult("infra", error=reason))

    # ---- server process ----

    def _start_server(self) -> None:
        self._control, theirs = socket.socketpair()
        env = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "PYTHONINTMAXSTRDIGITS": "0", "MALLOC_ARENA_MAX": "1"}
        env |= {f"{name}_NUM_THREADS": "1" for name in ("OPENBLAS", "OMP", "MKL")}
        env |= {k: v for k, v in os.environ.items() if k in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")}
        package = str(Path(__file__).parents[2])  # on sys.path for this import only: snippets must not import thor
        server = (
            f"import sys; sys.path[0] = {package!r}; from thor.sandbox import server; del sys.path[0]; server.main()"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", server, str(theirs.fileno()), json.dumps(self._config)],
            pass_fds=[theirs.fileno()],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()
        self._selector.register(self._control, selectors.EVENT_READ, self._on_control)
        self._control.settimeout(START_TIMEOUT)
        hello = b""
        while not hello.endswith(b"\n"):
            part = self._control.recv(1)
            if not part:
                raise RuntimeError("the executor's server process did not start; see its messages on stderr")
            hello += part
        self._control.settimeout(None)
        state = json.loads(hello)
        self._folder = state["folder"]
        self._portable = Portable(state["prefixes"], state["libraries"], self._folder)
        self.protection = protection_status(state["layers"])
        check_protection(self.protection, self._require)

    def _server_died(self) -> None:
        """Drop the server. Running snippets get a second attempt, unless the server keeps dying."""
        self._alive, self._starved = False, 0.0
        for child in self._children.values():
            if child.job and not child.answered and child.job.tries < 2:
                child.answered = True
                self._queue.appendleft(child.job)
        self._drop_server("the executor's server died while this ran")
        if self._restarts >= MAX_RESTARTS:
            self._fail_queue("the executor's server keeps dying")

    def _restart_server(self) -> None:
        self._restarts += 1
        try:
            self._start_server()
            self._alive = True
        except (RuntimeError, OSError) as error:
            print(f"Executor: {error}", file=sys.stderr)
            self._server_died()

    def _drop_server(self, reason: str) -> None:
        self._unwatch(self._control)
        self._control.close()  # the server exits when it notices
        self._idle.clear()
        for child in list(self._children.values()):
            if child.job:
                self._finish(child, ExecResult("infra", error=reason))
            self._forget(child)
        if self._process:
            try:
                self._process.wait(2.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _shut_down(self) -> None:
        self._drop_server("the executor was closed")
        with self._lock:
            self._closing = True
            self._fail_queue("the executor was closed")
            self._selector.close()
            os.close(self._wake_read)
            os.close(self._wake_write)

    def _abandon(self) -> None:
        """In a fork of the caller: close the inherited descriptors, so that the server notices when the caller ends."""
        self._closing, self._lock = True, threading.Lock()
        self._control.close()
        self._selector.close()
        for child in self._children.values():
            child.channel.close()
            os.close(child.out)
        os.close(self._wake_read)
        os.close(self._wake_write)


def _abandon_all() -> None:
    for executor in list(_executors):
        if not executor._closing:
            executor._abandon()


os.register_at_fork(after_in_child=_abandon_all)
