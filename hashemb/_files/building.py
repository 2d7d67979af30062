"""New directories: they are built next to their destination and renamed to it in one durable step, or not at all."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

from hashemb import _sharing
from hashemb._files.directory import Directory, boot_id, read_control, read_meta, space_errors, table_directory
from hashemb._files.format import FileSpec, TableMeta, encode_control, encode_meta, encode_npy_header
from hashemb._files.locks import Lock
from hashemb.errors import HashembError

ABANDONED_S = 10.0  # older than any directory that its process has created but not locked yet

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_FICLONE = 0x40049409  # the same on x86-64 and aarch64
_libc = ctypes.CDLL(None, use_errno=True)


def sync_directory(path: str) -> None:
    with Directory(path) as directory:
        directory.sync()


def check_free(path: str, aside: str | None = None) -> str:
    """Return the parent of a new `path`; raise `FileExistsError` or `FileNotFoundError` if `path` cannot be created.

    With `aside`, `path` may exist, as it can be moved there.
    """
    parent = os.path.dirname(os.path.abspath(path))
    if aside is None and os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, "there is already something at this path", path)
    if not os.path.isdir(parent):
        raise FileNotFoundError(errno.ENOENT, "the directory to create it in does not exist", parent)
    return parent


@contextmanager
def new_directory(path: str, *, aside: str | None = None) -> Iterator[Directory]:
    """Yield a directory to fill next to `path`. It is durably renamed to `path` at the end, or removed on failure.

    `FileExistsError` is raised if `path` exists, unless it may be moved to `aside`; `FileNotFoundError` if its parent
    does not exist.
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
                    os.rename(path, building.path)  # removed under that name, so that `path` vanishes in one step
                else:
                    give_place_back(building.path, path, aside)
            raise


def _rename_to_free(directory: str, path: str) -> None:
    """Rename to a free `path`; raise `FileExistsError` if another process has created it meanwhile."""
    try:
        os.rename(directory, path)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.ENOTDIR):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path) from None
        raise


@contextmanager
def building_directory(path: str) -> Iterator[Directory]:
    """Yield an empty directory next to `path`, in which to build what will be at `path`; remove it at the end.

    The process holds a lock on it, which ends with the process: the directories of killed ones are removed by the next.
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
    """Return the parent and the name prefix of the building directories for `path`."""
    return os.path.dirname(os.path.abspath(path)), f".{os.path.basename(path)}."


def _make_hidden(path: str) -> str:
    """Create a building directory with the kernel's default mode: reading the umask changes it for all threads."""
    parent, prefix = _hidden(path)
    while True:
        name = os.path.join(parent, f"{prefix}{os.urandom(4).hex()}.tmp")
        with suppress(FileExistsError):
            os.mkdir(name, 0o777)
            return name


def take_place(new: str, path: str, aside: str) -> None:
    """Move `path` to `aside` and `new` to `path`; all three are in one directory.

    This is one step where the file system can exchange two names: `new` is first moved to `aside`, so that a kill never
    leaves the old `path` under a name that looks temporary. Elsewhere nothing is at `path` for a moment.
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
    """Undo `take_place`, in steps that each leave a table at `path` where names can be exchanged."""
    try:
        exchange(aside, path)
        os.rename(aside, new)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        os.rename(path, new)
        os.rename(aside, path)


def exchange(one: str, other: str) -> None:
    """Exchange two names of a file system in one step; raise `OSError` with EINVAL or ENOSYS where it cannot."""
    if not hasattr(_libc, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), one)
    if _libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), one)


def remove_abandoned(parent: str, prefix: str) -> None:
    """Remove building directories of killed processes: those that no process has locked."""
    with suppress(OSError):  # best effort: leftovers are harmless
        for entry in os.scandir(parent):
            is_ours = entry.name.startswith(prefix) and entry.name.endswith(".tmp")
            if is_ours and entry.is_dir(follow_symlinks=False) and time.time() - entry.stat().st_mtime > ABANDONED_S:
                _remove_if_unlocked(entry.path)


def _remove_if_unlocked(path: str) -> None:
    with Directory(path) as directory, suppress(BlockingIOError):
        fcntl.flock(directory.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove_directory(path)


def remove_directory(path: str) -> None:
    """Remove a directory and its content as far as possible.

    This avoids `shutil.rmtree`, which closes a descriptor twice if a signal handler raises after the close and before
    it is recorded: by then the number may belong to another file.
    """
    for _ in range(2):  # a call that fails only once leaves nothing behind
        with suppress(OSError), Directory(path) as directory:
            for entry in list(directory.entries()):
                with suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):  # the user's, as the library creates none
                        shutil.rmtree(directory.filename(entry.name), ignore_errors=True)
                    else:
                        directory.remove(entry.name)
            os.rmdir(path)


# ---- their content ----


def create_arrays(directory: Directory, files: dict[str, FileSpec]) -> None:
    """Create array files that are holes after their headers, in O(1) time and space whatever their size."""
    for name, spec in files.items():
        directory.create(f"{name}.npy", encode_npy_header(spec), spec.file_bytes)


def clone_files(source: Directory, target: Directory, filenames: Iterable[str]) -> bool:
    """Clone files, which share space until written; return False, without any copy, where that is not possible."""
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
    """Create the files of a table's directory other than its arrays."""
    building.create("control", control)
    building.create("lock", b"")
    building.create("meta.json", encode_meta(meta))


# ---- tables ----


def create_table(path: str, meta: TableMeta) -> None:
    """Create the directory `path` in one step, in O(1) time whatever the size of the table."""
    with new_directory(path) as building:
        create_arrays(building, meta.files)
        finish_table(building, meta, encode_control(meta, boot_id()))


def take_table_back(path: str, meta: TableMeta) -> None:
    """Remove a table that `create_table` created but the caller could not open. This never fails.

    The table is kept if another process has it open for writing or has written to it. It vanishes from `path` in one
    step.
    """
    with suppress(OSError, HashembError), table_directory(path) as directory:
        lock = Lock(directory.open("lock", os.O_RDWR))
        try:
            alone = _sharing.lock(lock.fd, fcntl.F_WRLCK, _sharing.LOCK_WRITERS, False)
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
            lock.close()  # a process that waits for it finds that the table is gone
