"""Tests of answer equivalence and of its helper process."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import thor.verify
from thor.verify import verify

# ---- equivalence ----

TRIPLES = [
    # numbers
    ("42", "42", True),
    ("42.0", "42", True),
    ("-42", "42", False),
    ("1,000", "1000", True),
    (r"1{,}000", "1000", True),
    (r"\$18", "18", True),
    ("$18$", "18", True),
    ("18 dollars", "18", True),
    (r"18\text{ cm}^2", "18", True),
    ("18 cm", r"18 \text{ cm}", True),
    ("5 million", "5", False),
    ("0.5", r"\frac{1}{2}", True),
    ("1/2", r"\dfrac12", True),
    ("1/3", "0.333", False),
    ("0.333333", r"\frac{1}{3}", False),
    ("1 1/2", r"\frac{3}{2}", True),
    (r"1\frac{1}{2}", "1.5", True),
    (r"-1\frac{1}{2}", "-1.5", True),
    ("11/2", "1 1/2", False),
    ("-1./3", r"-\frac{1}{3}", True),
    ("50%", "0.5", True),
    (r"50\%", "50", True),
    ("50%", r"0.5\%", False),
    ("0.5", r"50\%", True),
    ("1.2e5", r"1.2 \times 10^{5}", True),
    ("120000", r"1.2 \times 10^5", True),
    (r"90^\circ", "90", True),
    ("90°", r"90^{\circ}", True),
    ("90 degrees", "90", True),
    ("\u22125", "-5", True),
    ("2516", "2516_8", True),
    ("101_2", "101_3", False),
    ("1/0", "1", False),
    (r"\frac{1}{2} )( \frac{", "0.5", False),
    # expressions
    ("2**10", "1024", True),
    ("2*sqrt(3)", r"2\sqrt{3}", True),
    ("pi/2", r"\frac{\pi}{2}", True),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", True),
    (r"\sqrt{8}", r"3\sqrt{2}", False),
    ("x^2+2x+1", "(x+1)^2", True),
    ("p - q", "-q+p", True),
    ("p - q", "q - p", False),
    ("5", "5x", False),
    ("6 - 5i", "-5i+6", True),
    (r"\frac{\log 8}{\log 2}", "3", True),
    ("10!", "3628800", True),
    (r"\infty", "oo", True),
    # equations and inequalities
    ("x=5", "5", True),
    ("5", "x=5", True),
    ("y=5", "x=5", False),
    ("2x = y", "y = 2x", True),
    ("f(x) = x^2", "x^2", True),
    ("x < 5", "5 > x", True),
    ("x < 5", r"x \le 5", False),
    # several values
    ("1 or 2", "1", False),
    ("1", "1 or 2", False),
    (r"1 \text{ or } 2", "2, 1", True),
    ("1,2", "1,2,3", False),
    (r"\{2, 1\}", "1,2", True),
    (r"\pm 1", "-1, 1", True),
    ("(3, pi/2)", r"\left( 3, \frac{\pi}{2} \right)", True),
    ("(2,1)", "(1,2)", False),
    ("2,1", "(1,2)", False),
    ("1,2", "(1,2)", True),
    (r"\{1,2\}", "(1,2)", False),
    ("[1,2)", "(1,2]", False),
    (r"(-\infty, 5]", r"x \le 5", True),
    (r"[2,3] \cup [0,1]", r"[0,1] \cup [2,3]", True),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", True),
    (r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", False),
    # words
    (r"\text{Monday}", "Monday", True),
    ("monday", r"\text{Monday}", True),
    ("Carla", r"\text{Clara}", False),
    (r"\text{(C)}", "C", True),
    ("(A)", "(B)", False),
    # whole texts and empty answers
    (r"It is \boxed{1}, no, \boxed{\frac{2}{4}}.", "0.5", True),
    (r"It is 5: \boxed{6", "5", False),
    ("", "5", False),
    ("5", "", False),
    ("", "", False),
]


@pytest.mark.parametrize(("prediction", "gold", "same"), TRIPLES)
def test_equivalence(prediction, gold, same):
    assert verify(prediction, gold) is same


@given(st.fractions(max_denominator=10**6))
def test_fractions_are_compared_exactly(value):
    n, d = value.numerator, value.denominator
    latex = rf"{'-' if n < 0 else ''}\frac{{{abs(n)}}}{{{d}}}"
    assert verify(str(value), latex) and verify(latex, f"{n:,}/{d}")
    assert not verify(str(value + 1), latex)


@given(st.integers(), st.integers(0, 6))
def test_decimals_are_compared_exactly(digits, places):
    text = f"{digits / 10**places:.{places}f}" if abs(digits) < 10**15 else str(digits)
    assert verify(text + "000" if "." in text else text + ".000", text)
    assert not verify(text + "1" if "." in text else text + ".001", text)


@settings(max_examples=60, deadline=None)
@given(st.text(st.sampled_from("0123456789+-*/^_=<>(){}[],.;:!%$\\ xyabcdefimnopqrst\n\0\ud800é∞√"), max_size=40))
@example("\\")
@example("\ud800" * 30)
def test_arbitrary_text_never_raises(text):
    assert verify(text, "1234567", timeout=2) in (True, False)
    assert verify("x+1", text, timeout=2) in (True, False)
    assert verify(text, text, timeout=2) in (True, False)


HOSTILE = [
    "9**9**9**9",
    "10^{10^{10}}",
    "x^" * 600 + "2",
    "(" * 900 + "1" + ")" * 900,
    r"\frac{" * 300,
    r"\sqrt{" * 150 + "2" + "}" * 150,
    "{" * 1900,
    "(a+b+c+d)^{400}",
    r"\prod_{k=1}^{100000000} k",
    "9" * 1900,
    "9" * 10**6,
    "a" * 1900,
    "1e999999999",
    "__import__('os').system('exit 1')",
]


@pytest.mark.parametrize("prediction", HOSTILE, ids=lambda text: text[:12])
def test_hostile_predictions_return_false_in_time(prediction):
    verify("x", "y")  # start the helper, so that only the comparison is timed
    start = time.perf_counter()
    assert verify(prediction, "7y+1", timeout=0.5) is False
    assert time.perf_counter() - start < 10
    assert verify("y+y", "2y") is True


# ---- helper process ----


def test_simple_comparisons_do_not_start_helper():
    thor.verify._helper.close()
    assert verify("1/2", "0.5") and not verify("3", "4") and verify("Monday", r"\text{Monday}")
    assert thor.verify._helper.process is None


def test_timeout_returns_false_and_next_comparison_works():
    start = time.perf_counter()
    assert verify("10^{10^{10}}", "10", timeout=0.5) is False
    assert time.perf_counter() - start < 30
    assert verify("y+y", "2y") is True


def test_killed_helper_is_restarted():
    assert verify("y+y", "2y") is True
    process = thor.verify._helper.process
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert verify("y+y", "2y") is True


def test_threads_get_correct_results():
    results = {}

    def compare(i):
        results[i] = verify(f"{i}x+x", f"{i + 1}x"), verify(f"{i}x+x", f"{i}x")

    threads = [threading.Thread(target=compare, args=(i,)) for i in range(1, 13)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(results.values()) == {(True, False)} and len(results) == 12


SCRIPT = """
import os, sys
from thor.verify import verify
import thor.verify
print("main runs once", flush=True)
assert verify("x+x", "2x")
assert not {"torch", "math_verify", "sympy"} & set(sys.modules)
child = os.fork()
if child == 0:
    ok = thor.verify._helper.process is None and verify("x+x", "2x") and not verify("x+x", "3x")
    os._exit(0 if ok else 1)
assert os.waitpid(child, 0)[1] == 0
assert verify("x+x", "2x") and not verify("x+x", "3x")
print(thor.verify._helper.process.pid, flush=True)
if len(sys.argv) > 1:
    import threading
    threading.Thread(target=verify, args=("10^{10^{10}}", "10", 3), daemon=True).start()
    import time; time.sleep(1)
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("killed", [False, True])
def test_helper_works_after_fork_and_exits_with_its_parent(tmp_path, killed):
    path = tmp_path / "script.py"  # deliberately without a __main__ guard
    path.write_text(SCRIPT)
    root = os.path.dirname(os.path.dirname(thor.verify.__file__))
    done = subprocess.run(
        [sys.executable, str(path)] + ["killed"] * killed,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == (-9 if killed else 0), done.stderr
    first, pid = done.stdout.split("\n")[:2]
    assert first == "main runs once" and done.stdout.count("main") == 1
    for _ in range(100):
        if not running(int(pid)):
            break
        time.sleep(0.1)
    assert not running(int(pid))


def running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
