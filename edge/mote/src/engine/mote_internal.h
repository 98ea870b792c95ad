/* What the engine's files share: the program's layout, its checked reading, and what a kernel is.
 *
 * A program, little-endian, every part aligned to 4 bytes:
 *     header | tensors | ops, in the order of execution | constants
 * docs/reference/program-format.md specifies it. Tensors are [h][w][c]. All offsets and sizes are bytes.
 *
 * Where tensors lie in the arena is planned by edge/model/memory_plan.py. Here it is only checked that each lies
 * inside: a plan in which two overlap computes nonsense, and reads and writes nothing that it should not.
 */
#ifndef MOTE_INTERNAL_H
#define MOTE_INTERNAL_H

#include <string.h>

#include "mote.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "programs are little-endian and read in place"
#endif
#if defined(__FLT_EVAL_METHOD__) && __FLT_EVAL_METHOD__ != 0
#error "float must be computed as float, or targets would not agree to the bit"
#endif

enum { MOTE_FORMAT_VERSION = 2 };
/* Header flags. */
enum { MOTE_CARRIES_PARAMETERS = 1, MOTE_HAS_MOMENTUM = 2, MOTE_TRAINS_INT8 = 4 };
/* Losses. */
enum { MOTE_NO_LOSS = 0, MOTE_CROSS_ENTROPY, MOTE_SQUARED_ERROR, MOTE_BINARY_CROSS_ENTROPY, MOTE_HUBER };
/* Op flags. */
enum {
    MOTE_TRAINS_WEIGHTS = 1,
    MOTE_TRAINS_BIAS = 2,
    MOTE_ADDS_DIN = 4,
    MOTE_ADDS_DIN2 = 8,
    MOTE_FILLS = 16,
    MOTE_MASKS = 32 /* a ReLU of any kind keeps bits instead of its output: see option */
};

/* Kinds of op. The constants that each has behind op->constants, in this order, every part aligned to 4 bytes:
 * W, B: weights and bias, where they do not train; they lie behind op->params, in this order, where they do. */
enum {
    /* float32 */
    MOTE_DENSE = 1,  /* W [out][in], B [out] */
    MOTE_CONV2D,     /* W [out][kernel_h][kernel_w][in], B [out] */
    MOTE_DEPTHWISE,  /* W [kernel_h][kernel_w][out], B [out]; output channel o reads input channel o * in_c / out_c */
    MOTE_AVGPOOL,    /* the mean of the elements that a window covers; padding does not count */
    MOTE_MAXPOOL,    /* */
    MOTE_LAYERNORM,  /* float epsilon, W gamma [c], B beta [c]: over the channels of every place */
    MOTE_ADD,        /* in + in2, of one shape */
    MOTE_RELU,       /* */
    MOTE_RELU6,      /* */
    MOTE_LEAKY_RELU, /* float slope */
    MOTE_TANH,       /* */
    MOTE_SIGMOID,    /* */
    MOTE_SOFTMAX,    /* over the channels of every place; not the loss's */
    /* float32 or int8 */
    MOTE_PLACE = 24, /* copies in to (pad_top, pad_left, option) of out. MOTE_FILLS: clears the rest to 0, or the zero
                        point. Concatenation is one for each part, padding is one that fills */
    MOTE_SLICE,      /* int32 begin h, w, c, stride h, w, c: out[i] = in[begin + i * stride] */
    /* between them */
    MOTE_QUANTIZE = 28, /* float32 -> int8: round(x / scale), half away from 0, + zero point, clamped */
    MOTE_DEQUANTIZE,    /* int8 -> float32: scale * (q - zero point) */
    /* int8, by TFLite's specification. R: mote_requant_t for every output channel. A: mote_range_t. */
    MOTE_INT8_DENSE = 32, /* A, R [out], weights [out][in] */
    MOTE_INT8_CONV2D,     /* A, R [out], weights [out][kernel_h][kernel_w][in] */
    MOTE_INT8_DEPTHWISE,  /* A, R [out], weights [kernel_h][kernel_w][out] */
    MOTE_INT8_AVGPOOL,    /* A */
    MOTE_INT8_MAXPOOL,    /* A */
    MOTE_INT8_ADD,        /* mote_int8_add_t */
    MOTE_INT8_MUL,        /* A, int32 in offset, in2 offset, out offset, multiplier, shift */
    MOTE_INT8_MEAN,       /* A, int32 multiplier, shift, bias: over rows and columns, to [1][1][c] */
    MOTE_INT8_SOFTMAX,    /* int32 multiplier, left shift, diff_min: as TFLite's reference prepares them */
    MOTE_INT8_TABLE,      /* int8 table[256] by (uint8_t)(in + 128): logistic, tanh, requantisation, ... */
    /* int8 weights that train. The output channels 0 .. op->trained - 1 have their weights (int8, [trained][...], or
     * [kernel_h][kernel_w][trained]; padded to 4 bytes) and then their bias (int32, not folded) behind op->params.
     * A, R [out], float weight scale [out], then weights of all channels that do not train, as above without the
     * first `trained` ones. If only MOTE_TRAINS_BIAS: the constants hold all weights, op->params the biases. R's bias
     * of a channel that trains is 0 if its weights do, else - zero point * sum of weights. */
    MOTE_TRAINED_INT8_DENSE = 48,
    MOTE_TRAINED_INT8_CONV2D,
    MOTE_TRAINED_INT8_DEPTHWISE
};

/* From here on kinds have int8 weights that train. */
#define MOTE_FIRST_TRAINED_INT8 MOTE_TRAINED_INT8_DENSE

/* A function whose frame is taken beside those of what else its caller calls, not inside it: for the stack's depth. */
#if defined(__clang__)
#define MOTE_APART __attribute__((noinline))
#elif defined(__GNUC__)
#define MOTE_APART __attribute__((noinline, noclone)) /* a clone may take more arguments, on the caller's stack */
#else
#define MOTE_APART
#endif

#define MOTE_NO_TENSOR UINT16_MAX
#define MOTE_EXTERNAL UINT32_MAX   /* a tensor's offset: it is the model's input, at mote_t.x */
#define MOTE_MAX_BYTES 0x10000000u /* of any size, so that no sum of a few overflows 32 bits */
#define MOTE_MAX_LAYERS 32u        /* that train: the mask's bits */

typedef struct {
    uint8_t magic[4]; /* "MOTE" */
    uint16_t version;
    uint16_t header_size;
    uint32_t total_size;
    uint32_t crc; /* of every byte behind this one */
    uint16_t tensors, ops;
    uint8_t loss, flags;
    uint16_t input;   /* tensor: external */
    uint16_t logits;  /* tensor: what the ops compute; what the loss takes */
    uint16_t output;  /* tensor: what mote_infer gives; another one than logits under a cross-entropy (its memory may be
                         the same) */
    uint16_t dlogits; /* tensor: the gradient with respect to logits, or MOTE_NO_TENSOR */
    uint16_t classes; /* outputs in use at first; the logits' size unless the program keeps room for more */
    float huber_delta;
    uint32_t params;      /* bytes that train, first in the arena; as many again behind them if MOTE_HAS_MOMENTUM */
    uint32_t activations; /* bytes of values and gradients */
    uint32_t constants;   /* bytes behind the ops: the initial parameters first, if MOTE_CARRIES_PARAMETERS */
} mote_header_t;          /* 48 bytes */

typedef struct {
    uint8_t type;      /* MOTE_FLOAT32 or MOTE_INT8 */
    int8_t zero_point; /* of int8 */
    uint16_t h, w, c;
    uint32_t offset; /* in the activations, aligned to 4 bytes; or MOTE_EXTERNAL */
    float scale;     /* of int8 */
} mote_tensor_t;     /* 16 bytes */

typedef struct {
    uint8_t kind, flags;
    uint8_t layer;            /* its number among those that train; 0 if it does not */
    uint8_t reserved;         /* 0 */
    uint16_t in, in2, out;    /* tensors; in2 may be MOTE_NO_TENSOR */
    uint16_t dout, din, din2; /* float32 tensors: the loss's gradients with respect to them; MOTE_NO_TENSOR: not wanted.
                                 din may be dout's memory where the op works in place */
    uint16_t kernel_h, kernel_w, pad_top, pad_left;
    uint8_t stride_h, stride_w, dilation_h, dilation_w;
    uint16_t option;    /* MOTE_PLACE: first channel. MOTE_MASKS: an int8 tensor of at least a bit for each element of
                           out, the lowest first: whether it is above 0 (and below 6, of MOTE_RELU6), written forward and
                           read backward, where out is not read any more */
    uint16_t trained;   /* output channels that train; 0 or all of them but for MOTE_TRAINED_INT8_* */
    uint32_t params;    /* offset in what trains */
    uint32_t constants; /* offset in the constants */
} mote_op_t;            /* 40 bytes */

/* acc = bias + sum of weight * input over ALL of a window's taps, those outside the input count as its zero point:
 * bias is folded, bias - zero point * sum of weights. out = clamp(zero point + requantised acc). */
typedef struct {
    int32_t bias, multiplier, shift; /* shift > 0: to the left, as TFLite's quantized multiplier */
} mote_requant_t;

typedef char mote_header_is_48_bytes[sizeof(mote_header_t) == 48 ? 1 : -1];
typedef char mote_tensor_is_16_bytes[sizeof(mote_tensor_t) == 16 ? 1 : -1];
typedef char mote_op_is_40_bytes[sizeof(mote_op_t) == 40 ? 1 : -1];

typedef struct {
    int8_t low, high; /* what an output is clamped to */
    uint16_t reserved;
} mote_range_t;

/* As TFLite's ArithmeticParams. */
typedef struct {
    int32_t in_offset, in2_offset, out_offset, left_shift;
    int32_t in_multiplier, in_shift, in2_multiplier, in2_shift, out_multiplier, out_shift;
    mote_range_t range;
} mote_int8_add_t;

/* What an image holds of a kind of op. */
typedef struct {
    uint8_t kind;
    /* 1 if the op's tensors, fields, parameters and constants are such that forward and backward stay inside of them.
     * The tensors that it names exist, lie in the arena (or are the input, where they are read), in and out are there,
     * and gradients are float32, of their tensors' shapes. */
    int (*check)(const mote_t *m, const mote_op_t *op);
    void (*forward)(const mote_t *m, const mote_op_t *op);
    /* Gradients (mote_din, mote_din2), and the update of what trains (mote_update). NULL: none passes through it. */
    void (*backward)(mote_t *m, const mote_op_t *op);
    /* Squared norm of the gradient with respect to what trains now. NULL: it has nothing that trains. */
    float (*norm)(const mote_t *m, const mote_op_t *op);
} mote_kernel_t;

typedef struct {
    uint8_t loss;
    /* 1 if the target can be one. */
    int (*target_fits)(uint32_t n, const float *target);
    /* From n logits to the model's output y (probabilities under a cross-entropy; y may be logits). Returns the loss,
     * or 0 if the target is NULL. */
    float (*forward)(const mote_t *m, uint32_t n, const float *logits, const float *target, float *y);
    /* dL / dlogits, from the output (dy may be y). */
    void (*gradient)(const mote_t *m, uint32_t n, const float *y, const float *target, float *dy);
} mote_loss_t;

/* The image's own tables, each ended by an entry of zeros: see mote_kernels.c. */
extern const mote_kernel_t mote_kernels[];
extern const mote_loss_t mote_losses[];

static inline int mote_is_loaded(const mote_t *m)
{
    return m != NULL && m->program != NULL;
}

/* A checked program's parts. */
static inline const mote_header_t *mote_header(const mote_t *m)
{
    return (const mote_header_t *)(const void *)m->program;
}

static inline const mote_tensor_t *mote_tensor(const mote_t *m, uint32_t number)
{
    return (const mote_tensor_t *)(const void *)(m->program + sizeof(mote_header_t)) + number;
}

static inline const mote_op_t *mote_ops(const mote_t *m)
{
    return (const mote_op_t *)(const void *)mote_tensor(m, mote_header(m)->tensors);
}

static inline const uint8_t *mote_constants(const mote_t *m)
{
    return (const uint8_t *)(mote_ops(m) + mote_header(m)->ops);
}

static inline uint8_t *mote_activations(const mote_t *m)
{
    const mote_header_t *h = mote_header(m);
    return m->arena + h->params + (h->flags & MOTE_HAS_MOMENTUM ? h->params : 0);
}

/* Elements and bytes of a tensor. */
static inline uint32_t mote_size(const mote_tensor_t *t)
{
    return (uint32_t)t->h * t->w * t->c;
}

static inline uint32_t mote_bytes(const mote_tensor_t *t)
{
    return t->type == MOTE_FLOAT32 ? 4 * mote_size(t) : mote_size(t);
}

/* A tensor's elements to be read. */
static inline const void *mote_read(const mote_t *m, uint32_t tensor)
{
    uint32_t offset = mote_tensor(m, tensor)->offset;
    return offset == MOTE_EXTERNAL ? m->x : mote_activations(m) + offset;
}

/* A tensor's elements to be written: never the input. */
static inline void *mote_write(const mote_t *m, uint32_t tensor)
{
    return mote_activations(m) + mote_tensor(m, tensor)->offset;
}

/* A gradient to be written, or NULL if nobody wants it: the first op of a backward pass has something that trains, and
 * so a single input. */
static inline float *mote_din(const mote_t *m, const mote_op_t *op)
{
    return op->din == MOTE_NO_TENSOR || op == &mote_ops(m)[m->first] ? NULL : (float *)mote_write(m, op->din);
}

/* The same, cleared first unless the op adds to what is there. */
static inline float *mote_begun_din(const mote_t *m, const mote_op_t *op)
{
    float *din = mote_din(m, op);
    if (din != NULL && !(op->flags & MOTE_ADDS_DIN)) {
        memset(din, 0, mote_size(mote_tensor(m, op->in)) * sizeof *din);
    }
    return din;
}

static inline float *mote_din2(const mote_t *m, const mote_op_t *op)
{
    return op->din2 == MOTE_NO_TENSOR ? NULL : (float *)mote_write(m, op->din2);
}

/* A float op's weights and bias, and where their updates go: NULL where they do not train now. */
typedef struct {
    const float *w, *b;
    float *dw, *db;
} mote_weights_t;

/* Of an op with `count` weights, whose constants begin with `skip` bytes of something else. */
mote_weights_t mote_weights(const mote_t *m, const mote_op_t *op, uint32_t count, uint32_t skip);

/* Checks that the constants hold `skip` bytes, and that `count` weights and `biases` floats lie where the op's flags
 * say: 1 if so. */
int mote_weights_fit(const mote_t *m, const mote_op_t *op, uint64_t count, uint32_t biases, uint32_t skip);

/* 1 if so many bytes lie behind op->constants, which must be a multiple of 4. */
int mote_constants_fit(const mote_t *m, const mote_op_t *op, uint64_t bytes);

/* 1 if so many bytes, rounded up to a multiple of 4, are all from op->params to the next layer's, or to the end. */
int mote_params_fit(const mote_t *m, const mote_op_t *op, uint64_t bytes);

/* The op of layer i, i < m->layers. */
const mote_op_t *mote_op_of(const mote_t *m, uint32_t layer);

/* The kernel of a checked op; the loss of a checked program that has one. */
const mote_kernel_t *mote_kernel_of(const mote_op_t *op);
const mote_loss_t *mote_loss_of(const mote_header_t *h);

/* Begins a backward pass of what the mask names: scale * dL/dlogits, from the output y, and where it ends, m->first. */
void mote_begin_back(mote_t *m, const float *y, const float *target, float scale);

/* The backward pass, updating what the mask names by m->step; loss is the step's. MOTE_ERR_DIVERGED: the gradient
 * overflowed, and the layers that it did not reach are as they were. */
int mote_go_back(mote_t *m, float loss);

/* 1 if every window of the op's output covers at least one element of its input, or of its padding's inner edge:
 * out, kernel, stride, dilation and padding fit together. */
int mote_windows_fit(const mote_t *m, const mote_op_t *op);

/* Rows of weights in use: fewer than the output's channels only in the head of a model that can still grow. */
static inline uint32_t mote_rows(const mote_t *m, const mote_op_t *op)
{
    return op->out == mote_header(m)->logits ? m->outputs : mote_tensor(m, op->out)->c;
}

/* A float's bits. Comparing them is quick even without a floating-point unit. */
static inline uint32_t mote_bits(float v)
{
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    return bits;
}

/* v < 0 */
static inline int mote_negative(float v)
{
    return mote_bits(v) - 0x80000001u < 0x7f800000u;
}

/* 1 unless infinite or not a number. */
static inline int mote_finite(float v)
{
    return (mote_bits(v) & 0x7f800000u) != 0x7f800000u;
}

int mote_all_finite(const float *x, size_t n);

/* The sum of n squares, in this order. */
float mote_squares(const float *x, uint32_t n);

static inline int mote_is_rate(float rate)
{
    return rate >= 0.0f && rate <= (float)MOTE_MAX_RATE;
}

float mote_expf(float x);
float mote_logf(float x);
float mote_tanhf(float x);
float mote_sqrtf(float x);

#endif
