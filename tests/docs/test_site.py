"""The site of the docs is built strictly: a broken link fails, and pages ask for nothing from a network."""

import logging
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_every_page_is_there(site):
    pages = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    wanted = {
        f"{path.relative_to(ROOT / 'docs').with_suffix('').as_posix()}.html"
        for path in (ROOT / "docs").rglob("*.md")
    }
    assert wanted <= pages
    assert {"notebooks/own_data.html", "notebooks/thresholds.html", "reference/command_line.html"} <= pages
    assert "repository/bench/results/index.html" in pages


def test_the_reference_comes_from_the_code(site):
    assert "T never goes below" in (site / "reference/dynamics.html").read_text()
    from drcnn.cli import VERBS

    commands = (site / "reference/command_line.html").read_text()
    assert not [verb for verb in VERBS if f'id="{verb}"' not in commands]
    assert "--model.training.iou-threshold" in commands


def test_drawings_are_in_their_pages(site):
    html = (site / "dynamic_rcnn.html").read_text()
    assert '<span class="drawing"><svg role="img" aria-label="Left' in html
    assert "<style>svg" not in html


def test_no_page_asks_for_anything_from_a_network(site):
    loaded = r"(?:script|img|iframe|link rel=.(?:stylesheet|preload|icon).)"
    asks = re.compile(rf"<{loaded}[^>]*(?:src|href)=.?(?:https?:)?//[^>]*")
    found = [(page.name, ask) for page in site.rglob("*.html") for ask in asks.findall(page.read_text())]
    assert not found


def test_no_page_says_where_it_was_built(site):
    assert not [page for page in site.rglob("*.html") if str(ROOT) in page.read_text()]


def test_broken_links_fail(build_site, tmp_path, caplog):
    from mkdocs.exceptions import Abort

    docs = tmp_path / "docs"
    shutil.copytree(ROOT / "docs", docs)
    page = docs / "faq.md"
    planted = (
        "[page](no_such_page.md)",
        "[anchor](install.md#no-such-heading)",
        "[file](../drcnn/no_such_file.py)",
        "![picture](no_such_picture.png)",
    )
    page.write_text(page.read_text() + "\n\n".join(planted))
    (docs / "forgotten.md").write_text("# In no menu\n")
    with caplog.at_level(logging.WARNING, logger="mkdocs"), pytest.raises(Abort):
        build_site(tmp_path / "site", docs)
    said = caplog.text
    names = ("no_such_page.md", "no-such-heading", "no_such_file.py", "no_such_picture.png", "forgotten.md")
    assert not [name for name in names if name not in said]
