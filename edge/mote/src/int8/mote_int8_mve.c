/* int8 depthwise convolution with the vectors of Armv8.1-M (Helium; Cortex-M55): eight channels at a time. Convolutions
 * and dense layers take theirs from mote_int8_dots.h. */
#include "mote_kernel_list.h"

#include "mote_int8_dots.h"

#ifdef MOTE_INT8_MVE

/* Eight channels' sums, or one thing of eight requants: of the even channels and of the odd ones. */
typedef struct {
    int32x4_t even, odd;
} pair_t;

/* A number of each of n channels, of which the first is at `at`. */
static inline pair_t each(const int32_t *at, uint32_t n)
{
    const uint32x4_t places = vmulq_n_u32(vidupq_n_u32(0, 2), sizeof(mote_requant_t) / sizeof(int32_t));
    const int32_t *odd = at + sizeof(mote_requant_t) / sizeof(int32_t);
    pair_t found = {vldrwq_gather_shifted_offset_z_s32(at, places, vctp32q((n + 1) / 2)),
                    vldrwq_gather_shifted_offset_z_s32(odd, places, vctp32q(n / 2))};
    return found;
}

static inline pair_t with_products(pair_t sums, int16x8_t a, int16x8_t b)
{
    sums.even = vaddq_s32(sums.even, vmullbq_int_s16(a, b));
    sums.odd = vaddq_s32(sums.odd, vmulltq_int_s16(a, b));
    return sums;
}

/* The taps [first, last) of a window's rows or columns that lie inside the input. */
typedef struct {
    uint32_t first, last;
} span_t;

static span_t inside(int32_t start, uint32_t taps, int32_t dilation, int32_t size)
{
    span_t span = {0, taps};
    while (span.first < taps && start + (int32_t)span.first * dilation < 0) {
        span.first++;
    }
    while (span.last > span.first && start + (int32_t)(span.last - 1) * dilation >= size) {
        span.last--;
    }
    return span;
}

/* At most eight channels of a pixel, those of the predicate `some`. `first` is the input's first tap, which may lie
 * outside. */
static inline pair_t window(const mote_op_t *op, const mote_tensor_t *in, pair_t sums, const int8_t *w,
                            const int8_t *input, int32_t first, span_t rows, span_t columns, mve_pred16_t some)
{
    const int32_t channels = in->c, step = op->dilation_w * channels;
    const int16x8_t zeros = vdupq_n_s16(in->zero_point);
    for (uint32_t i = 0; i < op->kernel_h; i++, first += op->dilation_h * in->w * channels) {
        const span_t none = {0, 0}, here = i >= rows.first && i < rows.last ? columns : none;
        const int8_t *x = input + first + (int32_t)here.first * step;
        uint32_t j = 0;
        for (; j < here.first; j++, w += channels) {
            sums = with_products(sums, vldrbq_z_s16(w, some), zeros);
        }
        for (; j < here.last; j++, w += channels, x += step) {
            sums = with_products(sums, vldrbq_z_s16(w, some), vldrbq_z_s16(x, some));
        }
        for (; j < op->kernel_w; j++, w += channels) {
            sums = with_products(sums, vldrbq_z_s16(w, some), zeros);
        }
    }
    return sums;
}

int mote_int8_depthwise_fast(const mote_t *m, const mote_op_t *op)
{
    const mote_tensor_t *in = mote_tensor(m, op->in), *out = mote_tensor(m, op->out);
    const mote_int8_constants_t constants = mote_int8_constants(m, op);
    const int8_t *input = mote_read(m, op->in);
    int8_t *to = mote_write(m, op->out);
    const uint32_t channels = out->c;
    if (in->c != channels) {
        return 0;
    }
    for (int32_t i = 0; i < out->h; i++) {
        const int32_t y = i * op->stride_h - op->pad_top;
        const span_t rows = inside(y, op->kernel_h, op->dilation_h, in->h);
        for (int32_t j = 0; j < out->w; j++, to += channels) {
            const int32_t x = j * op->stride_w - op->pad_left, first = (y * in->w + x) * (int32_t)channels;
            const span_t columns = inside(x, op->kernel_w, op->dilation_w, in->w);
            for (uint32_t c = 0; c < channels; c += 8) {
                const uint32_t n = channels - c < 8 ? channels - c : 8;
                const mve_pred16_t some = vctp16q(n);
                const mote_requant_t *r = constants.requant + c;
                const pair_t sums = window(op, in, each(&r->bias, n), constants.weights + c, input, first + (int32_t)c,
                                           rows, columns, some);
                const pair_t multiplier = each(&r->multiplier, n), shift = each(&r->shift, n);
                const int32x4_t even =
                    mote_int8_outputs(sums.even, multiplier.even, shift.even, out->zero_point, constants.range);
                const int32x4_t odd =
                    mote_int8_outputs(sums.odd, multiplier.odd, shift.odd, out->zero_point, constants.range);
                vstrbq_p_s16(to + c, vmovntq_s32(vmovnbq_s32(vdupq_n_s16(0), even), odd), some);
            }
        }
    }
    return 1;
}

#endif
