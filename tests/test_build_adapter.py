"""Builds with an adapter: the table, the export merged and separate, what is done again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import PeftModel
from sentence_transformers import SentenceTransformer

from commands import error_line, invoke
from conftest import SMALL_SAE, SMALL_SCENES
from patch_retriever import PatchedRetriever, build_retriever
from patch_retriever.adapters.settings import AdapterSettings
from patch_retriever.analysis.finished import open_build
from patch_retriever.backbones.load import load_backbone
from patch_retriever.backbones.readout import Readout
from patch_retriever.config import BuildConfig
from patch_retriever.patch.artefact import Patch
from patch_retriever.patch.methods.adapted import ALONE, OWN
from patch_retriever.runs import MARKER
from patch_retriever.scenes.tasks import scenes_collection
from patch_retriever.stages.fit import Fit

SETTINGS = {"scenes": SMALL_SCENES, "sae": SMALL_SAE, "folds": 1}
ADAPTER = {
    "rank": 4, "steps": 4, "lr": 1e-2, "warmup": 1, "batch_size": 6, "hard_negatives": 1,
    "validate_every": 2, "captions": 2,
}  # fmt: skip
ITEMS = [item.load() for item in scenes_collection("test", 20, 0).items[::25]]


CHOICE = Fit.choice


def preferring(needs_training):
    """Validation prefers what needs training, or what does not, to everything else."""

    def choice(self):
        found = CHOICE.fget(self)
        more = float((found["needs"] == "training") == needs_training)
        return {**found, "validation_score": found["validation_score"] + more}

    return property(choice)


@pytest.fixture
def prefer_adapted(monkeypatch):
    """With so little training validation would not."""
    monkeypatch.setattr(Fit, "choice", preferring(True))


@pytest.fixture(scope="module")
def merged_build(finished_build, random_model, tmp_path_factory):
    """The folder of a finished build with an adapter since, and what was said."""
    out = shutil.copytree(finished_build, tmp_path_factory.mktemp("adapted") / "out")
    said = []
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(Fit, "choice", preferring(True))
        build_retriever(out, model=str(random_model), adapter=ADAPTER, say=said.append, **SETTINGS)
    return out, said


@pytest.fixture
def adapted(merged_build, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(merged_build[0], tmp_path / "out")


class Enough(Exception):
    pass


def until(start):
    """For `say`: end the build at the first line that starts so."""

    def say(line):
        if line.startswith(start):
            raise Enough

    return say


def test_merged_loads_plainly_and_equals_the_trained_model(
    adapted, merged_build, random_model, tmp_path
):
    out, said = adapted, merged_build[1]
    for stage in ("collect", "sae", "features", "score", "select"):
        assert f"{stage}: done before" in said
    report = json.loads((out / "report" / "table.json").read_text())
    rows = {row["id"]: row for row in report["rows"] if row["needs"] == "training"}
    assert {ALONE, OWN} < set(rows)
    assert len(rows) == 3
    assert "needs training" in (out / "report" / "table.txt").read_text()

    patch = Patch.load(out / "patch")
    assert patch.about["needs"] == "training"
    moved = shutil.move(out, tmp_path / "moved")
    model = SentenceTransformer(str(moved), device="cpu")
    found = model.encode_document(ITEMS)

    # by hand: peft's own loader on the base, our patch live
    backbone = load_backbone(str(random_model))
    PeftModel.from_pretrained(backbone.model, str(moved / "run" / "adapter"))
    readout = Readout.from_json(patch.about["readout"])
    from patch_retriever.backbones.load import with_readout

    live = PatchedRetriever(with_readout(backbone, readout), patch)
    np.testing.assert_allclose(found, live.encode_document(ITEMS), atol=1e-5)
    np.testing.assert_allclose(
        found, PatchedRetriever.from_folder(moved).encode_document(ITEMS), atol=1e-5
    )
    assert not (moved / "adapter").exists()
    assert "merged into the weights" in (moved / "README.md").read_text()

    page = (moved / "report" / "report.html").read_text()
    assert "Modality of the concepts, after the adapter" in page
    assert "Validation while the adapter trains" in page
    assert "Energy while the adapter trains" in page
    assert open_build(moved).features.name == "features-adapted"


@pytest.mark.usefixtures("prefer_adapted")
def test_separate_stays_beside_the_base(adapted, random_model, tmp_path):
    out, said = adapted, []
    expected = SentenceTransformer(str(out), device="cpu").encode_query(ITEMS)
    separate = {"adapter": {**ADAPTER, "merge": False}, **SETTINGS}
    build_retriever(out, model=str(random_model), say=said.append, **separate)
    assert "adapter: done before" in said  # the same training
    moved = shutil.move(out, tmp_path / "moved")
    config = json.loads((moved / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == ".."
    weights = load_backbone(str(random_model)).model.state_dict()
    from transformers import AutoModel

    base = AutoModel.from_pretrained(moved)
    assert all(torch.equal(v, weights[k]) for k, v in base.state_dict().items())
    card = (moved / "README.md").read_text()
    assert "trust_remote_code=True" in card
    assert "lora of rank 4" in card
    assert "peft" in card

    model = SentenceTransformer(str(moved), device="cpu", trust_remote_code=True)
    np.testing.assert_allclose(model.encode_query(ITEMS), expected, atol=1e-5)
    live = PatchedRetriever.from_folder(moved)
    np.testing.assert_allclose(live.encode_query(ITEMS), expected, atol=1e-5)

    # peft's own loader on the folder's weights gives what the backbone gives
    readout = Readout.from_json(Patch.load(moved / "patch").about["readout"])
    from patch_retriever.backbones.load import with_readout

    theirs = load_backbone(str(random_model))
    PeftModel.from_pretrained(theirs.model, str(moved / "adapter"))
    np.testing.assert_allclose(
        with_readout(theirs, readout).encode(ITEMS), live.encode(ITEMS, patch=False), atol=1e-5
    )

    # saved again, it is whole without the adapter
    model.save(str(tmp_path / "again"), create_model_card=False)
    again = SentenceTransformer(str(tmp_path / "again"), device="cpu", trust_remote_code=True)
    np.testing.assert_allclose(again.encode_query(ITEMS), expected, atol=1e-5)


def test_a_given_adapter_is_taken(adapted, random_model, tmp_path):
    given = shutil.copytree(adapted / "run" / "adapter", tmp_path / "given")
    with pytest.raises(Enough):
        build_retriever(
            adapted, model=str(random_model), adapter_from=str(given),
            say=until("features-adapted"), **SETTINGS,
        )  # fmt: skip
    taken = adapted / "run" / "adapter"
    assert (taken / "adapter_model.safetensors").read_bytes() == (
        given / "adapter_model.safetensors"
    ).read_bytes()
    assert json.loads((taken / "adapter.json").read_text())["from"] == str(given)
    assert not (taken / "training.json").exists()


def test_without_the_adapter_the_build_is_the_old_one_again(adapted, finished_build, random_model):
    build_retriever(adapted, model=str(random_model), **SETTINGS)
    table = (adapted / "report" / "table.txt").read_text()
    assert table == (finished_build / "report" / "table.txt").read_text()
    assert "adapter" not in table


@pytest.mark.usefixtures("prefer_adapted")
def test_a_build_that_is_killed_in_training_goes_on_from_the_last_look(
    merged_build, finished_build, random_model, tmp_path
):
    out = shutil.copytree(finished_build, tmp_path / "killed")
    settings = {"model": str(random_model), "adapter": ADAPTER, **SETTINGS}
    with pytest.raises(Enough):
        build_retriever(out, say=until("step 2:"), **settings)
    said = []

    def say(line):
        said.append(line)
        until("features-adapted")(line)

    with pytest.raises(Enough):
        build_retriever(out, say=say, **settings)
    assert [line[:6] for line in said if line.startswith("step ")] == ["step 4"]
    for name in ("adapter_model.safetensors", "training.json"):
        assert (out / "run" / "adapter" / name).read_bytes() == (
            merged_build[0] / "run" / "adapter" / name
        ).read_bytes()
    assert not (out / "run" / "adapter.training").exists()


def test_validation_may_keep_the_patch_alone(adapted, finished_build, random_model, monkeypatch):
    monkeypatch.setattr(Fit, "choice", preferring(False))
    result = build_retriever(adapted, model=str(random_model), adapter=ADAPTER, **SETTINGS)
    before = json.loads((finished_build / "report" / "table.json").read_text())
    assert result.report["exported"] == before["exported"]
    assert any(row["needs"] == "training" for row in result.report["rows"])
    assert (adapted / "model.safetensors").read_bytes() == (
        finished_build / "model.safetensors"
    ).read_bytes()
    assert "after the adapter" in (adapted / "report" / "report.html").read_text()


def test_a_row_of_the_adapted_model_is_exported_by_its_id(adapted, tmp_path):
    done = invoke("export", adapted, "--method", ALONE, "-o", tmp_path / "alone")
    assert done.exit_code == 0, done.stderr
    assert "adapter: done before" in done.stderr and "test: done before" in done.stderr
    patch = Patch.load(tmp_path / "alone" / "patch")
    assert patch.about["id"] == ALONE and not patch.maps and patch.subtract is None
    assert json.loads((tmp_path / "alone/golden/result.json").read_text())["max_abs_diff"] <= 1e-5
    assert "merged into the weights" in (tmp_path / "alone" / "README.md").read_text()
    model = SentenceTransformer(str(tmp_path / "alone"), device="cpu")
    found = np.abs(model.encode(ITEMS) - SentenceTransformer(str(adapted)).encode(ITEMS))
    assert found.max() > 1e-3


def test_a_row_of_the_unadapted_model_is_exported_without_the_adapter(
    adapted, finished_build, tmp_path
):
    done = invoke("export", adapted, "--method", "base", "-o", tmp_path / "base")
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "base/model.safetensors").read_bytes() == (
        finished_build / "model.safetensors"
    ).read_bytes()


@pytest.mark.usefixtures("prefer_adapted")
def test_with_concepts_subtracted_in_a_layer(random_model, tmp_path):
    """Training goes through the subtraction in the layer, and its energies are read there."""
    out = tmp_path / "out"
    settings = {**SETTINGS, "patch_at": "layers.0", "adapter": ADAPTER}
    result = build_retriever(out, model=str(random_model), **settings)
    assert any(row["id"] == OWN for row in result.report["rows"])
    log = json.loads((out / "run" / "adapter" / "training.json").read_text())
    assert log["looks"][0]["up_share"] > 0
    golden = json.loads((out / "golden" / "result.json").read_text())
    assert golden["max_abs_diff"] <= 1e-5


# the commands


def test_adapt_in_a_fresh_process(finished_build, tmp_path):
    out = shutil.copytree(finished_build, tmp_path / "out")
    options = ["--rank", 2, "--steps", 2, "--batch-size", 4, "--hard-negatives", 0]
    command = [sys.executable, "-m", "patch_retriever", "adapt", out, *options]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "step 2: contrastive" in done.stderr
    assert "share of energy to grow" in done.stderr
    assert "needs training" in done.stdout
    assert "adapter alone" in done.stdout
    config = BuildConfig.read(out / MARKER)
    assert config.adapter == AdapterSettings(rank=2, steps=2, batch_size=4, hard_negatives=0)
    again = invoke("adapt", out, *options)
    assert "adapter: done before" in again.stderr
    assert "evaluate: done before" in again.stderr


def test_a_dry_run_says_what_fits(finished_build):
    found = json.loads(invoke("adapt", finished_build, "--dry-run", "--json").stdout)
    assert [one["memory_gib"] for one in found["memory"]] == [8, 24, 80]
    assert all(one["fits"] and one["chunk_size"] == 256 for one in found["memory"])
    text = invoke("adapt", finished_build, "--dry-run").stdout
    assert "8 GB: --chunk-size 256" in text


@pytest.mark.parametrize(("options", "said"), [
    (["--pairs", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--steps", "0"], "--steps"),
    (["--method", "prefix"], "--method"),
])  # fmt: skip
def test_a_wrong_option_is_named(finished_build, tmp_path, options, said):
    out = shutil.copytree(finished_build, tmp_path / "out")
    assert said in error_line(invoke("adapt", out, *options))


def test_pairs_without_images_are_refused(finished_build, tmp_path):
    out = shutil.copytree(finished_build, tmp_path / "out")
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"a red star {i}"}) + "\n" for i in range(60)))
    said = error_line(invoke("adapt", out, "--pairs", texts))
    assert str(texts) in said
    assert "image" in said
    kept = json.loads((out / "report" / "table.json").read_text())
    assert kept == json.loads((finished_build / "report" / "table.json").read_text())


def test_what_no_build_made_is_refused(tmp_path):
    assert "no such folder" in error_line(invoke("adapt", tmp_path / "nowhere"))
    tmp_path.joinpath("foreign").mkdir()
    assert "not made by patch-retriever" in error_line(invoke("adapt", tmp_path / "foreign"))


def test_an_adapter_of_another_base_is_refused(adapted, stand_in, tmp_path):
    out = adapted
    settings = tmp_path / "settings.yaml"
    settings.write_text(json.dumps({"model": str(stand_in("llava")), **SETTINGS}))
    given = ["--adapter", out / "run" / "adapter"]
    said = error_line(invoke("build", "--config", settings, *given, "-o", tmp_path / "other"))
    assert "made for" in said
    assert str(out / "run" / "adapter") in said


def test_a_folder_without_an_adapter_is_refused_before_anything_is_done(tmp_path):
    said = error_line(invoke("build", "--adapter", tmp_path / "none", "-o", tmp_path / "out"))
    assert "no adapter here" in said
    assert not (tmp_path / "out").exists()


def test_no_loss_is_refused(finished_build):
    said = error_line(invoke("adapt", finished_build, "--contrastive", 0, "--rebalancing", 0))
    assert "nothing to train for" in said


def test_an_unknown_setting_is_named(tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text("adapter: {rang: 3}\n")
    said = error_line(invoke("build", "--config", settings, "-o", tmp_path / "out"))
    assert "adapter.rang" in said
    assert "rank" in said
