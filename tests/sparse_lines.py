"""The slow twin of the libsvm, libffm and Vowpal Wabbit tokeniser: one line at a time, in plain Python, by the rules of
docs/reference/data-files.md. A line is an example, an error or a comment.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import numpy as np

_NUMBER = re.compile(rb"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_BLANKS = re.compile(rb"[ \t]+")
_LABELS = {-1.0: 0.0, 0.0: 0.0, 1.0: 1.0}


class Example(NamedTuple):
    label: float | None
    weight: float
    features: list[tuple[bytes, bytes | int, float]]  # field, name or index, value


class FaultError(Exception):
    """Raised for an invalid line."""


def parse_line(format: str, line: bytes, *, labelled: bool = True) -> Example | None:
    """Parse a line; return None for a comment, and raise `FaultError` for an invalid line."""
    if format != "vw" and b"#" in line:
        line = line.partition(b"#")[0]
        if not line.strip(b" \t"):
            return None
    if not line.strip(b" \t"):
        raise FaultError
    return _vw(line, labelled) if format == "vw" else _indexed(line, format, labelled)


def _utf8(name: bytes) -> bytes:
    try:
        name.decode()
    except UnicodeDecodeError:
        raise FaultError from None
    return name


def number(text: bytes) -> float:
    if len(text) >= 128 or not _NUMBER.fullmatch(text):
        raise FaultError
    return float(text)


def value_of(text: bytes) -> float:
    with np.errstate(over="ignore"):
        value = float(np.float32(number(text)))
    if not math.isfinite(value):
        raise FaultError
    return number(text)


def _words(text: bytes) -> list[bytes]:
    return [word for word in _BLANKS.split(text) if word]


def _label(text: bytes | None, labelled: bool) -> float | None:
    if not labelled:
        return None
    if text is None or (value := number(text)) not in _LABELS:
        raise FaultError
    return _LABELS[value]


def _indexed(line: bytes, format: str, labelled: bool) -> Example:
    words = _words(line)
    label = _label(words.pop(0) if b":" not in words[0] else None, labelled)
    return Example(label, 1.0, [_indexed_feature(word, format) for word in words])


def _indexed_feature(word: bytes, format: str) -> tuple[bytes, int, float]:
    if format == "libsvm":
        parts = [b"", *word.split(b":", 1)]
    else:
        parts = word.split(b":", 2)
        if not parts[0]:
            raise FaultError
    if len(parts) != 3 or not re.fullmatch(rb"-?[0-9]{1,18}", parts[1]):
        raise FaultError
    return _utf8(parts[0]), int(parts[1]), value_of(parts[2])


def _vw(line: bytes, labelled: bool) -> Example:
    if b"|" not in line:
        raise FaultError
    head, _, rest = line.partition(b"|")
    words = _words(head)
    if words and (head[-1:] not in (b" ", b"\t") or words[-1].startswith(b"'")):
        words.pop()
    if len(words) > 2:
        raise FaultError
    label = _label(words[0] if words else None, labelled)
    weight = value_of(words[1]) if len(words) == 2 else 1.0
    if weight < 0:
        raise FaultError
    return Example(label, weight, [feature for part in rest.split(b"|") for feature in _namespace(part)])


def _namespace(part: bytes) -> list[tuple[bytes, bytes, float]]:
    begin = re.match(rb"[^ \t:]*", part)
    assert begin is not None
    name, rest = _utf8(begin.group(0)), part[begin.end() :]
    scale_text, _, rest = _split_blank(rest)
    scale = value_of(scale_text[1:]) if scale_text else 1.0
    features = []
    for word in _words(rest):
        feature, colon, text = word.partition(b":")
        value = (value_of(text) if colon else 1.0) * scale
        with np.errstate(over="ignore"):
            if not feature or not math.isfinite(float(np.float32(value))):
                raise FaultError
        features.append((name, feature, value))
    return features


def _split_blank(text: bytes) -> tuple[bytes, bytes, bytes]:
    parts = _BLANKS.split(text, maxsplit=1)
    return parts[0], b" ", parts[1] if len(parts) > 1 else b""
