/* What mote_int8_avx2.c has beside the functions of mote_int8.h: each for a processor that has AVX2. */
#ifndef MOTE_INT8_AVX2_H
#define MOTE_INT8_AVX2_H

#include "mote_int8.h"

#ifdef MOTE_INT8_AVX2
static inline int mote_has_avx2(void)
{
    return __builtin_cpu_supports("avx2");
}

/* mote_int8_dot and mote_int8_dots. */
int32_t mote_int8_dot_avx2(int32_t acc, const int8_t *w, const int8_t *x, uint32_t n);
void mote_int8_dots_avx2(int32_t acc[4], const int8_t *w, uint32_t row, const int8_t *x, uint32_t n);

/* The first of n elements of an int8 addition; tells how many. */
uint32_t mote_int8_add_avx2(const mote_int8_add_t *a, const int8_t *x, const int8_t *x2, int8_t *y, uint32_t n);
#endif

#endif
