/* Applying a planned update: included once per instruction set (kernels.h), after kernels_merge.h.
 *
 * A row is read, stepped and written once. A row that would be stored as all zero bytes, which means "never written",
 * is stored with -0.0 as its first element. */

/* ---- optimisers: w and g are dim floats, s0 and s1 the row's state ---- */

HE_INLINE void step_adagrad(const he_table *t, float lr, const int64_t dim, const float *restrict g, float *restrict w,
                            float *restrict a) {
    HE_SIMD
    for (int64_t j = 0; j < dim; j++) {
        float total = a[j] + g[j] * g[j];
        a[j] = total;
        w[j] -= lr * g[j] / (__builtin_sqrtf(total + t->initial_accumulator) + t->eps);
    }
}

/* Returns mean(g²): sixteen partial sums by lane are added as a tree, in the same order for any vector width. */
HE_INLINE float mean_square(const float *g, const int64_t dim) {
    float lane[16] = {0};
    int64_t j = 0;
    for (; j + 16 <= dim; j += 16) {
        HE_SIMD
        for (int l = 0; l < 16; l++) lane[l] += g[j + l] * g[j + l];
    }
    for (int l = 0; j + l < dim; l++) lane[l] += g[j + l] * g[j + l];
    for (int width = 8; width > 0; width /= 2) {
        HE_SIMD
        for (int l = 0; l < width; l++) lane[l] += lane[l + width];
    }
    return lane[0] / (float)dim;
}

/* Adds to a row's accumulator; returns the row's learning rate. */
HE_INLINE float rowwise_lr(const he_table *t, float lr, const int64_t dim, const float *g, float *a) {
    const float total = *a + mean_square(g, dim);
    *a = total;
    return lr / (__builtin_sqrtf(total + t->initial_accumulator) + t->eps);
}

HE_INLINE void step_sgd(float lr, const int64_t dim, const float *restrict g, float *restrict w) {
    HE_SIMD
    for (int64_t j = 0; j < dim; j++) w[j] -= lr * g[j];
}

HE_INLINE void step_ftrl(const he_table *t, float alpha, int written, const int64_t dim, const float *restrict g,
                         float *restrict w, float *restrict z, float *restrict n) {
    HE_SIMD
    for (int64_t j = 0; j < dim; j++) {
        /* The z of a new row is the value that gives the initial weight. */
        float l1 = w[j] < 0.0f ? -t->l1 : w[j] > 0.0f ? t->l1 : 0.0f;
        float start = written ? z[j] : -w[j] * (t->beta / alpha + t->l2) - l1;
        float n_new = n[j] + g[j] * g[j];
        float root = __builtin_sqrtf(n_new);
        float sigma = (root - __builtin_sqrtf(n[j])) / alpha;
        float z_new = start + (g[j] - sigma * w[j]);
        float magnitude = __builtin_fabsf(z_new) - t->l1;
        float size = magnitude / ((t->beta + root) / alpha + t->l2);
        z[j] = z_new;
        n[j] = n_new;
        w[j] = magnitude <= 0.0f ? 0.0f : z_new < 0.0f ? size : -size;
    }
}

/* Stores a row that begins with 0. It is out of line, or compilers would check all of every row before storing it. */
HE_COLD void store_from_zero(float *restrict dst, const float *restrict w, int64_t dim) {
    /* With +0 others would read a row of zeros as never written. */
    dst[0] = any_bits((const char *)w, dim, HE_FLOAT32) ? 0.0f : -0.0f;
    HE_SIMD
    for (int64_t j = 1; j < dim; j++) dst[j] = w[j];
}

HE_INLINE void store_row(const he_table *t, uint64_t row, uint64_t step, const int64_t dim, const int dtype,
                         const float *w) {
    char *stored = t->weight + row * (uint64_t)(dim * (dtype == HE_FLOAT32 ? 4 : 2));
    if (dtype == HE_FLOAT32) {
        float *dst = (float *)stored;
        if (HE_UNLIKELY(he_bits(w[0]) == 0)) {
            store_from_zero(dst, w, dim);
            return;
        }
        HE_SIMD
        for (int64_t j = 0; j < dim; j++) dst[j] = w[j];
        return;
    }
    uint16_t *dst = (uint16_t *)stored;
    uint64_t seed = he_rounding_seed(t->rounding_key, row, step);
    HE_SIMD
    for (int64_t j = 0; j < dim; j++) {
        uint32_t random = (uint32_t)(he_splitmix64(seed, (uint64_t)j / 2) >> (32 * (j & 1)));
        dst[j] = dtype == HE_FLOAT16 ? he_to_f16(w[j], random) : he_to_bf16(w[j], random);
    }
    if (HE_UNLIKELY(!any_bits(stored, dim, dtype))) dst[0] = 0x8000;
}

/* Reads, steps and writes one row; g is its summed gradient. Returns whether this is the row's first update. */
HE_INLINE int update_row(const he_table *t, const he_step *s, uint64_t row, const int64_t dim, const int dtype,
                         const int optimizer, const float *g, float *w) {
    int written = load_row(t, row, dim, dtype, w);
    if (t->paid) {
        decay_row(t, row, s->decay_total, dim, w);
        t->paid[row] = s->decay_total;
    }
    uint64_t first = row * (uint64_t)dim;
    if (optimizer == HE_ADAGRAD) step_adagrad(t, s->lr, dim, g, w, t->state[0] + first);
    else if (optimizer == HE_ROWWISE_ADAGRAD) step_sgd(rowwise_lr(t, s->lr, dim, g, t->state[0] + row), dim, g, w);
    else if (optimizer == HE_FTRL) step_ftrl(t, s->lr, written, dim, g, w, t->state[0] + first, t->state[1] + first);
    else step_sgd(s->lr, dim, g, w);
    store_row(t, row, s->step, dim, dtype, w);
    return !written;
}

/* Copies a gradient from the caller's array, scaled, and returns whether it is not finite: the checked copy is used. */
HE_INLINE int copy_grad(const float *restrict grad, float scale, const int64_t dim, float *restrict copy) {
    const uint32_t exponent = UINT32_C(0x7F800000);
    int64_t j = 0;
    int bad = 0;
    for (; j + 16 <= dim; j += 16) {
        HE_SIMD
        for (int l = 0; l < 16; l++) copy[j + l] = grad[j + l] * scale;
        bad |= not_finite_16(copy + j);
    }
    HE_SIMD_OR(bad)
    for (int64_t l = j; l < dim; l++) {
        const float g = grad[l] * scale;
        copy[l] = g;
        bad |= (he_bits(g) & exponent) == exponent;
    }
    return bad;
}

/* Returns where row u's gradient is, and the scale that it still needs. */
HE_INLINE const float *gradient(const he_table *t, const he_plan *p, const he_share *share, int64_t u,
                                const int64_t dim, float *scale) {
    const uint64_t source = share->sources[u];
    int64_t key;
    *scale = 1.0f;
    if (source & HE_SUMMED) return share->sums + (int64_t)(source & ~HE_SUMMED) * dim;
    const float *grad = grad_of(p, t->num_hashes, source, dim, &key);
    if (p->scales) *scale = p->scales[key];
    return grad;
}

/* Stores the head of a row, which begins with 0, after the rest of the row has been stored. */
HE_COLD void store_head_from_zero(float *restrict dst, const float *restrict head, int64_t dim) {
    const int rest = any_bits((const char *)head, HE_HEAD, HE_FLOAT32) ||
                     (dim > HE_HEAD && any_bits((const char *)(dst + HE_HEAD), dim - HE_HEAD, HE_FLOAT32));
    dst[0] = rest ? 0.0f : -0.0f; /* or others would read the row as never written */
    HE_SIMD
    for (int64_t j = 1; j < HE_HEAD; j++) dst[j] = head[j];
}

/* Does the same as update_row for a float32 row that does not begin with 0, and owes no decay. dim is a constant: the
 * gradient stays in registers, and the row is stepped in place. Its head comes last: until then it begins with the old
 * value. Returns whether the gradient is not finite. */
HE_INLINE int update_in_place(const he_table *t, const he_step *s, uint64_t row, const int64_t dim, const int optimizer,
                              const float *grad, float scale, uint64_t *in_flight) {
    float g[HE_IN_PLACE_DIM], head[HE_HEAD];
    float *w = (float *)t->weight + row * (uint64_t)dim;
    if (HE_UNLIKELY(copy_grad(grad, scale, dim, g))) return 1;
    he_note(in_flight, row + 1);
    HE_SIMD
    for (int64_t j = 0; j < HE_HEAD; j++) head[j] = w[j];
    if (optimizer == HE_ADAGRAD) {
        float *a = t->state[0] + row * (uint64_t)dim;
        step_adagrad(t, s->lr, dim - HE_HEAD, g + HE_HEAD, w + HE_HEAD, a + HE_HEAD);
        step_adagrad(t, s->lr, HE_HEAD, g, head, a);
    } else {
        const float lr = rowwise_lr(t, s->lr, dim, g, t->state[0] + row);
        step_sgd(lr, dim - HE_HEAD, g + HE_HEAD, w + HE_HEAD);
        step_sgd(lr, HE_HEAD, g, head);
    }
    if (HE_UNLIKELY(he_bits(head[0]) == 0)) {
        store_head_from_zero(w, head, dim);
        return 0;
    }
    HE_SIMD
    for (int64_t j = 0; j < HE_HEAD; j++) w[j] = head[j];
    return 0;
}

HE_INLINE void prefetch_row(const he_table *t, const he_plan *p, const he_share *share, int64_t u, const int64_t dim,
                            const int dtype, const int optimizer) {
    const uint64_t row = share->rows[u], source = share->sources[u];
    const int64_t row_bytes = dim * (dtype == HE_FLOAT32 ? 4 : 2);
    int64_t key;
    he_prefetch_range(t->weight + row * (uint64_t)row_bytes, row_bytes, HE_WRITE);
    if (optimizer == HE_ADAGRAD || optimizer == HE_FTRL)
        he_prefetch_range(t->state[0] + row * (uint64_t)dim, dim * 4, HE_WRITE);
    if (optimizer == HE_ROWWISE_ADAGRAD) he_prefetch(t->state[0] + row, HE_WRITE);
    if (optimizer == HE_FTRL) he_prefetch_range(t->state[1] + row * (uint64_t)dim, dim * 4, HE_WRITE);
    if (t->paid) he_prefetch(t->paid + row, HE_WRITE);
    if (!(source & HE_SUMMED)) he_prefetch_range(grad_of(p, t->num_hashes, source, dim, &key), dim * 4, HE_NEAR);
}

HE_INLINE void apply_rows(const he_table *t, const he_plan *p, he_share *share, const he_step *s, const int64_t dim,
                          const int dtype, const int optimizer) {
    const int64_t n = share->num_rows, ahead = HE_MAX(2, HE_UPDATE_AHEAD / ((dim + 15) / 16));
    float *w = share->scratch + dim;
    uint64_t rows_touched = 0, rows_refused = 0; /* local, as shares are adjacent in memory */
    uint64_t *const in_flight = share->in_flight;
    const int in_place = dtype == HE_FLOAT32 && (optimizer == HE_ADAGRAD || optimizer == HE_ROWWISE_ADAGRAD) &&
                         __builtin_constant_p(dim) && dim % HE_HEAD == 0 && dim <= HE_IN_PLACE_DIM;
    const float *weight = (const float *)t->weight; /* if in place */
    const int paid = t->paid != NULL;
    for (int64_t u = 0; u < HE_MIN(n, ahead); u++) prefetch_row(t, p, share, u, dim, dtype, optimizer);
    for (int64_t u = 0; u < n; u++) {
        if (u + ahead < n) prefetch_row(t, p, share, u + ahead, dim, dtype, optimizer);
        const uint64_t row = share->rows[u];
        float scale;
        const float *grad = gradient(t, p, share, u, dim, &scale);
        if (in_place && HE_LIKELY(!paid && he_bits(weight[row * (uint64_t)dim]) != 0)) {
            rows_refused += (uint64_t)update_in_place(t, s, row, dim, optimizer, grad, scale, in_flight);
            continue;
        }
        if (HE_UNLIKELY(copy_grad(grad, scale, dim, share->scratch))) {
            rows_refused++;
            continue;
        }
        he_note(in_flight, row + 1);
        rows_touched += (uint64_t)update_row(t, s, row, dim, dtype, optimizer, share->scratch, w);
    }
    he_note(in_flight, 0);
    share->rows_touched = rows_touched;
    share->rows_refused = rows_refused;
}

/* ---- specialised copies: float32 rows of the usual dimensions, with either Adagrad, have their own functions ---- */

#define HE_DIMS(HE_DIM) HE_DIM(1) HE_DIM(8) HE_DIM(16) HE_DIM(32) HE_DIM(64)
#define HE_APPLY_COPY(d)                                                                                     \
    HE_COLD void apply_adagrad_##d(const he_table *t, const he_plan *p, he_share *share, const he_step *s) { \
        apply_rows(t, p, share, s, d, HE_FLOAT32, HE_ADAGRAD);                                               \
    }                                                                                                        \
    HE_COLD void apply_rowwise_##d(const he_table *t, const he_plan *p, he_share *share, const he_step *s) { \
        apply_rows(t, p, share, s, d, HE_FLOAT32, HE_ROWWISE_ADAGRAD);                                       \
    }
HE_DIMS(HE_APPLY_COPY)
#undef HE_APPLY_COPY

static void apply_adagrad(const he_table *t, const he_plan *p, he_share *share, const he_step *s) {
#define HE_CASE(d) \
    case d: apply_adagrad_##d(t, p, share, s); return;
    switch (t->dim) {
        HE_DIMS(HE_CASE)
        default: apply_rows(t, p, share, s, t->dim, HE_FLOAT32, HE_ADAGRAD);
    }
#undef HE_CASE
}

static void apply_rowwise(const he_table *t, const he_plan *p, he_share *share, const he_step *s) {
#define HE_CASE(d) \
    case d: apply_rowwise_##d(t, p, share, s); return;
    switch (t->dim) {
        HE_DIMS(HE_CASE)
        default: apply_rows(t, p, share, s, t->dim, HE_FLOAT32, HE_ROWWISE_ADAGRAD);
    }
#undef HE_CASE
}
#undef HE_DIMS

static void apply(const he_table *t, const he_plan *p, he_share *share, const he_step *s) {
    if (t->dtype == HE_FLOAT16) apply_rows(t, p, share, s, t->dim, HE_FLOAT16, t->optimizer);
    else if (t->dtype == HE_BFLOAT16) apply_rows(t, p, share, s, t->dim, HE_BFLOAT16, t->optimizer);
    else if (t->optimizer == HE_ADAGRAD) apply_adagrad(t, p, share, s);
    else if (t->optimizer == HE_ROWWISE_ADAGRAD) apply_rowwise(t, p, share, s);
    else apply_rows(t, p, share, s, t->dim, HE_FLOAT32, t->optimizer == HE_FTRL ? HE_FTRL : HE_SGD);
}
