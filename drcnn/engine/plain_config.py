"""Configs as plain nested types, for json and checkpoints, and back."""

import dataclasses
import importlib
from typing import Any

from drcnn.errors import ConfigError


def to_dict(config: Any) -> dict[str, Any]:
    """Turns a config into plain nested types for json and checkpoints; ``_type`` names each dataclass."""
    plain: dict[str, Any] = {"_type": f"{type(config).__module__}.{type(config).__qualname__}"}
    for item in dataclasses.fields(config):
        plain[item.name] = _plain(getattr(config, item.name), item.name)
    return plain


def _plain(value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, (tuple, list)):
        return [_plain(v, name) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    kind = type(value).__name__
    raise ConfigError(f"the config field {name} holds a {kind}; use numbers, text, tuples and dataclasses")


def from_dict(plain: dict[str, Any]) -> Any:
    """Rebuilds the config that :func:`to_dict` wrote. Only dataclasses of drcnn are built; no code is run.

    Raises:
        ConfigError: if a type or a field is not known to this version of drcnn.
    """
    path = plain.get("_type") if isinstance(plain, dict) else None
    module, _, kind_name = str(path).rpartition(".")
    if module.split(".")[0] != "drcnn" or "__main__" in module:
        raise ConfigError(f"a stored config names the type {path!r}, which is not one of drcnn")
    try:
        kind = getattr(importlib.import_module(module), kind_name)
    except (ImportError, AttributeError, ValueError, TypeError):
        raise ConfigError(f"a stored config names {path}, which this drcnn does not have") from None
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise ConfigError(f"a stored config names {path}, which is not a config of drcnn")
    fields = {f.name for f in dataclasses.fields(kind)}
    values = {k: v for k, v in plain.items() if k != "_type"}
    for name in values:
        if name not in fields:
            raise ConfigError(f"a stored config sets {path}.{name}, which this drcnn does not have")
    try:
        return kind(**{k: _typed(v) for k, v in values.items()})
    except ConfigError:
        raise
    except Exception as error:  # values of other types than the fields make their checks raise anything
        raise ConfigError(f"a stored config of {path} is incomplete or damaged: {error}") from None


def _typed(value: Any) -> Any:
    if isinstance(value, dict):
        return from_dict(value)
    return tuple(_typed(v) for v in value) if isinstance(value, list) else value


def complete(plain: dict[str, Any]) -> dict[str, Any]:
    """Fills in the fields that an earlier drcnn did not have: their defaults are what it did."""
    return to_dict(from_dict(plain))
