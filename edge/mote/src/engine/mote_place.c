/* Copies of float32 or int8 tensors into a part of another (padding, concatenation), and of parts of another. */
#include <string.h>

#include "mote_kernel_list.h"
#include "mote_window.h"

static size_t element(const mote_tensor_t *t)
{
    return t->type == MOTE_FLOAT32 ? sizeof(float) : 1;
}

int mote_place_check(const mote_t *m, const mote_op_t *op)
{
    const mote_tensor_t *in = mote_tensor(m, op->in), *out = mote_tensor(m, op->out);
    return in->type == out->type && op->pad_top + in->h <= out->h && op->pad_left + in->w <= out->w &&
           op->option + in->c <= out->c;
}

/* Where place (row, column) of the input begins in the output. */
static uint32_t target(const mote_op_t *op, const mote_tensor_t *out, uint32_t row, uint32_t column)
{
    return ((op->pad_top + row) * out->w + op->pad_left + column) * out->c + op->option;
}

void mote_place(const mote_t *m, const mote_op_t *op)
{
    const mote_tensor_t *in = mote_tensor(m, op->in), *out = mote_tensor(m, op->out);
    const uint8_t *from = mote_read(m, op->in);
    uint8_t *to = mote_write(m, op->out);
    size_t size = element(in);
    uint32_t together = in->c == out->c ? in->w : 1; /* places that lie together in both */
    if (op->flags & MOTE_FILLS) {
        memset(to, out->type == MOTE_INT8 ? out->zero_point : 0, mote_bytes(out));
    }
    for (uint32_t row = 0; row < in->h; row++) {
        for (uint32_t column = 0; column < in->w; column += together) {
            memmove(to + size * target(op, out, row, column), from, size * together * in->c);
            from += size * together * in->c;
        }
    }
}

/* The gradient of a copy is that of the place where it lies. */
void mote_place_back(mote_t *m, const mote_op_t *op)
{
    const mote_tensor_t *in = mote_tensor(m, op->in), *out = mote_tensor(m, op->out);
    const float *dy = mote_read(m, op->dout);
    float *dx = mote_din(m, op);
    if (dx == NULL) {
        return;
    }
    for (uint32_t row = 0; row < in->h; row++) {
        for (uint32_t column = 0; column < in->w; column++, dx += in->c) {
            const float *from = dy + target(op, out, row, column);
            if (!(op->flags & MOTE_ADDS_DIN)) {
                memmove(dx, from, in->c * sizeof *dx);
                continue;
            }
            for (uint32_t j = 0; j < in->c; j++) {
                dx[j] += from[j];
            }
        }
    }
}

typedef struct {
    int32_t begin[3], stride[3];
} slice_t;

static const slice_t *slice_of(const mote_t *m, const mote_op_t *op)
{
    return (const slice_t *)(const void *)(mote_constants(m) + op->constants);
}

/* 1 if the first and the last of n elements lie inside of a dimension of `in`. */
static int inside(int32_t begin, int32_t stride, uint32_t n, uint32_t in)
{
    int64_t last = begin + (int64_t)(n - 1) * stride;
    return begin >= 0 && begin < (int64_t)in && last >= 0 && last < (int64_t)in;
}

int mote_slice_check(const mote_t *m, const mote_op_t *op)
{
    const mote_tensor_t *in = mote_tensor(m, op->in), *out = mote_tensor(m, op->out);
    if (in->type != out->type || !mote_constants_fit(m, op, sizeof(slice_t))) {
        return 0;
    }
    const slice_t *s = slice_of(m, op);
    return inside(s->begin[0], s->stride[0], out->h, in->h) && inside(s->begin[1], s->stride[1], out->w, in->w) &&
           inside(s->begin[2], s->stride[2], out->c, in->c);
}

void mote_slice(const mote_t *m, const mote_op_t *op)
{
    const mote_tensor_t *in = mote_tensor(m, op->in), *out = mote_tensor(m, op->out);
    const slice_t *s = slice_of(m, op);
    const uint8_t *x = mote_read(m, op->in);
    uint8_t *to = mote_write(m, op->out);
    size_t size = element(in);
    for (int32_t i = 0; i < out->h; i++) {
        int32_t row = s->begin[0] + i * s->stride[0];
        for (int32_t j = 0; j < out->w; j++) {
            int32_t at = (row * in->w + s->begin[1] + j * s->stride[1]) * in->c + s->begin[2];
            for (int32_t k = 0; k < out->c; k++, to += size) {
                memmove(to, x + size * (uint32_t)(at + k * s->stride[2]), size);
            }
        }
    }
}
