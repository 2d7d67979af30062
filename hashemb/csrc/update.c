/* An update's two halves: planning (which rows, in which order, by which thread) and applying.
 *
 * Rows are divided over threads by range, so each row has one owner, and its occurrences are summed in batch order:
 * the result does not depend on the number of threads. */
#include <string.h>

#include "numerics.h"
#include "table.h"

enum { HE_DIGIT_BITS = 12 };

#define HE_ENTRY uint64_t
#define HE_SORT(f) f##_64
#include "sort.inc"
#undef HE_ENTRY
#undef HE_SORT

#define HE_ENTRY unsigned __int128
#define HE_SORT(f) f##_128
#include "sort.inc"
#undef HE_ENTRY
#undef HE_SORT

/* Bits that hold every number below n. */
static int bits_for(uint64_t n) { return n <= 1 ? 0 : 64 - __builtin_clzll(n - 1); }

static int64_t align_line(int64_t bytes) { return (bytes + HE_LINE_BYTES - 1) / HE_LINE_BYTES * HE_LINE_BYTES; }

void he_plan_init(const he_table *t, he_plan *p, int force_wide) {
    int64_t occurrences = p->batch.num_keys * t->num_hashes;
    p->row_bits = bits_for(t->num_rows);
    p->occurrence_bits = bits_for((uint64_t)occurrences);
    p->wide = force_wide || p->row_bits + p->occurrence_bits > 64;
    p->num_threads = he_threads_for(occurrences, 2048);
}

static int64_t entry_bytes(const he_table *t, const he_plan *p) {
    return align_line(p->batch.num_keys * t->num_hashes * (p->wide ? 16 : 8));
}

static int64_t share_bytes(const he_table *t, const he_plan *p) {
    return 2 * entry_bytes(t, p) + align_line(2 * t->dim * (int64_t)sizeof(float));
}

static int64_t bag_bytes(const he_plan *p) {
    return p->batch.offsets ? align_line(p->batch.num_keys * 8) + align_line(p->batch.num_keys * 4) : 0;
}

int64_t he_plan_bytes(const he_table *t, const he_plan *p) {
    return HE_LINE_BYTES + bag_bytes(p) + p->num_threads * share_bytes(t, p);
}

/* Divides scratch memory (he_plan_bytes of it) and, for bags, fills in each key's bag and scale. */
void he_plan_layout(const he_table *t, he_plan *p, char *memory) {
    const he_batch *b = &p->batch;
    memory = (char *)(((uintptr_t)memory + HE_LINE_BYTES - 1) & ~(uintptr_t)(HE_LINE_BYTES - 1));
    p->bag_of = NULL;
    p->scales = NULL;
    if (b->offsets) {
        int64_t *bag_of = (int64_t *)memory;
        float *scales = (float *)(memory + align_line(b->num_keys * 8));
        int scaled = b->weights || b->pooling != HE_SUM;
        he_bag_scales(b, bag_of, scaled ? scales : NULL);
        p->bag_of = bag_of;
        p->scales = scaled ? scales : NULL;
        memory += bag_bytes(p);
    }
    for (int i = 0; i < p->num_threads; i++, memory += share_bytes(t, p)) {
        he_share *s = &p->shares[i];
        memset(s, 0, sizeof(*s));
        s->entries = memory;
        s->spare = memory + entry_bytes(t, p);
        s->scratch = (float *)(memory + 2 * entry_bytes(t, p));
    }
}

typedef struct {
    const he_table *t;
    he_plan *p;
    uint32_t epoch;
    const he_step *step;
} job;

static uint64_t row_bound(const job *j, int i) {
    return (uint64_t)((unsigned __int128)j->t->num_rows * (unsigned)i / (unsigned)j->p->num_threads);
}

static void plan_share(void *arg, int i) {
    job *j = arg;
    he_plan *p = j->p;
    he_share *s = &p->shares[i];
    if (p->wide) {
        collect_128(j->t, p, s, row_bound(j, i), row_bound(j, i + 1));
        sort_128(s, p->occurrence_bits, p->row_bits);
        find_stale_128(j->t, p, s, j->epoch);
    } else {
        collect_64(j->t, p, s, row_bound(j, i), row_bound(j, i + 1));
        sort_64(s, p->occurrence_bits, p->row_bits);
        find_stale_64(j->t, p, s, j->epoch);
    }
}

void he_update_plan(const he_table *t, he_plan *p, uint32_t epoch) {
    job j = {t, p, epoch, NULL};
    he_parallel(plan_share, &j, p->num_threads);
}

static void apply_share(void *arg, int i) {
    job *j = arg;
    he_kernels_active()->apply(j->t, j->p, &j->p->shares[i], j->step);
}

uint64_t he_update_apply(const he_table *t, he_plan *p, const he_step *s) {
    job j = {t, p, s->epoch, s};
    uint64_t touched = 0;
    he_parallel(apply_share, &j, p->num_threads);
    for (int i = 0; i < p->num_threads; i++) touched += p->shares[i].rows_touched;
    return touched;
}
