"""Where a table's content comes from: the points in time that were taken of it, by identity. Pure values, no I/O.

Every snapshot and every delta is a *point*: a random id, and the epoch up to which it holds the table's blocks. A table
keeps the points that lie in its past in `history.json`. A delta names the point it starts from; only a table
whose last point that is may take it, which is what refuses gaps, repeats, reorderings and deltas of other tables.
"""

from __future__ import annotations

import json
import math
import uuid
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from hashemb._format import checksum_of, dump_checked
from hashemb.errors import CorruptTableError, FormatError

__all__ = ["History", "Point", "SnapshotInfo"]

LINEAGE_FORMAT = 1
MAX_POINTS = 1000  # kept in a table's history; a delta cannot start from an older one


# ---- JSON that carries its own checksum ----


def load_checked(data: bytes, filename: str) -> dict[str, Any]:
    """The inverse of `dump_checked`; any other bytes are a `CorruptTableError`, a larger format a `FormatError`."""
    try:
        content = json.loads(data)
        stored = content.pop("checksum")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CorruptTableError(
            f"{filename}: expected JSON with a checksum, found {len(data)} bytes that are not"
        ) from None
    if data != dump_checked(content):
        raise CorruptTableError(f"{filename}: damaged: expected checksum {checksum_of(content)}, found {stored}")
    if not isinstance(content.get("format"), int) or content["format"] > LINEAGE_FORMAT:
        raise FormatError(f"{filename}: format {content.get('format')!r}, this version reads up to {LINEAGE_FORMAT}")
    return content  # type: ignore[no-any-return]


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
        content = load_checked(data, filename)
        try:
            points = tuple(Point(**point) for point in content["points"])
            return cls(points, content["applying"], content["table"], content["source"])
        except (KeyError, TypeError) as error:
            raise FormatError(f"{filename}: this version cannot read the history: {error!r}") from None


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
        content = load_checked(data, filename)
        try:
            info = cls(**{f.name: content[f.name] for f in fields(cls)})
        except KeyError as error:
            raise FormatError(f"{filename}: this version cannot read the snapshot: {error!r}") from None
        if not math.isfinite(info.lr) or not isinstance(info.extra, dict):
            raise CorruptTableError(f"{filename}: expected a finite lr and an object extra, found {info.lr!r}")
        return info


def check_extra(extra: Any) -> dict[str, Any]:
    """`extra` as it will be read back: JSON, at most 1 MiB of it; anything else is a `TypeError` or `ValueError`."""
    if extra is None:
        return {}
    if not isinstance(extra, dict):
        raise TypeError(f"extra must be a dict, got {type(extra).__name__}")
    try:
        text = json.dumps(extra, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise type(error)(f"extra must hold what JSON can: {error}") from None
    if len(text) > 1 << 20:
        raise ValueError(f"extra may take at most {1 << 20} characters as JSON, got {len(text)}")
    if json.loads(text) != extra:
        raise ValueError("extra must read back from JSON as it is: keys that are not strings, or tuples, do not")
    return extra
