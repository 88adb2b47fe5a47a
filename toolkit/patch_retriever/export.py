"""A backbone, a readout and a patch as a folder that sentence-transformers loads, with a proof."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer

from patch_retriever.backbones.adapter import FOLDER as ADAPTER
from patch_retriever.backbones.adapter import Merged, copy_adapter
from patch_retriever.backbones.cut import cut_at
from patch_retriever.backbones.families import n_layers
from patch_retriever.backbones.load import with_readout
from patch_retriever.backbones.readout import LAST, Readout
from patch_retriever.errors import UserError
from patch_retriever.files import allow_reading, write_json, write_text
from patch_retriever.golden import check_golden, write_golden
from patch_retriever.items import Item
from patch_retriever.patch.artefact import Patch
from patch_retriever.patch.deep import CODE, needs_code, patched_modules
from patch_retriever.patch.export import export_modules
from patch_retriever.report.card import short_card
from patch_retriever.retriever import PatchedRetriever

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer

_UNTIED = {
    "transformers": {
        "specifier": ">=5.23",
        "reason": "older ones read this model after its final norm instead of before it",
    }
}
"""What a readout at the last layer needs: `tie_last_hidden_states` in config.json."""


def export_patch(
    transformer: Transformer,
    readout: Readout,
    patch: Patch,
    folder: Path,
    golden_items: Sequence[Item],
    adapter: Path | None = None,
) -> float:
    """Write the model into `folder`, its patch into `folder/patch`, and check in a fresh process
    that it embeds `golden_items` as the live model does.

    Stock modules only, unless the patch has `layers` or an `adapter` (a folder in peft's layout)
    is to stay beside the backbone's weights, as `folder/adapter`: then the folder holds one file of
    code, `patched_transformer.py`, and its README says that it needs `trust_remote_code=True`.

    Returns:
        The largest absolute difference between the exported and the live embeddings.

    Raises:
        UserError: the folder cannot be written, the patch is not for this backbone and readout, or
            the export differs from the live model by more than 1e-5 (float32).
    """
    patch = replace(patch, about={**patch.about, "readout": readout.to_json()})
    # no layer behind the readout is exported
    transformer = cut_at(
        transformer, readout.cut or (readout.site if readout.site != LAST else None)
    )
    retriever = PatchedRetriever(with_readout(transformer, readout), patch)
    with_code = needs_code(patch, transformer) or adapter is not None
    if with_code:
        modules = patched_modules(transformer, patch, readout.pooling)
    else:
        width = transformer.get_embedding_dimension()
        modules = [transformer, *export_modules(patch, width, readout.pooling)]
    model = SentenceTransformer(
        modules=modules, device=str(retriever.device), prompts=readout.prompts
    )
    try:
        model.save(str(folder), create_model_card=False)
        if with_code:
            _add_code(folder)
        elif readout.site == f"layers.{n_layers(transformer.model) - 1}":
            _require(folder, _UNTIED)
        write_text(
            folder / "README.md", short_card(folder.name, patch, with_code, adapter is not None)
        )
        for weights in folder.rglob("*.safetensors"):
            allow_reading(weights)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be written ({error})") from None
    patch.save(folder / "patch")
    if adapter is not None:
        copy_adapter(adapter, folder / ADAPTER, "..")
    with nullcontext() if adapter is None else Merged(transformer, adapter):
        by_batch = write_golden(folder, retriever, golden_items, with_code=with_code)
    largest = check_golden(folder)
    result = {"max_abs_diff": largest, "max_abs_diff_by_batch": by_batch}
    write_json(folder / "golden" / "result.json", result)
    return largest


def _add_code(folder: Path) -> None:
    """The module file, under the name by which `modules.json` then calls its classes."""
    write_text(folder / CODE.name, CODE.read_text())
    path = folder / "modules.json"
    modules: list[dict[str, Any]] = json.loads(path.read_text())
    for module in modules:
        package, _, name = module["type"].rpartition(".")
        if package.endswith(f".{CODE.stem}"):
            module["type"] = f"{CODE.stem}.{name}"
    write_json(path, modules)


def _require(folder: Path, requirements: dict[str, Any]) -> None:
    path = folder / "config_sentence_transformers.json"
    write_json(path, {**json.loads(path.read_text()), "requirements": requirements})
