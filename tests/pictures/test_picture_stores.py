"""Pictures in tars, Parquet files and datasets open like files, and again by their names."""

from __future__ import annotations

import functools
import random
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_retriever.containers import parquet
from patch_retriever.containers.hf_datasets import load
from patch_retriever.containers.parquet import ParquetRows
from patch_retriever.containers.tars import tar_members
from patch_retriever.errors import UserError
from patch_retriever.pictures import stores as picture_stores
from patch_retriever.pictures.picture import PictureBytes
from patch_retriever.pictures.stores import (
    ParquetColumn,
    PictureStores,
    TarPicture,
    locator,
    picture_at,
)
from stored import BROKEN, SOUND, write_tar

PICTURES = SOUND | BROKEN
NAMES = list(PICTURES)
steady = settings(deadline=None, derandomize=True, max_examples=40)


def in_folder(folder: Path) -> list[str]:
    for name, data in PICTURES.items():
        (folder / name).write_bytes(data)
    return [str(folder / name) for name in NAMES]


def in_tar(folder: Path) -> list[str]:
    path = write_tar(folder / "a #1.tar", {f"img/{n}": data for n, data in PICTURES.items()})
    return [f"{path}#img/{name}" for name in NAMES]


def in_bytes_column(folder: Path) -> list[str]:
    path = folder / "bytes.parquet"
    table = pa.table({"n": range(len(NAMES)), "a/b": list(PICTURES.values())})
    pq.write_table(table, path, row_group_size=3)
    return [f"{path}#a/b/{n}" for n in range(len(NAMES))]


def dataset() -> datasets.Dataset:
    cells = [{"bytes": data, "path": name} for name, data in PICTURES.items()]
    features = datasets.Features({"image": datasets.Image(), "n": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"image": cells, "n": range(len(NAMES))}, features)


def in_struct_column(folder: Path) -> list[str]:
    path = folder / "hf.parquet"
    dataset().to_parquet(path)
    return [f"{path}#image/{n}" for n in range(len(NAMES))]


def in_saved_dataset(folder: Path) -> list[str]:
    dataset().save_to_disk(folder / "disk")
    return [f"datasets:{folder / 'disk'}#image/{n}" for n in range(len(NAMES))]


def in_split_of_saved_datasets(folder: Path) -> list[str]:
    datasets.DatasetDict(train=dataset().select([0]), test=dataset()).save_to_disk(folder / "dd")
    return [f"datasets:{folder / 'dd'}:test#image/{n}" for n in range(len(NAMES))]


STORES = [
    in_folder,
    in_tar,
    in_bytes_column,
    in_struct_column,
    in_saved_dataset,
    in_split_of_saved_datasets,
]


@pytest.fixture(params=STORES, ids=lambda store: store.__name__)
def names(request, tmp_path) -> dict[str, str]:
    """The name of each picture in one kind of store."""
    return dict(zip(NAMES, request.param(tmp_path), strict=True))


def test_a_picture_is_the_same_wherever_it_lies(names):
    for name, data in SOUND.items():
        found, expected = picture_at(names[name]), PictureBytes(name, data)
        assert found.name == names[name]
        assert found.open().mode == "RGB"
        assert found.open().size == expected.open().size
        assert found.open().tobytes() == expected.open().tobytes()
        assert found.content_hash() == expected.content_hash()


def test_a_rotated_picture_is_turned_wherever_it_lies(names):
    assert picture_at(names["rotated.jpg"]).open().size == (30, 40)


def test_a_broken_picture_is_named(names):
    for name in BROKEN:
        with pytest.raises(UserError) as caught:
            picture_at(names[name]).open()
        assert str(caught.value).startswith(f"{names[name]}: not a readable image")
        assert "\n" not in str(caught.value)


def test_a_locator_opens_from_any_folder(names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    relative = names["rgb.png"].replace(f"{tmp_path}/", "")
    assert not relative.removeprefix("datasets:").startswith("/")
    found = locator(picture_at(relative))
    monkeypatch.chdir("/")
    assert picture_at(found).content_hash() == PictureBytes("", SOUND["rgb.png"]).content_hash()
    with pytest.raises(UserError):
        picture_at(relative)


def test_many_names_are_opened_together_each_store_once(tmp_path, monkeypatch):
    by_store = [store(tmp_path) for store in (in_tar, in_struct_column, in_saved_dataset)]
    opened = []
    for name in ("tar_members", "ParquetColumn", "load"):
        real = getattr(picture_stores, name)
        monkeypatch.setattr(
            picture_stores,
            name,
            lambda *args, real=real, name=name: (opened.append(name), real(*args))[1],
        )
    stores = PictureStores()
    for name in (name for row in zip(*by_store, strict=True) for name in row):
        assert stores.picture_at(name).name == name
    assert sorted(set(opened)) == ["ParquetColumn", "load", "tar_members"]
    assert (opened.count("tar_members"), opened.count("load")) == (1, 1)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gone.png", "no such picture"),
        ("gone.tar#a.png", "no such picture"),
        ("a.tar#gone.png", "no such member in this tar"),
        ("bytes.parquet#a/b/99", "8 rows, so none"),
        ("bytes.parquet#gone/0", "no column 'gone'"),
        ("bytes.parquet#n/0", "does not hold pictures"),
        ("bytes.parquet#a/b/x", "a column and a row expected"),
        ("bytes.parquet#0", "a column and a row expected"),
        ("datasets:disk#image/99", "8 rows, so none"),
        ("datasets:disk#gone/1", "no column 'gone'"),
        ("datasets:disk#n/1", "no picture there"),
        ("datasets:disk#image", "a column and a row expected"),
        ("datasets:./gone#image/0", "no such folder"),
        ("https://example.org/a.png", "not downloaded before"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write_tar(tmp_path / "a.tar", SOUND)
    in_bytes_column(tmp_path)
    in_saved_dataset(tmp_path)
    with pytest.raises(UserError, match=words) as caught:
        picture_at(name).open()
    assert "\n" not in str(caught.value)


# tars


@steady
@given(
    st.dictionaries(
        st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1)
        .map(lambda name: f"d/{name * 9}.png")
        .filter(lambda name: "/./" not in name),
        st.binary(max_size=1500),
        max_size=8,
    ),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_members_are_where_tarfile_says(members, format):
    with tempfile.TemporaryDirectory() as folder:
        path = write_tar(Path(folder) / "a.tar", members, format)
        found = {m.name: TarPicture(path, m).read() for m in tar_members(path)}
    assert found == members


def test_opening_a_picture_in_a_tar_is_a_seek(tmp_path, monkeypatch):
    found = [
        TarPicture(tmp_path / "a.tar", m) for m in tar_members(write_tar(tmp_path / "a.tar", SOUND))
    ]
    monkeypatch.setattr(tarfile, "open", lambda *_, **__: pytest.fail("the tar is searched again"))
    assert [picture.read() for picture in found] == list(SOUND.values())


def test_folders_and_links_in_a_tar_are_no_members(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a.png").write_bytes(SOUND["rgb.png"])
    (tmp_path / "d/b.png").symlink_to("a.png")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "d", "d")
    assert [m.name for m in tar_members(tmp_path / "a.tar")] == ["d/a.png"]


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_a_truncated_tar_gives_what_is_whole_and_is_named(tmp_path, share):
    path = write_tar(tmp_path / "a.tar", {f"{i}.png": SOUND["rgb.png"] for i in range(9)})
    path.write_bytes(path.read_bytes()[: int(share * 9 * (512 + 4096))])
    found = []
    with pytest.raises(UserError, match=r"a\.tar: cannot be read as a tar to its end"):
        for member in tar_members(path):
            found.append(member)
    assert 0 < len(found) < 9
    pictures = [TarPicture(path, m) for m in found]
    assert pictures[0].read() == SOUND["rgb.png"]
    with pytest.raises(UserError, match=r"a\.tar#\d\.png: the tar ends before"):
        [picture.read() for picture in [*pictures, TarPicture(path, cut_off(path, len(found)))]]


def cut_off(path: Path, n: int):
    """A member that was there when the tar was whole."""
    return type(next(tar_members(path)))(f"{n}.png", path.stat().st_size - 1, 9)


def test_a_compressed_tar_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.add(__file__, "a.png")
    with pytest.raises(UserError, match=r"must be unpacked to \.tar first"):
        list(tar_members(tmp_path / "a.tar"))


# Parquet


@functools.cache
def parquet_table() -> pa.Table:
    rng = random.Random(0)
    rows = [
        {
            "image": None
            if i % 11 == 3
            else {
                "bytes": None if i % 5 == 1 else rng.randbytes(rng.randrange(2000)),
                "path": f"{i}.png",
            },
            "text": f"text {i}",
        }
        for i in range(200)
    ]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    return pa.Table.from_pylist(rows, pa.schema({"image": kind, "text": pa.string()}))


@steady
@given(
    st.integers(1, 250),
    st.sampled_from([100, 10_000, 10**8]),
    st.lists(st.integers(0, 199), max_size=30),
)
def test_any_row_in_any_order_is_what_arrow_reads(group, window, order):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        patched.setattr(parquet, "WINDOW", window)
        path = Path(folder) / "a.parquet"
        pq.write_table(parquet_table(), path, row_group_size=group)
        expected = parquet_table().to_pylist()
        rows = ParquetRows(path, ["text", "image"])
        assert len(rows) == 200
        assert [rows[n] for n in order] == [expected[n] for n in order]
        assert [rows[n] for n in range(200)] == expected
        of_bytes = [row["image"] and row["image"]["bytes"] for row in expected]
        assert list(ParquetRows(path, ["image.bytes"]).missing()) == [b is None for b in of_bytes]


def test_reading_forwards_reads_each_row_group_once(tmp_path, monkeypatch):
    pq.write_table(parquet_table(), tmp_path / "a.parquet", row_group_size=30)
    monkeypatch.setattr(parquet, "WINDOW", 5000)
    read = []
    real = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile,
        "iter_batches",
        lambda self, *args, **more: (read.extend(more["row_groups"]), real(self, *args, **more))[1],
    )
    column = ParquetColumn(tmp_path / "a.parquet", "image")
    for row in range(200):
        picture = column.picture(row)
        expected = (parquet_table()["image"][row].as_py() or {}).get("bytes")
        if expected is None:
            with pytest.raises(UserError, match="no picture there"):
                picture.read()
        else:
            assert picture.read() == expected
    assert read == [0, 1, 2, 3, 4, 5, 6]


def test_of_a_large_row_group_only_a_window_is_in_memory(tmp_path, monkeypatch):
    rng = random.Random(0)
    table = pa.table({"image": [rng.randbytes(2**20) for _ in range(40)]})
    expected = table["image"].to_pylist()
    pages = {"use_dictionary": False, "write_batch_size": 2, "data_page_size": 2**20}
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=40, **pages)
    del table

    def most_allocated(window: int) -> float:
        """MiB above what was allocated before, over a whole pass."""
        monkeypatch.setattr(parquet, "WINDOW", window * 2**20)
        before, most = pa.total_allocated_bytes(), 0
        column = ParquetColumn(tmp_path / "a.parquet", "image")
        for row, data in enumerate(expected):
            assert column.picture(row).read() == data
            most = max(most, pa.total_allocated_bytes() - before)
        return most / 2**20

    assert most_allocated(4) < 20 < 40 < most_allocated(100)


@pytest.mark.parametrize("damage", ["cut", "page", "empty"])
def test_a_damaged_parquet_file_is_named(tmp_path, damage):
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"image": [np.random.default_rng(0).bytes(999)] * 9}),
        path,
        compression="zstd",
        use_dictionary=False,
    )
    data = path.read_bytes()
    data = {"cut": data[:-100], "page": data[:4] + bytes(60) + data[64:], "empty": b""}[damage]
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read as Parquet") as caught:
        picture_at(f"{path}#image/3").read()
    assert "\n" not in str(caught.value)


def test_after_a_damaged_group_the_next_is_read(tmp_path):
    path = tmp_path / "a.parquet"
    images = [np.random.default_rng(n).bytes(5000) for n in range(6)]
    pq.write_table(pa.table({"image": images}), path, row_group_size=2, use_dictionary=False)
    about = pq.read_metadata(path).row_group(1).column(0)
    data = bytearray(path.read_bytes())
    data[about.data_page_offset : about.data_page_offset + 20] = bytes(20)
    path.write_bytes(data)
    column = ParquetColumn(path, "image")
    for row in (0, 1, 2, 3, 4, 5, 2, 0):
        if row in (2, 3):
            with pytest.raises(UserError, match=r"a\.parquet: cannot be read as Parquet"):
                column.picture(row).read()
        else:
            assert column.picture(row).read() == images[row]


def test_of_many_files_one_is_open_and_one_window_in_memory(tmp_path):
    names = []
    for n in range(30):
        data = [random.Random(n).randbytes(2**20) for _ in range(2)]
        pq.write_table(pa.table({"image": data}), tmp_path / f"{n}.parquet")
        names += [f"{tmp_path}/{n}.parquet#image/{row}" for row in range(2)]
    stores = PictureStores()
    pictures = [stores.picture_at(name) for name in names]
    before, most = pa.total_allocated_bytes(), 0
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    for picture in pictures:
        assert len(picture.read()) == 2**20
        most = max(most, pa.total_allocated_bytes() - before)
        assert len(list(Path("/proc/self/fd").iterdir())) <= open_before + 1
    assert most < 15 * 2**20


# datasets


def test_the_hub_is_asked_for_name_configuration_and_split(monkeypatch):
    asked = []

    def load_dataset(*args: object, **more: object) -> datasets.Dataset:
        asked.append((*args, more))
        return dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for location in ("org/name", "org/name/config", "org/name:test", "org/name/config:train[:9]"):
        assert len(load(location)) == len(NAMES)
    assert asked == [
        ("org/name", None, {"split": None}),
        ("org/name", "config", {"split": None}),
        ("org/name", None, {"split": "test"}),
        ("org/name", "config", {"split": "train[:9]"}),
    ]


@pytest.mark.parametrize("location", ["name", "./gone", "/gone/far", "a/b/c/d", ""])
def test_what_is_neither_a_folder_nor_a_hub_id_is_named(location):
    with pytest.raises(UserError, match="no such folder; name one, or a hub id"):
        load(location)


def test_a_dataset_gives_the_bytes_as_they_are_stored(tmp_path, monkeypatch):
    names = in_saved_dataset(tmp_path)
    monkeypatch.setattr("PIL.Image.open", lambda *_: pytest.fail("a picture is decoded"))
    assert [picture_at(name).read() for name in names] == list(PICTURES.values())


def test_a_dataset_of_paths_opens_the_files(tmp_path):
    paths = [p for p in in_folder(tmp_path) if Path(p).name in SOUND]
    made = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
    made.save_to_disk(tmp_path / "disk")
    monkey = [picture_at(f"datasets:{tmp_path / 'disk'}#image/{n}") for n in range(len(paths))]
    assert [p.read() for p in monkey] == [SOUND[Path(p).name] for p in paths]


def test_without_the_library_it_is_told_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        picture_at(f"datasets:{tmp_path}#image/0")


def test_a_split_must_be_named_where_there_are_several(tmp_path):
    name = in_split_of_saved_datasets(tmp_path)[0]
    with pytest.raises(UserError, match=r"has the splits train, test; name one: datasets:"):
        picture_at(name.replace(":test#", "#"))
    with pytest.raises(UserError, match="has only the splits train, test"):
        picture_at(name.replace(":test#", ":dev#"))


def test_several_threads_read_one_parquet_file(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "WINDOW", 4096)
    cells = [bytes([n % 256]) * 512 for n in range(400)]
    pq.write_table(pa.table({"image": cells}), tmp_path / "a.parquet", row_group_size=50)
    rows = ParquetRows(tmp_path / "a.parquet", ["image"])
    order = random.Random(0).sample(range(400), 400)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda n: rows[n]["image"], order))
    assert found == [cells[n] for n in order]
