"""The model card of an export."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, StrictUndefined

from patch_retriever.patch.artefact import Patch

_CARD = """\
---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
base_model: {{ base_model }}
tags:
- sentence-transformers
- multimodal-retrieval
- patch-retriever
---
# {{ name }}

`{{ base_model }}`{% if commit %} (commit `{{ commit }}`){% endif %} as a retriever of images,
texts and both, patched by patch-retriever {{ version }}. {{ loading }}

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{{ name }}"{{ ", trust_remote_code=True" if with_code }})
queries = model.encode_query(["{{ example }}"])
documents = model.encode_document([picture, {"image": picture, "text": "a caption"}])
scores = model.similarity(queries, documents)
```

- **readout**: {{ readout }} ({{ chosen_how }}).
{% if instruction == "user" %}
- **prompts**: the readout's own is said after every item; `encode(..., prompt="...")` says another
  in its place.
{% else %}
- **prompts**: the readout's own is said after every item; `encode(..., prompt="...")` says another
  as a system message before it.
{% endif %}
{% if prompts %}
  `prompt_name=` knows the paper's for either side of every direction: {{ prompts | join(", ") }}.
{% endif %}
{% if max_tokens %}
- **token limit**: {{ max_tokens }}; of longer items the text is cut, never the pictures or the
  prompt.
{% endif %}
- **patch**: {{ exported }} ({{ setting }}), which needs {{ needs }}; operators: {{ operators }}.
{% if picked_instead_of %}
  It was picked by its id; held-out queries would have chosen: {{ picked_instead_of }}.
{% endif %}
- **attention sinks**: {{ sinks }}.
{% if adapter %}
- **adapter**: {{ adapter }}.
{% endif %}
- **live, exported and reloaded agree**: largest difference {{ golden }} on the golden inputs
  (`python golden/check.py` repeats the check where you are). One at a time instead of all in a
  batch, embeddings differ by up to {{ by_batch }}.
- **data**: {{ data }}
{% if warning %}

> {{ warning }}
{% endif %}

## Before and after

{{ explanation }}

{{ table }}

{{ verdict }} Curves, concepts, and queries won and
lost: `report/report.html`.
"""

_SHORT_CARD = """\
---
library_name: sentence-transformers
---
# {{ name }}

A retriever of images, texts and both, patched by patch-retriever: {{ operators }}. {{ loading }}

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{{ name }}"{{ ", trust_remote_code=True" if with_code }})
```

`python golden/check.py` checks it where you are.
"""


def model_card(**values: Any) -> str:
    """The card as Markdown; raises if a value is missing."""
    return (
        Environment(undefined=StrictUndefined, trim_blocks=True).from_string(_CARD).render(values)
    )


def short_card(name: str, patch: Patch, with_code: bool, with_adapter: bool = False) -> str:
    """The README of an export that no build made."""
    return (
        Environment(undefined=StrictUndefined, trim_blocks=True)
        .from_string(_SHORT_CARD)
        .render(
            name=name,
            loading=loading(with_code, with_adapter),
            with_code=with_code,
            operators=operators(patch),
        )
    )


def loading(with_code: bool, with_adapter: bool = False) -> str:
    """What a folder needs to be loaded, for its README."""
    if not with_code:
        return "It loads with sentence-transformers alone, without `trust_remote_code`:"
    why = (
        "It keeps its adapter beside the weights"
        if with_adapter
        else "It patches the model between its layers, or brings pictures to the model's precision"
    )
    needs = "sentence-transformers, peft" if with_adapter else "sentence-transformers"
    return (
        f"{why}, which no stock module can: it loads with {needs} and "
        "`trust_remote_code=True`, which runs the one file of code here, "
        "`patched_transformer.py`. `encode(..., patch=False)` gives the model without its patch:"
    )


def operators(patch: Patch) -> str:
    """A patch's operators in order, in words."""
    names = [
        f"subtract {len(subtract.concepts_m)} concepts"
        + (f" at {site}" if site in patch.layers else "")
        for site, subtract in patch.subtractions.items()
    ]
    return ", ".join([*names, *(step.name for step in patch.maps)]) or "none"


def verdict(table: dict[str, Any]) -> str:
    """What test says about the exported choice (`table` as in table.json)."""
    better = [row["method"] for row in table["rows"] if row["score_minus_exported"]["low"] > 0]
    return (
        f"On test, {', '.join(better) or 'no row'} scored significantly better on average than "
        "the exported choice."
    )
