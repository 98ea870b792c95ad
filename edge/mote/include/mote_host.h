/* What a host wants of the engine beside mote.h: many devices in one process, and int8 weights as real numbers. */
#ifndef MOTE_HOST_H
#define MOTE_HOST_H

#include "mote.h"

#ifdef __cplusplus
extern "C" {
#endif

/* `steps` steps of mote_learn on each of `count` devices, whose inputs and targets have one size: device i's samples
 * are x[i][steps][inputs] and targets[i][steps][targets]. losses[count][steps] gets the loss before each step. A device
 * stops at its first error, which is left in errors[i], MOTE_OK without any. */
void mote_learn_many(mote_t *const *devices, size_t count, size_t steps, const void *x, const float *targets,
                     float rate, float *losses, int *errors);

/* What trains, as real numbers, layer by layer, weights then bias: of int8 weights q * scale, of their biases
 * q * input scale * weight scale. Returns how many there are; writes nothing to NULL. */
size_t mote_get_real(const mote_t *m, float *values);

/* The same back: rounded to the nearest, saturated. The values are finite. Momentum is cleared. */
void mote_set_real(mote_t *m, const float *values);

/* Flash in memory: what a mote_flash_t's context points to, for reading in C. */
typedef struct {
    const uint8_t *image;
    void *owner; /* who writes and erases */
} mote_host_flash_t;

int mote_host_flash_read(void *flash, uint32_t at, void *out, uint32_t size);

#ifdef __cplusplus
}
#endif

#endif
