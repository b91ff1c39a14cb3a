"""The executor: result statuses, order, limits, isolation between snippets, recovery and cleanup."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from thor.sandbox import Executor, protection
from thor.sandbox import executor as executor_module
from thor.sandbox.executor import OUTPUT_CAP

ROOT = Path(__file__).resolve().parents[1]
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def ex():
    with Executor(workers=2, timeout=2.0, memory_mb=256) as executor:
        yield executor


def one(ex, code):
    return ex.submit(code).result(timeout=30)


def servers(ex) -> list[int]:
    """Pids of the server and its forks. They share a command line, which is unique to this executor."""
    found, mark = [], "\0".join(ex._process.args[1:])
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if mark in path.read_text() and path.with_name("exe").is_symlink():
                found.append(int(path.parent.name))
    return sorted(found)


def wait_until(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


SOLVE = "from sympy import *\nx = symbols('x')\nprint(solve(x**2 - 4))"


@pytest.mark.parametrize(
    "code, status, stdout, error",
    [
        ("print(1 + 1)", "ok", "2\n", ""),
        (SOLVE, "ok", "[-2, 2]\n", ""),
        ("import numpy\nprint(numpy.arange(3).sum())", "ok", "3\n", ""),
        ("1 + 1", "no_output", "", "no output: use print()"),
        ("", "no_output", "", "no output: use print()"),
        ("print()", "no_output", "\n", "no output: use print()"),
        ("print(3)\n\nx", "error", "3\n", "NameError: name 'x' is not defined (line 3)"),
        ("def f():\n    return 1 / 0\nf()", "error", "", "ZeroDivisionError: division by zero (line 2)"),
        ("import json\n\njson.loads('x')", "error", "", None),
        ("x = = 1", "error", "", "SyntaxError: invalid syntax (line 1)"),
        ("assert 1 == 2", "error", "", "AssertionError (line 1)"),
        ("raise ValueError('a\\nb')", "error", "", "ValueError: a b (line 1)"),
        ("while True: pass", "timeout", "", "TimeoutError: no result within 2 s"),
        ("import time\ntime.sleep(60)", "timeout", "", "TimeoutError: no result within 2 s"),
        ("x = bytearray(10**10)", "memory", "", "MemoryError (line 1)"),
        ("import socket\nsocket.socket()", "blocked", "", None),
        ("import os\nos.fork()", "blocked", "", "PermissionError: [Errno 1] Operation not permitted (line 2)"),
        ("print(1)\nimport os\nos._exit(0)", "ok", "1\n", ""),
        ("print(1)\nraise SystemExit(0)", "ok", "1\n", ""),
        ("exit()", "no_output", "", "no output: use print()"),
        ("raise SystemExit(3)", "error", "", "SystemExit: 3"),
        ("import os\nos._exit(7)", "error", "", "SystemExit: 7"),
        ("import ctypes\nctypes.string_at(0)", "error", "", "the interpreter crashed: SIGSEGV"),
        ("import warnings\nwarnings.warn('careful')\nprint(1)", "ok", "1\n", ""),
        ("import threading\nthreading.Thread(target=print, args=(5,)).start()", "ok", "5\n", ""),
        ("print(__name__)", "ok", "__main__\n", ""),
        ("print(input())", "error", "", "EOFError: EOF when reading a line (line 1)"),
        ("print(len(str(3**20000)), int('7' * 5000) % 10)", "ok", "9543 7\n", ""),
    ],
)
def test_status_stdout_and_error(ex, code, status, stdout, error):
    result = one(ex, code)
    assert (result.status, result.stdout) == (status, stdout)
    assert error in (None, result.error) and "\n" not in result.error
    assert result.passed == (status == "ok") and 0 < result.seconds < ex.timeout + 0.5


def test_error_in_library_names_line_of_snippet(ex):
    assert one(ex, "import json\n\njson.loads('x')").error.endswith("line 1 column 1 (char 0) (line 3)")


@pytest.mark.parametrize(
    "ending, status",
    [
        ("1 / 0", "error"),
        ("raise SystemExit(3)", "error"),
        ("while True: pass", "timeout"),
        ("import time; time.sleep(60)", "timeout"),
        ("bytearray(10**12)", "memory"),
        ("import os; os.fork()", "blocked"),
        ("import os; os.abort()", "error"),
        ("import os; os._exit(0)", "ok"),
    ],
)
def test_what_was_printed_before_the_end_is_returned(ex, ending, status):
    """Incomplete lines too, and what was written to the binary stream."""
    result = one(ex, f"import sys\nprint('é', 1)\nsys.stdout.buffer.write(b'2\\n')\nprint(3, end='')\n{ending}")
    assert (result.status, result.stdout) == (status, "é 1\n2\n3")


def test_write_accepts_buffers_of_other_item_sizes(ex):
    code = "import array, sys\nprint(sys.stdout.buffer.write(array.array('I', [0x31313131] * 2)))"
    assert one(ex, code).stdout == "111111118\n"


def test_results_are_in_submission_order(ex):
    codes = [f"import time\ntime.sleep({0.05 * (i % 3)})\nprint({i})" for i in range(12)]
    assert [r.stdout for r in ex.run(codes)] == [f"{i}\n" for i in range(12)]
    assert ex.run([]) == []


def test_submit_from_threads_and_asyncio(ex):
    found = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: one(ex, f"print({i})").stdout})) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: f"{i}\n" for i in range(8)}

    async def gather():
        return await asyncio.gather(*(asyncio.wrap_future(ex.submit(f"print({i})")) for i in range(4)))

    assert [r.stdout for r in asyncio.run(gather())] == ["0\n", "1\n", "2\n", "3\n"]


def test_snippets_share_no_state_and_are_deterministic(ex):
    one(ex, "import sympy, builtins\nsympy.pi = 3\nbuiltins.left = 1\nopen('file', 'w').write('x')")
    code = "import os, sympy, random, numpy\n"
    code += "print(sympy.pi, 'left' in dir(__builtins__), os.listdir('.'), dict(os.environ))\n"
    code += "print(random.random(), numpy.random.rand(), hash('a'), {'a', 'b', 'c', 'd'})"
    first, second = ex.run([code, code])
    assert first.stdout == second.stdout and first.stdout.startswith("pi False [] {}\n")


def test_server_process_loads_only_its_own_modules():
    code = "from thor.sandbox import server; import sys; print(*sorted(m for m in sys.modules if m.startswith('thor')))"
    loaded = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    modules = ("", ".kernel", ".protocol", ".server", ".snippet")
    assert loaded.stdout.split() == ["thor", *("thor.sandbox" + module for module in modules)]


def test_executor_needs_only_the_standard_library():
    code = "from thor.sandbox import Executor\nwith Executor(workers=1) as ex: print(ex.run(['print(1)'])[0].stdout)"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "1", done.stderr


@pytest.mark.parametrize("name", ["thor", "thor.trajectory", "thor.sandbox.executor", "thor.sandbox.server"])
def test_snippets_cannot_import_thor(ex, name):
    assert one(ex, f"import {name}").error == "ModuleNotFoundError: No module named 'thor' (line 1)"


@pytest.mark.parametrize(
    "module, code, stdout",
    [
        ("scipy", "from scipy.optimize import brentq\nprint(round(brentq(lambda x: x**2 - 2, 0, 2), 6))", "1.414214\n"),
        ("scipy", "from scipy.integrate import quad\nprint(round(quad(lambda x: x, 0, 1)[0], 6))", "0.5\n"),
        ("scipy", "from scipy.stats import norm\nprint(norm.cdf(0))", "0.5\n"),
        (
            "matplotlib",
            "import os\nimport matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()\nplt.savefig('a.png')\n"
            "print(os.path.getsize('a.png') > 1000, plt.get_backend())",
            "True agg\n",
        ),
    ],
)
def test_libraries_work_if_they_are_installed(module, code, stdout):
    pytest.importorskip(module)
    with Executor(workers=1, timeout=60) as ex:
        result = one(ex, code)
    assert (result.stdout, result.error) == (stdout, "")


def test_temporary_files_work(ex):
    code = "import tempfile\nwith tempfile.NamedTemporaryFile('w+') as f:\n    f.write('a'), f.seek(0)\n"
    assert one(ex, code + "    print(f.read())").stdout == "a\n"


def test_snippet_can_use_alarm(ex):
    code = "import signal, time\nsignal.signal(14, lambda *_: print('alarm'))\nsignal.alarm(1)\ntime.sleep(1.2)"
    assert one(ex, code).stdout == "alarm\n"


@pytest.mark.parametrize("size", [OUTPUT_CAP - 1, OUTPUT_CAP, OUTPUT_CAP + 1, 10**7])
@pytest.mark.parametrize(
    "how", ["print('x' * {}, end='')", "import os\nb = b'x' * {}\nwhile b: b = b[os.write(1, b):]"]
)
def test_output_is_capped(ex, size, how):
    result = one(ex, how.format(size))
    assert result.status == "ok" and result.stdout.startswith("x" * min(size, OUTPUT_CAP))
    assert ("output cut" in result.stdout) == (size > OUTPUT_CAP) and len(result.stdout) < OUTPUT_CAP + 100


def test_long_source_and_unusual_characters(ex):
    assert one(ex, "# " + "x" * 5_000_000 + "\nprint('é∑😀')").stdout == "é∑😀\n"
    assert one(ex, "print('\\ud800')").stdout == "?\n"
    assert one(ex, "print('\ud800')").status == one(ex, "print(1)\0").status == "error"


def test_memory_limit_is_1_gib_by_default():
    with Executor(workers=1, preload=()) as ex:
        codes = [f"x = bytearray({size} * 2**20)\nprint(len(x))" for size in (900, 1100)]
        assert [result.status for result in ex.run(codes)] == ["ok", "memory"]


def test_queued_snippet_can_be_cancelled(ex):
    busy = [ex.submit("import time\ntime.sleep(0.3)\nprint(1)") for _ in range(4)]
    last = ex.submit("print(2)")
    assert last.cancel() and all(future.result().passed for future in busy)


def test_invalid_arguments_are_rejected():
    for arguments in ({"workers": 0}, {"timeout": 0}, {"memory_mb": -1}):
        with pytest.raises(ValueError, match="must be positive"):
            Executor(**arguments)
    with pytest.raises(ValueError, match="choose from network"):
        Executor(workers=1, preload=(), require=("nonsense",))


@linux
def test_killed_server_is_restarted_and_snippets_are_retried():
    with Executor(workers=2, timeout=10, preload=()) as ex:
        for victim in (0, -1):  # the first process, then one of the others
            slow = [ex.submit("import time\ntime.sleep(1)\nprint(1)") for _ in range(2)]
            time.sleep(0.3)
            os.kill((servers(ex)[:2])[victim], signal.SIGKILL)
            assert [future.result(timeout=30).status for future in slow] == ["ok", "ok"]
        doomed = ex.submit("import time\ntime.sleep(5)\nprint(1)")
        for _ in range(2):
            assert wait_until(lambda: any(child.job for child in list(ex._children.values())))
            time.sleep(0.1)
            os.kill(ex._process.pid, signal.SIGKILL)
            time.sleep(0.1)
        assert doomed.result(timeout=30).status == "infra"
        assert one(ex, "print(3)").stdout == "3\n"


@linux
def test_stopped_server_is_replaced(monkeypatch):
    monkeypatch.setattr(executor_module, "STALL_TIMEOUT", 0.5)
    with Executor(workers=1, timeout=0.5, preload=()) as ex:
        for pid in servers(ex):
            os.kill(pid, signal.SIGSTOP)
        assert [r.status for r in ex.run(["print(1)"] * 3)][-1] == "ok"


@linux
def test_close_frees_all_resources():
    def descriptors():
        return len(os.listdir("/proc/self/fd"))

    before, threads = descriptors(), threading.active_count()
    ex = Executor(workers=2, timeout=30, preload=())
    running = [ex.submit("while True: pass") for _ in range(3)]
    time.sleep(0.2)
    started = time.monotonic()
    ex.close()
    assert time.monotonic() - started < 2
    ex.close()
    assert [future.result(timeout=1).status for future in running] == ["infra"] * 3
    assert wait_until(lambda: not servers(ex)) and descriptors() == before and threading.active_count() == threads
    with pytest.raises(RuntimeError, match="closed"):
        ex.submit("print(1)")


@linux
def test_no_leak_of_descriptors_or_processes():
    with Executor(workers=2, preload=()) as ex:

        def counts():  # once all idle children are ready
            wait_until(lambda: len(ex._idle) == ex._config["children"])
            return len(os.listdir("/proc/self/fd")), len(servers(ex))

        ex.run(["print(1)"] * 20)
        before = counts()
        ex.run(["print(1)", "x", "import os\nos.abort()", "open('a', 'w').write('b')"] * 50)
        assert counts() == before


CALLER = """
import os, signal, sys, time
from thor.sandbox import Executor
ex = Executor(workers=2, timeout=60, preload=())
ex.submit("while True: pass")
if sys.argv[1] == "fork":  # a process that outlives the caller and inherits its descriptors
    if os.fork() == 0:
        os.setsid()
        time.sleep(20)
        os._exit(0)
time.sleep(0.2)
print(*ex._process.args[1:], sep="\\0", flush=True)
if sys.argv[1] in ("crash", "fork"):
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "error":
    raise RuntimeError
"""


@linux
@pytest.mark.parametrize("how", ["exit", "crash", "error", "fork"])
def test_server_exits_with_its_caller(how):
    with subprocess.Popen(
        [sys.executable, "-c", CALLER, how], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT, text=True
    ) as process:
        mark = process.stdout.readline().strip()

        def left():
            found = 0
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    found += mark in path.read_text()
            return found

        assert "server.main()" in mark
        process.stdout.close()
    assert wait_until(lambda: left() == 0)


def test_missing_layers_are_reported_and_required_ones_raise(monkeypatch):
    monkeypatch.setattr(Executor, "_layers", ("rlimits",))
    monkeypatch.setattr(protection, "_warned", set())
    with pytest.warns(UserWarning) as caught, Executor(workers=1, timeout=2, preload=()) as ex:
        assert not ex.protection["network"] and not ex.protection["filesystem"] and ex.protection["rlimits"]
        assert [r.status for r in ex.run(["print(1)", "x", "while True: pass"])] == ["ok", "error", "timeout"]
    for name in ("seccomp", "landlock", "net_namespace", "pid_namespace", "mount_namespace"):
        assert [name in str(warning.message) for warning in caught].count(True) >= 1, name
    with pytest.raises(RuntimeError, match="network"):
        Executor(workers=1, preload=(), require=("memory", "network"))
    assert set(protection.LAYERS) < set(ex.protection)


@linux
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_descendants_are_killed_without_seccomp(monkeypatch):
    monkeypatch.setattr(Executor, "_layers", ())
    code = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(60)\n"
    with Executor(workers=1, timeout=5, preload=()) as ex:
        assert one(ex, code + "    os._exit(0)\nos.wait()\nprint(1)").stdout == "1\n"
        assert wait_until(lambda: len(ex._idle) == ex._config["children"] and len(servers(ex)) == 4)
    assert wait_until(lambda: not servers(ex))


@linux
def test_server_environment_contains_no_secrets(ex):
    os.environ["THOR_TEST_KEY"] = "hunter2"
    try:
        with Executor(workers=1, preload=()) as other:
            seen = b"".join(Path(f"/proc/{pid}/environ").read_bytes() for pid in servers(other)[:1])
    finally:
        del os.environ["THOR_TEST_KEY"]
    assert b"hunter2" not in seen and json.loads(ex._process.args[-1])["memory_mb"] == 256
