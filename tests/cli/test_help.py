"""Help: every command has it, with an example that works, and it does not wait for torch."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from patch_retriever import __version__
from patch_retriever.cli import main

COMMANDS = sorted(main.commands)
HEAVY = ("torch", "transformers", "sentence_transformers", "faiss", "nnsight", "peft", "sklearn")
HEAVY += ("datasets", "mteb")


def shown(*args: str) -> str:
    result = CliRunner().invoke(main, args, prog_name="patch-retriever")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


def examples(help_text: str) -> list[list[str]]:
    """The words of every example, without the remark after it."""
    lines = re.findall(r"^ +patch-retriever (.*)$", help_text, re.MULTILINE)
    return [shlex.split(re.split(r" {2,}| side by side", line)[0]) for line in lines]


def test_the_commands_are_those_of_the_docs():
    assert COMMANDS == [
        "adapt",
        "analyze",
        "build",
        "concepts",
        "convert-sae",
        "doctor",
        "encode",
        "evaluate",
        "explain",
        "export",
        "index",
        "index-migrate",
        "index-remove",
        "info",
        "mteb",
        "search",
        "train-sae",
    ]


def test_the_help_lists_every_command_with_what_it_does():
    text = shown("--help")
    for name in COMMANDS:
        assert re.search(rf"^  {name} +\w{{3}}", text, re.MULTILINE)


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, flag):
    text = shown(name, flag)
    assert text.startswith(f"Usage: patch-retriever {name}")
    assert "--help" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_an_example_of_its_command(name):
    assert [words[0] for words in examples(shown(name, "--help"))].count(name) >= 1


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_every_example_is_understood(name):
    for command, *args in examples(shown(*name.split(), "--help")):
        context = main.commands[command].make_context(command, list(args))
        assert context.args == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_does(name):
    options = [p for p in main.commands[name].params if isinstance(p, click.Option)]
    assert [option.name for option in options if not option.help] == []


def test_the_version_is_told():
    assert shown("--version") == f"patch-retriever, version {__version__}\n"


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("module", ["patch_retriever", "patch_retriever.cli"])
def test_nothing_heavy_is_imported_with(module):
    code = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    assert set(json.loads(run("-c", code))).isdisjoint(HEAVY)


def test_nothing_heavy_is_imported_to_show_the_help_of_all_commands():
    code = """
import sys
from patch_retriever.cli import main
for command in ([], *([name] for name in main.commands)):
    main([*command, "--help"], standalone_mode=False)
print("imported:", *sorted(sys.modules))
"""
    *text, imported = run("-c", code).splitlines()
    assert sum(line.startswith("Usage: ") for line in text) == 1 + len(COMMANDS)
    assert set(imported.split()).isdisjoint(HEAVY)


def test_the_module_runs_like_the_command():
    assert "Commands:" in run("-m", "patch_retriever", "--help")
