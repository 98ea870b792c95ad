/* Computes features of made-up sound and prints a checksum of them, so that targets can be compared to the bit: noise
 * of 12 strengths, from full scale to silence, in portions of changing size. Prints `frames CRC-32`, and ends. */
#include "mote_internal.h"
#include "mote_mel.h"
#include "semihost.h"

enum { STRENGTHS = 12, PORTIONS = 20, LARGEST = 700 };

static mote_mel_t mel;
static int16_t sound[LARGEST];
static uint8_t bands[(LARGEST / MOTE_MEL_HOP + 1) * MOTE_MEL_BANDS];

int main(void)
{
    uint32_t state = 7, frames = 0, crc = 0;
    mote_mel_open(&mel);
    for (uint32_t strength = 0; strength < STRENGTHS; strength++) {
        for (uint32_t portion = 0; portion < PORTIONS; portion++) {
            const uint32_t count = 37 * portion % LARGEST;
            for (uint32_t i = 0; i < count; i++) { /* xorshift32 (Marsaglia, 2003) */
                state ^= state << 13;
                state ^= state >> 17;
                state ^= state << 5;
                sound[i] = (int16_t)((int32_t)((state >> 16) & 0xffffu) / (1 << strength) - (0x8000 >> strength));
            }
            const size_t got = mote_mel_push(&mel, sound, count, bands);
            crc = mote_crc32(crc, bands, got * MOTE_MEL_BANDS);
            frames += (uint32_t)got;
        }
    }
    semihost_number(frames, 10);
    semihost_print(" ");
    semihost_number(crc, 16);
    semihost_print("\n");
    semihost_exit(0);
}
