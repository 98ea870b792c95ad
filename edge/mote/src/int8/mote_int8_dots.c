/* Dot products of int8. */
#include "mote_int8_dots.h"

#include "mote_int8_avx2.h"

#ifdef MOTE_INT8_DSP
/* What the functions below do with the first n elements, n > 0 a multiple of 4. The compiler would run out of
 * registers. */
static void add_fours(int32_t acc[4], const int8_t *w, uint32_t row, const int8_t *x, uint32_t n)
{
    int32_t a = acc[0], b = acc[1], c = acc[2], d = acc[3];
    const int8_t *w2 = w + 2 * row, *end = x + n;
    uint32_t even, odd, w_even, w_odd;
    __asm(".macro mote_row acc, weights:vararg \n"
          "    ldr     %[w_odd], \\weights \n"
          "    sxtb16  %[w_even], %[w_odd] \n"
          "    sxtb16  %[w_odd], %[w_odd], ror #8 \n"
          "    smlad   \\acc, %[w_even], %[even], \\acc \n"
          "    smlad   \\acc, %[w_odd], %[odd], \\acc \n"
          ".endm \n"
          "1:  ldr     %[odd], [%[x]], #4 \n"
          "    sxtb16  %[even], %[odd] \n"
          "    sxtb16  %[odd], %[odd], ror #8 \n"
          "    mote_row %[b], [%[w], %[row]] \n"
          "    mote_row %[a], [%[w]], #4 \n"
          "    mote_row %[d], [%[w2], %[row]] \n"
          "    mote_row %[c], [%[w2]], #4 \n"
          "    cmp     %[x], %[end] \n"
          "    bne     1b \n"
          ".purgem mote_row"
          : [a] "+r"(a), [b] "+r"(b), [c] "+r"(c), [d] "+r"(d), [x] "+r"(x), [w] "+r"(w), [w2] "+r"(w2),
            [even] "=&r"(even), [odd] "=&r"(odd), [w_even] "=&r"(w_even), [w_odd] "=&r"(w_odd)
          : [row] "r"(row), [end] "r"(end)
          : "cc", "memory");
    acc[0] = a;
    acc[1] = b;
    acc[2] = c;
    acc[3] = d;
}
#endif

#ifdef MOTE_INT8_MVE
int32_t mote_int8_dot(int32_t acc, const int8_t *w, const int8_t *x, uint32_t n)
{
    for (; n >= 16; n -= 16, w += 16, x += 16) {
        acc = vmladavaq_s8(acc, vld1q_s8(w), vld1q_s8(x));
    }
    const mve_pred16_t rest = vctp8q(n);
    return vmladavaq_s8(acc, vldrbq_z_s8(w, rest), vldrbq_z_s8(x, rest));
}

void mote_int8_dots(int32_t acc[4], const int8_t *w, uint32_t row, const int8_t *x, uint32_t n)
{
    int32_t a = acc[0], b = acc[1], c = acc[2], d = acc[3];
    const int8_t *w1 = w + row, *w2 = w1 + row, *w3 = w2 + row;
    for (uint32_t left = n >> 4; left > 0; left--, w += 16, w1 += 16, w2 += 16, w3 += 16, x += 16) {
        const int8x16_t values = vld1q_s8(x);
        a = vmladavaq_s8(a, vld1q_s8(w), values);
        b = vmladavaq_s8(b, vld1q_s8(w1), values);
        c = vmladavaq_s8(c, vld1q_s8(w2), values);
        d = vmladavaq_s8(d, vld1q_s8(w3), values);
    }
    if ((n & 15u) != 0) {
        const mve_pred16_t rest = vctp8q(n & 15u);
        const int8x16_t values = vldrbq_z_s8(x, rest);
        a = vmladavaq_s8(a, vldrbq_z_s8(w, rest), values);
        b = vmladavaq_s8(b, vldrbq_z_s8(w1, rest), values);
        c = vmladavaq_s8(c, vldrbq_z_s8(w2, rest), values);
        d = vmladavaq_s8(d, vldrbq_z_s8(w3, rest), values);
    }
    acc[0] = a;
    acc[1] = b;
    acc[2] = c;
    acc[3] = d;
}
#else
int32_t mote_int8_dot(int32_t acc, const int8_t *w, const int8_t *x, uint32_t n)
{
#ifdef MOTE_INT8_AVX2
    if (mote_has_avx2()) {
        return mote_int8_dot_avx2(acc, w, x, n);
    }
#endif
#ifdef MOTE_INT8_DSP
    for (; n >= 4; n -= 4, w += 4, x += 4) {
        const mote_fours_t a = mote_fours(w), b = mote_fours(x);
        acc = __smlad(a.odd, b.odd, __smlad(a.even, b.even, acc));
    }
#endif
    for (; n > 0; n--) {
        acc = mote_wrapped_sum(acc, *w++ * *x++);
    }
    return acc;
}

void mote_int8_dots(int32_t acc[4], const int8_t *w, uint32_t row, const int8_t *x, uint32_t n)
{
#ifdef MOTE_INT8_AVX2
    if (mote_has_avx2()) {
        mote_int8_dots_avx2(acc, w, row, x, n);
        return;
    }
#endif
#ifdef MOTE_INT8_DSP
    const uint32_t fours = n & ~3u;
    if (fours != 0) {
        add_fours(acc, w, row, x, fours);
    }
    w += fours;
    x += fours;
    n -= fours;
#endif
    for (uint32_t f = 0; f < 4; f++, w += row) {
        for (uint32_t i = 0; i < n; i++) {
            acc[f] = mote_wrapped_sum(acc[f], w[i] * x[i]);
        }
    }
}
#endif
