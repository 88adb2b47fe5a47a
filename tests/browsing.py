"""A page as a real browser shows it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def headless() -> Iterator[Any]:
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
