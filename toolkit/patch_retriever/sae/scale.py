"""The scale that every token has of its own.

Norms of a real language model's residual stream differ a hundredfold between tokens, and an SAE
without a scale per token spends itself on the largest of them. With `input_scale` "token" an SAE
sees every token standardised over its dimensions, as SAELens' `layer_norm` does
(`_setup_activation_normalization` in saes/sae.py of 6.54).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

InputScale = Literal["none", "token"]
"""none: activations go in as they are. token: each is standardised over its dimensions."""

EPSILON = 1e-5
"""Added to the standard deviation before it divides."""


def token_scale(x_nd: Tensor) -> Tensor:
    """The scale of every token, (...): its standard deviation over its dimensions (d - 1)."""
    return x_nd.std(-1)


def standardised(x_nd: Tensor) -> Tensor:
    """(x - mean) / (std + 1e-5) of every token (..., d) over its dimensions."""
    return (x_nd - x_nd.mean(-1, keepdim=True)) / (token_scale(x_nd)[..., None] + EPSILON)


def scaled_input(x_nd: Tensor, input_scale: InputScale) -> Tensor:
    """What an SAE of this input scale multiplies with its encoder, (..., d)."""
    return standardised(x_nd) if input_scale == "token" else x_nd
