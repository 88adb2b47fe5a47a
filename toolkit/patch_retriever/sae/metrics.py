"""How good an SAE is: what it explains, how sparsely, what retrieval keeps, how stable it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from patch_retriever.sae.codes import Codes
from patch_retriever.sae.model import SparseAutoencoder

DENSE = 0.1
"""A concept that is active on more than this share of tokens is dense: it tells little apart."""


CONTENT = ("image", "text")
"""The token roles that headline figures are of: items themselves, not what is written around."""


@dataclass(frozen=True)
class SAEMetrics:
    """Figures of an SAE on tokens that no training saw, sinks left out.

    The headline is over content tokens, images' and texts': template tokens are nearly constant,
    so they hide what an SAE misses. Figures per role (`..._by_role`) are of every role that is
    there; `fvu_by_role` leaves out roles whose tokens are all alike.
    """

    fvu: float
    """Fraction of the content tokens' variance unexplained: 0 is perfect, 1 no better than the
    mean."""
    fvu_by_role: dict[str, float]
    l0: float
    """Active concepts per content token."""
    l0_by_role: dict[str, float]
    cosine: float
    """Mean cosine between content tokens and their reconstructions."""
    cosine_by_role: dict[str, float]
    dead: float
    """Share of concepts that are active on no token, of whatever role."""
    dead_by_role: dict[str, float]
    """Share of concepts that are active on no token of the role."""
    dense: float
    """Share of concepts that are active on more than a tenth of all tokens."""
    neighbours: float
    """Share of a content token's 10 nearest by cosine that reconstructions keep."""
    tokens: int
    """How many tokens these figures are from."""
    tokens_by_role: dict[str, int]

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
    """All figures on activations (n, d) with the numbers of their roles (n,).

    Where no token is of an image or a text, the headline is over all of them.
    """
    codes = sae.codes(x_nd)
    out_nd = sae.decode(codes, x_nd)
    named = {name: torch.eq(roles_n, number) for number, name in enumerate(role_names)}
    rows = {name: is_n.nonzero()[:, 0] for name, is_n in named.items() if is_n.any()}
    content = [rows[name] for name in CONTENT if name in rows]
    content_m = torch.cat(content).sort().values if content else torch.arange(len(x_nd))
    cosine_n = torch.nn.functional.cosine_similarity(x_nd, out_nd)

    def is_silent(codes: Codes) -> float:
        return float((codes.counts() == 0).float().mean())

    return SAEMetrics(
        fvu=fvu(x_nd[content_m], out_nd[content_m]),
        fvu_by_role={
            name: fvu(x_nd[rows_m], out_nd[rows_m])
            for name, rows_m in rows.items()
            if (x_nd[rows_m] != x_nd[rows_m[0]]).any()
        },
        l0=codes[content_m].l0,
        l0_by_role={name: codes[rows_m].l0 for name, rows_m in rows.items()},
        cosine=float(cosine_n[content_m].mean()),
        cosine_by_role={name: float(cosine_n[rows_m].mean()) for name, rows_m in rows.items()},
        dead=is_silent(codes),
        dead_by_role={name: is_silent(codes[rows_m]) for name, rows_m in rows.items()},
        dense=float((codes.counts() > DENSE * len(x_nd)).float().mean()),
        neighbours=neighbour_recall(x_nd[content_m], out_nd[content_m]),
        tokens=len(x_nd),
        tokens_by_role={name: len(rows_m) for name, rows_m in rows.items()},
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
