"""`patch-retriever mteb`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from patch_retriever.cli import options
from patch_retriever.errors import UserError


@click.command()
@click.argument("model")
@click.option(
    "--tasks",
    "names",
    multiple=True,
    metavar="NAME[,NAME...]",
    help="mteb's tasks, or FILE.py:CLASS for one of your own; may be given again.",
)
@click.option(
    "--benchmark",
    "benchmarks",
    multiple=True,
    metavar="NAME",
    help="All tasks of one of mteb's benchmarks.",
)
@options.out_folder
@click.option(
    "--index",
    "factory",
    metavar="FACTORY",
    help="Search through a FAISS index ('IVF256,SQ8'); filed apart from the exact results.",
)
@click.option(
    "--prompts",
    is_flag=True,
    help="Give the model the instructions of the tasks; filed apart from the results without.",
)
@click.option(
    "--name",
    metavar="ORG/NAME",
    help="What results are filed under. [default: the hub id, or local/FOLDER]",
)
@click.option(
    "--revision",
    help="Of a hub id: a branch, a tag or a commit, which results are also filed under. "
    "[default: the newest commit, filed under a hash of all that decides its vectors]",
)
@options.device
@options.items_per_pass
@options.as_json
def mteb(
    model: str,
    names: tuple[str, ...],
    benchmarks: tuple[str, ...],
    out: Path,
    factory: str | None,
    prompts: bool,
    name: str | None,
    revision: str | None,
    device: str,
    batch_size: int,
    as_json: bool,
) -> None:
    """Run mteb's tasks (MTEB, MIEB) on any sentence-transformers MODEL, a folder or hub id.

    Results are written as mteb writes them, ready to be submitted. What is there for this model
    is not run again, so the same command goes on where it was stopped. A task that fails does not
    stop the others; the exit code is 2 then.

    \b
    patch-retriever mteb demo --tasks CIRRIT2IRetrieval,NIGHTSI2IRetrieval -o results
    patch-retriever mteb org/my-retriever --benchmark "MIEB(lite)" -o results --device cuda
    patch-retriever mteb demo --tasks my_tasks.py:ShapesT2I --index IVF64,Flat -o results
    """
    from patch_retriever.cli.progress import Narrator, quiet_libraries
    from patch_retriever.retrieval.mteb.run import named_tasks, run_mteb

    wanted = [one.strip() for given in names for one in given.split(",") if one.strip()]
    if not wanted and not benchmarks:
        raise click.UsageError("name the tasks: --tasks NAME, or --benchmark NAME")
    tasks = named_tasks(wanted, benchmarks)
    quiet_libraries()
    from patch_retriever.retrieval.mteb.encoder import MtebEncoder, MtebRetriever

    encoder = (
        MtebEncoder(model, revision, device=device, name=name, task_prompts=prompts)
        if factory is None
        else MtebRetriever(
            model, revision, device=device, name=name, task_prompts=prompts, index=factory
        )
    )
    narrator = Narrator(silent=as_json)
    report = run_mteb(encoder, tasks, out, batch_size, narrator.say)
    failed = [row for row in report["tasks"] if "failed" in row]
    if as_json:
        click.echo(json.dumps(report, indent=1))
    elif len(failed) < len(tasks):
        click.echo(f"{report['model']}   revision {report['revision'][:12]}   in {out}")
        for row in report["tasks"]:
            score = "failed" if "failed" in row else f"{100 * row['score']:6.2f}"
            click.echo(f"  {row['task']:<36} {row['metric']:<16} {score}")
    if failed:
        reason = failed[0]["failed"]
        if len(tasks) > 1:
            reason = f"{len(failed)} of {len(tasks)} tasks failed; {reason}"
        raise UserError(reason)
