/* What the int8 kernels share: TFLite's fixed-point arithmetic, in forms that no program can make overflow. */
#ifndef MOTE_INT8_H
#define MOTE_INT8_H

#include "mote_internal.h"

/* Products and sums of int8 stay exact modulo 2^32, whatever a program's constants are. */
static inline int32_t mote_wrapped_sum(int32_t a, int32_t b)
{
    return (int32_t)((uint32_t)a + (uint32_t)b);
}

/* gemmlowp's SaturatingRoundingDoublingHighMul, but for a = b = INT32_MIN: the high half of 2 a b, ties upwards. */
static inline int32_t mote_high_product(int32_t a, int32_t b)
{
    return (int32_t)(((int64_t)a * b + (1 << 30)) >> 31);
}

/* x / 2^bits to the nearest, ties away from 0; bits is 0 to 31. */
static inline int32_t mote_rounded_shift(int32_t x, int32_t bits)
{
    const int32_t mask = (int32_t)((1u << bits) - 1u);
    return (x >> bits) + ((x & mask) > (mask >> 1) + (x < 0));
}

/* TFLite's MultiplyByQuantizedMultiplier: x * multiplier * 2^(shift - 31), rounded twice. */
static inline int32_t mote_scaled(int32_t x, int32_t multiplier, int32_t shift)
{
    int32_t left = shift > 0 ? shift : 0;
    return mote_rounded_shift(mote_high_product((int32_t)((uint32_t)x << left), multiplier), left - shift);
}

static inline int8_t mote_clamped(int32_t value, mote_range_t range)
{
    return (int8_t)(value < range.low ? range.low : value > range.high ? range.high : value);
}

/* The output of an accumulator. */
static inline int8_t mote_requantised(int32_t acc, const mote_requant_t *r, int32_t zero_point, mote_range_t range)
{
    return mote_clamped(mote_wrapped_sum(mote_scaled(acc, r->multiplier, r->shift), zero_point), range);
}

/* 1 if mote_scaled can take them. */
static inline int mote_scale_fits(int32_t multiplier, int32_t shift)
{
    return multiplier >= 0 && shift >= -31 && shift <= 30;
}

static inline int mote_is_int8(const mote_t *m, uint32_t tensor)
{
    return mote_tensor(m, tensor)->type == MOTE_INT8;
}

/* The constants of an int8 dense or convolution. */
typedef struct {
    mote_range_t range;
    const mote_requant_t *requant; /* of every output channel */
    const int8_t *weights;
} mote_int8_constants_t;

static inline mote_int8_constants_t mote_int8_constants(const mote_t *m, const mote_op_t *op)
{
    const uint8_t *at = mote_constants(m) + op->constants;
    uint32_t channels = mote_tensor(m, op->out)->c;
    mote_int8_constants_t constants;
    constants.range = *(const mote_range_t *)(const void *)at;
    constants.requant = (const mote_requant_t *)(const void *)(at + sizeof(mote_range_t));
    constants.weights = (const int8_t *)(constants.requant + channels);
    return constants;
}

/* 1 if the op is from int8 to int8, and its constants are a range, a mote_requant_t that fits for every output channel,
 * and so many bytes of weights. */
int mote_int8_constants_fit(const mote_t *m, const mote_op_t *op, uint64_t weights);

/* What a dense or convolution writes for the output channels first ... first + count - 1: c has weights and requant of
 * these channels, from the first on. For a depthwise one, `row` is how many channels a row of weights has. A
 * convolution writes the output pixels from `pixel` on. */
void mote_int8_dense_part(const mote_t *m, const mote_op_t *op, const mote_int8_constants_t *c, uint32_t first,
                          uint32_t count);
void mote_int8_conv2d_part(const mote_t *m, const mote_op_t *op, const mote_int8_constants_t *c, uint32_t first,
                           uint32_t count, uint32_t pixel);
void mote_int8_depthwise_part(const mote_t *m, const mote_op_t *op, const mote_int8_constants_t *c, uint32_t row,
                              uint32_t first, uint32_t count);

/* Copies the taps of an output pixel's window. */
void mote_int8_window(const mote_t *m, const mote_op_t *op, uint32_t pixel, int8_t *to);

/* All that a convolution writes. */
void mote_int8_conv2d_whole(const mote_t *m, const mote_op_t *op, const mote_int8_constants_t *c);

/* Which instructions compute int8 better than C can name them. */
#if defined(__ARM_FEATURE_MVE) && (__ARM_FEATURE_MVE & 1) && !defined(__clang__)
#define MOTE_INT8_MVE
#elif defined(__ARM_FEATURE_DSP) && defined(__ARM_FEATURE_SIMD32) && defined(__OPTIMIZE__) && !defined(__clang__)
#define MOTE_INT8_DSP
#endif
#if defined(__x86_64__) && defined(__GNUC__) && __STDC_HOSTED__
#define MOTE_INT8_AVX2 /* asks the compiler's library what the processor has */
#endif

/* By such (mote_int8_*_dsp.c, mote_int8_mve.c, mote_int8_avx2.c), these compute a convolution's output pixels from the
 * first on, all channels, and tell how many; and all of a depthwise one, telling whether. */
#if defined(MOTE_INT8_DSP) || defined(MOTE_INT8_AVX2)
uint32_t mote_int8_conv2d_fast(const mote_t *m, const mote_op_t *op, const mote_int8_constants_t *constants);
#else
static inline uint32_t mote_int8_conv2d_fast(const mote_t *m, const mote_op_t *op,
                                             const mote_int8_constants_t *constants)
{
    (void)m, (void)op, (void)constants;
    return 0;
}
#endif
#if defined(MOTE_INT8_DSP) || defined(MOTE_INT8_MVE) || defined(MOTE_INT8_AVX2)
int mote_int8_depthwise_fast(const mote_t *m, const mote_op_t *op);
#else
static inline int mote_int8_depthwise_fast(const mote_t *m, const mote_op_t *op)
{
    (void)m, (void)op;
    return 0;
}
#endif

#endif
