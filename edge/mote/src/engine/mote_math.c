/* expf, logf, tanhf and sqrtf of our own, so that every target computes the same bits: C libraries differ in their last
 * ones.
 *
 * Reductions and polynomials are those of the Cephes library, single precision (S. L. Moshier 1992, netlib/cephes,
 * expf.c, logf.c, tanhf.c); relative errors there: 1.7e-7, 8e-8, 1.3e-7.
 */
#include <string.h>

#include "mote_internal.h"

static float from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* e^x for x <= 88; more is not asked for. Below -87, just above the subnormal results, it is 0. */
float mote_expf(float x)
{
    if (!(x >= -87.0f)) {
        return x < 0.0f ? 0.0f : x; /* not a number stays so */
    }
    float n = x * 1.44269504088896341f;
    int32_t k = (int32_t)(n + (n < 0.0f ? -0.5f : 0.5f));
    float kf = (float)k;
    x -= kf * 0.693359375f; /* ln 2 in two parts: the first has few bits, so that the product is exact */
    x -= kf * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * x + 1.3981999507e-3f;
    p = p * x + 8.3334519073e-3f;
    p = p * x + 4.1665795894e-2f;
    p = p * x + 1.6666665459e-1f;
    p = p * x + 5.0000001201e-1f;
    p = p * (x * x) + x + 1.0f;
    return p * from_bits((uint32_t)(k + 127) << 23);
}

/* ln x for normal x > 0 or infinity; anything else is not asked for. */
float mote_logf(float x)
{
    uint32_t bits;
    if (!mote_finite(x)) {
        return x;
    }
    memcpy(&bits, &x, sizeof bits);
    int32_t e = (int32_t)(bits >> 23) - 126;
    x = from_bits((bits & 0x007fffffu) | 0x3f000000u); /* in [0.5, 1) */
    if (x < 0.707106781186547524f) {
        e -= 1;
        x += x;
    }
    x -= 1.0f;
    float z = x * x;
    float p = 7.0376836292e-2f;
    p = p * x - 1.1514610310e-1f;
    p = p * x + 1.1676998740e-1f;
    p = p * x - 1.2420140846e-1f;
    p = p * x + 1.4249322787e-1f;
    p = p * x - 1.6668057665e-1f;
    p = p * x + 2.0000714765e-1f;
    p = p * x - 2.4999993993e-1f;
    p = p * x + 3.3333331174e-1f;
    p = p * x * z;
    float ef = (float)e;
    p += ef * -2.12194440e-4f;
    p -= 0.5f * z;
    return x + p + ef * 0.693359375f;
}

float mote_tanhf(float x)
{
    float size = x < 0.0f ? -x : x;
    if (size < 0.625f) {
        float z = x * x;
        float p = -5.70498872745e-3f;
        p = p * z + 2.06390887954e-2f;
        p = p * z - 5.37397155531e-2f;
        p = p * z + 1.33314422036e-1f;
        p = p * z - 3.33332819422e-1f;
        return p * z * x + x;
    }
    /* From 9.011 on it rounds to 1. */
    float t = size > 9.1f ? 1.0f : 1.0f - 2.0f / (mote_expf(size + size) + 1.0f);
    return x < 0.0f ? -t : t;
}

/* The square root of x >= 0, correctly rounded. */
float mote_sqrtf(float x)
{
#if defined(__ARM_FP) && (__ARM_FP & 4) && !defined(__aarch64__)
    __asm__("vsqrt.f32 %0, %0" : "+t"(x));
    return x;
#else
    uint32_t bits, root = 0, twice = 0; /* the root's digits so far, and two times them */
    float scale = 1.0f;
    if (!(x > 0.0f) || !mote_finite(x)) {
        return x;
    }
    if (x < 1.17549435e-38f) { /* subnormal */
        x *= 16777216.0f;
        scale = 1.0f / 4096.0f;
    }
    memcpy(&bits, &x, sizeof bits);
    uint32_t e = bits >> 23, rest = (bits & 0x007fffffu) | 0x00800000u;
    rest <<= 1 + (~e & 1u); /* an exponent (less 127) that is odd lends its half to the number */
    for (uint32_t digit = 1u << 24; digit != 0; digit >>= 1) { /* digit by digit, as with pen and paper */
        if (twice + digit <= rest) {
            rest -= twice + digit;
            twice += 2 * digit;
            root += digit;
        }
        rest <<= 1;
    }
    root += root & 1u; /* the last digit is half of the last place: it is never a tie */
    return from_bits((root >> 1) + ((e + 125) >> 1 << 23)) * scale;
#endif
}
