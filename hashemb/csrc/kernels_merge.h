/* Merging a planned update: included once per instruction set (kernels.h), after kernels_lookup.h.
 *
 * A thread finds the distinct rows of its buckets, and sums the gradients of rows that occur more than once, in batch
 * order. */

HE_INLINE const float *grad_of(const he_plan *p, int64_t k, uint64_t occurrence, int64_t dim, int64_t *key) {
    *key = (int64_t)(k == 1 ? occurrence : occurrence / (uint64_t)k);
    return p->grads + (p->bag_of ? p->bag_of[*key] : *key) * dim;
}

/* Computes sum = grad * scale, or sum += grad * scale. */
HE_INLINE void add_grad(const float *restrict grad, float scale, int first, int64_t dim, float *restrict sum) {
    if (first) {
        HE_SIMD
        for (int64_t j = 0; j < dim; j++) sum[j] = grad[j] * scale;
    } else {
        HE_SIMD
        for (int64_t j = 0; j < dim; j++) sum[j] += grad[j] * scale;
    }
}

HE_INLINE void add_occurrence(const he_plan *p, int64_t k, uint64_t occurrence, int first, int64_t dim, float *sum) {
    int64_t key;
    const float *grad = grad_of(p, k, occurrence, dim, &key);
    add_grad(grad, p->scales ? p->scales[key] : 1.0f, first, dim, sum);
}

/* Records the first row, among sums [first, end), whose sum is not finite. */
HE_COLD void check_sums(he_share *s, int64_t first, int64_t end, int64_t dim) {
    const int64_t bad = first_not_finite(s->sums, first * dim, end * dim);
    if (HE_LIKELY(bad < 0) || s->bad_row >= 0) return;
    for (int64_t u = 0; u < s->num_rows; u++)
        if (s->sources[u] == (HE_SUMMED | (uint64_t)(bad / dim))) s->bad_row = (int64_t)s->rows[u];
}

/* repeats[-i], for i = 0, 1, …, is the index of the distinct row << 32 | occurrence. Returns the number of rows
 * summed so far. */
HE_COLD int64_t sum_repeats(const he_table *t, const he_plan *p, he_share *s, const uint64_t *repeats, int64_t n,
                            int64_t num_sums) {
    const int64_t k = t->num_hashes, dim = t->dim, ahead = 8, first = num_sums;
    for (int64_t i = 0; i < n; i++) {
        if (i + ahead < n) {
            int64_t key;
            he_prefetch_range(grad_of(p, k, (uint32_t)repeats[-(i + ahead)], dim, &key), dim * 4, HE_NEAR);
        }
        uint64_t *source = &s->sources[repeats[-i] >> 32];
        if (!(*source & HE_SUMMED)) {
            add_occurrence(p, k, *source, 1, dim, s->sums + num_sums * dim);
            *source = HE_SUMMED | (uint64_t)num_sums++;
        }
        add_occurrence(p, k, (uint32_t)repeats[-i], 0, dim, s->sums + (int64_t)(*source & ~HE_SUMMED) * dim);
    }
    check_sums(s, first, num_sums, dim);
    return num_sums;
}

/* Appends the distinct rows of entries [begin, end), one bucket, to the share; returns how many entries repeat a row.
 * The set uses open addressing with at most a quarter of the slots taken; a slot holds the index of a row, from 1.
 * The share itself is written once, at the end, as shares are adjacent in memory. */
HE_INLINE int64_t distinct_rows(const he_table *t, const he_plan *p, he_share *s, uint64_t first_row, int64_t begin,
                                int64_t end, uint32_t *slots, uint64_t *repeats, uint32_t epoch) {
    const int bits = p->occurrence_bits, shift = t->block_shift;
    const int slot_bits = 64 - __builtin_clzll((uint64_t)(end - begin) * 4 - 1);
    const uint64_t occurrence_mask = (UINT64_C(1) << bits) - 1, slot_mask = (UINT64_C(1) << slot_bits) - 1;
    const int many_blocks = t->num_rows >> shift > HE_MANY_BLOCKS; /* more than the caches hold */
    const uint32_t *blocks = t->blocks;
    const uint64_t *entries = p->entries;
    uint64_t *rows = s->rows + s->num_rows, *sources = s->sources + s->num_rows, *stale = s->stale + s->num_stale;
    int64_t num_rows = 0, num_stale = 0, num_repeats = 0;
    memset(slots, 0, sizeof(*slots) << slot_bits);
    for (int64_t i = begin; i < end; i++) {
        if (HE_UNLIKELY(many_blocks) && i + HE_BLOCKS_AHEAD < end)
            he_prefetch(&blocks[(first_row + (entries[i + HE_BLOCKS_AHEAD] >> bits)) >> shift], HE_NEAR);
        const uint64_t row = first_row + (entries[i] >> bits), occurrence = entries[i] & occurrence_mask;
        uint64_t slot = (row * HE_GOLDEN) >> (64 - slot_bits);
        while (slots[slot] && rows[slots[slot] - 1] != row) slot = (slot + 1) & slot_mask;
        if (slots[slot]) {
            repeats[-num_repeats++] = (uint64_t)(s->num_rows + slots[slot] - 1) << 32 | occurrence;
            continue;
        }
        const uint64_t block = row >> shift;
        rows[num_rows] = row;
        sources[num_rows] = occurrence;
        slots[slot] = (uint32_t)++num_rows;
        stale[num_stale] = block;
        num_stale += __atomic_load_n(&blocks[block], __ATOMIC_RELAXED) != epoch;
    }
    s->num_rows += num_rows;
    s->num_stale += num_stale;
    return num_repeats;
}

/* Does the same for rows of one float: gradients are so small that all are summed at once, without branching on new
 * rows. */
HE_INLINE void sum_floats(const he_table *t, const he_plan *p, he_share *s, uint64_t first_row, int64_t begin,
                          int64_t end, uint32_t *slots, uint32_t epoch) {
    const int bits = p->occurrence_bits, shift = t->block_shift;
    const int slot_bits = 64 - __builtin_clzll((uint64_t)(end - begin) * 4 - 1);
    const uint64_t occurrence_mask = (UINT64_C(1) << bits) - 1, slot_mask = (UINT64_C(1) << slot_bits) - 1;
    const int many_blocks = t->num_rows >> shift > HE_MANY_BLOCKS;
    const int64_t k = t->num_hashes;
    const uint32_t *blocks = t->blocks;
    const uint64_t *entries = p->entries;
    uint64_t *rows = s->rows + s->num_rows, *sources = s->sources + s->num_rows, *stale = s->stale + s->num_stale;
    float *sums = s->sums + s->num_rows;
    int64_t num_rows = 0, num_stale = 0;
    memset(slots, 0, sizeof(*slots) << slot_bits);
    for (int64_t i = begin; i < end; i++) {
        if (HE_UNLIKELY(many_blocks) && i + HE_BLOCKS_AHEAD < end)
            he_prefetch(&blocks[(first_row + (entries[i + HE_BLOCKS_AHEAD] >> bits)) >> shift], HE_NEAR);
        const uint64_t entry = entries[i], row = first_row + (entry >> bits), block = row >> shift;
        int64_t key;
        const float *grad = grad_of(p, k, entry & occurrence_mask, 1, &key);
        const float g = *grad * (p->scales ? p->scales[key] : 1.0f);
        uint64_t slot = (row * HE_GOLDEN) >> (64 - slot_bits);
        while (slots[slot] && rows[slots[slot] - 1] != row) slot = (slot + 1) & slot_mask;
        const int is_new = slots[slot] == 0;
        const int64_t at = is_new ? num_rows : (int64_t)slots[slot] - 1;
        const float sum = sums[at] + g;
        sums[at] = is_new ? g : sum;
        rows[at] = row;
        sources[at] = HE_SUMMED | (uint64_t)(s->num_rows + at);
        slots[slot] = (uint32_t)at + 1;
        stale[num_stale] = block;
        num_stale += is_new & (__atomic_load_n(&blocks[block], __ATOMIC_RELAXED) != epoch);
        num_rows += is_new;
    }
    s->num_rows += num_rows;
    s->num_stale += num_stale;
}

/* Distinct rows overwrite the share's part of p->rows, and their sources that of p->entries, as no pass reads those
 * parts any more. In p->spare, stale blocks grow from the front and a bucket's repeats from the back: together they are
 * at most as many as the entries merged so far. */
static void merge(const he_table *t, he_plan *p, int share, uint32_t epoch) {
    he_share *s = &p->shares[share];
    const int64_t first_bucket = p->num_buckets * share / p->num_threads,
                  last = p->num_buckets * (share + 1) / p->num_threads;
    const int64_t begin = p->bucket_begin[first_bucket], end = p->bucket_begin[last];
    int64_t num_sums = 0;
    s->rows = p->rows + begin;
    s->sources = p->entries + begin;
    s->stale = p->spare + begin;
    s->sums = p->sums + he_sums_before(begin, t->dim);
    s->num_rows = s->num_stale = 0;
    s->bad_row = -1;
    for (int64_t b = first_bucket; b < last; b++) {
        const int64_t from = p->bucket_begin[b], to = p->bucket_begin[b + 1];
        uint64_t *repeats = p->spare + end - 1;
        const uint64_t first_row = (uint64_t)b << p->bucket_shift;
        uint32_t *slots = p->slots + begin * HE_SLOTS_PER_ENTRY;
        if (from == to) continue;
        if (t->dim == 1) {
            sum_floats(t, p, s, first_row, from, to, slots, epoch);
            continue;
        }
        const int64_t n = distinct_rows(t, p, s, first_row, from, to, slots, repeats, epoch);
        if (n) num_sums = sum_repeats(t, p, s, repeats, n, num_sums);
    }
    if (t->dim == 1) check_sums(s, 0, s->num_rows, 1);
}
