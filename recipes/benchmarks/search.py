"""Exact search through an index folder beside bare FAISS, and the memory that building one takes.

    python recipes/benchmarks/search.py            # a million candidates, some minutes, 12 GB free
    python recipes/benchmarks/search.py --quick    # a small size, seconds

Candidates and queries are random unit vectors. The candidates lie in shards on disk; fresh
processes build index folders from a quarter of them and from all of them, in one file and in eight,
and tell the largest memory of their own that they held (`RssAnon`: pages of mapped files can be
taken from them at any time and are not counted). Beside it stands the size of the index: what a
build takes beyond the index must not grow with it. Then one process searches the folder as
`patch-retriever search` does (mapped, hashes checked) and a bare `faiss.IndexFlatIP` that holds the
same vectors in memory, in turn, few queries at once and many, and the answers are compared. Bare
FAISS runs as it is shipped; `matrix_products` says what ours sets.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from reporting import Peak, Report, machine, table

GOAL = 1.3
"""Times bare FAISS at most."""
AT_ONCE = (1, 10, 100)
"""Queries in one search, beside all of them."""


@dataclass(frozen=True)
class Size:
    """What is indexed and asked."""

    candidates: int = 1_000_000
    dimension: int = 1_024
    queries: int = 1_000
    k: int = 10
    shard: int = 50_000
    """Candidates in one file that an index is built from."""


QUICK = Size(candidates=40_000, dimension=256, queries=200, shard=5_000)


@click.command()
@click.option("--quick", is_flag=True, help="A small size, seconds.")
@click.option("--threads", default=2, show_default=True, help="Of FAISS.")
@click.option("--repeats", default=3, show_default=True, help="Searches of each, in turn.")
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Where files go. [default: a temporary one]"
)
@click.option("--json", "as_json", is_flag=True, help="Only the line of JSON.")
@click.option("--worker", hidden=True, help="JSON of a step and its arguments.")
def main(
    quick: bool, threads: int, repeats: int, folder: Path | None, as_json: bool, worker: str | None
) -> None:
    """Build indexes of random vectors from shards on disk, and search beside bare FAISS."""
    if worker:
        step, arguments = json.loads(worker)
        steps: dict[str, Callable[..., dict[str, Any]]] = {"build": build, "search": search}
        click.echo(json.dumps(steps[step](**arguments)))
        return
    report = Report(as_json)
    size = QUICK if quick else Size()
    settings = {**asdict(size), "quick": quick, "repeats": repeats}
    figures: dict[str, Any] = {"settings": settings, **machine(threads)}
    with tempfile.TemporaryDirectory(prefix="search-", dir=folder) as name:
        root = Path(name)
        report.progress(f"writing {size.candidates:,} vectors of {size.dimension} dimensions")
        write_shards(root / "shards", size)
        builds = []
        for candidates in (size.candidates // 4, size.candidates):
            for files in (1, 8):
                report.progress(f"building from {candidates:,} in {files} file(s)")
                out = f"index-{candidates}-{files}"
                found = run_worker("build", root=name, out=out, n=candidates, files=files)
                builds.append({"candidates": candidates, "files": files, **found})
        report.progress(f"{size.queries:,} queries, {repeats} times each")
        last = f"index-{size.candidates}-1"
        found = run_worker(
            "search", root=name, out=last, size=asdict(size), threads=threads, repeats=repeats
        )
    rows = [
        [
            f"{b['candidates']:,} in {b['files']} file(s)",
            *(f"{b[key]:.0f}" for key in ("index_mib", "peak_mib", "beyond_mib")),
            f"{b['seconds']:.1f}",
        ]
        for b in builds
    ]
    head = ["build", "index, MiB", "peak memory, MiB", "beyond a file, MiB", "seconds"]
    report.say(*table(head, rows), "")
    rows = [
        [f"{n} at once", f"{ours:.3f}", f"{bare:.3f}", f"{ours / bare:.2f}"]
        for n, at_once in found["at_once"].items()
        for ours, bare in [(at_once["ours"]["median"], at_once["bare"]["median"])]
    ]
    head = ["exact search, seconds (median)", "index folder", "bare FAISS", "ratio"]
    report.say(*table(head, rows), "")
    ratio, same = found["ratio"], found["same"]
    met = "met" if ratio <= GOAL and same == 1 else "missed"
    report.say(
        f"{ratio:.2f} times bare FAISS (goal: at most {GOAL}, {met}); "
        f"{100 * same:.1f}% of the answers are the same",
        f"opened in {found['open_seconds']:.1f} s (hashing every file once), "
        f"again in {found['again_seconds']:.2f} s",
    )
    report.finish({"builds": builds, **found, "goal": GOAL, "goal_met": met == "met", **figures})


def run_worker(step: str, **arguments: Any) -> dict[str, Any]:
    """Figures of a step that runs in a process of its own."""
    command = [sys.executable, __file__, "--worker", json.dumps([step, arguments])]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def write_shards(folder: Path, size: Size) -> None:
    """Random unit vectors in files of `size.shard`."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(-(-size.candidates // size.shard)):
        rows = min(size.shard, size.candidates - number * size.shard)
        np.save(folder / f"{number:05d}.npy", unit_vectors(rng, rows, size.dimension))


def unit_vectors(rng: np.random.Generator, n: int, d: int) -> NDArray[np.float32]:
    """Random directions (n, d)."""
    rows_nd = rng.standard_normal((n, d), dtype=np.float32)
    rows_nd /= np.linalg.norm(rows_nd, axis=1, keepdims=True)
    return rows_nd


def build(root: str, out: str, n: int, files: int) -> dict[str, float]:
    """Build a folder of the first n vectors; its peak memory beyond one file of it."""
    from patch_retriever.retrieval.index.items import Entry
    from patch_retriever.retrieval.index.manifest import MadeBy
    from patch_retriever.retrieval.index.writing import build_folder
    from patch_retriever.retrieval.vectors import Shards

    arrays = [np.load(p, mmap_mode="r") for p in sorted(Path(root, "shards").iterdir())]
    d, first = arrays[0].shape[1], len(arrays[0])
    arrays = [a[: n - i * first] for i, a in enumerate(arrays) if i * first < n]
    made_by = MadeBy("random vectors", "", "", "", None, False, True, {}, "document")

    def entries(positions: range, first: int) -> Iterator[Entry]:
        return (Entry(i, str(i), None, None, "") for i, _ in enumerate(positions, first))

    folder = Path(root, out)
    folder.mkdir()
    shards = Shards(arrays)
    per_file = -(-n // files)
    with Peak() as peak:
        began = time.perf_counter()
        built = build_folder(folder, out, made_by, shards, entries, "Flat", d, per_file)
        seconds = time.perf_counter() - began
    index_mib = sum(shard.index.bytes for shard in built.shards) / 2**20
    largest_mib = max(shard.index.bytes for shard in built.shards) / 2**20
    beyond = {"peak_mib": peak.mib, "beyond_mib": peak.mib - largest_mib}
    return {"index_mib": index_mib, **beyond, "seconds": seconds}


def search(root: str, out: str, size: dict[str, int], threads: int, repeats: int) -> dict[str, Any]:
    """Seconds of both, and the share of answers that are the same."""
    import faiss

    from patch_retriever.retrieval.index.search import SavedIndex

    faiss.omp_set_num_threads(threads)
    n, d, k = size["candidates"], size["dimension"], size["k"]
    queries_qd = unit_vectors(np.random.default_rng(1), size["queries"], d)
    began = time.perf_counter()
    SavedIndex(Path(root, out))
    opened = time.perf_counter()
    ours = SavedIndex(Path(root, out))
    again = time.perf_counter()
    bare = faiss.IndexFlatIP(d)
    bare.codes.resize(4 * n * d)  # in one piece, as it is for ours
    bare.codes.resize(0)
    for path in sorted(Path(root, "shards").iterdir()):
        bare.add(np.load(path))
    figures: dict[str, Any] = {"at_once": {}}
    for at_once in [size for size in AT_ONCE if size < len(queries_qd)] + [len(queries_qd)]:
        seconds: dict[str, list[float]] = {"ours": [], "bare": []}
        answers = {}
        for repeat in range(repeats + 1):
            for name, index in (("ours", ours), ("bare", bare)):
                start = time.perf_counter()
                answers[name] = index.search(queries_qd[:at_once], k)
                if repeat:  # the first reads the mapped file
                    seconds[name].append(time.perf_counter() - start)
        found: dict[str, Any] = {
            name: {"median": float(np.median(s)), "fastest": min(s), "all": s}
            for name, s in seconds.items()
        }
        found["ratio"] = found["ours"]["median"] / found["bare"]["median"]
        figures["at_once"][at_once] = found
    figures |= found
    (ours_scores, ours_found), (bare_scores, bare_found) = answers["ours"], answers["bare"]
    np.testing.assert_allclose(ours_scores, bare_scores, atol=1e-5)
    figures["same"] = float((ours_found == bare_found).mean())
    return {**figures, "open_seconds": opened - began, "again_seconds": again - opened}


if __name__ == "__main__":
    main()
