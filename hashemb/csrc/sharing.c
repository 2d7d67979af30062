/* The mutex of an open table, and the functions of this extension that the core takes. */
#define _GNU_SOURCE
#include "sharing.h"

#include <time.h>

enum { MUTEX_SLICE_NS = 20000000 };

void he_batches_init(he_batches *b) {
    pthread_mutex_init(&b->mutex, NULL);
    b->closed = b->dirty = 0;
}

/* Resets the mutex in a forked child, where the thread that held it may not exist. */
void he_batches_after_fork(he_batches *b) { pthread_mutex_init(&b->mutex, NULL); }

/* Returns 0, or HE_AGAIN after waiting in vain for a while, in which signals may have arrived. */
int he_batches_enter(he_batches *b) {
    struct timespec until;
    if (pthread_mutex_trylock(&b->mutex) == 0) return 0;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += MUTEX_SLICE_NS;
    if (until.tv_nsec >= 1000000000) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000;
    }
    return pthread_mutex_timedlock(&b->mutex, &until) ? HE_AGAIN : 0;
}

void he_batches_leave(he_batches *b) { pthread_mutex_unlock(&b->mutex); }

/* The flag is accessed without the mutex: a thread that syncs the table reads and clears it while others write. */
int he_batches_dirty(const he_batches *b) { return __atomic_load_n(&b->dirty, __ATOMIC_ACQUIRE); }

void he_batches_set_dirty(he_batches *b, int value) { __atomic_store_n(&b->dirty, value, __ATOMIC_RELEASE); }

const he_sharing he_process_sharing = {
    .lock = he_lock,
    .lock_spinning = he_lock_spinning,
    .lock_retrying = he_lock_retrying,
    .gate_enter = he_gate_enter,
    .gate_look = he_gate_look,
    .gate_leave = he_gate_leave,
    .batches_enter = he_batches_enter,
    .batches_leave = he_batches_leave,
    .batches_set_dirty = he_batches_set_dirty,
    .mark_blocks = he_mark_blocks,
    .save_rows = he_save_rows,
};
