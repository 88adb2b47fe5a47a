"""Reports made again from a finished build, with other texts than it had."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from patch_retriever.backbones.load import load_backbone
from patch_retriever.config import BuildConfig
from patch_retriever.data import Data, scenes_data
from patch_retriever.report.page import REPORT, write_report
from patch_retriever.retrieval.collection import Collection

ATTACK = '<script>alert("caught")</script><img src=x onerror=alert(1)>'
ENDLESS = "w" * 400


def settings_and_data(build: Path) -> tuple[BuildConfig, Data]:
    """Of a build on the built-in world."""
    config = BuildConfig.model_validate(json.loads((build / "patch-retriever.json").read_text()))
    return config, scenes_data(config.scenes.model_dump(), config.seed)


def report_again(build: Path, folder: Path, text: str = "") -> str:
    """The report of a build on the built-in world, with `text` after every text of its items."""
    config, data = settings_and_data(build)
    if text:
        data = replace(data, splits={s: with_text(c, text) for s, c in data.splits.items()})
    folder.mkdir(exist_ok=True)
    write_report(load_backbone(config.model), data, config, build / "run", folder, build / "patch")
    return (folder / REPORT).read_text(encoding="utf-8")


def with_text(collection: Collection, text: str) -> Collection:
    items = (
        item if item.text is None else replace(item, text=f"{item.text} {text}")
        for item in collection.items
    )
    return replace(collection, items=tuple(items))
