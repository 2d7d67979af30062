"""Text from files on its way to a terminal or a page: names, values and messages that nobody has looked at."""

from __future__ import annotations

import sys
import unicodedata

__all__ = ["print_line", "printable"]


def printable(text: str, encoding: str = "utf-8") -> str:
    r"""The text with escapes, as Python writes them, in the place of what must not or can't be shown.

    That is control characters (a terminal obeys those of C0 and C1: they move its cursor, set its title, answer for
    its user), marks that turn the direction of text around or have no width, line breaks, and what `encoding` lacks.

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
    """Print one line, `printable`, and at once."""
    file = sys.stderr if stderr else sys.stdout
    print(printable(text, getattr(file, "encoding", None) or "utf-8"), file=file, flush=True)
