"""Encoder: any sentence-transformers model, split where its output is worth keeping.

The trunk is everything up to and including the pooling: the expensive part. The head is what comes
after it: the pooled part of a patch, a normalisation. Pooled vectors are stored by content, so a
model with another head over the same trunk needs no encoding at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from patch_retriever.ahead import WORKERS
from patch_retriever.backbones.inputs import Preparer, on_device
from patch_retriever.errors import UserError, first_line
from patch_retriever.files import value_hash
from patch_retriever.items import Item
from patch_retriever.retrieval.fingerprint import modules_fingerprint

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Role = Literal["query", "document"]
ROLES: tuple[Role, Role] = ("query", "document")


class Encoder:
    """A model as it is used for search: items to vectors whose inner products are its scores.

    Vectors have length 1, unless the model says that it is compared by dot product.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        name: str,
        head: Sequence[nn.Module] | None = None,
        workers: int = WORKERS,
    ) -> None:
        """Split `model`; `head` takes the place of the model's own, `workers` threads prepare
        what it reads."""
        from sentence_transformers import SentenceTransformer

        self.name, self.workers = name, workers
        modules = list(model)
        end = _trunk_length(modules)
        self._head = nn.ModuleList(modules[end:] if head is None else head).to(model.device)
        self._trunk = SentenceTransformer(modules=modules[:end], device=str(model.device)).eval()
        self._prompts = {name: said for name, said in model.prompts.items() if said}
        self._truncate = model.truncate_dim
        self._unit = str(model.similarity_fn_name or "cosine") != "dot"
        self.modalities: tuple[str, ...] = tuple(map(str, model.modalities))
        chats, pictures = "message" in self.modalities, any("image" in m for m in self.modalities)
        self._preparer = Preparer(modules[0], workers, chats, pictures)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._trunk.device

    @property
    def similarity(self) -> Literal["cosine", "dot"]:
        """How the model is compared; with "cosine" its vectors have length 1."""
        return "cosine" if self._unit else "dot"

    @property
    def max_tokens(self) -> int | None:
        """Longest input, in tokens."""
        return self._trunk.max_seq_length

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of the trunk and of the head."""
        return chain(self._trunk.parameters(), self._head.parameters())

    @cached_property
    def dimension(self) -> int:
        """Width of the final vectors."""
        return self.finish(np.zeros((1, self.width), np.float32), "document").shape[1]

    @cached_property
    def width(self) -> int:
        """Width of the stored vectors: what the pooling gives."""
        width = self._trunk.get_embedding_dimension()
        if width is None:  # the last module does not say
            width = self.pooled([Item("width")], "document").shape[1]
        return int(width)

    @cached_property
    def trunk_fingerprint(self) -> str:
        """SHA-256 of all that decides the pooled vectors: weights, configuration, processor."""
        return modules_fingerprint(self._trunk)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the whole model, its prompts too."""
        head = [self._truncate, self._unit, modules_fingerprint(self._head), self._prompts]
        return value_hash([self.trunk_fingerprint, head])

    @property
    def only_normalises(self) -> bool:
        """Whether the head does nothing but bring pooled vectors to length 1."""
        from sentence_transformers.base.modules import Normalize

        whole = self._truncate is None and all(isinstance(m, Normalize) for m in self._head)
        return whole and (self._unit or len(self._head) > 0)

    def store_key(self, role: Role, prompt: str | None = None) -> str:
        """SHA-256 of all that decides the pooled vectors of items in a role."""
        routed = any("task" in getattr(m, "forward_kwargs", ()) for m in self._trunk)
        return value_hash(
            [self.trunk_fingerprint, self.prompt(role, prompt), role if routed else None]
        )

    def prompt(self, role: Role, prompt: str | None = None) -> str:
        """What is said before an item: `prompt`, or else the model's own for the role, or ""."""
        if prompt is not None:
            return prompt
        names = ("query",) if role == "query" else ("document", "passage", "corpus")
        return next((said for n in names if (said := self._prompts.get(n))), "")

    def stream(
        self, items: Iterable[Item], role: Role, prompt: str | None = None, batch_size: int = 64
    ) -> Iterator[tuple[list[int], NDArray[np.float32]]]:
        """The trunk's output (n, w) a batch at a time, with the positions of its n items: every
        item once, those of similar length together. Pictures are prepared ahead by threads; a
        sequence of items is read by one of them, an iterator's have their pictures in memory.

        Raises:
            UserError: a picture cannot be read, or the model does not take such items.
        """
        from jinja2 import TemplateError

        said = self.prompt(role, prompt) or None
        batches = self._preparer.batches(items, batch_size, prompt=said, task=role)
        with closing(batches):
            while True:
                try:
                    numbers, features = next(batches)
                    rows_nw = self._run(on_device(features, self.device), role)
                except StopIteration:
                    return
                except (ValueError, TypeError, TemplateError) as error:
                    reason = first_line(error)
                    raise UserError(f"{self.name}: cannot encode these items ({reason})") from error
                yield numbers, rows_nw

    @torch.inference_mode()
    def _run(self, features: dict[str, Any], role: Role) -> NDArray[np.float32]:
        out: dict[str, Any] = self._trunk(features, task=role)
        return out["sentence_embedding"].float().cpu().numpy()

    def pooled(
        self, items: Sequence[Item], role: Role, prompt: str | None = None, batch_size: int = 64
    ) -> NDArray[np.float32]:
        """The trunk's output (n, w), a few batches of pictures in memory at a time.

        Raises:
            UserError: as `stream`.
        """
        found: NDArray[np.float32] | None = None
        for numbers, rows_nw in self.stream(items, role, prompt, batch_size):
            if found is None:
                found = np.empty((len(items), rows_nw.shape[1]), np.float32)
            found[numbers] = rows_nw
        return np.zeros((0, self.width), np.float32) if found is None else found

    @torch.inference_mode()
    def finish(self, pooled_nw: NDArray[np.float32], role: Role) -> NDArray[np.float32]:
        """The head's output (n, d) for pooled vectors (n, w)."""
        features: dict[str, Any] = {"sentence_embedding": _tensor(pooled_nw, self._dtype())}
        features["sentence_embedding"] = features["sentence_embedding"].to(self.device)
        module: Any
        for module in self._head:
            takes_task = "task" in getattr(module, "forward_kwargs", ())
            features = module(features, task=role) if takes_task else module(features)
        out_nd = features["sentence_embedding"].float()[:, : self._truncate]
        if self._unit:
            out_nd = nn.functional.normalize(out_nd, dim=1)
        return out_nd.cpu().numpy()

    def embed(
        self, items: Sequence[Item], role: Role, prompt: str | None = None, batch_size: int = 64
    ) -> NDArray[np.float32]:
        """Final vectors (n, d) of items."""
        return self.finish(self.pooled(items, role, prompt, batch_size), role)

    def _dtype(self) -> torch.dtype:
        return next((p.dtype for p in self._head.parameters()), torch.float32)


def _trunk_length(modules: Sequence[nn.Module]) -> int:
    """How many modules come before the head: up to and including the last pooling, or all but a
    normalisation at the end where the first module pools by itself."""
    from sentence_transformers.base.modules import Normalize
    from sentence_transformers.sentence_transformer.modules import Pooling

    poolings = [i for i, module in enumerate(modules) if isinstance(module, Pooling)]
    if poolings:
        return poolings[-1] + 1
    return len(modules) - isinstance(modules[-1], Normalize)


def _tensor(rows: NDArray[np.float32], dtype: torch.dtype) -> Tensor:
    return torch.tensor(np.ascontiguousarray(rows), dtype=dtype)  # a copy: maps are read-only
