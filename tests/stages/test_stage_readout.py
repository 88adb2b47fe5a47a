"""The stage that chooses a readout: what it compares readouts on, and what it leaves."""

from __future__ import annotations

import json

import pytest
import torch

from conftest import SMALL_SCENES
from patch_retriever.activations.collect import collect_pooled
from patch_retriever.backbones.load import load_backbone
from patch_retriever.backbones.readout import ONE_WORD
from patch_retriever.config import BuildConfig
from patch_retriever.data import scenes_data
from patch_retriever.items import KINDS
from patch_retriever.progress import no_progress
from patch_retriever.retrieval.evaluate import evaluate_pooled
from patch_retriever.stages.readout import (
    Sample,
    choose_readout,
    kept_tokens,
    load_readout,
    some_queries,
)


@pytest.fixture(scope="module")
def data():
    return scenes_data(SMALL_SCENES, 0)


@pytest.fixture(scope="module")
def chosen(random_model, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("readout")
    config = BuildConfig(model=str(random_model), batch_size=16)
    choose_readout(load_backbone(str(random_model)), data, config, folder, no_progress)
    return folder


def test_the_best_of_all_is_chosen_and_every_score_is_there(chosen):
    values = json.loads((chosen / "readout.json").read_text())
    by, scores = values["by"], values["scores"]
    for name, found in by.items():
        assert scores[name] == max(v for v in found.values() if v is not None)
    aligned = {name for name, found in by.items() if found["aligned"] is not None}
    readout = load_readout(chosen)
    assert readout.name in aligned
    assert scores[readout.name] == max(scores[name] for name in aligned)
    # three prompts; of the best, every end of the decoder and pooling is aligned
    assert {name.partition(" prompt")[0] for name in by} == {"plain", "paper", "one-word"}
    assert all(name.startswith(f"{readout.prompt.name} prompt") for name in aligned)
    assert len(aligned) == len(by) / 3


def test_scores_are_those_of_plain_steps(chosen, random_model, data):
    """As it is, less the calibration mean of its kind, and after CCA from all pairs."""
    readout = load_readout(chosen)
    found = json.loads((chosen / "readout.json").read_text())["by"][readout.name]
    transformer = load_backbone(str(random_model))
    seen_nd, held_nd = (
        collect_pooled(transformer, data.splits[split].items, [readout], 16)[readout]
        for split in ("calibration", "validation")
    )
    asked = some_queries(data.splits["validation"], 100)
    places = [data.splits["validation"].items.index(item) for item in asked.items]
    held_nd, validation = held_nd[places], asked
    held_kinds_n = torch.from_numpy(asked.kinds()).long()
    assert found["raw"] == pytest.approx(evaluate_pooled(held_nd, validation).score, abs=0.02)
    sample = Sample.of(data.splits["calibration"], 2000)
    items = data.splits["calibration"].items
    of_kind = [
        [i for i, item in enumerate(items) if item in sample.items and item.kind == kind]
        for kind in KINDS
    ]
    means_kd = torch.stack([seen_nd[rows].mean(0) for rows in of_kind])
    centred_nd = held_nd - means_kd[held_kinds_n]
    assert found["centred"] == pytest.approx(
        evaluate_pooled(centred_nd, validation).score, abs=0.02
    )


def test_tokens_of_what_was_read_under_the_chosen_readout_are_kept(chosen, data):
    kept = kept_tokens(chosen, data)
    assert kept.is_of(load_readout(chosen))
    asked = some_queries(data.splits["validation"], 100)
    read = {id(item) for item in Sample.of(data.splits["calibration"], 2000).items + asked.items}
    everything = data.items()
    known, left = kept.known(everything)
    assert {id(everything[i]) for i in known} == read
    assert sorted([*known, *left]) == list(range(len(everything)))
    # of the other ends of the decoder nothing is left on disk
    (tokens,) = (path for path in chosen.iterdir() if path.is_dir())
    assert len({path.name.partition("-")[0] for path in tokens.glob("*.safetensors")}) == 1


def test_with_the_papers_readout_nothing_is_read_and_nothing_kept(random_model, data, tmp_path):
    config = BuildConfig(model=str(random_model), preset="paper")
    choose_readout(load_backbone(str(random_model)), data, config, tmp_path, no_progress)
    assert kept_tokens(tmp_path, data) is None


@pytest.mark.parametrize("pairs", [3, 10, 1000])
def test_a_sample_holds_pairs_of_every_direction_by_their_places(data, pairs):
    calibration = data.splits["calibration"]
    sample = Sample.of(calibration, pairs)
    assert set(sample.pairs) == {task.direction for task in calibration.tasks}
    for direction, pairs_n2 in sample.pairs.items():
        whole = calibration.pairs((direction,)).tolist()
        of_whole = {(calibration.items[a], calibration.items[b]) for a, b in whole}
        found = [(sample.items[a], sample.items[b]) for a, b in pairs_n2.tolist()]
        assert set(found) <= of_whole
        assert len(found) <= pairs or len(found) == len(whole)
        assert len(found) >= min(pairs, len(whole)) / 2
    assert sample.kinds_n.tolist() == [KINDS.index(item.kind) for item in sample.items]


def test_some_queries_keep_all_that_answers_them(data):
    validation = data.splits["validation"]
    part = some_queries(validation, 5)
    assert {task.name for task in part.tasks} == {task.name for task in validation.tasks}
    assert len(part.items) < len(validation.items)
    for task, whole in zip(part.tasks, validation.tasks, strict=True):
        answers = {
            validation.items[query]: {validation.items[whole.documents[r]] for r in relevant}
            for query, relevant in zip(whole.queries, whole.relevant, strict=True)
        }
        documents = {part.items[d] for d in task.documents}
        for query, relevant in zip(task.queries, task.relevant, strict=True):
            expected = answers[part.items[query]] & documents
            assert {part.items[task.documents[r]] for r in relevant} == expected
        assert len(task.queries) >= 5


def test_enough_queries_for_all_are_all(data):
    validation = data.splits["validation"]
    part = some_queries(validation, 10_000)
    assert [len(t.queries) for t in part.tasks] == [len(t.queries) for t in validation.tasks]


def test_a_single_prompt_is_not_compared_with_itself(random_model, data, tmp_path):
    config = BuildConfig(model=str(random_model), prompt="one-word", pooling="lasttoken")
    choose_readout(load_backbone(str(random_model)), data, config, tmp_path, no_progress)
    values = json.loads((tmp_path / "readout.json").read_text())
    assert all(found["aligned"] is not None for found in values["by"].values())
    assert load_readout(tmp_path).prompt == ONE_WORD
