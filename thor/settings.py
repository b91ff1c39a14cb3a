"""Settings: one dataclass per script, filled from its defaults, a YAML file and the command line. One-line errors.

Also the seeds of random generators, which derive from the setting `seed`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import math
import operator
import os
import re
import sys
import traceback
import typing
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from transformers import HfArgumentParser

from thor.distributed import end_ranks, first_to_fail, gather, rank
from thor.prompts import PROMPT_FILE, Prompt, load_prompt

S = TypeVar("S")
TOPICS = (
    "model",
    "data",
    "sampling",
    "filter",
    "objective",
    "optimisation",
    "validation",
    "memory",
    "run",
)  # groups of --help, in this order
METAVARS = {int: "N", float: "X", str: "TEXT"}
BOUNDS = {  # name -> (what a valid value satisfies, how an error says it)
    "min": (operator.ge, "at least"),
    "above": (operator.gt, "above"),
    "max": (operator.le, "at most"),
    "below": (operator.lt, "below"),
}


class UserError(Exception):
    """A mistake that the user can fix. Scripts print it as one line and exit with code 2."""


# ---- declaring and parsing settings ---------------------------------------------------------------------------------


def setting(default: Any, help: str, topic: str, **bounds: float) -> Any:
    """A field of a settings dataclass, which becomes the flag --NAME.

    default: a list makes a flag that takes one or more values. topic: group of the flag in --help.
    bounds: limits of a number, by names in BOUNDS: `min=0, below=1` is the interval [0, 1). They do not apply to None.
    """
    assert bounds.keys() <= BOUNDS.keys(), f"unknown bounds {bounds}"
    metadata = {"help": help, "topic": topic, "bounds": bounds}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def by_model(demo: Any, other: Any, help: str, topic: str, **bounds: float) -> Any:
    """A `setting` with a default for the demo model, which `fill_defaults` replaces if the model is another one."""
    shown = "all" if other is None else f"{other:,}" if isinstance(other, int) else other
    field = setting(demo, f"{help} (default: %(default)s for the demo model, else {shown})", topic, **bounds)
    return dataclasses.field(default=demo, metadata={**field.metadata, "other": other})


def fill_defaults(settings: S, model: str, demo_model: str, names: Sequence[str] | None = None) -> S:
    """If `model` is not the demo model, replace the settings that were not given by the defaults of other models.

    Prints which. settings: from `parse_settings`, which records what was given; without it, values other than the
    demo's count as given. names: only these settings depend on this model.
    """
    if model == demo_model:
        return settings
    values = {
        field.name: field.metadata["other"]
        for field in dataclasses.fields(settings)
        if "other" in field.metadata
        and getattr(settings, field.name) == field.default
        and field.name not in getattr(settings, "_given", ())
        and (names is None or field.name in names)
    }
    if values and rank() == 0:
        shown = ", ".join(f"{name} {'all' if value is None else value}" for name, value in values.items())
        print(f"{model} is not the demo model, so the defaults are: {shown}")
    filled = dataclasses.replace(settings, **values)
    object.__setattr__(filled, "_given", getattr(settings, "_given", ()))  # for a second call, for another model
    return filled


class _Formatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        """Show no default where the help text explains it, or where there is none."""
        return action.help if action.default in (None, "") else super()._get_help_string(action)


class _Parser(HfArgumentParser):
    source = ""  # of the flags, for error messages

    def error(self, message: str) -> NoReturn:
        """Print argparse's message in the form of all other errors: flag, value, what is valid."""
        message = re.sub(r"argument (--\w+)\S*: invalid choice: '?(.*?)'? \(choose from (.*)\)", _one_of, message)
        message = re.sub(r"argument (--\w+)\S*: invalid (\w+) value: '?(.*?)'?$", r"\1 \3: must be of type \2", message)
        self.exit(2, f"{self.prog}: error: {self.source}{message}\n")


def _one_of(match: re.Match) -> str:
    flag, value, choices = match.groups()
    return f"{flag} {value}: must be one of " + choices.replace("'", "")


def parse_settings(cls: type[S], doc: str, argv: list[str] | None = None, positional: str = "") -> S:
    """Read settings from the defaults of `cls`, then `--config file.yaml`, then flags. Exits with code 2 on an error.

    cls: dataclass of `setting` fields. Fields of type Literal have a fixed set of choices.
    positional: name of a setting that can also be given without its flag.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    hints, topics = typing.get_type_hints(cls), {topic: [] for topic in TOPICS}
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        shown = {"help": field.metadata["help"]}
        for plain in (kind, *typing.get_args(kind)):  # `int | None` is an int in --help
            shown |= {"metavar": METAVARS[plain]} if plain in METAVARS else {}
        plain = dataclasses.field(default=field.default, default_factory=field.default_factory, metadata=shown)
        topics[field.metadata.get("topic", "run")].append((field.name, kind, plain))
    groups = [  # HfArgumentParser makes one group of flags per dataclass
        dataclasses.make_dataclass(topic, fields, namespace={"_argument_group_name": topic})
        for topic, fields in topics.items()
        if fields
    ]
    usage = f"%(prog)s {f'[{positional.upper()}] ' if positional else ''}[--config FILE] [--NAME VALUE ...]"
    parser = _Parser(groups, description=doc, allow_abbrev=False, formatter_class=_Formatter, usage=usage)
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings by name; flags override it")
    if positional:
        parser.add_argument("_positional", nargs="?", metavar=positional.upper(), help=f"the same as --{positional}")
    for action in parser._actions:
        if action.option_strings and action.option_strings[0].startswith("--no_"):
            action.help = argparse.SUPPRESS  # HfArgumentParser adds one to each flag that is true by default
    source, in_file = "", set()
    if config := parser.parse_args(argv).config:
        flags, source = _flags_from(config, cls, parser), f"--config {config}: "
        parser.source, in_file = source, _names(flags) - _names(argv)
        parser.parse_args(flags)  # so that an error names the file
        argv, parser.source = flags + argv, ""
    *parts, extra = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    settings = cls(**{name: value for part in parts for name, value in vars(part).items()})
    given = getattr(extra, "_positional", None) if positional else None
    for field in dataclasses.fields(cls):
        value = getattr(settings, field.name)
        if fault := _number_fault(value, field.metadata.get("bounds", {})):
            parser.source = source if field.name in in_file else ""
            parser.error(f"--{field.name} {value}: must be {fault}")
    if given:
        settings = dataclasses.replace(settings, **{positional: given})
    object.__setattr__(settings, "_given", _names(argv))  # for `fill_defaults`; not a field, so not in config.json
    return settings


def _names(words: list[str]) -> set[str]:
    """The settings that command line words name (and words that are values)."""
    return {word.partition("=")[0].removeprefix("--") for word in words}


def _number_fault(value: Any, bounds: dict[str, float]) -> str:
    """What a number must be, such as "at least 1", or "" if it is valid. Every number must be finite."""
    if not isinstance(value, (int, float)):
        return ""
    if not -math.inf < value < math.inf:  # false for NaN too
        return "a finite number"
    faults = [f"{BOUNDS[name][1]} {bound}" for name, bound in bounds.items() if not BOUNDS[name][0](value, bound)]
    return " and ".join(faults)


def _flags_from(config: str, cls: type, parser: _Parser) -> list[str]:
    """The settings of a YAML file as command line flags. An empty value or list keeps the default."""
    try:
        values = yaml.safe_load(Path(config).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f"--config {config}: {' '.join(str(error).split())}")
    if not isinstance(values, dict):
        parser.error(f"--config {config}: must consist of 'name: value' lines")
    for name in sorted({str(name) for name in values} - {field.name for field in dataclasses.fields(cls)}):
        parser.error(f"--config {config}: no setting is named {name!r}")
    flags, hints = [], typing.get_type_hints(cls)
    for name, value in values.items():
        parts = value if isinstance(value, list) else [] if value is None else [value]
        if any(part is None or isinstance(part, (dict, list)) for part in parts):
            parser.error(f"--config {config}: {name}: must be a value or a list of values, not {value}")
        if isinstance(value, list) and typing.get_origin(hints[name]) is not list:
            if hints[name] is not str:
                parser.error(f"--config {config}: {name}: must be one value, not {value}")
            value = ",".join(map(str, parts))  # as in `data: [aime24, math500]`
        if parts:
            flags += [f"--{name}", *map(str, parts)] if isinstance(value, list) else [f"--{name}={value}"]
    return flags


PROMPT_HELP = "prompt: tool, plain, tool-base, plain-base or a YAML file; empty: the model's own, or tool"


def prompt_for(flag: str, model: str) -> Prompt:
    """The prompt of a run: --prompt if given, else the one that the model was trained with, else 'tool'.

    model: --model. A local folder (or "vllm:FOLDER") may hold the prompt that the model was trained with. If --prompt
    names another one, a line says so. Raises UserError.
    """
    file = Path(model.removeprefix("vllm:"), PROMPT_FILE)
    try:
        own = load_prompt(file) if file.is_file() else None
        prompt = load_prompt(flag) if flag else own or load_prompt("tool")
    except ValueError as error:
        raise UserError(f"--prompt {error}") from error
    if own not in (None, prompt) and rank() == 0:
        print(f"--prompt {flag}: differs from the prompt that {model} was trained with ({file})")
    return prompt


def derive_seed(*parts: int | str) -> int:
    """A 64-bit seed from (seed, iteration, rank, sample, ...), the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


# ---- errors ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def user_errors(flag: str = "") -> Iterator[None]:
    """Turn errors raised while reading input into one line and exit code 2, without a traceback.

    flag: the command line flag that the input belongs to. With many ranks, an error on any of them ends all of them,
    and the first such rank prints its line.
    """
    fault = ""
    try:
        yield
    except (UserError, ValueError, OSError, RuntimeError) as error:
        fault = f"{flag and flag + ' '}{error}"
    faults = gather(fault)
    if any(faults):
        first = next(r for r, text in enumerate(faults) if text)
        if len(faults) == 1 or rank() == first:  # 1: also a rank that failed to join the others
            print(f"{Path(sys.argv[0]).name}: error: {f'rank {rank()}: ' if rank() else ''}{fault}", file=sys.stderr)
        sys.exit(2)


def run_main(main: Callable[[], None], many_ranks: bool = False) -> None:
    """Run the main function of a script. Ctrl-C and a UserError end it with one line.

    many_ranks: the script supports torchrun. A rank that fails prints its error and exits at once, without waiting for
    the others; the launcher then ends those. (torch's `@record` keeps the first traceback too, but the other ranks
    still print theirs, and a user's mistake would still be a traceback.)
    """
    name, ranks = Path(sys.argv[0]).name, int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1 and not many_ranks:  # they would overwrite each other's run folder
        sys.exit(f"{name}: error: started as {ranks} processes, but supports one only")
    code = 0
    try:
        main()
    except KeyboardInterrupt:
        code = 130
        if rank() == 0:
            print(f"\n{name}: interrupted; to resume, run the same command with --resume", file=sys.stderr)
    except UserError as error:
        code = 2
        if first_to_fail():
            print(f"{name}: error: {error}", file=sys.stderr)
    except SystemExit as end:  # the error was printed already
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
