"""Tests of the worker processes of thor.verify: threads, timeouts, restarts, forks, and the end of the parent."""

import asyncio
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import thor.verify
from thor.equivalence.workers import MEMORY_BYTES, Pool, Worker
from thor.verify import verify


@pytest.fixture
def pool():
    pool = Pool(size=2)
    yield pool
    pool.close()


def stop(worker: Worker) -> None:
    """Let a worker hang, whatever it does."""
    os.kill(worker.process.pid, signal.SIGSTOP)


def test_hang_costs_one_worker_and_is_counted(pool):
    assert pool.compare("x+x", "2x", timeout=60)
    (worker,) = pool.idle
    stop(worker)
    assert pool.compare("x+x", "2x", timeout=0.2) is False
    assert pool.timeouts == 1 and pool.idle == [] and worker.process.returncode == -signal.SIGKILL
    assert pool.compare("x+x", "2x", timeout=60) and not pool.compare("x+x", "3x", timeout=60)
    assert pool.timeouts == 1 and len(pool.idle) == 1


def test_timeouts_of_verify_are_counted():
    before = thor.verify.timeouts()
    assert verify("y+y", "2y")
    stop(thor.verify.pool.idle[-1])
    assert verify("y+y", "2y", timeout=0.2) is False
    assert thor.verify.timeouts() == before + 1
    assert verify("y+y", "2y") and thor.verify.timeouts() == before + 1


def test_idle_worker_that_was_killed_is_replaced(pool):
    assert pool.compare("y+y", "2y", timeout=60)
    os.kill(pool.idle[0].process.pid, signal.SIGKILL)
    pool.idle[0].process.wait()
    assert pool.compare("y+y", "2y", timeout=60) and not pool.compare("y+y", "3y", timeout=60)
    assert pool.timeouts == 0


def test_other_workers_go_on_while_one_hangs(pool):
    assert pool.compare("y+y", "2y", timeout=60)
    (worker,) = pool.idle
    stop(worker)
    with ThreadPoolExecutor() as threads:
        hanging = threads.submit(pool.compare, "y+y", "2y", 60)
        while pool.idle:  # until the thread has taken the stopped worker
            time.sleep(0.01)
        assert pool.compare("x+x", "2x", timeout=60) and not pool.compare("x+x", "3x", timeout=60)
        assert not hanging.done()
        os.kill(worker.process.pid, signal.SIGCONT)
        assert hanging.result() is True
    assert len(pool.idle) == 2


def test_many_threads_get_correct_results_from_few_workers(pool):
    def compare(i):
        return pool.compare(f"{i}x+x", f"{i + 1}x", 60), pool.compare(f"{i}x+x", f"{i}x", 60)

    with ThreadPoolExecutor(16) as threads:
        assert set(threads.map(compare, range(1, 65))) == {(True, False)}
    assert 1 <= len(pool.idle) <= 2


def test_event_loop_goes_on_while_a_comparison_hangs():
    async def main():
        verdict = asyncio.create_task(asyncio.to_thread(verify, "y+y", "2y", 0.5))
        ticks = 0
        while not verdict.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return ticks, verdict.result()

    assert verify("y+y", "2y")
    stop(thor.verify.pool.idle[-1])
    ticks, same = asyncio.run(main())
    assert ticks >= 5 and same is False


def test_worker_has_a_memory_limit_and_imports_neither_torch_nor_sympy(pool):
    assert pool.compare("y+y", "2y", timeout=60)
    pid = pool.idle[0].process.pid
    assert resource.prlimit(pid, resource.RLIMIT_AS) == (MEMORY_BYTES, MEMORY_BYTES)
    files = Path(f"/proc/{pid}/maps").read_text()
    assert "torch" not in files and "numpy" not in files


def test_failing_start_is_an_error(pool, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="could not be started"):
        pool.compare("y+y", "2y", timeout=60)
    monkeypatch.undo()
    assert pool.compare("y+y", "2y", timeout=60)  # its slot is free again


SCRIPT = """
import os, signal, sys, threading, time
from thor.verify import pool, verify
print("main runs once", flush=True)
assert verify("x+x", "2x")
assert not {"torch", "mpmath", "sympy"} & set(sys.modules)
child = os.fork()
if child == 0:
    ok = pool.idle == [] and verify("x+x", "2x") and not verify("x+x", "3x")
    os._exit(0 if ok else 1)
assert os.waitpid(child, 0)[1] == 0
assert verify("x+x", "2x") and not verify("x+x", "3x")
print(pool.idle[0].process.pid, flush=True)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "killed, with a child that holds the pipes":
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "interrupted":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell starts with it ignored
    os.kill(0, signal.SIGINT)
    time.sleep(60)
"""
ENDS = {"normal": 0, "killed": -9, "killed, with a child that holds the pipes": -9, "interrupted": -2}


@pytest.mark.parametrize("end", ENDS)
def test_workers_end_with_their_parent(tmp_path, end):
    path = tmp_path / "script.py"  # deliberately without a __main__ guard
    path.write_text(SCRIPT)
    with subprocess.Popen(
        [sys.executable, str(path), end],
        env={**os.environ, "PYTHONPATH": str(Path(thor.verify.__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        first, pid = process.stdout.readline().strip(), process.stdout.readline().strip()
        assert process.wait(timeout=120) == ENDS[end], process.stderr.read()
        assert first == "main runs once" and pid.isdigit()
        for _ in range(200):
            if not running(int(pid)):
                break
            time.sleep(0.1)
        assert not running(int(pid))
        if "child" in end:
            os.killpg(process.pid, signal.SIGKILL)
        assert "main" not in process.stdout.read()


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_verify_works_off_the_main_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append((verify("z+z", "2z"), verify("z+z", "3z"))))
    thread.start()
    thread.join()
    assert results == [(True, False)]
