"""`analyze`: what it writes, what it does again, and everything a user gets wrong."""

from __future__ import annotations

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from commands import error_line, invoke
from patch_retriever import build_retriever
from patch_retriever.analysis.analyze import OF_CONCEPTS, OF_READOUTS, analyze_build
from patch_retriever.analysis.catalogue import CATALOGUE
from patch_retriever.errors import UserError
from patch_retriever.sae.formats import save_sae
from patch_retriever.sae.model import SparseAutoencoder
from synthetic import directions

FIGURES = ("fig2", "fig3", "fig4", "fig5", "fig6", "removal-curve", "pairs-curve")
QUICK = "fig2,fig3,table1"


@pytest.fixture(scope="module")
def analysed(finished_build, tmp_path_factory):
    """Everything, on the small build."""
    out = tmp_path_factory.mktemp("analysis") / "out"
    return out, analyze_build(finished_build, out)


@pytest.fixture
def copy(finished_build, tmp_path):
    return shutil.copytree(finished_build, tmp_path / "copy")


def rows(out, name):
    with (out / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def make_sae(d=32, c=96, threshold=0.5):
    rows_cd = directions(c, d)
    return SparseAutoencoder(
        rows_cd.T.contiguous(), torch.zeros(c), rows_cd, torch.zeros(d), torch.full((c,), threshold)
    )


# what it writes


def test_every_name_has_a_maker_and_a_place_in_the_help():
    assert set(CATALOGUE) == set(OF_CONCEPTS) | set(OF_READOUTS)
    assert not set(OF_CONCEPTS) & set(OF_READOUTS)
    said = "".join(invoke("analyze", "--help").stdout.split())
    assert ",".join(CATALOGUE) in said


def test_everything_is_written_and_shown(analysed):
    out, results = analysed
    readme = (out / "README.md").read_text()
    assert list(results) == list(CATALOGUE)
    for name in CATALOGUE:
        assert (out / f"{name}.csv").is_file(), name
        assert f"## {name}: " in readme
        assert results[name]["summary"], name
    for name in FIGURES:
        assert "<svg" in (out / f"{name}.svg").read_text()
    for file in re.findall(r"\]\(([^)]+)\)", readme):
        assert (out / file).is_file(), file
    assert list(out.rglob("*.partial")) == list(out.rglob("*.npy")) == []


def test_every_row_says_its_split(analysed):
    out, _ = analysed
    for name in CATALOGUE:
        splits = {row["split"] for row in rows(out, name)}
        assert splits == ({"calibration"} if name in ("fig2", "fig3", "table1") else {"test"})


def test_recalls_are_of_every_task_and_the_average(analysed):
    out, _ = analysed
    for name in ("table2", "fig4", "fig5", "fig6", "table5", "table8", "pairs-curve"):
        found = rows(out, name)
        assert len({row["task"] for row in found}) == 11, name
        for row in found:
            assert 0 <= float(row["R@1"]) <= float(row["R@5"]) <= float(row["R@10"]) <= 1
            low, mean, high = (
                float(row[f"score_minus_base{end}"]) for end in ("_low", "", "_high")
            )
            assert low - 1e-6 <= mean <= high + 1e-6


def scores(out, name, **labels):
    (row,) = (
        row
        for row in rows(out, name)
        if row["task"] == "average" and all(row[k] == v for k, v in labels.items())
    )
    return {k: row[k] for k in ("R@1", "R@5", "R@10")}


def test_figures_agree_where_they_show_the_same(analysed, finished_build):
    out, _ = analysed
    base = scores(out, "table2", method="no patch")
    assert base == scores(out, "table8", method="no patch")
    assert base == scores(out, "removal-curve", selection="none")
    assert base == scores(out, "pairs-curve", method="no patch")
    zca = scores(out, "table8", method="ZCA whitening, per modality")
    assert zca == scores(out, "fig6", statistics="per modality", beta="0")
    centred = scores(out, "table2", method="centring, per side, task by task")
    assert centred == scores(out, "fig6", statistics="per side, task by task", beta="1")
    mean = {"prompt": "paper", "pooling": "mean", "then": "nothing"}
    paper = scores(out, "table5", **mean)
    assert paper == scores(out, "fig5", **mean, site="last_hidden_state")
    assert paper == scores(out, "fig4", prompt="paper", mean_over="all tokens")
    table = json.loads((finished_build / "report/table.json").read_text())
    rows_by_name = {row["method"]: row for row in table["rows"]}
    for name, found in (("base, the paper's readout", paper), ("base, chosen readout", base)):
        tasks = rows_by_name[name]["tasks"].values()
        for k in ("R@1", "R@5", "R@10"):
            expected = sum(task[k] for task in tasks) / len(tasks)
            assert float(found[k]) == pytest.approx(expected, abs=0.003), (name, k)


def test_differences_to_itself_are_zero(analysed):
    out, _ = analysed
    for row in rows(out, "table2"):
        if row["method"] == "no patch":
            assert float(row["score_minus_base"]) == float(row["score_minus_base_high"]) == 0


# again


def test_a_second_run_does_nothing_again(analysed, finished_build):
    out, first = analysed
    before = {p: p.stat().st_mtime_ns for p in (out / "run").rglob("*") if p.is_file()}
    lines = []
    assert analyze_build(finished_build, out, say=lines.append) == first
    assert all(line.endswith("done before") for line in lines), lines
    after = {p: p.stat().st_mtime_ns for p in (out / "run").rglob("*") if p.is_file()}
    assert {p.name for p in before if before[p] != after[p]} <= {"lock"}


def test_one_more_name_is_added_to_the_readme(finished_build, tmp_path):
    analyze_build(finished_build, tmp_path / "out", ["fig3"])
    lines = []
    found = analyze_build(finished_build, tmp_path / "out", ["table1"], say=lines.append)
    assert list(found) == ["table1"]
    assert lines == ["table1"]
    readme = (tmp_path / "out" / "README.md").read_text()
    assert readme.index("## fig3") < readme.index("## table1")


def test_damage_is_named_and_done_again(finished_build, tmp_path):
    out = tmp_path / "out"
    analyze_build(finished_build, out, ["fig3"])
    good = (out / "fig3.csv").read_bytes()
    (out / "run/fig3/fig3.csv").write_text("concepts\n")
    lines = []
    analyze_build(finished_build, out, ["fig3"], say=lines.append)
    assert "damaged" in lines[0] and lines[1] == "fig3"
    assert (out / "fig3.csv").read_bytes() == good


def test_a_build_that_has_changed_is_analysed_anew(copy, tmp_path):
    out = tmp_path / "out"
    analyze_build(copy, out, ["fig3", "table1"])
    done = copy / "run/score/done.json"
    done.write_text(json.dumps(json.loads(done.read_text()) | {"key": "another"}))
    lines = []
    analyze_build(copy, out, ["fig3"], say=lines.append)
    assert lines == ["fig3"]
    assert "## table1" not in (out / "README.md").read_text()  # it is of the build before


def test_a_folder_holds_the_analysis_of_one_build_and_sae(finished_build, copy, tmp_path):
    out = tmp_path / "out"
    analyze_build(finished_build, out, ["fig3"])
    files = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    for options in ((copy,), (finished_build, "--sae", finished_build / "run" / "sae")):
        line = fails(*options, "-o", out, "--only", "fig3")
        assert line.startswith(f"{out}: holds the analysis of another build or SAE")
    assert {path: path.read_bytes() for path in out.iterdir() if path.is_file()} == files


def test_a_damaged_result_that_is_not_asked_for_does_not_stop_others(finished_build, tmp_path):
    out = tmp_path / "out"
    analyze_build(finished_build, out, ["fig3", "table1"])
    (out / "run" / "table1" / "result.json").write_text("{")
    analyze_build(finished_build, out, ["fig3"])
    assert "## table1" not in (out / "README.md").read_text()


def test_a_killed_run_goes_on(finished_build, analysed, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "patch_retriever", "analyze", finished_build, "-o", out,
               "--only", "fig3,fig4"]  # fmt: skip
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "prompt-paper" in line:
            break
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert not (out / "README.md").exists()
    lines = []
    analyze_build(finished_build, out, ["fig3", "fig4"], say=lines.append)
    assert lines[0] == "fig3: done before"
    assert "fig4" in lines
    whole, _ = analysed
    assert (out / "fig4.csv").read_bytes() == (whole / "fig4.csv").read_bytes()


# from the command line


def test_the_command_says_what_it_wrote(finished_build, tmp_path):
    result = invoke("analyze", finished_build, "-o", tmp_path / "out", "--only", QUICK)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        "fig2: fig2.csv, fig2.svg",
        "fig3: fig3.csv, fig3.svg",
        "table1: table1.csv",
        "",
        f"{tmp_path / 'out' / 'README.md'} shows them all",
    ]
    assert "fig3" in result.stderr


def test_json_holds_the_summaries(finished_build, tmp_path):
    result = invoke("analyze", finished_build, "-o", tmp_path / "o", "--only", QUICK, "--json")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["folder"] == str(tmp_path / "o")
    assert list(values["results"]) == QUICK.split(",")
    assert values["results"]["fig3"]["summary"][-1]["share of energy"] == "99%"
    assert result.stderr == ""


def test_another_sae_is_scored_and_analysed(finished_build, tmp_path):
    save_sae(make_sae(threshold=1e-4), tmp_path / "sae")
    out = tmp_path / "out"
    result = invoke("analyze", finished_build, "-o", out, "--only", "fig3,table2",
                    "--sae", tmp_path / "sae", "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "of 96 concepts fire" in json.loads(result.stdout)["results"]["fig3"]["note"]
    assert rows(out, "fig3")[-1]["concepts"] == "96"


def test_pairs_of_a_user_are_analysed_too(random_model, photo_folder, tmp_path):
    build = tmp_path / "build"
    sae = {"expansion": 4, "k": 8, "steps": 20, "batch_size": 128}
    build_retriever(build, model=str(random_model), pairs=str(photo_folder), sae=sae)
    found = analyze_build(build, tmp_path / "out", ["table1", "table2", "pairs-curve"])
    assert {row["task"] for row in rows(tmp_path / "out", "table2")} == {"t->i", "i->t", "average"}
    curve = found["pairs-curve"]
    assert "one caption style only" in curve["note"]
    assert "pairs-curve-others.svg" not in curve["files"]


# what a user gets wrong


def fails(*args):
    return error_line(invoke("analyze", *args))


def test_an_unknown_name_is_told_the_known_ones(finished_build, tmp_path):
    line = fails(finished_build, "-o", tmp_path / "out", "--only", "fig3,fig99")
    assert line == f"--only: no 'fig99' here; there are {', '.join(CATALOGUE)}"
    assert "names nothing" in fails(finished_build, "-o", tmp_path / "out", "--only", " , ")
    assert not (tmp_path / "out").exists()


def test_what_is_no_build_is_named(tmp_path):
    out = tmp_path / "out"
    assert fails(tmp_path / "nowhere", "-o", out).startswith(f"{tmp_path / 'nowhere'}: no such")
    assert "not made by patch-retriever" in fails(tmp_path, "-o", out)
    assert not out.exists()


def test_a_build_that_has_not_finished_is_named(copy, tmp_path):
    (copy / "modules.json").unlink()
    line = fails(copy, "-o", tmp_path / "out")
    assert line == f"{copy}: its build has not finished; run the same build again"


@pytest.mark.parametrize("stage", ["features", "score"])
def test_a_missing_or_damaged_stage_is_named(copy, tmp_path, stage):
    file = next(p for p in (copy / "run" / stage).iterdir() if p.name != "done.json")
    file.write_bytes(file.read_bytes()[:-8] + b"damaged!")
    assert fails(copy, "-o", tmp_path / "out").startswith(f"{file}: damaged or missing")
    (copy / "run" / stage / "done.json").unlink()
    assert f"{copy / 'run' / stage}: not there" in fails(copy, "-o", tmp_path / "out")


def test_a_run_of_another_backbone_is_named(copy, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = copy / "model.safetensors"
    tensors = load_file(weights)
    name = next(iter(tensors))
    tensors[name] = tensors[name] + 1
    weights.unlink()  # a link to the build's own
    save_file(tensors, weights, {"format": "pt"})
    line = fails(copy, "-o", tmp_path / "out", "--only", "table5")
    assert line.startswith(f"{weights}: not the backbone that this run was made with")


def test_an_sae_of_another_width_is_named(finished_build, tmp_path):
    save_sae(make_sae(d=16), tmp_path / "sae")
    line = fails(finished_build, "-o", tmp_path / "out", "--sae", tmp_path / "sae", "--json")
    assert "activations of 16 dimensions; the backbone's have 32" in line


def test_an_sae_that_never_fires_is_named(finished_build, tmp_path):
    save_sae(make_sae(threshold=1e6), tmp_path / "sae")
    line = fails(finished_build, "-o", tmp_path / "out", "--sae", tmp_path / "sae", "--json")
    assert "none of its concepts fires" in line


def test_a_folder_of_something_else_is_left_alone(finished_build, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    assert "not empty and not made by `analyze`" in fails(finished_build, "-o", tmp_path)
    assert "not empty" in fails(finished_build, "-o", finished_build)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_two_at_a_time_are_refused(finished_build, tmp_path):
    from patch_retriever.progress import silent
    from patch_retriever.runs import Run

    with Run(tmp_path / "out" / "run", silent), pytest.raises(UserError, match="writing here"):
        analyze_build(finished_build, tmp_path / "out", ["fig3"])
