"""Hostile snippets, the checks after each of them, and a script that runs them all as the current user.

Used by test_executor_hostile.py and benchmarks/bench_executor.py. Needs only the standard library and `thor`, because
the Python that an unprivileged user can read may have no other packages.
"""

import contextlib
import json
import os
import secrets
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

from thor.sandbox import Executor

TIMEOUT = 0.8
ANY = ("ok", "error", "no_output", "timeout", "memory", "blocked")  # everything but 'infra'
FAILED = ("error", "no_output", "timeout", "memory", "blocked")
CALLS = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
DEADLY = "deadly"  # would harm this machine if no layer stopped it

# name -> (code, allowed statuses, required stdout or None for any, mark)
# Canary.fill replaces these words in the code: SECRET, VICTIM and FOLDER are paths outside the sandbox, PID is another
# process, CALLER the process of the tests, PORT a listening TCP and UDP port, UNIX and ABSTRACT are Unix sockets.
SNIPPETS: dict[str, tuple[str, tuple[str, ...], str | None, str]] = {}


def hostile(name: str, code: str, allowed: tuple[str, ...] = ANY, out: str | None = None, mark: str = "") -> None:
    assert name not in SNIPPETS
    SNIPPETS[name] = (code, allowed, out, mark)


def refused(name: str, code: str, mark: str = "") -> None:
    """Register code that must fail because an operation is refused, by whichever layer."""
    hostile(name, code, ("blocked", "error"), "", mark)


# ---- processes ----

hostile("fork_bomb", "import os\nwhile True:\n    os.fork()", ("blocked", "error"), mark=DEADLY)
stubborn = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
hostile("fork_bomb_that_ignores_errors", stubborn, ("timeout",), mark=DEADLY)
hostile("fork_in_c", CALLS + "print(libc.fork(), libc.vfork())", ("ok",), "-1 -1\n", DEADLY)
daemon = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(60)\n"
hostile("daemon", daemon + "    os._exit(0)\nprint(1)", FAILED)
refused("exec", "import os\nos.execv('/bin/sh', ['sh', '-c', 'touch FOLDER/new'])")
refused("subprocess", "import subprocess, sys\nsubprocess.run([sys.executable or 'python3', '-c', '1'], check=True)")
hostile("system", "import os\nprint(os.system('touch FOLDER/new') == 0)", ("ok",), "False\n")
refused("posix_spawn", "import os\nos.posix_spawn('/bin/sh', ['sh', '-c', 'touch FOLDER/new'], {})")
refused("multiprocessing", "import multiprocessing as m\np = m.get_context('fork').Process(target=print)\np.start()")
hostile(
    "threads", "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(9,)).start()", FAILED
)
small = "import threading, time\nthreading.stack_size(2**15)\nn = 0\nwhile True:\n    n += 1\n"
small += "    threading.Thread(target=time.sleep, args=(9,), daemon=True).start()"
hostile("threads_small_stacks", small, FAILED)

# ---- signals, inspection of other processes ----

refused("kill_zygote", "import os\nos.kill(os.getppid(), 9)", DEADLY)
refused("kill_caller", "import os\nos.kill(CALLER, 9)", DEADLY)
refused("kill_other", "import os\nos.kill(PID, 9)", DEADLY)
refused("kill_all", "import os\nos.kill(-1, 9)", DEADLY)
refused("kill_init", "import os\nos.kill(1, 15)", DEADLY)
refused("kill_group", "import os\nos.kill(0, 9)", DEADLY)
refused("kill_other_group", "import os\nos.killpg(os.getpgid(os.getppid()), 9)", DEADLY)
guess = (
    "import os\nfor pid in range(1, 40000):\n    if pid != os.getpid():\n        try:\n            os.kill(pid, 9)\n"
)
hostile("kill_every_pid", guess + "        except OSError: pass", ("no_output",), mark=DEADLY)
queue = "info = ctypes.create_string_buffer(128)\nprint(libc.sigqueue(PID, 9, 0), libc.syscall(129, PID, 9, info))"
hostile("sigqueue", CALLS + queue, ("ok",), "-1 -1\n", DEADLY)
hostile("pidfd", CALLS + "print(libc.syscall(434, PID, 0), libc.syscall(424, 3, 9, 0, 0))", ("ok",), "-1 -1\n", DEADLY)
hostile("tgkill", CALLS + "print(libc.tgkill(PID, PID, 9), libc.tgkill(1, 1, 9))", ("ok",), "-1 -1\n", DEADLY)
hostile("stop_itself", "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nprint(1)", ("timeout",), "")
hostile("kill_itself", "import os\nos.kill(os.getpid(), 9)\nprint(1)", ("error",), "")
hostile("real_time_signal", "import os\nos.kill(os.getpid(), 41)\nprint(1)", ("error",), "")
trace = "import os\nprint(libc.ptrace(16, PID, 0, 0), libc.ptrace(16, os.getppid(), 0, 0))"
hostile("ptrace", CALLS + trace, ("ok",), "-1 -1\n", DEADLY)
vm = "import os\nb = ctypes.create_string_buffer(64)\nv = (ctypes.c_size_t * 2)(ctypes.addressof(b), 64)\n"
vm += "for call in (libc.process_vm_readv, libc.process_vm_writev):\n"
vm += "    print(call(PID, v, 1, v, 1, 0), call(os.getppid(), v, 1, v, 1, 0))"
hostile("process_vm", CALLS + vm, ("ok",), "-1 -1\n-1 -1\n", DEADLY)
for target in ("mem", "environ", "maps", "cmdline"):
    refused(f"proc_{target}", f"print(open('/proc/CALLER/{target}', 'rb').read(100))")
every = "import glob\nfor path in glob.glob('/proc/*/environ') + glob.glob('/proc/*/task/*/environ'):\n"
hostile("proc_all", every + "    try:\n        print(open(path).read())\n    except OSError: pass", ("no_output",), "")
priority = "import os\nprint(libc.setpriority(0, os.getppid(), 19), libc.sched_setaffinity(PID, 8, b'1' * 8))"
hostile("change_priority_of_others", CALLS + priority, ("ok",), "-1 -1\n", DEADLY)
owner = "import os, fcntl\nfor command in (8, 10, 1024, 1026):\n    try:\n        print(fcntl.fcntl(1, command, PID))\n"
hostile("fcntl_owner", owner + "    except OSError: pass", ("no_output",), "")
refused("ioctl_tiocsti", "import fcntl\nfcntl.ioctl(0, 0x5412, b'x')")

# ---- secrets and files ----

hostile("read_environ", "import os\nprint(dict(os.environ), os.environb)", ("ok",))
env = "import ctypes\np = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), 'environ')\ni = 0\n"
hostile("read_environ_in_c", env + "while p and p[i]:\n    print(p[i])\n    i += 1")
keys = "import os, glob\nfor home in (os.path.expanduser('~'), '/root', *glob.glob('/home/*')):\n"
keys += "    for path in glob.glob(home + '/.*') + glob.glob(home + '/.ssh/*'):\n        try:\n"
hostile("home_keys", keys + "            print(open(path).read())\n        except OSError: pass", ("no_output",), "")
refused("read_secret", "print(open('SECRET').read())")
refused("read_secret_relative", "print(open('../' * 20 + 'SECRET').read())")
refused("read_secret_by_symlink", "import os\nos.symlink('SECRET', 'link')\nprint(open('link').read())")
refused("read_secret_by_hard_link", "import os\nos.link('SECRET', 'link')\nprint(open('link').read())")
refused("read_secret_by_proc_root", "print(open('/proc/1/root/SECRET').read())")
refused("read_secret_by_proc_cwd", "print(open('/proc/self/cwd/' + '../' * 20 + 'SECRET').read())")
handle = "h = ctypes.create_string_buffer(b'\\x80', 256)\nm = ctypes.c_int()\n"
handle += "print(libc.name_to_handle_at(-100, b'SECRET', h, ctypes.byref(m), 0), libc.open_by_handle_at(-100, h, 0))"
hostile("open_by_file_handle", CALLS + handle, ("ok",), "-1 -1\n")
passwd = "for path in ('/etc/passwd', '/etc/shadow', '/etc/hostname'):\n    try:\n        print(open(path).read())\n"
hostile("read_system_files", passwd + "    except OSError: pass", ("no_output",), "")
devices = (
    "for path in ('/dev/mem', '/dev/kmsg', '/dev/vda', '/dev/sda', '/dev/fuse'):\n    try:\n        open(path, 'rb')\n"
)
hostile("open_devices", devices + "        print(path)\n    except OSError: pass", ("no_output",), "")
refused("write_outside", "open('FOLDER/new', 'w').write('x')")
refused("overwrite", "open('VICTIM', 'w').write('x')")
refused("append", "open('VICTIM', 'a').write('x')")
refused("delete", "import os\nos.remove('VICTIM')")
refused("rename", "import os\nos.rename('VICTIM', 'FOLDER/new')")
refused("truncate", "import os\nos.truncate('VICTIM', 0)")
refused("chmod", "import os\nos.chmod('VICTIM', 0)")
refused("chown", "import os\nos.chown('VICTIM', os.getuid(), os.getgid())")
refused("utime", "import os\nos.utime('VICTIM', (0, 0))")
refused("mkdir", "import os\nos.mkdir('FOLDER/new')")
refused("rmtree", "import shutil\nshutil.rmtree('FOLDER')")
refused("mkfifo", "import os\nos.mkfifo('FOLDER/new')")
refused("xattr", "import os\nos.setxattr('VICTIM', 'user.x', b'1')")
refused("write_to_dev_shm", "open('/dev/shm/thor-new', 'w').write('x')")
refused("modify_library", "import os\nopen(os.__file__, 'a').write('#')")
refused("modify_bytecode", "import os, importlib.util as u\nopen(u.cache_from_source(os.__file__), 'wb').write(b'x')")
refused("import_thor", "import thor.sandbox.executor\nprint(thor)")
disk = "i = 0\nwhile True:\n    with open(str(i), 'wb') as file:\n        file.write(bytes(2**24))\n    i += 1"
hostile("fill_disk", disk, ("error", "timeout"), "")
files = "i = 0\nwhile True:\n    open(str(i), 'w').close()\n    i += 1"
hostile("exhaust_inodes", files, ("error", "timeout"), "")
hostile("big_file", "open('x', 'wb').truncate(2**40)", ("error",), "")
hostile("exhaust_descriptors", "import os\nwhile True:\n    os.dup(0)", ("error",), "")
leave = "import os\nprint(os.path.exists('left'), len(os.listdir('.')))\nopen('left', 'w').write('x')"
hostile("leave_file", leave, ("ok",), "False 0\n")
hostile("leave_file_again", leave, ("ok",), "False 0\n")
neighbours = "import os, glob\nfor path in glob.glob('../*') + glob.glob('/tmp/thor-executor-*/*'):\n    try:\n"
neighbours += "        if not os.path.samefile(path, '.'): open(path + '/left', 'w').write('x'), print(path)\n"
hostile("write_to_folders_of_other_children", neighbours + "    except OSError: pass", ("no_output",), "")

# ---- network ----

tcp = "import socket\ns = socket.create_connection(('127.0.0.1', PORT), 1)\ns.send(b'x')"
refused("tcp", tcp)
refused("udp", "import socket\nsocket.socket(2, 2).sendto(b'x', ('127.0.0.1', PORT))")
refused("listen", "import socket\ns = socket.socket()\ns.bind(('0.0.0.0', 0))\ns.listen()\nprint(s)")
refused("unix_socket", "import socket\ns = socket.socket(1)\ns.connect('UNIX')\ns.send(b'x')")
refused("abstract_socket", "import socket\ns = socket.socket(1)\ns.connect('\\0ABSTRACT')\ns.send(b'x')")
refused("raw_socket", "import socket\nprint(socket.socket(2, 3, 1))")
refused("netlink", "import socket\nprint(socket.socket(16, 3, 0))")
refused("dns", "import socket\nprint(socket.getaddrinfo('example.com', 80))")
refused("http", "import urllib.request\nprint(urllib.request.urlopen('http://127.0.0.1:PORT').read())")

# ---- kernel interfaces ----

numbers = "io_uring_setup 425 perf_event_open 298 bpf 321 keyctl 250 add_key 248 memfd_create 319 userfaultfd 323 "
numbers += (
    "shmget 29 msgget 68 semget 64 mq_open 240 unshare 272 setns 308 mount 165 umount2 166 chroot 161 swapon 167 "
)
numbers += "pivot_root 155 reboot 169 init_module 175 kexec_load 246 acct 163 sethostname 170 settimeofday 164 "
numbers += "personality 135 modify_ldt 154 iopl 172 ioperm 173 inotify_init 253 fanotify_init 300 kcmp 312 ptrace 101 "
numbers += "socket 41 socketpair 53 mlockall 151 quotactl 179 clock_settime 227 clone3 435 fsopen 430 mount_setattr 442"
tables = f"for name, n in zip(*[iter({numbers!r}.split())] * 2):\n    if libc.syscall(int(n), 0, 0, 0, 0, 0) >= 0:\n"
if os.uname().machine == "x86_64":
    hostile("forbidden_system_calls", CALLS + tables + "        print(name)", ("no_output",), "", DEADLY)
    other = "import mmap\nm = mmap.mmap(-1, 4096, prot=7)\nm.write(bytes.fromhex('b814000000cd80c3'))\n"
    other += "print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))() > 0)"
    hostile("i386_system_calls", CALLS + other, ("ok", "error"), None)
    hostile("x32_system_calls", CALLS + "print(libc.syscall(0x40000000 + 39))", ("ok",), "-1\n")
refused("set_uid", "import os\nos.setresuid(0, 0, 0)\nprint(open('SECRET').read())")
limit = "import resource as r\nfor kind in (r.RLIMIT_AS, r.RLIMIT_CPU, r.RLIMIT_NOFILE, r.RLIMIT_FSIZE):\n    try:\n"
limit += "        r.setrlimit(kind, (-1, -1))\n        print(kind)\n    except (ValueError, OSError): pass"
hostile("raise_limits", limit, ("no_output",), "")
refused("limits_of_other_process", "import resource as r\nr.prlimit(PID, r.RLIMIT_CPU, (0, 0))", DEADLY)
cap = "libc.capset(b'\\x22\\x05\\x08\\x20\\0\\0\\0\\0', b'\\xff' * 24)\n"
refused("capabilities", CALLS + cap + "open('SECRET')")
shared = "from multiprocessing import shared_memory\nprint(shared_memory.SharedMemory(create=True, size=2**20))"
refused("shared_memory", shared)

# ---- time ----

for name, caught in {"ignore_signals": "pass", "catch_everything": "raise KeyboardInterrupt"}.items():
    code = (
        "import signal\nfor s in set(signal.valid_signals()) - {9, 19, 32, 33}:\n    signal.signal(s, signal.SIG_IGN)\n"
    )
    code += f"while True:\n    try:\n        {caught}\n    except BaseException: pass"
    hostile(name, code, ("timeout",), "")
hostile("sleep", "import time\ntime.sleep(60)\nprint(1)", ("timeout",), "")
hostile("hang_in_c", "sum(range(10**13))", ("timeout",), "")
hostile("regex_backtracking", "import re\nre.match('(a+)+$', 'a' * 60 + 'b')", ("timeout",), "")
hostile("factor_integer", "from sympy import factorint\nprint(factorint((10**37 + 43) * (10**41 + 9)))", FAILED, "")
hostile("power_tower", "print(9**9**9)", FAILED, "")
hostile("huge_int_to_str", "import sys\nsys.set_int_max_str_digits(0)\nprint(len(str(7**(10**7))))", ANY)
hostile("hang_at_exit", "import atexit, time\natexit.register(time.sleep, 60)\nprint(1)", ("ok", "timeout"))
final = "import time\nclass A:\n    def __del__(self): time.sleep(60)\na = A()\nprint(1)"
hostile("hang_in_finalizer", final, ("ok", "timeout"))
hostile(
    "hang_in_thread", "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()", ("timeout",)
)
hang_str = "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E"
hostile("hang_in_exception_str", hang_str, ("timeout",), "")
hang_handler = (
    "import signal, time\nsignal.signal(14, lambda *_: time.sleep(60))\nsignal.setitimer(0, 0.01)\ntime.sleep(1)"
)
hostile("hang_in_handler", hang_handler, ("timeout",), "")
alarm = "import signal\ndef stop(*_): raise TimeoutError\nsignal.signal(14, stop)\nsignal.setitimer(0, 0.05)\n"
alarm += "n = 0\ntry:\n    while True:\n        n += 1\nexcept TimeoutError: print('out')"
hostile("own_timer_works", alarm, ("ok",), "out\n")

# ---- memory and size ----

hostile("list_bomb", "x = [0]\nwhile True:\n    x += x", ("memory", "timeout"), "")
hostile("bytes_bomb", "x = bytearray(10**11)", ("memory",), "")
grab = "x = []\nwhile True:\n    try:\n        x.append(bytearray(2**24))\n    except MemoryError: pass"
hostile("memory_bomb_that_ignores_errors", grab, ("timeout",), "")
hostile(
    "shared_mapping", "import mmap\nx = [mmap.mmap(-1, 2**28) for _ in range(64)]", ("error", "memory", "blocked"), ""
)
hostile("deep_recursion", "def f(): return f()\nf()", ("error",), "")
deep = (
    "import sys\nsys.setrecursionlimit(10**9)\nclass A:\n    def __getattr__(self, n): return getattr(self, n + 'x')\n"
)
hostile("deep_recursion_in_c", deep + "A().x", FAILED, "")
hostile("nested_source", "(" * 10**5 + ")" * 10**5, ("error", "memory"), "")
hostile("nested_unary_minus", "x = " + "-" * 10**6 + "1", ("error", "memory"), "")
hostile("big_source", "x = 1\n" * 400_000, FAILED, "")
hostile("folded_constant", "x = 'a' * 10**8 * 10**3", FAILED, "")
hostile("segfault", "import ctypes\nctypes.string_at(0)", ("error",), "")
hostile("abort", "import os\nos.abort()", ("error",), "")

# ---- output and results ----

hostile("print_forever", "while True: print('x' * 1000)", ("timeout",))
hostile("print_1gb", "for _ in range(1000): print('x' * 10**6)", ("ok", "timeout"))
raw = "import os\nb = b'x' * 2**16\nwhile True:\n    os.write(FD, b)"
hostile("write_stdout_forever", raw.replace("FD", "1"), ("timeout",))
hostile("write_stderr_forever", raw.replace("FD", "2"), ("timeout",), "")
hostile("write_channel_forever", raw.replace("FD", "3"), ("timeout",), "")
forge = "import os, json\nfor fd in range(256):\n    for line in (b'R', b'ok', b'X' + bytes(23)):\n        try:\n"
forge += "            if fd != 1: os.write(fd, line)\n        except OSError: pass\nraise ValueError"
hostile("forge_messages_on_descriptors", forge, ("error",), "")
peek = "import os\nfor fd in [0, *range(3, 256)]:\n    try:\n        print(os.read(fd, 99) or '')\n"
hostile("read_descriptors", peek + "    except OSError: pass", ("no_output",))
frames = "import sys\nf = sys._getframe()\nwhile f := f.f_back:\n    zygote = f.f_locals.get('self')\n"
frames += "    if hasattr(zygote, 'control'):\n        zygote.control.send(b'X' * 240)"
refused("forge_through_frames", frames)
for code in (1, 91, 92, 93, 137, 255):
    hostile(f"forge_exit_{code}", f"import os\nprint('42')\nos._exit({code})", FAILED)
hostile("exit_0_without_output", "import os\nos._exit(0)", ("no_output",), "")
hostile("exit_0_after_print", "import os\nprint(1)\nos._exit(0)", ("ok",), "1\n")
hostile("sys_exit_0", "print(1)\nraise SystemExit(0)", ("ok",), "1\n")
hostile("sys_exit_text", "print(1)\nraise SystemExit('bad')", ("error",), "1\n")
hostile("close_stdout", "import sys\nprint(1)\nsys.stdout.close()", ("ok",), "1\n")
hostile("stdout_is_none", "import sys\nsys.stdout = None\nprint(1)", ("no_output",), "")
hostile("close_descriptors", "import os\nos.closerange(0, 1000)\nprint(1)", ("no_output", "error"))
hostile("replace_stdout", "import sys, io\nsys.stdout = io.StringIO()\nprint(1)", ("no_output",), "")
hostile("surrogates", "print('a\\ud800b')", ("ok",), "a?b\n")
hostile("surrogate_in_source", "print('\ud800')", ("error",), "")
hostile("nul_in_source", "print(1)\0", ("error",), "")
hostile("invalid_utf8", "import sys\nsys.stdout.buffer.write(b'a\\xff')", ("ok",), "a\ufffd")
hostile("nul_in_output", "print('a\\0b')", ("ok",), "a\0b\n")
hostile("read_input", "print(input())", ("error",), "")
hostile("read_stdin", "import sys\nprint(repr(sys.stdin.read()))", ("ok",), "''\n")
hostile("long_error_text", "raise ValueError('x' * 10**6 + '\\n' * 10**5)", ("error",), "")

# ---- state that could leak into the next snippet ----

patch = "import builtins, math, sys\nbuiltins.print = builtins.sum = lambda *a, **k: 0\nmath.gcd = None\n"
hostile("patch_builtins", patch + "sys.modules.clear()", ("no_output", "error"))
hostile("patch_numpy", "import numpy\nnumpy.sum = numpy.linalg.inv = None\nnumpy.pi = 3", ("no_output", "error"))
hostile(
    "patch_sympy", "import sympy\nsympy.Integer.__add__ = lambda a, b: 0\nsympy.S.One.p = 7", ("no_output", "error")
)
hostile("patch_import", "import sys\nsys.path[:] = ['.']\nsys.meta_path.clear()", ("no_output",))
memory = "import gc, sys, re\nmarks = re.compile('CANA' + 'RY-[0-9a-f]{16}')\nfor x in gc.get_objects():\n    try:\n"
hostile(
    "search_own_memory",
    memory + "        for m in marks.findall(repr(x)[:10**5]): print(m)\n    except BaseException: pass",
)


class Canary:
    """Resources that a snippet must not touch: a folder with files, a process, listening sockets, a secret."""

    def __init__(self):
        self.token = f"CANARY-{secrets.token_hex(8)}"
        os.environ["THOR_CANARY_KEY"] = self.token
        self.folder = Path(tempfile.mkdtemp(prefix="thor-canary-"))
        self.folder.chmod(0o777)
        for name in ("secret", "victim"):
            (self.folder / name).write_text(self.token)
            (self.folder / name).chmod(0o666)
        self.process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        self.tcp, self.udp = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.port = self.tcp.getsockname()[1]
        self.udp.bind(("127.0.0.1", self.port))
        self.unix, self.abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        self.unix.bind(str(self.folder / "socket"))
        (self.folder / "socket").chmod(0o777)
        self.abstract.bind("\0" + self.token if sys.platform == "linux" else str(self.folder / "other"))
        self.unix.listen(), self.abstract.listen()
        self.before = self.state()

    def fill(self, code: str) -> str:
        """Replace the placeholders in a snippet."""
        names = {"SECRET": self.folder / "secret", "VICTIM": self.folder / "victim", "FOLDER": self.folder}
        names |= {"PID": self.process.pid, "CALLER": os.getpid(), "PORT": self.port, "UNIX": self.folder / "socket"}
        for name, value in names.items():
            code = code.replace(name, str(value))
        return code.replace("ABSTRACT", self.token[:6] + "' + '" + self.token[6:])

    def state(self) -> list:
        return [(p.name, p.stat().st_mode, p.stat().st_mtime, p.stat().st_uid) for p in sorted(self.folder.glob("*"))]

    def harm(self) -> str:
        """Describe what was touched; an empty string if nothing was."""
        if self.process.poll() is not None:
            return "the canary process was killed"
        if self.state() != self.before or (self.folder / "victim").read_text() != self.token:
            return f"files changed: {self.state()}"
        for name in ("tcp", "udp", "unix", "abstract"):
            if select.select([getattr(self, name)], [], [], 0)[0]:
                return f"received data on socket: {name}"
        return "" if not os.path.exists("/dev/shm/thor-new") else "file in /dev/shm"

    def close(self) -> None:
        self.process.kill(), self.process.wait()
        for s in (self.tcp, self.udp, self.unix, self.abstract):
            s.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.unlink("/dev/shm/thor-new")


def server_processes(executor: Executor) -> list[int]:
    """Return the pids of the server process and its descendants, which share its command line."""
    mark, found = "\0".join(executor._process.args[1:]), []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if mark in path.read_text():
                found.append(int(path.parent.name))
    return sorted(found)


def start() -> Executor:
    return Executor(workers=2, timeout=TIMEOUT, memory_mb=256)


def check(executor: Executor, canary: Canary, name: str) -> str:
    """Run one snippet and describe what went wrong: empty if nothing, 'skip: ...' if it cannot be run safely."""
    for _ in range(3):
        found = attempt(executor, canary, name)
        if "reply after" not in found and "status='timeout'" not in found:  # retry: the machine may be busy
            break
    return found


def attempt(executor: Executor, canary: Canary, name: str) -> str:
    code, allowed, out, mark = SNIPPETS[name]
    if mark == DEADLY:
        signal_0 = executor.run(["import os\nos.kill(os.getppid(), 0)"])[0]
        if signal_0.status != "blocked" or not executor.protection["seccomp"]:
            return "skip: seccomp is not in force"
        if os.getuid() == 0 and not executor.protection["pid_namespace"]:
            return "skip: running as root without a PID namespace"
    started = time.monotonic()
    result = executor.submit(canary.fill(code)).result(30)
    seconds = time.monotonic() - started
    if seconds > TIMEOUT + 0.5:
        return f"reply after {seconds:.2f} s"
    if result.status not in allowed or (out is not None and result.stdout != out):
        return f"unexpected result: {result!r}"[:1000]
    if canary.token in result.stdout + result.error:
        return "the secret leaked"
    if len(result.stdout) + len(result.error) > 2**17:
        return "output was not capped"
    following = executor.submit("import math\nprint(sum([math.gcd(12, 18), 1]), 'left' in globals())").result(30)
    if following.stdout != "7 False\n":
        return f"unexpected result of the next snippet: {following!r}"
    deadline = time.monotonic() + 3
    while len(server_processes(executor)) > executor._config["children"] + 2:
        if time.monotonic() > deadline:
            return "a process was left behind"
        time.sleep(0.02)
    return canary.harm()


@contextlib.contextmanager
def as_ordinary_user(script: str, *arguments: str):
    """Run `script` (a path relative to the project) as user 65534, from a copy of the project that this user can read.

    Yields the process, or None if the caller is not root or this user cannot read any Python installation.
    """
    root = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory(prefix="thor-hostile-") as folder:
        for name in ("thor", "tests"):
            shutil.copytree(root / name, Path(folder) / name, ignore=shutil.ignore_patterns("__pycache__"))
        for path in (Path(folder), *Path(folder).rglob("*")):
            path.chmod(0o755)
        options = {"user": 65534, "group": 65534, "extra_groups": [], "cwd": "/", "env": {"PYTHONPATH": folder}}
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        version = "import sys; assert sys.version_info >= (3, 10)"
        for python in (sys.executable, "/usr/bin/python3") if os.getuid() == 0 else ():
            with contextlib.suppress(OSError):
                if subprocess.run([python, "-c", version], **options).returncode == 0:
                    with subprocess.Popen([python, str(Path(folder) / script), *arguments], **options) as process:
                        yield process
                        process.kill()
                        return
        yield None


def main() -> None:
    """Run all snippets and print one JSON object that maps each name to what went wrong."""
    warnings.simplefilter("ignore")
    canary = Canary()
    with start() as executor:
        found = {"protection": executor.protection, "uid": os.getuid()}
        found |= {name: check(executor, canary, name) for name in SNIPPETS}
    canary.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
