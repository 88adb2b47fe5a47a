"""The report in a real browser: no errors, nothing missing, nothing wider than the window."""

from __future__ import annotations

import pytest
from wild import ENDLESS, report_again

from browsing import looked_at
from patch_retriever.report.page import REPORT


@pytest.fixture(scope="module")
def endless(finished_build, tmp_path_factory):
    """A report on texts with a word that fits in no line."""
    folder = tmp_path_factory.mktemp("endless")
    report_again(finished_build, folder, ENDLESS)
    return folder / REPORT


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
