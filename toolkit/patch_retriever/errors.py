"""The one exception for what a user can mend."""

from __future__ import annotations


class UserError(Exception):
    """A wrong input, in one line: what is wrong, where, and how to mend it.

    The command line prints the line and exits with code 2.
    """
