"""Models on the hub, with a fake one: errors in one line, and the commit that is recorded."""

from __future__ import annotations

import json
import shutil
from unittest.mock import Mock

import pytest
from huggingface_hub import ResolvedRevision, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from jinja2 import Environment, meta

from commands import error_line, invoke
from conftest import SMALL_SAE, SMALL_SCENES
from patch_retriever import build_retriever
from patch_retriever.backbones.load import load_backbone, pinned
from patch_retriever.build import model_fingerprint
from patch_retriever.config import BuildConfig
from patch_retriever.errors import UserError
from patch_retriever.report import card
from patch_retriever.retrieval.load import load_encoder
from patch_retriever.runs import MARKER, Run

COMMITS = {None: "a" * 40, "main": "a" * 40, "v2": "b" * 40}


@pytest.fixture
def hub(random_model, tmp_path, monkeypatch):
    """A hub with org/model: its cache holds two commits of it; `moved` changes a branch."""
    cache = tmp_path / "cache"
    commits = dict(COMMITS)
    for commit in set(commits.values()):
        snapshot = cache / "models--org--model" / "snapshots" / commit
        shutil.copytree(random_model, snapshot)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))

    def resolve_revision(repository, revision=None):
        assert repository == "org/model"
        return ResolvedRevision(resolved=commits.get(revision, revision), initial=revision)

    monkeypatch.setattr("huggingface_hub.resolve_revision", resolve_revision)
    return commits


def refusal(name, **named):
    with pytest.raises(UserError) as error:
        load_backbone(name, **named)
    line = str(error.value)
    assert line.startswith(f"{name}: ")
    assert "\n" not in line
    return line


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(("revision", "commit"), [*COMMITS.items(), ("b" * 40, "b" * 40)])
def test_a_revision_is_the_commit_that_it_now_is(revision, commit):
    assert pinned("org/model", revision) == commit


@pytest.mark.usefixtures("hub")
def test_the_files_of_that_commit_are_loaded(tmp_path):
    snapshot = tmp_path / "cache/models--org--model/snapshots" / COMMITS["v2"]
    config = json.loads((snapshot / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 0.5
    (snapshot / "config.json").write_text(json.dumps(config))
    for revision, eps in ((None, 1e-6), ("v2", 0.5)):
        transformer = load_backbone("org/model", revision=revision)
        assert transformer.config.text_config.rms_norm_eps == eps


@pytest.mark.usefixtures("hub")
def test_an_encoder_is_of_that_commit(tmp_path):
    snapshot = tmp_path / "cache/models--org--model/snapshots" / COMMITS["v2"]
    config = json.loads((snapshot / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 0.5
    (snapshot / "config.json").write_text(json.dumps(config))
    found = {
        revision: load_encoder("org/model", revision=revision).fingerprint
        for revision in ("main", COMMITS["main"], "v2", COMMITS["v2"])
    }
    assert found["main"] == found[COMMITS["main"]]
    assert found["main"] != found["v2"] == found[COMMITS["v2"]]


COMMANDS = {
    "build": ("{model}", "-o", "out", "--dry-run"),
    "encode": ("{model}", "{pairs}", "-o", "out.npy"),
    "index": ("{pairs}", "-m", "{model}", "-o", "out"),
    "index-migrate": ("{pairs}", "-m", "{model}", "-o", "out"),
    "search": ("{pairs}", "a cat", "-m", "{model}"),
    "train-sae": ("--model", "{model}", "-o", "out"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_loads_a_model_takes_a_revision(random_model, photo_folder, command):
    filled = [
        part.format(model=random_model, pairs=photo_folder / "pairs.jsonl")
        for part in COMMANDS[command]
    ]
    line = error_line(invoke(command, *filled, "--revision", "v2"))
    assert line == f"{random_model}: a folder has no revisions; leave 'v2' out"


@pytest.mark.usefixtures("hub")
def test_the_revision_of_an_evaluation_is_of_its_one_hub_id(random_model, monkeypatch):
    loaded = []

    def load(name, device, revision, *_, **__):
        loaded.append((name, device, revision))
        raise UserError("enough was seen")

    monkeypatch.setattr("patch_retriever.retrieval.comparison.models.load_encoder", load)
    for names, words in (
        (["org/model"], "enough was seen"),
        (["org/model", "org/other"], "a revision is of one hub id, and 2 are named"),
        ([random_model], "a revision is of one hub id, and 0 are named"),
    ):
        result = invoke("evaluate", *names, "--n", "3", "--revision", "v2")
        assert words in error_line(result)
    assert loaded == [("org/model", "cpu", "v2")]


@pytest.mark.usefixtures("hub")
def test_mteb_s_results_of_a_hub_id_are_filed_under_the_revision_that_is_loaded():
    pytest.importorskip("mteb")
    from patch_retriever.retrieval.mteb.encoder import MtebEncoder

    found = MtebEncoder("org/model", "v2")
    assert found.mteb_model_meta.revision == "v2"
    assert found.encoder.fingerprint == load_encoder("org/model", revision="v2").fingerprint


@pytest.mark.parametrize("name", ["folder", "tiny-mllm"])
def test_a_folder_has_no_revision(name, random_model):
    with pytest.raises(UserError, match="no revisions"):
        load_backbone(str(random_model) if name == "folder" else name, revision="v2")
    arguments = [] if name == "tiny-mllm" else [random_model]
    result = invoke("build", *arguments, "--revision", "v2", "-o", "nowhere", "--dry-run")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "no revisions" in result.stderr
    assert pinned(str(random_model)) is None


def response(status=404):
    return Mock(status_code=status, headers={})


ERRORS = [
    (GatedRepoError("a\nb", response=response(403)), "gated; accept its terms"),
    (RepositoryNotFoundError("a\nb", response=response()), "no such repository"),
    (RevisionNotFoundError("a\nb", response=response()), "no such revision"),
    (RevisionResolutionError("a\nb"), "cannot be reached; check the network"),
    (LocalEntryNotFoundError("a\nb"), "cannot be reached; check the network"),
    (HfHubHTTPError("a\nb", response=response(401)), "hf auth login"),
    (HfHubHTTPError("a\nb", response=response(403)), "hf auth login"),
    (HfHubHTTPError("a\nb", response=response(500)), "the hub failed (a)"),
]


@pytest.mark.parametrize(("error", "words"), ERRORS)
def test_errors_of_asking_for_the_commit(monkeypatch, error, words):
    monkeypatch.setattr("huggingface_hub.resolve_revision", Mock(side_effect=error))
    assert words in refusal("org/model")


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(("error", "words"), ERRORS[:1] + ERRORS[4:])
def test_errors_of_fetching_its_files(tmp_path, monkeypatch, error, words):
    # a gated repository says its commit to everybody, and its files to few
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", Mock(side_effect=error))
    assert words in refusal("org/model")


def test_the_hub_s_own_client_without_a_network():
    name = "no-such-organisation/no-such-model"
    assert "cannot be reached" in refusal(name)
    with pytest.raises(UserError, match=f"^{name}: .* cannot be reached"):
        load_encoder(name)


class Stop(Exception):
    """Enough of the build was seen."""


def built_until_readout(monkeypatch, out, **settings):
    """What the first stage of a build is keyed by, and the settings that it wrote."""
    seen = {}

    def stage(_run, name, _work, **inputs):
        if name == "readout":
            seen.update(inputs)
            raise Stop
        return out

    monkeypatch.setattr(Run, "stage", stage)
    with pytest.raises(Stop):
        build_retriever(
            out, model="org/model", scenes=SMALL_SCENES, sae=SMALL_SAE, folds=1, **settings
        )
    return seen["model"], BuildConfig(**json.loads((out / MARKER).read_text()))


def test_a_build_records_the_commit_and_notices_another(hub, tmp_path, monkeypatch):
    first, settings = built_until_readout(monkeypatch, tmp_path / "out")
    assert settings.revision == COMMITS["main"]
    again, _ = built_until_readout(monkeypatch, tmp_path / "out", revision=COMMITS["main"])
    assert again == first
    hub[None] = COMMITS["v2"]  # somebody pushed
    moved, settings = built_until_readout(monkeypatch, tmp_path / "out")
    assert moved != first
    assert settings.revision == COMMITS["v2"]


def test_the_fingerprint_of_a_folder_needs_no_commit(random_model):
    assert model_fingerprint("org/model", "a") != model_fingerprint("org/model", "b")
    assert len(model_fingerprint(str(random_model), None)) == 64


def test_the_card_tells_the_commit_of_a_hub_id():
    names = meta.find_undeclared_variables(Environment().parse(card._CARD))
    values = {name: name for name in names}
    assert "`base_model` (commit `commit`) as a retriever" in card.model_card(**values)
    assert "`base_model` as a retriever" in card.model_card(**{**values, "commit": None})
