"""Typed, documented flags for a verb from a dataclass, with one-line errors."""

import contextlib
import dataclasses
import difflib
import io
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

from drcnn.errors import ConfigError

Arguments = TypeVar("Arguments")


def parse(
    kind: type[Arguments], argv: Sequence[str], program: str, description: str, *, rest: bool = False
) -> Any:
    """Reads a verb's arguments into a dataclass.

    Args:
        kind: dataclass whose fields are the flags, each documented by a string below it.
        argv: the arguments.
        program: name to show in the help.
        description: text to show in the help.
        rest: hand back arguments that ``kind`` does not know instead of refusing them.

    Returns:
        The dataclass, and with ``rest`` a list of the other arguments.

    Raises:
        ConfigError: an argument that is unknown, missing or mistyped.
        SystemExit: after ``--help`` has been printed.
    """
    if "--help" in argv or "-h" in argv:
        tyro.cli(kind, args=["--help"], prog=program, description=description)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            parsed, unknown = tyro.cli(
                kind, args=list(argv), prog=program, description=description, return_unknown_args=True
            )
    except SystemExit:
        raise ConfigError(f"{_reason(said.getvalue())}; {program} --help explains the arguments") from None
    if rest:
        return parsed, unknown
    if unknown:
        raise ConfigError(f"unknown argument {unknown[0]}; {_hint(kind, unknown[0], program)}")
    return parsed


def split_fields(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Parts a verb's own arguments from flags of a config's fields, which have a dot: ``--data.root``.

    What follows such a flag up to the next one belongs to it.

    Returns:
        The verb's arguments, and the fields' flags with their values.
    """
    own: list[str] = []
    fields: list[str] = []
    target = own
    for argument in argv:
        if argument.startswith("--"):
            target = fields if "." in argument.partition("=")[0] else own
        target.append(argument)
    return own, fields


def _hint(kind: type, argument: str, program: str) -> str:
    known = [f"--{item.name.replace('_', '-')}" for item in dataclasses.fields(kind)]
    near = difflib.get_close_matches(argument.partition("=")[0], known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"{program} --help explains the arguments"


def _reason(said: str) -> str:
    """What the parser said, without the frame that it draws and its own advice."""
    lines = [line.strip("│╭╮╰╯─- \n") for line in said.splitlines()]
    body = [line for line in lines if line][1:]
    for end, line in enumerate(body):
        if line.startswith(("For full helptext", "Argument helptext")):
            body = body[:end]
            break
    return " ".join(body).rstrip(".") or "the arguments cannot be understood"
