/* The kernels for CPUs with AVX-512 (F, DQ, BW, VL) and BMI2. */
#include "maths_example.h"

#if HE_X86
HE_BEGIN_TARGET(HE_AVX512)

#include "maths_kernels.h"

HE_END_TARGET

const hm_kernels hm_kernels_avx512 = {run_block, add_batch};
#endif
