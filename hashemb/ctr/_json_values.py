"""Check values from untrusted JSON files, one by one, before they are used.

Every function returns the value with its checked type, or raises a ValueError that states the value's name, what was
expected and what was found.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

from hashemb._text import shown
from hashemb.errors import FormatError

__all__ = ["as_list", "as_number", "as_object", "as_text", "as_whole", "one_of", "parse_file"]

T = TypeVar("T")

MAX_WHOLE = (1 << 63) - 1


def parse_file(path: Path, what: str, parse: Callable[[Any], T]) -> T:
    """Read a JSON file and return the result of `parse`; `what` describes the file in messages.

    Raises
    ------
    FileNotFoundError
        The file does not exist.
    FormatError
        The file is not a regular file (another kind might never end), is not JSON, or `parse` raised a ValueError.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise FormatError(f"{path}: not {what}: no regular file")
        content = file.read()
    try:
        return parse(json.loads(content.decode("utf-8")))
    except RecursionError as error:
        raise FormatError(f"{path}: not {what}: values nested too deep") from error
    except ValueError as error:
        raise FormatError(f"{path}: not {what}: {error}") from error


def as_object(value: Any, name: str) -> dict[str, Any]:
    """Check for a JSON object."""
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object, found {shown(value)}")
    return value


def as_list(value: Any, name: str) -> list[Any]:
    """Check for a list."""
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list, found {shown(value)}")
    return value


def as_text(value: Any, name: str, *, encodable: bool = False) -> str:
    """Check for a string; with `encodable`, for one that can be hashed, without lone surrogates."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, found {shown(value)}")
    if encodable and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{name} must be whole characters, found {shown(value)}")
    return value


def as_whole(value: Any, name: str, low: int = 0, high: int = MAX_WHOLE) -> int:
    """Check for an integer from `low` to `high`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be an integer, found {shown(value)}")
    if not low <= value <= high:
        found = f"{value:,}" if abs(value) <= 1 << 64 else "one that is far outside"
        raise ValueError(f"{name} must be from {low:,} to {high:,}, found {found}")
    return value


def as_number(value: Any, name: str, low: float = -math.inf, high: float = math.inf) -> float:
    """Check for a finite number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number, found {shown(value)}")
    if isinstance(value, int):
        as_whole(value, name, -MAX_WHOLE)
    if not math.isfinite(value) or not low <= value <= high:
        raise ValueError(f"{name} must be finite, from {low:g} to {high:g}, found {float(value):g}")
    return float(value)


def one_of(value: Any, name: str, choices: Collection[str]) -> str:
    """Check for one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, found {shown(value)}")
    return value
