"""`patch-retriever analyze`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from patch_retriever.cli import options


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@options.out_folder
@click.option(
    "--only",
    metavar="NAMES",
    help="Only these, separated by commas: fig2, fig3, table1, table2, fig4, fig5, fig6, table5, "
    "table8, removal-curve, pairs-curve. [default: all]",
)
@click.option(
    "--sae",
    metavar="FOLDER|ID",
    help="Another SAE than the build's: SAELens, sparsify, dictionary_learning.",
)
@click.option("--device", help="torch device. [default: the build's]")
@options.as_json
def analyze(
    run: Path, out: Path, only: str | None, sae: str | None, device: str | None, as_json: bool
) -> None:
    """Write the paper's figures and tables about RUN, a folder made by `build`, to OUT.

    Concept energy and modality, overlap of the strongest concepts, removal against its controls,
    token roles, layers, poolings and prompts, whitening; and recall against the number of concepts
    removed and of pairs. For each a CSV file and, for figures, an SVG; OUT/README.md shows them
    all. A second run does only what is missing.

    \b
    patch-retriever analyze demo -o analysis
    patch-retriever analyze demo -o analysis --only fig3,table5
    patch-retriever analyze demo -o other --sae org/saes/layers.12
    """
    from patch_retriever.analysis.catalogue import names_of

    names = names_of(only)
    from patch_retriever.analysis.analyze import analyze_build
    from patch_retriever.cli.progress import Narrator, quiet_libraries

    quiet_libraries()
    narrator = Narrator(silent=as_json)
    results = analyze_build(run, out, names, sae, device, narrator.say, narrator.progress)
    if as_json:
        click.echo(json.dumps({"folder": str(out), "results": results}, indent=1))
        return
    narrator.say("done")
    for name, values in results.items():
        click.echo(f"{name}: {', '.join(values['files']) or values['note']}")
    click.echo(f"\n{out / 'README.md'} shows them all")
