"""Token roles: what every token of a preprocessed batch stands for, and where a picture's lie."""

from __future__ import annotations

from itertools import takewhile
from math import isqrt
from typing import TYPE_CHECKING, Any

import torch

from patch_retriever.backbones.families import image_token_id

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer
    from torch import Tensor

ROLES = ("image", "text", "instruction", "special")
"""Token roles; a role's number everywhere is its index here. `special` is also the template."""


class TokenRoles:
    """Tells image, text, instruction and special tokens apart in preprocessed batches.

    The template and the instruction are what two different items of one kind share at the start
    and at the end. What is before the item is `special`, with all that a processor writes around
    and between image tokens; what is after it is `instruction` up to the first special token,
    where the template goes on.
    """

    def __init__(self, transformer: Transformer) -> None:
        self._image = image_token_id(transformer.config)
        tokenizer: Any = transformer.tokenizer
        self._special = torch.tensor(sorted(tokenizer.all_special_ids))
        texts, both, (self._image_alone,) = self._written(transformer)
        self._ends = {}
        for has_image, (a, b) in ((False, texts), (True, both)):
            tail = _shared(a[::-1], b[::-1])
            words = sum(1 for _ in takewhile(lambda t: t not in self._special, a[len(a) - tail :]))
            self._ends[has_image] = _shared(a, b), tail, tail - words

    def __call__(self, features: dict[str, Any]) -> Tensor:
        """Role numbers, uint8 (n, tokens); padding counts as special."""
        ids_nt = features["input_ids"].cpu()
        mask_nt = features["attention_mask"].cpu().bool()
        image_nt = ids_nt == self._image
        position_nt = mask_nt.cumsum(1)  # from 1
        left_nt = mask_nt.sum(1, keepdim=True) - position_nt + 1  # tokens from here to the end
        written_nt = position_nt - (position_nt * image_nt).amax(1, keepdim=True)  # after the image
        has_image_n1 = image_nt.any(1, keepdim=True)
        alone_n1 = torch.zeros_like(has_image_n1)  # nothing but a picture: all else is prompt
        for row in has_image_n1[:, 0].nonzero()[:, 0].tolist():
            after_t = ids_nt[row, mask_nt[row] & (written_nt[row] > 0)]
            alone_n1[row] = after_t.tolist() == self._image_alone
        roles_nt = torch.full(ids_nt.shape, ROLES.index("text"), dtype=torch.uint8)
        for has_image, (head, tail, closing) in self._ends.items():
            rows_n1 = has_image_n1 == has_image
            roles_nt[rows_n1 & ((left_nt <= tail) | alone_n1)] = ROLES.index("instruction")
            outside_nt = (written_nt <= head) | (left_nt <= closing)
            roles_nt[rows_n1 & outside_nt] = ROLES.index("special")
        roles_nt[torch.isin(ids_nt, self._special)] = ROLES.index("special")
        roles_nt[image_nt] = ROLES.index("image")
        roles_nt[~mask_nt] = ROLES.index("special")
        return roles_nt

    def _written(self, transformer: Transformer) -> list[list[list[int]]]:
        """Token ids after the image, if any: of two texts, of both with an image, of an image."""
        from PIL import Image

        image = {"type": "image", "image": Image.new("RGB", (64, 64))}
        texts = [{"type": "text", "text": text} for text in ("one", "two other words")]
        kinds = [[text] for text in texts], [[image, text] for text in texts], [[image]]
        written: list[list[list[int]]] = []
        for contents in kinds:
            features = transformer.preprocess([[{"role": "user", "content": c}] for c in contents])
            written.append([])
            for ids_t, mask_t in zip(
                features["input_ids"], features["attention_mask"].bool(), strict=True
            ):
                ids = ids_t[mask_t].tolist()
                last = max((i for i, token in enumerate(ids) if token == self._image), default=-1)
                written[-1].append(ids[last + 1 :])
        return written


def _shared(a: list[int], b: list[int]) -> int:
    """How many ids two lists have in common at their start."""
    return sum(1 for _ in takewhile(lambda ab: ab[0] == ab[1], zip(a, b, strict=False)))


def image_grids(config: Any, features: dict[str, Any]) -> list[tuple[int, int] | None]:
    """Rows and columns of every item's image tokens; None for an item without an image.

    Qwen-VL says them (`image_grid_thw`, before its merger). Where every picture becomes a square
    number of tokens in one run, they are its patches row by row. Other layouts (tiles, ends of
    lines) are not known: one row.
    """
    image_nt = features["input_ids"].cpu() == image_token_id(config)
    said = iter(features["image_grid_thw"].tolist()) if "image_grid_thw" in features else None
    grids: list[tuple[int, int] | None] = []
    for image_t in image_nt:
        position_p = image_t.nonzero()[:, 0]
        n = len(position_p)
        if n == 0:
            grids.append(None)
            continue
        rows, columns = isqrt(n), isqrt(n)
        if said is not None:
            merged = config.vision_config.spatial_merge_size
            rows, columns = (length // merged for length in next(said)[1:])
        in_one_run = int(position_p[-1] - position_p[0]) == n - 1
        of_one_size = "image_sizes" not in features  # LLaVA-NeXT: ends of lines among them
        one_tile = getattr(config, "image_seq_length", None) or n
        tiled = n > one_tile and n % one_tile == 0  # InternVL: one tile after the other
        known = rows * columns == n and in_one_run and of_one_size and not tiled
        grids.append((rows, columns) if known else (1, n))
    return grids
