"""Whether an SAE is good enough to choose patches by its concepts."""

from __future__ import annotations

import pytest

from patch_retriever.sae.quality import WORST_FVU, problem


def metrics(**by_role: float) -> dict[str, object]:
    return {"fvu": 0.0038, "fvu_by_role": by_role}


@pytest.mark.parametrize(
    "by_role",
    [{}, {"text": 0.5, "image": 0.2}, {"text": 0.1}, {"instruction": 0.9, "special": 2.0}],
)
def test_content_that_is_explained_is_no_problem(by_role):
    assert problem(metrics(**by_role)) is None


@pytest.mark.parametrize(
    ("by_role", "named"),
    [
        ({"text": 0.73, "image": 0.8, "special": 0.004}, ["73%", "text", "80%", "image"]),
        ({"text": WORST_FVU + 0.01, "image": 0.1}, ["51%", "text"]),
        ({"image": 1.2}, ["120%", "image"]),
    ],
)
def test_content_that_is_not_explained_is_named_whatever_the_headline_says(by_role, named):
    line = problem(metrics(**by_role))
    assert line is not None and "\n" not in line
    assert all(word in line for word in named)


def test_metrics_of_another_tool_say_nothing():
    assert problem({}) is None
