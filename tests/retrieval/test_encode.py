"""Embeddings of items in a file, equal to what `encode` gives."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from sentence_transformers import SentenceTransformer

from commands import error_line, invoke
from patch_retriever.backbones.load import load_backbone, with_readout
from patch_retriever.backbones.readout import PAPER, Readout
from patch_retriever.errors import UserError
from patch_retriever.items import Item
from patch_retriever.pictures.picture import PictureFile
from patch_retriever.retrieval.encode import encode_file, readable
from patch_retriever.retrieval.load import load_encoder


@pytest.fixture(scope="module")
def model(finished_build):
    return load_encoder(str(finished_build))


@pytest.fixture
def items(photo_folder) -> list[Item]:
    return [
        Item("a field of colour"),
        Item(picture=PictureFile(photo_folder / "3.png")),
        Item("make it darker", PictureFile(photo_folder / "50.png")),
        Item("a longer text than the others, about nothing at all"),
        Item(picture=PictureFile(photo_folder / "40.png")),
    ]


@pytest.mark.parametrize("batch_size", [2, 64])
@pytest.mark.parametrize("role", ["query", "document"])
def test_the_file_holds_what_encode_gives(model, items, tmp_path, role, batch_size):
    out = tmp_path / "out.npy"
    shape = encode_file(model, items, out, role, batch_size)
    found_nd = np.load(out, allow_pickle=False)
    plain = SentenceTransformer(model.name)
    encode = plain.encode_query if role == "query" else plain.encode_document
    expected_nd = encode([item.load() for item in items])
    assert found_nd.dtype == np.float32
    assert found_nd.shape == shape == (5, plain.get_embedding_dimension())
    np.testing.assert_allclose(found_nd, expected_nd, atol=1e-5)


def test_queries_are_encoded_as_queries(items, tmp_path):
    class Sided:
        dimension = 2

        def stream(self, items, role, _prompt, batch_size):
            numbers = list(range(len(list(items))))
            for start in range(0, len(numbers), batch_size):
                some = numbers[start : start + batch_size]
                yield (
                    some,
                    np.tile(np.float32([role == "query", role == "document"]), (len(some), 1)),
                )

        def finish(self, pooled, _role):
            return pooled.astype(np.float64)

    for role, expected in (("query", [1, 0]), ("document", [0, 1])):
        encode_file(Sided(), items, tmp_path / "out.npy", role, 2)
        assert np.load(tmp_path / "out.npy").tolist() == [expected] * 5


def test_a_file_can_be_mapped_instead_of_read(model, items, tmp_path):
    encode_file(model, items, tmp_path / "out.npy", "document", 64)
    mapped = np.load(tmp_path / "out.npy", mmap_mode="r")
    assert mapped.shape[0] == 5


def test_a_missing_picture_leaves_the_old_file_and_nothing_half_written(model, items, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    out = folder / "out.npy"
    out.write_bytes(b"old")
    gone = Item(picture=PictureFile(tmp_path / "gone.png"))
    with pytest.raises(UserError, match=r"gone\.png"):
        encode_file(model, [*items, gone], out, "document", 2)
    assert out.read_bytes() == b"old"
    assert [p.name for p in folder.iterdir()] == ["out.npy"]


def test_progress_counts_items(items, tmp_path, model):
    seen = []

    def progress(steps, total):
        for step in steps:
            seen.append((step, total))
            yield step

    encode_file(model, items, tmp_path / "out.npy", "document", 2, progress)
    assert seen == [(step, 5) for step in range(5)]


def test_items_whose_picture_cannot_be_opened_are_named(items, tmp_path):
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    gone = [Item(picture=PictureFile(tmp_path / name)) for name in ("cut.png", "none.png")]
    kept, skipped = readable([items[0], gone[0], *items[1:3], gone[1]])
    assert kept == [0, 2, 3]
    cut, none = skipped
    assert cut.startswith(f"{tmp_path / 'cut.png'}: not a readable image")
    assert none.startswith(f"{tmp_path / 'none.png'}: no such image file")


PEAK = """
import sys
from pathlib import Path
from patch_retriever.retrieval.encode import encode_file
from patch_retriever.retrieval.load import load_encoder
from patch_retriever.retrieval.readers.items import read_corpus

def own():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 2**10

folder, model = map(Path, sys.argv[1:3])
encoder = load_encoder(str(model), workers=2)
items = read_corpus(folder).items
largest = 0

def progress(steps, total):
    global largest
    for step in steps:
        largest = max(largest, own())
        yield step

encode_file(encoder, items[:30], folder / "out.npy", "document", 4, progress)
few, largest = largest, 0
encode_file(encoder, items, folder / "out.npy", "document", 4, progress)
print(few, largest)
"""


def test_memory_does_not_grow_with_the_corpus(random_model, tmp_path):
    """Ten times the pictures, half a gigabyte of them decoded, in the memory of a few batches."""
    noise = np.random.default_rng(0).integers(0, 256, (100, 100, 3), np.uint8)
    Image.fromarray(noise).resize((750, 750)).save(tmp_path / "0.jpg")
    for i in range(1, 300):
        os.link(tmp_path / "0.jpg", tmp_path / f"{i}.jpg")
    model = tmp_path / "model"
    with_readout(load_backbone(str(random_model)), Readout(PAPER)).save(str(model))
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path), str(model)],
        capture_output=True,
        text=True,
        check=True,
    )
    few, many = map(float, done.stdout.split()[-2:])
    assert many < few + 50


def test_the_command_gives_the_same_with_any_number_of_workers(finished_build, photo_folder):
    found = []
    for workers in (1, 3):
        out = photo_folder / f"{workers}.npy"
        rows = photo_folder / "pairs.jsonl"
        done = invoke("encode", finished_build, rows, "-o", out, "--workers", workers)
        assert done.exit_code == 0, done.stderr
        assert "60 embeddings" in done.stdout
        found.append(np.load(out))
    np.testing.assert_array_equal(*found)
    assert "--workers" in error_line(
        invoke("encode", finished_build, rows, "-o", out, "--workers", 0)
    )
