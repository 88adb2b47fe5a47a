"""All scores of a large SAE's concepts on a CPU: how long, and in how much memory.

    python recipes/benchmarks/scoring.py            # 32,768 concepts, a minute or two in all
    python recipes/benchmarks/scoring.py --quick    # a small size, seconds

Codes, dictionary and pairs are random: every item (a text or an image, half of each) has the same
number of active concepts, and its pooled vector is what they rebuild. Hard negatives are mined from
the raw and from the centred vectors as a build does it. A fresh process does the work; its peak
resident memory, from its start, counts everything it holds (Python and torch, the dictionary, the
codes and vectors). Beside it stand the sizes of the dense float32 matrices that are never made.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import click
from reporting import Report, machine, table

SECONDS_GOAL, GIB_GOAL = 60, 3
KINDS = ("seconds", "cpu_seconds")
"""Of the clock, and of all threads: the second hardly suffers from what else runs."""


@dataclass(frozen=True)
class Size:
    """What is scored."""

    concepts: int = 32_768
    width: int = 3_584
    pairs: int = 5_000
    active: int = 50
    negatives: int = 5
    """Mined for every text and for every image."""


QUICK = Size(concepts=4_096, width=256, pairs=500, active=20)


@click.command()
@click.option("--quick", is_flag=True, help="A small size, seconds.")
@click.option("--threads", default=2, show_default=True, help="Of torch.")
@click.option("--json", "as_json", is_flag=True, help="Only the line of JSON.")
@click.option("--worker", hidden=True, help="JSON of a size: score it and tell.")
def main(quick: bool, threads: int, as_json: bool, worker: str | None) -> None:
    """Score random concepts in a process of its own and show its time and peak memory."""
    if worker:
        click.echo(json.dumps(measure(Size(**json.loads(worker)), threads)))
        return
    report = Report(as_json)
    size = QUICK if quick else Size()
    report.progress(f"scoring {size.concepts:,} concepts on {size.pairs:,} pairs")
    options = ["--worker", json.dumps(asdict(size)), "--threads", str(threads)]
    done = subprocess.run(
        [sys.executable, __file__, *options], check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    avoided = dense_gib(size)
    rows = [[name, *(f"{found[k][name]:.1f}" for k in KINDS)] for name in found["seconds"]]
    report.say(*table(["step", "seconds", "of processor time"], rows), "")
    rows = [["peak resident, all in all", f"{found['peak_gib']:.2f}"]]
    rows += [["  of it before the first step", f"{found['before_gib']:.2f}"]]
    rows += [[f"avoided: {name}", f"{gib:.2f}"] for name, gib in avoided.items()]
    report.say(*table(["memory", "GiB"], rows), "")
    met = found["seconds"]["all"] < SECONDS_GOAL and found["peak_gib"] < GIB_GOAL
    goal = f"goal: under {SECONDS_GOAL} s and {GIB_GOAL} GiB"
    report.say(f"{goal}, {'met' if met else 'missed'}")
    ratios = {"avoided_to_peak": sum(avoided.values()) / found["peak_gib"]}
    settings = {**asdict(size), "quick": quick, "goal_met": met}
    figures = {**found, "avoided_gib": avoided, "ratios": ratios, "settings": settings}
    report.finish({**figures, **machine(threads)})


def dense_gib(size: Size) -> dict[str, float]:
    """GiB of the matrices that the definitions speak of, in float32."""
    items = 2 * size.pairs
    return {
        "codes of all items (items x concepts)": items * size.concepts * 4 / 2**30,
        "the same, centred": items * size.concepts * 4 / 2**30,
        "M = D D^T (concepts x concepts)": size.concepts**2 * 4 / 2**30,
        "B, the bridge matrix (concepts x concepts)": size.concepts**2 * 4 / 2**30,
    }


def measure(size: Size, threads: int) -> dict[str, Any]:
    """Seconds of every step and the peak resident memory of this process."""
    import torch

    torch.set_num_threads(threads)
    from patch_retriever.concepts.scores import score_concepts
    from patch_retriever.features import Features
    from patch_retriever.retrieval.collection import Task
    from patch_retriever.retrieval.negatives import hard_negatives
    from patch_retriever.sae.codes import Codes

    generator = torch.Generator().manual_seed(0)
    n, k = 2 * size.pairs, size.active
    dictionary_cd = torch.randn(size.concepts, size.width, generator=generator)
    dictionary_cd /= dictionary_cd.norm(dim=1, keepdim=True)
    concepts_e = torch.randint(0, size.concepts, (n * k,), generator=generator)
    values_e = torch.rand(n * k, generator=generator)
    codes = Codes(torch.arange(0, n * k + 1, k), concepts_e, values_e, size.concepts)
    pooled_nd = codes.matmul(dictionary_cd)
    kinds_n = torch.arange(n) // size.pairs  # texts, then images
    features = Features(pooled_nd, pooled_nd, codes, kinds_n)
    texts, images = tuple(range(size.pairs)), tuple(range(size.pairs, n))
    answers = tuple((i,) for i in range(size.pairs))
    tasks = [
        Task("t->i", "t->i", texts, images, answers),
        Task("i->t", "i->t", images, texts, answers),
    ]
    pairs_n2 = torch.stack([torch.tensor(texts), torch.tensor(images)], 1)
    before_gib = peak_gib()
    seconds: dict[str, float] = {}
    cpu_seconds: dict[str, float] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        began, cpu_began = time.monotonic(), time.process_time()
        yield
        seconds[name] = time.monotonic() - began
        cpu_seconds[name] = time.process_time() - cpu_began

    with timed("all"):
        with timed("hard negatives"):
            negatives_n2 = hard_negatives(pooled_nd, tasks, size.negatives)
            centred_nd = pooled_nd.clone()
            for kind in (0, 1):
                centred_nd[kinds_n == kind] -= centred_nd[kinds_n == kind].mean(0)
            negatives_centred_n2 = hard_negatives(centred_nd, tasks, size.negatives)
            del centred_nd
        with timed("scores"):
            score_concepts(features, dictionary_cd, pairs_n2, negatives_n2, negatives_centred_n2)
    counts = {"pairs": len(pairs_n2), "hard_negatives": len(negatives_n2)}
    memory = {"peak_gib": peak_gib(), "before_gib": before_gib}
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, **memory, **counts}


def peak_gib() -> float:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
