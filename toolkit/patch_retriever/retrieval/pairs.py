"""A user's own pictures and texts: reading, checking, splitting, and the tasks over them."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from patch_retriever.errors import UserError
from patch_retriever.files import file_hash, value_hash
from patch_retriever.items import Item
from patch_retriever.pictures import PICTURE_SUFFIXES, PictureFile
from patch_retriever.progress import Progress, no_progress
from patch_retriever.retrieval.collection import Collection, Task

MIN_PAIRS = 50
SHARES = {"calibration": 0.5, "validation": 0.2, "test": 0.3}


@dataclass(frozen=True)
class Pair:
    """A picture with a text that is true of it. `content` is the hash of the picture's bytes."""

    picture: PictureFile
    text: str
    content: str


@dataclass(frozen=True)
class PairsRead:
    """All usable pairs, and one line for each that `skip_bad` left out."""

    pairs: tuple[Pair, ...]
    skipped: tuple[str, ...]


def read_pairs(
    source: Path,
    skip_bad: bool = False,
    progress: Progress = no_progress,
) -> PairsRead:
    """Read and check pairs; every picture is decoded once, so that a bad one is found now.

    Args:
        source: a JSON-lines file of `{"image": path, "text": ...}` (paths relative to the file),
            or a folder that holds `pairs.jsonl` or `metadata.jsonl` (with `file_name`), or
            pictures each with a `.txt` of the same name.
        skip_bad: leave out rows that cannot be used, instead of stopping at the first.
        progress: wraps the rows to show progress.

    Raises:
        UserError: nothing there, nothing in it, a bad row or picture, fewer than 50 pairs.
    """
    rows = list(_rows(source))
    if not rows:
        raise UserError(
            f"{source}: no pairs in it; give one JSON object a line, "
            '{"image": "a.jpg", "text": "what it shows"}, or pictures with .txt files beside them'
        )
    pairs: list[Pair] = []
    skipped: list[str] = []
    for where, picture, text in progress(rows, len(rows)):
        try:
            pairs.append(_check(where, picture, text))
        except UserError as error:
            if not skip_bad:
                raise UserError(f"{error}; mend it or pass --skip-bad") from None
            skipped.append(str(error))
    if len(pairs) < MIN_PAIRS:
        left_out = f" ({len(skipped)} left out)" if skipped else ""
        raise UserError(
            f"{source}: {len(pairs)} usable pairs{left_out}, at least {MIN_PAIRS} are needed "
            "to fit, choose and test"
        )
    return PairsRead(tuple(pairs), tuple(skipped))


def _rows(source: Path) -> Iterator[tuple[str, Path | None, str | UserError | None]]:
    """(where, picture path, text) of every row; what a row lacks is None.

    For a row that cannot be read, the error stands in the place of the text.
    """
    if not source.exists():
        raise UserError(f"{source}: no such pairs file or folder")
    if source.is_dir():
        tables = [source / name for name in ("pairs.jsonl", "metadata.jsonl")]
        found = [table for table in tables if table.is_file()]
        if not found:
            for path in sorted(
                p for p in source.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES
            ):
                text = path.with_suffix(".txt")
                said: str | UserError | None
                try:
                    said = text.read_text(encoding="utf-8") if text.is_file() else None
                except (UnicodeDecodeError, OSError) as error:
                    said = UserError(f"{text}: not a UTF-8 text file ({error})")
                yield str(path), path, said
            return
        source = found[0]
    try:
        lines = source.read_text(encoding="utf-8-sig").split("\n")
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{source}: not a UTF-8 text file ({error})") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{source}:{number}"
            try:
                row = json.loads(line)
                image = row.get("image", row.get("file_name"))
                text = row.get("text")
            except (ValueError, AttributeError):
                example = '{"image": ..., "text": ...}'
                yield where, None, UserError(f"{where}: not a JSON object like {example}")
                continue
            named = source.parent / image if isinstance(image, str) and image else None
            yield where, named, text if isinstance(text, str) else None


def pairs_fingerprint(source: Path) -> str:
    """Changes when a row is added, removed or edited, or when a picture's file changes."""
    rows = []
    for where, path, text in _rows(source):
        stat = path.stat() if path is not None and path.is_file() else None
        rows.append([where, text and str(text), stat and stat.st_size, stat and stat.st_mtime_ns])
    return value_hash(rows)


def _check(where: str, path: Path | None, text: str | UserError | None) -> Pair:
    if isinstance(text, UserError):
        raise text
    if path is None:
        raise UserError(f"{where}: no image")
    if text is None or not text.strip():
        raise UserError(f"{where}: no text")
    picture = PictureFile(path)
    try:
        picture.open()
    except UserError as error:
        raise UserError(f"{where}: {error}" if where != str(path) else str(error)) from None
    return Pair(picture, text.strip(), file_hash(path))


def texts_are_shared(pairs: Sequence[Pair]) -> bool:
    """Whether most pairs share their text with another: such texts occur in every split."""
    return len({_normal(pair.text) for pair in pairs}) < len(pairs) / 2


def split_pairs(pairs: Sequence[Pair], seed: int) -> dict[str, list[Pair]]:
    """Calibration, validation and test; a picture (by its bytes) is in one split only.

    So is a text, unless most pairs share theirs with another (`texts_are_shared`): then splits
    are disjoint by picture alone.
    """
    shared = texts_are_shared(pairs)
    parent = list(range(len(pairs)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[str, int] = {}
    for i, pair in enumerate(pairs):
        keys = [f"picture {pair.content}"] + ([] if shared else [f"text {_normal(pair.text)}"])
        for key in keys:
            parent[root(i)] = root(first.setdefault(key, i))
    groups: dict[int, list[int]] = defaultdict(list)
    for i in range(len(pairs)):
        groups[root(i)].append(i)
    names = {r: min(pairs[i].content for i in members) for r, members in groups.items()}
    order = sorted(groups, key=lambda r: hashlib.sha256(f"{seed}/{names[r]}".encode()).digest())
    out: dict[str, list[Pair]] = {split: [] for split in SHARES}
    wanted = {split: share * len(pairs) for split, share in SHARES.items()}
    for r in order:  # to the split that lacks most
        split = max(SHARES, key=lambda s: wanted[s] - len(out[s]))
        out[split] += [pairs[i] for i in groups[r]]
    if not all(out.values()):
        raise UserError(
            "the pairs cannot be split: nearly all are linked by pictures or texts that they share"
        )
    return out


def pairs_collection(split: str, pairs: Sequence[Pair]) -> Collection:
    """t->i and i->t over pairs; every picture with the same text is relevant to it.

    Items with both (picture and its text) are there to be calibrated on; no task asks for them.
    """
    texts = list(dict.fromkeys(_normal(pair.text) for pair in pairs))
    spoken = {_normal(pair.text): pair.text for pair in reversed(pairs)}
    number = {text: i for i, text in enumerate(texts)}
    text_items = [Item(spoken[text]) for text in texts]
    pictures = {pair.content: pair.picture for pair in reversed(pairs)}
    shown = {content: i for i, content in enumerate(dict.fromkeys(p.content for p in pairs))}
    picture_items = [Item(picture=pictures[content]) for content in shown]
    both_items = [Item(pair.text, pair.picture) for pair in pairs]
    text_numbers = tuple(range(len(texts)))
    picture_numbers = tuple(range(len(texts), len(texts) + len(shown)))
    of_text: dict[int, set[int]] = defaultdict(set)
    of_picture: dict[int, set[int]] = defaultdict(set)
    for pair in pairs:
        text, picture = number[_normal(pair.text)], shown[pair.content]
        of_text[text].add(picture)
        of_picture[picture].add(text)
    tasks = (
        Task(
            "t->i",
            "t->i",
            text_numbers,
            picture_numbers,
            tuple(tuple(sorted(of_text[t])) for t in text_numbers),
        ),
        Task(
            "i->t",
            "i->t",
            picture_numbers,
            text_numbers,
            tuple(tuple(sorted(of_picture[p])) for p in range(len(shown))),
        ),
    )
    return Collection(split, (*text_items, *picture_items, *both_items), tasks)


def _normal(text: str) -> str:
    return " ".join(text.split()).casefold()
