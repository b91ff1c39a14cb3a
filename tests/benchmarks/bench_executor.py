"""Benchmark the executor against two common alternatives, and measure the cost of each protection layer.

    python tests/benchmarks/bench_executor.py               latency, throughput, layers, memory: about two minutes
    python tests/benchmarks/bench_executor.py --soak 20000  mixed snippets, 5% hostile, from 4 threads
    python tests/benchmarks/bench_executor.py --hostile     how many hostile snippets exec pool and executor contain

Compared methods:

    subprocess  a new interpreter per snippet
    exec        a process pool that calls exec() on the snippet with the libraries loaded, as the evaluators of several
                RL projects do: no isolation, and no limit except a timeout
    ours        thor.sandbox.Executor

Rates are medians over repeated runs. Layer costs are differences between the fastest runs. The last line of the output
is JSON.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from statistics import median

from thor.sandbox import Executor
from thor.sandbox.protection import LAYERS

sys.path.insert(0, str(Path(__file__).parents[1]))
from hostile import DEADLY, SNIPPETS, TIMEOUT, Canary, as_ordinary_user, check, server_processes, start

SOLVE = "from sympy import *\nx = symbols('x')\nprint(solve(x**2 - {0}*x + {1}, x))"
KINDS = [
    SOLVE,
    "from sympy import *\nx, y = symbols('x y')\nprint(solve([x + {0}*y - 3, x - y - {1}], [x, y]))",
    "from sympy import *\nx = symbols('x')\nprint(integrate(x**2 * exp({0}*x), x))",
    "from sympy import *\nx = symbols('x')\nprint(factor(expand((x - {0})*(x + {1})**2)), diff(sin({0}*x)/x, x))",
    "from sympy import *\nx = symbols('x')\nprint(limit(sin({0}*x)/({1}*x), x, 0), series(cos({0}*x), x, 0, 4))",
    "from sympy import *\nprint(Matrix([[{0}, 2], [3, {1}]]).inv(), Matrix([[{0}, 1], [1, {0}]]).eigenvals())",
    "from sympy import *\nprint(factorint({0}**7 + {1}), totient({1} * 100), simplify(sqrt({0}) * sqrt({0} * 4)))",
    "import numpy as np\nfrom math import comb\nprint(np.roots([1, -{0}, {1}]), sum(comb({1}, k) for k in range({0})))",
]
MIXED = [KINDS[i % 8].format(i // 8 + 2, i + 3) for i in range(64)]


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Return the 50th and 95th percentile in milliseconds."""
    ordered = sorted(seconds)
    return {f"p{q}": round(1e3 * ordered[min(len(ordered) - 1, len(ordered) * q // 100)], 2) for q in (50, 95)}


def timed(function, *args) -> float:
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def by_subprocess(code: str) -> None:
    subprocess.run([sys.executable, "-c", "import numpy, sympy\n" + code], stdout=subprocess.PIPE, check=True)


def load() -> None:
    with contextlib.suppress(ImportError):  # the Python of an ordinary user may not have them
        import numpy  # noqa: F401
        import sympy  # noqa: F401


def by_exec(code: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, {})
    return out.getvalue()


def executor(workers: int, without: tuple[str, ...] = (), **options) -> Executor:
    """Start an executor without the layers in `without`."""
    Executor._layers = tuple(name for name in LAYERS if name not in without)
    try:
        return Executor(workers=workers, **options)
    finally:
        Executor._layers = tuple(LAYERS)


def memory(ex: Executor, field: str) -> list[float]:
    """Return a field of smaps_rollup in MiB for each server process of the executor."""
    found = []
    for pid in server_processes(ex):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith(field + ":"):
                    found.append(int(line.split()[1]) / 1024)
    return found


def measure(rounds: int) -> dict:
    """Run all timing and memory benchmarks."""
    found = {"snippets": len(MIXED)} | measure_latency(rounds)
    for workers in (1, 2):
        found |= measure_throughput(workers, rounds)
    found["mixed_speed_up"] = round(found["ours_per_s_2"] / found["subprocess_per_s_2"], 1)
    return found | measure_layers(rounds) | measure_memory()


def measure_latency(rounds: int) -> dict:
    """Time single snippets, one after the other."""
    found: dict = {}
    solves = [SOLVE.format(a + b, a * b) for a in range(2, 2 + rounds) for b in range(11, 19)]  # integer roots
    surds = [SOLVE.format(a + 30, b + 20) for a in range(rounds) for b in range(8)]  # roots with square roots
    with ProcessPoolExecutor(1, initializer=load) as pool:
        pool.submit(by_exec, solves[0]).result()
        for name, codes in {"solve": solves, "surds": surds}.items():
            seconds = [timed(lambda c: pool.submit(by_exec, c).result(), c) for c in codes]
            found[f"exec_{name}_ms"] = percentiles(seconds)
    found["start_s"] = round(min(timed(lambda: executor(1).close()) for _ in range(3)), 2)
    with executor(1) as ex:
        found["protection"] = ex.protection
        ex.run(["pass"] * 10)
        found["ours_empty_ms"] = percentiles([timed(lambda: ex.submit("pass").result()) for _ in range(40 * rounds)])
        for name, codes in {"solve": solves, "surds": surds}.items():
            found[f"ours_{name}_ms"] = percentiles([timed(lambda c: ex.submit(c).result(), c) for c in codes])
    found["subprocess_solve_ms"] = percentiles([timed(by_subprocess, c) for c in solves[: 4 * rounds]])
    found["solve_speed_up"] = round(found["subprocess_solve_ms"]["p50"] / found["ours_solve_ms"]["p50"], 1)
    return found


def measure_throughput(workers: int, rounds: int) -> dict:
    """Measure snippets per second with all three methods."""
    rates: dict[str, list[float]] = {"exec": [], "ours": [], "subprocess": []}
    for i in range(rounds):
        with ProcessPoolExecutor(workers, initializer=load) as pool:
            list(pool.map(by_exec, [kind.format(41, 43) for kind in KINDS] * workers))  # warm up, as our server does
            rates["exec"].append(timed(lambda pool: list(pool.map(by_exec, MIXED)), pool))
        with executor(workers) as ex:
            results = ex.run(MIXED)
            assert all(r.passed for r in results), next(r for r in results if not r.passed)
            rates["ours"].append(timed(ex.run, MIXED))
        if i < 2:  # slow: run half of the snippets and double the time
            with ThreadPoolExecutor(workers) as threads:
                rates["subprocess"].append(2 * timed(lambda pool: list(pool.map(by_subprocess, MIXED[:32])), threads))
    found = {}
    for name, seconds in rates.items():
        found[f"{name}_per_s_{workers}"] = round(len(MIXED) / median(seconds), 1)
        found[f"{name}_per_s_{workers}_best"] = round(len(MIXED) / min(seconds), 1)
    return found


def measure_layers(rounds: int) -> dict:
    """Measure the cost of each layer with empty snippets back to back, which includes the setup of the next child."""
    namespaces = ("net_namespace", "pid_namespace", "ipc_namespace", "mount_namespace")
    variants = {"all": (), "namespaces": namespaces, "unprivileged": ("unprivileged",)}
    variants |= {name: (name,) for name in ("landlock", "seccomp", "rlimits")} | {"none": tuple(LAYERS)}
    costs: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, without in variants.items():
            with executor(1, without) as ex:
                ex.run(["pass"] * 10)
                costs[name].append(timed(ex.run, ["pass"] * 100) * 10)
    best = {name: min(milliseconds) for name, milliseconds in costs.items()}
    return {
        "layer_cost_ms": {name: round(best["all"] - best[name], 2) for name in variants if name != "all"},
        "empty_back_to_back_ms": round(best["all"], 2),
    }


def measure_memory() -> dict:
    """Measure the memory of an idle pool and of one running child."""
    with executor(2) as ex:
        ex.run(MIXED)
        time.sleep(0.3)
        idle = round(sum(memory(ex, "Pss")), 1)
        running = ex.submit(SOLVE.format(7, 10) + "\nimport time\ntime.sleep(0.7)")
        time.sleep(0.4)
        child = round(max(memory(ex, "Private_Dirty")[2:], default=0.0), 1)  # the first two are guardian and zygote
        running.result()
    return {"idle_mib": idle, "child_private_mib": child}


# ---- soak test ----

USUAL = [  # code, expected status, expected stdout
    (SOLVE.format(5, 6), "ok", "[2, 3]\n"),
    ("print(6 * 7)", "ok", "42\n"),
    ("import numpy as np\nprint(int(np.arange(10).sum()))", "ok", "45\n"),
    ("from fractions import Fraction\nprint(Fraction(1, 3) + Fraction(1, 6))", "ok", "1/2\n"),
    ("x = 1\ny", "error", ""),
    ("1 + 1", "no_output", ""),
    ("open('a', 'w').write('b')\nimport os\nprint(os.listdir('.'))", "ok", "['a']\n"),
]
HOSTILE = [
    ("import os\nos.fork()", "blocked", ""),
    ("import os\nos.kill(os.getppid(), 0)", "blocked", ""),
    ("import socket\nsocket.socket()", "blocked", ""),
    ("x = bytearray(10**11)", "memory", ""),
    ("import ctypes\nctypes.string_at(0)", "error", ""),
    ("import os\nos.closerange(0, 100)\nraise ValueError", "error", ""),
    ("import builtins\nbuiltins.print = None\nprint(1)", "error", ""),
    ("import signal\nsignal.signal(15, signal.SIG_IGN)\nwhile True: pass", "timeout", ""),
    ("import os\nwhile True: os.write(2, b'x' * 4096)", "timeout", ""),
    ("def f(): f()\nf()", "error", ""),
]


def soak(count: int) -> dict:
    """Run `count` snippets from four threads, check every result and watch for leaks."""
    wrong, samples, lock, done = [], [], threading.Lock(), 0
    with executor(2, timeout=1.0) as ex:

        def sample() -> dict:
            rss = int(Path("/proc/self/statm").read_text().split()[1]) * 4 // 1024
            own = {"done": done, "caller_mib": rss, "fds": len(os.listdir("/proc/self/fd"))}
            return own | {"server_mib": round(sum(memory(ex, "Pss"))), "processes": len(server_processes(ex))}

        def work(thread: int) -> None:
            nonlocal done
            for i in range(thread, count, 4):
                code, status, out = HOSTILE[i // 80 % len(HOSTILE)] if i // 4 % 20 == 0 else USUAL[i % len(USUAL)]
                result = ex.submit(code).result()
                with lock:
                    done += 1
                    if (result.status, result.stdout) != (status, out) or result.seconds > 1.5:
                        wrong.append((code, result))
                        print("unexpected:", repr(code), result, flush=True)
                    if done % (count // 20 or 1) == 0:
                        samples.append(sample())
                        print(samples[-1], flush=True)

        start = time.perf_counter()
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = round(time.perf_counter() - start)
    return {"soak": count, "unexpected": len(wrong), "seconds": seconds, "first": samples[0], "last": samples[-1]}


# ---- hostile snippets ----


def attempt_by_exec(code: str, canary: Canary, answer: str) -> None:
    """Run a hostile snippet in an exec pool with a timeout, and write what went wrong to the file `answer`."""
    os.setsid()  # some snippets kill their whole process group
    pool, out, reason = ProcessPoolExecutor(1, initializer=load), "", ""
    pool.submit(by_exec, "pass").result()
    with contextlib.suppress(Exception):  # the snippet may fail or break the pool
        out = pool.submit(by_exec, canary.fill(code)).result(TIMEOUT)
    if canary.token in str(out):
        reason = "the secret leaked"
    with contextlib.suppress(TimeoutError, BrokenExecutor):  # not a failure: the pool would be restarted
        following = pool.submit(by_exec, "import math\nprint(sum([math.gcd(12, 18), 1]))")
        try:
            right = following.result(TIMEOUT) == "7\n"
        except (TimeoutError, BrokenExecutor):
            raise
        except Exception:
            right = False
        reason = reason or ("" if right else "wrong result of the next snippet")
    for worker in list(pool._processes.values()):
        worker.kill()
    Path(answer).write_text(reason)


def contained_by_exec(code: str) -> str:
    """Run a hostile snippet with `attempt_by_exec` and describe what escaped: empty if nothing."""

    def own_processes() -> set[int]:
        found = set()
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                zombie = path.joinpath("stat").read_text().rpartition(")")[2].split()[0] == "Z"
                if path.stat().st_uid == os.getuid() and not zombie:
                    found.add(int(path.name))
        return found

    canary = Canary()
    before = own_processes()
    answer = Path(tempfile.mkdtemp()) / "answer"  # no pipe: some snippets write to all open descriptors
    caller = os.fork()
    if caller == 0:
        with contextlib.suppress(BaseException):
            attempt_by_exec(code, canary, str(answer))
        os._exit(0)
    deadline, ended = time.monotonic() + 5.0, 0
    while not ended and time.monotonic() < deadline:
        time.sleep(0.01)
        ended, _ = os.waitpid(caller, os.WNOHANG)
    reason = answer.read_text() if answer.exists() else "the pool hung or was killed with its caller"
    if not ended:
        os.kill(caller, signal.SIGKILL)
        os.waitpid(caller, 0)
    shutil.rmtree(answer.parent, ignore_errors=True)
    time.sleep(0.05)
    left = own_processes() - before
    for pid in left:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    reason = reason or canary.harm() or ("a process was left behind" if left else "")
    canary.close()
    return reason


def hostile() -> dict:
    """Run the hostile suite in the exec pool and in the executor, as an ordinary user with limited memory."""
    with as_ordinary_user("tests/benchmarks/bench_executor.py", "--hostile") as process:
        if process:  # this process is root: in the exec pool, snippets could do anything to this machine
            out, err = process.communicate()
            if process.returncode:
                raise RuntimeError(err.decode())
            found = json.loads(out.decode().splitlines()[-1])
            return {name: value for name, value in found.items() if name.startswith("hostile") or name == "uid"}
    if os.getuid() == 0:
        raise RuntimeError("refusing to run as root, and an ordinary user cannot read any Python installation")
    resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
    deadly = [name for name in SNIPPETS if SNIPPETS[name][3] == DEADLY]
    with start() as ex:
        canary = Canary()
        ours = {name: check(ex, canary, name) for name in SNIPPETS}
        canary.close()
    theirs = {name: contained_by_exec(SNIPPETS[name][0]) for name in SNIPPETS if name not in deadly}
    reasons = Counter(reason.partition(":")[0] for reason in theirs.values() if reason)
    return {
        "hostile": len(SNIPPETS),
        "hostile_contained_by_ours": sum(not reason for reason in ours.values()),
        "hostile_contained_by_exec": sum(not reason for reason in theirs.values()),
        "hostile_not_tried_with_exec": len(deadly),  # they would end processes of this machine
        "hostile_escaped_from_exec": dict(reasons.most_common()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of each timing (default 5)")
    parser.add_argument(
        "--soak",
        type=int,
        default=0,
        help="run this many mixed snippets instead of the benchmark",
    )
    parser.add_argument(
        "--hostile",
        action="store_true",
        help="run the hostile snippets instead of the benchmark",
    )
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    about = {"cpus": len(os.sched_getaffinity(0)), "kernel": platform.release(), "python": platform.python_version()}
    about |= {"uid": os.getuid(), "load": [round(x, 1) for x in os.getloadavg()]}
    print(about)
    found = soak(args.soak) if args.soak else hostile() if args.hostile else measure(args.rounds)
    for name, value in found.items():
        print(f"{name:28} {value}")
    print(json.dumps(about | found))


if __name__ == "__main__":
    main()
