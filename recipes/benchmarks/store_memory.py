"""Does training from a store need more memory when the store is larger? It must not.

    python recipes/benchmarks/store_memory.py            # stores of 1 to 8 GiB, some minutes
    python recipes/benchmarks/store_memory.py --quick    # 64 to 256 MiB, well under a minute

For every size a store of random activations is written, then a fresh process trains on it for the
same number of steps, long enough to read all of it, with its private memory limited (RLIMIT_DATA)
to a fraction of the largest store; its peak resident memory is reported.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from reporting import Report, machine, table

WIDTH, SHARD_TOKENS, BATCH = 1024, 16_384, 4096


@click.command()
@click.option("--quick", is_flag=True, help="Small stores, under a minute.")
@click.option("--json", "as_json", is_flag=True, help="Only the line of JSON.")
@click.option("--worker", nargs=3, hidden=True, help="STORE STEPS BLOCK_BYTES: train and tell.")
def main(quick: bool, as_json: bool, worker: tuple[str, str, str] | None) -> None:
    """Train on stores of growing size and show the peak memory of each."""
    if worker:
        click.echo(json.dumps(train(Path(worker[0]), int(worker[1]), int(worker[2]))))
        return
    report = Report(as_json)
    sizes = [64, 128, 256] if quick else [1024, 2048, 4096, 8192]
    block_mib = 16 if quick else 256
    limit_mib = None if quick else 4096
    # every store is read once: as many batches as the largest has
    steps = max(sizes) * 2**20 // (2 * WIDTH) // BATCH
    rows, figures = [], []
    for mebibytes in sizes:
        with tempfile.TemporaryDirectory(prefix="store-") as folder:
            report.progress(f"writing a store of {mebibytes} MiB")
            write(Path(folder), mebibytes)
            report.progress(f"training on it for {steps} steps")
            found = measure(Path(folder), steps, block_mib * 2**20, limit_mib)
            shutil.rmtree(folder, ignore_errors=True)
        figures.append({"store_mib": mebibytes, **found})
        rows.append([str(mebibytes), f"{found['peak_mib']:.0f}", f"{found['seconds']:.0f}"])
    report.say(*table(["store (MiB)", "peak resident (MiB)", "seconds"], rows))
    settings: dict[str, Any] = {"width": WIDTH, "batch": BATCH, "steps": steps}
    settings |= {"block_mib": block_mib, "private_memory_limit_mib": limit_mib, "quick": quick}
    ratio = figures[-1]["peak_mib"] / figures[0]["peak_mib"]
    report.say(f"{sizes[-1] // sizes[0]} times the store, {ratio:.2f} times the memory")
    report.finish({"figures": figures, "ratio": ratio, "settings": settings, **machine(2)})


def write(folder: Path, mebibytes: int) -> None:
    """A store of random activations; every shard holds the same numbers, times its own factor."""
    import torch

    from patch_retriever.activations.writer import StoreWriter

    writer = StoreWriter(folder, SHARD_TOKENS)
    base_td = torch.randn(SHARD_TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    flags_t = torch.zeros(SHARD_TOKENS)
    for number in range(mebibytes * 2**20 // (2 * WIDTH * SHARD_TOKENS)):
        writer.add(base_td * (1 + number % 7 / 10), flags_t, flags_t, flags_t)
    writer.close()


def measure(store: Path, steps: int, block_bytes: int, limit_mib: int | None) -> dict[str, float]:
    """Peak resident memory and seconds of a fresh process that trains on the store."""

    def limited() -> None:
        if limit_mib is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit_mib * 2**20, limit_mib * 2**20))

    command = [sys.executable, __file__, "--worker", str(store), str(steps), str(block_bytes)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, preexec_fn=limited)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def train(store: Path, steps: int, block_bytes: int) -> dict[str, float]:
    """Train a small SAE, so that memory is the stream's; runs in its own process."""
    from patch_retriever.activations.store import Store, StoreSource
    from patch_retriever.sae.settings import SAESettings
    from patch_retriever.sae.train import train_saes

    settings = SAESettings(expansion=1, k=8, steps=steps, batch_size=BATCH)
    began = time.monotonic()
    train_saes(StoreSource(Store(store), block_bytes=block_bytes), [settings])
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_mib": peak_kib / 1024, "seconds": time.monotonic() - began}


if __name__ == "__main__":
    main()
