/* int8 convolution. */
#include "mote_kernel_list.h"

#include "mote_int8.h"

int mote_int8_conv2d_check(const mote_t *m, const mote_op_t *op)
{
    uint64_t taps = (uint64_t)op->kernel_h * op->kernel_w * mote_tensor(m, op->in)->c;
    return taps <= MOTE_MAX_BYTES && mote_windows_fit(m, op) &&
           mote_int8_constants_fit(m, op, taps * mote_tensor(m, op->out)->c);
}

/* acc + the sum of w * x over n channels. */
static int32_t added(int32_t acc, const int8_t *w, const int8_t *x, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        acc = mote_wrapped_sum(acc, w[i] * x[i]);
    }
    return acc;
}

/* The same where every x is the zero point: outside of the input. */
static int32_t added_outside(int32_t acc, const int8_t *w, int32_t zero_point, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        acc = mote_wrapped_sum(acc, w[i] * zero_point);
    }
    return acc;
}

/* acc + one filter over the window that begins at row y, column x of the input. */
static int32_t window(const mote_t *m, const mote_op_t *op, int32_t acc, const int8_t *w, int32_t y, int32_t x)
{
    const mote_tensor_t *in = mote_tensor(m, op->in);
    const int8_t *input = mote_read(m, op->in);
    for (uint32_t i = 0; i < op->kernel_h; i++, y += op->dilation_h) {
        int32_t column = x;
        for (uint32_t j = 0; j < op->kernel_w; j++, column += op->dilation_w, w += in->c) {
            if (y >= 0 && y < in->h && column >= 0 && column < in->w) {
                acc = added(acc, w, input + ((uint32_t)y * in->w + (uint32_t)column) * in->c, in->c);
            } else {
                acc = added_outside(acc, w, in->zero_point, in->c);
            }
        }
    }
    return acc;
}

void mote_int8_conv2d_part(const mote_t *m, const mote_op_t *op, mote_range_t range, const mote_requant_t *requant,
                           const int8_t *weights, uint32_t first, uint32_t count)
{
    const mote_tensor_t *out = mote_tensor(m, op->out);
    const uint32_t taps = (uint32_t)op->kernel_h * op->kernel_w * mote_tensor(m, op->in)->c;
    int8_t *to = (int8_t *)mote_write(m, op->out) + first;
    for (int32_t y = 0; y < out->h; y++) {
        for (int32_t x = 0; x < out->w; x++, to += out->c) {
            for (uint32_t o = 0; o < count; o++) {
                int32_t acc = window(m, op, requant[o].bias, weights + o * taps, y * op->stride_h - op->pad_top,
                                     x * op->stride_w - op->pad_left);
                to[o] = mote_requantised(acc, &requant[o], out->zero_point, range);
            }
        }
    }
}

void mote_int8_conv2d(const mote_t *m, const mote_op_t *op)
{
    mote_int8_constants_t c = mote_int8_constants(m, op);
    mote_int8_conv2d_part(m, op, c.range, c.requant, c.weights, 0, mote_tensor(m, op->out)->c);
}
