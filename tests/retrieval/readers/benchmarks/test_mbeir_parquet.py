"""MRBench's Parquet release of M-BEIR: rows as `datasets` reads them, every fault named."""

from __future__ import annotations

import shutil
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from releases import colour, item, only_task, png, refusal, write_items, write_qrels

from patch_retriever.retrieval.readers import read_tasks
from patch_retriever.retrieval.readers.options import ReadOptions

TEST = "test-00000-of-00001.parquet"
QUERIES = [
    item("9:1", "text", "a man on a motorcycle", None),
    item("9:2", "text", "two\tdogs\nat play", None),
    item("9:3", "text", "a red bag", None),
]
CORPUS = [item(f"9:{10 + n}", "image", None, n) for n in range(8)]
JUDGED = [("9:1", "9:11", 1), ("9:2", "9:10", 1), ("9:2", "9:17", 1), ("9:3", "9:12", 1)]


def write_task(folder: Path, queries=QUERIES, corpus=CORPUS, judged=JUDGED) -> Path:
    write_items(folder / "query" / TEST, queries)
    half = (len(corpus) + 1) // 2
    write_items(folder / "corpus" / "corpus-00000-of-00002.parquet", corpus[:half])
    write_items(folder / "corpus" / "corpus-00001-of-00002.parquet", corpus[half:])
    write_qrels(folder / "qrels" / TEST, judged)
    return folder


@pytest.fixture
def coco(tmp_path):
    return write_task(tmp_path / "mbeir_mscoco_task0")


def one(location: object, **options):
    return only_task(f"mbeir:{location}", **options)


def refused(location: object, **options) -> str:
    return refusal(f"mbeir:{location}", **options)


def shown(items) -> list[tuple[str | None, int | None]]:
    return [(i.text, None if i.picture is None else colour(i.picture)) for i in items]


def test_a_task_says_what_its_files_say(coco):
    task = one(coco)
    assert (task.name, task.split, task.direction) == ("mbeir_mscoco_task0", "test", "t->i")
    assert list(task.query_ids) == ["9:1", "9:2", "9:3"]
    assert shown(task.queries) == [(q["text"], None) for q in QUERIES]
    assert list(task.candidate_ids) == [c["id"] for c in CORPUS]
    assert shown(task.candidates) == [(None, n) for n in range(8)]
    assert task.qrels == {"9:1": {"9:11": 1}, "9:2": {"9:10": 1, "9:17": 1}, "9:3": {"9:12": 1}}
    assert (task.prompts, task.pools, task.excluded, task.skipped) == ({}, {}, {}, ())


def test_rows_are_those_that_datasets_reads(coco, tmp_path):
    def load(part: str):
        files = sorted(map(str, (coco / part).glob("*.parquet")))
        cache = str(tmp_path / "cache")
        return datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=cache)

    task = one(coco)
    queries, corpus, qrels = load("query"), load("corpus"), load("qrels")
    assert [(i, q.text) for i, q in zip(task.query_ids, task.queries, strict=True)] == [
        (row["id"], row["text"]) for row in queries
    ]
    for name, candidate, row in zip(task.candidate_ids, task.candidates, corpus, strict=True):
        assert name == row["id"]
        assert candidate.picture.open().tobytes() == row["image"].convert("RGB").tobytes()
    assert {(q, d, grade) for q, own in task.qrels.items() for d, grade in own.items()} == {
        (row["query-id"], row["corpus-id"], row["score"]) for row in qrels
    }


def test_a_task_is_as_mtebs_own_loader_has_it(coco, tmp_path, monkeypatch):
    loaders = pytest.importorskip("mteb.abstasks.retrieval_dataset_loaders")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    card = ["---", "configs:"]
    for part, split in (("query", "test"), ("corpus", "corpus"), ("qrels", "test")):
        card += [f"- config_name: {part}", "  data_files:", f"  - split: {split}"]
        card += [f"    path: {part}/{split}-*"]
    (coco / "README.md").write_text("\n".join([*card, "---", ""]))
    loaded = loaders.RetrievalDatasetLoader(str(coco), revision=None).load()
    task = one(coco)
    assert list(task.query_ids) == loaded["queries"]["id"][:]
    assert [q.text for q in task.queries] == loaded["queries"]["text"][:]
    assert list(task.candidate_ids) == loaded["corpus"]["id"][:]
    for candidate, image in zip(task.candidates, loaded["corpus"]["image"], strict=True):
        assert candidate.picture.open().tobytes() == image.convert("RGB").tobytes()
    assert task.qrels == loaded["relevant_docs"]


def test_flat_files_named_by_part_are_the_test_split(coco, tmp_path):
    flat = tmp_path / "flat" / "mbeir_mscoco_task0"
    flat.mkdir(parents=True)
    for part in ("query", "corpus", "qrels"):
        for number, path in enumerate(sorted((coco / part).iterdir())):
            shutil.copy(path, flat / f"{part}-0000{number}-of-00002.parquet")
    task, same = one(flat), one(coco)
    assert (task.query_ids, task.candidate_ids, task.qrels) == (
        same.query_ids,
        same.candidate_ids,
        same.qrels,
    )
    assert "no split val" in refused(flat, split="val")


@pytest.mark.parametrize("modality", ["image,text", "text,image"])
def test_both_parts_of_composed_queries(tmp_path, modality):
    queries = [item("8:0", modality, "in blue", 7), item("8:1", modality, None, 3)]
    corpus = [item("8:5", "image", "a text that the modality leaves out", 1)]
    task = one(
        write_task(
            tmp_path / "mbeir_cirr_task7", queries, corpus, [("8:0", "8:5", 1), ("8:1", "8:5", 1)]
        )
    )
    assert task.direction == "it->i"
    assert shown(task.queries) == [("in blue", 7), (None, 3)]
    assert shown(task.candidates) == [(None, 1)]


def test_pictures_stay_in_their_files(coco, monkeypatch):
    read: list[str] = []
    batches = pq.ParquetFile.iter_batches

    def iter_batches(self, *args, columns, **kwargs):
        read.extend(columns)
        return batches(self, *args, columns=columns, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    task = one(coco)
    candidate = task.candidates[5]
    assert "modality" in read
    assert not any("image" in column for column in read)
    assert candidate.picture.read() == png(5)
    assert read[-1] == "image.bytes"
    path = coco / "corpus" / "corpus-00001-of-00002.parquet"
    assert candidate.picture.name == f"{path}#image/1"


@pytest.mark.usefixtures("coco")
def test_several_tasks_in_a_folder(tmp_path):
    text = [item("9:3", "image", None, 1)]
    write_task(
        tmp_path / "mbeir_mscoco_task3", text, [item("9:4", "text", "a", None)], [("9:3", "9:4", 1)]
    )
    write_task(tmp_path / "a_custom_task", text, CORPUS, [("9:3", "9:10", 1)])
    (tmp_path / "notes").mkdir()
    tasks = read_tasks(f"mbeir:{tmp_path}", ReadOptions())
    assert [(t.name, t.direction) for t in tasks] == [
        ("mbeir_mscoco_task0", "t->i"),
        ("mbeir_mscoco_task3", "i->t"),
        ("a_custom_task", "i->i"),
    ]
    for name in ("#mscoco_task3", "/mscoco_task3", "/mscoco@paper4", "#mbeir_mscoco_task3"):
        assert one(f"{tmp_path}{name}").name == "mbeir_mscoco_task3"
    assert one(f"{tmp_path}#a_custom_task").direction == "i->i"
    assert "mbeir_cirr_task7" in refused(f"{tmp_path}/cirr")
    assert "mscoco@paper4" in refused(f"{tmp_path}/mscoco_task4")


def test_data_of_another_direction_than_the_name_is_refused(coco, tmp_path):
    coco.rename(tmp_path / "mbeir_mscoco_task3")
    said = refused(tmp_path / "mbeir_mscoco_task3")
    assert "should be i->t, but its data is t->i" in said
    assert "mbeir_mscoco_task0" in said


def test_a_folder_with_a_number_of_the_papers_is_refused(coco, tmp_path):
    coco.rename(tmp_path / "mbeir_mscoco_task1")
    assert "mscoco@paper1" in refused(tmp_path / "mbeir_mscoco_task1")


def test_hub_ids(coco, tmp_path, monkeypatch):
    asked = []
    snapshot = tmp_path / "datasets--mteb--mbeir_mscoco_task0" / "snapshots" / "0a1b2c"
    snapshot.parent.mkdir(parents=True)
    coco.rename(snapshot)

    def snapshot_download(repository, *, repo_type, allow_patterns):
        asked.append((repository, repo_type, allow_patterns))
        return str(snapshot)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    for location in ("mteb/mbeir_mscoco_task0", "mteb/mscoco_task0", "mteb/mscoco@paper1"):
        task = one(location)
        assert (task.name, task.direction) == ("mbeir_mscoco_task0", "t->i")
    assert asked == [("mteb/mbeir_mscoco_task0", "dataset", ["*.parquet"])] * 3
    assert "mscoco@paper4" in refused("mteb/mbeir_mscoco_task4")
    assert "clone it" in refused("TIGER-Lab/M-BEIR")
    assert len(asked) == 3


def test_a_hub_that_does_not_answer_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # HF_HUB_OFFLINE is set for all tests
    assert "mteb/mbeir_cirr_task7" in refused("mteb/mbeir_cirr_task7")


def test_the_limit_is_of_queries_alone(coco):
    task = one(coco, limit=2)
    assert list(task.query_ids) == ["9:1", "9:2"]
    assert [q.text for q in task.queries] == ["a man on a motorcycle", "two\tdogs\nat play"]
    assert len(task.candidates) == len(CORPUS)
    assert list(task.qrels) == ["9:1", "9:2"]


CORPUS_FILE = "corpus/corpus-00000-of-00002.parquet"


@pytest.mark.parametrize(
    ("part", "row", "changed", "where", "what"),
    [
        ("query", 1, {"text": " \n"}, f"query/{TEST}:1", "9:2 has no text"),
        ("query", 1, {"text": None}, f"query/{TEST}:1", "9:2 has no text"),
        ("query", 2, {"id": None}, f"query/{TEST}:2", "no id"),
        ("query", 2, {"id": "9:1"}, f"query/{TEST}:2", "id 9:1 is there twice"),
        ("query", 0, {"modality": "video"}, f"query/{TEST}:0", "'video'"),
        ("query", 0, {"modality": None}, f"query/{TEST}:0", "None"),
        ("corpus", 1, {"image": None}, f"{CORPUS_FILE}:1", "9:11 has no image"),
        ("corpus", 3, {"image": {"bytes": None, "path": None}}, f"{CORPUS_FILE}:3", "no image"),
        ("judged", 0, ("9:7", "9:11", 1), f"qrels/{TEST}:0", "no query 9:7"),
        ("judged", 3, ("9:3", "9:99", 1), f"qrels/{TEST}:3", "no candidate 9:99"),
        ("judged", 3, ("9:3", None, 1), f"qrels/{TEST}:3", "no query-id, corpus-id or score"),
        ("judged", 3, ("9:2", "9:10", 2), f"qrels/{TEST}:3", "judged twice"),
    ],
)
def test_a_bad_row_is_named_and_can_be_skipped(tmp_path, part, row, changed, where, what):
    rows = {"query": list(QUERIES), "corpus": list(CORPUS), "judged": list(JUDGED)}
    old = rows[part][row]
    rows[part][row] = changed if isinstance(changed, tuple) else {**old, **changed}
    folder = write_task(tmp_path / "mbeir_mscoco_task0", *rows.values())
    said = refused(folder)
    assert said.startswith(f"{folder / where.rpartition(':')[0]}:{where.rpartition(':')[2]}: ")
    assert what in said
    assert "--skip-bad" in said
    task = one(folder, skip_bad=True)
    assert any(line.startswith(said.split("; mend")[0]) for line in task.skipped)
    if part == "corpus":
        assert old["id"] not in task.candidate_ids
        assert shown(task.candidates) == [
            (None, n) for n, c in enumerate(CORPUS) if c["id"] != old["id"]
        ]


def test_positives_of_the_sister_dataset_are_kept_as_misses(tmp_path):
    """OVEN's qrels name candidates of InfoSeek's, which its local pool does not have."""
    queries = [item("5:1", "image,text", "what is this?", 1)]
    corpus = [item("5:2", "text", "an arch in Paris", None)]
    judged = [("5:1", "5:2", 1), ("5:1", "6:77", 1)]
    task = one(write_task(tmp_path / "mbeir_oven_task6", queries, corpus, judged))
    assert task.qrels == {"5:1": {"5:2": 1, "6:77": 1}}


def test_what_is_no_release_is_said(coco, tmp_path):
    assert "no such folder" in refused(tmp_path / "nothing" / "here")
    (tmp_path / "empty").mkdir()
    assert "no M-BEIR here" in refused(tmp_path / "empty")
    assert "UniIR" in refused(coco, pool="union")
    shutil.rmtree(coco / "qrels")
    assert "qrels" in refused(coco)


def test_a_file_that_is_cut_off_is_named(coco):
    path = coco / CORPUS_FILE
    path.write_bytes(path.read_bytes()[:-20])
    assert refused(coco).startswith(f"{path}: ")


def test_a_missing_column_is_named(coco):
    path = coco / "query" / TEST
    pq.write_table(pq.read_table(path).drop_columns(["modality"]), path)
    assert refused(coco).startswith(f"{path}: no column modality")


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(str.strip)
names = st.lists(st.text(min_size=1).filter(lambda s: ":" not in s), min_size=2, unique=True)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(names=names, said=st.lists(texts, min_size=1), group=st.integers(1, 5), data=st.data())
def test_any_ids_and_texts_come_back(tmp_path_factory, names, said, group, data):
    folder = tmp_path_factory.mktemp("any") / "a_task"
    middle = max(1, len(names) // 2)
    texts_of = [said[n % len(said)] for n in range(len(names))]
    rows = [item(n, "text", text, None) for n, text in zip(names, texts_of, strict=True)]
    judged = [
        (query, data.draw(st.sampled_from(names[middle:])), data.draw(st.integers(0, 3)))
        for query in names[:middle]
    ]
    write_items(folder / "query" / TEST, rows[:middle], group)
    write_items(folder / "corpus" / TEST, rows[middle:], group)
    write_qrels(folder / "qrels" / TEST, judged)
    task = one(folder)
    assert dict(zip(task.query_ids, [q.text for q in task.queries], strict=True)) == dict(
        zip(names[:middle], texts_of, strict=False)
    )
    assert list(task.candidate_ids) == names[middle:]
    backwards = [task.candidates[n].text for n in reversed(range(len(task.candidates)))]
    assert backwards[::-1] == texts_of[middle:]
    assert task.qrels == {query: {candidate: score} for query, candidate, score in judged}
