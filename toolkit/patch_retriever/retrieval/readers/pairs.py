"""A user's own pictures with texts: every row checked, every picture opened once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from patch_retriever.containers.hf_datasets import DATASETS
from patch_retriever.errors import UserError
from patch_retriever.files import value_hash
from patch_retriever.pictures.picture import PictureFile
from patch_retriever.progress import Progress, no_progress
from patch_retriever.retrieval.pairs import SHARES, Pair, pairs_collection, split_pairs
from patch_retriever.retrieval.readers.options import ReadOptions
from patch_retriever.retrieval.readers.sources import open_source
from patch_retriever.retrieval.readers.sources.rows import AS_USUAL, Reading, Row
from patch_retriever.retrieval.tasks import RetrievalTask
from patch_retriever.texts import shows, text_fault

MIN_PAIRS = 50


@dataclass(frozen=True)
class PairsRead:
    """All usable pairs, and one line for each that `skip_bad` left out."""

    pairs: tuple[Pair, ...]
    skipped: tuple[str, ...]


def read_pairs(
    source: str | Path,
    skip_bad: bool = False,
    progress: Progress = no_progress,
    reading: Reading = AS_USUAL,
    least: int = MIN_PAIRS,
) -> PairsRead:
    """Read and check pairs; every picture is decoded once, so that a bad one is found now.

    No picture's bytes stay in memory.

    Args:
        source: what `open_source` opens: rows of a picture, or a list of pictures, and a text, or a
            list of texts, each of which makes a pair.
        skip_bad: leave out rows that cannot be used, instead of stopping at the first.
        progress: wraps the rows to show progress.
        reading: names of columns, where pictures lie, whether they may be downloaded.
        least: how many pairs are needed.

    Raises:
        UserError: nothing there, nothing in it, a bad row or picture, fewer than `least` pairs.
    """
    rows = list(open_source(str(source), reading).rows())
    if not rows:
        raise UserError(
            f"{source}: no pairs in it; give one JSON object a line, "
            '{"image": "a.jpg", "text": "what it shows"}, or pictures with .txt files beside them'
        )
    pairs: list[Pair] = []
    skipped: list[str] = []
    for row in progress(rows, len(rows)):
        try:
            pairs.extend(_checked(row, reading))
        except UserError as error:
            if not skip_bad:
                raise UserError(f"{error}; mend it or pass --skip-bad") from None
            skipped.append(str(error))
    if len(pairs) < least:
        left_out = f" ({len(skipped)} left out)" if skipped else ""
        raise UserError(
            f"{source}: {len(pairs)} usable pairs{left_out}, at least {least} are needed "
            "to fit, choose and test"
        )
    return PairsRead(tuple(pairs), tuple(skipped))


def _checked(row: Row, reading: Reading) -> Iterator[Pair]:
    """The pairs of a row, one for each of its texts."""
    if row.fault:
        raise UserError(row.fault)
    if not row.pictures:
        raise UserError(f"{row.where}: no image (under {', '.join(reading.image_columns)})")
    texts = row.text if isinstance(row.text, list) else [row.text]
    if not texts or not all(isinstance(text, str) and shows(text) for text in texts):
        raise UserError(f"{row.where}: no text (under {', '.join(reading.text_columns)})")
    if (fault := next(filter(None, map(text_fault, texts)), None)) is not None:
        raise UserError(f"{row.where}: {fault}")
    try:
        for picture in row.pictures:
            picture.open()
        contents = [picture.content_hash() for picture in row.pictures]
    except UserError as error:
        line = str(error)
        raise UserError(line if line.startswith(row.where) else f"{row.where}: {line}") from None
    first, *more = row.pictures
    content = value_hash(contents) if more else contents[0]
    for text in texts:
        yield Pair(first, text.strip(), content, tuple(more))


def pairs_fingerprint(source: str | Path, reading: Reading = AS_USUAL) -> str:
    """Changes when a row is added, removed or edited, or when a file with pictures changes."""
    opened = open_source(str(source), reading)
    rows = []
    for row in opened.rows():
        paths = [p.path if isinstance(p, PictureFile) else None for p in row.pictures]
        pictures = [[p.name, _stat(path)] for p, path in zip(row.pictures, paths, strict=True)]
        rows.append([row.where, str(row.text), pictures])
    return value_hash([rows, [[str(path), _stat(path)] for path in opened.containers]])


def _stat(path: Path | None) -> list[int] | None:
    if path is None or not path.is_file():
        return None
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def read_pairs_tasks(location: str, options: ReadOptions) -> list[RetrievalTask]:
    """t->i and i->t over a split of pairs, or over all of them (`options.split` is `all`).

    Raises:
        UserError: the pairs cannot be used, or there is no such split.
    """
    names = (*SHARES, "all")
    if options.split not in names:
        raise UserError(f"{location}: no split {options.split!r}; pairs have {', '.join(names)}")
    reading = Reading.choose(
        options.image_column, options.text_column, options.images, options.allow_urls
    )
    whole = options.split == "all"
    read = read_pairs(location, options.skip_bad, reading=reading, least=1)
    if not whole and len(read.pairs) < MIN_PAIRS:
        raise UserError(
            f"{location}: {len(read.pairs)} usable pairs, at least {MIN_PAIRS} are needed to split "
            "them; --split all takes all of them, where they are there for testing only"
        )
    pairs = read.pairs if whole else split_pairs(read.pairs, options.seed)[options.split]
    tasks = pairs_collection(options.split, pairs).retrieval_tasks()
    return [replace(task, skipped=read.skipped) for task in tasks]


def read_datasets_tasks(location: str, options: ReadOptions) -> list[RetrievalTask]:
    """The same over a dataset of the `datasets` library."""
    return read_pairs_tasks(f"{DATASETS}{location}", options)
