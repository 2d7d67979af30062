"""Lineage of a table's content: the points in time taken of it, by identity. The module has pure values and no I/O.

Every snapshot and every delta is a *point*: a random id, and the epoch up to which it holds the table's blocks. A table
keeps its past points in `history.json`. A delta names the point it starts from and can only be applied to a table whose
last point is that one; this rejects gaps, repeats, reorderings and deltas of other tables.
"""

from __future__ import annotations

import itertools
import json
import math
import uuid
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from hashemb._files.format import SMALL_FILE_BYTES
from hashemb._files.sealed import dump_checked, load_checked
from hashemb._rules import (
    COUNTER,
    DECAY_TOTAL,
    EPOCH,
    ID,
    OBJECT,
    RATE,
    SEQUENCE,
    SHA256,
    TIME,
    Rule,
    Whole,
    check_fields,
    expect,
    list_of,
    one_of,
    optional,
    shown,
)
from hashemb.errors import CorruptTableError

__all__ = ["History", "Point", "SnapshotInfo"]

LINEAGE_FORMAT = 1
MAX_POINTS = 1000  # kept in a table's history; a delta cannot start from an older one
MAX_EXTRA_CHARACTERS, MAX_EXTRA_NESTING = 1 << 20, 64
MAX_EXTRA_DIGITS = 640  # the lowest limit that sys.set_int_max_str_digits accepts
_INTEGER_LIMIT = 10**MAX_EXTRA_DIGITS


# ---- what the fields of the files may be ----

POINT_RULES: dict[str, Rule | Whole] = {
    "id": ID,
    "kind": one_of("snapshot", "delta"),
    "sequence": SEQUENCE,
    "epoch": EPOCH,
    "step": COUNTER,
}
HISTORY_RULES: dict[str, Rule | Whole] = {
    "format": Whole(1, LINEAGE_FORMAT),
    "table": optional(ID, ""),
    "applying": optional(ID),
    "source": optional(ID),
    "points": list_of(MAX_POINTS, "points"),
}
#: Fields of every point in time, in whichever file it is: the table's counters at that moment.
MOMENT_RULES: dict[str, Rule | Whole] = {
    "id": ID,
    "sequence": SEQUENCE,
    "step": COUNTER,
    "created": TIME,
    "lr": RATE,
    "decay_total": DECAY_TOTAL,
    "rows_touched": COUNTER,
    "num_blocks": COUNTER,
}
SNAPSHOT_RULES: dict[str, Rule | Whole] = {
    "format": Whole(1, LINEAGE_FORMAT),
    **MOMENT_RULES,
    "epoch": EPOCH,
    "content_hash": SHA256,
    "extra": OBJECT,
}


# ---- points in time ----


@dataclass(frozen=True)
class Point:
    """A snapshot or delta that was taken of a table or applied to it.

    Attributes
    ----------
    id : str
        Random id of 32 hexadecimal digits.
    kind : {"snapshot", "delta"}
    sequence : int
        Number of points before this one in the same history.
    epoch : int
        The point contains blocks written in this epoch of the table or earlier.
    step : int
        The table's `step` at that moment.
    """

    id: str
    kind: Literal["snapshot", "delta"]
    sequence: int
    epoch: int
    step: int


def new_id() -> str:
    return uuid.uuid4().hex


@dataclass(frozen=True)
class History:
    """The points in a table's past, oldest first.

    `applying` is the id of a delta that is being applied to the table. `table` is the table's id, or "" in files from
    before ids were recorded. `source` is the id of the table that the points belong to, if it is another one (as in a
    replica made by hand).
    """

    points: tuple[Point, ...] = ()
    applying: str | None = None
    table: str = ""
    source: str | None = None

    @property
    def last(self) -> Point | None:
        return self.points[-1] if self.points else None

    def find(self, id: str) -> Point | None:
        return next((point for point in self.points if point.id == id), None)

    def next_sequence(self) -> int:
        """Return the next point's number; raise `OverflowError` after the last, as each point uses up an epoch."""
        if self.points and self.points[-1].sequence >= SEQUENCE.high:
            raise OverflowError(f"points in time are numbered up to {SEQUENCE.high}, and that number was taken")
        return self.points[-1].sequence + 1 if self.points else 0

    def append(self, point: Point) -> History:
        return replace(self, points=(*self.points, point)[-MAX_POINTS:], applying=None)

    def of(self, table: str) -> History:
        return replace(self, table=table)

    def encode(self) -> bytes:
        points = [asdict(point) for point in self.points]
        return dump_checked(
            {
                "format": LINEAGE_FORMAT,
                "table": self.table,
                "applying": self.applying,
                "source": self.source,
                "points": points,
            }
        )

    @classmethod
    def decode(cls, data: bytes, filename: str) -> History:
        content = load_checked(data, filename, LINEAGE_FORMAT)
        check_fields(content, HISTORY_RULES, filename)
        points = tuple(_point(value, filename, i) for i, value in enumerate(content["points"]))
        for before, after in itertools.pairwise(points):
            grows = before.sequence < after.sequence and before.epoch < after.epoch and before.step <= after.step
            if not grows:
                raise CorruptTableError(f"{filename}: expected points after {before}, found {after}")
        if len({point.id for point in points}) != len(points):
            raise CorruptTableError(f"{filename}: expected {len(points)} different points, found one twice")
        return cls(points, content["applying"], content["table"], content["source"])


def _point(value: Any, filename: str, number: int) -> Point:
    expect(OBJECT.holds(value), filename, f"points[{number}] to be {OBJECT.words}", value)
    check_fields(value, POINT_RULES, filename, f"points[{number}].")
    return Point(**value)


# ---- snapshots ----


@dataclass(frozen=True)
class SnapshotInfo:
    """Description of a snapshot, stored in its `snapshot.json`.

    Attributes
    ----------
    id, sequence, epoch, step
        The attributes of its `Point`.
    created : float
        Time at which the point was taken, in seconds since 1970.
    lr, decay_total : float
    rows_touched : int
        The table's counters at that moment.
    num_blocks : int
        Number of blocks that had ever been written.
    content_hash : str
        SHA-256 of the data with which `hashemb.verify` checks blocks: for the written blocks in ascending order, in
        chunks of 65,536 blocks of the table, their numbers (uint64), their epochs (uint32) and their rows of
        `checksums.npy`.
    extra : dict
        The caller's data, as passed to `EmbeddingTable.snapshot`.
    """

    id: str
    sequence: int
    epoch: int
    step: int
    created: float
    lr: float
    decay_total: float
    rows_touched: int
    num_blocks: int
    content_hash: str
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def point(self) -> Point:
        return Point(self.id, "snapshot", self.sequence, self.epoch, self.step)

    def encode(self) -> bytes:
        return dump_checked({"format": LINEAGE_FORMAT, **asdict(self)})

    @classmethod
    def decode(cls, data: bytes, filename: str) -> SnapshotInfo:
        content = load_checked(data, filename, LINEAGE_FORMAT)
        check_fields(content, SNAPSHOT_RULES, filename)
        return cls(**{f.name: content[f.name] for f in fields(cls)})


# ---- the caller's data ----


def check_extra(extra: Any) -> dict[str, Any]:
    """Return `extra` as it will be read back; raise `TypeError` or `ValueError`, with the limit, if it cannot be."""
    if extra is None:
        return {}
    if not isinstance(extra, dict):
        raise TypeError(f"extra must be a dict, got {type(extra).__name__}")
    _check_parts(extra)
    try:
        text = json.dumps(extra)
    except TypeError as error:
        raise TypeError(f"extra must hold what JSON can: {error}") from None
    if len(text) > MAX_EXTRA_CHARACTERS:
        raise ValueError(f"extra may take at most {MAX_EXTRA_CHARACTERS} characters as JSON, got {len(text)}")
    if (size := len(json.dumps({"extra": extra}, indent=2))) > SMALL_FILE_BYTES - 4096:
        raise ValueError(f"extra may take less than {SMALL_FILE_BYTES} bytes in its file, with indents, got {size}")
    back: dict[str, Any] = json.loads(text)
    if back != extra:
        raise ValueError("extra must read back from JSON as it is: keys that are not strings, or tuples, do not")
    return back


def _check_parts(extra: dict[str, Any]) -> None:
    """Check level by level, so that depth, cycles and repeated parts cannot exhaust the stack or memory."""
    level: list[Any] = [extra]
    for _ in range(MAX_EXTRA_NESTING + 1):
        below: list[Any] = []
        for part in level:
            _check_scalar(part)
            if isinstance(part, (dict, list, tuple)):
                below += [*part, *part.values()] if isinstance(part, dict) else part
                if len(below) > MAX_EXTRA_CHARACTERS:
                    limit = f"at most {MAX_EXTRA_CHARACTERS} characters as JSON"
                    raise ValueError(f"extra may take {limit}, got more parts than that")
        if not below:
            return
        level = below
    raise ValueError(f"extra may be nested at most {MAX_EXTRA_NESTING} deep, got deeper, or a part that holds itself")


def _check_scalar(part: Any) -> None:
    if isinstance(part, int) and abs(part) >= _INTEGER_LIMIT:
        limit = f"{MAX_EXTRA_DIGITS} digits, which every Python reads back"
        raise ValueError(f"extra may hold integers of up to {limit}, got {shown(part)}")
    if isinstance(part, float) and not math.isfinite(part):
        raise ValueError(f"extra must hold what JSON can, and it has no {part!r}")
    if isinstance(part, str) and not part.isascii():
        try:
            part.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"extra must hold text that UTF-8 can: {error.reason} in {shown(part)}") from None
