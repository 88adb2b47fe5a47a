"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path

import click

from patch_retriever.ahead import WORKERS

out_folder = click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder to write."
)
revision = click.option(
    "--revision", help="Of a hub id: a branch, a tag or a commit. [default: the newest commit]"
)
device = click.option("--device", default="cpu", show_default=True, help="torch device.")
items_per_pass = click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Items per forward pass.",
)
workers = click.option(
    "--workers",
    type=click.IntRange(1),
    default=WORKERS,
    show_default="one a core, 4 at most",
    help="Threads that open and prepare pictures, each a batch at a time.",
)
method = click.option(
    "--method",
    metavar="ID|concepts",
    help="Export this row of the table (ids are in report/table.json) instead of the one that "
    "held-out queries choose; concepts for the best of those that subtract concepts.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
role = click.option(
    "--as",
    "role",
    type=click.Choice(["query", "document"]),
    default="document",
    show_default=True,
    help="Encode the items as documents, to be found by queries, or as queries.",
)
skip_bad = click.option("--skip-bad", is_flag=True, help="Leave bad rows and pictures out.")
trust_remote_code = click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Run the code that lies in the model's folder, if it is not this package's own.",
)
