"""The books that ship with Firstlight, for measuring quality: real text, in which nothing was planted.

The three here are for evaluation alone; what a method is calibrated on must be another text (see `texts/README.md`).
"""

from __future__ import annotations

import functools
import hashlib

from firstlight.core.files import shipped

BOOKS = ("pride-and-prejudice", "the-adventures-of-sherlock-holmes", "the-federalist-papers")


@functools.cache
def text_of(book: str) -> str:
    """The text of one of BOOKS. Raises UserError where it is missing."""
    return shipped(f"evaluate/texts/{book}.txt")


def digest_of(book: str) -> str:
    """sha256 (hex) of its UTF-8 bytes: calibration and evaluation texts are told apart by it."""
    return hashlib.sha256(text_of(book).encode()).hexdigest()
