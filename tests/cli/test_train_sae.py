"""`train-sae`: from a store or a backbone, one SAE or several, and everything a user gets wrong."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

from commands import error_line, invoke
from patch_retriever.sae.formats import load_sae
from synthetic import sparse_tokens, write_store

QUICK = ["--steps", "20", "--batch-size", "128", "--expansion", "2", "--k", "4"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    return write_store(folder, sparse_tokens(2000), pairs=[[0, 1], [2, 3]]).folder


def run(*args):
    return invoke("train-sae", *args)


def done(*args):
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result


def fails(*args):
    return error_line(run(*args))


def fresh(*args, cwd=None):
    """The same in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "patch_retriever", "train-sae", *map(str, args)],
        capture_output=True,
        text=True,
        cwd=cwd,
    )


# what is said


def test_a_process_trains_from_a_store_and_says_how_good_it_is(store, tmp_path):
    said = fresh(store, "-o", tmp_path / "sae", *QUICK)
    assert said.returncode == 0, said.stderr
    assert said.stderr == ""
    for word in (str(tmp_path / "sae"), "FVU", "L0", "held-out tokens", "32 concepts"):
        assert word in said.stdout
    assert load_sae(tmp_path / "sae").n_concepts == 32


def test_a_process_says_json_and_nothing_else(store, tmp_path):
    said = fresh(store, "-o", "saes", *QUICK, "--seed", 0, "--seed", 1, "--json", cwd=tmp_path)
    assert (said.returncode, said.stderr) == (0, "")
    found = json.loads(said.stdout, parse_constant=pytest.fail)
    assert found["folder"] == "saes"
    assert list(found["saes"]) == ["topk-k4-x2-seed0", "topk-k4-x2-seed1"]
    for name, about in found["saes"].items():
        config = json.loads((tmp_path / "saes" / name / "cfg.json").read_text())
        assert config["metadata"] == about
    (value,) = found["stability"].values()
    assert 0 < value < 1


def test_the_help_of_a_process_says_what_can_be_set():
    said = fresh("--help")
    assert (said.returncode, said.stderr) == (0, "")
    for word in ("--architecture", "--option", "--shared", "--checkpoint-every", "matryoshka"):
        assert word in said.stdout


def test_a_process_says_one_line_about_what_is_wrong(tmp_path):
    said = fresh(tmp_path, "-o", tmp_path / "sae", *QUICK)
    assert (said.returncode, said.stdout) == (2, "")
    (line,) = said.stderr.splitlines()
    assert line.startswith(f"Error: {tmp_path}: no finished activation store")


def test_several_are_told_one_after_the_other_with_their_stability(store, tmp_path):
    more = ["--k", 2, "--seed", 0, "--seed", 1, "--architecture", "topk", "--architecture",
            "jumprelu"]  # fmt: skip
    text = done(store, "-o", tmp_path, *QUICK, *more).stdout
    names = [
        f"{architecture}-k{k}-x2-seed{seed}"
        for architecture in ("topk", "jumprelu")
        for k in (4, 2)
        for seed in (0, 1)
    ]
    assert {path.name for path in tmp_path.iterdir()} == set(names)
    places = [text.index(str(tmp_path / name)) for name in names]
    assert places == sorted(places)
    lines = [line for line in text.splitlines() if line.startswith("stability of ")]
    assert len(set(lines)) == 4
    for line in lines:
        assert "seed0 and " in line


def test_without_a_store_activations_come_from_the_backbone(random_model, photo_folder, tmp_path):
    text = done(
        "--model", random_model, "--pairs", photo_folder, "--prompt", "plain", "-o",
        tmp_path / "sae", *QUICK,
    ).stdout  # fmt: skip
    assert "32 dimensions, 64 concepts" in text
    assert load_sae(tmp_path / "sae").d_in == 32


def test_options_of_an_architecture_reach_it(store, tmp_path):
    for number, prefixes in enumerate(("[1]", "[0.25, 1]")):
        done(
            store, "-o", tmp_path / str(number), *QUICK, "--architecture", "matryoshka",
            "--option", f"prefixes={prefixes}",
        )  # fmt: skip
    first, second = (
        (tmp_path / name / "sae_weights.safetensors").read_bytes() for name in ("0", "1")
    )
    assert first != second
    metadata = json.loads((tmp_path / "1/cfg.json").read_text())["metadata"]
    assert metadata["settings"]["options"] == {"prefixes": [0.25, 1]}


def test_settings_reach_the_training(store, tmp_path):
    done(
        store, "-o", tmp_path, *QUICK, "--lr", "0.004", "--precision", "fp32", "--shared",
        "iso-energy", "--shared-weight", "0.2", "--seed", "7", "--pooled-share", "0.5",
    )  # fmt: skip
    settings = json.loads((tmp_path / "cfg.json").read_text())["metadata"]["settings"]
    given = {"steps": 20, "batch_size": 128, "expansion": 2, "k": 4, "lr": 0.004, "seed": 7,
             "precision": "fp32", "shared": "iso-energy", "shared_weight": 0.2}  # fmt: skip
    assert {name: settings[name] for name in given} == given


# what is refused


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--nothing", "1"], "--nothing"),
        (["--architecture", "gated"], "--architecture"),
        (["--k", "0"], "--k"),
        (["--steps", "0"], "--steps"),
        (["--lr", "-1"], "--lr"),
        (["--seed", "-1"], "--seed"),
        (["--pooled-share", "1"], "--pooled-share"),
        (["--precision", "fp16"], "--precision"),
        (["--shared", "all"], "--shared"),
        (["--option", "bandwidth"], "bandwidth"),
        (["--option", "bandwidth=wide"], "bandwidth=wide"),
        (["--option", "=3"], "no option"),
        (["--option", "bandwidth=0.1"], "bandwidth"),
        (["--architecture", "jumprelu", "--option", "width=0.1"], "width"),
        (["--architecture", "jumprelu", "--option", "bandwidth=0"], "bandwidth"),
        (["--architecture", "jumprelu", "--option", 'bandwidth="0.1"'], "bandwidth"),
        (["--architecture", "jumprelu", "--option", "bandwidth=[0.1]"], "bandwidth"),
        (["--architecture", "jumprelu", "--option", "l0_weight=null"], "l0_weight"),
        (["--architecture", "matryoshka", "--option", "prefixes=0.5"], "prefixes"),
        (["--architecture", "matryoshka", "--option", "prefixes=[]"], "prefixes"),
        (["--architecture", "matryoshka", "--option", "prefixes=[0.5,0.2,1]"], "prefixes"),
        (["--k", "33"], "33"),
        (["--k", "8", "--k", "8"], "topk-k8-x2-seed0 twice"),
        (["--device", "nonsense"], "nonsense"),
    ],
)
def test_a_wrong_option_is_named(args, named, store, tmp_path):
    quick = QUICK[:-2] if "--k" in args else QUICK
    assert named in fails(store, "-o", tmp_path / "sae", *quick, *args)
    assert not (tmp_path / "sae/cfg.json").exists()


def test_out_must_be_given(store):
    assert "--out" in fails(store)


def test_a_missing_store_is_named(tmp_path):
    path = tmp_path / "gone"
    line = fails(path, "-o", tmp_path / "sae")
    assert line.startswith(f"{path}: no finished activation store")


def test_a_folder_that_holds_an_sae_is_named(store, tmp_path):
    done(store, "-o", tmp_path, *QUICK)
    before = (tmp_path / "cfg.json").read_bytes()
    line = fails(store, "-o", tmp_path, *QUICK, "--seed", "1")
    assert line.startswith(f"{tmp_path}: holds a trained SAE already")
    assert (tmp_path / "cfg.json").read_bytes() == before


@pytest.mark.parametrize("model", ["./nowhere", "no-such-model"])
def test_an_unknown_model_is_named(model, tmp_path):
    assert fails("--model", model, "-o", tmp_path, *QUICK).startswith(f"{model}: no such folder")


def test_missing_pairs_are_named(random_model, tmp_path):
    path = tmp_path / "gone.jsonl"
    line = fails("--model", random_model, "--pairs", path, "-o", tmp_path / "sae", *QUICK)
    assert line.startswith(f"{path}: no such pairs file")


def test_a_damaged_shard_is_named(tmp_path):
    store = write_store(tmp_path / "store", sparse_tokens(2000))
    path = store.folder / store.shards[1]["file"]
    path.write_bytes(path.read_bytes()[:-9])
    assert fails(store.folder, "-o", tmp_path / "sae", *QUICK).startswith(f"{path}: damaged")


def test_tensorboard_gets_files_or_is_said_to_be_missing(store, tmp_path):
    args = store, "-o", tmp_path / "sae", *QUICK, "--tensorboard", tmp_path / "board"
    if importlib.util.find_spec("tensorboard") is None:
        assert fails(*args).startswith("TensorBoard is not installed")
        assert not (tmp_path / "sae").exists()
    else:
        done(*args)
        assert list((tmp_path / "board").glob("events.out.tfevents.*"))


def test_tensorboard_gets_the_figures_of_every_sae(store, tmp_path, monkeypatch):
    """With a writer that only remembers."""
    written = {}

    class Writer:
        def __init__(self, folder):
            assert folder == tmp_path / "board"

        def add_scalar(self, name, value, step):
            written.setdefault(name, {})[step] = value

        def flush(self):
            pass

    stand_in = type(sys)("torch.utils.tensorboard")
    stand_in.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    done(store, "-o", tmp_path / "saes", *QUICK, "--k", 2, "--tensorboard", tmp_path / "board")
    assert {name: list(values) for name, values in written.items()} == {
        name: [10, 20]
        for name in ("tokens/s", "fvu/0", "fvu/1", "l0/0", "l0/1", "dead/0", "dead/1")
    }
    assert written["l0/0"][20] == pytest.approx(4, rel=0.1)
    assert written["l0/1"][20] == pytest.approx(2, rel=0.1)
