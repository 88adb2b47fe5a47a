"""What an adapter is trained on: batches of pairs, and the captions that it is to keep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patch_retriever.errors import UserError
from patch_retriever.items import Item
from patch_retriever.retrieval.collection import Collection, Task
from patch_retriever.retrieval.negatives import hard_negatives

NEGATIVES_KEPT = 5
"""Wrong documents of each query that its hard negatives are drawn from."""


@dataclass(frozen=True)
class Batch:
    """Pairs of one task. `items_m` are the items that are embedded, numbers in the collection;
    `queries_q` and `documents_d` are places among them: document n answers query n, those after
    the first q are hard negatives. `relevant_qd` is all that is relevant."""

    items_m: Tensor
    queries_q: Tensor
    documents_d: Tensor
    relevant_qd: Tensor


class Pairs:
    """The pairs of a collection's tasks, drawn a batch at a time, one task after the other.

    A task's queries come in a random order, all of them before any comes again. What batch is
    drawn at a step depends on the seed alone.
    """

    def __init__(self, collection: Collection, batch_size: int, seed: int) -> None:
        """Raises:
        UserError: no task has two queries to tell apart.
        """
        self.collection, self.batch_size, self.seed = collection, batch_size, seed
        self.tasks = [task for task in collection.tasks if len(task.queries) > 1]
        if not self.tasks:
            raise UserError("no pairs to train an adapter on; give two at least")
        self._negatives: list[dict[int, list[int]]] = [{} for _ in self.tasks]

    def __len__(self) -> int:
        return sum(len(task.queries) for task in self.tasks)

    def mine(self, as_query_nd: Tensor, as_document_nd: Tensor) -> None:
        """Find the hard negatives of every query by embeddings of all items, with FAISS."""
        for task, found in zip(self.tasks, self._negatives, strict=True):
            found.clear()
            mined = hard_negatives(as_document_nd, [task], NEGATIVES_KEPT, as_query_nd)
            for query, document in mined.tolist():
                found.setdefault(query, []).append(document)

    def batch(self, number: int, negatives: int = 0) -> Batch:
        """Batch `number`, with so many hard negatives to each pair, as far as there are any."""
        turn, which = divmod(number, len(self.tasks))
        task = self.tasks[which]
        size = min(self.batch_size, len(task.queries))
        in_epoch = len(task.queries) // size
        epoch, place = divmod(turn, in_epoch)
        order = self._order(epoch, which, len(task.queries))
        picks = order[place * size : (place + 1) * size]
        queries = [task.queries[i] for i in picks]
        documents = [task.documents[task.relevant[i][0]] for i in picks]
        generator = self._generator(number, -1)
        for query in queries if negatives else ():
            wrong = self._negatives[which].get(query, [])
            chosen = torch.randperm(len(wrong), generator=generator)[:negatives].tolist()
            documents += [wrong[i] for i in chosen]
        return _batch(task, picks, queries, documents)

    def _order(self, epoch: int, which: int, n: int) -> list[int]:
        return torch.randperm(n, generator=self._generator(epoch, which)).tolist()

    def _generator(self, number: int, which: int) -> torch.Generator:
        mixed = hash((self.seed, number, which)) & 0x7FFF_FFFF_FFFF_FFFF  # of numbers: always alike
        return torch.Generator().manual_seed(mixed)


def _batch(
    task: Task, picks: Sequence[int], queries: Sequence[int], documents: Sequence[int]
) -> Batch:
    items_m, places = torch.tensor([*queries, *documents]).unique(return_inverse=True)
    relevant = [{task.documents[r] for r in task.relevant[i]} for i in picks]
    relevant_qd = torch.tensor([[d in right for d in documents] for right in relevant])
    return Batch(items_m, places[: len(queries)], places[len(queries) :], relevant_qd)


def some_of(collection: Collection, share: float, seed: int) -> Collection:
    """The same items with a random share of every task's queries, one at least."""
    generator = torch.Generator().manual_seed(seed)
    tasks = []
    for task in collection.tasks:
        n = max(1, math.ceil(share * len(task.queries)))
        keep = sorted(torch.randperm(len(task.queries), generator=generator)[:n].tolist())
        queries = tuple(task.queries[i] for i in keep)
        relevant = tuple(task.relevant[i] for i in keep)
        tasks.append(Task(task.name, task.direction, queries, task.documents, relevant))
    return Collection(collection.split, collection.items, tuple(tasks))


def captions_of(collection: Collection, n: int) -> list[tuple[Item, str]]:
    """Up to `n` pictures with a text that is true of them, evenly from all there are."""
    found = [
        (picture, text.text)
        for query, document in collection.pairs(("i->t",)).tolist()
        for picture, text in [(collection.items[query], collection.items[document])]
        if text.text
    ]
    step = max(1, len(found) // n)
    return found[::step][:n]


def check_apart(training: Collection, held_out: Sequence[Collection]) -> None:
    """Refuse training pairs of which a picture is in a held-out collection.

    Raises:
        UserError: one is.
    """
    mine = {p.content_hash() for item in training.items for p in item.pictures}
    for collection in held_out:
        theirs = {p.content_hash() for item in collection.items for p in item.pictures}
        if shared := mine & theirs:
            raise UserError(
                f"{len(shared)} pictures of the training pairs are also in the {collection.split} "
                "split, which must stay unseen; take them out of the pairs"
            )
