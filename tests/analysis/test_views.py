"""Views: poolings without some tokens, the residual before the MLP, and their outcomes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_retriever.activations.collect import collect_pooled
from patch_retriever.analysis.views import View, judge_views, load_outcomes, pooled_view, views_of
from patch_retriever.backbones.families import n_layers, residual_norm
from patch_retriever.backbones.inputs import item_batches
from patch_retriever.backbones.load import load_backbone, set_readout
from patch_retriever.backbones.readout import LAST, ONE_WORD, PAPER, Readout
from patch_retriever.backbones.roles import ROLES
from patch_retriever.data import scenes_data
from patch_retriever.probe import Probe
from patch_retriever.progress import no_progress
from patch_retriever.retrieval.evaluate import evaluate_embeddings

steady = settings(deadline=None, derandomize=True)
SIZES = {"calibration": 20, "validation": 20, "test": 20}


@pytest.fixture(scope="module")
def transformer(random_model):
    return load_backbone(str(random_model))


@steady
@given(
    st.integers(0, 10**6),
    st.sampled_from(["mean", "lasttoken", "max", "min"]),
    st.sampled_from(["", *ROLES]),
)
def test_a_view_is_a_loop_over_the_tokens_that_count(seed, pooling, without):
    generator = torch.Generator().manual_seed(seed)
    n, t, d = 3, 5, 4
    tokens_ntd = torch.randn(n, t, d, generator=generator)
    mask_nt = torch.rand(n, t, generator=generator) < 0.7
    mask_nt[:, 2] = True
    roles_nt = torch.randint(0, len(ROLES), (n, t), generator=generator, dtype=torch.uint8)
    found_nd = pooled_view(tokens_ntd, mask_nt, roles_nt, View(LAST, pooling, without))
    for i in range(n):
        real = [p for p in range(t) if mask_nt[i, p]]
        kept = [p for p in real if not without or ROLES[int(roles_nt[i, p])] != without]
        rows = tokens_ntd[i, kept or real]
        expected = {
            "mean": rows.mean(0),
            "lasttoken": rows[-1],
            "max": rows.max(0).values,
            "min": rows.min(0).values,
        }[pooling]
        assert torch.allclose(found_nd[i], expected, atol=1e-6)


def test_views_of_a_prompt(transformer):
    few, all_ = views_of(transformer, swept=False), views_of(transformer, swept=True)
    layers = n_layers(transformer.model)
    assert len(few) == 6
    assert len(all_) == 6 + 2 * layers + 3
    assert len({view.key for view in all_}) == len(all_)


def test_the_residual_before_the_mlp_and_the_mlp_give_the_layers_output(transformer):
    """h' = h + MLP(norm(h)): what FreeRet leaves out is the second term."""
    last = n_layers(transformer.model) - 1
    items = scenes_data(SIZES, 0).splits["test"].items[:3]
    set_readout(transformer, Readout(PAPER))
    _, features = next(item_batches(transformer, items, 3))
    layer = transformer.model.language_model.layers[last]
    norm, mlp = layer.post_attention_layernorm, layer.mlp
    sites = [f"layers.{last}", f"layers.{last}.attention", f"layers.{last - 1}"]
    found = Probe(transformer).read(features, sites)
    before, after, earlier = (found[sites[i]] for i in (1, 0, 2))
    with torch.no_grad():
        assert torch.allclose(before + mlp(norm(before)), after, atol=1e-5)
    assert not torch.allclose(before, earlier, atol=1e-3)
    assert not torch.allclose(before, after, atol=1e-3)


class Layer(torch.nn.Module):
    def __init__(self, *norms):
        super().__init__()
        for name in norms:
            setattr(self, name, torch.nn.Identity())


@pytest.mark.parametrize(
    ("norms", "expected"),
    [
        (["input_layernorm", "post_attention_layernorm"], "post_attention_layernorm"),
        (
            ["post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"],
            "pre_feedforward_layernorm",
        ),
        (["post_attention_layernorm", "post_feedforward_layernorm"], None),
        (["input_layernorm"], None),
    ],
)
def test_which_norm_reads_the_residual_depends_on_the_family(norms, expected):
    model = torch.nn.Module()
    model.config = SimpleNamespace(model_type="llava")
    model.language_model = torch.nn.Module()
    model.language_model.layers = torch.nn.ModuleList([Layer(*norms)])
    assert residual_norm(model) == expected


def test_outcomes_are_those_of_the_vectors_kept_in_memory(transformer, tmp_path):
    data = scenes_data(SIZES, 0)
    test, calibration = data.splits["test"], data.splits["calibration"]
    views = [View(), View(LAST, "lasttoken"), View("layers.1")]
    judge_views(transformer, data, ONE_WORD, views, 16, tmp_path, no_progress)
    assert [path.name for path in tmp_path.iterdir()] == ["outcomes.safetensors"]
    found = load_outcomes(tmp_path)
    assert set(found) == {(view, after) for view in views for after in ("nothing", "centring")}
    readouts = [Readout(ONE_WORD, view.site, view.pooling) for view in views]
    fitted_on, judged_on = (
        collect_pooled(transformer, c.items, readouts, 16) for c in (calibration, test)
    )
    for view, readout in zip(views, readouts, strict=True):
        raw = judged_on[readout].numpy()
        kind_means = [
            fitted_on[readout].numpy()[calibration.kinds() == kind].mean(0) for kind in range(3)
        ]
        centred = raw - np.stack([kind_means[kind] for kind in test.kinds()])
        for after, x in (("nothing", raw), ("centring", centred)):
            unit = x / np.linalg.norm(x, axis=1, keepdims=True)
            expected = evaluate_embeddings(unit, unit, test)
            for task, hits in expected.hits_by_task.items():
                same = found[view, after].hits_by_task[task] == hits
                assert same.mean() > 0.98, (view, after, task)  # rounding may break a tie
