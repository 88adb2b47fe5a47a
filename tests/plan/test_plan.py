"""The plan: sums that can be checked by hand, what grows with what, and a 7B model's bounds."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_retriever.backbones.load import built_in_model
from patch_retriever.backbones.size import backbone_size
from patch_retriever.config import BuildConfig
from patch_retriever.features import Features
from patch_retriever.plan import (
    ACCELERATOR,
    Fits,
    Sizes,
    Speed,
    Split,
    plan_json,
    plan_lines,
    stages,
    store_tokens,
)
from patch_retriever.plan.of_build import plan_of
from patch_retriever.sae.codes import Codes

GIGA = 1e9


def sizes_of(pairs, **others):
    calibration, validation, test = (Split.of_pairs(int(s * pairs)) for s in (0.5, 0.2, 0.3))
    small = {"width": 64, "concepts": 512, "active": 8, "image_tokens": 100}
    return Sizes(calibration, validation, test, **{**small, **others})


def seven_billion(**others):
    """LLaVA-1.5-7B in bfloat16 with 50,000 pairs."""
    model = {"parameters": 7_063_000_000, "decoder_parameters": 6_476_000_000}
    shape = {"width": 4096, "concepts": 32_768, "active": 24, "parameter_bytes": 2}
    return sizes_of(50_000, **{**model, **shape, **others})


def stage(sizes, name):
    return next(one for one in stages(sizes) if one.name == name)


@pytest.mark.parametrize("image_tokens", [576, 1000])
def test_a_7b_model_with_50000_pairs_fits_into_64_gb_of_memory_and_100_gb_of_disk(image_tokens):
    plan = plan_json(seven_billion(image_tokens=image_tokens), ACCELERATOR)
    for with_model in ("", "_without_the_model"):
        assert plan[f"memory_bytes{with_model}"] < 64 * GIGA
        assert plan[f"disk_bytes{with_model}"] < 100 * GIGA
    assert plan["memory_bytes"] - plan["memory_bytes_without_the_model"] == 2 * 7_063_000_000


def test_methods_take_no_more_for_ten_times_the_pairs():
    """Calibration is bounded; what grows is held out, and nobody fits on that."""
    few, many = (replace(seven_billion(image_tokens=576), most=n) for n in (2_000, 20_000))
    assert stage(few, "select").memory < stage(many, "select").memory
    more = sizes_of(500_000, width=4096, concepts=32_768, active=24, image_tokens=576)
    held_out = Split.of_pairs(10_000)
    plans = [
        stage(replace(s, validation=held_out), "select")
        for s in (seven_billion(image_tokens=576), more)
    ]
    assert plans[0] == plans[1]


def test_the_store_is_bounded_by_what_training_reads():
    assert store_tokens(sizes_of(200)) == 100 * (64 + 100 + 24)
    assert store_tokens(sizes_of(50_000)) == 2_048_000
    assert store_tokens(sizes_of(500_000, sae_steps=5_000, sae_batch=1_024)) == 5_120_000
    assert stage(sizes_of(50_000), "collect").disk == 2_048_000 * (2 * 64 + 7)


def test_a_features_file_is_as_large_as_planned(tmp_path):
    sizes = sizes_of(200, pooled_tokens=False)
    for split in sizes.splits:
        n = split.items
        concepts_e = torch.randint(sizes.concepts, (n * sizes.active,))
        starts_n1 = torch.arange(0, n * sizes.active + 1, sizes.active)
        codes = Codes(starts_n1, concepts_e, torch.ones(n * sizes.active), sizes.concepts)
        x_nd = torch.zeros(n, sizes.width)
        path = tmp_path / f"{n}.safetensors"
        Features(x_nd, x_nd.clone(), codes, torch.zeros(n, dtype=torch.int8)).save(path)
    written = sum(p.stat().st_size for p in tmp_path.iterdir())
    assert written == pytest.approx(stage(sizes, "features").disk, rel=0.05)


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(["width", "concepts", "active", "image_tokens", "sae_steps", "parameters"]),
    st.integers(100, 5_000),
)
def test_no_stage_takes_less_of_anything_where_something_is_larger(name, pairs):
    small = replace(sizes_of(pairs), parameters=1000, decoder_parameters=900)
    large = replace(small, **{name: 2 * getattr(small, name)})
    for before, after in zip(stages(small), stages(large), strict=True):
        assert after.disk >= before.disk
        assert after.memory >= before.memory
        assert after.operations >= before.operations


def test_codes_of_pooled_tokens_never_hold_more_than_all_concepts():
    sizes = sizes_of(200, image_tokens=10**6)
    assert sizes.entries(Split(0, 7)) == 7 * sizes.concepts
    last = replace(sizes, pooled_tokens=False)
    assert last.entries(Split(3, 7)) == 10 * sizes.active


def test_minutes_are_operations_at_the_speed_of_their_kind():
    speed = Speed(host=10, float32=20, float64=5, model=100, source="by hand")
    one = replace(stage(sizes_of(200), "export"), host=600, float32=1200, float64=300, model=6000)
    assert speed.minutes(one) == pytest.approx((60 + 60 + 60 + 60) / 60)
    assert one.operations == 8100


def test_fewer_settings_take_less_time_and_the_same_memory():
    every, one = sizes_of(2_000), sizes_of(2_000, fits=Fits(spectra=10, svds=2, patches=20))
    assert stage(one, "select").memory == stage(every, "select").memory
    assert stage(one, "select").operations < stage(every, "select").operations


def test_a_plan_is_json_and_its_table_names_every_stage():
    plan = json.loads(json.dumps(plan_json(sizes_of(200), ACCELERATOR)))
    text = "\n".join(plan_lines(plan))
    assert all(one.name in text for one in stages(sizes_of(200)))
    assert plan["disk_bytes"] == sum(one["disk_bytes"] for one in plan["stages"])


def test_the_built_in_models_size_is_that_of_its_files():
    from safetensors import safe_open

    size = backbone_size(str(built_in_model()))
    with safe_open(built_in_model() / "model.safetensors", "pt") as file:
        held = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
    config = json.loads((built_in_model() / "config.json").read_text())
    head = config["text_config"]["vocab_size"] * size.width
    assert size.parameters in (held, held - head)  # a backbone has no head
    assert size.width == config["text_config"]["hidden_size"]
    assert size.layers == config["text_config"]["num_hidden_layers"]
    assert 0 < size.decoder_parameters < size.parameters


def test_the_plan_of_the_scenes_counts_their_items():
    config = BuildConfig(scenes={"calibration": 24, "validation": 20, "test": 24})
    found = plan_of(config, 0, None)
    from patch_retriever.data import scenes_data

    splits = scenes_data(config.scenes.model_dump(), config.seed).splits
    for name, collection in splits.items():
        split = Split(**found["sizes"][name])
        assert split.items == len(collection.items)
        assert split.comparisons == sum(len(t.queries) * len(t.documents) for t in collection.tasks)
