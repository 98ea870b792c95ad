/* Many devices in one process, and int8 weights as real numbers. Not for firmware. */
#include "mote_host.h"

#include <string.h>

#include "mote_internal.h"

void mote_learn_many(mote_t *const *devices, size_t count, size_t steps, const void *x, const float *targets,
                     float rate, float *losses, int *errors)
{
    const uint8_t *sample = x;
    for (size_t i = 0; i < count; i++) {
        mote_t *m = devices[i];
        size_t size = mote_inputs(m) * (mote_input_type(m) == MOTE_FLOAT32 ? sizeof(float) : 1);
        errors[i] = MOTE_OK;
        for (size_t step = 0; step < steps && errors[i] == MOTE_OK; step++) {
            size_t at = i * steps + step;
            errors[i] = mote_learn(m, sample + at * size, targets + at * mote_targets(m), rate, &losses[at]);
        }
    }
}

/* How a layer's parameters lie: int8 weights (none, if only the bias trains), and int32 biases behind them. */
typedef struct {
    const mote_op_t *op;
    uint32_t weights; /* int8, padded to 4 bytes */
    uint32_t run;     /* weights of one channel that follow each other: 1 in a depthwise kernel */
    uint32_t channels;
    float in_scale;
    const float *scales; /* of the weights */
    uint8_t *at;
} layer_t;

static layer_t int8_layer(const mote_t *m, const mote_op_t *op)
{
    const mote_tensor_t *in = mote_tensor(m, op->in), *out = mote_tensor(m, op->out);
    uint32_t window = (uint32_t)op->kernel_h * op->kernel_w;
    uint32_t per_channel = op->kind == MOTE_TRAINED_INT8_DENSE    ? mote_size(in)
                           : op->kind == MOTE_TRAINED_INT8_CONV2D ? window * in->c
                                                                  : window;
    const uint8_t *scales = mote_constants(m) + op->constants + sizeof(mote_range_t) + out->c * sizeof(mote_requant_t);
    layer_t layer = {op,
                     op->flags & MOTE_TRAINS_WEIGHTS ? per_channel * op->trained : 0,
                     op->kind == MOTE_TRAINED_INT8_DEPTHWISE ? 1 : per_channel,
                     op->trained,
                     in->scale,
                     (const float *)(const void *)scales,
                     m->arena + op->params};
    return layer;
}

static float weight_scale(const layer_t *l, uint32_t j)
{
    return l->scales[j / l->run % l->channels];
}

static int32_t *biases(const layer_t *l)
{
    return (int32_t *)(void *)(l->at + ((l->weights + 3) & ~3u));
}

/* v / scale rounded to the nearest, half away from 0, and saturated. */
static int32_t quantized(float v, float scale, float limit)
{
    double q = (double)v / (double)scale;
    q = q<-(double)limit ? -(double)limit : q>(double) limit ? (double)limit : q;
    return (int32_t)(q + (q < 0 ? -0.5 : 0.5));
}

static int is_int8(const mote_op_t *op)
{
    return op->kind >= MOTE_FIRST_TRAINED_INT8;
}

static size_t float_count(const mote_t *m, uint32_t layer)
{
    size_t first = 0, count = 0;
    (void)mote_layer(m, layer, &first, &count);
    return count;
}

size_t mote_get_real(const mote_t *m, float *values)
{
    size_t n = 0;
    for (uint32_t i = 0; mote_is_loaded(m) && i < m->layers; i++) {
        const mote_op_t *op = mote_op_of(m, i);
        layer_t l = is_int8(op) ? int8_layer(m, op) : (layer_t){0};
        size_t size = is_int8(op) ? l.weights + l.channels : float_count(m, i);
        if (values != NULL && !is_int8(op)) {
            memcpy(values + n, m->arena + op->params, size * sizeof(float));
        }
        for (uint32_t j = 0; values != NULL && j < l.weights; j++) {
            values[n + j] = (float)((int8_t *)l.at)[j] * weight_scale(&l, j);
        }
        for (uint32_t o = 0; values != NULL && o < l.channels; o++) {
            values[n + l.weights + o] = (float)biases(&l)[o] * (l.in_scale * l.scales[o]);
        }
        n += size;
    }
    return n;
}

void mote_set_real(mote_t *m, const float *values)
{
    if (!mote_is_loaded(m)) {
        return;
    }
    const mote_header_t *h = mote_header(m);
    if (h->flags & MOTE_HAS_MOMENTUM) {
        memset(m->arena + h->params, 0, h->params);
    }
    for (uint32_t i = 0; i < m->layers; i++) {
        const mote_op_t *op = mote_op_of(m, i);
        if (!is_int8(op)) {
            size_t count = float_count(m, i);
            memcpy(m->arena + op->params, values, count * sizeof(float));
            values += count;
            continue;
        }
        layer_t l = int8_layer(m, op);
        for (uint32_t j = 0; j < l.weights; j++) {
            ((int8_t *)l.at)[j] = (int8_t)quantized(*values++, weight_scale(&l, j), 127.0f);
        }
        for (uint32_t o = 0; o < l.channels; o++) {
            biases(&l)[o] = quantized(*values++, l.in_scale * l.scales[o], 2147483520.0f);
        }
    }
}

int mote_host_flash_read(void *flash, uint32_t at, void *out, uint32_t size)
{
    memcpy(out, ((const mote_host_flash_t *)flash)->image + at, size);
    return MOTE_OK;
}
