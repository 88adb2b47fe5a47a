"""SAEs on the hub: which files are fetched, what is uploaded, and errors in one line."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub import RepoUrl
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from saved import FIXTURES, Saved

from patch_retriever.errors import UserError
from patch_retriever.sae.formats import load_sae, push_sae, save_sae


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one repository of many SAEs; `fetched` lists what was asked of it."""
    repository, fetched = tmp_path / "repository", []
    shutil.copytree(FIXTURES / "ours/jumprelu", repository, dirs_exist_ok=True)
    shutil.copytree(FIXTURES / "sparsify/topk", repository / "layers.3")
    shutil.copytree(FIXTURES / "saelens/topk", repository / "a" / "b")
    shutil.copytree(FIXTURES / "dictionary_learning/topk", repository / "trainer_0")
    shutil.copytree(FIXTURES / "overcomplete/state", repository / "official")
    for folder in (repository, repository / "layers.3", repository / "trainer_0"):
        for name in ("state.pt", "optimizer_0.pt", "pytorch_model.bin", "README.md"):
            (folder / name).write_bytes(b"not to be fetched")

    def snapshot_download(repo_id, revision, allow_patterns):
        cache = tmp_path / f"cache{len(fetched)}"
        cache.mkdir()
        names = [str(p.relative_to(repository)) for p in repository.rglob("*") if p.is_file()]
        wanted = [n for n in names if any(fnmatch(n, pattern) for pattern in allow_patterns)]
        for name in wanted:
            (cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repository / name, cache / name)
        fetched.append((repo_id, revision, sorted(wanted)))
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return fetched


@pytest.mark.parametrize(
    ("within", "case", "k", "files"),
    [
        ("", "ours/jumprelu", None, ["cfg.json", "sae_weights.safetensors"]),
        ("/layers.3", "sparsify/topk", None, ["layers.3/cfg.json", "layers.3/sae.safetensors"]),
        ("/a/b", "saelens/topk", None, ["a/b/cfg.json", "a/b/sae_weights.safetensors"]),
        (
            "/trainer_0",
            "dictionary_learning/topk",
            None,
            ["trainer_0/ae.pt", "trainer_0/config.json"],
        ),
        ("/official/sae.pt", "overcomplete/state", 3, ["official/sae.pt"]),
    ],
)
def test_one_sae_of_a_repository_is_fetched_and_nothing_else(hub, within, case, k, files):
    sae = load_sae(f"org/name{within}", k=k, revision="v1")
    assert hub == [("org/name", "v1", files)]
    x_nd, codes_nc, _ = Saved(FIXTURES / case).codes()
    torch.testing.assert_close(sae.encode(x_nd), codes_nc, atol=1e-5, rtol=0)


def test_a_folder_here_goes_before_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FIXTURES / "ours/topk", tmp_path / "org" / "name")
    assert load_sae("org/name").k == 3
    assert hub == []


def refusal(call, *arguments, **named):
    with pytest.raises(UserError) as error:
        call(*arguments, **named)
    line = str(error.value)
    assert "\n" not in line
    return line


def test_a_folder_here_has_no_revision(hub):
    folder = FIXTURES / "ours/topk"
    assert refusal(load_sae, folder, revision="v1").startswith(f"{folder}: ")
    assert hub == []


@pytest.mark.parametrize("within", ["", "/layers.4", "/a", "/a/b/cfg.json", "/sae.pt"])
def test_where_the_repository_has_no_sae(hub, within, tmp_path):
    for name in ("cfg.json", "sae_weights.safetensors"):
        (tmp_path / "repository" / name).unlink()
    line = refusal(load_sae, f"org/name{within}", k=None)
    assert line.startswith(f"org/name{within}: no SAE")
    assert "organisation/name/folder" in line
    assert len(hub) == 1


@pytest.mark.parametrize(
    "source",
    ["/nowhere", "nowhere", "./no/where", "~/no/where", "../no/where", "a/b/../../c", "a/"],
)
def test_what_is_no_hub_id_is_not_asked_of_the_hub(hub, source):
    assert refusal(load_sae, source).startswith(f"{source}: no such file or folder")
    assert hub == []


def response(status=404):
    return Mock(status_code=status, headers={})


ERRORS = [
    (GatedRepoError("a\nb", response=response(403)), "gated"),
    (RepositoryNotFoundError("a\nb", response=response()), "no such repository"),
    (RevisionNotFoundError("a\nb", response=response()), "no such revision"),
    (LocalEntryNotFoundError("a\nb"), "cannot be reached"),
    (HfHubHTTPError("a\nb", response=response(401)), "hf auth login"),
    (HfHubHTTPError("a\nb", response=response(500)), "the hub failed (a)"),
    (ConnectionError("a\nb"), "the hub failed (a)"),
    (OSError(28, "No space left on device"), "No space left"),
    (ValueError("bad id"), "bad id"),
    (RuntimeError(), "RuntimeError()"),
]


@pytest.mark.parametrize(("error", "words"), ERRORS)
def test_errors_of_fetching_name_the_repository_in_one_line(monkeypatch, error, words):
    monkeypatch.setattr("huggingface_hub.snapshot_download", Mock(side_effect=error))
    line = refusal(load_sae, "org/name/layers.3")
    assert line.startswith("org/name: ")
    assert words in line


def test_the_hub_s_own_client_without_a_network():
    line = refusal(load_sae, "no-such-organisation/no-such-name")  # tests run with HF_HUB_OFFLINE
    assert line.startswith("no-such-organisation/no-such-name: ")
    assert "cannot be reached" in line


@pytest.fixture
def api(monkeypatch):
    """The client's API, which notes what it is asked and uploads nothing."""
    api = Mock()
    api.create_repo.return_value = RepoUrl("https://huggingface.co/org/name")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    return api


@pytest.fixture
def ours(tmp_path):
    return Path(shutil.copytree(FIXTURES / "ours/topk", tmp_path / "ours"))


@pytest.mark.parametrize("private", [False, True])
def test_one_of_our_folders_is_uploaded(api, ours, private):
    assert push_sae(ours, "org/name", private) == "https://huggingface.co/org/name"
    api.create_repo.assert_called_once_with("org/name", private=private, exist_ok=True)
    api.upload_folder.assert_called_once()
    asked = api.upload_folder.call_args.kwargs
    assert (asked["repo_id"], asked["folder_path"]) == ("org/name", ours)
    assert asked["allow_patterns"] == ["cfg.json", "sae_weights.safetensors", "README.md"]


def test_an_sae_that_was_read_and_saved_again_is_uploaded(api, tmp_path):
    save_sae(load_sae(FIXTURES / "sparsify/topk"), tmp_path / "again")
    push_sae(str(tmp_path / "again"), "org/name")
    api.upload_folder.assert_called_once()


@pytest.mark.parametrize("case", ["saelens/topk", "sparsify/topk", "dictionary_learning/topk", ""])
def test_folders_that_are_not_ours_are_not_uploaded(api, case):
    line = refusal(push_sae, FIXTURES / case, "org/name")
    assert line.startswith(f"{FIXTURES / case}: ")
    assert api.mock_calls == []


def test_a_damaged_folder_is_not_uploaded(api, ours):
    weights = ours / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    assert refusal(push_sae, ours, "org/name").startswith(f"{weights}: ")
    assert api.mock_calls == []


def test_a_config_of_ours_with_somebody_else_s_name_is_not_uploaded(api, ours):
    config = json.loads((ours / "cfg.json").read_text())
    (ours / "cfg.json").write_text(json.dumps({**config, "saved_by": "somebody else"}))
    refusal(push_sae, ours, "org/name")
    assert api.mock_calls == []


@pytest.mark.parametrize(("error", "words"), ERRORS)
@pytest.mark.parametrize("step", ["create_repo", "upload_folder"])
def test_errors_of_uploading_name_the_repository_in_one_line(api, ours, step, error, words):
    getattr(api, step).side_effect = error
    line = refusal(push_sae, ours, "org/name")
    assert line.startswith("org/name: ")
    assert words in line
