"""Escape untrusted text from files, such as names, values and messages, for a terminal or a page."""

from __future__ import annotations

import sys
import unicodedata

__all__ = ["print_line", "printable"]


def printable(text: str, encoding: str = "utf-8") -> str:
    r"""Replace characters that must not or cannot be shown by escapes in Python's notation.

    These are control characters (those of C0 and C1 can move a terminal's cursor, set its title or answer for its
    user), marks that change the direction of text or have no width, line breaks, and characters that `encoding` lacks.

    >>> print(printable("a\x1b[31m b\x9d\u202e\n \udcff ünï 😀"))
    a\x1b[31m b\x9d\u202e\n \udcff ünï 😀
    """
    shown = text if text.isprintable() else "".join(_shown(character) for character in text)
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def _shown(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    return character.encode("unicode_escape").decode("ascii")


def print_line(text: str, *, stderr: bool = False) -> None:
    """Print one line, escaped by `printable`, and flush it."""
    file = sys.stderr if stderr else sys.stdout
    print(printable(text, getattr(file, "encoding", None) or "utf-8"), file=file, flush=True)
