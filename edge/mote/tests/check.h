/* What the tests share: a check that says where it failed, and samples to learn from. */
#ifndef CHECK_H
#define CHECK_H

#include <stdio.h>
#include <stdlib.h>

#include "model.h"

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);                                    \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

/* Fills in the next sample of a stream and returns its class: every third input, from the class on, is about 1. */
static inline float next_of_stream(uint32_t *state, float *x)
{
    uint32_t label = 0;
    for (int i = -1; i < MODEL_INPUTS; i++) {
        *state = *state * 1664525u + 1013904223u;
        if (i < 0) {
            label = (*state >> 16) % MODEL_OUTPUTS;
        } else {
            x[i] = (float)(*state >> 8) / 16777216.0f - 0.5f + (i % MODEL_OUTPUTS == (int)label ? 1.0f : 0.0f);
        }
    }
    return (float)label;
}

#endif
