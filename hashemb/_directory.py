"""A table at rest: the files of its directory read and written as a whole, never mapped.

Invariants: a directory or a small file appears complete, synced, or not at all; what is damaged is named, with what
was expected and what was found.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from hashemb._format import (
    CONTROL_BYTES,
    CONTROL_DTYPE,
    FileSpec,
    TableMeta,
    check_control,
    decode_meta,
    encode_control,
    encode_meta,
    encode_npy_header,
)
from hashemb.errors import CorruptTableError, FormatError, NoSpaceError
from hashemb.lineage import History, SnapshotInfo

ABANDONED_S = 10.0  # older than any directory that its maker has not locked yet
SMALL_FILE_BYTES = 1 << 21  # more than any of the JSON files can have

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_FICLONE = 0x40049409  # the same on x86-64 and aarch64
_libc = ctypes.CDLL(None, use_errno=True)


def boot_id() -> str:
    """Identifies the running kernel: pages written before it changed may not have reached the disk."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return "unknown"


@contextmanager
def space_errors(filename: str) -> Iterator[None]:
    """ENOSPC and EDQUOT as `NoSpaceError`, a file too large for the file system as a plain `OSError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(f"no space left on the file system: {error.strerror}", filename) from None
        raise


# ---- writing ----


def write_file(path: str, data: bytes, size_bytes: int | None = None, *, sync: bool = True) -> None:
    """Creates a file of `size_bytes` (default: of the data) that begins with `data` and is otherwise a hole."""
    with space_errors(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            _resize(fd, path, len(data) if size_bytes is None else size_bytes)
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)


def _resize(fd: int, path: str, size_bytes: int) -> None:
    try:
        os.ftruncate(fd, size_bytes)
    except OSError as error:
        if error.errno not in (errno.EFBIG, errno.EINVAL):
            raise
        message = f"this file system cannot hold a file of {size_bytes} bytes ({error.strerror})"
        raise OSError(error.errno, message, path) from None


def replace_file(path: str, data: bytes) -> None:
    """Puts a small file in the place of another in one step, durably."""
    temporary = f"{path}.{os.getpid()}.tmp"
    remove_if_there(temporary)  # of a process of the same number that was killed, or could not remove it
    try:
        write_file(temporary, data)
        os.rename(temporary, path)
    except BaseException:
        remove_if_there(temporary)
        raise
    sync_directory(os.path.dirname(path))


def remove_leftovers(path: str, *names: str) -> None:
    """Removes these files of a table, and what others were killed at while they replaced one. Alone with the table."""
    for entry in os.scandir(path):
        if entry.is_file(follow_symlinks=False) and (entry.name in names or entry.name.endswith(".tmp")):
            remove_if_there(entry.path)


def remove_if_there(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


def sync_file(path: str) -> None:
    with space_errors(path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def check_free(path: str, aside: str | None = None) -> str:
    """The directory that something new at `path` will be in; `FileExistsError`, `FileNotFoundError` if it cannot.

    What is at `path` is in nobody's way if it may be moved to `aside`.
    """
    parent = os.path.dirname(os.path.abspath(path))
    if aside is None and os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, "there is already something at this path", path)
    if not os.path.isdir(parent):
        raise FileNotFoundError(errno.ENOENT, "the directory to create it in does not exist", parent)
    return parent


@contextmanager
def new_directory(path: str, *, aside: str | None = None) -> Iterator[str]:
    """A directory to fill, beside `path`: renamed to it at the end, durably; removed if anything fails.

    `FileExistsError` if there is something at `path`, unless it may be moved to `aside`; `FileNotFoundError` if its
    parent does not exist.
    """
    parent = check_free(path, aside)
    with building_directory(path) as building:
        yield building
        sync_directory(building)
        if aside is None:
            _rename_to_free(building, path)
        else:
            take_place(building, path, aside)
        try:
            sync_directory(parent)
        except BaseException:
            with suppress(OSError):
                if aside is None:
                    os.rename(path, building)  # to be removed there: from `path` it goes in one step
                else:
                    give_place_back(building, path, aside)
            raise


def _rename_to_free(directory: str, path: str) -> None:
    """Somebody may have made something at `path` since it was free; if so, `FileExistsError`."""
    try:
        os.rename(directory, path)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.ENOTDIR):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path) from None
        raise


@contextmanager
def building_directory(path: str) -> Iterator[str]:
    """An empty directory beside `path`, to make in it what will stand there; what is left of it at the end is removed.

    Its maker holds a lock on it, which goes with the maker: what others were killed at is removed by the next.
    """
    parent, prefix = os.path.dirname(os.path.abspath(path)), f".{os.path.basename(path)}."
    remove_abandoned(parent, prefix)
    with space_errors(path):
        building = tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=parent)
    try:
        with _locked_directory(building):
            os.chmod(building, 0o777 & ~_umask())
            yield building
    finally:
        shutil.rmtree(building, ignore_errors=True)


@contextmanager
def _locked_directory(path: str) -> Iterator[None]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def take_place(new: str, path: str, aside: str) -> None:
    """Puts `new` at `path`, and what was there at `aside`: all beside each other.

    In one step where the file system can exchange two names: then `new` waits at `aside` for it, so that a kill never
    leaves what was at `path` under a name that looks temporary. Elsewhere nothing is at `path` for a moment.
    """
    os.rename(new, aside)
    try:
        exchange(aside, path)
    except OSError as error:
        os.rename(aside, new)
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        os.rename(path, aside)
        try:
            os.rename(new, path)
        except OSError:
            os.rename(aside, path)
            raise


def give_place_back(new: str, path: str, aside: str) -> None:
    """The inverse of `take_place`, in steps of which each leaves a table at `path` where names can be exchanged."""
    try:
        exchange(aside, path)
        os.rename(aside, new)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        os.rename(path, new)
        os.rename(aside, path)


def exchange(one: str, other: str) -> None:
    """Swaps two names of a file system in one step; `OSError` with EINVAL or ENOSYS where it cannot."""
    if not hasattr(_libc, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), one)
    if _libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), one)


def remove_abandoned(parent: str, prefix: str) -> None:
    """Removes directories begun by `new_directory` in processes that are dead: nobody holds a lock on them."""
    with suppress(OSError):  # a courtesy: what is in the way of it is in nobody's way
        for entry in os.scandir(parent):
            is_ours = entry.name.startswith(prefix) and entry.name.endswith(".tmp")
            if is_ours and entry.is_dir(follow_symlinks=False) and time.time() - entry.stat().st_mtime > ABANDONED_S:
                _remove_if_unlocked(entry.path)


def _remove_if_unlocked(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(fd)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def create_arrays(directory: str, files: dict[str, FileSpec]) -> None:
    """Array files that are holes behind their headers: O(1) in their size."""
    for name, spec in files.items():
        write_file(os.path.join(directory, f"{name}.npy"), encode_npy_header(spec), spec.file_bytes)


def clone_files(source: str, target: str, filenames: Iterable[str]) -> bool:
    """Copies files that share their space until one of two is written; False, and none, where that is not possible."""
    made: list[str] = []
    try:
        for filename in filenames:
            _clone_file(os.path.join(source, filename), os.path.join(target, filename), made)
    except OSError as error:
        for path in made:
            remove_if_there(path)
        if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM):
            return False
        raise
    return True


def _clone_file(source: str, target: str, made: list[str]) -> None:
    old = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        new = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        made.append(target)
        try:
            with space_errors(target):
                fcntl.ioctl(new, _FICLONE, old)
        finally:
            os.close(new)
    finally:
        os.close(old)


def create_table(path: str, meta: TableMeta) -> None:
    """Makes the directory `path` in one step. O(1) in the size of the table."""
    with new_directory(path) as building:
        create_arrays(building, meta.files)
        finish_table(building, meta, encode_control(meta, boot_id()))


def finish_table(building: str, meta: TableMeta, control: bytes) -> None:
    """What a table's directory holds beside its arrays."""
    write_file(os.path.join(building, "control"), control)
    write_file(os.path.join(building, "lock"), b"")
    write_file(os.path.join(building, "meta.json"), encode_meta(meta))


# ---- reading ----


def read_file(path: str, limit_bytes: int = SMALL_FILE_BYTES) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(fd, limit_bytes, 0)
    finally:
        os.close(fd)


def read_meta(path: str) -> TableMeta:
    """The table's metadata; `FileNotFoundError`, `FormatError` or `CorruptTableError` if there is none."""
    if not os.path.lexists(path):
        raise FileNotFoundError(errno.ENOENT, "no table at this path", path)
    filename = os.path.join(path, "meta.json")
    try:
        data = read_file(filename)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise FormatError(f"{path}: not a hashemb table: it holds no file meta.json") from None
    return decode_meta(data, filename)


def read_control(path: str) -> Any:
    """A copy of the control page, as a record with the fields of `_format.CONTROL_DTYPE`."""
    filename = os.path.join(path, "control")
    for attempt in range(3):
        try:
            data = read_file(filename, CONTROL_BYTES + 1)
        except FileNotFoundError:
            raise CorruptTableError(f"{filename}: expected {CONTROL_BYTES} bytes, found no file") from None
        try:
            check_control(data, filename)
            break
        except CorruptTableError:  # or read while a writer came or went
            if attempt == 2:
                raise
    return np.frombuffer(data, CONTROL_DTYPE)[0]


def read_history(path: str) -> History:
    """The points in the table's past; none where nothing has been taken of it yet."""
    filename = os.path.join(path, "history.json")
    try:
        return History.decode(read_file(filename), filename)
    except FileNotFoundError:
        return History()


def write_history(path: str, history: History) -> None:
    replace_file(os.path.join(path, "history.json"), history.of(read_meta(path).id).encode())


def read_snapshot_info(path: str) -> SnapshotInfo | None:
    """What was said of the table when it was made as a snapshot; None if it was not."""
    filename = os.path.join(path, "snapshot.json")
    try:
        return SnapshotInfo.decode(read_file(filename), filename)
    except FileNotFoundError:
        return None


def disk_bytes(path: str) -> int:
    """Bytes that the table's files take up on disk (holes take none)."""
    total = 0
    for entry in os.scandir(path):
        with suppress(FileNotFoundError):  # a snapshot's announcement comes and goes
            total += entry.stat().st_blocks * 512 if entry.is_file() else 0
    return total


def data_extents(fd: int, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """The ranges of bytes of [begin, end) that are not holes, ascending."""
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
