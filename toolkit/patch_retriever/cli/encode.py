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
@click.argument("items")
@click.option(
    "-o",
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="The .npy file to write, float32, one row an item.",
)
@options.role
@options.skip_bad
@options.revision
@options.device
@options.trust_remote_code
@options.items_per_pass
@options.workers
def encode(
    model: str,
    items: str,
    out: Path,
    role: Role,
    skip_bad: bool,
    revision: str | None,
    device: str,
    trust_remote_code: bool,
    batch_size: int,
    workers: int,
) -> None:
    """Encode ITEMS with MODEL into a NumPy file, one batch in memory at a time.

    ITEMS is a folder of pictures, or rows that hold "text", "image" (a path, relative to the file,
    or a list of paths) or both: JSON lines, CSV, Parquet, tar shards, or
    datasets:org/name[/config][:split].

    \b
    patch-retriever encode demo gallery.jsonl -o gallery.npy
    patch-retriever encode demo photos/ -o photos.npy
    patch-retriever encode demo questions.jsonl --as query -o questions.npy
    """
    from patch_retriever.cli.progress import Narrator, quiet_libraries
    from patch_retriever.lazy import Lazy
    from patch_retriever.retrieval.encode import encode_file, readable
    from patch_retriever.retrieval.load import load_encoder
    from patch_retriever.retrieval.readers.items import read_corpus

    quiet_libraries()
    narrator = Narrator()
    corpus = read_corpus(items, skip_bad)
    chosen, skipped = corpus.items, list(corpus.skipped)
    if skip_bad:
        kept, unreadable = readable(corpus.items, narrator.progress, workers)
        chosen, skipped = Lazy(kept, corpus.items.__getitem__), skipped + unreadable
    encoder = load_encoder(model, device, revision, trust_remote_code, workers=workers)
    shape = encode_file(encoder, chosen, out, role, batch_size, narrator.progress)
    for line in skipped:
        click.echo(f"left out: {line}", err=True)
    left_out = f", {len(skipped)} left out" if skipped else ""
    click.echo(f"{out}: {shape[0]} embeddings of {shape[1]} dimensions{left_out}")
