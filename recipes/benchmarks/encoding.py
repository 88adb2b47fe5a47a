"""Items a second and peak memory of encoding, beside plain sentence-transformers.

    python recipes/benchmarks/encoding.py            # 580 million parameters, about 20 minutes
    python recipes/benchmarks/encoding.py --quick    # a small one, under a minute

The model is a LLaVA of random weights: a SigLIP tower and a decoder of the shape and vocabulary of
Qwen2. Texts, pictures and both are mixed, pictures are JPEG files of many sizes. Each way of
encoding has a process of its own; they take turns, one at work at a time, in another order every
round.

In memory, all with the same prompts and mean pooling, pictures decoded before:
- base: plain sentence-transformers, without a patch;
- cut: the same with the first half of the decoder's layers;
- export: the folder that we write, with a patch of 64 concepts and a map for each role;
- live: `PatchedRetriever` with the same patch;
- official: as the paper's released code encodes, with the language-model head and its loss, all
  hidden states, one item at a time.

From files to a file:
- plain loop: pictures opened in a loop, then plain sentence-transformers;
- ours: `encode_file`, which is `patch-retriever encode`, on the same model.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
from encoding_worker import make, serve
from reporting import Report, machine, table

WAYS = ("base", "cut", "export", "live", "official", "plain loop", "ours")
GOALS = {("export", "base"): 0.98, ("live", "base"): 0.95, ("export", "official"): 2.0}
"""Times the other's items a second, at least."""


@dataclass(frozen=True)
class Size:
    """The model and what it encodes."""

    width: int = 896
    layers: int = 24
    heads: int = 14
    mlp: int = 4864
    vocabulary: int = 151_936
    tower_width: int = 768
    tower_layers: int = 12
    tower_mlp: int = 3072
    image_size: int = 224
    texts: int = 32
    pictures: int = 16
    both: int = 16
    longest_side: int = 2400
    batch_size: int = 8
    concepts: int = 64


QUICK = Size(
    width=256,
    layers=4,
    heads=4,
    mlp=1024,
    vocabulary=16_384,
    tower_width=192,
    tower_layers=3,
    tower_mlp=768,
    image_size=112,
    texts=16,
    pictures=8,
    both=8,
    longest_side=800,
    concepts=16,
)


@click.command()
@click.option("--quick", is_flag=True, help="A small model, under a minute.")
@click.option("--threads", default=2, show_default=True, help="Of torch.")
@click.option("--rounds", default=3, show_default=True, help="Of each way, in turn.")
@click.option("--workers", default=2, show_default=True, help="Threads that prepare pictures.")
@click.option("--dtype", default="float32", show_default=True, help="That the models run in.")
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Where files go. [default: a temporary one]"
)
@click.option("--json", "as_json", is_flag=True, help="Only the line of JSON.")
def main(
    quick: bool,
    threads: int,
    rounds: int,
    workers: int,
    dtype: str,
    folder: Path | None,
    as_json: bool,
) -> None:
    """Encode mixed items with each way in turn."""
    report = Report(as_json)
    size = QUICK if quick else Size()
    settings = {**asdict(size), "quick": quick, "rounds": rounds, "dtype": dtype}
    figures: dict[str, Any] = {"settings": {**settings, "workers": workers}, **machine(threads)}
    with tempfile.TemporaryDirectory(prefix="encoding-", dir=folder) as name:
        report.progress("writing the model and the items")
        figures["parameters"] = begin(make, Path(name), asdict(size), dtype).recv()
        found = take_turns((Path(name), threads, size.batch_size, workers), rounds, report)
    n = size.texts + size.pictures + size.both
    for way in found.values():
        way["items_per_second"] = n / statistics.median(way["seconds"])
    rows = [
        [
            name,
            f"{way['items_per_second']:.2f}",
            f"{way['peak_mib']:.0f}",
            *(f"{way['parts'].get(part, 0.0):.1f}" for part in ("prepare", "model", "decoder")),
            *(f"{statistics.median(way[key]):.1f}" for key in ("seconds", "cpu_seconds")),
        ]
        for name, way in found.items()
    ]
    parts = ["preparing, s", "model, s", "of it the decoder, s"]
    head = ["way", "items/s", "peak memory, MiB", *parts, "whole, s", "CPU, s"]
    report.say(*table(head, rows), "")
    ratios, met = {}, {}
    for (ours, other), goal in GOALS.items():
        label = f"{ours} / {other}"
        ratios[label] = ratio(found[ours]["seconds"], found[other]["seconds"])
        met[label] = ratios[label] >= goal
        said = "met" if met[label] else "missed"
        report.say(f"{label}: {ratios[label]:.3f} times the items/s (goal: {goal}, {said})")
    ratios["ours / plain loop"] = ratio(found["ours"]["seconds"], found["plain loop"]["seconds"])
    report.say(f"ours / plain loop: {ratios['ours / plain loop']:.3f} times the items/s")
    decoders = [found[way]["parts"]["decoder"] for way in ("cut", "base")]
    ratios["decoder of cut / base"] = decoders[0] / decoders[1]
    report.say(
        f"cut: {size.layers // 2} of {size.layers} layers, {decoders[0] / decoders[1]:.3f} of the "
        "decoder's time"
    )
    apart = {name: way["apart"] for name, way in found.items() if "apart" in way and name != "cut"}
    report.say(
        "largest difference from base: " + ", ".join(f"{k} {v:.1g}" for k, v in apart.items())
    )
    goals = {f"{a} / {b}": goal for (a, b), goal in GOALS.items()}
    report.finish({"ways": found, "ratios": ratios, "goals": goals, "goals_met": met, **figures})


def ratio(ours: Sequence[float], other: Sequence[float]) -> float:
    """How many times the other's items a second: the median of the rounds' ratios."""
    return statistics.median(b / a for a, b in zip(ours, other, strict=True))


def begin(step: Callable[..., None], *arguments: Any) -> Connection:
    """Run a step in a process of its own, which talks through the connection."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sentence_transformers"])  # imported once for all
    here, there = context.Pipe()
    context.Process(target=step, args=(there, *arguments), daemon=True).start()
    there.close()  # so that a process that ends is noticed
    return here


def take_turns(arguments: Sequence[Any], rounds: int, report: Report) -> dict[str, dict[str, Any]]:
    """Every way's seconds in each round and its figures; one is at work at a time."""
    running = {}
    for way in WAYS:
        report.progress(f"loading and warming up: {way}")
        running[way] = begin(serve, way, *arguments)
        ask(running[way], "warm")
    turns: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for number in range(rounds):
        for i in range(len(WAYS)):
            way = WAYS[(i + number) % len(WAYS)]
            turns[way].append(ask(running[way], "round"))
            report.progress(f"round {number + 1}, {way}: {turns[way][-1]['seconds']:.1f} s")
    return {
        way: {
            **{key: [turn[key] for turn in turns[way]] for key in ("seconds", "cpu_seconds")},
            **ask(running[way], "end"),
        }
        for way in WAYS
    }


def ask(process: Connection, request: str) -> dict[str, Any]:
    """A process's answer to a request."""
    process.send(request)
    answer: dict[str, Any] = process.recv()
    return answer


if __name__ == "__main__":
    main()
