/* Learns a stream: samples on the standard input, each MODEL_INPUTS features and then a class. Predicts, then learns.
 * model.h, the program, is written by `tinyfleet firmware export --format cmake --model model.mote`. */
#include <stdio.h>

#include "model.h"
#include "mote.h"

static uint32_t arena[MODEL_ARENA_BYTES / 4]; /* all the memory that learning takes */

int main(void)
{
    mote_t m;
    const void *output;
    model_input_t x[MODEL_INPUTS];
    float number, loss = 0.0f;
    int right = 0, seen = 0, have = 0;
    int error = mote_load(&m, model, sizeof model, arena, sizeof arena);
    while (error == MOTE_OK && scanf("%f", &number) == 1) {
        if (have < MODEL_INPUTS) {
            x[have++] = (model_input_t)number;
        } else if ((error = mote_infer(&m, x, &output)) == MOTE_OK) { /* number is the class */
            const float *p = output; /* a probability for every class */
            int best = 0;
            for (int k = 1; k < (int)mote_outputs(&m); k++) {
                best = p[k] > p[best] ? k : best;
            }
            right += best == (int)number;
            error = mote_learn(&m, x, &number, 0.05f, &loss);
            seen++;
            have = 0;
        }
    }
    printf("%d of %d predicted right; the last loss is %.3f\n", right, seen, loss);
    return -error;
}
