"""`patch-retriever concepts` on a finished build."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pytest

from commands import error_line, invoke
from patch_retriever.concepts.table import ConceptTable
from patch_retriever.patch.artefact import Patch


def shown(*args):
    result = invoke("concepts", *args)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return result.stdout


@pytest.fixture(scope="module")
def frame(finished_build):
    return pd.read_parquet(finished_build / "report/concepts.parquet")


def numbers(text):
    """The first column of the table."""
    _, _, table = text.partition("first\n\n")
    return [int(line.split()[0]) for line in table.splitlines()[1:]]


def test_the_table_of_a_build_is_complete(finished_build, frame):
    scores = vars(ConceptTable.load(finished_build / "run/score/concepts.parquet"))
    assert len(frame) == len(scores["energy"]) == 128
    for name in scores:
        assert frame[name].notna().all(), name
    assert frame["frequency"].between(0, 1).all()
    roles = frame[["role_image", "role_text", "role_instruction", "role_special"]]
    assert (roles.to_numpy() >= 0).all()
    assert (roles.sum() > 0).all()
    assert frame["tokens"].map(len).eq(8).all()
    patch = Patch.load(finished_build / "patch")
    assert {i: s for i, s in enumerate(frame["strength"]) if s} == patch.strengths
    chosen = frame[frame["strength"] > 0]
    assert chosen["why"].str.startswith(patch.about["method"]).all()
    assert set(frame.drop(chosen.index)["why"]) <= {""}


def test_top_items_are_of_their_kind_and_active(finished_build, frame):
    from patch_retriever.features import Features
    from patch_retriever.items import KINDS

    features = Features.load(finished_build / "run/features/calibration.safetensors")
    codes_nc = features.codes.dense()
    for concept, row in frame.iterrows():
        for name, kind in (("top_images", "image"), ("top_texts", "text")):
            found = row[name]
            values = [entry["value"] for entry in found]
            assert values == sorted(values, reverse=True)
            of_kind_nc = codes_nc[features.kinds_n == KINDS.index(kind)]
            assert len(found) == min(8, int((of_kind_nc[:, concept] != 0).sum()))
            for entry in found:
                assert features.kinds_n[entry["item"]] == KINDS.index(kind)
                assert float(codes_nc[entry["item"], concept]) == entry["value"]


def test_the_largest_attributions_come_first(finished_build, frame):
    text = shown(finished_build)
    order = frame.sort_values(["attribution", "concept"], ascending=[False, True])
    assert numbers(text) == order["concept"].tolist()[:20]
    assert "20 of 128 concepts, by attribution, largest first" in text


def test_rows_can_be_chosen_and_ordered(finished_build, frame):
    where = "modality > 0.5 and not frequency <= 0.02"
    text = shown(finished_build, "--where", where, "--sort", "energy", "--ascending", "--limit", 7)
    some = frame[(frame["modality"] > 0.5) & ~(frame["frequency"] <= 0.02)]
    assert numbers(text) == some.sort_values(["energy", "concept"])["concept"].tolist()[:7]


def test_columns_are_aligned_and_named(finished_build, frame):
    head, *rows = shown(finished_build, "--limit", 5).partition("first\n\n")[2].splitlines()
    place = head.index("frequency") + len("frequency")
    for row in rows:
        frequency = frame["frequency"][int(row.split()[0])]
        assert row[:place].split()[2] == f"{frequency:.3g}"


def test_it_says_what_was_scored_and_what_the_codes_leave_unexplained(finished_build):
    text = shown(finished_build)
    about = json.loads((finished_build / "report/concepts.json").read_text())
    assert "scored on codes of tokens, pooled" in text
    for codes in ("tokens", "pooled"):
        assert set(about["unexplained"][codes]) == {"all", "text", "image", "both"}
        assert f"text {about['unexplained'][codes]['text']:.3f}" in text


def test_json_has_every_column(finished_build, frame):
    found = json.loads(shown(finished_build, "--limit", 3, "--json"))
    assert found["folder"] == str(finished_build)
    assert (found["codes"], set(found["unexplained"])) == ("tokens", {"tokens", "pooled"})
    assert found["hard_negatives"] > found["pairs"] > 0
    assert len(found["concepts"]) == 3
    assert set(found["concepts"][0]) == set(frame.columns)


def test_a_condition_that_nothing_meets_shows_no_rows(finished_build):
    text = shown(finished_build, "--where", "energy < 0")
    assert "0 of 128 concepts" in text
    assert numbers(text) == []


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--sort", "beauty"], "--sort beauty: no such column; there are concept, energy"),
        (["--where", "beauty > 1"], "--where 'beauty > 1': no column 'beauty' of numbers; there"),
        (["--where", "energy >"], "--where 'energy >': not an expression"),
        (["--limit", "0"], "Invalid value for '--limit'"),
    ],
)
def test_a_wrong_wish_is_one_line(finished_build, args, said):
    assert error_line(invoke("concepts", finished_build, *args)).startswith(said)


def test_a_folder_that_is_no_build_is_named(tmp_path):
    line = error_line(invoke("concepts", tmp_path))
    assert line.startswith(f"{tmp_path}: not made by patch-retriever")
    line = error_line(invoke("concepts", tmp_path / "gone"))
    assert line == f"{tmp_path / 'gone'}: no such folder"


@pytest.mark.parametrize("name", ["concepts.parquet", "concepts.json"])
def test_a_damaged_or_missing_table_is_named(finished_build, tmp_path, name):
    for path in ("modules.json", "patch-retriever.json"):
        shutil.copy(finished_build / path, tmp_path / path)
    shutil.copytree(finished_build / "report", tmp_path / "report")
    (tmp_path / "report" / name).write_text("{")
    assert error_line(invoke("concepts", tmp_path)).startswith(f"{tmp_path / 'report'}: ")
    (tmp_path / "report" / name).unlink()
    assert error_line(invoke("concepts", tmp_path)).startswith(f"{tmp_path / 'report'}: ")
