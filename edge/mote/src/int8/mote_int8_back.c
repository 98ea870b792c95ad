/* Gradients through the int8 operators that have nothing to train. They are float32, with respect to the real values,
 * so that scales do not matter; what a pool, whose outputs no program with a gradient may clamp, rounds does not
 * either. */
#include "mote_kernel_list.h"

#include "mote_int8.h"

void mote_dequantize_back(mote_t *m, const mote_op_t *op)
{
    const float *dy = mote_read(m, op->dout);
    float *din = mote_din(m, op);
    const uint32_t rows = mote_size(mote_tensor(m, op->out)) - mote_tensor(m, op->out)->c + mote_rows(m, op);
    for (uint32_t i = 0; din != NULL && i < mote_size(mote_tensor(m, op->in)); i++) {
        const float d = i < rows ? dy[i] : 0.0f; /* classes not in use yet have no gradient */
        din[i] = op->flags & MOTE_ADDS_DIN ? din[i] + d : d;
    }
}

void mote_int8_add_back(mote_t *m, const mote_op_t *op)
{
    const mote_range_t range = ((const mote_int8_add_t *)(const void *)(mote_constants(m) + op->constants))->range;
    const int8_t *y = mote_read(m, op->out);
    const float *dy = mote_read(m, op->dout);
    float *din = mote_din(m, op), *din2 = mote_din2(m, op);
    for (uint32_t i = 0; i < mote_size(mote_tensor(m, op->out)); i++) {
        const float d = y[i] <= range.low || y[i] >= range.high ? 0.0f : dy[i];
        if (din != NULL) {
            din[i] = op->flags & MOTE_ADDS_DIN ? din[i] + d : d;
        }
        if (din2 != NULL) {
            din2[i] = op->flags & MOTE_ADDS_DIN2 ? din2[i] + d : d;
        }
    }
}

void mote_int8_mean_back(mote_t *m, const mote_op_t *op)
{
    const mote_tensor_t *in = mote_tensor(m, op->in);
    const float *dy = mote_read(m, op->dout);
    const float part = 1.0f / (float)((uint32_t)in->h * in->w);
    float *din = mote_din(m, op);
    for (uint32_t i = 0; din != NULL && i < mote_size(in); i++) {
        const float d = dy[i % in->c] * part;
        din[i] = op->flags & MOTE_ADDS_DIN ? din[i] + d : d;
    }
}

/* The part of a window that lies inside the input. */
typedef struct {
    uint32_t top, bottom, left, right;
} window_t;

static uint32_t begin_of(uint32_t i, uint32_t stride, uint32_t pad)
{
    return i * stride > pad ? i * stride - pad : 0;
}

static uint32_t end_of(uint32_t i, uint32_t stride, uint32_t pad, uint32_t kernel, uint32_t size)
{
    uint32_t end = i * stride + kernel - pad;
    return end < size ? end : size;
}

static window_t window_of(const mote_op_t *op, const mote_tensor_t *in, uint32_t i, uint32_t j)
{
    window_t w = {begin_of(i, op->stride_h, op->pad_top), end_of(i, op->stride_h, op->pad_top, op->kernel_h, in->h),
                  begin_of(j, op->stride_w, op->pad_left), end_of(j, op->stride_w, op->pad_left, op->kernel_w, in->w)};
    return w;
}

/* The average's: every element of the window gets d / their count. */
static void spread(const mote_tensor_t *in, window_t w, float d, float *din)
{
    d /= (float)((w.bottom - w.top) * (w.right - w.left));
    for (uint32_t y = w.top; y < w.bottom; y++) {
        for (uint32_t x = w.left; x < w.right; x++) {
            din[(y * in->w + x) * in->c] += d;
        }
    }
}

/* The maximum's: its first element gets d. */
static void give_most(const mote_tensor_t *in, window_t w, float d, const int8_t *values, float *din)
{
    uint32_t most = (w.top * in->w + w.left) * in->c;
    for (uint32_t y = w.top; y < w.bottom; y++) {
        for (uint32_t x = w.left; x < w.right; x++) {
            const uint32_t at = (y * in->w + x) * in->c;
            most = values[at] > values[most] ? at : most;
        }
    }
    din[most] += d;
}

static void pool_back(const mote_t *m, const mote_op_t *op, const int8_t *values)
{
    const mote_tensor_t *in = mote_tensor(m, op->in), *out = mote_tensor(m, op->out);
    const float *dy = mote_read(m, op->dout);
    float *din = mote_begun_din(m, op);
    if (din == NULL) {
        return;
    }
    for (uint32_t i = 0; i < out->h; i++) {
        for (uint32_t j = 0; j < out->w; j++) {
            const window_t w = window_of(op, in, i, j);
            for (uint32_t c = 0; c < out->c; c++, dy++) {
                if (values == NULL) {
                    spread(in, w, *dy, din + c);
                } else {
                    give_most(in, w, *dy, values + c, din + c);
                }
            }
        }
    }
}

void mote_int8_avgpool_back(mote_t *m, const mote_op_t *op)
{
    pool_back(m, op, NULL);
}

void mote_int8_maxpool_back(mote_t *m, const mote_op_t *op)
{
    pool_back(m, op, mote_read(m, op->in));
}
