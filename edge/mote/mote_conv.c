/* Convolution, float32.
 *
 * y[oy][ox][o] = b[o] + sum over ky, kx, i of w[o][ky][kx][i] x[oy * stride + ky * dilation - pad][...][i]: a dot
 * product for each part of the window that is contiguous (a row; a tap, if dilated), added from the top left on. */
#include <string.h>

#include "mote_kernel_list.h"
#include "mote_vector.h"
#include "mote_window.h"

static uint32_t weights(const mote_t *m, const mote_op_t *op)
{
    return (uint32_t)op->kernel_h * op->kernel_w * mote_tensor(m, op->in)->c * mote_tensor(m, op->out)->c;
}

int mote_conv2d_check(const mote_t *m, const mote_op_t *op)
{
    uint64_t kernel = (uint64_t)op->kernel_h * op->kernel_w; /* the product of four 16-bit numbers fits */
    return mote_floats(m, op) && mote_windows_fit(m, op) &&
           mote_weights_fit(m, op, kernel * mote_tensor(m, op->in)->c * mote_tensor(m, op->out)->c,
                            mote_tensor(m, op->out)->c, 0);
}

/* A window in contiguous parts: `rows` rows of `parts` parts of `n` floats. Of the input: where the first part begins,
 * and the distances between rows and between parts; of a filter likewise. */
typedef struct {
    uint32_t rows, parts, n;
    uint32_t x, x_row, x_part;
    uint32_t w, w_row;
} patch_t;

static patch_t patch(const mote_op_t *op, const mote_tensor_t *in, const mote_window_t *v, const mote_window_t *h)
{
    patch_t p = {v->count, h->count, in->c, 0, 0, 0, 0, 0};
    p.x_part = h->step * in->c;
    if (h->step == 1) {
        p.parts = h->count != 0;
        p.n = h->count * in->c;
    }
    p.x_row = v->step * in->w * in->c;
    p.x = (v->first * in->w + h->first) * in->c;
    p.w_row = (uint32_t)op->kernel_w * in->c;
    p.w = v->skipped * p.w_row + h->skipped * in->c;
    return p;
}

/* sum + one filter over one window */
static float filtered(const patch_t *p, float sum, const float *w, const float *x)
{
    for (uint32_t row = 0; row < p->rows; row++) {
        for (uint32_t part = 0; part < p->parts; part++) {
            sum += mote_dot(w + row * p->w_row + part * p->n, x + row * p->x_row + part * p->x_part, p->n);
        }
    }
    return sum;
}

void mote_conv2d(const mote_t *m, const mote_op_t *op)
{
    const mote_tensor_t *in = mote_tensor(m, op->in), *out = mote_tensor(m, op->out);
    const mote_weights_t p = mote_weights(m, op, weights(m, op), 0);
    const float *x = mote_read(m, op->in);
    float *y = mote_write(m, op->out);
    uint32_t filter = (uint32_t)op->kernel_h * op->kernel_w * in->c;
    for (uint32_t oy = 0; oy < out->h; oy++) {
        mote_window_t v = mote_rows_of(op, in, oy);
        for (uint32_t ox = 0; ox < out->w; ox++) {
            mote_window_t h = mote_columns_of(op, in, ox);
            patch_t at = patch(op, in, &v, &h);
            const float *w = p.w + at.w;
            for (uint32_t o = 0; o < out->c; o++, w += filter) {
                *y++ = filtered(&at, p.b[o], w, x + at.x);
            }
        }
    }
}

/* dx += d * one filter */
static void back(const patch_t *p, float *dx, float d, const float *w)
{
    for (uint32_t row = 0; row < p->rows; row++) {
        for (uint32_t part = 0; part < p->parts; part++) {
            mote_add_scaled(dx + row * p->x_row + part * p->x_part, d, w + row * p->w_row + part * p->n, p->n);
        }
    }
}

/* One filter += step * x */
static void learn(const patch_t *p, float *w, float step, const float *x)
{
    for (uint32_t row = 0; row < p->rows; row++) {
        for (uint32_t part = 0; part < p->parts; part++) {
            mote_add_scaled(w + row * p->w_row + part * p->n, step, x + row * p->x_row + part * p->x_part, p->n);
        }
    }
}

/* All of dx is computed before any weight changes: unlike a dense weight, each is used at many places. */
void mote_conv2d_back(mote_t *m, const mote_op_t *op)
{
    const mote_tensor_t *in = mote_tensor(m, op->in), *out = mote_tensor(m, op->out);
    const mote_weights_t p = mote_weights(m, op, weights(m, op), 0);
    const float *x = mote_read(m, op->in), *dy = mote_read(m, op->dout);
    float *dx = mote_din(m, op);
    uint32_t filter = (uint32_t)op->kernel_h * op->kernel_w * in->c, places = (uint32_t)out->h * out->w;
    if (dx != NULL && !(op->flags & MOTE_ADDS_DIN)) {
        memset(dx, 0, mote_bytes(in));
    }
    for (int learns = dx == NULL; learns < 1 + (p.dw != NULL); learns++) {
        const float *d = dy;
        for (uint32_t oy = 0; oy < out->h; oy++) {
            mote_window_t v = mote_rows_of(op, in, oy);
            for (uint32_t ox = 0; ox < out->w; ox++) {
                mote_window_t h = mote_columns_of(op, in, ox);
                patch_t at = patch(op, in, &v, &h);
                uint32_t w = at.w;
                for (uint32_t o = 0; o < out->c; o++, d++, w += filter) {
                    if (*d == 0.0f) {
                        continue; /* as behind a ReLU that is off, or max pooling */
                    }
                    if (learns) {
                        learn(&at, p.dw + w, m->step * *d, x + at.x);
                    } else {
                        back(&at, dx + at.x, *d, p.w + w);
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

/* The gradient of the weight at row ky, column kx, input channel i of filter o. */
static float gradient(const mote_t *m, const mote_op_t *op, uint32_t o, uint32_t ky, uint32_t kx, uint32_t i)
{
    const mote_tensor_t *in = mote_tensor(m, op->in), *out = mote_tensor(m, op->out);
    const float *x = mote_read(m, op->in), *dy = mote_read(m, op->dout);
    float sum = 0.0f;
    for (uint32_t oy = 0; oy < out->h; oy++) {
        uint32_t row = oy * op->stride_h + ky * op->dilation_h - op->pad_top;
        for (uint32_t ox = 0; row < in->h && ox < out->w; ox++) {
            uint32_t column = ox * op->stride_w + kx * op->dilation_w - op->pad_left;
            if (column < in->w) {
                sum += dy[(oy * out->w + ox) * out->c + o] * x[(row * in->w + column) * in->c + i];
            }
        }
    }
    return sum;
}

float mote_conv2d_norm(const mote_t *m, const mote_op_t *op)
{
    const mote_tensor_t *in = mote_tensor(m, op->in), *out = mote_tensor(m, op->out);
    const float *dy = mote_read(m, op->dout);
    int weights_train = mote_weights(m, op, weights(m, op), 0).dw != NULL;
    uint32_t size = mote_size(out);
    float norm = 0.0f;
    for (uint32_t o = 0; o < out->c; o++) {
        float sum = 0.0f;
        for (uint32_t at = o; at < size; at += out->c) {
            sum += dy[at];
        }
        norm += sum * sum;
        for (uint32_t ky = 0; weights_train && ky < op->kernel_h; ky++) {
            for (uint32_t kx = 0; kx < op->kernel_w; kx++) {
                for (uint32_t i = 0; i < in->c; i++) {
                    float g = gradient(m, op, o, ky, kx, i);
                    norm += g * g;
                }
            }
        }
    }
    return norm;
}
