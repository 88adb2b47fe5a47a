"""UniIR's release of M-BEIR: lines as a plain loop reads them, both pools, every fault named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from releases import colour, only_task, refusal, write_lines, write_png

from patch_retriever.errors import UserError
from patch_retriever.retrieval.readers import read_tasks
from patch_retriever.retrieval.readers.options import ReadOptions

COCO = "mbeir_images/mscoco_images/val2014/COCO_val2014_00000000000{}.jpg"
TASKS = {
    "visualnews": ("text", "image", 0, 0),
    "mscoco": ("image", "text", 9, 3),
    "webqa": ("text", "image,text", 2, 2),
    "oven": ("image,text", "text", 5, 6),
}
"""Query's and candidates' modality, the dataset's id, the task."""


def query(name: str, modality: str, number: int, positives: list[str], task: int) -> dict:
    return {
        "qid": name,
        "query_txt": f"query {number}" if "text" in modality else None,
        "query_img_path": COCO.format(number) if "image" in modality else None,
        "query_modality": modality,
        "query_src_content": json.dumps({"some": "thing"}),
        "pos_cand_list": positives,
        "neg_cand_list": [],
        "task_id": task,
    }


def candidate(name: str, modality: str, number: int) -> dict:
    return {
        "txt": f"candidate {number}" if "text" in modality else None,
        "img_path": COCO.format(number) if "image" in modality else None,
        "modality": modality,
        "did": name,
        "src_content": None,
    }


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """Four tasks with three queries and five candidates each."""
    root = tmp_path_factory.mktemp("M-BEIR")
    union = []
    header = "query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1\tprompt_2"
    instructions = [header + "\tprompt_3\tprompt_4"]
    for number in range(10):
        write_png(root / COCO.format(number), number)
    for dataset, (asked, given_, number, task) in TASKS.items():
        name = f"mbeir_{dataset}_task{task}"
        queries = [
            query(f"{number}:{n}", asked, n, [f"{number}:{n + 10}", f"{number}:14"], task)
            for n in range(3)
        ]
        pool = [candidate(f"{number}:{n + 10}", given_, n) for n in range(5)]
        union += pool
        if dataset == "oven":
            queries[0]["pos_cand_list"].append("6:44")
        for split in ("test", "val"):
            write_lines(root / "query" / split / f"{name}_{split}.jsonl", queries)
            path = root / "qrels" / split / f"{name}_{split}_qrels.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(
                "".join(f"{q['qid']} 0 {d} 1 {task}\n" for q in queries for d in q["pos_cand_list"])
            )
        of_split = "_test" if dataset == "mscoco" else ""
        write_lines(root / "cand_pool" / "local" / f"{name}{of_split}_cand_pool.jsonl", pool)
        other = query(f"{number}:99", "image", 1, [f"{number}:10"], 4)
        train = [other, *queries]
        write_lines(root / "query" / "train" / f"mbeir_{dataset}_train.jsonl", train)
        instructions.append(f"{asked}\t{given_}\t{dataset}\t{number}\tFind it for {name}.\tOther")
    union.append(candidate("6:44", "text", 4))
    pools = root / "cand_pool" / "global"
    for split in ("test", "val", "train"):
        write_lines(pools / f"mbeir_union_{split}_cand_pool.jsonl", union)
    (root / "instructions").mkdir()
    path = root / "instructions" / "query_instructions.tsv"
    path.write_text("\n".join(instructions) + "\n")
    return root


@pytest.fixture
def small(tmp_path):
    """One task, whose files a test may spoil."""
    write_lines(
        tmp_path / "query/test/mbeir_cirr_task7_test.jsonl",
        [query(f"8:{n}", "image,text", n, [], 7) for n in range(3)],
    )
    write_lines(
        tmp_path / "cand_pool/local/mbeir_cirr_task7_cand_pool.jsonl",
        [candidate(f"8:{n}", "image", n) for n in range(4)],
    )
    path = tmp_path / "qrels/test/mbeir_cirr_task7_test_qrels.txt"
    path.parent.mkdir(parents=True)
    path.write_text("8:0 0 8:1 1 7\n8:1 0 8:2 1 7\n8:2 0 8:3 1 7\n")
    for number in range(4):
        write_png(tmp_path / COCO.format(number), number)
    return tmp_path


def one(location: object, **options):
    return only_task(f"mbeir:{location}", **options)


def refused(location: object, **options) -> str:
    return refusal(f"mbeir:{location}", **options)


def loop(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check(task, root: Path, queries: list[dict], pool: list[dict], qrels: dict) -> None:
    """As a plain loop over the raw files would have it."""
    assert list(task.query_ids) == [q["qid"] for q in queries]
    assert list(task.candidate_ids) == [c["did"] for c in pool]
    keys = ("query_txt", "query_img_path"), ("txt", "img_path")
    for items, rows, (text, picture) in zip(
        (task.queries, task.candidates), (queries, pool), keys, strict=True
    ):
        for item, row in zip(items, rows, strict=True):
            assert item.text == row[text]
            path = row[picture]
            assert (item.picture and item.picture.path) == (root / path if path else None)
    assert task.qrels == qrels


def plain_qrels(path: Path) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for line in path.read_text().splitlines():
        qid, _, did, grade, _ = line.split()
        found.setdefault(qid, {})[did] = int(grade)
    return found


@pytest.mark.parametrize("dataset", TASKS)
def test_a_task_says_what_its_lines_say(release, dataset):
    asked, given_, _, number = TASKS[dataset]
    name = f"mbeir_{dataset}_task{number}"
    task = one(release / name)
    letters = {"text": "t", "image": "i", "image,text": "it"}
    assert (task.name, task.direction) == (name, f"{letters[asked]}->{letters[given_]}")
    split = "_test" if dataset == "mscoco" else ""
    check(
        task,
        release,
        loop(release / f"query/test/{name}_test.jsonl"),
        loop(release / f"cand_pool/local/{name}{split}_cand_pool.jsonl"),
        plain_qrels(release / f"qrels/test/{name}_test_qrels.txt"),
    )
    assert task.prompts == {"query": f"Find it for {name}."}
    pictures = [c.picture for c in task.candidates if c.picture]
    assert [colour(picture) for picture in pictures] == list(range(len(pictures)))


def test_the_union_pool_is_shared_and_mixed(release, monkeypatch):
    scans = []
    from patch_retriever.retrieval.readers.benchmarks import json_rows

    scan = json_rows.JsonLines.scan
    monkeypatch.setattr(
        json_rows.JsonLines, "scan", lambda self: scans.append(self.path) or scan(self)
    )
    tasks = read_tasks(f"mbeir:{release}", ReadOptions(pool="union"))
    path = release / "cand_pool/global/mbeir_union_test_cand_pool.jsonl"
    assert scans.count(path) == 1
    assert [(t.name, t.direction) for t in tasks] == [
        ("mbeir_visualnews_task0_union", "t->mixed"),
        ("mbeir_webqa_task2_union", "t->mixed"),
        ("mbeir_oven_task6_union", "it->mixed"),
        ("mbeir_mscoco_task3_union", "i->mixed"),
    ]
    for task in tasks:
        name = task.name.removesuffix("_union")
        check(
            task,
            release,
            loop(release / f"query/test/{name}_test.jsonl"),
            loop(path),
            plain_qrels(release / f"qrels/test/{name}_test_qrels.txt"),
        )
    (oven,) = (t for t in tasks if "oven" in t.name)
    assert "6:44" in oven.candidate_ids  # InfoSeek's positive of OVEN's query is found here only


def test_a_root_gives_all_its_tasks(release):
    tasks = read_tasks(f"mbeir:{release}", ReadOptions(limit=1))
    assert [t.name for t in tasks] == [
        "mbeir_visualnews_task0",
        "mbeir_webqa_task2",
        "mbeir_oven_task6",
        "mbeir_mscoco_task3",
    ]
    assert [(len(t.queries), len(t.candidates)) for t in tasks] == [(1, 5)] * 4


@pytest.mark.parametrize(
    "name", ["#mscoco_task3", "/mscoco_task3", "#mscoco@paper4", "/mscoco@paper4"]
)
def test_one_task_of_a_root_by_either_number(release, name):
    assert one(f"{release}{name}").name == "mbeir_mscoco_task3"


def test_names_that_are_not_there(release):
    assert "mscoco@paper4" in refused(f"{release}#mscoco_task4")
    assert "mbeir_cirr_task7_test.jsonl: no such file" in refused(f"{release}#cirr")
    assert "mbeir_webqa_task2 (t->it)" in refused(f"{release}#flickr30k")
    assert "no queries of the split dev" in refused(release, split="dev")


def test_the_val_split_has_its_own_files(release):
    task = one(release / "webqa_task2", split="val")
    assert (task.split, task.query_ids) == ("val", ["2:0", "2:1", "2:2"])


def test_the_train_split_holds_all_tasks_of_a_dataset(release):
    task = one(release / "mscoco_task3", split="train", pool="union")
    assert task.query_ids == ["9:0", "9:1", "9:2"]  # not 9:99, which is of another task
    assert task.qrels["9:1"] == {"9:11": 1, "9:14": 1}
    assert "pool=union" in refused(release / "mscoco_task3", split="train")


def test_candidates_stay_on_disk(small, monkeypatch):
    opened = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: opened.append(path) or read_bytes(path))
    task = one(small)
    candidates = list(task.candidates)
    assert opened == []
    assert colour(candidates[2].picture) == 2
    assert opened == [small / COCO.format(2)]


def test_pictures_elsewhere(small, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (small / "mbeir_images").rename(elsewhere / "mbeir_images")
    task = one(small, images=elsewhere)
    assert colour(task.candidates[3].picture) == 3


QUERY, POOL, QRELS = (
    "query/test/mbeir_cirr_task7_test.jsonl",
    "cand_pool/local/mbeir_cirr_task7_cand_pool.jsonl",
    "qrels/test/mbeir_cirr_task7_test_qrels.txt",
)


@pytest.mark.parametrize(
    ("file", "line", "changed", "what"),
    [
        (QUERY, 2, "{", "not JSON"),
        (QUERY, 2, "[1]", "not a JSON object"),
        (QUERY, 2, {"query_img_path": None}, "8:1 has no image"),
        (QUERY, 2, {"query_modality": "sound"}, "'sound'"),
        (QUERY, 2, {"qid": None}, "no id"),
        (QUERY, 2, {"qid": "8:0"}, "there twice"),
        (POOL, 3, {"img_path": ""}, "8:2 has no image"),
        (POOL, 3, {"modality": "text"}, "8:2 has no text"),
        (POOL, 3, b"\xff\xfe{}", "not JSON"),
        (QRELS, 2, "8:1 0 8:2", "not 'query 0 candidate grade task'"),
        (QRELS, 2, "8:1 0 8:2 yes 7", "not 'query 0 candidate grade task'"),
        (QRELS, 2, "8:9 0 8:2 1 7", "no query 8:9"),
        (QRELS, 2, "8:1 0 8:77 1 7", "no candidate 8:77"),
    ],
)
def test_a_bad_line_is_named_and_can_be_skipped(small, file, line, changed, what):
    path = small / file
    lines = path.read_bytes().splitlines()
    if isinstance(changed, dict):
        changed = json.dumps({**json.loads(lines[line - 1]), **changed})
    lines[line - 1] = changed if isinstance(changed, bytes) else changed.encode()
    path.write_bytes(b"\n".join(lines) + b"\n\n")
    said = refused(small)
    assert said.startswith(f"{path}:{line}: ")
    assert what in said
    task = one(small, skip_bad=True)
    assert said.split("; mend")[0] in task.skipped
    assert list(task.query_ids) == ["8:0", "8:2"]


def test_direction_against_the_name(small):
    for folder, end in (("query/test", "_test.jsonl"), ("qrels/test", "_test_qrels.txt")):
        (small / folder / f"mbeir_cirr_task7{end}").rename(
            small / folder / f"mbeir_oven_task8{end}"
        )
    pool = small / "cand_pool/local/mbeir_cirr_task7_cand_pool.jsonl"
    pool.rename(pool.with_name("mbeir_oven_task8_cand_pool.jsonl"))
    assert "should be it->it, but its data is it->i" in refused(small)


def test_a_file_that_is_missing_is_named(small):
    for file in (QRELS, POOL):
        (small / file).unlink()
        assert refused(small).startswith(f"{small / file}: ")


def test_a_file_that_changed_after_it_was_read_is_not_read_on(small):
    task = one(small)
    (small / POOL).write_text("\n" * 40)
    with pytest.raises(UserError, match="changed"):
        task.candidates[3]


def test_instructions_that_are_no_table_are_named(small):
    path = small / "instructions" / "query_instructions.tsv"
    path.parent.mkdir()
    path.write_text("query_modality\tcand_modality\nsound\timage\tCIRR\t8\tFind\n")
    assert refused(small).startswith(f"{path}:2: ")
    path.write_text("query_modality\tcand_modality\ntext,image\timage\tCIRR\t8\t\tSecond.\t\n")
    assert one(small).prompts == {"query": "Second."}


texts = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)
numbers = st.lists(st.integers(0, 10**6), min_size=2, max_size=12, unique=True)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(numbers=numbers, said=st.lists(texts, min_size=1), blank=st.booleans(), ascii=st.booleans())
def test_any_ids_and_texts_come_back(tmp_path_factory, numbers, said, blank, ascii):
    root = tmp_path_factory.mktemp("any")
    texts_of = {n: said[i % len(said)] for i, n in enumerate(numbers)}
    queries, pool = numbers[:1], numbers[1:]
    rows = [{**query(f"2:{n}", "text", 0, [], 1), "query_txt": texts_of[n]} for n in queries]
    candidates = [{**candidate(f"2:{n}", "text", 0), "txt": texts_of[n]} for n in pool]
    for name, lines in (
        ("query/test/mbeir_webqa_task1_test.jsonl", rows),
        ("cand_pool/local/mbeir_webqa_task1_cand_pool.jsonl", candidates),
    ):
        path = root / name
        path.parent.mkdir(parents=True)
        end = "\n\n" if blank else "\n"
        content = "".join(json.dumps(row, ensure_ascii=ascii) + end for row in lines)
        path.write_bytes(content.encode())
    qrels = root / "qrels/test/mbeir_webqa_task1_test_qrels.txt"
    qrels.parent.mkdir(parents=True)
    qrels.write_text("".join(f"2:{q} 0 2:{d} 1 1\n" for q in queries for d in pool))
    task = one(root)
    assert [q.text for q in task.queries] == [texts_of[n] for n in queries]
    backwards = [task.candidates[i].text for i in reversed(range(len(pool)))]
    assert backwards[::-1] == [texts_of[n] for n in pool]
    assert list(task.candidate_ids) == [f"2:{n}" for n in pool]
