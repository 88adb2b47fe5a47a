"""Models side by side: the same model differs from itself by nothing, what is done is kept."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from patch_retriever.errors import UserError
from patch_retriever.files import value_hash
from patch_retriever.items import Item
from patch_retriever.pictures.picture import PictureFile
from patch_retriever.retrieval.comparison import bench
from patch_retriever.retrieval.comparison import models as compare
from patch_retriever.retrieval.comparison.models import build_settings, compare_models, short_names
from patch_retriever.retrieval.comparison.result import Settings
from patch_retriever.retrieval.tasks import RetrievalTask
from patch_retriever.scenes.tasks import scenes_collection

N = 12


def scenes(n: int, *names: str, split: str = "test", seed: int = 0) -> dict[str, RetrievalTask]:
    tasks = scenes_collection(split, n, seed).retrieval_tasks()
    return {task.name: task for task in tasks if task.name in names}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def tasks():
    return scenes(N, "t->i short", "i->i")


@pytest.fixture(scope="module")
def found(finished_build, tasks, cache, tmp_path_factory):
    copy = tmp_path_factory.mktemp("again") / "twin"
    copy.symlink_to(finished_build)
    names = [str(finished_build), str(copy), f"{finished_build}@base"]
    return compare_models(names, tasks, Settings(), cache, batch_size=16)


def test_a_model_differs_from_itself_by_nothing(found):
    same = found.rows[1]
    assert same.fingerprint == found.base.fingerprint
    for metric in found.metrics:
        together, by_task = found.against_base(same, metric)
        for against in (together, *by_task.values()):
            assert set(against.to_json().values()) <= {0, 1, N, 2 * N}
            assert (against.difference.mean, against.p) == (0, 1)
            assert (against.tally.won, against.tally.lost) == (0, 0)


def test_nothing_is_encoded_twice(found):
    first, same, _ = found.rows
    assert first.encoded["items"] > 0
    assert same.encoded == {"items": 0, "seconds": 0.0, "items_per_second": None}


def test_the_report_is_json_and_says_how_many_queries_there_were(found):
    report = found.to_json()
    assert json.loads(json.dumps(report)) == report | {
        "settings": {**report["settings"], "cutoffs": [1, 5, 10]}
    }
    assert {t: about["queries"] for t, about in report["tasks"].items()} == {
        "t->i short": N,
        "i->i": N,
    }
    assert [row["needs"] for row in report["rows"]][2] == "nothing"
    assert "against_base" not in report["rows"][0]["tasks"]["i->i"]
    assert set(report["rows"][1]["tasks"]["i->i"]["against_base"]) == set(found.metrics)


def test_metrics_are_what_plain_encode_and_numpy_give(found, finished_build, tasks):
    model, task = SentenceTransformer(str(finished_build)), tasks["i->i"]
    asked = model.encode_query([item.load() for item in task.queries])
    there = model.encode_document([item.load() for item in task.candidates])
    order_qn = np.argsort(-(asked @ there.T), axis=1)
    relevant = [{c for c, g in task.qrels[q].items() if g > 0} for q in task.query_ids]
    ranked = [[task.candidate_ids[c] for c in row] for row in order_qn]
    for k in (1, 5, 10):
        hit = [bool(set(row[:k]) & r) for row, r in zip(ranked, relevant, strict=True)]
        assert found.base.mean(f"hit_rate@{k}", "i->i") == pytest.approx(np.mean(hit))
    trial, scores_qn = found.base.trials["i->i"], asked @ there.T
    number = {c: i for i, c in enumerate(task.candidate_ids)}
    shown = [[number[c] for c in row] for row in trial.top]  # nearly equal scores may change places
    best_qk = -np.sort(-scores_qn, axis=1)
    np.testing.assert_allclose(np.take_along_axis(scores_qn, np.array(shown), 1), best_qk[:, :10],
                               atol=1e-5)  # fmt: skip
    for q, (first, answers) in enumerate(zip(trial.first_q, relevant, strict=True)):
        best = max(scores_qn[q, number[c]] for c in answers)
        assert best_qk[q, first - 1] == pytest.approx(best, abs=1e-5)


def test_an_exported_patch_and_its_base_are_told_apart(found):
    assert found.rows[2].name.endswith("@base")
    assert found.rows[2].fingerprint != found.base.fingerprint


def test_the_base_is_the_backbone_without_its_patch(found, finished_build, tasks):
    from patch_retriever.retriever import PatchedRetriever

    live, task = PatchedRetriever.from_folder(finished_build), tasks["i->i"]
    asked = live.encode_query([item.load() for item in task.queries], patch=False)
    there = live.encode_document([item.load() for item in task.candidates], patch=False)
    top = (asked @ there.T).argmax(1)
    assert [row[0] for row in found.rows[2].trials["i->i"].top] == [
        task.candidate_ids[c] for c in top
    ]


def stand_in(name: str, embed, encoded: list[str], **more):
    """An encoder whose vectors of an item are given by a function of the item and the role."""

    def stream(items, role, prompt=None, _batch_size=64):
        for position, item in enumerate(items):
            encoded.append(f"{role} {item.content_hash()} {prompt or ''}".strip())
            yield [position], np.asarray(embed(item, role), np.float32)[None]

    def finish(x_nd, _role):
        return x_nd / np.maximum(np.linalg.norm(x_nd, axis=1, keepdims=True), 1e-12)

    width = len(np.asarray(embed(Item("a"), "query")))
    made = {
        "name": name,
        "fingerprint": name,
        "width": width,
        "dimension": width,
        "store_key": lambda role, prompt=None: value_hash([name, role, prompt]),
        "prompt": lambda _role, prompt=None: prompt or "",
        "stream": stream,
        "workers": 1,
        "finish": finish,
    }
    return SimpleNamespace(**made | more)


def pixels(item: Item, _role="") -> np.ndarray:
    if item.picture is None:
        return np.zeros(432)
    picture = item.picture.open().resize((12, 12))
    return np.asarray(picture, dtype=np.float32).ravel() - 90


@pytest.fixture
def encoded():
    return []


@pytest.fixture
def stand_ins(monkeypatch, encoded):
    functions = {
        "pixels": pixels,
        "constant": lambda *_: np.ones(4),
        "opposite": lambda item, role: pixels(item) * (1 if role == "query" else -1),
        "shifted": lambda item, _: pixels(item) + 3000,
    }
    made = {name: stand_in(name, f, encoded) for name, f in functions.items()}
    monkeypatch.setattr(compare, "load_encoder", lambda name, *_, **__: made[name])
    return made


@pytest.fixture(scope="module")
def views():
    return scenes(30, "i->i")


@pytest.mark.usefixtures("stand_ins")
def test_models_are_compared_with_the_first(views, tmp_path):
    found = compare_models(["constant", "pixels"], views, Settings(), tmp_path)
    together, by_task = found.against_base(found.rows[1], "hit_rate@1")
    assert found.base.mean("hit_rate@1") < 0.1 < 0.3 < found.rows[1].mean("hit_rate@1")
    assert together.difference.low > 0
    assert together.p < 0.01
    assert by_task["i->i"].p_holm == together.p  # one task: nothing to correct
    back = compare_models(["pixels", "constant"], views, Settings(), tmp_path)
    reverse, _ = back.against_base(back.rows[1], "hit_rate@1")
    assert reverse.difference.high < 0
    assert (reverse.tally.won, reverse.tally.lost) == (together.tally.lost, together.tally.won)


@pytest.mark.usefixtures("stand_ins")
def test_queries_and_candidates_are_encoded_as_what_they_are(views, tmp_path):
    found = compare_models(["pixels", "opposite"], views, Settings(), tmp_path)
    good, bad = (row.mean("mrr") for row in found.rows)
    assert good > 0.3 > bad


@pytest.mark.usefixtures("stand_ins")
def test_p_values_are_corrected_over_the_tasks(tmp_path):
    tasks = scenes(20, "i->i", "it->i", "it->it")
    found = compare_models(["constant", "pixels"], tasks, Settings(), tmp_path)
    together, by_task = found.against_base(found.rows[1], "ndcg@10")
    order = sorted(by_task.values(), key=lambda a: a.p)
    assert order[0].p_holm == pytest.approx(min(1, 3 * order[0].p))
    assert together.p_holm is None
    means = [a.difference.mean for a in by_task.values()]
    assert together.difference.mean == pytest.approx(np.mean(means))


@pytest.mark.usefixtures("stand_ins")
def test_small_batches_change_nothing(views, tmp_path):
    one, other = (
        compare_models(["pixels"], views, Settings(), tmp_path / str(size), batch_size=size)
        for size in (1, 64)
    )
    assert one.base.trials["i->i"].top == other.base.trials["i->i"].top


def test_what_is_finished_is_neither_encoded_nor_searched_again(
    views, tmp_path, stand_ins, encoded, monkeypatch
):
    def again(settings=Settings(), tasks=views, names=("pixels",)):  # noqa: B008
        return compare_models(names, tasks, settings, tmp_path / "e", tmp_path / "q")

    first = again()
    assert len(encoded) == len(set(encoded)) > 0
    encoded.clear()
    searched = []
    real = bench.try_out
    monkeypatch.setattr(bench, "try_out", lambda *a: searched.append(a[0].name) or real(*a))
    same = again()
    assert (encoded, searched) == ([], [])
    assert same.base.trials["i->i"].figures == first.base.trials["i->i"].figures
    assert same.to_json() == first.to_json()
    for changed in (
        {"settings": Settings(cutoffs=(1, 2))},
        {"tasks": {"i->i": replace(views["i->i"], qrels=flipped(views["i->i"]))}},
    ):
        again(**changed)
        assert (encoded, len(searched)) == ([], 1)
        searched.clear()
    stand_ins["pixels"].fingerprint = "trained on"
    again()
    assert len(searched) == 1


def flipped(task: RetrievalTask) -> dict[str, dict[str, int]]:
    return {q: dict.fromkeys(task.candidate_ids[:1], 1) for q in task.query_ids}


@pytest.mark.usefixtures("stand_ins")
def test_a_damaged_trial_is_made_again(views, tmp_path):
    def again():
        return compare_models(["pixels"], views, Settings(), tmp_path / "e", tmp_path / "q")

    expected = again().base.trials["i->i"]
    (path,) = (tmp_path / "q").iterdir()
    path.write_bytes(path.read_bytes()[:-40])
    mended = again().base.trials["i->i"]
    assert mended.top == expected.top
    for metric, values in expected.metrics.items():
        np.testing.assert_array_equal(mended.metrics[metric], values)


@pytest.mark.usefixtures("stand_ins")
def test_what_was_done_before_a_stop_is_kept(tmp_path, encoded, monkeypatch):
    tasks = scenes(20, "i->i", "it->i")
    real = bench.try_out

    def stop(task, *rest):
        if task.name == "it->i":
            raise KeyboardInterrupt
        return real(task, *rest)

    def run():
        return compare_models(["pixels"], tasks, Settings(), tmp_path / "e", tmp_path / "q")

    monkeypatch.setattr(bench, "try_out", stop)
    with pytest.raises(KeyboardInterrupt):
        run()
    encoded.clear()
    monkeypatch.setattr(bench, "try_out", real)
    found = run()
    assert encoded == []
    assert set(found.base.trials) == {"i->i", "it->i"}
    assert len(list((tmp_path / "q").iterdir())) == 2


@pytest.mark.usefixtures("stand_ins")
def test_a_tasks_prompts_are_used_only_where_they_are_asked_for(views, tmp_path, encoded):
    tasks = {"i->i": replace(views["i->i"], prompts={"query": "Find it."})}
    compare_models(["pixels"], tasks, Settings(), tmp_path)
    assert not any("Find it." in line for line in encoded)
    encoded.clear()
    compare_models(["pixels"], tasks, Settings(prompts=True), tmp_path)
    assert {line.split()[0] for line in encoded if line.endswith("Find it.")} == {"query"}
    assert len(encoded) == 30  # the queries alone: candidates have no other prompt


@pytest.mark.usefixtures("stand_ins")
def test_pictures_that_cannot_be_read_are_left_out_if_asked(views, tmp_path):
    task = views["i->i"]
    gone = Item(picture=PictureFile(tmp_path / "gone.png"))
    bad = replace(
        task,
        queries=(gone, *task.queries[1:]),
        candidates=(*task.candidates[:-1], gone),
        pools={task.query_ids[1]: [task.candidate_ids[-1], *task.candidate_ids[:5]]},
    )
    with pytest.raises(UserError, match=r"gone\.png: no such image file"):
        compare_models(["pixels"], {"i->i": bad}, Settings(), tmp_path / "e")
    found = compare_models(["pixels"], {"i->i": bad}, Settings(skip_bad=True), tmp_path / "e")
    less = found.tasks["i->i"]
    assert tuple(less.query_ids) == task.query_ids[1:]
    assert tuple(less.candidate_ids) == task.candidate_ids[:-1]
    assert less.queries[0] == task.queries[1]
    assert len(less.skipped) == 2
    assert len(found.base.trials["i->i"].first_q) == len(task.query_ids) - 1
    assert set(found.base.trials["i->i"].top[0]) == set(task.candidate_ids[:5])


@pytest.mark.usefixtures("stand_ins")
def test_an_index_is_measured_against_the_exact_search(tmp_path):
    # no two pictures alike: a processor's rounding decides no rank
    views = scenes(30, "i->i", split="calibration", seed=1)
    exact = compare_models(["pixels"], views, Settings(), tmp_path).base.trials["i->i"]
    flat = compare_models(["pixels"], views, Settings(index="flat"), tmp_path).base.trials["i->i"]
    assert flat.top == exact.top
    assert flat.figures["index_recall"] == 1
    assert flat.figures["index_bytes"] >= exact.figures["index_bytes"] == 90 * 432 * 4
    rough = compare_models(["pixels"], views, Settings(index="PQ6x4"), tmp_path)
    figures = rough.base.trials["i->i"].figures
    assert 0 < figures["index_recall"] < 1
    assert figures["index_bytes"] < exact.figures["index_bytes"]


@pytest.mark.usefixtures("stand_ins")
def test_baselines_stand_beside_the_first_model(tmp_path):
    tasks, known = scenes(20, "i->i"), scenes(20, "i->i", split="calibration")
    settings = Settings(baselines=True)
    names = ["shifted", "pixels"]
    found = compare_models(names, tasks, settings, tmp_path, calibration=list(known.values()))
    assert [row.name for row in found.rows] == [
        "shifted",
        "shifted + centring, calibrated",
        "shifted + ReAlign 0.1, calibrated",
        "shifted + centring, transductive",
        "shifted + ReAlign 0.1, transductive",
        "pixels",
    ]
    assert [row.plain for row in found.rows] == [True, *[False] * 4, True]
    assert "transductive, as the paper's code does" in found.rows[3].needs
    anisotropy = [row.trials["i->i"].figures["geometry"]["anisotropy"] for row in found.rows[:5]]
    assert anisotropy[0] > 0.9
    assert max(anisotropy[1:]) < 0.1
    without = compare_models(names, tasks, settings, tmp_path)
    assert [row.name for row in without.rows[1:3]] == [row.name for row in found.rows[3:5]]


@pytest.mark.usefixtures("stand_ins")
def test_calibration_is_never_on_items_of_the_test(tmp_path):
    tasks = scenes(20, "i->i")
    with pytest.raises(UserError, match="every calibration item is one of the test"):
        compare_models(
            ["pixels"], tasks, Settings(baselines=True), tmp_path, calibration=list(tasks.values())
        )


@pytest.mark.usefixtures("stand_ins")
def test_say_names_every_model(views, tmp_path):
    said = []
    compare_models(["pixels", "constant"], views, Settings(), tmp_path, say=said.append)
    assert [line.partition(":")[0] for line in said] == ["pixels", "constant"]


def test_models_are_checked_before_the_first_runs(finished_build, views, tmp_path):
    with pytest.raises(UserError, match=r"^\./nowhere: no such model folder"):
        compare_models([str(finished_build), "./nowhere@base"], views, Settings(), tmp_path / "e")
    assert not (tmp_path / "e").exists()


def test_folders_are_called_by_their_last_name_where_that_is_enough():
    assert short_names(["/a/demo", "/a/demo@base", "org/model"]) == {
        "/a/demo": "demo",
        "/a/demo@base": "demo@base",
        "org/model": "org/model",
    }
    assert short_names(["/a/demo", "/b/demo"]) == {"/a/demo": "/a/demo", "/b/demo": "/b/demo"}


def test_the_settings_of_a_build_are_known(finished_build, tmp_path):
    assert build_settings([str(tmp_path), f"{finished_build}@base"])["seed"] == 0
    (tmp_path / "patch-retriever.json").write_text('{"seed": 7}')
    assert build_settings([str(tmp_path), str(finished_build)]) == {"seed": 7}
    assert build_settings(["org/model"]) == {}
