/* Log-mel features of speech, in integers alone: the same on every target.
 *
 * A frame is 512 samples (32 ms at 16 kHz) under a Hann window, every 320 samples (20 ms); of each, the energy in 20
 * triangular bands between 60 and 7600 Hz, evenly spaced in mel, as its logarithm in eighths of an octave. A second
 * gives 49 frames.
 */
#ifndef MOTE_MEL_H
#define MOTE_MEL_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MOTE_MEL_VERSION 1 /* of the numbers: another one gives other features */
#define MOTE_MEL_RATE 16000
#define MOTE_MEL_WINDOW 512
#define MOTE_MEL_HOP 320
#define MOTE_MEL_BANDS 20

typedef struct {
    int16_t samples[MOTE_MEL_WINDOW]; /* of the frame to come */
    uint32_t filled;
    int32_t buffer[MOTE_MEL_WINDOW];
} mote_mel_t;

/* Begins with no samples. */
void mote_mel_open(mote_mel_t *m);

/* Takes the next samples, any number of them, and writes MOTE_MEL_BANDS bytes for every frame that is complete with
 * them: at most count / MOTE_MEL_HOP + 1. Returns how many frames it wrote. */
size_t mote_mel_push(mote_mel_t *m, const int16_t *samples, size_t count, uint8_t *bands);

/* What lies above the mean of all count bytes, at most 2^24; below it, 0: how loud it is, and most of the noise, are
 * gone. */
void mote_mel_level(uint8_t *bands, size_t count);

#ifdef __cplusplus
}
#endif

#endif
