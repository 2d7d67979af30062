"""JSON that carries its own check sum: bytes <-> objects. Pure functions, no I/O.

A check sum finds damage, not forgery: what comes out of `load_checked` is JSON of a bounded depth in exactly the bytes
that `dump_checked` writes, and nothing more is known of it. Its fields are for `_rules.check_fields`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

from hashemb._rules import shown
from hashemb.errors import CorruptTableError, FormatError

MAX_NESTING = 256  # of lists and objects in a file: deeper ones could exhaust the stack of whoever reads them
_MAX_DIGITS = 4300  # of an integer, as Python has it: longer ones take time in the square of their length


def checksum_of(content: dict[str, Any]) -> str:
    """SHA-256 of an object as `json.dumps(..., sort_keys=True)` writes it."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def dump_checked(content: dict[str, Any]) -> bytes:
    """JSON as bytes, with the SHA-256 of the rest as its last entry."""
    return (json.dumps({**content, "checksum": checksum_of(content)}, indent=2) + "\n").encode()


def dump_line(content: dict[str, Any]) -> bytes:
    """The same on one line."""
    return json.dumps({**content, "checksum": checksum_of(content)}).encode()


def load_checked(
    data: bytes, filename: str, newest: int, dump: Callable[[dict[str, Any]], bytes] = dump_checked
) -> dict[str, Any]:
    """The inverse of `dump`, without the check sum.

    Any other bytes are a `CorruptTableError`; what is no object with a format, or has one above `newest`, is a
    `FormatError`.
    """
    content = load_json(data, filename)
    if type(content) is not dict or type(content.get("format")) is not int:
        raise FormatError(f'{filename}: not the description of a hashemb table (no integer "format")')
    if content["format"] < 1:
        raise FormatError(f"{filename}: has format {shown(content['format'])}, formats begin at 1")
    if content["format"] > newest:
        advice = f"this version reads up to {newest}: upgrade hashemb"
        raise FormatError(f"{filename}: has format {shown(content['format'])}, {advice}")
    stored = content.pop("checksum", None)
    if data != dump(content):
        expected = checksum_of(content)
        found = shown(stored) if stored != expected else "that, in other bytes than hashemb writes"
        raise CorruptTableError(f"{filename}: damaged: expected checksum {expected}, found {found}")
    return content


def load_json(data: bytes, filename: str) -> Any:
    """JSON of a bounded depth, and without what only Python calls JSON; else a `CorruptTableError`."""
    try:
        content = json.loads(data, parse_int=_integer, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        reason = ascii(str(error))[1:-1]
        raise CorruptTableError(f"{filename}: expected JSON, found {len(data)} bytes that are not: {reason}") from None
    if is_nested_deeper(content, MAX_NESTING):
        raise CorruptTableError(f"{filename}: expected JSON nested up to {MAX_NESTING} deep, found deeper")
    return content


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits, more than {_MAX_DIGITS}")
    return int(text)


def _refuse(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


def is_nested_deeper(content: Any, limit: int) -> bool:
    """Whether lists and objects lie in each other more than `limit` deep. Takes no stack."""
    level = [content] if isinstance(content, (list, dict)) else []
    for _ in range(limit):
        parts = (item.values() if isinstance(item, dict) else item for item in level)
        level = [child for part in parts for child in part if isinstance(child, (list, dict))]
        if not level:
            return False
    return bool(level)
