"""One training step of a TopK SAE, ours and four other packages', measured side by side on a CPU.

Each package runs in its own process and environment (their requirements conflict) and trains as
its own trainer does: forward, loss, backward, optimiser, upkeep of the decoder. All get the same
batches in the same order; Adam with a constant rate of 1e-3, betas 0.9 and 0.999 and eps 1e-8;
their own initial weights, drawn from the same seed. The processes take turns of 8 steps, so that
noise of the machine hits all of them. After training all reconstruct the same held-out tokens.

Activations are made up: 24 directions of a dictionary, frequent ones far more often (Zipf), with
positive strengths, plus a mean and some noise. `--store` takes those of an activation store instead
(c = 8 d, k 24, 1,024 tokens a step). They are normalised to mean zero and mean square norm 1 for
every package.

    python recipes/benchmarks/sae_training.py --install peers     # once: the environments
    python recipes/benchmarks/sae_training.py --environments peers
    python recipes/benchmarks/sae_training.py --environments peers --quick --json

Columns: milliseconds a step, the median over turns of a turn's mean (a mean, as some upkeep isn't
done every step), without each process's first turn; how many times as long as our default step,
and as the floor in the precision that the row selects in; FVU, the squared error on held-out tokens
per unit of variance; concepts that never fire there; active concepts per token; resident memory
before the SAE was made, and what training added at its peak. The floor is no training at all but
the product and torch.topk that an exact step can't do without.

Nothing else should run: with every core in use, threads that wait for each other wait for their
neighbours too, and small steps suffer most. A wide p10-p90 tells.
"""

from __future__ import annotations

import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import venv
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import torch
from reporting import Report, machine, table
from sae_training_worker import TRAINERS, Settings

HERE = Path(__file__).parent
PACKAGES = {
    "sparsify": "eai-sparsify",
    "saelens": "sae-lens",
    "dictlearn": "dictionary-learning",
    "overcomplete": "overcomplete",
}
"""Environments of the peers and what pip calls them."""

TURN = 8
"""Steps of a turn: as many as ours has between two upkeeps of the dictionary."""

TIMED_TURNS = 8
"""Turns of a row that is only timed, spread over the run."""

LIKE_OURS = {"MALLOC_TRIM_THRESHOLD_": "2147483647", "MALLOC_MMAP_THRESHOLD_": "33554432"}
"""glibc's settings that `keep_freed_memory` makes, for a process that doesn't call it."""


@dataclass(frozen=True)
class Size:
    """What is trained, on how many steps' tokens."""

    d: int
    c: int
    k: int
    batch: int
    steps: int
    held_out: int = 8192
    training: int = 0
    """Training tokens in the file, gone through again and again; 0: as many as the steps take."""


SIZES = {
    "512": Size(512, 8192, 32, 2048, steps=304),
    "1536": Size(1536, 16384, 32, 1024, steps=96),
    "quick": Size(128, 1024, 16, 512, steps=48, held_out=2048),
}


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    trainer: str
    options: dict[str, bool] = field(default_factory=dict)
    trains: bool = True
    """Else only timed: it computes what another row does, or nothing."""
    as_shipped: bool = True
    """Else with settings that the package leaves to its users, or doesn't offer."""

    @property
    def floor(self) -> str:
        """The floor in the precision that this row selects in."""
        low = self.options.get("bfloat16", self.trainer == "ours") or self.options.get("autocast")
        return "floor, bfloat16" if low else "floor"


ROWS = [
    Row("ours", "ours"),
    Row("ours, float32", "ours", {"bfloat16": False}),
    Row("sparsify", "sparsify"),
    Row("sparsify, bfloat16", "sparsify", {"autocast": True}),
    Row("sparsify, fused Adam", "sparsify", {"fused": True}, trains=False, as_shipped=False),
    Row(
        "sparsify, bfloat16, fused Adam",
        "sparsify",
        {"autocast": True, "fused": True},
        trains=False,
        as_shipped=False,
    ),
    Row("SAELens", "saelens"),
    Row("SAELens, bfloat16", "saelens", {"autocast": True}, trains=False, as_shipped=False),
    Row(
        "SAELens, sparse",
        "saelens",
        {"sparse_activations": True},
        trains=False,
        as_shipped=False,
    ),
    Row("dictionary_learning", "dictlearn"),
    Row("overcomplete", "overcomplete"),
    Row("floor", "floor", trains=False),
    Row("floor, bfloat16", "floor", {"bfloat16": True}, trains=False),
]


def write_tokens(path: Path, size: Size, seed: int) -> Size:
    """Training tokens, then held-out ones, normalised; float16, as `worker.Tokens` reads them."""
    # never the stream that initial weights are drawn from: the first rows of both would be equal,
    # and an SAE that draws them as here would start from the answer
    generator = torch.Generator().manual_seed(0xDA7A + seed)
    directions = 4 * size.d if size.d <= 512 else 2 * size.d
    rows_gd = torch.randn(directions, size.d, generator=generator)
    rows_gd = torch.nn.functional.normalize(rows_gd, dim=1)
    mean_d = 0.1 * torch.randn(size.d, generator=generator)
    frequencies_g = 1 / (torch.arange(directions) + 10.0)
    ends_g = frequencies_g.cumsum(0) / frequencies_g.sum()
    shift_d, scale = mean_d, torch.tensor(1.0)
    with path.open("wb") as file:
        left = size.steps * size.batch + size.held_out
        while left:
            n = min(left, 16384)
            which_nk = torch.searchsorted(ends_g, torch.rand(n, 24, generator=generator))
            which_nk = which_nk.clamp(max=directions - 1)
            strengths_nk = 0.3 + torch.rand(n, 24, generator=generator)
            x_nd = torch.nn.functional.embedding_bag(
                which_nk, rows_gd, per_sample_weights=strengths_nk, mode="sum"
            )
            x_nd += mean_d + 0.02 * torch.randn(n, size.d, generator=generator)
            if file.tell() == 0:  # normalised by what the first tokens say
                shift_d = x_nd.mean(0)
                scale = (x_nd - shift_d).square().sum(1).mean().sqrt()
            ((x_nd - shift_d) / scale).half().numpy().tofile(file)
            left -= n
    return size


def write_store(path: Path, store: Path, steps: int, seed: int) -> Size:
    """The tokens of an activation store, in a random order, in the format of `write_tokens`."""
    from patch_retriever.activations.store import Store

    opened = Store(store)
    x_nd = torch.cat([opened.training(i)[0] for i in range(len(opened.shards))]).float()
    batch = 1024
    generator = torch.Generator().manual_seed(0xDA7A + seed)
    order_n = torch.randperm(len(x_nd), generator=generator)
    x_nd = x_nd[order_n[: len(order_n) // batch * batch]]
    if not len(x_nd):
        raise click.BadParameter(f"{store}: fewer than {batch} training tokens")
    held_out_nd, _ = opened.held_out(8192)
    mean_d = x_nd.mean(0)
    scale = (x_nd - mean_d).square().sum(1).mean().sqrt()
    with path.open("wb") as file:
        for part_nd in (x_nd, held_out_nd):
            ((part_nd - mean_d) / scale).half().numpy().tofile(file)
    return Size(opened.d, 8 * opened.d, 24, batch, steps, len(held_out_nd), len(x_nd))


class WorkerError(Exception):
    """A worker that can't be started, or that failed."""


class Process:
    """A worker process."""

    def __init__(self, row: Row, python: Path, environment: dict[str, str], errors: Path) -> None:
        self.row, self.errors = row, errors
        self.turns: list[list[float]] = []
        self.figures: dict[str, Any] = {}
        if not python.exists():
            raise WorkerError(f"no interpreter at {python}")
        self.process = subprocess.Popen(
            [str(python), str(HERE / "sae_training_worker.py"), row.trainer],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors.open("w"),
            text=True,
            env=environment,
        )

    def send(self, do: str, **request: Any) -> None:
        """Ask for something."""
        assert self.process.stdin
        with suppress(BrokenPipeError):  # `receive` says why
            self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self.process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """The answer."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": self._last_words()}
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Both."""
        self.send(do, **request)
        return self.receive()

    def _last_words(self) -> str:
        lines = self.errors.read_text(errors="replace").split("\n")
        said = [line for line in lines if line.strip()]
        return said[-1] if said else f"ended with exit code {self.process.wait(10)}"

    def take_turn(self) -> None:
        """Some steps, while all others wait (their threads spin for some milliseconds first)."""
        time.sleep(0.02)
        answer = self.ask("steps", n=TURN)
        self.turns.append(answer["seconds"])
        self.figures["peak_mib"] = answer["peak_bytes"] / 2**20

    def timing(self, skip: int = 1) -> dict[str, Any]:
        """Milliseconds a step, without the first turns."""
        turns = self.turns[skip:] or self.turns
        means = [1000 * statistics.mean(turn) for turn in turns]
        steps = sorted(1000 * seconds for turn in turns for seconds in turn)
        return {
            "ms": statistics.median(means),
            "ms_median_step": statistics.median(steps),
            "ms_p10": steps[len(steps) // 10],
            "ms_p90": steps[len(steps) * 9 // 10],
            "steps_timed": len(steps),
        }

    def close(self) -> None:
        """End it."""
        if self.process.stdin:
            with suppress(BrokenPipeError):
                self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Round:
    """All processes of one size. Those that fail leave, with their reason in `failed`."""

    def __init__(self, size: Size, folder: Path, pythons: dict[str, Path], threads: int) -> None:
        self.size, self.folder, self.pythons, self.threads = size, folder, pythons, threads
        self.processes: list[Process] = []
        self.failed: dict[str, str] = {}

    def start(self, row: Row, lr: float, seed: int, **environment: str) -> Process | None:
        """A new process, its SAE not built yet (but asked for: packages take long to import)."""
        variables = os.environ | {"OMP_NUM_THREADS": str(self.threads), **environment}
        if row.trainer in PACKAGES:
            variables.pop("PYTHONPATH", None)  # may hold our package, not the peer's
        settings = Settings(self.size.d, self.size.c, self.size.k, self.size.batch, lr, seed)
        try:
            python = self.pythons.get(row.trainer)
            if python is None:
                raise WorkerError("no environment given (--environments, --peers or --install)")
            errors = self.folder / f"errors-{len(list(self.folder.iterdir()))}.txt"
            process = Process(row, python, variables, errors)
        except WorkerError as error:
            self.failed[row.name] = str(error)
            return None
        process.send(
            "build",
            settings=asdict(settings),
            options=row.options,
            threads=self.threads,
            path=str(self.folder / "tokens"),
            n=self.size.training or self.size.steps * self.size.batch,
        )
        self.processes.append(process)
        return process

    def each(self, act: Callable[[Process], None], of: list[Process]) -> None:
        """One after the other; those that fail leave."""
        for process in of:
            try:
                act(process)
            except WorkerError as error:
                self.failed[process.row.name] = str(error)
                process.close()
                self.processes.remove(process)

    def take_turns(self, n: int, progress: Callable[[str], None]) -> None:
        """`n` turns of every row that trains, in an order that moves on by one every time."""
        rare = {round(i * (n - 1) / (TIMED_TURNS - 1)) for i in range(TIMED_TURNS)}
        for turn in range(n):
            now = [p for p in self.processes if p.row.trains or turn in rare]
            first = turn % len(now) if now else 0
            self.each(Process.take_turn, now[first:] + now[:first])
            if turn % 10 == 0 or turn == n - 1:
                times = (f"{p.row.name} {p.timing()['ms']:.0f}" for p in self.processes)
                progress(f"turn {turn + 1} of {n}, ms a step so far: {'; '.join(times)}")

    def close(self) -> None:
        """End all processes."""
        for process in self.processes:
            process.close()


def _built(process: Process) -> None:
    answer = process.receive()
    process.figures = {
        "version": answer["version"],
        "before_mib": answer["before_bytes"] / 2**20,
    }


def measure(
    write: Callable[[Path], Size],
    seed: int,
    rows: list[Row],
    pythons: dict[str, Path],
    threads: int,
    allocator: bool,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """All figures of one size, on the tokens that `write` writes."""
    lr = 1e-3
    with tempfile.TemporaryDirectory(prefix="sae-training-") as name:
        folder = Path(name)
        progress("writing tokens")
        size = write(folder / "tokens")
        group = Round(size, folder, pythons, threads)
        try:
            progress("starting all processes")
            for row in rows:
                group.start(row, lr, seed)
            group.each(_built, list(group.processes))
            group.take_turns(size.steps // TURN, progress)
            progress("reconstructing held-out tokens")
            trained = [process for process in group.processes if process.row.trains]
            group.each(lambda p: p.figures.update(p.ask("evaluate", n=size.held_out)), trained)
            figures = {p.row.name: p.figures | p.timing() for p in group.processes}
            result: dict[str, Any] = {
                "settings": asdict(size) | {"lr": lr, "seed": seed},
                "rows": figures,
            }
            result |= {"failed": group.failed, **ratios(figures, rows)}
            if allocator and result["fastest_peer"]:
                progress("the fastest peer with our allocator settings")
                result["allocator"] = _allocator(group, result["fastest_peer"], lr, seed)
            return result
        finally:
            group.close()


def ratios(figures: dict[str, dict[str, Any]], rows: list[Row]) -> dict[str, Any]:
    """How many times as long as ours and as the floor; fills in every row's, names the fastest."""
    ms = {name: figure["ms"] for name, figure in figures.items()}
    for row in rows:
        for key, other in (("times_ours", "ours"), ("times_floor", row.floor)):
            if row.name in ms:
                figures[row.name][key] = ms[row.name] / ms[other] if other in ms else None
    peers = [row for row in rows if row.trainer in PACKAGES and row.name in figures]

    def fastest(candidates: list[Row]) -> str | None:
        return min((row.name for row in candidates), key=lambda name: ms[name], default=None)

    shipped, tuned = fastest([row for row in peers if row.as_shipped]), fastest(peers)
    return {
        "fastest_peer": shipped,
        "fastest_peer_times_ours": figures[shipped]["times_ours"] if shipped else None,
        "fastest_peer_with_any_settings": tuned,
        "fastest_peer_with_any_settings_times_ours": figures[tuned]["times_ours"]
        if tuned
        else None,
    }


def _allocator(group: Round, name: str, lr: float, seed: int) -> dict[str, Any]:
    """The peer as it is, with glibc told what our loop tells it, and ours: turns anew."""
    plain = next((p for p in group.processes if p.row.name == name), None)
    ours = next((p for p in group.processes if p.row.name == "ours"), None)
    tuned = plain and group.start(plain.row, lr, seed, **LIKE_OURS)
    if not (plain and ours and tuned):
        return {"error": "a process that this needs has failed"}
    compared = {"plain": plain, "like_ours": tuned, "ours": ours}
    try:
        _built(tuned)
        for process in compared.values():
            process.turns = []
        for _ in range(TIMED_TURNS):
            for process in compared.values():
                process.take_turn()
    except WorkerError as error:
        return {"error": str(error)}
    result: dict[str, Any] = {"peer": name, "environment": LIKE_OURS}
    for key, process in compared.items():
        result[key + "_ms"] = process.timing()["ms"]
    return result | {"like_ours_peak_mib": tuned.figures["peak_mib"]}


def lines_of(result: dict[str, Any], rows: list[Row]) -> list[str]:
    """A size's table for people."""
    settings = result["settings"]
    lines = [
        "",
        f"d {settings['d']}, c {settings['c']}, k {settings['k']}, {settings['batch']} tokens a "
        f"step, {settings['steps']} steps, {settings['held_out']} tokens held out",
        "",
    ]
    head = ["", "version", "ms a step", "p10-p90", "x ours", "x floor", "FVU", "dead", "L0"]
    head += ["before, MiB", "+ peak"]
    body = []
    for row in rows:
        if row.name not in result["rows"]:
            continue
        figure = result["rows"][row.name]
        cells = [row.name, figure["version"], f"{figure['ms']:.1f}"]
        cells.append(f"{figure['ms_p10']:.0f}-{figure['ms_p90']:.0f}")
        cells += [_optional(figure[key], ".2f") for key in ("times_ours", "times_floor")]
        cells += [_optional(figure.get("fvu"), ".4f"), _optional(figure.get("dead_share"), ".1%")]
        cells += [_optional(figure.get("l0"), ".1f"), f"{figure['before_mib']:.0f}"]
        cells.append(f"{figure['peak_mib'] - figure['before_mib']:.0f}")
        body.append(cells)
    lines += table(head, body)
    lines += [f"{name}: not measured: {reason}" for name, reason in result["failed"].items()]
    for key in ("fastest_peer", "fastest_peer_with_any_settings"):
        if result[key]:
            times = _optional(result[f"{key}_times_ours"], ".2f")
            lines.append(f"{key.replace('_', ' ')}: {result[key]}, {times} times ours")
    found = result.get("allocator", {})
    if "error" in found:
        lines.append(f"allocator: not measured: {found['error']}")
    elif found:
        lines.append(
            f"allocator: {found['peer']} takes {found['plain_ms']:.1f} ms, with glibc's settings "
            f"as ours has them {found['like_ours_ms']:.1f} ms; ours {found['ours_ms']:.1f} ms"
        )
    return lines


def _optional(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def contents() -> list[str]:
    """What every trainer's step holds, from the workers' docstrings."""
    lines = ["", "What a step holds:"]
    for name, trainer in TRAINERS.items():
        text = " ".join((inspect.getdoc(trainer) or "").split())
        lines += textwrap.wrap(f"{name}: {text}", 100, subsequent_indent="    ")
    return lines


def install(folder: Path, progress: Callable[[str], None]) -> None:
    """The peers' environments that aren't there yet, with the torch of constraints.txt."""
    constraints = (HERE.parents[1] / "constraints.txt").read_text().splitlines()
    torch_pin = next(line for line in constraints if line.startswith("torch=="))
    for name, package in PACKAGES.items():
        python = folder / name / "bin" / "python"
        pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
        if not _runs(python, f"from importlib.metadata import version; version({package!r})"):
            progress(f"installing {package} in {folder / name}")
            venv.create(folder / name, with_pip=True)
            done = subprocess.run([*pip, "install", torch_pin, package], stdout=sys.stderr)
            if done.returncode:
                progress(f"{package}: pip failed")
                continue
        # where torch is a build for CPUs and torchvision isn't, importing it fails, and with it
        # transformers, which looks for it; nothing that trains an SAE needs it
        there = "from importlib.util import find_spec; assert find_spec('torchvision')"
        if _runs(python, there) and not _runs(python, "import torchvision"):
            subprocess.run([*pip, "uninstall", "--yes", "torchvision"], stdout=sys.stderr)


def _runs(python: Path, code: str) -> bool:
    """Whether this interpreter is there and gets through the code."""
    if not python.exists():
        return False
    return subprocess.run([str(python), "-c", code], capture_output=True).returncode == 0


def _pythons(environments: Path | None, peers: tuple[str, ...]) -> dict[str, Path]:
    """The interpreter of every trainer."""
    pythons = {"ours": Path(sys.executable), "floor": Path(sys.executable)}
    if environments:
        pythons |= {name: environments / name / "bin" / "python" for name in PACKAGES}
    for peer in peers:
        name, _, python = peer.partition("=")
        if name not in PACKAGES or not python:
            raise click.BadParameter(f"{peer!r}: NAME=PYTHON with one of {', '.join(PACKAGES)}")
        pythons[name] = Path(python)
    return pythons


@click.command(help=(__doc__ or "").split("\n\n")[0])
@click.option("--quick", is_flag=True, help="A small size and few steps, in a minute.")
@click.option("--json", "json_only", is_flag=True, help="Only the line of JSON that ends a run.")
@click.option("--environments", type=click.Path(path_type=Path), help="Holds NAME/bin/python.")
@click.option("--peers", multiple=True, metavar="NAME=PYTHON", help="One peer's interpreter.")
@click.option("--install", "install_in", type=click.Path(path_type=Path), help="Make them here.")
@click.option("--size", "sizes", multiple=True, type=click.Choice(["512", "1536"]))
@click.option("--steps", type=click.IntRange(2 * TURN), help="Instead of the size's own.")
@click.option("--store", type=click.Path(path_type=Path), help="Tokens of this activation store.")
@click.option("--seed", default=0, show_default=True, help="Of the tokens and of all weights.")
@click.option("--threads", default=os.cpu_count() or 1, show_default="all cores")
@click.option("--allocator", is_flag=True, help="Also the fastest peer with our malloc settings.")
def main(
    quick: bool,
    json_only: bool,
    environments: Path | None,
    peers: tuple[str, ...],
    install_in: Path | None,
    sizes: tuple[str, ...],
    steps: int | None,
    store: Path | None,
    seed: int,
    threads: int,
    allocator: bool,
) -> None:
    report = Report(json_only)
    about = machine(threads)
    if install_in:
        install(install_in, report.progress)
        environments = environments or install_in
    pythons = _pythons(environments, peers)
    report.say(*(f"{key}: {value}" for key, value in about.items()))
    rows = [row for row in ROWS if row.as_shipped or not quick]
    names = ["store"] if store else ["quick"] if quick else list(sizes or ("512", "1536"))
    results = {}
    for name in names:

        def write(path: Path, name: str = name) -> Size:
            if store:
                return write_store(path, store, (steps or 304) // TURN * TURN, seed)
            size = SIZES[name]
            return write_tokens(
                path, replace(size, steps=(steps or size.steps) // TURN * TURN), seed
            )

        results[name] = measure(write, seed, rows, pythons, threads, allocator, report.progress)
        report.say(*lines_of(results[name], rows))
    report.say(*contents(), "")
    about["load_at_end"] = round(os.getloadavg()[0], 2)
    report.finish({"benchmark": "sae_training", "machine": about, "sizes": results})


if __name__ == "__main__":
    main()
