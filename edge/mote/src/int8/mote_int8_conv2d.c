/* int8 convolution. */
#include <string.h>

#include "mote_int8_dots.h"
#include "mote_kernel_list.h"

int mote_int8_conv2d_check(const mote_t *m, const mote_op_t *op)
{
    uint64_t taps = (uint64_t)op->kernel_h * op->kernel_w * mote_tensor(m, op->in)->c;
    return taps <= MOTE_MAX_BYTES && mote_windows_fit(m, op) &&
           mote_int8_constants_fit(m, op, taps * mote_tensor(m, op->out)->c);
}

/* The window that begins at row y, column x of the input. */
typedef struct {
    const mote_op_t *op;
    const mote_tensor_t *in;
    const int8_t *input;
    int32_t y, x;
} window_t;

/* The taps that lie side by side from row y, column x on, at most `left`; 1 where it is outside of the input. Returns
 * the first one's values, or NULL outside. */
static const int8_t *taps_at(const window_t *a, int32_t y, int32_t x, uint32_t left, uint32_t *taps)
{
    *taps = 1;
    if (y < 0 || y >= a->in->h || x < 0 || x >= a->in->w) {
        return NULL;
    }
    if (a->op->dilation_w == 1) {
        const uint32_t there = (uint32_t)(a->in->w - x);
        *taps = left < there ? left : there;
    }
    return a->input + ((uint32_t)y * a->in->w + (uint32_t)x) * a->in->c;
}

/* Adds what the window gives to the sums of four filters, or of one. */
static void add_window(const window_t *a, int32_t acc[4], uint32_t filters, const int8_t *w)
{
    int8_t zeros[16];
    memset(zeros, a->in->zero_point, sizeof zeros);
    const uint32_t channels = a->in->c, row = (uint32_t)a->op->kernel_h * a->op->kernel_w * channels;
    int32_t y = a->y;
    for (uint32_t i = 0; i < a->op->kernel_h; i++, y += a->op->dilation_h) {
        int32_t x = a->x;
        uint32_t taps;
        for (uint32_t j = 0; j < a->op->kernel_w; j += taps, x += (int32_t)taps * a->op->dilation_w) {
            const int8_t *values = taps_at(a, y, x, a->op->kernel_w - j, &taps);
            const uint32_t most = values != NULL ? taps * channels : sizeof zeros;
            for (uint32_t left = taps * channels, n; left > 0; left -= n, w += n) {
                const int8_t *from = values != NULL ? values : zeros;
                n = left < most ? left : most;
                if (filters == 4) {
                    mote_int8_dots(acc, w, row, from, n);
                } else {
                    *acc = mote_int8_dot(*acc, w, from, n);
                }
            }
        }
    }
}

/* Copies the window's taps in their order. */
static void gather(const window_t *a, int8_t *to)
{
    const uint32_t channels = a->in->c;
    int32_t y = a->y;
    for (uint32_t i = 0; i < a->op->kernel_h; i++, y += a->op->dilation_h) {
        int32_t x = a->x;
        uint32_t taps;
        for (uint32_t j = 0; j < a->op->kernel_w; j += taps, x += (int32_t)taps * a->op->dilation_w) {
            const int8_t *values = taps_at(a, y, x, a->op->kernel_w - j, &taps);
            if (values != NULL) {
                memcpy(to, values, taps * channels);
            } else {
                memset(to, a->in->zero_point, channels);
            }
            to += taps * channels;
        }
    }
}

/* Of a window, the taps that lie side by side are a row of numbers; of most windows all are, gathered in the end of the
 * output that is not written yet. */
void mote_int8_conv2d_part(const mote_t *m, const mote_op_t *op, const mote_int8_constants_t *c, uint32_t first,
                           uint32_t count, uint32_t pixel)
{
    const mote_tensor_t *in = mote_tensor(m, op->in), *out = mote_tensor(m, op->out);
    const uint32_t row = (uint32_t)op->kernel_h * op->kernel_w * in->c, size = mote_size(out);
    window_t a = {op, in, mote_read(m, op->in), 0, 0};
    int8_t *to = (int8_t *)mote_write(m, op->out) + pixel * out->c + first, *end = mote_write(m, op->out);
    end += size;
    for (; to < end; pixel++, to += out->c) {
        a.y = (int32_t)(pixel / out->w) * op->stride_h - op->pad_top;
        a.x = (int32_t)(pixel % out->w) * op->stride_w - op->pad_left;
        const int8_t *patch = NULL;
        if (op->kernel_h * op->kernel_w == 1) {
            uint32_t taps;
            patch = taps_at(&a, a.y, a.x, 1, &taps);
        } else if (count == out->c && (uint32_t)(end - to) >= row + 4) {
            gather(&a, end - row);
            patch = end - row;
        }
        uint32_t filters;
        for (uint32_t o = 0; o < count; o += filters) {
            const mote_requant_t *r = c->requant + o;
            const int8_t *w = c->weights + o * row;
            int32_t acc[4];
            filters = count - o >= 4 ? 4 : 1;
            if (to + o + filters > end - row && patch == end - row) {
                patch = NULL; /* these outputs lie there */
            }
            for (uint32_t f = 0; f < filters; f++) {
                acc[f] = r[f].bias;
            }
            if (patch == NULL) {
                add_window(&a, acc, filters, w);
            } else if (filters == 4) {
                mote_int8_dots(acc, w, row, patch, row);
            } else {
                *acc = mote_int8_dot(*acc, w, patch, row);
            }
            if (filters == 4) {
                mote_int8_put_four(to + o, acc, r, out->zero_point, c->range);
            } else {
                to[o] = mote_requantised(*acc, r, out->zero_point, c->range);
            }
        }
    }
}

void mote_int8_window(const mote_t *m, const mote_op_t *op, uint32_t pixel, int8_t *to)
{
    const uint32_t width = mote_tensor(m, op->out)->w;
    const window_t a = {op, mote_tensor(m, op->in), mote_read(m, op->in),
                        (int32_t)(pixel / width) * op->stride_h - op->pad_top,
                        (int32_t)(pixel % width) * op->stride_w - op->pad_left};
    gather(&a, to);
}

void mote_int8_conv2d_whole(const mote_t *m, const mote_op_t *op, const mote_int8_constants_t *c)
{
    mote_int8_conv2d_part(m, op, c, 0, mote_tensor(m, op->out)->c, mote_int8_conv2d_fast(m, op, c));
}

void mote_int8_conv2d(const mote_t *m, const mote_op_t *op)
{
    const mote_int8_constants_t c = mote_int8_constants(m, op);
    mote_int8_conv2d_whole(m, op, &c);
}
