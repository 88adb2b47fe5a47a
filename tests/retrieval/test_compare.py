"""Models side by side: the same model differs from itself by nothing, wrong names are told."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from patch_retriever.errors import UserError
from patch_retriever.retrieval import compare
from patch_retriever.retrieval.compare import compare_models, load_model
from patch_retriever.retrieval.pairs import split_pairs
from patch_retriever.retrieval.readers.pairs import read_pairs

N = 12


@pytest.fixture(scope="module")
def collection():
    return compare.held_out_collection("scenes", N, 0, ["t->i short", "i->i"])


@pytest.fixture(scope="module")
def report(finished_build, collection):
    return compare_models([str(finished_build)] * 2, collection, 0, batch_size=16)


def test_a_model_differs_from_itself_by_nothing(report):
    first, second = report["models"]
    assert first["score"] == second["score"]
    for task in ("t->i short", "i->i"):
        assert "R@1_minus_first" not in first["tasks"][task]
        nothing = {"R@1_minus_first": {"mean": 0, "low": 0, "high": 0}}
        assert second["tasks"][task] == first["tasks"][task] | nothing


def test_the_report_is_json_and_says_how_many_queries_there_were(report, finished_build):
    assert json.loads(json.dumps(report)) == report
    assert report["queries"] == {"t->i short": N, "i->i": N}
    assert [model["model"] for model in report["models"]] == [str(finished_build)] * 2


def test_recalls_are_what_plain_encode_and_numpy_give(report, finished_build, collection):
    model = load_model(str(finished_build))
    task = next(t for t in collection.tasks if t.name == "i->i")
    asked, there = (
        encode([collection.items[i].load() for i in numbers])
        for encode, numbers in (
            (model.encode_query, task.queries),
            (model.encode_document, task.documents),
        )
    )
    order_qn = np.argsort(-(asked @ there.T), axis=1)
    for k in (1, 5, 10):
        hit = [bool(set(row[:k]) & set(r)) for row, r in zip(order_qn, task.relevant, strict=True)]
        assert report["models"][0]["tasks"]["i->i"][f"R@{k}"] == pytest.approx(np.mean(hit))


def stand_in(query, document):
    """A model whose embeddings of a loaded item are given by two functions."""

    def encode(embed):
        return lambda items, **_: np.stack([embed(item[0]["content"]) for item in items])

    return SimpleNamespace(
        modalities=["message", "image", "text"],
        encode_query=encode(query),
        encode_document=encode(document),
    )


def pixels(content) -> np.ndarray:
    picture = content[0]["image"].resize((12, 12))
    return np.asarray(picture, dtype=np.float32).ravel() - 90


def constant(value: float):
    return lambda _content: np.full(4, value)


MODELS = {
    "pixels": stand_in(pixels, pixels),
    "constant": stand_in(constant(1), constant(1)),
    "zero": stand_in(constant(0), constant(0)),
    "opposite": stand_in(lambda content: -pixels(content), pixels),
}


@pytest.fixture
def stand_ins(monkeypatch):
    monkeypatch.setattr(compare, "load_model", lambda name, _device: MODELS[name])


@pytest.fixture(scope="module")
def other_views():
    return compare.held_out_collection("scenes", 30, 0, ["i->i"])


@pytest.mark.usefixtures("stand_ins")
def test_models_are_compared_with_the_first(other_views):
    found = compare_models(["constant", "pixels"], other_views, 0)
    constant, good = (model["tasks"]["i->i"] for model in found["models"])
    assert constant == {"R@1": 0, "R@5": 0, "R@10": 0}
    assert good["R@1_minus_first"]["mean"] == pytest.approx(good["R@1"])
    assert good["R@1_minus_first"]["low"] > 0
    back = compare_models(["pixels", "constant"], other_views, 0)
    assert back["models"][1]["tasks"]["i->i"]["R@1_minus_first"]["high"] < 0


@pytest.mark.usefixtures("stand_ins")
def test_embeddings_of_zero_find_nothing(other_views):
    assert compare_models(["zero"], other_views, 0)["models"][0]["score"] == 0


@pytest.mark.usefixtures("stand_ins")
def test_queries_and_documents_are_encoded_as_what_they_are(other_views):
    found = compare_models(["pixels", "opposite"], other_views, 0)
    good, bad = (model["score"] for model in found["models"])
    assert good > bad


def test_a_model_without_a_chat_template_gets_items_as_they_are(monkeypatch, other_views):
    def encode(items, **_):
        return np.stack([np.asarray(item, dtype=np.float32).ravel() for item in items])

    plain = SimpleNamespace(modalities=["image"], encode_query=encode, encode_document=encode)
    monkeypatch.setattr(compare, "load_model", lambda _name, _device: plain)
    found = compare_models(["clip"], other_views, 0)
    assert found["models"][0]["score"] > 0


@pytest.mark.usefixtures("stand_ins")
def test_small_batches_change_nothing(other_views):
    scores = [
        compare_models(["pixels"], other_views, 0, batch_size=size)["models"] for size in (1, 64)
    ]
    assert scores[0] == scores[1]


def test_a_model_that_cannot_encode_pictures_is_named(monkeypatch, other_views):
    def refuse(_items, **_):
        raise ValueError("images are not supported\nby this model")

    texts_only = SimpleNamespace(modalities=["text"], encode_query=refuse, encode_document=refuse)
    monkeypatch.setattr(compare, "load_model", lambda _name, _device: texts_only)
    with pytest.raises(UserError) as caught:
        compare_models(["bert"], other_views, 0)
    assert str(caught.value) == ("bert: cannot encode these queries (images are not supported)")


@pytest.mark.usefixtures("stand_ins")
def test_say_names_every_model(other_views):
    said = []
    compare_models(["zero", "constant"], other_views, 0, say=said.append)
    assert [line for line in said if "zero" in line or "constant" in line] == said
    assert len(said) == 2


def test_all_tasks_are_there_unless_some_are_asked_for():
    assert len(compare.held_out_collection("scenes", 5, 0).tasks) == 10


def test_a_direction_asks_for_all_its_tasks_and_a_name_for_one():
    by_direction = compare.held_out_collection("scenes", 5, 0, ["t->i"])
    assert [t.name for t in by_direction.tasks] == ["t->i full", "t->i short", "t->i web"]
    by_name = compare.held_out_collection("scenes", 5, 0, ["t->i web", "t->t"])
    assert [t.name for t in by_name.tasks] == ["t->i web", "t->t"]


def test_an_unknown_task_is_told_with_those_there_are():
    with pytest.raises(UserError, match=r"no task 'i->x' here.*t->i short"):
        compare.held_out_collection("scenes", 5, 0, ["t->i", "i->x"])


def test_of_pairs_the_test_split_is_evaluated(photo_folder):
    source = photo_folder / "pairs.jsonl"
    found = compare.held_out_collection(str(source), 0, 3)
    held_out = split_pairs(read_pairs(source).pairs, 3)["test"]
    pictures = {item.picture for item in found.items if item.picture is not None}
    assert found.split == "test"
    assert pictures == {pair.picture for pair in held_out}
    with pytest.raises(UserError, match="no task 't->t' here"):
        compare.held_out_collection(str(source), 0, 3, ["t->t"])


def test_missing_pairs_are_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.jsonl: no such pairs file"):
        compare.held_out_collection(str(tmp_path / "gone.jsonl"), 0, 0)


@pytest.mark.parametrize("name", ["/no/such/model", "./nowhere", "a/b/c"])
def test_a_missing_model_folder_is_named(name):
    with pytest.raises(UserError, match=f"^{name}: no such model folder"):
        load_model(name)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no model in this folder \(modules\.json and config"):
        load_model(str(tmp_path))


def test_a_model_that_does_not_load_is_named_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nothing-known"}')
    with pytest.raises(UserError) as caught:
        load_model(str(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path}: cannot be loaded (")
    assert "\n" not in str(caught.value)


def test_the_seed_of_a_build_is_known(finished_build, tmp_path):
    assert compare.build_seed([str(tmp_path), str(finished_build)]) == 0
    (tmp_path / "patch-retriever.json").write_text('{"seed": 7}')
    assert compare.build_seed([str(tmp_path), str(finished_build)]) == 7
