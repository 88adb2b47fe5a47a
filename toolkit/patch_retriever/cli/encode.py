"""`patch-retriever encode`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from patch_retriever.cli import options

if TYPE_CHECKING:
    from patch_retriever.retrieval.encoder import Role


@click.command()
@click.argument("model")
@click.argument("items", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="The .npy file to write, float32, one row an item.",
)
@click.option(
    "--as",
    "role",
    type=click.Choice(["query", "document"]),
    default="document",
    show_default=True,
    help="As queries or as documents.",
)
@options.device
@options.items_per_pass
def encode(model: str, items: Path, out: Path, role: Role, device: str, batch_size: int) -> None:
    """Encode ITEMS with MODEL into a NumPy file, one batch in memory at a time.

    ITEMS is a JSON-lines file; a line holds "text", "image" (a path, relative to the file) or both.

    \b
    patch-retriever encode demo gallery.jsonl -o gallery.npy
    patch-retriever encode demo questions.jsonl --as query -o questions.npy
    """
    from patch_retriever.cli.progress import Narrator, quiet_libraries
    from patch_retriever.retrieval.encode import encode_file, read_items
    from patch_retriever.retrieval.encoder import load_encoder

    quiet_libraries()
    rows = read_items(items)
    encoder = load_encoder(model, device)
    shape = encode_file(encoder, rows, out, role, batch_size, Narrator().progress)
    click.echo(f"{out}: {shape[0]} embeddings of {shape[1]} dimensions")
