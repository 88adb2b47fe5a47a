"""Architectures by name, and what the registry says of mistakes."""

from __future__ import annotations

import pytest

from patch_retriever.errors import UserError
from patch_retriever.sae.architectures import ARCHITECTURES, make_architecture


def message_of(*arguments, **options):
    with pytest.raises(UserError) as error:
        make_architecture(*arguments, **options)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_the_four_architectures_are_there_by_their_names():
    assert list(ARCHITECTURES) == ["topk", "batch-topk", "matryoshka", "jumprelu"]
    for name, kind in ARCHITECTURES.items():
        architecture = make_architecture(name, 7)
        assert type(architecture) is kind
        assert (architecture.name, architecture.k) == (name, 7)


def test_thresholds_for_inference():
    found = {name: kind.threshold for name, kind in ARCHITECTURES.items()}
    assert found == {
        "topk": "per concept",
        "batch-topk": "one",
        "matryoshka": "one",
        "jumprelu": "learned",
    }


def test_options_reach_the_architecture():
    assert make_architecture("matryoshka", 7, prefixes=(0.5, 1.0)).prefix_ends(10) == [5, 10]
    assert make_architecture("matryoshka", 7, prefixes=[0.5, 1]).prefix_ends(10) == [5, 10]
    jump = make_architecture("jumprelu", 7, bandwidth=0.1, l0_weight=0.5)
    assert (jump.bandwidth, jump.l0_weight) == (0.1, 0.5)


@pytest.mark.parametrize("name", ["TopK", "top-k", "", "gated"])
def test_an_unknown_name_is_told_what_there_is(name):
    message = message_of(name, 7)
    assert repr(name) in message
    for known in ARCHITECTURES:
        assert known in message


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("topk", "none"),
        ("batch-topk", "none"),
        ("matryoshka", "prefixes"),
        ("jumprelu", "bandwidth, l0_weight"),
    ],
)
def test_an_unknown_option_is_told_what_the_architecture_has(name, options):
    message = message_of(name, 7, width=3)
    assert name in message
    assert "'width'" in message
    assert message.endswith(f"it has {options}")


def test_what_an_architecture_is_is_no_option():
    assert message_of("topk", 7, threshold="one").endswith("it has none")


@pytest.mark.parametrize(
    "prefixes", [(), (1.0, 0.5), (0.5,), (0.0, 1.0), ("a", 1), 0.5, None, "1", (None, 1)]
)
def test_bad_prefixes(prefixes):
    assert message_of("matryoshka", 7, prefixes=prefixes).startswith("architecture matryoshka: ")


@pytest.mark.parametrize(
    "options", [{"bandwidth": 0}, {"bandwidth": -0.1}, {"bandwidth": "wide"}, {"l0_weight": -1}]
)
def test_bad_values_for_jumprelu(options):
    message = message_of("jumprelu", 7, **options)
    assert message.startswith("architecture jumprelu: ")
    assert next(iter(options)) in message
