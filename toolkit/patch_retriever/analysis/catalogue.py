"""What the analysis can show: a name, a title and a paragraph for each figure and table.

Nothing heavy is imported here: the command's help lists the names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from patch_retriever.errors import UserError


@dataclass(frozen=True)
class Entry:
    """A figure or table: its title, and what it is, on which split, and how to read it."""

    title: str
    text: str


CATALOGUE: dict[str, Entry] = {
    "fig2": Entry(
        "Modality scores, weighted by energy (the paper's Fig. 2)",
        "Each concept has a modality score, E_text[z] / (E_text[z] + E_image[z]): 1 fires for "
        "texts only, 0 for images only. The histogram adds up the energy E[z] of the concepts in "
        "each bin, so a peak at 1 says that text semantics fill the vectors. Pooled codes of the "
        "calibration split. The paper finds two balanced peaks in CLIP and SigLIP, one large peak "
        "at 1 in MLLMs.",
    ),
    "fig3": Entry(
        "Energy concentration (Fig. 3)",
        "Concepts in the order of their energy E[z], and the share of all energy that the first of "
        "them hold. The paper counts the concepts that 99% of the energy needs: 2-5% in CLIP and "
        "SigLIP, 5-8% in MLLMs. Pooled codes of the calibration split.",
    ),
    "table1": Entry(
        "Overlap of the strongest concepts (Table 1)",
        "The concepts with the highest energy (E), retrieval attribution (A) and bridge score (B, "
        "row sum plus column sum of |B|), and how far the three sets are the same: Jaccard "
        "|X and Y| / |X or Y|, for all three |E and A and B| / |E or A or B| (the paper gives no "
        "formula for its triple overlap). The last column is what two random sets of that size "
        "would have. Scores of the calibration split.",
    ),
    "table2": Entry(
        "Removal of the attribution subspace (Table 2), with its controls",
        "The paper projects the span of the 1% of concepts with the highest attribution out of "
        "every vector and reads the gain as proof that they distract. Beside it stand random "
        "subspaces of the same rank, the span of random concepts of the same energy (means over "
        "three draws), plain centring and ReAlign, all on the build's readout. Per side, task by "
        "task: with the statistics of the queries and of the documents of each task, as in the "
        "paper; an exported model cannot know the task, but the modality. Statistics from "
        "calibration, ReAlign's beta (where not the paper's) from validation, numbers from test.",
    ),
    "fig4": Entry(
        "Token roles left out of the mean (Fig. 4)",
        "The mean over all tokens of the last layer, and the same without the image tokens, "
        "without the instruction that follows the item, and without the template (chat markup and "
        "special tokens). An item that would have no token left keeps all. Numbers from test, "
        "differences to the mean over all tokens of the same prompt.",
    ),
    "fig5": Entry(
        "Layer by layer (Fig. 5)",
        "Mean and last token of the residual stream after every decoder layer, and of the last "
        "hidden state (after the final norm), raw and after per-modality centring with the means "
        "of calibration. Numbers from test, differences to the last hidden state with the same "
        "prompt and pooling. The paper has the raw mean only.",
    ),
    "fig6": Entry(
        "ReAlign over its shrinkage beta (Fig. 6)",
        "Whitening per side (queries, documents) of each task, as in the paper, and per modality, "
        "with the covariance shrunk towards a multiple of the identity: beta 0 is ZCA whitening, "
        "beta 1 is centring. Statistics from "
        "calibration, numbers from test on the build's readout; the score on validation stands "
        "beside them, by which one would choose.",
    ),
    "table5": Entry(
        "Pooling and prompts (Table 5)",
        "Mean, last token, maximum and minimum of the last hidden state under four prompts: none "
        "(plain), the paper's, this project's one-word prompt and E5-V's wording, the latter two "
        "with the assistant's turn opened. `before the last MLP` is FreeRet's readout: the "
        "residual stream after the last layer's attention. Raw, and after per-modality centring "
        "with the means of calibration. Numbers from test, differences to the paper's readout "
        "(its prompt, mean over all tokens, raw).",
    ),
    "table8": Entry(
        "PCA, ZCA and ReAlign (Table 8)",
        "Whitening per side of each task, as in the paper, and per modality, on the build's "
        "readout: on principal axes (PCA), turned back to the "
        "original axes (ZCA), and ZCA with a shrunk covariance (ReAlign), at the paper's beta of "
        "0.1 and at the beta that validation chooses. Where each side is whitened by itself, PCA "
        "puts them on unrelated axes; with one basis for all items it gives "
        "the similarities of ZCA with one basis. Statistics from calibration, numbers from test.",
    ),
    "removal-curve": Entry(
        "Recall against the number of concepts removed (not in the paper)",
        "Concepts are subtracted from the tokens one after the other, in the order of a selection: "
        "highest attribution (the paper's), lowest discriminative attribution on raw or centred "
        "codes, text-dominant and unimodal ones by energy. Dashed in the same colour: random "
        "concepts of the same energy, means over three draws; a selection means something where it "
        "leaves its dashed line. Without anything after it, and followed by centring. Scores and "
        "statistics from calibration, numbers from test on the build's readout, bands are 95% "
        "intervals (bootstrap over queries).",
    ),
    "pairs-curve": Entry(
        "Recall against the number of pairs (not in the paper)",
        "What is fitted on pairs of a text and its image, from 25 pairs to all that calibration "
        "has of one caption style: learned concept gains, the same gains on principal components, "
        "ReAlign then Procrustes, CCA, and a linear map (ridge). Tested on the style that was "
        "fitted and on the others: an alignment that holds for one style only is a win on that "
        "style only. Means over three draws of the pairs; unpaired statistics (means, covariances) "
        "come from images and texts of that style, strengths from validation on it, recalls "
        "from test; bands are 95% intervals (bootstrap over queries).",
    ),
}


def names_of(only: str | None) -> tuple[str, ...]:
    """The names in a comma-separated list, in the catalogue's order; all of them for None.

    Raises:
        UserError: one is unknown, or there is none.
    """
    if only is None:
        return tuple(CATALOGUE)
    asked = [name.strip() for name in only.split(",") if name.strip()]
    for name in asked:
        if name not in CATALOGUE:
            raise UserError(f"--only: no {name!r} here; there are {', '.join(CATALOGUE)}")
    if not asked:
        raise UserError(f"--only: names nothing; there are {', '.join(CATALOGUE)}")
    return tuple(name for name in CATALOGUE if name in asked)


def readme(sections: Sequence[tuple[str, str]]) -> str:
    """The README of an analysis: (name, body in Markdown) under their titles."""
    parts = [
        f"## {name}: {CATALOGUE[name].title}\n\n{CATALOGUE[name].text}\n\n{body}"
        for name, body in sections
    ]
    return "\n\n".join([_HEAD, *parts]) + "\n"


_HEAD = """\
# Analysis

Recalls are shares of queries with a relevant document among the first k (in percent here, as
fractions in the CSV files), ties counted against the query. The score is the mean of R@1, R@5 and
R@10 over all tasks; a difference stands with its 95% interval (paired bootstrap over queries).
What is fitted per modality is told the kind of an item here; an exported patch has a gate for that.
Every row of a CSV file says which split its number is from."""
