/* The engine: runs a checked program forward, and backward with the update of every layer that trains. */
#include "mote_internal.h"
#include "mote_vector.h"

size_t mote_inputs(const mote_t *m)
{
    return mote_is_loaded(m) ? mote_size(mote_tensor(m, mote_header(m)->input)) : 0;
}

size_t mote_outputs(const mote_t *m)
{
    return mote_is_loaded(m) ? m->outputs : 0;
}

size_t mote_targets(const mote_t *m)
{
    return mote_is_loaded(m) && mote_header(m)->loss == MOTE_CROSS_ENTROPY ? 1 : mote_outputs(m);
}

int mote_input_type(const mote_t *m)
{
    return mote_is_loaded(m) ? mote_tensor(m, mote_header(m)->input)->type : MOTE_ERR_ARGUMENT;
}

int mote_output_type(const mote_t *m)
{
    return mote_is_loaded(m) ? mote_tensor(m, mote_header(m)->output)->type : MOTE_ERR_ARGUMENT;
}

float *mote_parameters(mote_t *m, size_t *count)
{
    int has_floats = mote_is_loaded(m) && !(mote_header(m)->flags & MOTE_TRAINS_INT8);
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
    if (!mote_is_loaded(m) || layer >= m->layers || first == NULL || count == NULL) {
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
    if (!mote_is_loaded(m)) {
        return MOTE_ERR_ARGUMENT;
    }
    if ((layers & ~m->trainable) != 0) {
        return MOTE_ERR_FROZEN;
    }
    m->mask = layers;
    m->biases_only = biases_only;
    return MOTE_OK;
}

int mote_grow(mote_t *m)
{
    if (!mote_is_loaded(m)) {
        return MOTE_ERR_ARGUMENT;
    }
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

float mote_squares(const float *x, uint32_t n)
{
    float sum = 0.0f;
#if MOTE_HAS_VLDM
    for (; n >= 8; n -= 8) {
        __asm__("vldmia %[x]!, {s8-s15}\n\t"
                "vmla.f32 %[sum], s8, s8\n\t"
                "vmla.f32 %[sum], s9, s9\n\t"
                "vmla.f32 %[sum], s10, s10\n\t"
                "vmla.f32 %[sum], s11, s11\n\t"
                "vmla.f32 %[sum], s12, s12\n\t"
                "vmla.f32 %[sum], s13, s13\n\t"
                "vmla.f32 %[sum], s14, s14\n\t"
                "vmla.f32 %[sum], s15, s15"
                : [x] "+r"(x), [sum] "+t"(sum)
                :
                : "s8", "s9", "s10", "s11", "s12", "s13", "s14", "s15", "memory");
    }
#endif
    for (; n > 0; n--, x++) {
        sum += *x * *x;
    }
    return sum;
}

#define NEAR 0x1p50f

/* 1 if the squared norm of a tensor of floats is surely below NEAR. Cheaper than the norm without a floating-point
 * unit: there every element is below 2^17 if no exponent, whose bias is 127, reaches 144, that is, if none has its
 * highest bit set and one of the next three. */
static MOTE_APART int is_near(const mote_t *m, uint32_t tensor)
{
    const float *x = mote_read(m, tensor);
    uint32_t n = mote_size(mote_tensor(m, tensor));
#if MOTE_HAS_LANES
    return mote_dot(x, x, n) < NEAR;
#elif MOTE_HAS_VLDM
    return mote_squares(x, n) < NEAR;
#else
    uint32_t large = n >> 16;
    for (; n > 0; n--) {
        uint32_t bits = mote_bits(*x++);
        large |= (bits << 1 | bits << 2 | bits << 3) & bits & 0x40000000u;
    }
    return large == 0;
#endif
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
static void forward(mote_t *m)
{
    const mote_op_t *op = mote_ops(m), *end = op + mote_header(m)->ops;
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

static float squared_norm(const mote_t *m, uint32_t tensor)
{
    return mote_squares(mote_read(m, tensor), mote_size(mote_tensor(m, tensor)));
}

/* 1 if an op's update stays within the range of floats. The norms of the gradient and of the input bound every element
 * of it: if their product is finite, an update is at most MOTE_MAX_RATE * 2^64, which added to any float gives no
 * infinite one. It is, without computing them, if both are near. */
static int update_fits(const mote_t *m, const mote_op_t *op, int near)
{
    const mote_tensor_t *in = mote_tensor(m, op->in);
    /* A bias needs no input, which may be gone. */
    int takes_input = in->type == MOTE_FLOAT32 && op->flags & MOTE_TRAINS_WEIGHTS;
    if (near && (!takes_input || (in->offset == MOTE_EXTERNAL ? !m->is_far : is_near(m, op->in)))) {
        return 1;
    }
    float product = squared_norm(m, op->dout);
    if (takes_input) {
        product *= 1.0f + squared_norm(m, op->in);
    }
    return mote_finite(product);
}

/* 1 if the op's input gradient can be any number of times its output's: it is multiplied by weights or a slope, or added
 * to what another op left there. */
static int has_gain(const mote_op_t *op)
{
    return op->kind <= MOTE_DEPTHWISE || op->kind == MOTE_LAYERNORM || op->kind == MOTE_LEAKY_RELU ||
           op->kind >= MOTE_INT8_DENSE || (op->flags & (MOTE_ADDS_DIN | MOTE_ADDS_DIN2)) != 0;
}

/* 1 if the gradient that the op has left there is near, or if it has left none. */
static int left_near(const mote_t *m, const mote_op_t *op)
{
    return (op->din == MOTE_NO_TENSOR || is_near(m, op->din)) && (op->din2 == MOTE_NO_TENSOR || is_near(m, op->din2));
}

int mote_go_back(mote_t *m, float loss)
{
    const mote_op_t *first = mote_ops(m) + m->first, *op = mote_ops(m) + mote_header(m)->ops;
    int near = loss < NEAR / 4.0f; /* the squared norm of its gradient is at most 2 or, of some losses, 4 * loss */
    while (op-- > first) {
        if (op->dout == MOTE_NO_TENSOR) {
            continue;
        }
        if (op->trained != 0 && (m->mask >> op->layer & 1u) && !update_fits(m, op, near)) {
            return MOTE_ERR_DIVERGED;
        }
        mote_kernel_of(op)->backward(m, op);
        if (near && op != first && has_gain(op)) {
            near = left_near(m, op);
        }
    }
    return MOTE_OK;
}

static int input_fits(mote_t *m, const void *x)
{
    if (!mote_is_loaded(m) || x == NULL) {
        return 0;
    }
    const mote_tensor_t *in = mote_tensor(m, mote_header(m)->input);
    m->x = x;
    m->is_far = in->type == MOTE_FLOAT32 && !is_near(m, mote_header(m)->input);
    return !m->is_far || mote_all_finite(x, mote_size(in));
}

int mote_infer(mote_t *m, const void *x, const void **y)
{
    if (y == NULL || !input_fits(m, x)) {
        return MOTE_ERR_ARGUMENT;
    }
    const mote_header_t *h = mote_header(m);
    forward(m);
    if (h->loss != MOTE_NO_LOSS) {
        mote_loss_of(h)->forward(m, m->outputs, mote_read(m, h->logits), NULL, mote_write(m, h->output));
    }
    *y = mote_read(m, h->output);
    int is_float = mote_tensor(m, h->output)->type == MOTE_FLOAT32;
    return is_float && !mote_all_finite(*y, m->outputs) ? MOTE_ERR_DIVERGED : MOTE_OK;
}

/* Whether a loss can be computed: MOTE_OK if so. */
static MOTE_APART int loss_fits(mote_t *m, const void *x, const float *target)
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
    forward(m);
    const mote_header_t *h = mote_header(m);
    *y = mote_read(m, h->output);
    *loss = mote_loss_of(h)->forward(m, m->outputs, mote_read(m, h->logits), target, mote_write(m, h->output));
    return mote_finite(*loss) ? MOTE_OK : MOTE_ERR_DIVERGED;
}

int mote_learn(mote_t *m, const void *x, const float *target, float rate, float *loss)
{
    const void *y;
    if (!mote_is_rate(rate)) {
        return MOTE_ERR_ARGUMENT;
    }
    int error = mote_loss(m, x, target, loss, &y);
    if (error == MOTE_OK && m->mask != 0) {
        m->step = -rate;
        mote_begin_back(m, y, target, 1.0f);
        error = mote_go_back(m, *loss);
    }
    return error;
}
