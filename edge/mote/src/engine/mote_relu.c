/* ReLU, ReLU6 and leaky ReLU in float32. All can work in place. Their way back needs no more than one bit for each
 * element of the output: where the plan says so, they keep that mask, and the output's memory is free for others. */
#include "mote_kernel_list.h"
#include "mote_window.h"

/* Whether a ReLU's output passes the gradient: it is above 0 and, of ReLU6, below 6. `most` is most_passing's. */
static uint32_t passes(float y, uint32_t most)
{
    return mote_bits(y) - 1u < most;
}

/* The bits of the largest output that passes: infinity, or the float below 6. */
static uint32_t most_passing(const mote_op_t *op)
{
    return op->kind == MOTE_RELU6 ? 0x40bfffffu : 0x7f800000u;
}

/* Keeps of a ReLU's output where it passes the gradient, if the plan wants that instead of the output. */
static void keep_mask(const mote_t *m, const mote_op_t *op)
{
    if (!(op->flags & MOTE_MASKS)) {
        return;
    }
    const float *y = mote_read(m, op->out);
    uint8_t *mask = mote_write(m, op->option);
    uint32_t n = mote_size(mote_tensor(m, op->out)), most = most_passing(op), bits = 0;
    for (uint32_t i = 0; i < n; i++) {
        bits |= passes(y[i], most) << (i & 7u);
        mask[i >> 3] = (uint8_t)bits;
        bits = (i & 7u) == 7u ? 0 : bits;
    }
}

/* The gradient where a ReLU passes it, elsewhere leak times as much, or nothing. */
static void relu_back(mote_t *m, const mote_op_t *op, float leak)
{
    const uint8_t *mask = op->flags & MOTE_MASKS ? mote_read(m, op->option) : NULL;
    const float *y = mote_read(m, op->out), *dy = mote_read(m, op->dout);
    float *dx = mote_din(m, op);
    int adds = op->flags & MOTE_ADDS_DIN, leaks = op->kind == MOTE_LEAKY_RELU;
    uint32_t n = dx == NULL ? 0 : mote_size(mote_tensor(m, op->out)), most = most_passing(op);
    for (uint32_t i = 0; i < n; i++) {
        float d = dy[i];
        uint32_t bit = mask != NULL ? mask[i >> 3] >> (i & 7u) & 1u : passes(y[i], most);
        if (bit == 0) {
            d = leaks ? leak * d : 0.0f;
        }
        dx[i] = adds ? dx[i] + d : d;
    }
}

int mote_relu_check(const mote_t *m, const mote_op_t *op)
{
    return mote_same_floats(m, op);
}

/* Not a number stays so, and shows in the loss. */
void mote_relu(const mote_t *m, const mote_op_t *op)
{
    const float *x = mote_read(m, op->in);
    float *y = mote_write(m, op->out);
    for (uint32_t n = mote_size(mote_tensor(m, op->out)); n > 0; n--, x++) {
        *y++ = mote_negative(*x) ? 0.0f : *x;
    }
    keep_mask(m, op);
}

void mote_relu_back(mote_t *m, const mote_op_t *op)
{
    relu_back(m, op, 0.0f);
}

int mote_relu6_check(const mote_t *m, const mote_op_t *op)
{
    return mote_same_floats(m, op);
}

void mote_relu6(const mote_t *m, const mote_op_t *op)
{
    const float *x = mote_read(m, op->in);
    float *y = mote_write(m, op->out);
    for (uint32_t n = mote_size(mote_tensor(m, op->out)); n > 0; n--, x++) {
        *y++ = mote_negative(*x) ? 0.0f : *x > 6.0f ? 6.0f : *x;
    }
    keep_mask(m, op);
}

void mote_relu6_back(mote_t *m, const mote_op_t *op)
{
    relu_back(m, op, 0.0f);
}

static float slope(const mote_t *m, const mote_op_t *op)
{
    return *(const float *)(const void *)(mote_constants(m) + op->constants);
}

/* The slope is not negative, so that an output has its input's sign. */
int mote_leaky_relu_check(const mote_t *m, const mote_op_t *op)
{
    return mote_same_floats(m, op) && mote_constants_fit(m, op, sizeof(float)) && slope(m, op) >= 0.0f &&
           mote_finite(slope(m, op));
}

void mote_leaky_relu(const mote_t *m, const mote_op_t *op)
{
    const float *x = mote_read(m, op->in), a = slope(m, op);
    float *y = mote_write(m, op->out);
    for (uint32_t n = mote_size(mote_tensor(m, op->out)); n > 0; n--, x++) {
        *y++ = mote_negative(*x) ? a * *x : *x;
    }
    keep_mask(m, op);
}

void mote_leaky_relu_back(mote_t *m, const mote_op_t *op)
{
    relu_back(m, op, slope(m, op));
}
