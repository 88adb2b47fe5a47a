"""One model of the paper, measured: its embeddings on disk, a file of results for every task."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

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
from paper.official import (
    POOLINGS,
    PaperModel,
    PoolingName,
    asked,
    load_official,
    official_prompt,
    with_poolings,
)
from paper.whitening import Spectrum
from patch_retriever.errors import UserError
from patch_retriever.files import value_hash, write_json
from patch_retriever.items import KINDS, Item
from patch_retriever.progress import Progress, Say, no_progress, silent
from patch_retriever.retrieval.comparison.baselines import MappedVectors, baselines, calibrated
from patch_retriever.retrieval.embeddings import EmbeddingStore, embed_items, open_store
from patch_retriever.retrieval.encoder import Encoder
from patch_retriever.retrieval.geometry import kinds_of
from patch_retriever.retrieval.metrics import CUTOFFS, query_metrics
from patch_retriever.retrieval.ranking import Judgements, Search, rank
from patch_retriever.retrieval.readers.benchmarks.mbeir_tasks import find_task
from patch_retriever.retrieval.tasks import RetrievalTask
from patch_retriever.retrieval.vectors import CHUNK, Vectors, at_hand

if TYPE_CHECKING:
    from patch_retriever.patch.operators import Affine
    from patch_retriever.sae.model import SparseAutoencoder

FORMAT = 1
"""Raised when a result changes meaning, so that old ones are made again."""
SHOWN_TASKS = ("mbeir_mscoco_task3", "mbeir_nights_task4", "mbeir_cirr_task7")
"""The tasks of Tables 5 and 8."""
REMOVAL_TASK = "mbeir_mscoco_task3"
"""The task of Table 2."""
TOP_SHARE = 0.01
RANKS = (1, 4, 16, 64)
"""Of the subspace that is removed, besides the whole one: the paper does not say its own."""
K = 50
"""Active concepts of the official SAEs."""
DRAWS = 3
SAE_EPOCHS, SAE_BATCH, SAE_LR = 5, 4096, 8e-4
BLOCK_BYTES = 1 << 29
"""Of the activations that are shuffled together; up to three such blocks are in memory."""
HELD_OUT_ITEMS = 256


@dataclass(frozen=True)
class Settings:
    """What a run is told."""

    model: PaperModel
    weights: str
    out: Path
    mbeir: Path
    coco: Path | None = None
    tasks: tuple[str, ...] = ()
    """Names as on the Hub."""
    limit: int | None = None
    calibration: int = 10_000
    """Captioned pictures that the frozen statistics and the attribution are taken of."""
    sae: str | None = None
    sae_steps: int | None = None
    batch_size: int = 8
    dtype: str = "float16"
    device: str = "cpu"
    revision: str | None = None
    skip_bad: bool = False

    @property
    def folder(self) -> Path:
        """Everything of this model."""
        return self.out / self.model.name

    @property
    def n_calibration(self) -> int:
        """As many as that, and in a trial no more than its queries."""
        return self.calibration if self.limit is None else min(self.calibration, self.limit)

    @property
    def how(self) -> dict[str, Any]:
        """What stands beside every result."""
        return {"weights": self.weights, "dtype": self.dtype, "limit": self.limit}

    def check_results(self) -> None:
        """Refuse to write over the results of another run.

        Raises:
            UserError: what lies there was measured otherwise.
        """
        for path in sorted((self.folder / "results").glob("*.json")):
            found = json.loads(path.read_text())
            for name, value in self.how.items():
                if found[name] != value:
                    raise UserError(
                        f"{path}: measured with {name} {found[name]}, not {value}; name another "
                        "folder with -o"
                    )


class Experiment:
    """The backbone as the official code reads it, and what is measured with it; `stack` closes its
    stores."""

    def __init__(
        self,
        settings: Settings,
        stack: ExitStack,
        say: Say = silent,
        progress: Progress = no_progress,
    ) -> None:
        self._settings, self._say, self._progress = settings, say, progress
        s = settings
        self._transformer = load_official(s.model, s.weights, s.dtype, s.device, s.revision)
        self._stores: dict[Sequence[PoolingName], tuple[Encoder, EmbeddingStore]] = {}
        for poolings in (("mean",), POOLINGS):
            encoder = Encoder(with_poolings(self._transformer, poolings), s.weights)
            store = open_store(s.folder / "embeddings", encoder, "document", say=say)
            self._stores[poolings] = encoder, stack.enter_context(store)

    def run(self) -> None:
        """All tasks, then Table 2; what is finished is not done again.

        Raises:
            UserError: bad data, a full disk, or items that the model does not take.
        """
        s = self._settings
        if s.sae is not None:
            self._named_sae(s.sae)  # a wrong one is found now
        for name in s.tasks:
            self._say(f"{name}: reading")
            self._task(read_task(s.mbeir, name, s.limit, s.skip_bad))
        if s.coco is not None and REMOVAL_TASK in s.tasks:
            self._removal(read_task(s.mbeir, REMOVAL_TASK, s.limit, s.skip_bad))

    def _task(self, task: RetrievalTask) -> None:
        """Tables 3, 5 and 8 for one task."""
        path = self._settings.folder / "results" / f"{task.name}.json"
        supported = has_support(self._settings.mbeir, task.name)
        key = value_hash([self._key, _judged(task), supported])
        if _finished(path, key):
            self._say(f"{task.name}: done before")
            return
        poolings = POOLINGS if task.name in SHOWN_TASKS else ("mean",)
        self._say(f"{task.name}: {len(task.queries)} queries, {len(task.candidates)} candidates")
        sides = [self._embed(side, task, poolings) for side in (task.queries, task.candidates)]
        rows = {"base": self._recalls(task, sides)}
        spectra = [Spectrum.of(side, device=self._settings.device) for side in sides]
        maps = {"centring": [s.centre() for s in spectra], "ReAlign": [s.whiten() for s in spectra]}
        if task.name in SHOWN_TASKS:
            both = Spectrum.of(*sides, device=self._settings.device)
            maps["ZCA"] = [s.whiten(0) for s in spectra]
            maps["PCA"] = [s.whiten_pca() for s in spectra]
            maps["PCA, common axes"] = [both.whiten_pca(s.mean_d) for s in spectra]
        for name, steps in maps.items():
            self._say(f"{task.name}: {name}")
            rows[name] = self._recalls(task, _all_mapped(sides, steps))
        for pooling in poolings[:-1]:
            rows[pooling] = self._recalls(task, [side.of(pooling) for side in sides])
        if supported:
            steps = [self._support(task).whiten(), spectra[1].whiten()]
            rows["ReAlign, support"] = self._recalls(task, _all_mapped(sides, steps))
        rows |= self._frozen(task, sides)
        values = {"queries": len(task.queries), "candidates": len(task.candidates)}
        self._write(path, key, {**values, "recalls": rows})

    def _support(self, task: RetrievalTask) -> Spectrum:
        """Of queries that are not the test's, as the paper's text has it (and not its code)."""
        s = self._settings
        queries = read_support(s.mbeir, task.name, s.skip_bad)[: s.n_calibration]
        return Spectrum.of(self._embed(queries, task), device=s.device)

    def _frozen(self, task: RetrievalTask, sides: Sequence[Pooled]) -> dict[str, list[float]]:
        """Our deployable version: statistics of other data, one set for every kind of item."""
        if self._settings.coco is None:
            return {}
        letters = task.direction.split("->")
        kinds = [
            kinds_of(items, letter)
            for items, letter in zip((task.queries, task.candidates), letters, strict=True)
        ]
        known = [self._known(task, np.unique(kinds_n)) for kinds_n in kinds]
        rows = {}
        for baseline in baselines(with_calibration=True):
            if not baseline.transductive:
                fitted = [
                    calibrated(baseline, known_, (side, kinds_n))
                    for known_, side, kinds_n in zip(known, sides, kinds, strict=True)
                ]
                name = baseline.name.split(" ")[0].strip(",")
                rows[f"{name}, frozen"] = self._recalls(task, fitted)
        return rows

    def _known(
        self, task: RetrievalTask, kinds: NDArray[np.int8]
    ) -> tuple[Vectors, NDArray[np.int8]]:
        """Calibration items of some kinds, with the prompts of the task's direction."""
        pairs = sample(self._captioned, self._settings.n_calibration)
        items = [pair.item(KINDS[kind]) for kind in kinds for pair in pairs]
        return self._embed(items, task), kinds_of(items)

    def _removal(self, task: RetrievalTask) -> None:
        """Table 2: the span of the concepts with the highest attribution is removed."""
        path = self._settings.folder / "results" / "removal.json"
        s = self._settings
        key = value_hash([self._key, _judged(task), s.sae, s.sae_steps])
        if _finished(path, key):
            self._say("removal: done before")
            return
        sides = [self._embed(side, task) for side in (task.queries, task.candidates)]
        pairs = sample(self._captioned, self._settings.n_calibration)
        items = [pair.item(kind) for kind in ("image", "text") for pair in pairs]
        pooled_nd = torch.from_numpy(self._embed(items, task).raw())
        sae = self._sae(task)
        self._say("removal: attribution")
        top_md = top_concepts(sae, pooled_nd)
        rows = {"base": self._recalls(task, sides)}
        for name, steps in removals(top_md).items():
            found = [self._recalls(task, _all_mapped(sides, [step, step])) for step in steps]
            rows[name] = np.mean(found, axis=0).tolist()
        values = {"concepts": len(top_md), "of": sae.n_concepts, "pairs": len(pairs)}
        self._write(path, key, {**values, "recalls": rows})

    def _sae(self, task: RetrievalTask) -> SparseAutoencoder:
        """The SAE that is named, or one trained on COCO's tokens; its codes are the top K."""
        from patch_retriever.sae.formats import load_sae, save_sae

        s, folder = self._settings, self._settings.folder / "sae"
        if s.sae is not None:
            return self._named_sae(s.sae)
        if not (folder / "cfg.json").exists():
            trained = self._train(task, folder)
            save_sae(trained.sae, folder, trained.about())
        sae = load_sae(folder)
        sae.k = min(K, sae.n_concepts)
        return sae

    def _named_sae(self, source: str) -> SparseAutoencoder:
        from patch_retriever.sae.formats import load_sae

        sae = load_sae(source, K if source.endswith(".pt") else None)
        width = int(self._transformer.get_embedding_dimension())
        if sae.d_in != width:
            raise UserError(f"{source}: an SAE of width {sae.d_in}; the model's is {width}")
        return sae

    def _train(self, task: RetrievalTask, folder: Path) -> Any:
        from patch_retriever.activations.collect import LiveSource
        from patch_retriever.backbones.readout import PLAIN, Readout
        from patch_retriever.sae.processes import Processes
        from patch_retriever.sae.settings import SAESettings
        from patch_retriever.sae.train import train_saes

        s = self._settings
        rows = self._captioned[: s.limit]
        items = [Item(picture=row.picture) for row in rows]
        items += [Item(text=text) for row in rows for text in row.captions]
        ready = asked(items, official_prompt(task.direction), s.model)
        tokens = self._tokens_an_item(ready)
        width = int(self._transformer.get_embedding_dimension())
        in_block = max(16, int(BLOCK_BYTES / (2 * width * tokens)))
        source = LiveSource(
            self._transformer, ready, Readout(PLAIN), s.batch_size, items_in_block=in_block
        )
        source.held_out_items = source.held_out_items[:HELD_OUT_ITEMS]
        settings = SAESettings(
            expansion=s.model.expansion,
            k=min(K, s.model.expansion * width),
            steps=s.sae_steps or max(1, round(SAE_EPOCHS * tokens * len(items) / SAE_BATCH)),
            batch_size=SAE_BATCH,
            lr=SAE_LR,
            seed=0,
        )
        self._say(f"SAE: {settings.steps} steps on {len(items)} items of {tokens:.0f} tokens")
        (trained,) = train_saes(
            source,
            [settings],
            folder=folder / "checkpoint",
            processes=Processes(device=s.device),
            progress=self._progress,
        )
        return trained

    def _tokens_an_item(self, items: Sequence[Item]) -> float:
        """Mean length of some items, evenly spaced."""
        picks = np.unique(np.linspace(0, len(items) - 1, 64).astype(int))
        inputs = [self._transformer.preprocess([items[i].load()]) for i in picks]
        return float(np.mean([int(features["attention_mask"].sum()) for features in inputs]))

    @cached_property
    def _captioned(self) -> list[Captioned]:
        """COCO's rows, without those that share a caption with M-BEIR's MSCOCO tests."""
        s = self._settings
        if s.coco is None:
            raise UserError("no COCO folder is named (--coco)")
        held_out: set[str] = set()
        for name in task_names(s.mbeir):  # whichever of them are run
            if name.startswith("mbeir_mscoco"):
                held_out |= captions_of(read_task(s.mbeir, name, skip_bad=s.skip_bad))
        return read_coco(s.coco, held_out)

    @cached_property
    def _key(self) -> str:
        """SHA-256 of what all results depend on, beside their tasks."""
        encoder, _ = self._stores["mean",]
        s = self._settings
        coco = None if s.coco is None else str(s.coco.resolve())
        return value_hash([FORMAT, encoder.fingerprint, s.model.name, coco, s.n_calibration])

    def _embed(
        self,
        items: Sequence[Item],
        task: RetrievalTask,
        poolings: Sequence[PoolingName] = ("mean",),
    ) -> Pooled:
        """Embed what is not stored yet, with the prompts of the task's direction."""
        s = self._settings
        named = find_task(task.name)
        prompt = official_prompt(task.direction if named is None else named.direction)
        encoder, store = self._stores[poolings]
        found = embed_items(
            encoder,
            asked(items, prompt, s.model),
            "document",
            store,
            batch_size=s.batch_size,
            progress=self._progress,
        )
        return Pooled(store, found.keys_n, poolings)

    def _recalls(self, task: RetrievalTask, sides: Sequence[Vectors]) -> list[float]:
        device = self._settings.device
        return recalls(task, sides[0], sides[1], device if device != "cpu" else None)

    def _write(self, path: Path, key: str, values: dict[str, Any]) -> None:
        write_json(path, {**values, **self._settings.how, "key": key})


class Pooled:
    """Stored vectors of one pooling, with length one."""

    def __init__(
        self,
        store: EmbeddingStore,
        keys_n: NDArray[Any],
        poolings: Sequence[PoolingName],
        pooling: PoolingName = "mean",
    ) -> None:
        self._store, self._keys_n, self._poolings = store, keys_n, tuple(poolings)
        self._width = store.width // len(self._poolings)
        self._first = self._width * self._poolings.index(pooling)

    def __len__(self) -> int:
        return len(self._keys_n)

    def __getitem__(self, rows: Any) -> NDArray[np.float32]:
        """Some of them, by a slice or an array of numbers."""
        x_nd = self.raw(rows)
        return x_nd / np.maximum(np.linalg.norm(x_nd, axis=1, keepdims=True), 1e-12)

    def raw(self, rows: Any = slice(None)) -> NDArray[np.float32]:
        """The same with the length that they have."""
        whole_nw = self._store.read(self._keys_n[rows])
        return whole_nw[:, self._first : self._first + self._width]

    def of(self, pooling: PoolingName) -> Pooled:
        """The same items under another pooling."""
        return Pooled(self._store, self._keys_n, self._poolings, pooling)


def recalls(
    task: RetrievalTask, queries: Vectors, candidates: Vectors, device: str | None = None
) -> list[float]:
    """R@1, R@5 and R@10 in percent, as M-BEIR and the official code count: queries with a relevant
    candidate among the first k, of all queries."""
    search = None if device is None else on_device(candidates, device)
    queries_qd = at_hand(queries, most=1 << 62)[: len(queries)]
    ranking = rank(task, queries_qd, candidates, max(CUTOFFS), search)
    judgements = Judgements(task)
    found = query_metrics(judgements.grades(ranking.found_qk), judgements.judged_qm, CUTOFFS)
    return [100 * float(found[f"hit_rate@{k}"].mean()) for k in CUTOFFS]


def on_device(candidates: Vectors, device: str, queries_at_once: int = 2048) -> Search:
    """An exact search that multiplies on `device`, a chunk of candidates at a time."""

    def search(
        queries_qd: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        parts = torch.from_numpy(queries_qd).to(device).split(queries_at_once)
        best = [
            (torch.zeros(len(p), 0, device=device), torch.zeros(len(p), 0, device=device).long())
            for p in parts
        ]
        for first in range(0, len(candidates), CHUNK):
            chunk_nd = torch.tensor(candidates[first : first + CHUNK]).to(device)
            numbers_n = torch.arange(first, first + len(chunk_nd), device=device)
            for i, part_qd in enumerate(parts):
                scores_qm = torch.cat([best[i][0], part_qd @ chunk_nd.T], 1)
                numbers_qm = torch.cat([best[i][1], numbers_n.expand(len(part_qd), -1)], 1)
                top = scores_qm.topk(min(k, scores_qm.shape[1]), dim=1)
                best[i] = top.values, numbers_qm.gather(1, top.indices)
        scores_qk, found_qk = (torch.cat(side).cpu().numpy() for side in zip(*best, strict=True))
        return scores_qk, found_qk

    return search


def top_concepts(sae: SparseAutoencoder, pooled_nd: torch.Tensor) -> torch.Tensor:
    """Dictionary rows (m, d) of the concepts with the highest retrieval attribution, the first 1%.

    `pooled_nd` are pooled vectors of n images, then of the n texts that belong to them; the SAE is
    applied to these, as in the paper (Eq. 6-8).
    """
    from patch_retriever.concepts.scores import IMAGE, TEXT, contribution

    n = len(pooled_nd) // 2
    images_n = torch.arange(n)
    kinds_n = torch.tensor([IMAGE] * n + [TEXT] * n)
    attribution_c = contribution(
        sae.codes(pooled_nd),
        kinds_n,
        torch.zeros(len(KINDS), sae.n_concepts),
        sae.W_dec_cd,
        torch.stack([images_n, images_n + n], dim=1),
    )
    m = max(1, round(TOP_SHARE * sae.n_concepts))
    return sae.W_dec_cd[attribution_c.argsort(descending=True, stable=True)[:m]]


def removals(top_md: torch.Tensor) -> dict[str, list[Affine]]:
    """The subspace's removal at several ranks, and that of random ones of the same rank."""
    from patch_retriever.patch.fit import remove_subspace

    m = min(top_md.shape)
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[Affine]] = {}
    for r in (*(r for r in RANKS if r < m), m):
        found[f"removal, rank {r}"] = [remove_subspace(top_md, r)]
        draws = [torch.randn(r, top_md.shape[1], generator=generator) for _ in range(DRAWS)]
        found[f"random, rank {r}"] = [remove_subspace(v_rd) for v_rd in draws]
    return found


def _all_mapped(sides: Sequence[Vectors], steps: Sequence[Affine]) -> list[Vectors]:
    """Each side through its own map, whatever its items hold, and normalised."""
    return [
        MappedVectors(vectors, step, np.zeros(len(vectors), np.int8))
        for vectors, step in zip(sides, steps, strict=True)
    ]


def _judged(task: RetrievalTask) -> list[Any]:
    """What a result depends on of a task, its pictures aside."""
    qrels = {query: dict(task.qrels[query]) for query in task.query_ids}
    return [task.name, list(task.query_ids), list(task.candidate_ids), qrels]


def _finished(path: Path, key: str) -> bool:
    try:
        return json.loads(path.read_text())["key"] == key
    except (OSError, ValueError, KeyError):
        return False
