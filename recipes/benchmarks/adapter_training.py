"""What a patch in the forward pass costs a step of an adapter's training: time and memory.

    python recipes/benchmarks/adapter_training.py            # about 5 minutes
    python recipes/benchmarks/adapter_training.py --quick    # a small model, under a minute

The model is a LLaVA of random weights (as in encoding.py), the adapter a LoRA on all linear layers
of its decoder, the patch 64 concepts and a map for each role. A step is forward, backward and AdamW
over the same batch of prepared pairs, in chunks by GradCache. Each way has a process of its own;
they take turns, in another order every round. Peak memory is the process's own beyond what it held
before its first step.

- without: the readout alone, contrastive loss;
- with: the same through the patch;
- all losses: the same with rebalancing and retention;
- checkpointing: with, and activations computed again on the way back;
- sentence-transformers: its CachedMultipleNegativesRankingLoss over the same pairs and LoRA, with
  the same chunks, without a patch.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
from encoding_worker import MODEL, write_model
from reporting import Peak, Report, machine, table

WAYS = ("without", "with", "all losses", "checkpointing", "sentence-transformers")
GOAL = 1.10
"""Times the time and the memory of training without a patch, at most."""


@dataclass(frozen=True)
class Size:
    """The model, its patch and a batch."""

    width: int = 512
    layers: int = 12
    heads: int = 8
    mlp: int = 2048
    vocabulary: int = 32_768
    tower_width: int = 256
    tower_layers: int = 4
    tower_mlp: int = 1024
    image_size: int = 112
    concepts: int = 64
    dictionary: int = 4096
    pairs: int = 16
    chunk_size: int = 8
    rank: int = 16


QUICK = Size(
    width=256, layers=2, heads=4, mlp=1024, vocabulary=4096, tower_width=128, tower_layers=1,
    tower_mlp=256, dictionary=1024, pairs=8, chunk_size=8,
)  # fmt: skip


def serve(way: str, told: Connection, root: Path, size: Size, threads: int) -> None:
    """Make the step, then run it as often as it is asked: seconds; at the end the peak, in MiB."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    step = (theirs if way == "sentence-transformers" else ours)(way, root, size)
    ctypes.CDLL(None).malloc_trim(0)  # what making the step has freed
    with Peak() as peak:
        told.send(None)
        time.sleep(0.05)
        before = peak.mib
        while told.recv() == "step":
            began = time.perf_counter()
            step()
            told.send(time.perf_counter() - began)
    told.send(peak.mib - before)


def ours(way: str, root: Path, size: Size) -> Callable[[], None]:
    """A step of `AdapterTrainer`."""
    from patch_retriever.adapters.batches import captions_of
    from patch_retriever.adapters.forward import PatchedForward
    from patch_retriever.adapters.losses import ConceptGroups
    from patch_retriever.adapters.settings import AdapterSettings
    from patch_retriever.adapters.training import AdapterTrainer
    from patch_retriever.backbones.load import load_backbone
    from patch_retriever.backbones.readout import PAPER_READOUT
    from patch_retriever.patch.artefact import Patch

    training, validation = data(size)
    sae, patch = concepts(size)
    every = way == "all losses"
    settings = AdapterSettings(
        rank=size.rank, batch_size=size.pairs, hard_negatives=0, chunk_size=size.chunk_size,
        rebalancing=0.1 if every else 0.0, retention=0.1 if every else 0.0,
        gradient_checkpointing=way == "checkpointing",
    )  # fmt: skip
    half = sae.n_concepts // 2
    import torch

    numbers_c = torch.arange(sae.n_concepts)
    groups = ConceptGroups(sae, numbers_c < half, numbers_c >= half)
    forward = PatchedForward(
        load_backbone(str(root / MODEL)), PAPER_READOUT,
        Patch(PAPER_READOUT.site) if way == "without" else patch, groups.energy if every else None,
    )  # fmt: skip
    captions = captions_of(training, settings.captions_per_step)
    trainer = AdapterTrainer(forward, training, validation, captions, settings, 0)
    batch, chunks = trainer._prepared(forward.transformer, 0)
    training_mode = trainer._in_training()  # held by `step`: it ends with its context
    training_mode.__enter__()

    def step(_held: Any = training_mode) -> None:
        trainer.backward(0, batch, chunks)
        trainer._step(0)

    return step


def theirs(_way: str, root: Path, size: Size) -> Callable[[], None]:
    """The same pairs by sentence-transformers' own loss."""
    import torch
    from peft import get_peft_model
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
    )

    from patch_retriever.adapters.batches import Pairs
    from patch_retriever.adapters.settings import AdapterSettings
    from patch_retriever.adapters.targets import adapter_config
    from patch_retriever.backbones.load import load_backbone, with_readout
    from patch_retriever.backbones.readout import PAPER_READOUT

    training, _ = data(size)
    transformer = load_backbone(str(root / MODEL))
    model = with_readout(transformer, PAPER_READOUT)
    base: Any = transformer.model
    adapted = get_peft_model(base, adapter_config(base, AdapterSettings(rank=size.rank)))
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, 1e-3, weight_decay=0.0)
    loss = CachedMultipleNegativesRankingLoss(model, scale=20, mini_batch_size=size.chunk_size)
    batch = Pairs(training, size.pairs, 0).batch(0)
    features = [
        transformer.preprocess([training.items[int(batch.items_m[p])].load() for p in places])
        for places in (batch.queries_q, batch.documents_d)
    ]

    def step() -> None:
        loss([dict(part) for part in features], None).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def data(size: Size) -> tuple[Any, Any]:
    """Full captions and their pictures; hardly any to look at."""
    from dataclasses import replace

    from patch_retriever.scenes.tasks import scenes_collection

    n = size.pairs + 4
    made = scenes_collection("calibration", n, 0)
    made = replace(made, items=made.items[: 6 * n])  # pictures and full captions come first
    task = next(task for task in made.tasks if task.name == "t->i full")
    captions = next(task for task in made.tasks if task.name == "i->t")
    few = replace(made, items=made.items[:1], tasks=())
    return replace(made, tasks=(task, captions)), few


def concepts(size: Size) -> tuple[Any, Any]:
    """An SAE of random weights, and a patch of some of its concepts and a map for each role."""
    import torch

    from patch_retriever.patch.artefact import Patch
    from patch_retriever.patch.operators import Affine, Subtract
    from patch_retriever.sae.model import SparseAutoencoder

    d, c = size.width, size.dictionary
    rows_cd = torch.nn.functional.normalize(torch.randn(c, d), dim=1)
    sae = SparseAutoencoder(
        rows_cd.T.contiguous(), torch.zeros(c), rows_cd, torch.zeros(d), torch.full((c,), 0.05)
    )
    strength_c = (torch.arange(c) < size.concepts).float()
    maps = Affine("maps", "role", torch.randn(2, d, d) / d**0.5, torch.zeros(2, d))
    return sae, Patch("last_hidden_state", Subtract.from_sae(sae, strength_c), (maps,))


@click.command(help=__doc__)
@click.option("--quick", is_flag=True, help="A small model and few steps.")
@click.option("--rounds", type=int, help="Turns that each way takes. [default: 12; quick: 2]")
@click.option("--threads", default=2, show_default=True)
@click.option("--json", "json_only", is_flag=True, help="The line of JSON alone.")
def main(quick: bool, rounds: int | None, threads: int, json_only: bool) -> None:
    report, size = Report(json_only), QUICK if quick else Size()
    rounds = rounds or (2 if quick else 12)
    context = multiprocessing.get_context("spawn")
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    peaks: dict[str, float] = {}
    about = machine(threads)
    with tempfile.TemporaryDirectory() as folder:
        parameters = write_model(Path(folder) / MODEL, asdict(size), "float32")
        running = {}
        for way in WAYS:
            mine, its = context.Pipe()
            process = context.Process(
                target=serve, args=(way, its, Path(folder), size, threads), daemon=True
            )
            process.start()
            running[way] = (process, mine)
        for way, (_, mine) in running.items():
            mine.recv()
            report.progress(f"{way}: ready")
        for turn in range(rounds + 1):
            for way in WAYS[turn % len(WAYS) :] + WAYS[: turn % len(WAYS)]:
                running[way][1].send("step")
                took = running[way][1].recv()
                if turn:  # the first is a warm-up
                    seconds[way].append(took)
        for way, (process, pipe) in running.items():
            pipe.send("end")
            peaks[way] = pipe.recv()
            process.join()
    medians = {way: statistics.median(found) for way, found in seconds.items()}
    ratios = {
        "time, with / without": paired(seconds["with"], seconds["without"]),
        "memory, with / without": peaks["with"] / peaks["without"],
        "time, all losses / without": paired(seconds["all losses"], seconds["without"]),
        "memory, checkpointing / with": peaks["checkpointing"] / peaks["with"],
        "time, sentence-transformers / without": paired(
            seconds["sentence-transformers"], seconds["without"]
        ),
        "memory, sentence-transformers / without": peaks["sentence-transformers"]
        / peaks["without"],
    }
    report.say(
        f"{parameters:,} parameters, {2 * size.pairs} items a step in chunks of {size.chunk_size}, "
        f"{size.concepts} concepts, rank {size.rank}; medians of {rounds} rounds",
        "",
        *table(
            ["way", "ms a step", "x without", "peak, MiB", "x without"],
            [
                [
                    way,
                    f"{1000 * medians[way]:.0f}",
                    f"{paired(seconds[way], seconds['without']):.2f}",
                    f"{peaks[way]:.0f}",
                    f"{peaks[way] / peaks['without']:.2f}",
                ]
                for way in WAYS
            ],
        ),
        "",
    )
    keys = ("time, with / without", "memory, with / without")
    report.finish(
        {
            "benchmark": "adapter_training",
            "parameters": parameters,
            "seconds": medians,
            "peak_mib": peaks,
            "ratios": {name: round(value, 3) for name, value in ratios.items()},
            "goals": dict.fromkeys(keys, GOAL),
            "goals_met": all(ratios[key] <= GOAL for key in keys),
            "settings": {**asdict(size), "rounds": rounds},
            "versions": versions(),
            **about,
        }
    )


def versions() -> dict[str, str]:
    """Of the packages that are measured."""
    from importlib.metadata import version

    return {name: version(name) for name in ("peft", "sentence-transformers", "transformers")}


def paired(a: list[float], b: list[float]) -> float:
    """The median over rounds of a / b: both of a round saw the same machine."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


if __name__ == "__main__":
    main()
