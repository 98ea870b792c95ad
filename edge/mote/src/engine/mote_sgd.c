/* Momentum, weight decay and clipping by norm. No gradient is ever stored: momentum takes it up as it is computed,
 * decay is folded into the step, and clipping goes forward and backward once more. */
#include "mote_internal.h"

/* The floats of layer i that train now: [*first, first + the result). */
static uint32_t training(const mote_t *m, uint32_t layer, size_t *first)
{
    size_t count = 0;
    if (!(m->mask >> layer & 1u)) {
        return 0;
    }
    (void)mote_layer(m, layer, first, &count);
    if (m->biases_only >> layer & 1u) {
        size_t biases = mote_op_of(m, layer)->trained;
        *first += count - biases;
        count = biases;
    }
    return (uint32_t)count;
}

/* to = a * to + b * from, of all that trains now; both are blocks of parameters or of momentum. */
static void blend(const mote_t *m, float *to, float a, const float *from, float b)
{
    size_t first = 0;
    for (uint32_t layer = 0; layer < m->layers; layer++) {
        uint32_t count = training(m, layer, &first);
        for (size_t i = first; i < first + count; i++) {
            to[i] = a * to[i] + b * from[i];
        }
    }
}

/* The squared norm of the gradient with respect to all that trains now. Changes nothing but activations. */
static float squared_norm(mote_t *m)
{
    const mote_op_t *first = mote_ops(m) + m->first, *op = mote_ops(m) + mote_header(m)->ops;
    uint32_t mask = m->mask;
    float sum = 0.0f;
    while (op-- > first) {
        if (op->trained != 0 && (mask >> op->layer & 1u)) {
            sum += mote_kernel_of(op)->norm(m, op);
        }
        if (op->dout != MOTE_NO_TENSOR && op != first) {
            m->mask = 0; /* nothing is updated */
            mote_kernel_of(op)->backward(m, op);
            m->mask = mask;
        }
    }
    return sum;
}

/* Puts into m->step what clipping multiplies the gradient by. 0 if the gradient is not finite. */
static MOTE_APART int clip(mote_t *m, const float *y, const float *target, float most)
{
    mote_begin_back(m, y, target, 1.0f);
    float norm = mote_sqrtf(squared_norm(m));
    m->step = norm > most ? most / norm : 1.0f;
    return mote_finite(norm);
}

/* What comes before the backward pass, and behind it, so that it is an update with momentum and decay. */
static MOTE_APART void begin_update(mote_t *m, const mote_sgd_t *options)
{
    float *w = (float *)(void *)m->arena, *v = w + mote_header(m)->params / sizeof(float);
    if (options->momentum > 0.0f) {
        blend(m, v, options->momentum, w, options->weight_decay);
        m->step = 1.0f;
        m->to_momentum = 1;
    } else { /* kept * w - rate * g = kept * (w - rate / kept * g): the input's gradient is of the whole w */
        m->step = -options->rate / (1.0f - options->rate * options->weight_decay);
    }
}

static MOTE_APART void end_update(mote_t *m, const mote_sgd_t *options)
{
    float *w = (float *)(void *)m->arena, *v = w + mote_header(m)->params / sizeof(float);
    float kept = 1.0f - options->rate * options->weight_decay;
    if (options->momentum > 0.0f) {
        blend(m, w, 1.0f, v, -options->rate);
    } else if (kept != 1.0f) {
        blend(m, w, 0.0f, w, kept);
    }
}

static MOTE_APART int fits(const mote_sgd_t *options)
{
    return options != NULL && mote_is_rate(options->rate) && options->momentum >= 0.0f && options->momentum < 1.0f &&
           options->weight_decay >= 0.0f && options->rate * options->weight_decay < 1.0f &&
           mote_is_rate(options->rate / (1.0f - options->rate * options->weight_decay)) && options->clip_norm >= 0.0f;
}

int mote_learn_with(mote_t *m, const void *x, const float *target, const mote_sgd_t *options, float *loss)
{
    const void *y;
    if (!fits(options)) {
        return MOTE_ERR_ARGUMENT;
    }
    int error = mote_loss(m, x, target, loss, &y);
    if (error != MOTE_OK) {
        return error;
    }
    const mote_header_t *h = mote_header(m);
    if (h->flags & MOTE_TRAINS_INT8 || (options->momentum > 0.0f && !(h->flags & MOTE_HAS_MOMENTUM))) {
        return MOTE_ERR_FROZEN;
    }
    if (m->mask == 0) {
        return MOTE_OK;
    }
    m->step = 1.0f;
    if (options->clip_norm > 0.0f) {
        if (!clip(m, y, target, options->clip_norm)) {
            return MOTE_ERR_DIVERGED;
        }
        (void)mote_loss(m, x, target, loss, &y); /* gradients lie where values were */
    }
    mote_begin_back(m, y, target, m->step);
    begin_update(m, options);
    error = mote_go_back(m, *loss);
    m->to_momentum = 0;
    if (error == MOTE_OK) {
        end_update(m, options);
    }
    return error;
}
