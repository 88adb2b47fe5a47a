"""What a command said, when it was called in this process."""

from __future__ import annotations

from click.testing import CliRunner, Result

from patch_retriever.cli import main


def invoke(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args], prog_name="patch-retriever")


def error_line(result: Result) -> str:
    """The one line that is said about what a user can mend."""
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("Error: "))
    return line.removeprefix("Error: ")
