/* The kernels, compiled for each instruction set. */
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "numerics.h"
#include "table.h"

enum { HE_RING = 64, HE_LOOKUP_LINES_AHEAD = 192, HE_UPDATE_AHEAD = 16, HE_BLOCKS_AHEAD = 16, HE_MANY_BLOCKS = 1 << 18 };
enum { HE_HEAD = 16, HE_IN_PLACE_DIM = 64 };

/* Returns the factor for a bag's sum: 1 / total weight, or 1 / root of the sum of squares; 0 if the total is 0. */
HE_INLINE float he_bag_scale(const he_batch *b, int64_t bag) {
    int64_t begin = b->offsets[bag], end = b->offsets[bag + 1];
    float total = 0.0f;
    if (b->pooling == HE_SUM) return 1.0f;
    if (!b->weights) total = (float)(end - begin);
    else if (b->pooling == HE_MEAN) for (int64_t i = begin; i < end; i++) total += b->weights[i];
    else for (int64_t i = begin; i < end; i++) total += b->weights[i] * b->weights[i];
    if (total == 0.0f) return 0.0f;
    return 1.0f / (b->pooling == HE_MEAN ? total : __builtin_sqrtf(total));
}

#define HE_TABLE(suffix)                                                                                          \
    {lookup_##suffix, lookup_pooled_##suffix, first_not_finite_##suffix, rows_##suffix, merge_##suffix, apply_##suffix}

/* Returns whether any of sixteen values is not finite. Compilers reduce sixteen flags by halves; AVX-512 has an
 * instruction for it. */
HE_INLINE int not_finite_16_baseline(const float *values) {
    const uint32_t exponent = UINT32_C(0x7F800000);
    uint32_t bad = 0;
    HE_SIMD_OR(bad)
    for (int j = 0; j < 16; j++) bad |= (he_bits(values[j]) & exponent) == exponent;
    return bad != 0;
}

#define HE_NAME(f) f##_baseline
#include "kernels_lookup.inc"
#include "kernels_update.inc"
#undef HE_NAME

#if HE_X86
HE_BEGIN_TARGET(HE_AVX2)
HE_INLINE int not_finite_16_avx2(const float *values) {
    const __m256 most = _mm256_castsi256_ps(_mm256_set1_epi32(0x7F7FFFFF)), magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
    const __m256 low = _mm256_and_ps(_mm256_loadu_ps(values), magnitude), high = _mm256_and_ps(_mm256_loadu_ps(values + 8), magnitude);
    const __m256 bad = _mm256_or_ps(_mm256_cmp_ps(low, most, _CMP_NLE_UQ), _mm256_cmp_ps(high, most, _CMP_NLE_UQ));
    return _mm256_movemask_ps(bad) != 0;
}

#define HE_NAME(f) f##_avx2
#include "kernels_lookup.inc"
#include "kernels_update.inc"
#undef HE_NAME
HE_END_TARGET

HE_BEGIN_TARGET(HE_AVX512)
HE_INLINE int not_finite_16_avx512(const float *values) {
    return _mm512_fpclass_ps_mask(_mm512_loadu_ps(values), 0x99) != 0; /* quiet and signalling NaN, either infinity */
}

#define HE_NAME(f) f##_avx512
#include "kernels_lookup.inc"
#include "kernels_update.inc"
#undef HE_NAME
HE_END_TARGET
#endif

static const he_kernels variants[HE_NUM_ISAS] = {
    HE_TABLE(baseline),
#if HE_X86
    HE_TABLE(avx2),
    HE_TABLE(avx512),
#endif
};

const he_runtime *he_linked;

const he_kernels *he_kernels_active(void) { return &variants[he_isa()]; }

int64_t he_offsets_copy(const int64_t *offsets, int64_t num_bags, int64_t num_keys, int64_t *out) {
    int64_t falls = 0;
    memcpy(out, offsets, (size_t)(num_bags + 1) * sizeof(*out));
    if (out[0] != 0) return 0;
    for (int64_t i = 0; i < num_bags; i++) falls |= out[i + 1] < out[i];
    for (int64_t i = 0; falls && i < num_bags; i++)
        if (out[i + 1] < out[i]) return i + 1;
    return out[num_bags] == num_keys ? -1 : num_bags + 1;
}

void he_bag_scales(const he_batch *b, int64_t *bag_of, float *scales) {
    for (int64_t bag = 0; bag < b->num_bags; bag++) {
        float scale = he_bag_scale(b, bag);
        for (int64_t i = b->offsets[bag]; i < b->offsets[bag + 1]; i++) {
            bag_of[i] = bag;
            if (scales) scales[i] = b->weights ? b->weights[i] * scale : scale;
        }
    }
}
