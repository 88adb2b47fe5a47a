"""BatchTopK: the n k largest pre-activations of a batch of n tokens (Bussmann et al. 2024, arXiv
2412.06410)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from patch_retriever.sae.architectures.base import Architecture
from patch_retriever.sae.ops import Entries, PreActivations, topk_of_batch


@dataclass(frozen=True)
class BatchTopK(Architecture):
    """Tokens have k active concepts on average: rich ones more, plain ones fewer."""

    name = "batch-topk"
    threshold = "one"

    def select(self, pre_activations: PreActivations, threshold_c: Tensor) -> Entries:  # noqa: ARG002
        """The n k largest positive ones of the batch."""
        return topk_of_batch(pre_activations, self.k)


@dataclass(frozen=True)
class Matryoshka(BatchTopK):
    """BatchTopK whose first concepts must reconstruct alone as well (Bussmann et al. 2025, arXiv
    2503.17547): the loss is the mean over prefixes of the dictionary, so general concepts come
    first and are not absorbed by special ones.
    """

    prefixes: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
    """Shares of the dictionary, ascending; the last is 1."""

    name = "matryoshka"

    def __post_init__(self) -> None:
        shares = list(self.prefixes)
        ascending = shares == sorted(set(shares))
        if not (shares and ascending and shares[0] > 0 and shares[-1] == 1):
            raise ValueError(f"prefixes {shares} must be positive, ascend and end with 1")

    def prefix_ends(self, c: int) -> list[int]:
        """The shares in concepts, without doubles in a small dictionary."""
        return sorted({max(1, round(share * c)) for share in self.prefixes})
