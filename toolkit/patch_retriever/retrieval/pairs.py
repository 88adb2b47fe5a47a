"""A user's own pictures and texts: splitting them, and the tasks over them."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from patch_retriever.errors import UserError
from patch_retriever.items import Item
from patch_retriever.pictures.picture import Picture
from patch_retriever.retrieval.collection import Collection, Task

SHARES = {"calibration": 0.5, "validation": 0.2, "test": 0.3}


@dataclass(frozen=True)
class Pair:
    """A picture, or several, with a text that is true of it. `content` is the hash of the bytes."""

    picture: Picture
    text: str
    content: str
    more_pictures: tuple[Picture, ...] = ()


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
    chosen: dict[str, list[int]] = {split: [] for split in SHARES}
    wanted = {split: share * len(pairs) for split, share in SHARES.items()}
    for r in order:  # to the split that lacks most
        split = max(SHARES, key=lambda s: wanted[s] - len(chosen[s]))
        chosen[split] += groups[r]
    if not all(chosen.values()):
        raise UserError(
            "the pairs cannot be split: nearly all are linked by pictures or texts that they share"
        )
    # in the order of their source, so that shards are read forwards
    return {split: [pairs[i] for i in sorted(numbers)] for split, numbers in chosen.items()}


def pairs_collection(split: str, pairs: Sequence[Pair]) -> Collection:
    """t->i and i->t over pairs; every picture with the same text is relevant to it.

    Items with both (picture and its text) are there to be calibrated on; no task asks for them.
    """
    texts = list(dict.fromkeys(_normal(pair.text) for pair in pairs))
    spoken = {_normal(pair.text): pair.text for pair in reversed(pairs)}
    number = {text: i for i, text in enumerate(texts)}
    text_items = [Item(spoken[text]) for text in texts]
    pictures = {p.content: (p.picture, *p.more_pictures) for p in reversed(pairs)}
    shown = {content: i for i, content in enumerate(dict.fromkeys(p.content for p in pairs))}
    picture_items = [Item.of(None, pictures[content]) for content in shown]
    both_items = [Item(p.text, p.picture, p.more_pictures) for p in pairs]
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
