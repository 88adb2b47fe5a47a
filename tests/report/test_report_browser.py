"""The report in a real browser: no errors, nothing missing, nothing wider than the window."""

from __future__ import annotations

import shutil

import pytest
from wild import ENDLESS, report_again

from patch_retriever.report.page import REPORT

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium of the system, or playwright's own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = [path for name in BROWSERS if (path := shutil.which(name))]
        own = playwright.chromium.executable_path
        if not found and shutil.which(own) is None:
            pytest.skip(f"no browser: none of {', '.join(BROWSERS)}, none of playwright's")
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=(found or [own])[0], args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def endless(finished_build, tmp_path_factory):
    """A report on texts with a word that fits in no line."""
    folder = tmp_path_factory.mktemp("endless")
    report_again(finished_build, folder, ENDLESS)
    return folder / REPORT


# how wide the page is, what cannot be seen, what sticks out of the window
LOOK = """() => {
  document.querySelectorAll('details').forEach(d => { d.open = true });
  const seen = e => { const r = e.getBoundingClientRect(); return r.width > 0 && r.height > 0 };
  const inside = e => e.closest('.scroll') || e.closest('svg');
  const box = document.querySelector('.scroll');
  const pictures = [...document.images];
  return {
    pictures: pictures.length,
    plots: document.querySelectorAll('figure svg').length,
    missing: pictures.filter(e => !e.complete || !e.naturalWidth || !seen(e)).length +
      [...document.querySelectorAll('figure svg')].filter(e => !seen(e)).length,
    width: document.documentElement.scrollWidth,
    window: document.documentElement.clientWidth,
    outside: [...document.querySelectorAll('main *')].filter(
      e => !inside(e) && e.getBoundingClientRect().right > window.innerWidth + 1
    ).map(e => e.outerHTML.slice(0, 80)),
    background: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.body).color,
    letters: Math.min(...[...document.querySelectorAll('figure svg text')].map(
      e => e.getBoundingClientRect().height)),
    box: box.scrollWidth - box.clientWidth,
  };
}"""


def looked_at(browser, path, width: int, scheme: str):
    """What is seen, what went wrong, and what was asked of the network."""
    context = browser.new_context(
        viewport={"width": width, "height": 900},
        is_mobile=width < 600,
        color_scheme=scheme,
        offline=True,
    )
    try:
        page = context.new_page()
        wrong: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("requestfailed", lambda request: wrong.append(request.url[:200]))
        page.on("request", lambda request: asked.append(request.url.split(":")[0]))
        page.goto(path.as_uri(), wait_until="load")
        found = page.evaluate(LOOK)
    finally:
        context.close()
    return found, wrong, asked


def brightness(colour: str) -> int:
    return sum(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_report_is_whole_and_fits_the_window(browser, finished_build, width, scheme):
    path = finished_build / "report" / REPORT
    found, wrong, asked = looked_at(browser, path, width, scheme)
    assert wrong == []
    assert set(asked) <= {"file", "data"}
    assert found["pictures"] > 50 and found["plots"] >= 8
    assert found["missing"] == 0
    assert found["width"] <= found["window"] == width
    assert found["outside"] == []
    assert (brightness(found["background"]) > brightness(found["ink"])) == (scheme == "light")
    assert found["letters"] >= 8  # pixels
    assert width > 390 or found["box"] > 0  # the wide table scrolls in its own box


@pytest.mark.parametrize("width", [1280, 390])
def test_a_word_without_end_does_not_widen_the_page(browser, endless, width):
    found, wrong, _ = looked_at(browser, endless, width, "light")
    assert wrong == []
    assert found["width"] <= width
    assert found["outside"] == []
