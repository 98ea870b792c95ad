/* int8 convolutions with the dual multiply-accumulate of Armv7E-M (Cortex-M4, M7) and Armv8-M (M33): sums by SMLAD, for
 * four pixels or for squares of two pixels and two filters, and then the outputs as mote_int8_dots.h describes. */
#include "mote_kernel_list.h"

#include "mote_int8_dots.h"

#ifdef MOTE_INT8_DSP

enum { PIXELS = 4 };

/* Behind four pixels' windows: what the loop over the filters needs. Four taps of the four pixels are eight words: of
 * every pixel taps 0 and 2, then 1 and 3, as int16. Where their number is no multiple of four, zeros lie ahead of the
 * first: they meet weights of the filter before, or what lies ahead of all weights. */
typedef struct {
    const mote_requant_t *end;
    int8_t *to;
    uint32_t pixel; /* bytes from pixel to pixel */
    const uint32_t *taps;
    uint32_t entry; /* where the first round through the unrolled loop starts */
    uint32_t zeros; /* ahead of the first tap */
    int32_t unit;   /* 2 zero_point + 1 */
} group_t;

/* Runs the filters from that of r on, one by one. r0 stays at the group_t; its taps end where it begins. */
static void run_filters(group_t *group, const int8_t *weights, const mote_requant_t *r, uint32_t skipped_fours)
{
    register group_t *at __asm("r0") = group;
    register const int8_t *w __asm("r2") = weights;
    register const mote_requant_t *requant __asm("r3") = r;
    register uint32_t skipped __asm("r1") = skipped_fours;
    __asm volatile("    adr     r4, 2f          \n"
                   "    movs    r5, #(3f - 2f)  \n"
                   "    mla     r4, r1, r5, r4  \n"
                   "    orr     r4, r4, #1      \n"
                   "    str     r4, [r0, #16]   \n"
                   "1:  ldrd    r1, r4, [r0, #12] \n"
                   "    ldr     r10, [r3], #12  \n"
                   "    mov     r11, r10        \n"
                   "    mov     r12, r10        \n"
                   "    mov     lr, r10         \n"
                   "    bx      r4              \n"
                   "    .balign 4               \n"
                   ".macro mote_four            \n"
                   "    ldr     r9, [r2], #4    \n"
                   "    sxtb16  r8, r9          \n"
                   "    sxtb16  r9, r9, ror #8  \n"
                   "    ldmia   r1!, {r4, r5, r6, r7} \n"
                   "    smlad   r10, r8, r4, r10 \n"
                   "    smlad   r11, r8, r6, r11 \n"
                   "    smlad   r10, r9, r5, r10 \n"
                   "    smlad   r11, r9, r7, r11 \n"
                   "    ldmia   r1!, {r4, r5, r6, r7} \n"
                   "    smlad   r12, r8, r4, r12 \n"
                   "    smlad   lr, r8, r6, lr  \n"
                   "    smlad   r12, r9, r5, r12 \n"
                   "    smlad   lr, r9, r7, lr  \n"
                   ".endm                       \n"
                   "2:  mote_four               \n"
                   "3:                          \n"
                   ".rept 15                    \n"
                   "    mote_four               \n"
                   ".endr                       \n"
                   ".purgem mote_four           \n"
                   "    cmp     r1, r0          \n"
                   "    bne     2b              \n"
                   ".macro mote_output acc      \n"
                   "    add     r7, r6, \\acc, asr #31 \n"
                   "    qadd    \\acc, \\acc, \\acc \n"
                   "    smmlar  \\acc, \\acc, r4, r7 \n"
                   "    asr     \\acc, \\acc, r5 \n"
                   "    ssat    \\acc, #8, \\acc \n"
                   ".endm                       \n"
                   "    ldrd    r8, r6, [r0, #20] \n"
                   "    ldrd    r4, r5, [r3, #-8] \n"
                   "    subs    r2, r2, r8      \n"
                   "    rsbs    r5, r5, #0      \n"
                   "    lsl     r6, r6, r5      \n"
                   "    asr     r6, r6, #1      \n"
                   "    mote_output r10         \n"
                   "    mote_output r11         \n"
                   "    mote_output r12         \n"
                   "    mote_output lr          \n"
                   ".purgem mote_output         \n"
                   "    ldm     r0, {r1, r8, r9} \n"
                   "    add     r4, r8, r9, lsl #1 \n"
                   "    strb    r12, [r4]       \n"
                   "    strb    lr, [r4, r9]    \n"
                   "    strb    r11, [r8, r9]   \n"
                   "    strb    r10, [r8], #1   \n"
                   "    str     r8, [r0, #4]    \n"
                   "    cmp     r3, r1          \n"
                   "    bne     1b              \n"
                   : "+r"(w), "+r"(requant), "+r"(skipped)
                   : "r"(at)
                   : "r4", "r5", "r6", "r7", "r8", "r9", "r10", "r11", "r12", "lr", "cc", "memory");
}

/* Where the taps of one pixel go: two words of every 2 * PIXELS. Up to three wait for the fourth. */
typedef struct {
    uint32_t *to;
    uint32_t waiting, bits; /* their bytes, and how many bits these are */
} taps_t;

static inline uint32_t *put_four(uint32_t *to, uint32_t four)
{
    to[0] = (uint32_t)mote_even(four);
    to[1] = (uint32_t)mote_odd(four);
    return to + 2 * PIXELS;
}

/* Adds n of them: step is 1, or 0 where all are as the four at x. */
static MOTE_APART void put(taps_t *taps, const int8_t *x, uint32_t step, uint32_t n)
{
    taps_t t = *taps;
    for (; n >= 4; n -= 4, x += 4 * step) {
        const uint32_t four = mote_word(x);
        t.to = put_four(t.to, t.waiting | four << t.bits);
        t.waiting = four >> 1 >> (31 - t.bits);
    }
    for (; n > 0; n--, x += step) {
        t.waiting |= (uint32_t)(uint8_t)*x << t.bits;
        t.bits += 8;
        if (t.bits == 32) {
            t.to = put_four(t.to, t.waiting);
            t.waiting = t.bits = 0;
        }
    }
    *taps = t;
}

/* Adds n of them, a multiple of four, where none wait. */
static inline void put_fours(taps_t *taps, const int8_t *x, uint32_t n)
{
    const int8_t *end = x + n;
    uint32_t even, odd;
    __asm("1:  ldr     %[odd], [%[x]], #4 \n"
          "    sxtb16  %[even], %[odd] \n"
          "    sxtb16  %[odd], %[odd], ror #8 \n"
          "    strd    %[even], %[odd], [%[to]], #32 \n"
          "    cmp     %[x], %[end] \n"
          "    bne     1b"
          : [to] "+r"(taps->to), [x] "+r"(x), [even] "=&r"(even), [odd] "=&r"(odd)
          : [end] "r"(end)
          : "cc", "memory");
}

/* The window that begins at row y, column x of the input. */
static void gather(const mote_op_t *op, const mote_tensor_t *in, const int8_t *input, taps_t taps, int32_t y, int32_t x)
{
    const uint32_t channels = in->c, dilation = op->dilation_w, width = op->kernel_w;
    int8_t zeros[4];
    memset(zeros, in->zero_point, sizeof zeros);
    uint32_t first = 0, last = width; /* of the columns that lie inside */
    while (first < last && x + (int32_t)(first * dilation) < 0) {
        first++;
    }
    while (last > first && x + (int32_t)((last - 1) * dilation) >= in->w) {
        last--;
    }
    const uint32_t inside = last - first, at_once = dilation == 1 ? inside : 1;
    const int is_even = inside == width && at_once == width && (width * channels & 3u) == 0;
    int32_t at = (y * in->w + x + (int32_t)(first * dilation)) * (int32_t)channels;
    for (uint32_t i = op->kernel_h; i > 0; i--, y += op->dilation_h, at += op->dilation_h * in->w * (int32_t)channels) {
        if (y < 0 || y >= in->h) {
            put(&taps, zeros, 0, width * channels);
            continue;
        }
        if (is_even) {
            put_fours(&taps, input + at, width * channels);
            continue;
        }
        if (first > 0) {
            put(&taps, zeros, 0, first * channels);
        }
        for (uint32_t j = 0; j < inside; j += at_once) {
            put(&taps, input + at + (int32_t)(j * dilation * channels), 1, at_once * channels);
        }
        if (last < width) {
            put(&taps, zeros, 0, (width - last) * channels);
        }
    }
}

/* 1 if no input changes the output: its filter's products are so small beside the bias. Not rare in trained models. */
static int is_constant(const mote_requant_t *r, uint32_t row)
{
    const int32_t most = (int32_t)row << 14; /* of the sum of `row` products */
    return row < 1u << 14 && r->shift <= 0 && r->bias < INT32_MAX - most && r->bias > INT32_MIN + most &&
           mote_scaled(r->bias + most, r->multiplier, r->shift) == mote_scaled(r->bias - most, r->multiplier, r->shift);
}

/* One filter, of a scale for which the sums must be taken as they are. */
static void run_filter(const group_t *group, const int8_t *weights, const mote_requant_t *r, uint32_t row,
                       int32_t zero_point, mote_range_t range)
{
    const uint32_t *taps = group->taps;
    int32_t acc[PIXELS] = {r->bias, r->bias, r->bias, r->bias};
    if (!is_constant(r, row)) {
        for (; taps != (const uint32_t *)(const void *)group; weights += 4) {
            const mote_fours_t w = mote_fours(weights);
            for (uint32_t p = 0; p < PIXELS; p++, taps += 2) {
                acc[p] = __smlad(w.odd, (int16x2_t)taps[1], __smlad(w.even, (int16x2_t)taps[0], acc[p]));
            }
        }
    }
    for (uint32_t p = 0; p < PIXELS; p++) {
        group->to[p * group->pixel] = mote_requantised(acc[p], r, zero_point, range);
    }
}

/* The first of the filters from o on whose shift does not fit. */
static uint32_t fitting(const mote_requant_t *r, uint32_t o, uint32_t channels)
{
    while (o < channels && mote_shift_fits(r + o)) {
        o++;
    }
    return o;
}

/* All filters on the four pixels whose taps were gathered; `end`: the first whose shift does not fit. */
static void run_group(group_t *group, const mote_int8_constants_t *constants, int8_t *to, uint32_t row,
                      int32_t zero_point, uint32_t end)
{
    const uint32_t channels = group->pixel;
    const mote_requant_t *r = constants->requant;
    for (uint32_t o = 0; o < channels;) {
        const int8_t *weights = constants->weights + o * row - group->zeros;
        group->to = to + o;
        if (o < end) {
            group->end = r + end;
            run_filters(group, weights, r + o, -((row + 3) >> 2) & 15u);
            o = end;
        } else {
            run_filter(group, weights, r + o, row, zero_point, constants->range);
            end = fitting(r, ++o, channels);
        }
    }
    if (constants->range.low != INT8_MIN || constants->range.high != INT8_MAX) {
        mote_clamp(to, PIXELS * channels, constants->range);
    }
}

/* acc[f][p] += the sum of filter f's weights by pixel p's values; both lie `row` apart, a multiple of 8. */
static MOTE_APART void add_square(int32_t acc[2][2], const int8_t *w, const int8_t *x, uint32_t row)
{
    int32_t a = acc[0][0], b = acc[0][1], c = acc[1][0], d = acc[1][1];
    const int8_t *end = x + row;
    uint32_t x_even, x_odd, y_even, y_odd, w_even, w_odd;
    __asm("1:                          \n"
          ".rept 2                     \n"
          "    ldr     %[y_odd], [%[x], %[row]] \n"
          "    ldr     %[x_odd], [%[x]], #4 \n"
          "    ldr     %[w_odd], [%[w], %[row]] \n"
          "    sxtb16  %[y_even], %[y_odd] \n"
          "    sxtb16  %[y_odd], %[y_odd], ror #8 \n"
          "    sxtb16  %[x_even], %[x_odd] \n"
          "    sxtb16  %[x_odd], %[x_odd], ror #8 \n"
          "    sxtb16  %[w_even], %[w_odd] \n"
          "    sxtb16  %[w_odd], %[w_odd], ror #8 \n"
          "    smlad   %[c], %[w_even], %[x_even], %[c] \n"
          "    smlad   %[d], %[w_even], %[y_even], %[d] \n"
          "    smlad   %[c], %[w_odd], %[x_odd], %[c] \n"
          "    smlad   %[d], %[w_odd], %[y_odd], %[d] \n"
          "    ldr     %[w_odd], [%[w]], #4 \n"
          "    sxtb16  %[w_even], %[w_odd] \n"
          "    sxtb16  %[w_odd], %[w_odd], ror #8 \n"
          "    smlad   %[a], %[w_even], %[x_even], %[a] \n"
          "    smlad   %[b], %[w_even], %[y_even], %[b] \n"
          "    smlad   %[a], %[w_odd], %[x_odd], %[a] \n"
          "    smlad   %[b], %[w_odd], %[y_odd], %[b] \n"
          ".endr                       \n"
          "    cmp     %[x], %[end]    \n"
          "    bne     1b"
          : [a] "+r"(a), [b] "+r"(b), [c] "+r"(c), [d] "+r"(d), [x] "+r"(x), [w] "+r"(w), [x_even] "=&r"(x_even),
            [x_odd] "=&r"(x_odd), [y_even] "=&r"(y_even), [y_odd] "=&r"(y_odd), [w_even] "=&r"(w_even),
            [w_odd] "=&r"(w_odd)
          : [row] "r"(row), [end] "r"(end)
          : "cc", "memory");
    acc[0][0] = a;
    acc[0][1] = b;
    acc[1][0] = c;
    acc[1][1] = d;
}

/* The outputs of a filter's two sums, of a scale whose shift fits. unit: 2 zero_point + 1. */
static inline void put_two(int8_t *to, int8_t *other, const int32_t acc[2], const mote_requant_t *r, int32_t unit)
{
    const int32_t right = -r->shift, offset = (unit * (1 << right)) >> 1;
    int32_t y = acc[0], z = acc[1], rest;
    __asm(".macro mote_output acc      \n"
          "    add     %[rest], %[offset], \\acc, asr #31 \n"
          "    qadd    \\acc, \\acc, \\acc \n"
          "    smmlar  \\acc, \\acc, %[multiplier], %[rest] \n"
          "    asr     \\acc, \\acc, %[right] \n"
          "    ssat    \\acc, #8, \\acc \n"
          ".endm                       \n"
          "    mote_output %[y]        \n"
          "    mote_output %[z]        \n"
          ".purgem mote_output"
          : [y] "+r"(y), [z] "+r"(z), [rest] "=&r"(rest)
          : [multiplier] "r"(r->multiplier), [right] "r"(right), [offset] "r"(offset));
    *to = (int8_t)y;
    *other = (int8_t)z;
}

enum { WINDOW = 40 /* bytes of a window that is gathered on the stack */ };

/* Output pixels from `pixel` on, by twos, whose number is at least two: small windows, or, where they lie, of one tap.
 */
static MOTE_APART void run_pairs(const mote_t *m, const mote_op_t *op, const mote_int8_constants_t *constants,
                                 uint32_t pixel)
{
    const mote_tensor_t *out = mote_tensor(m, op->out);
    const uint32_t row = (uint32_t)op->kernel_h * op->kernel_w * mote_tensor(m, op->in)->c;
    const uint32_t channels = out->c, pixels = (uint32_t)out->h * out->w;
    const int32_t unit = 2 * out->zero_point + 1;
    for (; pixel < pixels; pixel += 2) {
        pixel = pixel + 2 <= pixels ? pixel : pixels - 2; /* the last one but one again, where one is left */
        int8_t windows[2 * WINDOW];
        const int8_t *x = (const int8_t *)mote_read(m, op->in) + pixel * row, *w = constants->weights;
        if (row <= WINDOW) {
            mote_int8_window(m, op, pixel, windows);
            mote_int8_window(m, op, pixel + 1, windows + row);
            x = windows;
        }
        int8_t *to = (int8_t *)mote_write(m, op->out) + pixel * channels, *end = to + channels;
        for (const mote_requant_t *r = constants->requant; to != end; r += 2, w += 2 * row, to += 2) {
            int32_t acc[2][2] = {{r[0].bias, r[0].bias}, {r[1].bias, r[1].bias}};
            add_square(acc, w, x, row);
            put_two(to, to + channels, acc[0], r, unit);
            put_two(to + 1, to + channels + 1, acc[1], r + 1, unit);
        }
        mote_clamp(end - channels, 2 * channels, constants->range);
    }
}

/* Output pixels from the first on, by fours; tells how many. */
static MOTE_APART uint32_t run_groups(const mote_t *m, const mote_op_t *op, const mote_int8_constants_t *constants)
{
    const mote_tensor_t *in = mote_tensor(m, op->in), *out = mote_tensor(m, op->out);
    const uint32_t row = (uint32_t)op->kernel_h * op->kernel_w * in->c, zeros = -row & 3u, channels = out->c;
    /* The group and its taps lie at the end of the output, as long as that is not written yet. */
    const uint32_t scratch = 2 * PIXELS * (row + zeros) + sizeof(group_t), size = mote_size(out) & ~3u;
    const uint32_t pixels = scratch < size ? (size - scratch) / channels : 0;
    const void *ahead = constants->requant + channels;
    if (pixels < PIXELS || (zeros != 0 && constants->weights != ahead)) {
        return 0;
    }
    int8_t *to = mote_write(m, op->out);
    group_t *group = (group_t *)(void *)(to + size - sizeof(group_t));
    uint32_t *taps = (uint32_t *)(void *)(to + size - scratch);
    group->taps = taps;
    group->unit = 2 * out->zero_point + 1;
    group->pixel = channels;
    group->zeros = zeros;
    const uint32_t fit = fitting(constants->requant, 0, channels);
    for (uint32_t pixel = 0; pixel < pixels; pixel += PIXELS) {
        pixel = pixel + PIXELS <= pixels ? pixel : pixels - PIXELS; /* the last ones again, where fewer are left */
        for (uint32_t p = 0; p < PIXELS; p++) {
            const taps_t at = {taps + 2 * p, 0, 8 * zeros};
            gather(op, in, mote_read(m, op->in), at, (int32_t)((pixel + p) / out->w) * op->stride_h - op->pad_top,
                   (int32_t)((pixel + p) % out->w) * op->stride_w - op->pad_left);
        }
        run_group(group, constants, to + pixel * channels, row, out->zero_point, fit);
    }
    return pixels;
}

/* 1 if run_pairs can compute all filters. */
static MOTE_APART int pairs_fit(const mote_t *m, const mote_op_t *op, const mote_int8_constants_t *constants)
{
    const mote_tensor_t *in = mote_tensor(m, op->in), *out = mote_tensor(m, op->out);
    const uint32_t row = (uint32_t)op->kernel_h * op->kernel_w * in->c;
    const int there = row == in->c && op->stride_h * op->stride_w == 1 && in->h == out->h && in->w == out->w &&
                      (op->pad_top | op->pad_left) == 0;
    return (there || row <= WINDOW) && row % 8 == 0 && out->c % 2 == 0 && out->h * out->w >= 2 &&
           fitting(constants->requant, 0, out->c) == out->c;
}

uint32_t mote_int8_conv2d_fast(const mote_t *m, const mote_op_t *op, const mote_int8_constants_t *constants)
{
    const uint32_t pixels = run_groups(m, op, constants);
    if (!pairs_fit(m, op, constants)) {
        return pixels;
    }
    run_pairs(m, op, constants, pixels);
    return (uint32_t)mote_tensor(m, op->out)->h * mote_tensor(m, op->out)->w;
}

#endif
