/* int8 softmax over the channels of every place: the fixed-point arithmetic of TFLite's reference kernel and, below it,
 * of gemmlowp (fixedpoint.h). Qm.n: an int32 with m integer and n fractional bits. */
#include "mote_kernel_list.h"

#include "mote_int8.h"

typedef struct {
    int32_t multiplier, left_shift, diff_min;
} softmax_t;

enum { MOST_CHANNELS = 4095 }; /* so that a sum of Q12.19 holds e^0 of each */

int mote_int8_softmax_check(const mote_t *m, const mote_op_t *op)
{
    const mote_tensor_t *in = mote_tensor(m, op->in), *out = mote_tensor(m, op->out);
    if (!mote_is_int8(m, op->in) || !mote_is_int8(m, op->out) || in->c != out->c || mote_size(in) != mote_size(out) ||
        in->c > MOST_CHANNELS || !mote_constants_fit(m, op, sizeof(softmax_t))) {
        return 0;
    }
    const softmax_t *c = (const softmax_t *)(const void *)(mote_constants(m) + op->constants);
    return c->diff_min <= 0 && c->left_shift >= 0 && mote_scale_fits(c->multiplier, c->left_shift);
}

/* e^x for x in [-1/4, 0), Q0.31 both: Taylor's series around -1/8. */
static int32_t exp_of_quarter(int32_t x)
{
    const int32_t exp_of_eighth = 1895147668, third = 715827883;
    x += 1 << 28;
    int32_t x2 = mote_high_product(x, x);
    int32_t x3 = mote_high_product(x2, x);
    int32_t x4 = mote_high_product(x2, x2);
    int32_t rest = mote_high_product(mote_rounded_shift(x4, 2) + x3, third) + x2;
    return exp_of_eighth + mote_high_product(exp_of_eighth, x + mote_rounded_shift(rest, 1));
}

/* e^x in Q0.31 for x <= 0 in Q5.26. */
static int32_t exp_of(int32_t x)
{
    static const int32_t factors[] = {1672461947, 1302514674, 790015084, 290630308, 39332535, 720401, 242};
    const int32_t quarter = 1 << 24;
    if (x >= 0) {
        return INT32_MAX;
    }
    int32_t part = (x & (quarter - 1)) - quarter;
    uint32_t quarters = (uint32_t)part - (uint32_t)x;
    int32_t result = exp_of_quarter(part * 32);
    for (uint32_t i = 0; i < 7; i++) { /* e^-(2^(i - 2)) each */
        if (quarters >> (24 + i) & 1u) {
            result = mote_high_product(result, factors[i]);
        }
    }
    return result;
}

/* e^(a difference of inputs <= 0) in Q0.31. */
static int32_t exp_of_difference(int32_t difference, const softmax_t *c)
{
    return exp_of(mote_high_product((int32_t)((uint32_t)difference << c->left_shift), c->multiplier));
}

/* 1 / (1 + x) for x in [0, 1), Q0.31 both: three steps of Newton and Raphson. */
static int32_t reciprocal_of_one_plus(int32_t x)
{
    int32_t half = (int32_t)(((int64_t)x + INT32_MAX + 1) / 2);
    int32_t y = 1515870810 + mote_high_product(half, -1010580540); /* 48/17 - 32/17 half, in Q2.29 */
    for (int i = 0; i < 3; i++) {
        y += mote_high_product(y, (1 << 29) - mote_high_product(half, y)) * 4;
    }
    return y >= 1 << 30 ? INT32_MAX : y * 2;
}

static int32_t leading_zeros(int32_t x)
{
    int32_t zeros = 0;
    for (uint32_t bits = (uint32_t)x; bits >> 31 == 0; bits <<= 1) {
        zeros++;
    }
    return zeros;
}

static void softmax(const int8_t *x, int8_t *y, uint32_t n, const softmax_t *c)
{
    const mote_range_t all = {INT8_MIN, INT8_MAX, 0};
    int32_t most = INT8_MIN, sum = 0;
    for (uint32_t i = 0; i < n; i++) {
        most = x[i] > most ? x[i] : most;
    }
    for (uint32_t i = 0; i < n; i++) {
        if (x[i] - most >= c->diff_min) {
            sum += mote_rounded_shift(exp_of_difference(x[i] - most, c), 12);
        }
    }
    int32_t zeros = leading_zeros(sum), shift = 12 - zeros + 31 - 8;
    int32_t scale = reciprocal_of_one_plus((int32_t)(((uint32_t)sum << zeros) - (1u << 31)));
    for (uint32_t i = 0; i < n; i++) {
        int32_t value = INT8_MIN;
        if (x[i] - most >= c->diff_min) {
            int32_t share = mote_high_product(scale, exp_of_difference(x[i] - most, c));
            value += shift > 31 ? 0 : mote_rounded_shift(share, shift); /* a share of 512 or more is less than a half */
        }
        y[i] = mote_clamped(value, all);
    }
}

void mote_int8_softmax(const mote_t *m, const mote_op_t *op)
{
    const mote_tensor_t *in = mote_tensor(m, op->in);
    const softmax_t *c = (const softmax_t *)(const void *)(mote_constants(m) + op->constants);
    const int8_t *x = mote_read(m, op->in);
    int8_t *y = mote_write(m, op->out);
    for (uint32_t places = (uint32_t)in->h * in->w; places > 0; places--, x += in->c, y += in->c) {
        softmax(x, y, in->c, c);
    }
}
