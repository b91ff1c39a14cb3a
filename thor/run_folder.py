"""What every script does around its algorithm: settings, the run folder, metrics, one-line errors.

A run folder holds config.json, metrics.jsonl, trajectories.jsonl, checkpoints/, final/ and TensorBoard's files.
Files and folders are written beside their final name and then renamed, so what stands there is whole; jsonl files
grow a line at a time, and a line that a crash has torn is dropped when a run is resumed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from thor.distributed import rank
from thor.settings import UserError


class Run:
    """The folder of one run.

    resume=False refuses a folder that holds anything; resume=True takes up what is there (an empty one is fine) and
    refuses settings other than those of its config.json, but for MAY_CHANGE. Only rank 0 writes.
    """

    MAY_CHANGE = (
        # how far the run goes, where it stands and what is written of it
        *("iterations", "out", "save_every", "keep", "evaluate"),
        # speed and memory: the result is the same but for rounding, which may now and then turn a sampled token
        *("device", "rank_timeout", "rows", "kv_tokens"),
        *("max_tokens_per_micro_batch", "tree", "gradient_checkpointing"),
    )

    def __init__(self, folder: str, settings: Any, resume: bool) -> None:
        self.folder = Path(folder)
        config = dataclasses.asdict(settings)
        config.pop("resume", None)
        if self.folder.exists() and (not self.folder.is_dir() or (any(self.folder.iterdir()) and not resume)):
            raise UserError(f"--out {folder}: exists and is not empty; give another folder, or --resume to go on there")
        old = self.folder / "config.json"
        saved = json.loads(old.read_text()) if old.exists() else config
        for name in {**saved, **config}:
            if name not in self.MAY_CHANGE and saved.get(name) != config.get(name):
                raise UserError(f"--resume: {name} was {saved.get(name)!r} in {old}, now {config.get(name)!r}; keep it")
        self._config = config
        self._board = None

    def start(self) -> None:
        """Make the folder, once all input is known to be good: a failed start leaves nothing behind."""
        if rank():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.write_json("config.json", self._config)

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def write_json(self, name: str, value: Any) -> None:
        if rank() == 0:
            write_atomic(self / name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def append(self, name: str, record: dict) -> None:
        """Add one line to a jsonl file (a line torn by a crash is dropped by `read`)."""
        if rank():
            return
        with (self / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def read(self, name: str) -> list[dict]:
        """Whole lines of a jsonl file; what follows the last newline is cut off the file."""
        path = self / name
        if not path.exists():
            return []
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.truncate(path, len(whole))
        return [json.loads(line) for line in whole.decode("utf-8").split("\n") if line]

    def write_trajectories(self, name: str, trajectories: list, tokenizer, **extra: Any) -> None:
        """Add trajectories to a jsonl file: the ledger, and its text to read."""
        if rank():
            return
        for trajectory in trajectories:
            self.append(name, {**extra, "text": trajectory.text(tokenizer), **trajectory.to_dict()})

    def rewind(self, name: str, keep: Callable[[dict], bool]) -> None:
        """After a resume: drop the records behind the checkpoint, they will be written again."""
        if rank():
            return
        path, temporary = self / name, self / f"{name}.tmp"
        if path.exists():
            with path.open(encoding="utf-8") as old, temporary.open("w", encoding="utf-8") as new:
                new.writelines(line for line in old if line.endswith("\n") and keep(json.loads(line)))
            os.replace(temporary, path)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One line in metrics.jsonl, one point a metric in TensorBoard."""
        if rank():
            return
        from torch.utils.tensorboard import SummaryWriter

        clean = {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in metrics.items()}
        self.append("metrics.jsonl", {"step": step, **clean})
        self._board = self._board or SummaryWriter(str(self / "tensorboard"), purge_step=step)
        for name, value in clean.items():
            if value is not None:
                self._board.add_scalar(name, value, step)
        self._board.flush()

    @contextlib.contextmanager
    def whole_folder(self, name: str) -> Iterator[Path]:
        """A folder that rank 0 fills, and which gets its name only when the block ends well."""
        if rank():
            yield self / name
            return
        target, temporary = self / name, self / f"{name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        old = self / f"{name}.old"
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(target, old)
        os.replace(temporary, target)
        shutil.rmtree(old, ignore_errors=True)  # or that of a run that was killed between the two names


def write_atomic(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
