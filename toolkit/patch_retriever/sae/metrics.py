"""How good an SAE is: what it explains, how sparsely, what retrieval keeps, how stable it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from patch_retriever.sae.model import SparseAutoencoder

DENSE = 0.1
"""A concept that is active on more than this share of tokens is dense: it tells little apart."""


@dataclass(frozen=True)
class SAEMetrics:
    """Figures of an SAE on some tokens."""

    fvu: float
    """Fraction of variance unexplained: 0 is perfect, 1 no better than the mean."""
    fvu_by_role: dict[str, float]
    """The same within the tokens of each role, of those that are not all alike."""
    l0: float
    """Active concepts per token."""
    dead: float
    """Share of concepts that are active on no token."""
    dense: float
    """Share of concepts that are active on more than a tenth of the tokens."""
    cosine: float
    """Mean cosine between activations and reconstructions."""
    neighbours: float
    """Share of the 10 nearest tokens by cosine that reconstructions keep."""
    tokens: int
    """How many tokens these figures are from."""

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


@torch.no_grad()
def measure(
    sae: SparseAutoencoder,
    x_nd: Tensor,
    roles_n: Tensor,
    role_names: tuple[str, ...] = (),
) -> SAEMetrics:
    """All figures on activations (n, d) with the numbers of their roles (n,)."""
    codes = sae.codes(x_nd)
    out_nd = codes.matmul(sae.W_dec_cd) + sae.b_dec_d
    by_role = {}
    for number, name in enumerate(role_names):
        rows_m = torch.eq(roles_n, number).nonzero()[:, 0]
        if len(rows_m) and (x_nd[rows_m] != x_nd[rows_m[0]]).any():
            by_role[name] = fvu(x_nd[rows_m], out_nd[rows_m])
    counts_c = codes.counts()
    return SAEMetrics(
        fvu(x_nd, out_nd),
        by_role,
        codes.l0,
        float((counts_c == 0).float().mean()),
        float((counts_c > DENSE * len(x_nd)).float().mean()),
        float(torch.nn.functional.cosine_similarity(x_nd, out_nd).mean()),
        neighbour_recall(x_nd, out_nd),
        len(x_nd),
    )


def fvu(x_nd: Tensor, out_nd: Tensor) -> float:
    """Sum of squared errors over sum of squared distances from the mean."""
    return float((x_nd - out_nd).square().sum() / (x_nd - x_nd.mean(0)).square().sum())


def neighbour_recall(
    x_nd: Tensor, out_nd: Tensor, k: int = 10, queries: int = 1000, gallery: int = 20_000
) -> float:
    """Retrieval recall of reconstructions against the originals.

    Mean share of a query's k nearest originals (by cosine, itself left out) that are among the k
    nearest reconstructions of its reconstruction; the first rows ask, all (up to `gallery`) answer.
    """
    k = min(k, len(x_nd) - 1)
    if k < 1:
        return 1.0
    found = []
    for rows_nd in (x_nd[:gallery], out_nd[:gallery]):
        unit_nd = torch.nn.functional.normalize(rows_nd, dim=1)
        similar_qn = unit_nd[:queries] @ unit_nd.T
        similar_qn.fill_diagonal_(-torch.inf)
        found.append(similar_qn.topk(k, dim=1).indices)
    return float((found[0][:, :, None] == found[1][:, None, :]).any(2).float().mean())


def stability(first_cd: Tensor, second_cd: Tensor) -> float:
    """Mean cosine of two dictionaries' rows under the best one-to-one matching.

    Stability of Papadimitriou et al. 2025 (arXiv 2504.11695): max over permutations P of
    tr(D1^T P D2) / c, found by the Hungarian method; 1 means the same concepts in another order.
    It needs c^2 doubles and up to c^3 steps: seconds for 8,192 concepts.
    """
    from scipy.optimize import linear_sum_assignment

    unit = torch.nn.functional.normalize
    cosine_cc = (unit(first_cd, dim=1) @ unit(second_cd, dim=1).T).numpy()
    rows, columns = linear_sum_assignment(cosine_cc, maximize=True)
    return float(cosine_cc[rows, columns].mean())
