"""`explain`: the similarity of a query and a candidate, part by part, and heat over tokens."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch

from commands import error_line, invoke
from handmade import Drawn, make_sae
from patch_retriever import PatchedRetriever
from patch_retriever.backbones.readout import Readout
from patch_retriever.heat import token_heat, token_influence
from patch_retriever.items import Item
from patch_retriever.sae.formats import save_sae


@pytest.fixture(scope="module")
def star(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "a + b.png"  # a name that looks like both
    Drawn(2).open().save(path)
    return path


@pytest.fixture(scope="module")
def bare(finished_build, tmp_path_factory):
    """The build as it would be on the hub: without its run."""
    folder = tmp_path_factory.mktemp("hub") / "bare"
    shutil.copytree(finished_build, folder, ignore=shutil.ignore_patterns("run"))
    return folder


def shown(*args):
    result = invoke("explain", *args)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return result.stdout


def fails(*args):
    return error_line(invoke("explain", *args))


def test_the_parts_that_are_printed_sum_to_the_similarity(finished_build, star):
    said, head, _, _, *rows = shown(finished_build, "a red star", star).splitlines()
    assert said == "query: a text, document: a picture"
    before, after = re.fullmatch(r"similarity (-?\d\.\d{4}) -> (-?\d\.\d{4})", head).groups()
    columns = [[float(n) for n in re.findall(r"[+-]\d+\.\d{4}", row)[:2]] for row in rows]
    for i, said in enumerate((before, after)):
        assert columns[-1][i] == float(said)
        assert sum(row[i] for row in columns[:-1]) == pytest.approx(float(said), abs=1e-3)


def test_top_is_how_many_concepts_there_are(finished_build, star):
    for top in (0, 3):
        text = shown(finished_build, "a red star", star, "--top", top)
        assert len(re.findall(r"^concept \d+", text, re.MULTILINE)) == top
        assert " other concepts " in text


def test_concepts_are_labelled_from_the_table_of_the_build(finished_build, star, tmp_path):
    assert "modality " in shown(finished_build, "a red star", star)
    shutil.copytree(finished_build / "run" / "sae", tmp_path / "sae")
    named = shown(finished_build, "a red star", star, "--sae", tmp_path / "sae")
    assert "modality " not in named  # a table of another SAE would say wrong things


@pytest.mark.parametrize("both", [False, True])
def test_as_json_it_is_what_python_gives(finished_build, star, both):
    query = f"{star} + make it red" if both else "a red star"
    values = json.loads(shown(finished_build, query, star, "--json"))
    retriever = PatchedRetriever.from_folder(finished_build)
    picture = Drawn(2).open()
    given = {"image": picture, "text": "make it red"} if both else "a red star"
    expected = json.loads(json.dumps(retriever.explain(given, picture).to_json()))
    for name in ("score", "geometry", "residual"):
        assert values[name] == pytest.approx(expected[name], abs=1e-6)
    assert len(values["concepts"]) == len(expected["concepts"])


@pytest.mark.parametrize("read", [token_heat, token_influence])
def test_heat_and_influence_are_shown_on_both_items(finished_build, star, read):
    name = read.__name__.removeprefix("token_")
    retriever = PatchedRetriever.from_folder(finished_build)
    readout = Readout.from_json(retriever.patch.about["readout"])
    found = retriever.explain("a red star", Drawn(2).open())
    concept = next(part.concept for part in found.concepts if part.query and part.document)
    asked = (finished_build, "a red star", star, f"--{name}", concept)
    items = [Item("a red star"), Item.parse(str(star))]
    heats = read(retriever[0], readout, retriever.sae, items, torch.tensor([concept]))
    shown_heats = shown(*asked).split(f"\n{name} of concept {concept}, ")[1:]
    values = json.loads(shown(*asked, "--json"))[name]
    assert values["concept"] == concept
    for i, side in enumerate(("query", "document")):
        assert values[side]["tokens"] == heats[i].tokens
        expected = heats[i].codes_tm[:, 0].tolist()
        assert values[side]["values"] == pytest.approx(expected, abs=1e-4)
        assert shown_heats[i].strip() == f"{side}\n{heats[i].to_text(0)}"


def test_an_sae_can_be_named_where_the_folder_has_none(bare, finished_build, star):
    named = shown(bare, "a red star", star, "--json", "--sae", finished_build / "run" / "sae")
    assert named == shown(finished_build, "a red star", star, "--json")


# what can be wrong


def test_without_an_sae_it_is_said_how_to_get_one(bare, star):
    line = fails(bare, "a red star", star)
    assert "--sae" in line
    assert "run/sae" in line


def test_an_sae_of_another_width_is_named(finished_build, star, tmp_path):
    save_sae(make_sae(1.0, width=16), tmp_path / "narrow")
    line = fails(finished_build, "a red star", star, "--sae", tmp_path / "narrow")
    assert line.startswith(f"{tmp_path / 'narrow'}: an SAE for activations of 16 dimensions")


def test_a_concept_that_there_is_not_is_named(finished_build, star):
    assert fails(finished_build, "a", star, "--heat", 10**6).startswith("concept 1000000: ")


def test_a_missing_picture_is_named(finished_build, tmp_path):
    gone = tmp_path / "gone.JPG"
    for query in (gone, f"{gone} + in blue"):
        assert fails(finished_build, query, "a star").startswith(f"{gone}: no such image file")


def test_a_file_that_is_no_picture_is_named(finished_build, tmp_path):
    (tmp_path / "notes.txt").write_text("a star")
    line = fails(finished_build, tmp_path / "notes.txt", "a star")
    assert line.startswith(f"{tmp_path / 'notes.txt'}: not a readable image")


def test_an_empty_item_is_refused(finished_build):
    assert fails(finished_build, " ", "a star").startswith("an empty item")


def test_a_folder_that_is_no_build_is_named(tmp_path):
    assert fails(tmp_path / "gone", "a", "b").startswith(f"{tmp_path / 'gone'}")
