"""Heat: concepts' activations on every token, whatever the batch, and the grid of the image."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest
import torch

from handmade import ITEMS, READOUTS, C, make_patches, make_sae
from patch_retriever.backbones.cut import cut_at
from patch_retriever.backbones.load import load_backbone
from patch_retriever.backbones.readout import LAST
from patch_retriever.backbones.roles import ROLES, image_grids
from patch_retriever.heat import TokenHeat, _pieces, token_heat, token_influence
from patch_retriever.sae.model import SparseAutoencoder

IMAGE, TEXT = ROLES.index("image"), ROLES.index("text")
CONCEPTS = torch.tensor([40, 3, 17, 55])
GRID = (6, 6)


@pytest.fixture(scope="module", params=READOUTS, ids=lambda readout: readout.name)
def made(request, random_model):
    """A backbone, a readout, an SAE, features of the items, and heat on the items."""
    sae, features, _ = make_patches(str(random_model), request.param)
    transformer = load_backbone(str(random_model))
    heats = token_heat(transformer, request.param, sae, ITEMS, CONCEPTS)
    return transformer, request.param, sae, features, heats


def same(a, b):
    codes = torch.allclose(a.codes_tm, b.codes_tm, atol=1e-4)
    weights = torch.allclose(a.weights_t, b.weights_t)
    return a.tokens == b.tokens and torch.equal(a.roles_t, b.roles_t) and codes and weights


def test_pooled_by_its_weights_heat_is_the_code_of_the_pooled_vector(made):
    _, _, _, features, heats = made
    expected_nm = features.codes.dense()[:, CONCEPTS]
    assert int((expected_nm > 0).sum()) > 5
    for heat, expected_m in zip(heats, expected_nm, strict=True):
        assert torch.allclose(heat.weights_t @ heat.codes_tm, expected_m, atol=1e-4)
        assert float(heat.weights_t.sum()) == pytest.approx(1)


def test_the_text_is_what_the_text_tokens_say(made):
    for item, heat in zip(ITEMS, made[-1], strict=True):
        said = [
            t for t, role in zip(heat.tokens, heat.roles_t.tolist(), strict=True) if role == TEXT
        ]
        assert "".join(said) == (item.text or "")


def test_every_token_has_everything_and_padding_has_nothing(made):
    for heat in made[-1]:
        n = len(heat.tokens)
        assert heat.roles_t.shape == heat.weights_t.shape == (n,)
        assert heat.roles_t.dtype == torch.uint8
        assert heat.codes_tm.shape == (n, len(CONCEPTS))
        assert "<pad>" not in heat.tokens


@pytest.mark.parametrize("batch_size", [1, 5])
def test_batches_and_their_order_change_nothing(made, batch_size):
    transformer, readout, sae, _, heats = made
    order = random.Random(batch_size).sample(range(len(ITEMS)), len(ITEMS))
    items = [ITEMS[i] for i in order]
    found = token_heat(transformer, readout, sae, items, CONCEPTS, batch_size)
    assert all(same(heat, heats[i]) for heat, i in zip(found, order, strict=True))


def test_the_image_is_a_grid_of_its_tokens_in_their_order(made):
    for item, heat in zip(ITEMS, made[-1], strict=True):
        for j in range(len(CONCEPTS)):
            if item.picture is None:
                assert heat.patches(j) is None
                continue
            codes_hw = heat.patches(j)
            assert codes_hw.shape == GRID
            assert torch.equal(codes_hw.flatten(), heat.codes_tm[heat.roles_t == IMAGE, j])


def test_where_nothing_is_known_of_the_layout_the_image_is_one_row():
    heat = TokenHeat(
        ["a", "b", "c"], torch.tensor([IMAGE, TEXT, IMAGE]), torch.ones(3), torch.eye(3)
    )
    assert heat.patches(2).tolist() == [[0.0, 1.0]]


def test_heat_is_of_the_readouts_own_prompt(made, random_model):
    """Whatever prompt the backbone had before."""
    _, readout, sae, _, heats = made
    transformer = load_backbone(str(random_model))
    for other in READOUTS:
        token_heat(transformer, other, sae, ITEMS[:1], CONCEPTS)
    assert same(token_heat(transformer, readout, sae, ITEMS[:1], CONCEPTS)[0], heats[0])


# influence


def left_without(transformer, readout, sae, item, hidden, j):
    """Concept j in the pooled vector, the decoder called directly with one token's embedding
    replaced by the mean."""
    seen = {}
    decoder = transformer.model.language_model
    handle = decoder.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        transformer(transformer.preprocess([item.load()]))
        handle.remove()
        embeddings_1td = seen["inputs_embeds"].clone()
        n = embeddings_1td.shape[1]
        embeddings_1td[0, hidden] = sum(seen["inputs_embeds"][0]) / n
        out = decoder(inputs_embeds=embeddings_1td, output_hidden_states=True)
    tokens_td = out.last_hidden_state[0]
    if readout.site != LAST:
        tokens_td = out.hidden_states[int(readout.site.removeprefix("layers.")) + 1][0]
    codes_t = sae.encode(tokens_td)[:, j]
    if readout.pooling != "lasttoken":
        return sum(float(code) for t, code in enumerate(codes_t) if t != hidden) / n
    return 0.0 if hidden == n - 1 else float(codes_t[-1])


@pytest.mark.parametrize("readout", READOUTS, ids=lambda readout: readout.name)
@pytest.mark.parametrize("number", [1, 4, 8], ids=["text", "image", "both"])
def test_influence_is_what_the_pooled_activation_loses_without_a_token(
    readout, number, random_model
):
    transformer, sae, item = load_backbone(str(random_model)), make_sae(0.1), ITEMS[number]
    for layer in transformer.model.language_model.layers:  # random tokens hardly see each other
        layer.self_attn.v_proj.weight.mul_(20)
        layer.self_attn.o_proj.weight.mul_(20)
    (heat,) = token_heat(transformer, readout, sae, [item], CONCEPTS)
    (found,) = token_influence(transformer, readout, sae, [item], CONCEPTS, batch_size=7)
    ended, n = cut_at(transformer, readout.cut), len(heat.tokens)
    assert found.codes_tm.shape == (n, len(CONCEPTS))
    assert found.patches(0) is None if number == 1 else found.patches(0).shape == GRID
    assert float(found.codes_tm[:-1].abs().max()) > 0.01
    pooled_m = heat.weights_t @ heat.codes_tm
    for hidden in (0, 1, 3, n // 2, n - 2, n - 1):
        for j, concept in enumerate(CONCEPTS.tolist()):
            left = left_without(ended, readout, sae, item, hidden, concept)
            expected = float(pooled_m[j]) - left
            assert float(found.codes_tm[hidden, j]) == pytest.approx(expected, abs=1e-4)


def test_influence_leaves_the_backbone_as_it_was(made):
    transformer, readout, sae, _, heats = made
    token_influence(transformer, readout, sae, ITEMS[:1], CONCEPTS)
    assert same(token_heat(transformer, readout, sae, ITEMS[:1], CONCEPTS)[0], heats[0])


# some concepts alone


@pytest.mark.parametrize("k", [None, 5])
def test_some_concepts_alone_have_the_codes_that_they_have_among_all(k):
    sae = make_sae(1.0)
    sae = SparseAutoencoder(
        sae.W_enc_dc, sae.b_enc_c + 0.1, sae.W_dec_cd, sae.b_dec_d, sae.threshold_c, k
    )
    x_nd = torch.randn(50, sae.d_in, generator=torch.Generator().manual_seed(3))
    codes_nc = sae.encode(x_nd)
    assert 0 < int((codes_nc[:, CONCEPTS] > 0).sum()) < 50 * len(CONCEPTS)
    assert torch.allclose(sae.encode_some(x_nd, CONCEPTS), codes_nc[:, CONCEPTS], atol=1e-5)
    assert sae.encode_some(x_nd, torch.arange(C)).shape == (50, C)


# the layout of image tokens

PLACE, WORD = 9, 1


def config(**values):
    return SimpleNamespace(image_token_id=PLACE, **values)


def ids(*rows):
    """Items padded on the left."""
    longest = max(map(len, rows))
    return torch.tensor([[0] * (longest - len(row)) + row for row in rows])


def test_a_square_run_is_a_grid():
    features = {"input_ids": ids([WORD, *[PLACE] * 9, WORD], [WORD] * 3, [PLACE] * 4)}
    assert image_grids(config(), features) == [(3, 3), None, (2, 2)]


@pytest.mark.parametrize(
    "row",
    [[PLACE] * 6, [PLACE, PLACE, WORD, PLACE, PLACE], [WORD, PLACE, WORD, *[PLACE] * 8]],
    ids=["not square", "ends of lines", "tiles"],
)
def test_another_layout_is_one_row(row):
    assert image_grids(config(), {"input_ids": ids(row)}) == [(1, row.count(PLACE))]


def test_pictures_of_many_sizes_are_one_row():
    features = {"input_ids": ids([PLACE] * 9), "image_sizes": torch.tensor([[30, 40]])}
    assert image_grids(config(), features) == [(1, 9)]


def test_what_qwen_says_is_taken_after_its_merger():
    features = {
        "input_ids": ids([WORD, *[PLACE] * 6], [WORD], [PLACE] * 4, [*[PLACE] * 4, WORD]),
        "image_grid_thw": torch.tensor([[1, 4, 6], [1, 2, 8], [1, 4, 6]]),
    }
    qwen = config(vision_config=SimpleNamespace(spatial_merge_size=2))
    assert image_grids(qwen, features) == [(2, 3), None, (1, 4), (1, 4)]


# tokens as text


def test_words_of_sentencepiece_keep_their_spaces():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "▁a", "▁red", "▁st", "ar", "."]
    made = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    assert _pieces(tokenizer, [1, 2, 3, 4, 5]) == [" a", " red", " st", "ar", "."]


def test_as_text_words_have_their_activations_and_images_are_shaded():
    tokens = ["<u>", "<i>", "<i>", "<i>", "<i>", " red", " star", "\nsay"]
    roles_t = torch.tensor([3, *[IMAGE] * 4, TEXT, TEXT, 2], dtype=torch.uint8)
    codes_t = torch.tensor([0.0625, 0, 0.5, 1, 2, 1.25, 0, 0.125])  # the first is too little
    heat = TokenHeat(tokens, roles_t, torch.zeros(8), codes_t[:, None], (2, 2))
    assert heat.to_text(0).splitlines() == [
        "<u> red[1.25] star\\nsay[0.125]",
        "image, at most 2:",
        "|  ░░|",
        "|▒▒██|",
    ]


def test_as_json_it_holds_everything(made):
    heat = made[-1][8]
    values = json.loads(json.dumps(heat.to_json(1)))
    assert values["tokens"] == heat.tokens
    assert values["roles"][0] == "special"
    assert values["values"] == pytest.approx(heat.codes_tm[:, 1].tolist())
    assert [len(row) for row in values["patches"]] == [GRID[1]] * GRID[0]
    assert made[-1][0].to_json(0)["patches"] is None


def test_as_text_an_image_without_the_concept_is_not_drawn():
    heat = TokenHeat(["<i>"] * 4, torch.full((4,), IMAGE), torch.ones(4), torch.zeros(4, 1), (2, 2))
    assert heat.to_text(0) == "\nimage: nowhere"
