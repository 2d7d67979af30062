"""New directories: made beside the place where they will be, and put there in one step, durably, or not at all."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

from hashemb import _core
from hashemb._files.directory import Directory, boot_id, read_control, read_meta, space_errors, table_directory
from hashemb._files.format import FileSpec, TableMeta, encode_control, encode_meta, encode_npy_header
from hashemb._files.locks import Lock
from hashemb.errors import HashembError

ABANDONED_S = 10.0  # older than any directory that its maker has not locked yet

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_FICLONE = 0x40049409  # the same on x86-64 and aarch64
_libc = ctypes.CDLL(None, use_errno=True)


def sync_directory(path: str) -> None:
    with Directory(path) as directory:
        directory.sync()


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
def new_directory(path: str, *, aside: str | None = None) -> Iterator[Directory]:
    """A directory to fill, beside `path`: renamed to it at the end, durably; removed if anything fails.

    `FileExistsError` if there is something at `path`, unless it may be moved to `aside`; `FileNotFoundError` if its
    parent does not exist.
    """
    parent = check_free(path, aside)
    with building_directory(path) as building:
        yield building
        building.sync()
        if aside is None:
            _rename_to_free(building.path, path)
        else:
            take_place(building.path, path, aside)
        try:
            sync_directory(parent)
        except BaseException:
            with suppress(OSError):
                if aside is None:
                    os.rename(path, building.path)  # to be removed there: from `path` it goes in one step
                else:
                    give_place_back(building.path, path, aside)
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
def building_directory(path: str) -> Iterator[Directory]:
    """An empty directory beside `path`, to make in it what will stand there; what is left of it at the end is removed.

    Its maker holds a lock on it, which goes with the maker: what others were killed at is removed by the next.
    """
    remove_abandoned(*_hidden(path))
    with space_errors(path):
        building = _make_hidden(path)
    try:
        with Directory(building) as directory:
            fcntl.flock(directory.fd, fcntl.LOCK_EX)
            yield directory
    finally:
        remove_directory(building)


def _hidden(path: str) -> tuple[str, str]:
    """What is made, or removed, for `path`: the directory that it lies in, and how its name begins."""
    return os.path.dirname(os.path.abspath(path)), f".{os.path.basename(path)}."


def _make_hidden(path: str) -> str:
    """With the rights that the kernel gives new directories: to ask for the umask is to change it for all threads."""
    parent, prefix = _hidden(path)
    while True:
        name = os.path.join(parent, f"{prefix}{os.urandom(4).hex()}.tmp")
        with suppress(FileExistsError):
            os.mkdir(name, 0o777)
            return name


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
    with Directory(path) as directory, suppress(BlockingIOError):
        fcntl.flock(directory.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove_directory(path)


def remove_directory(path: str) -> None:
    """Removes a directory with all that is in it, as far as that is possible.

    Not by `shutil.rmtree`, which closes a descriptor twice where a signal's handler raises between the close and the
    note of it: by then the number may be that of another file.
    """
    with suppress(OSError), Directory(path) as directory:
        for entry in list(directory.entries()):
            with suppress(OSError):
                if entry.is_dir(follow_symlinks=False):  # a user's: the library makes none
                    shutil.rmtree(directory.filename(entry.name), ignore_errors=True)
                else:
                    directory.remove(entry.name)
        os.rmdir(path)


# ---- what is in them ----


def create_arrays(directory: Directory, files: dict[str, FileSpec]) -> None:
    """Array files that are holes behind their headers: O(1) in their size."""
    for name, spec in files.items():
        directory.create(f"{name}.npy", encode_npy_header(spec), spec.file_bytes)


def clone_files(source: Directory, target: Directory, filenames: Iterable[str]) -> bool:
    """Copies files that share their space until one of two is written; False, and none, where that is not possible."""
    made: list[str] = []
    try:
        for filename in filenames:
            _clone_file(source, target, filename, made)
    except OSError as error:
        for filename in made:
            target.remove(filename)
        if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM):
            return False
        raise
    return True


def _clone_file(source: Directory, target: Directory, filename: str, made: list[str]) -> None:
    with source.open(filename) as old, target.open(filename, os.O_RDWR | os.O_CREAT | os.O_EXCL) as new:
        made.append(filename)
        with space_errors(target.filename(filename)):
            fcntl.ioctl(new.fd, _FICLONE, old.fd)


def finish_table(building: Directory, meta: TableMeta, control: bytes) -> None:
    """What a table's directory holds beside its arrays."""
    building.create("control", control)
    building.create("lock", b"")
    building.create("meta.json", encode_meta(meta))


# ---- tables ----


def create_table(path: str, meta: TableMeta) -> None:
    """Makes the directory `path` in one step. O(1) in the size of the table."""
    with new_directory(path) as building:
        create_arrays(building, meta.files)
        finish_table(building, meta, encode_control(meta, boot_id()))


def take_table_back(path: str, meta: TableMeta) -> None:
    """Removes a table that `create_table` made for somebody who cannot use it. Never fails.

    It stays if another process has it open for writing, or has written to it; from `path` it goes in one step.
    """
    with suppress(OSError, HashembError), table_directory(path) as directory:
        lock = Lock(directory.open("lock", os.O_RDWR))
        try:
            alone = _core.lock(lock.fd, fcntl.F_WRLCK, _core.LOCK_WRITERS, False)
            page = read_control(directory)
            unused = (page["step"], page["epoch"], page["lr"]) == (0, 1, meta.optimizer.lr)
            if not alone or not unused or read_meta(directory).id != meta.id:
                return
            doomed = _make_hidden(path)
            try:
                os.rename(path, doomed)
            finally:
                remove_directory(doomed)
        finally:
            lock.close()  # who waits for it finds that the table is gone
