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
import ctypes
import errno
import gc
import importlib
import io
import json
import math
import os
import platform
import random
import resource
import select
import shutil
import signal
import site
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Callable

RECORD = struct.Struct("<ciidi")  # control socket, both ways: kind, pid, wait status, CPU seconds, peak memory in KiB
EXIT_ERROR, EXIT_MEMORY, EXIT_BLOCKED, EXIT_SETUP = 1, 91, 92, 93  # they only name a failure: success is exit status 0
SNIPPET = "<snippet>"  # file name of the user's code in tracebacks
BOX = "/box/tmp"  # in the private root: mount point of each child's own temporary folder
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

# ------------------------------------------------------------------------------------------------ kernel interfaces

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *args: int | bytes | None) -> int:
    """A C function's result; -1 where it fails or the platform has no such function."""
    if not sys.platform.startswith("linux") or not hasattr(libc, name):  # elsewhere a name may mean something else
        return -1
    return getattr(libc, name)(*(ctypes.c_long(a) if isinstance(a, int) else a for a in args))


def in_fork(function: Callable[[], object]) -> object:
    """What `function` returns (as JSON), or None where it raises; asked in a child, so its effects end with it."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException), os.fdopen(write_end, "w") as file:
            json.dump(function(), file)
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as file:
        answer = file.read()
    os.waitpid(pid, 0)
    return json.loads(answer or "null")


NAMESPACES = {"net_namespace": 1 << 30, "pid_namespace": 1 << 29, "ipc_namespace": 1 << 27, "mount_namespace": 1 << 17}


def enter_user_namespace() -> bool:
    """An ordinary user gains the right to enter the other namespaces, and keeps its own ids."""
    uid, gid = os.getuid(), os.getgid()
    if call("unshare", 1 << 28) != 0:
        return False
    for name, text in ("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1"):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return True


def enter_namespaces(wanted: set[str]) -> set[str]:
    """Enter what the kernel grants. pid_namespace takes effect at the next fork."""
    flags = {name: flag for name, flag in NAMESPACES.items() if name in wanted}
    granted = {name for name, flag in flags.items() if call("unshare", flag) == 0}
    # tried in a fork first, because a half-made user namespace would be worse than none
    if flags and not granted and in_fork(lambda: enter_user_namespace() and call("unshare", 1 << 17) == 0):
        enter_user_namespace()
        granted = {name for name, flag in flags.items() if call("unshare", flag) == 0} | {"user_namespace"}
    return granted


def python_paths() -> list[str]:
    """What a running Python reads. Editable installs are left out, as they lead into users' projects."""
    own = tuple(prefix + os.sep for prefix in (sys.prefix, sys.base_prefix, site.getuserbase()))
    paths = [path for path in sys.path if path.startswith(own)] + [sys.base_prefix + "/lib", "/usr/local/lib"]
    paths += ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo", "/dev/urandom"]
    found = sorted({p for path in paths if os.path.exists(path) for p in (path, os.path.realpath(path))})
    return [p for p in found if not any(p.startswith(outer + os.sep) for outer in found)]


def enter_private_root(readable: list[str]) -> bool:
    """In a mount namespace of our own: pivot into an empty read-only root with only `readable` bound into it."""
    root = "/proc"  # a mount point that exists everywhere and is needed no more, so nothing is left behind outside
    private, bind, detach, recursive = 1 << 18, 1 << 12, 2, 1 << 14
    if call("mount", b"none", b"/", None, private | recursive, None) != 0:
        return False
    if call("mount", b"root", root.encode(), b"tmpfs", 0, b"size=1m,mode=755") != 0:
        return False
    for path in [*readable, os.devnull]:
        folder = os.path.isdir(path)
        os.makedirs(root + (path if folder else os.path.dirname(path)), exist_ok=True)
        if not folder:
            open(root + path, "x").close()
        if call("mount", path.encode(), (root + path).encode(), None, bind | recursive, None) != 0:
            return False
    os.makedirs(root + BOX)
    if not os.path.exists(root + "/tmp"):  # it does where Python itself lives in there
        os.symlink(BOX, root + "/tmp")
    attributes = struct.pack("4Q", 1 | 2, 0, 0, 0)  # read-only, no set-uid
    if call("syscall", 442, -100, root.encode(), 0x8000, attributes, len(attributes)) != 0:  # mount_setattr, recursive
        return False
    os.chdir(root)
    pivot_root = {"x86_64": 155, "aarch64": 41}.get(platform.machine(), -1)
    if call("syscall", pivot_root, b".", b".") != 0:
        return False
    if call("umount2", b".", detach) != 0:
        raise OSError("cannot let go of the old root")
    os.chdir("/")
    return True


def landlock(read: list[str], write: str) -> bool:
    """From now on: read below `read`, write below `write`, no TCP, no signals or abstract sockets to the outside."""
    abi = call("syscall", 444, None, 0, 1)
    if abi < 1:
        return False
    if write == BOX:  # what counts of a mount point is the folder that it lies in
        write = os.path.dirname(BOX)
    rights = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    attributes = struct.pack("3Q", rights, 3, 3)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = call("syscall", 444, attributes, len(attributes), 0)
    read_any, of_files = 1 << 2 | 1 << 3, 1 << 1 | 1 << 2
    change = sum(1 << bit for bit in (1, 4, 5, 7, 8, 13, 14))  # write, remove, make folders and files, rename, truncate
    for path, allowed in [*((path, read_any) for path in read), (write, read_any | change), (os.devnull, of_files)]:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", allowed & rights & (-1 if os.path.isdir(path) else of_files), fd)
        if call("syscall", 445, ruleset, 1, rule, 0) != 0:
            return False
        os.close(fd)
    return call("syscall", 446, ruleset, 0) == 0


# The system calls a snippet may make: name, number on x86_64, number on aarch64 (- where there is none).
ALLOWED = """
read 0 63 write 1 64 open 2 - close 3 57 stat 4 - fstat 5 80 lstat 6 - poll 7 - lseek 8 62 mmap 9 222 mprotect 10 226
munmap 11 215 brk 12 214 rt_sigaction 13 134 rt_sigprocmask 14 135 rt_sigreturn 15 139 rt_sigpending 127 136
rt_sigsuspend 130 133 rt_sigtimedwait 128 137 pread64 17 67 pwrite64 18 68 readv 19 65 writev 20 66 access 21 -
pipe 22 - select 23 - sched_yield 24 124 mremap 25 216 msync 26 227 madvise 28 233 dup 32 23 dup2 33 - pause 34 -
nanosleep 35 101 getitimer 36 102 alarm 37 - setitimer 38 103 getpid 39 172 exit 60 93 wait4 61 260 waitid 247 95
uname 63 160 flock 73 32 fsync 74 82 fdatasync 75 83 ftruncate 77 46 getdents64 217 61 getcwd 79 17 chdir 80 49
fchdir 81 50 rename 82 - mkdir 83 - rmdir 84 - unlink 87 - readlink 89 - umask 95 166 gettimeofday 96 169
getrlimit 97 163 setrlimit 160 164 getrusage 98 165 sysinfo 99 179 times 100 153 getuid 102 174 getgid 104 176
geteuid 107 175 getegid 108 177 getppid 110 173 getpgrp 111 - getpgid 121 155 getsid 124 156 getgroups 115 158
getresuid 118 148 getresgid 120 150 sigaltstack 131 132 statfs 137 43 fstatfs 138 44 getpriority 140 141 gettid 186 178
futex 202 98 time 201 - sched_getaffinity 204 123 epoll_create1 291 20 epoll_ctl 233 21 epoll_wait 232 -
epoll_pwait 281 22 set_tid_address 218 96 restart_syscall 219 128 fadvise64 221 223 clock_gettime 228 113
clock_getres 229 114 clock_nanosleep 230 115 exit_group 231 94 openat 257 56 mkdirat 258 34 newfstatat 262 79
unlinkat 263 35 renameat 264 38 renameat2 316 276 readlinkat 267 78 faccessat 269 48 faccessat2 439 439 pselect6 270 72
ppoll 271 73 set_robust_list 273 99 fallocate 285 47 dup3 292 24 pipe2 293 59 getrandom 318 278 membarrier 324 283
copy_file_range 326 285 sendfile 40 71 statx 332 291 rseq 334 293 close_range 436 436
"""
OWN_PID = 0x7FFFFFF1  # stands for the child's pid, which is known only after the fork
RULES = [  # allowed where an argument has one of these values: (x86_64, aarch64), argument, values
    ((62, 129), 0, (OWN_PID,)),  # kill
    ((234, 131), 0, (OWN_PID,)),  # tgkill
    ((302, 261), 0, (0,)),  # prlimit64: of oneself
    ((72, 25), 1, (0, 1, 2, 3, 4, 5, 6, 7, 1030)),  # fcntl: duplicate, flags, locks; no owner, no signal, no lease
    ((16, 29), 1, (0x5401, 0x5450, 0x5451, 0x541B)),  # ioctl: TCGETS, FIONCLEX, FIOCLEX, FIONREAD
    ((157, 167), 0, (15, 16)),  # prctl: the thread's name
]
CLONE, CLONE3, CLONE_THREAD = (56, 220), (435, 435), 1 << 16


def seccomp_program() -> bytes | None:
    """The filter as BPF: what is not allowed fails with EPERM. None on an architecture without a table."""
    column, arch = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}.get(platform.machine(), (0, 0))
    if not arch or sys.maxsize < 2**32:
        return None
    load, equal, at_least, any_bit, ret = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, unknown = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
    # the number is at offset 0 of struct seccomp_data, the architecture at 4, the arguments from 16
    code = [(load, 0, 0, 4), (equal, 1, 0, arch), (ret, 0, 0, refuse), (load, 0, 0, 0)]
    code += [(at_least, 0, 1, 1 << 30), (ret, 0, 0, refuse)]  # x32, a second table of x86_64
    for number in ALLOWED.split()[1 + column :: 3]:
        if number != "-":
            code += [(equal, 0, 1, int(number)), (ret, 0, 0, allow)]
    tests = [(numbers, arg, equal, values) for numbers, arg, values in RULES]
    for numbers, arg, test, values in [*tests, (CLONE, 0, any_bit, (CLONE_THREAD,))]:  # threads yes, processes no
        code += [(equal, 0, len(values) + 3, numbers[column]), (load, 0, 0, 16 + 8 * arg)]
        code += [(test, len(values) - i, 0, value) for i, value in enumerate(values)]
        code += [(ret, 0, 0, refuse), (ret, 0, 0, allow)]
    # ENOSYS, because the C library then falls back to clone
    code += [(equal, 0, 1, CLONE3[column]), (ret, 0, 0, unknown), (ret, 0, 0, refuse)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def seccomp(program: bytes) -> bool:
    """Install the filter for this process."""
    program = program.replace(struct.pack("I", OWN_PID), struct.pack("I", os.getpid()))
    buffer = ctypes.create_string_buffer(program, len(program))
    return call("prctl", 22, 2, struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer)), 0, 0) == 0


def heap() -> list[tuple[int, int]]:
    """Start and end of the private memory of this process that belongs to no file."""
    with contextlib.suppress(OSError), open("/proc/self/maps") as file:
        regions = [line.split() for line in file if " rw-p " in line]
        spans = [region[0].split("-") for region in regions if len(region) == 5 or region[5] == "[heap]"]
        return [(int(start, 16), int(end, 16)) for start, end in spans]
    return []


def use_huge_pages() -> None:
    """Gather the heap in 2 MiB pages: a fork and its end then copy and free far fewer page-table entries."""
    for start, end in heap():
        start, end = -(-start // 2**21) * 2**21, end // 2**21 * 2**21
        if start < end:
            call("madvise", start, end - start, 25)  # MADV_COLLAPSE; fails for memory not in use yet


def pages_written(code: str) -> list[tuple[int, int]]:
    """Address and length of the pieces of shared memory of which this process, a fork, needs copies to run `code`."""
    exec(code, {})
    page, spans = resource.getpagesize(), []
    with open("/proc/self/pagemap", "rb") as pagemap:
        for start, end in heap():
            pagemap.seek(start // page * 8)
            for i, (entry,) in enumerate(struct.iter_unpack("Q", pagemap.read((end - start) // page * 8))):
                if entry >> 63 and entry >> 56 & 1:  # present, and no longer shared
                    address = start + i * page
                    if spans and sum(spans[-1]) == address:
                        spans[-1] = (spans[-1][0], spans[-1][1] + page)
                    else:
                        spans.append((address, page))
    return spans


# ------------------------------------------------------------------------------------------------ running a snippet


class CappedRaw(io.RawIOBase):
    """Raw stdout that swallows what comes after the first `left` bytes, so that endless printing costs nothing."""

    def __init__(self, left: int):
        self.left = left

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 1

    def write(self, data) -> int:
        kept = memoryview(data)[: self.left]
        self.left -= len(kept)
        while kept:
            kept = kept[os.write(1, kept) :]
        return len(data)


def describe(error: BaseException) -> str:
    """Last line of the traceback, with the line of the snippet at fault."""
    lines = traceback.format_exception_only(type(error), error)
    text, line = "".join(lines)[:2000].replace("\n", " "), None
    if isinstance(error, SyntaxError):  # its other lines repeat the source
        text, line = lines[-1], error.lineno
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == SNIPPET:
            line = trace.tb_lineno
        trace = trace.tb_next
    return text.strip() + (f" (line {line})" if line else "")


def was_blocked(error: BaseException | None) -> bool:
    """Whether this error, or one that led to it (urllib wraps them, for instance), is a refusal of the sandbox."""
    for _ in range(20):
        refused = isinstance(error, OSError) and error.errno in (errno.EPERM, errno.EACCES, errno.EROFS)
        if refused or isinstance(error, socket.gaierror):
            return True
        error = error and (error.__cause__ or error.__context__)
    return False


def run_snippet(source: bytes, channel: int, cap: int) -> int:
    """Run the code as `__main__`; writes the error line to `channel` and returns the exit status."""
    out = io.TextIOWrapper(io.BufferedWriter(CappedRaw(cap)), encoding="utf-8", errors="replace")
    sys.stdout = sys.__stdout__ = out
    leave = os._exit

    def exit_flushed(status: int) -> None:  # what was printed before an os._exit counts as printed
        with contextlib.suppress(Exception):
            out.flush()
        leave(status)

    os._exit = exit_flushed
    sys.modules["__main__"] = module = types.ModuleType("__main__")
    status, text = 0, ""
    try:
        try:
            exec(compile(source.decode("utf-8", "surrogatepass"), SNIPPET, "exec"), module.__dict__)
        finally:
            for thread in threading.enumerate():  # as the interpreter does at its end
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
        out.flush()
    with contextlib.suppress(Exception):
        os.write(channel, text.encode("utf-8", "replace"))
    return status


# ------------------------------------------------------------------------------------------------ the server


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
    control, config = socket.socket(fileno=int(sys.argv[1])), json.loads(sys.argv[2])
    sys.path.pop(0)  # this package's own folder, whose modules are not for snippets
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


if __name__ == "__main__":
    main()
