"""Hostile files: change one value in the files of a table, snapshot or delta, and correct the checksums.

A SHA-256 is no secret: anyone who edits a file can recompute it, so a matching checksum does not make a value
trustworthy. Everything is drawn from a seeded generator, and a `Mutation` is a value that can be printed and serialized
as JSON.

    rng = random.Random(7)
    for mutation in mutations(directory, rng, 1000, seal="all"):
        copy = shutil.copytree(directory, fresh)
        if mutation.apply(copy):
            assert set(outcomes(copy).values()) <= DOCUMENTED, mutation

`directory` is a table, a snapshot, or any directory with *.delta files. The module relies on docs/reference/format.md,
and uses the package only for the layout of the control page.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import struct
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from damage import Damage

import hashemb
from hashemb._files.format import CONTROL_DTYPE
from hashemb.errors import HashembError

#: "": leave the checksums. "sum": correct the checksum of the file. "all": also correct everything that follows from
#: the value elsewhere in the table: the list of files, their sizes and their headers.
Seal = Literal["", "sum", "all"]
Where = tuple[str | int, ...]

#: HashembError itself: all epochs are used up.
DOCUMENTED = {"ok", "problems", "FormatError", "CorruptTableError", "DeltaError", "FileNotFoundError", "OSError"} | {
    "HashembError"
}

_DEEP = 900
_ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
_DESCR = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}

#: JSON texts that replace a value.
TEXTS = [
    *("null", "true", "false", '""', '"x"', "[]", "{}", "[1]", '{"kind": []}', '{"kind": "sgd"}', '["float32"]'),
    *("0", "-0", "-0.0", "1", "-1", "2", "3", "16", "17", "0.5", "1.0", "1023", "1e999", "-1e999"),
    *(str(2**power + change) for power in (31, 32, 53, 62, 63, 64) for change in (-1, 0, 1)),
    *(str(10**30), "7" * 400, "7" * 5000, "1e308", "1e-320", "1e30", "1e31", "NaN", "Infinity", "-Infinity"),
    *('"float64"', '"float16"', '"\\ud800"', '"\\u0000"', '"\\u001b[31m"', '"../../x"', f'"{"a" * 70_000}"'),
    *(f'"{digit * 32}"' for digit in "0fFg"),
    *("[" * _DEEP + "]" * _DEEP, '{"x":' * _DEEP + "0" + "}" * _DEEP),
]

_WORDS = [0, 1, 2, 4095, 4096, *(2**power + change for power in (31, 32, 63) for change in (-1, 0, 1)), 2**64 - 1]
_DOUBLES = [math.nan, math.inf, -math.inf, 0.0, -0.0, -1.0, 1.0, 5e-324, 1e-320, 1e31, 1e308, -1e308]


@dataclass(frozen=True)
class Mutation:
    """One change of one file.

    `kind` is "set" (replace the value at `where` of the JSON by `text`, serialized again), "raw" (the same, verbatim),
    "remove", "add" (an unknown key), "twice" (a duplicate key, with `text`), "field" (a field of the control page:
    `where` is its name, `text` its bytes in hexadecimal), or a kind of `damage.Damage` (`where` is its a and b).
    """

    kind: str
    file: str
    where: Where
    text: str = ""
    seal: Seal = "sum"

    def apply(self, directory: Path) -> bool:
        """Apply the mutation; return whether it has changed anything."""
        path = directory / self.file
        if self.kind in ("flip", "fill", "truncate", "extend", "exchange"):
            return Damage(self.kind, self.file, *(int(n) for n in self.where)).apply(directory)
        before = path.read_bytes()
        with _without_limits():
            after = self._page(before) if self.kind == "field" else self._json(directory, before)
        path.write_bytes(after)
        return after != before

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, line: str) -> Mutation:
        fields = json.loads(line)
        return cls(**{**fields, "where": tuple(fields["where"])})

    def _page(self, data: bytes) -> bytes:
        page, name = bytearray(data), str(self.where[0])
        record = np.frombuffer(page, CONTROL_DTYPE)
        offset = CONTROL_DTYPE.fields[name][1]
        page_of = bytes.fromhex(self.text)
        had_sum = bool(record["checksum"][0])
        del record
        page[offset : offset + len(page_of)] = page_of
        if self.seal and had_sum and name != "checksum":
            page[-8:] = hashlib.sha256(page[:-8]).digest()[:8]
        return bytes(page)

    def _json(self, directory: Path, data: bytes) -> bytes:
        content = content_of(data)
        stored = content.pop("checksum", None)
        marker = "@@resealed@@"
        owner = content
        for step in self.where[:-1]:
            owner = owner[step]
        last = self.where[-1]
        if self.kind == "remove":
            del owner[last]
        elif self.kind == "add":
            owner[marker] = None
        elif self.kind == "set":
            owner[last] = json.loads(self.text)
        elif self.kind == "raw":
            owner[last] = marker
        raw = self.text if self.kind == "raw" else None
        if self.kind == "twice":  # Python's parser keeps the last one
            raw = f"{json.dumps(owner[last])}, {json.dumps(last)}: {self.text}"
            owner[last] = marker
        if self.seal == "all" and self.file == "meta.json" and raw is None:
            _conform(directory, content)
        return _packed(data, content, stored, None if raw is None else (json.dumps(marker), raw), bool(self.seal))


@contextmanager
def _without_limits() -> Iterator[None]:
    """Lift Python's limits for the parser and writer of this module; the package itself is tested with the limits."""
    depth, digits = sys.getrecursionlimit(), getattr(sys, "get_int_max_str_digits", lambda: 0)()
    sys.setrecursionlimit(max(depth, 12 * _DEEP))
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(0)
    try:
        yield
    finally:
        sys.setrecursionlimit(depth)
        if hasattr(sys, "set_int_max_str_digits"):
            sys.set_int_max_str_digits(digits)


# ---- files ----


def content_of(data: bytes) -> dict[str, Any]:
    """Return the JSON of a file, or of the header of a delta."""
    if data[:8] == b"hashembD":
        data = data[16 : 16 + struct.unpack_from("<Q", data, 8)[0]]
    content: dict[str, Any] = json.loads(data)
    return content


def _sha(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _packed(data: bytes, content: dict[str, Any], stored: Any, raw: tuple[str, str] | None, seal: bool) -> bytes:
    """Return the file with this content, and a correct checksum if `seal`; `raw` is a text and its replacement."""
    is_delta, meant = data[:8] == b"hashembD", content
    if raw:
        meant = json.loads(json.dumps(content).replace(*raw))
    if seal or stored is not None:
        content = {**content, "checksum": _sha(meant) if seal else stored}
    text = json.dumps(content, indent=None if is_delta else 2)
    if raw:
        text = text.replace(*raw)
    if not is_delta:
        return (text + "\n").encode()
    head = data[:8] + struct.pack("<Q", len(text.encode())) + text.encode()
    begin = -(-(16 + struct.unpack_from("<Q", data, 8)[0]) // 4096) * 4096
    return head.ljust(-(-len(head) // 4096) * 4096, b"\0") + data[begin:]


def _conform(directory: Path, content: dict[str, Any]) -> None:
    """Adapt lists, sizes and headers to the geometry in a meta.json, if it is valid and not too large."""
    rows, dim, per_block = (content.get(name) for name in ("num_embeddings", "embedding_dim", "block_rows"))
    dtype = content.get("dtype")
    files = content.get("files")
    if not all(type(n) is int and 0 < n < 2**48 for n in (rows, dim, per_block)) or str(dtype) not in _DESCR:
        return
    if not isinstance(files, dict):
        return
    for filename, entry in files.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("shape"), list):
            continue
        name, wide = filename.removesuffix(".npy"), len(entry["shape"]) == 2
        descr = _DESCR[dtype] if name == "weight" else entry.get("dtype")
        shape = (-(-rows // per_block),) if name == "blocks" else (rows, dim) if wide else (rows,)
        if descr not in ("<f4", "<f2", "<u2", "<u4", "<f8"):
            continue
        size = 4096 + math.prod(shape) * int(descr[2])
        path = directory / filename
        if size > 2**36 or not path.is_file():
            continue
        entry.update(shape=list(shape), dtype=descr, bytes=size)
        text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape!r}, }}".encode()
        with open(path, "r+b") as file:
            file.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", 4086) + text.ljust(4085) + b"\n")
            file.truncate(size)


# ---- drawing ----


def places(content: Any, at: Where = ()) -> Iterator[Where]:
    """Yield the path of every value of an object; of long lists only the first and last entries."""
    keys = list(content) if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    for key in list(keys) if len(keys) < 40 else [*keys][:3] + [*keys][-3:]:
        if (*at, key) != ("checksum",):
            yield (*at, key)
            yield from places(content[key], (*at, key))


def files_with_numbers(directory: Path) -> list[str]:
    """Return the files in which a value can be changed."""
    names = {"meta.json", "history.json", "snapshot.json", "saving.json", "control"}
    return sorted(path.name for path in directory.iterdir() if path.name in names or path.suffix == ".delta")


def every_field(directory: Path, texts: list[str] | None = None, *, seal: Seal = "sum") -> Iterator[Mutation]:
    """Replace each value of each file in turn by each text, and each field of the control page by extreme numbers."""
    for file in files_with_numbers(directory):
        if file == "control":
            for name in CONTROL_DTYPE.names or ():
                for data in _hostile_bytes(name):
                    yield Mutation("field", file, (name,), data.hex(), seal)
            continue
        for where in places(content_of((directory / file).read_bytes())):
            for text in TEXTS if texts is None else texts:
                yield Mutation("set", file, where, text, seal)


def mutations(directory: Path, rng: random.Random, count: int, *, seal: Seal = "sum") -> list[Mutation]:
    """Draw `count` mutations of the current directory; with `seal` "" every second one changes bytes, not values."""
    contents = {
        file: None if file == "control" else content_of((directory / file).read_bytes())
        for file in files_with_numbers(directory)
    }
    spots = {file: list(places(content)) for file, content in contents.items() if content is not None}
    found = []
    for number in range(count):
        if seal == "" and number % 2:
            found.append(_of_bytes(directory, rng))
            continue
        file = rng.choice(list(contents))
        if file == "control":
            name = rng.choice(CONTROL_DTYPE.names or ())
            found.append(Mutation("field", file, (name,), rng.choice(_hostile_bytes(name)).hex(), seal))
        else:
            found.append(_of_values(file, contents[file], spots[file], rng, seal))
    return found


def _of_values(file: str, content: Any, spots: list[Where], rng: random.Random, seal: Seal) -> Mutation:
    where = rng.choice(spots)
    kind = rng.choices(["set", "raw", "remove", "add", "twice"], [12, 3, 1, 1, 1])[0]
    value = content
    for step in where:
        value = value[step]
    is_named = isinstance(where[-1], str)
    if kind in ("add", "twice") and not is_named:
        kind = "set"
    return Mutation(kind, file, where, rng.choice([*TEXTS, *_neighbours(value, rng)]), seal)


def _neighbours(value: Any, rng: random.Random) -> list[str]:
    """Return texts close to a value: slightly wrong values get further than absurd ones."""
    near: list[Any] = [[value], str(value)[:50], {"kind": str(value)[:50]}]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        near += [value + 1, value - 1, value * 2, -value, float(value), value + 0.5, value * 1000, rng.randrange(2**34)]
        near += [1 << rng.randrange(66), rng.randrange(2**66)]
    elif isinstance(value, str):
        near += [value.upper(), value[::-1], value[:-1], value + "0"]
    return [json.dumps(one) for one in near * 2]


def _hostile_bytes(name: str) -> list[bytes]:
    kind, size = CONTROL_DTYPE[name].kind, CONTROL_DTYPE[name].itemsize
    if kind == "u":
        return [(word % 2 ** (8 * size)).to_bytes(size, "little") for word in _WORDS]
    if kind == "f":
        return [struct.pack("<d", value) for value in _DOUBLES]
    return [bytes([value]) * size for value in (0, 0x1B, 0x20, 0x61, 0xFF)]


def _of_bytes(directory: Path, rng: random.Random) -> Mutation:
    file = rng.choice(sorted(path.name for path in directory.iterdir() if path.is_file()))
    size = os.stat(directory / file).st_size
    kind = rng.choice(["flip", "flip", "fill", "truncate", "extend", "exchange"])
    low = min(rng.choice([0, 0, 4096]), max(0, size - 1))
    at = rng.randrange(low, size) if size else 0
    if kind == "extend" or not size:
        return Mutation("extend", file, (rng.choice([1, 8, 4096]), rng.choice([0, 0x20, 0xFF])), seal="")
    if kind == "exchange":
        return Mutation(kind, file, (at // 4096 * 4096, rng.randrange(size) // 4096 * 4096), seal="")
    return Mutation(kind, file, (at, rng.randrange(8 if kind == "flip" else 256)), seal="")


# ---- use ----


def outcomes(directory: Path, *, write: bool = True) -> dict[str, str]:
    """Read the directory in every way; return outcomes by name: "ok", "problems" (of `verify`), or an error class.

    With `write`, a table is also opened "r+" and updated, and a new replica next to the directory follows the deltas.
    """
    found: dict[str, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        if (directory / "meta.json").exists():
            found["info"] = _result(lambda: hashemb.info(directory))
            found["verify"] = _result(lambda: hashemb.verify(directory))
            found["open r"] = _result(lambda: _use(directory, "r"))
            if write:
                found["open r+"] = _result(lambda: _use(directory, "r+"))
        for file in sorted(directory.glob("*.delta")):
            found[f"delta_info {file.name}"] = _result(lambda file=file: hashemb.delta_info(file))
            found[f"check_delta {file.name}"] = _result(lambda file=file: hashemb.check_delta(file))
            found[f"verify {file.name}"] = _result(lambda file=file: hashemb.verify(file))
        if write and any(directory.glob("*.delta")):
            found["follow"] = _result(lambda: hashemb.follow(directory.parent / f"{directory.name}.replica", directory))
    return found


def _result(call: Any) -> str:
    try:
        value = call()
    except OSError as error:
        return "FileNotFoundError" if isinstance(error, FileNotFoundError) else "OSError"
    except HashembError as error:
        is_fit_to_print = len(str(error)) < 2000 and str(error).isascii() and str(error).isprintable()
        return type(error).__name__ if is_fit_to_print else f"unfit message: {str(error)[:200]!r}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return "problems" if isinstance(value, list) and value else "ok"


def _use(directory: Path, mode: Any) -> None:
    keys = np.arange(40)
    with hashemb.open(directory, mode) as table:
        if table.embedding_dim > 2**16:
            return
        table.lookup(keys)
        table.rows(keys)
        if mode == "r+":
            table.update(keys, np.ones((40, table.embedding_dim), np.float32))
            table.flush()
