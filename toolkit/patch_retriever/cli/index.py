"""`patch-retriever index`, `index-remove` and `index-migrate`."""

from __future__ import annotations

from pathlib import Path

import click

from patch_retriever.cli import options


@click.command()
@click.argument("source", type=click.Path(path_type=Path), metavar="FOLDER|FILE")
@click.option("-m", "--model", help="The model that encodes the items; with --add INDEX's own.")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="INDEX",
    help="Folder of the index.",
)
@click.option("--add", is_flag=True, help="Add to the INDEX that is there what it lacks.")
@click.option(
    "--factory",
    default="auto",
    show_default=True,
    help="auto, flat, ivf, hnsw, ivf-pq, sq8, rabitq, or a FAISS factory string.",
)
@click.option(
    "--shard-items",
    type=click.IntRange(1),
    metavar="N",
    help="Items in one file at most. [default: 4 GiB of vectors]",
)
@options.role
@options.skip_bad
@click.option(
    "--drop-embeddings",
    is_flag=True,
    help="Do not keep the pooled vectors, which migration and a later --add use.",
)
@options.revision
@options.device
@options.trust_remote_code
@options.items_per_pass
@options.workers
def index(
    source: Path,
    model: str | None,
    out: Path,
    add: bool,
    factory: str,
    shard_items: int | None,
    role: str,
    skip_bad: bool,
    drop_embeddings: bool,
    revision: str | None,
    device: str,
    trust_remote_code: bool,
    batch_size: int,
    workers: int,
) -> None:
    """Encode a folder of pictures, or a file of items, and index them for `search`.

    A file is JSON lines (CSV, Parquet) whose rows hold "text", "image" or both, and "id" if they
    have one. The same command again goes on where it was stopped.

    \b
    patch-retriever index photos -m demo -o photos-index
    patch-retriever index catalogue.jsonl -m demo -o catalogue --factory ivf
    patch-retriever index new-photos -o photos-index --add
    """
    from patch_retriever.cli.progress import Narrator, quiet_libraries
    from patch_retriever.retrieval.index.indexing import IndexOptions, add_corpus, index_corpus
    from patch_retriever.retrieval.index.manifest import maker
    from patch_retriever.retrieval.load import load_encoder
    from patch_retriever.retrieval.readers.items import read_corpus

    if model is None:
        if not add:
            raise click.UsageError("name the model that encodes the items: -m MODEL")
        model = maker(out)
    quiet_libraries()
    narrator = Narrator()
    corpus = read_corpus(source, skip_bad=skip_bad)
    encoder = load_encoder(model, device, revision, trust_remote_code, workers=workers)
    if add:
        done = add_corpus(
            corpus, encoder, out, skip_bad, batch_size, narrator.progress, narrator.say
        )
    else:
        chosen = IndexOptions(
            factory, "query" if role == "query" else "document", shard_items, not drop_embeddings
        )
        done = index_corpus(
            corpus, encoder, out, chosen, skip_bad, batch_size, narrator.progress, narrator.say
        )
    for line in done.skipped:
        click.echo(f"left out: {line}", err=True)
    there = f", {done.there_before} there before" if add else ""
    left_out = f", {len(done.skipped)} left out" if done.skipped else ""
    click.echo(f"{out}: {done.count} items ({done.added} added{there}{left_out})")


@click.command("index-remove")
@click.argument("index", type=click.Path(path_type=Path))
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
def index_remove(index: Path, ids: tuple[str, ...]) -> None:
    """Take the items with these IDs out of INDEX.

    \b
    patch-retriever index-remove photos-index red-bag.jpg old/blue-bag.jpg
    """
    from patch_retriever.retrieval.index.removing import remove_items

    left = remove_items(index, ids)
    click.echo(f"{index}: {left} items")


@click.command("index-migrate")
@click.argument("index", type=click.Path(path_type=Path))
@click.option("-m", "--model", required=True, help="The model that queries will come from.")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="NEW",
    help="Folder of the new index.",
)
@options.revision
@options.device
@options.trust_remote_code
def index_migrate(
    index: Path,
    model: str,
    out: Path,
    revision: str | None,
    device: str,
    trust_remote_code: bool,
) -> None:
    """Write INDEX anew for another MODEL and encode nothing.

    That works where the two differ after the pooling alone: a patch of pooled vectors against
    another, or against none (MODEL@base). Where they differ before, a line says so.

    \b
    patch-retriever index-migrate photos-index -m demo@base -o photos-index-base
    """
    from patch_retriever.cli.progress import Narrator, quiet_libraries
    from patch_retriever.retrieval.index.migration import migrate
    from patch_retriever.retrieval.load import load_encoder

    quiet_libraries()
    count = migrate(
        index, load_encoder(model, device, revision, trust_remote_code), out, Narrator().say
    )
    click.echo(f"{out}: {count} items for {model}")
