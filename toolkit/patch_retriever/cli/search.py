"""`patch-retriever search`."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import click

from patch_retriever.cli import options


@click.command()
@click.argument("index", type=click.Path(path_type=Path))
@click.argument("queries", nargs=-1, metavar="QUERY...")
@click.option(
    "--queries",
    "queries_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help='Queries from JSON lines (CSV, Parquet) with "text", "image" or both.',
)
@click.option("-k", type=click.IntRange(1), default=10, show_default=True, help="Items to find.")
@click.option("-m", "--model", help="The model that made INDEX, where it is not there any more.")
@click.option("--nprobe", type=click.IntRange(1), help="Lists to look into (IVF).")
@click.option("--ef-search", type=click.IntRange(1), help="Neighbours to keep in view (HNSW).")
@click.option(
    "--html",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write a page with thumbnails.",
)
@options.revision
@options.device
@options.trust_remote_code
@options.items_per_pass
@options.as_json
def search(
    index: Path,
    queries: tuple[str, ...],
    queries_file: Path | None,
    k: int,
    model: str | None,
    nprobe: int | None,
    ef_search: int | None,
    html: Path | None,
    revision: str | None,
    device: str,
    trust_remote_code: bool,
    batch_size: int,
    as_json: bool,
) -> None:
    """Find the items of INDEX that are nearest to every QUERY: a text, a picture's path, or both;
    a QUERY may have several pictures.

    \b
    patch-retriever search photos-index "a red bag"
    patch-retriever search photos-index photo.jpg --html found.html
    patch-retriever search photos-index "photo.jpg + but in blue" -k 5 --json
    patch-retriever search photos-index "front.jpg + back.jpg"
    """
    from patch_retriever.cli.progress import quiet_libraries
    from patch_retriever.items import Item
    from patch_retriever.retrieval.index.answers import answer
    from patch_retriever.retrieval.index.manifest import maker
    from patch_retriever.retrieval.index.search import SavedIndex
    from patch_retriever.retrieval.load import load_encoder
    from patch_retriever.retrieval.readers.items import read_corpus

    asked = [Item.parse(query) for query in queries]
    if queries_file is not None:
        asked += read_corpus(queries_file).items
    if not asked:
        raise click.UsageError("nothing is asked; give a QUERY or --queries FILE")
    for item in asked:
        item.check_picture()
    quiet_libraries()
    encoder = load_encoder(model or maker(index), device, revision, trust_remote_code)
    opened = SavedIndex(index, encoder, gpu=device.startswith("cuda"))
    settings = {"nprobe": nprobe, "efSearch": ef_search}
    answers = answer(
        opened, encoder, asked, k, {n: v for n, v in settings.items() if v}, batch_size
    )
    if html is not None:
        from patch_retriever.report.search_page import write_search_page

        write_search_page(html, opened, answers)
    if as_json:
        found = {"index": str(index), "model": opened.manifest.made_by.model}
        click.echo(json.dumps({**found, "answers": [a.to_json() for a in answers]}, indent=1))
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    for number, one in enumerate(answers):
        if len(answers) > 1:
            click.echo(f"{'' if number == 0 else chr(10)}{one.asked}")
        for line in one.to_lines():
            click.echo(line[:width] if width else line)
    if html is not None:
        click.echo(f"{html}: written", err=True)
