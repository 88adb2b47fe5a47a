"""Tokens that the choice of a readout keeps: later passes give what they would give without them,
and the items that are kept do not go through the model again."""

from __future__ import annotations

import pytest
import torch

from handmade import Drawn, make_sae
from patch_retriever.activations import kept as module
from patch_retriever.activations.collect import (
    collect_features,
    collect_pooled,
    collect_tokens,
)
from patch_retriever.activations.kept import KeptTokens, KeptWriter
from patch_retriever.activations.store import Store
from patch_retriever.backbones.load import load_backbone
from patch_retriever.backbones.readout import LAST, ONE_WORD, PAPER, Readout
from patch_retriever.items import KINDS, Item

ITEMS = tuple(
    item
    for i in range(8)
    for item in (
        Item("a cat " * (i + 1)),
        Item(picture=Drawn(i)),
        Item("dogs " * (8 - i), Drawn(8 + i)),
    )
)
KINDS_N = torch.tensor([KINDS.index(item.kind) for item in ITEMS])
READOUTS = (
    Readout(ONE_WORD, LAST, "mean"),
    Readout(ONE_WORD, LAST, "mean+lasttoken"),
    Readout(ONE_WORD, LAST, "lasttoken", cut="layers.0"),
)
SOME = ITEMS[::2]


@pytest.fixture(scope="module")
def transformer(random_model):
    return load_backbone(str(random_model))


@pytest.fixture
def keep(transformer, tmp_path, monkeypatch):
    """The tokens of `SOME`, kept of one readout, in several shards."""
    monkeypatch.setattr(module, "_SHARD", 20_000)

    def kept(readout, some=SOME, **settings):
        writer = KeptWriter(tmp_path, ITEMS, **settings)
        collect_pooled(transformer, some, READOUTS, batch_size=5, keep=writer)
        writer.close(readout)
        return KeptTokens(tmp_path, ITEMS)

    return kept


@pytest.fixture
def ran(transformer):
    """How many items went through the model."""
    counted = []
    hook = transformer.register_forward_pre_hook(
        lambda _, args: counted.append(len(args[0]["input_ids"]))
    )
    yield lambda: sum(counted)
    hook.remove()


@pytest.mark.parametrize("readout", READOUTS, ids=lambda readout: readout.name)
def test_features_are_those_of_a_pass_and_kept_items_take_none(readout, keep, transformer, ran):
    kept = keep(readout)
    arguments = (transformer, ITEMS, readout, make_sae(1.0), KINDS_N)
    before = ran()
    plain = collect_features(*arguments, batch_size=5, by_role=True)
    between = ran()
    found = collect_features(*arguments, batch_size=5, by_role=True, kept=kept)
    if readout.cut is None:  # a cut model is a copy without the hook
        assert (between - before, ran() - between) == (len(ITEMS), len(ITEMS) - len(SOME))
    for name in ("pooled_nd", "mean_nd", "role_energy_cr"):
        assert torch.allclose(getattr(found, name), getattr(plain, name), atol=1e-5), name
    assert torch.allclose(found.codes.dense(), plain.codes.dense(), atol=1e-4)
    assert torch.equal(found.kinds_n, plain.kinds_n)


@pytest.mark.parametrize("wanted", [None, 150])
def test_a_store_holds_the_same_tokens_of_the_same_items(wanted, keep, transformer, tmp_path):
    readout = READOUTS[1]
    kept = keep(readout)
    arguments = {"batch_size": 5, "tokens_wanted": wanted}
    collect_tokens(transformer, ITEMS, readout, tmp_path / "plain", **arguments)
    collect_tokens(transformer, ITEMS, readout, tmp_path / "kept", **arguments, kept=kept)
    plain, found = (_by_item(Store(tmp_path / name)) for name in ("plain", "kept"))
    assert plain.keys() == found.keys() == set(range(len(ITEMS)))
    for item, (tokens_td, *rest) in plain.items():
        assert torch.allclose(found[item][0], tokens_td, rtol=2e-2, atol=1e-3), item  # bf16
        assert all(map(torch.equal, found[item][1:], rest)), item


def _by_item(store):
    shards = [store.read(number) for number in range(len(store.shards))]
    columns = ("activations_td", "roles_t", "pooled_t", "sink_t")
    items_t = torch.cat([shard["items_t"] for shard in shards])
    joined = [torch.cat([shard[name] for shard in shards]) for name in columns]
    return {int(item): [c[items_t == item] for c in joined] for item in items_t.unique()}


def test_no_more_than_the_limit_is_on_disk_and_one_readout_is_in_the_end(keep, tmp_path):
    limit = 100_000
    kept = keep(READOUTS[2], limit=limit)
    known, left = kept.known(ITEMS)
    assert known and set(left) > set(range(1, len(ITEMS), 2))
    files = list(tmp_path.glob("*.safetensors"))
    assert sum(path.stat().st_size for path in files) < limit
    assert kept.is_of(READOUTS[2])
    assert not any(kept.is_of(readout) for readout in READOUTS[:2])
    # both poolings of the whole decoder are of the same tokens
    assert keep(READOUTS[0]).is_of(READOUTS[1])


def test_nothing_is_kept_where_the_first_batch_is_too_large(keep, transformer):
    kept = keep(READOUTS[0], limit=100)
    assert kept.known(ITEMS) == ([], list(range(len(ITEMS))))
    found = collect_features(transformer, ITEMS, READOUTS[0], make_sae(1.0), KINDS_N, kept=kept)
    plain = collect_features(transformer, ITEMS, READOUTS[0], make_sae(1.0), KINDS_N)
    assert torch.equal(found.pooled_nd, plain.pooled_nd)


@pytest.mark.parametrize(
    "other",
    [
        Readout(PAPER),
        Readout(ONE_WORD, "layers.0"),
        Readout(ONE_WORD, cut="layers.0"),
        Readout(ONE_WORD, max_tokens=70),
    ],
    ids=lambda readout: f"{readout.name}, {readout.max_tokens}",
)
def test_other_inputs_and_sites_go_through_the_model(other, keep, transformer):
    kept = keep(READOUTS[0])
    assert not kept.is_of(other)
    found = collect_features(transformer, ITEMS, other, make_sae(1.0), KINDS_N, kept=kept)
    plain = collect_features(transformer, ITEMS, other, make_sae(1.0), KINDS_N)
    assert torch.equal(found.pooled_nd, plain.pooled_nd)


def test_equal_items_that_are_not_the_same_are_not_known(keep):
    kept = keep(READOUTS[0])
    copies = [Item(item.text, item.picture) for item in ITEMS]
    assert kept.known(copies) == ([], list(range(len(ITEMS))))
    assert kept.known(ITEMS[::-1])[1] == list(range(0, len(ITEMS), 2))
