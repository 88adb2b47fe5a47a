"""The one exception for what a user can mend."""

from __future__ import annotations


class UserError(Exception):
    """A wrong input, in one line: what is wrong, where, and how to mend it.

    The command line prints the line and exits with code 2.
    """


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its name where it says nothing."""
    return (str(error).strip().splitlines() or [repr(error)])[0]
