"""Interaction of processes that share a table: locks, the gate, calls in progress, and saving blocks for a snapshot.

The wrappers handle numbers, arrays and open files, never paths. What the core needs of this module, it cimports.
"""

import os

from hashemb.errors import ClosedTableError, HashembError, TableBusyError

cimport numpy as cnp
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EAGAIN, EINTR, ERANGE
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from posix.fcntl cimport F_UNLCK, F_WRLCK
from posix.unistd cimport usleep

from hashemb._runtime cimport data_of

cdef extern from "pythread.h" nogil:
    unsigned long PyThread_get_thread_ident()

cdef extern from "sharing.h" nogil:
    enum: HE_MAX_FILES
    enum: HE_STRIPE_BLOCKS
    enum: HE_ROWS_PER_LOG
    int64_t HE_LOCK_WRITERS, HE_LOCK_SNAPSHOT, HE_LOCK_SEATS
    const he_sharing he_process_sharing
    void he_batches_init(he_batches *b) noexcept
    void he_batches_after_fork(he_batches *b) noexcept
    int he_batches_enter(he_batches *b) noexcept
    void he_batches_leave(he_batches *b) noexcept
    int he_batches_dirty(const he_batches *b) noexcept
    void he_batches_set_dirty(he_batches *b, int value) noexcept
    int he_lock(int fd, int kind, int64_t begin, int64_t length, int wait) noexcept
    int he_gate_close(he_control *c, int fd) noexcept
    void he_gate_open(he_control *c, int fd) noexcept
    int he_begin_point(he_control *c, int fd, char *page, int64_t page_bytes) noexcept
    int he_copy_stripes(const he_saving *s, int64_t begin, int64_t end) noexcept
    int he_read_units(int fd, const int64_t *units, int64_t n, int64_t size, int64_t offset, int64_t file_bytes,
                      char *out) noexcept

cnp.import_array()


cdef const he_sharing *process_sharing() noexcept:
    return &he_process_sharing


cdef int raise_errno(int error) except -1:
    if error:
        raise OSError(error, os.strerror(error))
    return 0


# ---- locks ----

LOCK_WRITERS, LOCK_GATE, LOCK_SNAPSHOT = HE_LOCK_WRITERS, HE_LOCK_GATE, HE_LOCK_SNAPSHOT
LOCK_SEATS = HE_LOCK_SEATS
STRIPE_BLOCKS = HE_STRIPE_BLOCKS


def lock(int fd, int kind, int64_t place, bint wait):
    """Take (`fcntl.F_RDLCK`, `F_WRLCK`) or release (`F_UNLCK`) a lock; return False if it is held and not `wait`."""
    cdef int error = EINTR
    while error == EINTR:
        with nogil:
            error = he_lock(fd, kind, place, 1, wait)
        if error == EINTR:
            PyErr_CheckSignals()
    if error == EAGAIN and not wait:
        return False
    raise_errno(error)
    return True


# Locks of tables that this process holds: (device and inode of the lock file, place) -> thread. If the same thread
# waited for one of them, in a signal handler or a callback, the wait would never end.
cdef dict HELD = {}


cdef unsigned long this_thread() noexcept:
    return <unsigned long>PyThread_get_thread_ident()


cdef class Calls:
    """The calls in progress on one open table: they decide whether a call may begin and when the table may be closed.

    Long calls, of many bytecodes, run inside ``with calls:``, which is entered and left atomically even if signals
    arrive. Batches are short: `Core.apply` excludes others with a mutex that is never held between bytecodes.

    Parameters
    ----------
    path : str
        Path of the table, for messages.
    identity : tuple
        Device and inode of the table's lock file.
    """

    def __cinit__(self, str path, tuple identity):
        he_batches_init(&self.batches)
        self.path, self.identity, self.threads = path, identity, []

    def after_fork(self):
        """Reset the state in a forked child, which has one thread."""
        HELD.clear()  # the locks are held by the parent
        he_batches_after_fork(&self.batches)
        self.threads = [thread for thread in self.threads if thread == this_thread()]
        if self.closer != this_thread():
            self.closer = 0

    cdef closed_error(self):
        return ClosedTableError(f"{self.path} has been closed")

    cdef int check_wait(self, place, str call) except -1:
        """Raise `TableBusyError` if this thread itself holds the lock that it would wait for."""
        if HELD.get((self.identity, place)) == this_thread():
            raise TableBusyError(
                f"{self.path}: {call}() was called by a signal handler or callback, in the middle of a call that has "
                "the table to itself: let that call return first")
        return 0

    def __enter__(self):
        self.check()
        self.threads.append(this_thread())
        return self

    def __exit__(self, *exc_info):
        self.threads.remove(this_thread())

    def check(self):
        """Raise `ClosedTableError` if the table has been closed or another thread waits to close it."""
        if self.closing or self.batches.closed:
            raise self.closed_error()

    cdef int end(self) except -1:
        """Let no call begin any more, tell long ones to stop, and wait for them."""
        self.closing = True
        try:
            while self.threads:
                with nogil:
                    usleep(WAIT_US)
                PyErr_CheckSignals()
            while he_batches_enter(&self.batches) == HE_AGAIN:
                PyErr_CheckSignals()
            self.batches.closed = True
            he_batches_leave(&self.batches)
        finally:
            self.closing = False
        return 0

    @property
    def closed(self):
        return self.batches.closed != 0

    @property
    def dirty(self):
        """Whether a batch has been applied since this was last set to False."""
        return he_batches_dirty(&self.batches) != 0

    @dirty.setter
    def dirty(self, bint value):
        he_batches_set_dirty(&self.batches, value)


cdef class Closing:
    """Ends the calls on a table and, in a ``with``, keeps other threads from closing it at the same time.

    A second ``with`` of the same thread, in a signal handler, is a `TableBusyError`; another thread waits, and may then
    repeat what the first one did.
    """

    cdef Calls calls

    def __cinit__(self, Calls calls not None):
        self.calls = calls

    def __enter__(self):
        cdef Calls calls = self.calls
        if calls.closer == this_thread() or this_thread() in calls.threads:
            raise TableBusyError(
                f"{calls.path}: close() was called by a signal handler or callback, in the middle of another call of "
                "the same thread: let that call return first")
        while calls.closer:
            with nogil:
                usleep(WAIT_US)
            PyErr_CheckSignals()
        calls.closer = this_thread()
        try:
            calls.end()
        except BaseException:
            calls.closer = 0
            raise

    def __exit__(self, *exc_info):
        self.calls.closer = 0


def wait_for_lock(int fd, int kind, int64_t place, Calls calls not None, str call):
    """Take a lock once it is free; raise `TableBusyError` if this thread has it, `ClosedTableError` on `close`."""
    cdef int error
    while True:
        error = he_lock(fd, kind, place, 1, 0)
        if error != EAGAIN and error != EINTR:
            raise_errno(error)
            return
        calls.check_wait(place, call)
        with nogil:
            usleep(WAIT_US)
        PyErr_CheckSignals()
        calls.check()


cdef class Hold:
    """Context manager that holds a place of a table's lock file; it is entered and left atomically if signals arrive.

    Parameters
    ----------
    lock : object
        Open lock file with an attribute `fd`; it is kept alive.
    calls : Calls
        Calls in progress on the table.
    place : int
        Byte of the lock file.
    call : str
        Name of the calling method, for messages.
    wait : bool
        Whether to wait for the lock; otherwise ``with`` yields False if it is not free.
    then : int
        State of the lock afterwards: `fcntl.F_UNLCK`, or F_RDLCK to keep it shared.
    """

    cdef readonly object lock
    cdef Calls calls
    cdef object place
    cdef str call
    cdef bint wait, is_held
    cdef int then

    def __cinit__(self, lock, Calls calls not None, place, str call, bint wait=True, int then=F_UNLCK):
        self.lock, self.calls, self.place, self.call = lock, calls, place, call
        self.wait, self.then = wait, then

    @property
    def fd(self):
        return self.lock.fd

    def __enter__(self):
        cdef int fd = self.fd
        if not self.wait:
            if not lock(fd, F_WRLCK, self.place, False):
                return False
        else:
            wait_for_lock(fd, F_WRLCK, self.place, self.calls, self.call)
        HELD[(self.calls.identity, self.place)] = this_thread()
        self.is_held = True
        return True

    def __exit__(self, *exc_info):
        if self.is_held:
            self.is_held = False
            HELD.pop((self.calls.identity, self.place), None)
            he_lock(self.fd, self.then, self.place, 1, 0)


cdef class ClosedGate:
    """Context manager that waits for batches in progress and keeps all others out; `fd` is a `Hold`'s lock file."""

    cdef object control
    cdef int fd
    cdef Calls calls

    def __cinit__(self, int fd, Calls calls not None, cnp.ndarray control not None):
        self.fd, self.calls, self.control = fd, calls, control

    def __enter__(self):
        cdef he_control *page = <he_control *>data_of(self.control, cnp.NPY_UINT8, "control")
        cdef int error = EINTR
        while error == EINTR:
            with nogil:
                error = he_gate_close(page, self.fd)
            if error == EINTR:
                PyErr_CheckSignals()
        raise_errno(error)
        HELD[(self.calls.identity, LOCK_GATE)] = this_thread()

    def __exit__(self, *exc_info):
        HELD.pop((self.calls.identity, LOCK_GATE), None)
        he_gate_open(<he_control *>data_of(self.control, cnp.NPY_UINT8, "control"), self.fd)


def begin_point(cnp.ndarray control not None, int lock_fd):
    """Begin a point in time, between batches: return the control page. Writers save rows up to its epoch from now on.

    Raise `HashembError` if all epochs have been used.
    """
    cdef he_control *page = <he_control *>data_of(control, cnp.NPY_UINT8, "control")
    cdef cnp.npy_intp size = cnp.PyArray_SIZE(control)
    cdef cnp.ndarray copy = cnp.PyArray_EMPTY(1, &size, cnp.NPY_UINT8, 0)
    cdef char *target = <char *>cnp.PyArray_DATA(copy)
    cdef int error = EINTR
    while error == EINTR:
        with nogil:
            error = he_begin_point(page, lock_fd, target, size)
        if error == EINTR:
            PyErr_CheckSignals()
    if error == ERANGE:
        raise HashembError(
            f"all {he_epoch(page)} epochs of the table are used up: no snapshot or delta of it can be taken any more; "
            "look-ups and updates still work")
    raise_errno(error)
    return copy.tobytes()


# ---- saving blocks ----

cdef class Saving:
    """Blocks and rows to save for a snapshot in progress, and the files to save them to: see csrc/save.c.

    Parameters
    ----------
    files : list of (ndarray, OpenFile or None)
        The table's row arrays with the writable files to copy their blocks to; None in a process that only logs rows.
    blocks, control : ndarray of uint32, of uint8
        The table's arrays.
    bits : ndarray of uint64
        One bit per row, mapped from a file that all writers share.
    others : tuple of OpenFile
        The target's blocks.npy (read and write), the file of `bits`, and this process's log of rows.
    lock : object
        The table's lock file, with an attribute `fd`.
    since, until : int
        Blocks with epochs above `since`, up to `until`, are saved.
    data_offset : int
        Offset of the array data in the target's files.
    block_shift : int
        Binary logarithm of the rows in a block.

    Notes
    -----
    It keeps the files open until no call uses it any more.
    """

    def __cinit__(self, list files, cnp.ndarray blocks not None, cnp.ndarray control not None,
                  cnp.ndarray bits not None, tuple others, lock, uint32_t since, uint32_t until, int64_t data_offset,
                  int block_shift):
        cdef he_saving *s = &self.saving
        cdef int i
        cdef int64_t entry_bytes = 8
        cdef cnp.ndarray array
        if not 1 <= len(files) <= HE_MAX_FILES:
            raise ValueError(f"{len(files)} files, 1 to {HE_MAX_FILES} expected")
        self.kept = (files, blocks, control, bits, others, lock)
        s.control = <he_control *>data_of(control, cnp.NPY_UINT8, "control")
        for i, (array, file) in enumerate(files):
            s.data[i], s.row_bytes[i] = <const char *>cnp.PyArray_DATA(array), array.nbytes // len(array)
            s.target_fds[i] = -1 if file is None else file.fd
            entry_bytes += s.row_bytes[i]
        s.num_files, s.num_rows, s.block_shift = len(files), len(array), block_shift
        s.target_blocks_fd, s.bits_fd, s.log_fd = [file.fd for file in others]
        s.lock_fd = lock.fd
        s.blocks, s.num_blocks = <const uint32_t *>data_of(blocks, cnp.NPY_UINT32, "blocks"), blocks.size
        s.bits = <uint64_t *>data_of(bits, cnp.NPY_UINT64, "bits")
        if bits.size * 64 < s.num_rows:
            raise ValueError(f"{bits.size} words of bits for {s.num_rows} rows")
        s.since, s.until, s.data_offset = since, until, data_offset
        s.buffer = <char *>malloc(HE_ROWS_PER_LOG * entry_bytes)
        if s.buffer == NULL:
            raise MemoryError()

    def __dealloc__(self):
        free(self.saving.buffer)

    def copy_stripes(self, int64_t begin, int64_t end):
        """Copy the blocks to save in [begin * STRIPE_BLOCKS, end * STRIPE_BLOCKS); raise OSError if it fails."""
        cdef int error
        if not 0 <= begin <= end <= (self.saving.num_blocks + HE_STRIPE_BLOCKS - 1) // HE_STRIPE_BLOCKS:
            raise ValueError(f"stripes {begin} to {end} of {self.saving.num_blocks} blocks")
        if self.saving.target_fds[0] < 0:
            raise ValueError("only who has the snapshot's files open can copy blocks to them")
        with nogil:
            error = he_copy_stripes(&self.saving, begin, end)
        raise_errno(error)


def read_units(int fd, cnp.ndarray units not None, int64_t offset, int64_t file_bytes, cnp.ndarray out not None):
    """Read the bytes of units, ascending int64, of an array file into `out`, uint8 (n, bytes of a unit)."""
    cdef const int64_t *source = <const int64_t *>data_of(units, cnp.NPY_INT64, "units")
    cdef char *target = <char *>data_of(out, cnp.NPY_UINT8, "out")
    cdef int64_t n = cnp.PyArray_SIZE(units), size = 0 if n == 0 else cnp.PyArray_SIZE(out) // n
    cdef int error
    if cnp.PyArray_SIZE(out) != n * size or (n and not 0 <= source[0] <= source[n - 1] < file_bytes // size + 1):
        raise ValueError(f"{out.size} bytes are not those of {n} units of a file of {file_bytes} bytes")
    with nogil:
        error = he_read_units(fd, source, n, size, offset, file_bytes, target)
    raise_errno(error)
