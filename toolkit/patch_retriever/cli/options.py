"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path

import click

out_folder = click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder to write."
)
device = click.option("--device", default="cpu", show_default=True, help="torch device.")
items_per_pass = click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Items per forward pass.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
