"""Concepts that image and text share: a term of the loss on the codes of matched pairs.

A plain SAE tends to learn an idea twice, once for each modality. Both terms reward pairs that use
the same concepts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

SharedKind = Literal["iso-energy", "group-sparse"]


@dataclass(frozen=True)
class SharedConcepts:
    """How pairs pull concepts together."""

    kind: SharedKind
    weight: float

    def penalty(self, a_pc: Tensor, b_pc: Tensor) -> Tensor:
        """The term for codes of p pairs, one side each."""
        term = iso_energy if self.kind == "iso-energy" else group_sparse
        return self.weight * term(a_pc, b_pc)


def iso_energy(a_pc: Tensor, b_pc: Tensor) -> Tensor:
    """Minus the mean cosine of the two sides' codes, without either side's strongest concept.

    Dhimoila et al. 2026 (arXiv 2602.06218): the strongest concept would carry the whole cosine.
    """
    rest_a_pc, rest_b_pc = a_pc.clone(), b_pc.clone()
    for strongest_p1 in (a_pc.argmax(1, keepdim=True), b_pc.argmax(1, keepdim=True)):
        rest_a_pc = rest_a_pc.scatter(1, strongest_p1, 0.0)
        rest_b_pc = rest_b_pc.scatter(1, strongest_p1, 0.0)
    dots_p = (rest_a_pc * rest_b_pc).sum(1)
    norms_p = (rest_a_pc.square().sum(1) * rest_b_pc.square().sum(1) + 1e-12).sqrt()
    return -(dots_p / norms_p).mean()


def group_sparse(a_pc: Tensor, b_pc: Tensor) -> Tensor:
    """Mean over pairs of sum_j sqrt(a_j^2 + b_j^2): one concept on both sides costs less than two.

    The group norm of arXiv 2601.20028 (without its masking of one modality).
    """
    return (a_pc.square() + b_pc.square() + 1e-12).sqrt().sub(1e-6).sum(1).mean()
