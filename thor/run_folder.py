"""The folder of one run: config.json, metrics.jsonl, trajectories.jsonl, checkpoints/, final/ and the tracker's files.

Files and folders are written under a temporary name and then renamed, so a file under its final name is complete.
jsonl files grow line by line. A checkpoint holds their sizes, and a resumed run cuts them back to these sizes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from thor.distributed import gather, rank
from thor.settings import UserError

LOGS = ("metrics.jsonl", "validation.jsonl", "trajectories.jsonl")  # files that grow during training


LINEAGE = "trained_from"  # key of config.json: the `lineage` of the model that the run started from


def lineage(model: str) -> list[str]:
    """`model`, the model that its run started from, and so on. The last one, the base model, is not from a run.

    Models of runs are absolute paths, so that later runs find them from any working directory.
    """
    name = model.removeprefix("vllm:")
    folder = Path(name).resolve()
    config = folder.parent / "config.json"
    # without the key, it is not the folder of a run; a folder of Hugging Face checkpoints has a config.json too
    earlier = json.loads(config.read_text()).get(LINEAGE) if folder.is_dir() and config.is_file() else None
    return [str(folder), *earlier] if earlier else [name]


def base_model(model: str) -> str:
    """The last of the `lineage` of `model`, as rank 0 sees it: other nodes may not have the folders of its runs."""
    return gather(lineage(model)[-1])[0]


class Run:
    """A run folder, and a context manager that finishes the trackers. Only rank 0 writes to it.

    resume=False refuses a folder that is not empty. resume=True continues the run in it, or starts a new one, and
    refuses settings that differ from its config.json, except for those in MAY_CHANGE; `iterations` only with a constant
    learning rate. Raises UserError.
    """

    MAY_CHANGE = (
        # how long the run is, where it is and what it writes
        *("iterations", "out", "save_every", "keep", "evaluate", "report_to", "log_trajectories"),
        *("preview", "patience", "alignment", "dry_run"),
        # speed and memory: results are the same up to rounding, which may change a sampled token now and then
        *("device", "rank_timeout", "rows", "kv_tokens"),
        *("max_tokens_per_micro_batch", "tree", "gradient_checkpointing"),
    )

    def __init__(self, folder: str, settings: Any, resume: bool) -> None:
        self.folder = Path(folder)
        config = dataclasses.asdict(settings)
        config.pop("resume", None)
        if self.folder.exists() and (not self.folder.is_dir() or (any(self.folder.iterdir()) and not resume)):
            raise UserError(f"--out {folder}: exists and is not empty; choose another folder, or --resume this run")
        old = self.folder / "config.json"
        saved = json.loads(old.read_text()) if old.exists() else config
        saved.pop(LINEAGE, None)
        for name in {**saved, **config}:
            # a schedule depends on the length of the run: in a longer one the learning rate would have been another
            fixed = name == "iterations" and (config.get("lr_schedule") != "constant" or config.get("warmup"))
            if (fixed or name not in self.MAY_CHANGE) and saved.get(name) != config.get(name):
                what = f"{name} was {saved.get(name)!r} in {old}, but now is {config.get(name)!r}"
                raise UserError(f"--resume: {what}{'; the learning rate depends on it' if fixed else ''}")
        self._config = config
        self._tracker_names = check_trackers(config.get("report_to", "none"))
        self._trackers: list = []

    def start(self) -> None:
        """Create the folder. Call it once all input is valid: a failed start then leaves nothing behind."""
        if rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            origin = {LINEAGE: lineage(self._config["model"])} if "model" in self._config else {}
            self.write_json("config.json", self._config | origin)

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file, with null for NaN and infinity."""
        if rank() == 0:
            write_atomic(self / name, json.dumps(finite(value), indent=2, ensure_ascii=False) + "\n")

    def append(self, name: str, record: dict) -> None:
        """Add one line to a jsonl file."""
        if rank() == 0:
            with writing(self / name), (self / name).open("a", encoding="utf-8") as file:
                file.write(to_line(record))

    def read(self, name: str) -> list[dict]:
        """The records of a jsonl file. An incomplete last line is cut off the file."""
        path = self / name
        if not path.exists():
            return []
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.truncate(path, len(whole))
        return [json.loads(line) for line in whole.decode("utf-8").split("\n") if line]

    def write_trajectories(self, name: str, trajectories: list, tokenizer, **extra: Any) -> None:
        """Add trajectories to a jsonl file, for `Trajectory.from_dict`, with their text for people to read."""
        for trajectory in trajectories if rank() == 0 else ():
            self.append(name, {**extra, "text": trajectory.text(tokenizer), **trajectory.to_dict()})

    def log_sizes(self) -> dict[str, int]:
        """The size in bytes of each file in LOGS, for `rewind`."""
        return {name: (self / name).stat().st_size if (self / name).exists() else 0 for name in LOGS}

    def rewind(self, name: str, offset: int) -> None:
        """Cut a file to its first `offset` bytes, which were there at the checkpoint; the resumed run writes the rest.

        A file that was deleted starts again. Raises UserError if the file is shorter than `offset`.
        """
        path = self / name
        if rank() or not path.exists():
            return
        size = path.stat().st_size
        if size < offset:
            raise UserError(f"{path}: has {size} bytes, but had {offset} at the checkpoint; restore or delete it")
        os.truncate(path, offset)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Add one line to metrics.jsonl, with null for NaN and infinity, and report the others to the trackers."""
        if rank():
            return
        clean = finite(metrics)
        self.append("metrics.jsonl", {"step": step, **clean})
        self.track(step, clean)

    def track(self, step: int, metrics: dict[str, float | None]) -> None:
        """Report those metrics that have a finite value to the trackers."""
        for tracker in self._trackers:
            tracker.log({k: v for k, v in metrics.items() if v is not None and math.isfinite(v)}, step=step)

    def start_trackers(self, step: int) -> None:
        """Start the trackers of `report_to`. `step`: the first step that will be logged. Raises UserError."""
        for name in self._tracker_names if rank() == 0 else ():
            options = {"logging_dir": self.folder} if LOGGER_TYPE_TO_CLASS[name].requires_logging_directory else {}
            if name == "tensorboard":  # purge_step hides points that the resumed run writes again
                tracker = LOGGER_TYPE_TO_CLASS[name]("tensorboard", **options, purge_step=step)
            else:
                options |= {"name": self.folder.name} if name in ("wandb", "trackio") else {}
                tracker = LOGGER_TYPE_TO_CLASS[name]("thor", **options)
            try:
                tracker.start()
                if name != "tensorboard":
                    tracker.store_init_configuration(self._config)
            except Exception as error:  # each tracker has its own, for example without a login
                raise UserError(f"--report_to {name}: {' '.join(str(error).split())}") from error
            self._trackers.append(tracker)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, fault: type | None, *_) -> None:
        """Finish the trackers. After an error, TensorBoard's own one, as on a full disk, does not replace it."""
        while self._trackers:
            with contextlib.suppress(*[OSError] if fault else []):
                self._trackers.pop().finish()

    @contextlib.contextmanager
    def whole_folder(self, name: str) -> Iterator[Path]:
        """A folder for rank 0 to fill. It gets its final name only if the block ends without an exception."""
        if rank():
            yield self / name
            return
        target, temporary, old = self / name, self / f"{name}.tmp", self / f"{name}.old"
        shutil.rmtree(temporary, ignore_errors=True)
        with writing(target):
            temporary.mkdir(parents=True)
        try:
            yield temporary
        except Exception:  # on a full disk, what there is of it would keep the disk full
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        with writing(target):  # a complete folder stays, even if it cannot be renamed
            if target.exists():
                shutil.rmtree(old, ignore_errors=True)
                os.replace(target, old)
            os.replace(temporary, target)
        shutil.rmtree(old, ignore_errors=True)  # also one left by a run that was killed between the two renames


def spread(items: Sequence, count: int) -> list:
    """At most `count` of the items, at equal distances. Of groups of one size, each then gives about as many."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def check_trackers(names: str) -> list[str]:
    """The trackers in a comma-separated list, or none for 'none'. Raises UserError if one is unknown or missing."""
    wanted = [] if names == "none" else [name.strip() for name in names.split(",")]
    installed = {str(name) for name in get_available_trackers()}
    for name in wanted:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(f"--report_to {name}: must be 'none' or some of {', '.join(LOGGER_TYPE_TO_CLASS)}")
        if name not in installed:
            raise UserError(f"--report_to {name}: its package is not installed; pip install {name}")
    return wanted


def finite(value: Any) -> Any:
    """JSON data with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_line(record: dict) -> str:
    """A line of a jsonl file."""
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n"


def write_atomic(path: Path, text: str) -> None:
    """Write a file that is complete or not there."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path, temporary):
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)


@contextlib.contextmanager
def writing(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Turn a failed write, as to a full disk, into a UserError, and remove the file `temporary`.

    For nothing but writes: torch, safetensors and tokenizers raise errors of their own, so it takes all of them.
    """
    try:
        yield
    except Exception as error:
        if temporary:
            with contextlib.suppress(OSError):
                temporary.unlink()
        why = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be written ({why}); is the disk full? --resume continues the run") from error
