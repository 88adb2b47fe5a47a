"""Explanations of the live model: their parts sum to what it says, before and after the patch."""

from __future__ import annotations

import json

import pytest

from handmade import (
    ITEMS,
    PATCHES,
    READOUTS,
    TEXTS,
    Drawn,
    live,
    make_patches,
    make_sae,
)
from patch_retriever import PatchedRetriever
from patch_retriever.errors import UserError
from patch_retriever.explain import ConceptPart, Explanation, Part, concept_labels
from patch_retriever.sae.formats import save_sae

PAIRS = ((0, 4), (5, 1), (9, 6), (2, 3), (8, 10))
"""A text and a picture, a picture and a text, both and a picture, two texts, twice both."""


@pytest.fixture(scope="module", params=[*((r, "none") for r in READOUTS), (READOUTS[2], "token")])
def made(request, random_model):
    readout, scale = request.param
    return readout, *make_patches(str(random_model), readout, input_scale=scale)


def similarity(retriever, query, document, **options):
    """What the model itself says."""
    query_1e = retriever.encode_query([query], convert_to_tensor=True, **options)
    document_1e = retriever.encode_document([document], convert_to_tensor=True, **options)
    return float(retriever.similarity(query_1e, document_1e))


def total(explanation, when):
    parts = [*explanation.concepts, explanation.geometry, explanation.residual]
    if explanation.last_token is not None:
        parts.append(explanation.last_token)
    return sum(getattr(part, when) for part in parts)


@pytest.mark.parametrize("name", PATCHES)
def test_the_parts_sum_to_what_the_model_says(name, made, random_model):
    readout, sae, _, patches = made
    retriever = live(str(random_model), readout, patches[name], sae)
    for query, document in PAIRS:
        query, document = ITEMS[query].load(), ITEMS[document].load()
        found = retriever.explain(query, document)
        for when, switch in (("before", False), ("after", True)):
            said = similarity(retriever, query, document, patch=switch)
            assert getattr(found.score, when) == pytest.approx(said, abs=1e-6)
            assert total(found, when) == pytest.approx(said, abs=1e-6)


def test_without_a_patch_nothing_changes(made, random_model):
    readout, sae, _, patches = made
    found = live(str(random_model), readout, patches["nothing"], sae).explain("a cat", "a dog")
    for part in (found.score, found.geometry, found.residual, *found.concepts):
        assert part.before == pytest.approx(part.after, abs=1e-9)
    assert {part.strength for part in found.concepts} == {0}


def test_activations_and_strengths_are_those_of_features_and_patch(made, random_model):
    readout, sae, features, patches = made
    patch = patches["everything"]
    found = live(str(random_model), readout, patch, sae).explain(ITEMS[1].load(), ITEMS[9].load())
    query_c, document_c = features.codes.dense()[[1, 9]]
    strength_c = dict(
        zip(patch.subtract.concepts_m.tolist(), patch.subtract.strength_m.tolist(), strict=True)
    )
    active = ((query_c > 0) | (document_c > 0)).nonzero()[:, 0].tolist()
    assert sorted(part.concept for part in found.concepts) == active
    for part in found.concepts:
        assert part.query == pytest.approx(float(query_c[part.concept]), abs=1e-4)
        assert part.document == pytest.approx(float(document_c[part.concept]), abs=1e-4)
        assert part.strength == strength_c.get(part.concept, 0)


def test_the_largest_part_comes_first(made, random_model):
    readout, sae, _, patches = made
    found = live(str(random_model), readout, patches["everything"], sae).explain("a cat", "no")
    sizes = [max(abs(part.before), abs(part.after)) for part in found.concepts]
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) > 2


def test_items_are_taken_as_encode_takes_them(random_model):
    sae, _, patches = make_patches(str(random_model), READOUTS[0])
    retriever = live(str(random_model), READOUTS[0], patches["everything"], sae)
    picture = Drawn(1).open()
    items = (TEXTS[0], picture, {"image": picture, "text": TEXTS[1]})
    for query in items:
        for document in items:
            said = similarity(retriever, query, document)
            assert retriever.explain(query, document).score.after == pytest.approx(said, abs=1e-6)


# the SAE


def test_a_build_brings_its_sae(finished_build):
    retriever = PatchedRetriever.from_folder(finished_build)
    found = retriever.explain("a red star", Drawn(1).open())
    assert found.score.after == pytest.approx(
        similarity(retriever, "a red star", Drawn(1).open()), abs=1e-6
    )
    assert total(found, "after") == pytest.approx(found.score.after, abs=1e-6)


def test_another_folder_can_be_named(finished_build, tmp_path):
    held = PatchedRetriever.from_folder(finished_build)
    save_sae(held.sae, tmp_path / "sae")
    named = PatchedRetriever.from_folder(finished_build, sae=tmp_path / "sae")
    assert named.explain("a cat", "no") == held.explain("a cat", "no")


def test_without_an_sae_it_is_said_how_to_get_one(made, random_model):
    readout, _, _, patches = made
    with pytest.raises(UserError, match="run/sae"):
        live(str(random_model), readout, patches["nothing"]).explain("a cat", "a dog")


def test_an_sae_of_another_width_is_refused(made, random_model, tmp_path):
    readout, _, _, patches = made
    narrow = make_sae(1.0, width=16)
    with pytest.raises(UserError, match="16 dimensions; this model's have 32"):
        live(str(random_model), readout, patches["nothing"], narrow)
    save_sae(narrow, tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path}: an SAE for activations of 16"):
        live(str(random_model), readout, patches["nothing"], tmp_path).explain("a cat", "no")


def test_an_sae_that_the_patch_was_not_made_with_is_refused(made, random_model):
    readout, sae, _, patches = made
    other = make_sae(1.0, seed=7)
    with pytest.raises(UserError, match="not the SAE that this patch was made with"):
        live(str(random_model), readout, patches["subtract"], other)
    other_gate = make_sae(1.0)
    other_gate.threshold_c.copy_(2 * sae.threshold_c)
    with pytest.raises(UserError, match="not the SAE that this patch was made with"):
        live(str(random_model), readout, patches["subtract"], other_gate)


def test_any_sae_of_the_width_serves_where_nothing_is_subtracted(made, random_model):
    readout, sae, _, patches = made
    other = make_sae(float(sae.threshold_c.mean()) / 2, seed=7)
    retriever = live(str(random_model), readout, patches["by all"], other)
    found = retriever.explain("a cat", "no")
    assert total(found, "after") == pytest.approx(similarity(retriever, "a cat", "no"), abs=1e-6)


def test_a_pooling_that_is_not_linear_is_refused(random_model):
    sae, _, patches = make_patches(str(random_model), READOUTS[0])
    retriever = live(str(random_model), READOUTS[0], patches["nothing"], sae)
    retriever[1].pooling_mode = "max"
    with pytest.raises(UserError, match="max pooling"):
        retriever.explain("a cat", "no")


# what is shown

SHOWN = Explanation(
    Part(0.5, 0.25),
    (
        ConceptPart(0.4, 0.0, concept=7, query=1.5, document=2.0, strength=1.0),
        ConceptPart(-0.2, 0.1, concept=30, query=0.5, document=0.0, strength=0.0),
        ConceptPart(0.1, 0.05, concept=2, query=0.0, document=0.25, strength=0.0),
    ),
    Part(0.15, 0.06),
    Part(0.05, 0.04),
)


def test_the_table_shows_the_largest_and_sums_the_others():
    lines = SHOWN.to_text(1, {7: "red star"}).splitlines()
    assert lines[0].split() == ["before", "after", "query", "document", "strength"]
    assert [line.split() for line in lines[1:]] == [
        ["concept", "7", "+0.4000", "+0.0000", "1.500", "2.000", "1.00", "red", "star"],
        ["2", "other", "concepts", "-0.1000", "+0.1500"],
        ["geometry", "+0.1500", "+0.0600"],
        ["residual", "+0.0500", "+0.0400"],
        ["similarity", "+0.5000", "+0.2500"],
    ]
    assert "other" not in SHOWN.to_text(3)


def test_columns_stand_below_each_other():
    head, *rows = SHOWN.to_text(3).splitlines()
    ends = [head.index(name) + len(name) for name in ("before", "after")]
    for row in rows:
        for end in ends:
            assert row[end - 1].isdigit()
            assert row[end : end + 1] in ("", " ")


def test_as_json_it_holds_everything():
    values = json.loads(json.dumps(SHOWN.to_json()))
    assert values["score"] == {"before": 0.5, "after": 0.25}
    assert [part["concept"] for part in values["concepts"]] == [7, 30, 2]
    assert values["concepts"][0] == {
        "before": 0.4,
        "after": 0.0,
        "concept": 7,
        "query": 1.5,
        "document": 2.0,
        "strength": 1.0,
    }
    assert set(values) == {"score", "concepts", "geometry", "residual", "last_token"}


def test_labels_say_what_the_table_of_a_build_has(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    assert concept_labels(tmp_path) == {}
    path = tmp_path / "report" / "concepts.parquet"
    path.parent.mkdir()
    columns = {"concept": [0, 1], "modality": [0.25, 1.0]}
    pq.write_table(pa.table(columns), path)
    assert concept_labels(tmp_path) == {0: "modality 0.25", 1: "modality 1.00"}
    tokens = [[" red", "red", "star", "a", "b", "c"], []]
    pq.write_table(pa.table({**columns, "tokens": tokens}), path)
    assert concept_labels(tmp_path, tokens=2) == {0: "modality 0.25  red star", 1: "modality 1.00"}
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match="damaged"):
        concept_labels(tmp_path)
