"""Flickr30k and COCO in Karpathy's splits: dataset_flickr30k.json, dataset_coco.json.

    {"dataset": "coco", "images": [{"filename": ..., "filepath": "val2014", "split": "test",
     "imgid": 0, "cocoid": 1, "sentences": [{"raw": ..., "sentid": 2, ...}, ...], ...}, ...]}

Flickr30k has no filepath. Splits: train, val, test, and COCO's restval, which is trained on, too.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from patch_retriever.errors import UserError
from patch_retriever.items import Item
from patch_retriever.pictures.picture import PictureFile
from patch_retriever.retrieval.readers.benchmarks.json_rows import read_json
from patch_retriever.retrieval.readers.benchmarks.shared import BadRows, image_folder
from patch_retriever.retrieval.readers.options import ReadOptions
from patch_retriever.retrieval.tasks import RetrievalTask

_FOLDERS = ("", "images", "flickr30k-images", "flickr30k_images", "Images")


def read_karpathy(location: str, options: ReadOptions) -> list[RetrievalTask]:
    """Captions to pictures and pictures to captions, a picture's own captions being relevant.

    Args:
        location: the JSON file, or a folder with one such file.
        options: pictures are beside the file or in a folder there (`images`,
            `flickr30k-images`), or in `options.images`.

    Raises:
        UserError: no such file or split, a bad entry, a missing picture.
    """
    path = _file(Path(location))
    content = read_json(path)
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list):
        raise UserError(f'{path}: no {{"images": [...]}} in it, as Karpathy\'s splits have')
    bad = BadRows(options.skip_bad)
    entries: list[tuple[str, dict[str, Any]]] = []
    for number, image in enumerate(images):
        problem = _problem(image)
        if problem:
            bad.add(f"{path}: images[{number}] {problem}")
        elif image["split"] == options.split:
            entries.append((f"{path}: images[{number}]", image))
    if not entries:
        splits = Counter(image["split"] for image in images if _problem(image) is None)
        there = ", ".join(f"{split} ({count})" for split, count in splits.items())
        raise UserError(f"{path}: no split {options.split}; there are {there or 'none'}")
    usual = [path.parent / folder for folder in _FOLDERS]
    root = image_folder(options.images, usual, (_path(image) for _, image in entries))
    pictures: dict[str, Item] = {}
    captions: dict[str, Item] = {}
    of_picture: dict[str, list[str]] = {}
    for where, image in entries:
        picture, name = root / _path(image), _path(image)
        if not picture.is_file():
            bad.add(f"{where}: {picture}: no such image file")
        elif name in pictures:
            bad.add(f"{where}: {name} is there twice")
        else:
            pictures[name] = Item(picture=PictureFile(picture))
            of_picture[name] = []
            for number, sentence in enumerate(image["sentences"]):
                caption = str(sentence.get("sentid", f"{name}#{number}"))
                if caption in captions:
                    bad.add(f"{where}: sentid {caption} is there twice")
                else:
                    captions[caption] = Item(sentence["raw"])
                    of_picture[name].append(caption)
    of_caption = {c: {name: 1} for name, own in of_picture.items() for c in own}
    dataset = str(content.get("dataset") or path.stem)
    return [
        _task(f"{dataset}_t2i", "t->i", captions, pictures, of_caption, options, bad),
        _task(
            f"{dataset}_i2t",
            "i->t",
            pictures,
            captions,
            {name: dict.fromkeys(own, 1) for name, own in of_picture.items() if own},
            options,
            bad,
        ),
    ]


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = sorted(path.glob("dataset_*.json"))
    if len(found) != 1:
        there = ", ".join(file.name for file in found) or "none"
        raise UserError(f"{path}: one dataset_*.json expected, there is {there}; name the file")
    return found[0]


def _problem(image: Any) -> str | None:
    if not isinstance(image, dict) or not isinstance(image.get("filename"), str):
        return "has no filename"
    if not isinstance(image.get("split"), str):
        return "has no split"
    sentences = image.get("sentences")
    if not isinstance(sentences, list) or not sentences:
        return "has no sentences"
    for number, sentence in enumerate(sentences):
        raw = sentence.get("raw") if isinstance(sentence, dict) else None
        if not isinstance(raw, str) or not raw.strip():
            return f"has no text in sentences[{number}]"
    return None


def _path(image: dict[str, Any]) -> str:
    folder = image.get("filepath")
    return f"{folder}/{image['filename']}" if folder else image["filename"]


def _task(
    name: str,
    direction: str,
    queries: dict[str, Item],
    candidates: dict[str, Item],
    qrels: dict[str, dict[str, int]],
    options: ReadOptions,
    bad: BadRows,
) -> RetrievalTask:
    ids = [query for query in queries if query in qrels]
    return RetrievalTask(
        name=name,
        split=options.split,
        direction=direction,
        query_ids=ids,
        queries=[queries[query] for query in ids],
        candidate_ids=list(candidates),
        candidates=list(candidates.values()),
        qrels={query: qrels[query] for query in ids},
        skipped=bad.lines,
    )
