"""What an architecture decides: which concepts are active, their activations, and the loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from patch_retriever.sae.ops import Entries, PreActivations


@dataclass(frozen=True)
class Architecture(ABC):
    """The training form of an SAE; for inference all of them become JumpReLU SAEs.

    The settings are fields. `k` is the number of active concepts per token: exactly, or on average.
    """

    k: int

    name: ClassVar[str]
    threshold: ClassVar[Literal["per concept", "one", "learned"]]
    """Where the thresholds for inference come from: one per concept at which it is as often active
    as the gate made it, one value for all, or parameters that were trained."""

    @property
    def learns_threshold(self) -> bool:
        """Whether thresholds are parameters."""
        return self.threshold == "learned"

    def prefix_ends(self, c: int) -> list[int]:
        """Ends of the dictionary's prefixes that each reconstruct the token; the last is c."""
        return [c]

    @abstractmethod
    def select(self, pre_activations: PreActivations, threshold_c: Tensor) -> Entries:
        """The entries that may be active; every other code is zero and passes no gradient."""

    def activate(self, pre_e: Tensor, threshold_e: Tensor) -> Tensor:  # noqa: ARG002
        """Activations of selected entries; differentiable."""
        return pre_e.relu()

    def sparsity_loss(
        self,
        pre_e: Tensor,  # noqa: ARG002
        threshold_e: Tensor,  # noqa: ARG002
        main_e: Tensor,  # noqa: ARG002
        n: int,  # noqa: ARG002
    ) -> Tensor | None:
        """What the loss says of the number of active concepts; `main_e` marks what counts."""
        return None
