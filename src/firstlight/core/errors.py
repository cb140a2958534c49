"""Errors that a person sees. Anything else that escapes is our bug and keeps its traceback."""

from __future__ import annotations


class UserError(ValueError):
    """A wrong input or setting. The text is one line: the cause, then the cure. Exit code 2, HTTP 4xx."""
