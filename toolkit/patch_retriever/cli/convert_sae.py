"""`patch-retriever convert-sae`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from patch_retriever.cli import options


@click.command("convert-sae")
@click.argument("source")
@options.out_folder
@click.option(
    "--k", type=click.IntRange(1), help="Active concepts per token, where the file does not say it."
)
@click.option(
    "--store",
    type=click.Path(path_type=Path),
    help="Activations to fit thresholds on and to measure with: a build's OUT/run/collect.",
)
@click.option("--push-to", metavar="ORG/NAME", help="Upload the result to this hub repository.")
def convert_sae(
    source: str, out: Path, k: int | None, store: Path | None, push_to: str | None
) -> None:
    """Read the SAE at SOURCE and write it to OUT in SAELens' layout.

    SOURCE is a folder, a .pt file or a hub id of SAELens, sparsify, dictionary_learning or
    overcomplete (the paper's checkpoints). With --store a TopK gate becomes one threshold per
    concept, which patches need, and the change in L0 and FVU is printed.

    \b
    patch-retriever convert-sae org/saes/layers.12 --store demo/run/collect -o sae
    patch-retriever convert-sae checkpoint.pt --k 50 --store demo/run/collect -o sae
    patch-retriever build org/model --pairs photos.jsonl --sae sae -o mine
    """
    from patch_retriever.activations.store import Store
    from patch_retriever.cli.progress import quiet_libraries
    from patch_retriever.errors import UserError
    from patch_retriever.sae.formats import load_sae, push_sae, save_sae
    from patch_retriever.stages.sae import adopt_sae

    quiet_libraries()
    if (out / "cfg.json").exists():
        raise UserError(f"{out}: holds an SAE already; name another folder")
    if store is None:
        sae, about = load_sae(source, k), {"from": source}
    else:
        sae, about = adopt_sae(source, Store(store), k)
    save_sae(sae, out, about)
    if push_to:
        push_sae(out, push_to)
    click.echo(json.dumps({"folder": str(out), "k": sae.k, **about}, indent=1))
