"""Rows of WebDataset shards: `0001.jpg` with `0001.txt` or `0001.json` in tar files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from patch_retriever.containers.tars import TarMember, tar_members, tar_read
from patch_retriever.errors import UserError
from patch_retriever.pictures.picture import PICTURE_SUFFIXES
from patch_retriever.pictures.stores import TarPicture
from patch_retriever.retrieval.readers.sources.rows import Reading, Row


@dataclass(frozen=True)
class _Sample:
    """Members of a tar that belong together, or what is wrong with the tar."""

    tar: Path
    name: str
    parts: dict[str, TarMember]
    fault: str | None = None


@dataclass(frozen=True)
class TarShards:
    """Samples of one shard or several: what the members before the first dot of their file names
    have in common. Only headers are read before a sample is asked for."""

    containers: Sequence[Path]
    reading: Reading

    def rows(self) -> Iterator[Row]:
        """Every sample."""
        return map(self.row, range(len(self._samples)))

    def row(self, key: int) -> Row:
        """The sample of this number."""
        sample = self._samples[key]
        where, own_id = f"{sample.tar}#{sample.name}", f"{sample.tar.name}#{sample.name}"
        if sample.fault:
            return Row(where, key, own_id, fault=sample.fault)
        pictures = [
            TarPicture(sample.tar, member)
            for part, member in sample.parts.items()
            if f".{part}" in PICTURE_SUFFIXES
        ]
        try:
            text = self._text(sample)
        except UserError as error:
            return Row(where, key, own_id, fault=str(error))
        return Row(where, key, own_id, tuple(pictures[:1]), text)

    def _text(self, sample: _Sample) -> object:
        """The text of the member that is one, else what the JSON member says."""
        for name in self.reading.text_columns:
            if name in sample.parts:
                return _decoded(sample.tar, sample.parts[name])
        if "json" not in sample.parts:
            return None
        member = sample.parts["json"]
        try:
            record = json.loads(_decoded(sample.tar, member))
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise UserError(f"{sample.tar}#{member.name}: not a JSON object")
        return self.reading.text(record)

    @cached_property
    def _samples(self) -> list[_Sample]:
        return [sample for path in self.containers for sample in _samples(path)]


def _samples(tar: Path) -> Iterator[_Sample]:
    """The samples of a shard, in the order of their first members; then what is wrong with it."""
    samples: dict[str, _Sample] = {}
    fault = None
    try:
        for member in tar_members(tar):
            if named := re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]*)", member.name):
                name, part = named[1], named[2].lower()
                samples.setdefault(name, _Sample(tar, name, {})).parts[part] = member
    except UserError as error:
        fault = str(error)
    yield from samples.values()
    if fault:
        yield _Sample(tar, "", {}, fault)


def _decoded(tar: Path, member: TarMember) -> str:
    try:
        return tar_read(tar, member).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{tar}#{member.name}: not UTF-8 text ({error})") from None
