/* Logits, probabilities and gradients of shallow CTR models: the C API of the extension _maths.
 *
 * Invariants: this code knows no tables. Kernels never allocate, print, raise or touch Python, and all arguments have
 * been checked. Every sum has a fixed order, so results are the same bits on every CPU, for any number of threads and
 * for any cut of a batch at a multiple of HM_BLOCK examples. _reference_maths.py does the same in NumPy. */
#ifndef HASHEMB_CTR_MATHS_H
#define HASHEMB_CTR_MATHS_H

#include <stddef.h>
#include <stdint.h>

enum { HM_FM = 0, HM_FWFM = 1, HM_FFM = 2 };
enum {
    HM_LANES = 16, /* partial sums of a dot product; the length of a padded row is a multiple of this */
    HM_BLOCK = 64, /* examples that one thread takes at a time */
};

/* Vector i has dim floats: the linear weight, then the factors. Example e has the keys [offsets[e], offsets[e + 1]) -
 * offsets[0] or, if offsets is NULL, num_fields keys, the j-th of field j. With labels, index and gradients are given:
 * a batch has few distinct keys, and the gradients of each are summed here, in the order of the examples. */
typedef struct {
    int32_t kind, wants_logits;
    int64_t dim, num_fields, num_examples, num_keys;
    int64_t max_keys; /* maximum number of keys of an example */
    const float *vectors;
    const int32_t *index; /* the number of each key's vector; NULL: key i has vector i */
    float *gradients;     /* gradients of the vectors, which are added to if there are labels */
    const int64_t *offsets;
    const float *values;           /* x of each key; NULL: 1 */
    const int32_t *fields;         /* field of each key, if there are offsets and the model is not HM_FM */
    const float *labels, *weights; /* weights may be NULL: 1 */
    const float *pair_weights;     /* HM_FWFM: (num_fields, num_fields), symmetric */
    float bias;
    float *out; /* a probability or logit for each example; a logit that is not finite is written unchanged */
} hm_batch;

/* Scratch memory of one thread. `vectors` holds the vectors of the keys of an example or, if the gradients are summed
 * later, of the batch; in the latter case they are replaced by gradients. */
typedef struct {
    float *vectors;
    int32_t has_batch;
    float *rows, *others; /* max_keys padded rows each */
    float *sums, *lanes;  /* one padded row each */
    float *pairs;         /* a padded row for each pair of fields */
} hm_scratch;

/* Gradients of the parameters that all examples share, summed over one block. */
typedef struct {
    double residual;
    float *pairs; /* one float for each pair of fields */
} hm_shared;

typedef struct {
    void (*block)(const hm_batch *b, const hm_scratch *s, int64_t block, hm_shared *shared);
    void (*add_gradients)(const hm_batch *b, const hm_scratch *s); /* of all examples, if s holds the batch */
} hm_kernels;

extern const hm_kernels hm_kernels_baseline, hm_kernels_avx2, hm_kernels_avx512;

/* Pair {f, g}, g <= f, of fields is number f (f + 1) / 2 + g, whatever the number of fields. */
static inline int64_t hm_num_pairs(const hm_batch *b) {
    return b->kind == HM_FWFM ? b->num_fields * (b->num_fields + 1) / 2 : 0;
}

int64_t hm_memory_bytes(const hm_batch *b, int num_threads);
void hm_run(const hm_batch *b, int num_threads, char *memory, double *residual, double *pair_gradients);
/* Number the distinct keys among n keys from 0 in order of appearance: key i has number index[i], and distinct[number]
 * is the key. Return their count. `slots` has room for hm_slots(n) numbers; *bits, kept between calls, is a guess: at
 * first only 2^bits slots are used. */
int64_t hm_distinct(const uint64_t *keys, int64_t n, uint64_t *distinct, int32_t *index, uint32_t *slots, int *bits);
int64_t hm_slots(int64_t n);
/* Return the largest number of keys of an example; -1 if offsets decrease or do not span num_keys. */
int64_t hm_max_keys(const int64_t *offsets, int64_t num_examples, int64_t num_keys);
/* The histogram of StreamingMetrics: bins of the logit, num_bins for label 0, then as many for label 1. */
typedef struct {
    int64_t num_bins;
    double logit_limit, eps;     /* probabilities are clipped to [eps, 1 - eps] */
    double *histogram, *squares; /* sums of weights, and of their squares unless NULL */
    double loss, probabilities;  /* weighted sums */
} hm_scores;

/* Add n scores; weights may be NULL. Return -1, or the index of the first score with an invalid label, probability or
 * weight; in that case nothing has been added. */
int64_t hm_add_scores(hm_scores *s, const double *labels, const double *probabilities, const double *weights,
                      int64_t n);
/* Return whether all elements are in [0, limit). */
int hm_index_fits(const int32_t *index, int64_t n, int64_t limit);

#endif
