/* mote: learning on a microcontroller. C99, no malloc, no OS, no stdio.
 *
 * A model is a pair (program, arena). The program is a checked binary that is read in place, from flash or RAM; the
 * arena is caller-owned RAM that holds the trainable parameters, first, and then the planned activations and
 * gradients. Every function returns MOTE_OK or a negative error; nothing is written to the arena on a bad argument.
 *
 * Arithmetic is float32 in a fixed order (no contraction), so that every target computes the same bits.
 */
#ifndef MOTE_H
#define MOTE_H

#include <stddef.h>
#include <stdint.h>

#define MOTE_VERSION "0.1.0"

enum {
    MOTE_OK = 0,
    MOTE_ERR_ARGUMENT = -1, /* NULL, wrong size, or a number that is not finite */
    MOTE_ERR_FORMAT = -2,   /* not a program, wrong version, an offset, shape or size that does not fit */
    MOTE_ERR_CRC = -3,      /* the program's bytes are damaged */
    MOTE_ERR_ARENA = -4,    /* the arena is too small or not aligned to 4 bytes */
    MOTE_ERR_FROZEN = -5,   /* asked to train a layer that this program was not planned to train */
    MOTE_ERR_TARGET = -6,   /* a class index out of range, or a target that is not finite */
    MOTE_ERR_DIVERGED = -7  /* the loss is not finite: the parameters, or the rate, are too large */
};

typedef struct {
    const uint8_t *program; /* the checked program, read in place */
    float *arena;           /* [parameters | activations and gradients] */
    uint32_t layers;        /* how many layers have parameters */
    uint32_t trainable;     /* bit i: layer i may train under this program's plan */
    uint32_t mask;          /* bit i: layer i trains now; a subset of trainable */
} mote_t;

/* Bytes of arena that a program needs, read from its header. 0 if it is not a program. */
size_t mote_arena_bytes(const void *program, size_t size);

/* Checks the whole program, then lays out the arena and copies the initial parameters (zeros if it carries none).
 * The program must stay where it is, aligned to 4 bytes; the arena must be aligned to 4 bytes. */
int mote_load(mote_t *m, const void *program, size_t size, void *arena, size_t arena_size);

/* Floats of one input, of one output, and of one target (1, a class index, under softmax cross-entropy). */
size_t mote_inputs(const mote_t *m);
size_t mote_outputs(const mote_t *m);
size_t mote_targets(const mote_t *m);

/* The trainable parameters: one contiguous vector, layer by layer, weights then bias. This is what a fleet exchanges.
 * *count gets its length in floats. */
float *mote_parameters(mote_t *m, size_t *count);

/* Where layer i (counting layers with parameters) lies in that vector: [*first, *first + *count). count is 0 for a
 * layer that is not trainable. */
int mote_layer(const mote_t *m, uint32_t layer, size_t *first, size_t *count);

/* Chooses which layers train: bit i is layer i. MOTE_ERR_FROZEN if the plan has no room for one of them. */
int mote_train_mask(mote_t *m, uint32_t layers);

/* Runs the model on x (mote_inputs floats). *y points into the arena (mote_outputs floats: probabilities under
 * softmax cross-entropy), valid until the next call. */
int mote_infer(mote_t *m, const float *x, const float **y);

/* As mote_infer, and the loss against the target. Learns nothing. */
int mote_loss(mote_t *m, const float *x, const float *target, float *loss, const float **y);

/* One step of stochastic gradient descent on one sample: forward, then backward fused with the update
 * w -= rate * dL/dw of the layers in the mask. *loss gets the loss before the step. */
int mote_learn(mote_t *m, const float *x, const float *target, float rate, float *loss);

/* CRC-32 (IEEE 802.3, reflected), as zlib.crc32: pass 0 to begin, the last result to go on. */
uint32_t mote_crc32(uint32_t crc, const void *bytes, size_t size);

#endif
