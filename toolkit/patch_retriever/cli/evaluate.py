"""`patch-retriever evaluate`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from patch_retriever.cli import options


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option(
    "--pairs",
    default="scenes",
    show_default=True,
    metavar="FILE|FOLDER|scenes",
    help="What to evaluate on; of pairs, the test split.",
)
@click.option(
    "--task",
    "wanted",
    multiple=True,
    help="Only this task or direction (t->i, 't->i short', ...); may be given again.",
)
@click.option("--skip-bad", is_flag=True, help="Leave bad rows and pictures out.")
@click.option(
    "--n",
    type=click.IntRange(1),
    default=500,
    show_default=True,
    help="Scenes asked about (scenes only).",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    help="Seed of the tasks, of the pairs' split and of the bootstrap. "
    "[default: that of the first MODEL that `build` made, else 0]",
)
@options.device
@options.items_per_pass
@options.as_json
def evaluate(
    models: tuple[str, ...],
    pairs: str,
    wanted: tuple[str, ...],
    n: int,
    seed: int | None,
    device: str,
    batch_size: int,
    as_json: bool,
    skip_bad: bool,
) -> None:
    """Evaluate sentence-transformers MODELs (folders or hub ids) side by side on test tasks.

    R@1/5/10 of every task, and for every model after the first the paired difference to the first
    with its 95% interval.

    \b
    patch-retriever evaluate demo
    patch-retriever evaluate demo sentence-transformers/clip-ViT-B-32 --task "t->i"
    patch-retriever evaluate demo --pairs photos.jsonl --json
    """
    from patch_retriever.cli.progress import Narrator, quiet_libraries
    from patch_retriever.retrieval.compare import build_seed, compare_models, held_out_collection

    quiet_libraries()
    narrator = Narrator(silent=as_json)
    if seed is None:  # another seed would split pairs otherwise and test on calibration
        seed = build_seed(models)
    collection = held_out_collection(pairs, n, seed, wanted, skip_bad)
    report = compare_models(models, collection, seed, device, batch_size, narrator.say)
    if as_json:
        click.echo(json.dumps(report, indent=1))
        return
    for model in report["models"]:
        click.echo(f"{model['model']}   score {100 * model['score']:.1f}")
        for task, values in model["tasks"].items():
            recalls = "/".join(f"{100 * values[k]:5.1f}" for k in ("R@1", "R@5", "R@10"))
            change = ""
            if "R@1_minus_first" in values:
                d = values["R@1_minus_first"]
                low, mean, high = (100 * d[k] for k in ("low", "mean", "high"))
                change = f"   against {Path(models[0]).name}: {mean:+.1f} [{low:+.1f}, {high:+.1f}]"
            click.echo(f"  {task:<12} R@1/5/10 {recalls}{change}")
