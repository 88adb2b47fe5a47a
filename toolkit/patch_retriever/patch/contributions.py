"""What one similarity is made of: concepts, geometry, and what the SAE does not see.

An embedding is e = normalise(x W + b), W and b being the patch's maps as one, with
x = p - sum_i a_i z_i d_i, and the pooled vector is p = sum_i z_i d_i + b_dec + residual. All of it
is linear up to the length l of x W + b, so that e is a sum of

- one vector for each active concept, (1 - a_i) z_i d_i W / l,
- the geometry, (b_dec W + b) / l: what every item of the group has in common (with a scale per
  token also the item's own level and size: std b_dec + mean in place of b_dec), and
- the residual's, residual W / l.

A readout of two parts puts the last token's raw vector beside p. No concept is taken out of that
one, and it adds a vector of its own to the sum.

A similarity is bilinear: a part's contribution is half of <its vector on one side, the other
side's embedding>, plus the same with the sides exchanged. The parts sum to the similarity exactly.
The paper's attribution (arXiv 2512.19115, Eq. 6-7) is twice this on unpatched, unnormalised
vectors, with the other side's reconstruction in place of its embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patch_retriever.patch.artefact import DOCUMENT, QUERY, Patch
from patch_retriever.patch.operators import compose
from patch_retriever.sae.model import SparseAutoencoder


@dataclass(frozen=True)
class PooledItem:
    """One item before any patch: its pooled vector (d,), or (2 d,) of two parts, the mean (d,) of
    its raw tokens, which the gate asks, its pooled codes (c,), and, of an SAE with a scale per
    token, its pooled scale."""

    pooled_d: Tensor
    mean_d: Tensor
    codes_c: Tensor
    scale: Tensor | None = None


@dataclass(frozen=True)
class Contributions:
    """The parts of one similarity: `concepts_m`, `geometry`, `residual` and `last_token` (0 for a
    readout of one part) sum to `score`."""

    score: float
    concepts_m: Tensor
    geometry: float
    residual: float
    last_token: float


def contributions(
    patch: Patch, sae: SparseAutoencoder, query: PooledItem, document: PooledItem, numbers_m: Tensor
) -> Contributions:
    """The parts of the similarity of a query and a document under `patch`, in float64.

    Args:
        patch: how they are embedded; `Patch(site)` is the plain backbone.
        sae: the SAE that the codes are of.
        query: one side.
        document: the other.
        numbers_m: the concepts asked about: every one that is active on either side.
    """
    rows_md = sae.W_dec_cd[numbers_m].double()
    kept_m = 1 - strengths(patch, sae.n_concepts)[numbers_m].double()
    sides = [
        _Side.of(
            patch,
            item,
            role,
            item.codes_c[numbers_m].double(),
            kept_m,
            rows_md,
            sae.base(item.pooled_d[: sae.d_in], item.scale).double(),
        )
        for role, item in ((QUERY, query), (DOCUMENT, document))
    ]
    concepts_m = torch.zeros(len(numbers_m), dtype=torch.float64)
    geometry = residual = last_token = 0.0
    d = sae.d_in
    for side, other in (sides, sides[::-1]):
        # <v W / l, e> = <v, W e / l>: no part's own vector is ever made
        seen_d, seen_last_d = (side.weight_de @ other.embedding_e / side.length).tensor_split([d])
        concepts_m += side.kept_codes_m * (rows_md @ seen_d) / 2
        shift = side.bias_e @ other.embedding_e / side.length
        geometry += float(side.base_d @ seen_d + shift) / 2
        residual += float(side.residual_d @ seen_d) / 2
        last_token += float(side.last_token_d @ seen_last_d) / 2
    score = float(sides[0].embedding_e @ sides[1].embedding_e)
    return Contributions(score, concepts_m, geometry, residual, last_token)


def strengths(patch: Patch, n_concepts: int) -> Tensor:
    """How much of every concept the patch subtracts, (c,): 0 leaves it alone, 1 removes it."""
    strength_c = torch.zeros(n_concepts)
    if patch.subtract is not None:
        strength_c[patch.subtract.concepts_m] = patch.subtract.strength_m
    return strength_c


@dataclass(frozen=True)
class _Side:
    """One item in one role, taken apart."""

    weight_de: Tensor
    bias_e: Tensor
    kept_codes_m: Tensor
    base_d: Tensor
    residual_d: Tensor
    last_token_d: Tensor
    embedding_e: Tensor
    length: Tensor

    @classmethod
    def of(
        cls,
        patch: Patch,
        item: PooledItem,
        role: int,
        codes_m: Tensor,
        kept_m: Tensor,
        rows_md: Tensor,
        base_d: Tensor,
    ) -> _Side:
        weight_de, bias_e = _map_of(patch, item, role)
        pooled_d, last_token_d = item.pooled_d.double().tensor_split([len(base_d)])
        residual_d = pooled_d - (codes_m @ rows_md + base_d)
        x_d = torch.cat([(codes_m * kept_m) @ rows_md + base_d + residual_d, last_token_d])
        out_e = x_d @ weight_de + bias_e
        length = torch.linalg.vector_norm(out_e).clamp(min=1e-12)  # as F.normalize
        kept_m, unit_e = codes_m * kept_m, out_e / length
        return cls(weight_de, bias_e, kept_m, base_d, residual_d, last_token_d, unit_e, length)


def _map_of(patch: Patch, item: PooledItem, role: int) -> tuple[Tensor, Tensor]:
    """The one affine map that an item goes through, as `apply_maps` has it."""
    weight_kde, bias_ke = compose(patch.maps, len(item.pooled_d), role)
    if patch.gate is None:
        return weight_kde[0].double(), bias_ke[0].double()
    image, both = patch.gate.switches(item.mean_d[None])[0]
    share_k = torch.stack([1 - image, image - both, both])  # the telescope, by kind
    return (
        torch.einsum("k,kde->de", share_k, weight_kde).double(),
        (share_k @ bias_ke).double(),
    )
