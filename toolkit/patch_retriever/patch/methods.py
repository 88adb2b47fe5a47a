"""The methods of the table: each makes patches from calibration data, for every setting it has.

Methods are grouped by what they need: nothing, unpaired items, or pairs. Controls (random
concepts, random subspaces) stand beside what they control for; they are never chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from patch_retriever.concepts.scores import TEXT_DOMINANT
from patch_retriever.patch import fit
from patch_retriever.patch.artefact import Patch
from patch_retriever.patch.calibration import Calibration
from patch_retriever.patch.gains import GainSettings, learn_gains
from patch_retriever.patch.operators import Affine, By, Subtract

Needs = Literal["nothing", "unpaired items", "pairs"]
Setting = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """One row of the table: patches for a setting; validation picks the setting."""

    name: str
    needs: Needs
    make: Callable[..., list[Patch]]
    grid: tuple[Setting, ...] = ({},)
    control: bool = False


def methods(c: Calibration) -> Iterator[Method]:
    """All rows, in the order of the table. Without a gate (kinds that no hyperplane tells apart)
    statistics per modality cannot be exported, and their rows are left out."""
    modality: tuple[By, ...] = ("modality",) if c.gate is not None else ()
    sides: tuple[By, ...] = ("role", *modality)
    after: By = "modality" if c.gate is not None else "role"
    names = {"all": "all items", "role": "per side", "modality": "per modality"}
    ns = tuple(n for n in (16, 64, 128, 256, 512) if n < c.sae.n_concepts)
    by_n = tuple({"n": n, "then": then} for n in ns for then in ("nothing", "centre"))

    def method(
        name: str,
        needs: Needs,
        make: Callable[..., list[Patch]],
        *grid: Setting,
        control: bool = False,
    ) -> Method:
        return Method(name, needs, make, tuple(grid) or ({},), control)

    def maps(*steps: Affine, subtract: Subtract | None = None, reason: str = "") -> list[Patch]:
        return [Patch(c.site, subtract, steps, c.gate, {"reason": reason})]

    def removal(ranking_c: Tensor, n: int, then: str, reason: str) -> list[Patch]:
        chosen = ranking_c.argsort(descending=True)[:n]
        chosen = chosen[torch.isfinite(ranking_c[chosen])]
        return [_subtracting(c, chosen, then, after, reason)]

    yield method("base, chosen readout", "nothing", lambda: maps())
    x_nd = c.features.pooled_nd
    by_all: tuple[By, ...] = ("all", *sides)
    for by in by_all:
        yield method(
            f"centring, {names[by]}",
            "unpaired items",
            lambda by=by: maps(fit.centre(x_nd, c.groups(by), by)),
        )
    for by in by_all:
        yield method(
            f"all-but-the-top, {names[by]}",
            "unpaired items",
            lambda r, by=by: maps(fit.all_but_the_top(x_nd, c.groups(by), by, r)),
            *({"r": r} for r in (1, 2, 4, 8, 16)),
        )
    for by in sides:
        yield method(
            f"ReAlign, {names[by]}",
            "unpaired items",
            lambda beta, by=by: maps(fit.realign(x_nd, c.groups(by), by, beta)),
            *({"beta": beta} for beta in (0.1, 0.3, 0.5, 0.8)),
        )
    dominant = torch.where(c.concepts.modality > TEXT_DOMINANT, c.concepts.energy, -torch.inf)
    yield method(
        "text-dominant concepts removed",
        "unpaired items",
        lambda n, then: removal(dominant, n, then, f"modality score above {TEXT_DOMINANT}"),
        *by_n,
    )
    yield method(
        "random subspace removed",
        "unpaired items",
        lambda r: _random_subspaces(c, r),
        {"r": 16},
        {"r": 64},
        control=True,
    )

    attribution = c.concepts.attribution
    yield method(
        "attribution subspace removed (the paper's)",
        "pairs",
        lambda n: maps(
            fit.remove_subspace(c.sae.W_dec_cd[attribution.argsort(descending=True)[:n]])
        ),
        *({"n": n} for n in (max(1, c.sae.n_concepts // 100), 32, 64)),
    )
    scores = {
        "attribution": attribution,
        "discriminative attribution, raw": -c.concepts.discriminative,
        "discriminative attribution, centred": -c.concepts.discriminative_centred,
    }
    for name, ranking_c in scores.items():
        yield method(
            f"removed by {name}",
            "pairs",
            lambda n, then, ranking_c=ranking_c, name=name: removal(ranking_c, n, then, name),
            *by_n,
        )
        yield method(
            f"random concepts, energy as by {name}",
            "pairs",
            lambda n, then, ranking_c=ranking_c: _random_concepts(c, ranking_c, n, then, after),
            *by_n,
            control=True,
        )
    gain_grid = tuple(
        {"pairs": which, "sparsity": s} for which in ("text-image", "all") for s in (0.0, 0.3)
    )
    gains = cache(lambda pairs, sparsity: _gains(c, after, pairs, sparsity))
    yield method(
        "learned gains", "pairs", lambda pairs, sparsity: [gains(pairs, sparsity)], *gain_grid
    )
    yield method(
        "gains on principal components",
        "pairs",
        lambda pairs: maps(*_principal(c, after, pairs)),
        {"pairs": "text-image"},
        {"pairs": "all"},
    )
    if c.gate is None or 0 not in c.pairs_to_images:
        return

    def procrustes(before: tuple[Affine, ...] = (), subtract: Subtract | None = None) -> Affine:
        return fit.procrustes(c.vectors_after(before, subtract), c.kinds_n, c.pairs_to_images)

    def cca(shrinkage: float, subtract: Subtract | None = None) -> Affine:
        d = x_nd.shape[1]
        return fit.cca(
            c.vectors_after((), subtract), c.kinds_n, c.pairs_to_images, shrinkage, min(d, 128)
        )

    yield method("Procrustes", "pairs", lambda: maps(procrustes()))
    yield method(
        "CCA",
        "pairs",
        lambda shrinkage: maps(cca(shrinkage)),
        *({"shrinkage": s} for s in (0.1, 0.3, 0.5, 0.8)),
    )

    def pair(first: str, second: str, **setting: Any) -> list[Patch]:
        subtract = None
        if first == "gains":
            subtract = gains(setting["pairs"], 0.0).subtract
        elif first == "removal":
            subtract = removal(
                scores["discriminative attribution, centred"], setting["n"], "nothing", first
            )[0].subtract
        reason = f"{first} {setting}" if subtract is not None else ""
        if second == "CCA":
            return maps(cca(0.5, subtract), subtract=subtract, reason=reason)
        whitened = fit.realign(
            c.vectors_after((), subtract), c.groups("modality"), "modality", setting["beta"]
        )
        if second == "ReAlign":
            return maps(whitened, subtract=subtract, reason=reason)
        turned = procrustes((whitened,), subtract)
        return maps(whitened, turned, subtract=subtract, reason=reason)

    betas = (0.3, 0.5, 0.8)
    pairs_grid: list[Setting] = [
        {"first": "ReAlign", "second": "Procrustes", "beta": b} for b in betas
    ]
    for which in ("text-image", "all"):
        pairs_grid += [
            {"first": "gains", "second": s, "beta": b, "pairs": which}
            for s in ("Procrustes", "ReAlign")
            for b in betas
        ]
        pairs_grid.append({"first": "gains", "second": "CCA", "pairs": which})
    for n in (64, 256):
        pairs_grid += [
            {"first": "removal", "second": s, "beta": 0.5, "n": n}
            for s in ("Procrustes", "ReAlign")
        ]
    yield method("best pair of methods", "pairs", pair, *pairs_grid)


def _subtracting(c: Calibration, chosen_m: Tensor, then: str, after: By, reason: str) -> Patch:
    """Remove concepts whole, then centre or not."""
    strength_c = torch.zeros(c.sae.n_concepts)
    strength_c[chosen_m] = 1.0
    return _with_strength(c, strength_c, then, after, reason)


def _with_strength(c: Calibration, strength_c: Tensor, then: str, after: By, reason: str) -> Patch:
    subtract = Subtract.from_sae(c.sae, strength_c)
    steps: tuple[Affine, ...] = ()
    if then == "centre":
        steps = (fit.centre(c.vectors_after((), subtract), c.groups(after), after),)
    return Patch(c.site, subtract, steps, c.gate, {"reason": reason})


def _random_concepts(
    c: Calibration, ranking_c: Tensor, n: int, then: str, after: By
) -> list[Patch]:
    """Three draws of random concepts, each as energetic as one that `ranking_c` puts first."""
    order = c.concepts.energy.argsort(descending=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    chosen = ranking_c.argsort(descending=True)[:n]
    patches = []
    for draw in range(3):
        generator = torch.Generator().manual_seed(c.seed * 1000 + draw)
        # a neighbour in the order of energy, at most ten places away
        shift = torch.randint(-10, 11, (n,), generator=generator)
        neighbours = order[(place[chosen] + shift).clamp(0, len(order) - 1)]
        patches.append(_subtracting(c, neighbours.unique(), then, after, "random"))
    return patches


def _random_subspaces(c: Calibration, r: int) -> list[Patch]:
    """Three draws of a random subspace of rank `r`, removed."""
    d = c.features.pooled_nd.shape[1]
    generator = torch.Generator().manual_seed(c.seed * 1000)
    draws = [torch.randn(min(r, d - 1), d, generator=generator) for _ in range(3)]
    return [Patch(c.site, None, (fit.remove_subspace(v),), c.gate) for v in draws]


def _pairs(c: Calibration, which: str) -> list[Tensor]:
    if which == "all":
        return list(c.pairs.values())
    return [p for direction, p in c.pairs.items() if direction in ("t->i", "i->t")]


def _gains(c: Calibration, after: By, pairs: str, sparsity: float) -> Patch:
    """Learned gains on centred codes, then centring; gains above 0.98 leave a concept alone."""
    settings = GainSettings(sparsity=sparsity)
    gains_c = learn_gains(
        c.centred_nd, c.centred_codes_nc, c.sae.W_dec_cd, _pairs(c, pairs), settings, c.seed
    )
    fires = c.features.codes.sum() > 0
    strength_c = torch.where(fires & (gains_c < 0.98), 1 - gains_c, 0.0)
    return _with_strength(c, strength_c, "centre", after, f"learned gains from {pairs} pairs")


def _principal(c: Calibration, after: By, pairs: str) -> tuple[Affine, Affine]:
    """The control of learned gains: the same on principal components."""
    covariance_dd = c.centred_nd.T @ c.centred_nd / len(c.centred_nd)
    vectors_dd = torch.linalg.eigh(covariance_dd.double()).eigenvectors
    codes_nd = (c.centred_nd.double() @ vectors_dd).float()
    gains_d = learn_gains(
        c.centred_nd, codes_nd, vectors_dd.T.float(), _pairs(c, pairs), GainSettings(), c.seed
    )
    centring = fit.centre(c.features.pooled_nd, c.groups(after), after)
    return centring, fit.principal_gains(c.centred_nd, gains_d.double(), vectors_dd)
