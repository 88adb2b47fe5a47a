"""Asking a finished build's concept table: which rows, in which order."""

from __future__ import annotations

import ast
import json
import operator
from collections.abc import Callable, Iterable
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patch_retriever.errors import UserError, first_line

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

TABLE, ABOUT = "concepts.parquet", "concepts.json"
"""The files in a build's `report`: the table, and what it was computed on."""

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


def words(tokens: Iterable[str] | None) -> list[str]:
    """Different words of a row's `tokens`: " red" and "red" are one."""
    return list(dict.fromkeys(token.strip() for token in tokens or ()))


def read_concepts(folder: Path) -> tuple[pa.Table, dict[str, Any]]:
    """The concept table of a folder made by `build`, and what it was computed on.

    Raises:
        UserError: a file is missing (an older version wrote only one) or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    report = folder / "report"
    try:
        about = json.loads((report / ABOUT).read_text(encoding="utf-8"))
        table = pq.read_table(report / TABLE)
        if missing := {"codes", "items", "pairs", "hard_negatives", "unexplained"} - set(about):
            raise ValueError(f"no {', '.join(sorted(missing))}")
    except (OSError, ValueError, TypeError, pa.ArrowException) as error:
        raise UserError(
            f"{report}: {TABLE} or {ABOUT} is missing or damaged ({first_line(error)}); "
            "run the same build again"
        ) from None
    return table, about


def matching(
    table: pa.Table, where: str | None, sort: str, ascending: bool, limit: int
) -> pa.Table:
    """The first `limit` rows for which `where` holds, by the column `sort` (ties: by concept).

    `where` compares numeric columns with numbers or with each other: `modality > 0.9 and (energy >=
    0.1 or not bridge < attribution)`.

    Raises:
        UserError: `where` is no such expression, or a column is not there or not numeric.
    """
    import pyarrow as pa

    is_number = (pa.types.is_integer, pa.types.is_floating)
    numeric = [f.name for f in table.schema if any(kind(f.type) for kind in is_number)]
    columns = {name: table[name].to_numpy() for name in numeric}
    if sort not in columns:
        raise UserError(f"--sort {sort}: no such column; there are {', '.join(columns)}")
    if where is not None:
        table = table.filter(pa.array(condition(where, columns)))
    order = "ascending" if ascending else "descending"
    return table.sort_by([(sort, order), ("concept", "ascending")]).slice(0, limit)


def condition(where: str, columns: dict[str, np.ndarray]) -> np.ndarray:
    """For every row whether `where` holds, bool (n,). The expression is parsed, never evaluated.

    Raises:
        UserError: it is not made of comparisons of columns and numbers, `and`, `or`, `not`.
    """
    import numpy as np

    def truth(node: ast.expr) -> np.ndarray:
        match node:
            case ast.BoolOp(op=ast.And(), values=parts):
                return reduce(operator.and_, map(truth, parts))
            case ast.BoolOp(op=ast.Or(), values=parts):
                return reduce(operator.or_, map(truth, parts))
            case ast.UnaryOp(op=ast.Not(), operand=part):
                return ~truth(part)
            case ast.Compare(left=left, ops=ops, comparators=rights) if all(
                type(op) in _COMPARE for op in ops
            ):
                values = [number(part) for part in (left, *rights)]
                sides = zip(ops, values, values[1:], strict=False)
                return reduce(operator.and_, (_COMPARE[type(op)](a, b) for op, a, b in sides))
        raise wrong(node)

    def number(node: ast.expr) -> np.ndarray:
        match node:
            case ast.Name(id=name):
                if name not in columns:
                    raise UserError(
                        f"--where {quoted}: no column {name!r} of numbers; "
                        f"there are {', '.join(columns)}"
                    )
                return columns[name].astype(np.float64)
            case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
                return np.full(n_rows, value, dtype=np.float64)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant() as part):
                return -number(part)
        raise wrong(node)

    def wrong(node: ast.expr) -> UserError:
        return UserError(
            f"--where {quoted}: {ast.unparse(node)!r} is not understood; compare columns with "
            "numbers (<, <=, >, >=, ==, !=) and join that with and, or, not, parentheses"
        )

    n_rows = len(next(iter(columns.values())))
    quoted = repr(where if len(where) <= 80 else where[:77] + "...")
    try:
        return truth(ast.parse(where.strip(), mode="eval").body)
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        reason = getattr(error, "msg", None) or first_line(error)
        raise UserError(f"--where {quoted}: not an expression ({reason})") from None
