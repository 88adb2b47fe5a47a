"""Learned gains of concepts, gains of principal components, and controls: gains of directions that
no SAE has learned, and the learned gains on other concepts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from patch_retriever.concepts.selection import shuffled
from patch_retriever.patch import fit
from patch_retriever.patch.artefact import Patch
from patch_retriever.patch.calibration import Calibration
from patch_retriever.patch.gains import Components, GainSettings, Parts, learn_gains
from patch_retriever.patch.methods.method import DRAWS, Method, one_patch
from patch_retriever.patch.methods.removal import subtracting, with_match
from patch_retriever.patch.operators import Affine


def rows(c: Calibration) -> Iterator[Method]:
    """Gains from the pairs of all directions."""
    yield Method(
        "learned-gains",
        "learned gains",
        "pairs",
        lambda: _gained(c),
        concepts=True,
    )
    yield Method(
        "learned-gains-shuffled",
        "learned gains, shuffled",
        "pairs",
        lambda: _shuffled(c),
        control_of="learned-gains",
        concepts=True,
    )
    yield Method(
        "learned-gains-untrained",
        "gains on random directions",
        "pairs",
        lambda: _untrained(c),
        control_of="learned-gains",
    )
    yield Method(
        "principal-gains",
        "gains on principal components",
        "pairs",
        lambda: _principal(c),
    )


def _gained(c: Calibration) -> list[Patch]:
    return subtracting(c, strengths_from_gains(c), "learned gains", "centre")


def strengths_from_gains(c: Calibration) -> Tensor:
    """1 - gain of every concept (c,), learned on centred codes; gains above 0.98 leave a concept
    alone."""
    key = "gains"  # asked for again by every pair of methods with gains
    if key not in c.cache:
        gains_c = _learned(c, c.centred_codes)
        fires_c = c.features.codes.sum() > 0
        c.cache[key] = torch.where(fires_c & (gains_c < 0.98), 1 - gains_c, 0.0)
    return c.cache[key]


def _learned(c: Calibration, parts: Parts) -> Tensor:
    pairs = list(c.pairs.values())
    return learn_gains(c.centred_nd, parts, pairs, GainSettings(), c.seed, c.device)


def _shuffled(c: Calibration) -> list[Patch]:
    """Draws of the learned strengths, dealt out anew among the concepts that fire."""
    strength_c = strengths_from_gains(c)
    found = []
    for draw in range(DRAWS):
        other = shuffled(strength_c, c.concepts.energy, c.seed * 1000 + draw)
        patches = subtracting(c, other.strength_c, "random", "centre")
        found += [with_match(patch, other) for patch in patches]
    return found


def _untrained(c: Calibration) -> list[Patch]:
    """Gains of as many random unit directions as there are concepts (no more than can be told
    apart: 4 d), with the smallest codes that rebuild every vector. One draw: it is learned."""
    d = c.centred_nd.shape[1]
    n = min(c.sae.n_concepts, 4 * d)
    generator = torch.Generator().manual_seed(c.seed * 1000)
    directions_md = torch.randn(n, d, generator=generator)
    directions_md = torch.nn.functional.normalize(directions_md, dim=1).double()
    encoder_dm = torch.linalg.lstsq(directions_md, torch.eye(n, dtype=torch.float64)).solution
    return _affine_gains(c, "random", encoder_dm, directions_md)


def _principal(c: Calibration) -> list[Patch]:
    if "components" not in c.cache:
        everything = torch.arange(len(c.kinds_n))
        vectors_dd = fit.Moments(c.centred_nd, everything, c.device).spectrum[1]
        c.cache["components"] = vectors_dd.cpu()
    vectors_dd = c.cache["components"]
    return _affine_gains(c, "principal", vectors_dd, vectors_dd.T)


def _affine_gains(
    c: Calibration, name: str, encoder_dm: Tensor, directions_md: Tensor
) -> list[Patch]:
    """Centring, then x - ((1 - g) * (x E)) D, g learned; E and D are the encoder and directions."""
    key = ("gains", name)  # made for the choice and for test
    if key not in c.cache:
        coordinates_nm = (c.centred_nd.double() @ encoder_dm).float()
        c.cache[key] = _learned(c, Components(coordinates_nm, directions_md.float()))
    eye_dd = torch.eye(directions_md.shape[1], dtype=torch.float64)
    weight_dd = eye_dd - (encoder_dm * (1 - c.cache[key].double())) @ directions_md
    centring = fit.centre(c.vectors().statistics(c.sides[-1]))
    gains = Affine(f"{name} gains", "all", weight_dd.float()[None], torch.zeros(1, len(eye_dd)))
    return one_patch(c, centring, gains)
