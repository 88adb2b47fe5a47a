"""The paper's Tables 2, 3, 5 and 8 for one of its models, from its weights and the data folders.

    python recipes/paper/run.py qwen2-vl --mbeir M-BEIR --coco coco-caption -o results --plan
    python recipes/paper/run.py qwen2-vl --mbeir M-BEIR --coco coco-caption -o results --limit 200
    python recipes/paper/run.py qwen2-vl --mbeir M-BEIR --coco coco-caption -o results

A stopped run goes on when the same command is given again. OUT/tables.md holds the tables of all
models that were run into OUT, beside the paper's figures; README.md here says what is compared.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parents[1]))

from paper.data import has_support, read_coco, read_task, task_names
from paper.experiment import Experiment
from paper.official import MODELS
from paper.plan import Size, needs, shape_of, size_of, sizes_of_coco
from paper.settings import Settings
from paper.tables import render
from patch_retriever.cli.progress import Narrator, quiet_libraries
from patch_retriever.errors import UserError
from patch_retriever.files import write_text

FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)


@click.command(help=__doc__)
@click.argument("model", type=click.Choice(list(MODELS)))
@click.option("--weights", help="Folder or hub id of the weights, if not the paper's.")
@click.option("--revision", help="Of a hub id: a branch, a tag or a commit.")
@click.option("--mbeir", type=FOLDER, required=True, help="MRBench's task folders side by side.")
@click.option("--coco", type=FOLDER, help="lmms-lab/COCO-Caption: SAE and frozen statistics.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Results.")
@click.option("--task", "tasks", multiple=True, help="Only this one (mscoco_task3, cirr ...).")
@click.option("--limit", type=click.IntRange(2), help="A trial: so many queries of every task.")
@click.option("--calibration", type=click.IntRange(2), default=10_000, show_default=True)
@click.option("--sae", help="An SAE of the last layer: a folder, or the authors' .pt file.")
@click.option("--sae-steps", type=click.IntRange(1), help="Of its training, if not 5 epochs.")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]))
@click.option("--device", default="cpu", show_default=True)
@click.option("--skip-bad", is_flag=True, help="Leave bad rows of M-BEIR out.")
@click.option("--plan", is_flag=True, help="Say what is needed, and stop.")
def main(model: str, plan: bool, **given: Any) -> None:
    narrator = Narrator()
    try:
        run(model, plan, narrator, **given)
    except UserError as error:
        click.echo(f"Error: {error}", err=True)
        raise SystemExit(2) from None


def run(
    model: str,
    plan: bool,
    narrator: Narrator,
    weights: str | None,
    dtype: str | None,
    tasks: tuple[str, ...],
    **given: Any,
) -> None:
    paper = MODELS[model]
    names = tuple(task_names(given["mbeir"], tasks))
    settings = Settings(
        paper, weights or paper.weights, tasks=names, dtype=dtype or paper.dtype, **given
    )
    settings.check_results()
    quiet_libraries()
    sizes = _sizes(settings)
    needed = needs(settings, shape_of(settings.weights, settings.revision), sizes)
    for line in needed.lines(settings, sizes):
        click.echo(line)
    if plan:
        return
    needed.check_disk(settings.out)
    with ExitStack() as stack:
        Experiment(settings, stack, narrator.say, narrator.progress).run()
    tables = settings.out / "tables.md"
    write_text(tables, render(settings.out))
    click.echo(f"tables: {tables}")


def _sizes(settings: Settings) -> list[Size]:
    """Of all data, each task read once, so that a bad row is found before anything is encoded."""
    s = settings
    found = []
    for name in s.tasks:
        task = read_task(s.mbeir, name, s.limit, s.skip_bad)
        support = s.n_calibration if has_support(s.mbeir, name) else 0
        found.append(size_of(task, s.model, support))
    if s.coco is not None:
        found += sizes_of_coco(settings, len(read_coco(s.coco, set())))
    return found


if __name__ == "__main__":
    main()
