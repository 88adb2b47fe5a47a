"""mteb sees our models rightly: the scores are ours, and nothing of an item is lost on the way."""

from __future__ import annotations

import logging
from io import BytesIO
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pytest
from mteb.models import EncoderProtocol, SearchProtocol, SentenceTransformerEncoderWrapper
from PIL import Image
from sentence_transformers import SentenceTransformer

from local_tasks import (
    Local,
    N,
    ShapesI2T,
    ShapesIT2I,
    ShapesReranking,
    ShapesT2I,
    ShapesT2Mixed,
    ShapesToOthers,
    both,
    metadata,
    mixed,
    picture,
    text,
)
from patch_retriever.errors import UserError
from patch_retriever.items import Item
from patch_retriever.pictures.picture import PictureBytes
from patch_retriever.retrieval.encoder import Encoder
from patch_retriever.retrieval.load import load_encoder
from patch_retriever.retrieval.metrics import query_metrics
from patch_retriever.retrieval.mteb.encoder import MtebEncoder, MtebRetriever, batch_items
from patch_retriever.retrieval.ranking import Judgements, rank
from patch_retriever.retrieval.readers.benchmarks.mteb_tasks import retrieval_tasks
from patch_retriever.retrieval.readers.options import ReadOptions


@pytest.fixture(scope="module")
def encoder(finished_build: Path) -> Encoder:
    return load_encoder(str(finished_build))


ASKED = {"task_metadata": ShapesT2Mixed.metadata, "hf_split": "test", "hf_subset": "default"}
QUERIES: dict[str, Any] = {**ASKED, "prompt_type": mteb.types.PromptType.query}
DOCUMENTS: dict[str, Any] = {**ASKED, "prompt_type": mteb.types.PromptType.document}


def by_mteb(model: Any, task: Local, batch_size: int = 7) -> dict[str, Any]:
    """mteb's scores of the task's one subset."""
    (result,) = mteb.evaluate(
        model,
        task,
        cache=None,
        co2_tracker=False,
        encode_kwargs={"batch_size": batch_size, "show_progress_bar": False},
        show_progress_bar=False,
    ).task_results
    return dict(result.scores["test"][0])


def by_us(encoder: Any, task: Local, task_prompts: bool = False) -> dict[str, np.ndarray]:
    (read,) = retrieval_tasks(task, ReadOptions())
    prompts = read.prompts if task_prompts else {}
    queries_qd = encoder.embed(read.queries, "query", prompts.get("query"), 64)
    candidates_nd = encoder.embed(read.candidates, "document", prompts.get("document"), 64)
    ranking = rank(read, queries_qd, candidates_nd)
    judgements = Judgements(read)
    grades_qk = judgements.grades(ranking.found_qk)
    return query_metrics(grades_qk, judgements.judged_qm, cutoffs=(1, 5, 10))


def vectors(model: Any, *inputs: Any) -> np.ndarray:
    return np.asarray(model.encode_query(list(inputs)))


# the same numbers


@pytest.mark.parametrize(
    "kind", [ShapesT2I, ShapesI2T, ShapesIT2I, ShapesT2Mixed, ShapesToOthers, ShapesReranking]
)
def test_ndcg_is_the_same_by_mteb_and_by_us(encoder, kind):
    task = kind()
    scores = by_mteb(MtebEncoder(encoder), task)
    ours = by_us(encoder, kind())
    per_query = np.array([task.per_query[q] for q in sorted(task.per_query)])
    order = np.argsort(retrieval_tasks(kind(), ReadOptions())[0].query_ids)
    np.testing.assert_allclose(ours["ndcg@10"][order], per_query, atol=1e-6)
    assert abs(ours["ndcg@10"].mean() - scores["unrounded_ndcg_at_10"]) < 1e-6
    assert abs(ours["ndcg@10"].mean() - scores["ndcg_at_10"]) < 0.51e-5  # mteb rounds
    assert 0 < scores["ndcg_at_10"] < 1
    for k in (1, 5, 10):  # M-BEIR's "recall" is mteb's hit rate, not its recall
        assert abs(ours[f"hit_rate@{k}"].mean() - scores[f"hit_rate_at_{k}"]) < 1e-5
        assert abs(ours[f"recall@{k}"].mean() - scores[f"recall_at_{k}"]) < 1e-5


def test_the_prompts_of_a_task_are_given_when_asked_for(encoder):
    plain = by_mteb(MtebEncoder(encoder), task := ShapesT2I())
    told = by_mteb(MtebEncoder(encoder, task_prompts=True), told_task := ShapesT2I())
    ours = by_us(encoder, ShapesT2I(), task_prompts=True)["ndcg@10"]
    assert abs(told["unrounded_ndcg_at_10"] - ours.mean()) < 1e-6
    assert task.per_query != told_task.per_query
    assert plain["unrounded_ndcg_at_10"] == by_us(encoder, ShapesT2I())["ndcg@10"].mean()


class Coarse:
    """Stands for an encoder; few different vectors of exact halves, so that most scores tie."""

    def embed(self, items: list[Item], role: str, *_: object) -> np.ndarray:
        seeds = [int(item.text.rsplit(" ", 1)[1]) % (5 if role == "query" else 3) for item in items]
        rows = [np.random.default_rng(seed).integers(-1, 2, 6) / 2 for seed in seeds]
        return np.array(rows, np.float32).reshape(-1, 6)


class Texts(ShapesI2T):
    metadata = metadata("Texts", "t2t")
    queries_of = staticmethod(lambda: ([text(i) for i in range(N)], None))


def test_ties_are_broken_the_same_way(encoder):
    model = MtebEncoder(encoder)
    model.encoder = Coarse()  # type: ignore[assignment]
    task = Texts()
    scores = by_mteb(model, task)
    (read,) = retrieval_tasks(Texts(), ReadOptions())
    coarse = Coarse()
    queries_qd, candidates_nd = (
        coarse.embed(side, role)
        for side, role in ((read.queries, "query"), (read.candidates, "document"))
    )
    scores_qn = queries_qd @ candidates_nd.T
    assert all(len(np.unique(row)) <= 3 for row in scores_qn)  # of 24
    ours = by_us(coarse, Texts())["ndcg@10"]
    np.testing.assert_allclose(ours, [task.per_query[q] for q in read.query_ids], atol=1e-6)
    # in the order of the corpus, as a search leaves ties, the score is another
    grades = np.array([[read.qrels[q].get(c, 0) for c in read.candidate_ids] for q in read.qrels])
    order = np.argsort(-scores_qn, axis=1, kind="stable")
    naive = query_metrics(np.take_along_axis(grades, order, 1), grades, (10,))["ndcg@10"]
    assert abs(naive.mean() - scores["unrounded_ndcg_at_10"]) > 0.01


# what mteb is told


def test_mteb_is_told_what_the_model_is(encoder, finished_build):
    model = MtebEncoder(encoder)
    meta = model.mteb_model_meta
    assert isinstance(model, EncoderProtocol)
    assert not isinstance(model, SearchProtocol)
    assert (meta.name, meta.revision) == (f"local/{finished_build.name}", encoder.fingerprint)
    assert set(meta.modalities) == {"text", "image"}
    assert meta.similarity_fn_name == mteb.models.model_meta.ScoringFunction.COSINE
    assert meta.embed_dim == encoder.dimension == encoder.embed([Item("a")], "query").shape[1]
    weights = SentenceTransformer(str(finished_build), device="cpu").parameters()
    assert meta.n_parameters == sum(p.numel() for p in weights)
    assert type(meta).model_validate(meta.model_dump()) == meta
    named = MtebEncoder(encoder, "abc", name="org/model").mteb_model_meta
    assert (named.name, named.revision, named.experiment_kwargs) == ("org/model", "abc", None)


def test_other_settings_are_filed_apart(encoder):
    kinds = (
        MtebEncoder(encoder),
        MtebEncoder(encoder, task_prompts=True),
        MtebRetriever(encoder, index="SQ8"),
        MtebRetriever(encoder, index="Flat"),
    )
    assert len({model.mteb_model_meta.experiment_name for model in kinds}) == 4


@pytest.mark.parametrize("name", ["model", "a/b/c", "/model", "org/"])
def test_a_name_that_mteb_cannot_file_is_refused(encoder, name):
    with pytest.raises(UserError, match=f"{name}: mteb files results under ORGANIZATION/NAME"):
        MtebEncoder(encoder, name=name)


def test_similarity_is_the_inner_product_of_what_is_encoded(encoder):
    model = MtebEncoder(encoder)
    a, b = np.eye(3, dtype=np.float32), np.arange(6, dtype=np.float32).reshape(2, 3)
    assert model.similarity(a, b).tolist() == (a @ b.T).tolist()
    assert model.similarity(a[0], b[1]).tolist() == [[3.0]]
    assert model.similarity_pairwise(a[:2], b).tolist() == [0.0, 4.0]


def test_a_precision_that_the_model_cannot_give_is_refused(encoder):
    with pytest.raises(ValueError, match="int8"):
        MtebEncoder(encoder).encode(
            [], task_metadata=ShapesT2I.metadata, hf_split="", hf_subset="", precision="int8"
        )


def test_every_kind_of_task_of_mtebs_own_mocks_runs(encoder):
    logging.disable(logging.WARNING)
    try:
        results = mteb.mock_run(MtebEncoder(encoder)).task_results
    finally:
        logging.disable(logging.NOTSET)
    ran = {name: result for name, result in results.items() if result is not None}
    assert not {name: r for name, r in ran.items() if not isinstance(r, mteb.results.TaskResult)}
    assert {"MockVisualSTS", "MockImageClassification", "MockAny2AnyRetrievalI2T"} <= set(ran)


# what is in an item


def test_a_batch_becomes_items():
    red = Image.new("RGB", (2, 2), "red")
    batch = {
        "id": ["a", "b", "c", "d"],
        "text": ["x", "", "y", ""],
        "image": [None, red, red, None],
    }
    items = batch_items(batch)
    assert [item.kind for item in items] == ["text", "image", "both", "text"]
    assert [item.text for item in items] == ["x", None, "y", ""]
    assert [item.kind for item in batch_items({"text": ["x", ""]})] == ["text", "text"]
    assert [item.kind for item in batch_items({"id": ["a"], "image": [red]})] == ["image"]
    with pytest.raises(ValueError, match="a text, a picture or both"):
        batch_items({"image": [None]})


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "I;16", "CMYK", "1", "LA"])
def test_pictures_of_every_mode_are_what_they_are_from_a_file(mode):
    if mode == "I;16":
        drawn = Image.fromarray((np.arange(256).reshape(16, 16) * 255).astype(np.uint16))
    else:
        drawn = Image.open(BytesIO(picture(3))).convert(mode)
    file = BytesIO()
    drawn.save(file, "TIFF")
    stored = PictureBytes("a", file.getvalue())
    (item,) = batch_items({"image": [Image.open(BytesIO(file.getvalue()))]})
    assert item.picture is not None
    assert item.picture.open().mode == "RGB"
    assert item.picture.open().tobytes() == stored.open().tobytes()
    (again,) = batch_items({"image": [Image.open(BytesIO(file.getvalue()))]})
    (other,) = batch_items({"image": [Image.open(BytesIO(picture(4)))]})
    assert item.content_hash() == again.content_hash() != other.content_hash()


# what mteb's own wrapper makes of the same model


@pytest.fixture(scope="module")
def stock(finished_build) -> SentenceTransformer:
    return SentenceTransformer(str(finished_build), device="cpu")


def mended(stock: SentenceTransformer) -> SentenceTransformerEncoderWrapper:
    """mteb's wrapper, told the modalities."""
    wrapper = SentenceTransformerEncoderWrapper(stock)
    right = {"name": "o/m", "revision": "1", "modalities": ["image", "text"]}
    wrapper.mteb_model_meta = wrapper.mteb_model_meta.model_copy(update=right)
    return wrapper


def test_by_itself_mteb_takes_the_model_for_one_of_texts(stock):
    with pytest.raises(ValueError, match="supports \\['text'\\], but none overlap"):
        by_mteb(stock, ShapesIT2I())


def test_by_itself_mteb_drops_the_pictures_of_a_mixed_corpus(encoder, stock):
    assert by_mteb(stock, ShapesT2Mixed())["ndcg_at_10"] > 0  # a warning in the log, no more
    texts, images = mixed()
    batch = {"text": texts, "image": [i and Image.open(BytesIO(i)) for i in images]}
    theirs = SentenceTransformerEncoderWrapper(stock).encode(_loader([batch]), **DOCUMENTS)
    ours = MtebEncoder(encoder).encode([batch], **DOCUMENTS)
    alone = [i for i, said in enumerate(texts) if not said]
    assert np.ptp(np.asarray(theirs)[alone], axis=0).max() < 1e-5  # all are the empty text
    assert np.ptp(ours[alone], axis=0).max() > 0.01


@pytest.mark.parametrize("kind", [ShapesT2I, ShapesI2T, ShapesIT2I])
def test_told_the_modalities_it_agrees_where_none_of_this_matters(encoder, stock, kind):
    """So what `build` exports needs no code of ours to be run again by others."""
    by_mteb(mended(stock), theirs := kind())
    by_mteb(MtebEncoder(encoder), ours := kind())
    assert ours.per_query == pytest.approx(theirs.per_query, abs=1e-6)


def test_told_the_modalities_it_stops_at_a_candidate_without_a_picture(encoder, stock):
    with pytest.raises(TypeError):
        by_mteb(mended(stock), ShapesT2Mixed())
    assert by_mteb(MtebEncoder(encoder), ShapesT2Mixed())["ndcg_at_10"] > 0


def test_a_text_that_names_a_picture_stays_a_text(encoder, stock, tmp_path):
    path = tmp_path / "named.png"
    path.write_bytes(picture(1))

    class Named(ShapesT2I):
        metadata = metadata("Named", "t2i")
        queries_of = staticmethod(lambda: ([str(path), *map(text, range(1, N))], None))

    inputs = [{"text": [str(path)]}]
    theirs = mended(stock).encode(_loader(inputs), **QUERIES)
    as_picture = vectors(stock, Image.open(path))
    np.testing.assert_allclose(np.asarray(theirs), as_picture, atol=1e-5)
    ours = MtebEncoder(encoder).encode(inputs, **QUERIES)
    chat = [{"role": "user", "content": [{"type": "text", "text": str(path)}]}]
    np.testing.assert_allclose(ours, vectors(stock, chat), atol=1e-5)
    assert np.abs(ours - as_picture).max() > 0.01
    by_mteb(mended(stock), theirs_task := Named())
    by_mteb(MtebEncoder(encoder), ours_task := Named())
    assert theirs_task.per_query["q1"] == pytest.approx(ours_task.per_query["q1"])


IN_ORDER = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endif %}{% endfor %}"
)
"""A chat template that keeps the order of the parts, as most do."""


def test_the_picture_comes_before_the_text_whatever_the_order_of_the_columns(random_model):
    model = SentenceTransformer(str(random_model), device="cpu")
    model[0].processor.chat_template = IN_ORDER
    encoder = Encoder(model, "in-order")
    drawn = Image.open(BytesIO(picture(1)))
    batches = {"text": ["a red star"], "image": [drawn]}, {"image": [drawn], "text": ["a red star"]}
    theirs = [mended(model).encode(_loader([batch]), **QUERIES) for batch in batches]
    ours = [MtebEncoder(encoder).encode([batch], **QUERIES) for batch in batches]
    assert np.abs(theirs[0] - theirs[1]).max() > 0.01
    np.testing.assert_array_equal(ours[0], ours[1])
    unit = theirs[1] / np.linalg.norm(theirs[1])
    np.testing.assert_allclose(ours[0], unit, atol=1e-5)


def _loader(inputs: list[dict[str, Any]]) -> Any:
    """As much of a data loader as mteb's wrapper asks for."""

    class Loader(list):  # type: ignore[type-arg]
        dataset = type("Table", (), {"features": inputs[0]})()

    return Loader(inputs)


# search through an index


@pytest.mark.parametrize("kind", [ShapesT2I, ShapesIT2I, ShapesT2Mixed, ShapesReranking])
def test_a_flat_index_finds_what_mteb_finds(encoder, kind):
    retriever = MtebRetriever(encoder, index="Flat")
    assert isinstance(retriever, EncoderProtocol) and isinstance(retriever, SearchProtocol)
    found = by_mteb(retriever, searched := kind())
    exact = by_mteb(MtebEncoder(encoder), compared := kind())
    assert searched.per_query == pytest.approx(compared.per_query, abs=1e-6)
    assert found["hit_rate_at_5"] == exact["hit_rate_at_5"]


def test_pools_are_ranked_exactly_whatever_the_index(encoder):
    by_mteb(MtebRetriever(encoder, index="IVF4,SQ4"), coarse := ShapesReranking())
    by_mteb(MtebEncoder(encoder), exact := ShapesReranking())
    assert coarse.per_query == pytest.approx(exact.per_query, abs=1e-6)


def test_a_lossy_index_is_what_is_searched(encoder):
    corpora = []

    class Seen(MtebRetriever):
        def search(self, *args: Any, **kwargs: Any) -> Any:
            corpora.append(type(self._index).__name__)
            return super().search(*args, **kwargs)

    by_mteb(Seen(encoder, index="IVF2,SQ4"), lossy := ShapesT2I())
    by_mteb(MtebEncoder(encoder), exact := ShapesT2I())
    assert corpora == ["IndexIVFScalarQuantizer"]
    assert lossy.per_query != exact.per_query


def test_an_index_that_needs_more_than_the_corpus_is_one_line(encoder):
    with pytest.raises(UserError, match="cannot be trained on 24 items"):
        by_mteb(MtebRetriever(encoder, index="IVF256,Flat"), ShapesT2I())


def test_with_an_index_a_corpus_may_lack_texts(encoder):
    class NoneForText(ShapesT2Mixed):
        metadata = metadata("NoneForText", "t2it")
        corpus_of = staticmethod(lambda: ([t or None for t in mixed()[0]], mixed()[1]))

    by_mteb(MtebRetriever(encoder, index="Flat"), lacking := NoneForText())
    by_mteb(MtebEncoder(encoder), task := ShapesT2Mixed())
    assert lacking.per_query == pytest.approx(task.per_query)
    with pytest.raises(AttributeError):  # mteb's own search
        by_mteb(MtebEncoder(encoder), NoneForText())


def test_the_corpus_is_encoded_a_batch_at_a_time(encoder, monkeypatch):
    asked: list[int] = []
    stream = encoder.stream

    def watched(*args: Any) -> Any:
        for positions, rows in stream(*args):
            asked.append(len(positions))
            yield positions, rows

    monkeypatch.setattr(encoder, "stream", watched)
    by_mteb(MtebRetriever(encoder, index="Flat"), ShapesIT2I(), batch_size=5)
    assert asked == 2 * [5, 5, 5, 5, 4]  # the corpus, then the queries
    assert both()[0][0] == text(0)
