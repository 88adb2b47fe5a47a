"""What is known of each concept: energy, modality, bridge, attribution, discriminative attribution.

Definitions from "Generative Giants, Retrieval Weaklings" (arXiv 2512.19115, Eq. 3-7), on codes
pooled like the embedding; discriminative attribution is this project's.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from patch_retriever.features import Features
from patch_retriever.files import write
from patch_retriever.sae.codes import Codes

TEXT_DOMINANT = 0.8
"""Modality score above which a concept is text-dominant."""


@dataclass(frozen=True)
class ConceptTable:
    """One entry per concept in every field, each (c,)."""

    energy: Tensor
    """Mean activation over all items (Eq. 3)."""
    modality: Tensor
    """E_text[z] / (E_text[z] + E_image[z]): 1 text, 0 image; 0.5 where it never fires (Eq. 4)."""
    bridge: Tensor
    """Row sum plus column sum of |B|, B = E[z_image^T z_text] * (D D^T) (Eq. 5). The paper does
    not say how it reduces B; signed sums would equal the attribution exactly."""
    attribution: Tensor
    """E[z_i * (M z_t) + z_t * (M z_i)] over pairs, M = D D^T (Eq. 6-7)."""
    discriminative: Tensor
    """Contribution to pairs less contribution to hard negatives."""
    discriminative_centred: Tensor
    """The same on codes less their modality's mean."""

    def save(self, path: Path) -> None:
        """Write a Parquet file with one row per concept."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = {"concept": list(range(len(self.energy)))}
        table = pa.table(columns | {f.name: getattr(self, f.name).numpy() for f in fields(self)})
        write(path, lambda p: pq.write_table(table, p))

    @classmethod
    def load(cls, path: Path) -> ConceptTable:
        """Read what `save` wrote."""
        import pyarrow.parquet as pq

        table = pq.read_table(path)
        return cls(**{f.name: torch.tensor(table[f.name].to_numpy()) for f in fields(cls)})


def score_concepts(
    features: Features,
    dictionary_cd: Tensor,
    pairs_n2: Tensor,
    negatives_n2: Tensor,
    negatives_centred_n2: Tensor,
) -> ConceptTable:
    """All scores from the calibration split.

    Args:
        features: pooled codes and kinds of the items.
        dictionary_cd: the SAE's dictionary D.
        pairs_n2: (query, relevant document) items, one a text and the other an image.
        negatives_n2: (query, hard negative) items by the raw embedding.
        negatives_centred_n2: the same by the centred embedding.
    """
    codes, kinds_n = features.codes, features.kinds_n
    text_c = codes[(kinds_n == 0).nonzero()[:, 0]].mean()
    image_c = codes[(kinds_n == 1).nonzero()[:, 0]].mean()
    both_c = codes[(kinds_n == 2).nonzero()[:, 0]].mean()
    means_kc = torch.stack([text_c, image_c, both_c])
    zero_kc = torch.zeros_like(means_kc)
    total_c = text_c + image_c
    raw_c = contribution(codes, kinds_n, zero_kc, dictionary_cd, pairs_n2)
    raw_negative_c = contribution(codes, kinds_n, zero_kc, dictionary_cd, negatives_n2)
    centred_c = contribution(codes, kinds_n, means_kc, dictionary_cd, pairs_n2)
    centred_negative_c = contribution(codes, kinds_n, means_kc, dictionary_cd, negatives_centred_n2)
    return ConceptTable(
        energy=codes.mean(),
        modality=torch.where(total_c > 0, text_c / total_c.clamp(min=1e-30), torch.tensor(0.5)),
        bridge=bridge_scores(codes, kinds_n, dictionary_cd, pairs_n2),
        attribution=raw_c,
        discriminative=raw_c - raw_negative_c,
        discriminative_centred=centred_c - centred_negative_c,
    )


def contribution(
    codes: Codes,
    kinds_n: Tensor,
    means_kc: Tensor,
    dictionary_cd: Tensor,
    pairs_n2: Tensor,
    chunk: int = 256,
) -> Tensor:
    """What each concept adds to the inner products of pairs, (c,): E[a * (M b) + b * (M a)].

    a and b are the codes of a pair's items less their kind's mean in `means_kc`; M = D D^T is
    never built (M b = D (b D)). The entries sum to twice the mean inner product.
    """
    total_c = torch.zeros(codes.n_concepts)
    for start in range(0, len(pairs_n2), chunk):
        part_n2 = pairs_n2[start : start + chunk]
        a_nc, b_nc = (codes[side].dense() - means_kc[kinds_n[side].long()] for side in part_n2.T)
        a_hat_nd, b_hat_nd = a_nc @ dictionary_cd, b_nc @ dictionary_cd
        total_c += (a_nc * (b_hat_nd @ dictionary_cd.T)).sum(0)
        total_c += (b_nc * (a_hat_nd @ dictionary_cd.T)).sum(0)
    return total_c / max(len(pairs_n2), 1)


def bridge_scores(
    codes: Codes, kinds_n: Tensor, dictionary_cd: Tensor, pairs_n2: Tensor, block: int = 1024
) -> Tensor:
    """Row sums plus column sums of |B|, in blocks of rows, (c,)."""
    first_is_image_n = kinds_n[pairs_n2[:, 0]] == 1
    image_n = torch.where(first_is_image_n, pairs_n2[:, 0], pairs_n2[:, 1])
    text_n = torch.where(first_is_image_n, pairs_n2[:, 1], pairs_n2[:, 0])
    z_image_nc, z_text_nc = codes[image_n].dense(), codes[text_n].dense()
    score_c = torch.zeros(codes.n_concepts)
    for start in range(0, codes.n_concepts, block):
        rows = slice(start, start + block)
        b_rc = z_image_nc[:, rows].T @ z_text_nc / len(pairs_n2)
        b_rc *= (dictionary_cd[rows] @ dictionary_cd.T).abs()
        score_c[rows] += b_rc.sum(1)
        score_c += b_rc.sum(0)
    return score_c
