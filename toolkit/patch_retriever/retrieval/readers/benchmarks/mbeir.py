"""M-BEIR (Wei et al., ECCV 2024): which release lies where, and which of its tasks is meant."""

from __future__ import annotations

from pathlib import Path

from patch_retriever.errors import UserError
from patch_retriever.hub import fetch_parquet, is_hub_id
from patch_retriever.retrieval.readers.benchmarks import mbeir_jsonl, mbeir_parquet
from patch_retriever.retrieval.readers.benchmarks.mbeir_tasks import find_task
from patch_retriever.retrieval.readers.options import ReadOptions
from patch_retriever.retrieval.tasks import RetrievalTask


def read_mbeir(location: str, options: ReadOptions) -> list[RetrievalTask]:
    """Read one task of M-BEIR, or all that are there.

    Args:
        location: the folder of a task in the MRBench release (Parquet) or its hub id; a folder of
            such folders, or the root of UniIR's release (JSONL), for all tasks in it; for one of
            them ROOT/mbeir_mscoco_task0, ROOT#mscoco_task0 or, by the number in the paper's code,
            ROOT/mscoco@paper1.
        options: `pool="union"` and splits other than test are in UniIR's release only.

    Raises:
        UserError: no such release or task, a bad row, data that is not what its name says.
    """
    root, name = _locate(location)
    if mbeir_jsonl.is_root(root):
        return mbeir_jsonl.read_root(root, name, options)
    if options.pool == "union":
        raise UserError(
            f"{root}: pool=union needs UniIR's release (TIGER-Lab/M-BEIR: query/, cand_pool/ ...); "
            "the Parquet release has each task's own pool only"
        )
    return mbeir_parquet.read_root(root, name, options)


def _locate(location: str) -> tuple[Path, str | None]:
    """The folder of a release or a task, and which task of it is asked for."""
    if "#" in location:
        root, _, name = location.rpartition("#")
        return Path(root), name
    path = Path(location)
    if path.is_dir():
        return path, None
    if mbeir_jsonl.is_root(path.parent) or mbeir_parquet.task_folders(path.parent):
        return path.parent, path.name
    if location.strip("/").lower() == "tiger-lab/m-beir":
        raise UserError(
            f"{location}: not fetched by itself, its pictures are split archives; clone it, unpack "
            "mbeir_images.tar.gz and name the folder"
        )
    if not is_hub_id(location):
        raise UserError(f"{location}: no such folder, and no hub id such as mteb/mbeir_cirr_task7")
    organisation, _, name = location.partition("/")
    task = find_task(name)
    return fetch_parquet(f"{organisation}/{task.name if task else name}"), None
