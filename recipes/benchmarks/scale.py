"""Does a build take what its plan says? A scaled-down one is held against `build --dry-run`'s plan.

    python recipes/benchmarks/scale.py            # d 1,024, 16,384 concepts, 5,000 pairs; minutes
    python recipes/benchmarks/scale.py --quick    # a small size, under a minute

Random vectors go through the code of a build, stage by stage, each in a process of its own: a store
is written and an SAE trained on it for a few steps; features with sparse codes are saved; concepts
are scored; every method is fitted in one setting and tried on validation, then on test. Peak
resident memory, bytes written and seconds stand beside the plan's. There is no model, so what the
forward passes take is not in it. The plan of a 7B model is shown below.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from reporting import Report, machine, table

from patch_retriever import plan

if TYPE_CHECKING:
    from patch_retriever.data import Data
    from patch_retriever.patch.calibration import Calibration
    from patch_retriever.patch.methods import Method
    from patch_retriever.stages.features import PatchedFeatures

STAGES = ("collect", "sae", "features", "score", "select", "evaluate")
ONE_SETTING = plan.Fits(spectra=33, svds=8, solves=2, gains=3, patches=40, shown=40)
"""One setting of every method."""
WITHIN = 0.2
"""Of the plan: how far a run may be from it in memory and on disk."""


@dataclass(frozen=True)
class Size:
    """What is built."""

    width: int = 1024
    concepts: int = 16_384
    pairs: int = 5_000
    active: int = 32
    image_tokens: int = 200
    sae_steps: int = 40

    @property
    def sizes(self) -> plan.Sizes:
        """What the plan follows from; vectors' codes are as sparse as one token's."""
        calibration, validation, test = splits(self.pairs)
        return plan.Sizes(
            calibration,
            validation,
            test,
            width=self.width,
            concepts=self.concepts,
            active=self.active,
            image_tokens=self.image_tokens,
            sae_steps=self.sae_steps,
            pooled_tokens=False,
            fits=ONE_SETTING,
        )


def splits(pairs: int) -> tuple[plan.Split, plan.Split, plan.Split]:
    """Calibration, validation and test, as a build divides so many pairs."""
    from patch_retriever.retrieval.pairs import SHARES

    parts = {name: plan.Split.of_pairs(round(share * pairs)) for name, share in SHARES.items()}
    return parts["calibration"], parts["validation"], parts["test"]


QUICK = Size(width=64, concepts=512, pairs=200, image_tokens=50, sae_steps=10)


@click.command()
@click.option("--quick", is_flag=True, help="A small size, under a minute.")
@click.option("--threads", default=2, show_default=True, help="Of torch.")
@click.option("--json", "as_json", is_flag=True, help="Only the line of JSON.")
@click.option("--worker", nargs=3, hidden=True, help="STAGE SIZE FOLDER: do it and tell.")
def main(quick: bool, threads: int, as_json: bool, worker: tuple[str, str, str] | None) -> None:
    """Run every stage on random vectors and show what it took beside the plan."""
    if worker:
        found = work(worker[0], Size(**json.loads(worker[1])), Path(worker[2]), threads)
        click.echo(json.dumps(found))
        return
    report, size = Report(as_json), QUICK if quick else Size()
    sizes = size.sizes
    planned = {stage.name: stage for stage in plan.stages(sizes)}
    speed = plan.measured_speed()
    rows, figures = [], []
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        for name in STAGES:
            report.progress(name)
            options = ["--worker", name, json.dumps(asdict(size)), folder]
            done = subprocess.run(
                [sys.executable, __file__, *options, "--threads", str(threads)],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            run: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
            stage = planned[name]
            run |= {"stage": name, "planned_seconds": 60 * speed.minutes(stage)}
            run["planned_memory_bytes"] = stage.memory + plan.RUNTIME_BYTES
            run["planned_disk_bytes"] = stage.disk
            figures.append(run)
            rows.append([name, *_cells(run)])
    head = ["stage", "memory GB", "planned", "disk GB", "planned", "seconds", "planned"]
    report.say(*table(head, rows), "")
    peaks = [max(run[key] for run in figures) for key in ("memory_bytes", "planned_memory_bytes")]
    disks = [sum(run[key] for run in figures) for key in ("disk_bytes", "planned_disk_bytes")]
    ratios = {"memory": peaks[0] / peaks[1], "disk": disks[0] / disks[1]}
    met = all(abs(ratio - 1) <= WITHIN for ratio in ratios.values())
    report.say(
        f"of the plan: {ratios['memory']:.2f} of its memory, {ratios['disk']:.2f} of its disk; "
        f"goal: within {WITHIN:.0%}, {'met' if met else 'missed'}",
        "",
        "A 7B model, 50,000 pairs:",
        *plan.plan_lines(seven_billion := plan.plan_json(large(), plan.ACCELERATOR)),
    )
    settings = {**asdict(size), "quick": quick, "goal_met": met}
    figures_7b = {k: v for k, v in seven_billion.items() if k not in ("sizes", "speed")}
    report.finish(
        {
            "figures": figures,
            "ratios": ratios,
            "plan_of_7b": figures_7b,
            "settings": settings,
            **machine(threads),
        }
    )


def _cells(run: dict[str, Any]) -> list[str]:
    cells = []
    for key in ("memory_bytes", "disk_bytes"):
        cells += [f"{run[key] / 1e9:.2f}", f"{run[f'planned_{key}'] / 1e9:.2f}"]
    return [*cells, f"{run['seconds']:.0f}", f"{run['planned_seconds']:.0f}"]


def large() -> plan.Sizes:
    """LLaVA-1.5-7B with 1,000 tokens an image, in bfloat16; an SAE of 32,768 concepts."""
    calibration, validation, test = splits(50_000)
    return plan.Sizes(
        calibration,
        validation,
        test,
        width=4096,
        concepts=32_768,
        active=24,
        image_tokens=1000,
        parameters=7_063_000_000,
        decoder_parameters=6_476_000_000,
        parameter_bytes=2,
        parts=2,
    )


def work(stage: str, size: Size, folder: Path, threads: int) -> dict[str, float]:
    """One stage: its seconds of processor time a thread (whatever else runs), the peak resident
    memory of this process, and what it wrote. All that a build imports is imported before."""
    import resource

    import torch

    torch.set_num_threads(threads)
    import faiss  # noqa: F401
    import sklearn.svm  # noqa: F401

    import patch_retriever.build  # noqa: F401

    before = _bytes(folder)
    began = time.process_time()
    {
        "collect": collect,
        "sae": train,
        "features": features,
        "score": score,
        "select": select_methods,
        "evaluate": evaluate_methods,
    }[stage](size, folder)
    seconds = (time.process_time() - began) / threads
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "memory_bytes": peak, "disk_bytes": _bytes(folder) - before}


def _bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def collect(size: Size, folder: Path) -> None:
    """A store of random activations, as large as planned."""
    import torch

    from patch_retriever.activations.writer import StoreWriter

    writer, left = StoreWriter(folder / "collect"), plan.store_tokens(size.sizes)
    generator = torch.Generator().manual_seed(0)
    items = 2 * size.sizes.calibration.images
    tokens_td = torch.randn(16_384, size.width, generator=generator)
    while left:
        n = min(left, len(tokens_td))
        flags_t = torch.ones(n)
        writer.add(tokens_td[:n], flags_t, flags_t, torch.randint(items, (n,), generator=generator))
        left -= n
    writer.close()


def train(size: Size, folder: Path) -> None:
    """An SAE on the store, for a few steps."""
    from patch_retriever.activations.store import Store, StoreSource
    from patch_retriever.sae.formats import save_sae
    from patch_retriever.sae.settings import SAESettings
    from patch_retriever.sae.train import train_saes

    expansion = size.concepts // size.width
    settings = SAESettings(expansion=expansion, k=size.active, steps=size.sae_steps)
    (trained,) = train_saes(StoreSource(Store(folder / "collect")), [settings])
    save_sae(trained.sae, folder / "sae", trained.about())


def features(size: Size, folder: Path) -> None:
    """Vectors of pairs that are alike, apart by modality, with random sparse codes."""
    import torch

    from patch_retriever.features import Features
    from patch_retriever.sae.codes import Codes

    generator = torch.Generator().manual_seed(1)
    names = ("calibration", "validation", "test")
    for name, split in zip(names, size.sizes.splits, strict=True):
        n, k = split.texts, size.active
        meaning_nd = torch.randn(n, size.width, generator=generator)
        noise_nd = torch.randn(2 * n, size.width, generator=generator)
        x_nd = meaning_nd.repeat(2, 1) + noise_nd
        x_nd[n:, 0] += 40
        concepts_e = torch.randint(size.concepts, (2 * n * k,), generator=generator)
        values_e = torch.rand(2 * n * k, generator=generator)
        codes = Codes(torch.arange(0, 2 * n * k + 1, k), concepts_e, values_e, size.concepts)
        kinds_n = (torch.arange(2 * n) // n).to(torch.int8)
        Features(x_nd, x_nd.clone(), codes, kinds_n).save(
            folder / "features" / f"{name}.safetensors"
        )


def data_of(size: Size) -> Data:
    """The tasks of the splits: texts, then images, one of each a pair."""
    from patch_retriever.data import Data
    from patch_retriever.items import Item
    from patch_retriever.pictures.picture import PictureFile
    from patch_retriever.retrieval.collection import Collection, Task

    collections = {}
    names = ("calibration", "validation", "test")
    for name, split in zip(names, size.sizes.splits, strict=True):
        n = split.texts
        texts, images = tuple(range(n)), tuple(range(n, 2 * n))
        answers = tuple((i,) for i in range(n))
        items = (
            *(Item(str(i)) for i in texts),
            *(Item(None, PictureFile(Path(f"{i}.png"))) for i in images),
        )
        tasks = (
            Task("t->i", "t->i", texts, images, answers),
            Task("i->t", "i->t", images, texts, answers),
        )
        collections[name] = Collection(name, items, tasks)
    return Data(collections, "random vectors")


def score(size: Size, folder: Path) -> None:
    """The concept table, as the stage of a build makes it but for the vocabulary's tokens."""
    import torch

    from patch_retriever.concepts.query import TABLE
    from patch_retriever.concepts.scores import score_concepts
    from patch_retriever.concepts.table import examples
    from patch_retriever.features import Features
    from patch_retriever.retrieval.negatives import hard_negatives
    from patch_retriever.sae.formats import load_sae

    found = Features.load(folder / "features" / "calibration.safetensors")
    collection, sae = data_of(size).splits["calibration"], load_sae(folder / "sae")
    raw_nd, kinds_n = found.pooled_nd, found.kinds_n.long()
    means_kd = torch.stack([raw_nd[kinds_n == kind].mean(0) for kind in range(2)])
    negatives = [
        hard_negatives(x_nd, collection.tasks) for x_nd in (raw_nd, raw_nd - means_kd[kinds_n])
    ]
    pairs_n2 = torch.from_numpy(collection.pairs(("t->i", "i->t")))
    scores = score_concepts(found, sae.W_dec_cd, pairs_n2, *negatives)
    rows = examples(found.codes, kinds_n, [["token"] * 8] * size.concepts, "none")
    scores.save(folder / "score" / TABLE, rows)


def fitted(size: Size, folder: Path) -> tuple[Calibration, Data, PatchedFeatures, list[Method]]:
    """What methods learn from and are tried on, and one setting of each."""
    from patch_retriever.backbones.readout import PAPER_READOUT
    from patch_retriever.patch.methods import methods
    from patch_retriever.stages.features import PatchedFeatures
    from patch_retriever.stages.selection import load_calibration

    data = data_of(size)
    no_model: Any = None  # only patches of layers would need one
    saved = PatchedFeatures(folder / "features", no_model, data, PAPER_READOUT, 1)
    calibration = load_calibration(
        PAPER_READOUT, data, saved, folder / "sae", folder / "score", seed=0
    )
    assert calibration.gate is not None
    every = [replace(method, grid=method.grid[:1]) for method in methods(calibration)]
    return calibration, data, saved, every


def select_methods(size: Size, folder: Path) -> None:
    """Every method in one setting on validation."""
    from patch_retriever.backbones.readout import PAPER_READOUT
    from patch_retriever.progress import no_progress
    from patch_retriever.stages.selection import select
    from patch_retriever.stages.trials import HeldOut, Trial

    calibration, data, saved, every = fitted(size, folder)
    held_out = HeldOut([Trial(tuple(every), saved.of("validation"), data.splits["validation"])])
    select(calibration, held_out, PAPER_READOUT, folder / "select", no_progress, every)


def evaluate_methods(size: Size, folder: Path) -> None:
    """Every method in one setting on test."""
    from patch_retriever.retrieval.evaluate import evaluate

    _, data, saved, every = fitted(size, folder)
    found = saved("test", {})
    for method in every:
        if not method.left_out and (patches := method.make(**method.grid[0])):
            evaluate(patches, found, data.splits["test"])


if __name__ == "__main__":
    main()
