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
import sys
import traceback
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import HfArgumentParser

from thor.ranks import end_ranks, first_to_fail, gather, rank

S = TypeVar("S")


class UserError(Exception):
    """Something the user can mend; shown as one line."""


def at_least(settings: Any, **bounds: int) -> None:
    """Refuse a setting below its bound, naming its flag."""
    for name, bound in bounds.items():
        if getattr(settings, name) < bound:
            raise UserError(f"--{name} {getattr(settings, name)}: at least {bound} is wanted")


@contextlib.contextmanager
def user_errors(flag: str = "") -> Iterator[None]:
    """Around reading input (named by `flag`): a fault ends the program with one line and exit code 2, no traceback.

    With many ranks a fault of any of them ends all, with that rank's line.
    """
    fault = ""
    try:
        yield
    except (UserError, ValueError, OSError, RuntimeError) as error:
        fault = f"{flag and flag + ' '}{error}"
    faults = gather(fault)
    if any(faults):
        first = next(r for r, text in enumerate(faults) if text)
        if len(faults) == 1 or rank() == first:  # 1: also a rank that could not join the others
            print(f"{Path(sys.argv[0]).name}: error: {f'rank {rank()}: ' if rank() else ''}{fault}", file=sys.stderr)
        sys.exit(2)


def run_main(main: Callable[[], None], many_ranks: bool = False) -> None:
    """Run a script's main; Ctrl-C ends it with one line that says how to go on, and so does a UserError.

    many_ranks: torchrun may start it more than once. A rank that fails then says so and is gone at once, without
    waiting for the others; torchrun ends those.
    """
    name, ranks = Path(sys.argv[0]).name, int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1 and not many_ranks:  # they would write over each other's run folder
        sys.exit(f"{name}: error: started as {ranks} processes, one is supported")
    code = 0
    try:
        main()
    except KeyboardInterrupt:
        code = 130
        if rank() == 0:
            print(
                f"\n{name}: interrupted; a run folder is continued by the same command with --resume", file=sys.stderr
            )
    except UserError as error:
        code = 2
        if first_to_fail():  # of all ranks, or of those that come to this end together
            print(f"{name}: error: {error}", file=sys.stderr)
    except SystemExit as end:  # of bad input, said already: with many ranks it must not take the ordinary way out
        if ranks == 1:
            raise
        code = end.code if isinstance(end.code, int) else 1
    except Exception:
        if ranks == 1:
            raise
        code = 1
        if first_to_fail():
            print("".join(f"rank {rank()}: {line}\n" for line in traceback.format_exc().splitlines()), file=sys.stderr)
    end_ranks(code)
    if code:
        sys.exit(code)


def parse_settings(cls: type[S], doc: str, argv: list[str] | None = None, positional: str = "") -> S:
    """Settings from their dataclass's defaults, then `--config file.yaml`, then flags; exit code 2 on any fault.

    positional: name of the setting that may also stand on the command line without its flag.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    formatter = type("Help", (ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter), {})
    parser = HfArgumentParser(cls, description=doc, allow_abbrev=False, formatter_class=formatter)
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings by name; flags on the command line win")
    if positional:
        parser.add_argument("_positional", nargs="?", metavar=positional.upper(), help=f"the same as --{positional}")
    config = parser.parse_args(argv).config
    if config:
        try:
            values = yaml.safe_load(Path(config).read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError) as error:
            parser.error(f"--config {config}: {' '.join(str(error).split())}")
        if not isinstance(values, dict):
            parser.error(f"--config {config}: 'name: value' lines are wanted")
        for name in sorted(set(values) - {f.name for f in dataclasses.fields(cls)}):
            parser.error(f"--config {config}: no setting is called {name!r}")
        argv = [word for name, value in values.items() for word in (f"--{name}", str(value))] + argv
    settings, extra = parser.parse_args_into_dataclasses(argv)
    given = getattr(extra, "_positional", None)
    return dataclasses.replace(settings, **{positional: given}) if given else settings


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
