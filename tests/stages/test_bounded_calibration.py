"""A calibration split that has more items than methods are fitted on."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from conftest import SMALL_SCENES
from patch_retriever.backbones.readout import PAPER_READOUT
from patch_retriever.config import BuildConfig
from patch_retriever.data import scenes_data
from patch_retriever.features import Features
from patch_retriever.patch.methods import methods
from patch_retriever.progress import no_progress
from patch_retriever.stages.features import SavedFeatures
from patch_retriever.stages.fit import fit
from patch_retriever.stages.readout import load_readout
from patch_retriever.stages.selection import load_calibration, select
from patch_retriever.stages.trials import HeldOut, Trial

DATA = scenes_data(SMALL_SCENES, 0)
MOST = 40


@pytest.fixture(scope="module")
def run(finished_build):
    return finished_build / "run"


def bounded(run, most):
    saved = SavedFeatures(run / "features")
    readout = load_readout(run / "readout")
    return load_calibration(
        readout, DATA, saved, run / "sae", run / "score", 0, device="cpu:0", most=most
    )


def test_a_sample_is_those_items_features_and_whole_pairs(run):
    c, whole = bounded(run, MOST), Features.load(run / "features/calibration.safetensors")
    assert torch.bincount(c.kinds_n.long()).tolist() == [MOST] * 3
    assert c.of_items == len(whole.kinds_n) > len(c.kinds_n)
    rows = {tuple(x_d.tolist()): n for n, x_d in enumerate(whole.pooled_nd)}
    place_n = torch.tensor([rows[tuple(x_d.tolist())] for x_d in c.features.pooled_nd])
    assert torch.equal(c.features.codes.dense(), whole.codes[place_n].dense())
    everything = bounded(run, None)
    for direction, pairs_n2 in c.pairs.items():
        known = set(map(tuple, everything.pairs[direction].tolist()))
        assert {(int(place_n[a]), int(place_n[b])) for a, b in pairs_n2} <= known
    assert sum(map(len, c.pairs.values())) > 0
    queries = set(everything.query_items.tolist())
    assert {int(place_n[i]) for i in c.query_items} <= queries


def test_without_a_bound_or_with_a_large_one_all_items_are_used(run):
    for most in (None, 20_000):
        c = bounded(run, most)
        assert len(c.kinds_n) == c.of_items == len(DATA.splits["calibration"].items)


def test_the_device_is_the_calibrations(run):
    assert bounded(run, None).device == "cpu:0"


def test_the_patch_says_how_many_items_it_was_fitted_on(run, tmp_path):
    c, saved = bounded(run, MOST), SavedFeatures(run / "features")
    few = tuple(m for m in methods(c) if m.id in ("base", "realign-role"))
    held_out = HeldOut([Trial(few, saved.of("validation"), DATA.splits["validation"])])
    select(c, held_out, load_readout(run / "readout"), tmp_path, no_progress, few)
    about = json.loads((tmp_path / "patch/patch.json").read_text())["about"]
    items = len(DATA.splits["calibration"].items)
    assert about["calibration_items"] == {"used": 3 * MOST, "of": items}


def test_a_build_fits_where_its_model_runs_and_by_its_bound(monkeypatch):
    """The stages before are taken as finished, and fitting stops where the methods would begin."""
    asked: dict[str, object] = {}
    finished = SimpleNamespace(stage=lambda name, *_, **__: Path(name))

    def load(*arguments):
        asked["device"], asked["most"] = arguments[-2:]
        raise InterruptedError

    monkeypatch.setattr("patch_retriever.stages.fit.load_calibration", load)
    monkeypatch.setattr("patch_retriever.stages.fit.device_of", lambda model: torch.device(model))
    for model, device in (("cuda:1", "cuda:1"), ("cpu", "cpu"), ("mps", "cpu")):
        config = BuildConfig(max_calibration_items=123)
        with pytest.raises(InterruptedError):
            fit(finished, model, DATA, PAPER_READOUT, Path("sae"), config, methods, no_progress)
        assert asked == {"device": device, "most": 123}
