/* mote: learning on a microcontroller. C99, no malloc, no OS, no stdio.
 *
 * A model is a pair (program, arena). The program is a checked binary that is read in place, from flash or RAM; the
 * arena is caller-owned RAM that holds what trains, first, then the optimiser's momentum if the program has room for
 * it, then the planned activations and gradients. Every function returns MOTE_OK or a negative error; nothing is
 * written to the arena on a bad argument.
 *
 * Arithmetic is in a fixed order (and, unless built with MOTE_FAST, without contraction), so that every target computes
 * the same bits.
 *
 * An image links the operators that its table `mote_kernels` names: mote_kernels.c names all; a build for known models
 * replaces that file by a table of those that they need.
 */
#ifndef MOTE_H
#define MOTE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MOTE_VERSION "0.2.0"

#define MOTE_MAX_RATE 1000000 /* a learning rate is from 0 to this */

enum {
    MOTE_OK = 0,
    MOTE_ERR_ARGUMENT = -1,   /* NULL, no program loaded, wrong size, a number that is not finite, or no such rate */
    MOTE_ERR_FORMAT = -2,     /* not a program, wrong version, an offset, shape or size that does not fit */
    MOTE_ERR_CRC = -3,        /* the program's bytes are damaged */
    MOTE_ERR_ARENA = -4,      /* the arena is too small or not aligned to 4 bytes */
    MOTE_ERR_FROZEN = -5,     /* asked to train what this program was not planned to train */
    MOTE_ERR_TARGET = -6,     /* a class index or probability out of range, or a target that is not finite */
    MOTE_ERR_DIVERGED = -7,   /* the loss, a gradient or the output is not finite: the parameters, or the rate, are too
                                 large */
    MOTE_ERR_UNSUPPORTED = -8,    /* the program has an operator or a loss that this image does not hold */
    MOTE_ERR_AUTHENTICATION = -9, /* a seal, a signature or a hash that is not right */
    MOTE_ERR_STORE = -10          /* the store is full, or its flash failed */
};

/* An error's name, such as "MOTE_ERR_CRC"; "an unknown error" for any other number. */
const char *mote_error_name(int error);

enum { MOTE_FLOAT32 = 1, MOTE_INT8 = 2 };

/* Read its fields only through the functions below, but for `trainable` and `mask`. In one that is zeroed no program is
 * loaded: every function below that returns an error returns MOTE_ERR_ARGUMENT for it, and the others 0 or NULL. */
typedef struct {
    const uint8_t *program; /* the checked program, read in place */
    uint8_t *arena;         /* [what trains | momentum | activations and gradients] */
    const void *x;          /* the input of the step in progress */
    float step;             /* what a gradient is multiplied by as it is added to a parameter, or to its momentum */
    uint32_t trainable;     /* bit i: layer i may train under this program's plan */
    uint32_t mask;          /* bit i: layer i trains now; a subset of trainable */
    uint32_t biases_only;   /* bit i: of layer i only the bias trains now */
    uint32_t random;        /* state of the generator that rounds int8 updates */
    uint16_t outputs;       /* how many outputs are in use: less than the output's size until all classes are there */
    uint16_t first;         /* the first op of the backward pass in progress: it needs no input gradient */
    uint8_t layers;         /* how many layers may train */
    uint8_t to_momentum;    /* updates go to the momentum, not to the parameters, in the step in progress */
    uint8_t is_far;         /* the input of the step in progress may be too large to skip the exact check */
} mote_t;

/* Bytes of arena that a program needs, read from its header. 0 if it is not a program. */
size_t mote_arena_bytes(const void *program, size_t size);

/* Checks the whole program, then lays out the arena and copies the initial parameters (zeros if it carries none).
 * The program must stay where it is, aligned to 4 bytes; the arena must be aligned to 4 bytes. */
int mote_load(mote_t *m, const void *program, size_t size, void *arena, size_t arena_size);

/* Elements of one input, of one output, and of one target (1, a class index, under softmax cross-entropy). */
size_t mote_inputs(const mote_t *m);
size_t mote_outputs(const mote_t *m);
size_t mote_targets(const mote_t *m);

/* MOTE_FLOAT32 or MOTE_INT8: what an input's, an output's elements are. Or MOTE_ERR_ARGUMENT. */
int mote_input_type(const mote_t *m);
int mote_output_type(const mote_t *m);

/* What trains, as one contiguous vector of floats, layer by layer, weights then bias: this is what a fleet exchanges.
 * *count gets its length in floats. NULL, and 0, for a program that trains int8 weights. The optimiser's momentum lies
 * right behind it, as long: who sets the parameters clears it too, or it goes on as it was. */
float *mote_parameters(mote_t *m, size_t *count);

/* Where layer i (counting the layers that may train) lies in that vector: [*first, *first + *count). */
int mote_layer(const mote_t *m, uint32_t layer, size_t *first, size_t *count);

/* Chooses which layers train: bit i is layer i. Of those also in biases_only, only the bias does.
 * MOTE_ERR_FROZEN if the plan has no room for one of them. */
int mote_train_mask(mote_t *m, uint32_t layers, uint32_t biases_only);

/* Takes one more class into use: its parameters are as they were left, 0 at first. MOTE_ERR_FROZEN if the program keeps
 * no room for another. */
int mote_grow(mote_t *m);

/* Runs the model on x (mote_inputs elements). *y points to mote_outputs elements (probabilities under cross-entropies),
 * valid until the next call. MOTE_ERR_DIVERGED if one of them is not finite. */
int mote_infer(mote_t *m, const void *x, const void **y);

/* As mote_infer, and the loss against the target. Learns nothing. MOTE_ERR_FROZEN if the program has no loss;
 * MOTE_ERR_DIVERGED if the loss is not finite. */
int mote_loss(mote_t *m, const void *x, const float *target, float *loss, const void **y);

/* One step of stochastic gradient descent on one sample: forward, then backward fused with the update
 * w -= rate * dL/dw of the layers in the mask. *loss gets the loss before the step.
 *
 * On an error every parameter is as it was before the step, with one exception. MOTE_ERR_DIVERGED can also come from
 * the middle of the backward pass, if weights beyond 1e19 make the gradient of the layers before them overflow: then
 * the layers behind have taken their step, and those before have not. Finite parameters stay finite in any case. */
int mote_learn(mote_t *m, const void *x, const float *target, float rate, float *loss);

/* How mote_learn_with learns. g = dL/dw, scaled so that its norm over all that trains is at most clip_norm (0: as it
 * is); v = momentum * v + g + weight_decay * w; w -= rate * v. */
typedef struct {
    float rate;
    float momentum;     /* 0 <= momentum < 1; more than 0 only if the program keeps room for it */
    float weight_decay; /* of weights and biases, 0: none; rate / (1 - rate * weight_decay) is a rate, too */
    float clip_norm;    /* 0: no limit. A limit costs a second pass, since no gradient is ever stored */
} mote_sgd_t;

/* As mote_learn, with momentum, weight decay and gradient clipping by norm. MOTE_ERR_FROZEN if the program keeps no
 * room for the momentum, or trains int8 weights, which have neither of the three. With momentum, or with a limit of the
 * norm, every parameter is as it was after any error. */
int mote_learn_with(mote_t *m, const void *x, const float *target, const mote_sgd_t *options, float *loss);

/* CRC-32 (IEEE 802.3, reflected), as zlib.crc32: pass 0 to begin, the last result to go on. */
uint32_t mote_crc32(uint32_t crc, const void *bytes, size_t size);

#ifdef __cplusplus
}
#endif

#endif
