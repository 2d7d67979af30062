"""The compiled core: five-step wrappers (buffers, checks, one nogil call, exception, result) over csrc/.

It knows arrays, numbers and open files, never paths. Tables are here, what processes share is in _core_sharing.pxi, hashing
in _core_hashing.pxi. `table.py` has brought every argument to the dtype, shape and order named here; what is checked
again is what would otherwise read or write outside an array.
"""

import mmap
import os

import numpy as np

from hashemb.errors import NoSpaceError

cimport numpy as cnp
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EAGAIN, EFAULT, EINTR
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

cnp.import_array()

cdef object PAGE_BYTES = mmap.PAGESIZE
cdef object NO_BLOCKS = np.empty(0, np.uint64)


# ---- the table kernels ----

cdef void *data_of(cnp.ndarray array, int type_number, const char *name) except? NULL:
    if cnp.PyArray_TYPE(array) != type_number or not cnp.PyArray_IS_C_CONTIGUOUS(array):
        raise TypeError(f"{name.decode()}: expected a C-contiguous array of another dtype than {array.dtype}")
    return cnp.PyArray_DATA(array)


cdef class Core:
    """The kernels bound to the arrays of one table.

    Parameters
    ----------
    arrays : dict
        "weight" (num_embeddings, embedding_dim), "blocks" (num_blocks,), "control" (4096 bytes), "states": list
        of float32 arrays, "paid" or None. Read-only arrays do for every method but `plan` and `apply`.
    scalars : dict
        The fields of he_table by name (see csrc/table.h).

    Not thread-safe between `plan` and `apply`; look-ups may run at any time.
    """

    cdef he_table table
    cdef he_plan current
    cdef he_ahead ahead
    cdef he_control *control
    cdef object arrays
    cdef char *memory
    cdef int64_t memory_bytes

    def __cinit__(self, dict arrays, dict scalars):
        cdef he_table *t = &self.table
        cdef int i
        self.arrays = arrays
        memset(t, 0, sizeof(he_table))
        memset(&self.ahead, 0, sizeof(he_ahead))
        t.ahead = &self.ahead
        t.weight = <char *>cnp.PyArray_DATA(arrays["weight"])
        t.blocks = <uint32_t *>data_of(arrays["blocks"], cnp.NPY_UINT32, b"blocks")
        self.control = <he_control *>data_of(arrays["control"], cnp.NPY_UINT8, b"control")
        for i, state in enumerate(arrays["states"]):
            t.state[i] = <float *>data_of(state, cnp.NPY_FLOAT32, b"state")
        if arrays["paid"] is not None:
            t.paid = <double *>data_of(arrays["paid"], cnp.NPY_FLOAT64, b"paid")
        t.num_rows, t.dim = arrays["weight"].shape
        t.row_bytes = t.dim * arrays["weight"].itemsize
        t.dtype, t.optimizer, t.init = scalars["dtype"], scalars["optimizer"], scalars["init"]
        t.block_shift = scalars["block_shift"]
        t.init_scale = t.init_std = scalars["init_scale"]
        t.init_key, t.rounding_key = scalars["init_key"], scalars["rounding_key"]
        t.num_hashes = len(scalars["salts"])
        if not 1 <= t.num_hashes <= HE_MAX_HASHES:
            raise ValueError(f"num_hashes must be between 1 and {HE_MAX_HASHES}, got {t.num_hashes}")
        for i in range(t.num_hashes):
            t.salts[i] = scalars["salts"][i]
        t.eps, t.initial_accumulator = scalars["eps"], scalars["initial_accumulator"]
        t.beta, t.l1, t.l2 = scalars["beta"], scalars["l1"], scalars["l2"]
        t.weight_decay = scalars["weight_decay"]
        t.tmpfs_fd = scalars["tmpfs_fd"]

    def __dealloc__(self):
        free(self.memory)

    cdef int fill_batch(self, he_batch *b, cnp.ndarray keys, offsets, weights, int pooling) except -1:
        b.keys = <const uint64_t *>data_of(keys, cnp.NPY_UINT64, b"keys")
        b.num_keys = b.num_bags = cnp.PyArray_SIZE(keys)
        b.offsets = NULL
        b.weights = NULL
        b.pooling = pooling
        if offsets is not None:
            b.offsets = <const int64_t *>data_of(offsets, cnp.NPY_INT64, b"offsets")
            b.num_bags = cnp.PyArray_SIZE(offsets) - 1
        if weights is not None:
            b.weights = <const float *>data_of(weights, cnp.NPY_FLOAT32, b"per_sample_weights")
        return 0

    cdef int secure_reads(self, const he_batch *b, bint of_rows) except -1:
        """On tmpfs: an error now instead of a SIGBUS when the batch reads a hole for which no page is left."""
        cdef int error
        if self.table.tmpfs_fd < 0:
            return 0
        with nogil:
            error = he_secure_reads(&self.table, b, of_rows)
        if error == EFAULT:
            raise NoSpaceError(f"no space left on the tmpfs, on which reading a row never written takes {PAGE_BYTES} bytes")
        return raise_errno(error)

    def lookup(self, cnp.ndarray keys not None, cnp.ndarray out not None, offsets=None, weights=None, int pooling=0):
        """Writes the vector of each key (or bag) to `out`, float32 (num_bags, embedding_dim)."""
        cdef he_batch b
        cdef float *target = <float *>data_of(out, cnp.NPY_FLOAT32, b"out")
        self.fill_batch(&b, keys, offsets, weights, pooling)
        if cnp.PyArray_SIZE(out) != b.num_bags * self.table.dim:
            raise ValueError(f"out holds {out.size} values, {b.num_bags * self.table.dim} expected")
        if b.num_bags == 0:
            return
        self.secure_reads(&b, True)
        cdef int num_threads = he_lookup_threads(&self.table, &b)
        cdef float *scratch = <float *>malloc(num_threads * he_lookup_scratch(&self.table) * sizeof(float))
        if scratch == NULL:
            raise MemoryError()
        with nogil:
            he_lookup(&self.table, &b, he_decay_total(self.control), num_threads, scratch, target)
        free(scratch)

    def rows(self, cnp.ndarray keys not None, cnp.ndarray out not None):
        """Writes each key's rows to `out`, int64 (num_keys, num_hashes)."""
        cdef const uint64_t *source = <const uint64_t *>data_of(keys, cnp.NPY_UINT64, b"keys")
        cdef int64_t *target = <int64_t *>data_of(out, cnp.NPY_INT64, b"out")
        cdef int64_t n = cnp.PyArray_SIZE(keys)
        if cnp.PyArray_SIZE(out) != n * self.table.num_hashes:
            raise ValueError(f"out holds {out.size} values, {n * self.table.num_hashes} expected")
        with nogil:
            he_rows(&self.table, source, n, target)

    def plan(self, cnp.ndarray keys not None, cnp.ndarray grads not None, offsets=None, weights=None, int pooling=0):
        """Checks and orders an update; returns the blocks it touches that are older than the epoch, ascending uint64.

        The arrays must stay alive and unchanged until `apply`.
        """
        cdef he_plan *p = &self.current
        cdef int64_t bad, num_grads = cnp.PyArray_SIZE(grads), dim = self.table.dim
        cdef uint32_t epoch = <uint32_t>self.control.epoch
        p.grads = <const float *>data_of(grads, cnp.NPY_FLOAT32, b"grads")
        self.fill_batch(&p.batch, keys, offsets, weights, pooling)
        if num_grads != p.batch.num_bags * dim:
            raise ValueError(f"grads holds {num_grads} values, {p.batch.num_bags * dim} expected")
        self.reserve()
        self.secure_reads(&p.batch, False)
        with nogil:
            he_plan_layout(&self.table, p, self.memory)
            bad = he_update_plan(&self.table, p, epoch)
        if bad >= 0:
            raise ValueError(f"gradients must be finite: grads[{bad // dim}, {bad % dim}] is {p.grads[bad]} in float32")
        bad = -1 if p.scales == NULL else he_first_not_finite(p.scales, p.batch.num_keys)
        if bad >= 0:
            raise ValueError(f"the weight of key {bad} in its bag must be finite, got {p.scales[bad]} in float32")
        return self.stale_blocks()

    cdef int reserve(self) except -1:
        """Grows the scratch memory to what the current plan needs; it is kept between calls."""
        cdef he_plan *p = &self.current
        if he_plan_init(&self.table, p):
            raise ValueError(
                f"an update of {p.num_occurrences} rows (keys * num_hashes) of a table of {self.table.num_rows} rows is too "
                "large for one call: divide the batch"
            )
        cdef int64_t needed = he_plan_bytes(&self.table, p)
        if needed <= self.memory_bytes:
            return 0
        free(self.memory)
        self.memory_bytes = 0
        self.memory = <char *>malloc(needed)
        if self.memory == NULL:
            raise MemoryError(f"an update of {p.batch.num_keys} keys needs {needed} bytes of scratch memory")
        self.memory_bytes = needed
        return 0

    @property
    def is_saving(self):
        """Whether a snapshot is in progress that may want the rows of an update saved."""
        return self.control.saving != 0

    def save_rows(self, Saving saving not None):
        """Saves the rows of the planned update for a snapshot; what cannot be saved fails the snapshot."""
        cdef he_plan *p = &self.current
        cdef int i, error = 0
        with nogil:
            for i in range(p.num_threads):
                if error == 0:
                    error = he_save_rows(
                        &saving.saving, p.shares[i].rows, p.shares[i].num_rows, p.shares[i].stale)

    cdef stale_blocks(self):
        cdef he_plan *p = &self.current
        cdef cnp.npy_intp total = 0, at = 0
        cdef int i
        for i in range(p.num_threads):
            total += p.shares[i].num_stale
        if total == 0:
            return NO_BLOCKS
        cdef cnp.ndarray out = cnp.PyArray_EMPTY(1, &total, cnp.NPY_UINT64, 0)
        cdef uint64_t *target = <uint64_t *>cnp.PyArray_DATA(out)
        for i in range(p.num_threads):
            memcpy(target + at, p.shares[i].stale, p.shares[i].num_stale * sizeof(uint64_t))
            at += p.shares[i].num_stale
        return np.unique(out)

    def prefetch(self, cnp.ndarray keys not None, bint with_state):
        """Has the pages of the keys' rows read from disk, with those of their state if wanted. Does not wait for them."""
        cdef const uint64_t *source = <const uint64_t *>data_of(keys, cnp.NPY_UINT64, b"keys")
        cdef int64_t n = cnp.PyArray_SIZE(keys)
        cdef int error = 0
        if n:
            with nogil:
                error = he_prefetch_keys(&self.table, source, n, with_state)
        raise_errno(error)

    @property
    def fault_ahead(self):
        """Whether look-ups and updates ask for pages that are not in memory before they touch them."""
        return not self.ahead.off

    @fault_ahead.setter
    def fault_ahead(self, bint wanted):
        self.ahead.off = not wanted

    @property
    def is_asking(self):
        """Whether they do at present, because rows were read from disk of late."""
        return self.ahead.asking != 0

    def apply(self):
        """Writes the planned update and counts it as one step of the table, whose number it returns."""
        cdef he_step step
        cdef uint64_t touched
        with nogil:
            he_step_begin(self.control, self.table.weight_decay, &step)
            touched = he_update_apply(&self.table, &self.current, &step)
            if touched:
                he_rows_touched_add(self.control, touched)
        return step.step

    def apply_exact(self, int lock_fd):
        """`apply`, in turn with other processes that do the same: as if batches came one after another, by step."""
        cdef he_step step
        cdef uint64_t touched
        cdef int error = EINTR
        while error == EINTR:
            with nogil:
                error = he_update_lock_rows(&self.current, lock_fd)
            if error == EINTR:
                PyErr_CheckSignals()
        raise_errno(error)
        with nogil:
            he_step_begin(self.control, self.table.weight_decay, &step)
            touched = he_update_apply_exact(&self.table, &self.current, &step, lock_fd)
            if touched:
                he_rows_touched_add(self.control, touched)
        return step.step

    def enter_gate(self, int lock_fd):
        """Before a batch: waits while a snapshot begins. `leave_gate` comes after the batch, whatever happened."""
        cdef int error = EINTR
        while error == EINTR:
            with nogil:
                error = he_gate_enter(self.control, lock_fd)
            if error == EINTR:
                PyErr_CheckSignals()
        raise_errno(error)

    def leave_gate(self, int lock_fd):
        he_gate_leave(lock_fd)


# ---- threads and instruction sets ----

def get_num_threads():
    """Threads that a call may use: HASHEMB_NUM_THREADS, else the CPUs this process may use; 1 after a fork."""
    return he_threads_get()


def set_num_threads(n):
    """Sets how many threads a call may use, 1 to 64. Results are the same bits for any number."""
    if isinstance(n, bool) or not hasattr(n, "__index__"):
        raise TypeError(f"the number of threads must be an integer, got {type(n).__name__} {n!r}")
    n = n.__index__()
    if not 1 <= n <= HE_MAX_THREADS:
        raise ValueError(f"the number of threads must be between 1 and {HE_MAX_THREADS}, got {n}")
    he_threads_set(n)


def get_isa():
    """The instruction set whose kernels are in use: "baseline", "avx2" or "avx512"."""
    return he_kernels_active().name.decode()


def available_isas():
    """The instruction sets that this CPU runs, slowest first."""
    names = []
    while he_isa_available(len(names)) != NULL:
        names.append(he_isa_available(len(names)).decode())
    return names


def set_isa(name):
    """Selects the kernels of one instruction set. Results are the same bits for any of them."""
    if he_isa_force(name.encode()) != 0:
        raise ValueError(f"no kernels for the instruction set {name!r}: this CPU runs {', '.join(available_isas())}")


def _configure(environment):
    threads, isa = environment.get("HASHEMB_NUM_THREADS"), environment.get("HASHEMB_ISA")
    if threads:
        if not threads.strip().isdigit():
            raise ValueError(f"HASHEMB_NUM_THREADS must be an integer, got {threads!r}")
        set_num_threads(int(threads))
    if isa:
        set_isa(isa)


_configure(os.environ)


include "_core_sharing.pxi"
include "_core_hashing.pxi"
