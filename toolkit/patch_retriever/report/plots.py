"""Plots by matplotlib, as SVG that follows a page's colours, light or dark, without network."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from patch_retriever.files import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#123456"
"""Drawn with this colour, an element takes the page's text colour (`currentColor`)."""

SIZE = (7.0, 4.2)
"""Inches; a page shrinks a figure to the room that it has, its letters too."""

SCALES = Literal["linear", "log", "symlog"]


@dataclass(frozen=True)
class Series:
    """A named line: values of y at x, with a band from `low` to `high` where there is one."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    control: bool = False
    """Drawn dashed and grey: what the others have to beat."""
    like: str = ""
    """The name of an earlier line that this one is the counterpart of: drawn dashed in its colour,
    without a band or a place in the legend."""


def lines(
    series: Sequence[Series],
    x: str,
    y: str,
    title: str = "",
    x_scale: SCALES = "linear",
    y_range: tuple[float, float] | None = None,
    level: tuple[str, float] | None = None,
    size: tuple[float, float] = SIZE,
) -> Figure:
    """Lines over a common axis, with their bands; `level` is a named dotted line across."""
    figure, axes = _figure(x, y, title, size)
    axes.set_xscale(x_scale)
    if x_scale == "log":
        _plain_ticks(axes, {x for one in series for x in one.x})
    colours: dict[str, Any] = {}
    for one in series:
        style: dict[str, Any] = {"marker": "o", "markersize": 3, "label": one.name}
        if one.control:
            style |= {"color": "#888888", "linestyle": "--"}
        elif one.like:
            dashed = {"color": colours[one.like], "linestyle": "--", "marker": ""}
            style |= dashed | {"label": "_"}
        (drawn,) = axes.plot(one.x, one.y, **style)
        colours[one.name] = drawn.get_color()
        if one.low is not None and one.high is not None and not one.like:
            axes.fill_between(one.x, one.low, one.high, color=drawn.get_color(), alpha=0.15, lw=0)
    if level is not None:
        axes.axhline(level[1], color=INK, linestyle=":", linewidth=1, label=level[0])
    if y_range is not None:
        axes.set_ylim(y_range)
    _legend(axes, len(series) + (level is not None))
    return figure


@dataclass(frozen=True)
class Interval:
    """A mean with the bounds of its interval."""

    mean: float
    low: float
    high: float


def intervals(
    names: Sequence[str],
    groups: Sequence[tuple[str, Sequence[Interval]]],
    x: str,
    size: tuple[float, float] = SIZE,
) -> Figure:
    """A line for each name, top to bottom, with an interval on it for each named group; zero is
    dotted."""
    figure, axes = _figure(x, "", "", size)
    step = 0.7 / len(groups)
    for i, (group, found) in enumerate(groups):
        heights = [place + (i - (len(groups) - 1) / 2) * step for place in range(len(names))]
        means = [one.mean for one in found]
        reach = [[m - one.low for m, one in zip(means, found, strict=True)],
                 [one.high - m for m, one in zip(means, found, strict=True)]]  # fmt: skip
        axes.errorbar(means, heights, xerr=reach, fmt="o", markersize=3, capsize=2, label=group)
    axes.axvline(0, color=INK, linestyle=":", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    if len(groups) > 1:
        figure.legend(loc="outside lower center", fontsize=8, frameon=False, labelcolor=INK)
    return figure


def bars(
    names: Sequence[str], groups: dict[str, Sequence[float]], y: str, title: str = ""
) -> Figure:
    """A cluster of bars for each name, a bar in it for each group."""
    figure, axes = _figure("", y, title)
    width = 0.8 / len(groups)
    for i, (group, values) in enumerate(groups.items()):
        places = [place + (i - (len(groups) - 1) / 2) * width for place in range(len(names))]
        axes.bar(places, values, width, label=group)
    axes.set_xticks(range(len(names)), names, rotation=30 if len(names) > 4 else 0, ha="right")
    _legend(axes, len(groups))
    return figure


def histogram(
    values: Sequence[float],
    weights: Sequence[float],
    x: str,
    y: str,
    title: str = "",
    bins: int = 40,
    size: tuple[float, float] = SIZE,
) -> Figure:
    """A weighted histogram over [0, 1]."""
    figure, axes = _figure(x, y, title, size)
    axes.hist(values, bins=bins, range=(0, 1), weights=weights)
    return figure


def to_svg(figure: Figure, name: str = "") -> str:
    """The figure as an SVG element for a page: as wide as its place, in the page's text colour.

    The same figure gives the same text. Figures that share a page need a `name` each, so that
    their ids differ.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "patch-retriever", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    if name:
        text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 width="100%"', text, count=1).replace(
        ' height="', ' data-height="', 1
    )


def save(figure: Figure, path: Path) -> None:
    """Write an SVG file of its own, dark ink on white."""
    text = to_svg(figure).replace("currentColor", "#222222").replace("<svg", _ROOT, 1)
    write_text(path, text)


_ROOT = '<?xml version="1.0" encoding="utf-8"?>\n<svg style="background:white"'


def _figure(x: str, y: str, title: str, size: tuple[float, float] = SIZE) -> tuple[Figure, Axes]:
    """An empty figure, made without pyplot: no global state, no display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(alpha=0.25)
    for spine in axes.spines.values():
        spine.set_color(INK)
    axes.tick_params(colors=INK)
    for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
        label.set_color(INK)
    return figure, axes


def _plain_ticks(axes: Axes, values: set[float]) -> None:
    """Plain numbers on a logarithmic axis: at the values themselves if they are few."""
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    if len(values) <= 8:
        axes.set_xticks(sorted(values))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _legend(axes: Axes, n: int) -> None:
    """A legend where there is something to tell apart."""
    if n > 1:
        axes.legend(fontsize=8, frameon=False, labelcolor=INK)
