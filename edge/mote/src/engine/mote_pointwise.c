/* float32 operators of single elements but the ReLUs, the sum of two tensors, and softmax. All can work in place. */
#include <string.h>

#include "mote_kernel_list.h"
#include "mote_window.h"

int mote_add_check(const mote_t *m, const mote_op_t *op)
{
    return op->in2 != MOTE_NO_TENSOR && mote_is_float(m, op->in2) && mote_same_floats(m, op) &&
           mote_size(mote_tensor(m, op->in2)) == mote_size(mote_tensor(m, op->out));
}

void mote_add(const mote_t *m, const mote_op_t *op)
{
    const float *a = mote_read(m, op->in), *b = mote_read(m, op->in2);
    float *y = mote_write(m, op->out);
    for (uint32_t n = mote_size(mote_tensor(m, op->out)); n > 0; n--) {
        *y++ = *a++ + *b++;
    }
}

static void pass_on(const mote_t *m, const mote_op_t *op, float *dx, int adds)
{
    const float *dy = mote_read(m, op->dout);
    uint32_t n = mote_size(mote_tensor(m, op->out));
    if (dx == NULL) {
        return;
    }
    if (!adds) {
        memmove(dx, dy, n * sizeof *dx);
        return;
    }
    for (; n > 0; n--) {
        *dx++ += *dy++;
    }
}

void mote_add_back(mote_t *m, const mote_op_t *op)
{
    pass_on(m, op, mote_din(m, op), op->flags & MOTE_ADDS_DIN);
    pass_on(m, op, mote_din2(m, op), op->flags & MOTE_ADDS_DIN2);
}

/* An activation: its check, y of x, and the derivative `slope_of` of its output y. */
#define ACTIVATION(name, y_of_x, slope_of)                                                                             \
    int mote_##name##_check(const mote_t *m, const mote_op_t *op)                                                      \
    {                                                                                                                  \
        return mote_same_floats(m, op);                                                                                \
    }                                                                                                                  \
                                                                                                                       \
    void mote_##name(const mote_t *m, const mote_op_t *op)                                                             \
    {                                                                                                                  \
        const float *in = mote_read(m, op->in);                                                                        \
        float *out = mote_write(m, op->out);                                                                           \
        for (uint32_t n = mote_size(mote_tensor(m, op->out)); n > 0; n--) {                                            \
            float x = *in++;                                                                                           \
            *out++ = y_of_x;                                                                                           \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    void mote_##name##_back(mote_t *m, const mote_op_t *op)                                                            \
    {                                                                                                                  \
        const float *out = mote_read(m, op->out), *dy = mote_read(m, op->dout);                                        \
        float *dx = mote_din(m, op);                                                                                   \
        int adds = op->flags & MOTE_ADDS_DIN;                                                                          \
        uint32_t n = dx == NULL ? 0 : mote_size(mote_tensor(m, op->out));                                              \
        for (; !adds && n > 0; n--) {                                                                                  \
            float y = *out++, d = *dy++;                                                                               \
            *dx++ = slope_of;                                                                                          \
        }                                                                                                              \
        for (; n > 0; n--) {                                                                                           \
            float y = *out++, d = *dy++;                                                                               \
            *dx++ += slope_of;                                                                                         \
        }                                                                                                              \
    }

static float sigmoid(float x)
{
    float e = mote_expf(x < 0.0f ? x : -x); /* at most 1 */
    return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

ACTIVATION(tanh, mote_tanhf(x), d *(1.0f - y * y))
ACTIVATION(sigmoid, sigmoid(x), d *(y *(1.0f - y)))

int mote_softmax_check(const mote_t *m, const mote_op_t *op)
{
    return mote_same_floats(m, op) && mote_tensor(m, op->in)->c == mote_tensor(m, op->out)->c;
}

/* The largest is taken off first, so that no exponential overflows. */
void mote_softmax(const mote_t *m, const mote_op_t *op)
{
    uint32_t c = mote_tensor(m, op->out)->c;
    const float *x = mote_read(m, op->in);
    float *y = mote_write(m, op->out);
    for (uint32_t places = mote_size(mote_tensor(m, op->out)) / c; places > 0; places--, x += c, y += c) {
        float top = x[0], sum = 0.0f;
        for (uint32_t j = 1; j < c; j++) {
            top = x[j] > top ? x[j] : top;
        }
        for (uint32_t j = 0; j < c; j++) {
            y[j] = mote_expf(x[j] - top);
            sum += y[j];
        }
        float share = 1.0f / sum;
        for (uint32_t j = 0; j < c; j++) {
            y[j] *= share;
        }
    }
}

/* dx = y (dy - sum of dy y) */
void mote_softmax_back(mote_t *m, const mote_op_t *op)
{
    uint32_t c = mote_tensor(m, op->out)->c;
    const float *y = mote_read(m, op->out), *dy = mote_read(m, op->dout);
    float *dx = mote_din(m, op);
    int adds = op->flags & MOTE_ADDS_DIN;
    if (dx == NULL) {
        return;
    }
    for (uint32_t places = mote_size(mote_tensor(m, op->out)) / c; places > 0; places--, y += c, dy += c, dx += c) {
        float sum = 0.0f;
        for (uint32_t j = 0; j < c; j++) {
            sum += dy[j] * y[j];
        }
        for (uint32_t j = 0; j < c; j++) {
            float g = y[j] * (dy[j] - sum);
            dx[j] = adds ? dx[j] + g : g;
        }
    }
}
