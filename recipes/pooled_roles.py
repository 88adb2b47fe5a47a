"""Which tokens does the mean beside the last token want? Of all, of the content, or of the frame.

    python recipes/pooled_roles.py [--seed 0] [--cut layers.4.attention]

The vectors of the built-in model's scenes under the one-word prompt are the last token, alone or
beside a mean over all tokens, over the content (image and text), or over the frame (template and
instruction); each part at a mean length of 1. Printed: the score on test after CCA and after the
contrastive alignment, both fitted on calibration.
"""

from __future__ import annotations

import click
import torch
from torch import Tensor

from patch_retriever.backbones.inputs import item_batches
from patch_retriever.backbones.load import BUILT_IN, as_read, load_backbone
from patch_retriever.backbones.pooling import pool, pooling_weights
from patch_retriever.backbones.readout import LAST, ONE_WORD, Readout
from patch_retriever.backbones.roles import ROLES, TokenRoles
from patch_retriever.config import ScenesSettings
from patch_retriever.data import scenes_data
from patch_retriever.patch import fit
from patch_retriever.patch.calibration import pairs_to_images
from patch_retriever.probe import Probe
from patch_retriever.retrieval.collection import Collection
from patch_retriever.retrieval.evaluate import evaluate_pooled
from patch_retriever.stages.trials import items_and_pairs

CONTENT = torch.tensor([ROLES.index(role) for role in ("image", "text")])
MEANS = ("all", "content", "frame")
SHRINKAGE = 0.5


def parts(cut: str | None, collection: Collection) -> dict[str, Tensor]:
    """The last token and the three means of every item, (n, d) each."""
    readout = Readout(ONE_WORD, LAST, "lasttoken", cut=cut)
    transformer = as_read(load_backbone(BUILT_IN), readout)
    probe, roles_of = Probe(transformer), TokenRoles(transformer)
    d = transformer.get_embedding_dimension()
    found = {name: torch.zeros(len(collection.items), d) for name in ("last", *MEANS)}
    for numbers, features in item_batches(transformer, collection.items, 64):
        tokens_ntd = probe.read(features, [LAST])[LAST]
        mask_nt = features["attention_mask"]
        content_nt = torch.isin(roles_of(features).long(), CONTENT) & mask_nt.bool()
        masks = {"all": mask_nt, "content": content_nt, "frame": mask_nt - content_nt.long()}
        for name, which_nt in masks.items():
            found[name][numbers] = pool(tokens_ntd, pooling_weights(which_nt, "mean"))
        found["last"][numbers] = pool(tokens_ntd, pooling_weights(mask_nt, "lasttoken"))
    return found


@click.command(help=__doc__)
@click.option("--seed", default=0, show_default=True)
@click.option("--cut", default="layers.4.attention", show_default=True)
def main(seed: int, cut: str) -> None:
    splits = scenes_data(ScenesSettings().model_dump(), seed).splits
    calibration, test = splits["calibration"], splits["test"]
    seen, held = parts(cut, calibration), parts(cut, test)
    scale = {name: 1 / rows_nd.norm(dim=1).mean() for name, rows_nd in seen.items()}
    kinds, of_test = (torch.from_numpy(c.kinds()).long() for c in (calibration, test))
    known = items_and_pairs(calibration)
    by_kind = pairs_to_images(known["pairs"].values(), kinds)
    print("| beside the last token | CCA | contrastive alignment |\n|---|---:|---:|")
    for mean in ("nothing", *MEANS):
        names = ["last"] if mean == "nothing" else ["last", mean]
        seen_ne, held_ne = (
            torch.cat([scale[name] * of[name] for name in names], dim=1) for of in (seen, held)
        )
        pairs = fit.PairStatistics(seen_ne, kinds, by_kind)
        cca = fit.cca(pairs, SHRINKAGE, seen_ne.shape[1])
        settings = fit.ContrastiveSettings()
        learned, _ = fit.contrastive(seen_ne, kinds, cca, known["tasks"], settings, seed)
        scores = [evaluate_pooled(m.by_kind(held_ne, of_test), test).score for m in (cca, learned)]
        print(f"| {mean} | {' | '.join(f'{100 * score:.1f}' for score in scores)} |", flush=True)


if __name__ == "__main__":
    main()
