/* Checks a program, completely, before anything of it runs: a hostile one gets an error, never a read or a write
 * outside of its own bytes and of the arena, and never two tensors in one place at one time. */
#include <string.h>

#include "mote_internal.h"

/* 1 if the header can be a program's; says nothing of the ops behind it. */
static int header_fits(const mote_header_t *h, size_t size)
{
    if (memcmp(h->magic, "MOTE", sizeof h->magic) != 0 || h->version != MOTE_FORMAT_VERSION ||
        h->header_size != sizeof *h || h->total_size != size || h->reserved != 0 || h->ops == 0 ||
        h->ops > MOTE_MAX_OPS || (h->flags & ~MOTE_CARRIES_PARAMETERS) != 0 ||
        (h->loss != MOTE_CROSS_ENTROPY && h->loss != MOTE_SQUARED_ERROR) || h->params > MOTE_MAX_FLOATS ||
        h->constants > MOTE_MAX_FLOATS || h->activations > MOTE_MAX_FLOATS) {
        return 0;
    }
    uint64_t floats = (uint64_t)h->constants + (h->flags & MOTE_CARRIES_PARAMETERS ? h->params : 0);
    return sizeof *h + (uint64_t)h->ops * sizeof(mote_op_t) + floats * sizeof(float) == size;
}

/* Floats of a tensor, or 0 if that is none or too many. */
static uint32_t volume(uint32_t h, uint32_t w, uint32_t c)
{
    uint64_t n = (uint64_t)h * w * c;
    return n > MOTE_MAX_FLOATS ? 0 : (uint32_t)n;
}

/* 1 if every one of `out` windows in a dimension covers at least one of its `in` elements. */
static int windows_fit(uint32_t in, uint32_t out, uint32_t kernel, uint32_t stride, uint32_t pad)
{
    return stride > 0 && pad < kernel && (out - 1) * stride < in + pad;
}

/* 1 if the op takes and gives the shapes that it says, and has only the fields that its kind has. */
static int shapes_fit(const mote_op_t *op)
{
    uint32_t in = volume(op->in_h, op->in_w, op->in_c), out = volume(op->out_h, op->out_w, op->out_c);
    int trainable = op->flags & MOTE_TRAINABLE;
    if (in == 0 || out == 0 || (op->flags & ~MOTE_TRAINABLE) != 0) {
        return 0;
    }
    if (op->kind == MOTE_CONV2D || op->kind == MOTE_AVGPOOL || op->kind == MOTE_MAXPOOL) {
        return windows_fit(op->in_h, op->out_h, op->kernel_h, op->stride_h, op->pad_top) &&
               windows_fit(op->in_w, op->out_w, op->kernel_w, op->stride_w, op->pad_left) &&
               (op->kind == MOTE_CONV2D || (op->in_c == op->out_c && !trainable && op->params == 0));
    }
    if (op->kernel_h || op->kernel_w || op->stride_h || op->stride_w || op->pad_top || op->pad_left) {
        return 0;
    }
    switch (op->kind) {
    case MOTE_DENSE:
        return in == op->in_c && out == op->out_c;
    case MOTE_FLATTEN:
        return in == op->out_c && in == out && !trainable && op->params == 0;
    case MOTE_RELU:
    case MOTE_TANH:
        return op->in_h == op->out_h && op->in_w == op->out_w && op->in_c == op->out_c && !trainable && op->params == 0;
    default:
        return 0;
    }
}

/* Floats of weights and bias of an op that has them. */
static uint64_t params_of(const mote_op_t *op)
{
    uint64_t fan_in = op->kind == MOTE_DENSE ? op->in_c : (uint64_t)op->kernel_h * op->kernel_w * op->in_c;
    return (fan_in + 1) * op->out_c;
}

/* What of a program the lifetimes depend on. */
typedef struct {
    const mote_op_t *ops;
    uint32_t count; /* of ops: the loss's time */
    uint32_t first; /* the first op that trains; count if none does */
    uint32_t loss, output;
} plan_t;

/* A tensor's place, and when it is written first and read last. */
typedef struct {
    uint32_t offset, size, birth, death;
} tensor_t;

static int is_pointwise(const mote_op_t *op)
{
    return op->kind == MOTE_RELU || op->kind == MOTE_TANH;
}

/* The op behind op i that computes with its output, past flattens; count if that is the loss. */
static uint32_t reader(const plan_t *p, uint32_t i)
{
    do {
        i++;
    } while (i < p->count && p->ops[i].kind == MOTE_FLATTEN);
    return i;
}

/* The output of op i, which is no flatten, and of the flattens behind it. */
static tensor_t value(const plan_t *p, uint32_t i)
{
    uint32_t next = reader(p, i);
    tensor_t t = {p->ops[i].out, mote_out_size(&p->ops[i]), i, next};
    if (is_pointwise(&p->ops[i]) && i > p->first) {
        t.death = 2 * p->count - i;
    } else if (next < p->count &&
               ((next > p->first && p->ops[next].kind == MOTE_MAXPOOL) || (p->ops[next].flags & MOTE_TRAINABLE) != 0)) {
        t.death = 2 * p->count - next;
    }
    return t;
}

/* The gradient with respect to that output. Asked for only where i >= first. */
static tensor_t gradient(const plan_t *p, uint32_t i)
{
    tensor_t t = {p->ops[i].grad, mote_out_size(&p->ops[i]), 2 * p->count - reader(p, i), 2 * p->count - i};
    return t;
}

/* The model's output under softmax cross-entropy. */
static tensor_t probabilities(const plan_t *p)
{
    tensor_t t = {p->output, mote_out_size(&p->ops[p->count - 1]), p->count, p->count};
    return t;
}

/* 1 if the step at this time reads an element before it writes the one in its place, and no other. */
static int in_place(const plan_t *p, uint32_t time)
{
    if (time == p->count) {
        return 1;
    }
    const mote_op_t *op = &p->ops[time < p->count ? time : 2 * p->count - time];
    return is_pointwise(op) || (time > p->count && op->kind == MOTE_MAXPOOL && mote_disjoint(op));
}

/* 1 if a and b never want the same memory at the same time. */
static int apart(const plan_t *p, tensor_t a, tensor_t b)
{
    if (a.offset + a.size <= b.offset || b.offset + b.size <= a.offset || a.death < b.birth || b.death < a.birth) {
        return 1;
    }
    return a.offset == b.offset && a.size == b.size &&
           ((a.death == b.birth && in_place(p, a.death)) || (b.death == a.birth && in_place(p, b.death)));
}

/* Tensor number k of the plan: all values, all gradients, then the probabilities. 0 if there is none of that number. */
static int nth(const plan_t *p, uint32_t k, tensor_t *t)
{
    if (k == 2 * p->count) {
        *t = probabilities(p);
        return p->loss == MOTE_CROSS_ENTROPY;
    }
    uint32_t i = k < p->count ? k : k - p->count;
    if (p->ops[i].kind == MOTE_FLATTEN || (k >= p->count && i < p->first)) {
        return 0;
    }
    *t = k < p->count ? value(p, i) : gradient(p, i);
    return 1;
}

/* 1 if every tensor lies in the arena and apart from every other. */
static int plan_fits(const plan_t *p, uint32_t activations)
{
    tensor_t a, b;
    for (uint32_t i = 0; i <= 2 * p->count; i++) {
        if (!nth(p, i, &a)) {
            continue;
        }
        if (a.size > activations || a.offset > activations - a.size) {
            return 0;
        }
        for (uint32_t j = 0; j < i; j++) {
            if (nth(p, j, &b) && !apart(p, a, b)) {
                return 0;
            }
        }
    }
    return 1;
}

/* Walks the ops: shapes from op to op, parameters one behind the other, flattens in place, gradients where wanted. */
static int program_fits(const mote_header_t *h, const mote_op_t *ops, mote_t *m)
{
    uint64_t params = 0, constants = 0;
    plan_t plan = {ops, h->ops, h->ops, h->loss, h->output};
    for (uint32_t i = 0; i < h->ops; i++) {
        const mote_op_t *op = &ops[i], *before = i == 0 ? NULL : op - 1;
        if (op->in_h != (before ? before->out_h : h->in_h) || op->in_w != (before ? before->out_w : h->in_w) ||
            op->in_c != (before ? before->out_c : h->in_c) || !shapes_fit(op)) {
            return 0;
        }
        if (mote_has_params(op)) {
            uint64_t *sum = op->flags & MOTE_TRAINABLE ? &params : &constants;
            if (op->params != *sum || m->layers == MOTE_MAX_LAYERS) {
                return 0;
            }
            *sum += params_of(op); /* 256 of at most 2^48 do not overflow */
            if (op->flags & MOTE_TRAINABLE) {
                m->trainable |= 1u << m->layers;
                plan.first = plan.first == h->ops ? i : plan.first;
            }
            m->layers++;
        }
        if (op->kind == MOTE_FLATTEN ? op->out != (before ? before->out : MOTE_NONE) : op->out == MOTE_NONE) {
            return 0;
        }
        if (i < plan.first ? op->grad != MOTE_NONE : op->grad == MOTE_NONE) {
            return 0;
        }
        if (op->kind == MOTE_FLATTEN && before && op->grad != before->grad) {
            return 0;
        }
    }
    if (params != h->params || constants != h->constants || ops[h->ops - 1].out == MOTE_NONE ||
        (h->loss == MOTE_SQUARED_ERROR && h->output != ops[h->ops - 1].out)) {
        return 0;
    }
    return plan_fits(&plan, h->activations);
}

size_t mote_arena_bytes(const void *program, size_t size)
{
    mote_header_t h;
    if (program == NULL || size < sizeof h) {
        return 0;
    }
    memcpy(&h, program, sizeof h);
    return header_fits(&h, size) ? sizeof(float) * ((size_t)h.params + h.activations) : 0;
}

int mote_load(mote_t *m, const void *program, size_t size, void *arena, size_t arena_size)
{
    if (m == NULL || program == NULL || (uintptr_t)program % sizeof(float) != 0) {
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
    mote_t loaded = {program, arena, 0, 0, 0};
    if (!program_fits(h, mote_ops(&loaded), &loaded)) {
        return MOTE_ERR_FORMAT;
    }
    if (arena_size < mote_arena_bytes(program, size) || (uintptr_t)arena % sizeof(float) != 0 ||
        (arena == NULL && mote_arena_bytes(program, size) != 0)) {
        return MOTE_ERR_ARENA;
    }
    if (h->params != 0) {
        if (h->flags & MOTE_CARRIES_PARAMETERS) {
            memcpy(arena, mote_floats(&loaded), h->params * sizeof(float));
        } else {
            memset(arena, 0, h->params * sizeof(float));
        }
    }
    loaded.mask = loaded.trainable;
    *m = loaded;
    return MOTE_OK;
}
