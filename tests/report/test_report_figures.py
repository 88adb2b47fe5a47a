"""The figures of a report: what is drawn, and that they can share a page."""

from __future__ import annotations

import re

import numpy as np
import pytest

from patch_retriever.report import figures
from patch_retriever.report.figures import energy_figure, modality_figure, validation_curves
from patch_retriever.report.plots import INK, Series, histogram, lines, to_svg


def tried(**scores: float):
    """Settings as `n=16 then=centre` with their scores."""
    found = []
    for setting, score in scores.items():
        parts = [part.split("_") for part in setting.split("__") if part]
        values = {key: int(v) if v.isdigit() else v for key, v in parts}
        found.append({"setting": values, "validation_score": score})
    return found


def method(name: str, control_of: str | None = None, **scores: float):
    every = tried(**scores)
    best = max(t["validation_score"] for t in every)
    return {
        "id": name.lower().replace(" ", "-"),
        "method": name,
        "control_of": control_of,
        "tried": every,
        "validation_score": best,
    }


SELECTION = [
    method("base", __=0.5),
    method("ABTT", r_1=0.5, r_2=0.4, r_4=0.6),
    method("one value", r_1=0.1),
    method("by A", n_16__then_no=0.5, n_64__then_no=0.6, n_64__then_c=0.55, n_128__then_c=0.3),
    method("random as A", "by-a", n_16__then_no=0.4, n_64__then_no=0.45, n_128__then_c=0.2),
    method("by B", n_16__r_4=0.1, n_32__r_4=0.2, n_64__r_4=0.3, n_64__r_8=0.7),
    method("by modality", threshold_1__then_no=0.4, threshold_2__then_re__beta_1=0.6),
    method("pairs", first_x=0.9, beta_1=0.1, beta_2=0.2),
]


@pytest.fixture
def drawn(monkeypatch):
    """What was asked of `lines`, beside the figures."""
    calls = []

    def spy(series, *args, **more):
        calls.append((series, more))
        return lines(series, *args, **more)

    monkeypatch.setattr(figures, "lines", spy)
    return validation_curves(SELECTION), calls


def test_every_removal_has_a_figure_with_its_own_control(drawn):
    found, calls = drawn
    titles = ["by A", "by B", "by modality", "Score over directions removed"]
    assert [figure.title for figure in found] == titles
    (by_a, _), (by_b, _), (by_modality, _), (by_r, _) = calls
    assert by_a == [
        Series("these concepts", [16, 64, 128], pytest.approx([50, 60, 30])),
        Series("random", [16, 64, 128], pytest.approx([40, 45, 20]), control=True),
    ]
    assert by_b == [Series("these concepts", [16, 32, 64], pytest.approx([10, 20, 70]))]
    assert by_modality == [Series("these concepts", [1, 2], pytest.approx([40, 60]))]
    assert by_r == [Series("ABTT", [1, 2, 4], pytest.approx([50, 40, 60]))]


def test_removals_share_a_scale_that_holds_them_all_and_the_base(drawn):
    _, calls = drawn
    (_, first), (_, second), (_, third), _ = calls
    assert first["y_range"] == second["y_range"] == third["y_range"]
    low, high = first["y_range"]
    assert low < 10 and high > 70
    assert all(more["level"] == ("base", 50.0) for _, more in calls)


@pytest.mark.parametrize("seed", range(3))
def test_captions_of_energy_and_modality_count_right(seed):
    rng = np.random.default_rng(seed)
    energy_c = rng.exponential(size=200).astype(np.float32) ** 3
    modality_c = rng.choice([0.0, 0.2, 0.5, 0.9, 1.0], 200).astype(np.float32)
    total, n = 0.0, 0
    for energy in sorted(energy_c.tolist(), reverse=True):
        if total >= 0.99 * float(energy_c.sum(dtype=np.float64)):
            break
        total, n = total + energy, n + 1
    assert energy_figure(energy_c).caption.startswith(f"{n} of 200 concepts ({n / 2:.1f}%)")
    share = 100 * energy_c[modality_c > 0.5].sum() / energy_c.sum()
    assert (
        f"on texts hold {share:.0f}% of the energy" in modality_figure(modality_c, energy_c).caption
    )


def test_concepts_that_never_fire_are_no_error():
    zeros_c = np.zeros(8, dtype=np.float32)
    assert "<svg" in energy_figure(zeros_c).svg
    assert "<svg" in modality_figure(zeros_c + 0.5, zeros_c).svg


def ids(svg: str) -> set[str]:
    return set(re.findall(r'\bid="([^"]+)"', svg))


def test_figures_on_one_page_share_no_id_and_point_at_their_own(drawn):
    found, _ = drawn
    everything = [ids(figure.svg) for figure in found]
    assert sum(map(len, everything)) == len(set().union(*everything))
    for figure, own in zip(found, everything, strict=True):
        pointed = set(re.findall(r'(?:href="#|url\(#)([^")]+)', figure.svg))
        assert pointed and pointed <= own


def test_a_figure_is_the_same_text_twice_in_the_colour_of_the_page():
    first, second = (to_svg(lines([Series("a", [1, 2], [3, 4])], "x", "y")) for _ in range(2))
    assert first == second
    assert first.startswith("<svg") and 'width="100%"' in first.split(">")[0]
    assert "currentColor" in first and INK not in first


def test_a_histogram_counts_by_weight():
    figure = histogram([0.05, 0.05, 0.95], [1, 2, 4], "x", "y", bins=10)
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights == [3, 0, 0, 0, 0, 0, 0, 0, 0, 4]
