"""`index`, `search`, `index-remove` and `index-migrate` over pictures, as a user runs them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from commands import error_line, invoke
from patch_retriever.backbones.load import load_backbone, with_readout
from patch_retriever.backbones.readout import PAPER, Readout
from patch_retriever.items import Item
from patch_retriever.retrieval.load import load_encoder


@pytest.fixture(scope="module")
def models(random_model, tmp_path_factory) -> Path:
    """`plain` and `turned`, which differ after the pooling, and `last`, which pools otherwise."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize

    folder = tmp_path_factory.mktemp("models")
    plain = with_readout(load_backbone(str(random_model)), Readout(PAPER, pooling="mean"))
    plain.save(str(folder / "plain"))
    turn = Dense(32, 16, activation_function=torch.nn.Identity())
    SentenceTransformer(modules=[*list(plain)[:2], turn, Normalize()]).save(str(folder / "turned"))
    last = with_readout(load_backbone(str(random_model)), Readout(PAPER, pooling="lasttoken"))
    last.save(str(folder / "last"))
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Twelve pictures, two of them in a folder of their own."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    for i in range(12):
        picture = Image.effect_noise((40, 40), 10 * i + 5).convert("RGB")
        picture.save(folder / ("more" if i >= 10 else "") / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def made(models, photos, tmp_path_factory) -> Path:
    """An index of the photos by the plain model."""
    folder = tmp_path_factory.mktemp("indexes") / "photos"
    result = invoke("index", photos, "-m", models / "plain", "-o", folder)
    assert result.stdout == f"{folder}: 12 items (12 added)\n", result.output
    return folder


@pytest.fixture
def index(made, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(made, tmp_path / "index"))


def hits(index, *args):
    result = invoke("search", index, *args, "--json")
    assert result.exit_code == 0, result.output
    return [[hit["id"] for hit in one["hits"]] for one in json.loads(result.stdout)["answers"]]


def test_the_three_forms_of_a_query_find_what_the_model_finds(made, models, photos):
    encoder = load_encoder(str(models / "plain"))
    names = sorted(str(p.relative_to(photos)) for p in photos.rglob("*.png"))
    documents = encoder.embed([Item.parse(str(photos / name)) for name in names], "document")
    asked = ["a red bag", str(photos / "3.png"), f"{photos / '3.png'} + but in blue"]
    scores = encoder.embed([Item.parse(one) for one in asked], "query") @ documents.T
    result = invoke("search", made, *asked, "-k", 12, "--json")
    for q, one in enumerate(json.loads(result.stdout)["answers"]):
        assert one["query"] == asked[q]
        order = np.argsort(-scores[q])
        found = [hit["score"] for hit in one["hits"]]
        np.testing.assert_allclose(found, scores[q][order], atol=1e-5)
        by_name = dict(zip(names, scores[q], strict=True))
        np.testing.assert_allclose([by_name[hit["id"]] for hit in one["hits"]], found, atol=1e-5)
    assert hits(made, photos / "3.png", "-k", 1) == [["3.png"]]
    assert hits(made, photos / "more" / "11.png", "-k", 1) == [["more/11.png"]]


def test_the_table_has_a_line_an_item(made, photos):
    result = invoke("search", made, photos / "3.png", "-k", 3)
    head, first, *rest = result.stdout.splitlines()
    assert head.split() == ["rank", "score", "id"]
    assert first.split() == ["1", "1.0000", "3.png"]
    assert len(rest) == 2


def test_queries_come_from_a_file_too(made, photos, tmp_path):
    rows = [{"text": "a bag"}, {"image": str(photos / "2.png")}]
    path = tmp_path / "queries.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = hits(made, "first of all", "--queries", path, "-k", 1)
    assert len(found) == 3
    assert found[2] == ["2.png"]


def test_the_page_is_written(made, photos, tmp_path):
    result = invoke("search", made, photos / "3.png", "-k", 4, "--html", tmp_path / "found.html")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "found.html").read_text().count("<img ") == 5


def test_an_index_of_a_file_keeps_its_ids_and_texts(models, photos, tmp_path):
    rows = [{"id": f"n{i}", "text": f"text {i}", "image": str(photos / f"{i}.png")} for i in (1, 2)]
    rows.append({"id": "t", "text": "a text alone"})
    path = tmp_path / "items.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    result = invoke("index", path, "-m", models / "plain", "-o", tmp_path / "ix", "--as", "query")
    assert result.exit_code == 0, result.output
    result = invoke("search", tmp_path / "ix", "a text alone", "-k", 1)
    assert result.stdout.splitlines()[1].split() == ["1", "1.0000", "t", "a", "text", "alone"]


def test_items_are_added_and_removed(index, photos, tmp_path):
    grown = Path(shutil.copytree(photos, tmp_path / "grown"))
    Image.new("RGB", (40, 40), "red").save(grown / "red.png")
    result = invoke("index", grown, "-o", index, "--add")
    assert result.stdout == f"{index}: 13 items (1 added, 12 there before)\n", result.output
    assert hits(index, grown / "red.png", "-k", 1) == [["red.png"]]
    result = invoke("index-remove", index, "red.png", "more/10.png")
    assert result.stdout == f"{index}: 11 items\n"
    (found,) = hits(index, grown / "red.png", "-k", 99)
    assert len(found) == 11
    assert {"red.png", "more/10.png"}.isdisjoint(found)


def test_a_bad_picture_stops_or_is_left_out(models, photos, tmp_path):
    grown = Path(shutil.copytree(photos, tmp_path / "grown"))
    (grown / "bad.png").write_bytes((photos / "1.png").read_bytes()[:90])
    arguments = ("index", grown, "-m", models / "plain", "-o", tmp_path / "ix")
    assert error_line(invoke(*arguments)).startswith(f"{grown / 'bad.png'}: not a readable image")
    result = invoke(*arguments, "--skip-bad")
    assert result.stdout == f"{tmp_path / 'ix'}: 12 items (12 added, 1 left out)\n"
    assert f"left out: {grown / 'bad.png'}: not a readable image" in result.stderr


def test_a_migrated_index_is_the_one_encoded_again(made, models, photos, tmp_path):
    new, again = tmp_path / "new", tmp_path / "again"
    result = invoke("index-migrate", made, "-m", models / "turned", "-o", new)
    assert result.stdout == f"{new}: 12 items for {models / 'turned'}\n", result.output
    assert invoke("index", photos, "-m", models / "turned", "-o", again).exit_code == 0
    asked = ["a red bag", "something else", photos / "4.png"]
    scores = [
        {hit["id"]: hit["score"] for one in answers for hit in one["hits"]}
        for answers in (
            json.loads(invoke("search", folder, *asked, "-k", 12, "--json").stdout)["answers"]
            for folder in (new, again)
        )
    ]
    assert len(scores[0]) == 12
    for name, score in scores[0].items():
        assert score == pytest.approx(scores[1][name], abs=1e-6)


def test_a_model_that_pools_otherwise_must_encode_again(made, models, tmp_path):
    line = error_line(invoke("index-migrate", made, "-m", models / "last", "-o", tmp_path / "new"))
    assert "differs from" in line
    assert line.endswith(f"patch-retriever index ITEMS -m {models / 'last'} -o {tmp_path / 'new'}")


@pytest.mark.parametrize(("other", "why"), [("turned", "another patch"), ("last", "another model")])
def test_another_model_is_refused_by_name(made, models, other, why):
    line = error_line(invoke("search", made, "a bag", "-m", models / other))
    assert line.startswith(f"{made}: made ")
    assert why in line
    assert str(models / "plain") in line
    assert str(models / other) in line


def test_a_model_that_has_moved_is_named_with_m(index, models, tmp_path):
    moved = Path(shutil.copytree(models / "plain", tmp_path / "moved"))
    manifest = index / "manifest.json"
    values = json.loads(manifest.read_text())
    values["made_by"]["model"] = str(tmp_path / "gone")
    manifest.write_text(json.dumps(values))
    for command in (("search", index, "a bag"), ("index", models, "-o", index, "--add")):
        line = error_line(invoke(*command))
        assert line.startswith(f"{tmp_path / 'gone'}: no such model folder, and it made {index}")
        assert line.endswith("with -m")
    assert len(hits(index, "a bag", "-m", moved)[0]) == 10


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ((), "nothing is asked; give a QUERY or --queries FILE"),
        (("nowhere.jpg",), "nowhere.jpg: no such image file"),
        (("a", "--nprobe", 2), "nprobe=2: not a search setting of this index; IVF indexes have "
         "nprobe, HNSW indexes efSearch"),
    ],
)  # fmt: skip
def test_a_wrong_search_is_one_line(made, args, line):
    assert error_line(invoke("search", made, *args)).startswith(line)


def test_a_truncated_file_is_named(index):
    path = index / "index-00000.faiss"
    path.write_bytes(path.read_bytes()[:-1])
    assert error_line(invoke("search", index, "a")).startswith(f"{path}: truncated or changed")


def test_without_a_model_a_new_index_is_refused(photos, tmp_path):
    line = error_line(invoke("index", photos, "-o", tmp_path / "ix"))
    assert line.startswith("name the model that encodes the items: -m MODEL")
    assert not (tmp_path / "ix").exists()


def test_search_settings_reach_an_ivf_index(models, tmp_path):
    rows = [{"text": f"thing number {i}"} for i in range(90)]
    path = tmp_path / "items.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    folder = tmp_path / "ix"
    arguments = ("-m", models / "plain", "-o", folder, "--factory", "IVF8,Flat")
    assert invoke("index", path, *arguments, "--shard-items", 50).exit_code == 0
    assert len(hits(folder, "thing number 7", "-k", 90)[0]) == 90
    assert len(hits(folder, "thing number 7", "-k", 90, "--nprobe", 1)[0]) < 90


def test_items_and_queries_of_several_pictures(models, photos, tmp_path):
    rows = [{"id": f"{i}", "image": [f"{i}.png", f"{i + 1}.png"]} for i in range(8)]
    rows.append({"id": "both", "image": ["0.png", "2.png", "3.png"], "text": "a red star"})
    source = photos / "several.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    index, vectors = tmp_path / "index", tmp_path / "vectors.npy"
    made = invoke("index", source, "-m", models / "plain", "-o", index)
    assert made.stdout == f"{index}: 9 items (9 added)\n", made.output
    for row in rows:
        asked = " + ".join([*(f"{photos}/{name}" for name in row["image"]), row.get("text", "")])
        asked = asked.removesuffix(" + ")
        page = tmp_path / "page.html"
        said = invoke("search", index, asked, "-m", models / "plain", "--json", "--html", page)
        assert said.exit_code == 0, said.output
        (answer,) = json.loads(said.stdout)["answers"]
        assert answer["query"] == asked
        assert answer["hits"][0]["id"] == row["id"]
        assert answer["hits"][0]["score"] == pytest.approx(1, abs=1e-5)
        assert answer["hits"][0]["picture"] == str(photos / row["image"][0])
        assert page.read_text().count("<img") >= 1
    assert invoke("encode", models / "plain", source, "-o", vectors).exit_code == 0
    encoder = load_encoder(str(models / "plain"))
    both = Item.parse(f"{photos}/0.png + {photos}/2.png + {photos}/3.png + a red star")
    assert np.abs(np.load(vectors)[-1] - encoder.embed([both], "document")[0]).max() < 1e-5
