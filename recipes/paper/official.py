"""How the paper's code embeds an item, wherever that is not how this package does it.

What is said here was read in the official code (github.com/Heinz217/mllm-retrieval-analysis,
retrieve/, dataset/ and collators/), which runs transformers 4.57. Its prompts become part of an
item's text, so that one backbone and one store of embeddings serve all directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from patch_retriever.backbones.pooling import pool, pooling_weights
from patch_retriever.backbones.readout import LAST, PAPER, PAPER_PROMPTS, PLAIN, Prompt, Readout
from patch_retriever.errors import UserError
from patch_retriever.files import value_hash
from patch_retriever.items import Item
from patch_retriever.lazy import Lazy
from patch_retriever.pictures.picture import Picture, PictureBytes, in_memory

if TYPE_CHECKING:
    from PIL import Image
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer

PoolingName = Literal["last", "max", "min", "mean"]
POOLINGS: tuple[PoolingName, ...] = get_args(PoolingName)
"""Table 5's."""


@dataclass(frozen=True)
class PaperModel:
    """One of the paper's four models, and what its part of the official code does by itself."""

    name: str
    weights: str
    """The hub id of the paper's checkpoint."""
    dtype: str
    expansion: int
    """Concepts of the SAE per dimension; the official widths as near as a whole number allows."""
    image_tokens: tuple[int, int]
    """About how many tokens a picture of M-BEIR's (256 pixels high or wide) and of COCO's is."""
    before_norm: bool = False
    """Whether the tokens are read before the final norm, as `hidden_states[-1]` gives them."""
    black_for_texts: bool = False
    """Whether an item without a picture gets a black one of 112 x 112 pixels, whose tokens are
    pooled like all others."""
    side: int | None = None
    """Pictures are first resized to a square of so many pixels (Lanczos)."""
    stripped: bool = False
    """Whether blanks around the input are taken off."""


MODELS = {
    model.name: model
    for model in (
        PaperModel("qwen2-vl", "Qwen/Qwen2-VL-7B-Instruct", "float16", 9, (108, 391)),
        PaperModel(
            "qwen3-vl", "Qwen/Qwen3-VL-8B-Instruct", "float16", 8, (88, 300), before_norm=True
        ),
        PaperModel(
            "paligemma2",
            "google/paligemma2-3b-mix-224",
            "float16",
            9,
            (256, 256),
            black_for_texts=True,
        ),
        PaperModel(
            "chameleon",
            "facebook/chameleon-7b",
            "bfloat16",
            8,
            (1024, 1024),
            side=224,
            stripped=True,
        ),
    )
}


def official_prompt(direction: str) -> Prompt:
    """The prompts of a direction (`t->i` ...); only that of an image with a text ever differs."""
    both = PAPER.both
    if "it" in direction.split("->"):
        role = "query" if direction.startswith("it") else "document"
        both = PAPER_PROMPTS[f"{direction} {role}"]
    return replace(PAPER, name=f"paper {direction}", both=both)


def asked(items: Sequence[Item], prompt: Prompt, model: PaperModel) -> Sequence[Item]:
    """Items as the official code hands them to a model's processor; made when asked for."""
    return Lazy(range(len(items)), lambda i: _asked(items[i], prompt, model))


def _asked(item: Item, prompt: Prompt, model: PaperModel) -> Item:
    said = (item.text or "") + getattr(prompt, item.kind)
    picture = item.picture
    if model.stripped:  # the placeholder of a picture stands before the text
        said = said.strip() if picture is None else said.rstrip()
    if picture is None:
        return Item(said, _black() if model.black_for_texts else None)
    return Item(said, picture if model.side is None else Resized(picture, model.side))


@dataclass(frozen=True)
class Resized:
    """A picture squeezed into a square, whatever its shape."""

    picture: Picture
    side: int

    @property
    def name(self) -> str:
        """The picture's own."""
        return self.picture.name

    def open(self) -> Image.Image:
        """The square in RGB.

        Raises:
            UserError: the picture cannot be read.
        """
        from PIL import Image

        return self.picture.open().resize((self.side, self.side), Image.Resampling.LANCZOS)

    def in_memory(self) -> Resized:
        """Of the picture's bytes: files with many pictures are read by one thread.

        Raises:
            UserError: the picture cannot be read.
        """
        return replace(self, picture=in_memory(self.picture))

    def content_hash(self) -> str:
        """Another one than the picture's."""
        return value_hash([self.picture.content_hash(), self.side, "lanczos"])


def _black() -> Picture:
    from io import BytesIO

    from PIL import Image

    file = BytesIO()
    Image.new("RGB", (112, 112)).save(file, "PNG")
    return PictureBytes("a black picture", file.getvalue())


def load_official(
    model: PaperModel, weights: str, dtype: str, device: str = "cpu", revision: str | None = None
) -> Transformer:
    """The backbone as the official code reads it, to be given `asked` items.

    Raises:
        UserError: it cannot be loaded.
    """
    from patch_retriever.backbones.families import n_layers
    from patch_retriever.backbones.load import load_backbone, set_readout

    transformer = load_backbone(weights, dtype, device, revision)
    last = f"layers.{n_layers(transformer.model) - 1}"
    set_readout(transformer, Readout(PLAIN, last if model.before_norm else LAST))
    return transformer


def with_poolings(transformer: Transformer, poolings: Sequence[PoolingName]) -> SentenceTransformer:
    """The backbone with several poolings side by side, for `Encoder`."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize

    width = int(transformer.get_embedding_dimension())
    return SentenceTransformer(
        modules=[transformer, Poolings(width, poolings), Normalize()],
        device=str(next(transformer.parameters()).device),
    )


class Poolings(nn.Module):
    """Token activations to pooled vectors, one pooling after the other, in float32.

    Every token of the input counts: system turn, template, image, text and instruction.
    """

    def __init__(self, width: int, poolings: Sequence[PoolingName]) -> None:
        super().__init__()
        self.width, self.poolings = width, tuple(poolings)

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """Adds `sentence_embedding`, (n, poolings x d).

        Raises:
            UserError: the activations are no numbers.
        """
        tokens_ntd = features["token_embeddings"].float()
        mask_nt = features["attention_mask"]
        parts = [_pooled(tokens_ntd, mask_nt, name) for name in self.poolings]
        pooled = torch.cat(parts, dim=1)
        if not pooled.isfinite().all():
            raise UserError(
                f"the activations of this model overflow in {features['token_embeddings'].dtype}; "
                "run with --dtype bfloat16"
            )
        return {**features, "sentence_embedding": pooled}

    def get_embedding_dimension(self) -> int:
        """Of all poolings together."""
        return self.width * len(self.poolings)

    def get_config_dict(self) -> dict[str, Any]:
        """What tells one from another."""
        return {"width": self.width, "poolings": list(self.poolings)}


def _pooled(tokens_ntd: Tensor, mask_nt: Tensor, name: PoolingName) -> Tensor:
    if name in ("mean", "last"):
        mode: Any = "mean" if name == "mean" else "lasttoken"
        return pool(tokens_ntd, pooling_weights(mask_nt, mode))
    padding_nt1 = ~mask_nt.bool()[:, :, None]
    if name == "max":
        return tokens_ntd.masked_fill(padding_nt1, -torch.inf).amax(1)
    return tokens_ntd.masked_fill(padding_nt1, torch.inf).amin(1)
