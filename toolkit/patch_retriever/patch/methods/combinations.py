"""Pairs of methods: concepts, then geometry or an alignment; ReAlign, then Procrustes."""

from __future__ import annotations

from collections.abc import Iterator

from patch_retriever.patch import fit
from patch_retriever.patch.artefact import Patch
from patch_retriever.patch.calibration import Calibration
from patch_retriever.patch.methods.alignment import cca, unaligned
from patch_retriever.patch.methods.gains import strengths_from_gains
from patch_retriever.patch.methods.method import Method, one_patch
from patch_retriever.patch.methods.removal import top_concepts
from patch_retriever.patch.operators import Subtract

_FIRSTS = ("gains", "removal")
_SECONDS = ("ReAlign", "ReAlign and Procrustes", "CCA")


def rows(c: Calibration) -> Iterator[Method]:
    """One row: validation chooses the pair, too; of pairs without concepts where the SAE is no
    good."""
    pairs = [("ReAlign", "Procrustes")]
    if not c.sae_problem:
        pairs += [(f, s) for f in _FIRSTS for s in _SECONDS]
    grid = tuple(
        {"first": f, "second": s, "strength": b} for f, s in pairs for b in (0.3, 0.5, 0.8)
    )
    yield Method(
        "pair",
        "best pair of methods",
        "pairs",
        lambda **setting: _pair(c, **setting),
        grid,
        left_out=unaligned(c),
    )


def _pair(c: Calibration, first: str, second: str, strength: float) -> list[Patch]:
    """`strength` is the shrinkage of ReAlign or CCA."""
    if first == "ReAlign":
        return _realigned(c, None, strength, turned=True, reason=first)
    if first == "removal":
        strength_c = top_concepts(c, -c.concepts.discriminative_centred, 64)
    else:
        strength_c = strengths_from_gains(c)
    if not bool(strength_c.any()):
        return []
    subtract = Subtract.from_sae(c.sae, strength_c)
    if second == "CCA":
        weight = 1.0 if c.n_parts > 1 else None
        steps = cca(c, strength, weight, subtract)
        return one_patch(c, *steps, subtract=subtract, reason=first)
    return _realigned(c, subtract, strength, turned=second != "ReAlign", reason=first)


def _realigned(
    c: Calibration, subtract: Subtract | None, beta: float, turned: bool, reason: str
) -> list[Patch]:
    """What `subtract` leaves, whitened per modality, then `turned` by Procrustes or not."""
    vectors = c.vectors(subtract)
    whitening = fit.realign(vectors.statistics("modality"), beta)
    turns = (fit.procrustes(vectors.after(whitening).pairs),) if turned else ()
    return one_patch(c, whitening, *turns, subtract=subtract, reason=reason)
