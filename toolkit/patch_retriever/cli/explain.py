"""`patch-retriever explain`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from patch_retriever.cli import options


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("query")
@click.argument("candidate")
@click.option(
    "--sae",
    metavar="FOLDER|HUB ID",
    help="The SAE that the patch was made with. [default: MODEL/run/sae]",
)
@click.option(
    "--top",
    type=click.IntRange(0),
    default=10,
    show_default=True,
    help="How many concepts the table shows.",
)
@click.option(
    "--heat",
    type=click.IntRange(0),
    metavar="CONCEPT",
    help="Show on which words and image patches this concept fires.",
)
@options.device
@options.as_json
def explain(
    model: Path,
    query: str,
    candidate: str,
    sae: str | None,
    top: int,
    heat: int | None,
    device: str,
    as_json: bool,
) -> None:
    """Say why QUERY and CANDIDATE are as similar as they are under MODEL, a folder made by `build`.

    Each is a text, a picture's path, or both. Prints the similarity before and after the patch and
    what every concept, the geometry and the residual add to it: the parts sum to it.

    \b
    patch-retriever explain demo "a red star" star.png
    patch-retriever explain demo "star.png + make it blue" blue.png --top 20
    patch-retriever explain demo "a red star" star.png --heat 812
    """
    import torch

    from patch_retriever.backbones.readout import Readout
    from patch_retriever.cli.progress import quiet_libraries
    from patch_retriever.errors import UserError
    from patch_retriever.explain import concept_labels
    from patch_retriever.heat import token_heat
    from patch_retriever.items import Item
    from patch_retriever.retriever import PatchedRetriever

    quiet_libraries()
    items = [Item.parse(query), Item.parse(candidate)]
    loaded = [item.load() for item in items]  # a bad picture is said before any work
    retriever = PatchedRetriever.from_folder(model, device, sae)
    if heat is not None and heat >= retriever.sae.n_concepts:
        raise UserError(f"concept {heat}: the SAE has {retriever.sae.n_concepts}, counted from 0")
    explanation = retriever.explain(*loaded)
    heats = {}
    if heat is not None:
        readout = Readout.from_json(retriever.patch.about["readout"])
        transformer: Any = retriever[0]
        found = token_heat(transformer, readout, retriever.sae, items, torch.tensor([heat]))
        heats = dict(zip(("query", "document"), found, strict=True))
    if as_json:
        values = explanation.to_json()
        if heat is not None:
            on_tokens = {side: tokens.to_json(0) for side, tokens in heats.items()}
            values["heat"] = {"concept": heat, **on_tokens}
        click.echo(json.dumps(values, indent=1))
        return
    before, after = explanation.score.before, explanation.score.after
    click.echo(f"similarity {before:.4f} -> {after:.4f}\n")
    click.echo(explanation.to_text(top, concept_labels(model) if sae is None else None))
    for side, tokens in heats.items():
        click.echo(f"\nconcept {heat} on the {side}, {tokens.pooled(0):.3g} in its pooled vector")
        click.echo(tokens.to_text(0))
