/* int8 convolution. */
#include "mote_kernel_list.h"

#include "mote_int8_dots.h"

int mote_int8_conv2d_check(const mote_t *m, const mote_op_t *op)
{
    uint64_t taps = (uint64_t)op->kernel_h * op->kernel_w * mote_tensor(m, op->in)->c;
    return taps <= MOTE_MAX_BYTES && mote_windows_fit(m, op) &&
           mote_int8_constants_fit(m, op, taps * mote_tensor(m, op->out)->c);
}

/* Filters whose weights lie `row` apart, over the window that begins at row y, column x of the input. */
typedef struct {
    const mote_op_t *op;
    const mote_tensor_t *in;
    const int8_t *input;
    uint32_t row;
    int32_t y, x;
} window_t;

/* Adds what a tap gives that lies outside of the input, where all is the zero point. */
static void add_outside(const window_t *a, int32_t *acc, uint32_t filters, const int8_t *w)
{
    for (uint32_t f = 0; f < filters; f++, w += a->row) {
        for (uint32_t i = 0; i < a->in->c; i++) {
            acc[f] = mote_wrapped_sum(acc[f], w[i] * a->in->zero_point);
        }
    }
}

/* Adds to the sums of one or four filters. */
static void add_window(const window_t *a, int32_t *acc, uint32_t filters, const int8_t *w)
{
    const mote_op_t *op = a->op;
    const mote_tensor_t *in = a->in;
    int32_t y = a->y;
    for (uint32_t i = 0; i < op->kernel_h; i++, y += op->dilation_h) {
        int32_t x = a->x;
        uint32_t taps; /* that lie side by side */
        for (uint32_t j = 0; j < op->kernel_w; j += taps, x += (int32_t)taps * op->dilation_w, w += taps * in->c) {
            taps = 1;
            if (y < 0 || y >= in->h || x < 0 || x >= in->w) {
                add_outside(a, acc, filters, w);
                continue;
            }
            if (op->dilation_w == 1) {
                uint32_t left = op->kernel_w - j, there = (uint32_t)(in->w - x);
                taps = left < there ? left : there;
            }
            const int8_t *values = a->input + ((uint32_t)y * in->w + (uint32_t)x) * in->c;
            if (filters == 4) {
                mote_dots(acc, w, a->row, values, taps * in->c);
            } else {
                *acc = mote_dot(*acc, w, values, taps * in->c);
            }
        }
    }
}

void mote_int8_conv2d_part(const mote_t *m, const mote_op_t *op, mote_range_t range, const mote_requant_t *requant,
                           const int8_t *weights, uint32_t first, uint32_t count)
{
    const mote_tensor_t *in = mote_tensor(m, op->in), *out = mote_tensor(m, op->out);
    const mote_int8_constants_t constants = {range, requant, weights};
    const uint32_t pixels = (uint32_t)out->h * out->w;
    window_t a = {op, in, mote_read(m, op->in), (uint32_t)op->kernel_h * op->kernel_w * in->c, 0, 0};
    uint32_t pixel = count == out->c ? mote_int8_conv2d_fast(m, op, &constants) : 0;
    int8_t *to = (int8_t *)mote_write(m, op->out) + pixel * out->c + first;
    for (; pixel < pixels; pixel++, to += out->c) {
        a.y = (int32_t)(pixel / out->w) * op->stride_h - op->pad_top;
        a.x = (int32_t)(pixel % out->w) * op->stride_w - op->pad_left;
        uint32_t filters;
        for (uint32_t o = 0; o < count; o += filters) {
            int32_t acc[4] = {requant[o].bias};
            filters = count - o >= 4 ? 4 : 1;
            for (uint32_t f = 1; f < filters; f++) {
                acc[f] = requant[o + f].bias;
            }
            add_window(&a, acc, filters, weights + o * a.row);
            for (uint32_t f = 0; f < filters; f++) {
                to[o + f] = mote_requantised(acc[f], &requant[o + f], out->zero_point, range);
            }
        }
    }
}

void mote_int8_conv2d(const mote_t *m, const mote_op_t *op)
{
    mote_int8_constants_t c = mote_int8_constants(m, op);
    mote_int8_conv2d_part(m, op, c.range, c.requant, c.weights, 0, mote_tensor(m, op->out)->c);
}
