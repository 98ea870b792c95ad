/* A program's inference and training step, to be measured. */
#include "bench.h"
#include "device.h"
#include "mote.h"

uint32_t mote_arena[DEVICE_ARENA_BYTES / sizeof(uint32_t)];
static mote_t m;
static union {
    float real[DEVICE_INPUTS];
    int8_t quantized[DEVICE_INPUTS];
} x;
static float target[DEVICE_OUTPUTS];

int bench_start(void)
{
    const int error = mote_load(&m, device_program, DEVICE_PROGRAM_BYTES, mote_arena, sizeof mote_arena);
    return error != MOTE_OK ? error : m.trainable != 0;
}

void bench_sample(uint32_t step)
{
    static uint32_t noise = 12345u;
    const uint32_t class = step % (uint32_t)mote_outputs(&m);
    uint32_t state = 99991u * (class + 1u);
    for (uint32_t i = 0; i < DEVICE_INPUTS; i++) {
        const float element = bench_element(&state, &noise);
        if (mote_input_type(&m) == MOTE_INT8) {
            x.quantized[i] = (int8_t)(80.0f * element);
        } else {
            x.real[i] = element;
        }
    }
    target[0] = (float)class;
}

int bench_infer(void)
{
    const void *y;
    return mote_infer(&m, &x, &y);
}

int bench_learn(void)
{
    float loss;
    return mote_learn(&m, &x, target, 0.02f, &loss);
}
