/* SHA-256 (FIPS 180-4). */
#include <string.h>

#include "mote_cose.h"

static const uint32_t constants[64] = {
    0x428a2f98u, 0x71374491u, 0xb5c0fbcfu, 0xe9b5dba5u, 0x3956c25bu, 0x59f111f1u, 0x923f82a4u, 0xab1c5ed5u,
    0xd807aa98u, 0x12835b01u, 0x243185beu, 0x550c7dc3u, 0x72be5d74u, 0x80deb1feu, 0x9bdc06a7u, 0xc19bf174u,
    0xe49b69c1u, 0xefbe4786u, 0x0fc19dc6u, 0x240ca1ccu, 0x2de92c6fu, 0x4a7484aau, 0x5cb0a9dcu, 0x76f988dau,
    0x983e5152u, 0xa831c66du, 0xb00327c8u, 0xbf597fc7u, 0xc6e00bf3u, 0xd5a79147u, 0x06ca6351u, 0x14292967u,
    0x27b70a85u, 0x2e1b2138u, 0x4d2c6dfcu, 0x53380d13u, 0x650a7354u, 0x766a0abbu, 0x81c2c92eu, 0x92722c85u,
    0xa2bfe8a1u, 0xa81a664bu, 0xc24b8b70u, 0xc76c51a3u, 0xd192e819u, 0xd6990624u, 0xf40e3585u, 0x106aa070u,
    0x19a4c116u, 0x1e376c08u, 0x2748774cu, 0x34b0bcb5u, 0x391c0cb3u, 0x4ed8aa4au, 0x5b9cca4fu, 0x682e6ff3u,
    0x748f82eeu, 0x78a5636fu, 0x84c87814u, 0x8cc70208u, 0x90befffau, 0xa4506cebu, 0xbef9a3f7u, 0xc67178f2u,
};

static uint32_t rotate(uint32_t x, unsigned by)
{
    return x >> by | x << (32u - by);
}

static uint32_t read_word(const uint8_t *b)
{
    return (uint32_t)b[0] << 24 | (uint32_t)b[1] << 16 | (uint32_t)b[2] << 8 | b[3];
}

/* The schedule is kept as a ring of its last 16 words. */
static void compress(uint32_t state[8], const uint8_t block[64])
{
    uint32_t w[16], s[8];
    memcpy(s, state, sizeof s);
    for (unsigned i = 0; i < 64; i++) {
        uint32_t *at = &w[i % 16];
        if (i < 16) {
            *at = read_word(block + 4 * i);
        } else {
            uint32_t a = w[(i + 1) % 16], b = w[(i + 14) % 16];
            *at +=
                (rotate(a, 7) ^ rotate(a, 18) ^ a >> 3) + w[(i + 9) % 16] + (rotate(b, 17) ^ rotate(b, 19) ^ b >> 10);
        }
        uint32_t first = s[7] + (rotate(s[4], 6) ^ rotate(s[4], 11) ^ rotate(s[4], 25)) +
                         ((s[4] & s[5]) ^ (~s[4] & s[6])) + constants[i] + *at;
        uint32_t second =
            (rotate(s[0], 2) ^ rotate(s[0], 13) ^ rotate(s[0], 22)) + ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
        s[7] = s[6];
        s[6] = s[5];
        s[5] = s[4];
        s[4] = s[3] + first;
        s[3] = s[2];
        s[2] = s[1];
        s[1] = s[0];
        s[0] = first + second;
    }
    for (unsigned i = 0; i < 8; i++) {
        state[i] += s[i];
    }
}

void mote_sha256_init(mote_sha256_t *s)
{
    static const uint32_t initial[8] = {0x6a09e667u, 0xbb67ae85u, 0x3c6ef372u, 0xa54ff53au,
                                        0x510e527fu, 0x9b05688cu, 0x1f83d9abu, 0x5be0cd19u};
    memcpy(s->state, initial, sizeof initial);
    s->size = 0;
}

void mote_sha256_add(mote_sha256_t *s, const void *bytes, size_t size)
{
    const uint8_t *from = bytes;
    while (size > 0) {
        size_t used = (size_t)(s->size % 64), room = 64 - used, n = size < room ? size : room;
        memcpy(s->block + used, from, n);
        s->size += n;
        from += n;
        size -= n;
        if (n == room) {
            compress(s->state, s->block);
        }
    }
}

void mote_sha256_end(mote_sha256_t *s, uint8_t out[32])
{
    uint64_t bits = s->size * 8;
    size_t used = (size_t)(s->size % 64);
    s->block[used++] = 0x80;
    if (used > 56) {
        memset(s->block + used, 0, 64 - used);
        compress(s->state, s->block);
        used = 0;
    }
    memset(s->block + used, 0, 56 - used);
    for (unsigned i = 0; i < 8; i++) {
        s->block[56 + i] = (uint8_t)(bits >> (56u - 8u * i));
    }
    compress(s->state, s->block);
    for (unsigned i = 0; i < 32; i++) {
        out[i] = (uint8_t)(s->state[i / 4] >> (24u - 8u * (i % 4)));
    }
}
