"""The removal curve: recall against the number of concepts subtracted, beside random ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from patch_retriever.analysis.concepts import log_steps
from patch_retriever.analysis.exhibit import Exhibit, Row, line, mean_outcome
from patch_retriever.analysis.finished import Finished
from patch_retriever.concepts.selection import TEXT_DOMINANT, random_outside, unimodal
from patch_retriever.features import Features
from patch_retriever.patch import fit
from patch_retriever.patch.artefact import Patch
from patch_retriever.patch.calibration import Calibration
from patch_retriever.progress import Progress
from patch_retriever.report import plots
from patch_retriever.retrieval.evaluate import Outcome, evaluate
from patch_retriever.sae.model import SparseAutoencoder

DRAWS = 3
"""Of the random concepts beside every selection."""
THEN = ("nothing", "centring")


@dataclass(frozen=True)
class Curve:
    """Outcomes of a split after each of `steps` removals, by what follows (`THEN`)."""

    steps: Sequence[int]
    outcomes: dict[str, list[Outcome]]


def removal_curve(build: Finished, progress: Progress) -> Exhibit:
    """Concepts subtracted in the order of each selection, and of random concepts like them."""
    c = build.calibration
    found = selections(c)
    chosen = {name: ranking_m for name, ranking_m in found.items() if len(ranking_m)}
    works = [
        (name, kind, split, removals)
        for name, ranking_m in chosen.items()
        for kind, split, removals in (
            ("selected", "test", first_of(ranking_m)),
            ("selected", "validation", first_of(ranking_m)),
            *(("random", "test", others) for others in random_like(c, first_of(ranking_m))),
        )
    ]
    curves: dict[tuple[str, str, str], list[Curve]] = {}
    for name, kind, split, removals in progress(works, len(works)):
        curve = curve_of(build, removals, split)
        curves.setdefault((name, kind, split), []).append(curve)
    means = {key: _mean(draws) for key, draws in curves.items()}
    return _exhibit(build, list(chosen), means, [name for name in found if name not in chosen])


def selections(c: Calibration) -> dict[str, Tensor]:
    """Concepts in the order in which each selection removes them; some select only a part."""
    scores = c.concepts

    def by(score_c: Tensor, of_c: Tensor | None = None) -> Tensor:
        order = score_c.argsort(descending=True, stable=True)
        return order if of_c is None else order[of_c[order]]

    text_c = (scores.modality > TEXT_DOMINANT) & (scores.energy > 0)
    return {
        "attribution": by(scores.attribution),
        "discriminative attribution, raw": by(-scores.discriminative),
        "discriminative attribution, centred": by(-scores.discriminative_centred),
        "text-dominant": by(scores.energy, text_c),
        "unimodal": by(scores.energy, unimodal(scores.modality)),
    }


def first_of(ranking_m: Tensor) -> list[Tensor]:
    """The first 1, 2, 4, ... concepts of a ranking."""
    return [ranking_m[:n] for n in log_steps(len(ranking_m))]


def random_like(c: Calibration, removals: Sequence[Tensor]) -> list[list[Tensor]]:
    """Draws of as many random concepts as in each of `removals`, of the same energy; none of them
    is there, too, unless too few others fire."""
    energy_c = c.concepts.energy

    def others(removed_m: Tensor, draw: int) -> Tensor:
        removed_c = torch.zeros(len(energy_c)).index_fill(0, removed_m, 1.0)
        return random_outside(removed_c, energy_c, c.seed * 1000 + draw).strength_c.nonzero()[:, 0]

    return [[others(removed_m, draw) for removed_m in removals] for draw in range(DRAWS)]


def without(
    features: Features, sae: SparseAutoencoder, removals: Sequence[Tensor]
) -> Iterator[Features]:
    """The features without the concepts in each of `removals`."""
    for removed_m in removals:
        removed_c = torch.zeros(sae.n_concepts, dtype=torch.bool).index_fill(0, removed_m, True)
        codes = features.codes.kept(removed_c[features.codes.concepts_e])
        removed_nd = codes.matmul(sae.W_dec_cd)  # of vectors of two parts, the first
        after_nd = pad(removed_nd, (0, features.pooled_nd.shape[1] - sae.d_in))
        yield replace(features, pooled_nd=features.pooled_nd - after_nd)


def curve_of(build: Finished, removals: Sequence[Tensor], split: str) -> Curve:
    """Outcomes on a split after each of some removals of concepts, with nothing after them and
    with centring (as finely as can be exported)."""
    c, by = build.calibration, build.calibration.sides[-1]
    held_out, collection = (
        build.test if split == "test" else build.validation,
        build.data.splits[split],
    )
    outcomes: dict[str, list[Outcome]] = {then: [] for then in THEN}
    calibration = without(c.features, c.sae, removals)
    judged = without(held_out, c.sae, removals)
    for fitted_on, judged_on in zip(calibration, judged, strict=True):
        centre = fit.centre(fit.Statistics(fitted_on.pooled_nd, c.groups(by), by, c.device))
        for then, maps in zip(THEN, ((), (centre,)), strict=True):
            patch = Patch(c.site, None, maps, c.gate)
            outcomes[then].append(evaluate([patch], judged_on, collection))
    return Curve([len(removed_m) for removed_m in removals], outcomes)


def _mean(draws: Sequence[Curve]) -> Curve:
    outcomes = {
        then: [mean_outcome(at) for at in zip(*(d.outcomes[then] for d in draws), strict=True)]
        for then in THEN
    }
    return Curve(draws[0].steps, outcomes)


def _exhibit(
    build: Finished,
    names: Sequence[str],
    curves: dict[tuple[str, str, str], Curve],
    empty: Sequence[str],
) -> Exhibit:
    yard = build.yardstick
    nothing = {"selection": "none", "concepts": "none", "then": "nothing", "removed": 0}
    rows: list[Row] = yard.rows(nothing, yard.base)
    summary: list[Row] = []
    figures = {}
    for then in THEN:
        series = []
        for name in names:
            for kind in ("selected", "random"):
                curve = curves[name, kind, "test"]
                outcomes = curve.outcomes[then]
                for n, outcome in zip(curve.steps, outcomes, strict=True):
                    labels = {"selection": name, "concepts": kind, "then": then, "removed": n}
                    rows += yard.rows(labels, outcome)
                bands = [yard.band(outcome) for outcome in outcomes]
                label = name if kind == "selected" else f"random like {name}"
                like = "" if kind == "selected" else name
                series.append(line(label, curve.steps, bands, like=like))
            on_validation = curves[name, "selected", "validation"].outcomes[then]
            best = max(range(len(on_validation)), key=lambda i: on_validation[i].score)
            for kind in ("selected", "random"):
                curve = curves[name, kind, "test"]
                concepts = name if kind == "selected" else "random, of the same energy"
                labels = {"concepts": concepts, "removed": curve.steps[best], "then": then}
                summary.append(yard.summary(labels, curve.outcomes[then][best]))
        longest = max(curve.steps[-1] for curve in curves.values())
        series.append(line("no patch", [1, longest], [yard.band(yard.base)] * 2, control=True))
        title = f"then {then}; dashed: random concepts of the same energy"
        figures["" if then == "nothing" else f"-{then}"] = plots.lines(
            series, "concepts removed", "score on test, %", title, x_scale="log"
        )
    note = (
        "In the table: as many concepts as validation chooses for each selection. Random concepts "
        "are other ones than the selected, while enough others fire."
    )
    if empty:
        note += f" Nothing to remove by: {', '.join(empty)} (no concept is so)."
    return Exhibit(rows, summary, figures, note)
