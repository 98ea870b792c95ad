/* Average and max pooling, float32. */
#include <string.h>

#include "mote_kernel_list.h"
#include "mote_vector.h"
#include "mote_window.h"

/* Without dilation, so that no window lies in the padding alone. */
static int pool_fits(const mote_t *m, const mote_op_t *op)
{
    return mote_floats(m, op) && mote_tensor(m, op->in)->c == mote_tensor(m, op->out)->c && op->dilation_h == 1 &&
           op->dilation_w == 1 && mote_windows_fit(m, op);
}

int mote_avgpool_check(const mote_t *m, const mote_op_t *op)
{
    return pool_fits(m, op);
}

int mote_maxpool_check(const mote_t *m, const mote_op_t *op)
{
    return pool_fits(m, op);
}

void mote_avgpool(const mote_t *m, const mote_op_t *op)
{
    const mote_tensor_t *in = mote_tensor(m, op->in), *out = mote_tensor(m, op->out);
    const float *x = mote_read(m, op->in);
    float *y = mote_write(m, op->out);
    uint32_t c = in->c;
    for (uint32_t oy = 0; oy < out->h; oy++) {
        mote_window_t v = mote_rows_of(op, in, oy);
        for (uint32_t ox = 0; ox < out->w; ox++, y += c) {
            mote_window_t h = mote_columns_of(op, in, ox);
            float share = 1.0f / (float)(v.count * h.count);
            memset(y, 0, c * sizeof *y);
            for (uint32_t ky = 0; ky < v.count; ky++) {
                const float *from = x + ((v.first + ky) * in->w + h.first) * c;
                for (uint32_t kx = 0; kx < h.count; kx++, from += c) {
                    for (uint32_t j = 0; j < c; j++) {
                        y[j] += from[j];
                    }
                }
            }
            for (uint32_t j = 0; j < c; j++) {
                y[j] *= share;
            }
        }
    }
}

void mote_avgpool_back(mote_t *m, const mote_op_t *op)
{
    const mote_tensor_t *in = mote_tensor(m, op->in), *out = mote_tensor(m, op->out);
    const float *dy = mote_read(m, op->dout);
    float *dx = mote_begun_din(m, op);
    uint32_t c = in->c;
    if (dx == NULL) {
        return;
    }
    for (uint32_t oy = 0; oy < out->h; oy++) {
        mote_window_t v = mote_rows_of(op, in, oy);
        for (uint32_t ox = 0; ox < out->w; ox++, dy += c) {
            mote_window_t h = mote_columns_of(op, in, ox);
            float share = 1.0f / (float)(v.count * h.count);
            for (uint32_t ky = 0; ky < v.count; ky++) {
                float *to = dx + ((v.first + ky) * in->w + h.first) * c;
                for (uint32_t kx = 0; kx < h.count; kx++, to += c) {
                    mote_add_scaled(to, share, dy, c);
                }
            }
        }
    }
}

/* The first of a window's largest elements in channel x[0], as a distance from x. */
static uint32_t largest(const float *x, uint32_t row, uint32_t c, uint32_t height, uint32_t width)
{
    uint32_t best = 0, at = 0;
    float most = x[0];
    for (; height > 0; height--, at += row - width * c) {
        for (uint32_t kx = 0; kx < width; kx++, at += c) {
            if (x[at] > most) {
                most = x[at];
                best = at;
            }
        }
    }
    return best;
}

/* Every channel of one window of two by two, the most common. */
static void pool_four(float *y, const float *x, uint32_t row, uint32_t c)
{
    const float *right = x + c, *below = x + row, *last = below + c;
    for (const float *end = right; x < end;) {
        float a = *x++, b = *right++, d = *below++, e = *last++;
        a = b > a ? b : a;
        d = e > d ? e : d;
        *y++ = d > a ? d : a;
    }
}

void mote_maxpool(const mote_t *m, const mote_op_t *op)
{
    const mote_tensor_t *in = mote_tensor(m, op->in), *out = mote_tensor(m, op->out);
    const float *x = mote_read(m, op->in);
    float *y = mote_write(m, op->out);
    uint32_t c = in->c, row = in->w * c;
    for (uint32_t oy = 0; oy < out->h; oy++) {
        mote_window_t v = mote_rows_of(op, in, oy);
        for (uint32_t ox = 0; ox < out->w; ox++, y += c) {
            mote_window_t h = mote_columns_of(op, in, ox);
            const float *corner = x + v.first * row + h.first * c;
            if (v.count == 2 && h.count == 2) {
                pool_four(y, corner, row, c);
                continue;
            }
            for (uint32_t j = 0; j < c; j++) {
                y[j] = corner[j + largest(corner + j, row, c, v.count, h.count)];
            }
        }
    }
}

/* The gradients of one window that shares nothing with another: cleared after it was read, so that dx can be x. */
static void back_alone(const float *x, float *dx, const float *dy, uint32_t row, uint32_t c, uint32_t height,
                       uint32_t width)
{
    for (uint32_t j = 0; j < c; j++, x++, dx++) {
        uint32_t best = dy[j] == 0.0f ? 0 : largest(x, row, c, height, width);
        for (uint32_t ky = 0; ky < height; ky++) {
            for (uint32_t kx = 0; kx < width; kx++) {
                dx[ky * row + kx * c] = 0.0f;
            }
        }
        dx[best] = dy[j];
    }
}

/* The same of two by two. */
#if MOTE_HAS_VLDM
static void back_four(const float *x, float *dx, const float *dy, uint32_t row, uint32_t c)
{
    const float *x1 = x + c, *x2 = x + row, *x3 = x2 + c;
    float *dx1 = dx + c, *dx2 = dx + row, *dx3 = dx2 + c, *best;
    __asm__ volatile("1:\n\t"
                     "vldmia %[dy]!, {s0}\n\t"
                     "vmov %[best], s0\n\t"
                     "lsls %[best], %[best], #1\n\t"
                     "beq 2f\n\t"
                     "vldmia %[x]!, {s1}\n\t"
                     "vldmia %[x1]!, {s2}\n\t"
                     "vldmia %[x2]!, {s3}\n\t"
                     "vldmia %[x3]!, {s4}\n\t"
                     "mov %[best], %[dx]\n\t"
                     "vcmp.f32 s2, s1\n\t"
                     "vmrs APSR_nzcv, fpscr\n\t"
                     "itt gt\n\t"
                     "movgt %[best], %[dx1]\n\t"
                     "vmovgt.f32 s1, s2\n\t"
                     "vcmp.f32 s3, s1\n\t"
                     "vmrs APSR_nzcv, fpscr\n\t"
                     "itt gt\n\t"
                     "movgt %[best], %[dx2]\n\t"
                     "vmovgt.f32 s1, s3\n\t"
                     "vcmp.f32 s4, s1\n\t"
                     "vmrs APSR_nzcv, fpscr\n\t"
                     "it gt\n\t"
                     "movgt %[best], %[dx3]\n\t"
                     "vstmia %[dx]!, {%[zero]}\n\t"
                     "vstmia %[dx1]!, {%[zero]}\n\t"
                     "vstmia %[dx2]!, {%[zero]}\n\t"
                     "vstmia %[dx3]!, {%[zero]}\n\t"
                     "vstr s0, [%[best]]\n\t"
                     "subs %[c], #1\n\t"
                     "bne 1b\n\t"
                     "b 3f\n"
                     "2:\n\t" /* as it is behind a ReLU that is off */
                     "adds %[x], #4\n\t"
                     "adds %[x1], #4\n\t"
                     "adds %[x2], #4\n\t"
                     "adds %[x3], #4\n\t"
                     "vstmia %[dx]!, {s0}\n\t"
                     "vstmia %[dx1]!, {%[zero]}\n\t"
                     "vstmia %[dx2]!, {%[zero]}\n\t"
                     "vstmia %[dx3]!, {%[zero]}\n\t"
                     "subs %[c], #1\n\t"
                     "bne 1b\n"
                     "3:"
                     : [x] "+r"(x), [x1] "+r"(x1), [x2] "+r"(x2), [x3] "+r"(x3), [dx] "+r"(dx), [dx1] "+r"(dx1),
                       [dx2] "+r"(dx2), [dx3] "+r"(dx3), [dy] "+r"(dy), [c] "+r"(c), [best] "=&r"(best)
                     : [zero] "t"(0.0f)
                     : "s0", "s1", "s2", "s3", "s4", "cc", "memory");
}
#else
static void back_four(const float *x, float *dx, const float *dy, uint32_t row, uint32_t c)
{
    const float *below = x + row;
    float *dx_below = dx + row;
    for (const float *end = dy + c; dy < end; x++, below++, dx++, dx_below++) {
        float d = *dy++, *best = dx;
        if (d != 0.0f) {
            float most = x[0];
            if (x[c] > most) {
                most = x[c];
                best = dx + c;
            }
            if (below[0] > most) {
                most = below[0];
                best = dx_below;
            }
            if (below[c] > most) {
                best = dx_below + c;
            }
        }
        dx[0] = dx[c] = dx_below[0] = dx_below[c] = 0.0f;
        *best = d;
    }
}
#endif

/* Clears what lies right of and below the last window. */
static void clear_rest(const mote_op_t *op, const mote_tensor_t *in, const mote_tensor_t *out, float *dx)
{
    mote_window_t v = mote_rows_of(op, in, out->h - 1u), h = mote_columns_of(op, in, out->w - 1u);
    uint32_t bottom = v.first + v.count, right = h.first + h.count;
    for (uint32_t y = 0; right < in->w && y < bottom; y++) {
        memset(dx + (y * in->w + right) * in->c, 0, (in->w - right) * in->c * sizeof *dx);
    }
    memset(dx + bottom * in->w * in->c, 0, (in->h - bottom) * in->w * in->c * sizeof *dx);
}

/* The gradient goes to each window's largest element. Where windows lie side by side it works in place: din can be the
 * input's memory. */
void mote_maxpool_back(mote_t *m, const mote_op_t *op)
{
    const mote_tensor_t *in = mote_tensor(m, op->in), *out = mote_tensor(m, op->out);
    const float *x = mote_read(m, op->in), *dy = mote_read(m, op->dout);
    float *dx = mote_din(m, op);
    uint32_t c = in->c, row = in->w * c;
    int adds = op->flags & MOTE_ADDS_DIN;
    int alone = !adds && op->kernel_h == op->stride_h && op->kernel_w == op->stride_w;
    if (dx == NULL) {
        return;
    }
    if (!adds && !alone) {
        memset(dx, 0, mote_bytes(in));
    }
    for (uint32_t oy = 0; oy < out->h; oy++) {
        mote_window_t v = mote_rows_of(op, in, oy);
        for (uint32_t ox = 0; ox < out->w; ox++, dy += c) {
            mote_window_t h = mote_columns_of(op, in, ox);
            uint32_t corner = v.first * row + h.first * c;
            if (alone && v.count == 2 && h.count == 2) {
                back_four(x + corner, dx + corner, dy, row, c);
            } else if (alone) {
                back_alone(x + corner, dx + corner, dy, row, c, v.count, h.count);
            }
            for (uint32_t j = 0; !alone && j < c; j++) {
                dx[corner + j + largest(x + corner + j, row, c, v.count, h.count)] += dy[j];
            }
        }
    }
    if (alone) {
        clear_rest(op, in, out, dx);
    }
}
