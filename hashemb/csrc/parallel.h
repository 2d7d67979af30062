/* Worker threads: the C API of parallel.c. Each extension compiles its own copy and so has its own workers. */
#ifndef HASHEMB_PARALLEL_H
#define HASHEMB_PARALLEL_H

#include <stdint.h>

enum { HE_MAX_THREADS = 64 };

/* Runs fn(arg, i) for i in [0, n), begun in this order; runs them serially while another call uses the workers. */
void he_parallel(void (*fn)(void *, int), void *arg, int n);
int he_threads_get(void);
void he_threads_set(int n);
int he_threads_for(int64_t work_items, int64_t items_per_thread);

#endif
