"""The main job on a small random model: what it writes, repeats, survives and loads as."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import SMALL_SAE, SMALL_SCENES
from patch_retriever import build_retriever
from patch_retriever.errors import UserError
from patch_retriever.patch.artefact import Patch
from patch_retriever.progress import silent
from patch_retriever.stages.readout import load_readout

STAGES = (
    "readout",
    "collect",
    "sae",
    "features",
    "score",
    "select",
    "export",
    "test",
    "evaluate",
    "report",
)


def small_build(out: Path, model: Path, **more):
    return build_retriever(
        out, model=str(model), scenes=SMALL_SCENES, sae=SMALL_SAE, folds=1, **more
    )


def patch_bytes(out: Path) -> tuple[bytes, bytes]:
    return (out / "patch/patch.safetensors").read_bytes(), (out / "patch/patch.json").read_bytes()


def test_out_holds_model_patch_report_card_and_golden_inputs(finished_build):
    for name in (
        "modules.json",
        "model.safetensors",
        "README.md",
        "patch/patch.json",
        "report/table.json",
        "report/table.md",
        "report/selection.json",
        "report/concepts.parquet",
        "report/report.html",
        "report/concepts.json",
        "golden/check.py",
        "patch-retriever.json",
    ):
        assert (finished_build / name).is_file(), name
    kinds = {m["type"] for m in json.loads((finished_build / "modules.json").read_text())}
    assert all(kind.startswith("sentence_transformers.") for kind in kinds)


def test_table_has_every_group_task_and_control(finished_build):
    table = json.loads((finished_build / "report/table.json").read_text())
    assert {row["needs"] for row in table["rows"]} == {"nothing", "unpaired items", "pairs"}
    methods = [row["method"] for row in table["rows"]]
    assert len(methods) == len(set(methods))
    for start in (
        "base, the paper's readout",
        "base, chosen readout",
        "centring, per side",
        "all-but-the-top",
        "ReAlign, per side",
        "text-dominant",
        "random subspace",
        "random concepts",
        "attribution subspace",
        "removed by attribution",
        "removed by discriminative attribution, raw",
        "removed by discriminative attribution, centred",
        "learned gains",
        "gains on principal components",
    ):
        assert any(m.startswith(start) for m in methods), start
    tasks = table["rows"][0]["tasks"]
    assert {"t->i full", "t->i short", "t->i web", "t->t", "t->it"} <= set(tasks)
    assert {"i->t", "i->i", "it->t", "it->i", "it->it"} <= set(tasks)


def test_what_is_exported_is_no_control_and_the_best_one_is_named_beside_it(finished_build):
    selection = json.loads((finished_build / "report/selection.json").read_text())
    allowed = [m for m in selection["methods"] if not m["control_of"]]
    best = max(allowed, key=lambda m: m["validation_score"])
    exported = next(m for m in allowed if m["id"] == selection["exported_id"])
    assert exported["method"] == selection["exported"]
    choice = selection["choice"]
    assert choice["best"] == best["id"]
    table = (finished_build / "report/table.txt").read_text()
    assert f"> {exported['method']}" in table and choice["reason"] in table
    assert "expected regret of the choice on validation" in table
    if choice["best_minus_base"]["low"] <= 0:
        assert exported["id"] == "base"
    for method in selection["methods"]:
        tried = [t["validation_score"] for t in method["tried"]]
        assert method["validation_score"] == max(tried)


def test_same_seed_gives_the_same_table_and_patch(finished_build, random_model, tmp_path):
    small_build(tmp_path / "again", random_model)
    again = tmp_path / "again"
    assert patch_bytes(again) == patch_bytes(finished_build)
    for name in (
        "table.json",
        "table.txt",
        "selection.json",
        "report.html",
        "concepts.parquet",
        "concepts.json",
    ):
        assert (again / "report" / name).read_bytes() == (
            finished_build / "report" / name
        ).read_bytes()


def test_second_run_does_only_what_is_missing(finished_build, random_model):
    lines: list[str] = []
    before = patch_bytes(finished_build)
    small_build(finished_build, random_model, say=lines.append)
    assert [line for line in lines if line in STAGES] == []
    assert sum(line.endswith("done before") for line in lines) == len(STAGES) + 1
    assert patch_bytes(finished_build) == before


def test_damaged_file_is_named_and_its_stage_built_again(random_model, tmp_path):
    out = tmp_path / "out"
    small_build(out, random_model)
    before = patch_bytes(out)
    shard = next((out / "run/collect").glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-100] + b"\xff" * 100)
    lines: list[str] = []
    small_build(out, random_model, say=lines.append)
    assert any(str(shard) in line and "damaged" in line for line in lines)
    assert "collect" in lines and "readout: done before" in lines
    assert patch_bytes(out) == before


def test_paper_preset_pins_the_papers_readout(random_model, tmp_path):
    small_build(tmp_path / "out", random_model, preset="paper")
    readout = load_readout(tmp_path / "out/run/readout")
    assert (readout.prompt.name, readout.pooling, readout.site) == (
        "paper",
        "mean",
        "last_hidden_state",
    )


def test_nothing_written_is_a_pickle(finished_build):
    for path in finished_build.rglob("*"):
        if not path.is_file():
            continue
        assert path.suffix not in (".pt", ".pth", ".pkl", ".bin", ".ckpt"), path
        assert path.read_bytes()[:1] != b"\x80", path
        assert not zipfile.is_zipfile(path), path


def run_python(code: str, *args: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


WITHOUT_US = """
import sys
for name in ("patch_retriever", "nnsight", "faiss"):
    sys.modules[name] = None  # as if it were not installed, to `import` and to `find_spec`
import numpy as np
from PIL import Image
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1])
picture = Image.new("RGB", (90, 60), (200, 40, 40))
mixed = ["a red circle", picture, {"image": picture, "text": "make it blue"}]
rows = [model.encode_query(mixed), model.encode_document(mixed), model.encode(mixed)]
rows.append(np.stack([model.encode(item) for item in mixed]))
rows.append(model.encode([{"text": "make it blue", "image": picture}] * 3))
np.save(sys.argv[2], np.stack(rows))
"""


def test_everything_in_the_folder_can_be_read_by_whom_a_plain_file_can(finished_build, tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    files = [path for path in finished_build.rglob("*") if path.is_file() and path.name != "lock"]
    assert {path.stat().st_mode for path in files} == {plain.stat().st_mode}


def test_export_loads_without_this_package_and_equals_the_live_retriever(finished_build, tmp_path):
    from PIL import Image

    from patch_retriever import PatchedRetriever

    run_python(WITHOUT_US, str(finished_build), str(tmp_path / "rows.npy"))
    query, document, plain, single, swapped = np.load(tmp_path / "rows.npy")
    live = PatchedRetriever.from_folder(finished_build)
    picture = Image.new("RGB", (90, 60), (200, 40, 40))
    mixed = ["a red circle", picture, {"image": picture, "text": "make it blue"}]
    np.testing.assert_allclose(query, live.encode_query(mixed), atol=1e-5)
    np.testing.assert_allclose(document, live.encode_document(mixed), atol=1e-5)
    np.testing.assert_allclose(plain, live.encode(mixed), atol=1e-5)
    np.testing.assert_allclose(single, plain, atol=1e-5)
    np.testing.assert_allclose(swapped[0], plain[2], atol=1e-5)  # the order of keys is nothing
    np.testing.assert_allclose(np.linalg.norm(plain, axis=1), 1, atol=1e-5)


@pytest.mark.usefixtures("golden_process")
def test_golden_check_fails_when_the_export_was_changed(finished_build, tmp_path):
    from safetensors.torch import load_file, save_file

    from patch_retriever.golden import check_golden

    out = shutil.copytree(finished_build, tmp_path / "out")
    assert check_golden(out) <= 1e-5
    weights = load_file(out / "model.safetensors")
    name = next(n for n in weights if n.endswith("norm.weight") and "language_model" in n)
    weights[name] += 0.5 * torch.rand_like(weights[name])
    save_file(weights, out / "model.safetensors")
    with pytest.raises(UserError, match="differs from the live one"):
        check_golden(out)


def test_a_build_in_bfloat16_agrees_with_its_export_as_far_as_that_goes(random_model, tmp_path):
    from sentence_transformers import SentenceTransformer

    out = tmp_path / "out"
    small_build(out, random_model, dtype="bfloat16")
    golden = json.loads((out / "golden" / "result.json").read_text())
    assert golden["max_abs_diff"] <= 0.02
    assert golden["max_abs_diff_by_batch"] <= 0.02
    assert SentenceTransformer(str(out)).dtype == torch.bfloat16


COMMAND = """
import json, sys
import torch
torch.set_num_threads(1)
from patch_retriever import build_retriever
build_retriever(sys.argv[1], model=sys.argv[2], **json.loads(sys.argv[3]))
"""


def start_build(out: Path, model: Path, **settings: object) -> subprocess.Popen[str]:
    settings = {"scenes": SMALL_SCENES, "sae": SMALL_SAE, "folds": 1, **settings}
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(out), str(model), json.dumps(settings)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def kill_in(stage: str, out: Path, model: Path, **settings: object) -> None:
    """Start a build and kill it as soon as it works on `stage`."""
    process = start_build(out, model, **settings)
    deadline = time.monotonic() + 240
    while not (out / "run" / stage).is_dir():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "modules.json").exists()  # half-published does not load


def test_killed_in_every_stage_it_resumes_to_the_same_bytes(finished_build, random_model, tmp_path):
    out = tmp_path / "out"
    for stage in STAGES:
        kill_in(stage, out, random_model)
    process = start_build(out, random_model)
    assert process.wait() == 0, process.stderr.read()
    assert patch_bytes(out) == patch_bytes(finished_build)
    assert (out / "report/table.json").read_bytes() == (
        finished_build / "report/table.json"
    ).read_bytes()


def test_two_builds_into_one_folder_the_second_leaves(finished_build, random_model):
    from patch_retriever.runs import Run

    with Run(finished_build / "run", silent):
        second = start_build(finished_build, random_model)
        _, error = second.communicate()
    assert second.returncode != 0
    assert "another build is writing here" in error


def test_patch_says_where_it_comes_from(finished_build):
    about = Patch.load(finished_build / "patch").about
    assert {"readout", "method", "needs", "setting", "concepts", "made_by"} <= set(about)


def test_own_photos_go_through_from_pairs_to_export(photo_folder, random_model, tmp_path):
    result = build_retriever(
        tmp_path / "out", model=str(random_model), pairs=str(photo_folder), sae=SMALL_SAE
    )
    assert set(result.report["queries"]) == {"t->i", "i->t"}
    assert (tmp_path / "out/modules.json").is_file()


def test_photos_in_one_file_survive_a_kill_and_give_what_the_photos_themselves_give(
    photo_folder, random_model, tmp_path_factory
):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [json.loads(line) for line in (photo_folder / "pairs.jsonl").read_text().splitlines()]
    images = [(photo_folder / row["image"]).read_bytes() for row in rows]
    table = pa.table({"image": images, "caption": [row["text"] for row in rows]})
    folder = tmp_path_factory.mktemp("stored")
    pq.write_table(table, folder / "photos.parquet", row_group_size=9)
    settings = {"pairs": str(folder / "photos.parquet"), "sae": SMALL_SAE, "folds": 1}
    kill_in("collect", folder / "out", random_model, **settings)
    build_retriever(folder / "out", model=str(random_model), **settings)
    settings["pairs"] = str(photo_folder)
    build_retriever(folder / "expected", model=str(random_model), **settings)
    assert patch_bytes(folder / "out") == patch_bytes(folder / "expected")
    tables = [(folder / out / "report/table.json").read_bytes() for out in ("out", "expected")]
    assert tables[0] == tables[1]


def test_python_example_of_the_readme_runs(photo_folder, tmp_path, monkeypatch):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (example,) = [
        code
        for code in re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
        if "build_retriever" in code
    ]
    (tmp_path / "work").mkdir()
    (tmp_path / "work/photos").symlink_to(photo_folder)
    monkeypatch.chdir(tmp_path / "work")
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})
    assert (tmp_path / "work/my-retriever/modules.json").is_file()
