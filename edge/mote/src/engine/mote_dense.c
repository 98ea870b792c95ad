/* Fully connected, float32: y = W x + b over all of the input's elements. */
#include "mote_kernel_list.h"
#include "mote_vector.h"

static uint32_t inputs(const mote_t *m, const mote_op_t *op)
{
    return mote_size(mote_tensor(m, op->in));
}

int mote_dense_check(const mote_t *m, const mote_op_t *op)
{
    const mote_tensor_t *in = mote_tensor(m, op->in), *out = mote_tensor(m, op->out);
    return in->type == MOTE_FLOAT32 && out->type == MOTE_FLOAT32 && out->h == 1 && out->w == 1 &&
           mote_weights_fit(m, op, (uint64_t)mote_size(in) * out->c, out->c, 0);
}

void mote_dense(const mote_t *m, const mote_op_t *op)
{
    uint32_t in = inputs(m, op), rows = mote_rows(m, op);
    mote_weights_t p = mote_weights(m, op, in * mote_tensor(m, op->out)->c, 0);
    const float *x = mote_read(m, op->in);
    float *y = mote_write(m, op->out);
    for (uint32_t o = 0; o < rows; o++, p.w += in) {
        y[o] = p.b[o] + mote_dot(p.w, x, in);
    }
}

/* Row by row: what a row adds to the input's gradient, of its weights before they change; then their update. */
void mote_dense_back(mote_t *m, const mote_op_t *op)
{
    uint32_t in = inputs(m, op), rows = mote_rows(m, op);
    mote_weights_t p = mote_weights(m, op, in * mote_tensor(m, op->out)->c, 0);
    const float *x = mote_read(m, op->in), *dy = mote_write(m, op->dout);
    float *dx = mote_begun_din(m, op);
    int updates = p.dw != NULL, goes_on = dx != NULL;
    for (uint32_t o = 0; o < rows; o++) {
        float d = dy[o], step = m->step * d;
        uint32_t row = o * in;
        if (d == 0.0f) {
            continue; /* as behind a ReLU that is off */
        }
        if (updates && goes_on) {
            mote_add_scaled_both(dx, d, p.w + row, p.dw + row, step, x, in);
        } else if (updates || goes_on) {
            mote_add_scaled(updates ? p.dw + row : dx, updates ? step : d, updates ? x : p.w + row, in);
        }
        if (p.db != NULL) {
            p.db[o] += step;
        }
    }
}

/* The gradient is the outer product of dy and x, and dy. */
float mote_dense_norm(const mote_t *m, const mote_op_t *op)
{
    uint32_t in = inputs(m, op);
    const float *x = mote_read(m, op->in), *dy = mote_read(m, op->dout);
    mote_weights_t p = mote_weights(m, op, in * mote_tensor(m, op->out)->c, 0);
    return mote_squares(dy, mote_rows(m, op)) * ((p.dw != NULL ? mote_squares(x, in) : 0.0f) + 1.0f);
}
