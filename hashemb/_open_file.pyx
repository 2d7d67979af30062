"""Open files that own their descriptors."""

import os

from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EBADF, EINTR, errno
from posix.fcntl cimport O_CLOEXEC
from posix.unistd cimport close

cdef extern from "<fcntl.h>" nogil:
    int AT_FDCWD
    int openat(int directory, const char *path, int flags, ...)


cdef class OpenFile:
    """An open file or directory. It is closed by `close`, by ``with``, or when it is no longer referenced.

    A signal handler may raise between any two steps of Python code, such as between `os.open` and the assignment of
    its result, which would lose the descriptor. Here one call opens the file and owns the descriptor.

    Parameters
    ----------
    path : str or PathLike
    flags, mode : int
        As in `os.open`; the file is always closed on exec.
    directory : OpenFile, optional
        Open directory to which a relative `path` refers. Default: the current directory.

    Attributes
    ----------
    fd : int
        File descriptor; -1 once it is closed.
    """

    cdef int one_more  # fd + 1, so that it is 0 (no file) when wrong argument types raise before __cinit__ runs

    def __cinit__(self, path, int flags=0, int mode=0o666, OpenFile directory=None):
        cdef bytes encoded = os.fsencode(path)
        cdef const char *name = encoded
        cdef int at = AT_FDCWD if directory is None else directory.one_more - 1
        cdef int error = EINTR
        if b"\0" in encoded:
            raise ValueError(f"{path!r}: a path cannot hold a null byte")
        if at == -1:
            raise OSError(EBADF, os.strerror(EBADF), path)
        while error == EINTR:
            with nogil:
                self.one_more = openat(at, name, flags | O_CLOEXEC, mode) + 1
                error = 0 if self.one_more else errno
            if error == EINTR:
                PyErr_CheckSignals()
        if error:
            raise OSError(error, os.strerror(error), path)

    def __dealloc__(self):
        if self.one_more:
            close(self.one_more - 1)

    @property
    def fd(self):
        return self.one_more - 1

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def close(self):
        """Close the file; closing it again has no effect. The descriptor is freed even if closing raises `OSError`."""
        cdef int fd = self.one_more - 1
        self.one_more = 0
        if fd >= 0 and close(fd) and errno != EINTR:
            raise OSError(errno, os.strerror(errno))
