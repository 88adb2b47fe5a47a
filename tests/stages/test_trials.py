"""Cross-validation: folds share no picture, what is judged was not fitted on, nothing is lost."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_retriever.config import BuildConfig
from patch_retriever.data import Data, scenes_data
from patch_retriever.features import Features
from patch_retriever.patch.artefact import Patch
from patch_retriever.patch.methods import Method
from patch_retriever.retrieval.collection import Collection
from patch_retriever.retrieval.pairs import Pair, pairs_collection
from patch_retriever.sae.codes import Codes
from patch_retriever.stages.trials import SHARED, fitted_splits, folds, folds_of, trials


@dataclass(frozen=True)
class Named:
    """A picture that is nothing but its name."""

    name: str

    def content_hash(self) -> str:
        return self.name


def pair(text: object, content: object) -> Pair:
    return Pair(Named(str(content)), str(text), str(content))


@st.composite
def pairs_of(draw: st.DrawFn) -> list[Pair]:
    """Pairs in which some pictures have several texts, some texts several pictures, or all texts
    are labels."""
    labels = draw(st.booleans())
    n = draw(st.integers(20, 60))
    few = st.integers(0, 2 * n)
    made = [(draw(few), draw(few)) for _ in range(draw(st.integers(0, 8)))]
    made += [(1000 + i, 1000 + i) for i in range(n)]
    return [pair(f"label {t % 4}" if labels else f"text {t}", p) for t, p in made]


def pictures(collection: Collection, rows) -> set[str]:
    return {p.content_hash() for i in rows for p in collection.items[i].pictures}


@settings(deadline=None, derandomize=True, max_examples=60)
@given(pairs_of(), st.integers(2, 6), st.integers(0, 50))
def test_no_picture_is_in_two_folds_and_only_texts_are_shared(pairs, k, seed):
    collection = pairs_collection("calibration", pairs)
    fold_n = folds(collection, k, seed)
    assert len(fold_n) == len(collection.items)
    assert set(fold_n) <= {SHARED, *range(k)}
    by_fold = [pictures(collection, np.flatnonzero(fold_n == fold)) for fold in range(k)]
    assert sum(map(len, by_fold)) == len(set.union(*by_fold))
    for i in np.flatnonzero(fold_n == SHARED):
        assert collection.items[i].picture is None
    sizes = [int((fold_n == fold).sum()) for fold in range(k)]
    assert max(sizes) <= 3 * max(1, len(fold_n) // k) + 3
    assert np.array_equal(folds(collection, k, seed), fold_n)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(pairs_of(), st.integers(2, 5), st.integers(0, 50))
def test_a_fold_is_judged_on_pairs_that_the_others_do_not_hold(pairs, k, seed):
    collection = pairs_collection("calibration", pairs)
    fold_n = folds(collection, k, seed)
    every = {tuple(p) for p in _pairs(collection, range(len(collection.items)))}
    judged = []
    for fold in range(k):
        fit = np.flatnonzero(fold_n != fold).tolist()
        held = np.flatnonzero((fold_n == fold) | (fold_n == SHARED)).tolist()
        asking = set(np.flatnonzero(fold_n == fold).tolist())
        fitted = {tuple(p) for p in _pairs(collection.subset(fit), fit)}
        found = {tuple(p) for p in _pairs(collection.subset(held, asking), held)}
        assert not fitted & found
        judged += sorted(found)
    assert set(judged) <= every
    if not (fold_n == SHARED).any():
        assert Counter(judged) == Counter(every)


def _pairs(collection: Collection, rows) -> list[tuple[str, int, int]]:
    """Every (task, query, relevant document) by the numbers that items had before."""
    numbers = list(rows)
    return [
        (task.name, numbers[query], numbers[task.documents[answer]])
        for task in collection.tasks
        for query, answers in zip(task.queries, task.relevant, strict=True)
        for answer in answers
    ]


def test_joined_collections_keep_every_pair():
    parts = [pairs_collection(s, [pair(f"{s}{i}", f"{s}{i}") for i in range(5)]) for s in "ab"]
    joined = Collection.joined(parts)
    assert len(joined.items) == 30
    assert [(t.name, len(t.queries), len(t.documents)) for t in joined.tasks] == [
        ("t->i", 10, 10),
        ("i->t", 10, 10),
    ]
    for task in joined.tasks:
        for query, answers in zip(task.queries, task.relevant, strict=True):
            named = [joined.items[query], *(joined.items[task.documents[a]] for a in answers)]
            names = {item.text or item.picture.name for item in named}
            assert len(named) == 2 and len(names) == 1
    assert Collection.joined(parts[:1]) is parts[0]


def test_few_documents_are_parted_into_fewer_folds():
    for pairs, most, expected in ((80, 5, 3), (124, 5, 4), (125, 5, 5), (500, 5, 5), (10, 5, 3)):
        collection = pairs_collection("calibration", [pair(i, i) for i in range(pairs)])
        assert folds_of(collection, most) == expected
        assert folds_of(collection, 2) == 2


def test_which_builds_are_cross_validated():
    small = Data(
        {"validation": pairs_collection("validation", [pair(i, i) for i in range(499)])}, ""
    )
    large = Data(
        {"validation": pairs_collection("validation", [pair(i, i) for i in range(500)])}, ""
    )
    assert fitted_splits(small, 5) == ("calibration", "validation")
    assert fitted_splits(small, 1) == fitted_splits(large, 5) == ("calibration",)


def make_calibration(splits: dict[str, Collection], d: int = 6):
    """Random features of two splits, and a calibration set of both."""
    from patch_retriever.patch.calibration import Calibration
    from patch_retriever.stages.trials import items_and_pairs

    made = {}
    for i, (name, collection) in enumerate(splits.items()):
        n = len(collection.items)
        x_nd = torch.randn(n, d, generator=torch.Generator().manual_seed(i))
        codes = Codes.from_dense(torch.zeros(n, 3))
        made[name] = Features(x_nd, x_nd, codes, torch.from_numpy(collection.kinds()))
    joined = Collection.joined(list(splits.values()))
    whole = Calibration(
        site="last_hidden_state",
        features=Features.joined(list(made.values())),
        sae=None,
        concepts=None,
        gate=None,
        seed=0,
        **items_and_pairs(joined),
    )
    return made, whole


def test_every_trial_is_fitted_and_scored_on_the_items_that_it_is_not_judged_on(monkeypatch):
    scored_on = []

    def scored(features, collection, *_):
        scored_on.append({tuple(row.tolist()) for row in features.pooled_nd})
        assert np.array_equal(features.kinds_n.numpy(), collection.kinds())
        return None, {}

    monkeypatch.setattr("patch_retriever.stages.trials.scored", scored)
    splits = {
        s: pairs_collection(s, [pair(f"{s}{i}", f"{s}{i}") for i in range(n)])
        for s, n in (("calibration", 20), ("validation", 8))
    }
    made, whole = make_calibration(splits)
    seen = []
    joined = Collection.joined(list(splits.values()))

    def spy(c):
        seen.append(c)
        yield Method("base", "base", "nothing", lambda: [Patch(c.site)])

    def features(names, patch):
        assert not patch.layers
        return Features.joined([made[name] for name in names])

    found = tuple(spy(whole))
    held_out = trials(whole, found, Data(splits, ""), features, spy, 4)
    assert (held_out.folds, held_out.repeats) == (3, 3) and len(held_out.trials) == 9
    assert len(seen) == 1  # none is made before its turn
    made_trials = list(held_out.trials)
    assert len(seen) == 10
    every = {tuple(row.tolist()) for row in whole.features.pooled_nd}
    queries = 0
    for c, trial in zip(seen[1:], made_trials, strict=True):
        fitted = {tuple(row.tolist()) for row in c.features.pooled_nd}
        judged_features = trial.features(Patch("last_hidden_state"))
        judged = {tuple(row.tolist()) for row in judged_features.pooled_nd}
        assert not fitted & judged and fitted | judged == every
        assert len(judged_features.kinds_n) == len(trial.collection.items)
        assert np.array_equal(judged_features.kinds_n.numpy(), trial.collection.kinds())
        queries += sum(len(task.queries) for task in trial.collection.tasks)
        named = [joined.items[number].text for number in trial.numbers_m]
        assert named == [item.text for item in trial.collection.items]
        for pairs_n2 in c.pairs.values():
            assert int(pairs_n2.max()) < len(c.features.pooled_nd)
            assert bool((c.kinds_n[pairs_n2[:, 0]] != c.kinds_n[pairs_n2[:, 1]]).all())
    assert queries == 3 * 2 * 28
    asked = [{trial.numbers_m for trial in made_trials[3 * part :][:3]} for part in range(3)]
    assert asked[0] != asked[1] != asked[2]  # other folds every time
    assert scored_on == [{tuple(row.tolist()) for row in c.features.pooled_nd} for c in seen[1:]]


def test_with_one_fold_validation_alone_judges_what_calibration_gave():
    splits = {
        s: pairs_collection(s, [pair(f"{s}{i}", f"{s}{i}") for i in range(5)])
        for s in ("calibration", "validation")
    }
    found = (Method("base", "base", "nothing", list),)
    asked = []
    held_out = trials(
        None, found, Data(splits, ""), lambda names, _: asked.append(tuple(names)), None, 1
    )
    assert held_out.about == {"folds": 1, "repeats": 1, "measure": "score"}
    (trial,) = held_out.trials
    assert trial.methods is found
    assert trial.collection is splits["validation"]
    trial.features(Patch("last_hidden_state"))
    assert asked == [("validation",)]


def test_the_built_in_world_parts_into_folds_by_picture():
    data = scenes_data({"calibration": 20, "validation": 20, "test": 20}, 0)
    joined = Collection.joined([data.splits[s] for s in ("calibration", "validation")])
    fold_n = folds(joined, 5, 0)
    by_fold = [pictures(joined, np.flatnonzero(fold_n == fold)) for fold in range(5)]
    assert all(by_fold)
    assert sum(map(len, by_fold)) == len(set.union(*by_fold))


def test_with_an_adapter_validation_alone_decides():
    """It was trained on calibration, which is no test of it."""
    config = BuildConfig.read(None)
    assert config.folds_of_choice == config.folds == 5
    assert BuildConfig.read(None, adapter={"method": "lora"}).folds_of_choice == 1
    assert BuildConfig.read(None, adapter_from="there").folds_of_choice == 1
    assert BuildConfig.read(None, patch_at="layers.1").folds_of_choice == 1
