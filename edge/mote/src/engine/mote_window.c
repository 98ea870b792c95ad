/* What convolutions, depthwise or not, have in common besides their windows: the gradients that a norm is made of. */
#include "mote_window.h"

float mote_bias_gradient(const mote_t *m, const mote_op_t *op, uint32_t o)
{
    const float *dy = mote_read(m, op->dout);
    uint32_t channels = mote_tensor(m, op->out)->c, size = mote_size(mote_tensor(m, op->out));
    float sum = 0.0f;
    for (uint32_t at = o; at < size; at += channels) {
        sum += dy[at];
    }
    return sum;
}

float mote_tap_gradient(const mote_t *m, const mote_op_t *op, uint32_t ky, uint32_t kx, uint32_t o, uint32_t i)
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
