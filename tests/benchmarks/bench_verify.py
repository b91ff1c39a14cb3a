"""Benchmark answer equivalence: one worker against several, and against math-verify if that is installed.

    python tests/benchmarks/bench_verify.py             about half a minute
    python tests/benchmarks/bench_verify.py --hang 5    what a comparison that hangs for 5 seconds costs the others

Workloads, half of whose predictions are correct and written in another way than the gold answer:

    numbers      integers, decimals, fractions, powers of ten: decided in the caller's process
    expressions  radicals, polynomials, functions, intervals: compared by their values, in workers
    ordinary     three quarters numbers, one quarter expressions, about as in MATH and OlympiadBench
    tests        the pairs of tests/test_verify.py, which all hold here (math-verify does not claim all of these rules)

Rates are verifications per second of wall time; cpu is the processor time of one, in ms, of the caller and its workers.
accepted and rejected count wrong predictions that were accepted and correct ones that were rejected.
The last line of the output is JSON.
"""

import argparse
import importlib.util
import json
import os
import platform
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import thor.verify
from thor.equivalence.reader import read
from thor.equivalence.workers import Pool
from thor.verify import verify

NUMBERS = [  # gold, correct prediction, wrong prediction; a, b, c are random integers
    ("{a}", "{a}.0", "{b}"),
    ("{a},\\!{b}", "{a}{b}", "{a}{c}"),
    ("\\frac{{{a}}}{{{b}}}", "{a}/{b}", "{c}/{b}"),
    ("{a}.{b}e{c}", "{a}.{b} \\times 10^{{{c}}} \\text{{ J}}", "{a}.{b} \\times 10^{{{a}}}"),
    ("({a}, -{b})", "\\left( {a}, -{b} \\right)", "({a}, {b})"),
    ("{a} \\text{{ cm}}^2", "{a} square centimeters", "{a} cm"),
    ("{a},{b},{c}", "[{c}, {a}, {b}]", "{a},{b}"),
]
EXPRESSIONS = [
    ("{a}+{b}\\sqrt{{{c}}}", "{b}*sqrt({c}) + {a}", "{a}-{b}\\sqrt{{{c}}}"),
    ("\\frac{{{a}-\\sqrt{{{b}}}}}{{{c}}}", "-sqrt({b})/{c} + {a}/{c}", "\\frac{{{a}+\\sqrt{{{b}}}}}{{{c}}}"),
    ("(x+{a})(x-{b})", "x**2 + {a}*x - {b}*x - {a}*{b}", "(x-{a})(x+{b})"),
    ("{a} \\cos({b} t) e^{{-{c} t}}", "{a}*exp(-{c}*t)*cos({b}*t)", "{a} \\sin({b} t) e^{{-{c} t}}"),
    ("y = {a}x + {b}", "{a}x - y = -{b}", "y = {a}x - {b}"),
    ("\\left(\\frac{{\\pi}}{{{a}}}, \\sqrt{{{b}}}\\right]", "(pi/{a}, sqrt({b})]", "(pi/{b}, sqrt({a})]"),
    ("{a} + {b}i", "{b}*I + {a}", "{a} - {b}i"),
]


def workload(name: str, count: int) -> list[tuple[str, str, bool]]:
    """Return (prediction, gold, correct)."""
    if name == "tests":
        sys.path.append(str(Path(__file__).parent.parent))
        from test_verify import pairs as tested

        return [(*pair.values, correct) for correct in (True, False) for pair in tested("==" if correct else "!=")]
    rng, pairs = random.Random(name), []
    for i in range(count):
        forms = {"numbers": NUMBERS, "expressions": EXPRESSIONS}.get(name) or (EXPRESSIONS if i % 4 == 0 else NUMBERS)
        a, b, c = rng.sample(range(100, 1000), 3)
        gold, right, wrong = (form.format(a=a, b=b, c=c % 97 + 2) for form in rng.choice(forms))
        pairs.append((right if i % 2 else wrong, gold, bool(i % 2)))
    return pairs


def cpu_seconds() -> float:
    usages = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def ours(pairs: list, workers: int) -> dict[str, float]:
    """Verify with as many threads as workers."""
    thor.verify.pool = pool = Pool(workers)
    with ThreadPoolExecutor(workers) as threads:
        list(threads.map(lambda i: pool.compare("x+x", "2x", 60), range(4 * workers)))  # starts the workers
        read.cache_clear()
        before, start = cpu_seconds(), time.perf_counter()
        verdicts = list(threads.map(lambda pair: verify(*pair[:2]), pairs))
        seconds = time.perf_counter() - start
    pool.close()  # from here on, the workers' processor time counts as that of children
    return result(pairs, verdicts, seconds, cpu_seconds() - before)


def theirs(pairs: list) -> dict[str, float]:
    """Verify with math-verify, in this process, with the time limit of 5 s that it recommends."""
    from math_verify import parse
    from math_verify import verify as equal

    before, start = cpu_seconds(), time.perf_counter()
    verdicts = [equal(parse(f"${gold}$"), parse(f"${prediction}$")) for prediction, gold, _ in pairs]
    return result(pairs, verdicts, time.perf_counter() - start, cpu_seconds() - before)


def result(pairs: list, verdicts: list[bool], seconds: float, cpu: float) -> dict[str, float]:
    wrong = [correct for verdict, (_, _, correct) in zip(verdicts, pairs, strict=True) if verdict != correct]
    errors = {"accepted": wrong.count(False), "rejected": wrong.count(True)}
    return {"rate": round(len(pairs) / seconds), "cpu_ms": round(1000 * cpu / len(pairs), 2), **errors}


def hang(seconds: float, workers: int) -> dict[str, float]:
    """Stop one worker in the middle of the ordinary workload."""
    thor.verify.pool = pool = Pool(workers)
    pairs = workload("ordinary", 2000)
    assert pool.compare("x+x", "2x", 60)
    os.kill(pool.idle[0].process.pid, signal.SIGSTOP)
    start = time.perf_counter()
    with ThreadPoolExecutor(4 * workers) as threads:
        verdicts = list(threads.map(lambda pair: verify(*pair[:2], timeout=seconds), pairs))
    found = result(pairs, verdicts, time.perf_counter() - start, 0.0)
    return {"seconds": round(len(pairs) / found.pop("rate"), 2), **found, "timeouts": pool.timeouts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="pairs of each workload (default 2000)")
    parser.add_argument("--hang", type=float, default=0, help="measure a hang of this many seconds instead")
    args = parser.parse_args()
    cpus = len(os.sched_getaffinity(0))
    about = {"cpus": cpus, "python": platform.python_version(), "load": [round(x, 1) for x in os.getloadavg()]}
    about |= {"pairs": args.count, "workers": max(2, cpus)}
    print(about, flush=True)
    sides: dict[str, Callable] = {
        "one": lambda pairs: ours(pairs, 1),
        "several": lambda pairs: ours(pairs, max(2, cpus)),
    }
    if importlib.util.find_spec("math_verify"):
        sides["math_verify"] = theirs
    found = {}
    if args.hang:
        found = hang(args.hang, max(2, cpus))
        print(found)
    for name in () if args.hang else ("numbers", "expressions", "ordinary", "tests"):
        pairs = workload(name, args.count)
        for side, measure in sides.items():
            part = pairs[:100] if side == "math_verify" and name != "tests" else pairs  # it is slow
            found[f"{name}_{side}"] = measured = measure(part)
            print(f"{name:12} {side:12} {measured}", flush=True)
    print(json.dumps(about | found))


if __name__ == "__main__":
    main()
