/* Look-ups and the small passes over a batch, divided among threads by key or bag. Nothing here writes to a table. */
#include <string.h>

#include "kernels.h"

enum { KEYS_PER_THREAD = 4096, FIRST_LOOK_KEYS = 256 };

typedef struct {
    const he_table *t;
    const he_batch *b;
    double decay_total;
    float *scratch, *out;
    int num_threads, watch;
} job;

static int64_t share_begin(int64_t n, int i, int num_threads) { return (int64_t)((__int128)n * i / num_threads); }

/* Returns the first bag that starts at or after `key`. */
static int64_t bag_at(const he_batch *b, int64_t key) {
    int64_t low = 0, high = b->num_bags;
    while (low < high) {
        int64_t mid = low + (high - low) / 2;
        if (b->offsets[mid] < key) low = mid + 1;
        else high = mid;
    }
    return low;
}

/* Looks up bags [begin, end); without bags, each key is one. */
static void lookup_bags(const job *j, int64_t begin, int64_t end, float *scratch) {
    if (j->b->offsets) he_kernels_active()->lookup_pooled(j->t, j->b, begin, end, j->decay_total, scratch, j->out);
    else he_kernels_active()->lookup(j->t, j->b->keys, begin, end, j->decay_total, scratch, j->out);
}

static int64_t first_key(const he_batch *b, int64_t bag) { return b->offsets ? b->offsets[bag] : bag; }

/* Returns the end of the chunk of bags that begins at `bag` and has about num_keys keys, but at least one bag. */
static int64_t chunk_end(const he_batch *b, int64_t bag, int64_t num_keys, int64_t end) {
    const int64_t next = b->offsets ? bag_at(b, b->offsets[bag] + num_keys) : bag + num_keys;
    return HE_MIN(HE_MAX(next, bag + 1), end);
}

static void ask_for_bags(const job *j, int64_t begin, int64_t end) {
    const int64_t key = first_key(j->b, begin);
    he_ahead_keys(j->t, j->b->keys + key, first_key(j->b, end) - key);
}

/* Does the same in chunks: rows that are not in memory are asked for one chunk ahead. */
static void lookup_reading_ahead(const job *j, int64_t begin, int64_t end, float *scratch) {
    const int64_t chunk = he_ahead_rows(j->t);
    int64_t from = begin, asked = begin, mark;
    while (from < end) {
        const int asking = he_ahead_begin(j->t, &mark);
        const int64_t to = chunk_end(j->b, from, asking || from > begin ? chunk : FIRST_LOOK_KEYS, end);
        const int64_t ahead = to < end ? chunk_end(j->b, to, chunk, end) : end;
        if (asking && ahead > asked) ask_for_bags(j, HE_MAX(asked, from), ahead);
        lookup_bags(j, from, to, scratch);
        if (asking) asked = ahead;
        else he_ahead_end(j->t, mark, (first_key(j->b, to) - first_key(j->b, from)) * j->t->num_hashes);
        from = to;
    }
}

static void lookup_share(void *arg, int i) {
    const job *j = arg;
    const int64_t n = j->b->num_keys;
    const int last = i + 1 == j->num_threads;
    const int64_t begin = i == 0 ? 0 : chunk_end(j->b, 0, share_begin(n, i, j->num_threads), j->b->num_bags);
    const int64_t end = last ? j->b->num_bags
                             : chunk_end(j->b, 0, share_begin(n, i + 1, j->num_threads), j->b->num_bags);
    (j->watch ? lookup_reading_ahead : lookup_bags)(j, begin, end, j->scratch + i * he_lookup_scratch(j->t));
}

int he_lookup_threads(const he_table *t, const he_batch *b) {
    return he_threads_for(b->num_keys * t->num_hashes, KEYS_PER_THREAD);
}

/* Returns the floats of scratch memory per thread: 2 * dim, and a cache line between threads. */
int64_t he_lookup_scratch(const he_table *t) { return (2 * t->dim + 15) / 16 * 16 + 16; }

void he_lookup(const he_table *t, const he_batch *b, double decay_total, int num_threads, float *scratch, float *out) {
    job j = {t, b, decay_total, scratch, out, num_threads, he_ahead_watch(t->ahead)};
    he_parallel(lookup_share, &j, num_threads);
    he_ahead_done(t->ahead, j.watch);
}

void he_rows(const he_table *t, const uint64_t *keys, int64_t n, int64_t *out) {
    he_kernels_active()->rows(t, keys, 0, n, out);
}

int64_t he_first_not_finite(const float *values, int64_t n) {
    return he_kernels_active()->first_not_finite(values, 0, n);
}

int64_t he_offsets_copy(const int64_t *offsets, int64_t num_bags, int64_t num_keys, int64_t *out) {
    int64_t falls = 0;
    memcpy(out, offsets, (size_t)(num_bags + 1) * sizeof(*out));
    if (out[0] != 0) return 0;
    for (int64_t i = 0; i < num_bags; i++) falls |= out[i + 1] < out[i];
    for (int64_t i = 0; falls && i < num_bags; i++)
        if (out[i + 1] < out[i]) return i + 1;
    return out[num_bags] == num_keys ? -1 : num_bags + 1;
}

void he_bag_scales(const he_batch *b, int64_t *bag_of, float *scales) {
    for (int64_t bag = 0; bag < b->num_bags; bag++) {
        float scale = he_bag_scale(b, bag);
        for (int64_t i = b->offsets[bag]; i < b->offsets[bag + 1]; i++) {
            bag_of[i] = bag;
            if (scales) scales[i] = b->weights ? b->weights[i] * scale : scale;
        }
    }
}
