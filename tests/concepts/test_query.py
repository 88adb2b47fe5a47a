"""Conditions and order over a concept table, against Python's own evaluation row by row."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_retriever.concepts.query import condition, matching
from patch_retriever.errors import UserError

steady = settings(deadline=None, derandomize=True)
ROWS = [
    {"concept": i, "energy": (i * 7 % 5) / 4, "modality": (i * 3 % 4) / 3, "bridge": -1 + i / 6}
    for i in range(13)
]
COLUMNS = {name: np.array([row[name] for row in ROWS]) for name in ROWS[0]}
TABLE = pa.table({**COLUMNS, "why": [f"reason {i}" for i in range(13)]})

sides = st.sampled_from([*COLUMNS, "0", "1", "0.5", "-0.25", "1e-3", "7"])
comparisons = st.builds(
    lambda first, more: first + "".join(f" {sign} {side}" for sign, side in more),
    sides,
    st.lists(
        st.tuples(st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), sides),
        min_size=1,
        max_size=3,
    ),
)
expressions = st.recursive(
    comparisons,
    lambda parts: st.one_of(
        st.builds("({} and {})".format, parts, parts),
        st.builds("({} or {})".format, parts, parts),
        st.builds("{} and {} or {}".format, parts, parts, parts),
        st.builds("not {}".format, parts),
    ),
    max_leaves=8,
)


@steady
@given(expressions)
def test_a_condition_holds_where_python_says_so(expression):
    expected = [bool(eval(expression, {"__builtins__": {}}, row)) for row in ROWS]
    assert condition(f" {expression} ", COLUMNS).tolist() == expected


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("modalty > 0.9", "no column 'modalty' of numbers; there are concept, energy,"),
        ("why == 1", "no column 'why'"),
        ("modality > 'text'", "'text'"),
        ("modality", "'modality' is not understood"),
        ("0.5", "is not understood"),
        ("", "not an expression"),
        ("modality >", "not an expression"),
        ("modality > 1 2", "not an expression"),
        ("modality = 1", "not an expression"),
        ("(modality > 1", "not an expression"),
        ("modality > True", "'True' is not understood"),
        ("modality + 1 > 2", "'modality + 1' is not understood"),
        ("modality > -energy", "is not understood"),
        ("modality in energy", "is not understood"),
        ("modality is energy", "is not understood"),
        ("abs(modality) > 1", "'abs(modality)' is not understood"),
        ("__import__('os').getcwd() == 1", "is not understood"),
        ("energy.__class__ > 1", "'energy.__class__' is not understood"),
        ("[1 for x in ()] > 1", "is not understood"),
        ("(x := 1) > 0", "is not understood"),
        ("lambda: 1", "is not understood"),
        ("energy > 1" + "0" * 400, "not an expression"),
        ("energy > 1\0", "not an expression"),
        ("not " * 100_000 + "energy > 1", "not an expression"),
    ],
)
def test_what_is_no_condition_is_said_in_one_line(where, said):
    with pytest.raises(UserError) as caught:
        condition(where, COLUMNS)
    message = str(caught.value)
    assert message.startswith("--where ")
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize("ascending", [True, False])
@pytest.mark.parametrize("sort", list(COLUMNS))
@pytest.mark.parametrize("where", [None, "energy > 0.2", "energy > 9"])
def test_rows_are_filtered_then_sorted_then_cut(where, sort, ascending):
    rows = [row for row in ROWS if where is None or eval(where, {}, row)]
    rows.sort(key=lambda row: (row[sort] if ascending else -row[sort], row["concept"]))
    found = matching(TABLE, where, sort, ascending, 4)
    assert found["concept"].to_pylist() == [row["concept"] for row in rows[:4]]


def test_an_unknown_or_wordy_column_to_sort_by_is_named():
    for name in ("beauty", "why"):
        with pytest.raises(UserError, match=f"--sort {name}: no such column; there are concept, e"):
            matching(TABLE, None, name, False, 4)
