# What processes that share a table do to each other: pages, locks, the gate, and saving blocks for a snapshot.

def populate_blocks(cnp.ndarray array not None, cnp.ndarray blocks not None, int64_t block_bytes):
    """Makes the pages of `blocks` (ascending, of `block_bytes` each) of a mapped array writable without a fault.

    Returns 0 or an errno: EFAULT where a store would be a SIGBUS, EINVAL where the kernel cannot do it.
    """
    cdef char *base = <char *>cnp.PyArray_DATA(array)
    cdef const uint64_t *source = <const uint64_t *>data_of(blocks, cnp.NPY_UINT64, b"blocks")
    cdef int64_t n = cnp.PyArray_SIZE(blocks), total_bytes = array.nbytes
    cdef int error
    if n and <int64_t>source[n - 1] * block_bytes >= total_bytes:
        raise ValueError(f"block {source[n - 1]} of {block_bytes} bytes is outside the array's {total_bytes} bytes")
    with nogil:
        error = he_populate_blocks(base, source, n, block_bytes, total_bytes)
    return error


def read_units(int fd, cnp.ndarray units not None, int64_t offset, int64_t file_bytes, cnp.ndarray out not None):
    """Reads the bytes of units, ascending int64, of an array file into `out`, uint8 (n, bytes of a unit)."""
    cdef const int64_t *source = <const int64_t *>data_of(units, cnp.NPY_INT64, b"units")
    cdef char *target = <char *>data_of(out, cnp.NPY_UINT8, b"out")
    cdef int64_t n = cnp.PyArray_SIZE(units), size = 0 if n == 0 else cnp.PyArray_SIZE(out) // n
    cdef int error
    if cnp.PyArray_SIZE(out) != n * size or (n and not 0 <= source[0] <= source[n - 1] < file_bytes // size + 1):
        raise ValueError(f"{out.size} bytes are not those of {n} units of a file of {file_bytes} bytes")
    with nogil:
        error = he_read_units(fd, source, n, size, offset, file_bytes, target)
    raise_errno(error)


cdef int raise_errno(int error) except -1:
    if error:
        raise OSError(error, os.strerror(error))
    return 0


# ---- locks ----

LOCK_WRITERS, LOCK_GATE, LOCK_SNAPSHOT = HE_LOCK_WRITERS, HE_LOCK_GATE, HE_LOCK_SNAPSHOT
STRIPE_BLOCKS = HE_STRIPE_BLOCKS


def lock(int fd, int kind, int64_t place, bint wait):
    """Takes (`fcntl.F_RDLCK`, `F_WRLCK`) or gives up (`F_UNLCK`) a lock; False where another holds it and `wait` is not."""
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


def close_gate(cnp.ndarray control not None, int lock_fd):
    """Waits until no batch of any process is in flight, and keeps them out until `open_gate`."""
    cdef he_control *page = <he_control *>data_of(control, cnp.NPY_UINT8, b"control")
    cdef int error = EINTR
    while error == EINTR:
        with nogil:
            error = he_gate_close(page, lock_fd)
        if error == EINTR:
            PyErr_CheckSignals()
    raise_errno(error)


def open_gate(cnp.ndarray control not None, int lock_fd):
    he_gate_open(<he_control *>data_of(control, cnp.NPY_UINT8, b"control"), lock_fd)


# ---- saving blocks ----

cdef class Saving:
    """What a snapshot in progress wants saved, and where: see csrc/save.c.

    Parameters
    ----------
    files : list of (ndarray, int)
        The table's row arrays, and the files to copy their blocks to, open for writing; -1 for one who only logs rows.
    blocks, control : ndarray of uint32, of uint8
        The table's.
    bits : ndarray of uint64
        A bit per row, mapped from a file that all writers share.
    fds : tuple of int
        The target's blocks.npy (read and write), the file of `bits`, this process's log of rows, the table's lock.
    since, until : int
        Blocks of epochs above `since`, up to `until`, are wanted.
    data_offset : int
        Where arrays begin in the target's files.
    block_shift : int
        Binary logarithm of the rows in a block.
    """

    cdef he_saving saving
    cdef object arrays

    def __cinit__(self, list files, cnp.ndarray blocks not None, cnp.ndarray control not None,
                  cnp.ndarray bits not None, tuple fds, uint32_t since, uint32_t until, int64_t data_offset, int block_shift):
        cdef he_saving *s = &self.saving
        cdef int i
        cdef int64_t entry_bytes = 8
        cdef cnp.ndarray array
        if not 1 <= len(files) <= HE_MAX_FILES:
            raise ValueError(f"{len(files)} files, 1 to {HE_MAX_FILES} expected")
        self.arrays = (files, blocks, control, bits)
        s.control = <he_control *>data_of(control, cnp.NPY_UINT8, b"control")
        for i, (array, fd) in enumerate(files):
            s.data[i], s.row_bytes[i] = <const char *>cnp.PyArray_DATA(array), array.nbytes // len(array)
            s.target_fds[i] = fd
            entry_bytes += s.row_bytes[i]
        s.num_files, s.num_rows, s.block_shift = len(files), len(array), block_shift
        s.target_blocks_fd, s.bits_fd, s.log_fd, s.lock_fd = fds
        s.blocks, s.num_blocks = <const uint32_t *>data_of(blocks, cnp.NPY_UINT32, b"blocks"), blocks.size
        s.bits = <uint64_t *>data_of(bits, cnp.NPY_UINT64, b"bits")
        if bits.size * 64 < s.num_rows:
            raise ValueError(f"{bits.size} words of bits for {s.num_rows} rows")
        s.since, s.until, s.data_offset = since, until, data_offset
        s.buffer = <char *>malloc(HE_ROWS_PER_LOG * entry_bytes)
        if s.buffer == NULL:
            raise MemoryError()

    def __dealloc__(self):
        free(self.saving.buffer)

    def copy_stripes(self, int64_t begin, int64_t end):
        """Copies what is wanted of the blocks [begin * STRIPE_BLOCKS, end * STRIPE_BLOCKS); OSError if it cannot."""
        cdef int error
        if not 0 <= begin <= end <= (self.saving.num_blocks + HE_STRIPE_BLOCKS - 1) // HE_STRIPE_BLOCKS:
            raise ValueError(f"stripes {begin} to {end} of {self.saving.num_blocks} blocks")
        if self.saving.target_fds[0] < 0:
            raise ValueError("only who has the snapshot's files open can copy blocks to them")
        with nogil:
            error = he_copy_stripes(&self.saving, begin, end)
        raise_errno(error)


def mark_blocks(cnp.ndarray marks not None, cnp.ndarray blocks not None, uint32_t epoch, Saving saving=None):
    """Marks blocks (ascending, uint64) as of `epoch`, after their old epochs are saved if `saving` wants them.

    What could not be saved is marked all the same: the control page then says that the snapshot has failed.
    """
    cdef uint32_t *target = <uint32_t *>data_of(marks, cnp.NPY_UINT32, b"blocks")
    cdef const uint64_t *source = <const uint64_t *>data_of(blocks, cnp.NPY_UINT64, b"blocks")
    cdef const he_saving *s = NULL if saving is None else &saving.saving
    cdef int64_t n = cnp.PyArray_SIZE(blocks)
    if n and <int64_t>source[n - 1] >= cnp.PyArray_SIZE(marks):
        raise ValueError(f"block {source[n - 1]} of {marks.size}")
    with nogil:
        he_mark_blocks(s, target, source, n, epoch)
