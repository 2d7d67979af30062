"""Format 1: bytes <-> metadata. Pure functions and values, no I/O; `_storage.py` reads and writes.

A table is a directory of plain `.npy` files, a `meta.json` that never changes and a `control` page that does.
See docs/format.md. Invariants: array data starts at byte 4096; everything is little-endian; a file's size follows
from `meta.json` alone.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import struct
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from hashemb import init as initializers
from hashemb import optim
from hashemb.errors import CorruptTableError, FormatError

FORMAT = 1
DATA_OFFSET_BYTES = 4096
CONTROL_BYTES = 4096
CONTROL_MAGIC = b"hashemb\x01"
MAX_HASHES = 16
HASH_SCHEME = "murmur3-x64-128, fmix64, mulhi64"

STORAGE_DTYPES = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}
OPTIMIZERS: dict[str, type] = {
    c.kind: c for c in (optim.Adagrad, optim.RowWiseAdagrad, optim.SGD, optim.FTRL)
}
INITIALIZERS: dict[str, type] = {
    c.kind: c for c in (initializers.Uniform, initializers.Normal, initializers.Zeros)
}

CONTROL_DTYPE = np.dtype(
    {
        "names": [
            "magic", "format", "step", "epoch", "lr", "decay_total", "clean", "rows_touched",
            "saving", "save_failed", "save_errno", "gate_closing", "table", "snapshot", "boot_id", "opened",
            "checksum",
        ],
        "formats": [
            "S8", "<u4", "<u8", "<u8", "<f8", "<f8", "<u8", "<u8",
            "<u8", "<u8", "<u8", "<u8", "V16", "V16", "S36", "<u8", "<u8",
        ],
        "offsets": [0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 112, 128, 168, 4088],
        "itemsize": CONTROL_BYTES,
    }
)  # fmt: skip


@dataclass(frozen=True)
class FileSpec:
    """Shape and dtype of one `.npy` file of a table."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def file_bytes(self) -> int:
        return DATA_OFFSET_BYTES + math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class TableMeta:
    """What `meta.json` says: everything about a table that never changes."""

    num_embeddings: int
    embedding_dim: int
    dtype: str
    optimizer: optim.Optimizer
    init: initializers.Initializer
    num_hashes: int
    seed: int
    block_rows: int
    id: str
    created_by: str

    @property
    def row_bytes(self) -> int:
        return self.embedding_dim * np.dtype(STORAGE_DTYPES[self.dtype]).itemsize

    @property
    def num_blocks(self) -> int:
        return -(-self.num_embeddings // self.block_rows)

    @property
    def row_files(self) -> dict[str, FileSpec]:
        """The files with one entry per row, by name without `.npy`."""
        rows, dim = self.num_embeddings, self.embedding_dim
        specs = {"weight": FileSpec((rows, dim), STORAGE_DTYPES[self.dtype])}
        for name, kind in self.optimizer.state_files.items():
            specs[name] = FileSpec((rows,) if kind == "row" else (rows, dim), "<f4")
        if self.optimizer.weight_decay > 0.0:
            specs["paid"] = FileSpec((rows,), "<f8")
        return specs

    @property
    def files(self) -> dict[str, FileSpec]:
        """All arrays of the table, by name without `.npy`."""
        return {**self.row_files, "blocks": FileSpec((self.num_blocks,), "<u4")}

    @property
    def logical_bytes(self) -> int:
        """Size of the table's array files and control page, holes included."""
        return sum(spec.file_bytes for spec in self.files.values()) + CONTROL_BYTES


def rows_per_block(row_bytes: int) -> int:
    """Rows in a block: the largest power of two of them that fits a 4096-byte page, at least 1.

    docs/decisions/0001-block-size.md has the measurement behind the size.
    """
    return 1 << max(0, (4096 // row_bytes).bit_length() - 1) if row_bytes <= 4096 else 1


# ---- numbers derived from the seed ----

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def splitmix64(seed: int, i: int) -> int:
    """Output number `i`, from 0, of SplitMix64 started at `seed` (Steele, Lea, Flood, OOPSLA 2014)."""
    z = (seed + (i + 1) * _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def salts(seed: int, num_hashes: int) -> list[int]:
    """One salt per hash function."""
    return [splitmix64(seed, h) for h in range(num_hashes)]


def init_key(seed: int) -> int:
    """Key of the generator of initial values, far from the salts in the same stream."""
    return splitmix64(seed, 1 << 32)


def rounding_key(seed: int) -> int:
    """Key of the generator of stochastic rounding."""
    return splitmix64(seed, (1 << 32) + 1)


# ---- .npy headers ----


def encode_npy_header(spec: FileSpec) -> bytes:
    """A version-1.0 `.npy` header padded so that the data starts at byte 4096."""
    text = f"{{'descr': '{spec.dtype}', 'fortran_order': False, 'shape': {spec.shape!r}, }}".encode()
    length = DATA_OFFSET_BYTES - 10
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", length) + text.ljust(length - 1) + b"\n"


def check_npy_header(data: bytes, spec: FileSpec, filename: str) -> None:
    """Raises `CorruptTableError` unless `data` is the header that `spec` asks for."""
    if data == encode_npy_header(spec):
        return
    found = "no .npy header"
    if data[:6] == b"\x93NUMPY":
        try:
            header = ast.literal_eval(data[10:].decode("latin1").strip())
            found = f"shape {header['shape']}, dtype {header['descr']}"
            if (header["shape"], header["descr"]) == (spec.shape, spec.dtype):
                found = f"that, but in other bytes than the {DATA_OFFSET_BYTES} it takes"
        except (ValueError, SyntaxError, KeyError, TypeError):
            found = "an unreadable .npy header"
    raise CorruptTableError(f"{filename}: expected shape {spec.shape}, dtype {spec.dtype}; found {found}")


# ---- meta.json ----


def _tagged(value: Any) -> dict[str, Any]:
    return {"kind": value.kind, **asdict(value)}


def checksum_of(content: dict[str, Any]) -> str:
    """SHA-256 of an object as `json.dumps(..., sort_keys=True)` writes it."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def dump_checked(content: dict[str, Any]) -> bytes:
    """JSON as bytes, with the SHA-256 of the rest as its last entry."""
    return (json.dumps({**content, "checksum": checksum_of(content)}, indent=2) + "\n").encode()


def encode_meta(meta: TableMeta) -> bytes:
    """`meta.json` as bytes, with its own checksum as the last entry."""
    return dump_checked(meta_content(meta))


def meta_content(meta: TableMeta) -> dict[str, Any]:
    """What `meta.json` says, without the checksum."""
    content: dict[str, Any] = {"format": FORMAT}
    for field in fields(meta):
        value = getattr(meta, field.name)
        content[field.name] = _tagged(value) if field.name in ("optimizer", "init") else value
    content["hash"] = HASH_SCHEME
    content["files"] = {
        f"{name}.npy": {"shape": list(s.shape), "dtype": s.dtype, "bytes": s.file_bytes}
        for name, s in meta.files.items()
    }
    return content


def _untag(value: dict[str, Any], classes: dict[str, type]) -> Any:
    options = dict(value)
    return classes[options.pop("kind")](**options)


def _parse(data: bytes, filename: str) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptTableError(
            f"{filename}: expected JSON, found {len(data)} bytes that are not: {error}"
        ) from None
    if not isinstance(content, dict) or type(content.get("format")) is not int:
        raise FormatError(f'{filename}: not the description of a hashemb table (no integer "format")')
    if content["format"] > FORMAT:
        raise FormatError(
            f"{filename}: the table has format {content['format']}, this version reads up to {FORMAT}: "
            "upgrade hashemb"
        )
    if content["format"] < 1:
        raise FormatError(f"{filename}: the table has format {content['format']}, formats begin at 1")
    return content


def decode_meta(data: bytes, filename: str) -> TableMeta:
    """The inverse of `encode_meta`; any other bytes are a `FormatError` or a `CorruptTableError`."""
    content = _parse(data, filename)
    stored = content.pop("checksum", None)
    if stored != checksum_of(content) or data != dump_checked(content):
        raise CorruptTableError(
            f"{filename}: damaged: expected checksum {checksum_of(content)}, found {stored}"
        )
    return meta_of_content(content, filename)


def meta_of_content(content: dict[str, Any], filename: str) -> TableMeta:
    """The inverse of `meta_content`; `FormatError` where this version lacks what it names."""
    try:
        values = {field.name: content[field.name] for field in fields(TableMeta)}
        values["optimizer"] = _untag(values["optimizer"], OPTIMIZERS)
        values["init"] = _untag(values["init"], INITIALIZERS)
        return TableMeta(**values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"{filename}: this version cannot read the table: {error!r}") from None


# ---- the control page ----


def encode_control(meta: TableMeta, boot_id: str) -> bytes:
    """The page of a table to which no update has been applied."""
    data = bytearray(CONTROL_BYTES)
    page = np.frombuffer(data, CONTROL_DTYPE)
    page["magic"], page["format"], page["epoch"], page["lr"] = CONTROL_MAGIC, FORMAT, 1, meta.optimizer.lr
    page["table"], page["boot_id"] = id_bytes(meta.id), boot_id
    return seal_control(bytes(data))


def id_bytes(id: str) -> np.void:
    """The id of a table or snapshot as the control page holds it; "" is none."""
    return np.void(bytes.fromhex(id).ljust(16, b"\0"))


def page_id(value: np.void) -> str:
    """The inverse of `id_bytes`."""
    data = value.tobytes()
    return data.hex() if any(data) else ""


def check_control(data: bytes, filename: str) -> None:
    """Raises `CorruptTableError` unless `data` can be a control page."""
    if len(data) != CONTROL_BYTES:
        raise CorruptTableError(f"{filename}: expected {CONTROL_BYTES} bytes, found {len(data)}")
    page = np.frombuffer(data, CONTROL_DTYPE)[0]
    if data[:8] != CONTROL_MAGIC or page["format"] != FORMAT:
        raise CorruptTableError(
            f"{filename}: expected {CONTROL_MAGIC!r} and format {FORMAT}, "
            f"found {data[:8]!r} and format {page['format']}"
        )
    lr, total = float(page["lr"]), float(page["decay_total"])
    if not (math.isfinite(lr) and lr >= 0.0 and math.isfinite(total) and total <= 0.0 and page["epoch"] >= 1):
        raise CorruptTableError(
            f"{filename}: expected lr >= 0, decay_total <= 0 and epoch >= 1, "
            f"found {lr!r}, {total!r} and {page['epoch']}"
        )
    stored, clean = int(page["checksum"]), int(page["clean"])
    if clean > 1 or (stored and not clean):
        raise CorruptTableError(f"{filename}: expected clean 0 or 1, 1 with a check sum; found {clean} and {stored:#x}")
    if stored and stored != _page_checksum(data):
        raise CorruptTableError(f"{filename}: expected check sum {_page_checksum(data):#x}, found {stored:#x}")


def seal_control(data: bytes) -> bytes:
    """A control page at rest, as its last writer leaves it: clean, with a check sum in its last eight bytes."""
    sealed = bytearray(data)  # not a copy of the record, which leaves out the bytes between its fields
    page = np.frombuffer(sealed, CONTROL_DTYPE)
    page["clean"] = 1
    page["checksum"] = _page_checksum(bytes(sealed))
    return bytes(sealed)


def _page_checksum(data: bytes) -> int:
    """The first 8 bytes of SHA-256 of all but the last 8 bytes; not 0, which stands for none."""
    return int.from_bytes(hashlib.sha256(data[:-8]).digest()[:8], "little") or 1
