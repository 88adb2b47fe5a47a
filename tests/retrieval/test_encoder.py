"""Encoders: the same vectors as the model gives by itself, split where they are worth keeping."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Router
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2Model

from patch_retriever import export_patch
from patch_retriever.backbones.load import load_backbone, with_readout
from patch_retriever.backbones.readout import PAPER, Readout
from patch_retriever.errors import UserError
from patch_retriever.items import Item
from patch_retriever.patch.artefact import Patch
from patch_retriever.pictures.picture import PictureFile
from patch_retriever.retrieval.encoder import Encoder
from patch_retriever.retrieval.load import load_encoder
from patch_retriever.retriever import PatchedRetriever
from patch_retriever.runs import MARKER
from patch_retriever.scenes.tasks import scenes_collection

ITEMS = scenes_collection("test", 5, 0).items


@pytest.fixture(scope="module")
def encoder(finished_build):
    return load_encoder(str(finished_build))


def backbone(random_model: Path) -> SentenceTransformer:
    return with_readout(load_backbone(str(random_model)), Readout(PAPER))


@pytest.mark.parametrize("role", ["query", "document"])
def test_vectors_are_what_the_model_gives(encoder, finished_build, role):
    model = SentenceTransformer(str(finished_build))
    expected = getattr(model, f"encode_{role}")([item.load() for item in ITEMS])
    # other batches: rounding, as much as the build's patch stretches it (golden/result.json says)
    np.testing.assert_allclose(encoder.embed(ITEMS, role), expected, atol=1e-5)
    assert expected.shape[1] == encoder.dimension
    assert encoder.pooled(ITEMS, role).shape == (len(ITEMS), encoder.width)


def test_the_base_of_a_build_is_its_readout_without_its_patch(finished_build):
    base = load_encoder(f"{finished_build}@base")
    live = PatchedRetriever.from_folder(finished_build)
    expected = live.encode([item.load() for item in ITEMS], patch=False)
    np.testing.assert_allclose(base.embed(ITEMS, "query"), expected, atol=1e-6)


def test_a_patch_of_pooled_vectors_alone_shares_its_trunk_with_its_base(encoder, finished_build):
    base = load_encoder(f"{finished_build}@base")
    alone = Patch.load(finished_build / "patch").subtract is None
    assert (base.trunk_fingerprint == encoder.trunk_fingerprint) == alone
    assert base.fingerprint != encoder.fingerprint


@pytest.mark.parametrize("name", ["paligemma2", "chameleon", "llava"])
def test_a_bare_mllm_takes_texts_pictures_and_both(stand_in, name):
    folder = str(stand_in(name))
    transformer = load_backbone(folder)
    modules = [transformer, Pooling(transformer.get_embedding_dimension(), "mean"), Normalize()]
    model = SentenceTransformer(modules=modules, device="cpu")
    expected = model.encode([item.load() for item in ITEMS])
    np.testing.assert_allclose(load_encoder(folder).embed(ITEMS, "query"), expected, atol=1e-5)


def test_a_text_only_model_with_chats_refuses_pictures(random_model, tmp_path):
    config = Qwen2Config(
        vocab_size=2000,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    Qwen2Model(config).save_pretrained(tmp_path)
    of_mllm = AutoTokenizer.from_pretrained(random_model)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=of_mllm.backend_tokenizer, pad_token=of_mllm.pad_token
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | string }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path))
    assert "message" in encoder.modalities
    assert encoder.embed([Item("a red star")], "query").shape == (1, 32)
    picture = next(item for item in ITEMS if item.pictures)
    with pytest.raises(UserError, match="takes texts alone, and there are items with pictures"):
        encoder.embed([Item("a red star"), picture], "query")


def test_the_base_of_an_export_with_code_has_its_dtype_and_shares_its_trunk(stand_in, tmp_path):
    readout, patch = Readout(PAPER), Patch("last_hidden_state")
    transformer = load_backbone(str(stand_in("chameleon")), "bfloat16")
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr("patch_retriever.export.check_golden", lambda _: 0.0)
        export_patch(transformer, readout, patch, tmp_path / "coded", ITEMS[:1])
    assert (tmp_path / "coded" / "patched_transformer.py").is_file()
    encoder, base = (load_encoder(f"{tmp_path / 'coded'}{end}") for end in ("", "@base"))
    assert base.trunk_fingerprint == encoder.trunk_fingerprint
    live = PatchedRetriever.from_folder(tmp_path / "coded")
    assert live.dtype == torch.bfloat16
    expected = with_readout(transformer, readout).encode(
        [item.load() for item in ITEMS], convert_to_tensor=True
    )
    np.testing.assert_allclose(base.embed(ITEMS, "query"), expected.float(), atol=5e-2)


def test_the_fingerprint_is_of_the_content_and_not_of_the_place(encoder, finished_build, tmp_path):
    for name in ("run", "report"):
        assert (finished_build / name).is_dir()
    ignore = shutil.ignore_patterns("run", "report", "golden")
    moved = Path(shutil.copytree(finished_build, tmp_path / "moved", ignore=ignore))
    assert load_encoder(str(moved)).fingerprint == encoder.fingerprint
    code = (
        "from patch_retriever.retrieval.load import load_encoder;"
        f"print(load_encoder({str(moved)!r}).fingerprint)"
    )
    elsewhere = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert elsewhere.stdout.split()[-1] == encoder.fingerprint


def test_one_changed_weight_or_word_of_the_template_is_another_trunk(
    encoder, finished_build, tmp_path
):
    ignore = shutil.ignore_patterns("run", "report", "golden")
    for change in ("weight", "template"):
        folder = Path(shutil.copytree(finished_build, tmp_path / change, ignore=ignore))
        if change == "weight":
            tensors = load_file(folder / "model.safetensors")
            name = next(n for n in tensors if n.endswith("q_proj.weight"))
            tensors[name][0, 0] += 0.5
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        else:
            path = folder / "chat_template.jinja"
            path.write_text(path.read_text() + "!")
        assert load_encoder(str(folder)).trunk_fingerprint != encoder.trunk_fingerprint


def test_another_head_leaves_the_trunk_alone(random_model):
    model = backbone(random_model)
    width = model.get_embedding_dimension()
    patched = SentenceTransformer(modules=[*list(model)[:2], Dense(width, 7), Normalize()])
    one, other = Encoder(model, "one"), Encoder(patched, "other")
    assert one.trunk_fingerprint == other.trunk_fingerprint
    assert one.store_key("query") == other.store_key("document")
    assert one.fingerprint != other.fingerprint
    pooled = one.pooled(ITEMS, "document")
    np.testing.assert_allclose(
        other.finish(pooled, "document"), other.embed(ITEMS, "document"), atol=1e-6
    )


def test_queries_and_documents_take_their_own_branch_of_the_head(random_model):
    model = backbone(random_model)
    width = model.get_embedding_dimension()
    branches = {"query": [Dense(width, 6)], "document": [Dense(width, 6)]}
    router = Router(branches, default_route="document")
    model = SentenceTransformer(modules=[*list(model)[:2], router, Normalize()])
    encoder = Encoder(model, "routed")
    loaded = [item.load() for item in ITEMS]
    for role, encode in (("query", model.encode_query), ("document", model.encode_document)):
        np.testing.assert_allclose(encoder.embed(ITEMS, role), encode(loaded), atol=1e-6)


def test_prompts_of_the_model_and_of_the_caller(random_model):
    plain = backbone(random_model)
    model = SentenceTransformer(modules=list(plain), prompts={"query": "Find it."})
    encoder = Encoder(model, "prompted")
    loaded = [item.load() for item in ITEMS]
    own, none = encoder.embed(ITEMS, "query"), encoder.embed(ITEMS, "query", prompt="")
    np.testing.assert_allclose(own, model.encode_query(loaded), atol=1e-6)
    np.testing.assert_allclose(none, plain.encode(loaded), atol=1e-6)
    other = encoder.embed(ITEMS, "query", prompt="Say it.")
    np.testing.assert_allclose(other, model.encode_query(loaded, prompt="Say it."), atol=1e-6)
    assert abs(own - none).max() > 1e-4
    keys = {
        encoder.store_key("query"),
        encoder.store_key("query", ""),
        encoder.store_key("document"),
    }
    assert len(keys) == 2  # without a prompt, a query is stored where a document is


def test_a_model_of_dot_products_keeps_its_lengths(random_model):
    modules = list(backbone(random_model))[:2]
    model = SentenceTransformer(modules=modules, similarity_fn_name="dot")
    found = Encoder(model, "dot").embed(ITEMS, "query")
    np.testing.assert_allclose(found, model.encode([i.load() for i in ITEMS]), atol=1e-6)
    assert (abs(np.linalg.norm(found, axis=1) - 1) > 0.01).any()


def test_a_truncated_model_gives_short_unit_vectors(random_model):
    model = SentenceTransformer(modules=list(backbone(random_model)), truncate_dim=5)
    found = Encoder(model, "short").embed(ITEMS, "document")
    assert found.shape == (len(ITEMS), 5)
    torch.testing.assert_close(torch.tensor(found).norm(dim=1), torch.ones(len(ITEMS)))


def test_what_is_no_model_is_told(tmp_path, finished_build):
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / MARKER).write_text("{}")
    for name, words in (
        (tmp_path / "none", "no such model folder"),
        (tmp_path, "no model in this folder"),
        (unfinished, "its build has not finished; run the same build again"),
        (f"{tmp_path}@base", "no model in this folder"),
    ):
        with pytest.raises(UserError, match=words):
            load_encoder(str(name))
    with pytest.raises(UserError, match="device"):
        load_encoder(str(finished_build), device="abacus")


def test_a_text_with_the_name_of_a_picture_is_a_text(encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ITEMS[0].picture.open().save("a.png")
    named = encoder.embed([Item("a.png")], "query")
    assert np.isfinite(named).all()
    shown = encoder.embed([Item(picture=ITEMS[0].picture)], "query")
    assert abs(named - shown).max() > 1e-4


@pytest.mark.parametrize("workers", [1, 3])
def test_a_stream_gives_every_item_once_whatever_the_batches(encoder, workers):
    whole = encoder.pooled(ITEMS, "document", batch_size=len(ITEMS))
    streaming = Encoder(SentenceTransformer(encoder.name), "again", workers=workers)
    found = np.full_like(whole, np.nan)
    for positions, rows in streaming.stream(iter(ITEMS), "document", batch_size=2):
        assert len(positions) <= 2
        assert np.isnan(found[positions]).all()
        found[positions] = rows
    np.testing.assert_allclose(found, whole, atol=1e-5)


def test_a_bad_picture_in_the_middle_is_named(encoder, tmp_path):
    path = tmp_path / "cut.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n....")
    items = [*ITEMS, Item("with a text", PictureFile(path)), *ITEMS]
    with pytest.raises(UserError, match=r"cut\.png: not a readable image"):
        encoder.embed(items, "query", batch_size=4)


def test_nothing_gives_no_rows(encoder):
    assert encoder.pooled([], "query").shape == (0, encoder.width)
    assert encoder.embed([], "query").shape == (0, encoder.dimension)


def test_no_head_of_the_language_model_is_there(encoder):
    names = [name for name, _ in encoder._trunk.named_modules()]
    assert any("layers" in name for name in names)
    assert not any("lm_head" in name for name in names)
