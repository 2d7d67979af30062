"""Where a table's content comes from: the points in time that were taken of it, by identity. Pure values, no I/O.

Every snapshot and every delta is a *point*: a random id, and the epoch up to which it holds the table's blocks. A table
keeps the points that lie in its past in `history.json`. A delta names the point it starts from; only a table
whose last point that is may take it, which is what refuses gaps, repeats, reorderings and deltas of other tables.
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
MAX_EXTRA_DIGITS = 640  # the least that sys.set_int_max_str_digits can be told
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
#: Of every point in time, whatever holds it: the table's counters at that moment.
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
    """A snapshot or delta that was taken of a table, or applied to it.

    Attributes
    ----------
    id : str
        32 hexadecimal digits, random.
    kind : {"snapshot", "delta"}
    sequence : int
        Number of points before this one in the same history.
    epoch : int
        Blocks written in this epoch of the table or before are in it.
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

    `applying` is the id of a delta that is being applied to the table; `table` the id of the table ("": written
    before it was noted); `source` that of the table whose points these are, where it is another (a replica made by
    hand).
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
        """`OverflowError` after the last that can be written: an epoch is used up by each, and there are no more."""
        if self.points and self.points[-1].sequence >= SEQUENCE.high:
            raise OverflowError(f"points in time are numbered up to {SEQUENCE.high}, and that number was taken")
        return self.points[-1].sequence + 1 if self.points else 0

    def append(self, point: Point) -> History:
        return replace(self, points=(*self.points, point)[-MAX_POINTS:], applying=None)

    def of(self, table: str) -> History:
        return replace(self, table=table)

    def while_applying(self, id: str) -> History:
        return replace(self, applying=id)

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
    """What `snapshot.json` says of the snapshot it lies in.

    Attributes
    ----------
    id, sequence, epoch, step
        As of the `Point`.
    created : float
        Seconds since 1970, when the point in time was taken.
    lr, decay_total : float
    rows_touched : int
        The table's counters at that moment.
    num_blocks : int
        Blocks that had ever been written.
    content_hash : str
        SHA-256 of what `hashemb.verify` checks blocks with: for the written blocks in ascending order, in chunks
        of 65,536 blocks of the table, their numbers (uint64), their epochs (uint32) and their rows of `checksums.npy`.
    extra : dict
        The caller's own, as given to `EmbeddingTable.snapshot`.
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


# ---- the caller's own ----


def check_extra(extra: Any) -> dict[str, Any]:
    """`extra` as it will be read back; a `TypeError` or `ValueError` if it cannot be, with the limit in it."""
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
    """Level by level, so that neither depth nor cycles nor parts that are held many times exhaust anything."""
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
