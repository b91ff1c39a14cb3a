"""Whatever a hostile snippet does, the next one is right and nothing outside was reached, read or left over.

Every snippet of hostile.py runs as the user who runs the tests, and, if that is root, a second time as an ordinary
user: a process of user 65534 with a Python that this user can read. Snippets that could end processes of this machine
run only where the layers that stop them are in force, checked with signal 0 first.
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
    """The run as an ordinary user, beside the other tests."""
    with as_ordinary_user("tests/hostile.py") as process:
        yield process


@pytest.fixture(scope="module")
def as_user(user_run):
    if user_run is None:
        pytest.skip("the tests already run as an ordinary user, or user 65534 can read no Python here")
    out, err = user_run.communicate(timeout=120)
    assert user_run.returncode == 0, err.decode()
    return json.loads(out)


def report(found: str) -> None:
    if found.startswith("skip: "):
        pytest.skip(found[6:])
    assert not found, found


@pytest.mark.parametrize("name", SNIPPETS)
def test_hostile(executor, canary, name):
    report(check(executor, canary, name))


@pytest.mark.parametrize("name", SNIPPETS)
def test_hostile_as_ordinary_user(as_user, name):
    report(as_user[name])


def test_all_at_once(executor, canary):
    """From four threads, in another order: every reply in time, the pool as good as new."""
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
