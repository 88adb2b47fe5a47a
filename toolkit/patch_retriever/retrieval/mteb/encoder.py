"""Any sentence-transformers model as mteb sees one, and our FAISS indexes in mteb's search.

mteb's own wrapper takes a model that it finds no metadata for to be one of texts alone, keeps the
order of a table's columns inside an item (which decides whether the text is read before or after
the picture), hands texts over as bare strings (one that names an image file is read as that image)
and pictures in whatever mode they were stored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from patch_retriever.errors import UserError
from patch_retriever.hub import is_hub_id
from patch_retriever.items import Item
from patch_retriever.pictures.picture import to_rgb
from patch_retriever.retrieval.encode import write_vectors
from patch_retriever.retrieval.encoder import ROLES, Encoder, Role
from patch_retriever.retrieval.load import load_encoder
from patch_retriever.retrieval.readers.benchmarks.mteb_tasks import (
    import_mteb,
    task_items,
    task_prompt,
)
from patch_retriever.runs import MARKER

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models import ModelMeta
    from PIL import Image


@dataclass(frozen=True)
class _Decoded:
    """A picture that mteb has decoded already."""

    image: Image.Image
    name: str = "a picture of mteb's"

    def open(self) -> Image.Image:
        """It, in RGB."""
        return to_rgb(self.image)

    def content_hash(self) -> str:
        """SHA-256 of its mode, size and pixels."""
        about = f"{self.image.mode} {self.image.size} ".encode()
        return hashlib.sha256(about + self.image.tobytes()).hexdigest()


class MtebEncoder:
    """mteb's `EncoderProtocol` over an `Encoder`.

    Queries are encoded as queries; documents, and the inputs of tasks without sides, as documents.
    """

    def __init__(
        self,
        model: Encoder | str,
        revision: str | None = None,
        *,
        device: str = "cpu",
        trust_remote_code: bool = False,
        name: str | None = None,
        task_prompts: bool = False,
    ) -> None:
        """Wrap a model.

        Args:
            model: an encoder, or what `load_encoder` takes.
            revision: what results are filed under, and of a hub id what is loaded; by default the
                newest commit, and the model's fingerprint to file under.
            device: torch device, for a model given by name.
            trust_remote_code: run the code in its folder that is not this package's own.
            name: `organization/name`, as mteb wants it; by default the hub id, or `local/FOLDER`.
            task_prompts: give the model the instructions of the tasks, in place of its own.

        Raises:
            UserError: the model does not load, or `name` is no such name.
        """
        import_mteb()
        if isinstance(model, str):
            on_hub = revision if is_hub_id(model) and not Path(model).exists() else None
            model = load_encoder(model, device, on_hub, trust_remote_code)
        self.encoder = model
        self._task_prompts = task_prompts
        self.mteb_model_meta = _metadata(self.encoder, name, revision, self._experiment())

    def _experiment(self) -> dict[str, Any]:
        """What sets these results apart from the model's plain ones."""
        return {"task_prompts": True} if self._task_prompts else {}

    def encode(
        self,
        inputs: Iterable[Mapping[str, Sequence[Any]]],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,  # noqa: ARG002  mteb's protocol
        hf_subset: str,  # noqa: ARG002
        prompt_type: Any = None,
        batch_size: int = 32,
        precision: str | None = None,
        **_: Any,
    ) -> NDArray[np.float32]:
        """Vectors (n, d) of mteb's batches of texts and pictures.

        Raises:
            UserError: the model does not take such items.
            ValueError: of a `precision` other than float32.
        """
        if precision not in (None, "float32"):
            raise ValueError(f"precision {precision!r}: vectors are float32 here")
        side = None if prompt_type is None else str(prompt_type.value)
        role: Role = "query" if side == "query" else "document"
        prompt = self._prompt(task_metadata, side)
        parts = [
            self.encoder.embed(batch_items(batch), role, prompt, batch_size) for batch in inputs
        ]
        return np.concatenate(parts) if parts else self.encoder.embed([], role)

    def _prompt(self, task_metadata: TaskMetadata, side: str | None) -> str | None:
        return task_prompt(task_metadata, side) if self._task_prompts else None

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Inner products (n, m)."""
        return _rows(embeddings1) @ _rows(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Inner products (n,) of rows with each other."""
        return (_rows(embeddings1) * _rows(embeddings2)).sum(1)


class MtebRetriever(MtebEncoder):
    """mteb's `SearchProtocol` too: retrieval tasks are searched through a FAISS index.

    A corpus is encoded once, a batch of pictures at a time, to a file beside which the index is
    trained and filled. Tasks that rank a short list for each query are scored exactly.
    """

    def __init__(
        self, model: Encoder | str, revision: str | None = None, *, index: str, **kwargs: Any
    ) -> None:
        """As for `MtebEncoder`; `index` is a name or factory string that `build_index` takes."""
        self._factory = index
        super().__init__(model, revision, **kwargs)

    def _experiment(self) -> dict[str, Any]:
        return {**super()._experiment(), "index": self._factory}

    def index(
        self,
        corpus: Dataset,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,  # noqa: ARG002  mteb's protocol
        hf_subset: str,  # noqa: ARG002
        encode_kwargs: Mapping[str, Any],
        **_: Any,
    ) -> None:
        """Encode a corpus and build its index.

        Raises:
            UserError: the index cannot be made of such a corpus, or the disk is full.
        """
        from patch_retriever.retrieval.index.build import build_index
        from patch_retriever.retrieval.index.factory import check_factory

        items = task_items(corpus, task_metadata, "document")
        check_factory(self._factory, len(items), self.encoder.dimension)
        self._ids = items.ids
        self._folder = TemporaryDirectory()  # and the corpus before this one is deleted
        path = Path(self._folder.name) / "corpus.f32"
        batch_size = encode_kwargs.get("batch_size", 32)
        prompt = self._prompt(task_metadata, "document")
        with path.open("wb") as file:  # a map that outgrows the disk kills the process
            write_vectors(file, self.encoder, items, "document", prompt, batch_size)
        shape = (len(items), self.encoder.dimension)
        self._vectors_nd = np.memmap(path, np.float32, "r", shape=shape)
        self._index = build_index(self._vectors_nd, self._factory, self.encoder.dimension)

    def search(
        self,
        queries: Dataset,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,  # noqa: ARG002  mteb's protocol
        hf_subset: str,  # noqa: ARG002
        top_k: int,
        encode_kwargs: Mapping[str, Any],
        top_ranked: Mapping[str, Sequence[str]] | None = None,
        **_: Any,
    ) -> dict[str, dict[str, float]]:
        """The scores of the best `top_k` documents of every query, by their ids."""
        from patch_retriever.retrieval.index.factory import matrix_products

        items = task_items(queries, task_metadata, "query")
        prompt = self._prompt(task_metadata, "query")
        queries_qd = self.encoder.embed(items, "query", prompt, encode_kwargs.get("batch_size", 32))
        if top_ranked is not None:
            return self._rank(items.ids, queries_qd, top_k, top_ranked)
        with matrix_products():
            scores_qk, numbers_qk = self._index.search(queries_qd, min(top_k, len(self._ids)))
        return {
            query: {
                self._ids[number]: float(score)
                for score, number in zip(scores_k, numbers_k, strict=True)
                if number >= 0  # fewer were found
            }
            for query, scores_k, numbers_k in zip(items.ids, scores_qk, numbers_qk, strict=True)
        }

    def _rank(
        self,
        ids: Sequence[str],
        queries_qd: NDArray[np.float32],
        top_k: int,
        pools: Mapping[str, Sequence[str]],
    ) -> dict[str, dict[str, float]]:
        """Each query's own short list by exact scores."""
        number = {document: n for n, document in enumerate(self._ids)}
        found: dict[str, dict[str, float]] = {}
        for query, query_d in zip(ids, queries_qd, strict=True):
            pool = list(pools.get(query, ()))
            rows_p = np.array([number[p] for p in pool], dtype=np.int64)
            scores_p = self._vectors_nd[rows_p] @ query_d
            best = np.argsort(-scores_p, kind="stable")[:top_k]
            found[query] = {pool[i]: float(scores_p[i]) for i in best}
        return found


def batch_items(batch: Mapping[str, Sequence[Any]]) -> list[Item]:
    """The items of one of mteb's batches, whose columns hold None or "" where an item lacks a part.

    Raises:
        ValueError: an item has neither a text nor a picture.
    """
    texts, images = batch.get("text"), batch.get("image")
    n = len(next(column for column in (texts, images, *batch.values()) if column is not None))
    items = []
    for text, image in zip(texts or [None] * n, images or [None] * n, strict=True):
        picture = None if image is None else _Decoded(image)
        items.append(Item(text or (None if picture else text), picture))
    return items


def _rows(embeddings: Any) -> torch.Tensor:
    import torch

    rows = torch.as_tensor(embeddings, dtype=torch.float32)
    return rows if rows.ndim > 1 else rows[None]


def _metadata(
    encoder: Encoder, name: str | None, revision: str | None, experiment: dict[str, Any]
) -> ModelMeta:
    from mteb.models import ModelMeta
    from mteb.models.model_meta import ScoringFunction

    folder = Path(encoder.name.partition("@")[0])
    published = not folder.exists() and encoder.name.count("/") == 1
    name = name or (encoder.name if published else f"local/{Path(encoder.name).resolve().name}")
    if name.count("/") != 1 or not all(name.split("/")):
        raise UserError(f"{name}: mteb files results under ORGANIZATION/NAME; give such a name")
    made_from = folder / MARKER
    base = json.loads(made_from.read_text())["model"] if made_from.is_file() else None
    base = None if base and Path(base).exists() else base  # a path says nothing elsewhere
    parameters = list(encoder.parameters())
    takes_images = "image" in " ".join(encoder.modalities)
    return ModelMeta(
        loader=MtebEncoder,
        name=name,
        revision=revision or encoder.fingerprint,
        release_date=None,
        languages=None,
        n_parameters=sum(p.numel() for p in parameters),
        memory_usage_mb=sum(p.numel() * p.element_size() for p in parameters) / 2**20,
        max_tokens=encoder.max_tokens,
        embed_dim=encoder.dimension,
        license=None,
        open_weights=True,
        public_training_code=None,
        public_training_data=None,
        framework=["Sentence Transformers", "PyTorch"],
        reference=f"https://huggingface.co/{name}" if published else None,
        similarity_fn_name=ScoringFunction(encoder.similarity),
        use_instructions=bool(experiment.get("task_prompts") or any(map(encoder.prompt, ROLES))),
        training_datasets=None,
        adapted_from=base,
        modalities=["text", "image"] if takes_images else ["text"],
        experiment_kwargs=experiment or None,
    )
