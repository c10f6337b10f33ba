"""``drcnn completion SHELL``: a script that completes verbs, flags and values in a shell."""

import argparse
import contextlib
import importlib
import sys
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from drcnn import cli
from drcnn.arguments import parse
from drcnn.command import command
from drcnn.config import flags
from drcnn.data import DataConfig, SplitConfig
from drcnn.engine.optim import OptimConfig
from drcnn.engine.trainer import TrainConfig
from drcnn.errors import ConfigError

PROGRAM = "drcnn completion"
DESCRIPTION = """Prints a script with which a shell completes verbs, flags and values after `drcnn`.

Examples:
  source <(drcnn completion bash)                     in ~/.bashrc, after the environment is activated
  drcnn completion zsh > ~/.zfunc/_drcnn              where ~/.zfunc is in fpath
  drcnn completion tcsh > ~/.drcnn.tcsh               and source it

Of a config's fields it knows those of data, optim and train; drcnn train CONFIG --help lists the model's."""

_PLACE = Positional[int].__metadata__
_WITH_FIELDS = ("train", "eval", "compare", "predict", "export", "benchmark")


@dataclass(frozen=True)
class CompletionArguments:
    """Flags of the verb."""

    shell: Positional[Annotated[Literal["bash", "zsh", "tcsh"], arg(metavar="SHELL")]]
    """bash, zsh or tcsh."""


@command
def main(argv: list[str]) -> int:
    """Runs the verb and returns its exit code."""
    if "-h" in argv or "--help" in argv:
        with contextlib.suppress(SystemExit):
            parse(CompletionArguments, ["--help"], PROGRAM, DESCRIPTION)
        return 0
    print(script(parse(CompletionArguments, argv, PROGRAM, DESCRIPTION).shell))
    return 0


def script(shell: str) -> str:
    """Makes the script from the arguments of all verbs.

    Args:
        shell: bash, zsh or tcsh.

    Raises:
        ConfigError: without shtab.
    """
    try:
        import shtab
    except ModuleNotFoundError:
        raise ConfigError("this needs shtab; install it with: pip install 'drcnn[completion]'") from None
    drcnn = argparse.ArgumentParser("drcnn")
    verbs = drcnn.add_subparsers(metavar="VERB")
    for verb, does in cli.VERBS.items():
        parser = verbs.add_parser(verb, help=does)
        for name, values in _arguments(verb).items():
            flag, choices = name.startswith("--"), _choices(values)
            if flag and values is bool:
                parser.add_argument(name, action="store_true")
                continue
            argument = parser.add_argument(name, nargs=None if flag else "*", choices=choices)
            if choices is None:
                argument.complete = shtab.FILE
    return shtab.complete(drcnn, shell)


def _arguments(verb: str) -> dict[str, Any]:
    """What a verb takes and the types of the values: flags with their dashes, and places by a bare name."""
    kind = getattr(importlib.import_module(f"drcnn.{verb}"), f"{verb.title()}Arguments", None)
    found: dict[str, Any] = {"CONFIG": str} if verb == "train" else {}
    if kind is not None:
        marked = typing.get_type_hints(kind, include_extras=True)
        for name, values in typing.get_type_hints(kind).items():
            place = getattr(marked[name], "__metadata__", ())[-1:] == _PLACE
            dashed = name.replace("_", "-")
            found[name if place else f"--{dashed}"] = values
            if values is bool:
                found[f"--no-{dashed}"] = values
    if verb in _WITH_FIELDS:
        anything = SplitConfig("images", "annotations.json")
        data = DataConfig("", anything, anything)
        for part, prefix in ((data, "data"), (OptimConfig(), "optim"), (TrainConfig(), "train")):
            found |= flags(part, f"{prefix}.")
    return found


def _choices(values: Any) -> tuple[Any, ...] | None:
    """The words that a value can be, or None if there are no such."""
    if typing.get_origin(values) is Literal:
        return typing.get_args(values)
    found = [_choices(kind) for kind in typing.get_args(values)]
    return next((words for words in found if words), None)


if __name__ == "__main__":
    sys.exit(main())
