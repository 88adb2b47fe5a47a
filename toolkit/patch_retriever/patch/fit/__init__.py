"""Fitting the affine operators: statistics from calibration vectors, closed forms only.

Every function takes the vectors `x_nd` as they are where the operator will stand. Those without
pairs take `groups`, too: the item numbers of each group that the operator tells apart
(`GROUPS[by]`). A group with too few items takes the statistics of all.
"""

from patch_retriever.patch.fit.alignment import cca, procrustes, ridge
from patch_retriever.patch.fit.erasure import leace, remove_subspace
from patch_retriever.patch.fit.gate import GateChoice, choose_gate, fit_gate
from patch_retriever.patch.fit.geometry import (
    all_but_the_top,
    centre,
    pca_whiten,
    principal_gains,
    realign,
    standardise,
    zca_whiten,
)

__all__ = [
    "GateChoice",
    "all_but_the_top",
    "cca",
    "centre",
    "choose_gate",
    "fit_gate",
    "leace",
    "pca_whiten",
    "principal_gains",
    "procrustes",
    "realign",
    "remove_subspace",
    "ridge",
    "standardise",
    "zca_whiten",
]
