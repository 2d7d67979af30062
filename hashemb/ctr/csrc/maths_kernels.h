/* Compute logit, probability and gradients, example by example: static functions, included once per instruction set by
 * maths_baseline.c, maths_avx2.c and maths_avx512.c, each of which exports one hm_kernels.
 *
 * An example's vectors are read into rows padded to whole lanes, y_i = x_i v_i, and stay in the first-level cache from
 * the logit to the gradients, which replace them. Lanes past dim hold arbitrary data; no result reads them. Loops over
 * lanes are vectorised, but the order of additions is fixed. */

/* Return whether HM_LANES-wide accesses to vector i stay within the example. Stores proceed upwards, so the next stores
 * overwrite what such a store has written past its vector. */
HE_INLINE int fits(const hm_example *x, int64_t i, int64_t dim, int64_t stride) {
    return i * dim + stride <= x->n * dim;
}

HE_INLINE void load_rows(const hm_example *x, int64_t dim, int64_t stride, float *restrict rows) {
    for (int64_t i = 0; i < x->n; i++) {
        const float *v = x->vectors + i * dim;
        const float value = hm_value(x, i);
        const int64_t width = fits(x, i, dim, stride) ? stride : dim;
        int64_t j = 0;
        for (; j + HM_LANES <= width; j += HM_LANES) {
            HE_SIMD
            for (int l = 0; l < HM_LANES; l++) rows[i * stride + j + l] = value * v[j + l];
        }
        for (; j < width; j++) rows[i * stride + j] = value * v[j];
    }
}

/* Return the sum of lanes[1 .. dim): sixteen partial sums by lane, added as a tree. The lanes are overwritten. */
HE_INLINE float fold(float *lanes, int64_t dim) {
    const int64_t stride = hm_padded(dim);
    lanes[0] = 0.0f;
    for (int64_t j = dim; j < stride; j++) lanes[j] = 0.0f;
    for (int64_t j = HM_LANES; j < stride; j += HM_LANES) {
        HE_SIMD
        for (int l = 0; l < HM_LANES; l++) lanes[l] += lanes[j + l];
    }
    for (int width = HM_LANES / 2; width > 0; width /= 2) {
        HE_SIMD
        for (int l = 0; l < width; l++) lanes[l] += lanes[l + width];
    }
    return lanes[0];
}

/* ---- gather an example's vectors, scatter its gradients ---- */

HE_INLINE void gather(const hm_batch *b, const hm_example *x, float *restrict vectors, const int64_t dim) {
    for (int64_t i = 0; i < x->n; i++) {
        const float *restrict v = b->vectors + x->index[i] * dim;
        if (b->labels && dim >= HM_LANES) he_prefetch_range(b->gradients + x->index[i] * dim, dim * 4, HE_WRITE);
        HE_SIMD
        for (int64_t j = 0; j < dim; j++) vectors[i * dim + j] = v[j];
    }
}

HE_INLINE void scatter(const hm_batch *b, const hm_example *x, const int64_t dim) {
    for (int64_t i = 0; i < x->n; i++) {
        float *restrict sum = b->gradients + x->index[i] * dim;
        const float *restrict g = x->vectors + i * dim;
        HE_SIMD
        for (int64_t j = 0; j < dim; j++) sum[j] += g[j];
    }
}

HE_INLINE void gather_vectors(const hm_batch *b, const hm_example *x) {
    switch (b->dim) {
        case 1: gather(b, x, x->vectors, 1); break;
        case 16: gather(b, x, x->vectors, 16); break;
        default: gather(b, x, x->vectors, b->dim);
    }
}

HE_INLINE void scatter_gradients(const hm_batch *b, const hm_example *x) {
    switch (b->dim) {
        case 1: scatter(b, x, 1); break;
        case 16: scatter(b, x, 16); break;
        default: scatter(b, x, b->dim);
    }
}

static void add_batch(const hm_batch *b, const hm_scratch *s) {
    for (int64_t e = 0; e < b->num_examples; e++) {
        const hm_example x = hm_example_at(b, s, e);
        scatter_gradients(b, &x);
    }
}

/* ---- logistic regression: rows of one element ---- */

HE_INLINE float linear_logit(const hm_example *x, int64_t dim) {
    float sum = 0.0f;
    for (int64_t i = 0; i < x->n; i++) sum += hm_value(x, i) * x->vectors[i * dim];
    return sum;
}

HE_INLINE void linear_gradients(const hm_example *x, int64_t dim, float residual) {
    for (int64_t i = 0; i < x->n; i++) x->vectors[i * dim] = residual * hm_value(x, i);
}

/* ---- factorisation machine: <w, x> + 1/2 sum_i <y_i, s - y_i>, s = sum_i y_i ---- */

HE_INLINE float fm_logit(const float *rows, int64_t n, int64_t dim, int64_t stride, float *restrict sums,
                         float *restrict lanes) {
    for (int64_t t = 0; t < stride; t += HM_LANES) {
        float s[HM_LANES] = {0}, a[HM_LANES] = {0};
        for (int64_t i = 0; i < n; i++) {
            HE_SIMD
            for (int l = 0; l < HM_LANES; l++) s[l] += rows[i * stride + t + l];
        }
        for (int64_t i = 0; i < n; i++) {
            HE_SIMD
            for (int l = 0; l < HM_LANES; l++) a[l] += rows[i * stride + t + l] * (s[l] - rows[i * stride + t + l]);
        }
        memcpy(sums + t, s, sizeof(s));
        memcpy(lanes + t, a, sizeof(a));
    }
    return sums[0] + 0.5f * fold(lanes, dim);
}

/* g_i = residual x_i (s - y_i). `rows` may be the vectors themselves. */
HE_INLINE void fm_gradients(const hm_example *x, const float *rows, const float *sums, int64_t dim, int64_t stride,
                            float residual) {
    for (int64_t i = 0; i < x->n; i++) {
        float *g = x->vectors + i * dim;
        const float scale = residual * hm_value(x, i), *y = rows + i * stride;
        const int64_t width = fits(x, i, dim, stride) ? stride : dim;
        int64_t j = 0;
        for (; j + HM_LANES <= width; j += HM_LANES) {
            HE_SIMD
            for (int l = 0; l < HM_LANES; l++) g[j + l] = scale * (sums[j + l] - y[j + l]);
        }
        for (; j < width; j++) g[j] = scale * (sums[j] - y[j]);
        g[0] = scale;
    }
}

/* ---- field-weighted FM: <w, x> + 1/2 sum_i <y_i, u_i>, u_i = sum_{j != i} r_{F(i) F(j)} y_j ---- */

HE_INLINE float fwfm_logit(const hm_batch *b, const hm_example *x, const hm_scratch *s, int64_t stride) {
    memset(s->lanes, 0, (size_t)stride * sizeof(float));
    for (int64_t i = 0; i < x->n; i++) {
        const float *pair_weights = b->pair_weights + hm_field(x, i) * b->num_fields;
        for (int64_t t = 0; t < stride; t += HM_LANES) {
            float u[HM_LANES] = {0}, *lanes = s->lanes + t;
            const float *y = s->rows + i * stride + t;
            for (int64_t j = 0; j < x->n; j++) {
                const float r = pair_weights[hm_field(x, j)], *yj = s->rows + j * stride + t;
                if (j == i) continue;
                HE_SIMD
                for (int l = 0; l < HM_LANES; l++) u[l] += r * yj[l];
            }
            HE_SIMD
            for (int l = 0; l < HM_LANES; l++) lanes[l] += y[l] * u[l];
            memcpy(s->others + i * stride + t, u, sizeof(u));
        }
    }
    return linear_logit(x, b->dim) + 0.5f * fold(s->lanes, b->dim);
}

/* Add residual y_i * y_j to each pair of fields, lane by lane. */
HE_INLINE void fwfm_pair_gradients(const hm_example *x, const hm_scratch *s, int64_t stride, float residual) {
    for (int64_t i = 1; i < x->n; i++)
        for (int64_t t = 0; t < stride; t += HM_LANES) {
            float q[HM_LANES];
            HE_SIMD
            for (int l = 0; l < HM_LANES; l++) q[l] = residual * s->rows[i * stride + t + l];
            for (int64_t j = 0; j < i; j++) {
                float *pair = s->pairs + hm_pair(hm_field(x, i), hm_field(x, j)) * stride + t;
                const float *y = s->rows + j * stride + t;
                HE_SIMD
                for (int l = 0; l < HM_LANES; l++) pair[l] += q[l] * y[l];
            }
        }
}

/* g_i = residual x_i u_i */
HE_INLINE void fwfm_gradients(const hm_example *x, const hm_scratch *s, int64_t dim, int64_t stride, float residual) {
    for (int64_t i = 0; i < x->n; i++) {
        float *g = x->vectors + i * dim;
        const float scale = residual * hm_value(x, i), *u = s->others + i * stride;
        HE_SIMD
        for (int64_t j = 0; j < dim; j++) g[j] = scale * u[j];
        g[0] = scale;
    }
}

/* ---- field-aware FM: <w, x> + sum_{i<j} x_i x_j <v_i[F(j)], v_j[F(i)]>, where v_i[f] has `rank` elements ---- */

/* Add c <v_i[F(j)], v_j[F(i)]> for all j > i, element by element from `first` on, to the lanes; each i has a separate
 * sum. */
HE_INLINE void ffm_meet(const hm_batch *b, const hm_example *x, int64_t i, int64_t first, const int64_t rank,
                        float *lanes) {
    const int64_t width = HE_MIN(rank - first, HM_LANES);
    const float *vi = x->vectors + i * b->dim + 1 + first, *vj = vi + b->dim + hm_field(x, i) * rank,
                value = hm_value(x, i);
    float sum[HM_LANES] = {0};
    for (int64_t j = i + 1; j < x->n; j++, vj += b->dim) {
        const float *vi_of = vi + hm_field(x, j) * rank, c = value * hm_value(x, j);
        HE_SIMD
        for (int64_t k = 0; k < width; k++) sum[k] += c * (vi_of[k] * vj[k]);
    }
    for (int64_t k = 0; k < width; k++) lanes[first + k] += sum[k];
}

HE_INLINE float ffm_logit(const hm_batch *b, const hm_example *x, float *lanes, const int64_t rank) {
    memset(lanes, 0, (size_t)hm_padded(1 + rank) * sizeof(float));
    for (int64_t i = 0; i < x->n; i++)
        for (int64_t first = 0; first < rank; first += HM_LANES) ffm_meet(b, x, i, first, rank, lanes + 1);
    return linear_logit(x, b->dim) + fold(lanes, 1 + rank);
}

/* If each field occurs once, in the order of the fields, the gradients of a pair are each other's vectors: a
 * transposition. */
HE_INLINE void ffm_swap(const hm_batch *b, const hm_example *x, const int64_t rank, float residual) {
    for (int64_t i = 0; i < x->n; i++) {
        float *vi = x->vectors + i * b->dim + 1;
        for (int64_t j = i + 1; j < x->n; j++) {
            float *restrict p = vi + j * rank, *restrict q = x->vectors + j * b->dim + 1 + i * rank;
            const float c = residual * (hm_value(x, i) * hm_value(x, j));
            HE_SIMD
            for (int64_t k = 0; k < rank; k++) {
                const float kept = p[k];
                p[k] = c * q[k];
                q[k] = c * kept;
            }
        }
        memset(vi + i * rank, 0, (size_t)rank * sizeof(float)); /* no value interacts with another of its own field */
    }
    linear_gradients(x, b->dim, residual);
}

HE_INLINE void ffm_sum(const hm_batch *b, const hm_example *x, float *gradients, const int64_t rank, float residual) {
    memset(gradients, 0, (size_t)(x->n * b->dim) * sizeof(float));
    for (int64_t i = 0; i < x->n; i++)
        for (int64_t j = i + 1; j < x->n; j++) {
            const int64_t at_i = i * b->dim + 1 + hm_field(x, j) * rank, at_j = j * b->dim + 1 + hm_field(x, i) * rank;
            const float c = residual * (hm_value(x, i) * hm_value(x, j));
            float *restrict gi = gradients + at_i, *restrict gj = gradients + at_j;
            HE_SIMD
            for (int64_t k = 0; k < rank; k++) {
                gi[k] += c * x->vectors[at_j + k];
                gj[k] += c * x->vectors[at_i + k];
            }
        }
    memcpy(x->vectors, gradients, (size_t)(x->n * b->dim) * sizeof(float));
    linear_gradients(x, b->dim, residual);
}

/* ---- any model ---- */

/* If `stride` is 0, the vectors themselves are whole rows. */
HE_INLINE float example_logit(const hm_batch *b, const hm_example *x, const hm_scratch *s, int64_t stride,
                              int64_t rank) {
    if (b->dim == 1) return linear_logit(x, 1);
    if (b->kind == HM_FFM) return ffm_logit(b, x, s->lanes, rank);
    if (!stride) return fm_logit(x->vectors, x->n, b->dim, b->dim, s->sums, s->lanes);
    load_rows(x, b->dim, stride, s->rows);
    if (b->kind == HM_FM) return fm_logit(s->rows, x->n, b->dim, stride, s->sums, s->lanes);
    return fwfm_logit(b, x, s, stride);
}

HE_INLINE void example_gradients(const hm_batch *b, const hm_example *x, const hm_scratch *s, int64_t stride,
                                 int64_t rank, float residual) {
    if (b->dim == 1) {
        linear_gradients(x, 1, residual);
    } else if (b->kind == HM_FM) {
        fm_gradients(x, stride ? s->rows : x->vectors, s->sums, b->dim, stride ? stride : b->dim, residual);
    } else if (b->kind == HM_FWFM) {
        fwfm_pair_gradients(x, s, stride, residual);
        fwfm_gradients(x, s, b->dim, stride, residual);
    } else if (x->fields) {
        ffm_sum(b, x, s->rows, rank, residual);
    } else {
        ffm_swap(b, x, rank, residual);
    }
}

HE_INLINE void run_examples(const hm_batch *b, const hm_scratch *s, int64_t begin, int64_t end, int64_t rank,
                            hm_shared *shared) {
    const int64_t stride = b->kind == HM_FM && !b->values && b->dim % HM_LANES == 0 ? 0 : hm_padded(b->dim);
    double total = 0.0;
    for (int64_t e = begin; e < end; e++) {
        const hm_example x = hm_example_at(b, s, e);
        if (b->index) gather_vectors(b, &x);
        const float z = b->bias + example_logit(b, &x, s, stride, rank);
        const double p = hm_probability((double)z);
        b->out[e] = b->wants_logits || !__builtin_isfinite(z) ? z : (float)p;
        if (!b->labels) continue;
        const float residual = (float)((b->weights ? (double)b->weights[e] : 1.0) * (p - (double)b->labels[e]));
        example_gradients(b, &x, s, stride, rank, residual);
        if (!s->has_batch) scatter_gradients(b, &x);
        total += (double)residual;
    }
    shared->residual = total;
}

static void run_block(const hm_batch *b, const hm_scratch *s, int64_t block, hm_shared *shared) {
    const int64_t begin = block * HM_BLOCK, end = HE_MIN(begin + HM_BLOCK, b->num_examples), stride = hm_padded(b->dim);
    const int64_t pairs = b->labels ? hm_num_pairs(b) : 0;
    memset(s->pairs, 0, (size_t)(pairs * stride) * sizeof(float));
    if (b->kind != HM_FFM) run_examples(b, s, begin, end, 0, shared);
    else switch ((b->dim - 1) / HE_MAX(b->num_fields, 1)) {
            case 4: run_examples(b, s, begin, end, 4, shared); break;
            case 8: run_examples(b, s, begin, end, 8, shared); break;
            default: run_examples(b, s, begin, end, (b->dim - 1) / HE_MAX(b->num_fields, 1), shared);
        }
    for (int64_t p = 0; p < pairs; p++) shared->pairs[p] = fold(s->pairs + p * stride, b->dim);
}
