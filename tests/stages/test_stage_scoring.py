"""The stage that scores concepts: on codes of pooled vectors, and without hard negatives."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from conftest import SMALL_SCENES
from patch_retriever.backbones.load import load_backbone
from patch_retriever.concepts.scores import score_concepts
from patch_retriever.concepts.table import ConceptTable
from patch_retriever.data import Data, scenes_data
from patch_retriever.errors import UserError
from patch_retriever.features import Features
from patch_retriever.retrieval.collection import Collection
from patch_retriever.retrieval.negatives import hard_negatives
from patch_retriever.sae.codes import Codes
from patch_retriever.sae.formats import load_sae
from patch_retriever.stages.readout import load_readout
from patch_retriever.stages.scoring import score


@pytest.fixture(scope="module")
def stage(finished_build, random_model):
    """The stage on a finished build's features; it takes the data, the kind of codes, a folder."""
    run = finished_build / "run"
    transformer, readout = load_backbone(str(random_model)), load_readout(run / "readout")

    def scored(data, codes, folder):
        score(transformer, data, readout, run / "features", run / "sae", codes, folder)
        return folder

    return scored


@pytest.fixture(scope="module")
def data():
    return scenes_data(SMALL_SCENES, 0)


def test_the_stage_gives_what_the_build_has(stage, data, finished_build, tmp_path):
    stage(data, "tokens", tmp_path)
    for name in ("concepts.parquet", "concepts.json"):
        assert (tmp_path / name).read_bytes() == (finished_build / "run/score" / name).read_bytes()


def test_codes_of_pooled_vectors_are_scored_where_they_are_asked_for(
    stage, data, finished_build, tmp_path
):
    stage(data, "pooled", tmp_path)
    sae = load_sae(finished_build / "run/sae")
    features = Features.load(finished_build / "run/features/calibration.safetensors")
    pooled = replace(
        features, codes=Codes.from_dense(sae.encode(features.pooled_nd[:, : sae.d_in]))
    )
    collection = data.splits["calibration"]
    crossing = [task for task in collection.tasks if task.direction in ("t->i", "i->t")]
    centred_nd = features.pooled_nd.clone()
    for kind in range(3):
        centred_nd[features.kinds_n == kind] -= centred_nd[features.kinds_n == kind].mean(0)
    expected = score_concepts(
        pooled,
        sae.W_dec_cd,
        torch.from_numpy(collection.pairs(("t->i", "i->t"))),
        hard_negatives(features.pooled_nd, crossing),
        hard_negatives(centred_nd, crossing),
    )
    found = ConceptTable.load(tmp_path / "concepts.parquet")
    for name in vars(expected):
        assert torch.allclose(getattr(found, name), getattr(expected, name), atol=1e-5), name
    tokens = ConceptTable.load(finished_build / "run/score/concepts.parquet")
    assert not torch.allclose(found.energy, tokens.energy, atol=1e-4)
    assert torch.equal(found.role_text, tokens.role_text)  # of tokens, whatever is scored
    about = json.loads((tmp_path / "concepts.json").read_text())
    before = json.loads((finished_build / "run/score/concepts.json").read_text())
    assert about == before | {"codes": "pooled"}


def everything_relevant(collection: Collection) -> Collection:
    """The same tasks where every document answers every query."""
    tasks = tuple(
        replace(task, relevant=(tuple(range(len(task.documents))),) * len(task.queries))
        for task in collection.tasks
    )
    return replace(collection, tasks=tasks)


def test_data_without_wrong_documents_is_one_line(stage, data, tmp_path):
    calibration = everything_relevant(data.splits["calibration"])
    same = Data({**data.splits, "calibration": calibration}, "60 pairs of the user's.")
    with pytest.raises(UserError) as caught:
        stage(same, "tokens", tmp_path)
    assert str(caught.value).startswith(
        "60 pairs of the user's. In calibration no document is wrong"
    )
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
