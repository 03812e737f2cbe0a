"""The exceptions that a user is meant to see, and those of libraries in as many words as fit beside them."""

import textwrap


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, where, and what to do.

    Command lines print it without a stack trace (unless ``--debug``) and exit with status 2.
    """


class Unreachable(UserError):
    """A file that an object store does not give, however often it is asked: no permission, no connection. Others may be in reach."""


class Unwritable(UserError):
    """A place that cannot be written to: a full disk, no permission, a store out of reach. Trying another shard would not help."""


def one_line(error: BaseException, limit: int = 160) -> str:
    """What an exception of a library says, in one line of at most ``limit`` characters, if it can be in whole words."""
    text = " ".join(str(error).split())
    short = textwrap.shorten(text, limit, placeholder=" …")
    return short if 2 * len(short) > limit or short == text else text[: limit - 1] + "…"
