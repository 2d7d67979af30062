/* Commits a planned batch to the table in one call: no lock, gate or incomplete state outlives the call.
 *
 * Python may run a signal handler between any two bytecodes, and the handler may use the table again or raise. Work
 * that needs Python (opening the files of a snapshot, allocating space on a disk that is nearly full, long waits) is
 * therefore requested by the status that he_commit returns after releasing everything, and the caller commits again.
 * The table's mutex is never held while waiting for the gate: the gate may be kept closed by the thread that owns the
 * mutex. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <string.h>

#include "portability.h"
#include "table.h"

enum { DIGIT_BITS = 11 };

const he_sharing *he_shared;

/* ---- the blocks of a batch that are older than the epoch ---- */

/* Sorts n numbers below 2^bits by digits; returns the array, of the two, that holds the result. */
static uint64_t *sort(uint64_t *from, uint64_t *to, int64_t n, int bits) {
    for (int shift = 0; shift < bits; shift += DIGIT_BITS) {
        int64_t begin[1 << DIGIT_BITS] = {0}, at = 0;
        for (int64_t i = 0; i < n; i++) begin[from[i] >> shift & ((1 << DIGIT_BITS) - 1)]++;
        for (int d = 0; d < 1 << DIGIT_BITS; d++) {
            const int64_t count = begin[d];
            begin[d] = at;
            at += count;
        }
        for (int64_t i = 0; i < n; i++) to[begin[from[i] >> shift & ((1 << DIGIT_BITS) - 1)]++] = from[i];
        uint64_t *swap = from;
        from = to;
        to = swap;
    }
    return from;
}

/* Gathers the shares' stale blocks, ascending and distinct; `fresh` are those that were never written. They reuse the
 * memory of the merged buckets' hash sets. */
static void gather_stale(const he_table *t, he_plan *p) {
    uint64_t *all = (uint64_t *)p->slots, *spare = all + p->num_occurrences;
    int64_t n = 0, distinct = 0;
    for (int i = 0; i < p->num_threads; i++) {
        memcpy(all + n, p->shares[i].stale, (size_t)p->shares[i].num_stale * sizeof(*all));
        n += p->shares[i].num_stale;
    }
    p->num_stale = p->num_fresh = 0;
    if (n == 0) return;
    p->stale = sort(all, spare, n, 64 - __builtin_clzll(((t->num_rows - 1) >> t->block_shift) | 1));
    for (int64_t i = 0; i < n; i++)
        if (i == 0 || p->stale[i] != p->stale[i - 1]) p->stale[distinct++] = p->stale[i];
    p->num_stale = distinct;
    p->fresh = spare + p->num_occurrences;
    for (int64_t i = 0; i < distinct; i++)
        if (__atomic_load_n(&t->blocks[p->stale[i]], __ATOMIC_RELAXED) == 0) p->fresh[p->num_fresh++] = p->stale[i];
}

/* Finds the stale blocks again if a snapshot has begun since the batch was planned. */
static void find_stale(const he_table *t, he_plan *p, uint32_t epoch) {
    for (int i = 0; i < p->num_threads; i++) {
        he_share *s = &p->shares[i];
        s->num_stale = 0;
        for (int64_t u = 0; u < s->num_rows; u++) {
            const uint64_t block = s->rows[u] >> t->block_shift;
            if (__atomic_load_n(&t->blocks[block], __ATOMIC_RELAXED) != epoch) s->stale[s->num_stale++] = block;
        }
    }
    p->epoch = epoch;
}

/* ---- saving for a snapshot in progress ---- */

/* Returns whether the owner of the snapshot in progress is alive, i.e. holds its lock. */
static int owner_lives(int lock_fd) {
    if (he_shared->lock(lock_fd, F_RDLCK, HE_LOCK_SNAPSHOT, 1, 0)) return 1;
    he_shared->lock(lock_fd, F_UNLCK, HE_LOCK_SNAPSHOT, 1, 0);
    return 0;
}

/* Returns the epoch whose rows have to be saved before they change, or 0 if there is none. */
static uint64_t saving_epoch(const he_control *c, int lock_fd) {
    const uint64_t until = __atomic_load_n(&c->saving, __ATOMIC_ACQUIRE);
    if (HE_LIKELY(until == 0) || __atomic_load_n(&c->save_failed, __ATOMIC_ACQUIRE) == until) return 0;
    return owner_lives(lock_fd) ? until : 0;
}

/* Saves the batch's rows, with the memory of the stale blocks as scratch; these are found again if the batch is not
 * applied. */
static void save_rows(const he_saving *s, he_plan *p) {
    int error = 0;
    p->epoch = 0;
    for (int i = 0; i < p->num_threads && !error; i++)
        error = he_shared->save_rows(s, p->shares[i].rows, p->shares[i].num_rows, p->shares[i].stale);
}

/* ---- the batch ---- */

/* Called with the gate held. `saving` is NULL if nothing has to be saved. */
static int prepare(const he_table *t, he_control *c, he_plan *p, const he_commit_options *o, const he_saving *saving) {
    const uint32_t epoch = (uint32_t)he_epoch(c);
    if (HE_UNLIKELY(p->epoch != epoch)) find_stale(t, p, epoch);
    gather_stale(t, p);
    if (HE_LIKELY(p->num_stale == 0)) return 0;
    if (p->num_fresh && !o->has_room && (o->asks_for_room || he_make_room(t, p->fresh, p->num_fresh)))
        return HE_NEEDS_ROOM;
    he_shared->mark_blocks(saving, t->blocks, p->stale, p->num_stale, epoch);
    return 0;
}

static int in_gate(const he_table *t, he_control *c, he_batches *b, he_plan *p, const he_commit_options *o) {
    const uint64_t until = saving_epoch(c, o->lock_fd);
    const he_saving *saving = until ? o->saving : NULL;
    he_step step;
    int error;
    if (HE_UNLIKELY(until && (!saving || saving->until != until))) return HE_NEEDS_SAVING;
    if ((error = prepare(t, c, p, o, saving))) return error;
    if (saving) save_rows(saving, p);
    if (o->exact && (error = he_update_lock_rows(p, o->lock_fd))) return error == EINTR ? HE_AGAIN : error;
    he_shared->batches_set_dirty(b, 1);
    he_step_begin(c, t->weight_decay, &step);
    p->step = step.step;
    return o->exact ? he_update_apply_exact(t, c, p, &step, o->lock_fd) : he_update_apply(t, c, p, &step);
}

int he_commit(const he_table *t, he_control *c, he_batches *b, he_plan *p, const he_commit_options *o) {
    int error = he_shared->batches_enter(b);
    if (error) return error;
    if (b->closed) error = HE_CLOSED;
    else if (o->lock_fd < 0) error = HE_NEEDS_JOIN;
    else error = he_shared->gate_enter(c, o->lock_fd, o->waited);
    if (!error) {
        error = in_gate(t, c, b, p, o);
        he_shared->gate_leave(o->lock_fd);
    }
    he_shared->batches_leave(b);
    return error;
}
