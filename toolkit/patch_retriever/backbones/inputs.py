"""Items to model inputs: batches of similar length, prepared by threads ahead of the model."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import chain, islice
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import torch

from patch_retriever.ahead import WORKERS, made_ahead
from patch_retriever.backbones.placement import device_of
from patch_retriever.items import KINDS, Item
from patch_retriever.lazy import Lazy
from patch_retriever.pictures.picture import in_memory, size_of
from patch_retriever.progress import Progress, no_progress

if TYPE_CHECKING:
    from sentence_transformers.base.modules import Transformer

WINDOW = 8
"""Batches whose items are sorted together: more would pad less, and read pictures' bytes longer
before they are used."""
_LETTERS_PER_TOKEN = 4
_PIXELS_PER_TOKEN = 28 * 28


def item_batches(
    transformer: Transformer,
    items: Sequence[Item],
    batch_size: int,
    progress: Progress = no_progress,
    workers: int = WORKERS,
    skip: int = 0,
) -> Generator[tuple[list[int], dict[str, Any]]]:
    """(item numbers, preprocessed features on the model's device), similar lengths together.

    The first `skip` items in this order are left out unread; if they are a number of whole windows
    (`WINDOW` batches), the batches are those that come after them without `skip`.

    Raises:
        UserError: a picture cannot be read; the batches before it come first.
    """
    device = device_of(transformer)
    keys = [(item.kind, len(item.text or "")) for item in items]
    order = sorted(range(len(items)), key=keys.__getitem__)[skip:]
    batches = Preparer(transformer, workers).batches(Lazy(order, items.__getitem__), batch_size)
    with closing(batches):  # its threads end with it, whoever fails
        for positions, features in progress(batches, -(-len(order) // batch_size)):
            yield [order[n] for n in positions], on_device(features, device)


def preprocessed(transformer: Transformer, loaded: list[Any]) -> dict[str, Any]:
    """One batch of loaded items as features on the model's device."""
    return on_device(transformer.preprocess(loaded), device_of(transformer))


def on_device(features: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Features with their tensors on a device."""
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in features.items()}


def read_ahead(items: Sequence[Item], batch_size: int) -> Generator[Item]:
    """The items in their order, their pictures' bytes in memory; a window of them is read ahead.

    By one thread, since files with many pictures in them are read forwards.
    """
    return made_ahead(
        lambda i: item_in_memory(items[i]), range(len(items)), ahead=WINDOW * batch_size
    )


def item_in_memory(item: Item) -> Item:
    """The item with its pictures' bytes read, not decoded.

    Raises:
        UserError: they cannot be read.
    """
    return Item.of(item.text, [in_memory(picture) for picture in item.pictures])


class Preparer:
    """What turns items into a model's input, by several threads at once.

    A tokenizer cannot serve two threads (it keeps how it pads), so each has a copy of the
    processor.
    """

    def __init__(
        self, module: Any, workers: int = WORKERS, as_chat: bool = True, pictures: bool = True
    ) -> None:
        """`module` is a model's first; without `as_chat` it takes items of one kind at a time,
        without `pictures` texts alone (a text-only model's chat template may drop the others)."""
        self._module, self._as_chat, self._pictures = module, as_chat, pictures
        self._processor = getattr(module, "processor", None)
        self._workers = workers if self._processor is not None else 1
        self._free: SimpleQueue[Any] = SimpleQueue()
        self._copies = 0

    def batches(
        self, items: Iterable[Item], batch_size: int, **settings: Any
    ) -> Generator[tuple[list[int], dict[str, Any]]]:
        """(positions in `items`, features on the CPU) of batches, those of every window by kind and
        length; as many batches are ahead as there are workers.

        A sequence is read ahead; what an iterator gives has its pictures in memory already.
        `settings` go to the module's `preprocess`.
        """
        drawn = read_ahead(items, batch_size) if isinstance(items, Sequence) else iter(items)

        def prepare(batch: tuple[list[int], list[Item]]) -> tuple[list[int], dict[str, Any]]:
            numbers, some = batch
            if not self._pictures and any(item.pictures for item in some):
                raise ValueError("takes texts alone, and there are items with pictures")
            if not self._as_chat and any(item.more_pictures for item in some):
                raise ValueError("takes one picture an item, and there are items of more")
            loaded = [item.load() if self._as_chat else item.load_plain() for item in some]
            module = self._free.get()
            try:
                return numbers, module.preprocess(loaded, **settings)
            finally:
                self._free.put(module)

        return made_ahead(prepare, self._planned(drawn, batch_size), self._workers)

    def _planned(
        self, items: Iterator[Item], batch_size: int
    ) -> Iterator[tuple[list[int], list[Item]]]:
        """Positions and items of every batch, a window in memory at a time."""
        start = 0
        try:
            while window := list(islice(items, WINDOW * batch_size)):
                groups = self._groups(window)
                parts = [(g, i) for g in groups for i in range(0, len(g), batch_size)]
                self._make_copies(min(self._workers, len(parts)))
                for group, i in parts:
                    batch = group[i : i + batch_size]
                    yield [start + n for n in batch], [window[n] for n in batch]
                start += len(window)
        finally:
            if isinstance(items, Generator):  # it reads ahead by a thread of its own
                items.close()

    def _groups(self, window: Sequence[Item]) -> list[list[int]]:
        """Numbers of items that may share a batch, by kind, the shortest first."""
        lengths = self._lengths(window)
        order = sorted(range(len(window)), key=lambda n: (window[n].kind, lengths[n]))
        if self._as_chat:
            return [order]
        return [[n for n in order if window[n].kind == kind] for kind in KINDS]

    def _lengths(self, window: Sequence[Item]) -> list[float]:
        """About how many tokens every item has, the template's aside."""
        sizes = [[s for p in item.pictures if (s := size_of(p))] for item in window]
        tokens = iter(picture_tokens(self._processor, list(chain.from_iterable(sizes))))
        return [
            sum(islice(tokens, len(of_item))) + len(item.text or "") / _LETTERS_PER_TOKEN
            for item, of_item in zip(window, sizes, strict=True)
        ]

    def _make_copies(self, n: int) -> None:
        while self._copies < n:
            self._free.put(twin(self._module) if self._copies else self._module)
            self._copies += 1


def picture_tokens(processor: Any, sizes: Sequence[tuple[int, int]]) -> Sequence[float]:
    """How many tokens pictures of these sizes (width, height) become; where the processor cannot
    say, as if it were in proportion to their pixels."""
    try:
        found = processor._get_num_multimodal_tokens([(height, width) for width, height in sizes])
        return list(found["num_image_tokens"])
    except Exception:  # it is there for servers, and not all processors have it or can
        return [width * height / _PIXELS_PER_TOKEN for width, height in sizes]


def twin(module: Any) -> Any:
    """A copy of a module with a processor of its own; submodules and hooks are shared."""
    own = {k: v for k, v in vars(module).items() if not k.startswith("_") and k != "forward"}
    other = copy.copy(module)
    vars(other).update(copy.deepcopy(own))
    return other
