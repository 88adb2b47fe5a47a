"""The bench: one model, the embeddings of its tasks' items, and its trials."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patch_retriever.errors import UserError
from patch_retriever.files import value_hash
from patch_retriever.items import Item
from patch_retriever.lazy import Lazy
from patch_retriever.progress import Progress, Say, no_progress, silent
from patch_retriever.retrieval.comparison.baselines import MOST, Baseline, calibrated, transductive
from patch_retriever.retrieval.comparison.result import Settings
from patch_retriever.retrieval.comparison.trial import Trial, try_out
from patch_retriever.retrieval.embeddings import (
    Embedded,
    EmbeddingStore,
    StoredVectors,
    embed_items,
    open_store,
)
from patch_retriever.retrieval.encoder import ROLES, Encoder, Role
from patch_retriever.retrieval.geometry import kinds_of
from patch_retriever.retrieval.ranking import DEPTH
from patch_retriever.retrieval.tasks import RetrievalTask
from patch_retriever.retrieval.vectors import Vectors, at_hand

_FORMAT = 1
"""Raised when a trial's figures change meaning, so that old ones are made again."""


@dataclass(frozen=True)
class Ready:
    """A task whose items are encoded, without those that were left out."""

    task: RetrievalTask
    keys: tuple[NDArray[Any], NDArray[Any]]
    """Of the content of queries and candidates."""
    vectors: tuple[Vectors, Vectors]
    kinds: tuple[NDArray[np.int8], NDArray[np.int8]]
    encoded: int
    seconds: float

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that decides what is found and what counts."""
        t = self.task
        judged = {q: dict(t.qrels[q]) for q in t.query_ids}
        out = {q: sorted(some) for q, some in t.excluded.items()}
        pools = {q: list(some) for q, some in t.pools.items()}
        contents = [keys_n.tobytes().hex() for keys_n in self.keys]
        ids = [list(t.query_ids), list(t.candidate_ids)]
        return value_hash([t.direction, *ids, *contents, judged, out, pools])


class Bench:
    """One model with its embedding stores, which `stack` closes."""

    def __init__(
        self,
        encoder: Encoder,
        settings: Settings,
        cache: Path,
        batch_size: int,
        stack: ExitStack,
        say: Say = silent,
        progress: Progress = no_progress,
    ) -> None:
        self._encoder, self._settings, self._cache = encoder, settings, cache
        self._batch_size, self._say, self._progress = batch_size, say, progress
        self._stack = stack
        self._stores: dict[str, EmbeddingStore] = {}
        self._known: dict[Role, tuple[NDArray[Any], NDArray[np.int8]]] = {}

    def prepare(self, task: RetrievalTask) -> Ready:
        """Encode what is not stored yet."""
        found = [
            self._embed(items, role, self._prompt(task, role))
            for role, items in zip(ROLES, (task.queries, task.candidates), strict=True)
        ]
        task, *keys = _without_bad(task, *found)
        vectors = [
            at_hand(StoredVectors(self._encoder, role, self._store(role, prompt), keys_n))
            for role, keys_n in zip(ROLES, keys, strict=True)
            for prompt in [self._prompt(task, role)]
        ]
        asked, _, answered = task.direction.partition("->")
        return Ready(
            task,
            (keys[0], keys[1]),
            (vectors[0], vectors[1]),
            (kinds_of(task.queries, asked), kinds_of(task.candidates, answered)),
            sum(side.encoded for side in found),
            sum(side.seconds for side in found),
        )

    def trial(
        self,
        ready: Ready,
        correction: Baseline | None,
        calibration: Sequence[RetrievalTask],
        keep: Path | None,
    ) -> Trial:
        """The model's trial, or that of a correction of it; read from `keep` if it lies there."""
        known = []
        if correction is not None and not correction.transductive:
            known = [self._calibration(calibration, ready, role) for role in ROLES]
        path = None
        if keep is not None:
            learned_from = [keys_n.tobytes().hex() for keys_n, _ in known]
            path = keep / self._file(ready, correction.name if correction else "", learned_from)
            if (kept := Trial.load(path)) is not None:
                return kept
        sides = list(zip(ready.vectors, ready.kinds, strict=True))
        vectors = list(ready.vectors)
        if known and correction is not None:
            vectors = [
                calibrated(correction, (self._vectors(role, keys_n), kinds_n), side)
                for role, (keys_n, kinds_n), side in zip(ROLES, known, sides, strict=True)
            ]
        elif correction is not None:
            vectors = [transductive(correction, side) for side in sides]
        queries, candidates = map(at_hand, vectors)
        s = self._settings
        found = try_out(ready.task, queries, candidates, ready.kinds, s.cutoffs, s.index)
        if correction is None:
            encoded = {"encoded_items": ready.encoded, "encode_seconds": ready.seconds}
            found = replace(found, figures=found.figures | encoded)
        if path is not None:
            found = replace(found, figures=found.figures | {"file": path.name})
            found.save(path)
        return found

    def _file(self, ready: Ready, correction: str, learned_from: list[str]) -> str:
        """The name of a trial's file: it changes with all that its figures depend on."""
        said = [self._encoder.prompt(role, self._prompt(ready.task, role)) for role in ROLES]
        s = self._settings
        how = [_FORMAT, DEPTH, s.cutoffs, s.index, said, correction, learned_from]
        key = value_hash([self._encoder.fingerprint, ready.digest, how])
        words = [Path(self._encoder.name).name, correction, ready.task.name]
        told = [re.sub(r"[^\w.@]+", "-", word) for word in words if word]
        return "-".join([*told, f"{key[:16]}.parquet"])

    def _calibration(
        self, tasks: Sequence[RetrievalTask], ready: Ready, role: Role
    ) -> tuple[NDArray[Any], NDArray[np.int8]]:
        """Keys and kinds of calibration's items on one side, none of them an item of the task."""
        if role not in self._known:
            items = [
                item
                for task in tasks
                for item in (task.queries if role == "query" else task.candidates)
            ]
            chosen = np.random.default_rng(0).permutation(len(items))[:MOST]
            items = [items[i] for i in np.sort(chosen)]
            keys_n = self._embed(items, role, None).keys_n
            _, first = np.unique(keys_n, return_index=True)
            first = np.sort(first[keys_n[first] != b""])
            self._known[role] = keys_n[first], kinds_of(items)[first]
        keys_n, kinds_n = self._known[role]
        kept = ~np.isin(keys_n, np.concatenate(ready.keys))
        if not kept.any():
            raise UserError(
                f"{ready.task.name}: every calibration item is one of the test; name another "
                "--calibration"
            )
        return keys_n[kept], kinds_n[kept]

    def _vectors(self, role: Role, keys_n: NDArray[Any]) -> Vectors:
        return StoredVectors(self._encoder, role, self._store(role, None), keys_n)

    def _prompt(self, task: RetrievalTask, role: Role) -> str | None:
        return task.prompts.get(role) if self._settings.prompts else None

    def _embed(self, items: Sequence[Item], role: Role, prompt: str | None) -> Embedded:
        return embed_items(
            self._encoder,
            items,
            role,
            self._store(role, prompt),
            prompt,
            self._batch_size,
            self._settings.skip_bad,
            self._progress,
        )

    def _store(self, role: Role, prompt: str | None) -> EmbeddingStore:
        """Opened once: where the sides are encoded alike, they share one."""
        key = self._encoder.store_key(role, prompt)
        if key not in self._stores:
            store = open_store(self._cache, self._encoder, role, prompt, self._say)
            self._stores[key] = self._stack.enter_context(store)
        return self._stores[key]


def _without_bad(
    task: RetrievalTask, queries: Embedded, candidates: Embedded
) -> tuple[RetrievalTask, NDArray[Any], NDArray[Any]]:
    """A task without the items that were left out, and the keys of the others."""
    if not (queries.skipped or candidates.skipped):
        return task, queries.keys_n, candidates.keys_n
    q, c = (np.flatnonzero(side.keys_n != b"") for side in (queries, candidates))
    if not (len(q) and len(c)):
        raise UserError(f"{task.name}: no item of it can be read; {queries.skipped[0]}")
    less = replace(
        task,
        query_ids=Lazy(q, task.query_ids.__getitem__),
        queries=Lazy(q, task.queries.__getitem__),
        candidate_ids=Lazy(c, task.candidate_ids.__getitem__),
        candidates=Lazy(c, task.candidates.__getitem__),
        pools={query: _there(pool, task, c) for query, pool in task.pools.items()},
        skipped=(*task.skipped, *queries.skipped, *candidates.skipped),
    )
    return less, queries.keys_n[q], candidates.keys_n[c]


def _there(pool: Sequence[str], task: RetrievalTask, kept: NDArray[np.int64]) -> list[str]:
    ids = {task.candidate_ids[int(i)] for i in kept}
    return [candidate for candidate in pool if candidate in ids]
