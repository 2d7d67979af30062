/* Look-ups and the small passes over a batch, divided over threads by key or bag; nothing here writes a table. */
#include "numerics.h"
#include "table.h"

enum { KEYS_PER_THREAD = 4096 };

typedef struct {
    const he_table *t;
    const he_batch *b;
    double decay_total;
    float *scratch, *out;
    int num_threads;
} job;

static int64_t share_begin(int64_t n, int i, int num_threads) {
    return (int64_t)((__int128)n * i / num_threads);
}

static void lookup_share(void *arg, int i) {
    const job *j = arg;
    int64_t n = j->b->num_keys;
    he_kernels_active()->lookup(j->t, j->b->keys, share_begin(n, i, j->num_threads), share_begin(n, i + 1, j->num_threads),
                                j->decay_total, j->scratch + i * he_lookup_scratch(j->t), j->out);
}

/* The first bag that starts at or after `key`. */
static int64_t bag_at(const he_batch *b, int64_t key) {
    int64_t low = 0, high = b->num_bags;
    while (low < high) {
        int64_t mid = low + (high - low) / 2;
        if (b->offsets[mid] < key) low = mid + 1;
        else high = mid;
    }
    return low;
}

static void pool_share(void *arg, int i) {
    const job *j = arg;
    int64_t n = j->b->num_keys;
    int last = i + 1 == j->num_threads;
    int64_t begin = i == 0 ? 0 : bag_at(j->b, share_begin(n, i, j->num_threads));
    int64_t end = last ? j->b->num_bags : bag_at(j->b, share_begin(n, i + 1, j->num_threads));
    he_kernels_active()->lookup_pooled(j->t, j->b, begin, end, j->decay_total, j->scratch + i * he_lookup_scratch(j->t), j->out);
}

int he_lookup_threads(const he_table *t, const he_batch *b) {
    return he_threads_for(b->num_keys * t->num_hashes, KEYS_PER_THREAD);
}

/* Floats of scratch memory per thread: 2 * dim, and a cache line between threads. */
int64_t he_lookup_scratch(const he_table *t) { return (2 * t->dim + 15) / 16 * 16 + 16; }

void he_lookup(const he_table *t, const he_batch *b, double decay_total, int num_threads, float *scratch, float *out) {
    job j = {t, b, decay_total, scratch, out, num_threads};
    he_parallel(b->offsets ? pool_share : lookup_share, &j, num_threads);
}

void he_rows(const he_table *t, const uint64_t *keys, int64_t n, int64_t *out) {
    he_kernels_active()->rows(t, keys, 0, n, out);
}

int64_t he_first_not_finite(const float *values, int64_t n) {
    return he_kernels_active()->first_not_finite(values, 0, n);
}
