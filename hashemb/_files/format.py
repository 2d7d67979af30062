"""Format 1: conversion between bytes and metadata by pure functions. `directory.py` and `table_files.py` do the I/O.

A table is a directory of plain `.npy` files, a `meta.json` that never changes and a `control` page that does.
See docs/reference/format.md. Invariants: array data starts at byte 4096; everything is little-endian; a file's size
follows from `meta.json` alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from hashemb import init as initializers
from hashemb import optim
from hashemb._files.sealed import dump_checked, load_checked, load_json
from hashemb._random import splitmix64
from hashemb._rules import (
    COUNTER,
    DECAY_TOTAL,
    EPOCH,
    EPOCH_OR_NONE,
    FLAG,
    ID,
    LINE,
    MAX_BYTES,
    OBJECT,
    RATE,
    Rule,
    Whole,
    check_fields,
    expect,
    list_of,
    one_of,
    shown,
)
from hashemb.errors import CorruptTableError, FormatError

FORMAT = 1
DATA_OFFSET_BYTES = 4096
CONTROL_BYTES = 4096
SMALL_FILE_BYTES = 1 << 21  # larger than any of the JSON files can be
CONTROL_MAGIC = b"hashemb\x01"
HASH_SCHEME = "murmur3-x64-128, fmix64, mulhi64"

STORAGE_DTYPES = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}
OPTIMIZERS: dict[str, Any] = {
    c.kind: c for c in (optim.Adagrad, optim.RowWiseAdagrad, optim.SGD, optim.FTRL)
}
INITIALIZERS: dict[str, Any] = {
    c.kind: c for c in (initializers.Uniform, initializers.Normal, initializers.Zeros)
}

#: Rules for the fields of meta.json. The limits of `create` are these.
META_RULES: dict[str, Rule | Whole] = {
    "format": Whole(1, FORMAT),
    "num_embeddings": Whole(1, MAX_BYTES),
    "embedding_dim": Whole(1, 1 << 24),
    "dtype": one_of(*STORAGE_DTYPES),
    "optimizer": OBJECT,
    "init": OBJECT,
    "num_hashes": Whole(1, 16),
    "seed": Whole(0, (1 << 64) - 1),
    "block_rows": Whole(1, 4096),
    "id": ID,
    "created_by": LINE,
    "hash": one_of(HASH_SCHEME),
    "files": OBJECT,
}

#: Rules for the fields of the control page. Ids may be any bytes, and a boot id is meaningful on its machine only.
CONTROL_RULES: dict[str, Rule | Whole] = {
    "step": COUNTER,
    "epoch": EPOCH,
    "lr": RATE,
    "decay_total": DECAY_TOTAL,
    "clean": FLAG,
    "rows_touched": COUNTER,
    "saving": EPOCH_OR_NONE,
    "save_failed": EPOCH_OR_NONE,
    "save_errno": Whole(0, 4095),
    "gate_closing": FLAG,
    "opened": FLAG,
}

#: Rules for the fields of saving.json.
SAVING_RULES: dict[str, Rule | Whole] = {
    "directory": Rule("an absolute path", lambda v: type(v) is str and v.startswith("/") and "\0" not in v),
    "names": list_of(8, "names of arrays"),
    "since": EPOCH_OR_NONE,
    "until": EPOCH,
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
    """Content of `meta.json`: everything about a table that never changes."""

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
        """Specs of the files with one entry per row, by name without `.npy`."""
        rows, dim = self.num_embeddings, self.embedding_dim
        specs = {"weight": FileSpec((rows, dim), STORAGE_DTYPES[self.dtype])}
        for name, kind in self.optimizer.state_files.items():
            specs[name] = FileSpec((rows,) if kind == "row" else (rows, dim), "<f4")
        if self.optimizer.weight_decay > 0.0:
            specs["paid"] = FileSpec((rows,), "<f8")
        return specs

    @property
    def files(self) -> dict[str, FileSpec]:
        """Specs of all arrays of the table, by name without `.npy`."""
        return {**self.row_files, "blocks": FileSpec((self.num_blocks,), "<u4")}

    @property
    def logical_bytes(self) -> int:
        """Size of the table's array files and control page, holes included."""
        return sum(spec.file_bytes for spec in self.files.values()) + CONTROL_BYTES


def rows_per_block(row_bytes: int) -> int:
    """Return the rows of a block: the largest power of two that fits a 4096-byte page, at least 1.

    docs/decisions/0001-block-size.md has the measurements behind the size.
    """
    return 1 << max(0, (4096 // row_bytes).bit_length() - 1) if row_bytes <= 4096 else 1


# ---- numbers derived from the seed ----


def salts(seed: int, num_hashes: int) -> list[int]:
    """Return one salt per hash function."""
    return [splitmix64(seed, h) for h in range(num_hashes)]


def init_key(seed: int) -> int:
    """Return the key of the generator of initial values, far from the salts in the same stream."""
    return splitmix64(seed, 1 << 32)


def rounding_key(seed: int) -> int:
    """Return the key of the generator for stochastic rounding."""
    return splitmix64(seed, (1 << 32) + 1)


# ---- .npy headers ----


def encode_npy_header(spec: FileSpec) -> bytes:
    """Return a version-1.0 `.npy` header, padded so that the data starts at byte 4096."""
    text = f"{{'descr': '{spec.dtype}', 'fortran_order': False, 'shape': {spec.shape!r}, }}".encode()
    length = DATA_OFFSET_BYTES - 10
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", length) + text.ljust(length - 1) + b"\n"


def check_npy_header(data: bytes, spec: FileSpec, filename: str) -> None:
    """Raise `CorruptTableError` unless `data` is the header for `spec`."""
    if data == encode_npy_header(spec):
        return
    found = "no .npy header"
    if data[:6] == b"\x93NUMPY":  # matched by patterns, as input can make a Python parser exhaust the stack
        header = data[10:].decode("latin1")
        descr = re.search(r"'descr': '([!-~]{1,20})'", header)
        shape = re.search(r"'shape': (\([0-9, ]{0,60}\))", header)
        found = "an unreadable .npy header"
        if descr and shape:
            found = f"shape {shape[1]}, dtype {descr[1]}"
            if (shape[1], descr[1]) == (repr(spec.shape), spec.dtype):
                found = f"that, but in other bytes than the {DATA_OFFSET_BYTES} it takes"
    raise CorruptTableError(f"{filename}: expected shape {spec.shape}, dtype {spec.dtype}; found {found}")


# ---- meta.json ----


def _tagged(value: Any) -> dict[str, Any]:
    return {"kind": value.kind, **asdict(value)}


def encode_meta(meta: TableMeta) -> bytes:
    """Return `meta.json` as bytes, with its own checksum as the last entry."""
    return dump_checked(meta_content(meta))


def meta_content(meta: TableMeta) -> dict[str, Any]:
    """Return the content of `meta.json` without the checksum."""
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


def decode_meta(data: bytes, filename: str) -> TableMeta:
    """Decode the result of `encode_meta`; raise `FormatError` or `CorruptTableError` for any other bytes."""
    return meta_of_content(load_checked(data, filename, FORMAT), filename)


def meta_of_content(content: dict[str, Any], filename: str, where: str = "") -> TableMeta:
    """Invert `meta_content`; raise `FormatError` if the content names something that this version lacks."""
    check_fields(content, META_RULES, filename, where)
    values = {field.name: content[field.name] for field in fields(TableMeta)}
    values["optimizer"] = _untag("optimizer", content, OPTIMIZERS, filename)
    values["init"] = _untag("init", content, INITIALIZERS, filename)
    meta = TableMeta(**values)
    expected = rows_per_block(meta.row_bytes)
    expect(meta.block_rows == expected, filename, f"{where}block_rows to be {expected} for its rows", meta.block_rows)
    try:
        check_size(meta)
    except ValueError as error:
        raise CorruptTableError(f"{filename}: expected files of up to {MAX_BYTES} bytes, found that {error}") from None
    follows = meta_content(meta)
    if json.dumps(follows) != json.dumps(content):  # as text: 1 is not True, nor 1.0
        names = [n for n in follows if json.dumps(follows[n]) != json.dumps(content[n])] or ["the order of fields"]
        expect(False, filename, f"{where}{names[0]} to be what follows from the rest", content.get(names[0]))
    return meta


def _untag(name: str, content: dict[str, Any], classes: dict[str, Any], filename: str) -> Any:
    options = dict(content[name])
    kind = options.pop("kind", None)
    rule = one_of(*classes)
    try:
        if not rule.holds(kind):
            raise ValueError(f"expected {name}.kind to be {rule.words}, found {shown(kind)}")
        known = {field.name for field in fields(classes[kind])}
        unknown = [option for option in options if option not in known]
        if unknown:
            raise ValueError(f"expected {name} of kind {kind!r} to have no field {shown(unknown[0])}, found one")
        return classes[kind](**options)
    except (TypeError, ValueError) as error:
        raise FormatError(f"{filename}: this version cannot read it: {error}") from None


def check_size(meta: TableMeta) -> None:
    """Raise `ValueError` if a file of the table would exceed the largest possible file size."""
    largest = max(spec.file_bytes for spec in meta.files.values())
    if largest > MAX_BYTES:
        rows, dim = meta.num_embeddings, meta.embedding_dim
        raise ValueError(f"{rows} rows of {dim} need a file of {largest} bytes, more than 2**63 - 1")


# ---- saving.json ----


def decode_saving(data: bytes, filename: str, meta: TableMeta) -> dict[str, Any]:
    """Return the request that the owner of a snapshot makes to writers; raise `FormatError` if it is invalid."""
    content = load_json(data, filename)
    expect(OBJECT.holds(content), filename, OBJECT.words, content)
    check_fields(content, SAVING_RULES, filename)
    is_known = one_of(*meta.row_files)
    for name in content["names"]:
        expect(is_known.holds(name), filename, f"names of arrays, {is_known.words}", name)
    expect(content["since"] < content["until"], filename, f"since below {content['until']}", content["since"])
    return content  # type: ignore[no-any-return]


# ---- the control page ----


def encode_control(meta: TableMeta, boot_id: str) -> bytes:
    """Return the page of a table to which no update has been applied."""
    data = bytearray(CONTROL_BYTES)
    page = np.frombuffer(data, CONTROL_DTYPE)
    page["magic"], page["format"], page["epoch"], page["lr"] = CONTROL_MAGIC, FORMAT, 1, meta.optimizer.lr
    page["table"], page["boot_id"] = id_bytes(meta.id), boot_id
    return seal_control(bytes(data))


def id_bytes(id: str) -> np.void:
    """Return the id of a table or snapshot as stored in the control page; "" means no id."""
    return np.void(bytes.fromhex(id).ljust(16, b"\0"))


def page_id(value: np.void) -> str:
    """Invert `id_bytes`."""
    data = value.tobytes()
    return data.hex() if any(data) else ""


def check_control(data: bytes, filename: str, meta: TableMeta | None = None) -> None:
    """Raise `CorruptTableError` unless `data` is a valid control page, of the table `meta` if that is given."""
    if len(data) != CONTROL_BYTES:
        raise CorruptTableError(f"{filename}: expected {CONTROL_BYTES} bytes, found {len(data)}")
    page = np.frombuffer(data, CONTROL_DTYPE)[0]
    if data[:8] != CONTROL_MAGIC or page["format"] != FORMAT:
        raise CorruptTableError(
            f"{filename}: expected {CONTROL_MAGIC!r} and format {FORMAT}, "
            f"found {data[:8]!r} and format {page['format']}"
        )
    values = {name: page[name].item() for name in CONTROL_RULES}
    check_fields(values, CONTROL_RULES, filename)
    epoch, lr = values["epoch"], values["lr"]
    expect(values["saving"] <= epoch, filename, f"a snapshot of an epoch up to {epoch} in progress", values["saving"])
    if meta is not None:
        expect_rate(meta.optimizer, lr, filename)
    stored, clean = int(page["checksum"]), values["clean"]
    if stored and not clean:
        raise CorruptTableError(f"{filename}: expected clean 1 with a check sum, found 0 and {stored:#x}")
    if stored and stored != _page_checksum(data):
        raise CorruptTableError(f"{filename}: expected check sum {_page_checksum(data):#x}, found {stored:#x}")


def expect_rate(optimizer: optim.Optimizer, lr: float, filename: str) -> None:
    """Raise `CorruptTableError` unless the rate is valid for a table with this optimiser."""
    try:
        optim.with_rate(optimizer, lr)
    except ValueError as error:
        raise CorruptTableError(f"{filename}: expected a rate of the optimiser, found that {error}") from None


def seal_control(data: bytes) -> bytes:
    """Return a control page as its last writer leaves it: clean, with a checksum in its last eight bytes."""
    sealed = bytearray(data)  # a copy of the record would leave out the bytes between its fields
    page = np.frombuffer(sealed, CONTROL_DTYPE)
    page["clean"] = 1
    page["checksum"] = _page_checksum(bytes(sealed))
    return bytes(sealed)


def _page_checksum(data: bytes) -> int:
    """Return the first 8 bytes of SHA-256 of all but the last 8 bytes; never 0, which means no checksum."""
    return int.from_bytes(hashlib.sha256(data[:-8]).digest()[:8], "little") or 1
