"""Datasets of the `datasets` library: from the hub, or as they lie in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from patch_retriever.errors import UserError, first_line

DATASETS = "datasets:"
"""How such a source begins: `datasets:org/name[/config][:split]` or `datasets:folder[:split]`."""


def load(location: str) -> Any:
    """A split of a dataset, its rows as Arrow: pictures stay undecoded and on disk.

    Args:
        location: `org/name[/config][:split]` on the hub, or a folder that `save_to_disk` wrote or
            that `load_dataset` reads, perhaps with `:split`. The split may be left out if there is
            one only, and may be a slice (`train[:100]`) unless `save_to_disk` wrote it.

    Raises:
        UserError: `datasets` is not installed, there is no such dataset, or it has several splits.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{DATASETS}{location}: the datasets library is missing; pip install datasets"
        ) from None
    name, split = parts(location)
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        if any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(name)
        elif name and Path(name).exists():
            loaded = datasets.load_dataset(str(Path(name)), split=split)
        else:
            repository, config = _repository(name)
            loaded = datasets.load_dataset(repository, config, split=split)
    except UserError:
        raise
    except Exception as error:  # of the library, of the hub's client or of the system
        raise UserError(f"{DATASETS}{location}: cannot be loaded ({first_line(error)})") from None
    finally:
        if bars:
            datasets.enable_progress_bars()
    if isinstance(loaded, dict):
        if split is None and len(loaded) > 1:
            raise UserError(
                f"{DATASETS}{location}: has the splits {', '.join(loaded)}; "
                f"name one: {DATASETS}{location}:{next(iter(loaded))}"
            )
        if split is not None and split not in loaded:
            raise UserError(f"{DATASETS}{location}: has only the splits {', '.join(loaded)}")
        loaded = loaded[split or next(iter(loaded))]
    elif split is not None and loaded.split is not None and str(loaded.split) != split:
        raise UserError(f"{DATASETS}{location}: is the split {loaded.split}, not {split}")
    return loaded.with_format("arrow")


def parts(location: str) -> tuple[str, str | None]:
    """The name of a dataset, and its split if one is named."""
    if Path(location).exists():
        return location, None
    colons = (i for i, letter in enumerate(location) if letter == ":")
    local = (i for i in colons if Path(location[:i]).exists())
    end = next(local, location.find(":"))  # a split may hold colons (train[:10]), a folder, too
    return (location, None) if end < 0 else (location[:end], location[end + 1 :])


def lasting(location: str) -> str:
    """The same dataset's location, whatever the working folder is."""
    name, split = parts(location)
    if Path(name).exists():
        name = str(Path(name).resolve())
    return name if split is None else f"{name}:{split}"


def _repository(name: str) -> tuple[str, str | None]:
    """Repository and configuration of a hub id."""
    organisation, _, rest = name.partition("/")
    dataset, _, config = rest.partition("/")
    if organisation in ("", ".", "..", "~") or not dataset or "/" in config:
        raise UserError(
            f"{DATASETS}{name}: no such folder; name one, or a hub id (org/name or org/name/config)"
        )
    return f"{organisation}/{dataset}", config or None
