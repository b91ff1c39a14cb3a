"""What a snippet prints is the same on every machine: no paths of its Python, no addresses."""

import sys

import pytest

from thor.sandbox import Executor
from thor.sandbox.portable import Portable

VENV = "/home/ann/venv"
portable = Portable(
    [VENV, "/opt/py"],
    ["/opt/py/lib/python311.zip", "/opt/py/lib/python3.11", f"{VENV}/lib/python3.11/site-packages", "", "/"],
    "/tmp/thor-executor-ab_c",
)


@pytest.mark.parametrize(
    "text, expected",
    [
        (
            f"'sympy' ({VENV}/lib/python3.11/site-packages/sympy/__init__.py)",
            "'sympy' (/usr/lib/python3/sympy/__init__.py)",
        ),
        ("/opt/py/lib/python3.11/json/decoder.py", "/usr/lib/python3/json/decoder.py"),
        ("['/opt/py/lib/python311.zip', '/opt/py/lib/python3.11']", "['/usr/lib/python3', '/usr/lib/python3']"),
        (f"{VENV} {VENV}/bin/python", "/usr /usr/bin/python"),
        (f"{VENV}2 x{VENV} /opt/pypy", f"{VENV}2 x{VENV} /opt/pypy"),  # other paths
        ("/tmp/thor-executor-ab_c/tmp_x1/a.txt", "/box/tmp/a.txt"),
        ("/tmp/a /usr/bin/env a/b //", "/tmp/a /usr/bin/env a/b //"),
        ("<function f at 0x7ff26f7d7380>", "<function f at 0x7f0000000000>"),
        ("<generator object <genexpr> at 0x55d0c0ffee>", "<generator object <genexpr> at 0x7f0000000000>"),
        ("<code object f at 0x7ff26f7d7380, file", "<code object f at 0x7f0000000000, file"),
        ("reads at 0x7ff26f7d7380 or <a at 0x10>", "reads at 0x7ff26f7d7380 or <a at 0x10>"),
        ("", ""),
    ],
)
def test_paths_and_addresses_are_replaced(text, expected):
    assert portable(text) == expected


def test_python_below_usr_has_the_same_names():
    debian = Portable(["/usr", "/usr"], ["/usr/lib/python3.11", "/usr/lib/python3/dist-packages"])
    assert debian("/usr/bin/python /usr/bin/env") == "/usr/bin/python /usr/bin/env"
    assert debian("/usr/lib/python3/dist-packages/sympy /usr/lib/python3.11/os.py") == (
        "/usr/lib/python3/sympy /usr/lib/python3/os.py"
    )


@pytest.fixture(scope="module")
def ex():
    with Executor(workers=1, timeout=20.0) as executor:
        yield executor


@pytest.mark.parametrize(
    "code, error",
    [
        ("from sympy import nothing", "ImportError: cannot import name 'nothing' from 'sympy' (line 1)"),
        ("from json import nothing", "ImportError: cannot import name 'nothing' from 'json' (line 1)"),
        ("from math import nothing", "ImportError: cannot import name 'nothing' from 'math' (line 1)"),
        ("from sys import nothing", "ImportError: cannot import name 'nothing' from 'sys' (line 1)"),
        (
            "import sys\nopen(sys.prefix + '/x')",
            "FileNotFoundError: [Errno 2] No such file or directory: '/usr/x' (line 2)",
        ),
        ("import sympy\nraise OSError(sympy.__file__)", "OSError: /usr/lib/python3/sympy/__init__.py (line 2)"),
        ("def f(): ...\nraise ValueError(f)", "ValueError: <function f at 0x7f0000000000> (line 2)"),
    ],
)
def test_error_names_no_path_of_the_host(ex, code, error):
    [result] = ex.run([code])
    assert result.error.partition(". Did you mean")[0] == error.partition(". Did you mean")[0], result
    assert not any(path in result.error for path in (sys.prefix, *sys.path) if path.count("/") > 1)


def test_stdout_and_tracebacks_in_it_name_no_path_of_the_host(ex):
    code = "import json, os, sympy, traceback\nprint(sympy, os.getcwd(), sympy.solve)\n"
    code += "try:\n    json.loads('x')\nexcept ValueError:\n    print(traceback.format_exc())"
    [result] = ex.run([code])
    first, *rest = result.stdout.splitlines()
    assert first == (
        "<module 'sympy' from '/usr/lib/python3/sympy/__init__.py'> /box/tmp <function solve at 0x7f0000000000>"
    )
    assert '  File "/usr/lib/python3/json/decoder.py"' in "\n".join(rest)
    assert not any(path in result.stdout for path in (sys.prefix, *sys.path) if path.count("/") > 1)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_temporary_folder_has_the_same_name_without_namespaces(monkeypatch):
    monkeypatch.setattr(Executor, "_layers", ("rlimits",))
    with Executor(workers=1, preload=()) as ex:
        [result] = ex.run(["import os\nopen('a', 'w')\nprint(os.getcwd(), os.path.abspath('a'))"])
    assert result.stdout == "/box/tmp /box/tmp/a\n"
