"""`patch-retriever mteb`: results where mteb looks for them, stopped runs that go on, one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mteb
import pytest

from commands import error_line, invoke

LOCAL = Path(__file__).parents[1] / "local_tasks.py"
SAID = ("-o", "results", "--batch-size", 8)


@pytest.fixture
def run(finished_build, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*tasks: str, more: tuple[object, ...] = ()):
        named = ",".join(f"{LOCAL}:{task}" for task in tasks)
        return invoke("mteb", finished_build, "--tasks", named, *SAID, *more)

    return call


def results() -> list[Path]:
    found = Path("results/results").rglob("Shapes*.json")
    return sorted(found)


def test_results_are_where_mteb_finds_them(run, finished_build):
    result = run("ShapesT2I", "ShapesIT2I", more=("--name", "org/model", "--revision", "abc"))
    assert result.exit_code == 0, result.stderr
    title, *rows = result.stdout.splitlines()
    assert title.split() == ["org/model", "revision", "abc", "in", "results"]
    cache = mteb.ResultCache("results")
    assert cache.get_models() == [("org__model", "abc")]
    for row, task in zip(rows, ("ShapesT2I", "ShapesIT2I"), strict=True):
        name, metric, score = row.split()
        assert (name, metric) == (task, "ndcg_at_10")
        stored = cache.load_task_result(task, "org/model", "abc")
        assert float(score) == pytest.approx(100 * stored.get_score(), abs=0.006)
    loaded = cache.load_results(
        models=["org/model"], require_model_meta=True, validate_and_filter=False
    )
    (model,) = loaded.model_results
    assert (model.model_name, model.model_revision) == ("org/model", "abc")
    assert {r.task_name for r in model.task_results} == {"ShapesT2I", "ShapesIT2I"}
    meta_path = results()[0].parent / "model_meta.json"
    meta = mteb.models.ModelMeta.model_validate_json_resolved(meta_path.read_text())
    assert (meta.name, meta.revision) == ("org/model", "abc")
    to_submit = cache._get_unsubmitted_results(cache._normalize_models("org/model"))
    assert [sorted(paths) for paths in to_submit.values()] == [results()]
    assert set(meta.modalities) == {"text", "image"}
    assert str(finished_build) not in meta_path.read_text()


def test_what_is_there_is_not_run_again(run):
    first = json.loads(run("ShapesT2I", more=("--json",)).stdout)
    (path,) = results()
    before = path.stat().st_mtime_ns
    values = json.loads(path.read_text())
    again = run("ShapesT2I", "ShapesI2T", more=("--json",))
    assert again.stderr == ""
    assert json.loads(again.stdout)["tasks"][0] == first["tasks"][0]
    assert path.stat().st_mtime_ns == before
    assert len(results()) == 2
    assert values["scores"]["test"][0]["main_score"] == first["tasks"][0]["score"]
    (row,) = first["tasks"]
    assert row["scores"] == {"test": {"default": row["score"]}}
    assert (first["model"].split("/")[0], len(first["revision"])) == ("local", 64)


def test_a_damaged_result_is_named_and_run_again(run):
    whole = run("ShapesT2I").stdout
    (path,) = results()
    for damaged in ("", path.read_text()[:200], "[]", "{}"):
        path.write_text(damaged)
        again = run("ShapesT2I")
        assert f"{path}: damaged; its task is run again" in again.stderr
        assert again.stdout == whole
        assert json.loads(path.read_text())["task_name"] == "ShapesT2I"


def test_an_index_and_prompts_are_filed_apart(run):
    plain = run("ShapesT2I").stdout
    index = run("ShapesT2I", more=("--index", "IVF2,SQ4"))
    assert index.exit_code == 0, index.stderr
    told = run("ShapesT2I", more=("--prompts",))
    assert len({plain, index.stdout, told.stdout}) == 3
    assert len(results()) == 3
    assert run("ShapesT2I").stdout == plain


def test_a_task_that_fails_does_not_stop_the_others(run):
    result = run("NotThere", "ShapesT2I", more=("--json",))
    assert result.exit_code == 2
    failed, done = json.loads(result.stdout)["tasks"]
    assert failed["failed"].startswith("NotThere: its data set nobody/no-such-data-set cannot")
    assert done["score"] > 0
    assert result.stderr.startswith("Error: 1 of 2 tasks failed; NotThere: its data set nobody/")
    shown = run("NotThere", "ShapesT2I")
    assert [row.split()[-1] == "failed" for row in shown.stdout.splitlines()[1:]] == [True, False]
    assert f"failed: {failed['failed']}" in shown.stderr


def test_data_that_cannot_be_had_are_one_line(run):
    said = error_line(run("NotThere"))
    assert said.startswith("NotThere: its data set nobody/no-such-data-set cannot be loaded")
    assert "tasks failed" not in said


def test_of_several_tasks_in_one_the_part_that_cannot_be_had_is_named(finished_build, tmp_path):
    asked = ("--tasks", "CQADupstackRetrieval", "-o", tmp_path)
    said = error_line(invoke("mteb", finished_build, *asked))
    assert "its data set mteb/CQADupstackAndroidRetrieval cannot be loaded" in said


def test_an_index_that_cannot_be_made_is_one_line(run):
    assert "cannot be trained on 24 items" in error_line(
        run("ShapesT2I", more=("--index", "IVF99,Flat"))
    )
    assert "nonsense" in error_line(run("ShapesT2I", more=("--index", "nonsense")))


def test_a_model_without_pictures_cannot_run_a_task_of_pictures(run, monkeypatch):
    from patch_retriever.retrieval.encoder import Encoder

    def texts_alone(self: Encoder, *args: object, **kwargs: object) -> None:
        init(self, *args, **kwargs)  # type: ignore[arg-type]
        self.modalities = ("text",)

    init = Encoder.__init__
    monkeypatch.setattr(Encoder, "__init__", texts_alone)
    said = error_line(run("ShapesI2T"))
    assert said.startswith("ShapesI2T: Model local/") and "supports ['text']" in said


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "name the tasks: --tasks NAME, or --benchmark NAME"),
        (("--tasks", "CIRRIT2IRetrieva"), "near: CIRRIT2IRetrieval"),
        (("--benchmark", "mieb-lite"), "no benchmark 'mieb-lite' in mteb; near: MIEB(lite)"),
        (("--tasks", "STS12", "--name", "model"), "model: mteb files results under"),
    ],
)
def test_what_is_asked_wrongly_is_one_line(finished_build, args, words, tmp_path):
    assert words in error_line(invoke("mteb", finished_build, *args, "-o", tmp_path))


def test_an_unknown_model_is_named(tmp_path):
    said = error_line(invoke("mteb", "./nowhere", "--tasks", "STS12", "-o", tmp_path))
    assert said == "./nowhere: no such model folder"


def test_a_folder_that_is_a_file_is_named(finished_build, tmp_path):
    out = tmp_path / "file"
    out.write_text("")
    task = f"{LOCAL}:ShapesT2I"
    assert error_line(invoke("mteb", finished_build, "--tasks", task, "-o", out)).startswith(
        f"{out}: "
    )


def test_without_mteb_it_says_what_to_install(finished_build, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mteb", None)
    said = error_line(invoke("mteb", finished_build, "--tasks", "STS12", "-o", tmp_path))
    assert said == "mteb is not installed; pip install 'patch-retriever[mteb]'"


def test_a_benchmark_is_its_tasks():
    from patch_retriever.retrieval.mteb.run import named_tasks

    tasks = named_tasks(["CIRRIT2IRetrieval", "CIRRIT2IRetrieval"], ["MIEB(lite)"])
    names = [task.metadata.name for task in tasks]
    assert len(names) == len(set(names)) > 40
    assert {task.metadata.name for task in mteb.get_benchmark("MIEB(lite)").tasks} <= set(names)
