"""Which kind of source a user means."""

from __future__ import annotations

from pathlib import Path

from patch_retriever.errors import UserError
from patch_retriever.retrieval.readers.folders import PictureFolder
from patch_retriever.retrieval.readers.rows import Reading, Source
from patch_retriever.retrieval.readers.tables import Csv, JsonLines


def open_source(location: str, reading: Reading, texts_beside: bool = True) -> Source:
    """Rows of pictures, texts or both."""
    path = Path(location)
    if path.is_dir():
        return PictureFolder(path, texts_beside)
    if not path.exists():
        raise UserError(f"{location}: no such file or folder")
    return (Csv if path.suffix.lower() in (".csv", ".tsv") else JsonLines)(path, reading)
