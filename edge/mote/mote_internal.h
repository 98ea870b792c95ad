/* What the engine's files share: the program's layout, its checked reading, and the kernels.
 *
 * A program, little-endian, every part aligned to 4 bytes:
 *     header | ops, in order | floats: initial parameters (if MOTE_CARRIES_PARAMETERS), then the frozen layers' weights
 * Offsets count floats: values and gradients in the arena behind the parameters. Tensors are [h][w][c]. Weights are
 * [out][in] (dense) and [out][kernel_h][kernel_w][in] (conv2d), then the bias [out].
 *
 * Values and gradients may share memory where their lifetimes allow it; the plan is made by edge/program.py and only
 * checked here. Step t of the time that a lifetime is measured in is: op t forward for t < n, the loss for t = n, and
 * op 2n - t backward for t > n.
 */
#ifndef MOTE_INTERNAL_H
#define MOTE_INTERNAL_H

#include "mote.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "programs are little-endian and read in place"
#endif
#if defined(__FLT_EVAL_METHOD__) && __FLT_EVAL_METHOD__ != 0
#error "float must be computed as float, or targets would not agree to the bit"
#endif

enum { MOTE_FORMAT_VERSION = 1, MOTE_CARRIES_PARAMETERS = 1 };
enum { MOTE_CROSS_ENTROPY = 1, MOTE_SQUARED_ERROR = 2 };
enum { MOTE_DENSE = 1, MOTE_CONV2D, MOTE_AVGPOOL, MOTE_MAXPOOL, MOTE_FLATTEN, MOTE_RELU, MOTE_TANH };
enum { MOTE_TRAINABLE = 1 };

#define MOTE_NONE UINT32_MAX        /* no such tensor in the arena */
#define MOTE_MAX_FLOATS 0x0fffffffu /* of any count, so that no sum of two in bytes overflows 32 bits */
#define MOTE_MAX_OPS 256u           /* so that checking every pair of tensors ends soon */
#define MOTE_MAX_LAYERS 32u         /* with parameters: the mask's bits */

typedef struct {
    uint8_t magic[4]; /* "MOTE" */
    uint16_t version;
    uint16_t header_size;
    uint32_t total_size;
    uint32_t crc; /* of every byte behind this one */
    uint16_t ops;
    uint8_t loss;
    uint8_t flags;
    uint16_t in_h, in_w, in_c;
    uint16_t reserved;    /* 0 */
    uint32_t params;      /* floats that train, first in the arena */
    uint32_t constants;   /* floats of the frozen layers' weights */
    uint32_t activations; /* floats of values and gradients, behind the parameters */
    uint32_t output;      /* offset of the model's output (probabilities under softmax cross-entropy) */
} mote_header_t;

typedef struct {
    uint8_t kind;
    uint8_t flags;
    uint8_t kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left;
    uint16_t in_h, in_w, in_c;
    uint16_t out_h, out_w, out_c;
    uint32_t params; /* in the parameter vector if MOTE_TRAINABLE, else in the constants */
    uint32_t out;    /* this op's output; MOTE_NONE for a flatten of the model's input */
    uint32_t grad;   /* the gradient with respect to that output, or MOTE_NONE */
} mote_op_t;

/* A checked program's parts. */
static inline const mote_header_t *mote_header(const mote_t *m)
{
    return (const mote_header_t *)(const void *)m->program;
}

static inline const mote_op_t *mote_ops(const mote_t *m)
{
    return (const mote_op_t *)(const void *)(m->program + sizeof(mote_header_t));
}

static inline const float *mote_floats(const mote_t *m)
{
    return (const float *)(const void *)(mote_ops(m) + mote_header(m)->ops);
}

static inline float *mote_activations(const mote_t *m)
{
    return m->arena + mote_header(m)->params;
}

static inline uint32_t mote_in_size(const mote_op_t *op)
{
    return (uint32_t)op->in_h * op->in_w * op->in_c;
}

static inline uint32_t mote_out_size(const mote_op_t *op)
{
    return (uint32_t)op->out_h * op->out_w * op->out_c;
}

static inline int mote_has_params(const mote_op_t *op)
{
    return op->kind == MOTE_DENSE || op->kind == MOTE_CONV2D;
}

/* Floats of weights, and of weights and bias, of an op that has parameters. */
static inline uint32_t mote_weights(const mote_op_t *op)
{
    return op->kind == MOTE_DENSE ? (uint32_t)op->in_c * op->out_c
                                  : (uint32_t)op->kernel_h * op->kernel_w * op->in_c * op->out_c;
}

/* 1 unless infinite or not a number. */
static inline int mote_finite(float v)
{
    return v - v == 0.0f;
}

/* 1 if all n numbers are. */
int mote_all_finite(const float *x, size_t n);

/* x, y: an op's input and output; dy, dx: the loss's gradients with respect to them. w: weights, then bias. */
void mote_dense(const mote_op_t *op, const float *w, const float *x, float *y);
void mote_conv2d(const mote_op_t *op, const float *w, const float *x, float *y);
void mote_avgpool(const mote_op_t *op, const float *x, float *y);
void mote_maxpool(const mote_op_t *op, const float *x, float *y);
void mote_relu(uint32_t n, const float *x, float *y);
void mote_tanh(uint32_t n, const float *x, float *y);

/* dx may be NULL: not wanted. update may be NULL (the layer is frozen), else it is w, and gets w -= rate * dL/dw after
 * w was used. */
void mote_dense_back(const mote_op_t *op, const float *w, float *update, float rate, const float *x, const float *dy,
                     float *dx);
void mote_conv2d_back(const mote_op_t *op, const float *w, float *update, float rate, const float *x, const float *dy,
                      float *dx);
void mote_avgpool_back(const mote_op_t *op, const float *dy, float *dx);
void mote_maxpool_back(const mote_op_t *op, const float *x, const float *dy, float *dx); /* dx may be x if disjoint */
void mote_relu_back(uint32_t n, const float *y, const float *dy, float *dx);
void mote_tanh_back(uint32_t n, const float *y, const float *dy, float *dx);

/* Windows that share no element: then the gradient can replace the input in place. */
static inline int mote_disjoint(const mote_op_t *op)
{
    return op->kernel_h == op->stride_h && op->kernel_w == op->stride_w;
}

/* Softmax of z into p (which may be z); returns the cross-entropy -ln p[target]. */
float mote_softmax(uint32_t n, const float *z, float *p, uint32_t target);
/* Mean of (y - target)^2, and its gradient (dy may be y). */
float mote_squared_error(uint32_t n, const float *y, const float *target);
void mote_squared_error_back(uint32_t n, const float *y, const float *target, float *dy);

float mote_expf(float x);
float mote_logf(float x);
float mote_tanhf(float x);

#endif
