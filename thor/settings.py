"""Settings from a dataclass, a YAML file and the command line; one-line errors."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import sys
import traceback
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import HfArgumentParser

from thor.distributed import end_ranks, first_to_fail, gather, rank

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


def derive_seed(*parts: int | str) -> int:
    """A 64-bit seed from (seed, iteration, rank, sample, ...): the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")
