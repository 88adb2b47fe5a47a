"""Bytes and operations of every stage, from shapes alone.

Memory counts the tensors that a stage holds at its worst moment, without the runtime
(`RUNTIME_BYTES`) and without the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from patch_retriever.activations.kept import KEPT_BYTES
from patch_retriever.patch.methods.alignment import MAX_CANONICAL
from patch_retriever.plan.sizes import CHOSEN, Fits, Sizes, Split
from patch_retriever.sae.settings import MOST_TOKENS

RUNTIME_BYTES = 600_000_000
"""Python, torch and the other libraries, before any work."""
ENTRY_BYTES = 12
"""Of an active concept in sparse codes: its number (int64) and its activation (float32)."""
EIGH, SVD, SOLVE = 8, 24, 5
"""Products of d x d matrices that LAPACK's decompositions take as long as (measured)."""
_MINED = 5
"""Hard negatives of every query."""
_SEEN, _ASKED = 4000, 1000
"""Items of each modality that readouts are aligned by and asked about, at most."""
_READOUTS, _PARTS, _ENDS = 12, 16, 4
"""Readouts of one prompt, the parts that their vectors have, and the ends of the decoder."""


@dataclass(frozen=True)
class Stage:
    """One stage: bytes that it leaves on disk, bytes of memory at its worst moment, and operations
    on the CPU (in float32), on the device in float32 and in float64, and by the model (on the
    device, in its precision)."""

    name: str
    disk: int
    memory: int
    host: float = 0.0
    float32: float = 0.0
    float64: float = 0.0
    model: float = 0.0

    @property
    def operations(self) -> float:
        """All of them."""
        return self.host + self.float32 + self.float64 + self.model


def stages(sizes: Sizes) -> list[Stage]:
    """Every stage of a build that takes long or much."""
    return [
        _readout(sizes),
        _collect(sizes),
        _sae(sizes),
        _features(sizes),
        _score(sizes),
        _select(sizes),
        Stage("export", sizes.parameters * sizes.parameter_bytes + _patch_bytes(sizes), 0),
        _evaluate(sizes),
    ]


def _forward(sizes: Sizes, splits: Sequence[Split]) -> float:
    return 2.0 * sizes.decoder_parameters * sum(map(sizes.tokens, splits))


def _vectors(sizes: Sizes, items: int) -> int:
    """Pooled vectors in float32."""
    return 4 * items * sizes.vector


def _feature_bytes(sizes: Sizes, split: Split) -> int:
    """Pooled vectors, tokens' means and codes."""
    means = 4 * split.items * sizes.width
    return _vectors(sizes, split.items) + means + ENTRY_BYTES * sizes.entries(split)


def _weights(sizes: Sizes) -> int:
    """One matrix of the SAE."""
    return 4 * sizes.width * sizes.concepts


def _square(sizes: Sizes) -> int:
    """One square matrix of a pooled vector's width in float64."""
    return 8 * sizes.vector**2


def _readout(sizes: Sizes) -> Stage:
    seen, asked = sizes.calibration.at_most(_SEEN), sizes.validation.at_most(_ASKED)
    memory = _PARTS * 4 * (seen.items + asked.items) * sizes.width
    share = min(1.0, _ASKED / max(1, sizes.validation.texts)) ** 2
    search = 2.0 * 3 * _READOUTS * share * sizes.validation.comparisons * sizes.vector
    disk = round(_kept_tokens(sizes) * sizes.width * sizes.parameter_bytes)
    return Stage("readout", disk, memory, search, model=_forward(sizes, [seen, asked]))


def _kept_tokens(sizes: Sizes) -> float:
    """Tokens that go through the model while readouts are tried and never again."""
    read = sum(
        sizes.tokens(split)
        for split in (sizes.calibration.at_most(_SEEN), sizes.validation.at_most(_ASKED))
    )
    return min(read, KEPT_BYTES / (_ENDS * sizes.width * sizes.parameter_bytes))


def _kept_forward(sizes: Sizes, most: int) -> float:
    """Operations that those tokens save, `most` of them at the most."""
    return 2.0 * sizes.decoder_parameters * min(most, _kept_tokens(sizes))


def store_tokens(sizes: Sizes) -> int:
    """Tokens that the store keeps."""
    wanted = max(MOST_TOKENS, sizes.sae_steps * sizes.sae_batch)
    return min(sizes.tokens(sizes.calibration), wanted)


def _collect(sizes: Sizes) -> Stage:
    tokens = store_tokens(sizes)
    shard = 2 * 16_384 * 2 * sizes.width
    forward = _forward(sizes, [sizes.calibration])
    forward -= _kept_forward(sizes, sizes.tokens(sizes.calibration.at_most(_SEEN)))
    return Stage("collect", tokens * (2 * sizes.width + 7), shard, model=forward)


def _sae(sizes: Sizes) -> Stage:
    d, c, n = sizes.width, sizes.concepts, sizes.sae_steps * sizes.sae_batch
    held_out = min(16_384, store_tokens(sizes) // 20)
    # weights, both of Adam's moments and a copy in bfloat16; three blocks of the stream
    store = store_tokens(sizes) * 2 * d
    blocks = 3 * store // ceil(store / 536_870_912)
    training = (2 + 4) * _weights(sizes) + _weights(sizes) // 2 + blocks + 4 * 512 * c
    # then the converted SAE beside them, measured on tokens that were held out
    converting = (2 + 4 + 3) * _weights(sizes) + 2 * 4 * held_out * d + 4 * 16_777_216
    memory = max(training, converting)
    operations = 2.0 * n * c * d + 10.0 * n * sizes.active * d + 20.0 * sizes.sae_steps * 2 * c * d
    return Stage("sae", 2 * _weights(sizes), memory, operations + 6.0 * held_out * c * d)


def _features(sizes: Sizes) -> Stage:
    largest = max(_feature_bytes(sizes, split) for split in sizes.splits)
    encoded = sum(map(sizes.tokens, sizes.splits))
    disk = sum(_feature_bytes(sizes, split) for split in sizes.splits)
    # the codes of batches and, stacked, of all
    memory = 2 * _weights(sizes) + 2 * largest
    operations = 2.0 * encoded * sizes.width * sizes.concepts
    forward = _forward(sizes, sizes.splits) - _kept_forward(sizes, encoded)
    return Stage("features", disk, memory, model=operations + forward)


def _score(sizes: Sizes) -> Stage:
    split, d, c = sizes.calibration, sizes.width, sizes.concepts
    entries, vectors = sizes.entries(split), _vectors(sizes, split.items)
    # the vectors centred, normalised and reconstructed; copies of the entries while they are sorted
    memory = 2 * _weights(sizes) + _feature_bytes(sizes, split) + 3 * vectors + 40 * entries
    memory += 4 * 16_777_216
    search = 2 * 2.0 * split.comparisons * d
    sampled = 2.0 * entries * d
    contributions = 4 * sampled * (2 + _MINED)
    pair_entries = entries / max(1, split.items)
    by_pairs = 2.0 * pair_entries**2 * split.texts * d
    by_tiles = 2.0 * c * c * d + 2.0 * entries * c
    operations = search + contributions + min(by_pairs, by_tiles)
    return Stage("score", 100 * c, memory, operations)


def _patch_bytes(sizes: Sizes) -> int:
    """A patch at its largest: all concepts subtracted, and two maps with a group for each
    modality."""
    return 2 * _weights(sizes) + 2 * 3 * _square(sizes) // 2


def _select(sizes: Sizes) -> Stage:
    split, fits = sizes.bounded(sizes.calibration), sizes.fits
    vectors, groups = _vectors(sizes, split.items), 3 if split.both else 2
    # eigenvectors for every group: by all, role and modality; of pairs the covariances, too
    raw = (1 + 2 + groups + 2 * 2) * _square(sizes)
    kept = 4 * (vectors + groups * _square(sizes))
    working = 6 * _square(sizes)
    memory = 2 * _weights(sizes) + _feature_bytes(sizes, split) + vectors + raw + kept + working
    held_out = sizes.validation
    memory += _feature_bytes(sizes, held_out) + 3 * _vectors(sizes, held_out.items)
    memory += 3 * _patch_bytes(sizes)  # draws of a control
    memory += _contrastive_bytes(sizes, split)
    return Stage(
        "select",
        _patch_bytes(sizes),
        memory,
        fits.patches * _evaluation(sizes, held_out),
        _gains(sizes, split) + _contrastive(sizes, split),
        _decompositions(sizes, fits, split.items / groups),
    )


def _decompositions(sizes: Sizes, fits: Fits, rows: float) -> float:
    """Covariances of so many rows, their spectra, and what is made of them."""
    d = sizes.vector
    operations = fits.spectra * (2 * rows * d**2 + (EIGH + 2) * d**3)
    operations += fits.svds * ((SVD + 4) * d**3 + 2 * rows * d**2)
    return operations + fits.solves * SOLVE * d**3


def _gains(sizes: Sizes, split: Split) -> float:
    """Learning gains: forwards and twice backwards through the active entries of every batch."""
    fits, active = sizes.fits, sizes.entries(split) / max(1, split.items)
    step = fits.gain_items * active + 3 * sizes.concepts + fits.gain_items**2 / 2
    return fits.gains * fits.gain_steps * 3 * 2.0 * step * sizes.width


def _contrastive_items(sizes: Sizes, split: Split) -> int:
    """Items of a batch."""
    return min(sizes.fits.contrastive_queries + sizes.fits.contrastive_documents, split.items)


def _contrastive_bytes(sizes: Sizes, split: Split) -> int:
    """At a step of the contrastive alignment: three maps with their gradients and Adam's moments,
    the items of a batch on their way, and its codes."""
    items = _contrastive_items(sizes, split)
    maps = 8 * 3 * 4 * sizes.vector * min(sizes.vector, MAX_CANONICAL)
    entries = items * sizes.entries(split) / max(1, split.items)
    codes = min(40 * entries, 3 * 4.0 * items * sizes.concepts)
    return maps + 6 * _vectors(sizes, items) + round(codes) + 3 * _weights(sizes)


def _contrastive(sizes: Sizes, split: Split) -> float:
    """Learning the contrastive alignments: maps, scores, and the codes of those with concepts."""
    fits, items = sizes.fits, _contrastive_items(sizes, split)
    active = sizes.entries(split) / max(1, split.items)
    canonical = min(sizes.vector, MAX_CANONICAL)
    step = items * (canonical * (sizes.vector + fits.contrastive_queries) + active * sizes.width)
    return fits.contrastive * fits.contrastive_steps * 3 * 2.0 * step


def _evaluation(sizes: Sizes, split: Split) -> float:
    """A patch on a split: subtraction, maps, and every query against every document."""
    subtracted = 2.0 * sizes.entries(split) * sizes.width
    mapped = 2.0 * split.items * sizes.vector**2
    return subtracted + mapped + 2.0 * split.comparisons * sizes.vector


def _evaluate(sizes: Sizes) -> Stage:
    split = sizes.test
    features = _feature_bytes(sizes, split) + 3 * _vectors(sizes, split.items)
    memory = _select(sizes).memory - _feature_bytes(sizes, sizes.validation) + features
    fitted = sizes.bounded(sizes.calibration)
    return Stage(
        "evaluate",
        0,
        memory,
        sizes.fits.shown * _evaluation(sizes, split),
        _gains(sizes, fitted) + _contrastive(sizes, fitted),
        _decompositions(sizes, CHOSEN, fitted.items / 3),
        _forward(sizes, [split]),
    )
