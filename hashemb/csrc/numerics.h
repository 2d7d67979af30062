/* The scalar arithmetic of the format: hashing keys to rows, initial values, decay, half-precision storage.
 *
 * Invariants: functions are pure and use only +, -, *, /, sqrt and integer operations, which IEEE 754 makes the same
 * on every CPU; nothing here calls libm (its log and exp differ between versions and CPUs in the last bit).
 * hashemb/reference/ has the same functions in NumPy, operation by operation. */
#ifndef HASHEMB_NUMERICS_H
#define HASHEMB_NUMERICS_H

#include <string.h>

#include "portability.h"

#define HE_GOLDEN UINT64_C(0x9E3779B97F4A7C15)

/* MurmurHash3's 64-bit finaliser (Appleby, public domain): a bijection with full avalanche. */
HE_INLINE uint64_t he_fmix64(uint64_t k) {
    k ^= k >> 33;
    k *= UINT64_C(0xFF51AFD7ED558CCD);
    k ^= k >> 33;
    k *= UINT64_C(0xC4CEB9FE1A85EC53);
    return k ^ (k >> 33);
}

/* Returns output number i (from 0) of SplitMix64 started at `seed` (Steele, Lea, Flood, OOPSLA 2014). */
HE_INLINE uint64_t he_splitmix64(uint64_t seed, uint64_t i) {
    uint64_t z = seed + (i + 1) * HE_GOLDEN;
    z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
    return z ^ (z >> 31);
}

HE_INLINE uint64_t he_row(uint64_t key, uint64_t salt, uint64_t num_rows) {
    return he_mulhi64(he_fmix64(key ^ salt), num_rows);
}

HE_INLINE uint32_t he_bits(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}
HE_INLINE float he_float(uint32_t u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}
HE_INLINE double he_double(uint64_t u) {
    double x;
    memcpy(&x, &u, 8);
    return x;
}
HE_INLINE uint64_t he_bits64(double x) {
    uint64_t u;
    memcpy(&u, &x, 8);
    return u;
}

/* Natural logarithm of a normal x > 0: the algorithm of FDLIBM's e_log.c (Sun Microsystems, 1993). */
HE_INLINE double he_log(double x) {
    uint64_t u = he_bits64(x);
    /* x = 2^k * m with m in [sqrt(2)/2, sqrt(2)). */
    uint64_t shifted = u + (UINT64_C(0x3FF0000000000000) - UINT64_C(0x3FE6A09E00000000));
    double k = (double)((int64_t)(shifted >> 52) - 1023);
    double m = he_double((shifted & UINT64_C(0x000FFFFFFFFFFFFF)) + UINT64_C(0x3FE6A09E00000000));
    double f = m - 1.0;
    double s = f / (2.0 + f), z = s * s, w = z * z;
    double t1 = w * (3.999999999940941908e-01 + w * (2.222219843214978396e-01 + w * 1.531383769920937332e-01));
    double t2 = z * (6.666666666666735130e-01 +
                     w * (2.857142874366239149e-01 + w * (1.818357216161805012e-01 + w * 1.479819860511658591e-01)));
    double half = 0.5 * f * f;
    return k * 6.93147180369123816490e-01 - ((half - (s * (half + (t2 + t1)) + k * 1.90821492927058770002e-10)) - f);
}

/* log(1 + x) for x in (-1, 0], exact to rounding for tiny x too (Kahan's correction of log(1 + x)). */
HE_INLINE double he_log1p(double x) {
    double u = 1.0 + x;
    return he_log(u) - ((u - 1.0) - x) / u;
}

/* exp(x) for x <= 0: the algorithm of FDLIBM's e_exp.c; below -700 the result is 0 (it would be < 1e-304). */
HE_INLINE double he_exp(double x) {
    if (x < -700.0) return 0.0;
    int64_t k = (int64_t)(x * 1.44269504088896338700e+00 - 0.5);
    double kd = (double)k;
    double hi = x - kd * 6.93147180369123816490e-01, lo = kd * 1.90821492927058770002e-10;
    double r = hi - lo, t = r * r;
    double c = r - t * (1.66666666666666019037e-01 +
                        t * (-2.77777777770155933842e-03 +
                             t * (6.61375632143793436117e-05 +
                                  t * (-1.65339022054652515390e-06 + t * 4.13813679705723846039e-08))));
    double y = 1.0 - ((lo - (r * c) / (2.0 - c)) - hi);
    return y * he_double((uint64_t)(k + 1023) << 52);
}

/* Quantile of the normal distribution for p in (0, 1): Wichura's AS 241 (PPND16), Applied Statistics 37 (1988).
 * (clang-format would break its polynomials at each power.) */
/* clang-format off */
HE_INLINE double he_normal_quantile(double p) {
    double q = p - 0.5;
    if (q >= -0.425 && q <= 0.425) {
        double r = 0.180625 - q * q;
        return q *
               (((((((2.5090809287301226727e+3 * r + 3.3430575583588128105e+4) * r + 6.7265770927008700853e+4) * r +
                    4.5921953931549871457e+4) * r + 1.3731693765509461125e+4) * r + 1.9715909503065514427e+3) * r +
                 1.3314166789178437745e+2) * r + 3.3871328727963666080e+0) /
               (((((((5.2264952788528545610e+3 * r + 2.8729085735721942674e+4) * r + 3.9307895800092710610e+4) * r +
                    2.1213794301586595867e+4) * r + 5.3941960214247511077e+3) * r + 6.8718700749205790830e+2) * r +
                 4.2313330701600911252e+1) * r + 1.0);
    }
    double r = __builtin_sqrt(-he_log(q < 0.0 ? p : 1.0 - p));
    double z;
    if (r <= 5.0) {
        r = r - 1.6;
        z = (((((((7.74545014278341407640e-4 * r + 2.27238449892691845833e-2) * r + 2.41780725177450611770e-1) * r +
                1.27045825245236838258e+0) * r + 3.64784832476320460504e+0) * r + 5.76949722146069140550e+0) * r +
             4.63033784615654529590e+0) * r + 1.42343711074968357734e+0) /
            (((((((1.05075007164441684324e-9 * r + 5.47593808499534494600e-4) * r + 1.51986665636164571966e-2) * r +
                1.48103976427480074590e-1) * r + 6.89767334985100004550e-1) * r + 1.67638483018380384940e+0) * r +
             2.05319162663775882187e+0) * r + 1.0);
    } else {
        r = r - 5.0;
        z = (((((((2.01033439929228813265e-7 * r + 2.71155556874348757815e-5) * r + 1.24266094738807843860e-3) * r +
                2.65321895265761230930e-2) * r + 2.96560571828504891230e-1) * r + 1.78482653991729133580e+0) * r +
             5.46378491116411436990e+0) * r + 6.65790464350110377720e+0) /
            (((((((2.04426310338993978564e-15 * r + 1.42151175831644588870e-7) * r + 1.84631831751005468180e-5) * r +
                7.86869131145613259100e-4) * r + 1.48753612908506148525e-2) * r + 1.36929880922735805310e-1) * r +
             5.99832206555887937690e-1) * r + 1.0);
    }
    return q < 0.0 ? -z : z;
}
/* clang-format on */

/* ---- half-precision storage: widening is exact, narrowing rounds stochastically with the given random bits ---- */

HE_INLINE float he_from_bf16(uint16_t h) { return he_float((uint32_t)h << 16); }

HE_INLINE float he_from_f16(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = h & 0x7FFF;
    uint32_t normal = (magnitude << 13) + (UINT32_C(112) << 23);
    uint32_t special = (magnitude << 13) | UINT32_C(0x7F800000);
    uint32_t subnormal = he_bits((float)(int32_t)magnitude * 0x1p-24f);
    uint32_t wide = magnitude >= 0x7C00 ? special : magnitude < 0x0400 ? subnormal : normal;
    return he_float(sign | wide);
}

/* Adds uniform random bits below the last kept one and truncates: this rounds away from zero with probability equal to
 * the part cut off. A finite value beyond the largest representable one becomes infinite, as in IEEE rounding. */
HE_INLINE uint16_t he_to_bf16(float x, uint32_t random) {
    uint32_t u = he_bits(x);
    if ((u & UINT32_C(0x7FFFFFFF)) >= UINT32_C(0x7F800000)) {
        uint32_t quiet = (u & UINT32_C(0x007FFFFF)) ? UINT32_C(0x0040) : 0;
        return (uint16_t)((u >> 16) | quiet);
    }
    return (uint16_t)((u + (random & UINT32_C(0xFFFF))) >> 16);
}

HE_INLINE uint16_t he_to_f16(float x, uint32_t random) {
    uint32_t u = he_bits(x), sign = (u >> 16) & 0x8000, a = u & UINT32_C(0x7FFFFFFF), h;
    if (a >= UINT32_C(0x7F800000)) {
        h = a > UINT32_C(0x7F800000) ? 0x7E00 : 0x7C00;
    } else if (a >= UINT32_C(0x38800000)) { /* >= 2^-14: normal */
        h = (a + (random & 0x1FFF) - (UINT32_C(112) << 23)) >> 13;
        h = a >= UINT32_C(0x47800000) || h > 0x7C00 ? 0x7C00 : h;
    } else { /* a multiple of 2^-24 below, plus a fraction */
        float scaled = he_float(a) * 0x1p24f;
        float whole = (float)(int32_t)scaled;
        float uniform = (float)(int32_t)(random & UINT32_C(0xFFFFFF)) * 0x1p-24f;
        h = (uint32_t)(int32_t)whole + (uniform < scaled - whole ? 1u : 0u);
    }
    return (uint16_t)(sign | h);
}

/* Returns the seed of the random words that round one row in one step; word j is he_splitmix64(seed, j). */
HE_INLINE uint64_t he_rounding_seed(uint64_t rounding_key, uint64_t row, uint64_t step) {
    return he_fmix64(he_fmix64(rounding_key ^ row) ^ step);
}

#endif
