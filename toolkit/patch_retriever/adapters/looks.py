"""What is seen of an adapter's training: looks at validation, and what became of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Look:
    """What a look at validation saw: the step, means since the last look of the losses and of the
    shares of energy in concepts to grow and to shrink (training items), and on validation the
    score and R@1. `seconds` of training so far."""

    step: int
    contrastive: float
    rebalancing: float
    retention: float
    up_share: float
    down_share: float
    validation_score: float
    validation_r1: float
    seconds: float

    def to_text(self) -> str:
        """For a line of progress."""
        losses = (
            f"contrastive {self.contrastive:.3f}, rebalancing {self.rebalancing:.3f}, "
            f"retention {self.retention:.4f}; "
        )
        shares = f"share of energy to grow {self.up_share:.1%}, to shrink {self.down_share:.1%}; "
        return (
            f"step {self.step}: {losses if self.step else ''}{shares if self.up_share else ''}"
            f"validation score {100 * self.validation_score:.1f}, "
            f"R@1 {100 * self.validation_r1:.1f}"
        )


Watch = Callable[[Look], None]


@dataclass(frozen=True)
class Training:
    """A finished training; `best` is the number of the best look, `best_weights` are its."""

    looks: tuple[Look, ...]
    best: int
    best_weights: dict[str, Tensor]
    n_parameters: int
    n_pairs: int

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, without times: the same training gives the same."""
        looks = [asdict(look) for look in self.looks]
        return {
            "looks": [{k: v for k, v in look.items() if k != "seconds"} for look in looks],
            "best_step": self.looks[self.best].step,
            "parameters": self.n_parameters,
            "pairs": self.n_pairs,
        }
