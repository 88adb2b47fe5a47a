"""Table 2, Figure 6 and Table 8: subspaces removed and spaces whitened, on the build's readout."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from patch_retriever.analysis import stand_ins
from patch_retriever.analysis.exhibit import Exhibit, Row, line
from patch_retriever.analysis.finished import Finished
from patch_retriever.patch import fit
from patch_retriever.patch.artefact import Patch
from patch_retriever.progress import Progress
from patch_retriever.report import plots
from patch_retriever.retrieval.evaluate import Outcome

PAPER_BETA = 0.1
BETAS = tuple(i / 10 for i in range(11))
DRAWS = 3
"""Of every random control."""


def removal_table(build: Finished, progress: Progress) -> Exhibit:
    """Table 2: the span of the strongest concepts by attribution removed, beside its controls."""
    c = build.calibration
    n = max(1, c.sae.n_concepts // 100)
    n = min(n, c.sae.d_in - 1)
    top_m = c.concepts.attribution.argsort(descending=True, stable=True)[:n]
    seeds = [c.seed * 1000 + draw for draw in range(DRAWS)]
    random_directions = [
        torch.randn(n, c.sae.d_in, generator=torch.Generator().manual_seed(seed)) for seed in seeds
    ]
    of_energy = [
        c.sae.W_dec_cd[stand_ins.matched_in_energy(c.concepts.energy, top_m, seed)]
        for seed in seeds
    ]
    methods = {
        "no patch": [build.patch()],
        f"span of the {n} concepts of highest attribution removed": [
            build.patch(fit.remove_subspace(c.sae.W_dec_cd[top_m]))
        ],
        f"random subspace of rank {n} removed": [
            build.patch(fit.remove_subspace(v)) for v in random_directions
        ],
        f"span of {n} random concepts of that energy removed": [
            build.patch(fit.remove_subspace(v)) for v in of_energy
        ],
        **_whitened(build, progress, pca=False),
    }
    return _table(build, methods)


def whitening_table(build: Finished, progress: Progress) -> Exhibit:
    """Table 8: PCA, ZCA and ReAlign."""
    methods = {"no patch": [build.patch()], **_whitened(build, progress, pca=True)}
    return _table(build, methods)


def _whitened(build: Finished, progress: Progress, pca: bool) -> dict[str, list[Patch]]:
    """Centring and ReAlign per side, between them the other whitenings if `pca`."""
    c = build.calibration
    x_nd, groups = c.features.pooled_nd, c.groups("role")
    on_validation = {
        beta: build.on_validation([build.patch(fit.realign(x_nd, groups, "role", beta))]).score
        for beta in progress(BETAS[1:-1], len(BETAS) - 2)
    }
    best = max(on_validation, key=lambda beta: on_validation[beta])
    found = {"centring, per side": fit.centre(x_nd, groups, "role")}
    if pca:
        everyone = c.groups("all")
        name = "PCA whitening, all items together"
        found[name] = stand_ins.pca_whitening(x_nd, everyone, "all")
        found["PCA whitening, per side"] = stand_ins.pca_whitening(x_nd, groups, "role")
        found["ZCA whitening, per side"] = fit.realign(x_nd, groups, "role", 0.0)
    for how, beta in (("the paper's", PAPER_BETA), ("chosen on validation", best)):
        name = f"ReAlign, per side, beta {beta:g} ({how})"
        found[name] = fit.realign(x_nd, groups, "role", beta)
    return {name: [build.patch(fitted)] for name, fitted in found.items()}


def _table(build: Finished, methods: dict[str, list[Patch]]) -> Exhibit:
    """A row for each method and task."""
    yard = build.yardstick
    rows: list[Row] = []
    summary: list[Row] = []
    for name, patches in methods.items():
        outcome = build.on_test(patches)
        rows += yard.rows({"method": name, "draws": len(patches)}, outcome)
        summary.append(yard.summary({"method": name}, outcome))
    return Exhibit(rows, summary)


def beta_figure(build: Finished, progress: Progress) -> Exhibit:
    """Fig. 6: ReAlign over beta."""
    c, yard = build.calibration, build.yardstick
    x_nd, groups = c.features.pooled_nd, c.groups("role")
    rows: list[Row] = []
    summary: list[Row] = []
    outcomes = []
    for beta in progress(BETAS, len(BETAS)):
        patches = [build.patch(fit.realign(x_nd, groups, "role", beta))]
        on_validation = build.on_validation(patches).score
        outcomes.append(build.on_test(patches))
        rows += yard.rows({"beta": beta, "validation_score": on_validation}, outcomes[-1])
        labels = {"beta": f"{beta:g}", "score on validation": f"{100 * on_validation:.1f}"}
        summary.append(yard.summary(labels, outcomes[-1]))
    base = [yard.band(yard.base)] * len(BETAS)
    figure = plots.lines(
        [
            line("score, mean over tasks", BETAS, [yard.band(o) for o in outcomes]),
            *_by_direction(build, outcomes),
            line("score without a patch", BETAS, base, control=True),
        ],
        "beta (0 ZCA, 1 centring)",
        "score or R@1 on test, %",
    )
    return Exhibit(rows, summary, {"": figure})


def _by_direction(build: Finished, outcomes: Sequence[Outcome]) -> list[plots.Series]:
    """R@1 of image to text, as in the paper's figure, and of text to image."""
    found = []
    for direction in ("i->t", "t->i"):
        tasks = [t.name for t in build.yardstick.collection.tasks if t.direction == direction][:1]
        if tasks:
            bands = [build.yardstick.band(o, 0, tasks) for o in outcomes]
            found.append(line(f"R@1, {tasks[0]}", BETAS, bands))
    return found
