"""What the report of a small build holds."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
from setuptools import Distribution
from test_report_pictures import opened
from wild import ATTACK, report_again

from patch_retriever.activations.store import Store, sinks_text
from patch_retriever.report.page import summary
from patch_retriever.report.table import NEEDS


class Page(HTMLParser):
    """A page's elements (tag, attributes, path of tags) and texts, its ends checked."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        return [
            attributes
            for name, attributes in self.elements
            if name == tag and wanted.items() <= attributes.items()
        ]


@pytest.fixture(scope="module")
def source(finished_build) -> str:
    return (finished_build / "report/report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(source) -> Page:
    return Page(source)


@pytest.fixture(scope="module")
def table(finished_build):
    return json.loads((finished_build / "report/table.json").read_text())


def test_the_parts_are_there_in_order_and_the_navigation_leads_to_them(page):
    sections = [found["id"] for found in page.all("section")]
    assert sections == ["built", "methods", "curves", "modality", "concepts", "gallery"]
    assert [a["href"] for a in page.all("a")] == [f"#{name}" for name in sections]


def test_report_and_card_say_what_was_found_of_sinks(page, finished_build):
    store = Store(finished_build / "run/collect")
    assert sinks_text(store) == f"none found, at {store.site}"
    assert f"Attention sinks {sinks_text(store)}" in page.text
    card = (finished_build / "README.md").read_text()
    assert f"- **attention sinks**: {sinks_text(store)}." in card


def test_every_method_is_there_with_its_score_and_interval(page, table):
    assert {row["needs"] for row in table["rows"]} <= set(NEEDS)
    for row in table["rows"]:
        d = row["score_minus_base"]
        told = f"{100 * d['mean']:+.1f} [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]"
        score = f"{100 * row['test_score']:.1f}"
        if row["id"] == table["base_id"]:
            told = ""
        assert re.search(
            rf"{re.escape(row['method'])} .*?{re.escape(score)} {re.escape(told)}", page.text
        ), row["method"]
        for task in row["tasks"].values():
            assert f"{100 * task['R@1']:.1f}" in page.text


def test_exported_base_and_controls_are_marked_in_both_tables(page, table):
    controls = sum(row["control"] for row in table["rows"])
    assert len(page.all("tr", **{"class": "control"})) == 2 * controls > 0
    marked = len(page.all("tr", **{"class": "exported"}))
    tried = 1 if page.all("summary") and "readouts that were tried" in page.text else 0
    assert marked == 2 + tried
    if table["exported_id"] != table["base_id"]:
        assert len(page.all("tr", **{"class": "base"})) == 2


def test_pictures_lie_in_the_page_decode_and_have_alternatives(page):
    pictures = page.all("img")
    assert len(pictures) > 50
    for picture in pictures:
        assert picture["alt"]
        assert min(opened(picture["src"]).size) > 0
    heat = page.all("img", **{"class": "heat"})
    assert heat and all(opened(one["src"]).size == (6, 6) for one in heat)


def test_nothing_is_fetched_and_nothing_runs(source, page):
    assert not page.all("script") and not page.all("iframe")
    for name, attributes in page.elements:
        assert not any(key.startswith("on") for key in attributes), name
        for key in ("src", "href", "xlink:href", "data", "srcset", "action"):
            value = attributes.get(key)
            assert value is None or value.startswith(("data:", "#")), (name, value)
    styles = re.search(r"<style>.*?</style>", source, re.DOTALL)[0]
    assert "url(" not in styles and "@import" not in styles
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["content"].startswith("default-src 'none'")


def test_plots_are_named_for_those_who_cannot_see_them(page):
    plots = page.all("svg")
    named = [one for one in page.all("div", role="img") if one["aria-label"]]
    assert len(plots) == len(named) == len(page.all("figure")) >= 8


def test_ids_are_unique(page):
    ids = [attributes["id"] for _, attributes in page.elements if attributes.get("id")]
    assert len(ids) == len(set(ids))


def test_cards_and_gallery_are_of_the_build(page, table):
    cards = len(page.all("article", **{"class": "card"}))
    assert 12 <= cards <= 24
    assert len(re.findall(r"Concept \d+ (?:kept|subtracted) \w+", page.text)) == cards
    counts = re.findall(r"(\S+(?: \w+)?): (\d+) won, (\d+) lost of (\d+)", page.text)
    assert [int(count[3]) for count in counts] == list(table["queries"].values())
    exported = next(row for row in table["rows"] if row["method"] == table["exported"])
    for name, won, lost, queries in counts:
        change = exported["tasks"][name]["R@1_minus_base"]["mean"]
        assert (int(won) - int(lost)) / int(queries) == pytest.approx(change)


def test_small_in_bytes_and_the_same_when_made_again(finished_build, source, tmp_path):
    assert len(source) < 3_000_000
    assert report_again(finished_build, tmp_path) == source


def test_texts_of_users_are_shown_and_never_become_elements(finished_build, tmp_path):
    text = report_again(finished_build, tmp_path, ATTACK)
    page = Page(text)
    assert ATTACK in page.text
    assert not page.all("script") and ATTACK not in text
    assert not any("onerror" in attributes for _, attributes in page.elements)


def row(method: str, score: float, mean: float = 0.0):
    difference = {"mean": mean, "low": mean - 0.01, "high": mean + 0.01}
    return {
        "id": method.lower(),
        "method": method,
        "test_score": score,
        "score_minus_base": difference,
    }


def test_the_result_in_a_sentence():
    rows = [row("base", 0.828), row("CCA", 0.858, 0.03)]
    names = {"base_id": "base", "rows": rows}
    assert summary({**names, "exported_id": "cca"}) == (
        "On test the exported patch (CCA) scores 85.8, base 82.8: "
        "a difference of +3.0 [+2.0, +4.0]."
    )
    assert "No patch was better" in summary({**names, "exported_id": "base"})


def test_an_installed_package_has_the_templates(request):
    """By setuptools' own reading of setup.cfg."""
    root = request.config.rootpath
    distribution = Distribution({"src_root": str(root)})
    distribution.parse_config_files([str(root / "setup.cfg")])
    patterns = distribution.package_data["patch_retriever.report"]
    folder = root / "toolkit/patch_retriever/report"
    shipped = {path for pattern in patterns for path in folder.glob(pattern)}
    assert shipped >= set((folder / "templates").iterdir())
    assert folder / "templates/report.html.jinja" in shipped
