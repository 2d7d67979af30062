"""Checks of a table, a snapshot or a delta, at rest or in use: all checksums and all invariants. Nothing is written.

Files are read with `pread` and never mapped, so that no content can kill the process, and holes are skipped. The result
is a list of problems, not an exception. A snapshot that has not been opened for writing since it was taken (`opened` in
its control page is 0) is compared with its checksums in every byte; in one that has been opened, only the blocks that
have not been written since are compared.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from hashemb._arguments import path_string
from hashemb._files import (
    CONTROL_BYTES,
    CONTROL_DTYPE,
    DATA_OFFSET_BYTES,
    MAX_POINTS,
    SEATS_FILE,
    FileSpec,
    History,
    SnapshotInfo,
    TableMeta,
    abandoned_rows,
    check_npy_header,
    page_id,
)
from hashemb._files import blocks as _blocks
from hashemb._files import directory as _directory
from hashemb._points import Covered, Limits, Problem, Progress, Report, Scan, Sink, UnreadableError, check_delta
from hashemb.errors import CorruptTableError, HashembError

__all__ = ["Check", "verify"]

T = TypeVar("T")

_BOOT_ID = re.compile(rb"[0-9a-f-]{36}|unknown")


def verify(
    path: str | os.PathLike[str], *, progress: Progress | None = None, suspects: bool = False
) -> list[Problem]:
    """Check a table, a snapshot or a delta file, and return all problems found.

    Parameters
    ----------
    path : str or path-like
        Directory of a table or snapshot, or a delta file.
    progress : callable, optional
        Called with the number of blocks checked so far and the total.
    suspects : bool
        Whether to report also the rows that killed processes were writing: see `EmbeddingTable.suspects`.

    Returns
    -------
    list of Problem
        Empty if nothing is wrong. Beyond ten problems of a kind in one file, the others are counted and not listed.

    Raises
    ------
    FileNotFoundError
        `path` does not exist.

    Notes
    -----
    In any table this checks `meta.json`, `history.json`, the control page, and the sizes and headers of all files; that
    blocks never written hold only zeros; that weights and optimiser state of the other blocks are finite, sums of
    squares are not negative, and no row has paid more weight decay than was applied. In a snapshot it checks every
    byte by checksums; blocks written after it was opened for writing are checked as in any table. Values confirmed by
    a checksum may be arbitrary. A row with state but without weights is not a problem: a process killed in the row's
    first update leaves it so.

    Written blocks are read once, 8 MiB at a time; holes cost nothing. The call may run at the same time as writers: a
    block that changes while it is being checked is not reported.

    Examples
    --------
    >>> import tempfile, hashemb
    >>> path = tempfile.mkdtemp() + "/ads.emb"
    >>> hashemb.create(path, num_embeddings=64, embedding_dim=16).close()
    >>> hashemb.verify(path)
    []
    >>> with open(path + "/weight.npy", "ab") as file:
    ...     _ = file.write(b"more")
    >>> [(problem.expected, problem.found) for problem in hashemb.verify(path)]
    [('8192 bytes', '8196 bytes')]
    """
    path = path_string(path)
    if not os.path.lexists(path):
        raise FileNotFoundError(errno.ENOENT, "nothing is at this path", path)
    if not os.path.isdir(path):
        return _verify_file(path, progress)
    check = Check(path)
    check.run(progress)
    if check.report.problems() and check.opened_meanwhile():
        check = Check(path)  # a writer has opened the snapshot meanwhile, so the rules of a table apply
        check.run(progress)
    if suspects and check.meta is not None:
        _name_suspects(check, check.meta)
    return check.report.problems()


def _name_suspects(check: Check, meta: TableMeta) -> None:
    with _directory.table_directory(check.path) as directory:
        rows = abandoned_rows(directory, meta.num_embeddings).tolist()
    kind = "rows written whole"
    check.report.add_many(
        SEATS_FILE, kind, len(rows), ((kind, f"row {row}, which a killed process was writing") for row in rows)
    )


def _verify_file(path: str, progress: Progress | None) -> list[Problem]:
    if not os.path.isfile(path):
        return [Problem(path, "a directory that holds a table, or a delta file", "neither")]
    report = Report(os.path.dirname(path))
    try:
        messages = check_delta(path, progress)
    except OSError as error:
        messages = [f"a file that cannot be read: {error}"]
    for message in messages:
        report.add_message(os.path.basename(path), message, "a delta in order")
    return report.problems()


class Check:
    """The check of one directory.

    Parameters
    ----------
    path : str
    as_taken : bool
        Whether a snapshot that has been opened for writing must still be as it was taken.

    Attributes
    ----------
    report : Report
    meta : TableMeta or None
    page : record or None
        The control page.
    info : SnapshotInfo or None
    history : History or None
        These are None if they cannot be read or do not exist.
    """

    def __init__(self, path: str, *, as_taken: bool = False) -> None:
        self.path, self.report = path, Report(path)
        self.meta: TableMeta | None = self._read("meta.json", _directory.read_meta)
        self.history: History | None = self._read("history.json", _directory.read_history, optional=True)
        self.info: SnapshotInfo | None = self._read("snapshot.json", _directory.read_snapshot_info, optional=True)
        self.page = self._read("control", lambda path: _directory.read_control(path, self.meta))
        self.was_taken = self.info is not None and (as_taken or self.page is None or not self.page["opened"])

    def run(self, progress: Progress | None = None, *, arrays_in: str | None = None, sink: Sink | None = None) -> None:
        """Check everything; if `arrays_in` is given, read the arrays' content from that directory."""
        self._check_lock()
        if self.page is not None:
            self._check_page(self.page)
            self._check_origin(self.page)
        if self.history is not None:
            self._check_history(self.history)
        if self.meta is not None:
            self._check_arrays(self.meta, arrays_in or self.path, sink, progress)

    def opened_meanwhile(self) -> bool:
        """Return whether a snapshot has been opened for writing since the check began."""
        if not self.was_taken or self.page is None:
            return False
        now = self._raw_page()
        return now is not None and now["opened"] != self.page["opened"]

    # -- small files --

    def _read(self, name: str, read: Callable[[str], T], *, optional: bool = False) -> T | None:
        if not self._is_file(name, optional=optional):
            return None
        try:
            return read(self.path)
        except (HashembError, OSError) as error:
            self.report.add_error(name, error)
            return None

    def _is_file(self, name: str, *, optional: bool = False) -> bool:
        try:
            mode = os.stat(os.path.join(self.path, name)).st_mode
        except FileNotFoundError:
            if not optional:
                self.report.add(name, "a file", "none")
            return False
        except OSError as error:
            self.report.add_error(name, error)
            return False
        if not stat.S_ISREG(mode):
            self.report.add(name, "a file", stat.filemode(mode))
        return stat.S_ISREG(mode)

    def _check_lock(self) -> None:
        if self._is_file("lock"):
            size = os.stat(os.path.join(self.path, "lock")).st_size
            self._expect("lock", size == 0, "0 bytes", f"{size}")

    def _expect(self, name: str, is_so: Any, expected: str, found: str) -> None:
        if not is_so:
            self.report.add(name, expected, found)

    def _same(self, what: str, expected: Any, found: Any) -> None:
        self._expect("control", expected == found, f"{what} {expected!r}", f"{found!r}")

    # -- the control page, and the other files as it describes them --

    def _raw_page(self) -> Any:
        try:
            data = _directory.read_file(os.path.join(self.path, "control"), CONTROL_BYTES)
        except OSError:
            return None
        return np.frombuffer(data, CONTROL_DTYPE)[0] if len(data) == CONTROL_BYTES else None

    def _limits(self) -> Limits:
        page = self._raw_page() if self.page is not None else None
        if page is None or (not self.was_taken and not self._is_up_to_date(page)):
            return Limits(all_marked=self.was_taken)
        half_applied = self.history is not None and self.history.applying  # a delta's rows are written before the page
        return Limits(int(page["epoch"]), -np.inf if half_applied else float(page["decay_total"]), all_marked=True)

    def _check_page(self, page: Any) -> None:
        """Check what `read_control` does not; this is useful where no checksum covers the page."""
        between = bytearray(_directory.read_file(os.path.join(self.path, "control"), CONTROL_BYTES))
        for name in CONTROL_DTYPE.names or ():
            offset = CONTROL_DTYPE.fields[name][1]  # type: ignore[index]
            between[offset : offset + CONTROL_DTYPE[name].itemsize] = bytes(CONTROL_DTYPE[name].itemsize)
        others = len(between) - between.count(0)
        self._expect("control", not others, "zeros between its fields", f"{others} other bytes")
        boot_id = page["boot_id"]
        self._expect("control", _BOOT_ID.fullmatch(boot_id), "the id of a boot", repr(boot_id))

    def _check_origin(self, page: Any) -> None:
        """Check that the page belongs to this table, as files from other tables may have valid checksums."""
        table, snapshot = page_id(page["table"]), page_id(page["snapshot"])
        if self.meta is not None and table:
            self._same("the page of table", self.meta.id, table)
        if self.info is not None:
            self._same("the page of snapshot", self.info.id, snapshot)
            self._check_point(page, self.info)
        elif snapshot and not os.path.lexists(os.path.join(self.path, "snapshot.json")):
            self.report.add("snapshot.json", f"a file of snapshot {snapshot}", "none")

    def _check_point(self, page: Any, info: SnapshotInfo) -> None:
        if not self.was_taken:
            self._expect("control", page["step"] >= info.step, f"step {info.step} or more", f"{page['step']}")
            self._expect("control", page["epoch"] > info.epoch, f"an epoch above {info.epoch}", f"{page['epoch']}")
            return
        self._same("step", info.step, int(page["step"]))
        self._same("epoch", info.epoch + 1, int(page["epoch"]))
        self._same("rows_touched", info.rows_touched, int(page["rows_touched"]))
        self._same("lr", info.lr, float(page["lr"]))
        self._same("decay_total", info.decay_total, float(page["decay_total"]))
        if not page["opened"]:
            self._expect("control", page["clean"] and page["checksum"], "a check sum, as nobody has opened it", "none")

    def _check_history(self, history: History) -> None:
        points, name = history.points, "history.json"
        if self.meta is not None and history.table:
            own, found = self.meta.id, history.table
            self._expect(name, own == found, f"the history of table {own}", f"that of {found}")
        page = self._raw_page() if self.page is not None else None
        if points and page is not None and self._is_up_to_date(page):
            epoch = int(page["epoch"])
            self._expect(name, points[-1].epoch < epoch, f"points before epoch {epoch}", f"{points[-1]}")
        if self.info is not None:
            self._check_own_point(history, self.info)

    def _is_up_to_date(self, page: Any) -> bool:
        """Return False after the machine restarted with a writer at work, until the next writer repairs the page."""
        return bool(page["clean"]) or page["boot_id"].decode("ascii", "replace") == _directory.boot_id()

    def _check_own_point(self, history: History, info: SnapshotInfo) -> None:
        found = history.last if self.was_taken else history.find(info.id)
        gone = not self.was_taken and found is None and len(history.points) == MAX_POINTS
        self._expect("history.json", found == info.point or gone, f"{info.point}", f"{found}")

    # -- arrays --

    def _check_arrays(self, meta: TableMeta, directory: str, sink: Sink | None, progress: Progress | None) -> None:
        specs = dict(meta.files)
        if self.info is not None:
            specs["checksums"] = _blocks.checksum_spec(meta)
        names = [name for name, spec in specs.items() if self._is_array(name, spec)]
        if self.was_taken and self.history is None and not os.path.lexists(os.path.join(self.path, "history.json")):
            self.report.add("history.json", "a file, as in every snapshot", "none")
        if "blocks" not in names:
            return
        covered = None
        if self.info is not None and "checksums" in names:
            covered = Covered(None if self.was_taken else self.info.epoch)
        scan = Scan(directory, meta, names, self.report, self._limits, covered=covered, sink=sink)
        try:
            scan.run(progress)
        except UnreadableError as unreadable:
            self.report.add_error(f"{unreadable.name}.npy", unreadable.error)
            return
        if self.was_taken and self.info is not None and covered:
            self._check_content(self.info, scan)

    def _is_array(self, name: str, spec: FileSpec) -> bool:
        """Return whether the file can be read as an array, i.e. has the right size. A bad header is only reported."""
        filename = f"{name}.npy"
        if not self._is_file(filename):
            return False
        full = os.path.join(self.path, filename)
        try:
            size, header = os.stat(full).st_size, _directory.read_file(full, DATA_OFFSET_BYTES)
            self._expect(filename, size == spec.file_bytes, f"{spec.file_bytes} bytes", f"{size} bytes")
            if size >= DATA_OFFSET_BYTES:
                check_npy_header(header, spec, full)
        except (OSError, CorruptTableError) as error:
            self.report.add_error(filename, error)
            return isinstance(error, CorruptTableError) and size == spec.file_bytes
        return size == spec.file_bytes

    def _check_content(self, info: SnapshotInfo, scan: Scan) -> None:
        wanted, found = info.content_hash, scan.content_hash
        self._expect("checksums.npy", found == wanted, f"with blocks.npy the content hash {wanted}", found)
        num_blocks = scan.num_blocks
        self._expect("blocks.npy", num_blocks == info.num_blocks, f"{info.num_blocks} blocks", f"{num_blocks}")
