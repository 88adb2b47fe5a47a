"""A corpus from whatever holds it: its ids, its items one at a time, and what is wrong with it."""

from __future__ import annotations

import csv
import json
import random
import tempfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from patch_retriever.errors import UserError
from patch_retriever.items import Item
from patch_retriever.pictures.picture import PictureFile
from patch_retriever.pictures.stores import picture_at
from patch_retriever.retrieval.readers.items import read_corpus
from patch_retriever.texts import text_fault
from stored import BROKEN, SOUND, write_tar


def written(folder: Path, *lines: str) -> Path:
    path = folder / "items.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_texts_images_and_both_are_read(tmp_path):
    path = written(
        tmp_path,
        '{"text": "a red star"}',
        '{"image": "sub/a.png"}',
        "",
        '{"text": "what is this?", "image": "b.png"}',
        '{"text": "", "image": "c.png"}',
        '{"text": null, "image": "/d.png", "id": 7}',
    )
    assert list(read_corpus(path).items) == [
        Item("a red star"),
        Item(picture=PictureFile(tmp_path / "sub/a.png")),
        Item("what is this?", PictureFile(tmp_path / "b.png")),
        Item(picture=PictureFile(tmp_path / "c.png")),
        Item(picture=PictureFile(Path("/d.png"))),
    ]


def test_a_line_separator_inside_a_text_does_not_end_the_row(tmp_path):
    text = "copied\u2028from the web"
    path = written(tmp_path, json.dumps({"text": text}, ensure_ascii=False), '{"text": "b"}')
    assert [item.text for item in read_corpus(path).items] == [text, "b"]


def says(path: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        read_corpus(path)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    says(tmp_path / "nowhere.jsonl", "nowhere.jsonl: cannot be read")


def test_a_picture_in_the_place_of_its_folder_is_named(tmp_path):
    path = tmp_path / "a.jpg"
    Image.new("RGB", (4, 4)).save(path)
    says(path, "a.jpg: a picture; give the folder that it lies in")


def test_an_empty_folder_is_named(tmp_path):
    says(tmp_path, f"{tmp_path}: empty; pictures, or rows")


def test_an_empty_file_is_named(tmp_path):
    says(written(tmp_path, "", " "), "items.jsonl: empty", '"text"')


def test_a_file_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_bytes(b"\xff\xfe\x00")
    says(path, "items.jsonl: cannot be read")


@pytest.mark.parametrize("line", ["{not json", "[1]", "null", "7", '"text"'])
def test_a_line_that_is_no_object_is_named(tmp_path, line):
    says(written(tmp_path, '{"text": "a"}', "", line), "items.jsonl:3: not a JSON object")


@pytest.mark.parametrize(
    "line",
    [
        *("{}", '{"text": ""}', '{"text": 7}', '{"words": "a"}', '{"image": []}'),
        *('{"image": ["a.png", 7]}', '{"image": ["a.png", null], "text": "a"}'),
    ],
)
def test_a_line_without_text_or_image_is_named(tmp_path, line):
    says(written(tmp_path, '{"text": "a"}', line), "items.jsonl:2:", '"text", "image" or both')


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


# folders


def test_a_folder_is_its_pictures_by_their_paths(photo_folder):
    (photo_folder / "more").mkdir()
    (photo_folder / "more/a b.JPG").write_bytes(SOUND["cmyk.jpg"])
    (photo_folder / "7.txt").write_text("not asked for")
    corpus = read_corpus(str(photo_folder))
    assert sorted(corpus.ids) == sorted([*(f"{i}.png" for i in range(60)), "more/a b.JPG"])
    assert list(corpus.items) == [Item(picture=PictureFile(photo_folder / i)) for i in corpus.ids]
    assert corpus.skipped == ()


def test_a_folder_with_only_a_table_is_read_by_it(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "/elsewhere/a.png", "text": "a"}')
    corpus = read_corpus(tmp_path)
    assert list(corpus.items) == [Item("a", PictureFile(Path("/elsewhere/a.png")))]


# the same items in every file


RECORDS = [
    {"id": f"item {n}", "text": f"text {n}" if n % 3 else None, "image": n % 2 == 0}
    for n in range(40)
    if n % 3 or n % 2 == 0
]
PICTURE = dict(enumerate([*SOUND.values(), *BROKEN.values()] * 5))


def as_jsonl(folder: Path) -> str:
    lines = []
    for n, record in enumerate(RECORDS):
        (folder / f"{n}.jpg").write_bytes(PICTURE[n])
        lines.append(json.dumps({**record, "image": f"{n}.jpg" if record["image"] else None}))
    (folder / "items.jsonl").write_text("\n".join(lines))
    return str(folder / "items.jsonl")


def as_csv(folder: Path) -> str:
    with (folder / "items.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "ID", "img"])
        for n, record in enumerate(RECORDS):
            (folder / f"{n}.jpg").write_bytes(PICTURE[n])
            writer.writerow([record["text"], record["id"], f"{n}.jpg" if record["image"] else ""])
    return str(folder / "items.csv")


def cells() -> dict[str, list]:
    found = [(PICTURE[n] if record["image"] else None) for n, record in enumerate(RECORDS)]
    return {
        "id": [record["id"] for record in RECORDS],
        "text": [record["text"] for record in RECORDS],
        "image": found,
    }


def as_parquet(folder: Path) -> str:
    pq.write_table(pa.table(cells()), folder / "items.parquet", row_group_size=7)
    return str(folder / "items.parquet")


def dataset() -> datasets.Dataset:
    found = cells()
    found["image"] = [data and {"bytes": data, "path": "a.png"} for data in found["image"]]
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "text": datasets.Value("string"),
            "image": datasets.Image(),
        }
    )
    return datasets.Dataset.from_dict(found, features)


def as_parquet_of_datasets(folder: Path) -> str:
    dataset().to_parquet(folder / "items.parquet", batch_size=9)
    return str(folder / "items.parquet")


def as_saved_dataset(folder: Path) -> str:
    dataset().save_to_disk(folder / "disk")
    return f"datasets:{folder / 'disk'}"


LAYOUTS = [as_jsonl, as_csv, as_parquet, as_parquet_of_datasets, as_saved_dataset]


def content(item: Item) -> tuple[str | None, bytes | None]:
    return item.text, item.picture and item.picture.read()


EXPECTED = {
    record["id"]: (record["text"], PICTURE[n] if record["image"] else None)
    for n, record in enumerate(RECORDS)
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_items_are_the_same_from_every_file_in_any_order(tmp_path, layout):
    corpus = read_corpus(layout(tmp_path))
    assert list(corpus.ids) == list(EXPECTED)
    assert [content(item) for item in corpus.items] == list(EXPECTED.values())
    order = [*range(len(EXPECTED)), -1, -5]
    random.Random(0).shuffle(order)
    expected = list(EXPECTED.values())
    assert [content(corpus.items[n]) for n in order] == [expected[n] for n in order]
    assert [content(item) for item in corpus.items[5:9]] == expected[5:9]
    assert len(corpus.items[::3]) == len(expected[::3])
    with pytest.raises(IndexError):
        corpus.items[len(expected)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pictures_of_a_corpus_open_again_by_their_names(tmp_path, layout):
    for item in read_corpus(layout(tmp_path)).items:
        if item.picture is not None:
            assert picture_at(item.picture.name).content_hash() == item.picture.content_hash()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_picture_is_opened_or_read_for_the_corpus(tmp_path, layout, monkeypatch):
    source = layout(tmp_path)
    for store in ("picture.PictureFile", "stores.ParquetPicture"):
        monkeypatch.setattr(
            f"patch_retriever.pictures.{store}.read", lambda _: pytest.fail("it is read")
        )
    monkeypatch.setattr("PIL.Image.open", lambda *_: pytest.fail("it is opened"))
    assert len(list(read_corpus(source).items)) == len(EXPECTED)


def test_of_parquet_without_gaps_no_picture_is_even_looked_for(tmp_path, monkeypatch):
    table = pa.table({"image": [SOUND["rgb.png"]] * 9, "text": ["a"] * 9})
    pq.write_table(table, tmp_path / "a.parquet")
    read = []
    real = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile,
        "iter_batches",
        lambda self, *args, **more: (read.append(more["columns"]), real(self, *args, **more))[1],
    )
    corpus = read_corpus(tmp_path / "a.parquet")
    assert all(item.kind == "both" for item in corpus.items)
    assert read == [["text"]]
    assert list(corpus.ids) == [f"a.parquet:{n}" for n in range(9)]


def test_a_tar_is_its_samples_by_tar_and_key(tmp_path):
    members = {"x/1.jpg": SOUND["cmyk.jpg"], "x/1.txt": b"both", "2.txt": b"text", "3.png": b"cut"}
    write_tar(tmp_path / "a.tar", members)
    write_tar(tmp_path / "b.tar", members)
    corpus = read_corpus(str(tmp_path / "?.tar"))
    keys = ["x/1", "2", "3"]
    assert list(corpus.ids) == [f"{tar}.tar#{key}" for tar in "ab" for key in keys]
    expected = [("both", SOUND["cmyk.jpg"]), ("text", None), (None, b"cut")]
    assert [content(item) for item in corpus.items] == 2 * expected


def test_rows_without_an_id_are_called_by_file_and_row(tmp_path):
    (tmp_path / "a.csv").write_text('text,id\nx,\n"y\nz",7\nw,\n')
    assert list(read_corpus(tmp_path / "a.csv").ids) == ["a.csv:2", "7", "a.csv:5"]
    path = written(tmp_path, "", '{"text": "x", "id": ""}', '{"text": "y", "id": 0}')
    assert list(read_corpus(path).ids) == ["items.jsonl:2", "0"]


def test_where_a_text_comes_from_is_no_picture(tmp_path):
    path = written(tmp_path, '{"text": "a", "url": "https://example.org/a"}')
    assert list(read_corpus(path).items) == [Item("a")]


def test_the_same_id_twice_is_named(tmp_path):
    path = written(tmp_path, *(f'{{"text": "{n}", "id": {n % 2}}}' for n in range(3)))
    says(path, "items.jsonl:3: the id '0' is taken")
    corpus = read_corpus(path, skip_bad=True)
    assert (list(corpus.ids), len(corpus.skipped)) == (["0", "1"], 1)


def test_bad_rows_are_left_out_and_counted(tmp_path):
    path = written(tmp_path, '{"text": "a"}', "{", '{"text": "b", "image": 7}', '{"text": "c"}')
    corpus = read_corpus(path, skip_bad=True)
    assert [item.text for item in corpus.items] == ["a", "c"]
    assert "items.jsonl:2: not a JSON object" in corpus.skipped[0]
    assert "items.jsonl:3:" in corpus.skipped[1]


def test_an_address_is_refused(tmp_path):
    says(written(tmp_path, '{"image": "https://example.org/a.png"}'), "items.jsonl:1", "address")


steady = settings(deadline=None, derandomize=True, max_examples=60)
letters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
words = st.text(letters, min_size=1).filter(lambda text: text_fault(text) is None)


@steady
@given(st.lists(words, min_size=1), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_any_text_in_a_csv_is_what_csv_reads(texts, end, marked):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.csv"
        with path.open("w", newline="", encoding="utf-8-sig" if marked else "utf-8") as file:
            writer = csv.writer(file, lineterminator=end, quoting=csv.QUOTE_ALL)
            writer.writerows([["n", "text"], *enumerate(texts)])
        with path.open(newline="", encoding="utf-8-sig") as file:
            expected = [row["text"] for row in csv.DictReader(file)]
        corpus = read_corpus(path)
        assert [item.text for item in corpus.items] == expected
        assert corpus.items[len(texts) - 1].text == expected[-1]


@steady
@given(st.lists(words, min_size=1), st.booleans(), st.sampled_from(["\n", "\r\n", "\n\n"]))
def test_any_text_in_json_lines_is_what_json_reads(texts, escaped, end):
    with tempfile.TemporaryDirectory() as folder:
        lines = [json.dumps({"text": text}, ensure_ascii=escaped) for text in texts]
        path = Path(folder) / "a.jsonl"
        path.write_bytes(end.join(lines).encode())
        corpus = read_corpus(path)
        assert [item.text for item in corpus.items] == texts
        assert corpus.items[0].text == texts[0]


def valid(suffix: str, folder: Path) -> bytes:
    """A file of texts and pictures in this format."""
    path = folder / f"valid{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"image": [b"one", b"two"], "text": ["a", "b"]}), path)
    elif suffix == ".tar":
        write_tar(path, {"a.png": b"one", "a.txt": b"text", "b.json": b'{"text": "b"}'})
    elif suffix == ".csv":
        path.write_text('id,text,image\n1,"a\nb",a.png\n2,c,\n')
    else:
        path.write_text('{"id": 1, "text": "a", "image": "a.png"}\n{"text": "b"}\n')
    return path.read_bytes()


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    st.sampled_from([".jsonl", ".csv", ".tsv", ".tar", ".parquet"]),
    st.one_of(
        st.binary(max_size=3000),
        st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=9)), max_size=4),
    ),
    st.integers(0, 20_000),
    st.booleans(),
)
def test_whatever_a_file_holds_it_is_read_or_named(suffix, damage, length, skip_bad):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{suffix}"
        if isinstance(damage, bytes):
            path.write_bytes(damage)
        else:
            data = bytearray(valid(suffix, Path(folder)))
            for at, put in damage:
                at %= len(data)
                data[at : at + len(put)] = put
            path.write_bytes(data[: max(1, length)])
        try:
            for item in read_corpus(path, skip_bad).items:
                if item.picture is not None and not isinstance(item.picture, PictureFile):
                    item.picture.read()
        except UserError as error:
            assert str(error).startswith(str(path))
            assert "\n" not in str(error)


def test_a_header_that_is_no_csv_is_named(tmp_path):
    (tmp_path / "a.csv").write_text('"text"x,image\na,b\n')
    says(tmp_path / "a.csv", "a.csv: not CSV")
    (tmp_path / "a.csv").write_text("\n\ntext\n\na\n")
    assert [item.text for item in read_corpus(tmp_path / "a.csv").items] == ["a"]
    (tmp_path / "a.csv").write_text("text,text\na,b\n")
    says(tmp_path / "a.csv", "a.csv: two columns are called 'text'")


def test_an_id_that_is_no_name_is_a_bad_row_and_a_whole_number_is_one(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"id": 5.0, "text": "a"}, {"id": 1.5, "text": "b"}, {"id": None, "text": "c"}]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(UserError, match=r"a\.jsonl:2: the id 1\.5 is no text or integer"):
        read_corpus(str(path))
    corpus = read_corpus(str(path), skip_bad=True)
    assert list(corpus.ids) == ["5", "a.jsonl:3"]


# several pictures


def two_of(picture):
    return [picture(name) for name in ("a.png", "b.png")]


@pytest.fixture
def drawn(tmp_path):
    """Two pictures, their bytes, and how `datasets` writes them."""
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (9, 7), colour).save(tmp_path / name)
    return tmp_path


def as_stored(folder, name):
    return {"bytes": (folder / name).read_bytes(), "path": name}


def test_a_row_may_hold_several_pictures(drawn):
    listed = ["a.png", "b.png"]
    path = written(
        drawn,
        json.dumps({"image": listed}),
        json.dumps({"images": listed, "text": "both"}),
        json.dumps({"image": ["b.png"]}),
        json.dumps({"image": [], "text": "none"}),
    )
    a, b = two_of(lambda name: PictureFile(drawn / name))
    expected = [Item(None, a, (b,)), Item("both", a, (b,)), Item(None, b), Item("none")]
    corpus = read_corpus(path)
    assert list(corpus.items) == expected
    assert corpus.items[1].pictures == (a, b)


@pytest.mark.parametrize("kind", ["paths", "bytes", "structs", "large"])
def test_lists_of_pictures_in_parquet(drawn, kind):
    cell = {
        "paths": lambda name: name,
        "bytes": lambda name: (drawn / name).read_bytes(),
    }.get(kind, lambda name: as_stored(drawn, name))
    inner = {"paths": pa.string(), "bytes": pa.binary()}.get(
        kind, pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    lists = (pa.large_list if kind == "large" else pa.list_)(inner)
    rows = [two_of(cell), [], None, [cell("b.png")]]
    table = pa.table({"images": pa.array(rows, lists), "text": ["two", "none", "null", "one"]})
    pq.write_table(table, drawn / "part.parquet")
    items = read_corpus(drawn / "part.parquet").items
    assert [item.text for item in items] == ["two", "none", "null", "one"]
    assert [len(item.pictures) for item in items] == [2, 0, 0, 1]
    expected = [(drawn / name).read_bytes() for name in ("a.png", "b.png")]
    assert [picture.read() for picture in items[0].pictures] == expected
    for picture in (*items[0].pictures, *items[3].pictures):
        assert picture_at(picture.locator).read() == picture.read()
    if kind != "paths":
        names = [picture.name.partition("#")[2] for picture in items[0].pictures]
        assert names == ["images/0.0", "images/0.1"]


def test_a_list_of_pictures_without_bytes_is_one_of_paths(drawn):
    rows = [[{"bytes": None, "path": "a.png"}, {"bytes": None, "path": "b.png"}]]
    kind = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(pa.table({"image": pa.array(rows, kind)}), drawn / "part.parquet")
    (item,) = read_corpus(drawn / "part.parquet").items
    assert list(item.pictures) == two_of(lambda name: PictureFile(drawn / name))


def test_lists_of_pictures_in_a_dataset(drawn):
    rows = {
        "images": [two_of(lambda name: str(drawn / name)), [], [str(drawn / "b.png")]],
        "text": ["two", "none", "one"],
    }
    features = datasets.Features(
        {"images": datasets.List(datasets.Image()), "text": datasets.Value("string")}
    )
    whole = datasets.Dataset.from_dict(rows, features=features)
    stored = [[as_stored(drawn, Path(p).name) for p in paths] for paths in rows["images"]]
    inside = whole.cast_column("images", datasets.List(datasets.Image(decode=False))).map(
        lambda _, i: {"images": stored[i]}, with_indices=True
    )
    for name, made in (("paths", whole), ("bytes", inside)):
        made.save_to_disk(drawn / name)
        items = read_corpus(f"datasets:{drawn / name}").items
        assert [(item.text, len(item.pictures)) for item in items] == [
            ("two", 2),
            ("none", 0),
            ("one", 1),
        ]
        expected = [(drawn / file).read_bytes() for file in ("a.png", "b.png")]
        assert [picture.read() for picture in items[0].pictures] == expected
        for picture in items[0].pictures:
            assert picture_at(picture.locator).read() == picture.read()


@pytest.mark.parametrize("cell", ["image/0.2", "image/0.x", "image/0.", "image/x.0"])
def test_a_place_that_is_not_there_is_named(drawn, cell):
    kind = pa.list_(pa.binary())
    rows = [[(drawn / "a.png").read_bytes()] * 2]
    pq.write_table(pa.table({"image": pa.array(rows, kind)}), drawn / "part.parquet")
    with pytest.raises(UserError, match=r"part\.parquet#image/"):
        picture_at(f"{drawn}/part.parquet#{cell}").read()
