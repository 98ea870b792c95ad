/* The arithmetic of every op, forward and backward. The order of every sum is fixed: it is part of the format. */
#include <string.h>

#include "mote_internal.h"

/* Sum of a[j] * b[j], j < n, n > 0, in four lanes by j & 3 that are joined in a fixed order: vectors can compute the
 * same bits. A lane begins with its first product. */
static inline float dot(const float *a, const float *b, uint32_t n)
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
static void add_scaled(float *restrict y, float a, const float *restrict x, uint32_t n)
{
    for (; n >= 4; n -= 4, x += 4, y += 4) {
        y[0] += a * x[0];
        y[1] += a * x[1];
        y[2] += a * x[2];
        y[3] += a * x[3];
    }
    if (n > 0) {
        y[0] += a * x[0];
    }
    if (n > 1) {
        y[1] += a * x[1];
    }
    if (n > 2) {
        y[2] += a * x[2];
    }
}

/* y += a * x, and x += b * z. */
static void add_scaled_both(float *restrict y, float a, float *restrict x, float b, const float *restrict z, uint32_t n)
{
    for (; n >= 2; n -= 2, x += 2, y += 2, z += 2) {
        float x0 = x[0], x1 = x[1];
        y[0] += a * x0;
        y[1] += a * x1;
        x[0] = x0 + b * z[0];
        x[1] = x1 + b * z[1];
    }
    if (n > 0) {
        float x0 = x[0];
        y[0] += a * x0;
        x[0] = x0 + b * z[0];
    }
}

/* Where window number o begins in a dimension of `in`, clipped: its first element, its length, and how many of the
 * kernel's rows or columns lie before it. */
typedef struct {
    uint32_t first, count, skipped;
} window_t;

static inline window_t window(uint32_t o, uint32_t stride, uint32_t pad, uint32_t kernel, uint32_t in)
{
    window_t w;
    uint32_t begin = o * stride; /* in a dimension that starts with the padding */
    uint32_t end = begin + kernel < in + pad ? begin + kernel : in + pad;
    w.skipped = begin < pad ? pad - begin : 0;
    w.first = begin + w.skipped - pad;
    w.count = end - (begin + w.skipped);
    return w;
}

static inline window_t rows(const mote_op_t *op, uint32_t oy)
{
    return window(oy, op->stride_h, op->pad_top, op->kernel_h, op->in_h);
}

static inline window_t columns(const mote_op_t *op, uint32_t ox)
{
    return window(ox, op->stride_w, op->pad_left, op->kernel_w, op->in_w);
}

/* y[o] = b[o] + sum over i of w[o][i] x[i] */
void mote_dense(const mote_op_t *op, const float *w, const float *x, float *y)
{
    uint32_t in = op->in_c, out = op->out_c;
    const float *bias = w + in * out;
    for (uint32_t o = 0; o < out; o++, w += in) {
        y[o] = bias[o] + dot(w, x, in);
    }
}

void mote_dense_back(const mote_op_t *op, const float *w, float *update, float rate, const float *x, const float *dy,
                     float *dx)
{
    uint32_t in = op->in_c, out = op->out_c;
    if (dx != NULL) {
        memset(dx, 0, in * sizeof *dx);
    }
    for (uint32_t o = 0; o < out; o++) {
        float d = dy[o];
        if (d == 0.0f) {
            continue; /* as behind a ReLU that is off */
        }
        float step = -(rate * d);
        if (update == NULL) {
            add_scaled(dx, d, w + o * in, in);
            continue;
        }
        if (dx == NULL) {
            add_scaled(update + o * in, step, x, in);
        } else {
            add_scaled_both(dx, d, update + o * in, step, x, in);
        }
        update[in * out + o] += step;
    }
}

/* y[oy][ox][o] = b[o] + sum over ky, kx, i of w[o][ky][kx][i] x[oy * stride + ky - pad][ox * stride + kx - pad][i]:
 * a dot product for each row of the window, which is contiguous, added from the top row down. */
void mote_conv2d(const mote_op_t *op, const float *w, const float *x, float *y)
{
    uint32_t in = op->in_c, row = op->in_w * in, kernel_row = op->kernel_w * in, filter = op->kernel_h * kernel_row;
    const float *bias = w + mote_weights(op);
    for (uint32_t oy = 0; oy < op->out_h; oy++) {
        window_t v = rows(op, oy);
        for (uint32_t ox = 0; ox < op->out_w; ox++) {
            window_t h = columns(op, ox);
            const float *corner = x + v.first * row + h.first * in;
            const float *k = w + v.skipped * kernel_row + h.skipped * in;
            for (uint32_t o = 0; o < op->out_c; o++, k += filter) {
                float sum = bias[o];
                for (uint32_t ky = 0; ky < v.count; ky++) {
                    sum += dot(k + ky * kernel_row, corner + ky * row, h.count * in);
                }
                *y++ = sum;
            }
        }
    }
}

/* All of dx is computed before any weight changes: unlike a dense weight, this one is used at many places. */
void mote_conv2d_back(const mote_op_t *op, const float *w, float *update, float rate, const float *x, const float *dy,
                      float *dx)
{
    uint32_t in = op->in_c, row = op->in_w * in, kernel_row = op->kernel_w * in, filter = op->kernel_h * kernel_row;
    if (dx != NULL) {
        memset(dx, 0, mote_in_size(op) * sizeof *dx);
    }
    for (int pass = dx == NULL; pass < 1 + (update != NULL); pass++) {
        const float *d = dy;
        for (uint32_t oy = 0; oy < op->out_h; oy++) {
            window_t v = rows(op, oy);
            for (uint32_t ox = 0; ox < op->out_w; ox++) {
                window_t h = columns(op, ox);
                uint32_t corner = v.first * row + h.first * in, k = v.skipped * kernel_row + h.skipped * in;
                for (uint32_t o = 0; o < op->out_c; o++, d++, k += filter) {
                    if (*d == 0.0f) {
                        continue;
                    }
                    float step = -(rate * *d);
                    for (uint32_t ky = 0; ky < v.count; ky++) {
                        uint32_t kr = k + ky * kernel_row, xr = corner + ky * row;
                        if (pass == 0) {
                            add_scaled(dx + xr, *d, w + kr, h.count * in);
                        } else {
                            add_scaled(update + kr, step, x + xr, h.count * in);
                        }
                    }
                    if (pass == 1) {
                        update[filter * op->out_c + o] += step;
                    }
                }
            }
        }
    }
}

/* The mean of the elements that a window covers; padding does not count. */
void mote_avgpool(const mote_op_t *op, const float *x, float *y)
{
    uint32_t c = op->in_c;
    for (uint32_t oy = 0; oy < op->out_h; oy++) {
        window_t v = rows(op, oy);
        for (uint32_t ox = 0; ox < op->out_w; ox++, y += c) {
            window_t h = columns(op, ox);
            float share = 1.0f / (float)(v.count * h.count);
            memset(y, 0, c * sizeof *y);
            for (uint32_t ky = 0; ky < v.count; ky++) {
                for (uint32_t kx = 0; kx < h.count; kx++) {
                    const float *from = x + ((v.first + ky) * op->in_w + h.first + kx) * c;
                    for (uint32_t j = 0; j < c; j++) {
                        y[j] += from[j];
                    }
                }
            }
            for (uint32_t j = 0; j < c; j++) {
                y[j] *= share;
            }
        }
    }
}

void mote_avgpool_back(const mote_op_t *op, const float *dy, float *dx)
{
    uint32_t c = op->in_c;
    memset(dx, 0, mote_in_size(op) * sizeof *dx);
    for (uint32_t oy = 0; oy < op->out_h; oy++) {
        window_t v = rows(op, oy);
        for (uint32_t ox = 0; ox < op->out_w; ox++, dy += c) {
            window_t h = columns(op, ox);
            float share = 1.0f / (float)(v.count * h.count);
            for (uint32_t ky = 0; ky < v.count; ky++) {
                for (uint32_t kx = 0; kx < h.count; kx++) {
                    add_scaled(dx + ((v.first + ky) * op->in_w + h.first + kx) * c, share, dy, c);
                }
            }
        }
    }
}

/* The first of a window's largest elements in channel x[0], as a distance from x. */
static inline uint32_t largest(const mote_op_t *op, const float *x, uint32_t height, uint32_t width)
{
    uint32_t best = 0;
    for (uint32_t ky = 0; ky < height; ky++) {
        for (uint32_t kx = 0; kx < width; kx++) {
            uint32_t at = (ky * op->in_w + kx) * op->in_c;
            if (x[at] > x[best]) {
                best = at;
            }
        }
    }
    return best;
}

void mote_maxpool(const mote_op_t *op, const float *x, float *y)
{
    for (uint32_t oy = 0; oy < op->out_h; oy++) {
        window_t v = rows(op, oy);
        for (uint32_t ox = 0; ox < op->out_w; ox++) {
            window_t h = columns(op, ox);
            const float *corner = x + (v.first * op->in_w + h.first) * op->in_c;
            for (uint32_t j = 0; j < op->in_c; j++) {
                *y++ = corner[j + largest(op, corner + j, v.count, h.count)];
            }
        }
    }
}

/* The gradient goes to each window's largest element. Windows that share none are cleared one by one, after they were
 * read, so that dx can be x; what lies behind the last window is cleared too. */
void mote_maxpool_back(const mote_op_t *op, const float *x, const float *dy, float *dx)
{
    int disjoint = mote_disjoint(op);
    uint32_t c = op->in_c;
    if (!disjoint) {
        memset(dx, 0, mote_in_size(op) * sizeof *dx);
    }
    for (uint32_t oy = 0; oy < op->out_h; oy++) {
        window_t v = rows(op, oy);
        for (uint32_t ox = 0; ox < op->out_w; ox++) {
            window_t h = columns(op, ox);
            uint32_t corner = (v.first * op->in_w + h.first) * c;
            for (uint32_t j = 0; j < c; j++, corner++) {
                uint32_t best = corner + largest(op, x + corner, v.count, h.count);
                float d = *dy++;
                if (!disjoint) {
                    dx[best] += d;
                    continue;
                }
                for (uint32_t ky = 0; ky < v.count; ky++) {
                    for (uint32_t kx = 0; kx < h.count; kx++) {
                        dx[corner + (ky * op->in_w + kx) * c] = 0.0f;
                    }
                }
                dx[best] = d;
            }
        }
    }
    if (disjoint) {
        window_t v = rows(op, op->out_h - 1u), h = columns(op, op->out_w - 1u);
        uint32_t bottom = v.first + v.count, right = h.first + h.count;
        for (uint32_t y = 0; right < op->in_w && y < bottom; y++) {
            memset(dx + (y * op->in_w + right) * c, 0, (op->in_w - right) * c * sizeof *dx);
        }
        memset(dx + bottom * op->in_w * c, 0, (op->in_h - bottom) * op->in_w * c * sizeof *dx);
    }
}

void mote_relu(uint32_t n, const float *x, float *y)
{
    for (uint32_t j = 0; j < n; j++) {
        y[j] = x[j] < 0.0f ? 0.0f : x[j]; /* not a number stays so, and shows in the loss */
    }
}

void mote_relu_back(uint32_t n, const float *y, const float *dy, float *dx)
{
    for (uint32_t j = 0; j < n; j++) {
        dx[j] = y[j] > 0.0f ? dy[j] : 0.0f;
    }
}

void mote_tanh(uint32_t n, const float *x, float *y)
{
    for (uint32_t j = 0; j < n; j++) {
        y[j] = mote_tanhf(x[j]);
    }
}

void mote_tanh_back(uint32_t n, const float *y, const float *dy, float *dx)
{
    for (uint32_t j = 0; j < n; j++) {
        dx[j] = dy[j] * (1.0f - y[j] * y[j]);
    }
}

/* The largest is taken off first, so that no exponential overflows; the loss is ln sum - z[target], which stays finite
 * where p[target] rounds to 0. */
float mote_softmax(uint32_t n, const float *z, float *p, uint32_t target)
{
    float top = z[0], at_target, sum = 0.0f;
    for (uint32_t j = 1; j < n; j++) {
        if (z[j] > top) {
            top = z[j];
        }
    }
    at_target = z[target] - top;
    for (uint32_t j = 0; j < n; j++) {
        p[j] = mote_expf(z[j] - top);
        sum += p[j];
    }
    float share = 1.0f / sum;
    for (uint32_t j = 0; j < n; j++) {
        p[j] *= share;
    }
    return mote_logf(sum) - at_target;
}

float mote_squared_error(uint32_t n, const float *y, const float *target)
{
    float sum = 0.0f;
    for (uint32_t j = 0; j < n; j++) {
        float d = y[j] - target[j];
        sum += d * d;
    }
    return sum / (float)n;
}

void mote_squared_error_back(uint32_t n, const float *y, const float *target, float *dy)
{
    float share = 2.0f / (float)n;
    for (uint32_t j = 0; j < n; j++) {
        dy[j] = (y[j] - target[j]) * share;
    }
}
