"""One model of the paper, measured: a file of results for every task."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from paper.concepts import named_sae, removals, top_concepts, trained_sae
from paper.data import (
    Captioned,
    captions_of,
    has_support,
    read_coco,
    read_support,
    read_task,
    sample,
    task_names,
)
from paper.embedding import Embedder, Pooled
from paper.measuring import all_mapped, recalls
from paper.official import POOLINGS
from paper.settings import REMOVAL_TASK, SHOWN_TASKS, Settings
from paper.whitening import Spectrum
from patch_retriever.files import value_hash, write_json
from patch_retriever.items import KINDS
from patch_retriever.progress import Progress, Say, no_progress, silent
from patch_retriever.retrieval.comparison.baselines import baselines, calibrated
from patch_retriever.retrieval.geometry import kinds_of
from patch_retriever.retrieval.readers.benchmarks.mbeir_tasks import TASKS
from patch_retriever.retrieval.tasks import RetrievalTask
from patch_retriever.retrieval.vectors import Vectors

FORMAT = 1
"""Raised when a result changes meaning, so that old ones are made again."""
DIRECTIONS = {task.name: task.direction for task in TASKS}


class Experiment:
    """A model and what is measured with it; `stack` closes its stores."""

    def __init__(
        self,
        settings: Settings,
        stack: ExitStack,
        say: Say = silent,
        progress: Progress = no_progress,
    ) -> None:
        self._settings, self._say, self._progress = settings, say, progress
        self._embedder = Embedder(settings, stack, say, progress)

    def run(self) -> None:
        """All tasks, then Table 2; what is finished is not done again.

        Raises:
            UserError: bad data, a full disk, or items that the model does not take.
        """
        s = self._settings
        if s.sae is not None:
            named_sae(s.sae, self._embedder.width)  # a wrong one is found now
        for name in s.tasks:
            self._say(f"{name}: reading")
            task = read_task(s.mbeir, name, s.limit, s.skip_bad)
            self._unless_done(name, [_judged(task), has_support(s.mbeir, name)], self._task, task)
        if s.coco is not None and REMOVAL_TASK in s.tasks:
            task = read_task(s.mbeir, REMOVAL_TASK, s.limit, s.skip_bad)
            self._unless_done("removal", [_judged(task), s.sae, s.sae_steps], self._removal, task)

    def _unless_done(
        self,
        name: str,
        key: Any,
        measure: Callable[[RetrievalTask], dict[str, Any]],
        task: RetrievalTask,
    ) -> None:
        """Write what `measure` finds, unless it lies there; `key` is all that it depends on."""
        path = self._settings.folder / "results" / f"{name}.json"
        key = value_hash([self._key, key])
        if path.exists() and json.loads(path.read_text())["key"] == key:
            self._say(f"{name}: done before")
        else:
            write_json(path, {**measure(task), **self._settings.how, "key": key})

    def _task(self, task: RetrievalTask) -> dict[str, Any]:
        """Tables 3, 5 and 8 for one task."""
        s = self._settings
        self._say(f"{task.name}: {len(task.queries)} queries, {len(task.candidates)} candidates")
        poolings = POOLINGS if task.name in SHOWN_TASKS else ("mean",)
        direction = DIRECTIONS[task.name]
        sides = [
            self._embedder.embed(side, direction, poolings)
            for side in (task.queries, task.candidates)
        ]
        rows = {"base": recalls(task, sides, s.device)}
        spectra = [Spectrum.of(side, device=s.device) for side in sides]
        maps = {"centring": [x.centre() for x in spectra], "ReAlign": [x.whiten() for x in spectra]}
        if task.name in SHOWN_TASKS:
            both = Spectrum.of(*sides, device=s.device)
            maps["ZCA"] = [x.whiten(0) for x in spectra]
            maps["PCA"] = [x.whiten_pca() for x in spectra]
            maps["PCA, common axes"] = [both.whiten_pca(x.mean_d) for x in spectra]
        if has_support(s.mbeir, task.name):
            maps["ReAlign, support"] = [self._support(task.name).whiten(), spectra[1].whiten()]
        for name, steps in maps.items():
            self._say(f"{task.name}: {name}")
            rows[name] = recalls(task, all_mapped(sides, steps), s.device)
        for pooling in poolings[:-1]:
            rows[pooling] = recalls(task, [side.of(pooling) for side in sides], s.device)
        if s.coco is not None:
            rows |= self._frozen(task, sides)
        return {"queries": len(task.queries), "candidates": len(task.candidates), "recalls": rows}

    def _support(self, task: str) -> Spectrum:
        """Of queries that are not the test's, as the paper's text has it (and not its code)."""
        s = self._settings
        queries = read_support(s.mbeir, task, s.skip_bad)[: s.n_calibration]
        return Spectrum.of(self._embedder.embed(queries, DIRECTIONS[task]), device=s.device)

    def _frozen(self, task: RetrievalTask, sides: Sequence[Pooled]) -> dict[str, list[float]]:
        """Our deployable version: statistics of other data, one set for every kind of item."""
        letters = task.direction.split("->")
        kinds = [
            kinds_of(items, letter)
            for items, letter in zip((task.queries, task.candidates), letters, strict=True)
        ]
        known = [self._known(task.name, np.unique(kinds_n)) for kinds_n in kinds]
        rows = {}
        for baseline in baselines(with_calibration=True):
            if not baseline.transductive:
                fitted = [
                    calibrated(baseline, known_, (side, kinds_n))
                    for known_, side, kinds_n in zip(known, sides, kinds, strict=True)
                ]
                name = baseline.name.split(" ")[0].strip(",")
                rows[f"{name}, frozen"] = recalls(task, fitted, self._settings.device)
        return rows

    def _known(self, task: str, kinds: NDArray[np.int8]) -> tuple[Vectors, NDArray[np.int8]]:
        """Calibration items of some kinds, with the prompts of a task's direction."""
        items = [pair.item(KINDS[kind]) for kind in kinds for pair in self._calibration]
        return self._embedder.embed(items, DIRECTIONS[task]), kinds_of(items)

    def _removal(self, task: RetrievalTask) -> dict[str, Any]:
        """Table 2: the span of the concepts with the highest attribution is removed."""
        s, embed, direction = self._settings, self._embedder.embed, DIRECTIONS[task.name]
        sides = [embed(side, direction) for side in (task.queries, task.candidates)]
        items = [pair.item(kind) for kind in ("image", "text") for pair in self._calibration]
        pooled_nd = torch.from_numpy(embed(items, direction).raw())
        if s.sae is not None:
            sae = named_sae(s.sae, self._embedder.width)
        else:
            folder = s.folder / f"sae-{value_hash([self._key, s.limit, s.sae_steps])[:8]}"
            rows_ = self._captioned[: s.limit]
            sae = trained_sae(folder, self._embedder, rows_, s, self._say, self._progress)
        self._say("removal: attribution")
        top_md = top_concepts(sae, pooled_nd)
        rows = {"base": recalls(task, sides, s.device)}
        for name, steps in removals(top_md).items():
            found = [recalls(task, all_mapped(sides, [x, x]), s.device) for x in steps]
            rows[name] = np.mean(found, axis=0).tolist()
        counts = {"concepts": len(top_md), "of": sae.n_concepts, "pairs": len(self._calibration)}
        return {**counts, "recalls": rows}

    @property
    def _calibration(self) -> list[Captioned]:
        return sample(self._captioned, self._settings.n_calibration)

    @cached_property
    def _captioned(self) -> list[Captioned]:
        """COCO's rows, without those that share a caption with M-BEIR's MSCOCO tests."""
        s = self._settings
        assert s.coco is not None
        held_out: set[str] = set()
        for name in task_names(s.mbeir):  # whichever of them are run
            if name.startswith("mbeir_mscoco"):
                held_out |= captions_of(read_task(s.mbeir, name, skip_bad=s.skip_bad))
        return read_coco(s.coco, held_out)

    @cached_property
    def _key(self) -> str:
        """SHA-256 of what all results depend on, beside their tasks."""
        s = self._settings
        coco = None if s.coco is None else str(s.coco.resolve())
        return value_hash([FORMAT, self._embedder.fingerprint, s.model.name, coco, s.n_calibration])


def _judged(task: RetrievalTask) -> list[Any]:
    """What a result depends on of a task, its pictures aside."""
    qrels = {query: dict(task.qrels[query]) for query in task.query_ids}
    return [task.name, list(task.query_ids), list(task.candidate_ids), qrels]
