/* What all extensions of a process share: one pool of threads and one choice of instruction set.
 *
 * The extension _runtime has both (parallel.c, runtime.c) and describes them in he_process. Each of the others defines
 * he_linked in one of its C files and points it there when it is loaded, before it calls anything else. */
#ifndef HASHEMB_RUNTIME_H
#define HASHEMB_RUNTIME_H

#include <stdint.h>

#include "portability.h"

enum { HE_MAX_THREADS = 64 };

/* Instruction sets for which there are kernels, slowest first. */
enum { HE_ISA_BASELINE = 0, HE_ISA_AVX2 = 1, HE_ISA_AVX512 = 2, HE_NUM_ISAS = HE_X86 ? 3 : 1 };

typedef struct {
    void (*parallel)(void (*fn)(void *, int), void *arg, int n);
    int (*num_threads)(void);
    int32_t isa; /* may change at any time */
} he_runtime;

/* ---- in _runtime ---- */

extern he_runtime he_process;

void he_pool_run(void (*fn)(void *, int), void *arg, int n);
int he_threads_get(void);
void he_threads_set(int n);
const char *he_isa_name(int isa);
int he_isa_force(const char *name);  /* 0, or -1 if this CPU has no such instruction set */
const char *he_isa_available(int i); /* the i-th instruction set that this CPU supports; NULL past the end */

/* ---- in the other extensions ---- */

extern const he_runtime *he_linked;

/* Runs fn(arg, i) for i in [0, n), begun in this order; runs them serially while another call uses the workers. */
HE_INLINE void he_parallel(void (*fn)(void *, int), void *arg, int n) { he_linked->parallel(fn, arg, n); }

HE_INLINE int he_isa(void) { return __atomic_load_n(&he_linked->isa, __ATOMIC_RELAXED); }

HE_INLINE int he_threads_for(int64_t work_items, int64_t items_per_thread) {
    const int64_t useful = work_items / items_per_thread;
    const int available = he_linked->num_threads();
    return useful < 1 ? 1 : useful < available ? (int)useful : available;
}

#endif
