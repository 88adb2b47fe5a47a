"""Pairs from every source that people have them in; every fault is named by row."""

from __future__ import annotations

import csv
import json
import random
import tarfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from patch_retriever.errors import UserError
from patch_retriever.files import file_hash
from patch_retriever.retrieval.readers.pairs import pairs_fingerprint, read_pairs
from patch_retriever.retrieval.readers.sources.rows import Reading
from stored import BROKEN, SOUND, write_tar


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]


def rewrite(folder: Path, changed: list[dict], name: str = "pairs.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(json.dumps(row) for row in changed))
    return path


def texts(source: Path) -> list[str]:
    return [pair.text for pair in read_pairs(source).pairs]


# several pictures


def test_a_pair_may_have_several_pictures(photo_folder):
    changed = rows(photo_folder)
    changed[0]["image"] = ["0.png", "1.png"]
    changed[1]["image"] = ["1.png"]
    source = rewrite(photo_folder, changed)
    first, second, *_ = read_pairs(source).pairs
    assert [p.path.name for p in (first.picture, *first.more_pictures)] == ["0.png", "1.png"]
    assert (second.picture.path.name, second.more_pictures) == ("1.png", ())
    assert second.content == file_hash(photo_folder / "1.png")
    before = pairs_fingerprint(source)
    changed[0]["image"] = ["1.png", "0.png"]
    turned = rewrite(photo_folder, changed)
    assert read_pairs(turned).pairs[0].content != first.content
    assert pairs_fingerprint(turned) != before


def test_a_bad_picture_among_several_is_named(photo_folder):
    changed = rows(photo_folder)
    changed[3]["image"] = ["3.png", "gone.png"]
    with pytest.raises(UserError, match=r"pairs\.jsonl:4: .*gone\.png: no such image file"):
        read_pairs(rewrite(photo_folder, changed))


# layouts


def test_a_jsonl_file_is_read_with_paths_relative_to_it(photo_folder, monkeypatch):
    monkeypatch.chdir("/")
    read = read_pairs(photo_folder / "pairs.jsonl")
    assert [pair.text for pair in read.pairs] == [row["text"] for row in rows(photo_folder)]
    assert [pair.picture.path for pair in read.pairs] == [
        photo_folder / row["image"] for row in rows(photo_folder)
    ]
    assert read.skipped == ()


def test_a_folder_is_read_by_its_jsonl(photo_folder):
    assert read_pairs(photo_folder) == read_pairs(photo_folder / "pairs.jsonl")


def test_a_folder_with_metadata_jsonl_is_read_as_datasets_does(photo_folder):
    expected = texts(photo_folder)
    changed = [{"file_name": row["image"], "text": row["text"]} for row in rows(photo_folder)]
    rewrite(photo_folder, changed, "metadata.jsonl")
    (photo_folder / "pairs.jsonl").unlink()
    assert texts(photo_folder) == expected


def with_sidecars(folder: Path) -> Path:
    for row in rows(folder):
        (folder / row["image"]).with_suffix(".txt").write_text(row["text"] + "\n")
    (folder / "pairs.jsonl").unlink()
    return folder


def test_pictures_with_txt_files_beside_them_are_read(photo_folder):
    expected = {row["image"]: row["text"] for row in rows(photo_folder)}
    read = read_pairs(with_sidecars(photo_folder))
    assert {pair.picture.path.name: pair.text for pair in read.pairs} == expected


def test_sidecars_are_found_in_folders_below_and_beside_any_format(photo_folder):
    with_sidecars(photo_folder)
    (photo_folder / "more").mkdir()
    Image.new("RGB", (9, 9), "red").save(photo_folder / "more" / "a.JPG", "JPEG")
    (photo_folder / "more" / "a.txt").write_text("a red one below")
    assert "a red one below" in texts(photo_folder)


def test_absolute_paths_are_taken_as_they_are(photo_folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "pairs.jsonl"
    changed = [{**row, "image": str(photo_folder / row["image"])} for row in rows(photo_folder)]
    elsewhere.write_text("\n".join(map(json.dumps, changed)))
    assert texts(elsewhere) == texts(photo_folder)


def test_empty_lines_are_no_rows_and_texts_are_trimmed(photo_folder):
    changed = rows(photo_folder)
    changed[0]["text"] = "  a red one \n"
    path = rewrite(photo_folder, changed)
    path.write_text("\n" + path.read_text().replace("\n", "\n\n") + "\n\n")
    read = texts(path)
    assert (len(read), read[0]) == (60, "a red one")


@pytest.mark.parametrize("separator", ["\u2028", "\u0085"])
def test_a_line_separator_inside_a_text_does_not_end_the_row(photo_folder, separator):
    changed = rows(photo_folder)
    changed[3]["text"] = f"copied{separator}from the web"
    path = photo_folder / "pairs.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in changed]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert len(texts(path)) == 60


def test_windows_line_ends_are_read(photo_folder):
    path = photo_folder / "pairs.jsonl"
    expected = texts(path)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert texts(path) == expected


def test_progress_sees_every_row(photo_folder):
    seen = []

    def progress(steps, total):
        seen.append(total)
        for step in steps:
            seen.append(step)
            yield step

    read_pairs(photo_folder, progress=progress)
    assert seen[0] == 60
    assert len(seen) == 61


# faults


def says(source: Path, *words: str, skip_bad: bool = False) -> str:
    """The one line of the error, which holds all `words`."""
    with pytest.raises(UserError) as caught:
        read_pairs(source, skip_bad)
    line = str(caught.value)
    assert "\n" not in line
    for word in words:
        assert word in line, line
    return line


def test_a_missing_file_is_named(tmp_path):
    says(tmp_path / "nowhere.jsonl", "nowhere.jsonl: no such pairs file")


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_named(tmp_path, content):
    (tmp_path / "empty.jsonl").write_text(content)
    says(tmp_path / "empty.jsonl", "empty.jsonl: no pairs in it", '"image"')


def test_an_empty_folder_is_named(tmp_path):
    says(tmp_path, f"{tmp_path}: no pairs in it")


@pytest.mark.parametrize("line", ["{not json", "[1, 2]", "null", '"a text"', "7"])
def test_a_row_that_is_no_object_is_named_with_its_line(photo_folder, line):
    path = photo_folder / "pairs.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], line, *lines[2:]]))
    says(path, "pairs.jsonl:3: not a JSON object")


def test_a_file_that_is_no_text_is_named(photo_folder):
    path = (photo_folder / "0.png").rename(photo_folder / "0.jsonl")
    says(path, "0.jsonl: cannot be read", "not a UTF-8 text file")


@pytest.mark.parametrize("text", ["", "  \n", None, 7, [], ["a", " "], ["a", 7]])
def test_a_row_without_text_is_named(photo_folder, text):
    changed = rows(photo_folder)
    changed[4]["text"] = text
    says(rewrite(photo_folder, changed), "pairs.jsonl:5: no text", "--skip-bad")


@pytest.mark.parametrize("image", ["", None, 7])
def test_a_row_without_image_is_named(photo_folder, image):
    changed = rows(photo_folder)
    changed[4]["image"] = image
    says(rewrite(photo_folder, changed), "pairs.jsonl:5: no image", "--skip-bad")


def test_a_missing_picture_is_named(photo_folder):
    (photo_folder / "7.png").unlink()
    says(photo_folder, "pairs.jsonl:8", "7.png: no such image file", "--skip-bad")


def truncate(path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:1500])


def test_a_truncated_picture_is_named(photo_folder):
    truncate(photo_folder / "7.png")
    says(photo_folder, "pairs.jsonl:8", "7.png: not a readable image", "--skip-bad")


def test_a_file_that_is_no_picture_is_named(photo_folder):
    (photo_folder / "7.png").write_text("hello")
    says(photo_folder, "pairs.jsonl:8", "7.png: not a readable image", "--skip-bad")


def test_a_picture_without_a_txt_file_is_named(photo_folder):
    (with_sidecars(photo_folder) / "7.txt").unlink()
    says(photo_folder, "7.png: no text", "--skip-bad")


def test_a_txt_file_that_is_not_utf8_is_named(photo_folder):
    (with_sidecars(photo_folder) / "7.txt").write_bytes("caf\xe9".encode("latin-1"))
    assert "7.txt" in says(photo_folder) or "7.png" in says(photo_folder)


def test_fewer_than_fifty_pairs_are_too_few(photo_folder):
    path = rewrite(photo_folder, rows(photo_folder)[:49])
    says(path, "pairs.jsonl: 49 usable pairs", "at least 50")


def test_fifty_pairs_are_enough(photo_folder):
    path = rewrite(photo_folder, rows(photo_folder)[:50])
    assert len(read_pairs(path).pairs) == 50


# skip_bad


def test_skip_bad_leaves_out_names_and_goes_on(photo_folder):
    changed = rows(photo_folder)
    changed[0]["text"] = ""
    del changed[1]["image"]
    path = rewrite(photo_folder, changed)
    (photo_folder / "2.png").unlink()
    truncate(photo_folder / "3.png")
    (photo_folder / "4.png").write_text("hello")
    read = read_pairs(path, skip_bad=True)
    assert [pair.text for pair in read.pairs] == [row["text"] for row in changed[5:]]
    assert len(read.skipped) == 5
    for line, named in zip(
        read.skipped, ["no text", "no image", "2.png", "3.png", "4.png"], strict=True
    ):
        assert named in line
        assert "\n" not in line


def test_skip_bad_leaves_out_a_row_that_is_no_object(photo_folder):
    path = photo_folder / "pairs.jsonl"
    path.write_text("{not json\n" + path.read_text())
    read = read_pairs(path, skip_bad=True)
    assert len(read.pairs) == 60
    assert len(read.skipped) == 1
    assert "pairs.jsonl:1" in read.skipped[0]


def test_skip_bad_leaves_out_a_txt_file_that_is_not_utf8(photo_folder):
    (with_sidecars(photo_folder) / "7.txt").write_bytes("caf\xe9".encode("latin-1"))
    read = read_pairs(photo_folder, skip_bad=True)
    assert (len(read.pairs), len(read.skipped)) == (59, 1)


def test_skip_bad_still_needs_fifty(photo_folder):
    for i in range(15):
        (photo_folder / f"{i}.png").unlink()
    says(photo_folder, "45 usable pairs", "15 left out", skip_bad=True)


# the same pairs in other files


def image(folder: Path, row: dict) -> bytes:
    return (folder / row["image"]).read_bytes()


def as_csv(folder: Path, _: Path) -> str:
    """Beside the pictures, as `metadata.csv` lies."""
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["file_name", "text"])
        writer.writeheader()
        writer.writerows({"file_name": r["image"], "text": r["text"]} for r in rows(folder))
    (folder / "pairs.jsonl").unlink()
    return str(folder)


def as_tsv(folder: Path, out: Path) -> str:
    lines = ["Image\tCAPTION", *(f"{folder}/{r['image']}\t{r['text']}" for r in rows(folder))]
    (out / "pairs.tsv").write_text("\n".join(lines))
    return str(out / "pairs.tsv")


def as_parquet_of_paths(folder: Path, out: Path) -> str:
    paths = [str(folder / row["image"]) for row in rows(folder)]
    texts = [row["text"] for row in rows(folder)]
    pq.write_table(pa.table({"image_path": paths, "text": texts}), out / "pairs.parquet")
    return str(out / "pairs.parquet")


def as_parquet_of_bytes(folder: Path, out: Path) -> str:
    """Two files of a folder."""
    found = rows(folder)
    for n, part in enumerate((found[:25], found[25:])):
        table = pa.table(
            {"text": [r["text"] for r in part], "image": [image(folder, r) for r in part]}
        )
        pq.write_table(table, out / f"part-{n}.parquet", row_group_size=7)
    return str(out)


def as_dataset(folder: Path) -> datasets.Dataset:
    cells = [{"bytes": image(folder, r), "path": r["image"]} for r in rows(folder)]
    texts = [row["text"] for row in rows(folder)]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    return datasets.Dataset.from_dict({"image": cells, "text": texts}, features)


def as_parquet_of_datasets(folder: Path, out: Path) -> str:
    as_dataset(folder).to_parquet(out / "train-00000-of-00001.parquet", batch_size=16)
    return str(out / "*.parquet")


def as_saved_dataset(folder: Path, out: Path) -> str:
    as_dataset(folder).save_to_disk(out / "disk")
    return str(out / "disk")


def as_folder_for_load_dataset(folder: Path, out: Path) -> str:
    for split in ("train", "test"):
        as_dataset(folder).to_parquet(out / f"{split}.parquet")
    return f"datasets:{out}:train"


def as_shards(folder: Path, out: Path) -> str:
    """As img2dataset writes them: text in .txt, and more in .json."""
    found = list(enumerate(rows(folder)))
    for n, part in enumerate((found[:25], found[25:])):
        members = {}
        for i, row in part:
            members[f"{i:05}.png"] = image(folder, row)
            members[f"{i:05}.txt"] = row["text"].encode()
            about = {"caption": "not this", "url": "https://example.org/a.png", "status": "success"}
            members[f"{i:05}.json"] = json.dumps(about).encode()
        write_tar(out / f"{n:05}.tar", members)
    return str(out / "{00000..00001}.tar")


def as_shards_with_json(folder: Path, out: Path) -> str:
    members = {}
    for i, row in enumerate(rows(folder)):
        members[f"some/{i:03}.PNG"] = image(folder, row)
        members[f"some/{i:03}.json"] = json.dumps({"caption": row["text"]}).encode()
    write_tar(out / "a.tar", members)
    return str(out)


def as_tar_of_a_folder(folder: Path, out: Path) -> str:
    """`tar cf a.tar folder`: texts and pictures in any order."""
    with_sidecars(folder)
    files = list(folder.iterdir())
    random.Random(0).shuffle(files)
    with tarfile.open(out / "a.tar", "w") as tar:
        for file in files:
            tar.add(file, f"./photos/{file.name}")
    return str(out / "a.tar")


LAYOUTS = [
    as_csv,
    as_tsv,
    as_parquet_of_paths,
    as_parquet_of_bytes,
    as_parquet_of_datasets,
    as_saved_dataset,
    as_folder_for_load_dataset,
    as_shards,
    as_shards_with_json,
    as_tar_of_a_folder,
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


@pytest.fixture
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("out")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_pairs_are_read_from_every_layout(photo_folder, out, layout):
    expected = {row["text"]: file_hash(photo_folder / row["image"]) for row in rows(photo_folder)}
    read = read_pairs(layout(photo_folder, out))
    assert {p.text: p.content for p in read.pairs} == expected
    assert len(read.pairs) == 60
    if layout is not as_tar_of_a_folder:
        assert [p.text for p in read.pairs] == list(expected)
    assert len({p.picture.name for p in read.pairs}) == 60
    assert not any(hasattr(p.picture, "data") for p in read.pairs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_fingerprint_stays_until_a_picture_changes(photo_folder, out, layout):
    source = layout(photo_folder, out)
    before = pairs_fingerprint(source)
    assert pairs_fingerprint(source) == before
    Image.new("RGB", (9, 9), "red").save(photo_folder / "7.png")
    if not (photo_folder / "pairs.jsonl").exists():
        (photo_folder / "pairs.jsonl").write_text(
            "\n".join(
                json.dumps({"image": f"{i}.png", "text": f"a field of colour number {i}"})
                for i in range(60)
            )
        )
    again = layout(photo_folder, out)
    assert (again, pairs_fingerprint(source) != before) == (source, True)


def peer_of(layout, source: str) -> list[dict]:
    """The same rows as `datasets` reads them, pictures undecoded."""
    kind = {
        as_csv: ("csv", f"{source}/metadata.csv"),
        as_parquet_of_bytes: ("parquet", f"{source}/*.parquet"),
        as_shards: ("webdataset", source.replace("{00000..00001}", "*")),
        as_shards_with_json: ("webdataset", f"{source}/*.tar"),
    }[layout]
    found = datasets.load_dataset(kind[0], data_files=kind[1], split="train")
    for name, feature in found.features.items():
        if isinstance(feature, datasets.Image):
            found = found.cast_column(name, datasets.Image(decode=False))
    return list(found)


@pytest.mark.parametrize(
    ("layout", "image_of", "text_of"),
    [
        (as_csv, lambda r, folder: (folder / r["file_name"]).read_bytes(), lambda r: r["text"]),
        (as_parquet_of_bytes, lambda r, _: r["image"], lambda r: r["text"]),
        (as_shards, lambda r, _: r["png"]["bytes"], lambda r: r["txt"]),
        (as_shards_with_json, lambda r, _: r["PNG"]["bytes"], lambda r: r["json"]["caption"]),
    ],
)
def test_rows_are_those_that_datasets_reads(photo_folder, out, layout, image_of, text_of):
    source = layout(photo_folder, out)
    expected = [(image_of(r, photo_folder), text_of(r)) for r in peer_of(layout, source)]
    assert [(p.picture.read(), p.text) for p in read_pairs(source).pairs] == expected


def test_a_list_of_texts_makes_a_pair_of_each(photo_folder, out):
    found = [{**row, "text": [row["text"], f"again {row['text']}"]} for row in rows(photo_folder)]
    read = read_pairs(rewrite(photo_folder, found))
    assert [p.text for p in read.pairs] == [text for row in found for text in row["text"]]
    table = pa.Table.from_pylist(
        [{"img": str(photo_folder / r["image"]), "caption": r["text"]} for r in found]
    )
    pq.write_table(table, out / "a.parquet")
    assert [p.text for p in read_pairs(out / "a.parquet").pairs] == [p.text for p in read.pairs]


def test_columns_may_be_named(photo_folder):
    changed = [{"photo": r["image"], "words": r["text"], "text": 7} for r in rows(photo_folder)]
    path = rewrite(photo_folder, changed)
    says(path, "pairs.jsonl:1: no image")
    read = read_pairs(path, reading=Reading.choose("photo", "words"))
    assert [p.text for p in read.pairs] == [row["words"] for row in changed]


def test_pictures_may_lie_elsewhere(photo_folder, out):
    path = rewrite(photo_folder, rows(photo_folder))
    moved = path.rename(out / "pairs.jsonl")
    assert len(read_pairs(moved, reading=Reading(images=photo_folder)).pairs) == 60


# faults in other files


def test_a_bad_row_of_a_csv_is_named_by_its_line(photo_folder):
    source = Path(as_csv(photo_folder, photo_folder)) / "metadata.csv"
    lines = source.read_text().splitlines()
    quoted = [*lines[:3], '9.png,"over', 'two lines"', lines[3], "5.png", *lines[4:]]
    source.write_text("\n".join(quoted))
    says(source, "metadata.csv:7: 1 values, but the header has 2", "--skip-bad")
    read = read_pairs(source, skip_bad=True)
    assert (len(read.pairs), read.pairs[2].text, len(read.skipped)) == (61, "over\ntwo lines", 1)


def test_a_csv_that_breaks_off_in_quotes_is_named(photo_folder):
    source = Path(as_csv(photo_folder, photo_folder)) / "metadata.csv"
    source.write_text(source.read_text() + '9.png,"never closed')
    says(source, "metadata.csv:62: not CSV")
    assert len(read_pairs(source, skip_bad=True).pairs) == 60


def test_a_table_without_known_columns_says_what_it_has(out):
    pq.write_table(pa.table({"photo": ["a"], "words": ["b"]}), out / "a.parquet")
    says(
        out / "a.parquet",
        "a.parquet: no column for pictures (image, images, file_name",
        "photo, words",
    )


def test_a_csv_without_known_columns_is_named(out):
    (out / "a.csv").write_text("photo,words\na.png,b\n")
    says(out / "a.csv", "a.csv", "no column for pictures (image, images, file_name", "photo, words")


def mixed(folder: Path, kind: str) -> tuple[str, list[str]]:
    """Sixty sound rows after ones with all sorts of pictures; what names each broken one."""
    found = [*SOUND.items(), *BROKEN.items()]
    texts = [f"the one called {name}" for name, _ in found]
    found += [(f"{i}.png", SOUND["rgb.png"]) for i in range(60)]
    texts += [f"number {i}" for i in range(60)]
    datas = [data for _, data in found]
    if kind == "tar":
        members = {}
        for (name, data), text in zip(found, texts, strict=True):
            members[name] = data
            members[name.split(".")[0] + ".txt"] = text.encode()
        return str(write_tar(folder / "a.tar", members)), [f"a.tar#{name}" for name in BROKEN]
    if kind == "parquet":
        pq.write_table(pa.table({"image": datas, "text": texts}), folder / "a.parquet")
        return str(folder / "a.parquet"), [f"a.parquet:{n}: " for n in (5, 6, 7)]
    cells = [{"bytes": data, "path": None} for data in datas]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict({"image": cells, "text": texts}, features).save_to_disk(folder / "d")
    return str(folder / "d"), [f"d#{n}: " for n in (5, 6, 7)]


@pytest.mark.parametrize("kind", ["tar", "parquet", "dataset"])
def test_broken_pictures_inside_files_are_named_and_left_out(out, kind):
    source, named = mixed(out, kind)
    says(source, named[0], "not a readable image", "--skip-bad")
    read = read_pairs(source, skip_bad=True)
    assert len(read.pairs) == 65
    for line, name in zip(read.skipped, named, strict=True):
        assert name in line
        assert "not a readable image" in line
    assert [p.picture.open().size for p in read.pairs[:5]][3] == (30, 40)


def test_a_truncated_tar_is_named_and_what_is_whole_is_read(out):
    source, _ = mixed(out, "tar")
    data = Path(source).read_bytes()
    for cut in (20_000, 20_100, 20_480, 22_000, 22_528, 23_000):
        Path(source).write_bytes(data[:-cut])
        read = read_pairs(source, skip_bad=True)
        assert 50 < len(read.pairs) < 65, cut
        assert "a.tar: cannot be read as a tar to its end" in read.skipped[-1]
    Path(source).write_bytes(data[:100])
    says(source, "a.tar: cannot be read as a tar")


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"a.txt": b"text"}, "a.tar#a: no image"),
        ({"a.png": SOUND["rgb.png"]}, "a.tar#a: no text"),
        ({"a.png": SOUND["rgb.png"], "a.txt": b"\xff"}, "a.tar#a.txt: not UTF-8 text"),
        ({"a.png": SOUND["rgb.png"], "a.json": b"{"}, "a.tar#a.json: not a JSON object"),
        ({"a.png": SOUND["rgb.png"], "a.json": b"[7]"}, "a.tar#a.json: not a JSON object"),
        ({}, "a.tar: no pairs in it"),
        ({".hidden": b"", "folder/.png": b"", "README": b""}, "a.tar: no pairs in it"),
    ],
)
def test_a_bad_sample_is_named_by_tar_and_member(out, members, words):
    says(write_tar(out / "a.tar", members), words)


def test_a_missing_shard_is_named(photo_folder, out):
    source = as_shards(photo_folder, out)
    (out / "00001.tar").unlink()
    says(source, "00001.tar: no such file")
    says(str(out / "none-*.tar"), "none-*.tar: no such pairs file")


def test_files_of_several_kinds_are_not_mixed(photo_folder, out):
    as_csv(photo_folder, out)
    says(str(photo_folder / "*"), "several files are read together if all are Parquet or tar")


def test_an_unknown_dataset_is_named(out):
    says(f"datasets:{out}", "cannot be loaded")
    says("datasets:./gone", "no such folder")


# addresses


def test_an_address_is_refused_unless_it_is_allowed(photo_folder):
    changed = rows(photo_folder)
    changed[4]["image"] = "https://example.org/a.png"
    says(rewrite(photo_folder, changed), "pairs.jsonl:5: https://example.org", "--allow-urls")


def test_a_text_of_bytes_is_no_text(photo_folder, out):
    table = pa.table({"image": [str(photo_folder / "1.png")], "text": [b"bytes"]})
    pq.write_table(table, out / "a.parquet")
    says(out / "a.parquet", "a.parquet:0: no text")
