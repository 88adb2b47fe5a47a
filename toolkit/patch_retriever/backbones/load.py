"""Backbones: any MLLM folder or hub id as a sentence-transformers model, with a readout."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patch_retriever.backbones.families import image_token_id
from patch_retriever.backbones.limits import limit_tokens
from patch_retriever.backbones.readout import LAST, Readout
from patch_retriever.backbones.strict import no_image_part, strict_loading
from patch_retriever.errors import UserError, first_line
from patch_retriever.hub import commit_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer

BUILT_IN = "tiny-mllm"
"""Name of the model that ships with the project (checkpoints/tiny-mllm)."""


def built_in_model() -> Path:
    """Folder of the built-in MLLM.

    Raises:
        UserError: this installation has no checkpoints beside it.
    """
    folder = Path(__file__).parents[3] / "checkpoints" / BUILT_IN
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: the built-in model is not here; it lies in the project's repository "
            "(install from a clone with `pip install -e .`) or name a model of your own"
        )
    return folder


def load_backbone(
    name_or_path: str,
    dtype: str = "float32",
    device: str = "cpu",
    revision: str | None = None,
) -> Transformer:
    """Load an MLLM as sentence-transformers' `Transformer` module.

    Args:
        name_or_path: a folder, a hub id, or `tiny-mllm` for the built-in model.
        dtype: torch dtype to run in, or "auto" for that of its files.
        device: torch device.
        revision: of a hub id: a branch, a tag or a commit; None for the newest.

    Raises:
        UserError: nothing is there, it is no model or not a whole one, it takes no images, or a
            package is missing.
    """
    path = str(built_in_model()) if name_or_path == BUILT_IN else name_or_path
    commit = pinned(name_or_path, revision)
    import torch
    from sentence_transformers.base.modules import Transformer

    check_device(device)
    at = {"revision": commit} if commit else {}
    as_dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    with _quiet(), strict_loading(name_or_path):
        transformer = Transformer(
            path, model_kwargs={**at, "dtype": as_dtype}, processor_kwargs=at, config_kwargs=at
        )
    modalities = [str(m) for m in transformer.modalities]
    if image_token_id(transformer.config) is None:
        raise UserError(
            f"{name_or_path}: a text-only model (it takes {', '.join(modalities)}); "
            "patch-retriever needs a multimodal LLM that takes images"
        )
    if "image" not in " ".join(modalities):
        raise no_image_part(name_or_path)
    if getattr(transformer.processor, "chat_template", None) is None:
        raise UserError(
            f"{name_or_path}: its processor has no chat template, which the readout's prompt is "
            "written into; save the processor with one (processor.chat_template = ...)"
        )
    transformer.model.eval().requires_grad_(False)
    return transformer.to(device)


def pinned(name_or_path: str, revision: str | None = None) -> str | None:
    """The commit of a hub id's `revision`; None for a folder.

    Raises:
        UserError: there is no such folder, repository or revision, or it is plainly no model.
    """
    path = str(built_in_model()) if name_or_path == BUILT_IN else name_or_path
    check_folder(path, revision)
    return None if Path(path).exists() else commit_of(path, revision)


def check_device(device: str) -> None:
    """Refuse a device that this torch does not know or have.

    Raises:
        UserError: it cannot be used.
    """
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = first_line(error)
        raise UserError(f"device {device!r} cannot be used ({reason})") from None


def check_folder(path: str, revision: str | None = None) -> None:
    """Refuse what is plainly no model: no folder and no hub id, or a folder without a model; and a
    revision of a folder."""
    folder = Path(path)
    if folder.exists():
        if not folder.is_dir():
            raise UserError(f"{path}: not a folder; name a model's folder or its hub id")
        if not (folder / "config.json").is_file():
            raise UserError(f"{path}: no model in this folder (config.json is missing)")
        try:
            json.loads((folder / "config.json").read_text())
        except ValueError:
            raise UserError(f"{path}/config.json: damaged (not JSON)") from None
        if revision is not None:
            raise UserError(f"{path}: a folder has no revisions; leave {revision!r} out")
    elif path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(
            f"{path}: no such folder; name a model's folder, a hub id (organisation/model), "
            f"or {BUILT_IN}"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' load reports and progress bars."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    sentence_transformers = logging.getLogger("sentence_transformers")
    their_level = sentence_transformers.level
    sentence_transformers.setLevel(logging.ERROR)
    try:
        yield
    finally:
        sentence_transformers.setLevel(their_level)
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def set_readout(transformer: Transformer, readout: Readout) -> None:
    """Make `transformer` read items as `readout` says (its pooling aside).

    Raises:
        UserError: the readout's token limit cannot be kept.
    """
    processor: Any = transformer.processor
    processor.chat_template = readout.prompt.wrap(processor.chat_template)
    transformer._chat_template_suffix_cache.clear()  # it does not know that the template changed
    if readout.max_tokens is not None:
        room = limit_tokens(transformer, readout.max_tokens)
        processor.chat_template = readout.prompt.wrap(processor.chat_template, room)
    output: Any = LAST
    if readout.site != LAST:
        # hidden_states[0] are the embeddings, so layer N's output is at N + 1
        output = ["hidden_states", int(readout.site.removeprefix("layers.")) + 1]
    transformer.modality_config = {
        modality: {**params, "method_output_name": output}
        for modality, params in transformer.modality_config.items()
    }


def with_readout(transformer: Transformer, readout: Readout) -> SentenceTransformer:
    """The backbone: `Transformer`, `Pooling` and `Normalize` with `readout` set."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize
    from sentence_transformers.sentence_transformer.modules import Pooling

    set_readout(transformer, readout)
    width = transformer.get_embedding_dimension()
    return SentenceTransformer(
        modules=[transformer, Pooling(width, readout.pooling), Normalize()],
        device=str(next(transformer.parameters()).device),
        prompts=readout.prompts,
    )
