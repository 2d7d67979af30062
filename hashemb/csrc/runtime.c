/* The choice of instruction set: the best one that this CPU supports, unless HASHEMB_ISA or he_isa_force selects
 * another. All of them give the same bits. */
#include "runtime.h"

#include <string.h>

static const char *const names[] = {"baseline", "avx2", "avx512"};

he_runtime he_process = {he_pool_run, he_threads_get, HE_ISA_BASELINE};

static int supported(int isa) {
#if HE_X86
    __builtin_cpu_init();
    if (isa == HE_ISA_AVX2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2");
    if (isa == HE_ISA_AVX512)
        return __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("avx512f") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl");
#endif
    return isa == HE_ISA_BASELINE;
}

/* Runs before anything else in this library. */
__attribute__((constructor)) static void choose_best(void) {
    for (int isa = 0; isa < HE_NUM_ISAS; isa++)
        if (supported(isa)) he_process.isa = isa;
}

const char *he_isa_name(int isa) { return names[isa]; }

int he_isa_force(const char *name) {
    for (int isa = 0; isa < HE_NUM_ISAS; isa++)
        if (strcmp(name, names[isa]) == 0 && supported(isa)) {
            __atomic_store_n(&he_process.isa, isa, __ATOMIC_RELAXED);
            return 0;
        }
    return -1;
}

const char *he_isa_available(int i) {
    for (int isa = 0; isa < HE_NUM_ISAS; isa++)
        if (supported(isa) && i-- == 0) return names[isa];
    return NULL;
}
