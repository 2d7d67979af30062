"""A table at rest: its directory is held open, and the files in it are read and written as a whole, never mapped.

Invariants: files are accessed in the directory that was opened, even if its path leads elsewhere by now; only regular
files are opened, without waiting; a small file appears complete and synced, or not at all; errors name the damaged
file, what was expected and what was found.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from hashemb._files.format import CONTROL_BYTES, CONTROL_DTYPE, SMALL_FILE_BYTES, TableMeta, check_control, decode_meta
from hashemb._files.lineage import History, SnapshotInfo
from hashemb._open_file import OpenFile
from hashemb.errors import CorruptTableError, FormatError, NoSpaceError, ReadOnlyTableError

HISTORY_FILE = "history.json"

_AT_ONCE = os.O_NONBLOCK | os.O_NOCTTY  # opening a FIFO would wait for a process at its other end
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a symbolic link that leads nowhere",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def boot_id() -> str:
    """Return the id of this boot of the machine: pages written in another may not have reached the disk."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return "unknown"


@contextmanager
def space_errors(filename: str) -> Iterator[None]:
    """Raise ENOSPC and EDQUOT as `NoSpaceError`; a file too large for the file system stays a plain `OSError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(f"no space left on the file system: {error.strerror}", filename) from None
        raise


# ---- opening ----


def open_regular(path: str, flags: int = os.O_RDONLY, *, directory: Directory | None = None) -> OpenFile:
    """Open a file, relative to `directory` if given, without ever waiting. Every existing file is opened by this.

    Anything but a regular file raises `CorruptTableError`, which names its type. A symbolic link is followed for
    reading, as model caches consist of links; for writing it raises `ReadOnlyTableError`, as others may rely on its
    target.
    """
    filename, place = (os.path.join(directory.path, path), directory.file) if directory else (path, None)
    writes = flags & os.O_ACCMODE != os.O_RDONLY
    try:
        file = OpenFile(path, flags | _AT_ONCE | (os.O_NOFOLLOW if writes else 0), directory=place)
    except OSError as error:
        if writes and error.errno == errno.ELOOP:
            raise ReadOnlyTableError(
                f"{filename}: is a symbolic link, and what it leads to is not opened for writing: "
                'open the table with mode="r", or copy it with its files in the place of the links'
            ) from None
        if error.errno in (errno.ENXIO, errno.ENODEV, errno.EISDIR, errno.ELOOP):
            dir_fd = place.fd if place else None
            found = os.stat(path, dir_fd=dir_fd, follow_symlinks=error.errno != errno.ELOOP)
            raise _not_regular(filename, found) from None
        error.filename = filename
        raise
    found = os.fstat(file.fd)
    if not stat.S_ISREG(found.st_mode):
        raise _not_regular(filename, found)
    return file


def _not_regular(filename: str, found: os.stat_result) -> CorruptTableError:
    kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
    return CorruptTableError(f"{filename}: expected a regular file, found {kind}")


class Directory:
    """Context manager of an open directory. Its own files remain accessible when it is moved or replaced at its path.

    `path` is where it was when it was opened, for messages.
    """

    def __init__(self, path: str) -> None:
        self.path, self.file = path, OpenFile(path, os.O_DIRECTORY)

    @property
    def fd(self) -> int:
        return self.file.fd

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> Directory:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def filename(self, name: str) -> str:
        """Return the path of a file, for messages."""
        return os.path.join(self.path, name)

    def identity(self) -> list[int]:
        """Return the device and inode numbers, which identify the directory on this machine."""
        found = os.fstat(self.fd)
        return [found.st_dev, found.st_ino]

    # -- its files --

    def open(self, name: str, flags: int = os.O_RDONLY) -> OpenFile:
        """Open a file of the directory; see `open_regular`."""
        return open_regular(name, flags, directory=self)

    def read(self, name: str, limit_bytes: int = SMALL_FILE_BYTES) -> bytes:
        with self.open(name) as file:
            return os.pread(file.fd, limit_bytes, 0)

    def exists(self, name: str) -> bool:
        try:
            os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def entries(self) -> Iterator[os.DirEntry[str]]:
        """Yield the entries, from a new descriptor: threads and forked children share the read position of `fd`."""
        with OpenFile(".", os.O_DIRECTORY, directory=self.file) as file, os.scandir(file.fd) as found:
            yield from found

    def create(self, name: str, data: bytes, size_bytes: int | None = None, *, sync: bool = True) -> None:
        """Create a file of `size_bytes` (default: the data's size) that begins with `data` and is otherwise a hole."""
        with space_errors(self.filename(name)), self.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL) as file:
            _resize(file.fd, self.filename(name), len(data) if size_bytes is None else size_bytes)
            view = memoryview(data)
            while view:
                view = view[os.write(file.fd, view) :]
            if sync:
                os.fsync(file.fd)

    def replace(self, name: str, data: bytes) -> None:
        """Replace a small file in one durable step."""
        temporary = _temporary_name(name)
        self.remove(temporary)  # left by a process with the same id that was killed or could not remove it
        try:
            self.create(temporary, data)
            os.rename(temporary, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        except BaseException:
            self.remove(temporary)
            raise
        os.fsync(self.fd)

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.fd)

    def sync(self, name: str | None = None) -> None:
        """Make a file durable, or without `name` the directory's entries."""
        with space_errors(self.path if name is None else self.filename(name)):
            if name is None:
                os.fsync(self.fd)
                return
            with self.open(name) as file:
                os.fsync(file.fd)


def _resize(fd: int, path: str, size_bytes: int) -> None:
    try:
        os.ftruncate(fd, size_bytes)
    except OSError as error:
        if error.errno not in (errno.EFBIG, errno.EINVAL):
            raise
        message = f"this file system cannot hold a file of {size_bytes} bytes ({error.strerror})"
        raise OSError(error.errno, message, path) from None


def _temporary_name(name: str) -> str:
    return f"{name}.{os.getpid()}.tmp"


def _is_temporary(found: str, names: tuple[str, ...]) -> bool:
    """Return whether `found` is the `_temporary_name` of one of these names in any process."""
    parts = found.rsplit(".", 2)
    return len(parts) == 3 and parts[0] in names and parts[1].isdecimal() and parts[2] == "tmp"


def remove_leftovers(directory: Directory, *names: str) -> None:
    """Remove these files, and temporaries left by killed processes. The caller must be the only writer."""
    for entry in directory.entries():
        ours = entry.name in names or _is_temporary(entry.name, (HISTORY_FILE, *names))
        if ours and entry.is_file(follow_symlinks=False):
            directory.remove(entry.name)


def table_directory(path: str) -> Directory:
    """Open the directory of a table; raise `FileNotFoundError` or `FormatError` if it does not exist."""
    try:
        return Directory(path)
    except (FileNotFoundError, NotADirectoryError):
        if not os.path.lexists(path):
            raise FileNotFoundError(errno.ENOENT, "no table at this path", path) from None
        raise FormatError(f"{path}: not a hashemb table: it holds no file meta.json") from None


@contextmanager
def opened(place: str | Directory) -> Iterator[Directory]:
    """Yield a directory that is open already, or open the one at a path for the duration of the block."""
    if isinstance(place, Directory):
        yield place
        return
    with table_directory(place) as directory:
        yield directory


# ---- reading ----


def read_file(path: str, limit_bytes: int = SMALL_FILE_BYTES) -> bytes:
    with open_regular(path) as file:
        return os.pread(file.fd, limit_bytes, 0)


def read_meta(place: str | Directory) -> TableMeta:
    """Return the table's metadata, or raise `FileNotFoundError`, `FormatError` or `CorruptTableError`."""
    with opened(place) as directory:
        try:
            data = directory.read("meta.json")
        except FileNotFoundError:
            raise FormatError(f"{directory.path}: not a hashemb table: it holds no file meta.json") from None
        except CorruptTableError as error:
            message = f"{directory.path}: not a hashemb table: it holds no file meta.json; {error}"
            raise FormatError(message) from None
        return decode_meta(data, directory.filename("meta.json"))


def read_control(place: str | Directory, meta: TableMeta | None = None) -> Any:
    """Return a copy of the control page as a record of `_format.CONTROL_DTYPE`, checked against `meta` if given."""
    with opened(place) as directory:
        filename = directory.filename("control")
        for attempt in range(3):
            try:
                data = directory.read("control", CONTROL_BYTES + 1)
            except FileNotFoundError:
                raise CorruptTableError(f"{filename}: expected {CONTROL_BYTES} bytes, found no file") from None
            try:
                check_control(data, filename, meta)
                break
            except CorruptTableError:  # possibly read while a writer opened or closed the table
                if attempt == 2:
                    raise
    return np.frombuffer(data, CONTROL_DTYPE)[0]


def read_history(place: str | Directory, table: str = "") -> History:
    """Return the points in the table's past; an empty history if no point was taken yet.

    Raise `CorruptTableError` if the history belongs to a table with an id other than `table` ("" accepts any).
    """
    with opened(place) as directory:
        filename = directory.filename(HISTORY_FILE)
        try:
            history = History.decode(directory.read(HISTORY_FILE), filename)
        except FileNotFoundError:
            return History()
    if table and history.table not in ("", table):
        raise CorruptTableError(
            f"{filename}: expected the history of table {table}, found that of table {history.table}: remove the file; "
            "the next delta then begins with since=None or a new snapshot"
        )
    return history


def write_history(directory: Directory, history: History) -> None:
    directory.replace(HISTORY_FILE, history.of(read_meta(directory).id).encode())


def read_snapshot_info(place: str | Directory) -> SnapshotInfo | None:
    """Return the description of a snapshot, or None if the table was not made as one."""
    with opened(place) as directory:
        try:
            return SnapshotInfo.decode(directory.read("snapshot.json"), directory.filename("snapshot.json"))
        except FileNotFoundError:
            return None


def disk_bytes(place: str | Directory) -> int:
    """Return the bytes that the table's files take on disk (holes take none)."""
    total = 0
    with opened(place) as directory:
        for entry in directory.entries():
            with suppress(FileNotFoundError):  # files of a snapshot in progress come and go
                total += entry.stat().st_blocks * 512 if entry.is_file() else 0
    return total


def data_extents(fd: int, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges of bytes in [begin, end) that are not holes, ascending."""
    while begin < end:
        try:
            begin = os.lseek(fd, begin, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        stop = min(os.lseek(fd, begin, os.SEEK_HOLE), end)
        if begin < stop:
            yield begin, stop
        begin = stop
