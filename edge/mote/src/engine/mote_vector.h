/* Sums over contiguous floats, which float kernels are made of. In the exact profile the order of every sum is fixed:
 * it is part of the format.
 *
 * The Cortex-M with an FPU run assembler: several floats in one load, and VMLA, which rounds the product and then the
 * sum, as the exact profile has it.
 */
#ifndef MOTE_VECTOR_H
#define MOTE_VECTOR_H

#include <stdint.h>
#include <string.h>

#if defined(__ARM_FP) && defined(__ARM_ARCH_PROFILE) && __ARM_ARCH_PROFILE == 'M'
#define MOTE_HAS_VLDM 1
#else
#define MOTE_HAS_VLDM 0
#endif

/* Four lanes at once, where vectors compute the same bits as scalars. */
#if defined(__SSE2__) || defined(__aarch64__)
#define MOTE_HAS_LANES 1
typedef float mote_lanes_t __attribute__((vector_size(16)));

static inline mote_lanes_t mote_load_lanes(const float *from)
{
    mote_lanes_t lanes;
    memcpy(&lanes, from, sizeof lanes);
    return lanes;
}

static inline void mote_store_lanes(float *to, mote_lanes_t lanes)
{
    memcpy(to, &lanes, sizeof lanes);
}
#else
#define MOTE_HAS_LANES 0
#endif

/* Sum of a[j] * b[j], j < n, n > 0, in four lanes by j & 3 that are joined in a fixed order: vectors can compute the
 * same bits. A lane begins with its first product. */
static inline float mote_dot(const float *a, const float *b, uint32_t n)
{
    if (n < 4) { /* common in a convolution of few channels */
        float s = a[0] * b[0];
        if (n > 1) {
            s += a[1] * b[1];
        }
        if (n > 2) {
            s += a[2] * b[2];
        }
        return s;
    }
#if MOTE_HAS_VLDM
    float s0, s1, s2, s3;
    __asm__("vldmia %[a]!, {s8-s11}\n\t"
            "vldmia %[b]!, {s16-s19}\n\t"
            "vmul.f32 %[s0], s8, s16\n\t"
            "vmul.f32 %[s1], s9, s17\n\t"
            "vmul.f32 %[s2], s10, s18\n\t"
            "vmul.f32 %[s3], s11, s19"
            : [a] "+r"(a), [b] "+r"(b), [s0] "=&t"(s0), [s1] "=&t"(s1), [s2] "=&t"(s2), [s3] "=&t"(s3)
            :
            : "s8", "s9", "s10", "s11", "s16", "s17", "s18", "s19", "memory");
    n -= 4;
    if (n >= 8) {
        uint32_t eights = n >> 3;
        __asm__("1:\n\t"
                "vldmia %[a]!, {s8-s15}\n\t"
                "vldmia %[b]!, {s16-s23}\n\t"
                "subs %[eights], #1\n\t"
                "vmla.f32 %[s0], s8, s16\n\t"
                "vmla.f32 %[s1], s9, s17\n\t"
                "vmla.f32 %[s2], s10, s18\n\t"
                "vmla.f32 %[s3], s11, s19\n\t"
                "vmla.f32 %[s0], s12, s20\n\t"
                "vmla.f32 %[s1], s13, s21\n\t"
                "vmla.f32 %[s2], s14, s22\n\t"
                "vmla.f32 %[s3], s15, s23\n\t"
                "bne 1b"
                : [a] "+r"(a), [b] "+r"(b), [eights] "+r"(eights), [s0] "+t"(s0), [s1] "+t"(s1), [s2] "+t"(s2),
                  [s3] "+t"(s3)
                :
                : "s8", "s9", "s10", "s11", "s12", "s13", "s14", "s15", "s16", "s17", "s18", "s19", "s20", "s21", "s22",
                  "s23", "cc", "memory");
        n &= 7;
    }
    if (n >= 4) {
        __asm__("vldmia %[a]!, {s8-s11}\n\t"
                "vldmia %[b]!, {s16-s19}\n\t"
                "vmla.f32 %[s0], s8, s16\n\t"
                "vmla.f32 %[s1], s9, s17\n\t"
                "vmla.f32 %[s2], s10, s18\n\t"
                "vmla.f32 %[s3], s11, s19"
                : [a] "+r"(a), [b] "+r"(b), [s0] "+t"(s0), [s1] "+t"(s1), [s2] "+t"(s2), [s3] "+t"(s3)
                :
                : "s8", "s9", "s10", "s11", "s16", "s17", "s18", "s19", "memory");
        n -= 4;
    }
#else
    float s0 = a[0] * b[0], s1 = a[1] * b[1], s2 = a[2] * b[2], s3 = a[3] * b[3];
    n -= 4;
    a += 4;
    b += 4;
#if MOTE_HAS_LANES
    mote_lanes_t s = {s0, s1, s2, s3};
    for (; n >= 4; n -= 4, a += 4, b += 4) {
        s += mote_load_lanes(a) * mote_load_lanes(b);
    }
    s0 = s[0];
    s1 = s[1];
    s2 = s[2];
    s3 = s[3];
#else
    for (; n >= 4; n -= 4, a += 4, b += 4) {
        s0 += a[0] * b[0];
        s1 += a[1] * b[1];
        s2 += a[2] * b[2];
        s3 += a[3] * b[3];
    }
#endif
#endif
    if (n > 0) {
        s0 += a[0] * b[0];
    }
    if (n > 1) {
        s1 += a[1] * b[1];
    }
    if (n > 2) {
        s2 += a[2] * b[2];
    }
    return (s0 + s1) + (s2 + s3);
}

/* y += a * x */
static inline void mote_add_scaled(float *y, float a, const float *x, uint32_t n)
{
#if MOTE_HAS_VLDM
    if (n >= 8) {
        uint32_t eights = n >> 3;
        __asm__ volatile("1:\n\t"
                         "vldmia %[x]!, {s0-s7}\n\t"
                         "vldmia %[y], {s8-s15}\n\t"
                         "subs %[eights], #1\n\t"
                         "vmla.f32 s8, %[a], s0\n\t"
                         "vmla.f32 s9, %[a], s1\n\t"
                         "vmla.f32 s10, %[a], s2\n\t"
                         "vmla.f32 s11, %[a], s3\n\t"
                         "vmla.f32 s12, %[a], s4\n\t"
                         "vmla.f32 s13, %[a], s5\n\t"
                         "vmla.f32 s14, %[a], s6\n\t"
                         "vmla.f32 s15, %[a], s7\n\t"
                         "vstmia %[y]!, {s8-s15}\n\t"
                         "bne 1b"
                         : [x] "+r"(x), [y] "+r"(y), [eights] "+r"(eights)
                         : [a] "t"(a)
                         : "s0", "s1", "s2", "s3", "s4", "s5", "s6", "s7", "s8", "s9", "s10", "s11", "s12", "s13",
                           "s14", "s15", "cc", "memory");
        n &= 7;
    }
#elif MOTE_HAS_LANES
    for (; n >= 4; n -= 4, x += 4, y += 4) {
        mote_store_lanes(y, mote_load_lanes(y) + a * mote_load_lanes(x));
    }
#endif
    for (; n > 0; n--) {
        *y++ += a * *x++;
    }
}

/* y += a * x, and z += b * v. z may be x: y gets what it was. */
static inline void mote_add_scaled_both(float *y, float a, const float *x, float *z, float b, const float *v,
                                        uint32_t n)
{
#if MOTE_HAS_VLDM
    if (n >= 4) {
        uint32_t fours = n >> 2;
        __asm__ volatile("1:\n\t"
                         "vldmia %[y], {s0-s3}\n\t"
                         "vldmia %[x]!, {s4-s7}\n\t"
                         "vldmia %[z], {s8-s11}\n\t"
                         "vldmia %[v]!, {s12-s15}\n\t"
                         "subs %[fours], #1\n\t"
                         "vmla.f32 s0, %[a], s4\n\t"
                         "vmla.f32 s1, %[a], s5\n\t"
                         "vmla.f32 s2, %[a], s6\n\t"
                         "vmla.f32 s3, %[a], s7\n\t"
                         "vmla.f32 s8, %[b], s12\n\t"
                         "vmla.f32 s9, %[b], s13\n\t"
                         "vmla.f32 s10, %[b], s14\n\t"
                         "vmla.f32 s11, %[b], s15\n\t"
                         "vstmia %[y]!, {s0-s3}\n\t"
                         "vstmia %[z]!, {s8-s11}\n\t"
                         "bne 1b"
                         : [x] "+r"(x), [y] "+r"(y), [z] "+r"(z), [v] "+r"(v), [fours] "+r"(fours)
                         : [a] "t"(a), [b] "t"(b)
                         : "s0", "s1", "s2", "s3", "s4", "s5", "s6", "s7", "s8", "s9", "s10", "s11", "s12", "s13",
                           "s14", "s15", "cc", "memory");
        n &= 3;
    }
#elif MOTE_HAS_LANES
    for (; n >= 4; n -= 4, x += 4, y += 4, z += 4, v += 4) {
        mote_lanes_t y4 = mote_load_lanes(y) + a * mote_load_lanes(x);
        mote_store_lanes(z, mote_load_lanes(z) + b * mote_load_lanes(v));
        mote_store_lanes(y, y4);
    }
#endif
    for (; n > 0; n--) {
        float y0 = *y + a * *x++;
        *z++ += b * *v++;
        *y++ = y0;
    }
}

#endif
