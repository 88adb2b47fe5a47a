"""mteb tasks that need no network: drawn pictures and made-up texts, one task for a direction.

Tests import it, and `--tasks tests/local_tasks.py:ShapesT2I` reads it as a user's file.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset, Features, Image, Value
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from PIL import Image as Pillow

N = 24
WORDS = ("red", "blue", "green", "star", "circle", "square", "two", "three", "small", "large")


def picture(i: int) -> bytes:
    """A PNG of few colours; every third one with a transparent half, every fifth grey."""
    rng = np.random.default_rng(i)
    pixels = np.kron(rng.integers(0, 255, (4, 4, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
    drawn = Pillow.fromarray(pixels)
    if i % 3 == 0:
        drawn.putalpha(Pillow.linear_gradient("L").resize(drawn.size))
    elif i % 5 == 0:
        drawn = drawn.convert("L")
    file = BytesIO()
    drawn.save(file, "PNG")
    return file.getvalue()


def text(i: int) -> str:
    rng = np.random.default_rng(100 + i)
    return " ".join(rng.choice(WORDS, 4)) + f" {i}"


def table(
    ids: list[str], texts: list[str | None] | None, images: list[bytes | None] | None
) -> Dataset:
    """Columns as MIEB's data sets have them: the text before the picture."""
    columns: dict[str, list[Any]] = {"id": ids}
    features: dict[str, Any] = {"id": Value("string")}
    if texts is not None:
        columns["text"], features["text"] = texts, Value("string")
    if images is not None:
        columns["image"] = [None if b is None else {"bytes": b, "path": None} for b in images]
        features["image"] = Image()
    return Dataset.from_dict(columns, features=Features(features))


def metadata(name: str, category: str, **more: Any) -> TaskMetadata:
    kinds = {"t": "text", "i": "image"}
    return TaskMetadata(
        **{
            "name": name,
            "description": "Drawn here.",
            "dataset": {"path": "local/shapes", "revision": "1"},
            "type": "Any2AnyRetrieval",
            "category": category,
            "modalities": sorted({kinds[c] for c in category if c in kinds}),
            "eval_splits": ["test"],
            "eval_langs": ["eng-Latn"],
            "main_score": "ndcg_at_10",
            "prompt": {"query": "Find what fits."},
            **more,
        }
    )


class Local(AbsTaskRetrieval):
    """A task over the drawn pictures; also says its nDCG@10 unrounded, and for every query."""

    queries_of: ClassVar[Any]
    corpus_of: ClassVar[Any]
    per_query: dict[str, float]

    def load_data(self, *_: object, **__: object) -> None:
        self.dataset = {s: {"test": self.split_data()} for s in self.hf_subsets}
        self.data_loaded = True

    def split_data(self) -> dict[str, Any]:
        """Query i fits candidate i, and half as well the one after it."""
        q, d = [f"q{i}" for i in range(N)], [f"d{i}" for i in range(N)]
        corpus = self.corpus_of()
        return {
            "queries": table(q, *self.queries_of()),
            "corpus": table(d, *corpus),
            "relevant_docs": {f"q{i}": {f"d{i}": 2, f"d{(i + 1) % N}": 1} for i in range(N)},
            "top_ranked": None,
        }

    def task_specific_scores(
        self, scores: dict[str, dict[str, float]], *_: object, **__: object
    ) -> dict[str, float]:
        self.per_query = {query: found["ndcg_cut_10"] for query, found in scores.items()}
        return {"unrounded_ndcg_at_10": float(np.mean(list(self.per_query.values())))}


def texts() -> tuple[list[str], None]:
    return [text(i) for i in range(N)], None


def pictures() -> tuple[None, list[bytes]]:
    return None, [picture(i) for i in range(N)]


def both() -> tuple[list[str], list[bytes]]:
    return [text(i) for i in range(N)], [picture(i) for i in range(N)]


def mixed() -> tuple[list[str], list[bytes | None]]:
    """Texts, pictures, and both, in turn."""
    said = ["" if i % 3 == 1 else text(i) for i in range(N)]
    return said, [None if i % 3 == 0 else picture(i) for i in range(N)]


class ShapesT2I(Local):
    metadata = metadata("ShapesT2I", "t2i")
    queries_of, corpus_of = staticmethod(texts), staticmethod(both)  # the texts are not to be seen


class ShapesI2T(Local):
    metadata = metadata("ShapesI2T", "i2t")
    queries_of, corpus_of = staticmethod(pictures), staticmethod(texts)


class ShapesIT2I(Local):
    metadata = metadata("ShapesIT2I", "it2i")
    queries_of, corpus_of = staticmethod(both), staticmethod(pictures)


class ShapesT2Mixed(Local):
    metadata = metadata("ShapesT2Mixed", "t2it")
    queries_of, corpus_of = staticmethod(texts), staticmethod(mixed)


class ShapesReranking(Local):
    """Every query ranks five candidates of its own."""

    metadata = metadata("ShapesReranking", "t2i", type="Reranking", main_score="map_at_1000")
    queries_of, corpus_of = staticmethod(texts), staticmethod(pictures)

    def split_data(self) -> dict[str, Any]:
        pools = {f"q{i}": [f"d{(i + 5 * j) % N}" for j in range(5)] for i in range(N)}
        return super().split_data() | {"top_ranked": pools}


class ShapesByLanguage(Local):
    """Two subsets."""

    metadata = metadata(
        "ShapesByLanguage", "t2i", eval_langs={"en": ["eng-Latn"], "de": ["deu-Latn"]}
    )
    queries_of, corpus_of = staticmethod(texts), staticmethod(pictures)


class ShapesToOthers(Local):
    """Queries are among the candidates, and left out of their own rankings."""

    metadata = metadata("ShapesToOthers", "i2i")
    queries_of, corpus_of = staticmethod(pictures), staticmethod(pictures)
    ignore_identical_ids = True

    def split_data(self) -> dict[str, Any]:
        ids = [f"d{i}" for i in range(N)]
        data = super().split_data()
        data["queries"] = table(ids, *pictures())
        data["relevant_docs"] = {f"d{i}": {f"d{(i + 1) % N}": 1} for i in range(N)}
        return data


class NotThere(Local):
    """Its data are on the hub, which tests cannot reach."""

    metadata = metadata(
        "NotThere", "t2i", dataset={"path": "nobody/no-such-data-set", "revision": "1"}
    )
    load_data = AbsTaskRetrieval.load_data


HERE = Path(__file__)
