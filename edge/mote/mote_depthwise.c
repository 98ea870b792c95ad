/* Depthwise convolution, float32: every output channel is a filter over one input channel.
 *
 * y[oy][ox][o] = b[o] + sum over ky, kx of w[ky][kx][o] x[oy * stride + ky * dilation - pad][...][o * in_c / out_c],
 * tap by tap from the top left. */
#include <string.h>

#include "mote_kernel_list.h"
#include "mote_window.h"

static uint32_t weights(const mote_t *m, const mote_op_t *op)
{
    return (uint32_t)op->kernel_h * op->kernel_w * mote_tensor(m, op->out)->c;
}

int mote_depthwise_check(const mote_t *m, const mote_op_t *op)
{
    uint32_t in_c = mote_tensor(m, op->in)->c, out_c = mote_tensor(m, op->out)->c;
    return mote_floats(m, op) && out_c % in_c == 0 && mote_windows_fit(m, op) &&
           mote_weights_fit(m, op, (uint64_t)op->kernel_h * op->kernel_w * out_c, out_c, 0);
}

/* y[o] += w[o] * x[o / multiplier] */
static void add_tap(float *y, const float *w, const float *x, uint32_t n, uint32_t multiplier)
{
    if (multiplier == 1) {
        for (; n > 0; n--) {
            *y++ += *w++ * *x++;
        }
        return;
    }
    for (; n > 0; n--, x++) {
        for (uint32_t q = 0; q < multiplier; q++) {
            *y++ += *w++ * *x;
        }
    }
}

void mote_depthwise(const mote_t *m, const mote_op_t *op)
{
    const mote_tensor_t *in = mote_tensor(m, op->in), *out = mote_tensor(m, op->out);
    const mote_weights_t p = mote_weights(m, op, weights(m, op), 0);
    const float *x = mote_read(m, op->in);
    float *y = mote_write(m, op->out);
    uint32_t c = in->c, multiplier = out->c / c;
    for (uint32_t oy = 0; oy < out->h; oy++) {
        mote_window_t v = mote_rows_of(op, in, oy);
        for (uint32_t ox = 0; ox < out->w; ox++, y += out->c) {
            mote_window_t h = mote_columns_of(op, in, ox);
            memmove(y, p.b, out->c * sizeof *y);
            for (uint32_t ky = 0; ky < v.count; ky++) {
                const float *w = p.w + ((v.skipped + ky) * op->kernel_w + h.skipped) * out->c;
                const float *row = x + ((v.first + ky * v.step) * in->w + h.first) * c;
                for (uint32_t kx = 0; kx < h.count; kx++, w += out->c) {
                    add_tap(y, w, row + kx * h.step * c, c, multiplier);
                }
            }
        }
    }
}

/* x[o / multiplier] += w[o] * d[o] */
static void back_tap(float *x, const float *w, const float *d, uint32_t n, uint32_t multiplier)
{
    for (; n > 0; n--, x++) {
        for (uint32_t q = 0; q < multiplier; q++) {
            *x += *w++ * *d++;
        }
    }
}

/* w[o] += step * d[o] * x[o / multiplier] */
static void learn_tap(float *w, float step, const float *d, const float *x, uint32_t n, uint32_t multiplier)
{
    for (; n > 0; n--, x++) {
        for (uint32_t q = 0; q < multiplier; q++) {
            *w++ += step * *d++ * *x;
        }
    }
}

/* All of dx is computed before any weight changes: each is used at many places. */
void mote_depthwise_back(mote_t *m, const mote_op_t *op)
{
    const mote_tensor_t *in = mote_tensor(m, op->in), *out = mote_tensor(m, op->out);
    const mote_weights_t p = mote_weights(m, op, weights(m, op), 0);
    const float *x = mote_read(m, op->in), *dy = mote_read(m, op->dout);
    float *dx = mote_din(m, op);
    uint32_t c = in->c, multiplier = out->c / c, places = (uint32_t)out->h * out->w;
    if (dx != NULL && !(op->flags & MOTE_ADDS_DIN)) {
        memset(dx, 0, mote_bytes(in));
    }
    for (int learns = dx == NULL; learns < 1 + (p.dw != NULL); learns++) {
        const float *d = dy;
        for (uint32_t oy = 0; oy < out->h; oy++) {
            mote_window_t v = mote_rows_of(op, in, oy);
            for (uint32_t ox = 0; ox < out->w; ox++, d += out->c) {
                mote_window_t h = mote_columns_of(op, in, ox);
                for (uint32_t ky = 0; ky < v.count; ky++) {
                    uint32_t w = ((v.skipped + ky) * op->kernel_w + h.skipped) * out->c;
                    uint32_t at = ((v.first + ky * v.step) * in->w + h.first) * c;
                    for (uint32_t kx = 0; kx < h.count; kx++, w += out->c, at += h.step * c) {
                        if (learns) {
                            learn_tap(p.dw + w, m->step, d, x + at, c, multiplier);
                        } else {
                            back_tap(dx + at, p.w + w, d, c, multiplier);
                        }
                    }
                }
            }
        }
    }
    for (const float *d = dy; p.db != NULL && places > 0; places--) {
        for (uint32_t o = 0; o < out->c; o++) {
            p.db[o] += m->step * *d++;
        }
    }
}

/* The gradient of the weight at row ky, column kx of the kernel, of channel o. */
static float gradient(const mote_t *m, const mote_op_t *op, uint32_t ky, uint32_t kx, uint32_t o)
{
    const mote_tensor_t *in = mote_tensor(m, op->in), *out = mote_tensor(m, op->out);
    const float *x = mote_read(m, op->in), *dy = mote_read(m, op->dout);
    uint32_t channel = o / (out->c / in->c);
    float sum = 0.0f;
    for (uint32_t oy = 0; oy < out->h; oy++) {
        uint32_t row = oy * op->stride_h + ky * op->dilation_h - op->pad_top;
        for (uint32_t ox = 0; row < in->h && ox < out->w; ox++) {
            uint32_t column = ox * op->stride_w + kx * op->dilation_w - op->pad_left;
            if (column < in->w) {
                sum += dy[(oy * out->w + ox) * out->c + o] * x[(row * in->w + column) * in->c + channel];
            }
        }
    }
    return sum;
}

float mote_depthwise_norm(const mote_t *m, const mote_op_t *op)
{
    const mote_tensor_t *out = mote_tensor(m, op->out);
    const float *dy = mote_read(m, op->dout);
    uint32_t size = mote_size(out);
    float norm = 0.0f;
    for (uint32_t o = 0; o < out->c; o++) {
        float sum = 0.0f;
        for (uint32_t at = o; at < size; at += out->c) {
            sum += dy[at];
        }
        norm += sum * sum;
    }
    if (mote_weights(m, op, weights(m, op), 0).dw == NULL) {
        return norm;
    }
    for (uint32_t ky = 0; ky < op->kernel_h; ky++) {
        for (uint32_t kx = 0; kx < op->kernel_w; kx++) {
            for (uint32_t o = 0; o < out->c; o++) {
                float g = gradient(m, op, ky, kx, o);
                norm += g * g;
            }
        }
    }
    return norm;
}
