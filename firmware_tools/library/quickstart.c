/* Learns a stream: samples on the standard input, each MODEL_INPUTS features and then a class. Predicts, then learns.
 * model.h, the program, is written by `tinyfleet firmware export --library cmake --model model.mote`. */
#include <stdio.h>

#include "model.h"
#include "mote.h"

static uint32_t arena[MODEL_ARENA_BYTES / 4]; /* all the memory that learning takes */

int main(void)
{
    mote_t m;
    const void *output;
    float x[MODEL_INPUTS + 1], *label = &x[MODEL_INPUTS], loss = 0.0f;
    int right = 0, seen = 0, have = 0;
    int error = mote_load(&m, model, sizeof model, arena, sizeof arena);
    while (error == MOTE_OK && scanf("%f", &x[have]) == 1) {
        if (++have > MODEL_INPUTS && (error = mote_infer(&m, x, &output)) == MOTE_OK) {
            const float *p = output; /* a probability for every class */
            int best = 0;
            for (int k = 1; k < MODEL_OUTPUTS; k++) {
                best = p[k] > p[best] ? k : best;
            }
            right += best == (int)*label;
            error = mote_learn(&m, x, label, 0.05f, &loss);
            seen++;
            have = 0;
        }
    }
    printf("%d of %d predicted right; the last loss is %.3f\n", right, seen, loss);
    return -error;
}
