"""The methods of the table: each makes patches from calibration data, for every setting it has.

Methods are grouped by what they need: nothing, unpaired items, or pairs. Controls (random
concepts, random subspaces) stand beside what they control for; they are never chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
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

_BY_NAME = {"all": "all items", "role": "per side", "modality": "per modality"}
_BETAS = (0.1, 0.3, 0.5, 0.8)
_N_CONCEPTS = (16, 64, 128, 256, 512)
_DRAWS = 3  # of every random control


@dataclass(frozen=True)
class Method:
    """One row of the table: patches for a setting; validation picks the setting."""

    name: str
    needs: Needs
    make: Callable[..., list[Patch]]
    grid: tuple[Setting, ...] = ({},)
    control: bool = False


def methods(c: Calibration) -> Iterator[Method]:
    """All rows, in the order of the table.

    Without a gate (kinds that no hyperplane tells apart) statistics per modality cannot be
    exported, and their rows are left out.
    """
    yield Method("base, chosen readout", "nothing", lambda: _patch(c))
    yield from _geometry(c)
    energy_of_text_c = torch.where(
        c.concepts.modality > TEXT_DOMINANT, c.concepts.energy, -torch.inf
    )
    name = "text-dominant concepts removed"
    yield from _removal(c, name, "unpaired items", energy_of_text_c, "text-dominant ones")
    subspaces = tuple({"r": r} for r in (16, 64))
    yield Method(
        "random subspace removed",
        "unpaired items",
        lambda r: _random_subspaces(c, r),
        subspaces,
        control=True,
    )
    yield _attribution_subspace(c)
    rankings = {
        "attribution": c.concepts.attribution,
        "discriminative attribution, raw": -c.concepts.discriminative,
        "discriminative attribution, centred": -c.concepts.discriminative_centred,
    }
    for name, ranking_c in rankings.items():
        yield from _removal(c, f"removed by {name}", "pairs", ranking_c, f"by {name}")
    yield from _gains(c)
    if c.gate is not None and 0 in c.pairs_to_images:
        yield from _alignment(c)


def _patch(
    c: Calibration, *maps: Affine, subtract: Subtract | None = None, reason: str = ""
) -> list[Patch]:
    return [Patch(c.site, subtract, maps, c.gate, {"reason": reason})]


def _geometry(c: Calibration) -> Iterator[Method]:
    """Centring, all-but-the-top, ReAlign."""
    x_nd = c.features.pooled_nd

    def row(name: str, by: By, fitted: Callable[..., Affine], *grid: Setting) -> Method:
        def make(**setting: Any) -> list[Patch]:
            return _patch(c, fitted(x_nd, c.groups(by), by, **setting))

        return Method(f"{name}, {_BY_NAME[by]}", "unpaired items", make, grid or ({},))

    for by in ("all", *c.sides):
        yield row("centring", by, fit.centre)
    for by in ("all", *c.sides):
        ranks = [r for r in (1, 2, 4, 8, 16) if r < x_nd.shape[1] // 2]
        yield row("all-but-the-top", by, fit.all_but_the_top, *({"r": r} for r in ranks))
    for by in c.sides:
        yield row("ReAlign", by, fit.realign, *({"beta": beta} for beta in _BETAS))


def _removal(
    c: Calibration, name: str, needs: Needs, ranking_c: Tensor, control: str
) -> Iterator[Method]:
    """Removal of the n concepts that `ranking_c` puts first (never those at -inf), then centring
    or not; and its control, random concepts of matched energy."""
    ns = [n for n in _N_CONCEPTS if n < c.sae.n_concepts]
    grid = tuple({"n": n, "then": then} for n in ns for then in ("nothing", "centre"))

    def first(n: int) -> Tensor:
        chosen_m = ranking_c.argsort(descending=True)[:n]
        return chosen_m[torch.isfinite(ranking_c[chosen_m])]

    yield Method(
        name, needs, lambda n, then: [_subtracting(c, _ones(c, first(n)), then, name)], grid
    )
    yield Method(
        f"random concepts, energy as {control}",
        needs,
        lambda n, then: [
            _subtracting(c, _ones(c, chosen_m), then, "random")
            for chosen_m in _random_like(c, first(n))
        ],
        grid,
        control=True,
    )


def _ones(c: Calibration, chosen_m: Tensor) -> Tensor:
    """Strength one for the chosen concepts, (c,)."""
    strength_c = torch.zeros(c.sae.n_concepts)
    strength_c[chosen_m] = 1.0
    return strength_c


def _subtracting(c: Calibration, strength_c: Tensor, then: str, reason: str) -> Patch:
    """Subtract concepts by strength, then centre as finely as can be exported, or not."""
    subtract = Subtract.from_sae(c.sae, strength_c)
    maps: tuple[Affine, ...] = ()
    if then == "centre":
        by = c.sides[-1]
        maps = (fit.centre(c.vectors_after((), subtract), c.groups(by), by),)
    return Patch(c.site, subtract, maps, c.gate, {"reason": reason})


def _random_like(c: Calibration, chosen_m: Tensor) -> Iterator[Tensor]:
    """Draws of as many random concepts: concepts change places in the order of energy, one for
    one, with others at most twenty places away."""
    order = c.concepts.energy.argsort(descending=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    for draw in range(_DRAWS):
        generator = torch.Generator().manual_seed(c.seed * 1000 + draw)
        near = (
            torch.arange(len(order)) + 20 * torch.rand(len(order), generator=generator)
        ).argsort()
        yield order[near[place[chosen_m]]]


def _random_subspaces(c: Calibration, r: int) -> list[Patch]:
    """Draws of a random subspace of rank `r`, removed."""
    d = c.features.pooled_nd.shape[1]
    generator = torch.Generator().manual_seed(c.seed * 1000)
    draws = [torch.randn(min(r, d - 1), d, generator=generator) for _ in range(_DRAWS)]
    return [Patch(c.site, None, (fit.remove_subspace(v),), c.gate) for v in draws]


def _attribution_subspace(c: Calibration) -> Method:
    """The paper's ablation: the span of the concepts of highest attribution (its top 1%, and
    more)."""
    order = c.concepts.attribution.argsort(descending=True)
    ns = sorted({max(1, c.sae.n_concepts // 100), 32, 64})
    return Method(
        "attribution subspace removed (the paper's)",
        "pairs",
        lambda n: _patch(c, fit.remove_subspace(c.sae.W_dec_cd[order[:n]])),
        tuple({"n": n} for n in ns if n < c.sae.d_in),
    )


def _gains(c: Calibration) -> Iterator[Method]:
    """Learned gains of concepts, and their control: gains of principal components."""
    which = ("text-image", "all")
    yield Method(
        "learned gains",
        "pairs",
        lambda **setting: [_with_gains(c, **setting)],
        tuple({"pairs": pairs, "sparsity": s} for pairs in which for s in (0.0, 0.3)),
    )
    yield Method(
        "gains on principal components",
        "pairs",
        lambda pairs: _patch(c, *_principal_gains(c, pairs)),
        tuple({"pairs": pairs} for pairs in which),
    )


def _pairs(c: Calibration, which: str) -> list[Tensor]:
    if which == "all":
        return list(c.pairs.values())
    return [pairs for name, pairs in c.pairs.items() if name in ("t->i", "i->t")]


def _with_gains(c: Calibration, pairs: str, sparsity: float) -> Patch:
    """Learned gains on centred codes, then centring; gains above 0.98 leave a concept alone."""
    key = ("gains", pairs, sparsity)  # asked for again by every pair of methods with gains
    if key not in c.cache:
        gains_c = learn_gains(
            c.centred_nd,
            c.centred_codes_nc,
            c.sae.W_dec_cd,
            _pairs(c, pairs),
            GainSettings(sparsity=sparsity),
            c.seed,
        )
        fires_c = c.features.codes.sum() > 0
        strength_c = torch.where(fires_c & (gains_c < 0.98), 1 - gains_c, 0.0)
        reason = f"learned gains from {pairs} pairs, sparsity {sparsity}"
        c.cache[key] = _subtracting(c, strength_c, "centre", reason)
    return c.cache[key]


def _principal_gains(c: Calibration, pairs: str) -> tuple[Affine, Affine]:
    covariance_dd = c.centred_nd.T @ c.centred_nd / len(c.centred_nd)
    vectors_dd = torch.linalg.eigh(covariance_dd.double()).eigenvectors
    codes_nd = (c.centred_nd.double() @ vectors_dd).float()
    dictionary_dd = vectors_dd.T.float()
    gains_d = learn_gains(
        c.centred_nd, codes_nd, dictionary_dd, _pairs(c, pairs), GainSettings(), c.seed
    )
    by = c.sides[-1]
    centring = fit.centre(c.features.pooled_nd, c.groups(by), by)
    return centring, fit.principal_gains(c.centred_nd, gains_d.double(), vectors_dd)


def _alignment(c: Calibration) -> Iterator[Method]:
    """Procrustes, CCA, and pairs of methods with them or with ReAlign."""

    def procrustes(*before: Affine, subtract: Subtract | None = None) -> Affine:
        x_nd = c.vectors_after(before, subtract)
        return fit.procrustes(x_nd, c.kinds_n, c.pairs_to_images)

    def cca(shrinkage: float, subtract: Subtract | None = None) -> Affine:
        x_nd = c.vectors_after((), subtract)
        r = min(x_nd.shape[1], 128)
        return fit.cca(x_nd, c.kinds_n, c.pairs_to_images, shrinkage, r)

    def realign(beta: float, subtract: Subtract | None = None) -> Affine:
        x_nd = c.vectors_after((), subtract)
        return fit.realign(x_nd, c.groups("modality"), "modality", beta)

    yield Method("Procrustes", "pairs", lambda: _patch(c, procrustes()))
    shrinkages = tuple({"shrinkage": s} for s in _BETAS)
    yield Method("CCA", "pairs", lambda shrinkage: _patch(c, cca(shrinkage)), shrinkages)

    def pair(first: str, second: str, strength: float) -> list[Patch]:
        subtract = None
        if first.startswith("gains"):
            subtract = _with_gains(c, first.removeprefix("gains from "), 0.0).subtract
        elif first == "removal":
            chosen_m = c.concepts.discriminative_centred.argsort()[:64]
            subtract = Subtract.from_sae(c.sae, _ones(c, chosen_m))
        if second == "CCA":
            return _patch(c, cca(strength, subtract), subtract=subtract, reason=first)
        whitening = realign(strength, subtract)
        if second == "ReAlign":
            return _patch(c, whitening, subtract=subtract, reason=first)
        turn = procrustes(whitening, subtract=subtract)
        return _patch(c, whitening, turn, subtract=subtract, reason=first)

    firsts = ("gains from text-image", "gains from all", "removal")
    pairs = [("ReAlign", "Procrustes"), *((f, s) for f in firsts for s in _SECONDS)]
    grid = tuple(
        {"first": f, "second": s, "strength": b} for f, s in pairs for b in (0.3, 0.5, 0.8)
    )
    yield Method("best pair of methods", "pairs", pair, grid)


_SECONDS = ("ReAlign", "ReAlign and Procrustes", "CCA")
