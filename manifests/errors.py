"""Exceptions whose message a user reads, and a short form for those of libraries."""

import textwrap


class UserError(Exception):
    """A fault that the user can mend. The message is one line: what is wrong, where, and what to do.

    Command lines print it without a stack trace (unless ``--debug``) and exit with status 2.
    """


class Unreachable(UserError):
    """A file that an object store still refuses after retries: no permission, no connection. Others may be in reach."""


class Unwritable(UserError):
    """A place that cannot be written: a full disk, no permission, a store out of reach. Other shards would fail too."""


def one_line(error: BaseException, limit: int = 160) -> str:
    """A library exception's message on one line, at most `limit` characters, cut between words where possible."""
    text = " ".join(str(error).split())
    short = textwrap.shorten(text, limit, placeholder=" …")
    return short if 2 * len(short) > limit or short == text else text[: limit - 1] + "…"
