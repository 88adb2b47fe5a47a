"""The model card of an export."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, StrictUndefined

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

`{{ base_model }}` as a retriever of images, texts and both, patched by patch-retriever
{{ version }}. It loads with sentence-transformers alone, without `trust_remote_code`:

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{{ name }}")
queries = model.encode_query(["{{ example }}"])
documents = model.encode_document([picture, {"image": picture, "text": "a caption"}])
scores = model.similarity(queries, documents)
```

- **readout**: {{ readout }} ({{ chosen_how }}).
- **patch**: {{ exported }} ({{ setting }}), which needs {{ needs }}; operators: {{ operators }}.
- **live, exported and reloaded agree**: largest difference {{ golden }} on the golden inputs
  (`python golden/check.py` repeats the check where you are).
- **data**: {{ data }}
{% if warning %}

> {{ warning }}
{% endif %}

## Before and after

{{ explanation }}

{{ table }}

{{ verdict }}
"""


def model_card(**values: Any) -> str:
    """The card as Markdown; raises if a value is missing."""
    return (
        Environment(undefined=StrictUndefined, trim_blocks=True).from_string(_CARD).render(values)
    )
