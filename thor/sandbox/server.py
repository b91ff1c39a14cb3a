"""The server process of the executor: loads the math libraries once and forks one restricted child per snippet.

`executor.py` starts it as a separate program. It consists of up to three kinds of process:

    guardian    enters the namespaces, forks the zygote as process 1 of the new PID namespace and waits for it
    zygote      imports and warms up the libraries, enters a root that contains only Python, then forks, reaps and
                kills children. It runs no user code; code and output pass directly between executor and child
    child       drops all privileges, reports that it is ready, waits for one snippet, runs it and exits

The server tries each protection layer and reports those in force to the executor. A child in which one of these fails
exits before it receives a snippet. `executor.py` documents the threat model.
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
import sys
import tempfile
import time
import traceback

from thor.sandbox import kernel
from thor.sandbox.protocol import CHILD, EXIT_SETUP, EXITED, READY, RECORD
from thor.sandbox.snippet import run_snippet

TMP_BYTES, MAX_FILES, MAX_THREADS = 64 * 2**20, 64, 128  # limits: temporary files, open files, threads
SANDBOX_UIDS = range(61184, 65520)  # user ids that systemd reserves for such temporary users
MAX_DESCRIPTORS = 4096  # a child closes those that it has inherited
STANDARD = "bisect cmath collections dataclasses datetime decimal fractions functools heapq itertools math operator re "
STANDARD += "random statistics string time typing"  # standard modules that snippets import most

# Typical operations of snippets, so that lazy imports and caches are in place before the first fork.
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
# Typical short snippet: shows which memory pages a snippet writes to.
PROBE = "from sympy import *; x = symbols('x'); str([solve(x**2 - 7*x + 5, x), diff(x**3 - x, x)])"
PREPARE_DELAY = 0.01  # seconds that a child waits for its snippet before it starts to copy those pages


class Zygote:
    """Forks children that wait for a snippet, reaps them and reports how they ended."""

    def __init__(self, control: socket.socket, config: dict, namespaces: set[str]):
        self.control, self.config, self.namespaces = control, config, namespaces
        self.pid, self.memory = os.getpid(), 0  # memory: address space of the loaded libraries in bytes
        self.children: dict[int, str] = {}  # pid -> its temporary folder
        self.active: set[str] = set()  # layers in force
        self.folder = ""  # parent of the temporary folders, unless there is a private root
        self.load()
        self.set_up()

    def load(self) -> None:
        """Import, warm up and freeze everything that the children share."""
        for name in [*STANDARD.split(), *self.config["preload"]]:
            with contextlib.suppress(ImportError):  # snippets cannot import it either
                importlib.import_module(name)
        scope: dict = {}
        for line in WARM_UP.splitlines() if "sympy" in sys.modules else []:
            with contextlib.suppress(Exception):  # other versions of sympy have other functions
                exec(line, scope)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(0)
        os.environ.clear()
        sys.argv = [""]
        gc.collect()
        gc.freeze()  # otherwise a collection in a child would write to every page, and so copy it
        with contextlib.suppress(OSError), open("/proc/self/statm") as file:
            self.memory = int(file.read().split()[0]) * resource.getpagesize()
        kernel.use_huge_pages()
        self.hot_pages = kernel.in_fork(lambda: kernel.pages_written(PROBE)) or []

    def set_up(self) -> None:
        """Set up what all children share, and find out which layers take effect."""
        layers = self.config["layers"]
        paths = self.readable = kernel.python_paths()
        if "mount_namespace" in self.namespaces and kernel.enter_private_root(paths):
            self.readable = ["/"]
        else:
            self.namespaces.discard("mount_namespace")
            self.folder = tempfile.mkdtemp(prefix="thor-executor-")
            os.chmod(self.folder, 0o711)
            kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)  # adopt orphans of snippets, to find and kill them
        self.program = kernel.seccomp_program() if "seccomp" in layers else None
        self.uid = random.choice(SANDBOX_UIDS) if os.getuid() == 0 and "unprivileged" in layers else 0
        needed = [*paths, os.__file__]
        if self.uid and not kernel.in_fork(lambda: self.drop_user() or all(os.access(p, os.R_OK) for p in needed)):
            self.uid = 0
        self.active = set(kernel.in_fork(lambda: sorted(self.restrict(self.make_folder()))) or ())

    def drop_user(self) -> None:
        """Switch to a user that owns nothing. Each executor has a different one: RLIMIT_NPROC counts per user."""
        os.setgroups([])
        os.setresgid(self.uid, self.uid, self.uid)
        os.setresuid(self.uid, self.uid, self.uid)

    def make_folder(self) -> str:
        """Return the path of the temporary folder for the next child."""
        if not self.folder:
            return kernel.PRIVATE_TMP
        folder = tempfile.mkdtemp(dir=self.folder)
        if self.uid:
            os.chown(folder, self.uid, self.uid)
        return folder

    def limits(self) -> dict[int, int]:
        """Return the resource limits of a child."""
        limits = {
            resource.RLIMIT_AS: self.memory + self.config["memory_mb"] * 2**20,
            resource.RLIMIT_CPU: math.ceil(self.config["timeout"]),
            resource.RLIMIT_FSIZE: TMP_BYTES,
            resource.RLIMIT_NOFILE: MAX_FILES,
            resource.RLIMIT_CORE: 0,
        }
        if self.uid or "user_namespace" in self.namespaces:
            limits[resource.RLIMIT_NPROC] = MAX_THREADS + self.config["children"]
        elif self.program is None:
            limits[resource.RLIMIT_NPROC] = 0  # it also counts other processes of the user: no other number is safe
        return limits

    def restrict(self, folder: str) -> set[str]:
        """Drop all privileges that a snippet does not need, in this process. Return the names of the active layers."""
        active = set(self.namespaces)
        if not self.folder:
            kernel.mount_private_tmp(TMP_BYTES)
        os.chdir(folder)
        tempfile.tempdir = folder
        if "rlimits" in self.config["layers"]:
            active.add("rlimits")
            for kind, limit in self.limits().items():
                try:
                    resource.setrlimit(kind, (limit, limit))
                except (ValueError, OSError):  # macOS cannot limit the address space
                    active.discard("rlimits")
        if self.uid:
            self.drop_user()
        if os.getuid() != 0:
            active.add("unprivileged")
        if kernel.drop_capabilities():
            active.add("no_capabilities")
        if kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1):
            active.add("no_new_privs")
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)  # die with the zygote
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)  # no ptrace, no /proc/PID/mem
        kernel.prctl(kernel.PR_SET_THP_DISABLE, 1)  # no huge pages for memory that the child allocates
        if os.getppid() != self.pid:
            raise OSError("the zygote ended")
        if "landlock" in self.config["layers"] and kernel.apply_landlock(self.readable, folder):
            active.add("landlock")
        if self.program and kernel.apply_seccomp(self.program):
            active.add("seccomp")
        return active

    def fork(self) -> None:
        """Fork one more waiting child and hand its two channels to the executor, which sends code and reads output."""
        mine, theirs = socket.socketpair()
        out_read, out_write = os.pipe()
        folder = self.make_folder()
        pid = os.fork()
        if pid == 0:
            leave, status = os._exit, EXIT_SETUP  # the snippet may replace os._exit
            try:
                status = self.child(theirs.fileno(), out_write, folder)
            except BaseException:
                traceback.print_exc()
            finally:
                leave(status)
        self.children[pid] = folder
        socket.send_fds(self.control, [RECORD.pack(CHILD, pid, 0, 0.0, 0)], [mine.fileno(), out_read])
        for fd in (mine.detach(), theirs.detach(), out_read, out_write):
            os.close(fd)

    def child(self, channel: int, out: int, folder: str) -> int:
        """Restrict this process, report that it is ready, receive the code and run it. Return the exit status."""
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(out, 1)
        if self.restrict(folder) != self.active:
            raise OSError("not all layers took effect")
        os.dup2(null, 2)
        os.dup2(channel, 3)
        os.closerange(4, MAX_DESCRIPTORS)
        random.seed(0)  # Python seeds it randomly after a fork
        os.write(3, READY)
        if not select.select([3], [], [], PREPARE_DELAY)[0]:
            kernel.copy_pages(self.hot_pages)  # while idle, copy what the snippet would have to copy
        source = bytearray()
        while part := os.read(3, 2**16):
            source += part
        return run_snippet(source, 3, self.config["output_cap"])

    def reap(self) -> None:
        """Report every child that ended, and kill all its descendants."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.wait4(-1, os.WNOHANG))[0]:
                pid, status, usage = ended
                if pid in self.children:
                    seconds = usage.ru_utime + usage.ru_stime
                    self.control.sendall(RECORD.pack(EXITED, pid, status, seconds, usage.ru_maxrss))
                    if self.folder:
                        shutil.rmtree(self.children[pid], ignore_errors=True)
                    del self.children[pid]
        if "seccomp" not in self.active:  # seccomp forbids new processes
            self.kill_orphans()

    def kill_orphans(self) -> None:
        """Kill descendants whose snippet ended, even in other sessions. Their children become orphans in turn."""
        with contextlib.suppress(OSError):
            if os.readlink("/proc/self") == str(self.pid):  # else /proc shows the pids of another namespace
                with open(f"/proc/self/task/{self.pid}/children") as file:
                    for pid in map(int, file.read().split()):
                        if pid not in self.children:
                            os.kill(pid, signal.SIGKILL)

    def kill(self, pid: int) -> None:
        """Kill a child and its process group, which does not exist until the child has called setsid."""
        for send in (os.killpg, os.kill):
            with contextlib.suppress(OSError):
                send(pid, signal.SIGKILL)

    def serve(self) -> None:
        """Keep `config["children"]` children alive until the executor closes the control socket."""
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        hello = {"layers": sorted(self.active), "folder": self.folder}
        prefixes = (sys.prefix, sys.base_prefix)
        hello |= {"prefixes": [*prefixes, *map(os.path.realpath, prefixes)], "libraries": sys.path}
        self.control.sendall(json.dumps(hello).encode() + b"\n")
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
                    pid = RECORD.unpack(record)[1]  # the only message is KILL
                    if pid in self.children:
                        self.kill(pid)
            if missing:
                self.fork()

    def close(self) -> None:
        """Kill all children and their descendants, and wait for them."""
        for pid in self.children:
            self.kill(pid)
        with contextlib.suppress(ChildProcessError):  # raised when none is left
            for _ in range(100):
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    self.kill_orphans()
                    time.sleep(0.01)
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


def main() -> None:
    """Run the server. Arguments of the process: descriptor of the control socket, configuration as JSON."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "thor"]:
        del sys.modules[name]  # snippets must not be able to import it
    control, config = socket.socket(fileno=int(sys.argv[1])), json.loads(sys.argv[2])
    namespaces = kernel.enter_namespaces(set(config["layers"]))
    if "pid_namespace" in namespaces:
        pid = os.fork()
        if pid:
            control.close()
            os.waitpid(pid, 0)
            return
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)  # die with the guardian; the children then die too
    zygote = Zygote(control, config, namespaces)
    try:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the executor's process is gone
            zygote.serve()
    finally:
        zygote.close()
