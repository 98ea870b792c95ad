/* int8 depthwise convolutions with the dual multiply-accumulate of Armv7E-M (Cortex-M4, M7) and Armv8-M (M33): four
 * channels at a time, two taps of a channel by one SMLAD, and then the outputs as mote_int8_dots.h describes. */
#include "mote_kernel_list.h"

#include "mote_int8_dots.h"

#ifdef MOTE_INT8_DSP

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
static void run_line(const line_t *line, const int8_t *from, uint32_t skipped_twos)
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

/* The stretch behind s, in one dimension. */
static inline void go_on(stretch_t *s, int32_t in, int32_t out, int32_t kernel, int32_t stride, int32_t pad)
{
    const int32_t start = s->end * stride - pad;
    const int32_t first = start < 0 ? -start : 0, last = start + kernel > in ? in - start : kernel;
    int32_t end = s->end + 1;
    if (first == 0 && last == kernel) {
        end = (in - kernel + pad) / stride + 1;
    }
    s->begin = s->end;
    s->end = (uint16_t)(end < out ? end : out);
    s->first = (uint16_t)first;
    s->last = (uint16_t)last;
}

static MOTE_APART void go_down(stretch_t *rows, const mote_t *m, const mote_op_t *op)
{
    go_on(rows, mote_tensor(m, op->in)->h, mote_tensor(m, op->out)->h, op->kernel_h, op->stride_h, op->pad_top);
}

static MOTE_APART void go_right(stretch_t *columns, const mote_t *m, const mote_op_t *op)
{
    go_on(columns, mote_tensor(m, op->in)->w, mote_tensor(m, op->out)->w, op->kernel_w, op->stride_w, op->pad_left);
}

/* Output pixels of whose windows the same taps lie inside the input. */
typedef struct {
    line_t line;
    const int8_t *from; /* the first pixel's first tap inside, and the first pixel: of channel 0 */
    int8_t *to;
    uint16_t rows, columns; /* of pixels */
    uint8_t inside, taps;   /* how many taps lie inside, how many there are */
    uint8_t tap[TAPS];      /* their numbers: first of the taps inside, then of the others */
} patch_t;

/* Where the pixels are, and their windows. */
static MOTE_APART void place(patch_t *patch, const mote_t *m, const mote_op_t *op, const stretch_t *rows,
                             const stretch_t *columns)
{
    const mote_tensor_t *in = mote_tensor(m, op->in), *out = mote_tensor(m, op->out);
    const uint32_t channels = in->c;
    const uint32_t y = (uint32_t)(rows->begin * op->stride_h + rows->first - op->pad_top);
    const uint32_t x = (uint32_t)(columns->begin * op->stride_w + columns->first - op->pad_left);
    patch->from = (const int8_t *)mote_read(m, op->in) + (y * in->w + x) * channels;
    patch->to = (int8_t *)mote_write(m, op->out) + ((uint32_t)rows->begin * out->w + columns->begin) * channels;
    patch->line.to_step = out->w * channels;
    patch->line.from_step = op->stride_h * in->w * channels;
    patch->rows = (uint16_t)(rows->end - rows->begin);
    patch->columns = (uint16_t)(columns->end - columns->begin);
    patch->taps = (uint8_t)(op->kernel_h * op->kernel_w);
    patch->inside = (uint8_t)((rows->last - rows->first) * (columns->last - columns->first));
}

/* Where the taps are. */
static MOTE_APART void lay_out(patch_t *patch, const mote_tensor_t *in, const mote_op_t *op, const stretch_t *rows,
                               const stretch_t *columns)
{
    enum { TWO = sizeof(two_t) / sizeof(uint32_t) };
    const uint32_t width = op->kernel_w, channels = in->c;
    uint32_t *begin = patch->line.begin = patch->line.bias + (TAPS / 2 - patch->inside / 2) * TWO;
    uint32_t inside = 0, outside = patch->taps;
    patch->line.at = patch->line.even = patch->line.odd = 0;
    for (uint32_t tap = 0; tap < patch->taps; tap++) {
        const uint32_t i = tap / width, j = tap % width;
        if (i >= rows->first && i < rows->last && j >= columns->first && j < columns->last) {
            begin[CHANNELS + inside / 2 * TWO + inside % 2] =
                ((i - rows->first) * in->w + j - columns->first) * channels; /* that of a last one is the line's */
            patch->tap[inside++] = (uint8_t)tap;
        } else {
            patch->tap[--outside] = (uint8_t)tap;
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

/* 1 if four channels' outputs can be computed as above, and no doubled sum can overflow. */
static int all_fit(const mote_requant_t *r)
{
    for (uint32_t f = 0; f < CHANNELS; f++) {
        if (!mote_shift_fits(r + f) || r[f].bias >= 1 << 29 || r[f].bias <= -(1 << 29)) {
            return 0;
        }
    }
    return 1;
}

/* Makes ready what a line of the four channels from `first` on needs. 0 if they cannot be computed as above. */
static MOTE_APART int prepare(patch_t *patch, const mote_t *m, const mote_op_t *op, uint32_t first)
{
    const mote_tensor_t *in = mote_tensor(m, op->in);
    const mote_int8_constants_t constants = mote_int8_constants(m, op);
    const mote_requant_t *r = constants.requant + first;
    const int8_t *w = constants.weights + first;
    if (!all_fit(r)) {
        return 0;
    }
    line_t *line = &patch->line;
    const uint32_t channels = in->c;
    int32_t a = 2 * r[0].bias, b = 2 * r[1].bias, c = 2 * r[2].bias, d = 2 * r[3].bias;
    for (uint32_t k = patch->inside; k < patch->taps; k++) {
        const uint32_t word = mote_word(w + patch->tap[k] * channels), even = doubled_even(word);
        const uint32_t odd = doubled_odd(word);
        a = __smlabb((int32_t)even, in->zero_point, a);
        b = __smlabb((int32_t)odd, in->zero_point, b);
        c = __smlatb((int32_t)even, in->zero_point, c);
        d = __smlatb((int32_t)odd, in->zero_point, d);
    }
    uint32_t *bias = line->begin;
    bias[0] = (uint32_t)a;
    bias[1] = (uint32_t)b;
    bias[2] = (uint32_t)c;
    bias[3] = (uint32_t)d;
    const uint8_t *tap = patch->tap;
    for (two_t *two = (two_t *)(void *)(bias + CHANNELS); two != line->twos + TAPS / 2; two++, tap += 2) {
        const uint32_t one = mote_word(w + tap[0] * channels), other = mote_word(w + tap[1] * channels);
        uint32_t low, high;
        __asm("pkhbt %0, %1, %2, lsl #16" : "=r"(low) : "r"(one), "r"(other));
        __asm("pkhtb %0, %1, %2, asr #16" : "=r"(high) : "r"(other), "r"(one));
        two->weights[0] = doubled_even(low);
        two->weights[1] = doubled_odd(low);
        two->weights[2] = doubled_even(high);
        two->weights[3] = doubled_odd(high);
    }
    if ((patch->inside & 1u) != 0) {
        const uint32_t word = mote_word(w + *tap * channels);
        line->even = doubled_even(word);
        line->odd = doubled_odd(word);
    }
    const int32_t unit = 2 * mote_tensor(m, op->out)->zero_point + 1;
    for (uint32_t f = 0; f < CHANNELS; f++) {
        line->requant[f].multiplier = r[f].multiplier;
        line->requant[f].right = -r[f].shift;
        line->requant[f].offset = (unit * (1 << -r[f].shift)) >> 1;
    }
    return 1;
}

/* The four channels from `first` on, that are made ready, of pixels that begin `step` apart. */
static MOTE_APART void run_lines(patch_t *patch, uint32_t first, uint32_t channels, uint32_t step)
{
    const int8_t *from = patch->from + first;
    int8_t *to = patch->to + first, *end = to + patch->columns * channels;
    for (; to != end; to += channels, from += step) {
        patch->line.to = to;
        patch->line.end = to + patch->rows * patch->line.to_step;
        run_line(&patch->line, from, TAPS / 2 - patch->inside / 2);
    }
}

/* All channels that can be computed as above. */
static MOTE_APART void run_patches(const mote_t *m, const mote_op_t *op)
{
    const mote_tensor_t *in = mote_tensor(m, op->in), *out = mote_tensor(m, op->out);
    stretch_t rows = {0, 0, 0, 0}, columns = {0, 0, 0, 0};
    while (rows.end < out->h) {
        go_down(&rows, m, op);
        for (columns.end = 0; columns.end < out->w;) {
            patch_t patch;
            go_right(&columns, m, op);
            place(&patch, m, op, &rows, &columns);
            lay_out(&patch, in, op, &rows, &columns);
            for (uint32_t c = 0; c < in->c; c += CHANNELS) {
                if (prepare(&patch, m, op, c)) {
                    run_lines(&patch, c, in->c, op->stride_w * in->c);
                }
            }
        }
    }
}

/* What run_patches leaves. */
static MOTE_APART void run_others(const mote_t *m, const mote_op_t *op)
{
    const mote_tensor_t *out = mote_tensor(m, op->out);
    mote_int8_constants_t four = mote_int8_constants(m, op);
    if (four.range.low != INT8_MIN || four.range.high != INT8_MAX) {
        mote_clamp(mote_write(m, op->out), mote_size(out), four.range);
    }
    for (uint32_t c = 0; c < out->c; c += CHANNELS, four.requant += CHANNELS, four.weights += CHANNELS) {
        if (!all_fit(four.requant)) {
            mote_int8_depthwise_part(m, op, &four, out->c, c, CHANNELS);
        }
    }
}

int mote_int8_depthwise_fast(const mote_t *m, const mote_op_t *op)
{
    const mote_tensor_t *in = mote_tensor(m, op->in);
    if (in->c != mote_tensor(m, op->out)->c || in->c % CHANNELS != 0 || op->kernel_h * op->kernel_w > TAPS ||
        op->dilation_h != 1 || op->dilation_w != 1) {
        return 0;
    }
    run_patches(m, op);
    run_others(m, op);
    return 1;
}

#endif
