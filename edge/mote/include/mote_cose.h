/* Sealed messages: COSE_Mac0 and COSE_Sign1 (RFC 9052), SHA-256 and Ed25519, for devices. */
#ifndef MOTE_COSE_H
#define MOTE_COSE_H

#include "mote.h"

#ifdef __cplusplus
extern "C" {
#endif

#define MOTE_COSE_MAC0 17
#define MOTE_COSE_SIGN1 18

typedef struct {
    uint32_t state[8];
    uint64_t size;
    uint8_t block[64];
} mote_sha256_t;

void mote_sha256_init(mote_sha256_t *s);
void mote_sha256_add(mote_sha256_t *s, const void *bytes, size_t size);
void mote_sha256_end(mote_sha256_t *s, uint8_t out[32]);

typedef struct {
    int kind;
    const uint8_t *key_id;
    const uint8_t *payload;
    size_t payload_size;
    const uint8_t *proof;
} mote_cose_t;

typedef struct {
    void *context;
    int (*verify)(void *context, const uint8_t key[32], const uint8_t signature[64], const uint8_t *head,
                  size_t head_size, const uint8_t *body, size_t body_size);
} mote_verify_t;

int mote_cose_parse(const uint8_t *bytes, size_t size, mote_cose_t *out);
int mote_cose_check_mac0(const mote_cose_t *message, const uint8_t key[32], const char *context, size_t context_size);
int mote_cose_check_sign1(const mote_cose_t *message, const mote_verify_t *verify, const uint8_t key[32],
                          const char *context, size_t context_size);
int mote_ed25519_verify(void *context, const uint8_t key[32], const uint8_t signature[64], const uint8_t *head,
                        size_t head_size, const uint8_t *body, size_t body_size);

#ifdef __cplusplus
}
#endif

#endif
