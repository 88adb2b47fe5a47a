"""What a plan follows from: items of every split, widths, and how much is tried."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import exp

from patch_retriever.patch.fit import ContrastiveSettings
from patch_retriever.patch.gains import GainSettings

TEXT_TOKENS = 64
"""Assumed for a text with its prompt."""
ITEM_TOKENS = 24
"""Assumed for the prompt around an image."""


@dataclass(frozen=True)
class Split:
    """Items of a split by modality, and how many (query, document) comparisons its tasks make."""

    texts: int
    images: int
    both: int = 0
    comparisons: int = 0

    @property
    def items(self) -> int:
        """All of them."""
        return self.texts + self.images + self.both

    def at_most(self, n: int) -> Split:
        """A part of it, of up to n items of each modality."""
        return Split(*(min(n, have) for have in (self.texts, self.images, self.both)))

    @classmethod
    def of_pairs(cls, n: int) -> Split:
        """n pairs, asked in both directions."""
        return cls(n, n, 0, 2 * n * n)


@dataclass(frozen=True)
class Fits:
    """How much is fitted and tried where the methods are chosen.

    The defaults are those of all settings of all methods: `spectra` are different covariances,
    `svds` the alignments, `patches` are evaluated on validation and `shown` on test.
    """

    spectra: int = 146
    svds: int = 33
    solves: int = 20
    gains: int = 3
    gain_steps: int = GainSettings().steps
    gain_items: int = 1024
    contrastive: int = 3
    contrastive_steps: int = ContrastiveSettings().steps
    contrastive_queries: int = ContrastiveSettings().queries
    contrastive_documents: int = ContrastiveSettings().documents
    patches: int = 376
    shown: int = 60


CHOSEN = Fits(spectra=40, svds=8, solves=2, gains=3, patches=60)
"""One setting of every method, as it is fitted again for the test split."""


@dataclass(frozen=True)
class Sizes:
    """What a plan follows from."""

    calibration: Split
    validation: Split
    test: Split
    width: int
    concepts: int
    active: int
    """Active concepts of a token (k)."""
    image_tokens: int
    parameters: int = 0
    decoder_parameters: int = 0
    parameter_bytes: int = 4
    sae_steps: int = 600
    sae_batch: int = 1024
    most: int = 20_000
    """Calibration items of a modality that methods are fitted on."""
    parts: int = 1
    """Of a pooled vector: two where it is a mean and the last token."""
    pooled_tokens: bool = True
    """Whether the readout pools all tokens; the last alone holds few concepts."""
    fits: Fits = field(default_factory=Fits)

    @property
    def vector(self) -> int:
        """Width of a pooled vector."""
        return self.parts * self.width

    @property
    def splits(self) -> tuple[Split, Split, Split]:
        """Calibration, validation, test."""
        return self.calibration, self.validation, self.test

    def tokens(self, split: Split) -> int:
        """Tokens of all items of a split."""
        image = self.image_tokens + ITEM_TOKENS
        return split.texts * TEXT_TOKENS + split.images * image + split.both * (image + TEXT_TOKENS)

    def entries(self, split: Split) -> int:
        """Active concepts of all items of a split, at most: as if every token drew its own."""

        def of_item(tokens: int) -> float:
            if not self.pooled_tokens:
                return self.active
            return self.concepts * (1 - exp(-self.active * tokens / self.concepts))

        image = of_item(self.image_tokens + ITEM_TOKENS)
        text = of_item(TEXT_TOKENS)
        return round(split.texts * text + (split.images + split.both) * image)

    def bounded(self, split: Split) -> Split:
        """The part of a split that methods are fitted on."""
        return split.at_most(self.most)
