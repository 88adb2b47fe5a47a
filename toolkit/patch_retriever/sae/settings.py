"""The settings of an SAE's training, and their defaults: the only ones there are."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from patch_retriever.sae.scale import InputScale

EPOCHS, LEAST_TOKENS, MOST_TOKENS = 3, 614_400, 2_048_000
"""Tokens that a training sees: those of the store three times, but no fewer and no more than
this."""

POOLED_SHARE = 0.5
"""Tokens that the readout pools are repeated until they are this share of what training sees: a
last-token readout uses one in many; a mean over all tokens is not changed."""


@dataclass(frozen=True)
class SAESettings:
    """How an SAE is trained."""

    __pydantic_config__: ClassVar = {
        "extra": "forbid"
    }  # an unknown key in a config file is an error

    architecture: str = "topk"
    """topk, batch-topk, matryoshka or jumprelu."""
    options: dict[str, Any] = field(default_factory=dict)
    """What only this architecture has: `prefixes`, `bandwidth`, `l0_weight`."""
    expansion: Annotated[int, Field(ge=1)] = 8
    """Concepts per dimension of the activations."""
    k: Annotated[int, Field(ge=1)] = 24
    """Active concepts per token, exactly or on average."""
    input_scale: Literal["auto", "token", "site"] = "auto"
    """token: every token is standardised over its dimensions; site: one mean and one scale for all
    tokens. auto: token after a decoder layer, where norms differ a hundredfold, site at the last
    hidden state, which the model itself has normalised."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """None: as many as the number of tokens asks for (`training_steps`)."""
    batch_size: Annotated[int, Field(ge=1)] = 1024
    """Tokens per step, of all processes together."""
    lr: Annotated[float, Field(ge=0)] | None = None
    """Of Adam; None: what suits the number of concepts (`learning_rate`)."""
    warmup: Annotated[int, Field(ge=1)] = 20
    """Steps until the learning rate is reached; in the last fifth of all steps it falls to zero."""
    dead_after_tokens: Annotated[int, Field(ge=1)] = 61_440
    """Tokens without firing after which a concept is dead and trained on what is left over."""
    k_aux: Annotated[int, Field(ge=1)] = 256
    """Dead concepts that reconstruct the error of each token (AuxK, Gao et al. 2024)."""
    aux_weight: Annotated[float, Field(ge=0)] = 1 / 32
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the product that concepts are selected by; chosen ones are always computed in float32.
    auto: bf16 where the machine has matrix units for it."""
    shared: Literal["none", "iso-energy", "group-sparse"] = "none"
    """How image-text pairs pull concepts together."""
    shared_weight: Annotated[float, Field(ge=0)] = 0.1
    pairs_per_step: Annotated[int, Field(ge=1)] = 64
    """Pairs in every step where concepts are shared."""
    seed: Annotated[int, Field(ge=0)] | None = None
    """Of the weights and the order of tokens; the build's own where none is given."""

    def resolved(self, site: str | None, d: int, steps: int) -> SAESettings:
        """The same with nothing left open, for activations of width d at a site (None: unknown, so
        that all tokens have one scale) and the steps of the training."""
        scale = self.input_scale
        if scale == "auto":
            scale = "token" if site is not None and site.startswith("layers.") else "site"
        lr = self.peak_lr(self.expansion * d)
        return replace(self, input_scale=scale, lr=lr, steps=steps)

    def peak_lr(self, n_concepts: int) -> float:
        """The learning rate between warm-up and decay."""
        return learning_rate(n_concepts) if self.lr is None else self.lr

    @property
    def scale_of_input(self) -> InputScale:
        """What the trained SAE does with its input; settings have to be resolved."""
        return "token" if self.input_scale == "token" else "none"


def learning_rate(n_concepts: int) -> float:
    """2e-3, and above 1,536 concepts less by the square root of their number.

    The fall with the root is sparsify's (trainer.py of 1.3). With 2e-3 for 9,216 concepts half of
    them died on a real language model's residual stream, where 7e-4 left nine in ten alive.
    """
    return 2e-3 * min(1.0, 1536 / n_concepts) ** 0.5


def training_steps(n_tokens: int | None, batch_size: int) -> int:
    """Steps of training on `n_tokens` tokens, each of `batch_size`.

    Three epochs, but at least 614,400 tokens, below which concepts are still moving, and at most
    2,048,000. Where the number is unknown, the least.
    """
    seen = min(max(EPOCHS * (n_tokens or 0), LEAST_TOKENS), MOST_TOKENS)
    return -(-seen // batch_size)
