"""Fitting the affine operators: statistics from calibration vectors, closed forms and one that goes
on by a contrastive loss.

Every function takes the statistics of vectors as they are where the operator will stand:
`Statistics` by groups of items, or `PairStatistics`. One object serves all settings: what it holds
is computed when it is first needed, and once.
"""

from patch_retriever.patch.fit.alignment import cca, procrustes, ridge
from patch_retriever.patch.fit.contrastive import (
    ConceptCodes,
    ContrastiveSettings,
    GradedTask,
    contrastive,
)
from patch_retriever.patch.fit.erasure import leace, remove_subspace
from patch_retriever.patch.fit.gate import GateChoice, choose_gate, fit_gate
from patch_retriever.patch.fit.geometry import (
    all_but_the_top,
    centre,
    pca_whiten,
    principal_gains,
    realign,
    standardise,
    weigh,
    zca_whiten,
)
from patch_retriever.patch.fit.statistics import (
    Moments,
    PairStatistics,
    Statistics,
    fitting_device,
)

__all__ = [
    "ConceptCodes",
    "ContrastiveSettings",
    "GateChoice",
    "GradedTask",
    "Moments",
    "PairStatistics",
    "Statistics",
    "all_but_the_top",
    "cca",
    "centre",
    "choose_gate",
    "contrastive",
    "fit_gate",
    "fitting_device",
    "leace",
    "pca_whiten",
    "principal_gains",
    "procrustes",
    "realign",
    "remove_subspace",
    "ridge",
    "standardise",
    "weigh",
    "zca_whiten",
]
