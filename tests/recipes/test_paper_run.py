"""The paper's runs end to end on stand-ins: from folders as on the hub to the tables."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from paper_data import N, words, write_coco, write_mbeir, write_uniir

from families import missing
from paper import experiment
from paper.data import captions_of, read_coco, read_task, task_names
from paper.official import MODELS, Poolings
from paper.plan import shape_of
from paper.run import main
from paper.settings import SHOWN_TASKS, Settings
from paper.tables import PAPER, render
from patch_retriever.backbones.load import load_backbone
from patch_retriever.errors import UserError
from patch_retriever.sae.formats import save_sae
from patch_retriever.sae.model import SparseAutoencoder

TASKS = ("mbeir_webqa_task2", "mbeir_mscoco_task3", "mbeir_nights_task4", "mbeir_cirr_task7")


@pytest.fixture(scope="module", autouse=True)
def small_batches():
    """Of the SAE's training, for which a few thousand tokens are few."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("paper.concepts.BATCH", 256)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return SimpleNamespace(mbeir=write_mbeir(root / "m-beir"), coco=write_coco(root / "coco"))


def run(data, model, weights, out, *more, coco=True):
    coco_folder = ("--coco", data.coco) if coco else ()
    words_ = (model, "--weights", weights, "--mbeir", data.mbeir, *coco_folder, "-o", out)
    given = [str(word) for word in (*words_, "--dtype", "float32", "--batch-size", 4, *more)]
    return CliRunner().invoke(main, given, catch_exceptions=False)


def results(out, model):
    return {p.stem: json.loads(p.read_text()) for p in (out / model / "results").glob("*.json")}


@pytest.mark.parametrize("model", MODELS)
def test_a_model_runs_from_folders_to_tables(data, stand_in, tmp_path, model):
    if lacking := missing(model):
        pytest.skip(f"needs {', '.join(lacking)}")
    done = run(data, model, stand_in(model), tmp_path, "--sae-steps", 2)
    assert done.exit_code == 0, done.output
    found = results(tmp_path, model)
    assert set(found) == {*TASKS, "removal"}
    for name in TASKS:
        rows = found[name]["recalls"]
        expected = {"base", "centring", "ReAlign", "centring, frozen", "ReAlign, frozen"}
        if name in SHOWN_TASKS:
            expected |= {"last", "max", "min", "ZCA", "PCA", "PCA, common axes"}
        assert set(rows) == expected
        assert all(0 <= r1 <= r5 <= r10 <= 100 for r1, r5, r10 in rows.values())
        assert (found[name]["queries"], found[name]["candidates"]) == (N, 3 * N)
    assert found["removal"]["recalls"]["base"] == found["mbeir_mscoco_task3"]["recalls"]["base"]
    tables = (tmp_path / "tables.md").read_text()
    r5 = found["mbeir_cirr_task7"]["recalls"]["ReAlign"][1]
    (line,) = [
        line
        for line in tables.partition(f"### {PAPER['models'][model]}")[2].splitlines()[:25]
        if "| cirr |" in line
    ]
    assert f"| {r5:.2f} |" in line
    assert f"{PAPER['table3']['mbeir_cirr_task7'][model][1]:.2f}" in line


@pytest.fixture(scope="module")
def llava_run(data, stand_in, tmp_path_factory):
    """A whole run with LLaVA in the place of Qwen2-VL."""
    out = tmp_path_factory.mktemp("run")
    done = run(data, "qwen2-vl", stand_in("llava"), out, "--sae-steps", 2)
    assert done.exit_code == 0, done.output
    return out


def encoded_by(monkeypatch, most=None):
    """How many items go through the poolings, batch by batch; interrupted after `most`."""
    batches, whole = [], Poolings.forward

    def counted(self, features):
        if most is not None and sum(batches) > most:
            raise KeyboardInterrupt
        batches.append(len(features["attention_mask"]))
        return whole(self, features)

    monkeypatch.setattr(Poolings, "forward", counted)
    return batches


def test_a_stopped_run_goes_on_where_it_stood(data, stand_in, llava_run, tmp_path, monkeypatch):
    weights, more = stand_in("llava"), ("--sae-steps", 2)
    with monkeypatch.context() as patched:
        before = encoded_by(patched, most=200)
        assert run(data, "qwen2-vl", weights, tmp_path, *more).exit_code == 1
    first = set(results(tmp_path, "qwen2-vl"))
    assert first < {*TASKS, "removal"} and first
    after = encoded_by(monkeypatch)
    assert run(data, "qwen2-vl", weights, tmp_path, *more).exit_code == 0
    assert results(tmp_path, "qwen2-vl") == results(llava_run, "qwen2-vl")
    stored = [
        shard["rows"]
        for manifest in (llava_run / "qwen2-vl" / "embeddings").glob("*/embeddings.json")
        for shard in json.loads(manifest.read_text())["shards"]
    ]
    again = sum(before) + sum(after) - sum(stored)
    assert 0 <= again <= 3 * N, "no more than the side at which it was stopped"


def test_a_finished_run_does_nothing_again(data, stand_in, llava_run, monkeypatch):
    before, batches = results(llava_run, "qwen2-vl"), encoded_by(monkeypatch)
    done = run(data, "qwen2-vl", stand_in("llava"), llava_run, "--sae-steps", 2)
    assert done.exit_code == 0, done.output
    assert results(llava_run, "qwen2-vl") == before
    assert batches == []


def test_a_trial_has_few_queries_and_their_positives(data, stand_in, tmp_path):
    more = ("--limit", 3, "--task", "nights", "--task", "mscoco@paper4")
    done = run(data, "qwen2-vl", stand_in("llava"), tmp_path, *more, coco=False)
    assert done.exit_code == 0, done.output
    found = results(tmp_path, "qwen2-vl")
    assert set(found) == {"mbeir_nights_task4", "mbeir_mscoco_task3"}
    assert {r["queries"] for r in found.values()} == {3}
    assert "a trial of 3 queries a task, no result" in (tmp_path / "tables.md").read_text()
    whole = read_task(data.mbeir, "mbeir_nights_task4")
    short = read_task(data.mbeir, "mbeir_nights_task4", limit=2)
    judged = {c for q in short.query_ids for c in short.qrels[q]}
    assert judged < set(short.candidate_ids) < set(whole.candidate_ids)
    assert len(short.candidate_ids) == 2 + 20
    at = {c: i for i, c in enumerate(whole.candidate_ids)}
    for name, item in zip(short.candidate_ids, short.candidates, strict=True):
        assert item.content_hash() == whole.candidates[at[name]].content_hash()


def test_validation_queries_are_a_support_set(stand_in, tmp_path, monkeypatch):
    asked, whole = [], experiment.recalls

    def kept(task, sides, device):
        asked.append(sides[0][:])
        return whole(task, sides, device)

    monkeypatch.setattr(experiment, "recalls", kept)
    for name, numbers, alike in (("same", range(N), True), ("other", range(50, 50 + N), False)):
        asked.clear()
        data = SimpleNamespace(mbeir=write_uniir(tmp_path / name, numbers))
        out = tmp_path / f"out-{name}"
        done = run(data, "qwen2-vl", stand_in("llava"), out, coco=False)
        assert done.exit_code == 0, done.output
        assert "ReAlign, support" in results(out, "qwen2-vl")["mbeir_cirr_task7"]["recalls"]
        _, _, realign_nd, *_, support_nd = asked[:7]  # base, centring, ReAlign, ..., support
        difference = np.abs(realign_nd - support_nd).max()
        assert difference == 0 if alike else difference > 0.01


def test_a_plan_needs_no_weights(data, stand_in, tmp_path):
    weights = tmp_path / "no-weights"
    shutil.copytree(stand_in("llava"), weights, ignore=shutil.ignore_patterns("*.safetensors"))
    shape = shape_of(str(weights))
    model = load_backbone(str(stand_in("llava"))).model
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.width == 32
    out = tmp_path / "out"
    done = run(data, "qwen2-vl", weights, out, "--plan")
    assert done.exit_code == 0, done.output
    assert "disk:" in done.output and "memory:" in done.output and "PFLOP" in done.output
    assert not out.exists()


def test_the_disk_that_a_plan_states_is_enough(data, stand_in, llava_run):
    from paper.plan import needs, size_of, sizes_of_coco

    weights = str(stand_in("llava"))
    settings = Settings(
        MODELS["qwen2-vl"], weights, llava_run, data.mbeir, data.coco, TASKS, dtype="float32"
    )
    sizes = [size_of(read_task(data.mbeir, name), settings.model) for name in TASKS]
    sizes += sizes_of_coco(settings, 30)
    needed = needs(settings, shape_of(weights), sizes)
    vectors = sum(p.stat().st_size for p in (llava_run / "qwen2-vl").rglob("*vectors.npy"))
    assert vectors <= sum(size.bytes(32) for size in sizes) <= 1.5 * vectors
    used = sum(p.stat().st_size for p in llava_run.rglob("*.safetensors"))
    assert vectors + used <= needed.disk


def test_a_disk_that_is_too_small_is_refused_before_anything_is_loaded(
    data, stand_in, tmp_path, monkeypatch
):
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=1000))
    monkeypatch.setattr("paper.run.Experiment", None)
    done = run(data, "qwen2-vl", stand_in("llava"), tmp_path / "out")
    assert done.exit_code == 2
    (line,) = [line for line in done.output.splitlines() if line.startswith("Error")]
    assert "GiB are needed" in line and "--limit" in line


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--task", "oven_task6"), "no task oven_task6 in it; there are mbeir_webqa_task2, "),
        (("--task", "mscoco_task4"), "if 4 is the number in the paper's code, say mscoco@paper4"),
        (("--weights", "/no/such/model"), "/no/such/model: no such folder"),
    ],
)
def test_a_wrong_word_is_one_line(data, stand_in, tmp_path, more, said):
    done = run(data, "qwen2-vl", stand_in("llava"), tmp_path, *more)
    assert done.exit_code == 2
    (line,) = [line for line in done.output.splitlines() if line.startswith("Error")]
    assert said in line


def test_folders_without_data_are_refused(tmp_path):
    with pytest.raises(UserError, match="no task of M-BEIR in it"):
        task_names(tmp_path)
    with pytest.raises(UserError, match=r"no val-\*.parquet"):
        read_coco(tmp_path, set())


def test_coco_rows_that_share_a_caption_with_the_test_are_left_out(data):
    whole = read_coco(data.coco, set())
    assert len(whole) == 30
    assert whole[5].captions == (words(305), f"{words(305)} again")
    held_out = captions_of(read_task(data.mbeir, "mbeir_mscoco_task3"))
    assert len(held_out) == 3 * N
    kept = read_coco(data.coco, held_out)
    assert [row.captions for row in kept] == [row.captions for row in whole[4:]]


def test_a_row_of_coco_without_captions_is_named(data, tmp_path):
    path = tmp_path / "val-00000-of-00001.parquet"
    table = pq.read_table(next((data.coco / "data").glob("*.parquet")))
    answers = [[], *table["answer"].to_pylist()[1:]]
    at = table.schema.get_field_index("answer")
    pq.write_table(table.set_column(at, "answer", pa.array(answers, table["answer"].type)), path)
    with pytest.raises(UserError, match=r"val-00000-of-00001.parquet:0: a picture and captions"):
        read_coco(tmp_path, set())


def test_the_quoted_figures_add_up_and_disagree_only_where_it_is_said():
    marks = set(PAPER["marks"])
    for name in PAPER["models"]:
        for column in (0, 1):
            mean = sum(row[name][column] for row in PAPER["table3"].values()) / 16
            assert abs(mean - PAPER["table3_average"][name][column]) < 0.0051
    disagree = set()
    for task in SHOWN_TASKS:
        for name in PAPER["models"]:
            base, realign = PAPER["table3"][task][name]
            others = [(PAPER["table8"][task][name]["ReAlign"], realign, "ReAlign")]
            if name in PAPER["table5"][task]:
                others.append((PAPER["table5"][task][name]["mean"], base, "base"))
            if task == "mbeir_mscoco_task3":
                others.append((PAPER["table2"][name]["base"], base, "base"))
            for found, expected, row in others:
                if abs(found[1] - expected) > 0.011:
                    disagree.add(f"table3/{name}/{task}/{row}")
    assert disagree == {
        "table3/qwen2-vl/mbeir_nights_task4/base",
        "table3/qwen3-vl/mbeir_nights_task4/base",
        "table3/chameleon/mbeir_mscoco_task3/base",
        "table3/paligemma2/mbeir_cirr_task7/ReAlign",
    }
    assert disagree < marks
    assert set(PAPER["marks"].values()) == set(PAPER["notes"])
    rendered = render(None)
    assert all(rendered.count(f" [{mark}]") >= 1 for mark in PAPER["notes"])
    assert sum(rendered.count(f"[{mark}] |") for mark in PAPER["notes"]) >= len(marks)


def test_the_empty_tables_in_the_folder_are_those_that_are_rendered():
    folder = Path(__file__).parents[2] / "recipes" / "paper"
    assert (folder / "TABLES.md").read_text() == render(None)


@pytest.mark.parametrize("more", [("--limit", 3), ("--dtype", "bfloat16")])
def test_results_are_never_written_over_by_another_run(data, stand_in, llava_run, more):
    before = results(llava_run, "qwen2-vl")
    done = run(data, "qwen2-vl", stand_in("llava"), llava_run, *more)
    assert done.exit_code == 2
    assert f"measured with {more[0][2:]} " in done.output
    assert results(llava_run, "qwen2-vl") == before


def test_an_sae_of_another_width_is_refused_before_anything_is_encoded(
    data, stand_in, tmp_path, monkeypatch
):
    batches = encoded_by(monkeypatch)
    zero_c, rows_cd = torch.zeros(20), torch.eye(20, 16)
    save_sae(
        SparseAutoencoder(rows_cd.T, zero_c, rows_cd, torch.zeros(16), zero_c.clone()), tmp_path
    )
    done = run(data, "qwen2-vl", stand_in("llava"), tmp_path / "out", "--sae", tmp_path)
    assert done.exit_code == 2
    assert "an SAE of width 16; the model's is 32" in done.output
    assert batches == []


def test_the_authors_sae_takes_the_place_of_training(data, stand_in, tmp_path):
    c, path = 300, tmp_path / "sae_Qwen2-VL-7B-Instruct.pt"
    generator = torch.Generator().manual_seed(0)
    rows_cd = torch.randn(c, 32, generator=generator)
    state = {
        "encoder.final_block.0.weight": rows_cd,
        "encoder.final_block.0.bias": torch.zeros(c),
        "dictionary._weights": rows_cd,
        "dictionary.multiplier": torch.tensor(0.0),
    }
    torch.save({"model_state": state}, path)
    out, more = tmp_path / "out", ("--sae", path, "--task", "mscoco_task3")
    done = run(data, "qwen2-vl", stand_in("llava"), out, *more)
    assert done.exit_code == 0, done.output
    removal = results(out, "qwen2-vl")["removal"]
    assert (removal["concepts"], removal["of"]) == (3, c)
    assert set(removal["recalls"]) >= {"removal, rank 3", "random, rank 3"}
    assert not list((out / "qwen2-vl").glob("sae*"))
