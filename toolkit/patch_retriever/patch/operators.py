"""The operators of a patch, in plain torch.

There are two: `Subtract` takes concepts out of token activations, `Affine` corrects the geometry
of pooled vectors (centring, standardisation, all-but-the-top, whitening, ReAlign, subspace removal,
LEACE, Procrustes, CCA, ridge regression and gains on principal components are all affine maps).
`Gate` tells the kinds of items apart where an affine map has statistics per modality.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from patch_retriever.items import KINDS
from patch_retriever.sae.codes import Codes
from patch_retriever.sae.model import SparseAutoencoder
from patch_retriever.sae.scale import InputScale, scaled_input, token_scale

By = Literal["all", "role", "modality"]
GROUPS: dict[str, tuple[str, ...]] = {
    "all": ("all",),
    "role": ("query", "document"),
    "modality": KINDS,
}
"""Which statistics an affine map holds, by what it tells apart."""


@dataclass(frozen=True)
class Subtract:
    """h - sum_i a_i z_i(h) d_i over m selected concepts, z_i = u_i [u_i > threshold_i].

    It holds the rows of the SAE that it needs and no others: `concepts_m` (their numbers in the
    SAE), `strength_m` (a, in [0, 1]), `W_enc_dm`, `b_enc_m`, `threshold_m`, `W_dec_md`; and the
    SAE's `input_scale`, which says what u is computed from.
    """

    concepts_m: Tensor
    strength_m: Tensor
    W_enc_dm: Tensor
    b_enc_m: Tensor
    threshold_m: Tensor
    W_dec_md: Tensor
    input_scale: InputScale = "none"

    @classmethod
    def from_sae(cls, sae: SparseAutoencoder, strength_c: Tensor) -> Subtract:
        """Subtract every concept whose entry in `strength_c` is above zero."""
        concepts_m = strength_c.nonzero()[:, 0]
        return cls(
            concepts_m,
            strength_c[concepts_m].float(),
            sae.W_enc_dc[:, concepts_m],
            sae.b_enc_c[concepts_m],
            sae.threshold_c[concepts_m],
            sae.W_dec_cd[concepts_m],
            sae.input_scale,
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by their names."""
        return {k: v for k, v in vars(self).items() if isinstance(v, Tensor)}

    def to(self, device: torch.device) -> Subtract:
        """The same on a device; itself where it is there already."""
        if self.W_dec_md.device == device:
            return self
        tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return Subtract(**tensors, input_scale=self.input_scale)

    def is_like(self, other: Subtract) -> bool:
        """Whether both take the same concepts of the same SAE by the same strengths."""
        return torch.equal(self.concepts_m, other.concepts_m) and torch.equal(
            self.strength_m, other.strength_m
        )

    def keeping(self, concepts: Collection[int]) -> Subtract:
        """The same without some concepts (numbers in the SAE), which stay in."""
        if not concepts:
            return self
        numbers = torch.tensor(sorted(concepts), device=self.concepts_m.device)
        keep_m = torch.isin(self.concepts_m, numbers)
        return replace(self, strength_m=self.strength_m.masked_fill(keep_m, 0))

    def __call__(self, h_nd: Tensor) -> Tensor:
        """Patched activations (..., d)."""
        u = scaled_input(h_nd, self.input_scale) @ self.W_enc_dm + self.b_enc_m
        removed_nd = (u * (u > self.threshold_m) * self.strength_m) @ self.W_dec_md
        if self.input_scale == "token":
            removed_nd = removed_nd * token_scale(h_nd)[..., None]
        return h_nd - removed_nd

    def on_stream(self, h_ntd: Tensor) -> Tensor:
        """The patched residual stream, as the next layer wants it: computed in float32 where the
        activations are, in their own dtype again."""
        return self.to(h_ntd.device)(h_ntd.float()).to(h_ntd.dtype)

    def on_pooled(self, pooled_nd: Tensor, codes: Codes) -> Tensor:
        """What pooling the patched tokens would give, from pooled vectors and pooled codes.

        Exact for linear poolings (mean, last token): pool(h - sum a z d) = pool(h) - sum a
        pool(z) d. Of vectors of two parts the second, of raw tokens, stays as it is.
        """
        d = self.W_dec_md.shape[1]
        removed_nd = codes.of(self.concepts_m).scaled(self.strength_m).matmul(self.W_dec_md)
        return torch.cat([pooled_nd[:, :d] - removed_nd, pooled_nd[:, d:]], dim=1)


@dataclass(frozen=True)
class Affine:
    """x W_g + b_g, one W (d, e) and b (e,) for each group g that `by` tells apart."""

    name: str
    by: By
    weight_gde: Tensor
    bias_ge: Tensor

    def __post_init__(self) -> None:
        if len(self.weight_gde) != len(GROUPS[self.by]) or len(self.bias_ge) != len(
            self.weight_gde
        ):
            raise ValueError(f"{self.name}: {len(self.weight_gde)} groups, by {self.by}")

    def to(self, device: torch.device | str) -> Affine:
        """The same on a device."""
        return replace(self, weight_gde=self.weight_gde.to(device), bias_ge=self.bias_ge.to(device))

    def by_kind(self, x_nd: Tensor, kinds_n: Tensor, role: int = 1) -> Tensor:
        """The map of items whose kinds (numbers in `KINDS`) are known, without a gate."""
        out_ne = x_nd.new_empty(len(x_nd), self.bias_ge.shape[1])
        for kind in range(len(KINDS)):
            rows, g = kinds_n == kind, self.group(role, kind)
            out_ne[rows] = x_nd[rows] @ self.weight_gde[g] + self.bias_ge[g]
        return out_ne

    def group(self, role: int, kind: int) -> int:
        """The group of a query (role 0) or document (1) of a kind (its number in `KINDS`)."""
        return {"all": 0, "role": role, "modality": kind}[self.by]


def compose(maps: tuple[Affine, ...], d: int, role: int) -> tuple[Tensor, Tensor]:
    """All maps as one for a role: weights (3, d, e) and biases (3, e), one per kind."""
    found: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
    by_kind = [tuple(step.group(role, kind) for step in maps) for kind in range(len(KINDS))]
    for groups in by_kind:
        if groups not in found:  # kinds that no map tells apart are composed once
            found[groups] = _composed(maps, groups, d)
    weights, biases = zip(*(found[groups] for groups in by_kind), strict=True)
    return torch.stack(weights), torch.stack(biases)


def _composed(maps: tuple[Affine, ...], groups: tuple[int, ...], d: int) -> tuple[Tensor, Tensor]:
    """One group of each map as one map: weight (d, e) and bias (e,)."""
    if not maps:
        return torch.eye(d), torch.zeros(d)
    weight_de, bias_e = maps[0].weight_gde[groups[0]], maps[0].bias_ge[groups[0]]
    for step, g in zip(maps[1:], groups[1:], strict=True):
        bias_e = bias_e @ step.weight_gde[g] + step.bias_ge[g]
        weight_de = weight_de @ step.weight_gde[g]
    return weight_de, bias_e


@dataclass(frozen=True)
class Gate:
    """Tells text, image and both apart by two hyperplanes, from the mean of the raw tokens.

    The mean is asked whatever the readout's pooling: a last token after a "one word" prompt is
    (and should be) alike for a picture and its caption. The first of `direction_2d`, `offset_2`
    is positive for everything with an image, the second for items with image and text, or for
    nothing: then these go the way of images. `margin` is the distance of the nearest calibration
    item from its hyperplane, in units of the mean one; `error` the largest share of a kind's items
    that go another kind's way.
    """

    direction_2d: Tensor
    offset_2: Tensor
    margin: float
    error: float = 0.0

    @property
    def tells_both(self) -> bool:
        """Whether items with image and text are told from images."""
        return bool(self.direction_2d[1].any()) or float(self.offset_2[1]) > 0

    def to(self, device: torch.device) -> Gate:
        """The same on a device."""
        return replace(
            self, direction_2d=self.direction_2d.to(device), offset_2=self.offset_2.to(device)
        )

    def switches(self, mean_nd: Tensor) -> Tensor:
        """(n, 2): whether there is an image, whether there is an image and a text."""
        return (mean_nd @ self.direction_2d.T + self.offset_2 > 0).float()

    def kinds(self, mean_nd: Tensor) -> Tensor:
        """The kind of every item, as its number in `KINDS`."""
        return self.switches(mean_nd).sum(1).long()


def apply_maps(
    maps: tuple[Affine, ...], gate: Gate | None, x_nd: Tensor, mean_nd: Tensor, role: int
) -> Tensor:
    """`maps` in order on pooled vectors; `mean_nd`, the raw tokens' means, decide the kind.

    Every item is multiplied once: by what the telescope of `apply_composed` comes to for its
    switches.
    """
    if not maps:
        return x_nd
    weight_kde, bias_ke = compose(maps, x_nd.shape[1], role)
    if gate is None or all(step.by != "modality" for step in maps):
        return x_nd @ weight_kde[0] + bias_ke[0]
    steps_kde, steps_ke = weight_kde.diff(dim=0), bias_ke.diff(dim=0)
    switch_n2 = gate.switches(mean_nd).bool()
    out_ne = x_nd.new_empty(len(x_nd), bias_ke.shape[1])
    for switches in product((False, True), repeat=2):
        rows = (switch_n2 == torch.tensor(switches)).all(1).nonzero()[:, 0]
        weight_de, bias_e = weight_kde[0], bias_ke[0]
        for k, switch in enumerate(switches):
            if switch:
                weight_de, bias_e = weight_de + steps_kde[k], bias_e + steps_ke[k]
        out_ne[rows] = x_nd[rows] @ weight_de + bias_e
    return out_ne


def apply_composed(
    weight_kde: Tensor, bias_ke: Tensor, gate: Gate | None, x_nd: Tensor, mean_nd: Tensor
) -> Tensor:
    """As `apply_maps`, for maps that are one already (`compose`); differentiable."""
    out_ne = x_nd @ weight_kde[0] + bias_ke[0]
    if gate is None:
        return out_ne
    switch_n2 = gate.switches(mean_nd)
    for k in (0, 1):  # telescoped, as the export computes it: text, then + image, then + both
        step_ne = x_nd @ (weight_kde[k + 1] - weight_kde[k]) + bias_ke[k + 1] - bias_ke[k]
        out_ne = out_ne + switch_n2[:, k, None] * step_ne
    return out_ne
