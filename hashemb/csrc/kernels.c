/* The kernels of the chosen instruction set. */
#include "table.h"

const he_runtime *he_linked;

static const he_kernels *const kernels[HE_NUM_ISAS] = {
    &he_kernels_baseline,
#if HE_X86
    &he_kernels_avx2,
    &he_kernels_avx512,
#endif
};

const he_kernels *he_kernels_active(void) { return kernels[he_isa()]; }
