"""Restoring a table from a snapshot of it.

Invariants: every byte is compared with the snapshot's checksums while it is copied; the path holds a complete table at
any moment; what was there before is moved aside and never removed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from hashemb import _sharing
from hashemb._arguments import path_string
from hashemb._files import (
    CONTROL_BYTES,
    CONTROL_DTYPE,
    HISTORY_FILE,
    SAVING_FILE,
    SEATS_FILE,
    Bytes,
    Directory,
    Lock,
    Numbers,
    TableMeta,
    id_bytes,
    seal_control,
)
from hashemb._files import blocks as _blocks
from hashemb._files import building as _building
from hashemb._files import directory as _directory
from hashemb._points import Progress
from hashemb.errors import CorruptTableError, FormatError, HashembError
from hashemb.verify import Check

__all__ = ["restore"]

_OWN_FILES = {"meta.json", "control", "lock", HISTORY_FILE, "snapshot.json", "checksums.npy", SAVING_FILE, SEATS_FILE}


def restore(
    snapshot: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    replace: bool = False,
    progress: Progress | None = None,
) -> str | None:
    """Restore a table from a snapshot, which is left unchanged.

    Parameters
    ----------
    snapshot : str or path-like
        A snapshot as `EmbeddingTable.snapshot` wrote it, not trained since.
    path : str or path-like
        Directory to create; its parent must exist.
    replace : bool
        If True, move a table at `path`, damaged or not, to ``PATH.damaged-1``, or the first number that is free.
    progress : callable, optional
        Called with the number of blocks copied so far and the total.

    Returns
    -------
    str or None
        New path of the table that was at `path`, if there was one.

    Raises
    ------
    CorruptTableError
        The snapshot is damaged: the message holds the first problem that `verify` finds.
    ValueError
        `snapshot` is a table but not a snapshot, has been trained since it was taken, or is `path` itself.
    FileExistsError
        `path` exists, and `replace` is False.
    FormatError
        `replace` is True, and `path` is not a table.
    HashembError
        `replace` is True, and a writer has the table open.
    NoSpaceError, OSError
        The table could not be written; nothing has changed.

    Notes
    -----
    Each written block is read and checked once. Holes remain holes, and where the file system can share space between
    files, nothing is copied. The table appears atomically and durably: if the process is killed, the old table is still
    at `path` (on file systems that cannot exchange two names, there is a moment when nothing is at `path` and the old
    table is under its new name). The table has the snapshot's step and its history, so deltas that follow the snapshot
    apply to it. Files in the directory that are not part of a table are copied too, from the snapshot and from the
    replaced table; the snapshot's take precedence.

    Examples
    --------
    >>> import tempfile, hashemb
    >>> path = tempfile.mkdtemp() + "/ads.emb"
    >>> with hashemb.create(path, num_embeddings=64, embedding_dim=16) as table:
    ...     table.update([1], [[1.0] * 16])
    ...     info = table.snapshot(path + ".snapshot")
    ...     table.update([2], [[1.0] * 16])
    >>> aside = hashemb.restore(path + ".snapshot", path, replace=True)
    >>> hashemb.info(path).step, hashemb.info(aside).step, aside == path + ".damaged-1"
    (1, 2, True)
    """
    snapshot, path = path_string(snapshot, "snapshot"), os.path.realpath(path_string(path))
    check = _checked_snapshot(snapshot)
    if not os.path.lexists(path):
        _build(check, path, None, progress)
        return None
    if os.path.samefile(snapshot, path):
        raise ValueError(f"{snapshot} is both the snapshot and the table to restore")
    if not replace:
        raise FileExistsError(errno.EEXIST, "there is already something at this path", path)
    with _without_writers(path):
        aside = _free_name(path)
        _build(check, path, aside, progress)
    return aside


def _checked_snapshot(path: str) -> Check:
    """Return the check of a snapshot, for which the small files have been read."""
    _directory.read_meta(path)  # raises the usual errors if it is not a table
    check = Check(path, as_taken=True)
    _refuse(check)
    info, page = check.info, check.page
    if info is None or page is None:
        raise ValueError(f"{path} is a table but not a snapshot: it holds no file snapshot.json")
    found = int(page["step"]), int(page["epoch"]), float(page["lr"])
    if page["opened"] and found != (info.step, info.epoch + 1, info.lr):
        raise ValueError(
            f"{path} has been written since it was taken at step {info.step}: it is at step {page['step']}, a table "
            "like any other; take a snapshot of it to copy it"
        )
    return check


def _refuse(check: Check) -> None:
    problems = check.report.problems()
    if problems:
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        raise CorruptTableError(f"{problems[0]}{more}; {check.path} cannot be restored from")


# ---- what is replaced ----


@contextmanager
def _without_writers(path: str) -> Iterator[None]:
    """Keep writers away from the table at `path`. A table whose lock is missing or not a file cannot get any."""
    if not any(os.path.lexists(os.path.join(path, name)) for name in ("meta.json", "control", "weight.npy")):
        raise FormatError(f"{path}: not a hashemb table: it is not replaced")
    try:
        with _directory.table_directory(path) as directory:
            lock = Lock(directory.open("lock", os.O_RDWR))
    except (FileNotFoundError, CorruptTableError):
        yield
        return
    try:
        if not _sharing.lock(lock.fd, fcntl.F_WRLCK, _sharing.LOCK_WRITERS, False):
            raise HashembError(f"{path}: the table cannot be replaced while a process has it open for writing")
        yield
    finally:
        lock.close()


def _free_name(path: str) -> str:
    number = 1
    while os.path.lexists(f"{path}.damaged-{number}"):
        number += 1
    return f"{path}.damaged-{number}"


# ---- building ----


def _build(check: Check, path: str, aside: str | None, progress: Progress | None) -> None:
    meta, info, history = check.meta, check.info, check.history
    if meta is None or info is None or history is None:
        raise CorruptTableError(f"{check.path}: expected a snapshot with its history, found none")
    names = [f"{name}.npy" for name in (*meta.files, "checksums")]
    with _building.new_directory(path, aside=aside) as building:
        if _cloned(check.path, building, names):
            check.run(progress, arrays_in=building.path)
        else:
            _building.create_arrays(building, meta.files)
            with _blocks.OpenArrays(building, meta.files, os.O_RDWR) as fds:
                check.run(progress, sink=_Copy(building, meta, fds))
        _refuse(check)
        building.remove("checksums.npy")
        _building.finish_table(building, meta, _control_of_table(check.page))
        building.create(HISTORY_FILE, history.encode())
        _carry_over([path, check.path], building, meta)
        for name in meta.files:
            building.sync(f"{name}.npy")


def _cloned(snapshot: str, building: Directory, names: list[str]) -> bool:
    with _directory.table_directory(snapshot) as source:
        return _building.clone_files(source, building, names)


def _control_of_table(page: Any) -> bytes:
    data = bytearray(CONTROL_BYTES)
    fields = np.frombuffer(data, CONTROL_DTYPE)
    for name in CONTROL_DTYPE.names or ():
        fields[name] = page[name]
    fields["snapshot"], fields["opened"] = id_bytes(""), 0
    fields["boot_id"] = _directory.boot_id().encode()
    return seal_control(bytes(data))


class _Copy:
    """Write what a scan reads to the open array files of a new directory."""

    def __init__(self, directory: Directory, meta: TableMeta, fds: dict[str, int]) -> None:
        self._meta, self._fds = meta, fds
        self._paths = {name: directory.filename(f"{name}.npy") for name in meta.files}

    def epochs(self, first: int, epochs: npt.NDArray[np.uint32]) -> None:
        _blocks.write_rows(self._fds["blocks"], first, epochs, self._paths["blocks"])

    def blocks(self, name: str, blocks: Numbers, data: Bytes) -> None:
        _blocks.write_blocks(self._fds[name], self._meta, self._meta.files[name], blocks, data, self._paths[name])


def _carry_over(sources: list[str], building: Directory, meta: TableMeta) -> None:
    """Copy the files that are not part of a table; those of later sources replace those of earlier ones."""
    own = _OWN_FILES | {f"{name}.npy" for name in meta.files}
    for source in sources:
        if not os.path.isdir(source):
            continue
        for entry in os.scandir(source):
            is_file = stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode)
            if is_file and entry.name not in own and not entry.name.endswith(".tmp"):
                target = building.filename(entry.name)
                with _directory.space_errors(target):
                    shutil.copy2(entry.path, target)
                building.sync(entry.name)
