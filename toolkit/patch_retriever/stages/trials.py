"""What methods are chosen on: held-out validation or, where that is small, cross-validation.

With few queries one split of them decides by chance. Then calibration and validation are one set,
which is parted into folds so that no picture is in two: concepts are scored and every method is
fitted on all folds but one and answers the queries of that one against the documents of that one,
for each fold in turn, and all of that again for other folds; what is exported is fitted on all of
them. The SAE and the gate stay as they are. (Scored on calibration alone, concepts are selected by
the pairs that they are then judged on: that cost 3 to 5 points on four seeds of nine in
recipes/small_data.py.)

A fold has few documents, among which R@5 and R@10 say little: methods are judged by the recall at
all cutoffs, `log_recall`. More folds leave more to fit on, and fewer documents to be found among:
with 100 pairs three folds choose better than five, and three times other folds better than once
(docs/methods.md); with 1,000 items methods that need many pairs show it on five folds alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from patch_retriever.concepts.scores import CodesOf
from patch_retriever.data import Data
from patch_retriever.features import Features
from patch_retriever.lazy import Lazy
from patch_retriever.patch.artefact import Patch
from patch_retriever.patch.calibration import Calibration
from patch_retriever.patch.fit import GradedTask
from patch_retriever.patch.methods import Method
from patch_retriever.retrieval.collection import Collection
from patch_retriever.retrieval.metrics import Measure, hits, log_recall
from patch_retriever.stages.scoring import scored

SMALL = 1000
"""Queries on validation below which choices are made by cross-validation."""
REPEATS = 3
"""How often the items are parted into folds: a query meets other documents each time."""
DOCUMENTS = 25
"""Of a fold at least, where that leaves `FEWEST` folds."""
FEWEST = 3
SHARED = -1
"""The fold of items that belong to every fold: texts of pictures in several."""


@dataclass(frozen=True)
class Trial:
    """Methods fitted on some items, and tasks over others by which they are judged; `features`
    are those of the latter, by the patch that they are for, and `numbers_m` what they are called in
    other trials of the same queries (empty: there are none)."""

    methods: tuple[Method, ...]
    features: Callable[[Patch], Features]
    collection: Collection
    numbers_m: tuple[int, ...] = ()


@dataclass(frozen=True)
class HeldOut:
    """The trials by which methods are judged, made when it is their turn, and what queries score in
    them."""

    trials: Sequence[Trial]
    folds: int = 1
    repeats: int = 1
    measure: Measure = hits

    @property
    def about(self) -> dict[str, Any]:
        """As entries of `choice` in `selection.json`."""
        measured = "score" if self.measure is hits else "log recall"
        return {"folds": self.folds, "repeats": self.repeats, "measure": measured}


def fitted_splits(data: Data, n_folds: int) -> tuple[str, ...]:
    """The splits that the exported patch and all rows of the table are fitted on: calibration, and
    validation where that is so small that choices are made by cross-validation."""
    queries = sum(len(task.queries) for task in data.splits["validation"].tasks)
    cross_validated = queries < SMALL and n_folds > 1
    return ("calibration", "validation") if cross_validated else ("calibration",)


def trials(
    calibration: Calibration,
    found: tuple[Method, ...],
    data: Data,
    features: Callable[[Sequence[str], Patch], Features],
    methods: Callable[[Calibration], Iterator[Method]],
    n_folds: int,
    codes: CodesOf = "tokens",
) -> HeldOut:
    """One trial on validation of what was fitted on calibration, or one for every fold, `REPEATS`
    times.

    `found` are the methods fitted on `calibration`, which is of `fitted_splits`; `features`
    gives those of some splits for a patch.
    """
    splits = fitted_splits(data, n_folds)
    if len(splits) == 1:
        validation = ("validation",)
        held_out = data.splits["validation"]
        return HeldOut([Trial(found, lambda patch: features(validation, patch), held_out)])
    collection = Collection.joined([data.splits[split] for split in splits])
    n_folds = folds_of(collection, n_folds)
    fold_rn = [folds(collection, n_folds, calibration.seed, part) for part in range(REPEATS)]

    def trial(number: int) -> Trial:
        part, fold = divmod(number, n_folds)
        fold_n = fold_rn[part]
        fit_m, held_m = (
            torch.from_numpy(np.flatnonzero(rows_n | (fold_n == SHARED)))
            for rows_n in (fold_n != fold, fold_n == fold)
        )
        fitted = part_of(calibration, collection, fit_m, codes)
        asking = set(np.flatnonzero(fold_n == fold).tolist())
        numbers_m = tuple(held_m.tolist())
        return Trial(
            tuple(methods(fitted)),
            lambda patch: features(splits, patch).rows(held_m),
            collection.subset(numbers_m, asking),
            numbers_m,
        )

    return HeldOut(Lazy(range(REPEATS * n_folds), trial), n_folds, REPEATS, log_recall)


def folds_of(collection: Collection, most: int) -> int:
    """How many folds a collection is parted into: `most`, or fewer so that a fold has documents."""
    documents = min(len(task.documents) for task in collection.tasks)
    return min(most, max(FEWEST, documents // DOCUMENTS))


def part_of(
    whole: Calibration, collection: Collection, rows_m: torch.Tensor, codes: CodesOf
) -> Calibration:
    """Of a calibration set (`collection` are its items) some items, the pairs among them, and the
    concepts' scores by these."""
    part, features = collection.subset(rows_m.tolist()), whole.features.rows(rows_m)
    concepts, _ = scored(features, part, whole.sae, codes, "Some folds.")
    return replace(whole, features=features, concepts=concepts, **items_and_pairs(part))


def items_and_pairs(collection: Collection) -> dict[str, Any]:
    """What a `Calibration` holds of a collection: items by role, pairs by direction, tasks."""
    directions = dict.fromkeys(task.direction for task in collection.tasks)
    return {
        "query_items": torch.tensor(sorted({i for t in collection.tasks for i in t.queries})),
        "document_items": torch.tensor(sorted({i for t in collection.tasks for i in t.documents})),
        "pairs": {one: torch.from_numpy(collection.pairs((one,))) for one in directions},
        "tasks": tuple(GradedTask.of(t.queries, t.documents, t.relevant) for t in collection.tasks),
    }


def folds(collection: Collection, k: int, seed: int, part: int = 0) -> np.ndarray:
    """The fold of every item, (n,), folds of nearly equal size; no picture is in two. Another
    `part` of the same seed parts them anew.

    Items stay together that share a picture or a text, or of which one answers the other. Where
    that links nearly all (texts that belong to many pictures), only pictures keep together, and a
    text whose pictures are in several folds is in every one (`SHARED`).
    """
    links = [
        (query, task.documents[answer])
        for task in collection.tasks
        for query, answers in zip(task.queries, task.relevant, strict=True)
        for answer in answers
    ]
    pictures = list(_alike(collection, texts=False))
    group_n = _groups(len(collection.items), [*links, *pictures, *_alike(collection, texts=True)])
    if np.bincount(group_n).max() <= 2 * len(group_n) / k:
        return _dealt(group_n, k, [seed, part])
    fold_n = _dealt(_groups(len(collection.items), pictures), k, [seed, part])
    seen: list[set[int]] = [set() for _ in collection.items]
    alone = [item.picture is None for item in collection.items]
    for pair in links:
        for text, other in (pair, pair[::-1]):
            if alone[text] and not alone[other]:
                seen[text].add(int(fold_n[other]))
    for i, found in enumerate(seen):
        if alone[i]:
            fold_n[i] = found.pop() if len(found) == 1 else SHARED
    return fold_n


def _alike(collection: Collection, texts: bool) -> Iterator[tuple[int, int]]:
    """Links between items that show the same picture, or have the same text."""
    first: dict[str, int] = {}
    for i, item in enumerate(collection.items):
        keys = [item.text.casefold()] if texts and item.text is not None else []
        keys += [] if texts else [picture.content_hash() for picture in item.pictures]
        for key in keys:
            yield i, first.setdefault(key, i)


def _groups(n: int, links: Iterable[tuple[int, int]]) -> np.ndarray:
    """The number of each item's connected component."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ends = np.array(list(links), dtype=np.int64).reshape(-1, 2)
    graph = coo_array((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(n, n))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def _dealt(group_n: np.ndarray, k: int, seed: list[int]) -> np.ndarray:
    """Groups in random order, each to the fold with fewest items."""
    sizes_g = np.bincount(group_n)
    fold_g = np.empty(len(sizes_g), dtype=np.int64)
    held_k = np.zeros(k, dtype=np.int64)
    for group in np.random.default_rng(seed).permutation(len(sizes_g)):
        fold_g[group] = held_k.argmin()
        held_k[fold_g[group]] += sizes_g[group]
    return fold_g[group_n]
