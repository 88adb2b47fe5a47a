"""Backbones: any MLLM folder or hub id as a sentence-transformers model, with a readout."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patch_retriever.backbones.adapter import CONFIG, FOLDER, merge
from patch_retriever.backbones.chat import take_chats
from patch_retriever.backbones.cut import cut_at
from patch_retriever.backbones.families import (
    assumed,
    family_of,
    image_token_id,
    placeholders,
)
from patch_retriever.backbones.image_backend import use_pillow
from patch_retriever.backbones.pixel_budget import limit_pixels
from patch_retriever.backbones.placement import DeviceMap, check_placed, device_of
from patch_retriever.backbones.pooling import parts_of
from patch_retriever.backbones.readout import LAST, Readout, layer_number
from patch_retriever.backbones.strict import no_image_part, strict_loading
from patch_retriever.backbones.token_limit import limit_tokens
from patch_retriever.errors import UserError, first_line
from patch_retriever.hub import commit_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from torch import Tensor, nn

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
    *,
    device_map: DeviceMap | None = None,
    max_pixels: int | None = None,
    attention: str | None = None,
) -> Transformer:
    """Load an MLLM as sentence-transformers' `Transformer` module, which takes chats of texts,
    pictures and both whatever its family.

    Args:
        name_or_path: a folder, a hub id, or `tiny-mllm` for the built-in model.
        dtype: torch dtype to run in, or "auto" for that of its files.
        device: torch device.
        revision: of a hub id: a branch, a tag or a commit; None for the newest.
        device_map: "auto" to spread the model over all devices, or a device for every part of it,
            in place of `device`; what fits nowhere stays on the CPU or the disk until it is run.
        max_pixels: of a picture, where the family makes more tokens of a larger one.
        attention: "sdpa", "eager", "flash_attention_2" ...; None for transformers' choice.

    Raises:
        UserError: nothing is there, it is no model or not a whole one, it takes no images, a
            package is missing, or an option does not fit the model.
    """
    path = str(built_in_model()) if name_or_path == BUILT_IN else name_or_path
    if device_map is not None and device != "cpu":
        raise UserError(f"a device map says where the model goes; leave device {device!r} out")
    commit = pinned(name_or_path, revision)
    import torch
    from sentence_transformers.base.modules import Transformer

    check_device(device)
    at = {"revision": commit} if commit else {}
    kwargs: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if device_map is not None:
        kwargs["device_map"] = device_map
    if attention is not None:
        kwargs["attn_implementation"] = attention
    with _quiet(), strict_loading(name_or_path):
        transformer = Transformer(
            path, model_kwargs={**at, **kwargs}, processor_kwargs=at, config_kwargs=at
        )
        use_pillow(transformer, path, **at)
    _check_takes_images(transformer, name_or_path)
    if attention is not None:
        _check_attention(transformer, attention, name_or_path)
    if device_map is not None:
        check_placed(transformer, device_map, name_or_path)
    make_whole(transformer)
    try:
        said = assumed(transformer.model)
    except UserError as error:
        raise UserError(f"{name_or_path}: {error}") from None
    if said is not None:
        warnings.warn(f"{name_or_path}: {said}", stacklevel=2)
    if max_pixels is not None:
        limit_pixels(transformer, max_pixels, name_or_path)
    transformer.model.eval().requires_grad_(False)
    if (Path(path) / FOLDER / CONFIG).is_file():
        merge(transformer, Path(path) / FOLDER)
    return transformer if device_map is not None else transformer.to(device)


def make_whole(transformer: Transformer) -> None:
    """What stock sentence-transformers lacks for some families: chats of texts, of pictures and of
    both, and pictures in the dtype of what takes them."""
    take_chats(transformer)
    _cast_pictures(transformer)


def _check_takes_images(transformer: Transformer, name: str) -> None:
    """Refuse a text-only model, and one whose processor takes no images."""
    processor: Any = transformer.processor
    if image_token_id(transformer.config) is None:
        # some families say it in the processor alone
        if (found := getattr(processor, "image_token_id", None)) is None:
            modalities = ", ".join(map(str, transformer.modalities))
            what = "no image token in its text" if "image" in modalities else "a text-only model"
            raise UserError(
                f"{name}: {what} (it takes {modalities}); "
                "patch-retriever needs a multimodal LLM that takes images"
            )
        transformer.config.image_token_id = found
    if getattr(processor, "image_processor", None) is None:
        raise no_image_part(name)


def _check_attention(transformer: Transformer, attention: str, name: str) -> None:
    """Refuse flash attention where it drops a part of the family's mask without a word."""
    family = family_of(transformer.config)
    if family and family.two_way and "flash" in attention:
        raise UserError(
            f"{name}: {family.name} has tokens that see later ones, which {attention} would hide; "
            "use sdpa"
        )


def _cast_pictures(transformer: Transformer) -> None:
    """Bring pictures to the dtype of the part that takes them, as the family's users do by hand."""
    family = family_of(transformer.config)
    if family and family.pictures_to:
        part = transformer.model.get_submodule(family.pictures_to)
        part.register_forward_pre_hook(_in_its_dtype)


def _in_its_dtype(part: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    dtype = next(part.parameters()).dtype
    return tuple(values.to(dtype) for values in inputs)


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
    """Make `transformer` read items as `readout` says, its pooling and the end of its decoder
    (`cut_at`) aside.

    `last_hidden_state` is after the decoder's final norm, every `layers.N` before it.

    Raises:
        UserError: the readout's token limit cannot be kept.
    """
    processor: Any = transformer.processor
    tokens = placeholders(transformer.config, transformer.tokenizer, processor)
    processor.chat_template = readout.prompt.wrap(processor.chat_template, None, tokens)
    # sentence-transformers keeps the ends of templates, and does not see that this one changed
    getattr(transformer, "_chat_template_suffix_cache", {}).clear()
    if readout.max_tokens is not None:
        room = limit_tokens(transformer, readout.max_tokens)
        processor.chat_template = readout.prompt.wrap(processor.chat_template, room, tokens)
    output: Any = LAST
    if readout.site != LAST:
        # hidden_states[0] are the embeddings, so layer N's output is at N + 1
        output = ["hidden_states", layer_number(readout.site) + 1]
        # else transformers puts the normed state in the last one's place
        for config in (transformer.config, transformer.config.get_text_config()):
            config.tie_last_hidden_states = False
    transformer.modality_config = {
        modality: {**params, "method_output_name": output}
        for modality, params in transformer.modality_config.items()
    }


def as_read(transformer: Transformer, readout: Readout) -> Transformer:
    """`transformer` with its decoder ended and its inputs set as `readout` says.

    Raises:
        UserError: the decoder cannot end there, or the readout's token limit cannot be kept.
    """
    transformer = cut_at(transformer, readout.cut)
    set_readout(transformer, readout)
    return transformer


def readout_site(transformer: Transformer) -> str:
    """The site at which `transformer` reads items, as `set_readout` set it."""
    params = next(iter(transformer.modality_config.values()))
    match params["method_output_name"]:
        case ["hidden_states", index]:
            return f"layers.{index - 1}"
        case _:
            return LAST


def with_readout(transformer: Transformer, readout: Readout) -> SentenceTransformer:
    """The backbone: `Transformer`, `Pooling` and `Normalize` with `readout` set.

    Raises:
        UserError: the decoder cannot end where the readout says.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize
    from sentence_transformers.sentence_transformer.modules import Pooling

    transformer = as_read(transformer, readout)
    width = transformer.get_embedding_dimension()
    return SentenceTransformer(
        modules=[transformer, Pooling(width, parts_of(readout.pooling)), Normalize()],
        device=str(device_of(transformer)),
        prompts=readout.prompts,
    )
