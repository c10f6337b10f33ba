"""The site in a real Chromium, opened from disk."""

import pytest

PAGES = ("index", "dynamic_rcnn", "from_mmdetection", "notebooks/thresholds", "reference/configs")


@pytest.fixture
def open_page(browser, site):
    """Function that opens a page; at the end, nothing must have gone wrong."""
    problems, contexts = [], []

    def open_it(name: str, width: int, scheme: str):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(120_000)
        page.on("console", lambda message: problems.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("requestfailed", lambda request: problems.append(f"failed: {request.url}"))
        page.on("request", lambda request: asked(request.url))
        page.goto((site / f"{name}.html").as_uri())
        return page

    def asked(url: str) -> None:
        if not url.startswith(("file:", "data:", "blob:")):
            problems.append(f"asked for {url}")

    yield open_it
    for context in contexts:
        context.close()
    assert not problems


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_pages_fit_a_desk_and_a_phone(open_page, width, scheme):
    backs = set()
    for name in PAGES:
        page = open_page(name, width, scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        backs.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert backs == {"rgb(255, 255, 255)"} if scheme == "light" else "rgb(255, 255, 255)" not in backs


def test_drawings_take_the_colour_of_the_text(open_page):
    colours = set()
    for scheme in ("light", "dark"):
        page = open_page("dynamic_rcnn", 1280, scheme)
        drawn = page.evaluate("getComputedStyle(document.querySelector('.drawing svg text')).fill")
        assert drawn == page.evaluate("getComputedStyle(document.querySelector('.md-typeset p')).color")
        colours.add(drawn)
    assert len(colours) == 2


def test_search_works_from_disk(open_page):
    page = open_page("reference/presets", 1280, "light")
    page.click(".md-search__input")
    page.keyboard.type("label assignment")
    page.wait_for_selector(".md-search-result__link")
    found = page.locator(".md-search-result__link").evaluate_all("all => all.map(one => one.href)")
    assert any("dynamic_rcnn.html" in link or "dynamic_sparse_rcnn.html" in link for link in found)
