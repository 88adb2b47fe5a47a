"""What real activations are like: the first token is a sink. The built-in model has none.

These pin facts that other parts are built for (sink detection, the input scale of SAEs, means).
"""

from __future__ import annotations

import pytest
import torch

from patch_retriever.backbones.load import load_backbone, set_readout
from patch_retriever.backbones.readout import LAST, PLAIN, Readout
from patch_retriever.backbones.roles import ROLES, TokenRoles
from patch_retriever.probe import Probe
from patch_retriever.scenes.render import render
from patch_retriever.scenes.world import Thing, make_scene

SCENE = make_scene(Thing(4, "heart", "red", "large", "solid"), background="black")
TEXT = "A man in a red shirt rides a bicycle down the street while two dogs run beside him"
CHATS = [
    [{"role": "user", "content": [{"type": "text", "text": TEXT}]}],
    [{"role": "user", "content": [{"type": "image", "image": render(SCENE)}]}],
]
LAYERS = [f"layers.{n}" for n in range(30)]


@pytest.fixture(scope="module", params=["real_llava", "real_idefics3"])
def read(request):
    """Per item: the norm of every token after every layer, and the tokens' roles."""
    transformer = load_backbone(str(request.getfixturevalue(request.param)))
    set_readout(transformer, Readout(PLAIN))
    features = transformer.preprocess(CHATS)
    roles_nt = TokenRoles(transformer)(features)
    found = Probe(transformer).read(features, [*LAYERS, LAST])
    mask_nt = features["attention_mask"].bool()
    return [
        ({site: h_ntd[n][mask_t].norm(dim=-1) for site, h_ntd in found.items()}, roles_t[mask_t])
        for n, (mask_t, roles_t) in enumerate(zip(mask_nt, roles_nt, strict=True))
    ]


def test_the_first_token_is_a_sink_from_layer_2_to_the_last(read):
    for norms, _ in read:
        for n in (2, *range(11, 29)):
            norm_t = norms[f"layers.{n}"]
            assert norm_t[0] > 10 * norm_t[1:].median(), n


def test_in_the_deep_layers_it_is_the_same_for_every_item(read):
    (text, _), (image, _) = read
    for n in range(11, 28):
        first, other = (norms[f"layers.{n}"][0] for norms in (text, image))
        assert 20_000 < first < 30_000, n
        assert abs(first - other) < 0.05 * first, n


def test_the_final_norm_takes_the_sink_away(read):
    for norms, _ in read:
        assert norms[LAST].max() < 2 * norms[LAST].median()


def test_other_norms_grow_with_depth(read):
    norms, _ = read[0]
    medians = [float(norms[site][1:].median()) for site in ("layers.2", "layers.14", "layers.28")]
    assert medians[0] < medians[1] < medians[2]
    assert 300 < medians[2] < 1000


def test_the_sink_is_no_content(read):
    for (norms, roles_t), content in zip(read, ("text", "image"), strict=True):
        assert ROLES[int(roles_t[0])] == "special"
        of_content_t = norms["layers.14"][roles_t == ROLES.index(content)]
        assert len(of_content_t) >= 10
        assert torch.isfinite(of_content_t).all()
