"""What a run needs, from the model's config and the data's sizes, before anything is loaded."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from paper.concepts import EPOCHS
from paper.official import POOLINGS, PaperModel
from paper.settings import REMOVAL_TASK, SHOWN_TASKS, Settings
from patch_retriever.backbones.load import pinned
from patch_retriever.backbones.strict import strict_loading
from patch_retriever.errors import UserError
from patch_retriever.items import KINDS
from patch_retriever.retrieval.tasks import RetrievalTask

TEXT_TOKENS = 60
"""About how many a text with its prompt and template is."""
CAPTIONS = 5
"""Of a picture of COCO's."""
RATE = 1e14
"""Operations a second that hours are stated for; an H100 does about that with batches of a few."""
GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """Of a model: its parameters (without the language-model head) and its width."""

    parameters: int
    width: int


@dataclass(frozen=True)
class Size:
    """How much there is of a task or of COCO: items of each kind in `KINDS`, and whether all
    poolings of them are stored."""

    name: str
    items_k: tuple[int, int, int]
    image_tokens: int
    every_pooling: bool = False
    passes: int = 1
    stored: bool = True

    def tokens(self, model: PaperModel) -> int:
        """About how many the model reads."""
        text, image, both = self.items_k
        picture = self.image_tokens
        of_text = TEXT_TOKENS + (model.image_tokens[0] if model.black_for_texts else 0)
        total = text * of_text + (image + both) * (picture + TEXT_TOKENS)
        return self.passes * total

    def bytes(self, width: int) -> int:
        """Of its vectors."""
        each = 4 * width * (len(POOLINGS) if self.every_pooling else 1) + 16
        return sum(self.items_k) * each if self.stored else 0


@dataclass(frozen=True)
class Needs:
    """Bytes and operations."""

    shape: Shape
    weights: int
    disk: int
    memory: int
    device_memory: int
    operations: float

    def lines(self, settings: Settings, sizes: Sequence[Size]) -> list[str]:
        """For people."""
        items = sum(sum(size.items_k) for size in sizes if size.stored)
        memory = f"memory: {self.memory / GIB:.1f} GiB"
        if settings.device != "cpu":
            memory += f"; on {settings.device}: {self.device_memory / GIB:.1f} GiB"
        return [
            f"{settings.weights}: {self.shape.parameters / 1e9:.2f} billion parameters, width "
            f"{self.shape.width}, {self.weights / GIB:.1f} GiB in {settings.dtype}",
            *(
                f"  {size.name}: {sum(size.items_k):,} items, about "
                f"{size.tokens(settings.model) / 1e6:,.1f} million tokens"
                for size in sizes
            ),
            f"to encode: {items:,} items at most (alike ones once)",
            f"disk: {self.disk / GIB:.1f} GiB in {settings.out}, weights and data aside",
            memory,
            f"work: {self.operations / 1e15:,.1f} PFLOP; as an estimate "
            f"{self.operations / RATE / 3600:,.1f} hours at {RATE / 1e12:.0f} TFLOP/s",
        ]

    def check_disk(self, out: Path) -> None:
        """Refuse to begin what cannot end.

        Raises:
            UserError: the disk has not that much left, beside what lies in `out`.
        """
        there = next(path for path in (out, *out.resolve().parents) if path.exists())
        held = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        free = shutil.disk_usage(there).free + held
        if free < self.disk:
            raise UserError(
                f"{out}: {self.disk / GIB:.1f} GiB are needed and {free / GIB:.1f} are there; free "
                "some, name another folder, or make a trial with --limit"
            )


def shape_of(weights: str, revision: str | None = None) -> Shape:
    """Count a model's parameters from its config alone, on no device.

    Raises:
        UserError: no model is there.
    """
    import torch
    from transformers import AutoConfig, AutoModel

    commit = pinned(weights, revision)
    with strict_loading(weights), torch.device("meta"):
        config = AutoConfig.from_pretrained(weights, revision=commit)
        model = AutoModel.from_config(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Shape(parameters, int(config.get_text_config().hidden_size))


def size_of(task: RetrievalTask, model: PaperModel, support: int = 0) -> Size:
    """Of a task, by its direction, and of so many more queries."""
    letters = {"t": 0, "i": 1, "it": 2}
    items_k = [0] * len(KINDS)
    counted = (len(task.queries) + support, len(task.candidates))
    for letter, n in zip(task.direction.split("->"), counted, strict=True):
        items_k[letters.get(letter, 2)] += n  # of a mixed side all count as both
    counts = (items_k[0], items_k[1], items_k[2])
    return Size(task.name, counts, model.image_tokens[0], task.name in SHOWN_TASKS)


def sizes_of_coco(settings: Settings, rows: int) -> list[Size]:
    """The calibration items under all prompts, and the passes of the SAE's training."""
    n = min(rows, settings.n_calibration)
    picture = settings.model.image_tokens[1]
    found = [Size("COCO, calibration", (n, n, 3 * n), picture)]
    if settings.sae is None and REMOVAL_TASK in settings.tasks:
        rows = min(rows, settings.limit or rows)
        items = (CAPTIONS * rows, rows, 0)
        found.append(Size("COCO, training the SAE", items, picture, passes=EPOCHS, stored=False))
    return found


def needs(settings: Settings, shape: Shape, sizes: Sequence[Size]) -> Needs:
    """Bytes and operations, all of them from above where they are not exact."""
    d, model = shape.width, settings.model
    weights = shape.parameters * (4 if settings.dtype == "float32" else 2)
    trains = any(not size.stored for size in sizes)
    dictionary = 4 * 2 * model.expansion * d * d
    disk = sum(size.bytes(d) for size in sizes) + trains * 4 * dictionary
    most = max(sum(size.items_k) for size in sizes)
    calibration = 3 * settings.n_calibration
    # ids and keys; queries; chunks, their copies and torch; a spectrum; calibration in float32 and
    # float64; the SAE's blocks
    memory = 300 * most + 8 * d * min(most, 50_000) + 2 * GIB + 6 * 8 * d * d + 20 * d * calibration
    memory += trains * (3 * GIB // 2 + dictionary)
    training = trains * 4 * dictionary
    device_memory = weights + max(4 * GIB, training)
    if settings.device == "cpu":
        memory += device_memory
    operations = 2.0 * shape.parameters * sum(size.tokens(model) for size in sizes)
    return Needs(shape, weights, disk, memory, device_memory, operations)
