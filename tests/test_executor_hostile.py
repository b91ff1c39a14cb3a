"""Hostile snippets cannot read, change or leave behind anything outside the sandbox, nor affect the next snippet.

Each snippet of hostile.py runs as the current user. If that is root, it also runs as user 65534, with a Python that
this user can read. Snippets that could kill processes of this machine run only if the layers that stop them are in
force, which is checked with signal 0 first.
"""

import json
import threading
import warnings

import pytest
from hostile import ANY, DEADLY, SNIPPETS, Canary, as_ordinary_user, check, start


@pytest.fixture(scope="module")
def executor():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with start() as executor:
            yield executor


@pytest.fixture(scope="module")
def canary():
    canary = Canary()
    yield canary
    canary.close()


@pytest.fixture(scope="module", autouse=True)
def user_run():
    """Run the suite as user 65534 in the background, concurrently with the other tests."""
    with as_ordinary_user("tests/hostile.py") as process:
        yield process


@pytest.fixture(scope="module")
def as_user(user_run):
    if user_run is None:
        pytest.skip("the tests do not run as root, or user 65534 cannot read any Python installation")
    out, err = user_run.communicate(timeout=120)
    assert user_run.returncode == 0, err.decode()
    return json.loads(out)


def report(found: str) -> None:
    if found.startswith("skip: "):
        pytest.skip(found[6:])
    assert not found, found


@pytest.mark.parametrize("name", SNIPPETS)
def test_snippet_is_contained(executor, canary, name):
    report(check(executor, canary, name))


@pytest.mark.parametrize("name", SNIPPETS)
def test_snippet_is_contained_as_ordinary_user(as_user, name):
    report(as_user[name])


def test_concurrent_snippets_are_contained(executor, canary):
    """Snippets from four threads, in reverse order: all get a result, and the pool still works."""
    safe = [code for code, _, _, mark in SNIPPETS.values() if mark != DEADLY]
    slow = [code for code, allowed, _, _ in SNIPPETS.values() if allowed == ("timeout",)]
    codes = [canary.fill(code) for code in safe if code not in slow][::-1]
    found: list = []
    threads = [threading.Thread(target=lambda i=i: found.extend(executor.run(codes[i::4]))) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(codes) and all(result.status in ANY for result in found)
    assert executor.run(["print(40 + 2)"])[0].stdout == "42\n" and not canary.harm()
