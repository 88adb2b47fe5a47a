"""JumpReLU: a learned threshold per concept (Rajamanoharan et al. 2024, arXiv 2407.14435)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patch_retriever.sae.architectures.base import Architecture
from patch_retriever.sae.ops import Entries, PreActivations, above


@dataclass(frozen=True)
class JumpReLU(Architecture):
    """Thresholds are parameters, trained through a window of width `bandwidth` around them.

    They begin where BatchTopK with the same k would have its one threshold, so training is sparse
    from the first step, and are learned as they are, not as logarithms (which Adam cannot move).
    The penalty (L0 / k - 1)^2 holds the mean number of active concepts at k.
    """

    bandwidth: float = 0.05
    """Width of the window, where tokens have a mean square norm of one."""
    l0_weight: float = 1.0

    name = "jumprelu"
    threshold = "learned"

    def __post_init__(self) -> None:
        if not self.bandwidth > 0:
            raise ValueError(f"bandwidth {self.bandwidth} must be positive")
        if not self.l0_weight >= 0:
            raise ValueError(f"l0_weight {self.l0_weight} must not be negative")

    def select(self, pre_activations: PreActivations, threshold_c: Tensor) -> Entries:
        """Everything above the window's lower edge (and a margin for a rounded product)."""
        edge_c1 = (threshold_c - self.bandwidth).to(pre_activations.b_c.dtype)[:, None]
        tokens_e, concepts_e, _ = above(pre_activations, edge_c1)
        return Entries(tokens_e, concepts_e, pre_activations.n)

    def activate(self, pre_e: Tensor, threshold_e: Tensor) -> Tensor:
        """u where u > threshold, else 0; its pseudo-derivative moves the threshold (eq. 11)."""
        return _Jump.apply(pre_e, threshold_e, self.bandwidth)

    def sparsity_loss(self, pre_e: Tensor, threshold_e: Tensor, main_e: Tensor, n: int) -> Tensor:
        """l0_weight * (L0 / k - 1)^2, L0 the mean number of active concepts (eq. 12)."""
        l0 = (_Step.apply(pre_e, threshold_e, self.bandwidth) * main_e).sum() / n
        return self.l0_weight * (l0 / self.k - 1).square()


def _in_window(pre_e: Tensor, threshold_e: Tensor, bandwidth: float) -> Tensor:
    """The rectangle kernel K((u - threshold) / bandwidth)."""
    return ((pre_e - threshold_e).abs() < bandwidth / 2).to(pre_e.dtype)


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre_e: Tensor, threshold_e: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_e, threshold_e)
        ctx.bandwidth = bandwidth
        return pre_e * (pre_e > threshold_e)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        pre_e, threshold_e = ctx.saved_tensors
        window_e = _in_window(pre_e, threshold_e, ctx.bandwidth)
        gradient_e = gradients[0]
        to_threshold_e = -threshold_e / ctx.bandwidth * window_e * gradient_e
        return gradient_e * (pre_e > threshold_e), to_threshold_e, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre_e: Tensor, threshold_e: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_e, threshold_e)
        ctx.bandwidth = bandwidth
        return (pre_e > threshold_e).to(pre_e.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        pre_e, threshold_e = ctx.saved_tensors
        window_e = _in_window(pre_e, threshold_e, ctx.bandwidth)
        return None, -window_e / ctx.bandwidth * gradients[0], None
