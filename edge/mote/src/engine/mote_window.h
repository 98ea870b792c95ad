/* Windows of convolution and pooling, and the float operators' common checks. */
#ifndef MOTE_WINDOW_H
#define MOTE_WINDOW_H

#include <string.h>

#include "mote_internal.h"

/* One dimension of a window, without what lies in the padding: its first element, how many, how far apart, and how
 * many of the kernel's lie before it. count can be 0 if the kernel is dilated. */
typedef struct {
    uint32_t first, count, step, skipped;
} mote_window_t;

static inline mote_window_t mote_window(uint32_t number, uint32_t in, uint32_t kernel, uint32_t stride,
                                        uint32_t dilation, uint32_t pad)
{
    uint32_t begin = number * stride; /* counted from the padding's edge */
    mote_window_t w = {begin - pad, kernel, dilation, 0};
    if (begin < pad) {
        w.skipped = dilation == 1 ? pad - begin : (pad - begin + dilation - 1) / dilation;
        w.first = begin + w.skipped * dilation - pad;
        w.count -= w.skipped;
    }
    if (w.first >= in) {
        w.first = w.count = 0;
    } else if ((uint64_t)(w.count - 1) * dilation >= in - w.first) {
        w.count = dilation == 1 ? in - w.first : (in - w.first - 1) / dilation + 1;
    }
    return w;
}

static inline mote_window_t mote_rows_of(const mote_op_t *op, const mote_tensor_t *in, uint32_t oy)
{
    return mote_window(oy, in->h, op->kernel_h, op->stride_h, op->dilation_h, op->pad_top);
}

static inline mote_window_t mote_columns_of(const mote_op_t *op, const mote_tensor_t *in, uint32_t ox)
{
    return mote_window(ox, in->w, op->kernel_w, op->stride_w, op->dilation_w, op->pad_left);
}

/* Of a convolution, depthwise or not: the gradient of the bias of output channel o, and of the weight at row ky, column
 * kx of its kernel and input channel i. */
float mote_bias_gradient(const mote_t *m, const mote_op_t *op, uint32_t o);
float mote_tap_gradient(const mote_t *m, const mote_op_t *op, uint32_t ky, uint32_t kx, uint32_t o, uint32_t i);

/* 1 if a gradient is 0, as behind a ReLU that is off, or max pooling. */
static inline int mote_is_zero(const float *d)
{
    uint32_t bits;
    memcpy(&bits, d, sizeof bits);
    return bits << 1 == 0;
}

static inline int mote_is_float(const mote_t *m, uint32_t tensor)
{
    return mote_tensor(m, tensor)->type == MOTE_FLOAT32;
}

/* 1 if in and out are float32. */
static inline int mote_floats(const mote_t *m, const mote_op_t *op)
{
    return mote_is_float(m, op->in) && mote_is_float(m, op->out);
}

/* 1 if they have as many elements, too. */
static inline int mote_same_floats(const mote_t *m, const mote_op_t *op)
{
    return mote_floats(m, op) && mote_size(mote_tensor(m, op->in)) == mote_size(mote_tensor(m, op->out));
}

#endif
