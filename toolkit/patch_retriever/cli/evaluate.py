"""`patch-retriever evaluate`."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from patch_retriever.cli import options


def _cutoffs(_context: click.Context, _option: click.Parameter, said: str) -> tuple[int, ...]:
    """1,5,10 as numbers, ascending."""
    try:
        found = {int(k) for k in said.split(",")}
    except ValueError:
        found = {0}
    if min(found) < 1:
        raise click.BadParameter(f"{said!r}: whole numbers from 1 on expected, as in 1,5,10")
    return tuple(sorted(found))


_READING = (
    click.option("--split", default="test", show_default=True, help="Of the tasks."),
    click.option(
        "--images", type=click.Path(path_type=Path), help="Where relative pictures start."
    ),
    click.option("--image-column", help="The column of pictures, if not found by itself."),
    click.option("--text-column", help="The column of texts, if not found by itself."),
    click.option(
        "--pool",
        type=click.Choice(["local", "union"]),
        default="local",
        show_default=True,
        help="Candidates of a task alone, or of all tasks together (M-BEIR).",
    ),
    click.option("--limit", type=click.IntRange(1), help="Queries of a task at most."),
    click.option("--allow-urls", is_flag=True, help="Download pictures named by an address."),
    options.skip_bad,
    click.option(
        "--n",
        type=click.IntRange(1),
        default=500,
        show_default=True,
        help="Scenes asked about (scenes only).",
    ),
)
"""Named as in `ReadOptions`."""


def _reading(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say how tasks are read."""
    for option in reversed(_READING):
        command = option(command)
    return command


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--against", metavar="MODEL", help="The model to compare with.  [default: the first]")
@click.option(
    "--task",
    "specs",
    multiple=True,
    default=("scenes",),
    show_default=True,
    metavar="SPEC",
    help="scenes, a file or folder of pairs, or FORMAT:LOCATION; may be given again.",
)
@click.option(
    "--only",
    multiple=True,
    metavar="NAME|DIRECTION",
    help="Only this task or direction (t->i, 't->i short', ...); may be given again.",
)
@_reading
@click.option(
    "--seed",
    type=click.IntRange(0),
    help="Seed of the tasks, of the pairs' split and of the statistics. "
    "[default: that of the first MODEL that `build` made, else 0]",
)
@click.option(
    "--k",
    "cutoffs",
    default="1,5,10",
    show_default=True,
    callback=_cutoffs,
    help="k of every metric at k.",
)
@click.option(
    "--index",
    "factory",
    default="",
    metavar="FACTORY",
    help="Search with this FAISS index (hnsw, ivf-pq, 'IVF256,SQ8', ...).  [default: exact]",
)
@click.option("--prompts", is_flag=True, help="Use the tasks' own instructions.")
@click.option("--baselines", is_flag=True, help="Centring and ReAlign of the first model, too.")
@click.option(
    "--calibration",
    multiple=True,
    metavar="SPEC",
    help="Tasks that the baselines' statistics are of.  [default: those of the build]",
)
@click.option(
    "--calibration-split",
    default="calibration",
    show_default=True,
    help="Of these tasks; benchmarks call it train.",
)
@click.option(
    "--html", type=click.Path(dir_okay=False, path_type=Path), help="An HTML page to write."
)
@click.option(
    "-o",
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the page, all figures, every query's scores and the embeddings; "
    "the same command goes on where it stood.",
)
@click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of embeddings.  [default: OUT/embeddings, or none]",
)
@options.revision
@options.device
@options.trust_remote_code
@options.items_per_pass
@options.workers
@options.as_json
def evaluate(
    models: tuple[str, ...],
    against: str | None,
    specs: tuple[str, ...],
    only: tuple[str, ...],
    seed: int | None,
    cutoffs: tuple[int, ...],
    factory: str,
    prompts: bool,
    baselines: bool,
    calibration: tuple[str, ...],
    calibration_split: str,
    html: Path | None,
    out: Path | None,
    cache: Path | None,
    revision: str | None,
    device: str,
    trust_remote_code: bool,
    batch_size: int,
    workers: int,
    as_json: bool,
    **reading: Any,
) -> None:
    """Evaluate sentence-transformers MODELs (folders or hub ids) side by side on retrieval tasks.

    FOLDER@base is the backbone and readout of a folder that `build` made, without its patch.
    Every model after the first is compared with it, query by query.

    \b
    patch-retriever evaluate demo --against demo@base
    patch-retriever evaluate demo sentence-transformers/clip-ViT-B-32 --only "t->i"
    patch-retriever evaluate demo --against demo@base --task photos.jsonl --baselines -o compared
    """
    from patch_retriever.cli.progress import Narrator, quiet_libraries
    from patch_retriever.files import write_json, write_text
    from patch_retriever.report.comparison import to_json, to_text
    from patch_retriever.report.comparison_page import comparison_page
    from patch_retriever.retrieval.comparison.chosen import calibration_tasks, read_chosen
    from patch_retriever.retrieval.comparison.models import build_settings, compare_models
    from patch_retriever.retrieval.comparison.result import Settings
    from patch_retriever.retrieval.readers.options import ReadOptions

    if calibration and not baselines:
        raise click.UsageError("--calibration is for the statistics of --baselines; give both")
    quiet_libraries()
    narrator = Narrator(silent=as_json)
    names = (against, *models) if against else models
    built = build_settings(names)
    if seed is None:  # another seed would split pairs otherwise and test on calibration
        seed = int(built.get("seed", 0))
    how = ReadOptions(seed=seed, **reading)
    tasks = read_chosen(specs, how, only)
    known = []
    if baselines:
        learning = replace(how, split=calibration_split, limit=None)
        known = calibration_tasks(calibration, built, learning)
    settings = Settings(cutoffs, factory, prompts, baselines, seed, how.skip_bad)
    with ExitStack() as stack:
        if cache is None:
            cache = out / "embeddings" if out else Path(stack.enter_context(TemporaryDirectory()))
        found = compare_models(
            names,
            tasks,
            settings,
            cache,
            out / "queries" if out else None,
            known,
            device,
            batch_size,
            narrator.say,
            narrator.progress,
            revision,
            trust_remote_code,
            workers=workers,
        )
    figures = to_json(found)
    if out is not None:
        write_json(out / "comparison.json", figures)
    for path in (html, out and out / "comparison.html"):
        if path is not None:
            write_text(path, comparison_page(found))
            narrator.say(f"{path}: written")
    click.echo(json.dumps(figures, indent=1) if as_json else to_text(found))
