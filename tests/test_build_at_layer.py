"""A build that subtracts concepts after a decoder layer."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from sentence_transformers import SentenceTransformer

from commands import error_line, invoke
from conftest import SMALL_SAE, SMALL_SCENES
from patch_retriever import PatchedRetriever, build_retriever
from patch_retriever.backbones.readout import readout_grid
from patch_retriever.errors import UserError
from patch_retriever.patch.artefact import Patch
from patch_retriever.retrieval.evaluate import evaluate_embeddings
from patch_retriever.retrieval.load import load_encoder
from patch_retriever.scenes.tasks import scenes_collection
from patch_retriever.stages import features as stage
from patch_retriever.stages import judging

SITE = "layers.0"
SETTINGS = {"scenes": SMALL_SCENES, "sae": SMALL_SAE, "folds": 1, "patch_at": SITE}
REMOVED = "removed by discriminative attribution, centred, at layers.0"


@pytest.fixture(scope="module")
def built(random_model, tmp_path_factory):
    """The folder of a build in which validation prefers a removal to everything else."""

    def prefer_removal(patches, features, collection, measure):
        outcome = judging_evaluate(patches, features, collection, measure)
        if all(patch.layers for patch in patches):
            hits = {task: found + 10 for task, found in outcome.hits_by_task.items()}
            outcome = type(outcome)(hits)
        return outcome

    judging_evaluate = judging.evaluate
    out = tmp_path_factory.mktemp("deep-build") / "out"
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(judging, "evaluate", prefer_removal)
        build_retriever(out, model=str(random_model), **SETTINGS)
    return out


@pytest.fixture(scope="module")
def table(built):
    report = json.loads((built / "report" / "table.json").read_text())
    return {row["method"]: row for row in report["rows"]}


def test_it_is_the_live_model_and_the_flag_is_said(built):
    items = [item.load() for item in scenes_collection("test", 4, 0).items]
    model = SentenceTransformer(str(built), device="cpu", trust_remote_code=True)
    live = PatchedRetriever.from_folder(built)
    assert list(live.patch.layers) == [SITE]
    np.testing.assert_allclose(model.encode(items), live.encode(items), atol=1e-5)
    unpatched = live.encode(items, patch=False)
    np.testing.assert_allclose(model.encode(items, patch=False), unpatched, atol=1e-5)
    assert np.abs(live.encode(items) - unpatched).max() > 1e-3
    readme = (built / "README.md").read_text()
    assert "trust_remote_code=True)" in readme
    assert f"at {SITE}" in readme


def test_the_table_has_rows_of_the_layer_their_controls_and_the_base(table):
    for row, control in (
        ("text-dominant concepts removed at layers.0", "text-dominant ones at layers.0"),
        ("removed by attribution, at layers.0", "by attribution, at layers.0"),
        (REMOVED, REMOVED.removeprefix("removed ")),
    ):
        assert not table[row]["control"]
        assert table[f"random concepts, energy as {control}"]["control"]
    others = {"base, the paper's readout", "base, chosen readout", "centring, all items"}
    assert others <= set(table)
    assert not any("rebuilt" in name or "CCA" in name for name in table)


def test_the_exported_row_is_what_the_export_reaches_on_test(built, table):
    """Independently: the folder's embeddings of the test items, searched."""
    exported = json.loads((built / "report" / "table.json").read_text())["exported"]
    collection = scenes_collection("test", SMALL_SCENES["test"], 0)
    encoder = load_encoder(str(built))
    sides = [encoder.embed(collection.items, role) for role in ("query", "document")]
    score = evaluate_embeddings(*sides, collection).score
    assert table[exported]["test_score"] == pytest.approx(score, abs=2e-3)


def test_a_second_run_does_nothing_again(built, random_model):
    said = []
    before = {p: p.stat().st_mtime_ns for p in (built / "run").glob("*/done.json")}
    build_retriever(built, model=str(random_model), say=said.append, **SETTINGS)
    assert {p: p.stat().st_mtime_ns for p in (built / "run").glob("*/done.json")} == before


def test_the_table_of_concepts_is_of_the_layer(built):
    patch = Patch.load(built / "patch")
    rows = pq.read_table(built / "report" / "concepts.parquet").to_pylist()
    strengths = {row["concept"]: row["strength"] for row in rows if row["strength"]}
    assert strengths == pytest.approx(patch.strengths)
    assert len(patch.about["concepts"]) == len(strengths)


def test_readouts_before_the_layer_are_not_tried():
    cuts = {readout.cut for readout in readout_grid(12, after="layers.5")}
    assert cuts == {None, "layers.10", "layers.11.attention"}
    assert {readout.cut for readout in readout_grid(12)} == cuts | {"layers.5"}
    assert "layers.11.attention" not in {r.cut for r in readout_grid(12, skip_mlp=False)}


def test_a_layer_that_is_not_there_is_refused_before_anything_is_done(random_model, tmp_path):
    with pytest.raises(UserError, match=r"patch_at layers\.7: .* layers\.0 to layers\.2"):
        build_retriever(tmp_path / "out", model=str(random_model), patch_at="layers.7")
    assert not (tmp_path / "out" / "run").exists()


@pytest.mark.parametrize("site", ["last_hidden_state", "layers.x", "7"])
def test_what_is_no_layer_is_refused(site, tmp_path):
    assert "patch_at" in error_line(invoke("build", "--patch-at", site, "-o", tmp_path / "out"))


def test_analyze_refuses_it_in_one_line(built, tmp_path):
    assert SITE in error_line(invoke("analyze", built, "-o", tmp_path / "out"))


def test_features_are_kept_and_made_once(built, monkeypatch):
    made = []
    monkeypatch.setattr(stage, "features_without", lambda *args: made.append(args) or len(made))
    patch = Patch.load(built / "patch")
    features = stage.PatchedFeatures(built / "run" / "unpatched", None, None, None, 1)
    assert features("test", patch.layers) == features("test", patch.layers) == 1
    assert features("validation", patch.layers) == 2
    assert features.of("test")(patch) == 1
    assert features("test", {}).mean_nd.shape[1] == 32
    assert len(made) == 2
