"""The figures of a report: validation curves, modality, energy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from patch_retriever.concepts.energy import concentration, concepts_for
from patch_retriever.patch.methods import BASE
from patch_retriever.report.plots import SCALES, Series, histogram, lines, to_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMALL = (4.6, 3.3)
"""Inches: letters stay readable on a phone."""
SCORE = "score on held-out queries (%)"


@dataclass(frozen=True)
class Drawn:
    """A figure of the page: its title, what to see in it, the SVG."""

    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Axis:
    """A setting that makes a curve, its name and scale."""

    setting: str
    name: str
    scale: SCALES = "linear"
    selects: bool = False
    """Whether it decides which concepts are removed."""


AXES = (
    Axis("n", "concepts removed", "log", selects=True),
    Axis("threshold", "modality score above which concepts are removed", selects=True),
    Axis("eps", "eps (modality scores from eps to 1 - eps are kept)", "log", selects=True),
    Axis("beta", "beta of ReAlign (1: centring)"),
    Axis("r", "directions removed", "log"),
    Axis("k", "components kept", "log"),
    Axis("shrinkage", "shrinkage", "log"),
    Axis("strength", "strength"),
)
"""A method's curve is over the first of these that it was tried with several values of."""


def validation_curves(methods: Sequence[dict[str, Any]]) -> list[Drawn]:
    """What was tried on validation as curves (`methods` as in selection.json).

    Every selection of concepts has a figure with its own controls; methods with another setting
    share a figure for each setting. A point is the best over the other settings, as validation
    chooses.
    """
    base = 100 * next(m["validation_score"] for m in methods if m["id"] == BASE)
    curves = [(method, axis, _curve(method, axis)) for method in methods if (axis := _axis(method))]
    heights = [y for _, axis, (_, ys) in curves if axis.selects for y in ys] + [base]
    spare = 0.05 * (max(heights) - min(heights)) + 0.1
    y_range = min(heights) - spare, max(heights) + spare

    def drawn(title: str, caption: str, axis: Axis, series: list[Series], **more: Any) -> Drawn:
        figure = lines(
            series, axis.name, SCORE, x_scale=axis.scale, level=("base", base), size=SMALL, **more
        )
        return _drawn(title, caption, figure)

    figures = []
    for method, axis, curve in curves:
        if method["control_of"] or not axis.selects:
            continue
        series = [Series("these concepts", *curve)]
        caption = "Against base (dotted)."
        for other, its_axis, its_curve in curves:
            if other["control_of"] == method["id"] and its_axis is axis:
                series.append(Series("random", *its_curve, control=True))
                caption = f"Against base (dotted) and (dashed): {other['method']}."
        figures.append(drawn(method["method"], caption, axis, series, y_range=y_range))
    for axis in AXES:
        series = [
            Series(method["method"], *curve, control=method["control_of"] is not None)
            for method, its_axis, curve in curves
            if its_axis is axis and not axis.selects
        ]
        if series:
            caption = "Each point the best over the methods' other settings; dotted: base."
            title = f"Score over {axis.name}"
            figures.append(drawn(title, caption, axis, series))
    return figures


def _axis(method: dict[str, Any]) -> Axis | None:
    """The setting that a method's curve is over."""
    for axis in AXES:
        values = {tried["setting"].get(axis.setting) for tried in method["tried"]}
        if None not in values and len(values) > 1:
            return axis
    return None


def _curve(method: dict[str, Any], axis: Axis) -> tuple[list[float], list[float]]:
    """Values of the setting in order, with the best score (%) at each."""
    best: dict[float, float] = {}
    for tried in method["tried"]:
        x = tried["setting"][axis.setting]
        best[x] = max(best.get(x, 0.0), 100 * tried["validation_score"])
    return sorted(best), [best[x] for x in sorted(best)]


def modality_figure(
    modality_c: NDArray[np.float32], energy_c: NDArray[np.float32], when: str = ""
) -> Drawn:
    """Histogram of the concepts' modality scores, weighted by energy (the paper's figure 2); the
    title says `when`."""
    share_c = energy_c / max(float(energy_c.sum()), 1e-30)
    text, image = (float(share_c[side].sum()) for side in (modality_c > 0.5, modality_c < 0.5))
    figure = histogram(
        modality_c.tolist(),
        (100 * share_c).tolist(),
        "modality score (0 image, 1 text)",
        "share of energy (%)",
        size=SMALL,
    )
    caption = (
        f"Concepts that fire more on texts hold {100 * text:.0f}% of the energy, those that fire "
        f"more on pictures {100 * image:.0f}%."
    )
    return _drawn(f"Modality of the concepts{when}", caption, figure)


def energy_figure(energy_c: NDArray[np.float32], when: str = "") -> Drawn:
    """Share of all energy in the n strongest concepts (the paper's figure 3); the title says
    `when`."""
    share_c = concentration(torch.tensor(energy_c)).numpy()
    needed = concepts_for(torch.tensor(energy_c), 0.99)
    ns = np.unique(np.geomspace(1, len(share_c), 40).astype(int))
    figure = lines(
        [Series("energy", ns.tolist(), (100 * share_c[ns - 1]).tolist())],
        "strongest concepts",
        "share of energy (%)",
        x_scale="log",
        level=("99%", 99.0),
        size=SMALL,
    )
    caption = (
        f"{needed:,} of {len(share_c):,} concepts ({100 * needed / len(share_c):.1f}%) hold 99% "
        "of the energy."
    )
    return _drawn(f"Concentration of energy{when}", caption, figure)


def training_figures(adapter: Path) -> list[Drawn]:
    """An adapter's training over its steps, from `training.json` in its folder: validation and
    shares of energy. None where there was no training."""
    if not (adapter / "training.json").is_file():
        return []
    looks = json.loads((adapter / "training.json").read_text())["looks"]
    steps = [look["step"] for look in looks]

    def series(name: str, key: str) -> Series:
        return Series(name, steps, [100 * look[key] for look in looks])

    seen = [series("score", "validation_score"), series("R@1", "validation_r1")]
    figures = [
        _drawn(
            "Validation while the adapter trains",
            "The weights of the step with the best score are kept.",
            lines(seen, "steps", "on validation (%)", size=SMALL),
        )
    ]
    if any(look["up_share"] for look in looks):
        shares = [
            series("visual and discriminative", "up_share"),
            series("text-dominant and distractors", "down_share"),
        ]
        caption = "By the frozen SAE's codes of the training items, before the patch."
        drawn = lines(shares, "steps", "share of energy (%)", size=SMALL)
        figures.append(_drawn("Energy while the adapter trains", caption, drawn))
    return figures


def _drawn(title: str, caption: str, figure: Figure) -> Drawn:
    name = "".join(letter if letter.isalnum() else "-" for letter in title.lower())
    return Drawn(title, caption, to_svg(figure, name))
