"""`patch-retriever explain`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from patch_retriever.cli import options

_KINDS = {"text": "a text", "image": "a picture", "both": "a picture and a text"}


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
@click.option(
    "--influence",
    type=click.IntRange(0),
    metavar="CONCEPT",
    help="Show what this concept's activation loses without each word and image patch.",
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
    influence: int | None,
    device: str,
    as_json: bool,
) -> None:
    """Say why QUERY and CANDIDATE are as similar as they are under MODEL, a folder made by `build`.

    Each is a text, a picture's path, or both. Prints the similarity before and after the patch and
    what every concept, the geometry and the residual add to it: the parts sum to it.

    \b
    patch-retriever explain demo "a red star" star.png
    patch-retriever explain demo "star.png + make it blue" blue.png --top 20
    patch-retriever explain demo "a red star" star.png --influence 812
    """
    import torch

    from patch_retriever.backbones.readout import Readout
    from patch_retriever.cli.progress import quiet_libraries
    from patch_retriever.errors import UserError
    from patch_retriever.explain import concept_labels
    from patch_retriever.heat import token_heat, token_influence
    from patch_retriever.items import Item
    from patch_retriever.retriever import PatchedRetriever

    quiet_libraries()
    items = [Item.parse(query), Item.parse(candidate)]
    loaded = [item.load() for item in items]  # a bad picture is said before any work
    retriever = PatchedRetriever.from_folder(model, device, sae)
    asked = [
        (name, concept, read)
        for name, concept, read in (
            ("heat", heat, token_heat),
            ("influence", influence, token_influence),
        )
        if concept is not None
    ]
    for _, concept, _ in asked:
        if concept >= retriever.sae.n_concepts:
            raise UserError(
                f"concept {concept}: the SAE has {retriever.sae.n_concepts}, counted from 0"
            )
    explanation = retriever.explain(*loaded)
    readout = Readout.from_json(retriever.patch.about["readout"])
    transformer: Any = retriever[0]
    on_tokens = {
        name: (concept, read(transformer, readout, retriever.sae, items, torch.tensor([concept])))
        for name, concept, read in asked
    }
    kinds = dict(zip(("query", "document"), (item.kind for item in items), strict=True))
    if as_json:
        values = {"kinds": kinds, **explanation.to_json()}
        for name, (concept, sides) in on_tokens.items():
            query_json, document_json = (side.to_json(0) for side in sides)
            values[name] = {"concept": concept, "query": query_json, "document": document_json}
        click.echo(json.dumps(values, indent=1))
        return
    before, after = explanation.score.before, explanation.score.after
    said = ", ".join(f"{side}: {_KINDS[kind]}" for side, kind in kinds.items())
    click.echo(f"{said}\nsimilarity {before:.4f} -> {after:.4f}\n")
    click.echo(explanation.to_text(top, concept_labels(model) if sae is None else None))
    for name, (concept, sides) in on_tokens.items():
        for side, tokens in zip(("query", "document"), sides, strict=True):
            click.echo(f"\n{name} of concept {concept}, {side}\n{tokens.to_text(0)}")
