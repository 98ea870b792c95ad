/* Depthwise convolution, float32: every output channel is a filter over one input channel.
 *
 * y[oy][ox][o] = b[o] + sum over ky, kx of w[ky][kx][o] x[oy * stride + ky * dilation - pad][...][o * in_c / out_c],
 * tap by tap from the top left. */
#include <string.h>

#include "mote_kernel_list.h"
#include "mote_vector.h"
#include "mote_window.h"

static uint32_t weights(const mote_t *m, const mote_op_t *op)
{
    return (uint32_t)op->kernel_h * op->kernel_w * mote_tensor(m, op->out)->c;
}

int mote_depthwise_check(const mote_t *m, const mote_op_t *op)
{
    uint32_t in_c = mote_tensor(m, op->in)->c, out_c = mote_tensor(m, op->out)->c;
    return mote_floats(m, op) && out_c % in_c == 0 && mote_windows_fit(m, op) &&
           mote_weights_fit(m, op, (uint64_t)op->kernel_h * op->kernel_w * out_c, out_c, 0);
}

#define S0_TO_S23                                                                                                      \
    "s0", "s1", "s2", "s3", "s4", "s5", "s6", "s7", "s8", "s9", "s10", "s11", "s12", "s13", "s14", "s15", "s16",       \
        "s17", "s18", "s19", "s20", "s21", "s22", "s23"

/* y += a * x, element by element */
static void add_products(float *y, const float *a, const float *x, uint32_t n)
{
#if MOTE_HAS_VLDM
    if (n >= 8) {
        uint32_t eights = n >> 3;
        __asm__ volatile("1:\n\t"
                         "vldmia %[a]!, {s0-s7}\n\t"
                         "vldmia %[x]!, {s8-s15}\n\t"
                         "vldmia %[y], {s16-s23}\n\t"
                         "subs %[eights], #1\n\t"
                         "vmla.f32 s16, s0, s8\n\t"
                         "vmla.f32 s17, s1, s9\n\t"
                         "vmla.f32 s18, s2, s10\n\t"
                         "vmla.f32 s19, s3, s11\n\t"
                         "vmla.f32 s20, s4, s12\n\t"
                         "vmla.f32 s21, s5, s13\n\t"
                         "vmla.f32 s22, s6, s14\n\t"
                         "vmla.f32 s23, s7, s15\n\t"
                         "vstmia %[y]!, {s16-s23}\n\t"
                         "bne 1b"
                         : [y] "+r"(y), [a] "+r"(a), [x] "+r"(x), [eights] "+r"(eights)
                         :
                         : S0_TO_S23, "cc", "memory");
        n &= 7;
    }
#elif MOTE_HAS_LANES
    for (; n >= 4; n -= 4, y += 4, a += 4, x += 4) {
        mote_store_lanes(y, mote_load_lanes(y) + mote_load_lanes(a) * mote_load_lanes(x));
    }
#endif
    for (; n > 0; n--) {
        *y++ += *a++ * *x++;
    }
}

/* w += (step * d) * x, element by element */
static void add_scaled_products(float *w, float step, const float *d, const float *x, uint32_t n)
{
#if MOTE_HAS_VLDM
    if (n >= 8) {
        uint32_t eights = n >> 3;
        __asm__ volatile("1:\n\t"
                         "vldmia %[d]!, {s0-s7}\n\t"
                         "vldmia %[x]!, {s8-s15}\n\t"
                         "vldmia %[w], {s16-s23}\n\t"
                         "subs %[eights], #1\n\t"
                         "vmul.f32 s0, %[step], s0\n\t"
                         "vmul.f32 s1, %[step], s1\n\t"
                         "vmul.f32 s2, %[step], s2\n\t"
                         "vmul.f32 s3, %[step], s3\n\t"
                         "vmul.f32 s4, %[step], s4\n\t"
                         "vmul.f32 s5, %[step], s5\n\t"
                         "vmul.f32 s6, %[step], s6\n\t"
                         "vmul.f32 s7, %[step], s7\n\t"
                         "vmla.f32 s16, s0, s8\n\t"
                         "vmla.f32 s17, s1, s9\n\t"
                         "vmla.f32 s18, s2, s10\n\t"
                         "vmla.f32 s19, s3, s11\n\t"
                         "vmla.f32 s20, s4, s12\n\t"
                         "vmla.f32 s21, s5, s13\n\t"
                         "vmla.f32 s22, s6, s14\n\t"
                         "vmla.f32 s23, s7, s15\n\t"
                         "vstmia %[w]!, {s16-s23}\n\t"
                         "bne 1b"
                         : [w] "+r"(w), [d] "+r"(d), [x] "+r"(x), [eights] "+r"(eights)
                         : [step] "t"(step)
                         : S0_TO_S23, "cc", "memory");
        n &= 7;
    }
#elif MOTE_HAS_LANES
    for (; n >= 4; n -= 4, w += 4, d += 4, x += 4) {
        mote_store_lanes(w, mote_load_lanes(w) + step * mote_load_lanes(d) * mote_load_lanes(x));
    }
#endif
    for (; n > 0; n--) {
        *w++ += step * *d++ * *x++;
    }
}

/* y[o] += w[o] * x[o / multiplier] */
static void add_tap(float *y, const float *w, const float *x, uint32_t n, uint32_t multiplier)
{
    if (multiplier == 1) {
        add_products(y, w, x, n);
        return;
    }
    for (; n > 0; n--, x++) {
        for (uint32_t q = 0; q < multiplier; q++) {
            *y++ += *w++ * *x;
        }
    }
}

void mote_depthwise(const mote_t *m, const mote_op_t *op)
{
    const mote_tensor_t *in = mote_tensor(m, op->in), *out = mote_tensor(m, op->out);
    const mote_weights_t p = mote_weights(m, op, weights(m, op), 0);
    const float *x = mote_read(m, op->in);
    float *y = mote_write(m, op->out);
    uint32_t c = in->c, multiplier = out->c / c;
    for (uint32_t oy = 0; oy < out->h; oy++) {
        mote_window_t v = mote_rows_of(op, in, oy);
        for (uint32_t ox = 0; ox < out->w; ox++, y += out->c) {
            mote_window_t h = mote_columns_of(op, in, ox);
            memmove(y, p.b, out->c * sizeof *y);
            for (uint32_t ky = 0; ky < v.count; ky++) {
                const float *w = p.w + ((v.skipped + ky) * op->kernel_w + h.skipped) * out->c;
                const float *row = x + ((v.first + ky * v.step) * in->w + h.first) * c;
                for (uint32_t kx = 0; kx < h.count; kx++, w += out->c) {
                    add_tap(y, w, row + kx * h.step * c, c, multiplier);
                }
            }
        }
    }
}

/* x[o / multiplier] += w[o] * d[o] */
static void back_tap(float *x, const float *w, const float *d, uint32_t n, uint32_t multiplier)
{
    if (multiplier == 1) {
        add_products(x, w, d, n);
        return;
    }
    for (; n > 0; n--, x++) {
        for (uint32_t q = 0; q < multiplier; q++) {
            *x += *w++ * *d++;
        }
    }
}

/* w[o] += step * d[o] * x[o / multiplier] */
static void learn_tap(float *w, float step, const float *d, const float *x, uint32_t n, uint32_t multiplier)
{
    if (multiplier == 1) {
        add_scaled_products(w, step, d, x, n);
        return;
    }
    for (; n > 0; n--, x++) {
        for (uint32_t q = 0; q < multiplier; q++) {
            *w++ += step * *d++ * *x;
        }
    }
}

/* All of dx is computed before any weight changes: each is used at many places. */
void mote_depthwise_back(mote_t *m, const mote_op_t *op)
{
    const mote_tensor_t *in = mote_tensor(m, op->in), *out = mote_tensor(m, op->out);
    const mote_weights_t p = mote_weights(m, op, weights(m, op), 0);
    const float *x = mote_read(m, op->in), *dy = mote_read(m, op->dout);
    float *dx = mote_begun_din(m, op);
    uint32_t c = in->c, multiplier = out->c / c, places = (uint32_t)out->h * out->w;
    for (int learns = dx == NULL; learns < 1 + (p.dw != NULL); learns++) {
        const float *d = dy;
        for (uint32_t oy = 0; oy < out->h; oy++) {
            mote_window_t v = mote_rows_of(op, in, oy);
            for (uint32_t ox = 0; ox < out->w; ox++, d += out->c) {
                mote_window_t h = mote_columns_of(op, in, ox);
                for (uint32_t ky = 0; ky < v.count; ky++) {
                    uint32_t w = ((v.skipped + ky) * op->kernel_w + h.skipped) * out->c;
                    uint32_t at = ((v.first + ky * v.step) * in->w + h.first) * c;
                    for (uint32_t kx = 0; kx < h.count; kx++, w += out->c, at += h.step * c) {
                        if (learns) {
                            learn_tap(p.dw + w, m->step, d, x + at, c, multiplier);
                        } else {
                            back_tap(dx + at, p.w + w, d, c, multiplier);
                        }
                    }
                }
            }
        }
    }
    for (const float *d = dy; p.db != NULL && places > 0; places--, d += out->c) {
        mote_add_scaled(p.db, m->step, d, out->c);
    }
}

float mote_depthwise_norm(const mote_t *m, const mote_op_t *op)
{
    const mote_tensor_t *out = mote_tensor(m, op->out);
    uint32_t multiplier = out->c / mote_tensor(m, op->in)->c;
    float norm = 0.0f;
    for (uint32_t o = 0; o < out->c; o++) {
        float sum = mote_bias_gradient(m, op, o);
        norm += sum * sum;
    }
    if (mote_weights(m, op, weights(m, op), 0).dw == NULL) {
        return norm;
    }
    for (uint32_t ky = 0; ky < op->kernel_h; ky++) {
        for (uint32_t kx = 0; kx < op->kernel_w; kx++) {
            for (uint32_t o = 0; o < out->c; o++) {
                float g = mote_tap_gradient(m, op, ky, kx, o, o / multiplier);
                norm += g * g;
            }
        }
    }
    return norm;
}
