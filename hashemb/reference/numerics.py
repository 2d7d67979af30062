"""Numerics of `hashemb.reference`: logarithm, exponential, normal quantile and half-precision rounding in NumPy.

They use only +, -, *, / and sqrt, which IEEE 754 makes the same everywhere; NumPy's own log and exp differ between
CPUs. The same functions in C are in csrc/numerics.h.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


# ---- logarithm, exponential, normal quantile ----


def log(x: F64) -> F64:
    """Compute the natural logarithm by FDLIBM's algorithm, without the platform's libm."""
    u = x.view(np.uint64) + np.uint64(0x3FF0000000000000 - 0x3FE6A09E00000000)
    k = (u >> np.uint64(52)).astype(np.int64).astype(np.float64) - 1023.0
    m = ((u & np.uint64(0x000FFFFFFFFFFFFF)) + np.uint64(0x3FE6A09E00000000)).view(np.float64)
    f = m - 1.0
    s = f / (2.0 + f)
    z = s * s
    w = z * z
    t1 = w * (3.999999999940941908e-01 + w * (2.222219843214978396e-01 + w * 1.531383769920937332e-01))
    t2 = z * (
        6.666666666666735130e-01
        + w * (2.857142874366239149e-01 + w * (1.818357216161805012e-01 + w * 1.479819860511658591e-01))
    )
    half = 0.5 * f * f
    low = s * (half + (t2 + t1)) + k * 1.90821492927058770002e-10
    return k * 6.93147180369123816490e-01 - ((half - low) - f)


def log1p(x: float) -> float:
    """Compute log(1 + x), accurately for tiny x too (Kahan's correction)."""
    u = 1.0 + x
    return float(log(np.array([u]))[0]) - ((u - 1.0) - x) / u


def exp(x: F64) -> F64:
    """Compute exp(x) for x <= 0 by FDLIBM's algorithm; the result is 0 below -700."""
    x = np.asarray(x, np.float64)
    safe = np.maximum(x, -700.0)
    k = np.trunc(safe * 1.44269504088896338700e00 - 0.5)
    hi, lo = safe - k * 6.93147180369123816490e-01, k * 1.90821492927058770002e-10
    r = hi - lo
    t = r * r
    tail = -1.65339022054652515390e-06 + t * 4.13813679705723846039e-08
    tail = -2.77777777770155933842e-03 + t * (6.61375632143793436117e-05 + t * tail)
    c = r - t * (1.66666666666666019037e-01 + t * tail)
    y = 1.0 - ((lo - (r * c) / (2.0 - c)) - hi)
    scale = ((k.astype(np.int64) + 1023).astype(np.uint64) << np.uint64(52)).view(np.float64)
    return np.where(x < -700.0, 0.0, y * scale)


_CENTRE = (
    (2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4, 4.5921953931549871457e4,
     1.3731693765509461125e4, 1.9715909503065514427e3, 1.3314166789178437745e2, 3.3871328727963666080e0),
    (5.2264952788528545610e3, 2.8729085735721942674e4, 3.9307895800092710610e4, 2.1213794301586595867e4,
     5.3941960214247511077e3, 6.8718700749205790830e2, 4.2313330701600911252e1, 1.0),
)  # fmt: skip
_TAIL = (
    (7.74545014278341407640e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1, 1.27045825245236838258e0,
     3.64784832476320460504e0, 5.76949722146069140550e0, 4.63033784615654529590e0, 1.42343711074968357734e0),
    (1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2,
     1.48103976427480074590e-1, 6.89767334985100004550e-1, 1.67638483018380384940e0,
     2.05319162663775882187e0, 1.0),
)  # fmt: skip
_FAR_TAIL = (
    (2.01033439929228813265e-7, 2.71155556874348757815e-5, 1.24266094738807843860e-3,
     2.65321895265761230930e-2, 2.96560571828504891230e-1, 1.78482653991729133580e0,
     5.46378491116411436990e0, 6.65790464350110377720e0),
    (2.04426310338993978564e-15, 1.42151175831644588870e-7, 1.84631831751005468180e-5,
     7.86869131145613259100e-4, 1.48753612908506148525e-2, 1.36929880922735805310e-1,
     5.99832206555887937690e-1, 1.0),
)  # fmt: skip


def _ratio(coefficients: tuple[tuple[float, ...], tuple[float, ...]], r: F64) -> F64:
    values = []
    for polynomial in coefficients:
        value = np.full_like(r, polynomial[0])
        for c in polynomial[1:]:
            value = value * r + c
        values.append(value)
    return values[0] / values[1]


def normal_quantile(p: F64) -> F64:
    """Compute the quantile of the standard normal distribution, 0 < p < 1, by Wichura's algorithm AS 241 (PPND16)."""
    q = p - 0.5
    centre = q * _ratio(_CENTRE, 0.180625 - q * q)
    r = np.sqrt(-log(np.where(q < 0.0, p, 1.0 - p)))
    tail = np.where(r <= 5.0, _ratio(_TAIL, r - 1.6), _ratio(_FAR_TAIL, r - 5.0))
    return np.where(np.abs(q) <= 0.425, centre, np.where(q < 0.0, -tail, tail))


# ---- half-precision storage ----


def from_bfloat16(bits: npt.NDArray[np.uint16]) -> F32:
    """Convert bfloat16 bits to float32, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(x: F32, random: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint16]:
    """Round finite float32 stochastically: add 16 random bits below the last kept one, and truncate."""
    u = x.view(np.uint32)
    rounded = (u + (random & np.uint32(0xFFFF))) >> np.uint32(16)
    quiet = np.where(np.isnan(x), np.uint32(0x40), np.uint32(0))
    return np.where(np.isfinite(x), rounded, (u >> np.uint32(16)) | quiet).astype(np.uint16)


def to_float16(x: F32, random: npt.NDArray[np.uint32]) -> npt.NDArray[np.float16]:
    """Round float32 stochastically; a value above 65504 may become infinite, and one above 65536 does."""
    u = x.view(np.uint32)
    a = u & np.uint32(0x7FFFFFFF)
    normal = (a + (random & np.uint32(0x1FFF)) - np.uint32(112 << 23)) >> np.uint32(13)
    scaled = np.where(a < 0x38800000, np.abs(x), np.float32(0.0)) * np.float32(2.0**24)
    whole = np.trunc(scaled)
    uniform = (random & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2.0**-24)
    small = whole.astype(np.uint32) + (uniform < scaled - whole)
    h = np.where(a >= 0x38800000, normal, small)
    h = np.where(a >= 0x47800000, np.uint32(0x7C00), h)
    h = np.where(np.isnan(x), np.uint32(0x7E00), h)
    return (h | ((u >> np.uint32(16)) & np.uint32(0x8000))).astype(np.uint16).view(np.float16)
