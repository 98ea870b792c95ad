/* int8 sums, products and functions of one number, and the steps between int8 and float32. */
#include "mote_kernel_list.h"

#include "mote_int8_avx2.h"

typedef struct {
    mote_range_t range;
    int32_t in_offset, in2_offset, out_offset, multiplier, shift;
} mul_t;

/* A zero point or its negative. */
static int offset_fits(int32_t offset)
{
    return offset >= -128 && offset <= 128;
}

/* 1 if all that the op reads and writes is int8, of one size, and so many bytes of constants are there. */
static int all_fit(const mote_t *m, const mote_op_t *op, int inputs, uint64_t constants)
{
    uint32_t size = mote_size(mote_tensor(m, op->out));
    return mote_is_int8(m, op->out) && mote_is_int8(m, op->in) && mote_size(mote_tensor(m, op->in)) == size &&
           (inputs == 1 ||
            (op->in2 != MOTE_NO_TENSOR && mote_is_int8(m, op->in2) && mote_size(mote_tensor(m, op->in2)) == size)) &&
           mote_constants_fit(m, op, constants);
}

int mote_int8_add_check(const mote_t *m, const mote_op_t *op)
{
    if (!all_fit(m, op, 2, sizeof(mote_int8_add_t))) {
        return 0;
    }
    const mote_int8_add_t *a = (const mote_int8_add_t *)(const void *)(mote_constants(m) + op->constants);
    return offset_fits(a->in_offset) && offset_fits(a->in2_offset) && offset_fits(a->out_offset) &&
           a->left_shift >= 0 && a->left_shift <= 20 && mote_scale_fits(a->in_multiplier, a->in_shift) &&
           mote_scale_fits(a->in2_multiplier, a->in2_shift) && mote_scale_fits(a->out_multiplier, a->out_shift);
}

void mote_int8_add(const mote_t *m, const mote_op_t *op)
{
    const mote_int8_add_t *a = (const mote_int8_add_t *)(const void *)(mote_constants(m) + op->constants);
    const int8_t *x = mote_read(m, op->in), *x2 = mote_read(m, op->in2);
    int8_t *y = mote_write(m, op->out);
    const int32_t unit = 1 << a->left_shift;
    uint32_t left = mote_size(mote_tensor(m, op->out));
#ifdef MOTE_INT8_AVX2
    if (mote_has_avx2()) {
        const uint32_t done = mote_int8_add_avx2(a, x, x2, y, left);
        x += done;
        x2 += done;
        y += done;
        left -= done;
    }
#endif
    for (; left > 0; left--) {
        int32_t sum = mote_wrapped_sum(mote_scaled((*x++ + a->in_offset) * unit, a->in_multiplier, a->in_shift),
                                       mote_scaled((*x2++ + a->in2_offset) * unit, a->in2_multiplier, a->in2_shift));
        *y++ =
            mote_clamped(mote_wrapped_sum(mote_scaled(sum, a->out_multiplier, a->out_shift), a->out_offset), a->range);
    }
}

int mote_int8_mul_check(const mote_t *m, const mote_op_t *op)
{
    if (!all_fit(m, op, 2, sizeof(mul_t))) {
        return 0;
    }
    const mul_t *c = (const mul_t *)(const void *)(mote_constants(m) + op->constants);
    return offset_fits(c->in_offset) && offset_fits(c->in2_offset) && offset_fits(c->out_offset) &&
           mote_scale_fits(c->multiplier, c->shift);
}

void mote_int8_mul(const mote_t *m, const mote_op_t *op)
{
    const mul_t *c = (const mul_t *)(const void *)(mote_constants(m) + op->constants);
    const int8_t *x = mote_read(m, op->in), *x2 = mote_read(m, op->in2);
    int8_t *y = mote_write(m, op->out);
    for (uint32_t i = mote_size(mote_tensor(m, op->out)); i > 0; i--) {
        int32_t product = (*x++ + c->in_offset) * (*x2++ + c->in2_offset);
        *y++ = mote_clamped(mote_wrapped_sum(mote_scaled(product, c->multiplier, c->shift), c->out_offset), c->range);
    }
}

int mote_int8_table_check(const mote_t *m, const mote_op_t *op)
{
    return all_fit(m, op, 1, 256);
}

void mote_int8_table(const mote_t *m, const mote_op_t *op)
{
    const int8_t *middle = (const int8_t *)(mote_constants(m) + op->constants) + 128;
    const int8_t *x = mote_read(m, op->in);
    int8_t *y = mote_write(m, op->out);
    for (uint32_t i = mote_size(mote_tensor(m, op->out)); i > 0; i--) {
        *y++ = middle[*x++];
    }
}

int mote_quantize_check(const mote_t *m, const mote_op_t *op)
{
    return !mote_is_int8(m, op->in) && mote_is_int8(m, op->out) &&
           mote_size(mote_tensor(m, op->in)) == mote_size(mote_tensor(m, op->out));
}

/* To the nearest integer, half away from 0, and not beyond +-512; not a number is -512. */
static int32_t rounded(float x)
{
    if (!(x > -512.0f)) {
        return -512;
    }
    if (x > 512.0f) {
        return 512;
    }
    int32_t whole = (int32_t)x;
    float rest = x - (float)whole; /* exact */
    return whole + (rest >= 0.5f) - (rest <= -0.5f);
}

void mote_quantize(const mote_t *m, const mote_op_t *op)
{
    const mote_tensor_t *out = mote_tensor(m, op->out);
    const mote_range_t all = {INT8_MIN, INT8_MAX, 0};
    const float *x = mote_read(m, op->in);
    int8_t *y = mote_write(m, op->out);
    for (uint32_t i = mote_size(out); i > 0; i--) {
        *y++ = mote_clamped(rounded(*x++ / out->scale) + out->zero_point, all);
    }
}

int mote_dequantize_check(const mote_t *m, const mote_op_t *op)
{
    return mote_is_int8(m, op->in) && !mote_is_int8(m, op->out) &&
           mote_size(mote_tensor(m, op->in)) == mote_size(mote_tensor(m, op->out));
}

void mote_dequantize(const mote_t *m, const mote_op_t *op)
{
    const mote_tensor_t *in = mote_tensor(m, op->in);
    const int8_t *x = mote_read(m, op->in);
    float *y = mote_write(m, op->out);
    for (uint32_t i = mote_size(in); i > 0; i--) {
        *y++ = in->scale * (float)(*x++ - in->zero_point);
    }
}
