/* Dot products of int8: of one row of numbers with one or four rows of weights. */
#ifndef MOTE_INT8_DOTS_H
#define MOTE_INT8_DOTS_H

#include <string.h>

#include "mote_int8.h"

#ifdef MOTE_INT8_DSP
#include <arm_acle.h>

/* Four int8 as they lie in memory: elements 0 and 2, and 1 and 3, as pairs of int16. */
typedef struct {
    int16x2_t even, odd;
} mote_fours_t;

static inline mote_fours_t mote_fours(const int8_t *x)
{
    uint32_t word;
    memcpy(&word, x, sizeof word);
    mote_fours_t fours = {__sxtb16((int8x4_t)word), __sxtb16((int8x4_t)(word >> 8 | word << 24))};
    return fours;
}

static inline int32_t mote_add_fours(int32_t acc, mote_fours_t x, const int8_t *w)
{
    mote_fours_t weights = mote_fours(w);
    return __smlad(weights.odd, x.odd, __smlad(weights.even, x.even, acc));
}
#endif

/* acc + sum of w * x */
static inline int32_t mote_dot(int32_t acc, const int8_t *w, const int8_t *x, uint32_t n)
{
#ifdef MOTE_INT8_DSP
    for (; n >= 4; n -= 4, w += 4, x += 4) {
        acc = mote_add_fours(acc, mote_fours(x), w);
    }
#endif
    for (; n > 0; n--) {
        acc = mote_wrapped_sum(acc, *w++ * *x++);
    }
    return acc;
}

/* The same for four rows of weights that lie `row` apart. */
static inline void mote_dots(int32_t acc[4], const int8_t *w, uint32_t row, const int8_t *x, uint32_t n)
{
    int32_t a = acc[0], b = acc[1], c = acc[2], d = acc[3];
    const int8_t *w2 = w + 2 * row;
#ifdef MOTE_INT8_DSP
    for (; n >= 4; n -= 4, w += 4, w2 += 4, x += 4) {
        mote_fours_t fours = mote_fours(x);
        a = mote_add_fours(a, fours, w);
        b = mote_add_fours(b, fours, w + row);
        c = mote_add_fours(c, fours, w2);
        d = mote_add_fours(d, fours, w2 + row);
    }
#endif
    for (; n > 0; n--, w++, w2++) {
        int32_t value = *x++;
        a = mote_wrapped_sum(a, w[0] * value);
        b = mote_wrapped_sum(b, w[row] * value);
        c = mote_wrapped_sum(c, w2[0] * value);
        d = mote_wrapped_sum(d, w2[row] * value);
    }
    acc[0] = a;
    acc[1] = b;
    acc[2] = c;
    acc[3] = d;
}

#endif
