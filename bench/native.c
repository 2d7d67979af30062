/* The minimum work for the memory accesses of a look-up or an update: no hashing, no duplicates, no optimiser, and the
 * rows are given. The time of these loops is the limit of the machine. The consumer that reads results is here too.
 * native.py compiles this file at run time; threads divide the loops by position in the batch. */
#include <immintrin.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>

enum { LINE_BYTES = 64, MAX_THREADS = 64 };

typedef struct {
    char *weight;
    float *state;
    const int64_t *rows, *order; /* order: which gradient each row takes, or NULL for the i-th */
    const float *grads;
    char *out;
    int64_t dim, state_dim;
    float scale;
    int ahead, nontemporal, far; /* far: prefetch to the second-level cache only */
} work;

typedef struct {
    void (*fn)(const work *, int64_t begin, int64_t end, double *sum);
    const work *w;
    int64_t begin, end;
    double sum;
} task;

static void *run_task(void *arg) {
    task *t = arg;
    t->fn(t->w, t->begin, t->end, &t->sum);
    return NULL;
}

static double run(void (*fn)(const work *, int64_t, int64_t, double *), const work *w, int64_t n, int num_threads) {
    pthread_t threads[MAX_THREADS];
    task tasks[MAX_THREADS];
    double sum = 0.0;
    for (int i = 0; i < num_threads; i++) {
        tasks[i] = (task){fn, w, n * i / num_threads, n * (i + 1) / num_threads, 0.0};
        if (i > 0 && pthread_create(&threads[i], NULL, run_task, &tasks[i])) __builtin_trap();
    }
    run_task(&tasks[0]);
    for (int i = 1; i < num_threads; i++) pthread_join(threads[i], NULL);
    for (int i = 0; i < num_threads; i++) sum += tasks[i].sum;
    return sum;
}

static void sum_share(const work *w, int64_t begin, int64_t end, double *sum) {
    enum { LANES = 64 }; /* independent sums hide the latency of the additions */
    const float *values = w->grads;
    float lanes[LANES] = {0};
    for (; begin + LANES <= end; begin += LANES)
        for (int l = 0; l < LANES; l++) lanes[l] += values[begin + l];
    for (; begin < end; begin++) lanes[0] += values[begin];
    for (int l = 0; l < LANES; l++) *sum += lanes[l];
}

/* The consumer: reads every value once, at memory bandwidth. */
double bench_sum(const float *values, int64_t n, int num_threads) {
    work w = {.grads = values};
    return run(sum_share, &w, n, num_threads);
}

static inline __attribute__((always_inline)) void copy_row(char *out, const char *row, int64_t bytes, int nontemporal) {
#ifdef __AVX2__
    if (nontemporal) {
        for (int64_t i = 0; i < bytes; i += 32)
            _mm256_stream_si256((__m256i *)(out + i), _mm256_loadu_si256((const __m256i *)(row + i)));
        return;
    }
#else
    (void)nontemporal;
#endif
    memcpy(out, row, bytes);
}

enum { READ, WRITE, READ_FAR };

static inline __attribute__((always_inline)) void prefetch(const char *p, int64_t bytes, const int kind) {
    const char *line = (const char *)((uintptr_t)p & ~(uintptr_t)(LINE_BYTES - 1));
    for (; line < p + bytes; line += LINE_BYTES)
        if (kind == WRITE) __builtin_prefetch(line, 1, 3);
        else if (kind == READ_FAR) __builtin_prefetch(line, 0, 2);
        else __builtin_prefetch(line, 0, 3);
}

static inline __attribute__((always_inline)) void gather_rows_from(const work *w, int64_t begin, int64_t end, int64_t bytes,
                                                                   const int kind) {
    for (int64_t i = begin; i < end && i < begin + w->ahead; i++) prefetch(w->weight + w->rows[i] * bytes, bytes, kind);
    for (int64_t i = begin; i < end; i++) {
        if (i + w->ahead < end) prefetch(w->weight + w->rows[i + w->ahead] * bytes, bytes, kind);
        copy_row(w->out + i * bytes, w->weight + w->rows[i] * bytes, bytes, w->nontemporal);
    }
}

static inline __attribute__((always_inline)) void gather_rows(const work *w, int64_t begin, int64_t end, int64_t bytes) {
    if (w->far) gather_rows_from(w, begin, end, bytes, READ_FAR);
    else gather_rows_from(w, begin, end, bytes, READ);
}

static void gather_share(const work *w, int64_t begin, int64_t end, double *sum) {
    (void)sum;
    switch (w->dim) {
        case 4: gather_rows(w, begin, end, 16); break;
        case 8: gather_rows(w, begin, end, 32); break;
        case 16: gather_rows(w, begin, end, 64); break;
        case 32: gather_rows(w, begin, end, 128); break;
        case 64: gather_rows(w, begin, end, 256); break;
        case 128: gather_rows(w, begin, end, 512); break;
        default: gather_rows(w, begin, end, w->dim * 4);
    }
    if (w->nontemporal) _mm_sfence();
}

/* out[i] = weight[rows[i]]; `nontemporal` needs rows whose size is a multiple of 32 bytes and `out` aligned to 32. */
void bench_gather(char *weight, int64_t dim, const int64_t *rows, int64_t n, char *out, int ahead, int nontemporal,
                  int far, int num_threads) {
    work w = {.weight = weight, .dim = dim, .rows = rows, .out = out, .ahead = ahead, .nontemporal = nontemporal,
              .far = far};
    run(gather_share, &w, n, num_threads);
}

static inline __attribute__((always_inline)) void prefetch_update(const work *w, int64_t i, int64_t dim, int64_t state_dim) {
    int64_t row = w->rows[i];
    prefetch(w->weight + row * dim * 4, dim * 4, WRITE);
    if (w->order) prefetch((const char *)(w->grads + w->order[i] * dim), dim * 4, READ);
    if (state_dim) prefetch((const char *)(w->state + row * state_dim), state_dim * 4, WRITE);
}

static inline __attribute__((always_inline)) void update_rows(const work *w, int64_t begin, int64_t end, int64_t dim,
                                                              int64_t state_dim) {
    for (int64_t i = begin; i < end && i < begin + w->ahead; i++) prefetch_update(w, i, dim, state_dim);
    for (int64_t i = begin; i < end; i++) {
        if (i + w->ahead < end) prefetch_update(w, i + w->ahead, dim, state_dim);
        const float *restrict g = w->grads + (w->order ? w->order[i] : i) * dim;
        float *restrict row = (float *)w->weight + w->rows[i] * dim;
        float *restrict state = w->state + w->rows[i] * state_dim;
        if (state_dim == dim) {
            /* Both are read before either is written: they lie at the same offset in their pages, and a load
             * waits for an earlier store whose address has the same low 12 bits. */
            for (int64_t j = 0; j < dim; j++) {
                float s = state[j], r = row[j], change = g[j] * w->scale;
                state[j] = s + change;
                row[j] = r + change;
            }
            continue;
        }
        for (int64_t j = 0; j < dim; j++) row[j] += g[j] * w->scale;
        for (int64_t j = 0; j < state_dim; j++) state[j] += g[j] * w->scale;
    }
}

#define CASE(d)                                                     \
    case d:                                                         \
        if (w->state_dim > 1) update_rows(w, begin, end, d, d);     \
        else if (w->state_dim) update_rows(w, begin, end, d, 1);    \
        else update_rows(w, begin, end, d, 0);                      \
        break;

static void update_share(const work *w, int64_t begin, int64_t end, double *sum) {
    (void)sum;
    switch (w->dim) {
        CASE(4) CASE(8) CASE(16) CASE(32) CASE(64) CASE(128)
        default: update_rows(w, begin, end, w->dim, w->state_dim);
    }
}

/* Adds scale * grads[order[i]] to weight[rows[i]] and to state[rows[i]]; the rows must be distinct. */
void bench_update(char *weight, float *state, int64_t dim, int64_t state_dim, const int64_t *rows, const int64_t *order,
                  int64_t n, const float *grads, float scale, int ahead, int num_threads) {
    work w = {.weight = weight, .state = state, .dim = dim, .state_dim = state_dim, .rows = rows, .order = order,
              .grads = grads, .scale = scale, .ahead = ahead};
    run(update_share, &w, n, num_threads);
}
