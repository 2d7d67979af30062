/* What the kernels of all instruction sets share. kernels_baseline.c, kernels_avx2.c and kernels_avx512.c include this
 * file, begin their target, and include the kernels themselves: static functions in kernels_lookup.h, kernels_merge.h
 * and kernels_apply.h, of which each exports one he_kernels. What is defined here is inlined into them. */
#ifndef HASHEMB_KERNELS_H
#define HASHEMB_KERNELS_H

#include <string.h>

#include "numerics.h"
#include "table.h"

enum {
    HE_RING = 64,
    HE_LOOKUP_LINES_AHEAD = 192,
    HE_UPDATE_AHEAD = 16,
    HE_BLOCKS_AHEAD = 16,
    HE_MANY_BLOCKS = 1 << 18
};
enum { HE_HEAD = 16, HE_IN_PLACE_DIM = 64 };

/* Returns the factor for a bag's sum: 1 / total weight, or 1 / root of the sum of squares; 0 if the total is 0. */
HE_INLINE float he_bag_scale(const he_batch *b, int64_t bag) {
    int64_t begin = b->offsets[bag], end = b->offsets[bag + 1];
    float total = 0.0f;
    if (b->pooling == HE_SUM) return 1.0f;
    if (!b->weights) total = (float)(end - begin);
    else if (b->pooling == HE_MEAN)
        for (int64_t i = begin; i < end; i++) total += b->weights[i];
    else
        for (int64_t i = begin; i < end; i++) total += b->weights[i] * b->weights[i];
    if (total == 0.0f) return 0.0f;
    return 1.0f / (b->pooling == HE_MEAN ? total : __builtin_sqrtf(total));
}

#endif
