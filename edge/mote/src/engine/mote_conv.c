/* Convolution, float32.
 *
 * y[oy][ox][o] = b[o] + sum over ky, kx, i of w[o][ky][kx][i] x[oy * stride + ky * dilation - pad][...][i]: a dot
 * product for each part of the window that is contiguous (a row; a tap, if dilated), added from the top left on. */
#include <string.h>

#include "mote_kernel_list.h"
#include "mote_vector.h"
#include "mote_window.h"

static uint32_t weights(const mote_t *m, const mote_op_t *op)
{
    return (uint32_t)op->kernel_h * op->kernel_w * mote_tensor(m, op->in)->c * mote_tensor(m, op->out)->c;
}

int mote_conv2d_check(const mote_t *m, const mote_op_t *op)
{
    uint64_t kernel = (uint64_t)op->kernel_h * op->kernel_w; /* the product of four 16-bit numbers fits */
    return mote_floats(m, op) && mote_windows_fit(m, op) &&
           mote_weights_fit(m, op, kernel * mote_tensor(m, op->in)->c * mote_tensor(m, op->out)->c,
                            mote_tensor(m, op->out)->c, 0);
}

/* A window in contiguous parts: `rows` rows of `parts` parts of `n` floats. Of the input and of a filter: where the
 * first part begins, and the distances between rows and between parts. */
typedef struct {
    uint32_t rows, parts, n;
    uint32_t x, x_row, x_part;
    uint32_t w, w_row;
} patch_t;

/* The windows of one row of the output. Most lie inside of the input's columns, and differ in where they begin. */
typedef struct {
    patch_t whole, clipped;
    uint32_t x;      /* where the windows' first row begins */
    uint32_t inside; /* columns for whole windows to begin at */
} row_t;

static row_t row_of(const mote_op_t *op, const mote_tensor_t *in, uint32_t oy)
{
    mote_window_t v = mote_rows_of(op, in, oy);
    uint32_t c = in->c, reach = (op->kernel_w - 1u) * op->dilation_w;
    patch_t whole = {v.count, op->kernel_w, c, 0, v.step * in->w * c, op->dilation_w * c, 0, op->kernel_w * c};
    whole.w = v.skipped * whole.w_row;
    row_t row = {whole, whole, v.first * in->w * c, reach < in->w ? in->w - reach : 0};
    if (op->dilation_w == 1) {
        row.whole.parts = 1;
        row.whole.n = whole.w_row;
    }
    return row;
}

static const patch_t *clip(row_t *row, const mote_op_t *op, const mote_tensor_t *in, uint32_t ox)
{
    mote_window_t h = mote_columns_of(op, in, ox);
    patch_t *p = &row->clipped;
    p->parts = h.count;
    p->n = in->c;
    if (op->dilation_w == 1) {
        p->parts = 1;
        p->n *= h.count; /* not 0 without dilation */
    }
    p->x = row->x + h.first * in->c;
    p->w = row->whole.w + h.skipped * in->c;
    return p;
}

static inline const patch_t *patch_of(row_t *row, const mote_op_t *op, const mote_tensor_t *in, uint32_t ox)
{
    uint32_t first = ox * op->stride_w - op->pad_left;
    if (first >= row->inside) { /* it wraps around left of the input */
        return clip(row, op, in, ox);
    }
    row->whole.x = row->x + first * in->c;
    return &row->whole;
}

#if MOTE_HAS_VLDM
/* Windows of three rows of three floats, as a first layer's of one channel often are: for them there is code of its
 * own, which keeps a window in registers. Where the first lies, and from row to row and from window to window, in
 * floats. */
typedef struct {
    const float *x;
    uint32_t row, step, count;
} nines_t;

/* Those from column ox on; none if that one is no such window. */
static nines_t nines_from(const row_t *row, const mote_op_t *op, const mote_tensor_t *in, const mote_tensor_t *out,
                          const float *x, uint32_t ox)
{
    uint32_t first = ox * op->stride_w - op->pad_left, left = out->w - ox;
    nines_t nines = {x, row->whole.x_row, (uint32_t)op->stride_w * in->c, 0};
    if (op->kernel_h == 3 && row->whole.rows == 3 && row->whole.n == 3 && row->whole.w_row == 3 &&
        first < row->inside) {
        uint32_t whole = (row->inside - 1 - first) / op->stride_w + 1;
        nines.x += row->x + first * in->c;
        nines.count = whole < left ? whole : left;
    }
    return nines;
}

#if defined(MOTE_FAST) && defined(__ARM_FEATURE_FMA)
#define ROW_OF_NINE(w0, w1, w2, x0, x1, x2)                                                                            \
    "vfma.f32 s18, " w0 ", " x0 "\n\tvfma.f32 s18, " w1 ", " x1 "\n\tvfma.f32 s18, " w2 ", " x2 "\n\t"
#else
#define ROW_OF_NINE(w0, w1, w2, x0, x1, x2)                                                                            \
    "vmul.f32 " w0 ", " w0 ", " x0 "\n\tvmla.f32 " w0 ", " w1 ", " x1 "\n\tvmla.f32 " w0 ", " w2 ", " x2 "\n\t"        \
    "vadd.f32 s18, s18, " w0 "\n\t"
#endif

/* All filters over the windows. */
static void nine_forward(nines_t at, float *y, const float *b, const float *w, uint32_t filters)
{
    const float *bias = b, *filter = w;
    for (; at.count > 0; at.count--, at.x += at.step) {
        const float *x = at.x;
        uint32_t left = filters;
        b = bias;
        w = filter;
        __asm__ volatile("vldmia %[x], {s0-s2}\n\t"
                         "add %[x], %[row]\n\t"
                         "vldmia %[x], {s3-s5}\n\t"
                         "add %[x], %[row]\n\t"
                         "vldmia %[x], {s6-s8}\n"
                         "1:\n\t"
                         "vldmia %[w]!, {s9-s17}\n\t"
                         "vldmia %[b]!, {s18}\n\t"
                         "subs %[left], #1\n\t" /* clang-format off */
                         ROW_OF_NINE("s9", "s10", "s11", "s0", "s1", "s2")
                         ROW_OF_NINE("s12", "s13", "s14", "s3", "s4", "s5")
                         ROW_OF_NINE("s15", "s16", "s17", "s6", "s7", "s8") /* clang-format on */
                         "vstmia %[y]!, {s18}\n\t"
                         "bne 1b"
                         : [y] "+r"(y), [b] "+r"(b), [w] "+r"(w), [x] "+r"(x), [left] "+r"(left)
                         : [row] "r"(at.row * sizeof *x)
                         : "s0", "s1", "s2", "s3", "s4", "s5", "s6", "s7", "s8", "s9", "s10", "s11", "s12", "s13",
                           "s14", "s15", "s16", "s17", "s18", "cc", "memory");
    }
}

/* Every filter and bias learns from the windows; most gradients are 0 behind max pooling. */
static void nine_learn(nines_t at, float *w, float *b, float step, const float *d, uint32_t filters)
{
    float *bias = b, *filter = w;
    for (; at.count > 0; at.count--, at.x += at.step) {
        const float *x = at.x;
        uint32_t left = filters, bits;
        b = bias;
        w = filter;
        __asm__ volatile("vldmia %[x], {s0-s2}\n\t"
                         "add %[x], %[row]\n\t"
                         "vldmia %[x], {s3-s5}\n\t"
                         "add %[x], %[row]\n\t"
                         "vldmia %[x], {s6-s8}\n"
                         "1:\n\t"
                         "ldr %[bits], [%[d]], #4\n\t"
                         "vmov s18, %[bits]\n\t"
                         "lsls %[bits], %[bits], #1\n\t"
                         "beq 2f\n\t"
                         "vldmia %[w], {s9-s17}\n\t"
                         "vldr s19, [%[b]]\n\t"
                         "vmul.f32 s18, %[step], s18\n\t"
                         "vmla.f32 s9, s18, s0\n\t"
                         "vmla.f32 s10, s18, s1\n\t"
                         "vmla.f32 s11, s18, s2\n\t"
                         "vmla.f32 s12, s18, s3\n\t"
                         "vmla.f32 s13, s18, s4\n\t"
                         "vmla.f32 s14, s18, s5\n\t"
                         "vmla.f32 s15, s18, s6\n\t"
                         "vmla.f32 s16, s18, s7\n\t"
                         "vmla.f32 s17, s18, s8\n\t"
                         "vadd.f32 s19, s19, s18\n\t"
                         "vstmia %[w], {s9-s17}\n\t"
                         "vstr s19, [%[b]]\n"
                         "2:\n\t"
                         "add %[w], #36\n\t"
                         "add %[b], #4\n\t"
                         "subs %[left], #1\n\t"
                         "bne 1b"
                         : [d] "+r"(d), [b] "+r"(b), [w] "+r"(w), [x] "+r"(x), [left] "+r"(left), [bits] "=&r"(bits)
                         : [step] "t"(step), [row] "r"(at.row * sizeof *x)
                         : "s0", "s1", "s2", "s3", "s4", "s5", "s6", "s7", "s8", "s9", "s10", "s11", "s12", "s13",
                           "s14", "s15", "s16", "s17", "s18", "s19", "cc", "memory");
    }
}

/* sum[0] += mote_dot(w, x, n), sum[1] += mote_dot(v, x, n), n >= 8, to the same bits: x is loaded once for both. */
static void add_two_dots(float *sum, const float *w, const float *v, const float *x, uint32_t n)
{
    n -= 8;
    __asm__ volatile("vldmia %[x]!, {s0-s7}\n\t"
                     "vldmia %[w]!, {s8-s15}\n\t"
                     "vldmia %[v]!, {s16-s23}\n\t"
                     "vmul.f32 s24, s8, s0\n\t"
                     "vmul.f32 s25, s9, s1\n\t"
                     "vmul.f32 s26, s10, s2\n\t"
                     "vmul.f32 s27, s11, s3\n\t"
                     "vmul.f32 s28, s16, s0\n\t"
                     "vmul.f32 s29, s17, s1\n\t"
                     "vmul.f32 s30, s18, s2\n\t"
                     "vmul.f32 s31, s19, s3\n\t"
                     "b 2f\n"
                     "1:\n\t"
                     "vldmia %[x]!, {s0-s7}\n\t"
                     "vldmia %[w]!, {s8-s15}\n\t"
                     "vldmia %[v]!, {s16-s23}\n\t"
                     "vmla.f32 s24, s8, s0\n\t"
                     "vmla.f32 s25, s9, s1\n\t"
                     "vmla.f32 s26, s10, s2\n\t"
                     "vmla.f32 s27, s11, s3\n\t"
                     "vmla.f32 s28, s16, s0\n\t"
                     "vmla.f32 s29, s17, s1\n\t"
                     "vmla.f32 s30, s18, s2\n\t"
                     "vmla.f32 s31, s19, s3\n"
                     "2:\n\t"
                     "vmla.f32 s24, s12, s4\n\t"
                     "vmla.f32 s25, s13, s5\n\t"
                     "vmla.f32 s26, s14, s6\n\t"
                     "vmla.f32 s27, s15, s7\n\t"
                     "vmla.f32 s28, s20, s4\n\t"
                     "vmla.f32 s29, s21, s5\n\t"
                     "vmla.f32 s30, s22, s6\n\t"
                     "vmla.f32 s31, s23, s7\n\t"
                     "subs %[n], #8\n\t"
                     "bhs 1b\n\t"
                     "tst %[n], #4\n\t" /* what is left, modulo 8 */
                     "beq 3f\n\t"
                     "vldmia %[x]!, {s0-s3}\n\t"
                     "vldmia %[w]!, {s8-s11}\n\t"
                     "vldmia %[v]!, {s16-s19}\n\t"
                     "vmla.f32 s24, s8, s0\n\t"
                     "vmla.f32 s25, s9, s1\n\t"
                     "vmla.f32 s26, s10, s2\n\t"
                     "vmla.f32 s27, s11, s3\n\t"
                     "vmla.f32 s28, s16, s0\n\t"
                     "vmla.f32 s29, s17, s1\n\t"
                     "vmla.f32 s30, s18, s2\n\t"
                     "vmla.f32 s31, s19, s3\n"
                     "3:\n\t"
                     "ands %[n], #3\n\t"
                     "beq 4f\n\t"
                     "vldmia %[x]!, {s0}\n\t"
                     "vldmia %[w]!, {s8}\n\t"
                     "vldmia %[v]!, {s16}\n\t"
                     "vmla.f32 s24, s8, s0\n\t"
                     "vmla.f32 s28, s16, s0\n\t"
                     "subs %[n], #1\n\t"
                     "beq 4f\n\t"
                     "vldmia %[x]!, {s0}\n\t"
                     "vldmia %[w]!, {s8}\n\t"
                     "vldmia %[v]!, {s16}\n\t"
                     "vmla.f32 s25, s8, s0\n\t"
                     "vmla.f32 s29, s16, s0\n\t"
                     "subs %[n], #1\n\t"
                     "beq 4f\n\t"
                     "vldmia %[x]!, {s0}\n\t"
                     "vldmia %[w]!, {s8}\n\t"
                     "vldmia %[v]!, {s16}\n\t"
                     "vmla.f32 s26, s8, s0\n\t"
                     "vmla.f32 s30, s16, s0\n"
                     "4:\n\t"
                     "vldmia %[sum], {s0-s1}\n\t"
                     "vadd.f32 s24, s24, s25\n\t"
                     "vadd.f32 s26, s26, s27\n\t"
                     "vadd.f32 s28, s28, s29\n\t"
                     "vadd.f32 s30, s30, s31\n\t"
                     "vadd.f32 s24, s24, s26\n\t"
                     "vadd.f32 s28, s28, s30\n\t"
                     "vadd.f32 s0, s0, s24\n\t"
                     "vadd.f32 s1, s1, s28\n\t"
                     "vstmia %[sum], {s0-s1}"
                     : [w] "+r"(w), [v] "+r"(v), [x] "+r"(x), [n] "+r"(n)
                     : [sum] "r"(sum)
                     : "s0", "s1", "s2", "s3", "s4", "s5", "s6", "s7", "s8", "s9", "s10", "s11", "s12", "s13", "s14",
                       "s15", "s16", "s17", "s18", "s19", "s20", "s21", "s22", "s23", "s24", "s25", "s26", "s27", "s28",
                       "s29", "s30", "s31", "cc", "memory");
}
#endif

/* y = b + every filter over one window. `filter` floats lie from one filter to the next. */
static void forward(const patch_t *p, float *y, const float *b, const float *w, uint32_t filter, const float *x,
                    uint32_t filters)
{
    memmove(y, b, filters * sizeof *y);
    for (uint32_t row = 0; row < p->rows; row++) {
        for (uint32_t part = 0; part < p->parts; part++) {
            const float *from = x + row * p->x_row + part * p->x_part, *k = w + row * p->w_row + part * p->n;
            uint32_t o = 0;
#if MOTE_HAS_VLDM
            for (; p->n >= 8 && o + 1 < filters; o += 2, k += 2 * filter) {
                add_two_dots(y + o, k, k + filter, from, p->n);
            }
#endif
            for (; o < filters; o++, k += filter) {
                y[o] += mote_dot(k, from, p->n);
            }
        }
    }
}

void mote_conv2d(const mote_t *m, const mote_op_t *op)
{
    const mote_tensor_t *in = mote_tensor(m, op->in), *out = mote_tensor(m, op->out);
    const mote_weights_t p = mote_weights(m, op, weights(m, op), 0);
    const float *x = mote_read(m, op->in);
    float *y = mote_write(m, op->out);
    uint32_t filter = (uint32_t)op->kernel_h * op->kernel_w * in->c, filters = out->c;
    for (uint32_t oy = 0; oy < out->h; oy++) {
        row_t row = row_of(op, in, oy);
        for (uint32_t ox = 0; ox < out->w; ox++, y += filters) {
#if MOTE_HAS_VLDM
            nines_t nines = nines_from(&row, op, in, out, x, ox);
            if (nines.count > 0) {
                nine_forward(nines, y, p.b, p.w, filters);
                ox += nines.count - 1;
                y += (nines.count - 1) * filters;
                continue;
            }
#endif
            const patch_t *at = patch_of(&row, op, in, ox);
            forward(at, y, p.b, p.w + at->w, filter, x + at->x, filters);
        }
    }
}

/* to += scale * d * from, n floats, for every filter's gradient d. */
static void spread(float *to, uint32_t to_step, float scale, const float *d, const float *from, uint32_t from_step,
                   uint32_t n, uint32_t filters)
{
    for (; filters > 0; filters--, d++, to += to_step, from += from_step) {
        if (!mote_is_zero(d)) {
            mote_add_scaled(to, scale * *d, from, n);
        }
    }
}

/* dx += every filter by its gradient */
static void back(const patch_t *p, float *dx, const float *d, const float *w, uint32_t filter, uint32_t filters)
{
    for (uint32_t row = 0; row < p->rows; row++) {
        for (uint32_t part = 0; part < p->parts; part++) {
            spread(dx + row * p->x_row + part * p->x_part, 0, 1.0f, d, w + row * p->w_row + part * p->n, filter, p->n,
                   filters);
        }
    }
}

static void learn_biases(float *b, float step, const float *d, uint32_t filters)
{
    for (; filters > 0; filters--, d++, b++) {
        if (!mote_is_zero(d)) {
            *b += step * *d;
        }
    }
}

/* Every filter += step * its gradient * x, and every bias += step * its gradient. */
static void learn(const patch_t *p, float *w, float *b, uint32_t filter, float step, const float *d, const float *x,
                  uint32_t filters)
{
    for (uint32_t row = 0; row < p->rows; row++) {
        for (uint32_t part = 0; part < p->parts; part++) {
            spread(w + row * p->w_row + part * p->n, filter, step, d, x + row * p->x_row + part * p->x_part, 0, p->n,
                   filters);
        }
    }
    learn_biases(b, step, d, filters);
}

/* All of dx is computed before any weight changes: unlike a dense weight, each is used at many places. */
void mote_conv2d_back(mote_t *m, const mote_op_t *op)
{
    const mote_tensor_t *in = mote_tensor(m, op->in), *out = mote_tensor(m, op->out);
    const mote_weights_t p = mote_weights(m, op, weights(m, op), 0);
    const float *x = mote_read(m, op->in), *dy = mote_read(m, op->dout);
    float *dx = mote_begun_din(m, op);
    uint32_t filter = (uint32_t)op->kernel_h * op->kernel_w * in->c, filters = out->c;
    for (int learns = dx == NULL; learns < 1 + (p.db != NULL); learns++) {
        const float *d = dy;
        for (uint32_t oy = 0; oy < out->h; oy++) {
            row_t row = row_of(op, in, oy);
            for (uint32_t ox = 0; ox < out->w; ox++, d += filters) {
#if MOTE_HAS_VLDM
                nines_t nines = nines_from(&row, op, in, out, x, ox);
                if (learns && p.dw != NULL && nines.count > 0) {
                    nine_learn(nines, p.dw, p.db, m->step, d, filters);
                    ox += nines.count - 1;
                    d += (nines.count - 1) * filters;
                    continue;
                }
#endif
                const patch_t *at = patch_of(&row, op, in, ox);
                if (!learns) {
                    back(at, dx + at->x, d, p.w + at->w, filter, filters);
                } else if (p.dw != NULL) {
                    learn(at, p.dw + at->w, p.db, filter, m->step, d, x + at->x, filters);
                } else {
                    learn_biases(p.db, m->step, d, filters);
                }
            }
        }
    }
}

float mote_conv2d_norm(const mote_t *m, const mote_op_t *op)
{
    const mote_tensor_t *in = mote_tensor(m, op->in), *out = mote_tensor(m, op->out);
    int weights_train = mote_weights(m, op, weights(m, op), 0).dw != NULL;
    float norm = 0.0f;
    for (uint32_t o = 0; o < out->c; o++) {
        float sum = mote_bias_gradient(m, op, o);
        norm += sum * sum;
        for (uint32_t ky = 0; weights_train && ky < op->kernel_h; ky++) {
            for (uint32_t kx = 0; kx < op->kernel_w; kx++) {
                for (uint32_t i = 0; i < in->c; i++) {
                    float g = mote_tap_gradient(m, op, ky, kx, o, i);
                    norm += g * g;
                }
            }
        }
    }
    return norm;
}
