"""Errors that a user can cause and fix; every command prints them as one line and exits with code 2."""


class DrcnnError(Exception):
    """An error with a one-line message that says what is wrong, where, and what to do."""


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
