/* int8 depthwise convolution. */
#include "mote_kernel_list.h"

#include "mote_int8.h"

int mote_int8_depthwise_check(const mote_t *m, const mote_op_t *op)
{
    uint32_t in = mote_tensor(m, op->in)->c, out = mote_tensor(m, op->out)->c;
    uint64_t weights = (uint64_t)op->kernel_h * op->kernel_w * out;
    return out % in == 0 && mote_windows_fit(m, op) && mote_int8_constants_fit(m, op, weights);
}

/* acc + one channel's filter (with `row` weights from tap to tap) over the window that begins at row y, column x of the
 * input's channel. */
static int32_t window(const mote_t *m, const mote_op_t *op, int32_t acc, const int8_t *w, uint32_t row, int32_t y,
                      int32_t x, uint32_t channel)
{
    const mote_tensor_t *in = mote_tensor(m, op->in);
    const int8_t *input = (const int8_t *)mote_read(m, op->in) + channel;
    for (uint32_t i = 0; i < op->kernel_h; i++, y += op->dilation_h) {
        int32_t column = x;
        for (uint32_t j = 0; j < op->kernel_w; j++, column += op->dilation_w, w += row) {
            int32_t value = in->zero_point;
            if (y >= 0 && y < in->h && column >= 0 && column < in->w) {
                value = input[((uint32_t)y * in->w + (uint32_t)column) * in->c];
            }
            acc = mote_wrapped_sum(acc, *w * value);
        }
    }
    return acc;
}

void mote_int8_depthwise_part(const mote_t *m, const mote_op_t *op, const mote_int8_constants_t *c, uint32_t row,
                              uint32_t first, uint32_t count)
{
    const mote_tensor_t *out = mote_tensor(m, op->out);
    const uint32_t multiple = out->c / mote_tensor(m, op->in)->c;
    int8_t *to = (int8_t *)mote_write(m, op->out) + first;
    for (int32_t y = 0; y < out->h; y++) {
        for (int32_t x = 0; x < out->w; x++, to += out->c) {
            for (uint32_t o = 0; o < count; o++) {
                const mote_requant_t *r = c->requant + o;
                int32_t acc = window(m, op, r->bias, c->weights + o, row, y * op->stride_h - op->pad_top,
                                     x * op->stride_w - op->pad_left, (first + o) / multiple);
                to[o] = mote_requantised(acc, r, out->zero_point, c->range);
            }
        }
    }
}

static MOTE_APART void run(const mote_t *m, const mote_op_t *op)
{
    const mote_int8_constants_t c = mote_int8_constants(m, op);
    const uint32_t channels = mote_tensor(m, op->out)->c;
    mote_int8_depthwise_part(m, op, &c, channels, 0, channels);
}

void mote_int8_depthwise(const mote_t *m, const mote_op_t *op)
{
    if (!mote_int8_depthwise_fast(m, op)) {
        run(m, op);
    }
}
