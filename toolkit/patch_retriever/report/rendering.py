"""Pages from the templates here: one file that opens anywhere, without network and scripts."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from patch_retriever.report.table import setting_text


def render(template: str, **values: Any) -> str:
    """A page; every text is escaped. Raises if a value is missing."""
    environment = Environment(
        loader=PackageLoader("patch_retriever.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": lambda share: f"{100 * share:.1f}",
        "change": lambda share: f"{100 * share:+.1f}",
        "short": lambda number: f"{number:.3g}",
        "setting": setting_text,
    }
    return environment.get_template(template).render(values) + "\n"
