/* Ed25519's verification (RFC 8032, 5.1.7): Monocypher's curve with SHA-512, which Monocypher's own EdDSA does not use.
 */
#include <string.h>

#include "monocypher.h"
#include "mote_cose.h"
#include "mote_sha512.h"

/* Whether S is less than the group's order, or another signature would be as good as this one. Monocypher checks it,
 * too: here it does not depend on that. */
static int is_canonical(const uint8_t s[32])
{
    static const uint8_t order[32] = {0xed, 0xd3, 0xf5, 0x5c, 0x1a, 0x63, 0x12, 0x58, 0xd6, 0x9c, 0xf7,
                                      0xa2, 0xde, 0xf9, 0xde, 0x14, 0,    0,    0,    0,    0,    0,
                                      0,    0,    0,    0,    0,    0,    0,    0,    0,    0x10};
    for (unsigned i = 32; i-- > 0;) {
        if (s[i] != order[i]) {
            return s[i] < order[i];
        }
    }
    return 0;
}

int mote_ed25519_verify(void *context, const uint8_t key[32], const uint8_t signature[64], const uint8_t *head,
                        size_t head_size, const uint8_t *body, size_t body_size)
{
    mote_sha512_t hash;
    uint8_t digest[64], h[32];
    (void)context;
    if (!is_canonical(signature + 32)) {
        return MOTE_ERR_AUTHENTICATION;
    }
    mote_sha512_init(&hash);
    mote_sha512_add(&hash, signature, 32);
    mote_sha512_add(&hash, key, 32);
    mote_sha512_add(&hash, head, head_size);
    mote_sha512_add(&hash, body, body_size);
    mote_sha512_end(&hash, digest);
    crypto_eddsa_reduce(h, digest);
    return crypto_eddsa_check_equation(signature, key, h) == 0 ? MOTE_OK : MOTE_ERR_AUTHENTICATION;
}
