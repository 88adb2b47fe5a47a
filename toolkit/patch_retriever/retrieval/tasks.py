"""Retrieval tasks as benchmarks hold them: queries, candidates, and graded relevance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from patch_retriever.items import Item


@dataclass(frozen=True)
class RetrievalTask:
    """Find, for each query, the candidates that are relevant to it.

    `queries` and `candidates` are sequences that may make their items when asked for them, so that
    a corpus of millions stays on disk; pictures are opened when they are encoded.

    - `direction`: "t->i", "it->t", ...; "mixed" stands for a side that holds several kinds.
    - `qrels[query][candidate]`: the grade of every judged pair, relevant above 0. Every query is a
      key; one whose relevant candidates are not in the pool counts as a miss.
    - `excluded[query]`: candidates that are left out of that query's ranking (the picture that a
      composed query starts from).
    - `pools[query]`: the candidates of a query, where every query has a short list of its own.
    - `prompts`: instructions that the benchmark gives, for "query" and "document".
    - `skipped`: one line for every bad row that was left out.
    """

    name: str
    split: str
    direction: str
    query_ids: Sequence[str]
    queries: Sequence[Item]
    candidate_ids: Sequence[str]
    candidates: Sequence[Item]
    qrels: Mapping[str, Mapping[str, int]]
    excluded: Mapping[str, frozenset[str]] = field(default_factory=dict)
    pools: Mapping[str, Sequence[str]] = field(default_factory=dict)
    prompts: Mapping[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.query_ids) != len(self.queries):
            raise ValueError(f"{self.name}: {len(self.query_ids)} ids, {len(self.queries)} queries")
        if len(self.candidate_ids) != len(self.candidates):
            raise ValueError(
                f"{self.name}: {len(self.candidate_ids)} ids, {len(self.candidates)} candidates"
            )
        if missing := [q for q in self.query_ids if q not in self.qrels]:
            raise ValueError(f"{self.name}: nothing is judged for query {missing[0]}")
