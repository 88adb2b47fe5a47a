"""`patch-retriever concepts`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from patch_retriever.cli import options

SHOWN = {
    "energy": "energy",
    "frequency": "frequency",
    "modality": "modality",
    "bridge": "bridge",
    "attribution": "attribution",
    "discriminative": "discrim.",
    "discriminative_centred": "d. centred",
    "strength": "strength",
}
"""Numbers in a terminal, with their headings; `--json` has every column."""


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--sort",
    default="attribution",
    show_default=True,
    metavar="COLUMN",
    help="Column to order by, largest first.",
)
@click.option("--ascending", is_flag=True, help="Smallest first.")
@click.option(
    "--where",
    metavar="CONDITION",
    help='Only rows for which this holds, as "modality > 0.9 and not energy < 0.1".',
)
@click.option(
    "--limit", type=click.IntRange(1), default=20, show_default=True, help="Rows to print."
)
@options.as_json
def concepts(
    run: Path, sort: str, ascending: bool, where: str | None, limit: int, as_json: bool
) -> None:
    """Print the concept table of RUN, a folder made by `build`.

    For every concept of the SAE its scores, how much of it the patch subtracts (strength), and the
    vocabulary tokens that it speaks for. The file is RUN/report/concepts.parquet.

    \b
    patch-retriever concepts demo
    patch-retriever concepts demo --sort discriminative_centred --ascending
    patch-retriever concepts demo --where "modality > 0.9 and frequency > 0.01" --limit 5
    """
    from patch_retriever.concepts.query import matching, read_concepts
    from patch_retriever.runs import check_finished

    check_finished(run)
    table, about = read_concepts(run)
    rows = matching(table, where, sort, ascending, limit).to_pylist()
    if as_json:
        click.echo(json.dumps({"folder": str(run), **about, "concepts": rows}, indent=1))
        return
    click.echo("\n".join(heading(about)))
    order = "smallest" if ascending else "largest"
    click.echo(f"{len(rows)} of {table.num_rows} concepts, by {sort}, {order} first\n")
    click.echo("\n".join(lines(rows)))


def heading(about: dict[str, Any]) -> list[str]:
    """What the scores are of, and how well the SAE rebuilds what it was not trained on."""
    names = {"tokens": "codes of tokens, pooled", "pooled": "codes of pooled vectors"}
    items = ", ".join(f"{n} {kind}" for kind, n in about["items"].items())
    found = [
        f"scored on {names[about['codes']]}, of calibration: {items}; "
        f"{about['pairs']} pairs, {about['hard_negatives']} hard negatives",
        "variance of the pooled vectors that the SAE leaves unexplained",
    ]
    for codes, name in names.items():
        parts = "  ".join(f"{kind} {fvu:.3f}" for kind, fvu in about["unexplained"][codes].items())
        found.append(f"  {name:<24} {parts}")
    return found


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """Rows in aligned columns under their headings."""
    from patch_retriever.concepts.query import words

    numbers = [[f"{row[name]:.3g}" for name in SHOWN] for row in rows]
    widths = [max(map(len, column)) for column in zip(SHOWN.values(), *numbers, strict=True)]
    found = [_line("concept", list(SHOWN.values()), widths, "tokens")]
    for row, cells in zip(rows, numbers, strict=True):
        near = " ".join(words(row["tokens"])[:4])
        found.append(_line(str(row["concept"]), cells, widths, near))
    return found


def _line(concept: str, cells: list[str], widths: list[int], tokens: str) -> str:
    return "  ".join([f"{concept:>7}", *map(str.rjust, cells, widths), tokens]).rstrip()
