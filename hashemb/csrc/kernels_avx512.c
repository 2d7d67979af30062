/* The kernels for CPUs with AVX-512 (F, DQ, BW, VL) and BMI2. */
#include "kernels.h"

#if HE_X86
#include <immintrin.h>

HE_BEGIN_TARGET(HE_AVX512)

/* Returns whether any of sixteen values is not finite, for which AVX-512 has an instruction. */
HE_INLINE int not_finite_16(const float *values) {
    return _mm512_fpclass_ps_mask(_mm512_loadu_ps(values), 0x99) != 0; /* quiet and signalling NaN, either infinity */
}

#include "kernels_lookup.h"
#include "kernels_merge.h"
#include "kernels_apply.h"

HE_END_TARGET

const he_kernels he_kernels_avx512 = {lookup, lookup_pooled, first_not_finite, hash_rows, merge, apply};
#endif
