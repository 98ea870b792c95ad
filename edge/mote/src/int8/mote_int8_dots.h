/* Dot products of int8: of one row of numbers with one or four rows of weights. */
#ifndef MOTE_INT8_DOTS_H
#define MOTE_INT8_DOTS_H

#include "mote_int8.h"

/* acc + sum of w * x over n elements. */
int32_t mote_int8_dot(int32_t acc, const int8_t *w, const int8_t *x, uint32_t n);

/* The same for each of four rows of weights that lie `row` bytes apart. */
void mote_int8_dots(int32_t acc[4], const int8_t *w, uint32_t row, const int8_t *x, uint32_t n);

#ifdef MOTE_INT8_DSP
#include <arm_acle.h>
#include <string.h>

/* Four int8 as they lie in memory, at any address: elements 0 and 2, and 1 and 3, as pairs of int16. */
typedef struct {
    int16x2_t even, odd;
} mote_fours_t;

static inline uint32_t mote_word(const int8_t *x)
{
    uint32_t word;
    memcpy(&word, x, sizeof word);
    return word;
}

static inline int16x2_t mote_even(uint32_t word)
{
    return __sxtb16((int8x4_t)word);
}

static inline int16x2_t mote_odd(uint32_t word)
{
    int16x2_t odd;
    __asm("sxtb16 %0, %1, ror #8" : "=r"(odd) : "r"(word)); /* the compiler takes two instructions */
    return odd;
}

static inline mote_fours_t mote_fours(const int8_t *x)
{
    const uint32_t word = mote_word(x);
    mote_fours_t fours = {mote_even(word), mote_odd(word)};
    return fours;
}

/* 1 if an output can be computed as the convolutions in assembler do:
 *
 *     (acc * multiplier / 2^31, rounded up at half, + (acc < 0 ? -1 : 0) + zero_point * 2^n + 2^(n - 1)) >> n
 *
 * which is mote_requantised for shift = -n, 1 <= n <= 20. The sign of the rounded product may be taken from acc: where
 * the product is 0 the one less makes no difference. The sum is doubled first, with saturation: what saturates would be
 * beyond int8 after the shift. SMMLAR does the product, its rounding, and the addition. */
static inline int mote_shift_fits(const mote_requant_t *r)
{
    return r->shift <= -1 && r->shift >= -20;
}

static inline void mote_clamp(int8_t *y, uint32_t n, mote_range_t range)
{
    for (; n > 0; n--, y++) {
        *y = mote_clamped(*y, range);
    }
}
#endif

#ifdef MOTE_INT8_MVE
#include <arm_mve.h>

/* mote_requantised of four accumulators, not narrowed. */
static inline int32x4_t mote_int8_outputs(int32x4_t acc, int32x4_t multiplier, int32x4_t shift, int32_t zero_point,
                                          mote_range_t range)
{
    const int32x4_t none = vdupq_n_s32(0), right = vminq_s32(shift, none);
    int32x4_t y = vqrdmulhq_s32(vshlq_s32(acc, vmaxq_s32(shift, none)), multiplier);
    y = vqaddq_s32(y, vshrq_n_s32(vandq_s32(y, right), 31)); /* ties away from 0: -1 below it, where it is shifted */
    y = vaddq_n_s32(vrshlq_s32(y, right), zero_point);
    return vminq_s32(vmaxq_s32(y, vdupq_n_s32(range.low)), vdupq_n_s32(range.high));
}
#endif

/* The outputs of four accumulators. */
static inline void mote_int8_put_four(int8_t *to, const int32_t acc[4], const mote_requant_t r[4], int32_t zero_point,
                                      mote_range_t range)
{
#ifdef MOTE_INT8_MVE
    const uint32x4_t places = vmulq_n_u32(vidupq_n_u32(0, 1), sizeof(mote_requant_t) / sizeof(int32_t));
    const int32x4_t multiplier = vldrwq_gather_shifted_offset_s32(&r->multiplier, places);
    const int32x4_t shift = vldrwq_gather_shifted_offset_s32(&r->shift, places);
    vstrbq_s32(to, mote_int8_outputs(vld1q_s32(acc), multiplier, shift, zero_point, range));
#else
    for (uint32_t f = 0; f < 4; f++) {
        to[f] = mote_requantised(acc[f], &r[f], zero_point, range);
    }
#endif
}

#endif
