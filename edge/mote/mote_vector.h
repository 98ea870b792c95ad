/* Sums over contiguous floats, which float kernels are made of. In the exact profile the order of every sum is fixed:
 * it is part of the format. */
#ifndef MOTE_VECTOR_H
#define MOTE_VECTOR_H

#include <stdint.h>

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
    float s0 = a[0] * b[0], s1 = a[1] * b[1], s2 = a[2] * b[2], s3 = a[3] * b[3];
    for (n -= 4, a += 4, b += 4; n >= 4; n -= 4, a += 4, b += 4) {
        s0 += a[0] * b[0];
        s1 += a[1] * b[1];
        s2 += a[2] * b[2];
        s3 += a[3] * b[3];
    }
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
    for (; n >= 4; n -= 4, x += 4, y += 4) {
        float y0 = y[0] + a * x[0], y1 = y[1] + a * x[1], y2 = y[2] + a * x[2], y3 = y[3] + a * x[3];
        y[0] = y0;
        y[1] = y1;
        y[2] = y2;
        y[3] = y3;
    }
    for (; n > 0; n--) {
        *y++ += a * *x++;
    }
}

/* y += a * x, and z += b * v. z may be x: y gets what it was. */
static inline void mote_add_scaled_both(float *y, float a, const float *x, float *z, float b, const float *v,
                                        uint32_t n)
{
    for (; n >= 2; n -= 2, x += 2, y += 2, z += 2, v += 2) {
        float y0 = y[0] + a * x[0], y1 = y[1] + a * x[1], z0 = z[0] + b * v[0], z1 = z[1] + b * v[1];
        y[0] = y0;
        y[1] = y1;
        z[0] = z0;
        z[1] = z1;
    }
    if (n > 0) {
        float y0 = *y + a * *x, z0 = *z + b * *v;
        *y = y0;
        *z = z0;
    }
}

#endif
