"""The pairs curve: recall against the number of pairs that a method is fitted on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from patch_retriever.analysis.exhibit import Exhibit, Row, Yardstick, line, mean_outcome
from patch_retriever.analysis.finished import Finished
from patch_retriever.patch import fit
from patch_retriever.patch.artefact import Patch
from patch_retriever.patch.calibration import Calibration
from patch_retriever.patch.gains import CentredCodes, Components, GainSettings, learn_gains
from patch_retriever.patch.operators import Affine, Subtract
from patch_retriever.progress import Progress
from patch_retriever.report import plots
from patch_retriever.retrieval.collection import Collection, Task
from patch_retriever.retrieval.evaluate import Outcome, evaluate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DRAWS = 3
"""Of the pairs, where not all are taken."""
STRENGTHS = (0.1, 0.3, 0.5, 0.8)
RIDGE_STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0)


@dataclass(frozen=True)
class Style:
    """What a method may learn from besides pairs: all images, and the texts of one caption style.

    `kinds_n` are the kinds of calibration's items; texts of other styles are of none (-1). The
    mean of all texts would leave each style an offset that costs more than the pairs bring.
    """

    c: Calibration
    kinds_n: Tensor

    @classmethod
    def of(cls, c: Calibration, task: Task) -> Style:
        """The style in which a task asks for images."""
        mine_n = torch.zeros(len(c.kinds_n), dtype=torch.bool)
        mine_n[list(task.queries)] = True
        return cls(c, torch.where((c.kinds_n == 0) & ~mine_n, -1, c.kinds_n.long()))

    @cached_property
    def groups(self) -> list[Tensor]:
        """The items of each kind."""
        return [(self.kinds_n == kind).nonzero()[:, 0] for kind in range(3)]

    @cached_property
    def statistics(self) -> fit.Statistics:
        """Of the vectors of each kind."""
        return fit.Statistics(self.c.features.pooled_nd, self.groups, "modality", self.c.device)

    @cached_property
    def centred_nd(self) -> Tensor:
        """Pooled vectors less the mean of their kind."""
        x_nd = self.c.features.pooled_nd.clone()
        for rows in self.groups:
            x_nd[rows] -= x_nd[rows].mean(0)
        return x_nd

    @cached_property
    def centred_codes(self) -> CentredCodes:
        """Pooled codes less the mean of their kind, times the dictionary."""
        width = self.c.features.pooled_nd.shape[1]
        return CentredCodes.of(self.c.features.codes, self.kinds_n, self.c.sae.W_dec_cd, width)

    @cached_property
    def components(self) -> Tensor:
        """Principal components (d, d), in columns, within kinds."""
        seen_m = (self.kinds_n >= 0).nonzero()[:, 0]
        return fit.Moments(self.centred_nd, seen_m, self.c.device).spectrum[1]

    def pairs(self, pairs_n2: Tensor, x_nd: Tensor | None = None) -> fit.PairStatistics:
        """Of some pairs of texts and images, at the readout or in other vectors."""
        x_nd = self.c.features.pooled_nd if x_nd is None else x_nd
        return fit.PairStatistics(x_nd, self.kinds_n, {0: pairs_n2}, self.c.device)


def pairs_curve(build: Finished, progress: Progress) -> Exhibit:
    """Gains, Procrustes, CCA and a linear map over the number of pairs."""
    c = build.calibration
    fitted_task = next(
        (t for t in build.data.splits["calibration"].tasks if t.direction == "t->i"), None
    )
    if fitted_task is None:
        return Exhibit([], note="Left out: these data have no task from texts to images.")
    style, pairs_n2 = Style.of(c, fitted_task), pairs_of(fitted_task)
    works = [
        (n, draw) for n in numbers(len(pairs_n2)) for draw in range(draws_of(n, len(pairs_n2)))
    ]
    validation = _only(build.data.splits["validation"], fitted_task.name)
    found: dict[tuple[str, int], list[Outcome]] = {}
    for n, draw in progress(works, len(works)):
        some_n2 = drawn(pairs_n2, n, c.seed * 1000 + draw)
        for name, candidates in METHODS.items():
            patches = list(candidates(style, some_n2))
            scores = [0.0]
            if len(patches) > 1:
                scores = [evaluate([p], build.validation, validation).score for p in patches]
            best = patches[scores.index(max(scores))]
            found.setdefault((name, n), []).append(build.on_test([best]))
    return _exhibit(build, style, fitted_task.name, found, numbers(len(pairs_n2)))


def numbers(total: int) -> list[int]:
    """25, 50, 100, ... well below `total`, and `total`."""
    return [*(25 * 2**i for i in range(total.bit_length()) if 25 * 2**i < 0.8 * total), total]


def draws_of(n: int, total: int) -> int:
    """Several draws of a part, one of all."""
    return 1 if n == total else DRAWS


def drawn(pairs_n2: Tensor, n: int, seed: int) -> Tensor:
    """n random pairs; of one seed, fewer are always among more."""
    order = torch.randperm(len(pairs_n2), generator=torch.Generator().manual_seed(seed))
    return pairs_n2[order[:n]]


def pairs_of(task: Task) -> Tensor:
    """(query, relevant document) items of a task, (n, 2): all, where a text fits several."""
    return torch.tensor(
        [
            (query, task.documents[place])
            for query, relevant in zip(task.queries, task.relevant, strict=True)
            for place in relevant
        ]
    )


def _only(collection: Collection, task: str) -> Collection:
    return replace(collection, tasks=tuple(t for t in collection.tasks if t.name == task))


def _centre(style: Style, subtract: Subtract | None = None) -> Patch:
    x_nd = style.c.vectors(subtract).x_nd
    centre = fit.centre(fit.Statistics(x_nd, style.groups, "modality", style.c.device))
    return Patch(style.c.site, subtract, (centre,), style.c.gate)


def _mapped(style: Style, *maps: Affine) -> Patch:
    return Patch(style.c.site, None, maps, style.c.gate)


def _gains(style: Style, pairs_n2: Tensor) -> Iterator[Patch]:
    c = style.c
    gains_c = learn_gains(
        style.centred_nd, style.centred_codes, [pairs_n2], GainSettings(), c.seed, c.device
    )
    fires_c = c.features.codes.sum() > 0
    yield _centre(style, Subtract.from_sae(c.sae, torch.where(fires_c, 1 - gains_c, 0.0)))


def _principal_gains(style: Style, pairs_n2: Tensor) -> Iterator[Patch]:
    c, vectors_dd = style.c, style.components
    parts = Components.of(style.centred_nd, vectors_dd)
    gains_d = learn_gains(style.centred_nd, parts, [pairs_n2], GainSettings(), c.seed, c.device)
    gains = fit.principal_gains(gains_d.to(vectors_dd), vectors_dd)
    yield _mapped(style, *_centre(style).maps, gains)


def _procrustes(style: Style, pairs_n2: Tensor) -> Iterator[Patch]:
    for beta in STRENGTHS:
        whiten = fit.realign(style.statistics, beta)
        pairs = style.pairs(pairs_n2, style.c.vectors().after(whiten).x_nd)
        yield _mapped(style, whiten, fit.procrustes(pairs))


def _cca(style: Style, pairs_n2: Tensor) -> Iterator[Patch]:
    pairs = style.pairs(pairs_n2)
    r = min(pairs.x_nd.shape[1], 128)
    for shrinkage in STRENGTHS:
        yield _mapped(style, fit.cca(pairs, shrinkage, r))


def _ridge(style: Style, pairs_n2: Tensor) -> Iterator[Patch]:
    pairs = style.pairs(pairs_n2)
    for strength in RIDGE_STRENGTHS:
        yield _mapped(style, fit.ridge(pairs, strength))


METHODS: dict[str, Callable[[Style, Tensor], Iterator[Patch]]] = {
    "learned gains": _gains,
    "gains on principal components": _principal_gains,
    "ReAlign, then Procrustes": _procrustes,
    "CCA": _cca,
    "linear map (ridge)": _ridge,
}
"""Each gives its patches, one per strength; validation chooses among them."""


def _exhibit(
    build: Finished,
    style: Style,
    fitted: str,
    found: dict[tuple[str, int], list[Outcome]],
    ns: Sequence[int],
) -> Exhibit:
    yard = build.yardstick
    centred = build.on_test([_centre(style)])
    rows = yard.rows(_labels("no patch", fitted, 0, [yard.base]), yard.base)
    rows += yard.rows(_labels("centring, per modality", fitted, 0, [centred]), centred)
    summary = [
        yard.summary({"method": "no patch", "pairs": 0}, yard.base),
        yard.summary({"method": "centring, per modality", "pairs": 0}, centred),
    ]
    means: dict[str, list[Outcome]] = {}
    for (name, n), draws in found.items():
        mean = mean_outcome(draws)
        means.setdefault(name, []).append(mean)
        rows += yard.rows(_labels(name, fitted, n, draws), mean)
        if n in (ns[0], ns[-1]):
            summary.append(yard.summary({"method": name, "pairs": n}, mean))
    others = [t.name for t in yard.collection.tasks if t.direction == "t->i" and t.name != fitted]
    plot = partial(_figure, yard, means, centred, ns)
    figures = {"": plot([fitted], f"fitted and tested on {fitted}")}
    note = "These data have one caption style only, so nothing is said about others."
    if others:
        figures["-others"] = plot(others, f"fitted on {fitted}, tested on {', '.join(others)}")
        note = f"Fitted on {fitted}; the CSV has every other task, too."
    return Exhibit(rows, summary, figures, note)


def _labels(method: str, fitted: str, n: int, draws: Sequence[Outcome]) -> Row:
    scores = [draw.score for draw in draws]
    return {
        "method": method,
        "fitted_on": fitted,
        "pairs": n,
        "draws": len(draws),
        "average_score_lowest_draw": min(scores),
        "average_score_highest_draw": max(scores),
    }


def _figure(
    yard: Yardstick,
    means: dict[str, list[Outcome]],
    centred: Outcome,
    ns: Sequence[int],
    tasks: Sequence[str],
    title: str,
) -> Figure:
    def curve(name: str, outcomes: Sequence[Outcome], control: bool = False) -> plots.Series:
        return line(name, ns, [yard.band(o, 0, tasks) for o in outcomes], control=control)

    series = [curve(name, outcomes) for name, outcomes in means.items()]
    series.append(curve("centring, per modality", [centred] * len(ns), control=True))
    return plots.lines(series, "pairs", "R@1 on test, %", title, x_scale="log")
