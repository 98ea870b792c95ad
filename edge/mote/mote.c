/* The engine: runs a checked program forward, and backward with the update of every layer that trains. */
#include "mote_internal.h"

size_t mote_inputs(const mote_t *m)
{
    return mote_in_size(&mote_ops(m)[0]);
}

size_t mote_outputs(const mote_t *m)
{
    return mote_out_size(&mote_ops(m)[mote_header(m)->ops - 1]);
}

size_t mote_targets(const mote_t *m)
{
    return mote_header(m)->loss == MOTE_CROSS_ENTROPY ? 1 : mote_outputs(m);
}

float *mote_parameters(mote_t *m, size_t *count)
{
    if (count != NULL) {
        *count = mote_header(m)->params;
    }
    return m->arena;
}

int mote_layer(const mote_t *m, uint32_t layer, size_t *first, size_t *count)
{
    const mote_op_t *op = mote_ops(m);
    if (layer >= m->layers || first == NULL || count == NULL) {
        return MOTE_ERR_ARGUMENT;
    }
    for (;; op++) {
        if (mote_has_params(op) && layer-- == 0) {
            break;
        }
    }
    int trains = op->flags & MOTE_TRAINABLE;
    *first = trains ? op->params : 0;
    *count = trains ? mote_weights(op) + op->out_c : 0;
    return MOTE_OK;
}

int mote_train_mask(mote_t *m, uint32_t layers)
{
    if ((layers & ~m->trainable) != 0) {
        return MOTE_ERR_FROZEN;
    }
    m->mask = layers;
    return MOTE_OK;
}

int mote_all_finite(const float *x, size_t n)
{
    for (size_t j = 0; j < n; j++) {
        if (!mote_finite(x[j])) {
            return 0;
        }
    }
    return 1;
}

static const float *weights_of(const mote_t *m, const mote_op_t *op)
{
    const mote_header_t *header = mote_header(m);
    if (op->flags & MOTE_TRAINABLE) {
        return m->arena + op->params;
    }
    return mote_floats(m) + (header->flags & MOTE_CARRIES_PARAMETERS ? header->params : 0) + op->params;
}

/* A tensor in the arena, or NULL. */
static float *tensor(const mote_t *m, uint32_t offset)
{
    return offset == MOTE_NONE ? NULL : mote_activations(m) + offset;
}

/* The input of op i: the output of the one before, or x. */
static const float *input_of(const mote_t *m, uint32_t i, const float *x)
{
    const float *in = i == 0 ? NULL : tensor(m, mote_ops(m)[i - 1].out);
    return in == NULL ? x : in;
}

/* All ops but the loss; returns the last op's output. */
static const float *forward(const mote_t *m, const float *x)
{
    uint32_t ops = mote_header(m)->ops;
    for (uint32_t i = 0; i < ops; i++) {
        const mote_op_t *op = &mote_ops(m)[i];
        const float *in = input_of(m, i, x);
        float *out = tensor(m, op->out);
        switch (op->kind) {
        case MOTE_DENSE:
            mote_dense(op, weights_of(m, op), in, out);
            break;
        case MOTE_CONV2D:
            mote_conv2d(op, weights_of(m, op), in, out);
            break;
        case MOTE_AVGPOOL:
            mote_avgpool(op, in, out);
            break;
        case MOTE_MAXPOOL:
            mote_maxpool(op, in, out);
            break;
        case MOTE_RELU:
            mote_relu(mote_out_size(op), in, out);
            break;
        case MOTE_TANH:
            mote_tanh(mote_out_size(op), in, out);
            break;
        default: /* flatten: its output is its input */
            break;
        }
    }
    return input_of(m, ops, x);
}

/* Backward from the last op's gradient down to op `first`, updating what the mask names. */
static void backward(const mote_t *m, const float *x, float rate, uint32_t first)
{
    uint32_t layer = m->layers;
    for (uint32_t i = mote_header(m)->ops; i-- > first;) {
        const mote_op_t *op = &mote_ops(m)[i];
        const float *in = input_of(m, i, x);
        const float *out = tensor(m, op->out);
        const float *dy = tensor(m, op->grad);
        float *dx = i > first ? tensor(m, op[-1].grad) : NULL;
        float *update = NULL;
        if (mote_has_params(op) && ((m->mask >> --layer) & 1u) != 0) {
            update = m->arena + op->params;
        }
        switch (op->kind) {
        case MOTE_DENSE:
            mote_dense_back(op, weights_of(m, op), update, rate, in, dy, dx);
            break;
        case MOTE_CONV2D:
            mote_conv2d_back(op, weights_of(m, op), update, rate, in, dy, dx);
            break;
        case MOTE_AVGPOOL:
            mote_avgpool_back(op, dy, dx);
            break;
        case MOTE_MAXPOOL:
            mote_maxpool_back(op, in, dy, dx);
            break;
        case MOTE_RELU:
            mote_relu_back(mote_out_size(op), out, dy, dx);
            break;
        case MOTE_TANH:
            mote_tanh_back(mote_out_size(op), out, dy, dx);
            break;
        default:
            break;
        }
    }
}

/* The op of the lowest layer in the mask. */
static uint32_t first_trained(const mote_t *m)
{
    uint32_t layer = 0, i = 0;
    for (;; i++) {
        if (mote_has_params(&mote_ops(m)[i]) && ((m->mask >> layer++) & 1u) != 0) {
            return i;
        }
    }
}

int mote_infer(mote_t *m, const float *x, const float **y)
{
    if (m == NULL || x == NULL || y == NULL || !mote_all_finite(x, mote_inputs(m))) {
        return MOTE_ERR_ARGUMENT;
    }
    *y = forward(m, x);
    if (mote_header(m)->loss == MOTE_CROSS_ENTROPY) {
        float *p = mote_activations(m) + mote_header(m)->output;
        mote_softmax((uint32_t)mote_outputs(m), *y, p, 0);
        *y = p;
    }
    return MOTE_OK;
}

int mote_loss(mote_t *m, const float *x, const float *target, float *loss, const float **y)
{
    if (m == NULL || x == NULL || target == NULL || loss == NULL || y == NULL || !mote_all_finite(x, mote_inputs(m))) {
        return MOTE_ERR_ARGUMENT;
    }
    const mote_header_t *header = mote_header(m);
    uint32_t n = (uint32_t)mote_outputs(m), class = 0;
    if (header->loss == MOTE_CROSS_ENTROPY) {
        if (!(target[0] >= 0.0f && target[0] < (float)n) || target[0] != (float)(uint32_t)target[0]) {
            return MOTE_ERR_TARGET;
        }
        class = (uint32_t)target[0];
    } else if (!mote_all_finite(target, n)) {
        return MOTE_ERR_TARGET;
    }
    *y = forward(m, x);
    if (header->loss == MOTE_CROSS_ENTROPY) {
        float *p = mote_activations(m) + header->output;
        *loss = mote_softmax(n, *y, p, class);
        *y = p;
    } else {
        *loss = mote_squared_error(n, *y, target);
    }
    return mote_finite(*loss) ? MOTE_OK : MOTE_ERR_DIVERGED;
}

int mote_learn(mote_t *m, const float *x, const float *target, float rate, float *loss)
{
    const float *y;
    if (!mote_finite(rate)) {
        return MOTE_ERR_ARGUMENT;
    }
    int error = mote_loss(m, x, target, loss, &y);
    if (error != MOTE_OK || m->mask == 0) {
        return error;
    }
    const mote_header_t *header = mote_header(m);
    uint32_t n = (uint32_t)mote_outputs(m);
    float *dy = mote_activations(m) + mote_ops(m)[header->ops - 1].grad;
    if (header->loss == MOTE_CROSS_ENTROPY) {
        for (uint32_t j = 0; j < n; j++) {
            dy[j] = y[j];
        }
        dy[(uint32_t)target[0]] -= 1.0f;
    } else {
        mote_squared_error_back(n, y, target, dy);
    }
    backward(m, x, rate, first_trained(m));
    return MOTE_OK;
}
