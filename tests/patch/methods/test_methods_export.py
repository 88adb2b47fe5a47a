"""Whatever is in the table can be exported exactly."""

from __future__ import annotations

import pytest
import torch
from calibrations import D, N, every_patch, make_calibration

from patch_retriever.patch.artefact import DOCUMENT, QUERY
from patch_retriever.patch.export import export_modules
from patch_retriever.patch.methods import methods

CALIBRATION = make_calibration()
METHODS = {method.id: method for method in methods(CALIBRATION)}


def exported(patch, task):
    """Embeddings by the exported modules; every item is one token, which is its pooled vector."""
    features = {
        "token_embeddings": CALIBRATION.features.pooled_nd[:, None].clone(),
        "attention_mask": torch.ones(N, 1, dtype=torch.long),
    }
    with torch.no_grad():
        for module in export_modules(patch, D, "mean"):
            takes_task = "task" in getattr(module, "forward_kwargs", ())
            features = module(features, task=task) if takes_task else module(features)
    return features["sentence_embedding"]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_exports_exactly(name):
    made = every_patch(METHODS[name])
    for setting, patch in (made[0], made[-1]):
        for task, role in (("query", QUERY), ("document", DOCUMENT)):
            expected_ne = patch.embed(CALIBRATION.features, role)
            difference = float((exported(patch, task) - expected_ne).abs().max())
            assert difference <= 1e-5, (setting, task)
