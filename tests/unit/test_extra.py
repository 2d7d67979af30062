"""The `extra` data of a snapshot: JSON that reads back unchanged, in any process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import hashemb


def nested(depth: int, kind: type = dict) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = {"x": value} if kind is dict else kind([value])
    return value


def holding_itself() -> dict[str, Any]:
    extra: dict[str, Any] = {}
    extra["x"] = [extra]
    return extra


def doubled(times: int) -> list[Any]:
    """Return a nested list of 2**times numbers that takes only a few bytes of memory."""
    value: list[Any] = [0]
    for _ in range(times):
        value = [value, value]
    return value


REFUSED: list[tuple[str, Any, type[Exception], str]] = [
    ("deep", nested(65), ValueError, "nested at most 64 deep"),
    ("very deep", nested(900), ValueError, "nested at most 64 deep"),
    ("deeper than the stack", nested(100_000), ValueError, "nested at most 64 deep"),
    ("deep lists", {"x": nested(100_000, list)}, ValueError, "nested at most 64 deep"),
    ("deep tuples", {"x": nested(900, tuple)}, ValueError, "nested at most 64 deep"),
    ("a cycle", holding_itself(), ValueError, "nested at most 64 deep, got deeper, or a part that holds itself"),
    ("many parts in few bytes", {"x": doubled(60)}, ValueError, "at most 1048576 characters"),
    ("many shared parts", {"x": [[0] * 2000] * 2000}, ValueError, "at most 1048576 characters"),
    ("digits", {"x": 10**640}, ValueError, "integers of up to 640 digits, .*, got an integer of 2127 bits"),
    ("more digits than Python writes", {"x": -(10**5000)}, ValueError, "integers of up to 640 digits"),
    ("NaN", {"x": float("nan")}, ValueError, "what JSON can, and it has no nan"),
    ("infinite", {"x": [float("inf")]}, ValueError, "what JSON can, and it has no inf"),
    ("surrogate", {"x": "\ud800"}, ValueError, "text that UTF-8 can: surrogates not allowed"),
    ("surrogate as key", {"\udfff": 1}, ValueError, "text that UTF-8 can"),
    ("long", {"x": "a" * (1 << 20)}, ValueError, r"at most 1048576 characters as JSON, got 1048585"),
    ("long with indents", {"x": [1] * 300_000}, ValueError, "less than 2097152 bytes in its file, with indents"),
    ("a set", {"x": {1}}, TypeError, "what JSON can: Object of type set"),
    ("a tuple", {"x": (1,)}, ValueError, "must read back"),
    ("numbers as keys", {1: 2}, ValueError, "must read back"),
    ("a list", [1], TypeError, "extra must be a dict, got list"),
]


@pytest.fixture
def table(tmp_path: Path) -> Any:
    with hashemb.create(tmp_path / "t", num_embeddings=8, embedding_dim=2) as table:
        yield table


@pytest.mark.parametrize(("extra", "error", "message"), [c[1:] for c in REFUSED], ids=[c[0] for c in REFUSED])
def test_refused(table: Any, tmp_path: Path, extra: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        table.snapshot(tmp_path / "s", extra=extra)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t"]


@pytest.mark.parametrize(
    "extra",
    [
        {"x": nested(63)},
        {"x": nested(63, list)},
        {"x": 10**640 - 1, "y": -(10**639), "z": [True, None, 0.1, -0.0, "ä", "\x00", "😀"]},
        {"x": "a" * ((1 << 20) - 9)},
        {"x": [1] * 200_000},
        {},
    ],
    ids=["deep", "deep lists", "values", "long", "many", "empty"],
)
def test_read_back(table: Any, tmp_path: Path, extra: Any) -> None:
    """It can be read back even with the lowest limit on digits that Python can be set to."""
    table.snapshot(tmp_path / "s", extra=extra)
    limit = sys.get_int_max_str_digits() if hasattr(sys, "get_int_max_str_digits") else 0
    try:
        if limit:
            sys.set_int_max_str_digits(640)
        assert hashemb.info(tmp_path / "s").snapshot.extra == extra  # type: ignore[union-attr]
    finally:
        if limit:
            sys.set_int_max_str_digits(limit)
    assert hashemb.verify(tmp_path / "s") == []


def test_it_is_what_was_given_when_it_was_given(table: Any, tmp_path: Path) -> None:
    """A caller may modify the object while the snapshot is written."""
    extra: dict[str, Any] = {"position": [1]}
    info = table.snapshot(tmp_path / "s", extra=extra)
    extra["position"].append(2)
    assert info.extra == {"position": [1]}
