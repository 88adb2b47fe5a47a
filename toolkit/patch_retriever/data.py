"""Where a build's items come from: the built-in world, or a user's own pairs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from patch_retriever.config import BuildConfig, ScenesSettings
from patch_retriever.files import write_json
from patch_retriever.items import Item
from patch_retriever.pictures.stores import PictureStores, locator
from patch_retriever.progress import Progress
from patch_retriever.retrieval.collection import Collection
from patch_retriever.retrieval.pairs import Pair, pairs_collection, split_pairs, texts_are_shared
from patch_retriever.retrieval.readers.pairs import read_pairs
from patch_retriever.retrieval.readers.sources.rows import Reading

SCENES = "scenes"
SPLITS = ("calibration", "validation", "test")


@dataclass(frozen=True)
class Data:
    """The three splits, and a sentence or two about them for the card."""

    splits: dict[str, Collection]
    about: str
    warning: str = ""

    def items(self) -> tuple[Item, ...]:
        """Those of all splits, one after the other."""
        return tuple(item for split in SPLITS for item in self.splits[split].items)


def scenes_data(sizes: dict[str, int], seed: int) -> Data:
    """The built-in world; a scene's split is a hash of its content."""
    from patch_retriever.scenes.tasks import scenes_collection

    splits = {split: scenes_collection(split, sizes[split], seed) for split in SPLITS}
    about = (
        f"the built-in procedural world, seed {seed}: "
        + ", ".join(f"{sizes[s]} scenes asked about in {s}" for s in SPLITS)
        + f"; galleries of {3 * sizes['test']} items on test, near misses among them."
    )
    return Data(splits, about)


def pairs_reading(config: BuildConfig) -> Reading:
    """How a build reads its pairs."""
    return Reading.choose(config.image_column, config.text_column, allow_urls=config.allow_urls)


def prepare_pairs(config: BuildConfig, folder: Path, progress: Progress) -> None:
    """Read, check and split a user's pairs once; `folder/splits.json` is what later runs read."""
    read = read_pairs(config.pairs, config.skip_bad, progress, pairs_reading(config))
    splits = {
        split: [
            [locator(p.picture), p.text, p.content, *map(locator, p.more_pictures)] for p in pairs
        ]
        for split, pairs in split_pairs(read.pairs, config.seed).items()
    }
    values = {
        "splits": splits,
        "skipped": list(read.skipped),
        "texts_are_shared": texts_are_shared(read.pairs),
    }
    write_json(folder / "splits.json", values)


def pairs_data(folder: Path, built_in_model: bool) -> Data:
    """What `prepare_pairs` wrote, as collections."""
    values = json.loads((folder / "splits.json").read_text())
    stores = PictureStores()
    splits = {
        split: pairs_collection(
            split,
            [
                Pair(stores.picture_at(p), text, content, tuple(map(stores.picture_at, more)))
                for p, text, content, *more in rows
            ],
        )
        for split, rows in values["splits"].items()
    }
    sizes = ", ".join(f"{len(values['splits'][s])} in {s}" for s in SPLITS)
    total = sum(map(len, values["splits"].values()))
    about = f"{total} pairs of the user's: {sizes}, disjoint by picture"
    if values["skipped"]:
        about += f"; {len(values['skipped'])} bad ones left out"
    if values["texts_are_shared"]:
        about += (
            "; most texts belong to several pictures and so occur in every split, "
            "every picture with a query's text counts as relevant"
        )
    warning = ""
    if built_in_model:
        warning = (
            "The built-in model has only ever seen drawn shapes. These numbers show that the "
            "pipeline runs on such data, not what a real MLLM would reach."
        )
    return Data(splits, about + ".", warning)


def all_items(pairs: str) -> list[Item]:
    """Every item of a pairs file or of the built-in world's calibration split, for a training
    that needs no tasks."""
    if pairs == SCENES:
        from patch_retriever.scenes.tasks import scenes_collection

        return list(scenes_collection("calibration", ScenesSettings().calibration, 0).items)
    read = read_pairs(pairs)
    return [
        item
        for pair in read.pairs
        for item in (Item(None, pair.picture, pair.more_pictures), Item(pair.text))
    ]
