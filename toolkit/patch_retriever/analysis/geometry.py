"""Table 2, Figure 6 and Table 8: subspaces removed and spaces whitened, on the build's readout."""

from __future__ import annotations

from collections.abc import Callable

import torch

from patch_retriever.analysis.exhibit import Exhibit, Row, line
from patch_retriever.analysis.finished import Finished
from patch_retriever.concepts.selection import random_outside
from patch_retriever.patch import fit
from patch_retriever.patch.operators import Affine
from patch_retriever.progress import Progress
from patch_retriever.report import plots
from patch_retriever.retrieval.evaluate import Outcome
from patch_retriever.retrieval.metrics import hits, ranks

PAPER_BETA = 0.1
BETAS = tuple(i / 10 for i in range(11))
DRAWS = 3
"""Of every random control."""
BY_TASK, BY_MODALITY = "per side, task by task", "per modality"
"""Whose statistics: the queries' and the documents' of a task as in the paper, which no exported
model can know; or those of all texts, all images, all items with both."""

Fit = Callable[[fit.Statistics], Affine]
"""Fits a map on vectors of groups of items."""


def _realign(beta: float) -> Fit:
    return lambda statistics: fit.realign(statistics, beta)


def _pca(statistics: fit.Statistics) -> Affine:
    return fit.pca_whiten(statistics, statistics.x_nd.shape[1])


def fitted(build: Finished, fit_map: Fit, by: str, split: str) -> Outcome:
    """The outcome on a split of a map that is fitted on calibration, with the statistics `by`."""
    if by == BY_MODALITY:
        patch = build.patch(fit_map(build.calibration.vectors().statistics("modality")))
        return build.on_test([patch]) if split == "test" else build.on_validation([patch])
    judged_nd = (build.test if split == "test" else build.validation).pooled_nd
    found = {}
    for statistics, task in zip(build.task_statistics, build.data.splits[split].tasks, strict=True):
        step = fit_map(statistics)
        queries_qd, documents_nd = (
            torch.nn.functional.normalize(
                judged_nd[list(items)] @ step.weight_gde[role] + step.bias_ge[role], dim=1
            ).numpy()
            for role, items in enumerate((task.queries, task.documents))
        )
        found[task.name] = hits(ranks(queries_qd, documents_nd, task.relevant))
    return Outcome(found)


def removal_table(build: Finished, progress: Progress) -> Exhibit:
    """Table 2: the span of the strongest concepts by attribution removed, beside its controls."""
    c = build.calibration
    n = min(max(1, c.sae.n_concepts // 100), c.sae.d_in - 1)
    top_m = c.concepts.attribution.argsort(descending=True, stable=True)[:n]
    seeds = [c.seed * 1000 + draw for draw in range(DRAWS)]
    top = [c.dictionary_cw[top_m]]
    width = c.features.pooled_nd.shape[1]
    random_directions = [
        torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) for seed in seeds
    ]
    top_c = torch.zeros(c.sae.n_concepts).index_fill(0, top_m, 1.0)
    others = [random_outside(top_c, c.concepts.energy, seed).strength_c > 0 for seed in seeds]
    of_energy = [c.dictionary_cw[other_c] for other_c in others]
    outcomes = {
        name: build.on_test([build.patch(fit.remove_subspace(v)) for v in directions])
        for name, directions in (
            (f"span of the {n} concepts of highest attribution removed", top),
            (f"random subspace of rank {n} removed", random_directions),
            (f"span of {n} other concepts of that energy, at random, removed", of_energy),
        )
    }
    return _table(build, outcomes | _whitened(build, {}, progress))


def whitening_table(build: Finished, progress: Progress) -> Exhibit:
    """Table 8: PCA, ZCA and ReAlign."""
    together = build.patch(_pca(build.calibration.vectors().statistics("all")))
    outcomes = {"PCA whitening, all items together": build.on_test([together])}
    others: dict[str, Fit] = {
        "PCA whitening": _pca,
        "ZCA whitening": fit.zca_whiten,
    }
    return _table(build, outcomes | _whitened(build, others, progress))


def _whitened(build: Finished, others: dict[str, Fit], progress: Progress) -> dict[str, Outcome]:
    """Centring, `others` and ReAlign on test: at the paper's beta, and at the one that validation
    chooses."""
    found: dict[str, Outcome] = {}
    for by in (BY_TASK, BY_MODALITY):
        on_validation = {
            beta: fitted(build, _realign(beta), by, "validation").score
            for beta in progress(BETAS[1:-1], len(BETAS) - 2)
        }
        best = max(on_validation, key=lambda beta: on_validation[beta])
        fits: dict[str, Fit] = {
            f"centring, {by}": fit.centre,
            **{f"{name}, {by}": fit_map for name, fit_map in others.items()},
            f"ReAlign, {by}, beta {PAPER_BETA:g} (the paper's)": _realign(PAPER_BETA),
            f"ReAlign, {by}, beta {best:g} (chosen on validation)": _realign(best),
        }
        found |= {name: fitted(build, fit_map, by, "test") for name, fit_map in fits.items()}
    return found


def _table(build: Finished, outcomes: dict[str, Outcome]) -> Exhibit:
    """A row for each method and task."""
    yard = build.yardstick
    rows: list[Row] = []
    summary: list[Row] = []
    for name, outcome in {"no patch": yard.base, **outcomes}.items():
        rows += yard.rows({"method": name}, outcome)
        summary.append(yard.summary({"method": name}, outcome))
    return Exhibit(rows, summary)


def beta_figure(build: Finished, progress: Progress) -> Exhibit:
    """Fig. 6: ReAlign over beta."""
    yard = build.yardstick
    rows: list[Row] = []
    summary: list[Row] = []
    series = []
    tasks = [t.name for t in yard.collection.tasks if t.direction == "i->t"][:1]
    for by in (BY_TASK, BY_MODALITY):
        outcomes = []
        for beta in progress(BETAS, len(BETAS)):
            on_validation = fitted(build, _realign(beta), by, "validation").score
            outcomes.append(fitted(build, _realign(beta), by, "test"))
            labels = {"statistics": by, "beta": beta, "validation_score": on_validation}
            rows += yard.rows(labels, outcomes[-1])
            validation = f"{100 * on_validation:.1f}"
            said = {"statistics": by, "beta": f"{beta:g}", "score on validation": validation}
            summary.append(yard.summary(said, outcomes[-1]))
        series.append(line(by, BETAS, [yard.band(o) for o in outcomes]))
        if tasks:
            bands = [yard.band(o, 0, tasks) for o in outcomes]
            series.append(line(f"{tasks[0]}, {by}", BETAS, bands, like=by))
    base = [yard.band(yard.base)] * len(BETAS)
    series.append(line("no patch", BETAS, base, control=True))
    title = f"solid: score; dashed: R@1 of {tasks[0]}" if tasks else ""
    figure = plots.lines(series, "beta (0 ZCA, 1 centring)", "on test, %", title)
    return Exhibit(rows, summary, {"": figure})
