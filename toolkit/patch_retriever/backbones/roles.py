"""Token roles: what every token of a preprocessed batch stands for, and where a picture's lie."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice, takewhile
from math import isqrt
from typing import TYPE_CHECKING, Any

import torch

from patch_retriever.backbones.families import image_token_id
from patch_retriever.backbones.readout import PROMPT_VARIABLE, has_readout
from patch_retriever.items import KINDS, Kind

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer
    from torch import Tensor

ROLES = ("image", "text", "instruction", "special")
"""Token roles; a role's number everywhere is its index here. `special` is also the template."""


class TokenRoles:
    """Tells image, text, instruction and special tokens apart in preprocessed batches.

    The template and the instruction are what two different items of one kind share at the start
    and at the end; of these, the instruction is what changes when another prompt is asked for. All
    that a processor writes around and between image tokens is `special`.
    """

    def __init__(self, transformer: Transformer, prompt: str | None = None) -> None:
        """Learn what `transformer` writes around items under the readout that is set.

        Args:
            transformer: the backbone.
            prompt: one that is given at encoding (`encode(..., prompt=)`).
        """
        self._image = image_token_id(transformer.config)
        tokenizer: Any = transformer.tokenizer
        self._special = torch.tensor(sorted(tokenizer.all_special_ids))
        self._frames: dict[Kind, _Frame] = {}
        for kind in KINDS:
            written = self._written(transformer, kind, prompt)
            otherwise = self._written(transformer, kind, prompt and _OTHER, _OTHER)
            self._frames[kind] = _Frame.of(written, otherwise)
            if kind == "image":
                self._image_alone = written[0].after

    def __call__(self, features: dict[str, Any]) -> Tensor:
        """Role numbers, uint8 (n, tokens); padding counts as special."""
        ids_nt, mask_nt = features["input_ids"].cpu(), features["attention_mask"].cpu().bool()
        roles_nt = torch.full(ids_nt.shape, ROLES.index("special"), dtype=torch.uint8)
        for ids_t, mask_t, roles_t in zip(ids_nt, mask_nt, roles_nt, strict=True):
            roles_t[mask_t] = self._roles(ids_t[mask_t])
        return roles_nt

    def _roles(self, ids_t: Tensor) -> Tensor:
        """Role numbers of one item's tokens."""
        item = _Written.of(ids_t.tolist(), self._image)
        kind: Kind = "text"
        if item.before:
            kind = "image" if item.after == self._image_alone else "both"
        frame, n = self._frames[kind], len(ids_t)
        roles_t = torch.full(ids_t.shape, ROLES.index("text"), dtype=torch.uint8)
        roles_t[max(0, n - frame.tail) :] = ROLES.index("instruction")
        roles_t[max(0, n - frame.closing) :] = ROLES.index("special")
        roles_t[: len(item.before) + frame.head] = ROLES.index("special")
        roles_t[frame.before] = ROLES.index("instruction")
        roles_t[len(item.before) :][frame.between] = ROLES.index("instruction")
        roles_t[torch.isin(ids_t, self._special)] = ROLES.index("special")
        roles_t[ids_t == self._image] = ROLES.index("image")
        return roles_t

    def _written(
        self, transformer: Transformer, kind: Kind, prompt: str | None, other: str | None = None
    ) -> list[_Written]:
        """Two items of a kind as they are written; `other` takes the place of any prompt after
        them."""
        from PIL import Image

        image = {"type": "image", "image": Image.new("RGB", (64, 64))}
        texts = [{"type": "text", "text": text} for text in ("one", "two other words")]
        pictures = [] if kind == "text" else [image]
        contents = [[image]] if kind == "image" else [[*pictures, text] for text in texts]
        options: dict[str, Any] = {}
        processor: Any = transformer.processor
        if other is not None and has_readout(processor.chat_template):
            options = {"processing_kwargs": {"chat_template": {PROMPT_VARIABLE: other}}}
        features = transformer.preprocess(
            [[{"role": "user", "content": content}] for content in contents], prompt, **options
        )
        masks_nt = features["attention_mask"].bool()
        return [
            _Written.of(ids_t[mask_t].tolist(), self._image)
            for ids_t, mask_t in zip(features["input_ids"], masks_nt, strict=True)
        ]


_OTHER = "¤"
"""A prompt that has no token in common with any other."""


@dataclass(frozen=True)
class _Written:
    """Token ids of an item: up to its last image token, and after it."""

    before: list[int]
    after: list[int]

    @classmethod
    def of(cls, ids: list[int], image: int | None) -> _Written:
        end = max((i + 1 for i, token in enumerate(ids) if token == image), default=0)
        return cls(ids[:end], ids[end:])


@dataclass(frozen=True)
class _Frame:
    """What surrounds the items of one kind.

    - `head`: tokens between the last picture, or the start, and the item's text.
    - `tail`: tokens after the text.
    - `closing`: those at the end of the tail that are the template's.
    - `before`, `between`: where an instruction before the item stands, from the start, or in the
      head where the family writes pictures first.
    """

    head: int
    tail: int
    closing: int
    before: slice
    between: slice

    @classmethod
    def of(cls, written: list[_Written], otherwise: list[_Written]) -> _Frame:
        """From items as they are written, and from the same under another prompt."""
        head, tail = _ends(written)
        other_head, other_tail = _ends(otherwise)
        if len(written) == 1:  # a picture alone: the tail is where the other prompt sets in
            start = _shared(head, other_head)
            tail, other_tail = tail[start:], other_tail[start:]
            head, other_head = head[:start], other_head[:start]
        closing = _shared(tail[::-1], other_tail[::-1])
        before = _differing(written[0].before, otherwise[0].before)
        return cls(len(head), len(tail), closing, before, _differing(head, other_head))


def _ends(written: list[_Written]) -> tuple[list[int], list[int]]:
    """What items of a kind share after the image, at the start and at the end."""
    a, b = written[0].after, written[-1].after
    return a[: _shared(a, b)], a[len(a) - _shared(a[::-1], b[::-1]) :]


def _differing(a: list[int], b: list[int]) -> slice:
    """Where `a` is not what `b` is, between the same start and the same end."""
    start = _shared(a, b)
    return slice(start, len(a) - _shared(a[start:][::-1], b[start:][::-1]))


def _shared(a: list[int], b: list[int]) -> int:
    """How many ids two lists have in common at their start."""
    return sum(1 for _ in takewhile(lambda ab: ab[0] == ab[1], zip(a, b, strict=False)))


def image_grids(config: Any, features: dict[str, Any]) -> list[tuple[int, int] | None]:
    """Rows and columns of every item's image tokens; None for an item without an image.

    Several pictures are one row.

    Qwen-VL says them (`image_grid_thw`, before its merger). Where every picture becomes a square
    number of tokens in one run, they are its patches row by row. Other layouts (tiles, ends of
    lines) are not known: one row.
    """
    image_nt = features["input_ids"].cpu() == image_token_id(config)
    said = iter(features["image_grid_thw"].tolist()) if "image_grid_thw" in features else None
    pictures_n = features.get("num_images_per_sample")
    grids: list[tuple[int, int] | None] = []
    for row, image_t in enumerate(image_nt):
        position_p = image_t.nonzero()[:, 0]
        n = len(position_p)
        if n == 0:
            grids.append(None)
            continue
        rows, columns = isqrt(n), isqrt(n)
        pictures = 1 if pictures_n is None else int(pictures_n[row])
        if said is not None:
            merged = config.vision_config.spatial_merge_size
            for _, height, width in islice(said, pictures):
                rows, columns = height // merged, width // merged
        in_one_run = int(position_p[-1] - position_p[0]) == n - 1
        of_one_size = "image_sizes" not in features  # LLaVA-NeXT: ends of lines among them
        one_tile = getattr(config, "image_seq_length", None) or n
        tiled = n > one_tile and n % one_tile == 0  # InternVL: one tile after the other
        known = pictures == 1 and rows * columns == n and in_one_run and of_one_size and not tiled
        grids.append((rows, columns) if known else (1, n))
    return grids
