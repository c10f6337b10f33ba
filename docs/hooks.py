"""Hooks of mkdocs: what the pages show of the repository is read when the site is built.

- ``--help`` of every verb becomes the page ``reference/command_line.md``.
- Notebooks become pages, with the output that they hold.
- A link out of ``docs/`` gets a page with that file of the repository. Without the file, the link is broken.
- Drawings (``figures/*.svg``) go into their page, where they take the colour of the text.
"""

import contextlib
import importlib
import io
import json
import os
import posixpath
import re
import textwrap
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
HELP_COLUMNS = 92
FIELDS = re.compile(r"^Fields of the .*as flags.*$", re.MULTILINE)
"""Where the help of some verbs goes on with every field of a config."""

_LINK = re.compile(r"(?<=\]\()(?:\.\./)+[^)#\s]+")
_PAGE_LINK = re.compile(r"(\]\([^)\s]*)\.ipynb(?=[)#])")
_DRAWING = re.compile(r'<img alt="([^"]*)" src="(?:\.\./)*(figures/[\w-]+\.svg)" />')
_ROLE = re.compile(r":(?:func|class|meth|mod|attr):(?=<code>)")
_FRAME = re.compile(r"^(?:[╭╰]─*[╮╯]?|[│ ]*[─-]{20,}[│ ]*)$")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made, and takes away what they are made of."""
    docs = Path(config.docs_dir)
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        files.remove(notebook)
        for made in notebook_files(docs / notebook.src_uri, notebook.src_uri, config):
            files.append(made)
    reference = command_line()
    files.append(File.generated(config, "reference/command_line.md", content=reference))
    linked = {target for page in docs.rglob("*.md") for target in outside(page, docs)}
    for target in sorted(linked):
        uri = f"repository/{target}{'' if target.endswith('.md') else '.md'}"
        files.append(File.generated(config, uri, content=repository_page(target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Points links out of ``docs/`` to the pages of those files."""
    folder = posixpath.dirname(page.file.src_uri)

    def point(match: re.Match) -> str:
        target = posixpath.normpath(posixpath.join("docs", folder, match[0]))
        if target.startswith(("docs/", "..")) or not (ROOT / target).is_file():
            return match[0]
        uri = f"repository/{target}{'' if target.endswith('.md') else '.md'}"
        return posixpath.relpath(uri, folder or ".")

    if page.file.src_uri.startswith("repository/"):
        return markdown
    return _PAGE_LINK.sub(r"\1.md", _LINK.sub(point, markdown))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Puts drawings into the page, and takes Sphinx's roles off the names in docstrings."""

    def draw(match: re.Match) -> str:
        text = (Path(config.docs_dir) / match[2]).read_text()
        text = re.sub(r"<\?xml.*?\?>|<style>.*?</style>|<!--.*?-->", "", text, flags=re.S).strip()
        text = text.replace("<svg ", f'<svg role="img" aria-label="{match[1]}" ', 1)
        return f'<span class="drawing">{text}</span>'

    return _ROLE.sub("", _DRAWING.sub(draw, html))


def outside(page: Path, docs: Path) -> Iterator[str]:
    """Lists the files of the repository that a page links to, as paths from its root."""
    for match in _LINK.finditer(page.read_text()):
        folder = posixpath.join("docs", page.parent.relative_to(docs).as_posix())
        target = posixpath.normpath(posixpath.join(folder, match[0]))
        if not target.startswith(("docs/", "..")) and (ROOT / target).is_file():
            yield target


def repository_page(target: str) -> str:
    """Shows a file of the repository; the links of a text there are not followed."""
    text = (ROOT / target).read_text()
    head = f"---\ntitle: {target}\nsearch:\n  exclude: true\n---\n\n"
    if target.endswith(".md"):
        return head + re.sub(r"!?\[([^\]]*)\]\((?!http)[^)]*\)", r"\1", text)
    return f"{head}# {target}\n\n````{Path(target).suffix[1:] or 'text'}\n{text}\n````\n"


def command_line() -> str:
    """Collects what ``--help`` of every verb prints; fields of a config are shown once, with train's."""
    from drcnn import cli

    parts = ["# Command line\n", "What `--help` prints.\n", fenced(cli.usage())]
    for verb, meaning in cli.VERBS.items():
        own, *fields = FIELDS.split(printed_help(verb))
        parts += [f"## drcnn {verb} {{#{verb}}}\n", f"{meaning[0].upper()}{meaning[1:]}.\n", fenced(own)]
        if fields and verb == "train":
            parts += ['??? note "Every field of a config, as a flag"\n', indented(fenced(*fields))]
    return "\n".join(parts)


def printed_help(verb: str) -> str:
    """Returns what ``drcnn VERB --help`` prints, without the frames' lines."""
    said = io.StringIO()
    plain = patch.dict(os.environ, COLUMNS=str(HELP_COLUMNS), NO_COLOR="1", TERM="dumb")
    with plain, contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        importlib.import_module(f"drcnn.{verb}").main(["--help"])
    lines = [line.rstrip() for line in said.getvalue().splitlines()]
    kept = [line.removeprefix("│").removesuffix("│").rstrip() for line in lines if not _FRAME.match(line)]
    # Descriptions come as long lines; examples, which are indented, keep theirs.
    wrapped = (line if line.startswith(" ") else textwrap.fill(line, HELP_COLUMNS) for line in kept)
    return re.sub(r"^╭─ (.*?) ─*╮$", r"\1:", "\n".join(wrapped), flags=re.M)


def notebook_files(path: Path, uri: str, config: MkDocsConfig) -> Iterator[File]:
    """Yields the page of a notebook and its pictures."""
    stem, parts, number = uri.removesuffix(".ipynb"), [], 0
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        printed = ""
        for output in cell.get("outputs", []):
            printed += "".join(output.get("text", ""))
            data = output.get("data", {})
            if "image/png" in data:
                number += 1
                name = f"{stem}_{number}.png"
                yield File.generated(config, name, content=b64decode("".join(data["image/png"])))
                parts.append(f"![Output of the cell above]({posixpath.basename(name)})")
            elif "text/plain" in data:
                printed += "".join(data["text/plain"]) + "\n"
        if printed:
            parts.append(f"```text\n{printed.rstrip()}\n```")
    yield File.generated(config, f"{stem}.md", content="\n\n".join(parts) + "\n")


def fenced(text: str) -> str:
    """Shows a text as it is."""
    return f"```text\n{text.strip()}\n```\n"


def indented(text: str) -> str:
    """Moves a text into the block before it."""
    return "".join(f"    {line}\n" for line in text.splitlines())
