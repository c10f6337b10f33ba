"""The tree of typed configs, how a file in ``configs/`` becomes one, and how flags override its fields.

A config file is Python that builds one object named ``config``. It is executed: use files that you trust.
"""

import contextlib
import dataclasses
import difflib
import io
import runpy
import traceback
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from drcnn.command import one_line
from drcnn.data import DataConfig
from drcnn.engine.optim import OptimConfig
from drcnn.engine.plain_config import from_dict, to_dict
from drcnn.engine.trainer import TrainConfig
from drcnn.errors import ConfigError, DrcnnError
from drcnn.models import FasterRCNNConfig, FCOSConfig, RetinaNetConfig, SparseRCNNConfig

__all__ = [
    "Config",
    "apply_overrides",
    "describe_type",
    "flags",
    "from_dict",
    "load_config",
    "print_field_help",
    "to_dict",
]

_MARKERS = (tyro.conf.AvoidSubcommands,)
_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    type(None): "None",
}


@dataclass(frozen=True)
class Config:
    """Everything that defines an experiment."""

    model: FasterRCNNConfig | RetinaNetConfig | FCOSConfig | SparseRCNNConfig
    """The detector."""
    data: DataConfig
    """The images and annotations, and how they are prepared."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer and its schedule."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The run: seed, precision, device, logging, checkpoints, evaluation."""


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Executes a config file and applies flags such as ``["--model.num-classes", "3"]`` to its ``config``.

    Raises:
        ConfigError: if the file is missing, fails or holds no ``config``, or a flag cannot be used.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist; {_known_configs(path)}")
    try:
        values = runpy.run_path(str(path))
    except DrcnnError as error:
        raise ConfigError(f"config file {path}: {one_line(error)}") from error
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        line = lines[-1] if lines else getattr(error, "lineno", None)
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ConfigError(f"config file {path}, line {line}: {reason}") from error
    config = values.get("config")
    if not isinstance(config, Config):
        found = "none" if config is None else f"one of type {type(config).__name__}"
        raise ConfigError(f"config file {path} must define config = drcnn.config.Config(...), found {found}")
    return apply_overrides(config, overrides)


def _known_configs(path: Path) -> str:
    for folder in (path.parent, Path("configs"), Path(__file__).parents[1] / "configs"):
        names = sorted(str(p) for p in folder.glob("*.py")) if folder.is_dir() else []
        if names and (folder.name == "configs" or folder == path.parent):
            near = difflib.get_close_matches(str(path), names, n=1)
            return f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
    return "pass the path of a file that defines `config`"


def flags(config: Any, prefix: str = "") -> dict[str, Any]:
    """Lists every flag that ``config`` accepts with its value's type, such as ``{"--optim.lr": float}``."""
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(type(config))
    for item in dataclasses.fields(config):
        value, name = getattr(config, item.name), f"{prefix}{item.name.replace('_', '-')}"
        if dataclasses.is_dataclass(value):
            found |= flags(value, f"{name}.")
        elif not _holds_dataclass(hints[item.name]):
            found[f"--{name}"] = hints[item.name]
            if hints[item.name] is bool:
                found[f"--{prefix}no-{item.name.replace('_', '-')}"] = bool
    return found


def apply_overrides(config: Config, overrides: list[str] | tuple[str, ...]) -> Config:
    """Returns ``config`` with the fields that the flags name replaced by their values.

    ``--model.num-classes 3``, ``--model.num_classes 3`` and ``--model.num-classes=3`` are the same.

    Raises:
        ConfigError: naming the flag, and the nearest valid one or what was expected.
    """
    known = flags(config)
    groups: list[list[str]] = []
    for argument in overrides:
        if argument.startswith("--"):
            name = "--" + argument[2:].partition("=")[0].replace("_", "-")
            if name not in known:
                raise _unknown_flag(argument.partition("=")[0], config, known)
            groups.append([argument])
        elif groups:
            groups[-1].append(argument)
        else:
            raise ConfigError(
                f"unexpected argument {argument!r}; set a field by a flag such as --optim.lr 0.01"
            )
    result, _ = _parse(config, overrides)
    if result is not None:
        return result
    for group in groups:  # the first flag that fails on its own is the culprit
        result, said = _parse(config, group)
        if result is None:
            raise _wrong_value(group, known, said)
    raise ConfigError(f"these flags do not go together: {' '.join(overrides)}")


def _parse(config: Config, arguments: list[str] | tuple[str, ...]) -> tuple[Config | None, str]:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            return tyro.cli(Config, default=config, args=list(arguments), config=_MARKERS), ""
        except SystemExit:
            lines = [line.strip("│╭╮╰╯─ \n") for line in said.getvalue().splitlines()]
            return None, next((line for line in lines[1:] if line), "")


def _unknown_flag(flag: str, config: Config, known: dict[str, Any]) -> ConfigError:
    name = flag[2:].replace("-", "_")
    owner: Any = config
    for part in name.split(".")[:-1]:
        owner = getattr(owner, part, None)
        if owner is None:
            break
    if owner is None and _is_none_field(config, name):
        return ConfigError(f"{flag} cannot be set: the config file leaves its group at None; set it there")
    near = difflib.get_close_matches(flag.replace("_", "-"), known, n=1, cutoff=0.5)
    if not near:  # a right name in the wrong group, such as --lr
        leaf = flag.replace("_", "-").lstrip("-").split(".")[-1]
        near = [f for f in known if f.lstrip("-").split(".")[-1] == leaf][:1]
    hint = f"did you mean {near[0]}?" if near else "--help lists the flags"
    return ConfigError(f"unknown flag {flag}; {hint}")


def _is_none_field(config: Config, name: str) -> bool:
    value: Any = config
    for part in name.split(".")[:-1]:
        if not dataclasses.is_dataclass(value) or not hasattr(value, part):
            return False
        value = getattr(value, part)
    return value is None


def _wrong_value(group: list[str], known: dict[str, Any], said: str) -> ConfigError:
    flag, equals, value = group[0].partition("=")
    given = ([value] if equals else []) + group[1:]
    kind = known["--" + flag[2:].replace("_", "-")]
    if kind is bool:
        group_name, _, leaf = flag.rpartition(".")
        leaf = leaf.removeprefix("no-")
        return ConfigError(f"{flag} takes no value; write {group_name}.{leaf} or {group_name}.no-{leaf}")
    if said.startswith("Error parsing") and f"--{flag[2:].replace('_', '-')}" not in said and " ".join(given):
        return ConfigError(f"{flag} {' '.join(given)}: {said.partition(': ')[2] or said}")
    got = " ".join(given) if given else "nothing"
    return ConfigError(f"{flag} must be {describe_type(kind)}, got {got}")


def describe_type(kind: Any) -> str:
    """Says in words which values a field of this type takes, e.g. ``a whole number``."""
    if kind in _WORDS:
        return _WORDS[kind]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe_type(a) for a in arguments)
    if origin is tuple and arguments[-1:] == (Ellipsis,):
        return f"any number of values, each {describe_type(arguments[0])}"
    if origin is tuple:
        return f"{len(arguments)} values, each {describe_type(arguments[0])}"
    return getattr(kind, "__name__", str(kind))


def _holds_dataclass(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) or any(_holds_dataclass(a) for a in typing.get_args(kind))


def print_field_help(config: Config | None, program: str) -> None:
    """Prints every field with its flag, meaning and default; those of a Faster R-CNN without ``config``."""
    default = config or Config(model=FasterRCNNConfig(), data=tyro.MISSING)
    with contextlib.suppress(SystemExit):
        tyro.cli(Config, default=default, args=["--help"], prog=program, config=_MARKERS, description="")
