"""Hard negatives, against a brute-force search."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_retriever.retrieval.collection import Task
from patch_retriever.retrieval.negatives import hard_negatives

N_ITEMS = 40
steady = settings(deadline=None, derandomize=True)


@st.composite
def tasks(draw: st.DrawFn) -> Task:
    numbers = list(range(N_ITEMS))
    queries = draw(st.lists(st.sampled_from(numbers), min_size=1, max_size=6, unique=True))
    documents = draw(st.lists(st.sampled_from(numbers), min_size=2, max_size=30, unique=True))
    answers = st.sets(st.integers(0, len(documents) - 1), min_size=1, max_size=4).map(tuple)
    relevant = tuple(draw(answers) for _ in queries)
    return Task("a task", "t->i", tuple(queries), tuple(documents), relevant)


def by_sorting(embeddings_nd: torch.Tensor, task: Task, per_query: int) -> list[list[int]]:
    """Every query with its nearest wrong documents by cosine, nearest first."""
    unit = embeddings_nd.double().numpy()
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    found = []
    for query, relevant in zip(task.queries, task.relevant, strict=True):
        wrong = [d for position, d in enumerate(task.documents) if position not in relevant]
        nearest = sorted(wrong, key=lambda d: -unit[query] @ unit[d])
        found += [[query, d] for d in nearest[:per_query]]
    return found


@steady
@given(tasks(), st.integers(1, 6), st.integers(0, 2**31))
def test_they_are_the_nearest_wrong_documents(task, per_query, seed):
    embeddings_nd = torch.randn(N_ITEMS, 8, generator=torch.Generator().manual_seed(seed))
    found = hard_negatives(embeddings_nd, [task], per_query)
    assert found.tolist() == by_sorting(embeddings_nd, task, per_query)


@steady
@given(tasks(), tasks())
def test_tasks_are_taken_one_after_the_other(one, other):
    embeddings_nd = torch.randn(N_ITEMS, 8, generator=torch.Generator().manual_seed(0))
    both = hard_negatives(embeddings_nd, [one, other])
    apart = [hard_negatives(embeddings_nd, [task]) for task in (one, other)]
    assert both.tolist() == torch.cat(apart).tolist()


@pytest.mark.parametrize("scale", [0.001, 1000.0])
def test_length_does_not_matter(scale):
    task = Task("a task", "t->i", (0, 1), (2, 3, 4, 5), ((0,), (1, 2)))
    embeddings_nd = torch.randn(6, 8, generator=torch.Generator().manual_seed(3))
    longer_nd = embeddings_nd * torch.tensor([1, scale, 1, scale, 1, 1])[:, None]
    assert (
        hard_negatives(longer_nd, [task]).tolist() == hard_negatives(embeddings_nd, [task]).tolist()
    )


def test_where_everything_is_relevant_there_are_none():
    task = Task("a task", "t->i", (0,), (1, 2), ((0, 1),))
    found = hard_negatives(torch.eye(3), [task])
    assert found.shape == (0, 2)
    assert hard_negatives(torch.eye(3), []).shape == (0, 2)
