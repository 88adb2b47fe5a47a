"""Selections of concepts by their scores, and random concepts to compare them with."""

from __future__ import annotations

import torch
from torch import Tensor

TEXT_DOMINANT = 0.8
"""Modality score above which a concept is text-dominant."""

UNIMODAL = 0.05
"""Modality score nearer than this to 0 or 1: a concept of one modality (IsoEnergy's bimodal mask,
arXiv 2602.06218)."""


def unimodal(modality_c: Tensor, eps: float = UNIMODAL) -> Tensor:
    """Which concepts fire for one modality only, (c,); never those that do not fire (0.5)."""
    return (modality_c < eps) | (modality_c > 1 - eps)


def like_in_energy(energy_c: Tensor, seed: int, reach: int = 20) -> Tensor:
    """For every concept one of about its energy, (c,): all change places in the order of energy,
    one for one, with others at most `reach` places away. Never depends on what is selected."""
    order = energy_c.argsort(descending=True, stable=True)
    generator = torch.Generator().manual_seed(seed)
    jitter = reach * torch.rand(len(order), generator=generator)
    near = (torch.arange(len(order)) + jitter).argsort(stable=True)
    partner_c = torch.empty_like(order)
    partner_c[order] = order[near]
    return partner_c
