"""Kernel interfaces that Python's library does not offer: namespaces, a private root, landlock, seccomp, memory pages.

Each function does one thing to the process that calls it and says whether the kernel granted it; zygote.py decides
which are called, in which order and in which process.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import platform
import resource
import site
import struct
import sys
from collections.abc import Callable

BOX = "/box/tmp"  # in the private root: mount point of each child's own temporary folder
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
