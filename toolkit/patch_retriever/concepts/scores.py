"""What is known of each concept: energy, modality, bridge, attribution, discriminative attribution.

Definitions from "Generative Giants, Retrieval Weaklings" (arXiv 2512.19115, Eq. 3-7);
discriminative attribution is this project's. z are codes, a row an item; D is the dictionary, a
row a concept; z D is what the codes rebuild (without the decoder's bias); M = D D^T. Concept i is
row i of D and column i of z.

All is computed through the active entries of sparse codes: the largest thing that is made has the
shape (items, d), and neither a matrix of items by concepts nor one of concepts by concepts ever
exists.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from patch_retriever.backbones.roles import ROLES
from patch_retriever.concepts.table import ConceptTable
from patch_retriever.features import Features
from patch_retriever.items import KINDS
from patch_retriever.sae.codes import Codes
from patch_retriever.sae.metrics import fvu
from patch_retriever.sae.model import SparseAutoencoder
from patch_retriever.sae.ops import sampled_products, starts_of, weighted_rows

CodesOf = Literal["tokens", "pooled"]
"""What the SAE encodes: tokens, whose codes are then pooled as the activations are (as the SAE was
trained), or pooled vectors (as the paper computes its scores)."""

CHUNK_FLOATS = 16_777_216
"""Numbers of an intermediate that are alive at a time (64 MiB in float32)."""

TEXT, IMAGE, BOTH = (KINDS.index(kind) for kind in ("text", "image", "both"))


def codes_of(features: Features, sae: SparseAutoencoder, which: CodesOf) -> Codes:
    """Token-level codes pooled like the embedding, or the codes of the pooled vectors."""
    if which == "tokens":
        return features.codes
    return sae.codes(features.pooled_nd[:, : sae.d_in].contiguous())


def unexplained(features: Features, codes: Codes, sae: SparseAutoencoder) -> dict[str, float]:
    """Fraction of the pooled vectors' variance that `codes` leave unexplained, over all items and
    over those of each kind (0 perfect, 1 no better than the mean); of vectors of two parts, in the
    first."""
    pooled_nd = features.pooled_nd[:, : sae.d_in]
    scale_n = features.scale_n if codes is features.codes else None  # pooled vectors have their own
    rebuilt_nd = sae.decode(codes, pooled_nd, scale_n)
    found = {"all": fvu(pooled_nd, rebuilt_nd)}
    for number, kind in enumerate(KINDS):
        rows_m = torch.eq(features.kinds_n, number).nonzero()[:, 0]
        x_md = pooled_nd[rows_m]
        if len(rows_m) and (x_md != x_md[0]).any():
            found[kind] = fvu(x_md, rebuilt_nd[rows_m])
    return found


@torch.no_grad()
def score_concepts(
    features: Features,
    dictionary_cd: Tensor,
    pairs_n2: Tensor,
    negatives_n2: Tensor,
    negatives_centred_n2: Tensor,
) -> ConceptTable:
    """All scores from the calibration split.

    Energy_i = E[z_i] over items; frequency_i = P(z_i != 0); modality_i = E_text[z_i] /
    (E_text[z_i] + E_image[z_i]); attribution as in `contribution`, bridge as in `bridge_scores`;
    discriminative attribution is the contribution to pairs less that to hard negatives, on codes
    as they are and on codes less the mean of their item's kind.

    Args:
        features: codes and kinds of the items, and mean codes by role if they were collected.
        dictionary_cd: the SAE's dictionary D.
        pairs_n2: (query, relevant document) items, one a text and the other an image.
        negatives_n2: (query, hard negative) items by the raw embedding.
        negatives_centred_n2: the same by the centred embedding.
    """
    codes, kinds_n = features.codes, features.kinds_n
    means_kc = torch.stack([codes[torch.eq(kinds_n, k).nonzero()[:, 0]].mean() for k in range(3)])
    zero_kc = torch.zeros_like(means_kc)
    total_c = means_kc[TEXT] + means_kc[IMAGE]
    modality_c = means_kc[TEXT] / total_c.clamp(min=1e-30)
    raw_c = contribution(codes, kinds_n, zero_kc, dictionary_cd, pairs_n2)
    raw_negative_c = contribution(codes, kinds_n, zero_kc, dictionary_cd, negatives_n2)
    centred_c = contribution(codes, kinds_n, means_kc, dictionary_cd, pairs_n2)
    centred_negative_c = contribution(codes, kinds_n, means_kc, dictionary_cd, negatives_centred_n2)
    energy_cr = features.role_energy_cr
    if energy_cr is None:
        energy_cr = torch.full((codes.n_concepts, len(ROLES)), torch.nan)
    return ConceptTable(
        energy=codes.mean(),
        energy_texts=means_kc[TEXT],
        energy_images=means_kc[IMAGE],
        energy_both=means_kc[BOTH],
        frequency=codes.counts() / len(codes),
        modality=torch.where(total_c > 0, modality_c, torch.tensor(0.5)),
        bridge=bridge_scores(codes, kinds_n, dictionary_cd, pairs_n2),
        attribution=raw_c,
        discriminative=raw_c - raw_negative_c,
        discriminative_centred=centred_c - centred_negative_c,
        **{f"role_{role}": energy_cr[:, r] for r, role in enumerate(ROLES)},
    )


def contribution(
    codes: Codes,
    kinds_n: Tensor,
    means_kc: Tensor,
    dictionary_cd: Tensor,
    pairs_n2: Tensor,
    chunk: int = 1024,
) -> Tensor:
    """What each concept adds to the inner products of pairs, (c,): E[a * (M b) + b * (M a)].

    a and b are the codes of a pair's items less their kind's mean in `means_kc` (zeros: codes as
    they are, Eq. 6-7 of the paper). The entries sum to twice the mean inner product of a D and b D.

    Exact without M: M b = D (b D). Let v_n be the sum of b D over the partners b of item n. Then
    the sum over pairs is sum_n a_n * (D v_n), of which the part of the codes needs D_i . v_n at
    active entries only, and the part of the means, - mean_k * (D sum_n v_n) over the items n of
    kind k, is one product for each kind.
    """
    kinds_n = kinds_n.long()
    rebuilt_nd = codes.matmul(dictionary_cd)
    rebuilt_nd -= (means_kc @ dictionary_cd)[kinds_n]
    items_p, partners_p = pairs_n2.T.flatten(), pairs_n2.flip(1).T.flatten()
    partners_p = partners_p[items_p.argsort(stable=True)]
    starts_n1 = starts_of(torch.bincount(items_p, minlength=len(codes)))
    total_c = torch.zeros(codes.n_concepts, dtype=torch.float64)
    sums_kd = torch.zeros(len(means_kc), rebuilt_nd.shape[1], dtype=torch.float64)
    for items_m in torch.arange(len(codes)).split(chunk):
        first, last = int(starts_n1[items_m[0]]), int(starts_n1[items_m[-1] + 1])
        ones_e = torch.ones(last - first, dtype=rebuilt_nd.dtype)
        v_md = weighted_rows(ones_e, partners_p[first:last], starts_n1[items_m] - first, rebuilt_nd)
        sums_kd.index_add_(0, kinds_n[items_m], v_md.double())
        part = codes[items_m]
        products_e = sampled_products(v_md, dictionary_cd, part.rows_e, part.concepts_e)
        total_c.index_add_(0, part.concepts_e, (part.values_e * products_e).double())
    total_c -= (means_kc * (sums_kd.float() @ dictionary_cd.T)).sum(0)
    return (total_c / max(len(pairs_n2), 1)).float()


def bridge_scores(codes: Codes, kinds_n: Tensor, dictionary_cd: Tensor, pairs_n2: Tensor) -> Tensor:
    """Row sums plus column sums of |B|, (c,); B = E[z_image^T z_text] * (D D^T) over pairs (Eq. 5).

    Rows of B are concepts of the image, columns concepts of the text. The paper does not say how
    it reduces B to one number a concept; IsoEnergy's code takes these sums, and signed sums would
    equal the attribution exactly.

    Where the SAE's codes are nonnegative, |B_ij| = E[z_i z_j] |D_i . D_j| is a sum over pairs, so
    that each pair needs the products of its own concepts only. Where some are negative, or so many
    are active that the whole of M is less work, B is made tile by tile. Both are exact.
    """
    image_first_n = torch.eq(kinds_n[pairs_n2[:, 0]], IMAGE)
    image = codes[torch.where(image_first_n, pairs_n2[:, 0], pairs_n2[:, 1])]
    text = codes[torch.where(image_first_n, pairs_n2[:, 1], pairs_n2[:, 0])]
    products_of_pairs = int((image.active_n * text.active_n).sum())
    if products_of_pairs == 0:
        return torch.zeros(codes.n_concepts)
    products_of_all = int((image.counts() > 0).sum()) * int((text.counts() > 0).sum())
    additive = bool((image.values_e >= 0).all() and (text.values_e >= 0).all())
    by_pairs = additive and products_of_pairs < products_of_all
    sums = bridge_by_pairs if by_pairs else bridge_by_tiles
    return (sums(image, text, dictionary_cd) / max(len(pairs_n2), 1)).float()


def bridge_by_pairs(
    image: Codes, text: Codes, dictionary_cd: Tensor, floats: int = CHUNK_FLOATS
) -> Tensor:
    """Sums over pairs (rows of both) of z_i z_j |D_i . D_j|, for nonnegative codes."""
    score_c = torch.zeros(image.n_concepts, dtype=torch.float64)
    active_n = image.active_n + text.active_n
    order_n = active_n.argsort(descending=True)  # pairs of like sizes together: little padding
    start = 0
    while start < len(order_n):
        largest = max(1, int(active_n[order_n[start]]))
        pairs_p = order_n[start : start + max(1, floats // (largest * dictionary_cd.shape[1]))]
        start += len(pairs_p)
        (i_pa, z_pa), (j_pb, z_pb) = image[pairs_p].padded(), text[pairs_p].padded()
        m_pab = (dictionary_cd[i_pa] @ dictionary_cd[j_pb].transpose(1, 2)).abs_()
        rows_pa = z_pa * (m_pab @ z_pb[:, :, None])[:, :, 0]
        columns_pb = z_pb * (z_pa[:, None, :] @ m_pab)[:, 0]
        score_c.index_add_(0, i_pa.flatten(), rows_pa.flatten().double())
        score_c.index_add_(0, j_pb.flatten(), columns_pb.flatten().double())
    return score_c


def bridge_by_tiles(
    image: Codes, text: Codes, dictionary_cd: Tensor, floats: int = CHUNK_FLOATS
) -> Tensor:
    """Sums of |sum over pairs of z_i z_j| |D_i . D_j| over the tiles of concepts that fire."""
    score_c = torch.zeros(image.n_concepts, dtype=torch.float64)
    pairs_of_i, pairs_of_j = image.transposed(), text.transposed()
    size = max(1, min(1024, floats // max(len(image), dictionary_cd.shape[1])))
    for j_t in pairs_of_j.active_n.nonzero()[:, 0].split(size):
        z_nt = pairs_of_j[j_t].dense().T.contiguous()
        for i_s in pairs_of_i.active_n.nonzero()[:, 0].split(size):
            b_st = pairs_of_i[i_s].matmul(z_nt).abs_()
            b_st *= (dictionary_cd[i_s] @ dictionary_cd[j_t].T).abs_()
            score_c.index_add_(0, i_s, b_st.sum(1).double())
            score_c.index_add_(0, j_t, b_st.sum(0).double())
    return score_c
