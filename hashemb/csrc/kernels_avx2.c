/* The kernels for CPUs with AVX2 and BMI2. */
#include "kernels.h"

#if HE_X86
#include <immintrin.h>

HE_BEGIN_TARGET(HE_AVX2)

/* Returns whether any of sixteen values is not finite: compilers would reduce sixteen flags by halves. */
HE_INLINE int not_finite_16(const float *values) {
    const __m256 most = _mm256_castsi256_ps(_mm256_set1_epi32(0x7F7FFFFF)),
                 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
    const __m256 low = _mm256_and_ps(_mm256_loadu_ps(values), magnitude),
                 high = _mm256_and_ps(_mm256_loadu_ps(values + 8), magnitude);
    const __m256 bad = _mm256_or_ps(_mm256_cmp_ps(low, most, _CMP_NLE_UQ), _mm256_cmp_ps(high, most, _CMP_NLE_UQ));
    return _mm256_movemask_ps(bad) != 0;
}

#include "kernels_lookup.h"
#include "kernels_merge.h"
#include "kernels_apply.h"

HE_END_TARGET

const he_kernels he_kernels_avx2 = {lookup, lookup_pooled, first_not_finite, hash_rows, merge, apply};
#endif
