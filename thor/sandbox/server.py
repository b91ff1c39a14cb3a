"""The executor's server side: loads the maths libraries once, then forks one restricted child per snippet.

Started by `executor.py` as a program of its own. Up to three kinds of process:

    guardian    enters the namespaces, forks the zygote as process 1 of the new pid namespace and waits for it
    zygote      imports, warms up, moves into a root that holds nothing but Python; forks, reaps and kills children.
                It never runs user code and never sees code or output: those travel between child and caller
    child       gives up every right, says that it is ready, waits for one snippet, runs it, ends

Each layer of protection is tried and those that took effect are reported; a child on which not all of them take effect
ends before it gets a snippet. `executor.py` says what this protects from and what not.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import math
import os
import random
import resource
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
import traceback

from thor.sandbox.kernel import (
    BOX,
    call,
    enter_namespaces,
    enter_private_root,
    in_fork,
    landlock,
    pages_written,
    python_paths,
    seccomp,
    seccomp_program,
    use_huge_pages,
)
from thor.sandbox.snippet import EXIT_SETUP, run_snippet

RECORD = struct.Struct("<ciidi")  # control socket, both ways: kind, pid, wait status, CPU seconds, peak memory in KiB
BOX_BYTES, FILES, PROCESSES = 64 * 2**20, 64, 128  # limits: temporary files, open files, threads
STANDARD = "bisect cmath collections dataclasses datetime decimal fractions functools heapq itertools math operator re "
STANDARD += "random statistics string time typing"  # what snippets import most

# One of each kind of thing that snippets do, so that lazy imports and caches are in place before the first fork.
WARM_UP = """
from sympy import *
x, y, z = symbols("x y z"); n = symbols("n", integer=True, positive=True); a = symbols("a", positive=True)
solve(x**2 - 5*x + 6, x), solve(x**2 - 5*x + 3, x), solve(x**2 + x + 1, x), solve(x**4 - 3*x**2 + 1, x), roots(x**2 - 1)
solve([x + y - 3, x - y - 1], [x, y]), solve([x**2 + y**2 - 5, x - y - 1], [x, y]), solve(Eq(2*x, 3)), solve(a*x - 1, x)
solve(2*x - 3 > 1, x), solveset(x**2 - 4, x, S.Reals), solve(sin(x) - 1, x), solve(exp(x) - 2, x), nsolve(cos(x) - x, 1)
factor(x**3 - 1), expand((x + 1)**5), simplify(sin(x)**2 + cos(x)**2), apart(1/(x**2 - 1)), together(1/x + 1/y)
integrate(x * sin(x), x), integrate(x**2 * exp(2*x), x), integrate(x**2, (x, 0, 1)), integrate(1/(x**2 + 1), (x, 0, oo))
diff(exp(x) * cos(x) / x, x), limit(sin(2*x)/(3*x), x, 0), limit((1 + 1/x)**x, x, oo), series(cos(2*x), x, 0, 4)
summation(n**2, (n, 1, 10)), summation(1/n**2, (n, 1, oo)), product(n, (n, 1, 5)), Matrix([[1, 2]]).rref()
Matrix([[1, 2], [3, 4]]).inv(), Matrix([[2, 1], [1, 2]]).eigenvals(), Matrix([[1, 2], [3, 5]]).det(), Point(0, 0)
factorint(360), divisors(12), totient(10), isprime(97), list(primerange(2, 20)), gcd(48, 36), mod_inverse(3, 11)
Rational(3, 4) + Rational(1, 6), sqrt(50), sqrt(2) * sqrt(8), N(pi, 20), binomial(10, 3), factorial(5), floor(x), Abs(x)
str(x**2/y), latex(x**2/y), sympify("x**2 + 1").subs(x, 2), Poly(x**2 - 1, x).all_coeffs(), symbols("f", cls=Function)
import numpy; numpy.roots([1, -5, 3]), numpy.linalg.solve(numpy.eye(2), numpy.ones(2)), numpy.linalg.eig(numpy.eye(2))
"""
TOUCH = "from sympy import *; x = symbols('x'); str([solve(x**2 - 7*x + 5, x), diff(x**3 - x, x)])"
PATIENCE = 0.01  # seconds that a child waits for its snippet before it prepares memory


class Zygote:
    """Forks children that wait for a snippet, reaps them and reports how they ended."""

    def __init__(self, control: socket.socket, config: dict, namespaces: set[str]):
        self.control, self.config, self.namespaces = control, config, namespaces
        self.pid, self.memory = os.getpid(), 0  # memory: address space of the loaded libraries, bytes
        self.children: dict[int, str] = {}  # pid -> its temporary folder
        self.held: set[str] = set()  # layers in force
        self.folder = ""  # where temporary folders are made, if there is no private root
        self.load()
        self.prepare()

    def load(self) -> None:
        """Import, warm up, freeze: everything that children share."""
        for name in [*STANDARD.split(), *self.config["preload"]]:
            with contextlib.suppress(ImportError):  # what is not installed is not there for snippets either
                importlib.import_module(name)
        scope: dict = {}
        for line in WARM_UP.splitlines() if "sympy" in sys.modules else []:
            with contextlib.suppress(Exception):  # other versions have other functions
                exec(line, scope)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(0)
        os.environ.clear()
        sys.argv = [""]
        gc.collect()
        gc.freeze()  # a collection would otherwise write to, and so copy, every page in every child
        with contextlib.suppress(OSError), open("/proc/self/statm") as file:
            self.memory = int(file.read().split()[0]) * resource.getpagesize()
        use_huge_pages()
        self.hot = in_fork(lambda: pages_written(TOUCH)) or []

    def prepare(self) -> None:
        """What is set up once for all children."""
        layers = self.config["layers"]
        paths = self.readable = python_paths()
        if "mount_namespace" in self.namespaces and enter_private_root(paths):
            self.readable = ["/"]
        else:
            self.namespaces.discard("mount_namespace")
            self.folder = tempfile.mkdtemp(prefix="thor-executor-")
            os.chmod(self.folder, 0o711)
            call("prctl", 36, 1, 0, 0, 0)  # orphans of a snippet become ours, so that they can be found and killed
        self.program = seccomp_program() if "seccomp" in layers else None
        self.uid = random.randrange(61184, 65520) if os.getuid() == 0 and "unprivileged" in layers else 0
        needed = [*paths, os.__file__]
        if self.uid and not in_fork(lambda: self.drop_user() or all(os.access(path, os.R_OK) for path in needed)):
            self.uid = 0
        self.held = set(in_fork(lambda: sorted(self.restrict(self.make_folder()))) or ())

    def drop_user(self) -> None:
        """Become a user that owns nothing; one of its own, because RLIMIT_NPROC counts per user."""
        os.setgroups([])
        os.setresgid(self.uid, self.uid, self.uid)
        os.setresuid(self.uid, self.uid, self.uid)

    def make_folder(self) -> str:
        if not self.folder:
            return BOX
        folder = tempfile.mkdtemp(dir=self.folder)
        if self.uid:
            os.chown(folder, self.uid, self.uid)
        return folder

    def limits(self) -> dict[int, int]:
        limits = {
            resource.RLIMIT_AS: self.memory + self.config["memory_mb"] * 2**20,
            resource.RLIMIT_CPU: math.ceil(self.config["timeout"]),
            resource.RLIMIT_FSIZE: BOX_BYTES,
            resource.RLIMIT_NOFILE: FILES,
            resource.RLIMIT_CORE: 0,
        }
        if self.uid or "user_namespace" in self.namespaces:
            limits[resource.RLIMIT_NPROC] = PROCESSES + self.config["children"]
        elif self.program is None:
            limits[resource.RLIMIT_NPROC] = 0  # it counts what else the user runs, so no other number is safe
        return limits

    def restrict(self, folder: str) -> set[str]:
        """Give up, in this process, everything a snippet has no use for; returns the names of the layers in force."""
        held = set(self.namespaces)
        if not self.folder:  # a file system of its own, of limited size, that ends with the child
            options = f"size={BOX_BYTES},nr_inodes=4096,mode=777".encode()
            if call("unshare", 1 << 17) or call("mount", b"box", BOX.encode(), b"tmpfs", 2 | 4, options):
                raise OSError("no private temporary folder")
        os.chdir(folder)
        tempfile.tempdir = folder
        if "rlimits" in self.config["layers"]:
            held.add("rlimits")
            for kind, limit in self.limits().items():
                try:
                    resource.setrlimit(kind, (limit, limit))
                except (ValueError, OSError):  # macOS has no limit on address space
                    held.discard("rlimits")
        if self.uid:
            self.drop_user()
        if os.getuid() != 0:
            held.add("unprivileged")
        if call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24)) == 0:
            held.add("no_capabilities")
        if call("prctl", 38, 1, 0, 0, 0) == 0:
            held.add("no_new_privs")
        call("prctl", 1, signal.SIGKILL, 0, 0, 0)  # die with the zygote
        call("prctl", 4, 0, 0, 0, 0)  # not dumpable: no ptrace, no /proc/PID/mem
        call("prctl", 41, 1, 0, 0, 0)  # no huge pages for what it allocates itself
        if os.getppid() != self.pid:
            raise OSError("the zygote ended")
        if "landlock" in self.config["layers"] and landlock(self.readable, folder):
            held.add("landlock")
        if self.program and seccomp(self.program):
            held.add("seccomp")
        return held

    def fork(self) -> None:
        """One more waiting child; its two channels go to the caller, who alone writes code and reads output."""
        mine, theirs = socket.socketpair()
        out_read, out_write = os.pipe()
        folder = self.make_folder()
        pid = os.fork()
        if pid == 0:
            leave, status = os._exit, EXIT_SETUP
            try:
                status = self.child(theirs.fileno(), out_write, folder)
            except BaseException:
                traceback.print_exc()
            finally:
                leave(status)
        self.children[pid] = folder
        socket.send_fds(self.control, [RECORD.pack(b"C", pid, 0, 0.0, 0)], [mine.fileno(), out_read])
        for fd in (mine.detach(), theirs.detach(), out_read, out_write):
            os.close(fd)

    def child(self, channel: int, out: int, folder: str) -> int:
        """Restrict, say that it is ready, take the code, run it; returns the exit status."""
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(out, 1)
        if self.restrict(folder) != self.held:
            raise OSError("not all layers took effect")
        os.dup2(null, 2)
        os.dup2(channel, 3)
        os.closerange(4, 4096)
        random.seed(0)  # Python seeds it anew after a fork
        os.write(3, b"R")
        if not select.select([3], [], [], PATIENCE)[0]:  # there is time to copy now what it would copy while it runs
            for start, length in self.hot:
                call("madvise", start, length, 23)  # MADV_POPULATE_WRITE
        source = bytearray()
        while part := os.read(3, 2**16):
            source += part
        return run_snippet(source, 3, self.config["output_cap"])

    def reap(self) -> None:
        """Report every child that ended, and leave none of its descendants."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.wait4(-1, os.WNOHANG))[0]:
                pid, status, usage = ended
                if pid in self.children:
                    seconds = usage.ru_utime + usage.ru_stime
                    self.control.sendall(RECORD.pack(b"X", pid, status, seconds, usage.ru_maxrss))
                    if self.folder:
                        shutil.rmtree(self.children[pid], ignore_errors=True)
                    del self.children[pid]
        if "seccomp" not in self.held:  # where it is, there are no descendants
            self.kill_orphans()

    def kill_orphans(self) -> None:
        """End descendants whose snippet ended, even in other sessions; their own children become orphans in turn."""
        with contextlib.suppress(OSError):
            if os.readlink("/proc/self") == str(self.pid):  # the pids in there are those of our own namespace
                with open(f"/proc/self/task/{self.pid}/children") as file:
                    for pid in map(int, file.read().split()):
                        if pid not in self.children:
                            os.kill(pid, signal.SIGKILL)

    def kill(self, pid: int) -> None:
        for send in (os.killpg, os.kill):  # there is no group yet if the child did not come to setsid
            with contextlib.suppress(OSError):
                send(pid, signal.SIGKILL)

    def serve(self) -> None:
        """Keep `config["children"]` children alive until the caller closes the control socket."""
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        self.control.sendall(json.dumps({"layers": sorted(self.held), "folder": self.folder}).encode() + b"\n")
        poll = select.poll()
        poll.register(self.control, select.POLLIN)
        poll.register(wake_read, select.POLLIN)
        while True:
            missing = len(self.children) < self.config["children"]
            for fd, _ in poll.poll(0 if missing else None):
                if fd == wake_read:
                    os.read(wake_read, 4096)
                    self.reap()
                else:
                    record = self.control.recv(RECORD.size, socket.MSG_WAITALL)
                    if len(record) < RECORD.size:
                        return
                    pid = RECORD.unpack(record)[1]
                    if pid in self.children:
                        self.kill(pid)
            if missing:
                self.fork()

    def close(self) -> None:
        for pid in self.children:
            self.kill(pid)
        with contextlib.suppress(ChildProcessError):  # until there are none
            for _ in range(100):
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    self.kill_orphans()
                    time.sleep(0.01)
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


def main() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "thor"]:
        del sys.modules[name]  # snippets must not find them there
    control, config = socket.socket(fileno=int(sys.argv[1])), json.loads(sys.argv[2])
    namespaces = enter_namespaces(set(config["layers"]))
    if "pid_namespace" in namespaces:
        pid = os.fork()
        if pid:
            control.close()
            os.waitpid(pid, 0)
            return
        call("prctl", 1, signal.SIGKILL, 0, 0, 0)  # the guardian's end is ours, and so that of every child
    zygote = Zygote(control, config, namespaces)
    try:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the caller is gone
            zygote.serve()
    finally:
        zygote.close()
