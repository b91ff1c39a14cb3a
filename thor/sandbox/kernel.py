"""Linux kernel interfaces without a Python API: namespaces, private root, landlock, seccomp, memory pages.

Each function acts on the calling process and reports whether the kernel granted the request. `server.py` decides which
process calls which function, and in which order.
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

PRIVATE_TMP = "/box/tmp"  # in the private root: mount point of the temporary folder of each child
libc = ctypes.CDLL(None, use_errno=True)

# ---- kernel constants ----

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NAME, PR_GET_NAME, PR_SET_SECCOMP = 1, 4, 15, 16, 22
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_SET_THP_DISABLE = 36, 38, 41
LINUX_CAPABILITY_VERSION_3 = 0x20080522

CLONE_THREAD, CLONE_NEWNS = 1 << 16, 1 << 17
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 1 << 27, 1 << 28, 1 << 29, 1 << 30

MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 1 << 12, 1 << 14, 1 << 18
MNT_DETACH = 2
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 1, 2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000

MADV_POPULATE_WRITE, MADV_COLLAPSE = 23, 25

SYS_pivot_root = {"x86_64": 155, "aarch64": 41}.get(platform.machine(), -1)
SYS_mount_setattr = 442
SYS_landlock_create_ruleset, SYS_landlock_add_rule, SYS_landlock_restrict_self = 444, 445, 446

LANDLOCK_CREATE_RULESET_VERSION = 1
LANDLOCK_RULE_PATH_BENEATH = 1
LANDLOCK_ACCESS_FS_WRITE_FILE = 1 << 1
LANDLOCK_ACCESS_FS_READ_FILE = 1 << 2
LANDLOCK_ACCESS_FS_READ_DIR = 1 << 3
LANDLOCK_ACCESS_FS_REMOVE_DIR = 1 << 4
LANDLOCK_ACCESS_FS_REMOVE_FILE = 1 << 5
LANDLOCK_ACCESS_FS_MAKE_DIR = 1 << 7
LANDLOCK_ACCESS_FS_MAKE_REG = 1 << 8
LANDLOCK_ACCESS_FS_REFER = 1 << 13
LANDLOCK_ACCESS_FS_TRUNCATE = 1 << 14
LANDLOCK_ACCESS_NET_BIND_TCP, LANDLOCK_ACCESS_NET_CONNECT_TCP = 1, 2
LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET, LANDLOCK_SCOPE_SIGNAL = 1, 2

F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_GETLK, F_SETLK, F_SETLKW, F_DUPFD_CLOEXEC = *range(8), 1030
TCGETS, FIONREAD, FIONCLEX, FIOCLEX = 0x5401, 0x541B, 0x5450, 0x5451

SECCOMP_MODE_FILTER = 2
SECCOMP_RET_ERRNO, SECCOMP_RET_ALLOW = 0x50000, 0x7FFF0000
AUDIT_ARCH_X86_64, AUDIT_ARCH_AARCH64 = 0xC000003E, 0xC00000B7
X32_SYSCALL_BIT = 1 << 30
# Codes of BPF instructions: load a word of struct seccomp_data, return, jump if ==, jump if >=, jump if any bit is set
LOAD, RETURN, JUMP_EQ, JUMP_GE, JUMP_SET = 0x20, 0x06, 0x15, 0x35, 0x45

# ---- system calls ----


def call(name: str, *args: int | bytes | None) -> int:
    """Return the result of a C function; -1 if it fails or the platform does not have it."""
    if not sys.platform.startswith("linux") or not hasattr(libc, name):  # elsewhere the name can mean something else
        return -1
    return getattr(libc, name)(*(ctypes.c_long(a) if isinstance(a, int) else a for a in args))


def prctl(option: int, value: int) -> bool:
    """Set an attribute of this process."""
    return call("prctl", option, value, 0, 0, 0) == 0


def drop_capabilities() -> bool:
    """Give up all capabilities."""
    return call("capset", struct.pack("Ii", LINUX_CAPABILITY_VERSION_3, 0), bytes(24)) == 0


def in_fork(function: Callable[[], object]) -> object:
    """Call `function` in a forked child, which confines its side effects, and return its result as JSON data.

    Returns None if `function` raises.
    """
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


# ---- namespaces ----

NAMESPACES = {
    "net_namespace": CLONE_NEWNET,
    "pid_namespace": CLONE_NEWPID,
    "ipc_namespace": CLONE_NEWIPC,
    "mount_namespace": CLONE_NEWNS,
}


def enter_user_namespace() -> bool:
    """Enter a user namespace, in which an ordinary user may enter the other namespaces. User and group id are kept."""
    uid, gid = os.getuid(), os.getgid()
    if call("unshare", CLONE_NEWUSER) != 0:
        return False
    for name, text in ("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1"):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return True


def enter_namespaces(wanted: set[str]) -> set[str]:
    """Enter those of the wanted namespaces that the kernel grants. The PID namespace takes effect at the next fork."""
    flags = {name: flag for name, flag in NAMESPACES.items() if name in wanted}
    granted = {name for name, flag in flags.items() if call("unshare", flag) == 0}
    # Try it in a fork first: a half-configured user namespace would be worse than none.
    if flags and not granted and in_fork(lambda: enter_user_namespace() and call("unshare", CLONE_NEWNS) == 0):
        enter_user_namespace()
        granted = {name for name, flag in flags.items() if call("unshare", flag) == 0} | {"user_namespace"}
    return granted


# ---- private root ----


def python_paths() -> list[str]:
    """Return the paths that a running Python reads. Editable installs are excluded: they expose user projects."""
    own = tuple(prefix + os.sep for prefix in (sys.prefix, sys.base_prefix, site.getuserbase()))
    paths = [path for path in sys.path if path.startswith(own)] + [sys.base_prefix + "/lib", "/usr/local/lib"]
    paths += ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo", "/dev/urandom"]
    found = sorted({p for path in paths if os.path.exists(path) for p in (path, os.path.realpath(path))})
    return [p for p in found if not any(p.startswith(outer + os.sep) for outer in found)]


def enter_private_root(readable: list[str]) -> bool:
    """Pivot into an empty read-only root with only `readable` mounted in it. Requires a private mount namespace."""
    root = "/proc"  # a mount point that exists on every system and is no longer needed, so nothing is left outside
    if call("mount", b"none", b"/", None, MS_PRIVATE | MS_REC, None) != 0:
        return False
    if call("mount", b"root", root.encode(), b"tmpfs", 0, b"size=1m,mode=755") != 0:
        return False
    for path in [*readable, os.devnull]:
        folder = os.path.isdir(path)
        os.makedirs(root + (path if folder else os.path.dirname(path)), exist_ok=True)
        if not folder:
            open(root + path, "x").close()
        if call("mount", path.encode(), (root + path).encode(), None, MS_BIND | MS_REC, None) != 0:
            return False
    os.makedirs(root + PRIVATE_TMP)
    if not os.path.exists(root + "/tmp"):  # it exists if Python is installed below /tmp
        os.symlink(PRIVATE_TMP, root + "/tmp")
    attributes = struct.pack("4Q", MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    if call("syscall", SYS_mount_setattr, AT_FDCWD, root.encode(), AT_RECURSIVE, attributes, len(attributes)) != 0:
        return False
    os.chdir(root)
    if call("syscall", SYS_pivot_root, b".", b".") != 0:
        return False
    if call("umount2", b".", MNT_DETACH) != 0:
        raise OSError("cannot unmount the old root")
    os.chdir("/")
    return True


def mount_private_tmp(size: int) -> None:
    """Mount a tmpfs of `size` bytes at PRIVATE_TMP, visible to this process only and freed when it exits."""
    target, options = PRIVATE_TMP.encode(), f"size={size},nr_inodes=4096,mode=777".encode()
    if call("unshare", CLONE_NEWNS) or call("mount", b"box", target, b"tmpfs", MS_NOSUID | MS_NODEV, options):
        raise OSError("cannot mount a private temporary folder")


# ---- landlock ----


def apply_landlock(readable: list[str], writable: str) -> bool:
    """Restrict file access to reading below `readable` and writing below `writable`.

    Also blocks TCP, and signals and abstract Unix sockets to processes outside, as far as the kernel version supports.
    """
    abi = call("syscall", SYS_landlock_create_ruleset, None, 0, LANDLOCK_CREATE_RULESET_VERSION)
    if abi < 1:
        return False
    if writable == PRIVATE_TMP:  # the rights on a mount point are those of the folder that contains it
        writable = os.path.dirname(PRIVATE_TMP)
    handled = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1  # all file rights that this version knows
    net = LANDLOCK_ACCESS_NET_BIND_TCP | LANDLOCK_ACCESS_NET_CONNECT_TCP
    scope = LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET | LANDLOCK_SCOPE_SIGNAL
    attributes = struct.pack("3Q", handled, net, scope)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = call("syscall", SYS_landlock_create_ruleset, attributes, len(attributes), 0)
    read = LANDLOCK_ACCESS_FS_READ_FILE | LANDLOCK_ACCESS_FS_READ_DIR
    write = LANDLOCK_ACCESS_FS_WRITE_FILE | LANDLOCK_ACCESS_FS_TRUNCATE | LANDLOCK_ACCESS_FS_REFER
    write |= LANDLOCK_ACCESS_FS_MAKE_DIR | LANDLOCK_ACCESS_FS_MAKE_REG
    write |= LANDLOCK_ACCESS_FS_REMOVE_DIR | LANDLOCK_ACCESS_FS_REMOVE_FILE
    file_rights = LANDLOCK_ACCESS_FS_READ_FILE | LANDLOCK_ACCESS_FS_WRITE_FILE
    for path, rights in [*((path, read) for path in readable), (writable, read | write), (os.devnull, file_rights)]:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", rights & handled & (-1 if os.path.isdir(path) else file_rights), fd)
        if call("syscall", SYS_landlock_add_rule, ruleset, LANDLOCK_RULE_PATH_BENEATH, rule, 0) != 0:
            return False
        os.close(fd)
    return call("syscall", SYS_landlock_restrict_self, ruleset, 0) == 0


# ---- seccomp ----

# The allowed system calls: name, number on x86_64, number on aarch64 ("-": does not exist there).
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
OWN_PID = 0x7FFFFFF1  # placeholder for the pid of the child, which is known only after the fork
RULES = [  # allowed only if an argument has one of these values: (number on x86_64, on aarch64), argument, values
    ((62, 129), 0, (OWN_PID,)),  # kill
    ((234, 131), 0, (OWN_PID,)),  # tgkill
    ((302, 261), 0, (0,)),  # prlimit64: only of the calling process
    # fcntl: no owner, signal or lease
    ((72, 25), 1, (F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_GETLK, F_SETLK, F_SETLKW, F_DUPFD_CLOEXEC)),
    ((16, 29), 1, (TCGETS, FIONCLEX, FIOCLEX, FIONREAD)),  # ioctl
    ((157, 167), 0, (PR_SET_NAME, PR_GET_NAME)),  # prctl
]
CLONE, CLONE3 = (56, 220), (435, 435)


def seccomp_program() -> bytes | None:
    """Return the system call filter as BPF, or None on an architecture without a table. Other calls fail with EPERM."""
    machines = {"x86_64": (0, AUDIT_ARCH_X86_64), "aarch64": (1, AUDIT_ARCH_AARCH64)}
    column, arch = machines.get(platform.machine(), (0, 0))
    if not arch or sys.maxsize < 2**32:
        return None
    allow = (RETURN, 0, 0, SECCOMP_RET_ALLOW)
    refuse = (RETURN, 0, 0, SECCOMP_RET_ERRNO | errno.EPERM)
    # struct seccomp_data: the number of the call at offset 0, the architecture at 4, the arguments from 16
    code = [(LOAD, 0, 0, 4), (JUMP_EQ, 1, 0, arch), refuse, (LOAD, 0, 0, 0)]
    code += [(JUMP_GE, 0, 1, X32_SYSCALL_BIT), refuse]  # x32: a second table of x86_64
    for number in ALLOWED.split()[1 + column :: 3]:
        if number != "-":
            code += [(JUMP_EQ, 0, 1, int(number)), allow]
    tests = [(numbers, arg, JUMP_EQ, values) for numbers, arg, values in RULES]
    tests += [(CLONE, 0, JUMP_SET, (CLONE_THREAD,))]  # threads but no processes
    for numbers, arg, test, values in tests:
        code += [(JUMP_EQ, 0, len(values) + 3, numbers[column]), (LOAD, 0, 0, 16 + 8 * arg)]
        code += [(test, len(values) - i, 0, value) for i, value in enumerate(values)]
        code += [refuse, allow]
    # ENOSYS makes the C library fall back to clone.
    code += [(JUMP_EQ, 0, 1, CLONE3[column]), (RETURN, 0, 0, SECCOMP_RET_ERRNO | errno.ENOSYS), refuse]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def apply_seccomp(program: bytes) -> bool:
    """Install the system call filter for this process."""
    program = program.replace(struct.pack("I", OWN_PID), struct.pack("I", os.getpid()))
    buffer = ctypes.create_string_buffer(program, len(program))
    filters = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    return call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, filters, 0, 0) == 0


# ---- memory pages ----


def heap() -> list[tuple[int, int]]:
    """Return start and end address of the private anonymous memory regions of this process."""
    with contextlib.suppress(OSError), open("/proc/self/maps") as file:
        regions = [line.split() for line in file if " rw-p " in line]
        spans = [region[0].split("-") for region in regions if len(region) == 5 or region[5] == "[heap]"]
        return [(int(start, 16), int(end, 16)) for start, end in spans]
    return []


def use_huge_pages() -> None:
    """Move the heap to 2 MiB pages: fork and exit then copy and free far fewer page-table entries."""
    for start, end in heap():
        start, end = -(-start // 2**21) * 2**21, end // 2**21 * 2**21
        if start < end:
            call("madvise", start, end - start, MADV_COLLAPSE)  # fails for memory that is not in use yet


def pages_written(code: str) -> list[tuple[int, int]]:
    """Run `code` and return address and length of the shared heap pages that this process, a fork, had to copy."""
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


def copy_pages(spans: list[tuple[int, int]]) -> None:
    """Copy shared pages now, rather than at the first write to each of them."""
    for start, length in spans:
        call("madvise", start, length, MADV_POPULATE_WRITE)
