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

/* 1 if an output can be computed as above. */
static int shift_fits(const mote_requant_t *r)
{
    return r->shift <= -1 && r->shift >= -20;
}

enum { PIXELS = 4 };

/* Behind four pixels' windows: what the loop over the filters needs. Four taps of the four pixels are eight words: of
 * every pixel taps 0 and 2, then 1 and 3, as int16. Where their number is no multiple of four, zeros lie ahead of the
 * first: they meet weights of the filter before, or what lies ahead of all weights. */
typedef struct {
    const uint32_t *taps;
    uint32_t entry; /* where the first round through the unrolled loop starts */
    uint32_t zeros; /* ahead of the first tap */
    int32_t unit;   /* 2 zero_point + 1 */
    const mote_requant_t *end;
    int8_t *to;
    uint32_t pixel; /* bytes from pixel to pixel */
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
                   "    str     r4, [r0, #4]    \n"
                   "1:  ldrd    r1, r4, [r0]    \n"
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
                   "3:  mote_four               \n"
                   "    mote_four               \n"
                   "    mote_four               \n"
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
                   "    ldrd    r8, r6, [r0, #8] \n"
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
                   "    add     r4, r0, #16     \n"
                   "    ldm     r4, {r1, r8, r9} \n"
                   "    add     r4, r8, r9, lsl #1 \n"
                   "    strb    r12, [r4]       \n"
                   "    strb    lr, [r4, r9]    \n"
                   "    strb    r11, [r8, r9]   \n"
                   "    strb    r10, [r8], #1   \n"
                   "    str     r8, [r0, #20]   \n"
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
static __attribute__((noinline)) void put(taps_t *taps, const int8_t *x, uint32_t step, uint32_t n)
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

static void clamp(int8_t *y, uint32_t n, mote_range_t range)
{
    for (; n > 0; n--, y++) {
        *y = mote_clamped(*y, range);
    }
}

/* The first of the filters from o on whose shift does not fit. */
static uint32_t fitting(const mote_requant_t *r, uint32_t o, uint32_t channels)
{
    while (o < channels && shift_fits(r + o)) {
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
            run_filters(group, weights, r + o, -((row + 3) >> 2) & 3u);
            o = end;
        } else {
            run_filter(group, weights, r + o, row, zero_point, constants->range);
            end = fitting(r, ++o, channels);
        }
    }
    if (constants->range.low != INT8_MIN || constants->range.high != INT8_MAX) {
        clamp(to, PIXELS * channels, constants->range);
    }
}

/* Bytes of taps of four pixels, and a group_t, that a function takes of the stack. Larger windows are gathered at the
 * end of the output, as long as that is not written yet. */
enum { OWN_TAPS = 64, OWN = 2 * PIXELS * OWN_TAPS + sizeof(group_t) };

uint32_t mote_int8_conv2d_fast(const mote_t *m, const mote_op_t *op, const mote_int8_constants_t *constants)
{
    const mote_tensor_t *in = mote_tensor(m, op->in), *out = mote_tensor(m, op->out);
    const uint32_t row = (uint32_t)op->kernel_h * op->kernel_w * in->c, zeros = -row & 3u, channels = out->c;
    const uint32_t scratch = 2 * PIXELS * (row + zeros) + sizeof(group_t), size = mote_size(out) & ~3u;
    uint32_t own[OWN / sizeof(uint32_t)], pixels = (uint32_t)out->h * out->w;
    int8_t *to = mote_write(m, op->out), *end = (int8_t *)own + sizeof own;
    if (scratch > sizeof own) {
        pixels = scratch < size ? (size - scratch) / channels : 0;
        end = to + size;
    }
    const void *ahead = constants->requant + channels;
    if (pixels < PIXELS || (zeros != 0 && constants->weights != ahead)) {
        return 0;
    }
    group_t *group = (group_t *)(void *)(end - sizeof(group_t));
    uint32_t *taps = (uint32_t *)(void *)(end - scratch);
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

enum { CHANNELS = 4, TAPS = 9 };

/* Two taps of four channels: where in the input, from the first tap inside it on, and both weights of each channel,
 * doubled, as int16. */
typedef struct {
    uint32_t at[2];
    uint32_t weights[CHANNELS];
} two_t;

/* All that a line of pixels needs, in the order of its use. Of the twos, the last are used; the first of those has the
 * biases, doubled, ahead of it. If the number of taps is even, the last one has the weights 0. */
typedef struct {
    uint32_t bias[CHANNELS];
    two_t twos[TAPS / 2];
    uint32_t at;
    uint32_t even, odd; /* the last tap's weights: of channels 0 and 2, 1 and 3 */
    struct {
        int32_t multiplier, right, offset; /* offset: zero_point * 2^right + 2^(right - 1) */
    } requant[CHANNELS];
    int8_t *to;
    uint32_t to_step;
    int8_t *end;
    uint32_t from_step;
    uint32_t *begin; /* the biases */
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

/* Output pixels [begin, end) of a row or column, of whose windows the taps [first, last) lie inside the input. */
typedef struct {
    uint16_t begin, end, first, last;
} stretch_t;

/* The stretch that begins at pixel `begin`, in one dimension. */
static stretch_t stretch(int32_t begin, int32_t in, int32_t out, int32_t kernel, int32_t stride, int32_t pad)
{
    const int32_t start = begin * stride - pad;
    const int32_t first = start < 0 ? -start : 0, last = start + kernel > in ? in - start : kernel;
    int32_t end = begin + 1;
    if (first == 0 && last == kernel) {
        end = (in - kernel + pad) / stride + 1;
    }
    stretch_t s = {(uint16_t)begin, (uint16_t)(end < out ? end : out), (uint16_t)first, (uint16_t)last};
    return s;
}

/* Output pixels of whose windows the same taps lie inside the input. */
typedef struct {
    uint32_t from, to;      /* elements ahead of the first pixel's first tap inside, and of the first pixel */
    uint32_t rows, columns; /* of pixels */
    uint32_t inside, taps;  /* how many taps lie inside, how many there are */
    uint32_t weight[TAPS];  /* where the weights of a tap are: first of the taps inside, then of the others */
    uint32_t at[TAPS];      /* where a tap inside is in the input, from the first one on */
} patch_t;

static void lay_out(patch_t *patch, const mote_tensor_t *in, const mote_tensor_t *out, const mote_op_t *op,
                    stretch_t rows, stretch_t columns)
{
    const uint32_t channels = in->c;
    const uint32_t y = (uint32_t)(rows.begin * op->stride_h + rows.first - op->pad_top);
    const uint32_t x = (uint32_t)(columns.begin * op->stride_w + columns.first - op->pad_left);
    patch->from = (y * in->w + x) * channels;
    patch->to = ((uint32_t)rows.begin * out->w + columns.begin) * channels;
    patch->rows = (uint32_t)rows.end - rows.begin;
    patch->columns = (uint32_t)columns.end - columns.begin;
    patch->taps = (uint32_t)op->kernel_h * op->kernel_w;
    patch->inside = 0;
    uint32_t weight = 0, outside = patch->taps;
    for (uint32_t i = 0; i < op->kernel_h; i++) {
        for (uint32_t j = 0; j < op->kernel_w; j++, weight += channels) {
            if (i >= rows.first && i < rows.last && j >= columns.first && j < columns.last) {
                patch->weight[patch->inside] = weight;
                patch->at[patch->inside++] = ((i - rows.first) * in->w + j - columns.first) * channels;
            } else {
                patch->weight[--outside] = weight;
            }
        }
    }
}

/* Bytes 0 and 2 of a word, doubled, as two int16; and bytes 1 and 3. */
static inline uint32_t doubled_even(uint32_t word)
{
    return (uint32_t)__sadd16(mote_even(word), mote_even(word));
}

static inline uint32_t doubled_odd(uint32_t word)
{
    return (uint32_t)__sadd16(mote_odd(word), mote_odd(word));
}

/* Makes ready what a line of four channels needs: w and r are theirs. Returns how many twos less than all there are. */
static uint32_t prepare(line_t *line, const patch_t *patch, const int8_t *w, const mote_requant_t *r, int32_t zero_in,
                        int32_t zero_out)
{
    int32_t a = 2 * r[0].bias, b = 2 * r[1].bias, c = 2 * r[2].bias, d = 2 * r[3].bias;
    for (uint32_t k = patch->inside; k < patch->taps; k++) {
        const uint32_t word = mote_word(w + patch->weight[k]), even = doubled_even(word), odd = doubled_odd(word);
        a = __smlabb((int32_t)even, zero_in, a);
        b = __smlabb((int32_t)odd, zero_in, b);
        c = __smlatb((int32_t)even, zero_in, c);
        d = __smlatb((int32_t)odd, zero_in, d);
    }
    const uint32_t twos = patch->inside / 2, skipped = TAPS / 2 - twos;
    two_t *two = line->twos + skipped, *end = line->twos + TAPS / 2;
    uint32_t *bias = line->begin = line->bias + skipped * sizeof(two_t) / sizeof(uint32_t);
    bias[0] = (uint32_t)a;
    bias[1] = (uint32_t)b;
    bias[2] = (uint32_t)c;
    bias[3] = (uint32_t)d;
    const uint32_t *weight = patch->weight, *at = patch->at;
    for (; two != end; two++, weight += 2, at += 2) {
        const uint32_t one = mote_word(w + weight[0]), other = mote_word(w + weight[1]);
        uint32_t low, high;
        __asm("pkhbt %0, %1, %2, lsl #16" : "=r"(low) : "r"(one), "r"(other));
        __asm("pkhtb %0, %1, %2, asr #16" : "=r"(high) : "r"(other), "r"(one));
        two->at[0] = at[0];
        two->at[1] = at[1];
        two->weights[0] = doubled_even(low);
        two->weights[1] = doubled_odd(low);
        two->weights[2] = doubled_even(high);
        two->weights[3] = doubled_odd(high);
    }
    line->at = line->even = line->odd = 0;
    if ((patch->inside & 1u) != 0) {
        const uint32_t word = mote_word(w + *weight);
        line->at = *at;
        line->even = doubled_even(word);
        line->odd = doubled_odd(word);
    }
    for (uint32_t f = 0; f < CHANNELS; f++) {
        line->requant[f].multiplier = r[f].multiplier;
        line->requant[f].right = -r[f].shift;
        line->requant[f].offset = ((2 * zero_out + 1) * (1 << -r[f].shift)) >> 1;
    }
    return skipped;
}

/* 1 if four channels' outputs can be computed as above, and no doubled sum can overflow. */
static int all_fit(const mote_requant_t *r)
{
    for (uint32_t f = 0; f < CHANNELS; f++) {
        if (!shift_fits(r + f) || r[f].bias >= 1 << 29 || r[f].bias <= -(1 << 29)) {
            return 0;
        }
    }
    return 1;
}

/* All channels that can be computed as above. */
static void run_patch(const mote_t *m, const mote_op_t *op, const mote_int8_constants_t *constants,
                      const patch_t *patch)
{
    const mote_tensor_t *in = mote_tensor(m, op->in), *out = mote_tensor(m, op->out);
    const int8_t *from = (const int8_t *)mote_read(m, op->in) + patch->from;
    int8_t *to = (int8_t *)mote_write(m, op->out) + patch->to;
    const uint32_t channels = out->c, step = op->stride_w * channels;
    line_t line;
    line.to_step = out->w * channels;
    line.from_step = op->stride_h * in->w * channels;
    for (uint32_t c = 0; c < channels; c += CHANNELS) {
        const mote_requant_t *r = constants->requant + c;
        if (!all_fit(r)) {
            continue;
        }
        const uint32_t skipped = prepare(&line, patch, constants->weights + c, r, in->zero_point, out->zero_point);
        for (uint32_t i = 0; i < patch->columns; i++) {
            line.to = to + i * channels + c;
            line.end = line.to + patch->rows * line.to_step;
            run_line(&line, from + i * step + c, skipped);
        }
    }
}

int mote_int8_depthwise_fast(const mote_t *m, const mote_op_t *op)
{
    const mote_tensor_t *in = mote_tensor(m, op->in), *out = mote_tensor(m, op->out);
    const mote_int8_constants_t constants = mote_int8_constants(m, op);
    if (in->c != out->c || in->c % CHANNELS != 0 || op->kernel_h * op->kernel_w > TAPS || op->dilation_h != 1 ||
        op->dilation_w != 1) {
        return 0;
    }
    stretch_t rows = {0, 0, 0, 0}, columns = {0, 0, 0, 0};
    while (rows.end < out->h) {
        rows = stretch(rows.end, in->h, out->h, op->kernel_h, op->stride_h, op->pad_top);
        for (columns.end = 0; columns.end < out->w;) {
            patch_t patch;
            columns = stretch(columns.end, in->w, out->w, op->kernel_w, op->stride_w, op->pad_left);
            lay_out(&patch, in, out, op, rows, columns);
            run_patch(m, op, &constants, &patch);
        }
    }
    if (constants.range.low != INT8_MIN || constants.range.high != INT8_MAX) {
        clamp(mote_write(m, op->out), mote_size(out), constants.range);
    }
    for (uint32_t c = 0; c < out->c; c += CHANNELS) {
        if (!all_fit(constants.requant + c)) {
            mote_int8_depthwise_part(m, op, constants.range, constants.requant + c, constants.weights + c, out->c, c,
                                     CHANNELS);
        }
    }
    return 1;
}

#endif
