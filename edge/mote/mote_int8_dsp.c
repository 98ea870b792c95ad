/* int8 convolutions with the dual multiply-accumulate of Armv7E-M (Cortex-M4, M7) and Armv8-M (M33).
 *
 * Both compute, for all of a group of outputs, sums by SMLAD, and then the outputs by
 *
 *     (acc * multiplier / 2^31, rounded up at half, + (acc < 0 ? -1 : 0) + zero_point * 2^n + 2^(n - 1)) >> n
 *
 * which is mote_requantised for shift = -n, 1 <= n <= 20. The sign of the rounded product may be taken from acc: where
 * the product is 0 the one less makes no difference. The sum is doubled first, with saturation: what saturates would be
 * beyond int8 after the shift. SMMLAR does the product, its rounding, and the addition.
 */
#include "mote_kernel_list.h"

#include "mote_int8_dots.h"

#ifdef MOTE_INT8_DSP

/* 1 if the outputs can be computed as above. */
static int shifts_fit(const mote_requant_t *r, uint32_t channels)
{
    for (uint32_t o = 0; o < channels; o++) {
        if (r[o].shift > -1 || r[o].shift < -20) {
            return 0;
        }
    }
    return 1;
}

/* Two pixels' windows, and what the loop over the filters needs, behind them. They lie in the end of the output, which
 * is not written yet. Four taps of both pixels are four words: of the first pixel taps 0 and 2, then 1 and 3, as int16;
 * and so of the second. */
typedef struct {
    const uint32_t *taps;
    const mote_requant_t *requant; /* of the filter to be computed next */
    uint32_t row;                  /* bytes from filter to filter */
    int32_t unit;                  /* 2 zero_point + 1 */
    const mote_requant_t *end;
    int8_t *to;
    uint32_t pixel; /* bytes from pixel to pixel */
    uint32_t entry; /* where the first round through the unrolled loop starts */
} pair_t;

/* Runs the filters, two at a time. r0 stays at the pair_t; its taps end where it begins. */
static void run_filters(pair_t *pair, const int8_t *weights, uint32_t skipped_groups)
{
    register pair_t *at __asm("r0") = pair;
    register const int8_t *w __asm("r2") = weights;
    register uint32_t skipped __asm("r3") = skipped_groups;
    __asm volatile("    adr     r4, 2f          \n"
                   "    movs    r5, #(3f - 2f)  \n"
                   "    mla     r4, r3, r5, r4  \n"
                   "    orr     r4, r4, #1      \n"
                   "    str     r4, [r0, #28]   \n"
                   "1:  ldm     r0, {r1, r4, r5} \n" /* taps, requant, row */
                   "    ldr     r10, [r4]       \n"
                   "    ldr     r12, [r4, #12]  \n"
                   "    add     r3, r2, r5      \n"
                   "    mov     r11, r10        \n"
                   "    mov     lr, r12         \n"
                   "    ldr     pc, [r0, #28]   \n"
                   "    .balign 4               \n"
                   ".macro mote_group           \n"
                   "    ldmia   r1!, {r4, r5, r6, r7} \n"
                   "    ldr     r9, [r2], #4    \n"
                   "    sxtb16  r8, r9          \n"
                   "    sxtb16  r9, r9, ror #8  \n"
                   "    smlad   r10, r8, r4, r10 \n"
                   "    smlad   r11, r8, r6, r11 \n"
                   "    smlad   r10, r9, r5, r10 \n"
                   "    smlad   r11, r9, r7, r11 \n"
                   "    ldr     r9, [r3], #4    \n"
                   "    sxtb16  r8, r9          \n"
                   "    sxtb16  r9, r9, ror #8  \n"
                   "    smlad   r12, r8, r4, r12 \n"
                   "    smlad   lr, r8, r6, lr  \n"
                   "    smlad   r12, r9, r5, r12 \n"
                   "    smlad   lr, r9, r7, lr  \n"
                   ".endm                       \n"
                   "2:  mote_group              \n"
                   "3:  mote_group              \n"
                   "    mote_group              \n"
                   "    mote_group              \n"
                   ".purgem mote_group          \n"
                   "    cmp     r1, r0          \n"
                   "    bne     2b              \n"
                   ".macro mote_output acc      \n"
                   "    add     r7, r6, \\acc, asr #31 \n"
                   "    qadd    \\acc, \\acc, \\acc \n"
                   "    smmlar  \\acc, \\acc, r4, r7 \n"
                   "    asr     \\acc, \\acc, r5 \n"
                   "    ssat    \\acc, #8, \\acc \n"
                   ".endm                       \n"
                   "    mov     r2, r3          \n"
                   "    ldr     r1, [r0, #4]    \n"
                   "    ldr     r3, [r0, #12]   \n"
                   "    ldrd    r8, r9, [r0, #20] \n"
                   "    ldrd    r4, r5, [r1, #4] \n"
                   "    rsb     r5, r5, #0      \n"
                   "    lsl     r6, r3, r5      \n"
                   "    asr     r6, r6, #1      \n"
                   "    mote_output r10         \n"
                   "    mote_output r11         \n"
                   "    strb    r11, [r8, r9]   \n"
                   "    strb    r10, [r8], #1   \n"
                   "    ldrd    r4, r5, [r1, #16] \n"
                   "    rsb     r5, r5, #0      \n"
                   "    lsl     r6, r3, r5      \n"
                   "    asr     r6, r6, #1      \n"
                   "    mote_output r12         \n"
                   "    mote_output lr          \n"
                   "    strb    lr, [r8, r9]    \n"
                   "    strb    r12, [r8], #1   \n"
                   ".purgem mote_output         \n"
                   "    str     r8, [r0, #20]   \n"
                   "    adds    r1, #24         \n"
                   "    str     r1, [r0, #4]    \n"
                   "    ldr     r4, [r0, #16]   \n"
                   "    cmp     r1, r4          \n"
                   "    bne     1b              \n"
                   : "+r"(w), "+r"(skipped)
                   : "r"(at)
                   : "r1", "r4", "r5", "r6", "r7", "r8", "r9", "r10", "r11", "r12", "lr", "cc", "memory");
}

/* The taps of one pixel's window that begins at row y, column x, four int16 of every eight. */
typedef struct {
    int16_t *to;
    uint32_t done;
} taps_t;

static void put(taps_t *taps, const int8_t *x, uint32_t step, uint32_t n)
{
    int16_t *to = taps->to;
    uint32_t k = taps->done;
    taps->done += n;
    if (((k | n) & 3u) == 0 && step == 1) {
        uint32_t *words = (uint32_t *)(void *)(to + 2 * k);
        for (; n > 0; n -= 4, x += 4, words += 4) {
            mote_fours_t fours = mote_fours(x);
            words[0] = (uint32_t)fours.even;
            words[1] = (uint32_t)fours.odd;
        }
    }
    for (; n > 0; n--, k++, x += step) {
        to[(k & ~3u) * 2 + (k & 1u) * 2 + (k >> 1 & 1u)] = *x;
    }
}

static void gather(const mote_op_t *op, const mote_tensor_t *in, const int8_t *input, int16_t *to, int32_t y,
                   int32_t x0)
{
    taps_t taps = {to, 0};
    for (uint32_t i = 0; i < op->kernel_h; i++, y += op->dilation_h) {
        int32_t x = x0;
        uint32_t run;
        for (uint32_t j = 0; j < op->kernel_w; j += run, x += (int32_t)run * op->dilation_w) {
            run = 1;
            if (y < 0 || y >= in->h || x < 0 || x >= in->w) {
                put(&taps, &in->zero_point, 0, in->c);
                continue;
            }
            if (op->dilation_w == 1) {
                uint32_t left = op->kernel_w - j, there = (uint32_t)(in->w - x);
                run = left < there ? left : there;
            }
            put(&taps, input + ((uint32_t)y * in->w + (uint32_t)x) * in->c, 1, run * in->c);
        }
    }
}

static void clamp(int8_t *y, uint32_t n, mote_range_t range)
{
    for (; n > 0; n--, y++) {
        *y = mote_clamped(*y, range);
    }
}

uint32_t mote_int8_conv2d_fast(const mote_t *m, const mote_op_t *op, const mote_int8_constants_t *constants)
{
    const mote_tensor_t *in = mote_tensor(m, op->in), *out = mote_tensor(m, op->out);
    const uint32_t row = (uint32_t)op->kernel_h * op->kernel_w * in->c, channels = out->c;
    const uint32_t scratch = 4 * row + sizeof(pair_t), size = mote_size(out) & ~3u;
    if ((row & 3u) != 0 || (channels & 1u) != 0 || scratch > size || !shifts_fit(constants->requant, channels)) {
        return 0;
    }
    int8_t *first = mote_write(m, op->out), *to = first;
    const uint32_t pairs = (size - scratch) / (2 * channels);
    int16_t *taps = (int16_t *)(void *)(first + size - scratch);
    pair_t *pair = (pair_t *)(void *)(first + size - sizeof(pair_t));
    for (uint32_t pixel = 0; pixel < 2 * pairs; pixel++) {
        gather(op, in, mote_read(m, op->in), taps + 4 * (pixel & 1u),
               (int32_t)(pixel / out->w) * op->stride_h - op->pad_top,
               (int32_t)(pixel % out->w) * op->stride_w - op->pad_left);
        if (pixel & 1u) {
            pair_t next = {(const uint32_t *)(const void *)taps,
                           constants->requant,
                           row,
                           2 * out->zero_point + 1,
                           constants->requant + channels,
                           to,
                           channels,
                           0};
            *pair = next;
            run_filters(pair, constants->weights, -(row >> 2) & 3u);
            if (constants->range.low != INT8_MIN || constants->range.high != INT8_MAX) {
                clamp(to, 2 * channels, constants->range);
            }
            to += 2 * channels;
        }
    }
    return 2 * pairs;
}

enum { CHANNELS = 4, MOST_TAPS = 9 };

/* All that a line of pixels needs, in the order of its use. `head` is filled from its end: four biases, doubled, and
 * for every two taps where in the input they lie, from the window's first tap on, and for each channel the weights of
 * both, doubled, as int16. */
typedef struct {
    uint32_t head[CHANNELS + MOST_TAPS / 2 * (2 + CHANNELS)];
    uint32_t at;     /* of the last tap */
    uint32_t last02; /* its weights, doubled: of channels 0 and 2, 1 and 3 */
    uint32_t last13;
    struct {
        int32_t multiplier, right, offset; /* offset: zero_point * 2^right + 2^(right - 1) */
    } requant[CHANNELS];
    int8_t *to;
    uint32_t to_step;
    int8_t *end;
    uint32_t from_step;
    uint32_t *begin; /* in head */
} line_t;

/* Computes pixels to, to + to_step, ... up to end, of windows whose first tap is at from, from + from_step, ... */
static void run_line(line_t *line, const int8_t *from, uint32_t skipped_twos)
{
    register uint32_t *at __asm("r0") = line->begin;
    register const int8_t *x __asm("r1") = from;
    register uint32_t skipped __asm("r2") = skipped_twos;
    __asm volatile("    adr     r4, 2f          \n"
                   "    movs    r5, #(3f - 2f)  \n"
                   "    mla     r2, r2, r5, r4  \n"
                   "    orr     r2, r2, #1      \n"
                   "1:  ldmia   r0!, {r10, r11, r12, lr} \n"
                   "    bx      r2              \n"
                   "    .balign 4               \n"
                   ".macro mote_two             \n"
                   "    ldmia   r0!, {r3, r4, r6, r7, r8, r9} \n"
                   "    ldr     r3, [r1, r3]    \n"
                   "    ldr     r4, [r1, r4]    \n"
                   "    pkhbt   r5, r3, r4, lsl #16 \n"
                   "    pkhtb   r4, r4, r3, asr #16 \n"
                   "    sxtb16  r3, r5          \n"
                   "    sxtb16  r5, r5, ror #8  \n"
                   "    smlad   r10, r3, r6, r10 \n"
                   "    smlad   r11, r5, r7, r11 \n"
                   "    sxtb16  r3, r4          \n"
                   "    sxtb16  r4, r4, ror #8  \n"
                   "    smlad   r12, r3, r8, r12 \n"
                   "    smlad   lr, r4, r9, lr  \n"
                   ".endm                       \n"
                   "2:  mote_two                \n"
                   "3:  mote_two                \n"
                   "    mote_two                \n"
                   "    mote_two                \n"
                   ".purgem mote_two            \n"
                   "    ldmia   r0!, {r3, r6, r7} \n"
                   "    ldr     r3, [r1, r3]    \n"
                   "    sxtb16  r4, r3          \n"
                   "    sxtb16  r3, r3, ror #8  \n"
                   "    smlabb  r10, r4, r6, r10 \n"
                   "    smlabb  r11, r3, r7, r11 \n"
                   "    smlatt  r12, r4, r6, r12 \n"
                   "    smlatt  lr, r3, r7, lr  \n"
                   ".macro mote_output acc      \n"
                   "    ldmia   r0!, {r3, r4, r5} \n"
                   "    add     r5, r5, \\acc, asr #31 \n"
                   "    smmlar  \\acc, \\acc, r3, r5 \n"
                   "    asr     \\acc, \\acc, r4 \n"
                   "    ssat    \\acc, #8, \\acc \n"
                   ".endm                       \n"
                   "    mote_output r10         \n"
                   "    mote_output r11         \n"
                   "    mote_output r12         \n"
                   "    mote_output lr          \n"
                   ".purgem mote_output         \n"
                   "    ldm     r0, {r3, r4, r5, r6, r7} \n"
                   "    strb    r10, [r3]       \n"
                   "    strb    r11, [r3, #1]   \n"
                   "    strb    r12, [r3, #2]   \n"
                   "    strb    lr, [r3, #3]    \n"
                   "    add     r3, r3, r4      \n"
                   "    str     r3, [r0]        \n"
                   "    add     r1, r1, r6      \n"
                   "    mov     r0, r7          \n"
                   "    cmp     r3, r5          \n"
                   "    bne     1b              \n"
                   : "+r"(at), "+r"(x), "+r"(skipped)
                   :
                   : "r3", "r4", "r5", "r6", "r7", "r8", "r9", "r10", "r11", "r12", "lr", "cc", "memory");
}

/* A depthwise convolution's shape. */
typedef struct {
    const mote_op_t *op;
    const mote_tensor_t *in, *out;
    const int8_t *input;
    int8_t *output;
    const mote_int8_constants_t *constants;
} depthwise_t;

/* Output pixels [begin, end) of a row or column, of which the taps [first, last) lie inside the input. */
typedef struct {
    uint32_t begin, end, first, last;
} stretch_t;

/* The stretch that begins at pixel `begin`, in one dimension. */
static stretch_t stretch(uint32_t begin, uint32_t in, uint32_t out, uint32_t kernel, uint32_t stride, uint32_t dilation,
                         uint32_t pad)
{
    stretch_t s = {begin, begin, 0, 0};
    for (; s.end < out; s.end++) {
        uint32_t first = 0, last = kernel;
        while (first < kernel && s.end * stride + first * dilation < pad) {
            first++;
        }
        while (last > first && s.end * stride + (last - 1) * dilation >= in + pad) {
            last--;
        }
        if (s.end > begin && (first != s.first || last != s.last)) {
            break;
        }
        s.first = first;
        s.last = last;
    }
    return s;
}

/* Adds the doubled weights of one tap, as int16, to every channel's word. */
static void spread(uint32_t to[CHANNELS], const int8_t *w, uint32_t shift)
{
    for (uint32_t c = 0; c < CHANNELS; c++) {
        to[c] |= (uint32_t)(uint16_t)(w[c] * 2) << shift;
    }
}

/* Fills in what depends on the channels c ... c + 3 and on which taps lie inside. Returns how many twos of taps less
 * than all there are. */
static uint32_t prepare(line_t *line, const depthwise_t *d, uint32_t c, const stretch_t *rows, const stretch_t *columns)
{
    const mote_op_t *op = d->op;
    const uint32_t channels = d->out->c, taps = (rows->last - rows->first) * (columns->last - columns->first);
    const uint32_t skipped = MOST_TAPS / 2 - taps / 2;
    const mote_requant_t *r = d->constants->requant + c;
    const int8_t *w = d->constants->weights + c;
    memset(line, 0, offsetof(line_t, requant));
    line->begin = line->head + skipped * (2 + CHANNELS);
    uint32_t *bias = line->begin, *two = line->begin + CHANNELS;
    for (uint32_t f = 0; f < CHANNELS; f++) {
        bias[f] = 2 * (uint32_t)r[f].bias;
        line->requant[f].multiplier = r[f].multiplier;
        line->requant[f].right = -r[f].shift;
        line->requant[f].offset = ((2 * d->out->zero_point + 1) * (1 << -r[f].shift)) >> 1;
    }
    uint32_t tap = 0;
    for (uint32_t i = 0; i < op->kernel_h; i++) {
        for (uint32_t j = 0; j < op->kernel_w; j++, w += channels) {
            if (i < rows->first || i >= rows->last || j < columns->first || j >= columns->last) {
                for (uint32_t f = 0; f < CHANNELS; f++) {
                    bias[f] += (uint32_t)(2 * w[f] * d->in->zero_point);
                }
                continue;
            }
            const uint32_t at =
                ((i - rows->first) * op->dilation_h * d->in->w + (j - columns->first) * op->dilation_w) * channels;
            if (tap == (taps & ~1u)) {
                uint32_t last[CHANNELS] = {0};
                spread(last, w, 0);
                line->at = at;
                line->last02 = last[0] | last[2] << 16;
                line->last13 = last[1] | last[3] << 16;
            } else {
                two[tap & 1u] = at;
                spread(two + 2, w, tap & 1u ? 16 : 0);
                two += tap & 1u ? 2 + CHANNELS : 0;
            }
            tap++;
        }
    }
    return skipped;
}

/* Channels c ... c + 3 of all pixels of whose windows the same taps lie inside. */
static void run_patch(const depthwise_t *d, uint32_t c, const stretch_t *rows, const stretch_t *columns)
{
    line_t line;
    const mote_op_t *op = d->op;
    const uint32_t channels = d->out->c, row = d->in->w * channels;
    const uint32_t skipped = prepare(&line, d, c, rows, columns);
    const int8_t *from = d->input + c;
    line.to_step = d->out->w * channels;
    line.from_step = 0;
    if (rows->first < rows->last && columns->first < columns->last) {
        line.from_step = op->stride_h * row;
        from += (rows->begin * op->stride_h + rows->first * op->dilation_h - op->pad_top) * row +
                (columns->begin * op->stride_w + columns->first * op->dilation_w - op->pad_left) * channels;
    }
    for (uint32_t x = columns->begin; x < columns->end; x++) {
        line.to = d->output + (rows->begin * d->out->w + x) * channels + c;
        line.end = line.to + (rows->end - rows->begin) * line.to_step;
        run_line(&line, from, skipped);
        from += line.from_step != 0 ? op->stride_w * channels : 0;
    }
}

/* 1 if no doubled sum can overflow. */
static int biases_fit(const mote_requant_t *r, uint32_t channels)
{
    for (uint32_t o = 0; o < channels; o++) {
        if (r[o].bias >= 1 << 29 || r[o].bias <= -(1 << 29)) {
            return 0;
        }
    }
    return 1;
}

int mote_int8_depthwise_fast(const mote_t *m, const mote_op_t *op, const mote_int8_constants_t *constants)
{
    const mote_tensor_t *in = mote_tensor(m, op->in), *out = mote_tensor(m, op->out);
    if (in->c != out->c || in->c % CHANNELS != 0 || op->kernel_h * op->kernel_w > MOST_TAPS ||
        !shifts_fit(constants->requant, out->c) || !biases_fit(constants->requant, out->c)) {
        return 0;
    }
    const depthwise_t d = {op, in, out, mote_read(m, op->in), mote_write(m, op->out), constants};
    stretch_t rows = {0, 0, 0, 0}, columns = {0, 0, 0, 0};
    for (; rows.end < out->h;) {
        rows = stretch(rows.end, in->h, out->h, op->kernel_h, op->stride_h, op->dilation_h, op->pad_top);
        for (columns.end = 0; columns.end < out->w;) {
            columns = stretch(columns.end, in->w, out->w, op->kernel_w, op->stride_w, op->dilation_w, op->pad_left);
            for (uint32_t c = 0; c < out->c; c += CHANNELS) {
                run_patch(&d, c, &rows, &columns);
            }
        }
    }
    if (constants->range.low != INT8_MIN || constants->range.high != INT8_MAX) {
        clamp(d.output, mote_size(out), constants->range);
    }
    return 1;
}

#endif
