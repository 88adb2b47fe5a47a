"""Which kind of source a user means."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from pathlib import Path

from patch_retriever.containers.hf_datasets import DATASETS
from patch_retriever.errors import UserError
from patch_retriever.pictures.picture import PICTURE_SUFFIXES
from patch_retriever.retrieval.readers.sources.folders import PictureFolder
from patch_retriever.retrieval.readers.sources.hub_rows import DatasetRows
from patch_retriever.retrieval.readers.sources.parquet import ParquetFiles
from patch_retriever.retrieval.readers.sources.rows import Reading, Source
from patch_retriever.retrieval.readers.sources.tables import Csv, JsonLines
from patch_retriever.retrieval.readers.sources.tars import TarShards

TABLES = ("pairs.jsonl", "metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Tables that tell of the pictures in their folder; `metadata` as `datasets` reads it."""


def open_source(location: str, reading: Reading, paired: bool = True) -> Source:
    """Rows of pictures, texts or both.

    Args:
        location: a JSON-lines, CSV, TSV, Parquet or tar file; several Parquet or tar files as a
            pattern (`shards/{0000..0031}.tar`, `data/*.parquet`); `datasets:org/name[/config]
            [:split]`; or a folder that holds one of `TABLES`, pictures, Parquet files, tars, or
            what `save_to_disk` of `datasets` wrote.
        reading: how.
        paired: whether pictures of a folder come with texts; if not, its pictures are taken alone,
            whatever tables lie beside them.

    Raises:
        UserError: there is nothing.
    """
    if location.startswith(DATASETS):
        return DatasetRows(location.removeprefix(DATASETS), reading)
    path = Path(location)
    if path.is_dir():
        return _folder(path, reading, paired)
    if path.is_file():
        return _files([path], reading)
    paths = [Path(name) for name in expand(location)]
    if not paths:
        raise UserError(f"{location}: no such pairs file or folder")
    if gone := [p for p in paths if not p.is_file()]:
        raise UserError(f"{gone[0]}: no such file (of {location})")
    return _files(paths, reading)


def exists(location: str) -> bool:
    """Whether something lies at a path, or matches a pattern."""
    return location.startswith(DATASETS) or Path(location).exists() or bool(expand(location))


def expand(pattern: str) -> list[str]:
    """Paths of a pattern: `{00..11}` and `{a,b}` name files one by one, `*` and `?` match those
    that are there. Nothing for a path that is no pattern."""
    named = list(_braces(pattern))
    if any(letter in pattern for letter in "*?["):
        found = (glob.glob(name, recursive=True) for name in named)  # noqa: PTH207  (may be absolute)
        return sorted(path for paths in found for path in paths)
    return named if named != [pattern] else []


def _braces(pattern: str) -> Iterator[str]:
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        yield pattern
        return
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if ends:
        first, last = ends.groups()
        choices = [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)]
    elif "," in found[1]:
        choices = found[1].split(",")
    else:
        choices = [found[0]]
    for choice in choices:
        for rest in _braces(pattern[found.end() :]):
            yield pattern[: found.start()] + choice + rest


def _folder(folder: Path, reading: Reading, paired: bool) -> Source:
    pictures = PictureFolder(folder, paired)
    has_pictures = any(p.suffix.lower() in PICTURE_SUFFIXES for p in folder.rglob("*"))
    if has_pictures and not paired:
        return pictures
    if tables := [folder / name for name in TABLES if (folder / name).is_file()]:
        return _files(tables[:1], reading)
    if has_pictures:
        return pictures
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return DatasetRows(str(folder), reading)
    for suffix in (".parquet", ".tar"):
        if paths := sorted(folder.rglob(f"*{suffix}")):
            return _files(paths, reading)
    return pictures


def _files(paths: list[Path], reading: Reading) -> Source:
    suffixes = {path.suffix.lower() for path in paths}
    if suffixes == {".parquet"}:
        return ParquetFiles(paths, reading)
    if suffixes == {".tar"}:
        return TarShards(paths, reading)
    if len(paths) > 1:
        raise UserError(f"{paths[0]}: several files are read together if all are Parquet or tar")
    if suffixes <= set(PICTURE_SUFFIXES):
        raise UserError(
            f"{paths[0]}: a picture; give the folder that it lies in, or a file of rows"
        )
    return (Csv if suffixes <= {".csv", ".tsv"} else JsonLines)(paths[0], reading)
