/* Reading rows: included once per instruction set (kernels.h).
 *
 * The code lets the compiler vectorise over a row (dim is a constant in the specialised copies) without changing
 * the order of additions. A weight row whose bytes are all zero has never been written, and is read as its initial
 * value. */

HE_INLINE uint32_t init_bits(const he_table *t, uint64_t first_pair, int64_t j) {
    return (uint32_t)(he_splitmix64(t->init_key, first_pair + (uint64_t)j / 2) >> (32 * (j & 1)));
}

HE_COLD void init_row(const he_table *t, uint64_t row, int64_t dim, float *out) {
    uint64_t pair = row * (uint64_t)((dim + 1) / 2);
    if (t->init == HE_ZEROS) {
        memset(out, 0, (size_t)dim * sizeof(float));
    } else if (t->init == HE_UNIFORM) {
        for (int64_t j = 0; j < dim; j++)
            out[j] = ((float)(int32_t)(init_bits(t, pair, j) >> 8) * 0x1p-23f - 1.0f) * t->init_scale;
    } else {
        for (int64_t j = 0; j < dim; j++)
            out[j] = (float)(he_normal_quantile(((double)init_bits(t, pair, j) + 0.5) * 0x1p-32) * t->init_std);
    }
}

HE_INLINE uint32_t stored_bits(const char *row, int64_t j, const int dtype) {
    return dtype == HE_FLOAT32 ? he_bits(((const float *)row)[j]) : ((const uint16_t *)row)[j];
}

/* Returns whether any stored value has a byte that is not zero; the first value nearly always decides. */
HE_INLINE int any_bits(const char *row, const int64_t dim, const int dtype) {
    if (HE_LIKELY(stored_bits(row, 0, dtype))) return 1;
    uint32_t any = 0;
    for (int64_t j = 1; j < dim; j++) any |= stored_bits(row, j, dtype);
    return any != 0;
}

/* Returns whether the row has been written, and its value in `out`, before the decay that it owes. */
HE_INLINE int load_row(const he_table *t, uint64_t row, const int64_t dim, const int dtype, float *out) {
    const char *stored = t->weight + row * (uint64_t)(dim * (dtype == HE_FLOAT32 ? 4 : 2));
    if (HE_UNLIKELY(!any_bits(stored, dim, dtype))) {
        init_row(t, row, dim, out);
        return 0;
    }
    HE_SIMD
    for (int64_t j = 0; j < dim; j++) {
        if (dtype == HE_FLOAT32) out[j] = ((const float *)stored)[j];
        else
            out[j] = dtype == HE_FLOAT16 ? he_from_f16(((const uint16_t *)stored)[j])
                                         : he_from_bf16(((const uint16_t *)stored)[j]);
    }
    return 1;
}

HE_COLD void decay_row(const he_table *t, uint64_t row, double decay_total, int64_t dim, float *out) {
    float factor = (float)he_exp(decay_total - t->paid[row]);
    HE_SIMD
    for (int64_t j = 0; j < dim; j++) out[j] *= factor;
}

HE_INLINE void read_row(const he_table *t, uint64_t row, const int64_t dim, const int dtype, double decay_total,
                        float *out) {
    load_row(t, row, dim, dtype, out);
    if (t->paid) decay_row(t, row, decay_total, dim, out);
}

/* Reads a key's vector: the sum of its k = num_hashes rows, first to last. tmp holds dim floats. */
HE_INLINE void read_key(const he_table *t, const uint64_t *rows, const int64_t k, const int64_t dim, const int dtype,
                        double decay_total, float *restrict tmp, float *restrict out) {
    read_row(t, rows[0], dim, dtype, decay_total, out);
    for (int64_t h = 1; h < k; h++) {
        read_row(t, rows[h], dim, dtype, decay_total, tmp);
        HE_SIMD
        for (int64_t j = 0; j < dim; j++) out[j] += tmp[j];
    }
}

/* ---- the stream of rows: hashed and prefetched some keys ahead ---- */

/* Returns a distance long enough for a row to arrive, and short enough for it to still be in the second-level cache. */
HE_INLINE int64_t keys_ahead(const he_table *t, int64_t k) {
    const int64_t lines = (t->row_bytes + HE_LINE_BYTES - 1) / HE_LINE_BYTES * k;
    return HE_MIN(HE_RING - 1, HE_MAX(2, HE_LOOKUP_LINES_AHEAD / lines));
}

/* Keys [0, end) of a part of a call; the rows of the next `ahead` keys are known and being prefetched. */
typedef struct {
    const uint64_t *keys;
    int64_t end, ahead;
    uint64_t rows[HE_RING * HE_MAX_HASHES];
} stream;

HE_INLINE void stream_fetch(const he_table *t, stream *s, int64_t i, const int64_t k, const int64_t dim,
                            const int dtype) {
    const int64_t row_bytes = dim * (dtype == HE_FLOAT32 ? 4 : 2);
    uint64_t *rows = s->rows + (int64_t)((uint64_t)i % HE_RING) * k;
    for (int64_t h = 0; h < k; h++) {
        const uint64_t row = rows[h] = he_row(s->keys[i], t->salts[h], t->num_rows);
        he_prefetch_range(t->weight + row * (uint64_t)row_bytes, row_bytes, HE_FAR);
        if (HE_UNLIKELY(t->paid != NULL)) he_prefetch(&t->paid[row], HE_FAR);
    }
}

HE_INLINE void stream_start(const he_table *t, stream *s, const uint64_t *keys, int64_t num_keys, const int64_t k,
                            const int64_t dim, const int dtype) {
    s->keys = keys;
    s->end = num_keys;
    s->ahead = keys_ahead(t, k);
    for (int64_t i = 0; i < HE_MIN(s->ahead, num_keys); i++) stream_fetch(t, s, i, k, dim, dtype);
}

/* Returns the rows of key i; must be called for i = 0, 1, 2 … */
HE_INLINE const uint64_t *stream_key(const he_table *t, stream *s, int64_t i, const int64_t k, const int64_t dim,
                                     const int dtype) {
    if (i + s->ahead < s->end) stream_fetch(t, s, i + s->ahead, k, dim, dtype);
    return s->rows + (int64_t)((uint64_t)i % HE_RING) * k;
}

/* ---- one vector per key ---- */

/* tmp holds dim floats. */
HE_INLINE void lookup_keys(const he_table *t, const uint64_t *keys, int64_t n, double decay_total, float *tmp,
                           float *out, const int64_t k, const int64_t dim, const int dtype) {
    stream s;
    stream_start(t, &s, keys, n, k, dim, dtype);
    for (int64_t i = 0; i < n; i++) {
        const uint64_t *rows = stream_key(t, &s, i, k, dim, dtype);
        read_key(t, rows, k, dim, dtype, decay_total, tmp, out + i * dim);
    }
}

/* Does the same for one hash and no decay, the usual case, with everything that the loop needs in registers. */
HE_INLINE void lookup_plain(const he_table *t, const uint64_t *keys, int64_t n, float *out, const int64_t dim,
                            const int dtype) {
    const uint64_t salt = t->salts[0], num_rows = t->num_rows;
    const int64_t row_bytes = dim * (dtype == HE_FLOAT32 ? 4 : 2), ahead = keys_ahead(t, 1);
    const char *weight = t->weight;
    uint64_t rows[HE_RING];
    for (int64_t i = -ahead; i < n; i++) {
        if (i + ahead < n) {
            const uint64_t row = he_row(keys[i + ahead], salt, num_rows);
            rows[(uint64_t)(i + ahead) % HE_RING] = row;
            he_prefetch_range(weight + row * (uint64_t)row_bytes, row_bytes, HE_FAR);
        }
        if (i >= 0) load_row(t, rows[(uint64_t)i % HE_RING], dim, dtype, out + i * dim);
    }
}

/* ---- one vector per bag: sum of weight * vector in batch order from +0, times the bag's scale ---- */

HE_INLINE void add_key(float weight, int weighted, const float *restrict v, int64_t dim, float *restrict acc) {
    if (weighted) {
        HE_SIMD
        for (int64_t j = 0; j < dim; j++) acc[j] += weight * v[j];
    } else {
        HE_SIMD
        for (int64_t j = 0; j < dim; j++) acc[j] += v[j];
    }
}

HE_COLD void scale_bag(const he_batch *b, int64_t bag, int64_t dim, float *acc) {
    if (b->pooling == HE_SUM) return;
    float scale = he_bag_scale(b, bag);
    HE_SIMD
    for (int64_t j = 0; j < dim; j++) acc[j] *= scale;
}

/* scratch holds 2 * dim floats. */
HE_INLINE void pool_keys(const he_table *t, const he_batch *b, int64_t bag, int64_t bag_end, double decay_total,
                         float *scratch, float *out, const int64_t k, const int64_t dim, const int dtype) {
    const int64_t begin = b->offsets[bag], end = b->offsets[bag_end];
    float *tmp = scratch, *v = scratch + dim;
    stream s;
    memset(out + bag * dim, 0, (size_t)((bag_end - bag) * dim) * sizeof(float));
    stream_start(t, &s, b->keys + begin, end - begin, k, dim, dtype);
    for (int64_t i = begin; i < end; i++) {
        for (; i >= b->offsets[bag + 1]; bag++) scale_bag(b, bag, dim, out + bag * dim);
        read_key(t, stream_key(t, &s, i - begin, k, dim, dtype), k, dim, dtype, decay_total, tmp, v);
        add_key(b->weights ? b->weights[i] : 1.0f, b->weights != NULL, v, dim, out + bag * dim);
    }
    for (; bag < bag_end; bag++) scale_bag(b, bag, dim, out + bag * dim);
}

/* ---- specialised copies: float32 rows of the usual dimensions, with one hash, have their own functions ---- */

#define HE_DIMS(HE_DIM) HE_DIM(1) HE_DIM(4) HE_DIM(8) HE_DIM(16) HE_DIM(32) HE_DIM(64) HE_DIM(128)
#define HE_LOOKUP_COPY(d)                                                                           \
    HE_COLD void lookup_plain_##d(const he_table *t, const uint64_t *keys, int64_t n, float *out) { \
        lookup_plain(t, keys, n, out, d, HE_FLOAT32);                                               \
    }
#define HE_POOL_COPY(d)                                                                                                \
    HE_COLD void pool_keys_##d(const he_table *t, const he_batch *b, int64_t bag, int64_t bag_end, double decay_total, \
                               float *scratch, float *out) {                                                           \
        pool_keys(t, b, bag, bag_end, decay_total, scratch, out, 1, d, HE_FLOAT32);                                    \
    }
HE_DIMS(HE_LOOKUP_COPY)
HE_DIMS(HE_POOL_COPY)
#undef HE_LOOKUP_COPY
#undef HE_POOL_COPY

/* tmp holds dim floats. */
static void lookup(const he_table *t, const uint64_t *keys, int64_t begin, int64_t end, double decay_total, float *tmp,
                   float *out) {
    const int64_t k = t->num_hashes, n = end - begin, dim = t->dim;
    const int plain = k == 1 && !t->paid;
    keys += begin;
    out += begin * dim;
#define HE_CASE(d) \
    case d: lookup_plain_##d(t, keys, n, out); return;
    if (n <= 0) return;
    if (t->dtype == HE_FLOAT16) lookup_keys(t, keys, n, decay_total, tmp, out, k, dim, HE_FLOAT16);
    else if (t->dtype == HE_BFLOAT16 && plain) lookup_plain(t, keys, n, out, dim, HE_BFLOAT16);
    else if (t->dtype == HE_BFLOAT16) lookup_keys(t, keys, n, decay_total, tmp, out, k, dim, HE_BFLOAT16);
    else switch (plain ? dim : 0) {
            HE_DIMS(HE_CASE)
            default: lookup_keys(t, keys, n, decay_total, tmp, out, k, dim, HE_FLOAT32);
        }
#undef HE_CASE
}

/* scratch holds 2 * dim floats. */
static void lookup_pooled(const he_table *t, const he_batch *b, int64_t bag, int64_t bag_end, double decay_total,
                          float *scratch, float *out) {
    const int64_t k = t->num_hashes, dim = t->dim;
#define HE_CASE(d) \
    case d: pool_keys_##d(t, b, bag, bag_end, decay_total, scratch, out); return;
    if (bag >= bag_end) return;
    if (t->dtype == HE_FLOAT16) pool_keys(t, b, bag, bag_end, decay_total, scratch, out, k, dim, HE_FLOAT16);
    else if (t->dtype == HE_BFLOAT16) pool_keys(t, b, bag, bag_end, decay_total, scratch, out, k, dim, HE_BFLOAT16);
    else switch (k == 1 ? dim : 0) {
            HE_DIMS(HE_CASE)
            default: pool_keys(t, b, bag, bag_end, decay_total, scratch, out, k, dim, HE_FLOAT32);
        }
#undef HE_CASE
}
#undef HE_DIMS

/* ---- small loops over a batch ---- */

static void hash_rows(const he_table *t, const uint64_t *keys, int64_t begin, int64_t end, int64_t *out) {
    const int64_t k = t->num_hashes;
    for (int64_t i = begin; i < end; i++)
        for (int64_t h = 0; h < k; h++) out[i * k + h] = (int64_t)he_row(keys[i], t->salts[h], t->num_rows);
}

/* Updates, by lane, the largest exponent field with those of the 64 values at `piece`. */
HE_INLINE void max_exponents(const float *piece, uint32_t exponent, uint32_t lane[16]) {
    for (int j = 0; j < 64; j += 16) {
        HE_SIMD
        for (int l = 0; l < 16; l++) {
            const uint32_t bits = he_bits(piece[j + l]) & exponent;
            lane[l] = HE_MAX(lane[l], bits);
        }
    }
}

/* Returns the index of the first NaN or infinity (exponent of all ones) in values [begin, end), or -1. The loop is
 * bound by memory, so four quarters are read in parallel, each prefetched; a batch with a bad value is read again to
 * find it. */
static int64_t first_not_finite(const float *values, int64_t begin, int64_t end) {
    const uint32_t exponent = UINT32_C(0x7F800000);
    const int64_t quarter = (end - begin) / 256 * 64, ahead = 256;
    const float *at = values + begin;
    uint32_t lane[16] = {0}, worst = 0;
    for (int64_t i = 0; i < quarter; i += 64)
        for (const float *piece = at + i; piece < at + 4 * quarter; piece += quarter) {
            he_prefetch_range(piece + HE_MIN(ahead, quarter - i - 64), 256, HE_NEAR);
            max_exponents(piece, exponent, lane);
        }
    for (int l = 0; l < 16; l++) worst = HE_MAX(worst, lane[l]);
    for (int64_t j = begin + 4 * quarter; j < end; j++) worst = HE_MAX(worst, he_bits(values[j]) & exponent);
    if (HE_LIKELY(worst < exponent)) return -1;
    for (int64_t j = begin; j < end; j++)
        if ((he_bits(values[j]) & exponent) == exponent) return j;
    return -1;
}
