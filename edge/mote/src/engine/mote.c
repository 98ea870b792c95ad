/* The engine: runs a checked program forward, and backward with the update of every layer that trains. */
#include <string.h>

#include "mote_internal.h"

size_t mote_inputs(const mote_t *m)
{
    return mote_size(mote_tensor(m, mote_header(m)->input));
}

size_t mote_outputs(const mote_t *m)
{
    return m->outputs;
}

size_t mote_targets(const mote_t *m)
{
    return mote_header(m)->loss == MOTE_CROSS_ENTROPY ? 1 : m->outputs;
}

int mote_input_type(const mote_t *m)
{
    return mote_tensor(m, mote_header(m)->input)->type;
}

int mote_output_type(const mote_t *m)
{
    return mote_tensor(m, mote_header(m)->output)->type;
}

float *mote_parameters(mote_t *m, size_t *count)
{
    int has_floats = !(mote_header(m)->flags & MOTE_TRAINS_INT8);
    if (count != NULL) {
        *count = has_floats ? mote_header(m)->params / sizeof(float) : 0;
    }
    return has_floats ? (float *)(void *)m->arena : NULL;
}

const mote_op_t *mote_op_of(const mote_t *m, uint32_t layer)
{
    const mote_op_t *op = mote_ops(m);
    while (op->trained == 0 || op->layer != layer) {
        op++;
    }
    return op;
}

int mote_layer(const mote_t *m, uint32_t layer, size_t *first, size_t *count)
{
    if (layer >= m->layers || first == NULL || count == NULL) {
        return MOTE_ERR_ARGUMENT;
    }
    uint32_t begin = mote_op_of(m, layer)->params;
    uint32_t end = layer + 1 < m->layers ? mote_op_of(m, layer + 1)->params : mote_header(m)->params;
    *first = begin / sizeof(float);
    *count = (end - begin) / sizeof(float);
    return MOTE_OK;
}

int mote_train_mask(mote_t *m, uint32_t layers, uint32_t biases_only)
{
    if ((layers & ~m->trainable) != 0) {
        return MOTE_ERR_FROZEN;
    }
    m->mask = layers;
    m->biases_only = biases_only;
    return MOTE_OK;
}

int mote_grow(mote_t *m)
{
    if (m->outputs == mote_size(mote_tensor(m, mote_header(m)->logits))) {
        return MOTE_ERR_FROZEN;
    }
    m->outputs++;
    return MOTE_OK;
}

mote_weights_t mote_weights(const mote_t *m, const mote_op_t *op, uint32_t count, uint32_t skip)
{
    const float *constant = (const float *)(const void *)(mote_constants(m) + op->constants + skip);
    float *trained = (float *)(void *)(m->arena + op->params);
    float *update = m->to_momentum ? trained + mote_header(m)->params / sizeof(float) : trained;
    mote_weights_t p = {constant, constant, NULL, NULL};
    int trains = (m->mask >> op->layer & 1u) != 0;
    if (op->flags & MOTE_TRAINS_WEIGHTS) {
        p.w = trained;
        if (trains && !(m->biases_only >> op->layer & 1u)) {
            p.dw = update;
        }
        trained += count;
        update += count;
    } else {
        p.b += count;
    }
    if (op->flags & MOTE_TRAINS_BIAS) {
        p.b = trained;
        if (trains) {
            p.db = update;
        }
    }
    return p;
}

const mote_kernel_t *mote_kernel_of(const mote_op_t *op)
{
    const mote_kernel_t *k = mote_kernels;
    while (k->kind != op->kind) {
        k++;
    }
    return k;
}

const mote_loss_t *mote_loss_of(const mote_header_t *h)
{
    const mote_loss_t *l = mote_losses;
    while (l->loss != h->loss) {
        l++;
    }
    return l;
}

int mote_all_finite(const float *x, size_t n)
{
    float sum = 0.0f; /* of zeros, or of something that is not a number */
    for (size_t j = 0; j < n; j++) {
        sum += x[j] * 0.0f;
    }
    return sum == 0.0f;
}

/* All ops; the output is not made of the logits yet. */
static void forward(mote_t *m, const void *x)
{
    const mote_op_t *op = mote_ops(m), *end = op + mote_header(m)->ops;
    m->x = x;
    for (; op < end; op++) {
        mote_kernel_of(op)->forward(m, op);
    }
}

void mote_begin_back(mote_t *m, const float *y, const float *target, float scale)
{
    const mote_header_t *h = mote_header(m);
    const mote_op_t *ops = mote_ops(m);
    float *dy = mote_write(m, h->dlogits);
    mote_loss_of(h)->gradient(m, m->outputs, y, target, dy);
    for (uint32_t j = 0; scale != 1.0f && j < m->outputs; j++) {
        dy[j] *= scale;
    }
    for (m->first = 0; ops[m->first].trained == 0 || !(m->mask >> ops[m->first].layer & 1u);) {
        m->first++;
    }
}

void mote_go_back(mote_t *m)
{
    const mote_op_t *first = mote_ops(m) + m->first, *op = mote_ops(m) + mote_header(m)->ops;
    while (op-- > first) {
        if (op->dout != MOTE_NO_TENSOR) {
            mote_kernel_of(op)->backward(m, op);
        }
    }
}

static int input_fits(const mote_t *m, const void *x)
{
    return m != NULL && x != NULL && (mote_input_type(m) != MOTE_FLOAT32 || mote_all_finite(x, mote_inputs(m)));
}

int mote_infer(mote_t *m, const void *x, const void **y)
{
    if (y == NULL || !input_fits(m, x)) {
        return MOTE_ERR_ARGUMENT;
    }
    const mote_header_t *h = mote_header(m);
    forward(m, x);
    if (h->loss != MOTE_NO_LOSS) {
        mote_loss_of(h)->forward(m, m->outputs, mote_read(m, h->logits), NULL, mote_write(m, h->output));
    }
    *y = mote_read(m, h->output);
    return MOTE_OK;
}

/* Whether a loss can be computed: MOTE_OK if so. */
static MOTE_APART int loss_fits(const mote_t *m, const void *x, const float *target)
{
    if (target == NULL || !input_fits(m, x)) {
        return MOTE_ERR_ARGUMENT;
    }
    const mote_header_t *h = mote_header(m);
    if (h->loss == MOTE_NO_LOSS) {
        return MOTE_ERR_FROZEN;
    }
    return mote_loss_of(h)->target_fits(m->outputs, target) ? MOTE_OK : MOTE_ERR_TARGET;
}

int mote_loss(mote_t *m, const void *x, const float *target, float *loss, const void **y)
{
    int error = loss == NULL || y == NULL ? MOTE_ERR_ARGUMENT : loss_fits(m, x, target);
    if (error != MOTE_OK) {
        return error;
    }
    forward(m, x);
    const mote_header_t *h = mote_header(m);
    *y = mote_read(m, h->output);
    *loss = mote_loss_of(h)->forward(m, m->outputs, mote_read(m, h->logits), target, mote_write(m, h->output));
    return mote_finite(*loss) ? MOTE_OK : MOTE_ERR_DIVERGED;
}

int mote_learn(mote_t *m, const void *x, const float *target, float rate, float *loss)
{
    const void *y;
    if (!mote_finite(rate)) {
        return MOTE_ERR_ARGUMENT;
    }
    int error = mote_loss(m, x, target, loss, &y);
    if (error == MOTE_OK && m->mask != 0) {
        m->step = -rate;
        mote_begin_back(m, y, target, 1.0f);
        mote_go_back(m);
    }
    return error;
}
