"""mteb's tasks as retrieval tasks: what a model may see, in mteb's words, from tables on disk."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from mteb._create_dataloaders import _retrieval_texts
from mteb.types import PromptType

from local_tasks import (
    HERE,
    Local,
    N,
    NotThere,
    ShapesByLanguage,
    ShapesI2T,
    ShapesIT2I,
    ShapesReranking,
    ShapesT2I,
    ShapesT2Mixed,
    ShapesToOthers,
    metadata,
    picture,
    table,
    text,
)
from patch_retriever.errors import UserError
from patch_retriever.items import Item
from patch_retriever.pictures.picture import PictureBytes
from patch_retriever.retrieval.readers import read_tasks
from patch_retriever.retrieval.readers.benchmarks.mteb_tasks import (
    find_task,
    read_mteb,
    retrieval_tasks,
    task_items,
    task_prompt,
)
from patch_retriever.retrieval.readers.options import ReadOptions
from patch_retriever.retrieval.tasks import RetrievalTask


def read(task: Local, **options: Any) -> RetrievalTask:
    (found,) = retrieval_tasks(task, ReadOptions(**options))
    return found


def says(location: str, *words: str, **options: Any) -> None:
    with pytest.raises(UserError) as caught:
        read_mteb(location, ReadOptions(**options))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_task_is_read():
    task = read(ShapesIT2I())
    assert (task.name, task.split, task.direction) == ("ShapesIT2I", "test", "it->i")
    assert list(task.query_ids) == [f"q{i}" for i in range(N)]
    assert list(task.candidate_ids) == [f"d{i}" for i in range(N)]
    assert task.queries[2] == Item(text(2), PictureBytes("ShapesIT2I q2", picture(2)))
    assert task.candidates[N - 1] == Item(
        None, PictureBytes(f"ShapesIT2I d{N - 1}", picture(N - 1))
    )
    assert task.qrels["q3"] == {"d3": 2, "d4": 1}
    assert task.prompts == {"query": "Find what fits."}
    assert (task.excluded, task.pools, task.skipped) == ({}, {}, ())


def test_only_what_the_direction_names_is_seen():
    task = read(ShapesT2I())  # its corpus holds the texts, too
    assert {item.kind for item in task.queries} == {"text"}
    assert {item.kind for item in task.candidates} == {"image"}
    assert task.direction == "t->i"


def test_candidates_of_several_kinds():
    kinds = [item.kind for item in read(ShapesT2Mixed()).candidates]
    assert kinds == ["text", "image", "both"] * (N // 3)


def test_slices_and_ends_are_those_of_a_sequence():
    items = read(ShapesI2T()).candidates
    assert list(items[2:5]) == [items[2], items[3], items[4]]
    assert items[2:5].ids == ("d2", "d3", "d4")
    assert items[-1] == items[N - 1]
    assert len(list(items)) == len(items) == N
    with pytest.raises(IndexError):
        items[N]


def test_pictures_are_decoded_when_they_are_opened():
    class Broken(ShapesI2T):
        queries_of = staticmethod(lambda: (None, [b"no picture", *map(picture, range(1, N))]))

    task = read(Broken())
    assert task.queries[1].picture is not None and task.queries[0].picture is not None
    assert task.queries[1].picture.open().mode == "RGB"
    with pytest.raises(UserError, match=r"^ShapesI2T q0: not a readable image"):
        task.queries[0].picture.open()


def test_an_item_with_nothing_in_it_is_named():
    class Empty(ShapesI2T):
        queries_of = staticmethod(lambda: (None, [None, *map(picture, range(1, N))]))

    with pytest.raises(UserError, match="ShapesI2T: q0 has neither a text nor a picture"):
        read(Empty()).queries[0]


def test_queries_that_nothing_was_judged_for_are_left_out_as_in_mteb():
    class Unjudged(ShapesT2I):
        def split_data(self) -> dict[str, Any]:
            data = super().split_data()
            data["relevant_docs"]["q1"] = {}
            del data["relevant_docs"]["q2"]
            data["relevant_docs"]["q3"] = {"not in the corpus": 1}
            return data

    task = read(Unjudged())
    assert list(task.query_ids[:3]) == ["q0", "q3", "q4"]
    assert task.qrels["q3"] == {"not in the corpus": 1}


def test_the_first_queries_of_a_task():
    task = read(ShapesT2I(), limit=3)
    assert (list(task.query_ids), len(task.queries)) == (["q0", "q1", "q2"], 3)
    assert len(task.candidates) == N


def test_queries_among_the_candidates_are_left_out_of_their_own_ranking():
    assert read(ShapesToOthers()).excluded == {f"d{i}": frozenset({f"d{i}"}) for i in range(N)}


def test_short_lists_of_reranking_are_pools():
    task = read(ShapesReranking())
    assert task.pools["q3"] == ("d3", "d8", "d13", "d18", "d23")
    assert set(task.pools) == set(task.query_ids)


def test_every_subset_is_a_task():
    tasks = retrieval_tasks(ShapesByLanguage(), ReadOptions())
    assert [task.name for task in tasks] == ["ShapesByLanguage en", "ShapesByLanguage de"]


def test_a_task_of_a_users_own_file():
    (task,) = read_tasks(f"mteb:{HERE}:ShapesT2I", ReadOptions(limit=2))
    assert (task.name, len(task.queries)) == ("ShapesT2I", 2)
    (task,) = read_mteb(f"{HERE}:ShapesByLanguage:de", ReadOptions())
    assert task.queries[0] == Item(text(0))
    says(f"{HERE}:ShapesByLanguage:fr", "no subset 'fr'; there are en, de")


class TwoSplits(ShapesT2I):
    metadata = metadata("TwoSplits", "t2i", eval_splits=["dev", "test"])

    def load_data(self, *_: object, **__: object) -> None:
        assert list(self.eval_splits) == ["dev"]  # the other is not loaded
        self.dataset = {"default": {"dev": self.split_data()}}  # type: ignore[typeddict-item]
        self.data_loaded = True


def test_the_split_that_is_asked_for():
    assert read(TwoSplits(), split="dev").split == "dev"
    with pytest.raises(UserError, match="no split 'train'; there are dev, test"):
        read(TwoSplits(), split="train")
    assert read(ShapesT2I(), split="train").split == "test"  # it has no other


# texts are put together as mteb does

WORDS = st.text("ab ", max_size=5)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=5))
def test_titles_and_texts_of_documents(rows):
    columns = {"id": [str(i) for i in range(len(rows))], "title": [a for a, _ in rows]}
    documents = Dataset.from_dict({**columns, "text": [b for _, b in rows]})
    items = task_items(documents, metadata("Documents", "t2t"), "document")
    assert [item.text for item in items] == _retrieval_texts(documents, PromptType.document)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(WORDS, st.none() | WORDS), min_size=1, max_size=5))
def test_texts_and_instructions_of_queries(rows):
    columns = {"id": [str(i) for i in range(len(rows))], "text": [a for a, _ in rows]}
    queries = Dataset.from_dict({**columns, "instruction": [b for _, b in rows]})
    items = task_items(queries, metadata("Queries", "t2t"), "query")
    assert [item.text for item in items] == _retrieval_texts(queries, PromptType.query)


@pytest.mark.parametrize("instruction", [None, "Answer."])
def test_turns_of_conversations(instruction):
    turns = [["hello", "a red star?"], ["yes"]]
    spoken = [[{"role": "user", "content": t} for t in said] for said in turns]
    for texts in (turns, spoken):
        columns: dict[str, Any] = {"id": ["a", "b"], "text": texts}
        if instruction:
            columns["instruction"] = [instruction] * 2
        queries = Dataset.from_dict(columns)
        items = task_items(queries, metadata("Talks", "t2t"), "query")
        with pytest.warns(UserWarning) if texts is turns else _nothing():
            assert [i.text for i in items] == _retrieval_texts(queries, PromptType.query)


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()


@pytest.mark.parametrize(
    ("prompt", "query", "document", "neither"),
    [
        (None, None, None, None),
        ("Do.", "Do.", None, "Do."),
        ({"query": "Find."}, "Find.", None, "Find."),
        ({"query": "Find.", "document": "Read."}, "Find.", "Read.", "Find."),
    ],
)
def test_prompts_by_role(prompt, query, document, neither):
    about = metadata("Told", "t2t", prompt=prompt)
    asked = [task_prompt(about, role) for role in ("query", "document", None)]
    assert asked == [query, document, neither]


# what a user can mend


def test_an_unknown_task_is_answered_with_near_names():
    says("CIRRIT2IRetrieva", "no task 'CIRRIT2IRetrieva' in mteb; near: CIRRIT2IRetrieval")
    says("zzzzzzzzzzzz", "no task 'zzzzzzzzzzzz' in mteb")


def test_a_task_that_is_no_retrieval_is_refused():
    says("STS12", "STS12: of mteb's type STS, not retrieval", "patch-retriever mteb --tasks STS12")


def test_a_task_whose_first_result_is_dropped_is_refused():
    says("CUB200I2IRetrieval", "drops the first result", "patch-retriever mteb")


def test_data_that_cannot_be_had_are_named():
    with pytest.raises(UserError, match="NotThere: its data set nobody/no-such-data-set cannot"):
        retrieval_tasks(NotThere(), ReadOptions())
    says("CIRRIT2IRetrieval", "its data set mteb/mbeir_cirr_task7 cannot be loaded")


def test_a_file_that_holds_no_such_task_is_named(tmp_path: Path):
    path = tmp_path / "own.py"
    says(f"{path}:Task", f"{path}: no such file")
    path.write_text("Task = 1")
    says(f"{path}:Task", f"{path}: no class 'Task' that is an mteb.AbsTask")
    path.write_text("1 / 0")
    says(f"{path}:Task", f"{path}: does not run (ZeroDivisionError")


def test_without_mteb_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mteb", None)
    says("CIRRIT2IRetrieval", "pip install 'patch-retriever[mteb]'")


def test_a_task_of_mtebs_is_found_by_name():
    task = find_task("CIRRIT2IRetrieval")
    assert task.metadata.category == "it2i"
    assert task_items(table(["a"], ["b"], [picture(0)]), task.metadata, "document")[0].text is None
