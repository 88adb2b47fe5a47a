"""Adam on parts of parameters, so that an update can follow gradients that come in parts."""

from __future__ import annotations

import torch
from torch import Tensor


class Adam:
    """Adam (Kingma & Ba 2015) by torch's fused kernel, on parts of named parameters."""

    def __init__(
        self,
        parameters: dict[str, Tensor],
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
    ) -> None:
        self.parameters = parameters
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.means = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
        self.squares = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
        self.steps = torch.zeros(())
        self.lr = 0.0

    def state(self) -> dict[str, Tensor]:
        """Moments and the number of steps, by name."""
        means = {f"mean.{name}": tensor for name, tensor in self.means.items()}
        squares = {f"square.{name}": tensor for name, tensor in self.squares.items()}
        return {**means, **squares, "steps": self.steps}

    def begin(self, lr: float) -> None:
        """A new step with this learning rate."""
        self.steps += 1
        self.lr = lr

    def update(self, name: str, gradient: Tensor, part: slice = slice(None)) -> None:
        """Move a part of a parameter by its gradient."""
        from torch.optim.adam import adam

        parameter = self.parameters[name][part]
        adam(
            [parameter],
            [gradient],
            [self.means[name][part]],
            [self.squares[name][part]],
            [],
            [(self.steps - 1).to(parameter.device)],  # the kernel counts this step itself
            fused=True,
            amsgrad=False,
            beta1=self.beta1,
            beta2=self.beta2,
            lr=self.lr,
            weight_decay=0.0,
            eps=self.eps,
            maximize=False,
        )
