/* Logits, probabilities and gradients of shallow CTR models: the C API of the extension _maths.
 *
 * Invariants: nothing here knows tables. Kernels never allocate, print, raise or touch Python, and all arguments have
 * been checked. Every sum has one order, so results are the same bits on every CPU, for any number of threads and for
 * any cut of a batch at a multiple of HM_BLOCK examples. _reference_maths.py holds the same in NumPy. */
#ifndef HASHEMB_CTR_MATHS_H
#define HASHEMB_CTR_MATHS_H

#include <stddef.h>
#include <stdint.h>

enum { HM_FM = 0, HM_FWFM = 1, HM_FFM = 2 };
enum {
    HM_LANES = 16, /* partial sums of a dot product; a padded row is a multiple of it */
    HM_BLOCK = 64, /* examples that one thread takes at a time */
};

/* Vector i is dim floats: the linear weight, then the factors. Example e owns the keys [offsets[e], offsets[e + 1]) -
 * offsets[0], or, where offsets is NULL, num_fields keys, the j-th of field j. With labels there are an index and
 * gradients: a batch has few distinct keys, and the gradients of each are summed here, in the order of the examples. */
typedef struct {
    int32_t kind, wants_logits;
    int64_t dim, num_fields, num_examples, num_keys;
    int64_t max_keys; /* of an example */
    const float *vectors;
    const int32_t *index; /* of each key: its vector; NULL: key i has vector i */
    float *gradients; /* of each vector: added to, when there are labels */
    const int64_t *offsets;
    const float *values; /* x of each key; NULL: 1 */
    const int32_t *fields; /* of each key, where there are offsets and the model is not HM_FM */
    const float *labels, *weights; /* weights may be NULL: 1 */
    const float *pair_weights; /* HM_FWFM: (num_fields, num_fields), symmetric */
    float bias;
    float *out; /* a probability, or logit, for each example; a logit that is not finite is left as it is */
} hm_batch;

/* What one thread works in. Vectors of the keys of an example, or, where others are to sum the gradients, of the batch;
 * there they are turned into gradients. */
typedef struct {
    float *vectors;
    int32_t has_batch;
    float *rows, *others; /* max_keys padded rows each */
    float *sums, *lanes; /* one padded row each */
    float *pairs; /* a padded row for each pair of fields */
} hm_scratch;

/* What all examples share the gradient of, summed over one block. */
typedef struct {
    double residual;
    float *pairs; /* one float for each pair of fields */
} hm_shared;

typedef struct {
    const char *name;
    void (*block)(const hm_batch *b, const hm_scratch *s, int64_t block, hm_shared *shared);
    void (*add_gradients)(const hm_batch *b, const hm_scratch *s); /* of all examples, where s has the batch */
} hm_kernels;

const hm_kernels *hm_kernels_active(void);
int hm_isa_force(const char *name);
const char *hm_isa_available(int i);

/* Pair {f, g}, g <= f, of fields is number f (f + 1) / 2 + g, whatever the number of fields. */
int64_t hm_num_pairs(const hm_batch *b);
int64_t hm_memory_bytes(const hm_batch *b, int num_threads);
void hm_run(const hm_batch *b, int num_threads, char *memory, double *residual, double *pair_gradients);
/* Numbers the distinct of n keys from 0 as they come: key i has number index[i], and distinct[number] is the key. Returns
 * how many there are. `slots` holds hm_slots(n) numbers; *bits, kept between calls, is a guess at how many are needed. */
int64_t hm_distinct(const uint64_t *keys, int64_t n, uint64_t *distinct, int32_t *index, uint32_t *slots, int *bits);
int64_t hm_slots(int64_t n);
void hm_sigmoid(const float *logits, int64_t n, float *out);
/* The largest number of keys of an example; -1 where offsets fall or do not span num_keys. */
int64_t hm_max_keys(const int64_t *offsets, int64_t num_examples, int64_t num_keys);
/* What StreamingMetrics keeps of scores: bins of the logit, num_bins for label 0, then as many for label 1. */
typedef struct {
    int64_t num_bins;
    double logit_limit, eps; /* probabilities are clipped to [eps, 1 - eps] */
    double *histogram, *squares; /* sums of weights, and of their squares where that is not NULL */
    double loss, probabilities; /* weighted sums */
} hm_scores;

/* Adds n scores; weights may be NULL. Returns -1, or the first whose label, probability or weight is none: then nothing
 * has been added. */
int64_t hm_add_scores(hm_scores *s, const double *labels, const double *probabilities, const double *weights, int64_t n);
/* Whether each is in [0, limit). */
int hm_index_fits(const int32_t *index, int64_t n, int64_t limit);

#endif
