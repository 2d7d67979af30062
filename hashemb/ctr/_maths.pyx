"""The compiled maths of the shallow models: five-step wrappers (buffers, checks, one nogil call, exception, result).

The module works on arrays of numbers and knows no tables or keys; the kernels are in csrc/. `hashed_model.py` has
converted every argument to the dtype, shape and order given here; the wrappers check again only what could cause a
read or write outside an array.
"""

import numpy as np

cimport numpy as cnp
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memset

from hashemb._runtime cimport HE_MAX_THREADS, data_of, he_linked, process_runtime, reserve

cdef extern from "maths.h" nogil:
    enum: HM_FM
    enum: HM_FWFM
    enum: HM_FFM
    enum: HM_BLOCK

    ctypedef struct hm_batch:
        int32_t kind, wants_logits
        int64_t dim, num_fields, num_examples, num_keys, max_keys
        const float *vectors
        const int32_t *index
        float *gradients
        const int64_t *offsets
        const float *values
        const int32_t *fields
        const float *labels
        const float *weights
        const float *pair_weights
        float bias
        float *out

    int64_t hm_num_pairs(const hm_batch *b) noexcept
    int64_t hm_memory_bytes(const hm_batch *b, int num_threads) noexcept
    void hm_run(const hm_batch *b, int num_threads, char *memory, double *residual, double *pair_gradients) noexcept
    int64_t hm_slots(int64_t n) noexcept
    int64_t hm_distinct(const uint64_t *keys, int64_t n, uint64_t *distinct, int32_t *index, uint32_t *slots,
                        int *bits) noexcept
    int hm_index_fits(const int32_t *index, int64_t n, int64_t num_vectors) noexcept
    int64_t hm_max_keys(const int64_t *offsets, int64_t num_examples, int64_t num_keys) noexcept

    ctypedef struct hm_scores:
        int64_t num_bins
        double logit_limit, eps, loss, probabilities
        double *histogram
        double *squares

    int64_t hm_add_scores(hm_scores *s, const double *labels, const double *probabilities, const double *weights,
                          int64_t n) noexcept

cnp.import_array()
he_linked = process_runtime()

KINDS = {"fm": HM_FM, "fwfm": HM_FWFM, "ffm": HM_FFM}
BLOCK_EXAMPLES = HM_BLOCK


cdef class Maths:
    """The kernels of one model, with their scratch memory.

    Parameters
    ----------
    kind : {"fm", "fwfm", "ffm"}
        Kind of the model.
    dim : int
        Number of elements in a vector: the linear weight, then the factors.
    num_fields : int
        Number of fields, for "fwfm" and "ffm"; for "fm", number of keys of an example in the matrix form.

    Attributes
    ----------
    residual : float
        Sum of the residuals, weight x (probability - label), over the examples of all calls with labels since `start`.
    pair_gradients : ndarray of float64, shape (num_fields * (num_fields + 1) / 2,)
        "fwfm": gradients of the pair weights, summed likewise; pair {f, g}, g <= f, has number f (f + 1) / 2 + g.

    An object supports only one call at a time.
    """

    cdef hm_batch batch
    cdef char *memory
    cdef int64_t memory_bytes
    cdef readonly double residual
    cdef readonly object pair_gradients

    def __cinit__(self, str kind, int64_t dim, int64_t num_fields):
        memset(&self.batch, 0, sizeof(hm_batch))
        self.batch.kind, self.batch.dim, self.batch.num_fields = KINDS[kind], dim, num_fields
        if dim < 1 or num_fields < 0 or (kind != "fm" and not 1 <= num_fields < dim * 2**31):
            raise ValueError(f"{kind}: no model has vectors of {dim} and {num_fields} fields")
        if kind == "ffm" and (dim - 1) % num_fields:
            raise ValueError(f"ffm: {dim} - 1 is no multiple of {num_fields} fields")
        self.pair_gradients = np.zeros(hm_num_pairs(&self.batch))

    def __dealloc__(self):
        free(self.memory)

    def start(self):
        """Set the sums to 0."""
        self.residual = 0.0
        self.pair_gradients[:] = 0.0

    def run(self, cnp.ndarray vectors not None, cnp.ndarray out not None, *, float bias, int num_fields=0,
            pair_weights=None, offsets=None, values=None, fields=None, index=None, labels=None, weights=None,
            gradients=None, bint logits=False, int num_threads=1):
        """Write the probability (or logit) of each example to `out`; with labels, add to the gradients of the vectors.

        Parameters
        ----------
        vectors : ndarray of float32, shape (num_keys, dim), or (num_vectors, dim) with an index
            Vectors of the keys.
        out : ndarray of float32, shape (num_examples,)
            Output. A logit that is not finite is written unchanged.
        bias : float
            The bias of the logit.
        num_fields : int
            "fm" without offsets: number of keys per example.
        pair_weights : ndarray of float32, shape (num_fields, num_fields)
            "fwfm": the symmetric matrix of pair weights.
        offsets : ndarray of int64, shape (num_examples + 1,), optional
            Example e has the keys offsets[e] - offsets[0] to offsets[e + 1] - offsets[0].
        values, fields : ndarray of float32, int32, shape (num_keys,), optional
            Value and field of each key.
        index : ndarray of int32, shape (num_keys,), optional
            Number of each key's vector.
        labels, weights : ndarray of float32, shape (num_examples,), optional
            Label and weight of each example.
        gradients : ndarray of float32, of the shape of vectors
            Required with labels, like `index`; the gradients are added in the order of the examples.
        logits : bool
            Whether to write logits instead of probabilities.
        num_threads : int
            Maximum number of threads.
        """
        cdef hm_batch b = self.batch
        cdef int64_t n = cnp.PyArray_SIZE(out), num_vectors = cnp.PyArray_SIZE(vectors) // b.dim
        cdef int64_t num_keys = num_vectors if index is None else index.size
        b.num_examples, b.num_keys, b.bias, b.wants_logits = n, num_keys, bias, logits
        if b.kind == HM_FM:
            b.num_fields = num_fields
        b.vectors = <const float *>data_of(vectors, cnp.NPY_FLOAT32, "vectors", num_vectors * b.dim)
        b.out = <float *>data_of(out, cnp.NPY_FLOAT32, "out", n)
        b.offsets = <const int64_t *>data_of(offsets, cnp.NPY_INT64, "offsets", n + 1)
        b.values = <const float *>data_of(values, cnp.NPY_FLOAT32, "values", num_keys)
        b.fields = <const int32_t *>data_of(fields, cnp.NPY_INT32, "fields", num_keys)
        b.index = <const int32_t *>data_of(index, cnp.NPY_INT32, "index", num_keys)
        b.labels = <const float *>data_of(labels, cnp.NPY_FLOAT32, "labels", n)
        b.weights = <const float *>data_of(weights, cnp.NPY_FLOAT32, "weights", n)
        b.gradients = <float *>data_of(gradients, cnp.NPY_FLOAT32, "gradients", num_vectors * b.dim)
        b.pair_weights = <const float *>data_of(pair_weights, cnp.NPY_FLOAT32, "pair_weights",
                                                b.num_fields * b.num_fields)
        self.check(&b, num_vectors)
        num_threads = max(1, min(num_threads, HE_MAX_THREADS))
        reserve(&self.memory, &self.memory_bytes, hm_memory_bytes(&b, num_threads), "the maths of this batch")
        cdef double residual = self.residual
        cdef double *pair_gradients = <double *>cnp.PyArray_DATA(<cnp.ndarray>self.pair_gradients)
        with nogil:
            hm_run(&b, num_threads, self.memory, &residual, pair_gradients)
        self.residual = residual

    cdef int check(self, hm_batch *b, int64_t num_vectors) except -1:
        """Check the conditions under which a kernel stays within the arrays."""
        cdef int64_t num_keys = b.num_keys
        b.max_keys = b.num_fields
        if b.kind == HM_FWFM and b.pair_weights == NULL:
            raise ValueError("fwfm needs pair_weights")
        if b.labels != NULL and (b.index == NULL or b.gradients == NULL):
            raise ValueError("labels need an index and gradients")
        if b.index != NULL and not hm_index_fits(b.index, num_keys, num_vectors):
            raise ValueError(f"an index must be between 0 and {num_vectors - 1}, the vectors")
        if b.offsets == NULL:
            if num_keys != b.num_examples * b.num_fields:
                raise ValueError(f"{num_keys} keys are not those of {b.num_examples} examples of {b.num_fields} keys")
            return 0
        b.max_keys = hm_max_keys(b.offsets, b.num_examples, num_keys)
        if b.max_keys < 0:
            raise ValueError(f"offsets must rise to {num_keys}, the number of keys")
        if b.kind != HM_FM and (b.fields == NULL or not hm_index_fits(b.fields, num_keys, b.num_fields)):
            raise ValueError(f"each key needs a field between 0 and {b.num_fields - 1}")
        return 0


cdef class DistinctKeys:
    """Finds the distinct keys of batches, reusing its memory. An object supports only one call at a time."""

    cdef char *memory
    cdef int64_t memory_bytes
    cdef int guess

    def __dealloc__(self):
        free(self.memory)

    def find(self, cnp.ndarray keys not None, cnp.ndarray distinct not None, cnp.ndarray index not None):
        """Write the distinct keys to the front of `distinct`, in order of appearance; return their number. O(n).

        Parameters
        ----------
        keys, distinct : ndarray of uint64, shape (n,)
            The keys, and the output for the distinct ones.
        index : ndarray of int32, shape (n,)
            Output: the position of each key in `distinct`.
        """
        cdef int64_t n = cnp.PyArray_SIZE(keys), count, needed = hm_slots(n)
        cdef const uint64_t *source = <const uint64_t *>data_of(keys, cnp.NPY_UINT64, "keys", n)
        cdef uint64_t *target = <uint64_t *>data_of(distinct, cnp.NPY_UINT64, "distinct", n)
        cdef int32_t *places = <int32_t *>data_of(index, cnp.NPY_INT32, "index", n)
        if n >= 2**31:
            raise ValueError(f"a batch of {n} keys is too large to be learned in one call: divide it")
        reserve(&self.memory, &self.memory_bytes, needed * sizeof(uint32_t), "finding the distinct keys of this batch")
        with nogil:
            count = hm_distinct(source, n, target, places, <uint32_t *>self.memory, &self.guess)
        return count


def add_scores(cnp.ndarray labels not None, cnp.ndarray probabilities not None, weights, cnp.ndarray histogram not None,
               squares, *, double logit_limit, double eps):
    """Add scores to a histogram over their logits; return their weighted log loss and sum of probabilities.

    Parameters
    ----------
    labels, probabilities, weights : ndarray of float64, shape (n,)
        Labels, probabilities and weights of the examples. If the weights are None, all are 1.
    histogram, squares : ndarray of float64, shape (2, num_bins)
        For each label: sums of weights, and of their squares if `squares` is not None, in bins of equal width between
        -logit_limit and logit_limit.
    logit_limit, eps : float
        Probabilities are clipped to [eps, 1 - eps], logits to the limits.

    Returns
    -------
    (float, float) or None
        None if a label is not 0 or 1, a probability is not in [0, 1], or a weight is negative or not finite; in that
        case nothing has been added.
    """
    cdef int64_t n = cnp.PyArray_SIZE(labels), size = cnp.PyArray_SIZE(histogram), bad
    cdef hm_scores s
    s.num_bins, s.logit_limit, s.eps, s.loss, s.probabilities = size // 2, logit_limit, eps, 0.0, 0.0
    s.histogram = <double *>data_of(histogram, cnp.NPY_FLOAT64, "histogram", 2 * s.num_bins)
    s.squares = <double *>data_of(squares, cnp.NPY_FLOAT64, "squares", size)
    cdef const double *y = <const double *>data_of(labels, cnp.NPY_FLOAT64, "labels", n)
    cdef const double *p = <const double *>data_of(probabilities, cnp.NPY_FLOAT64, "probabilities", n)
    cdef const double *w = <const double *>data_of(weights, cnp.NPY_FLOAT64, "weights", n)
    with nogil:
        bad = hm_add_scores(&s, y, p, w, n)
    return None if bad >= 0 else (s.loss, s.probabilities)
