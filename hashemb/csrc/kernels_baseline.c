/* The kernels for every CPU of the architecture. */
#include "kernels.h"

/* Returns whether any of sixteen values is not finite. */
HE_INLINE int not_finite_16(const float *values) {
    const uint32_t exponent = UINT32_C(0x7F800000);
    uint32_t bad = 0;
    HE_SIMD_OR(bad)
    for (int j = 0; j < 16; j++) bad |= (he_bits(values[j]) & exponent) == exponent;
    return bad != 0;
}

#include "kernels_lookup.h"
#include "kernels_merge.h"
#include "kernels_apply.h"

const he_kernels he_kernels_baseline = {lookup, lookup_pooled, first_not_finite, hash_rows, merge, apply};
