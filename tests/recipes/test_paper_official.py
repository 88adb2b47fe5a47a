"""The paper's way of embedding and whitening, against independent forms of the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from families import missing
from paper.concepts import removals, top_concepts
from paper.measuring import on_device, recalls
from paper.official import (
    MODELS,
    POOLINGS,
    Poolings,
    Resized,
    asked,
    load_official,
    official_prompt,
    with_poolings,
)
from paper.whitening import Spectrum
from patch_retriever.backbones.load import load_backbone, with_readout
from patch_retriever.backbones.readout import Readout
from patch_retriever.errors import UserError
from patch_retriever.items import Item
from patch_retriever.pictures.picture import PictureFile, in_memory
from patch_retriever.retrieval.comparison.baselines import MappedVectors
from patch_retriever.retrieval.encoder import Encoder
from patch_retriever.retrieval.readers.benchmarks.mbeir_tasks import DIRECTIONS
from patch_retriever.retrieval.tasks import RetrievalTask
from patch_retriever.sae.model import SparseAutoencoder


class Plain:
    """A picture in memory."""

    name = "a plain picture"

    def __init__(self, colour: str = "red") -> None:
        self.colour = colour

    def open(self):
        picture = Image.new("RGB", (90, 40), self.colour)
        picture.paste("white", (0, 0, 20, 40))
        return picture

    def content_hash(self):
        return self.colour


ITEMS = [Item("a cat"), Item(picture=Plain()), Item("two small dogs", Plain("blue"))]
IT2I = official_prompt("it->i")


def official_nd(model, weights, items, prompt, dtype="float32"):
    """Unit vectors as the recipe makes them."""
    transformer = load_official(model, str(weights), dtype)
    encoder = Encoder(with_poolings(transformer, ["mean"]), model.name)
    pooled_nd = encoder.pooled(asked(items, prompt, model), "document")
    return pooled_nd / np.linalg.norm(pooled_nd, axis=1)[:, None]


def mean_unit(hidden_1td):
    vector_d = hidden_1td[0].double().mean(0)
    return (vector_d / vector_d.norm()).numpy()


def test_prompts_are_those_of_the_official_code():
    said = {d: official_prompt(d) for d in DIRECTIONS.values()}
    assert {p.text for p in said.values()} == {"\nSummarize the above sentence in one word: "}
    assert {p.image for p in said.values()} == {"\nSummarize the above image in one word: "}
    together = "\nSummarize above image and sentence in one word: "
    assert said["t->it"].both == said["it->t"].both == together
    question = "\nSummarize the above image with the question in one word: "
    assert said["it->i"].both == question
    assert said["it->it"].both == "\nSummarize the above image and the sentence in one word: "


@pytest.mark.parametrize("family", ["llava", "qwen2-vl"])
def test_a_prompt_in_the_text_is_a_prompt_in_the_readout(stand_in, family):
    if lacking := missing(family):
        pytest.skip(f"needs {', '.join(lacking)}")
    found_nd = official_nd(MODELS["qwen2-vl"], stand_in(family), ITEMS, IT2I)
    model = with_readout(load_backbone(str(stand_in(family))), Readout(IT2I))
    expected_nd = model.encode([item.load() for item in ITEMS])
    assert np.abs(found_nd - expected_nd).max() < 1e-5


def test_paligemma_reads_a_black_picture_before_a_text(stand_in):
    from transformers import AutoProcessor, PaliGemmaForConditionalGeneration

    folder = stand_in("paligemma2")
    processor = AutoProcessor.from_pretrained(folder)
    model = PaliGemmaForConditionalGeneration.from_pretrained(folder).eval()
    found_nd = official_nd(MODELS["paligemma2"], folder, ITEMS, IT2I)
    for item, found_d in zip(ITEMS, found_nd, strict=True):
        black = Image.fromarray(np.zeros((112, 112, 3), dtype=np.uint8))
        picture = black if item.picture is None else item.picture.open()
        text = "<image>" + (item.text or "") + getattr(IT2I, item.kind)
        inputs = processor(text=[text], images=[picture], return_tensors="pt")
        # as transformers 4.57 did for what the official collator leaves of the inputs
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        inputs.pop("labels", None)
        with torch.no_grad():
            hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
        assert np.abs(mean_unit(hidden) - found_d).max() < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chameleon_reads_squares_and_no_blanks_around_a_text(stand_in, dtype):
    from transformers import AutoProcessor, ChameleonForConditionalGeneration

    folder = stand_in("chameleon")
    processor = AutoProcessor.from_pretrained(folder)
    own = getattr(torch, dtype)
    model = ChameleonForConditionalGeneration.from_pretrained(folder, dtype=own).eval()
    items = [*ITEMS, Item("  blanks before")]
    found_nd = official_nd(MODELS["chameleon"], folder, items, IT2I, dtype)
    for item, found_d in zip(items, found_nd, strict=True):
        text, pictures = (item.text or "") + getattr(IT2I, item.kind), None
        if item.picture is not None:
            text = "<image>" + text
            pictures = [item.picture.open().resize((224, 224), Image.Resampling.LANCZOS)]
        inputs = processor(text=[text.strip()], images=pictures, return_tensors="pt")
        if pictures is not None:
            inputs["pixel_values"] = inputs["pixel_values"].to(own)
        with torch.no_grad():
            hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
        assert np.abs(mean_unit(hidden) - found_d).max() < (1e-5 if dtype == "float32" else 2e-3)


def test_qwen3_is_read_before_the_final_norm(stand_in):
    if lacking := missing("qwen3-vl"):
        pytest.skip(f"needs {', '.join(lacking)}")
    folder, prompt = stand_in("qwen3-vl"), official_prompt("i->t")
    found_nd = official_nd(MODELS["qwen3-vl"], folder, ITEMS, prompt)
    transformer = with_readout(load_backbone(str(folder)), Readout(prompt))[0]
    caught = []
    last = transformer.model.language_model.layers[-1]
    last.register_forward_hook(
        lambda _m, _i, out: caught.append(out[0] if isinstance(out, tuple) else out)
    )
    for item, found_d in zip(ITEMS, found_nd, strict=True):
        with torch.no_grad():
            after = transformer(transformer.preprocess([item.load()]))["token_embeddings"]
        assert np.abs(mean_unit(caught[-1]) - found_d).max() < 1e-5
        assert np.abs(mean_unit(after) - found_d).max() > 1e-3


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_half_precision_gives_about_the_same(stand_in, model):
    if lacking := missing(model.name):
        pytest.skip(f"needs {', '.join(lacking)}")
    whole_nd = official_nd(model, stand_in(model.name), ITEMS, IT2I)
    half_nd = official_nd(model, stand_in(model.name), ITEMS, IT2I, dtype=model.dtype)
    assert np.abs(whole_nd - half_nd).max() > 1e-6, "not in half precision"
    cosines_n = (whole_nd * half_nd).sum(1)
    # Chameleon's pictures become words of a book, and near ties among these fall otherwise
    alike = slice(0, 1) if model.name == "chameleon" else slice(None)
    assert (cosines_n[alike] > 0.999).all(), cosines_n


@given(st.integers(0, 2**16), st.booleans())
@settings(max_examples=20, deadline=None)
def test_poolings_see_every_token_and_no_padding(seed, left):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 7, 4)
    tokens_ntd = rng.normal(size=(4, 7, 5)).astype(np.float32)
    places_t = np.arange(7)
    mask_nt = (places_t >= 7 - lengths[:, None]) if left else (places_t < lengths[:, None])
    features = {
        "token_embeddings": torch.from_numpy(tokens_ntd),
        "attention_mask": torch.from_numpy(mask_nt.astype(int)),
    }
    out_nw = Poolings(5, POOLINGS)(features)["sentence_embedding"].numpy()
    for tokens_td, mask_t, out_w in zip(tokens_ntd, mask_nt, out_nw, strict=True):
        own = tokens_td[mask_t]
        expected = np.concatenate([own[-1], own.max(0), own.min(0), own.mean(0)])
        assert np.allclose(out_w, expected, atol=1e-5)


def test_an_overflow_is_said():
    features = {
        "token_embeddings": torch.full((1, 2, 3), torch.inf).half(),
        "attention_mask": torch.ones(1, 2),
    }
    with pytest.raises(UserError, match=r"overflow in torch\.float16; run with --dtype bfloat16"):
        Poolings(3, ("mean",))(features)


def unit(rng, n, d):
    x_nd = rng.normal(size=(n, d)) * np.linspace(0.1, 2, d) + 1
    return (x_nd / np.linalg.norm(x_nd, axis=1, keepdims=True)).astype(np.float32)


def whitened(x_nd, alpha):
    """By the covariance of everything at once, through an SVD, as the official code does it."""
    centred_nd = torch.from_numpy(x_nd.astype(np.float64) - x_nd.astype(np.float64).mean(0))
    d = x_nd.shape[1]
    covariance = torch.cov(centred_nd.T)
    shrunk = covariance * (1 - alpha) + torch.eye(d) * (alpha * covariance.diagonal().sum() / d)
    u, s, _ = torch.linalg.svd(shrunk)
    white_nd = centred_nd @ (u @ torch.diag((s + 1e-5) ** -0.5) @ u.T)
    return torch.nn.functional.normalize(white_nd, dim=1).numpy()


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("n", [9, 400])  # fewer and more than dimensions
def test_whitening_is_the_official_one(alpha, n):
    x_nd = unit(np.random.default_rng(n), n, 24)
    spectrum = Spectrum.of(x_nd)
    found = MappedVectors(x_nd, spectrum.whiten(alpha), np.zeros(n, np.int8))[:]
    assert np.abs(found - whitened(x_nd, alpha)).max() < 1e-4
    if alpha == 1:  # all of it shrunk: centring and one scale
        centred = MappedVectors(x_nd, spectrum.centre(), np.zeros(n, np.int8))[:]
        assert np.abs(found - centred).max() < 1e-5


def test_pca_whitening_is_zca_in_other_axes():
    x_nd = unit(np.random.default_rng(0), 300, 12)
    spectrum, kinds = Spectrum.of(x_nd), np.zeros(300, np.int8)
    zca_nd = MappedVectors(x_nd, spectrum.whiten(0), kinds)[:]
    pca_nd = MappedVectors(x_nd, spectrum.whiten_pca(), kinds)[:]
    assert np.abs(zca_nd @ zca_nd.T - pca_nd @ pca_nd.T).max() < 1e-4
    assert np.abs(zca_nd - pca_nd).max() > 0.1


def test_common_axes_centre_each_side_by_itself():
    rng = np.random.default_rng(1)
    a_nd, b_nd = unit(rng, 200, 8), -unit(rng, 100, 8)
    both = Spectrum.of(a_nd, b_nd)
    centred = np.concatenate([a_nd - a_nd.mean(0), b_nd - b_nd.mean(0)]).astype(np.float64)
    assert np.allclose(both.values_d, np.linalg.eigvalsh(centred.T @ centred / 299), atol=1e-6)


@pytest.fixture
def task():
    rng = np.random.default_rng(0)
    qrels = {str(q): {f"c{c}": 1 for c in rng.integers(0, 60, 2)} for q in range(39)}
    qrels["39"] = {"elsewhere": 1}
    return RetrievalTask(
        "t",
        "test",
        "i->t",
        [str(q) for q in range(40)],
        [Item("q")] * 40,
        [f"c{c}" for c in range(60)],
        [Item("c")] * 60,
        qrels,
    )


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])  # the second counts as another device
def test_recalls_are_hits_of_all_queries(task, device):
    rng = np.random.default_rng(3)
    queries_qd, candidates_nd = unit(rng, 40, 16), unit(rng, 60, 16)
    order_qn = np.argsort(-(queries_qd @ candidates_nd.T), axis=1)
    expected = []
    for k in (1, 5, 10):
        hits = sum(any(f"c{c}" in task.qrels[str(q)] for c in order_qn[q, :k]) for q in range(40))
        expected.append(100 * hits / 40)  # the one without a positive in the pool counts, too
    assert recalls(task, [queries_qd, candidates_nd], device) == pytest.approx(expected)


def test_a_search_by_chunks_finds_what_one_product_does(monkeypatch):
    monkeypatch.setattr("paper.measuring.CHUNK", 7)
    rng = np.random.default_rng(4)
    queries_qd, candidates_nd = unit(rng, 9, 8), unit(rng, 40, 8)
    scores_qk, found_qk = on_device(candidates_nd, "cpu", queries_at_once=4)(queries_qd, 6)
    products_qn = queries_qd @ candidates_nd.T
    order_qk = np.argsort(-products_qn, axis=1)[:, :6]
    assert np.array_equal(found_qk, order_qk)
    assert np.allclose(scores_qk, np.take_along_axis(products_qn, order_qk, 1), atol=1e-6)


def test_the_top_concepts_are_those_of_the_papers_formula():
    generator = torch.Generator().manual_seed(0)
    d, c, n = 12, 300, 20
    dictionary_cd = torch.nn.functional.normalize(torch.randn(c, d, generator=generator), dim=1)
    zero_c = torch.zeros(c)
    sae = SparseAutoencoder(dictionary_cd.T, zero_c, dictionary_cd, torch.zeros(d), zero_c, k=5)
    pooled_nd = torch.randn(2 * n, d, generator=generator)
    z_nc = sae.encode(pooled_nd)
    image_nc, text_nc = z_nc[:n], z_nc[n:]
    m_cc = dictionary_cd @ dictionary_cd.T
    attribution_c = (image_nc * (text_nc @ m_cc) + text_nc * (image_nc @ m_cc)).mean(0)
    top = attribution_c.argsort(descending=True)[:3]
    assert torch.equal(top_concepts(sae, pooled_nd), dictionary_cd[top])


def test_a_removal_leaves_nothing_of_its_subspace():
    top_md = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    found = removals(top_md)
    assert list(found) == [f"{what}, rank {r}" for r in (1, 4, 6) for what in ("removal", "random")]
    (whole,) = found["removal, rank 6"]
    x_nd = torch.randn(5, 20)
    assert (x_nd @ whole.weight_gde[0] @ top_md.T).abs().max() < 1e-4
    for name, steps in found.items():
        assert len(steps) == (1 if name.startswith("removal") else 3)
        for step in steps:
            rank = int(name.split()[-1])
            assert torch.linalg.matrix_rank(step.weight_gde[0], atol=1e-4) == 20 - rank


def test_a_resized_picture_is_read_before_it_is_opened(tmp_path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    resized = Resized(PictureFile(tmp_path / "a.png"), 8)
    ready = in_memory(resized)
    assert (ready.name, ready.content_hash()) == (resized.name, resized.content_hash())
    (tmp_path / "a.png").unlink()
    assert ready.open().size == (8, 8)
