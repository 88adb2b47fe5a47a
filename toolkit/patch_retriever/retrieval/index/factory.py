"""What an index is made of: FAISS factory strings, names for the usual ones, their settings."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from patch_retriever.errors import UserError, first_line

if TYPE_CHECKING:
    import faiss
    import numpy as np
    from numpy.typing import NDArray

NAMES = ("auto", "flat", "ivf", "hnsw", "ivf-pq", "sq8", "rabitq")
EXACT_UP_TO = 100_000
"""Items that `auto` searches exactly: no index is needed for so few."""
PLAIN_UP_TO = 1_000_000
"""Items up to which `auto` keeps whole vectors in its lists; above, a byte a dimension."""
POINTS_PER_LIST = 40
"""Of the training sample; FAISS asks for 39."""
SAMPLE = 65_536
"""Training points at least, where there are as many: what an 8-bit product quantizer asks for."""


def factory_string(factory: str, n: int, dimension: int) -> str:
    """The FAISS factory string for one of `NAMES`; anything else is one already.

    Args:
        factory: a name or a factory string.
        n: how many items the index is made for.
        dimension: of their vectors.
    """
    lists = _lists(n)
    auto = "flat" if n <= EXACT_UP_TO else "ivf" if n <= PLAIN_UP_TO else "ivf-sq8"
    return {
        "flat": "Flat",
        "ivf": f"IVF{lists},Flat",
        "ivf-sq8": f"IVF{lists},SQ8",
        "hnsw": "HNSW32",
        "ivf-pq": f"RR{dimension},IVF{lists},PQ{_parts(dimension)}x8",
        "sq8": "SQ8",
        "rabitq": f"RR{dimension},RaBitQ",  # a bit a dimension, which all must weigh the same
    }.get(auto if factory == "auto" else factory, factory)


def _lists(n: int) -> int:
    """Inverted lists: about 4 sqrt(n), and enough points for each to be trained."""
    wanted = max(1, min(round(4 * math.sqrt(n)), n // POINTS_PER_LIST))
    return 1 << (wanted.bit_length() - 1)


def _parts(dimension: int) -> int:
    """Parts of a product quantizer: a byte for every eight dimensions, where they divide."""
    return max(m for m in range(1, max(1, dimension // 8) + 1) if dimension % m == 0)


def new_index(factory: str, dimension: int) -> faiss.Index:
    """An empty index by inner product that takes vectors with numbers of their own.

    Raises:
        UserError: FAISS does not understand the string, or it does not fit the dimension.
    """
    faiss = import_faiss()
    try:
        index = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise UserError(
            f"index {factory!r}: FAISS makes no index of {dimension} dimensions from it "
            f"({_reason(error)}); give {', '.join(NAMES)} or a FAISS factory string"
        ) from None
    _settle(index)
    if not isinstance(index, faiss.IndexIDMap) and not _keeps_numbers(index):
        index = faiss.IndexIDMap(index)
    return index


def check_factory(factory: str, n: int, dimension: int) -> None:
    """Refuse an index that cannot be made of n items, before they are encoded.

    Raises:
        UserError: FAISS does not understand the string, it does not fit the dimension, or it wants
            more items to train on.
    """
    string = factory_string(factory, n, dimension)
    index = new_index(string, dimension)
    core = _core(index)
    quantizer = getattr(core, "pq", None)
    wanted = max(getattr(core, "nlist", 0), 0 if quantizer is None else quantizer.ksub)
    if string.startswith("OPQ"):  # its rotation is learned with a quantizer of eight bits
        wanted = max(wanted, 256)
    if n < wanted:
        raise _too_few(string, n, f"it wants {wanted} at least")


def _too_few(factory: str, n: int, reason: str) -> UserError:
    return UserError(
        f"index {factory!r}: cannot be trained on {n} items ({reason}); take flat or hnsw for so "
        "few, or fewer lists"
    )


def train(index: faiss.Index, sample_td: NDArray[np.float32], factory: str) -> None:
    """Train `index` on a sample of what it will hold.

    Raises:
        UserError: the sample is too small for this index.
    """
    try:
        index.train(sample_td)
    except RuntimeError as error:
        raise _too_few(factory, len(sample_td), _reason(error)) from None


def sample_size(index: faiss.Index) -> int:
    """How many vectors to train `index` on; 0 where it needs no training."""
    if index.is_trained:
        return 0
    ivf = _ivf(_inner(index))
    return max(SAMPLE, POINTS_PER_LIST * ivf.nlist if ivf is not None else 0)


def default_search(index: faiss.Index) -> dict[str, int]:
    """Search settings to begin with: FAISS's own (one list, 16 neighbours) find too little."""
    faiss = import_faiss()
    inner = _inner(index)
    ivf = _ivf(inner)
    if ivf is not None:
        return {"nprobe": min(ivf.nlist, max(8, ivf.nlist // 32))}
    return {"efSearch": 64} if isinstance(inner, faiss.IndexHNSW) else {}


def set_search(index: faiss.Index, settings: Mapping[str, int]) -> None:
    """Set `nprobe`, `efSearch`, ... for the searches that follow.

    Raises:
        UserError: this kind of index has no such setting.
    """
    space = import_faiss().ParameterSpace()
    for name, value in settings.items():
        try:
            space.set_index_parameter(index, name, value)
        except RuntimeError:
            raise UserError(
                f"{name}={value}: not a search setting of this index; IVF indexes have nprobe, "
                "HNSW indexes efSearch"
            ) from None


def reserve(index: faiss.Index, count: int) -> None:
    """Take the room for `count` vectors at once; growing as they come takes up to twice as much."""
    faiss = import_faiss()
    codes = _core(index)
    if isinstance(codes, faiss.IndexHNSW):
        codes = faiss.downcast_index(codes.storage)
    if isinstance(codes, faiss.IndexFlatCodes):
        held = codes.codes.size()
        codes.codes.resize(held + count * codes.code_size)
        codes.codes.resize(held)


def flat_vectors(index: faiss.Index) -> FlatVectors | None:
    """The vectors of an index that holds them whole, in the order of their adding."""
    is_flat = isinstance(_inner(index), import_faiss().IndexFlat)
    return FlatVectors(index) if is_flat else None


class FlatVectors:
    """The vectors (n, d) of a Flat index, read like an array."""

    def __init__(self, index: faiss.Index) -> None:
        self._owner = index  # what is inside dies with it
        self._index = _inner(index)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def __getitem__(self, at: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        if isinstance(at, slice):
            start, stop, _ = at.indices(len(self))
            return self._index.reconstruct_n(start, stop - start)
        return self._index.reconstruct_batch(at)


def to_gpu(index: faiss.Index) -> faiss.Index:
    """A copy on all GPUs, where this FAISS has any and they take this kind of index."""
    faiss = import_faiss()
    if not getattr(faiss, "get_num_gpus", int)():
        return index
    try:
        return faiss.index_cpu_to_all_gpus(index)
    except RuntimeError:  # HNSW, RaBitQ
        return index


def import_faiss() -> Any:
    """FAISS.

    Raises:
        UserError: it is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise UserError(
            "FAISS is not installed; pip install faiss-cpu (or faiss-gpu for an NVIDIA GPU)"
        ) from None
    return faiss


@contextmanager
def matrix_products() -> Iterator[None]:
    """While this lasts, FAISS multiplies matrices from four queries on.

    Version 1.15 by itself compares query by query below 128,000 numbers of queries (125 queries of
    1,024 dimensions), which takes up to 14 times as long (recipes/benchmarks/search.py).
    """
    settings = import_faiss().cvar
    before = settings.distance_compute_blas_threshold
    settings.distance_compute_blas_threshold = 4
    try:
        yield
    finally:
        settings.distance_compute_blas_threshold = before


def _inner(index: faiss.Index) -> Any:
    """What an ID map is around, as its own class."""
    faiss = import_faiss()
    index = faiss.downcast_index(index)
    return faiss.downcast_index(index.index) if isinstance(index, faiss.IndexIDMap) else index


def _core(index: faiss.Index) -> Any:
    """What is inside an ID map and behind a rotation, as its own class."""
    faiss = import_faiss()
    inner = _inner(index)
    behind = isinstance(inner, faiss.IndexPreTransform)
    return faiss.downcast_index(inner.index) if behind else inner


def _ivf(index: faiss.Index) -> Any:
    """The inverted lists inside an index, as their own class; None if it has none."""
    faiss = import_faiss()
    found = faiss.try_extract_index_ivf(index)
    return None if found is None else faiss.downcast_index(found)


def _settle(index: faiss.Index) -> None:
    """No page of warnings where a sample is small (k-means says one for every part), and no
    polysemous training of product quantizers: it permutes codes for a Hamming filter that is not
    used here, finds nothing more, and takes hundreds of times as long as the rest."""
    core = _core(index)
    trained: Any
    for trained in (core, getattr(core, "pq", None)):
        if hasattr(trained, "cp"):
            trained.cp.min_points_per_centroid = 1
    if hasattr(core, "do_polysemous_training"):
        core.do_polysemous_training = False


def _keeps_numbers(index: Any) -> bool:
    """Whether vectors are stored with their numbers, without an ID map around the index."""
    return isinstance(_core(index), import_faiss().IndexIVF)


def _reason(error: RuntimeError) -> str:
    """What FAISS says, without where in its source it says it."""
    return re.sub(r"^.*( failed: |\.cpp:\d+: )", "", first_line(error))
