/* Checks a program, completely, before anything of it runs: a hostile one gets an error, never a read or a write
 * outside of its own bytes and of the arena. */
#include <string.h>

#include "mote_internal.h"

/* 1 if the sizes of a program's parts are such that no sum of a few overflows 32 bits. */
static int sizes_fit(const mote_header_t *h)
{
    return h->ops > 0 && h->ops <= INT16_MAX && h->tensors > 0 && h->tensors <= INT16_MAX &&
           ((h->params | h->activations | h->constants) & 3u) == 0 && h->params <= MOTE_MAX_BYTES &&
           h->activations <= MOTE_MAX_BYTES && h->constants <= MOTE_MAX_BYTES;
}

/* 1 if the header can be a program's; says nothing of what lies behind it. */
static int header_fits(const mote_header_t *h, size_t size)
{
    if (memcmp(h->magic, "MOTE", sizeof h->magic) != 0 || h->version != MOTE_FORMAT_VERSION ||
        h->header_size != sizeof *h || h->total_size != size || (h->flags & ~7) != 0 || !sizes_fit(h) ||
        (h->flags & MOTE_CARRIES_PARAMETERS && h->params > h->constants)) {
        return 0;
    }
    return sizeof *h + h->tensors * sizeof(mote_tensor_t) + h->ops * sizeof(mote_op_t) + h->constants == size;
}

static size_t arena_bytes(const mote_header_t *h)
{
    return (size_t)h->params * (h->flags & MOTE_HAS_MOMENTUM ? 2u : 1u) + h->activations;
}

size_t mote_arena_bytes(const void *program, size_t size)
{
    mote_header_t h;
    if (program == NULL || size < sizeof h) {
        return 0;
    }
    memcpy(&h, program, sizeof h);
    return header_fits(&h, size) ? arena_bytes(&h) : 0;
}

int mote_constants_fit(const mote_t *m, const mote_op_t *op, uint64_t bytes)
{
    return (op->constants & 3u) == 0 && bytes <= MOTE_MAX_BYTES && op->constants + bytes <= mote_header(m)->constants;
}

int mote_params_fit(const mote_t *m, const mote_op_t *op, uint64_t bytes)
{
    const mote_op_t *next = op + 1, *end = mote_ops(m) + mote_header(m)->ops;
    while (next < end && next->trained == 0) {
        next++;
    }
    uint32_t behind = next < end ? next->params : mote_header(m)->params;
    return (op->params & 3u) == 0 && bytes <= MOTE_MAX_BYTES && behind <= mote_header(m)->params &&
           op->params + ((bytes + 3) & ~(uint64_t)3) == behind;
}

int mote_weights_fit(const mote_t *m, const mote_op_t *op, uint64_t count, uint32_t biases, uint32_t skip)
{
    uint64_t w = 4 * count, b = 4 * (uint64_t)biases, constants = skip, params = 0;
    *(op->flags & MOTE_TRAINS_WEIGHTS ? &params : &constants) += w;
    *(op->flags & MOTE_TRAINS_BIAS ? &params : &constants) += b;
    return count <= MOTE_MAX_BYTES && mote_constants_fit(m, op, constants) &&
           (params == 0 || (op->trained == biases && mote_params_fit(m, op, params)));
}

/* In one dimension: every window reaches an element of the input. */
static int dimension_fits(uint32_t in, uint32_t out, uint32_t kernel, uint32_t stride, uint32_t dilation, uint32_t pad)
{
    return kernel > 0 && stride > 0 && dilation > 0 && pad <= (kernel - 1) * dilation &&
           (uint64_t)(out - 1) * stride < (uint64_t)in + pad;
}

int mote_windows_fit(const mote_t *m, const mote_op_t *op)
{
    const mote_tensor_t *in = mote_tensor(m, op->in), *out = mote_tensor(m, op->out);
    return dimension_fits(in->h, out->h, op->kernel_h, op->stride_h, op->dilation_h, op->pad_top) &&
           dimension_fits(in->w, out->w, op->kernel_w, op->stride_w, op->dilation_w, op->pad_left);
}

static int tensor_fits(const mote_t *m, const mote_tensor_t *t)
{
    const mote_header_t *h = mote_header(m);
    uint64_t size = (uint64_t)t->h * t->w * t->c; /* at most 2^48 */
    if (size == 0 || size > MOTE_MAX_BYTES / 4 || (t->type != MOTE_FLOAT32 && t->type != MOTE_INT8)) {
        return 0;
    }
    if (t->offset == MOTE_EXTERNAL) {
        const mote_tensor_t *input = mote_tensor(m, h->input);
        return t->type == input->type && size <= mote_size(input);
    }
    return (t->offset & 3u) == 0 && t->offset <= h->activations && mote_bytes(t) <= h->activations - t->offset;
}

/* 1 if a tensor of this number is there and in the arena. */
static int is_written(const mote_t *m, uint32_t number)
{
    return number < mote_header(m)->tensors && mote_tensor(m, number)->offset != MOTE_EXTERNAL;
}

/* 1 if `gradient` is none, or can be that with respect to tensor `of`. */
static int gradient_fits(const mote_t *m, uint32_t gradient, uint32_t of)
{
    return gradient == MOTE_NO_TENSOR ||
           (is_written(m, gradient) && of < mote_header(m)->tensors && mote_tensor(m, gradient)->type == MOTE_FLOAT32 &&
            mote_size(mote_tensor(m, gradient)) == mote_size(mote_tensor(m, of)));
}

/* 1 if the op keeps no mask, or is a ReLU whose mask has a bit for each element. */
static int mask_fits(const mote_t *m, const mote_op_t *op)
{
    if (!(op->flags & MOTE_MASKS)) {
        return 1;
    }
    return op->kind >= MOTE_RELU && op->kind <= MOTE_LEAKY_RELU && is_written(m, op->option) &&
           mote_tensor(m, op->option)->type == MOTE_INT8 &&
           mote_size(mote_tensor(m, op->option)) >= (mote_size(mote_tensor(m, op->out)) + 7) / 8;
}

static const mote_kernel_t *kernel_of(const mote_op_t *op)
{
    const mote_kernel_t *k = mote_kernels;
    while (k->kind != 0 && k->kind != op->kind) {
        k++;
    }
    return k;
}

static int is_training(const mote_op_t *op)
{
    return op->flags & (MOTE_TRAINS_WEIGHTS | MOTE_TRAINS_BIAS);
}

/* 1 if the op's tensors are there: values, gradients, and a mask. */
static int operands_fit(const mote_t *m, const mote_op_t *op)
{
    const mote_header_t *h = mote_header(m);
    return op->in < h->tensors && is_written(m, op->out) && (op->in2 == MOTE_NO_TENSOR || op->in2 < h->tensors) &&
           gradient_fits(m, op->dout, op->out) && gradient_fits(m, op->din, op->in) &&
           gradient_fits(m, op->din2, op->in2) && mask_fits(m, op);
}

/* 1 if the op is the next layer that trains, in order, or says nothing of training. Weights never train alone. */
static int layer_fits(const mote_t *m, const mote_op_t *op, const mote_kernel_t *kernel)
{
    if (!is_training(op)) {
        return op->layer == 0 && op->trained == 0;
    }
    int is_int8 = op->kind >= MOTE_FIRST_TRAINED_INT8;
    int can_train = is_int8 ? mote_header(m)->flags & MOTE_TRAINS_INT8 : kernel->norm != NULL;
    return op->flags & MOTE_TRAINS_BIAS && op->layer == m->layers && op->layer < MOTE_MAX_LAYERS &&
           (op->layer != 0 || op->params == 0) && op->trained != 0 && op->trained <= mote_tensor(m, op->out)->c &&
           can_train;
}

/* 1 if a gradient passes through the op only where it can, and where one is wanted of it. */
static int backward_fits(const mote_t *m, const mote_op_t *op, const mote_kernel_t *kernel)
{
    if (op->dout == MOTE_NO_TENSOR) {
        return !is_training(op) && op->din == MOTE_NO_TENSOR && op->din2 == MOTE_NO_TENSOR;
    }
    return kernel->backward != NULL && mote_header(m)->loss != MOTE_NO_LOSS;
}

static int op_fits(mote_t *m, const mote_op_t *op)
{
    const mote_kernel_t *kernel = kernel_of(op);
    if (kernel->kind == 0) {
        return MOTE_ERR_UNSUPPORTED;
    }
    if (op->reserved != 0 || (op->flags & ~63) != 0 || !operands_fit(m, op) || !layer_fits(m, op, kernel) ||
        !backward_fits(m, op, kernel)) {
        return MOTE_ERR_FORMAT;
    }
    if (is_training(op)) {
        m->trainable |= 1u << m->layers++;
    }
    return kernel->check(m, op) ? MOTE_OK : MOTE_ERR_FORMAT;
}

static const mote_loss_t *loss_of(const mote_header_t *h)
{
    const mote_loss_t *l = mote_losses;
    while (l->loss != 0 && l->loss != h->loss) {
        l++;
    }
    return l;
}

/* 1 if the tensors that the header names are there (the input is), and the classes are no more than the logits. */
static int ends_fit(const mote_t *m)
{
    const mote_header_t *h = mote_header(m);
    if (mote_tensor(m, h->input)->offset != MOTE_EXTERNAL || !is_written(m, h->logits) || !is_written(m, h->output)) {
        return 0;
    }
    const mote_tensor_t *logits = mote_tensor(m, h->logits), *output = mote_tensor(m, h->output);
    uint32_t size = mote_size(logits);
    return size == mote_size(output) && logits->type == output->type && h->classes != 0 && h->classes <= size &&
           (h->classes == size || logits->c == size);
}

/* The loss over these tensors. */
static int loss_fits(const mote_t *m)
{
    const mote_header_t *h = mote_header(m);
    int fits;
    if (h->loss == MOTE_NO_LOSS) {
        fits = h->output == h->logits && h->dlogits == MOTE_NO_TENSOR;
    } else if (loss_of(h)->loss == 0) {
        return MOTE_ERR_UNSUPPORTED;
    } else {
        fits = mote_tensor(m, h->logits)->type == MOTE_FLOAT32 && gradient_fits(m, h->dlogits, h->logits) &&
               h->huber_delta > 0.0f && mote_finite(h->huber_delta);
    }
    return fits ? MOTE_OK : MOTE_ERR_FORMAT;
}

/* All that lies behind a header that fits. Counts the layers that train. */
static int body_fits(mote_t *m)
{
    const mote_header_t *h = mote_header(m);
    if (h->input >= h->tensors) {
        return MOTE_ERR_FORMAT;
    }
    for (uint32_t i = 0; i < h->tensors; i++) {
        if (!tensor_fits(m, mote_tensor(m, i))) {
            return MOTE_ERR_FORMAT;
        }
    }
    int error = ends_fit(m) ? loss_fits(m) : MOTE_ERR_FORMAT;
    for (uint32_t i = 0; error == MOTE_OK && i < h->ops; i++) {
        error = op_fits(m, &mote_ops(m)[i]);
    }
    if (error == MOTE_OK && (m->layers != 0 ? h->dlogits == MOTE_NO_TENSOR : h->params != 0)) {
        error = MOTE_ERR_FORMAT;
    }
    return error;
}

/* The initial parameters, and no momentum. */
static void begin_parameters(const mote_t *m)
{
    const mote_header_t *h = mote_header(m);
    if (h->params != 0) {
        memset(m->arena, 0, arena_bytes(h) - h->activations);
        if (h->flags & MOTE_CARRIES_PARAMETERS) {
            memcpy(m->arena, mote_constants(m), h->params);
        }
    }
}

int mote_load(mote_t *m, const void *program, size_t size, void *arena, size_t arena_size)
{
    if (m == NULL || program == NULL || (uintptr_t)program % 4 != 0) {
        return MOTE_ERR_ARGUMENT;
    }
    const mote_header_t *h = program;
    const size_t unsummed = offsetof(mote_header_t, crc) + sizeof h->crc;
    if (size < sizeof *h || !header_fits(h, size)) {
        return MOTE_ERR_FORMAT;
    }
    if (mote_crc32(0, (const uint8_t *)program + unsummed, size - unsummed) != h->crc) {
        return MOTE_ERR_CRC;
    }
    mote_t loaded;
    memset(&loaded, 0, sizeof loaded);
    loaded.program = program;
    loaded.arena = arena;
    loaded.outputs = h->classes;
    loaded.random = 1;
    int error = body_fits(&loaded);
    if (error != MOTE_OK) {
        return error;
    }
    if (arena == NULL || arena_size < arena_bytes(h) || (uintptr_t)arena % 4 != 0) {
        return MOTE_ERR_ARENA;
    }
    begin_parameters(&loaded);
    loaded.mask = loaded.trainable;
    *m = loaded;
    return MOTE_OK;
}
