"""The settings of an adapter's training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field

AdapterMethod = Literal["lora", "dora", "ia3"]
METHODS: tuple[AdapterMethod, ...] = get_args(AdapterMethod)


@dataclass(frozen=True)
class AdapterSettings:
    """What is trained, on what, and how the losses weigh against each other."""

    __pydantic_config__: ClassVar = {
        "extra": "forbid"
    }  # an unknown key in a config file is an error

    method: AdapterMethod = "lora"
    """LoRA (arXiv 2106.09685), DoRA (2402.09353) or IA3 (2205.05638)."""
    rank: Annotated[int, Field(ge=1)] = 16
    """Of LoRA and DoRA; IA3 has none."""
    scale: Annotated[float, Field(gt=0)] = 2.0
    """Of their product: alpha / rank."""
    projector: bool = False
    """Adapt the projector, too, and not the language model's layers alone."""
    pairs: str | None = None
    """What is trained on, if not the build's calibration split: pairs as `build --pairs` takes."""
    with_patch: bool = True
    """Train through the patch that was selected; without it the adapter sees the plain readout."""
    merge: bool = True
    """Export merged weights; else the base's, with the adapter beside them."""
    steps: Annotated[int, Field(ge=1)] = 500
    lr: Annotated[float, Field(gt=0)] = 1e-3
    warmup: Annotated[int, Field(ge=0)] = 20
    """Steps until the learning rate is reached; from there it falls to zero along a cosine."""
    batch_size: Annotated[int, Field(ge=2)] = 24
    """Pairs that are contrasted with each other."""
    hard_negatives: Annotated[int, Field(ge=0)] = 2
    """Wrong documents that each pair brings along, of those that looked most like the answer."""
    chunk_size: Annotated[int, Field(ge=1)] = 64
    """Items in a forward pass with gradients: memory goes with it, the loss does not."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Batches whose gradients make one step; each is contrasted within itself."""
    gradient_checkpointing: bool = False
    """Compute activations again on the way back instead of keeping them."""
    temperature: Annotated[float, Field(gt=0)] = 0.05
    contrastive: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the contrastive loss."""
    rebalancing: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the concept rebalancing loss."""
    shift: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """How far concepts' energy is to be rebalanced (`ConceptGroups`)."""
    retention: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the loss that keeps what the model says about pictures."""
    captions: Annotated[int, Field(ge=1)] = 32
    """Captions that it is kept on."""
    captions_per_step: Annotated[int, Field(ge=1)] = 2
    validate_every: Annotated[int, Field(ge=1)] = 50
    """Steps between looks at the validation split; a stopped training goes on from the last."""
    patience: Annotated[int, Field(ge=1)] = 4
    """Looks without a better one after which the training ends."""
    seed: Annotated[int, Field(ge=0)] | None = None
    """Of the weights and the order of pairs; the build's own where none is given."""

    def __post_init__(self) -> None:
        if not (self.contrastive or self.rebalancing):
            raise ValueError("contrastive and rebalancing are both 0: nothing to train for")
