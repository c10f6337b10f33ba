"""Command line of the synthetic data set maker."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from drcnn.data.synthetic.maker import SyntheticConfig, make_synthetic
from drcnn.errors import DrcnnError


@dataclass(frozen=True)
class _Arguments:
    """Make a synthetic detection data set in COCO format."""

    out: tyro.conf.Positional[str]
    """Folder to make; an older synthetic data set in it is replaced if its settings differ."""
    config: tyro.conf.OmitArgPrefixes[SyntheticConfig] = field(default_factory=SyntheticConfig)


def main(arguments: list[str] | None = None) -> int:
    """Makes the data set that the arguments describe; returns the exit code."""
    options = tyro.cli(_Arguments, args=arguments, prog="python -m drcnn.data.synthetic")
    try:
        made = make_synthetic(Path(options.out), options.config)
    except DrcnnError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {'made' if made else 'already there'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
