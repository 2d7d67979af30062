/* Every difference between compilers and CPUs is here: hints, the 128-bit multiply, and the pragmas that
 * compile one source for several instruction sets. All macros start with HE_. */
#ifndef HASHEMB_PORTABILITY_H
#define HASHEMB_PORTABILITY_H

#include <stdint.h>

#if !defined(__GNUC__)
#error "hashemb needs GCC or Clang"
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "hashemb's files are little-endian, and so must the machine be"
#endif

#define HE_LIKELY(x) __builtin_expect(!!(x), 1)
#define HE_UNLIKELY(x) __builtin_expect(!!(x), 0)
#define HE_INLINE static inline __attribute__((always_inline, unused))
/* Not inlined: code that runs once per call, bag or rare row, and loops that need all registers. */
#define HE_COLD static __attribute__((noinline))
#define HE_MIN(a, b) ((a) < (b) ? (a) : (b))
#define HE_MAX(a, b) ((a) > (b) ? (a) : (b))

enum { HE_LINE_BYTES = 64 };

#define HE_PRAGMA(x) _Pragma(#x)

/* Placed before a loop over a row: vectorises it before it is unrolled into scalars, as compilers do if they know the
 * dimension. It needs -fopenmp-simd, but no OpenMP library. The order of additions is kept. */
#define HE_SIMD _Pragma("omp simd")
#define HE_SIMD_OR(x) HE_PRAGMA(omp simd reduction(| : x))

/* Returns the high 64 bits of a 128-bit product, which map a 64-bit hash onto [0, n) without a division (Lemire 2019,
 * "Fast random integer generation in an interval"). The hash must span all 64 bits. */
HE_INLINE uint64_t he_mulhi64(uint64_t a, uint64_t b) { return (uint64_t)(((unsigned __int128)a * b) >> 64); }

/* Prefetches into the caches: FAR into the second level, which handles more concurrent misses than the first; WRITE as
 * a line that this core owns. */
enum { HE_NEAR, HE_FAR, HE_WRITE };
HE_INLINE void he_prefetch(const void *p, const int kind) {
    if (kind == HE_WRITE) __builtin_prefetch(p, 1, 3);
    else if (kind == HE_FAR) __builtin_prefetch(p, 0, 2);
    else __builtin_prefetch(p, 0, 3);
}

/* Used in a loop that waits for another thread. */
HE_INLINE void he_pause(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

/* Stores a note after all earlier stores and before all later ones, in the order in which this thread's stores are
 * visible if it is killed between two of them. This costs the compiler some freedom, and the processor nothing. */
HE_INLINE void he_note(uint64_t *note, uint64_t value) {
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    __atomic_store_n(note, value, __ATOMIC_RELAXED);
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
}

/* Prefetches every cache line of [p, p + bytes). */
HE_INLINE void he_prefetch_range(const void *p, int64_t bytes, const int kind) {
    const char *line = (const char *)((uintptr_t)p & ~(uintptr_t)(HE_LINE_BYTES - 1));
    for (; line < (const char *)p + bytes; line += HE_LINE_BYTES) he_prefetch(line, kind);
}

/* Functions between HE_BEGIN_* and HE_END_TARGET are compiled for one instruction set. Neither target names
 * `fma`, and the build uses -ffp-contract=off, so all variants give the same bits. */
#if defined(__x86_64__)
#define HE_X86 1
#define HE_AVX2 "avx2,bmi,bmi2"
#if defined(__clang__)
#define HE_AVX512 "avx2,bmi,bmi2,avx512f,avx512dq,avx512bw,avx512vl"
#define HE_BEGIN_TARGET(features) \
    HE_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define HE_END_TARGET HE_PRAGMA(clang attribute pop)
#else
#define HE_AVX512 "avx2,bmi,bmi2,avx512f,avx512dq,avx512bw,avx512vl,prefer-vector-width=512"
#define HE_BEGIN_TARGET(features) HE_PRAGMA(GCC push_options) HE_PRAGMA(GCC target(features))
#define HE_END_TARGET HE_PRAGMA(GCC pop_options)
#endif
#else
#define HE_X86 0
#endif

#endif
