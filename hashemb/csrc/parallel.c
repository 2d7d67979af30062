/* The worker threads of this process. One call uses them at a time; a call that finds them busy runs serially,
 * which gives the same result. Workers don't survive fork(), so a child starts with none and with one thread.
 *
 * The next free thread takes the next task: a call never waits for a worker whose CPU is in use, only for tasks begun.
 * An update consists of several parallel passes, so a waiting thread spins for a few microseconds before it sleeps. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <string.h>

#include "runtime.h"

typedef struct {
    pthread_mutex_t in_use; /* held by the call that uses the workers */
    pthread_mutex_t lock;   /* guards the rest */
    pthread_cond_t work, done;
    void (*fn)(void *, int);
    void *arg;
    int num_tasks, next_task, num_running, num_workers; /* num_running: tasks being run by workers */
    uint64_t generation;
} pool_t;

#define POOL_EMPTY                        \
    {.in_use = PTHREAD_MUTEX_INITIALIZER, \
     .lock = PTHREAD_MUTEX_INITIALIZER,   \
     .work = PTHREAD_COND_INITIALIZER,    \
     .done = PTHREAD_COND_INITIALIZER}

enum { SPINS = 150 }; /* a pause takes some 50 ns on x86 since Skylake, less elsewhere */

static pool_t pool = POOL_EMPTY;
static int num_threads; /* 0: not set yet */

static void after_fork_in_child(void) {
    static const pool_t empty = POOL_EMPTY;
    memcpy(&pool, &empty, sizeof(pool));
    num_threads = 1;
}

__attribute__((constructor)) static void set_fork_handler(void) { pthread_atfork(NULL, NULL, after_fork_in_child); }

/* Runs tasks until all have been begun. The caller holds pool.lock, also on return. */
static void take_tasks(int is_worker) {
    while (pool.next_task < pool.num_tasks) {
        void (*fn)(void *, int) = pool.fn;
        void *arg = pool.arg;
        const int task = pool.next_task++;
        __atomic_store_n(&pool.num_running, pool.num_running + is_worker, __ATOMIC_RELAXED);
        pthread_mutex_unlock(&pool.lock);
        fn(arg, task);
        pthread_mutex_lock(&pool.lock);
        __atomic_store_n(&pool.num_running, pool.num_running - is_worker, __ATOMIC_RELAXED);
    }
}

static void *worker_main(void *arg) {
    uint64_t seen = 0;
    for (;;) {
        for (int i = 0; i < SPINS && __atomic_load_n(&pool.generation, __ATOMIC_RELAXED) == seen; i++) he_pause();
        pthread_mutex_lock(&pool.lock);
        while (pool.generation == seen) pthread_cond_wait(&pool.work, &pool.lock);
        seen = pool.generation;
        take_tasks(1);
        if (pool.num_running == 0) pthread_cond_signal(&pool.done);
        pthread_mutex_unlock(&pool.lock);
    }
    return arg;
}

/* Starts workers until there are n - 1; returns how many tasks can run at once. The caller holds in_use. */
static int ensure_workers(int n) {
    while (pool.num_workers + 1 < n) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, worker_main, NULL)) break;
        pthread_detach(thread);
        pool.num_workers++;
    }
    return pool.num_workers + 1;
}

static void run_with_workers(void (*fn)(void *, int), void *arg, int n) {
    pthread_mutex_lock(&pool.lock);
    pool.fn = fn;
    pool.arg = arg;
    pool.num_tasks = n;
    pool.next_task = 0;
    __atomic_store_n(&pool.generation, pool.generation + 1, __ATOMIC_RELAXED);
    pthread_cond_broadcast(&pool.work);
    take_tasks(0);
    if (pool.num_running > 0) {
        pthread_mutex_unlock(&pool.lock);
        for (int i = 0; i < SPINS && __atomic_load_n(&pool.num_running, __ATOMIC_RELAXED) > 0; i++) he_pause();
        pthread_mutex_lock(&pool.lock);
    }
    while (pool.num_running > 0) pthread_cond_wait(&pool.done, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
}

void he_pool_run(void (*fn)(void *, int), void *arg, int n) {
    int together = 1;
    if (n > 1 && pthread_mutex_trylock(&pool.in_use) == 0) {
        together = ensure_workers(n);
        if (together >= n) run_with_workers(fn, arg, n);
        pthread_mutex_unlock(&pool.in_use);
        if (together >= n) return;
    }
    for (int i = 0; i < n; i++) fn(arg, i);
}

static int cpus_allowed(void) {
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof(set), &set)) return 1;
    return HE_MIN(CPU_COUNT(&set), HE_MAX_THREADS);
}

int he_threads_get(void) {
    int n = __atomic_load_n(&num_threads, __ATOMIC_RELAXED);
    if (n == 0) he_threads_set(n = cpus_allowed());
    return n;
}

void he_threads_set(int n) { __atomic_store_n(&num_threads, n, __ATOMIC_RELAXED); }
