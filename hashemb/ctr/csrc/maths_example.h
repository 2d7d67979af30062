/* One example of a batch, and the logistic function: what the kernels of all instruction sets share. */
#ifndef HASHEMB_CTR_MATHS_EXAMPLE_H
#define HASHEMB_CTR_MATHS_EXAMPLE_H

#include <string.h>

#include "maths.h"
#include "numerics.h"

HE_INLINE int64_t hm_padded(int64_t n) { return (n + HM_LANES - 1) / HM_LANES * HM_LANES; }

/* 1 / (1 + exp(-z)) in double precision, without overflow; NaN for NaN. */
HE_INLINE double hm_probability(double z) {
    if (z != z) return z;
    double e = he_exp(z < 0.0 ? z : -z);
    return (z < 0.0 ? e : 1.0) / (1.0 + e);
}

/* One example of a batch. Its vectors are written to only if they are copies. */
typedef struct {
    float *vectors;
    const int32_t *index;
    const float *values;
    const int32_t *fields;
    int64_t n;
} hm_example;

HE_INLINE hm_example hm_example_at(const hm_batch *b, const hm_scratch *s, int64_t e) {
    const int64_t first = b->offsets ? b->offsets[e] - b->offsets[0] : e * b->num_fields;
    hm_example x;
    x.n = b->offsets ? b->offsets[e + 1] - b->offsets[e] : b->num_fields;
    x.vectors = b->index ? s->vectors + (s->has_batch ? first * b->dim : 0) : (float *)b->vectors + first * b->dim;
    x.index = b->index ? b->index + first : NULL;
    x.values = b->values ? b->values + first : NULL;
    x.fields = b->offsets && b->fields ? b->fields + first : NULL;
    return x;
}

HE_INLINE float hm_value(const hm_example *x, int64_t i) { return x->values ? x->values[i] : 1.0f; }
HE_INLINE int64_t hm_field(const hm_example *x, int64_t i) { return x->fields ? x->fields[i] : i; }
HE_INLINE int64_t hm_pair(int64_t f, int64_t g) { return f < g ? g * (g + 1) / 2 + f : f * (f + 1) / 2 + g; }

#endif
