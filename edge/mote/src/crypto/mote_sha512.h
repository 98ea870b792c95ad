/* SHA-512, which Ed25519 is made with. */
#ifndef MOTE_SHA512_H
#define MOTE_SHA512_H

#include <stddef.h>
#include <stdint.h>

typedef struct {
    uint64_t state[8];
    uint64_t size;
    uint8_t block[128];
} mote_sha512_t;

void mote_sha512_init(mote_sha512_t *s);
void mote_sha512_add(mote_sha512_t *s, const void *bytes, size_t size);
void mote_sha512_end(mote_sha512_t *s, uint8_t out[64]);

#endif
