/* int8 pooling: averages, maxima, and means over all places. */
#include "mote_kernel_list.h"

#include "mote_int8_dots.h"

typedef struct {
    mote_range_t range;
    int32_t multiplier, shift, bias;
} mean_t;

/* The rows or columns of a window that lie inside the input: [begin, end). */
typedef struct {
    uint32_t begin, end;
} span_t;

static span_t inside(int32_t start, uint32_t kernel, uint32_t size)
{
    int32_t end = start + (int32_t)kernel;
    span_t span = {start > 0 ? (uint32_t)start : 0, end < (int32_t)size ? (uint32_t)end : size};
    return span;
}

static int pool_fits(const mote_t *m, const mote_op_t *op)
{
    return mote_is_int8(m, op->in) && mote_is_int8(m, op->out) && mote_windows_fit(m, op) && op->dilation_h == 1 &&
           op->dilation_w == 1 && mote_tensor(m, op->in)->c == mote_tensor(m, op->out)->c &&
           mote_constants_fit(m, op, sizeof(mote_range_t));
}

int mote_int8_avgpool_check(const mote_t *m, const mote_op_t *op)
{
    return pool_fits(m, op);
}

int mote_int8_maxpool_check(const mote_t *m, const mote_op_t *op)
{
    return pool_fits(m, op);
}

static int32_t sum_of(const int8_t *x, const mote_tensor_t *in, span_t rows, span_t columns)
{
    int32_t sum = 0;
    for (uint32_t i = rows.begin; i < rows.end; i++) {
        for (uint32_t j = columns.begin; j < columns.end; j++) {
            sum = mote_wrapped_sum(sum, x[(i * in->w + j) * in->c]);
        }
    }
    return sum;
}

/* The sums of four channels. */
static void sums_of(int32_t sums[4], const int8_t *x, const mote_tensor_t *in, span_t rows, span_t columns)
{
#if defined(MOTE_INT8_MVE)
    int32x4_t all = vdupq_n_s32(0);
    for (uint32_t i = rows.begin; i < rows.end; i++) {
        const int8_t *from = x + (i * in->w + columns.begin) * in->c;
        for (uint32_t j = columns.begin; j < columns.end; j++, from += in->c) {
            all = vaddq_s32(all, vldrbq_s32(from));
        }
    }
    vst1q_s32(sums, all);
#else
#if defined(MOTE_INT8_DSP)
    if (columns.end - columns.begin <= 256) { /* so many fit in 16 bits */
        int32_t a = 0, b = 0, c = 0, d = 0;
        for (uint32_t i = rows.begin; i < rows.end; i++) {
            const int8_t *from = x + (i * in->w + columns.begin) * in->c;
            int16x2_t even = 0, odd = 0;
            for (uint32_t j = columns.begin; j < columns.end; j++, from += in->c) {
                const mote_fours_t fours = mote_fours(from);
                even = __sadd16(even, fours.even);
                odd = __sadd16(odd, fours.odd);
            }
            a += (int16_t)even;
            b += (int16_t)odd;
            c += even >> 16;
            d += odd >> 16;
        }
        sums[0] = a;
        sums[1] = b;
        sums[2] = c;
        sums[3] = d;
        return;
    }
#endif
    for (uint32_t f = 0; f < 4; f++) {
        sums[f] = sum_of(x + f, in, rows, columns);
    }
#endif
}

static int32_t most_of(const int8_t *x, const mote_tensor_t *in, span_t rows, span_t columns)
{
    int32_t most = INT8_MIN;
    for (uint32_t i = rows.begin; i < rows.end; i++) {
        for (uint32_t j = columns.begin; j < columns.end; j++) {
            int8_t value = x[(i * in->w + j) * in->c];
            most = value > most ? value : most;
        }
    }
    return most;
}

/* sum / count to the nearest, ties away from 0. */
static int32_t average(int32_t sum, int32_t count)
{
    return (sum > 0 ? sum + count / 2 : sum - count / 2) / count;
}

static void pool(const mote_t *m, const mote_op_t *op, int averages)
{
    const mote_tensor_t *in = mote_tensor(m, op->in), *out = mote_tensor(m, op->out);
    const mote_range_t range = *(const mote_range_t *)(const void *)(mote_constants(m) + op->constants);
    const int8_t *x = mote_read(m, op->in);
    int8_t *y = mote_write(m, op->out);
    for (int32_t i = 0; i < out->h; i++) {
        span_t rows = inside(i * op->stride_h - op->pad_top, op->kernel_h, in->h);
        for (int32_t j = 0; j < out->w; j++) {
            span_t columns = inside(j * op->stride_w - op->pad_left, op->kernel_w, in->w);
            int32_t count = (int32_t)((rows.end - rows.begin) * (columns.end - columns.begin));
            uint32_t c = 0;
            for (; averages && c + 4 <= out->c; c += 4) {
                int32_t sums[4];
                sums_of(sums, x + c, in, rows, columns);
                for (uint32_t f = 0; f < 4; f++) {
                    *y++ = mote_clamped(average(sums[f], count), range);
                }
            }
            for (; c < out->c; c++) {
                int32_t value =
                    averages ? average(sum_of(x + c, in, rows, columns), count) : most_of(x + c, in, rows, columns);
                *y++ = mote_clamped(value, range);
            }
        }
    }
}

void mote_int8_avgpool(const mote_t *m, const mote_op_t *op)
{
    pool(m, op, 1);
}

void mote_int8_maxpool(const mote_t *m, const mote_op_t *op)
{
    pool(m, op, 0);
}

int mote_int8_mean_check(const mote_t *m, const mote_op_t *op)
{
    const mote_tensor_t *in = mote_tensor(m, op->in), *out = mote_tensor(m, op->out);
    if (!mote_is_int8(m, op->in) || !mote_is_int8(m, op->out) || in->c != out->c || mote_size(out) != out->c ||
        !mote_constants_fit(m, op, sizeof(mean_t))) {
        return 0;
    }
    const mean_t *mean = (const mean_t *)(const void *)(mote_constants(m) + op->constants);
    return mote_scale_fits(mean->multiplier, mean->shift);
}

void mote_int8_mean(const mote_t *m, const mote_op_t *op)
{
    const mote_tensor_t *in = mote_tensor(m, op->in), *out = mote_tensor(m, op->out);
    const mean_t *mean = (const mean_t *)(const void *)(mote_constants(m) + op->constants);
    const span_t rows = {0, in->h}, columns = {0, in->w};
    const int8_t *x = mote_read(m, op->in);
    int8_t *y = mote_write(m, op->out);
    uint32_t count;
    for (uint32_t c = 0; c < out->c; c += count) {
        int32_t sums[4];
        count = out->c - c >= 4 ? 4 : 1;
        if (count == 4) {
            sums_of(sums, x + c, in, rows, columns);
        } else {
            sums[0] = sum_of(x + c, in, rows, columns);
        }
        for (uint32_t f = 0; f < count; f++) {
            int32_t scaled = mote_scaled(mote_wrapped_sum(sums[f], mean->bias), mean->multiplier, mean->shift);
            y[c + f] = mote_clamped(mote_wrapped_sum(scaled, out->zero_point), mean->range);
        }
    }
}
