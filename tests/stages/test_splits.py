"""Calibration, validation and test never overlap, and nothing learned or chosen saw test."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace

import pytest
import torch

from conftest import SMALL_SCENES
from patch_retriever.backbones.load import load_backbone
from patch_retriever.concepts.table import ConceptTable
from patch_retriever.config import BuildConfig
from patch_retriever.data import SPLITS, scenes_data
from patch_retriever.features import Features
from patch_retriever.items import Item
from patch_retriever.patch.methods import methods
from patch_retriever.progress import no_progress
from patch_retriever.runs import DONE
from patch_retriever.stages.evaluation import evaluate_on_test, write_table
from patch_retriever.stages.features import NO_CHANGE, SavedFeatures
from patch_retriever.stages.fit import Fit
from patch_retriever.stages.readout import choose_readout, load_readout
from patch_retriever.stages.scoring import score
from patch_retriever.stages.selection import NO_CONCEPT, load_calibration, select
from patch_retriever.stages.trials import fitted_splits, trials

DATA = scenes_data(SMALL_SCENES, 0)
POISONED_DATA = replace(
    DATA,
    splits=DATA.splits
    | {"test": replace(DATA.splits["test"], items=(Item("poison"),) * 3, tasks=())},
)


@pytest.fixture(scope="module")
def run(finished_build):
    return finished_build / "run"


@pytest.fixture
def features(run, tmp_path):
    """A copy of the build's features."""
    return shutil.copytree(run / "features", tmp_path / "features")


def scored_and_selected(run, model, features, data, out):
    """The stages between features and export, again; returns the calibration split."""
    readout = load_readout(run / "readout")
    transformer = load_backbone(str(model))
    score(transformer, data, readout, features, run / "sae", "tokens", out / "score")
    saved = SavedFeatures(features)
    calibration = load_calibration(
        readout, data, saved, run / "sae", out / "score", 0, None, fitted_splits(data, 1)
    )
    found = tuple(methods(calibration))
    select_again(calibration, data, saved, readout, found, out / "select")
    return calibration


def select_again(calibration, data, saved, readout, found, folder):
    held_out = trials(calibration, found, data, saved.of_all, methods, 1)
    select(calibration, held_out, readout, folder, no_progress, found)


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != DONE
    }


def poison(features, split):
    """Everything that is known of a split's items is not a number, or wrong."""
    found = Features.load(features / f"{split}.safetensors")
    codes = found.codes.scaled(torch.full((found.codes.n_concepts,), torch.nan))
    nan_nd = torch.full_like(found.pooled_nd, torch.nan)
    poisoned = replace(
        found, pooled_nd=nan_nd, mean_nd=nan_nd.clone(), codes=codes, kinds_n=2 - found.kinds_n
    )
    poisoned.save(features / f"{split}.safetensors")


def test_the_splits_share_no_scene_and_no_full_caption():
    scenes, captions = [], []
    for split in SPLITS:
        collection = DATA.splits[split]
        scenes.append({item.picture.scene for item in collection.items if item.picture is not None})
        (task,) = (task for task in collection.tasks if task.name == "t->t")
        captions.append({collection.items[i].text for i in task.documents})
    for found in (scenes, captions):
        assert all(found)
        for a, b in itertools.combinations(found, 2):
            assert not a & b


def test_scores_patches_and_choices_are_bit_equal_when_test_is_poisoned(
    run, random_model, features, tmp_path
):
    """`selection.json` holds the validation score of every patch that was tried."""
    poison(features, "test")
    scored_and_selected(run, random_model, features, POISONED_DATA, tmp_path)
    for stage in ("score", "select"):
        assert contents(tmp_path / stage) == contents(run / stage), stage


def test_the_readout_is_chosen_without_test(run, random_model, tmp_path):
    config = BuildConfig.read(None, model=str(random_model), scenes=SMALL_SCENES)
    transformer = load_backbone(str(random_model))
    choose_readout(transformer, POISONED_DATA, config, tmp_path, no_progress)
    assert contents(tmp_path) == contents(run / "readout")


def test_choices_do_depend_on_validation(run, random_model, features, tmp_path):
    """So that the test above could fail."""
    found = Features.load(features / "validation.safetensors")
    wrong = replace(found, pooled_nd=found.pooled_nd.roll(1, 0))
    wrong.save(features / "validation.safetensors")
    scored_and_selected(run, random_model, features, DATA, tmp_path)
    assert contents(tmp_path / "score") == contents(run / "score")
    assert contents(tmp_path / "select") != contents(run / "select")


def test_a_method_that_selects_no_concept_is_named_as_left_out(
    run, features, random_model, tmp_path
):
    readout = load_readout(run / "readout")
    saved = SavedFeatures(features)
    calibration = load_calibration(readout, DATA, saved, run / "sae", run / "score", 0)
    concepts = ConceptTable.load(run / "score/concepts.parquet")
    flat = replace(concepts, modality=torch.full_like(concepts.modality, 0.5))
    calibration = replace(calibration, concepts=flat)
    found = tuple(methods(calibration))
    select_again(calibration, DATA, saved, readout, found, tmp_path / "select")
    selection = json.loads((tmp_path / "select/selection.json").read_text())
    every = selection["left_out"]
    left_out = [one for one in every if one["why"] == NO_CONCEPT]
    assert len(left_out) == 8
    ids = {one["id"] for one in left_out}
    assert all("text-dominant" in name or "unimodal" in name for name in ids)
    assert not {choice["id"] for choice in selection["methods"]} & ids

    config = BuildConfig.read(None, model=str(random_model), scenes=SMALL_SCENES)
    made = Fit(NO_CHANGE, saved, run / "score", calibration, found, tmp_path / "select", "select")
    evaluate_on_test(
        [made],
        load_backbone(str(random_model)),
        DATA,
        config,
        tmp_path / "test",
        no_progress,
    )
    write_table(tmp_path / "test", [made], made, made.choice["id"], 0, tmp_path / "evaluate")
    report = json.loads((tmp_path / "evaluate/table.json").read_text())
    assert report["left_out"] == every
    assert not {row["id"] for row in report["rows"]} & ids
    for name in ("table.txt", "table.md"):
        lines = (tmp_path / "evaluate" / name).read_text().splitlines()
        (line,) = (line for line in lines if line.startswith(f"left out, {NO_CONCEPT}: "))
        assert all(one["title"] in line for one in left_out)
