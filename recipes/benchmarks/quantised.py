"""Do approximate indexes lose less when the gap between texts and images is closed?

    python recipes/benchmarks/quantised.py --model demo --model demo-paper --store DIR
    python recipes/benchmarks/quantised.py --quick       # a small build and gallery, a minute

The built-in world scaled up: captions ask for pictures among 50,000, near misses among them, and
for pictures and captions in one pool. Every model is a folder that `build` made, and stands three
times: its base (backbone and readout), the base with asking captions, captions and pictures each
centred by their own mean (nothing but the gap closed; means of the calibration split), and the
exported patch. Each index holds the same vectors; its recall is the share of the ten that exact
search finds which it finds too. Codes have the same number of bytes for all models. Differences to
the base come with their paired 95% interval over queries.
"""

from __future__ import annotations

import random
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from reporting import Report, machine, table

K = 10
GROUPS = ("asking captions", "pictures", "captions")
DRAWS = 1000
BASE, CENTRED, PATCHED = "base", "base, gap closed", "exported patch"


@dataclass(frozen=True)
class Index:
    """An index, and how it is searched."""

    factory: str
    nprobe: int = 0

    @property
    def name(self) -> str:
        """For the table."""
        rotated = re.sub(r"^RR\d+", "RR", self.factory)  # dimensions differ, rows do not
        return f"{rotated}, nprobe {self.nprobe}" if self.nprobe else rotated


def indexes(n: int, dimension: int, code_bytes: int) -> list[Index]:
    """About 4 sqrt(n) lists, of which 1 and 3% are searched. Quantizers stand with and without a
    random rotation (RR), which evens out axes of unlike variance."""
    lists = 1 << (round(4 * n**0.5).bit_length() - 1)
    few, more = max(1, lists // 128), max(2, lists // 32)
    return [
        Index("SQ8"),
        Index("RaBitQ"),
        Index(f"RR{dimension},RaBitQ"),
        Index("HNSW32"),
        Index(f"IVF{lists},Flat", few),
        Index(f"IVF{lists},Flat", more),
        Index(f"IVF{lists},SQ8", more),
        Index(f"IVF{lists},PQ{code_bytes}x8", more),
        Index(f"RR{dimension},IVF{lists},PQ{code_bytes}x8", more),
    ]


@dataclass(frozen=True)
class World:
    """Captions that ask (the first `n_queries` items), pictures, and captions of every second
    scene; and for each query the numbers of the scenes that it is true of."""

    items: tuple[Any, ...]
    n_queries: int
    n_scenes: int
    relevant: list[set[int]]

    @property
    def groups(self) -> NDArray[np.int64]:
        """What every item is, its number in `GROUPS`."""
        captions = len(self.items) - self.n_queries - self.n_scenes
        return np.repeat(np.arange(3), [self.n_queries, self.n_scenes, captions])

    def pools(self) -> dict[str, NDArray[np.int64]]:
        """Item numbers of the candidates, scene by scene: pictures alone; every second scene as
        its caption instead."""
        pictures = self.n_queries + np.arange(self.n_scenes)
        mixed = pictures.copy()
        mixed[1::2] = np.arange(self.n_queries + self.n_scenes, len(self.items))
        return {"captions for pictures": pictures, "captions for pictures and captions": mixed}


def draw(split: str, n_scenes: int, n_queries: int) -> World:
    """Scenes of a split: those asked about, a near miss of each where there is one, and others."""
    from patch_retriever.items import Item
    from patch_retriever.scenes.language import caption
    from patch_retriever.scenes.tasks import Relevance, ScenePicture
    from patch_retriever.scenes.world import near_misses, sample_scene

    rng = random.Random(split)
    asked = list(dict.fromkeys(sample_scene(rng, split) for _ in range(2 * n_queries)))[:n_queries]
    near = [rng.choice(found) for scene in asked if (found := near_misses(scene, split))]
    seen = dict.fromkeys([*asked, *near])
    while len(seen) < n_scenes:
        seen[sample_scene(rng, split)] = None
    scenes = list(seen)[:n_scenes]
    rng.shuffle(scenes)
    said = [caption(rng, scene, "web") for scene in asked]
    relevance = Relevance(scenes)
    items = [Item(query.text) for query in said]
    items += [Item(picture=ScenePicture(scene)) for scene in scenes]
    items += [Item(caption(rng, scene, "full").text) for scene in scenes[1::2]]
    relevant = [set(relevance.of_caption(query)) for query in said]
    return World(tuple(items), len(asked), len(scenes), relevant)


@click.command()
@click.option("--model", "models", multiple=True, help="A folder that `build` made.")
@click.option("--store", type=click.Path(path_type=Path), help="Keep embeddings here.")
@click.option("--candidates", default=50_000, show_default=True, help="Pictures in the gallery.")
@click.option("--queries", default=2_000, show_default=True, help="Captions that ask.")
@click.option("--code-bytes", default=32, show_default=True, help="Of a product-quantised vector.")
@click.option("--threads", default=2, show_default=True, help="Of torch and FAISS.")
@click.option("--quick", is_flag=True, help="A small build and gallery, a minute.")
@click.option("--json", "as_json", is_flag=True, help="Only the line of JSON.")
def main(
    models: tuple[str, ...],
    store: Path | None,
    candidates: int,
    queries: int,
    code_bytes: int,
    threads: int,
    quick: bool,
    as_json: bool,
) -> None:
    """Recall of approximate indexes against exact search, before and after a patch."""
    import faiss
    import torch

    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    report = Report(as_json)
    if quick:
        candidates, queries, code_bytes = 1_000, 200, 8
    with tempfile.TemporaryDirectory() as temporary:
        root = store or Path(temporary)
        if not models:
            models = (_build(root, quick, report),)
        found = {m: measure(m, root, candidates, queries, code_bytes, report) for m in models}
    for model, pools in found.items():
        for pool, result in pools.items():
            report.say(f"{Path(model).name}, {pool}", "")
            report.say(*show(result), "")
    settings = {"candidates": candidates, "queries": queries, "code_bytes": code_bytes, "k": K}
    versions = {"quick": quick, "faiss": faiss.__version__}
    named = {Path(model).name: pools for model, pools in found.items()}
    report.finish({"models": named, "settings": settings | versions, **machine(threads)})


def _build(root: Path, quick: bool, report: Report) -> str:
    """The demo build, small where it is only to be tried."""
    from patch_retriever import build_retriever

    small: dict[str, Any] = {
        "preset": "paper",  # no readouts to try
        "scenes": {"calibration": 40, "validation": 20, "test": 20},
        "sae": {"expansion": 4, "k": 8, "steps": 40, "batch_size": 256},
    }
    report.progress("building the demo")
    build_retriever(root / "demo", **(small if quick else {}))
    return str(root / "demo")


def measure(
    model: str, root: Path, n_candidates: int, n_queries: int, code_bytes: int, report: Report
) -> dict[str, Any]:
    """Figures of one build for both pools."""
    from patch_retriever.retrieval.load import BASE as AT_BASE
    from patch_retriever.retrieval.load import load_encoder

    report.progress(f"drawing {n_candidates:,} scenes")
    world = draw("test", n_candidates, n_queries)
    known = draw("calibration", min(1_500, n_candidates), min(500, n_queries))
    base = load_encoder(f"{model}{AT_BASE}")
    as_base = _embedded(base, world, root, report)
    known_base = _embedded(base, known, root, report)
    means = np.stack([known_base[known.groups == g].mean(0) for g in range(len(GROUPS))])
    variants = {
        BASE: as_base,
        # of unit vectors: what one would do to an index that is there already
        CENTRED: _unit(as_base - means[world.groups]),
        PATCHED: _embedded(load_encoder(model), world, root, report),
    }
    found: dict[str, Any] = {}
    for pool, candidates in world.pools().items():
        found[pool] = {}
        outcomes: dict[str, dict[str, NDArray[np.float64]]] = {}
        for name, vectors_nd in variants.items():
            report.progress(f"{pool}: {name}")
            sides = vectors_nd[: world.n_queries], vectors_nd[candidates]
            figures, outcomes[name] = judge(*sides, world.relevant, code_bytes)
            found[pool][name] = {**figures, "gap": _gap(*sides)}
        for name in (CENTRED, PATCHED):
            for index, per_query in outcomes[name].items():
                found[pool][name]["indexes"][index]["recall_minus_base"] = _interval(
                    per_query - outcomes[BASE][index]
                )
    return found


def _embedded(encoder: Any, world: World, root: Path, report: Report) -> NDArray[np.float32]:
    """Unit vectors of a world's items, queries as queries and the rest as documents."""
    from patch_retriever.retrieval.embeddings import StoredVectors, embed_items, open_store

    parts: list[NDArray[np.float32]] = []
    n = world.n_queries
    for role, items in (("query", world.items[:n]), ("document", world.items[n:])):
        with open_store(root / "embeddings", encoder, role) as kept:  # type: ignore[arg-type]
            done = embed_items(encoder, items, role, kept)  # type: ignore[arg-type]
            if done.encoded:
                rate = done.encoded / done.seconds
                report.progress(f"encoded {done.encoded:,} items, {rate:.0f} a second")
            parts.append(StoredVectors(encoder, role, kept, done.keys_n)[:])  # type: ignore[arg-type]
    return np.concatenate(parts)


def judge(
    queries_qd: NDArray[np.float32],
    documents_nd: NDArray[np.float32],
    relevant: list[set[int]],
    code_bytes: int,
) -> tuple[dict[str, Any], dict[str, NDArray[np.float64]]]:
    """Figures of every index, and its recall against exact search for every query."""
    from patch_retriever.retrieval.index.build import build_index
    from patch_retriever.retrieval.index.factory import set_search

    dimension = documents_nd.shape[1]
    exact = build_index(documents_nd, "Flat", dimension)
    began = time.perf_counter()
    _, best_qk = exact.search(queries_qd, K)
    exact_ms = 1000 * (time.perf_counter() - began) / len(queries_qd)
    figures: dict[str, Any] = {
        "dimension": dimension,
        "exact_hit_rate_at_10": _hit_rate(best_qk, relevant),
        "exact_ms_a_query": exact_ms,
        "indexes": {},
    }
    per_query: dict[str, NDArray[np.float64]] = {}
    built: dict[str, Any] = {}
    for index in indexes(len(documents_nd), dimension, code_bytes):
        if index.factory not in built:
            built = {index.factory: build_index(documents_nd, index.factory, dimension)}
        settings = {"nprobe": index.nprobe} if index.nprobe else {}
        if index.factory.startswith("HNSW"):
            settings = {"efSearch": 32}
        set_search(built[index.factory], settings)
        began = time.perf_counter()
        _, found_qk = built[index.factory].search(queries_qd, K)
        seconds = time.perf_counter() - began
        recall_q = (found_qk[:, :, None] == best_qk[:, None, :]).any(2).mean(1)
        per_query[index.name] = recall_q
        figures["indexes"][index.name] = {
            "recall_of_exact": float(recall_q.mean()),
            "hit_rate_at_10": _hit_rate(found_qk, relevant),
            "ms_a_query": 1000 * seconds / len(queries_qd),
        }
    return figures, per_query


def _hit_rate(found_qk: NDArray[np.int64], relevant: list[set[int]]) -> float:
    hit = [bool(right & set(row.tolist())) for row, right in zip(found_qk, relevant, strict=True)]
    return float(np.mean(hit))


def _unit(vectors_nd: NDArray[np.float32]) -> NDArray[np.float32]:
    return (vectors_nd / np.linalg.norm(vectors_nd, axis=1, keepdims=True)).astype(np.float32)


def _gap(queries_qd: NDArray[np.float32], documents_nd: NDArray[np.float32]) -> float:
    """Distance of the means (Liang et al. 2022)."""
    return float(np.linalg.norm(queries_qd.mean(0) - documents_nd.mean(0)))


def _interval(delta_q: NDArray[np.float64]) -> dict[str, float]:
    """Mean and 95% bootstrap interval over queries."""
    rng = np.random.default_rng(0)
    n = len(delta_q)
    draws = rng.multinomial(n, np.full(n, 1 / n), size=DRAWS) @ delta_q / n
    low, high = np.quantile(draws, (0.025, 0.975))
    return {"mean": float(delta_q.mean()), "low": float(low), "high": float(high)}


def show(result: dict[str, Any]) -> list[str]:
    """A table: indexes down, variants across; recall of exact search and hit rate at 10."""
    head = ["", *(f"{name}: recall" for name in result), *(f"{name}: hits" for name in result)]
    rows = [
        ["exact", *("" for _ in result)]
        + [f"{100 * figures['exact_hit_rate_at_10']:.1f}" for figures in result.values()]
    ]
    for index in result[BASE]["indexes"]:
        cells = [figures["indexes"][index] for figures in result.values()]
        recalls = [f"{100 * cell['recall_of_exact']:.1f}{_change(cell)}" for cell in cells]
        rows.append([index, *recalls, *(f"{100 * cell['hit_rate_at_10']:.1f}" for cell in cells)])
    gaps = [f"{figures['gap']:.2f}" for figures in result.values()]
    rows.append(["gap of the means", *gaps, *("" for _ in result)])
    return table(head, rows)


def _change(cell: dict[str, Any]) -> str:
    if "recall_minus_base" not in cell:
        return ""
    d = cell["recall_minus_base"]
    return f" ({100 * d['mean']:+.1f} [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}])"


if __name__ == "__main__":
    main()
