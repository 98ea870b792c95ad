/* The log-mel front end, measured: one frame of noise, with all that comes every 20 ms. */
#include "bench.h"
#include "mote_mel.h"

static mote_mel_t mel;
static int16_t sound[MOTE_MEL_HOP];
static uint8_t bands[2 * MOTE_MEL_BANDS];

int bench_start(void)
{
    static const int16_t silence[MOTE_MEL_WINDOW - MOTE_MEL_HOP];
    mote_mel_open(&mel);
    (void)mote_mel_push(&mel, silence, MOTE_MEL_WINDOW - MOTE_MEL_HOP, bands);
    return 0;
}

void bench_sample(uint32_t step)
{
    uint32_t state = step + 1;
    for (uint32_t i = 0; i < MOTE_MEL_HOP; i++) {
        sound[i] = (int16_t)(bench_noise(&state) * 8000.0f);
    }
}

int bench_infer(void)
{
    return mote_mel_push(&mel, sound, MOTE_MEL_HOP, bands) == 1 ? 0 : -1;
}

int bench_learn(void)
{
    return -1;
}
