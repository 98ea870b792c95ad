/* int8 fully connected layer. */
#include "mote_kernel_list.h"

#include "mote_int8_dots.h"

int mote_int8_constants_fit(const mote_t *m, const mote_op_t *op, uint64_t weights)
{
    uint32_t channels = mote_tensor(m, op->out)->c;
    uint64_t ahead = sizeof(mote_range_t) + (uint64_t)channels * sizeof(mote_requant_t);
    if (!mote_is_int8(m, op->in) || !mote_is_int8(m, op->out) || weights > MOTE_MAX_BYTES ||
        !mote_constants_fit(m, op, ahead + weights)) {
        return 0;
    }
    const mote_requant_t *r = mote_int8_constants(m, op).requant;
    for (uint32_t o = 0; o < channels; o++) {
        if (!mote_scale_fits(r[o].multiplier, r[o].shift)) {
            return 0;
        }
    }
    return 1;
}

int mote_int8_dense_check(const mote_t *m, const mote_op_t *op)
{
    const mote_tensor_t *out = mote_tensor(m, op->out);
    return mote_size(out) == out->c &&
           mote_int8_constants_fit(m, op, (uint64_t)mote_size(mote_tensor(m, op->in)) * out->c);
}

void mote_int8_dense_part(const mote_t *m, const mote_op_t *op, const mote_int8_constants_t *c, uint32_t first,
                          uint32_t count)
{
    const mote_requant_t *requant = c->requant;
    const int8_t *weights = c->weights;
    const mote_tensor_t *out = mote_tensor(m, op->out);
    const int8_t *x = mote_read(m, op->in);
    int8_t *y = (int8_t *)mote_write(m, op->out) + first;
    uint32_t n = mote_size(mote_tensor(m, op->in)), o = 0;
    for (; o + 4 <= count; o += 4, weights += 4 * n) {
        int32_t acc[4] = {requant[o].bias, requant[o + 1].bias, requant[o + 2].bias, requant[o + 3].bias};
        mote_int8_dots(acc, weights, n, x, n);
        mote_int8_put_four(y + o, acc, requant + o, out->zero_point, c->range);
    }
    for (; o < count; o++, weights += n) {
        int32_t acc = mote_int8_dot(requant[o].bias, weights, x, n);
        y[o] = mote_requantised(acc, &requant[o], out->zero_point, c->range);
    }
}

void mote_int8_dense(const mote_t *m, const mote_op_t *op)
{
    const mote_int8_constants_t c = mote_int8_constants(m, op);
    mote_int8_dense_part(m, op, &c, 0, mote_tensor(m, op->out)->c);
}
