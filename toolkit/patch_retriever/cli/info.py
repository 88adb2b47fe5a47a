"""`patch-retriever info`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--concepts",
    type=click.IntRange(0),
    default=10,
    show_default=True,
    help="How many subtracted concepts to list.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def info(folder: Path, concepts: int, as_json: bool) -> None:
    """Say what a FOLDER made by `build` is: model, readout, patch, concepts, and the table.

    \b
    patch-retriever info demo
    patch-retriever info demo --json
    """
    from patch_retriever.errors import UserError
    from patch_retriever.runs import MARKER, check_finished

    check_finished(folder)
    settings, patch, table = (
        _read(folder / name) for name in (MARKER, "patch/patch.json", "report/table.json")
    )
    if as_json:
        click.echo(json.dumps({"settings": settings, "patch": patch, "table": table}, indent=1))
        return
    try:
        found = lines(settings, patch, concepts)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder}: damaged ({error} is missing); run the same build again"
        ) from None
    click.echo("\n".join(found))
    click.echo("\n" + (folder / "report" / "table.txt").read_text().rstrip())


def lines(settings: dict[str, Any], patch: dict[str, Any], concepts: int) -> list[str]:
    """What a terminal shows above the table."""
    from patch_retriever.backbones.readout import Readout

    about = patch["about"]
    readout = Readout.from_json(about["readout"])
    found = [
        f"model      {settings['model']}",
        f"data       {settings['pairs']}, seed {settings['seed']}",
        f"readout    {readout.name}",
        f"patch      {about['method']} {about['setting'] or ''} (needs {about['needs']})",
    ]
    for operator in patch["operators"]:
        detail = (
            f"{operator['name']}, by {operator['by']}"
            if "name" in operator
            else f"{len(about['concepts'])} concepts at {operator.get('site', readout.site)}"
        )
        found.append(f"           {operator['kind']}: {detail}")
    strongest = sorted(about["concepts"], key=lambda c: -c["strength"] * c["energy"])[:concepts]
    for c in strongest:
        found.append(
            f"  concept {c['concept']:<6} strength {c['strength']:.2f}  energy {c['energy']:.3g}  "
            f"modality {c['modality']:.2f}  attribution {c['attribution']:.3g}"
        )
    return found


def _read(path: Path) -> Any:
    from patch_retriever.errors import UserError

    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: missing or damaged ({error}); run the same build again") from None
