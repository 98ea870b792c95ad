/* Loads every program of a file, runs it on random samples, and prints what came out: `error` or `crc of the arena`.
 *
 * Every block of memory is exactly as large as the engine asked for, so that a sanitizer sees one element too many.
 * The file: for each program its size (uint32, little-endian), then its bytes.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "mote.h"
#include "mote_internal.h"

static uint32_t state = 1;

static uint32_t next_random(void)
{
    state ^= state << 13;
    state ^= state >> 17;
    state ^= state << 5;
    return state;
}

static float next_float(void)
{
    return (float)(next_random() >> 8) * (2.0f / 16777216.0f) - 1.0f;
}

static void *block(size_t size)
{
    void *p = malloc(size ? size : 1);
    if (p == NULL) {
        exit(2);
    }
    return p;
}

static int run(const void *program, size_t size, int steps)
{
    size_t need = mote_arena_bytes(program, size), count;
    if (need > ((size_t)1 << 24)) {
        return MOTE_ERR_ARENA;
    }
    float *arena = block(need), loss;
    const float *out;
    mote_t m;
    int error = mote_load(&m, program, size, arena, need);
    if (error == MOTE_OK) {
        float *x = block(mote_inputs(&m) * sizeof *x), *y = block(mote_targets(&m) * sizeof *y);
        float *parameters = mote_parameters(&m, &count);
        for (size_t i = 0; i < count; i++) {
            parameters[i] = next_float();
        }
        memset((uint8_t *)arena + count * sizeof *arena, 0, need - count * sizeof *arena);
        for (int step = 0; step < steps; step++) {
            for (size_t i = 0; i < mote_inputs(&m); i++) {
                x[i] = next_float();
            }
            for (size_t i = 0; i < mote_targets(&m); i++) {
                y[i] = mote_header(&m)->loss == MOTE_CROSS_ENTROPY ? (float)(next_random() % mote_outputs(&m))
                                                                   : next_float();
            }
            error = mote_train_mask(&m, step % 3 ? m.trainable : m.trainable & next_random());
            if (error != MOTE_OK || mote_infer(&m, x, &out) != MOTE_OK) {
                abort();
            }
            error = mote_learn(&m, x, y, 0.05f, &loss);
            if (error == MOTE_ERR_DIVERGED) {
                break;
            }
            if (error != MOTE_OK) {
                abort();
            }
        }
        printf("%d %08x\n", error, mote_crc32(0, arena, need));
        free(x);
        free(y);
    }
    free(arena);
    return error;
}

int main(int argc, char **argv)
{
    FILE *file = argc == 3 ? fopen(argv[1], "rb") : NULL;
    uint32_t size;
    if (file == NULL) {
        return 2;
    }
    while (fread(&size, sizeof size, 1, file) == 1) {
        void *program = block(size);
        if (fread(program, 1, size, file) != size) {
            return 2;
        }
        int error = run(program, size, atoi(argv[2]));
        if (error != MOTE_OK && error != MOTE_ERR_DIVERGED) {
            printf("%d\n", error);
        }
        free(program);
    }
    fclose(file);
    return 0;
}
