/* Distribute a batch over threads, find distinct keys, and add scores to histograms. */
#include <math.h>

#include "maths_example.h"
#include "runtime.h"

/* A thread takes about .3 us per example, and waking a thread takes about 10 us. A single thread sums gradients as it
 * goes; with several threads, one sums them when all are done, which is faster for a factorisation machine only from
 * four threads on. */
enum { HM_FLOATS_PER_THREAD = 1 << 15, HM_FM_THREADS = 4 };

const he_runtime *he_linked;

static const hm_kernels *const kernels[HE_NUM_ISAS] = {
    &hm_kernels_baseline,
#if HE_X86
    &hm_kernels_avx2,
    &hm_kernels_avx512,
#endif
};

static const hm_kernels *active(void) { return kernels[he_isa()]; }

/* ---- memory: the scratch of each thread, then the results of each block ---- */

static int64_t num_blocks(const hm_batch *b) { return (b->num_examples + HM_BLOCK - 1) / HM_BLOCK; }

static int threads_for(const hm_batch *b, int num_threads) {
    const int64_t floats = b->num_examples * HE_MAX(b->max_keys, 1) * b->dim;
    const int64_t useful = HE_MIN(floats / HM_FLOATS_PER_THREAD, num_blocks(b));
    if (b->kind == HM_FM && b->labels && HE_MIN(useful, num_threads) < HM_FM_THREADS) return 1;
    return (int)HE_MAX(1, HE_MIN(useful, num_threads));
}

static int64_t scratch_floats(const hm_batch *b) {
    const int64_t rows = b->kind == HM_FM ? 1 : 2;
    return hm_padded(b->dim) * (rows * b->max_keys + 2 + hm_num_pairs(b));
}

/* Return the size of the copied vectors: those of an example per thread or, if gradients are summed at the end, of the
 * batch. */
static int64_t copied_floats(const hm_batch *b, int num_threads) {
    if (!b->index) return 0;
    return hm_padded(b->labels && num_threads > 1 ? b->num_keys * b->dim
                                                  : num_threads * hm_padded(b->max_keys * b->dim));
}

int64_t hm_memory_bytes(const hm_batch *b, int num_threads) {
    const int64_t shared = num_blocks(b) * ((int64_t)sizeof(hm_shared) + hm_num_pairs(b) * 4);
    num_threads = threads_for(b, num_threads);
    return (copied_floats(b, num_threads) + num_threads * scratch_floats(b)) * 4 + shared + HE_LINE_BYTES;
}

/* ---- a batch over threads: a free thread takes the next block; each block has its own sums ---- */

typedef struct {
    const hm_batch *batch;
    float *copies, *scratch;
    hm_shared *shared;
    int64_t next;
    int num_threads;
} job_t;

static hm_scratch scratch_of(const job_t *job, int thread) {
    const hm_batch *b = job->batch;
    const int64_t stride = hm_padded(b->dim);
    hm_scratch s;
    s.has_batch = b->labels && job->num_threads > 1;
    s.vectors = job->copies + (s.has_batch ? 0 : thread * hm_padded(b->max_keys * b->dim));
    s.sums = job->scratch + thread * scratch_floats(b);
    s.lanes = s.sums + stride;
    s.rows = s.lanes + stride;
    s.others = s.rows + b->max_keys * stride;
    s.pairs = s.others + (b->kind == HM_FM ? 0 : b->max_keys * stride);
    return s;
}

static void work(void *arg, int thread) {
    job_t *job = arg;
    const hm_batch *b = job->batch;
    const hm_scratch s = scratch_of(job, thread);
    const int64_t n = num_blocks(b);
    for (;;) {
        const int64_t block = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
        if (block >= n) return;
        active()->block(b, &s, block, &job->shared[block]);
    }
}

void hm_run(const hm_batch *b, int num_threads, char *memory, double *residual, double *pair_gradients) {
    const int64_t blocks = num_blocks(b), pairs = hm_num_pairs(b);
    float *start = (float *)(((uintptr_t)memory + HE_LINE_BYTES - 1) & ~(uintptr_t)(HE_LINE_BYTES - 1));
    job_t job = {b, start, NULL, NULL, 0, threads_for(b, num_threads)};
    job.scratch = start + copied_floats(b, job.num_threads);
    job.shared = (hm_shared *)(job.scratch + job.num_threads * scratch_floats(b));
    for (int64_t i = 0; i < blocks; i++) {
        job.shared[i].residual = 0.0;
        job.shared[i].pairs = (float *)(job.shared + blocks) + i * pairs;
    }
    he_parallel(work, &job, job.num_threads);
    if (!b->labels) return;
    const hm_scratch s = scratch_of(&job, 0);
    if (s.has_batch) active()->add_gradients(b, &s);
    for (int64_t i = 0; i < blocks; i++) {
        *residual += job.shared[i].residual;
        for (int64_t p = 0; p < pairs; p++) pair_gradients[p] += (double)job.shared[i].pairs[p];
    }
}

/* ---- distinct keys: open addressing with at most a quarter of the slots in use; a slot holds a number + 1 ---- */

enum { HM_LEAST_SLOT_BITS = 8 };

static int slot_bits_for(int64_t n) {
    int bits = HM_LEAST_SLOT_BITS;
    while (INT64_C(1) << bits < 4 * n) bits++;
    return bits;
}

int64_t hm_slots(int64_t n) { return INT64_C(1) << slot_bits_for(n); }

static void fill_slots(const uint64_t *distinct, int64_t count, uint32_t *slots, int bits) {
    const uint64_t mask = (UINT64_C(1) << bits) - 1;
    memset(slots, 0, sizeof(*slots) << bits);
    for (int64_t i = 0; i < count; i++) {
        uint64_t at = (distinct[i] * HE_GOLDEN) >> (64 - bits);
        while (slots[at]) at = (at + 1) & mask;
        slots[at] = (uint32_t)i + 1;
    }
}

int64_t hm_distinct(const uint64_t *keys, int64_t n, uint64_t *distinct, int32_t *index, uint32_t *slots, int *guess) {
    const int most = slot_bits_for(n);
    int bits = HE_MIN(HE_MAX(*guess, HM_LEAST_SLOT_BITS), most);
    int64_t count = 0, i = 0;
    for (; i < n; bits = HE_MIN(bits + 2, most)) {
        const uint64_t mask = (UINT64_C(1) << bits) - 1;
        const int64_t room = bits == most ? n : INT64_C(1) << (bits - 2);
        fill_slots(distinct, count, slots, bits);
        for (; i < n && count < room; i++) {
            const uint64_t key = keys[i];
            uint64_t at = (key * HE_GOLDEN) >> (64 - bits);
            uint32_t number;
            while ((number = slots[at]) != 0 && HE_UNLIKELY(distinct[number - 1] != key)) at = (at + 1) & mask;
            if (!number) {
                distinct[count] = key;
                slots[at] = number = (uint32_t)++count;
            }
            index[i] = (int32_t)number - 1;
        }
    }
    *guess = slot_bits_for(count);
    return count;
}

/* ---- small loops over a batch ---- */

static int is_score(double y, double p, double w) {
    return (y == 0.0 || y == 1.0) && p >= 0.0 && p <= 1.0 && w >= 0.0 && w < HUGE_VAL;
}

int64_t hm_add_scores(hm_scores *s, const double *labels, const double *probabilities, const double *weights,
                      int64_t n) {
    const double per_logit = (double)s->num_bins / (2.0 * s->logit_limit), last = (double)(s->num_bins - 1);
    for (int64_t i = 0; i < n; i++)
        if (!is_score(labels[i], probabilities[i], weights ? weights[i] : 1.0)) return i;
    for (int64_t i = 0; i < n; i++) {
        const double w = weights ? weights[i] : 1.0;
        const double p = HE_MIN(HE_MAX(probabilities[i], s->eps), 1.0 - s->eps);
        const double log_p = log(p), log_not_p = log1p(-p);
        const double bin = HE_MIN(HE_MAX((log_p - log_not_p + s->logit_limit) * per_logit, 0.0), last);
        const int64_t at = (int64_t)bin + (labels[i] == 1.0 ? s->num_bins : 0);
        s->loss -= w * (labels[i] == 1.0 ? log_p : log_not_p);
        s->probabilities += w * probabilities[i];
        s->histogram[at] += w;
        if (s->squares) s->squares[at] += w * w;
    }
    return -1;
}

int64_t hm_max_keys(const int64_t *offsets, int64_t num_examples, int64_t num_keys) {
    int64_t most = 0;
    for (int64_t e = 0; e < num_examples; e++) {
        const int64_t n = offsets[e + 1] - offsets[e];
        if (n < 0 || n > num_keys) return -1;
        most = HE_MAX(most, n);
    }
    return offsets[num_examples] - offsets[0] == num_keys ? most : -1;
}

int hm_index_fits(const int32_t *index, int64_t n, int64_t limit) {
    uint32_t outside = 0;
    for (int64_t i = 0; i < n; i++) outside |= (uint32_t)((int64_t)(uint32_t)index[i] >= limit);
    return !outside;
}
