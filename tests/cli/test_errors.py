"""Whatever a user gets wrong: one line that names it, exit code 2, and no traceback."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from commands import invoke
from patch_retriever.cli import main
from patch_retriever.runs import MARKER, Run
from patch_retriever.sae.formats import save_sae
from patch_retriever.sae.model import SparseAutoencoder

PROGRESS = re.compile(r"\[ *\d+\.\d s\] ")


def fails(*args: object) -> str:
    """The one line that is said about a command that a user can mend."""
    result = invoke(*args)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if not PROGRESS.match(line)]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    return lines[0].removeprefix("Error: ")


@pytest.fixture
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("made") / "out"


@pytest.fixture
def build(photo_folder, out):
    """Build on a user's pairs, which are read at once."""

    def run(*args: object) -> str:
        return fails("build", "--pairs", photo_folder, "-o", out, *args)

    return run


# models


@pytest.mark.parametrize("model", ["./nowhere", "/no/such/model", "~/model", "nowhere", "a/b/c"])
def test_an_unknown_model_is_named(build, model):
    assert build(model).startswith(f"{model}: no such folder")


@pytest.mark.parametrize("model", ["./nowhere", "/no/such/model"])
def test_a_dry_run_does_not_look_up_a_folder_on_the_hub(build, model):
    assert build(model, "--dry-run").startswith(f"{model}: no such folder")


def test_with_json_the_error_is_all_there_is_on_stderr(photo_folder, out):
    result = invoke("build", "./nowhere", "--pairs", photo_folder, "-o", out, "--json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(r"Error: ./nowhere: no such folder.*\n", result.stderr)


def test_a_folder_without_a_model_is_named(build, tmp_path):
    (tmp_path / "empty").mkdir()
    line = build(tmp_path / "empty")
    assert line == f"{tmp_path / 'empty'}: no model in this folder (config.json is missing)"


def test_a_file_instead_of_a_model_is_named(build, photo_folder):
    assert build(photo_folder / "0.png").startswith(f"{photo_folder / '0.png'}: not a folder")


@pytest.mark.parametrize("config", ["{", '{"model_type": "nothing-known"}', "{}"])
def test_a_damaged_model_is_named(build, tmp_path, config):
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / "config.json").write_text(config)
    assert build(folder).startswith(f"{folder}")


@pytest.fixture(scope="module")
def text_only(tmp_path_factory) -> dict[str, Path]:
    """Two small models that take texts only: an encoder and a decoder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        BertConfig,
        BertModel,
        PreTrainedTokenizerFast,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    words = ["[PAD]", "[UNK]", *"abcdefghijklmnopqrstuvwxyz"]
    made = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64
    )
    sizes = {
        "vocab_size": len(words),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    folders = {}
    for name, model in (
        ("bert", BertModel(BertConfig(**sizes))),
        ("qwen2", Qwen2ForCausalLM(Qwen2Config(**sizes, num_key_value_heads=2))),
    ):
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


@pytest.mark.parametrize("name", ["bert", "qwen2"])
def test_a_text_only_model_is_named(build, text_only, name):
    line = build(text_only[name])
    assert line.startswith(f"{text_only[name]}: a text-only model")
    assert "takes images" in line


def test_a_model_that_is_patched_already_is_named(build, finished_build):
    assert build(finished_build).startswith(f"{finished_build}: patched already")


def test_an_unknown_device_is_named(build, random_model):
    assert "'teapot'" in build(random_model, "--device", "teapot")


# pairs: with a dry run, and in a build


def rewrite(folder: Path, change) -> Path:
    path = folder / "pairs.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows)
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def cut(path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:1500])


@pytest.fixture(params=["--dry-run", None], ids=["dry", "wet"])
def build_on(request, out, random_model):
    def run(pairs: Path, *args: object) -> str:
        dry = [request.param] if request.param else []
        return fails("build", random_model, "--pairs", pairs, "-o", out, *dry, *args)

    return run


def test_a_missing_pairs_file_is_named(build_on, tmp_path):
    line = build_on(tmp_path / "gone.jsonl")
    assert line == f"{tmp_path / 'gone.jsonl'}: no such pairs file or folder"


def test_an_empty_pairs_file_is_named(build_on, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    assert build_on(tmp_path / "empty.jsonl").startswith(f"{tmp_path / 'empty.jsonl'}: no pairs")


def test_a_row_without_text_is_named(build_on, photo_folder):
    path = rewrite(photo_folder, lambda rows: rows[6].pop("text"))
    line = build_on(path)
    assert line.startswith(f"{path}:7: no text")
    assert "--skip-bad" in line


def test_a_row_that_is_no_json_is_named(build_on, photo_folder):
    path = photo_folder / "pairs.jsonl"
    path.write_text(path.read_text() + "\n{")
    assert build_on(path).startswith(f"{path}:61: not a JSON object")


def test_a_truncated_image_is_named(build_on, photo_folder):
    cut(photo_folder / "9.png")
    line = build_on(photo_folder)
    assert f"{photo_folder / '9.png'}: not a readable image" in line
    assert "pairs.jsonl:10" in line


def test_a_missing_image_is_named(build_on, photo_folder):
    (photo_folder / "9.png").unlink()
    assert f"{photo_folder / '9.png'}: no such image file" in build_on(photo_folder)


def test_too_few_pairs_are_counted(build_on, photo_folder):
    path = rewrite(photo_folder, lambda rows: rows.pop() and rows.__delitem__(slice(30, None)))
    assert build_on(path).startswith(f"{path}: 30 usable pairs, at least 50")


def test_too_few_pairs_left_are_counted(build_on, photo_folder):
    for i in range(20):
        (photo_folder / f"{i}.png").unlink()
    line = build_on(photo_folder, "--skip-bad")
    assert line.startswith(f"{photo_folder}: 40 usable pairs (20 left out), at least 50")


def test_skip_bad_goes_on_and_says_what_is_left_out(photo_folder, out, random_model):
    cut(photo_folder / "9.png")
    rewrite(photo_folder, lambda rows: rows[6].pop("text"))
    command = ["build", random_model, "--pairs", photo_folder, "-o", out, "--dry-run"]
    result = invoke(*command, "--skip-bad")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "58 usable pairs, 2 left out" in result.stdout
    assert "9.png" in result.stdout
    assert "pairs.jsonl:7: no text" in result.stdout
    assert not out.exists()
    found = json.loads(invoke(*command, "--skip-bad", "--json").stdout)["pairs"]
    assert (found["usable"], len(found["left out"])) == (58, 2)


# where to write


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_foreign_folder_is_not_written_to(photo_folder, dry):
    before = sorted(photo_folder.iterdir())
    line = fails("build", "--pairs", photo_folder, "-o", photo_folder, *dry)
    assert line.startswith(f"{photo_folder}: not empty and not made by patch-retriever")
    assert sorted(photo_folder.iterdir()) == before


def test_a_file_is_not_written_over(photo_folder):
    line = fails("build", "--pairs", photo_folder, "-o", photo_folder / "0.png")
    assert line.startswith(f"{photo_folder / '0.png'}: a file")


def test_a_folder_that_cannot_be_made_is_named(photo_folder, random_model):
    path = photo_folder / "0.png" / "out"
    line = fails("build", random_model, "--pairs", photo_folder, "-o", path)
    assert line.startswith(f"{path}")


def test_a_folder_that_another_build_writes_is_named(build, out, random_model):
    with Run(out / "run", print):
        (out / MARKER).write_text("{}")
        assert build(random_model).startswith(f"{out}: another build is writing here")


def no_space(*_args: object, **_options: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "/the/disk")


def test_a_full_disk_is_told_and_the_same_command_may_be_run_again(
    build, random_model, photo_folder, monkeypatch, out
):
    path = rewrite(photo_folder, lambda rows: rows[6].pop("text"))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", no_space)
        line = build(random_model)
        assert line.startswith(f"{out}")
        assert "No space left" in line
    assert build(random_model).startswith(f"{path}:7: no text")  # on to the next fault


def test_a_full_disk_anywhere_else_is_told_too(monkeypatch, tmp_path):
    monkeypatch.setattr("patch_retriever.retrieval.readers.items.read_corpus", no_space)
    line = fails("encode", tmp_path, tmp_path / "items.jsonl", "-o", tmp_path / "out.npy")
    assert line.startswith("/the/disk: no space left")


# settings


@pytest.fixture
def configured(tmp_path, out):
    def run(content: object) -> str:
        path = tmp_path / "settings.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        line = fails("build", "org/model", "--config", path, "-o", out, "--dry-run")
        assert line.startswith(f"{path}: ")
        return line.removeprefix(f"{path}: ")

    return run


def test_an_unknown_key_is_named_with_the_known_ones(configured):
    line = configured({"modle": "a"})
    assert line.startswith("unknown key 'modle'; known keys: ")
    assert "model" in line.split("known keys: ")[1].split(", ")


@pytest.mark.parametrize(
    ("section", "key", "known"),
    [("sae", "expnsion", "expansion"), ("scenes", "tset", "test")],
)
def test_an_unknown_key_of_a_section_is_named_with_the_known_ones(configured, section, key, known):
    line = configured({section: {key: 30}})
    assert line.startswith(f"unknown key '{section}.{key}'")
    assert known in re.split(r"[ ,:.']+", line.split("known keys")[1])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"seed": -1}, "seed"),
        ({"seed": "many"}, "seed"),
        ({"preset": "best"}, "preset"),
        ({"codes": "both"}, "codes"),
        ({"dtype": "int8"}, "dtype"),
        ({"batch_size": 0}, "batch_size"),
        ({"scenes": {"test": 3}}, "scenes.test"),
        ({"scenes": 7}, "scenes"),
        ({"sae": {"k": "many"}}, "sae.k"),
        ({"sae": {"k": 0}}, "sae.k"),
        ({"sae": {"expansion": 0}}, "sae.expansion"),
        ({"sae": {"steps": 0}}, "sae.steps"),
        ({"sae": {"batch_size": -5}}, "sae.batch_size"),
        ({7: 8}, "7"),
    ],
)
def test_a_wrong_value_is_named(configured, settings, named):
    assert configured(settings).startswith(f"{named}: ")


@pytest.mark.parametrize("content", ["a: [", "\ta: b", "- a\n- b", "just words", "\0"])
def test_what_is_no_settings_file_is_named(configured, content):
    assert configured(content)


def test_a_missing_settings_file_is_named(tmp_path, out):
    path = tmp_path / "gone.yaml"
    assert fails("build", "--config", path, "-o", out).startswith(f"{path}: cannot be read")


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["build"], "--out"),
        (["build", "-o", "x", "--preset", "best"], "--preset"),
        (["build", "-o", "x", "--seed", "-1"], "--seed"),
        (["build", "-o", "x", "--batch-size", "0"], "--batch-size"),
        (["build", "-o", "x", "--nothing"], "--nothing"),
        (["evaluate"], "MODELS"),
        (["evaluate", "x", "--n", "0"], "--n"),
        (["evaluate", "x", "--seed", "-1"], "--seed"),
        (["evaluate", "x", "--batch-size", "0"], "--batch-size"),
        (["evaluate", "x", "--k", "0"], "--k"),
        (["evaluate", "x", "--k", "1,ten"], "--k"),
        (["evaluate", "x", "--pairs", "y"], "--pairs"),
        (["evaluate", "x", "--html", "/"], "--html"),
        (["evaluate", "x", "--calibration", "y"], "--baselines"),
        (["search", "x", "a bag", "--html", "/"], "--html"),
        (["encode", "x", "y", "-o", "/"], "--out"),
        (["encode", "x", "y", "-o", "z", "--batch-size", "0"], "--batch-size"),
        (["encode", "x", "y", "-o", "z", "--as", "poem"], "--as"),
        (["info"], "FOLDER"),
        (["bulid"], "bulid"),
    ],
)
def test_a_wrong_option_is_named_before_anything_is_done(args, named, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = invoke(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("Error: "))
    assert named in line
    assert list(tmp_path.iterdir()) == []


# info


def test_info_on_a_foreign_folder_names_it(tmp_path):
    assert fails("info", tmp_path).startswith(f"{tmp_path}: not made by patch-retriever")


def test_info_on_a_missing_folder_names_it(tmp_path):
    assert fails("info", tmp_path / "gone").startswith(f"{tmp_path / 'gone'}: no such folder")


def test_info_on_an_unfinished_build_says_so(tmp_path):
    (tmp_path / MARKER).write_text("{}")
    assert fails("info", tmp_path).startswith(f"{tmp_path}: its build has not finished")


@pytest.mark.parametrize("damaged", [MARKER, "patch/patch.json", "report/table.json"])
def test_info_on_a_damaged_folder_names_what_is_damaged(finished_build, tmp_path, damaged):
    for name in ("modules.json", MARKER, "patch/patch.json", "report/table.json"):
        copy = tmp_path / name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes((finished_build / name).read_bytes())
    (tmp_path / damaged).write_text("{")
    assert fails("info", tmp_path).startswith(str(tmp_path / damaged))
    (tmp_path / damaged).unlink()
    assert fails("info", tmp_path).startswith(str(tmp_path))


# evaluate and encode


@pytest.mark.parametrize("model", ["./nowhere", "/no/such/model", "no-such-model"])
def test_evaluate_names_an_unknown_model(model):
    assert fails("evaluate", model, "--n", 3).startswith(f"{model}: ")


def test_evaluate_names_an_unknown_second_model_before_it_runs_the_first(finished_build):
    result = invoke("evaluate", finished_build, "./nowhere", "--n", 3)
    assert result.exit_code == 2
    assert "encoding" not in result.stderr
    assert fails("evaluate", finished_build, "--against", "./nowhere@base", "--n", 3) == (
        "./nowhere: no such model folder"
    )
    assert result.stderr.splitlines()[-1] == "Error: ./nowhere: no such model folder"


def test_evaluate_names_a_folder_without_a_model(tmp_path):
    assert fails("evaluate", tmp_path, "--n", 3).startswith(f"{tmp_path}: no model")


def test_evaluate_names_an_unknown_task_and_those_there_are(tmp_path):
    line = fails("evaluate", tmp_path, "--n", 3, "--only", "t->x")
    assert line.startswith("no task 't->x' here; there are ")
    assert "t->i short" in line


def test_evaluate_names_missing_pairs(tmp_path):
    path = tmp_path / "gone.jsonl"
    assert fails("evaluate", tmp_path, "--task", path).startswith(f"{path}: no such")


def test_evaluate_names_a_bad_row_and_offers_only_what_it_has(tmp_path, photo_folder):
    path = rewrite(photo_folder, lambda rows: rows[6].pop("text"))
    line = fails("evaluate", tmp_path, "--task", path)
    assert line.startswith(f"{path}:7: no text")
    offered = {name for option in main.commands["evaluate"].params for name in option.opts}
    assert set(re.findall(r"--[a-z-]+", line)) <= offered


def test_evaluate_names_a_model_that_takes_no_pictures(text_only):
    line = fails("evaluate", text_only["bert"], "--n", 3, "--only", "t->i short")
    assert line.startswith(f"{text_only['bert']}: cannot encode these items")


def test_evaluate_names_an_index_that_faiss_does_not_make(finished_build):
    line = fails("evaluate", finished_build, "--n", 3, "--only", "i->i", "--index", "HSNW")
    assert "'HSNW': FAISS makes no index" in line


def test_evaluate_names_a_full_disk(finished_build, tmp_path, monkeypatch):
    monkeypatch.setattr("patch_retriever.report.comparison_page.comparison_page", no_space)
    args = ["evaluate", finished_build, "--n", 3, "--only", "i->i", "-o", tmp_path / "out"]
    assert fails(*args).startswith("/the/disk: no space left")
    assert (tmp_path / "out/comparison.json").is_file()


@pytest.fixture
def items(tmp_path) -> Path:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    path = tmp_path / "items.jsonl"
    path.write_text('{"text": "a"}\n{"image": "a.png"}')
    return path


def test_encode_names_a_missing_file(finished_build, tmp_path):
    path = tmp_path / "gone.jsonl"
    line = fails("encode", finished_build, path, "-o", tmp_path / "out.npy")
    assert line.startswith(f"{path}: cannot be read")


def test_encode_names_an_unknown_model(items, tmp_path):
    line = fails("encode", "./nowhere", items, "-o", tmp_path / "out.npy")
    assert line == "./nowhere: no such model folder"


def test_encode_names_a_picture_that_is_missing(finished_build, items, tmp_path):
    (tmp_path / "a.png").unlink()
    line = fails("encode", finished_build, items, "-o", tmp_path / "out.npy")
    assert line.startswith(f"{tmp_path / 'a.png'}: no such image file")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["items.jsonl"]


def test_encode_names_a_model_that_takes_no_pictures(text_only, items, tmp_path):
    line = fails("encode", text_only["bert"], items, "-o", tmp_path / "out.npy")
    assert line.startswith(f"{text_only['bert']}: cannot encode")
    assert not (tmp_path / "out.npy").exists()


@pytest.mark.parametrize("out_name", ["a.png/out.npy", "."])
def test_encode_names_a_file_that_cannot_be_written(finished_build, items, tmp_path, out_name):
    line = fails("encode", finished_build, items, "-o", tmp_path / out_name)
    assert str(tmp_path / out_name) in line


# in fresh processes, with all that libraries may say


def fresh(*args: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "patch_retriever", *map(str, args)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    lines = [line for line in done.stderr.splitlines() if not PROGRESS.match(line)]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_a_process_says_one_line_about_pairs(photo_folder, out, random_model):
    cut(photo_folder / "9.png")
    line = fresh("build", random_model, "--pairs", photo_folder, "-o", out, "--dry-run")
    assert line.startswith("Error: ")
    assert "9.png: not a readable image" in line


def test_a_process_says_one_line_about_a_text_only_model(photo_folder, out, text_only):
    line = fresh("build", text_only["qwen2"], "--pairs", photo_folder, "-o", out)
    assert line.startswith(f"Error: {text_only['qwen2']}: a text-only model")


def test_a_process_says_one_line_about_an_unknown_model(items, tmp_path):
    line = fresh("encode", "no-such-model", items, "-o", tmp_path / "out.npy")
    assert line.startswith("Error: no-such-model: ")


@pytest.mark.parametrize(
    "command",
    [
        ("concepts", "--limit", "0"),
        ("explain", "demo", "a", "b", "--heat", "abc"),
        ("info", "demo", "--concepts", "-3"),
        ("analyze", "demo"),
        ("build", "--nonsense"),
    ],
)
def test_a_wrong_option_is_one_line(command):
    assert fails(*command).endswith(f"(see `patch-retriever {command[0]} --help`)")


@pytest.mark.parametrize("text", ["{}", "[]", "{"])
@pytest.mark.parametrize(
    ("command", "file"),
    [("concepts", "report/concepts.json"), ("info", "patch/patch.json")],
)
def test_a_damaged_file_of_a_build_is_named(finished_build, tmp_path, command, file, text):
    folder = tmp_path / "copy"
    shutil.copytree(finished_build, folder)
    (folder / file).unlink()
    (folder / file).write_text(text)
    assert "damaged" in fails(command, folder)


def test_an_sae_of_another_width_is_named_before_anything_is_computed(random_model, tmp_path):
    one_c, zero_c = torch.ones(9), torch.zeros(9)
    sae = SparseAutoencoder(torch.ones(5, 9), zero_c, torch.ones(9, 5), torch.zeros(5), one_c)
    save_sae(sae, tmp_path / "sae")
    line = fails("build", random_model, "--sae", tmp_path / "sae", "-o", tmp_path / "out")
    assert line.startswith(f"{tmp_path / 'sae'}: an SAE for activations of 5 dimensions")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_looks_at_the_sae(tmp_path):
    line = fails("build", "--dry-run", "--sae", tmp_path / "nowhere", "-o", tmp_path / "out")
    assert line.startswith(f"{tmp_path / 'nowhere'}: ")
