"""The settings of an SAE's training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field


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
    steps: Annotated[int, Field(ge=1)] = 600
    batch_size: Annotated[int, Field(ge=1)] = 1024
    """Tokens per step, of all processes together."""
    lr: Annotated[float, Field(ge=0)] = 2e-3
    warmup: Annotated[int, Field(ge=1)] = 20
    """Steps until the learning rate is reached; in the last fifth of all steps it falls to zero."""
    dead_after: Annotated[int, Field(ge=1)] = 60
    """Steps without firing after which a concept is dead and trained on what is left over."""
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
