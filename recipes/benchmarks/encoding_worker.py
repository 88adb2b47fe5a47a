"""What the processes of `encoding.py` do: write the model, or encode in one of the ways."""

from __future__ import annotations

import json
import random
import time
from collections import defaultdict
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from reporting import Peak

from patch_retriever.items import Item
from patch_retriever.pictures.picture import PictureFile

ITEMS, MODEL, BASE, CUT, EXPORT = "items.jsonl", "model", "base", "cut", "export"


def make(told: Connection, root: Path, size: dict[str, int], dtype: str) -> None:
    """Write the model, the base and the export as sentence-transformers folders, and the items;
    tell how many weights the model has."""
    write_items(root, size)
    torch.manual_seed(0)
    parameters = write_model(root / MODEL, size, dtype)
    write_folders(root, size, dtype)
    told.send(parameters)


def write_items(root: Path, size: dict[str, int]) -> None:
    """Texts of one to four captions, pictures of all sizes up to the longest side, and both."""
    from patch_retriever.scenes.tasks import scenes_collection

    rng, noise = random.Random(0), np.random.default_rng(0)
    captions = [i.text for i in scenes_collection("test", 100, 0).items if i.text]

    def text(sentences: int) -> str:
        return " ".join(rng.choice(captions) for _ in range(sentences))

    rows: list[dict[str, str]] = []
    for kind in ("texts", "pictures", "both"):
        for _ in range(size[kind]):
            row = {}
            if kind != "pictures":
                row["text"] = text(rng.randint(1, 4))
            if kind != "texts":
                sides = [int(size["longest_side"] * rng.uniform(0.1, 1)) for _ in range(2)]
                small = noise.integers(0, 256, (sides[1] // 8 + 1, sides[0] // 8 + 1, 3), np.uint8)
                row["image"] = f"{len(rows)}.jpg"
                picture = Image.fromarray(small).resize((sides[0], sides[1]))
                picture.save(root / row["image"], quality=90)
            rows.append(row)
    rng.shuffle(rows)
    (root / ITEMS).write_text("\n".join(map(json.dumps, rows)))


def read_items(root: Path) -> list[Item]:
    """What `write_items` wrote."""
    rows = [json.loads(line) for line in (root / ITEMS).read_text().splitlines()]
    return [
        Item(row.get("text"), PictureFile(root / row["image"]) if "image" in row else None)
        for row in rows
    ]


def write_model(folder: Path, size: dict[str, int], dtype: str) -> int:
    """A LLaVA of random weights with the processor of the built-in model; how many weights."""
    from transformers import (
        AutoProcessor,
        LlavaConfig,
        LlavaForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    from patch_retriever.backbones.load import built_in_model

    processor: Any = AutoProcessor.from_pretrained(built_in_model())
    side, patch = size["image_size"], 16
    processor.image_processor.size = {"height": side, "width": side}
    processor.patch_size = patch
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=size["tower_width"],
            intermediate_size=size["tower_mlp"],
            num_hidden_layers=size["tower_layers"],
            num_attention_heads=size["tower_width"] // 64,
            image_size=side,
            patch_size=patch,
            vision_use_head=False,
        ),
        text_config=Qwen2Config(
            vocab_size=size["vocabulary"],
            hidden_size=size["width"],
            intermediate_size=size["mlp"],
            num_hidden_layers=size["layers"],
            num_attention_heads=size["heads"],
            num_key_value_heads=2,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
        ),
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(side // patch) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def write_folders(root: Path, size: dict[str, int], dtype: str) -> None:
    """The base with the paper's readout, the same with half of the decoder's layers, and the export
    of a patch of random concepts on the first."""
    from sentence_transformers import SentenceTransformer

    from patch_retriever.backbones.cut import cut_at
    from patch_retriever.backbones.load import load_backbone, with_readout
    from patch_retriever.backbones.readout import PAPER_READOUT
    from patch_retriever.patch.artefact import Patch
    from patch_retriever.patch.export import export_modules
    from patch_retriever.patch.operators import Affine, Subtract

    transformer = load_backbone(str(root / MODEL), dtype)
    with_readout(transformer, PAPER_READOUT).save(str(root / BASE), create_model_card=False)
    half = cut_at(transformer, f"layers.{size['layers'] // 2 - 1}")
    with_readout(half, PAPER_READOUT).save(str(root / CUT), create_model_card=False)
    d, concepts = transformer.get_embedding_dimension(), size["concepts"]
    directions_md = torch.nn.functional.normalize(torch.randn(concepts, d), dim=1)
    subtract = Subtract(
        concepts_m=torch.arange(concepts),
        strength_m=torch.ones(concepts),
        W_enc_dm=directions_md.T.contiguous(),
        b_enc_m=torch.zeros(concepts),
        threshold_m=torch.ones(concepts),
        W_dec_md=directions_md,
    )
    by_role = Affine("map", "role", torch.eye(d).repeat(2, 1, 1), 0.1 * torch.randn(2, d))
    about = {"readout": PAPER_READOUT.to_json(), "method": "random concepts"}
    patch = Patch("last_hidden_state", subtract, (by_role,), None, about)
    modules = [transformer, *export_modules(patch, d, PAPER_READOUT.pooling)]
    SentenceTransformer(modules=modules).save(str(root / EXPORT), create_model_card=False)
    patch.save(root / EXPORT / "patch")


Encode = Callable[[], NDArray[np.float32]]
Parts = defaultdict[str, float]


def in_memory(way: str, root: Path, batch_size: int, parts: Parts) -> Encode:
    """Base, cut, export or live, on decoded pictures."""
    from sentence_transformers import SentenceTransformer

    from patch_retriever.backbones.families import decoder_path
    from patch_retriever.retriever import PatchedRetriever

    model: Any
    if way == "live":
        model = PatchedRetriever.from_folder(root / EXPORT)
    else:
        folder = {"base": BASE, "cut": CUT, "export": EXPORT}[way]
        model = SentenceTransformer(str(root / folder), device="cpu")
        whole = model[0].model
        timed(whole.get_submodule(decoder_path(whole)), "forward", "decoder", parts)
    timed(model, "preprocess", "prepare", parts)
    timed(model, "forward", "model", parts)
    inputs = [item.load_plain() for item in read_items(root)]
    return lambda: model.encode_document(inputs, batch_size=batch_size, show_progress_bar=False)


def official(root: Path, parts: Parts) -> Encode:
    """As the paper's released code: `model(**batch, labels=..., output_hidden_states=True)`, the
    mean of the last hidden state over the attention mask, one item at a time."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(root / BASE)
    model: Any = AutoModelForImageTextToText.from_pretrained(root / MODEL).eval()
    timed(processor, "apply_chat_template", "prepare", parts)
    timed(model, "forward", "model", parts)
    chats = [item.load() for item in read_items(root)]

    def encode() -> NDArray[np.float32]:
        rows = []
        for chat in chats:
            batch = processor.apply_chat_template(
                chat, tokenize=True, return_dict=True, return_tensors="pt"
            )
            with torch.inference_mode():
                out = model(**batch, labels=batch["input_ids"], output_hidden_states=True)
                mask_nt1 = batch["attention_mask"][..., None]
                pooled_nd = (out.hidden_states[-1] * mask_nt1).sum(1) / mask_nt1.sum(1)
                rows.append(torch.nn.functional.normalize(pooled_nd, dim=1).float())
        return torch.cat(rows).numpy()

    return encode


def plain_loop(root: Path, batch_size: int, parts: Parts) -> Encode:
    """From files to a file as one writes it: open, encode, save."""
    from sentence_transformers import SentenceTransformer

    model: Any = SentenceTransformer(str(root / BASE), device="cpu")
    timed(model, "forward", "model", parts)
    items = read_items(root)

    def encode() -> NDArray[np.float32]:
        inputs = [item.load_plain() for item in items]
        rows_nd = model.encode_document(inputs, batch_size=batch_size, show_progress_bar=False)
        np.save(root / "plain.npy", rows_nd)
        return np.asarray(rows_nd)

    return encode


def ours(root: Path, batch_size: int, workers: int, parts: Parts) -> Encode:
    """From files to a file as `patch-retriever encode` does."""
    from patch_retriever.retrieval.encode import encode_file
    from patch_retriever.retrieval.load import load_encoder

    encoder = load_encoder(str(root / BASE), workers=workers)
    timed(encoder, "_run", "model", parts)
    items = read_items(root)

    def encode() -> NDArray[np.float32]:
        encode_file(encoder, items, root / "ours.npy", "document", batch_size)
        found: NDArray[np.float32] = np.load(root / "ours.npy")
        return found

    return encode


def timed(thing: Any, name: str, part: str, parts: Parts) -> None:
    """Add the seconds of every call of a method to a part."""
    method = getattr(thing, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            parts[part] += time.perf_counter() - began

    setattr(thing, name, call)


def serve(
    asked: Connection, way: str, root: Path, threads: int, batch_size: int, workers: int
) -> None:
    """Encode in one way whenever asked: `warm`, `round`, `end`."""
    torch.set_num_threads(threads)
    parts: Parts = defaultdict(float)
    encode = {
        "official": lambda: official(root, parts),
        "plain loop": lambda: plain_loop(root, batch_size, parts),
        "ours": lambda: ours(root, batch_size, workers, parts),
    }.get(way, lambda: in_memory(way, root, batch_size, parts))()
    rounds = 0
    with Peak() as peak:
        while (request := asked.recv()) != "end":
            began, busy = time.perf_counter(), time.process_time()
            rows_nd = encode()
            seconds, busy = time.perf_counter() - began, time.process_time() - busy
            asked.send({"seconds": seconds, "cpu_seconds": busy})
            if request == "round":
                rounds += 1
                continue
            parts.clear()
            if way == "base":
                np.save(root / "base.npy", rows_nd)
    apart = float(np.abs(rows_nd - np.load(root / "base.npy")).max())
    seconds_of = {part: seconds / rounds for part, seconds in parts.items()}
    asked.send({"peak_mib": peak.mib, "parts": seconds_of, "apart": apart})
