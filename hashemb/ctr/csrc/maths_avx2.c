/* The kernels for CPUs with AVX2 and BMI2. */
#include "maths_example.h"

#if HE_X86
HE_BEGIN_TARGET(HE_AVX2)

#include "maths_kernels.h"

HE_END_TARGET

const hm_kernels hm_kernels_avx2 = {run_block, add_batch};
#endif
