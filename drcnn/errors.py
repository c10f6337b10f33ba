"""Errors that a user can cause and fix; every command prints them as one line and exits with code 2."""

import reprlib

_LONGEST, _TAIL = 2000, 500  # characters; what a file holds may be of any length

_shortened = reprlib.Repr()
_shortened.maxstring = _shortened.maxother = 80
_shortened.maxlevel = 3


def shown(value: object) -> str:
    """Shows a value of a file in a message: as ``repr`` does, but never long, deep or of many lines."""
    try:
        return _shortened.repr(value)
    except (ValueError, RecursionError):  # integers of thousands of digits have no text
        return f"a {type(value).__name__}"


class DrcnnError(Exception):
    """An error with a one-line message that says what is wrong, where, and what to do.

    Line breaks become spaces and other characters that cannot be printed their escapes: names of files may
    hold any.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(part.strip() for part in message.splitlines())
        if not line.isprintable():
            line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
        if len(line) > _LONGEST:
            line = f"{line[: _LONGEST - _TAIL]} ... {line[-_TAIL:]}"
        super().__init__(line)


class ConfigError(DrcnnError):
    """A configuration file, field or flag that cannot be used."""


class DataError(DrcnnError):
    """Images or annotations that cannot be used; names the file and, where there is one, the id."""


class WeightsError(DrcnnError):
    """A checkpoint or weights file that cannot be used."""


class TrainingError(DrcnnError):
    """A training run that cannot go on, such as one whose loss is no longer finite."""


class RankStopped(DrcnnError):
    """A rank that stops because of another one, which says why; without a text of its own."""
