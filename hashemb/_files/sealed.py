"""JSON that carries its own checksum: conversion between bytes and objects, by pure functions without I/O.

A checksum detects damage, not forgery: the result of `load_checked` is JSON of bounded depth in exactly the bytes that
`dump_checked` writes, and nothing more is known about it. `_rules.check_fields` checks its fields.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

from hashemb._rules import shown
from hashemb.errors import CorruptTableError, FormatError

MAX_NESTING = 256  # of lists and objects in a file: deeper nesting could exhaust the stack of a reader
_MAX_DIGITS = 4300  # of an integer, Python's default: parsing longer ones takes time quadratic in their length


def checksum_of(content: dict[str, Any]) -> str:
    """Return the SHA-256 of an object as `json.dumps(..., sort_keys=True)` writes it."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def dump_checked(content: dict[str, Any]) -> bytes:
    """Return JSON as bytes, with the SHA-256 of the rest as its last entry."""
    return (json.dumps({**content, "checksum": checksum_of(content)}, indent=2) + "\n").encode()


def dump_line(content: dict[str, Any]) -> bytes:
    """Return the same as `dump_checked` on one line."""
    return json.dumps({**content, "checksum": checksum_of(content)}).encode()


def load_checked(
    data: bytes, filename: str, newest: int, dump: Callable[[dict[str, Any]], bytes] = dump_checked
) -> dict[str, Any]:
    """Invert `dump`, and return the content without the checksum.

    Any other bytes raise `CorruptTableError`; JSON that is not an object with a format, or whose format is above
    `newest`, raises `FormatError`.
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
    """Load JSON of bounded depth, without Python's extensions of it; raise `CorruptTableError` for anything else."""
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
    """Return whether lists and objects are nested more than `limit` deep, without recursion."""
    level = [content] if isinstance(content, (list, dict)) else []
    for _ in range(limit):
        parts = (item.values() if isinstance(item, dict) else item for item in level)
        level = [child for part in parts for child in part if isinstance(child, (list, dict))]
        if not level:
            return False
    return bool(level)
