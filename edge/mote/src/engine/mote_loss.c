/* The losses, and the outputs that they are defined on. Means are over the outputs, as in Keras. */
#include <string.h>

#include "mote_kernel_list.h"

int mote_cross_entropy_fits(uint32_t n, const float *target)
{
    return target[0] >= 0.0f && target[0] < (float)n && target[0] == (float)(uint32_t)target[0];
}

/* Softmax, and -ln p[target]. The largest is taken off first, so that no exponential overflows; the loss is
 * ln sum - z[target], which stays finite where p[target] rounds to 0. */
float mote_cross_entropy(const mote_t *m, uint32_t n, const float *z, const float *target, float *p)
{
    (void)m;
    float top = z[0], at_target, sum = 0.0f;
    for (uint32_t j = 1; j < n; j++) {
        if (z[j] > top) {
            top = z[j];
        }
    }
    at_target = target != NULL ? z[(uint32_t)target[0]] - top : 0.0f;
    for (uint32_t j = 0; j < n; j++) {
        p[j] = mote_expf(z[j] - top);
        sum += p[j];
    }
    float share = 1.0f / sum;
    for (uint32_t j = 0; j < n; j++) {
        p[j] *= share;
    }
    return target != NULL ? mote_logf(sum) - at_target : 0.0f;
}

void mote_cross_entropy_gradient(const mote_t *m, uint32_t n, const float *p, const float *target, float *dz)
{
    (void)m;
    memmove(dz, p, n * sizeof *dz);
    dz[(uint32_t)target[0]] -= 1.0f;
}

int mote_squared_error_fits(uint32_t n, const float *target)
{
    return mote_all_finite(target, n);
}

float mote_squared_error(const mote_t *m, uint32_t n, const float *z, const float *target, float *y)
{
    (void)m;
    float sum = 0.0f;
    memmove(y, z, n * sizeof *y);
    for (uint32_t j = 0; target != NULL && j < n; j++) {
        float d = y[j] - target[j];
        sum += d * d;
    }
    return sum / (float)n;
}

void mote_squared_error_gradient(const mote_t *m, uint32_t n, const float *y, const float *target, float *dz)
{
    (void)m;
    float share = 2.0f / (float)n;
    for (uint32_t j = 0; j < n; j++) {
        dz[j] = (y[j] - target[j]) * share;
    }
}

int mote_binary_entropy_fits(uint32_t n, const float *target)
{
    for (uint32_t j = 0; j < n; j++) {
        if (!(target[j] >= 0.0f && target[j] <= 1.0f)) {
            return 0;
        }
    }
    return 1;
}

/* y = sigmoid(z), and the mean of -t ln y - (1 - t) ln(1 - y) = max(z, 0) - z t + ln(1 + e^-|z|), which needs no y that
 * has rounded to 0 or 1. */
float mote_binary_entropy(const mote_t *m, uint32_t n, const float *z, const float *target, float *y)
{
    (void)m;
    float sum = 0.0f;
    for (uint32_t j = 0; j < n; j++) {
        float v = z[j], e = mote_expf(v > 0.0f ? -v : v);
        if (target != NULL) {
            float whole = 1.0f + e, lost = whole - 1.0f; /* what of e is left in 1 + e (Kahan's log1p) */
            sum += (v > 0.0f ? v : 0.0f) - v * target[j] + (lost > 0.0f ? mote_logf(whole) * (e / lost) : e);
        }
        y[j] = (v > 0.0f ? 1.0f : e) / (1.0f + e);
    }
    return sum / (float)n;
}

void mote_binary_entropy_gradient(const mote_t *m, uint32_t n, const float *y, const float *target, float *dz)
{
    (void)m;
    float share = 1.0f / (float)n;
    for (uint32_t j = 0; j < n; j++) {
        dz[j] = (y[j] - target[j]) * share;
    }
}

int mote_huber_fits(uint32_t n, const float *target)
{
    return mote_all_finite(target, n);
}

/* The mean of d^2 / 2 up to delta, and of delta (|d| - delta / 2) beyond it. */
float mote_huber(const mote_t *m, uint32_t n, const float *z, const float *target, float *y)
{
    float delta = mote_header(m)->huber_delta, sum = 0.0f;
    memmove(y, z, n * sizeof *y);
    for (uint32_t j = 0; target != NULL && j < n; j++) {
        float d = y[j] - target[j], size = d < 0.0f ? -d : d;
        sum += size <= delta ? 0.5f * size * size : delta * (size - 0.5f * delta);
    }
    return sum / (float)n;
}

void mote_huber_gradient(const mote_t *m, uint32_t n, const float *y, const float *target, float *dz)
{
    float delta = mote_header(m)->huber_delta, share = 1.0f / (float)n;
    for (uint32_t j = 0; j < n; j++) {
        float d = y[j] - target[j];
        d = d > delta ? delta : d < -delta ? -delta : d;
        dz[j] = d * share;
    }
}
