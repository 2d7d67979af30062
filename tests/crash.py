"""Simulated power failures: the possible contents of a disk at any moment of an operation, from a record of its calls.

`python crash.py DIRECTORY OUT SCENARIO` under fault_shim.c runs an operation and records the page cache contents of
every file before each system call, which includes stores through mappings. `states` then derives disk contents from
the record.

The model: fsync and msync make the bytes of a file durable, and fsync of a directory makes its entries durable. Among
data that is not durable, each page of 4096 bytes is as it was when last durable, or as at any later moment, or torn
between two of these at a sector boundary. A file has one of the sizes that it had since then. Creations, renames and
removals in a directory have happened or not, either independently of each other or up to some moment.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import hashemb

PAGE_BYTES, SECTOR_BYTES = 4096, 512
KINDS = ["open", "create", "ftruncate", "fallocate", "mmap", "msync", "fsync", "rename"]
OPTIONS: dict[str, Any] = {
    "num_embeddings": 1500,
    "embedding_dim": 4,
    "optimizer": hashemb.Adagrad(lr=0.1),
    "seed": 3,
}
ROWS = hashemb.reference.rows(np.arange(200, dtype=np.uint64), num_embeddings=1500, seed=3)
ALL = np.unique(ROWS, return_index=True)[1][:80]  # keys that share no row
OLD, NEW = ALL[:12], ALL[12:52]
GRADS = np.random.default_rng(1).normal(size=(40, 4)).astype(np.float32)

Entries = dict[str, int]  # a directory: inodes by name


# ---- recording ----


@dataclass
class Moment:
    """The moment before a call: its kind and inode, the bytes of every file, the entries of every directory, a mark."""

    kind: str
    inode: int | None
    files: dict[int, bytes]
    directories: dict[int, Entries]
    mark: str


@dataclass
class Recorder:
    """Records moments. It keeps the inodes open, so that no inode number is reused for another file."""

    root: str
    moments: list[Moment] = field(default_factory=list)
    mark: str = ""
    held: dict[int, int] = field(default_factory=dict)
    seen: dict[int, bytes] = field(default_factory=dict)

    def record(self, kind: int, path: bytes | None, new_path: bytes | None) -> None:
        files: dict[int, bytes] = {}
        directories: dict[int, Entries] = {}
        self._scan(self.root, files, directories)
        name = KINDS[kind] if kind < len(KINDS) else "other"
        inode = self._inode(name, os.fsdecode(path or b""))
        self.moments.append(Moment(name, inode, files, directories, self.mark))

    def _scan(self, path: str, files: dict[int, bytes], directories: dict[int, Entries]) -> int:
        inode = os.stat(path).st_ino
        if inode not in self.held:
            self.held[inode] = os.open(path, os.O_RDONLY)
        if os.path.isdir(path):
            directories[inode] = {name: self._scan(f"{path}/{name}", files, directories) for name in os.listdir(path)}
        else:
            data = os.pread(self.held[inode], 1 << 24, 0)
            files[inode] = self.seen[inode] = self.seen[inode] if self.seen.get(inode) == data else data
        return inode

    def _inode(self, kind: str, path: str) -> int | None:
        """Return the inode that the call syncs, if any; an msync is given an address."""
        if kind == "msync":
            path = mapped_at(int(path[1:], 16))
        return os.stat(path).st_ino if kind in ("msync", "fsync") else None


def mapped_at(address: int) -> str:
    with open("/proc/self/maps", encoding="utf-8") as file:
        for line in file:
            begin, end = (int(word, 16) for word in line.split()[0].split("-"))
            if begin <= address < end:
                return line.split(maxsplit=5)[5].rstrip("\n")
    raise ValueError(f"nothing is mapped at {address:#x}")


# ---- the disks that a power failure may leave ----


class Disk:
    """The data that is durable, and the data that may be, at one moment of the record."""

    def __init__(self, first: Moment, root: int) -> None:
        self.root = root
        self.versions = {inode: [data] for inode, data in first.files.items()}  # the durable version, then later ones
        self.entries = {inode: dict(entries) for inode, entries in first.directories.items()}
        self.pending: dict[int, list[dict[str, int | None]]] = {}
        self.latest = first

    def advance(self, moment: Moment) -> None:
        """Add the changes up to `moment`."""
        for inode, data in moment.files.items():
            versions = self.versions.setdefault(inode, [b""])
            if versions[-1] is not data:
                versions.append(data)
        for inode, entries in moment.directories.items():
            before = self.latest.directories.get(inode, {})
            self.entries.setdefault(inode, {})
            self.pending.setdefault(inode, []).extend(changes(before, entries))
        self.latest = moment

    def sync(self, moment: Moment) -> None:
        if moment.inode in moment.files:
            self.versions[moment.inode] = [moment.files[moment.inode]]
        elif moment.inode in moment.directories:
            self.entries[moment.inode] = dict(moment.directories[moment.inode])
            self.pending[moment.inode] = []

    def write(self, target: Path, seed: int) -> None:
        self._write_directory(self.root, target, seed, random.Random(seed))

    def _write_directory(self, inode: int, target: Path, seed: int, rng: random.Random) -> None:
        target.mkdir()
        for name, child in sorted(self._choose_entries(inode, seed, rng).items()):
            if child in self.entries:
                self._write_directory(child, target / name, seed, rng)
            else:
                (target / name).write_bytes(self._choose_bytes(child, seed, rng))

    def _choose_entries(self, inode: int, seed: int, rng: random.Random) -> Entries:
        entries, pending = dict(self.entries[inode]), self.pending.get(inode, [])
        if seed in (0, 3):
            pending = []
        elif seed > 3 and rng.random() < 0.5:
            pending = pending[: rng.randrange(len(pending) + 1)]
        elif seed > 3:
            pending = [change for change in pending if rng.random() < 0.5]
        for change in pending:
            for name, child in change.items():
                entries.pop(name, None)
                if child is not None:
                    entries[name] = child
        return entries

    def _choose_bytes(self, inode: int, seed: int, rng: random.Random) -> bytes:
        """Choose the bytes of a file. Seeds 0 and 2 lose all that is not durable; 1 and 3 keep it (2 keeps the entries
        of directories, 3 loses them).
        """
        versions = self.versions[inode]
        if seed <= 3 or len(versions) == 1:
            return versions[0] if seed in (0, 2) else versions[-1]
        size = len(rng.choice([versions[0], versions[-1], rng.choice(versions)]))
        return b"".join(choose_page(versions, at, min(PAGE_BYTES, size - at), rng) for at in range(0, size, PAGE_BYTES))


def changes(before: Entries, after: Entries) -> Iterator[dict[str, int | None]]:
    """Yield the change of a directory between two calls, at most one: names and their inodes, None if removed."""
    names = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    if names:
        yield {name: after.get(name) for name in sorted(names)}


def choose_page(versions: list[bytes], at: int, size: int, rng: random.Random) -> bytes:
    def pick() -> bytes:
        data = rng.choice([versions[0], versions[-1], rng.choice(versions)])
        return data[at : at + size].ljust(size, b"\0")

    cut = rng.randrange(0, PAGE_BYTES, SECTOR_BYTES) if rng.random() < 0.3 else 0
    return pick()[:cut] + pick()[cut:]


def states(record: list[Moment], root: int, target: Path, seeds: range, stride: int = 1) -> Iterator[tuple[str, Path]]:
    """Yield (mark, directory) for every call and seed: a directory as a power failure at that moment could leave it."""
    disk = Disk(record[0], root)
    for number, moment in enumerate(record):
        disk.advance(moment)
        for seed in seeds if number % stride == 0 else ():
            path = target / f"{number}-{seed}"
            disk.write(path, seed)
            yield moment.mark, path
        disk.sync(moment)


# ---- the recorded operations ----


def create(root: Path, recorder: Recorder) -> None:
    with hashemb.create(root / "new", **OPTIONS):
        recorder.mark = "made"


def snapshot(root: Path, recorder: Recorder) -> None:
    with hashemb.open(root / "t", "r+") as table:
        table.update(NEW, GRADS)
        table.snapshot(root / "s")
        recorder.mark = "made"
        table.update(NEW, GRADS)


def flush(root: Path, recorder: Recorder) -> None:
    with hashemb.open(root / "t", "r+") as table:
        table.update(OLD, GRADS[: OLD.size])
        table.lr = 0.05
        table.flush()
        recorder.mark = "flushed"
        for _ in range(3):
            table.update(NEW, GRADS)
        table.flush()
        recorder.mark = "flushed twice"
        table.update(NEW[:5], GRADS[:5])
    recorder.mark = "closed"


def export(root: Path, recorder: Recorder) -> None:
    with hashemb.open(root / "t", "r+") as table:
        table.snapshot(root / "base")
        recorder.moments.clear()
        table.update(NEW, GRADS)
        table.export_delta(root / "base", root / "d.delta", state=True)
        recorder.mark = "made"
        table.update(NEW, GRADS)


def apply(root: Path, recorder: Recorder) -> None:
    """Apply a delta to a replica that was the snapshot `base`."""
    export(root, recorder)
    recorder.moments.clear()
    recorder.mark = ""
    hashemb.apply_delta(root / "base", root / "d.delta")
    recorder.mark = "made"


def restore(root: Path, recorder: Recorder) -> None:
    """Replace a table by an earlier snapshot of it."""
    snapshot(root, recorder)
    recorder.moments.clear()
    recorder.mark = ""
    hashemb.restore(root / "s", root / "t", replace=True)
    recorder.mark = "made"


def main(root: str, out: str, name: str) -> None:
    scenarios = [create, snapshot, flush, export, apply, restore]
    scenario = next(function for function in scenarios if function.__name__ == name)
    if name != "create":
        with hashemb.create(Path(root) / "t", **OPTIONS) as table:
            table.update(OLD, GRADS[: OLD.size])
    recorder = Recorder(root)
    callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p)(recorder.record)
    shim = ctypes.CDLL(None)
    shim.shim_watch(os.fsencode(root), callback)
    scenario(Path(root), recorder)
    recorder.record(len(KINDS), None, None)
    shim.shim_watch(b"", ctypes.cast(None, type(callback)))
    with open(out, "wb") as file:
        pickle.dump((recorder.moments, os.stat(root).st_ino), file)


if __name__ == "__main__":
    main(*sys.argv[1:])
