/* Trains on a stream, one sample at a time, while the stream changes: predict, then learn, and forget the sample.
 *
 *     cmake -S examples/train_on_a_stream -B build/stream && cmake --build build/stream && build/stream/train_on_a_stream
 *
 * prints how many of 200 samples it predicted correctly, before and after the sensor is turned upside down:
 *
 *     samples    1 to  200: 189 correct
 *     samples  201 to  400: 200 correct
 *     the sensor is turned upside down
 *     samples  401 to  600: 187 correct
 *     samples  601 to  800: 200 correct
 */
#include <stdio.h>

#include "model.h" /* a network of 16 inputs and 3 classes; `tinyfleet firmware export` writes it for your model */
#include "mote.h"

static uint32_t arena[MODEL_ARENA_BYTES / 4]; /* all the memory that inference and training need */
static uint32_t state = 1;

static float noise(void) /* uniform in -1 .. 1 */
{
    state = state * 1664525u + 1013904223u;
    return (float)(state >> 8) / 8388608.0f - 1.0f;
}

int main(void)
{
    mote_t m;
    int correct = 0, error = mote_load(&m, model, sizeof model, arena, sizeof arena);
    for (int i = 1; error == MOTE_OK && i <= 800; i++) {
        const int class = (int)(noise() * 1.5f + 1.5f) % 3;
        float x[MODEL_INPUTS], label = (float)class, loss;
        const void *output;
        for (int k = 0; k < MODEL_INPUTS; k++) { /* each class lights another third of the sensor */
            const int position = i <= 400 ? k : MODEL_INPUTS - 1 - k;
            x[k] = (position * 3 / MODEL_INPUTS == class ? 1.0f : 0.0f) + 0.5f * noise();
        }
        error = mote_infer(&m, x, &output);
        if (error == MOTE_OK) {
            const float *p = output; /* one probability for each class */
            const int best = p[0] >= p[1] && p[0] >= p[2] ? 0 : p[1] >= p[2] ? 1 : 2;
            correct += best == class;
            error = mote_learn(&m, x, &label, 0.05f, &loss);
        }
        if (i % 200 == 0) {
            printf("samples %4d to %4d: %3d correct\n", i - 199, i, correct);
            correct = 0;
            if (i == 400) {
                puts("the sensor is turned upside down");
            }
        }
    }
    return error == MOTE_OK ? 0 : 1;
}
