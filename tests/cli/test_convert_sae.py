"""`convert-sae`: SAEs of others in our layout, with thresholds where there is a store."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from commands import error_line, invoke
from patch_retriever.sae.formats import load_sae, save_sae
from patch_retriever.sae.model import SparseAutoencoder
from synthetic import directions, sparse_tokens, write_store

K, D, C = 3, 16, 24


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store"), sparse_tokens(4000))


def make_sae(d=D, c=C, k=None):
    rows_cd = directions(c, d)
    threshold_c = torch.zeros(c) if k else torch.full((c,), 0.7)
    return SparseAutoencoder(
        rows_cd.T.contiguous(), torch.zeros(c), rows_cd, torch.zeros(d), threshold_c, k
    )


@pytest.fixture
def saved(tmp_path):
    """Folders of an SAE with thresholds and of one with a TopK gate."""
    save_sae(make_sae(), tmp_path / "ours", {"note": "from us"})
    save_sae(make_sae(k=K), tmp_path / "topk")
    return {"ours": tmp_path / "ours", "topk": tmp_path / "topk"}


def run(*args):
    return invoke("convert-sae", *args)


def done(*args):
    result = run(*args)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout, parse_constant=pytest.fail)


def fails(*args):
    return error_line(run(*args))


def test_without_a_store_it_stays_what_it_is(saved, tmp_path):
    for name, k in (("ours", None), ("topk", K)):
        said = done(saved[name], "-o", tmp_path / "out" / name)
        assert (said["k"], said["from"]) == (k, str(saved[name]))
        before, after = load_sae(saved[name]), load_sae(tmp_path / "out" / name)
        assert after.k == k
        x_nd = sparse_tokens(50)
        assert torch.equal(before.encode(x_nd), after.encode(x_nd))


def test_with_a_store_a_gate_becomes_thresholds(saved, store, tmp_path):
    said = done(saved["topk"], "--store", store.folder, "-o", tmp_path / "out")
    before, after = load_sae(saved["topk"]), load_sae(tmp_path / "out")
    assert said["k"] is after.k is None
    assert torch.allclose(before.W_dec_cd, after.W_dec_cd, atol=1e-6)
    x_nd = store.held_out(100_000)[0]
    chosen_c, fires_c = ((sae.encode(x_nd) > 0).sum(0) for sae in (before, after))
    assert torch.allclose(fires_c.float(), chosen_c.float(), rtol=0.5, atol=6)
    assert said["conversion"]["l0_gate"] == pytest.approx(K, rel=0.05)
    assert said["conversion"]["l0"] == pytest.approx(said["conversion"]["l0_gate"], rel=0.02)
    assert said["metrics"]["fvu"] < 0.9
    metadata = json.loads((tmp_path / "out/cfg.json").read_text())["metadata"]
    assert metadata == {name: said[name] for name in ("from", "conversion", "metrics")}


def test_with_a_store_one_with_thresholds_is_only_measured(saved, store, tmp_path):
    said = done(saved["ours"], "--store", store.folder, "-o", tmp_path / "out")
    assert "conversion" not in said
    assert torch.allclose(load_sae(tmp_path / "out").threshold_c, make_sae().threshold_c)
    x_nd = sparse_tokens(4000)
    l0 = float((make_sae().encode(x_nd) > 0).sum(1).float().mean())
    assert said["metrics"]["l0"] == pytest.approx(l0, rel=0.15)


def test_an_sae_of_another_width_is_refused(store, tmp_path):
    save_sae(make_sae(d=20, k=K), tmp_path / "wide")
    line = fails(tmp_path / "wide", "--store", store.folder, "-o", tmp_path / "out")
    assert line.startswith(f"{tmp_path / 'wide'}: an SAE for activations of 20 dimensions")
    assert "16" in line
    assert not (tmp_path / "out").exists()


def test_a_folder_with_an_sae_is_not_written_over(saved):
    line = fails(saved["topk"], "-o", saved["ours"])
    assert line.startswith(f"{saved['ours']}: holds an SAE already")
    assert load_sae(saved["ours"]).k is None


@pytest.mark.parametrize("source", ["./nowhere", "empty"])
def test_a_source_without_an_sae_is_named(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert fails(source, "-o", tmp_path / "out").startswith(source)
    assert not (tmp_path / "out").exists()


def test_a_missing_store_is_named(saved, tmp_path):
    line = fails(saved["topk"], "--store", tmp_path / "gone", "-o", tmp_path / "out")
    assert line.startswith(f"{tmp_path / 'gone'}: no finished activation store")


def test_a_k_that_the_folder_says_itself_is_refused(saved, tmp_path):
    assert "k=9" in fails(saved["topk"], "--k", 9, "-o", tmp_path / "out")


def test_a_process_says_json_or_one_line(saved, store, tmp_path):
    command = [sys.executable, "-m", "patch_retriever", "convert-sae", saved["topk"],
               "--store", store.folder, "-o", tmp_path / "out"]  # fmt: skip
    first, second = (subprocess.run(command, capture_output=True, text=True) for _ in range(2))
    assert (first.returncode, first.stderr) == (0, "")
    assert json.loads(first.stdout)["folder"] == str(tmp_path / "out")
    assert (second.returncode, second.stdout) == (2, "")
    (line,) = second.stderr.splitlines()
    assert line.startswith(f"Error: {tmp_path / 'out'}: holds an SAE already")
