"""Text for people: names and values from untrusted files made safe for a terminal or a page, and numbers with units."""

from __future__ import annotations

import math
import unicodedata

__all__ = ["format_bytes", "printable", "shown"]

_SHOWN_CHARACTERS = 40


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


def shown(value: object) -> str:
    """Format `value` for a message: quoted, at most 40 characters; nothing for a missing value."""
    if value is None:
        return "nothing"
    text = value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
    return repr(text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…")


def format_bytes(count: float) -> str:
    """Format a number of bytes with a binary unit.

    >>> format_bytes(0), format_bytes(1536), format_bytes(2**39)
    ('0 B', '1.5 KiB', '512.0 GiB')
    """
    if count < 1024:
        return f"{count:.0f} B"
    units = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    power = min(int(math.log2(count)) // 10, len(units))
    return f"{count / 1024**power:.1f} {units[power - 1]}"
