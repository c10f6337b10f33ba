"""How runs were made: settings and their differences, commands, environment."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly

from drcnn.engine.report.page import Panel, Section, table
from drcnn.engine.summary import describe_software

_HEAD = re.compile(r"(command|model|data|schedule|device|operators|software): (.*)")
_PROGRESS = re.compile(r"step \d+")


def read_log_head(file: Path) -> list[tuple[str, str]]:
    """What a run said about itself when it last began: pairs of a word and a text; empty without a log."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    starts = [i for i, line in enumerate(lines) if line.startswith("command: ")]
    if not starts:
        return []
    found = []
    for line in lines[starts[-1] :]:
        if _PROGRESS.match(line):
            break
        if match := _HEAD.match(line):
            found.append((match[1], match[2]))
    return found


def flatten(config: Any, prefix: str = "") -> dict[str, str]:
    """The settings of a config by their dotted names, as text."""
    if isinstance(config, dict):
        found: dict[str, str] = {}
        for key, value in config.items():
            if key == "_type":
                if prefix:
                    found[f"{prefix}(kind)"] = str(value).rpartition(".")[2]
            else:
                found |= flatten(value, f"{prefix}{key}.")
        return found
    if isinstance(config, list) and any(isinstance(value, dict) for value in config):
        return {k: v for i, value in enumerate(config) for k, v in flatten(value, f"{prefix}{i}.").items()}
    text = ", ".join(map(str, config)) if isinstance(config, list) else str(config)
    return {prefix.rstrip("."): text}


def settings_section(runs: Sequence[tuple[int, str, dict, list[tuple[str, str]]]]) -> Section:
    """Settings, commands and environment.

    Args:
        runs: number, name, config as plain types and head of the log of each run.
    """
    configs = [flatten(config) for _, _, config, _ in runs]
    names = [name for _, name, _, _ in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = [(key, [config.get(key) for config in configs]) for key in keys]
    differing = [(key, values) for key, values in rows if len(set(values)) > 1]
    variants, options = [], []
    if len(runs) > 1:
        options.append(f"{len(differing)} that differ")
        variants.append(differing)
    options.append(f"all {len(rows)}")
    variants.append(rows)
    content = {
        str(place): table(["setting", *names], [(None, [key, *values]) for key, values in shown], search=True)
        for place, shown in enumerate(variants)
    }
    panels = [Panel("table", "Settings", content, [("Show", options)], wide=True)]
    said = [(number, [name, word, text]) for number, name, _, head in runs for word, text in head]
    said.append((None, ["this page", "software", f"{describe_software()}, plotly {plotly.__version__}"]))
    note = "As each run's log says at its start; the last line is of the machine that made this page."
    panels.append(
        Panel("table", "Command and environment", {"": table(["of", "", "text"], said)}, note=note, wide=True)
    )
    return Section("settings", "Settings and environment", panels)
