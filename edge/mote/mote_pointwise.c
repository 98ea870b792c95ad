/* float32 operators of single elements, the sum of two tensors, and softmax. All can work in place. */
#include <string.h>

#include "mote_kernel_list.h"
#include "mote_window.h"

static int same_floats(const mote_t *m, const mote_op_t *op)
{
    return mote_floats(m, op) && mote_size(mote_tensor(m, op->in)) == mote_size(mote_tensor(m, op->out));
}

int mote_add_check(const mote_t *m, const mote_op_t *op)
{
    return op->in2 != MOTE_NO_TENSOR && mote_is_float(m, op->in2) && same_floats(m, op) &&
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

/* An activation: y of x, and the derivative `slope_of` of its output y. */
#define ACTIVATION(linkage, name, y_of_x, slope_of)                                                                    \
    linkage void name(const mote_t *m, const mote_op_t *op)                                                            \
    {                                                                                                                  \
        const float *in = mote_read(m, op->in);                                                                        \
        float *out = mote_write(m, op->out);                                                                           \
        for (uint32_t n = mote_size(mote_tensor(m, op->out)); n > 0; n--) {                                            \
            float x = *in++;                                                                                           \
            *out++ = y_of_x;                                                                                           \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    linkage void name##_back(mote_t *m, const mote_op_t *op)                                                           \
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

/* Not a number stays so, and shows in the loss. */
ACTIVATION(static, relu, x<0.0f ? 0.0f : x, y> 0.0f ? d : 0.0f)
ACTIVATION(static, relu6, x<0.0f ? 0.0f : x> 6.0f ? 6.0f : x, y > 0.0f && y < 6.0f ? d : 0.0f)
ACTIVATION(, mote_tanh, mote_tanhf(x), d *(1.0f - y * y))
ACTIVATION(, mote_sigmoid, sigmoid(x), d *(y *(1.0f - y)))

int mote_relu_check(const mote_t *m, const mote_op_t *op)
{
    return same_floats(m, op);
}

int mote_relu6_check(const mote_t *m, const mote_op_t *op)
{
    return same_floats(m, op);
}

int mote_tanh_check(const mote_t *m, const mote_op_t *op)
{
    return same_floats(m, op);
}

int mote_sigmoid_check(const mote_t *m, const mote_op_t *op)
{
    return same_floats(m, op);
}

/* Keeps where the output passes a gradient, if the plan wants that instead of the output. */
static void keep_mask(const mote_t *m, const mote_op_t *op)
{
    if (!(op->flags & MOTE_MASKS)) {
        return;
    }
    const float *y = mote_read(m, op->out);
    uint8_t *mask = mote_write(m, op->option);
    uint32_t n = mote_size(mote_tensor(m, op->out));
    for (uint32_t i = 0; i < n; i += 8, mask++) {
        uint32_t bits = 0;
        for (uint32_t j = 0; j < 8 && i + j < n; j++, y++) {
            bits |= (uint32_t)(*y > 0.0f && (op->kind != MOTE_RELU6 || *y < 6.0f)) << j;
        }
        *mask = (uint8_t)bits;
    }
}

/* The gradient where the mask has it pass, elsewhere as much of it as an input below 0 has: nothing, or leaky's slope. */
static void back_by_mask(mote_t *m, const mote_op_t *op, float leak)
{
    const uint8_t *mask = mote_read(m, op->option);
    const float *dy = mote_read(m, op->dout);
    float *dx = mote_din(m, op);
    int adds = op->flags & MOTE_ADDS_DIN, leaks = op->kind == MOTE_LEAKY_RELU;
    uint32_t n = dx == NULL ? 0 : mote_size(mote_tensor(m, op->out));
    for (uint32_t i = 0; i < n; i++, dx++) {
        float d = *dy++, g = mask[i >> 3] >> (i & 7u) & 1 ? d : leaks ? leak * d : 0.0f;
        *dx = adds ? *dx + g : g;
    }
}

void mote_relu(const mote_t *m, const mote_op_t *op)
{
    relu(m, op);
    keep_mask(m, op);
}

void mote_relu_back(mote_t *m, const mote_op_t *op)
{
    if (op->flags & MOTE_MASKS) {
        back_by_mask(m, op, 0.0f);
    } else {
        relu_back(m, op);
    }
}

void mote_relu6(const mote_t *m, const mote_op_t *op)
{
    relu6(m, op);
    keep_mask(m, op);
}

void mote_relu6_back(mote_t *m, const mote_op_t *op)
{
    if (op->flags & MOTE_MASKS) {
        back_by_mask(m, op, 0.0f);
    } else {
        relu6_back(m, op);
    }
}

static float slope(const mote_t *m, const mote_op_t *op)
{
    return *(const float *)(const void *)(mote_constants(m) + op->constants);
}

/* The slope is not negative, so that an output has its input's sign. */
int mote_leaky_relu_check(const mote_t *m, const mote_op_t *op)
{
    return same_floats(m, op) && mote_constants_fit(m, op, sizeof(float)) && slope(m, op) >= 0.0f &&
           mote_finite(slope(m, op));
}

void mote_leaky_relu(const mote_t *m, const mote_op_t *op)
{
    const float *x = mote_read(m, op->in), a = slope(m, op);
    float *y = mote_write(m, op->out);
    for (uint32_t n = mote_size(mote_tensor(m, op->out)); n > 0; n--, x++) {
        *y++ = *x < 0.0f ? a * *x : *x;
    }
    keep_mask(m, op);
}

void mote_leaky_relu_back(mote_t *m, const mote_op_t *op)
{
    if (op->flags & MOTE_MASKS) {
        back_by_mask(m, op, slope(m, op));
        return;
    }
    const float *y = mote_read(m, op->out), *dy = mote_read(m, op->dout), a = slope(m, op);
    float *dx = mote_din(m, op);
    int adds = op->flags & MOTE_ADDS_DIN;
    for (uint32_t n = dx == NULL ? 0 : mote_size(mote_tensor(m, op->out)); n > 0; n--, dx++) {
        float d = *dy++, g = *y++ > 0.0f ? d : a * d;
        *dx = adds ? *dx + g : g;
    }
}

int mote_softmax_check(const mote_t *m, const mote_op_t *op)
{
    return same_floats(m, op) && mote_tensor(m, op->in)->c == mote_tensor(m, op->out)->c;
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
