"""What would many vectors an item give? MaxSim over frozen tokens, beside the pooled vector.

    python recipes/late_interaction.py [--seed 0] [--scenes 100] [--cut layers.4.attention]

After SMART (arXiv 2605.24938): the score of a query and a document is the cosine of their last
tokens plus the mean over the query's other tokens of the largest cosine with any of the document's.
Nothing is fitted, but for the mean of each kind of item in the centred rows. The built-in model's
test scenes under the one-word prompt; printed is the score of each way of scoring.
"""

from __future__ import annotations

import click
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from patch_retriever.backbones.inputs import item_batches
from patch_retriever.backbones.load import BUILT_IN, as_read, load_backbone
from patch_retriever.backbones.pooling import pool, pooling_weights
from patch_retriever.backbones.readout import LAST, ONE_WORD, Readout
from patch_retriever.probe import Probe
from patch_retriever.retrieval.collection import Collection
from patch_retriever.retrieval.evaluate import Outcome
from patch_retriever.retrieval.metrics import hits, ranks
from patch_retriever.scenes.tasks import scenes_collection


def tokens_of(cut: str | None, collection: Collection) -> tuple[Tensor, list[Tensor]]:
    """The last token (n, d) and the tokens before it, (t, d) for each item."""
    readout = Readout(ONE_WORD, LAST, "lasttoken", cut=cut)
    transformer = as_read(load_backbone(BUILT_IN), readout)
    probe, n = Probe(transformer), len(collection.items)
    last_nd = torch.zeros(n, transformer.get_embedding_dimension())
    others = [last_nd[:0]] * n
    for numbers, features in item_batches(transformer, collection.items, 64):
        tokens_ntd, mask_nt = probe.read(features, [LAST])[LAST], features["attention_mask"]
        at_end_nt = pooling_weights(mask_nt, "lasttoken")
        last_nd[numbers] = pool(tokens_ntd, at_end_nt)
        for row, number in enumerate(numbers):
            others[number] = tokens_ntd[row][(mask_nt[row] - at_end_nt[row]).bool()]
    return last_nd, others


def max_sim(queries: list[Tensor], documents: list[Tensor]) -> Tensor:
    """(q, n): the mean over a query's tokens of the largest cosine with a document's."""
    sizes = torch.tensor([len(one) for one in documents])
    document_t = torch.arange(len(documents)).repeat_interleave(sizes)
    tokens_td = normalize(torch.cat(documents), dim=1)
    rows = []
    for query_sd in queries:
        cosines_st = normalize(query_sd, dim=1) @ tokens_td.T
        best_sn = cosines_st.new_full((len(query_sd), len(documents)), -1)
        best_sn.scatter_reduce_(1, document_t.expand_as(cosines_st), cosines_st, "amax")
        rows.append(best_sn.mean(0))
    return torch.stack(rows)


def scored(scores: dict[str, Tensor], collection: Collection) -> float:
    """The score of a collection's tasks from (q, n) scores of each."""
    found = {}
    for task in collection.tasks:
        documents_nn = np.eye(len(task.documents), dtype=np.float32)  # a row of scores is a query
        found[task.name] = hits(ranks(scores[task.name].numpy(), documents_nn, task.relevant))
    return Outcome(found).score


@click.command(help=__doc__)
@click.option("--seed", default=0, show_default=True)
@click.option("--scenes", default=100, show_default=True)
@click.option("--cut", default="layers.4.attention", show_default=True)
def main(seed: int, scenes: int, cut: str) -> None:
    test, calibration = (scenes_collection(s, scenes, seed) for s in ("test", "calibration"))
    last_nd, others = tokens_of(cut, test)
    seen_nd, seen = tokens_of(cut, calibration)
    kinds_n, of_seen_n = test.kinds(), calibration.kinds()
    ways: dict[str, dict[str, Tensor]] = {}
    for name, centred in (("as they are", False), ("centred per modality", True)):
        pooled_nd, tokens = last_nd, others
        if centred:
            rows_k = [np.flatnonzero(of_seen_n == kind) for kind in range(3)]
            pooled_nd = last_nd - torch.stack([seen_nd[rows].mean(0) for rows in rows_k])[kinds_n]
            means = [torch.cat([seen[i] for i in rows]).mean(0) for rows in rows_k]
            tokens = [one - means[kind] for one, kind in zip(others, kinds_n, strict=True)]
        unit_nd = normalize(pooled_nd, dim=1)
        pooled, local = {}, {}
        for task in test.tasks:
            queries, documents = list(task.queries), list(task.documents)
            pooled[task.name] = unit_nd[queries] @ unit_nd[documents].T
            local[task.name] = max_sim([tokens[i] for i in queries], [tokens[i] for i in documents])
        ways[f"last token, {name}"] = pooled
        ways[f"MaxSim, {name}"] = local
        ways[f"both, {name}"] = {task: pooled[task] + local[task] for task in pooled}
    print("| scored by | score |\n|---|---:|")
    for name, scores in ways.items():
        print(f"| {name} | {100 * scored(scores, test):.1f} |", flush=True)


if __name__ == "__main__":
    main()
