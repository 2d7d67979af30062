/* The kernels for every CPU of the architecture. */
#include "maths_example.h"
#include "maths_kernels.h"

const hm_kernels hm_kernels_baseline = {run_block, add_batch};
