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
#endif

#endif
