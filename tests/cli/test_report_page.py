"""The report's page in a real Chromium without a window."""

import pytest

from drcnn.report import main


@pytest.fixture
def page_file(reported_run, tmp_path):
    """The page of two runs."""
    runs = [reported_run("first"), reported_run("second", 1)]
    assert main([*map(str, runs), "--out", str(tmp_path / "page.html"), "--image-side", "96", "--check"]) == 0
    return tmp_path / "page.html"


@pytest.fixture
def open_page(browser, page_file):
    """Function that opens the page and waits until all is drawn; at the end, nothing must have gone wrong."""
    problems, contexts = [], []

    def open_it(width: int = 1280, scheme: str = "light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(120_000)
        page.on("console", lambda message: problems.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: asked(request.url))
        page.goto(page_file.as_uri())
        page.wait_for_selector("html[data-ready=true]", state="attached")
        return page

    def asked(url: str) -> None:
        if not url.startswith(("file:", "data:", "blob:")):
            problems.append(f"asked for {url}")

    yield open_it
    for context in contexts:
        context.close()
    assert not problems


def drawn(page) -> dict[str, int]:
    """Number of visible marks of each chart by its title."""
    marks = ".scatterlayer .trace path, .barlayer .point path, .heatmaplayer image"
    count = f"(chart) => [chart.getAttribute('aria-label'), chart.querySelectorAll('{marks}').length]"
    return page.evaluate(f"Object.fromEntries([...document.querySelectorAll('.chart')].map({count}))")


def until(page, condition: str) -> None:
    """Waits for a condition; the page's own policy forbids Playwright's way."""
    for _ in range(200):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never came true: {condition}")


def rows(page, title: str) -> list[str]:
    return page.locator(f'.scroll[aria-label="{title}"] tbody tr').all_inner_texts()


def test_every_chart_is_drawn_in_light_and_dark(open_page):
    backs = {}
    for scheme in ("light", "dark"):
        page = open_page(scheme=scheme)
        charts = drawn(page)
        assert len(charts) >= 18 and all(charts.values()), charts
        backs[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert page.locator("html").get_attribute("data-theme") == scheme
    assert backs["light"] != backs["dark"]
    text = "getComputedStyle(document.querySelector('.chart .xtick text')).fill"
    before = page.evaluate(text)
    page.locator("#theme").focus()
    page.keyboard.press("Enter")
    until(page, f"{text} !== '{before}'")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == backs["light"]


def test_runs_can_be_hidden(open_page):
    page = open_page()
    both = drawn(page)["What each kind of error costs"]
    assert len(rows(page, "Costs and counts")) == 4
    page.get_by_label("second").first.uncheck()
    bars = "document.querySelectorAll('.chart .barlayer .point path').length"
    until(page, f"{bars} < {both}")
    left = rows(page, "Costs and counts")
    assert len(left) == 2 and all("first" in row for row in left)


def test_selects_search_and_order_of_tables(open_page):
    page = open_page()
    panel = page.locator(".panel", has=page.get_by_role("heading", name="AP by class and size"))
    before = rows(page, "AP by class and size")
    panel.get_by_role("combobox", name="Size of object", exact=True).select_option("small")
    assert rows(page, "AP by class and size") != before
    panel.get_by_role("button", name="AP50").press("Enter")
    values = [row.split("\t")[3] for row in rows(page, "AP by class and size")]
    known = [float(value) for value in values if value[0].isdigit()]
    assert known == sorted(known, reverse=True) and panel.locator("th[aria-sort=descending]").count() == 1
    settings = page.locator(".panel", has=page.get_by_role("heading", name="Settings", exact=True))
    assert len(rows(page, "Settings")) == 1
    settings.get_by_role("combobox", name="Show", exact=True).select_option(index=1)
    settings.get_by_label("Search").fill("warmup")
    assert 0 < len(rows(page, "Settings")) < 5
    curve = page.locator(".panel", has=page.get_by_role("heading", name="Precision and recall"))
    path = curve.locator(".scatterlayer .js-line").first
    before = path.get_attribute("d")
    curve.get_by_role("combobox", name="Class", exact=True).select_option(index=2)
    assert path.get_attribute("d") != before


def test_filters_of_the_images(open_page):
    page = open_page()
    filters = page.get_by_role("group", name="Filters of the images")
    status, cards = filters.locator("span[role=status]"), page.locator("article")
    assert status.inner_text() == "6 of 6 images" and cards.count() == 6
    assert page.locator("article img").first.evaluate("image => image.naturalWidth") > 32
    worst = cards.first.locator("h3").inner_text()
    filters.get_by_role("combobox", name="Order", exact=True).select_option("best first")
    assert cards.first.locator("h3").inner_text() != worst
    filters.get_by_label("Least score").fill("0.05")
    filters.get_by_role("combobox", name="Errors", exact=True).select_option("background")
    shown = cards.count()
    assert 0 < shown < 6 and status.inner_text() == f"{shown} of 6 images"
    for card in cards.all():
        assert "background" in card.locator("p.note").inner_text()
        assert card.locator(".view").nth(1).locator(".box.background:not(.faint)").count() > 0
        assert card.locator(".view").nth(1).locator(".box.correct:not(.faint)").count() == 0
    filters.get_by_role("combobox", name="Errors", exact=True).select_option("any")
    name = filters.get_by_role("combobox", name="Class", exact=True).locator("option").nth(1).inner_text()
    filters.get_by_role("combobox", name="Class", exact=True).select_option(name)
    filters.get_by_label("Labels").check()
    texts = page.locator("article .box span").all_inner_texts()
    assert texts and all(text.startswith(name) for text in texts)
    filters.get_by_role("combobox", name="Beside", exact=True).select_option("second")
    assert page.locator("article .view").count() == 3 * cards.count()
    filters.get_by_label("Least score").fill("1")
    assert page.locator("article").first.locator(".box.correct:not(.faint)").count() == 0
    page.locator(".frame").first.press("Enter")
    assert page.locator("dialog img").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("dialog img").is_visible()


@pytest.mark.parametrize("width", [320, 390, 768])
def test_narrow_screens_do_not_scroll_sideways(open_page, width):
    page = open_page(width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ends = "[...document.querySelectorAll('.chart .main-svg')].map((s) => s.getBoundingClientRect().right)"
    assert max(page.evaluate(ends)) <= width


def test_sections_are_reached_by_keyboard(open_page):
    page = open_page()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    links = page.locator("nav a")
    assert links.count() == 8
    links.nth(7).press("Enter")
    until(page, "document.getElementById('settings').getBoundingClientRect().top < innerHeight")
    unnamed = "[...document.querySelectorAll('select, input')].filter((e) => !e.labels.length)"
    assert page.evaluate(f"{unnamed}.length") == 0
