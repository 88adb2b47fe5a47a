"""`patch-retriever encode`."""

from __future__ import annotations

from pathlib import Path

import click

from patch_retriever.cli import options


@click.command()
@click.argument("model")
@click.argument("items")
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
@click.option("--skip-bad", is_flag=True, help="Leave rows that are no items out, and count them.")
@options.device
@options.items_per_pass
def encode(
    model: str, items: str, out: Path, role: str, skip_bad: bool, device: str, batch_size: int
) -> None:
    """Encode ITEMS with MODEL into a NumPy file, one batch in memory at a time.

    ITEMS is a folder of pictures, or rows that hold "text", "image" (a path, relative to the file)
    or both: JSON lines, CSV, Parquet, tar shards, or datasets:org/name[/config][:split].

    \b
    patch-retriever encode demo gallery.jsonl -o gallery.npy
    patch-retriever encode demo photos/ -o photos.npy
    patch-retriever encode demo questions.jsonl --as query -o questions.npy
    """
    from patch_retriever.cli.progress import Narrator, quiet_libraries
    from patch_retriever.retrieval.compare import load_model
    from patch_retriever.retrieval.encode import encode_file
    from patch_retriever.retrieval.readers.items import read_corpus

    quiet_libraries()
    corpus = read_corpus(items, skip_bad)
    loaded = load_model(model, device)
    progress = Narrator().progress
    shape = encode_file(loaded, corpus.items, out, role, batch_size, progress, name=model)
    left_out = f", {len(corpus.skipped)} bad rows left out" if corpus.skipped else ""
    click.echo(f"{out}: {shape[0]} embeddings of {shape[1]} dimensions{left_out}")
