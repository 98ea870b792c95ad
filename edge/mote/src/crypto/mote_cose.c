/* COSE_Mac0 and COSE_Sign1 (RFC 9052) in the one shape each that the wire has: edge/wire/protocol.cddl. */
#include <string.h>

#include "mote_cose.h"

enum { TAG = 32, SIGNATURE = 64, KEY_ID = 8, HEADER_MAC0 = 3, HEADER_SIGN1 = 13, MAX_CONTEXT = 128 };

static const uint8_t mac0_header[HEADER_MAC0] = {0xa1, 0x01, 0x05};    /* alg: HMAC 256/256 */
static const uint8_t sign1_header[5] = {0xa2, 0x01, 0x27, 0x04, 0x48}; /* alg: EdDSA; kid: 8 bytes */

/* The head of a byte string or text of this size, in its shortest form: at most 5 bytes. */
static size_t write_head(uint8_t *to, unsigned major, size_t size)
{
    uint8_t first = (uint8_t)(major << 5);
    if (size < 24) {
        to[0] = (uint8_t)(first | size);
        return 1;
    }
    if (size < 0x100) {
        to[0] = first | 24;
        to[1] = (uint8_t)size;
        return 2;
    }
    unsigned bytes = size < 0x10000 ? 2 : 4;
    to[0] = (uint8_t)(first | (bytes == 2 ? 25 : 26));
    for (unsigned i = 0; i < bytes; i++) {
        to[1 + i] = (uint8_t)(size >> (8 * (bytes - 1 - i)));
    }
    return 1 + bytes;
}

/* A byte string at *at, passed over: its bytes, or NULL if there is none. Its head must be as write_head writes it. */
static const uint8_t *read_bytes(const uint8_t **at, const uint8_t *end, size_t *size)
{
    uint8_t shortest[5];
    const uint8_t *from = *at;
    size_t left = (size_t)(end - from);
    if (left == 0 || from[0] >> 5 != 2 || (from[0] & 31) > 26) {
        return NULL;
    }
    unsigned info = from[0] & 31, bytes = info < 24 ? 0 : 1u << (info - 24);
    size_t value = info < 24 ? info : 0;
    if (left < 1 + bytes) {
        return NULL;
    }
    for (unsigned i = 0; i < bytes; i++) {
        value = value << 8 | from[1 + i];
    }
    if (write_head(shortest, 2, value) != 1 + bytes || value > left - 1 - bytes) {
        return NULL;
    }
    *at = from + 1 + bytes + value;
    *size = value;
    return from + 1 + bytes;
}

static int read_header(const uint8_t **at, const uint8_t *end, mote_cose_t *out)
{
    size_t size = 0;
    const uint8_t *header = read_bytes(at, end, &size);
    if (header == NULL) {
        return 0;
    }
    if (out->kind == MOTE_COSE_MAC0) {
        return size == sizeof mac0_header && memcmp(header, mac0_header, size) == 0;
    }
    out->key_id = header + sizeof sign1_header;
    return size == HEADER_SIGN1 && memcmp(header, sign1_header, sizeof sign1_header) == 0;
}

int mote_cose_parse(const uint8_t *bytes, size_t size, mote_cose_t *out)
{
    size_t proof_size = 0;
    if (bytes == NULL || size < 3) {
        return MOTE_ERR_FORMAT;
    }
    const uint8_t *at = bytes + 2, *end = bytes + size;
    memset(out, 0, sizeof *out);
    out->kind = bytes[0] == (0xc0 | MOTE_COSE_MAC0) ? MOTE_COSE_MAC0 : MOTE_COSE_SIGN1;
    if (bytes[0] != (0xc0 | out->kind) || bytes[1] != 0x84 || !read_header(&at, end, out) || at == end ||
        *at++ != 0xa0) {
        return MOTE_ERR_FORMAT;
    }
    out->payload = read_bytes(&at, end, &out->payload_size);
    out->proof = out->payload != NULL ? read_bytes(&at, end, &proof_size) : NULL;
    int good = out->proof != NULL && at == end && proof_size == (out->kind == MOTE_COSE_MAC0 ? TAG : SIGNATURE);
    return good ? MOTE_OK : MOTE_ERR_FORMAT;
}

/* What is proven, up to the payload's bytes: MAC_structure or Sig_structure. Its size, or 0 if the context is too long.
 */
static size_t write_structure(uint8_t *to, const mote_cose_t *m, const char *context, size_t context_size)
{
    static const char mac0[] = "MAC0", signature1[] = "Signature1";
    const char *name = m->kind == MOTE_COSE_MAC0 ? mac0 : signature1;
    size_t name_size = strlen(name), at = 0;
    if (context_size > MAX_CONTEXT) {
        return 0;
    }
    to[at++] = 0x84;
    at += write_head(to + at, 3, name_size);
    memcpy(to + at, name, name_size);
    at += name_size;
    if (m->kind == MOTE_COSE_MAC0) {
        at += write_head(to + at, 2, sizeof mac0_header);
        memcpy(to + at, mac0_header, sizeof mac0_header);
        at += sizeof mac0_header;
    } else {
        at += write_head(to + at, 2, HEADER_SIGN1);
        memcpy(to + at, sign1_header, sizeof sign1_header);
        memcpy(to + at + sizeof sign1_header, m->key_id, KEY_ID);
        at += HEADER_SIGN1;
    }
    at += write_head(to + at, 2, context_size);
    memcpy(to + at, context, context_size);
    at += context_size;
    return at + write_head(to + at, 2, m->payload_size);
}

enum { STRUCTURE = 1 + 1 + 10 + 1 + HEADER_SIGN1 + 2 + MAX_CONTEXT + 5 };

static void begin_hmac(mote_sha256_t *s, const uint8_t key[32], uint8_t pad)
{
    uint8_t block[64];
    memset(block, pad, sizeof block);
    for (unsigned i = 0; i < 32; i++) {
        block[i] ^= key[i];
    }
    mote_sha256_init(s);
    mote_sha256_add(s, block, sizeof block);
}

int mote_cose_check_mac0(const mote_cose_t *m, const uint8_t key[32], const char *context, size_t context_size)
{
    uint8_t structure[STRUCTURE], digest[32], different = 0;
    mote_sha256_t s;
    size_t size = m->kind == MOTE_COSE_MAC0 ? write_structure(structure, m, context, context_size) : 0;
    if (size == 0) {
        return MOTE_ERR_AUTHENTICATION;
    }
    begin_hmac(&s, key, 0x36);
    mote_sha256_add(&s, structure, size);
    mote_sha256_add(&s, m->payload, m->payload_size);
    mote_sha256_end(&s, digest);
    begin_hmac(&s, key, 0x5c);
    mote_sha256_add(&s, digest, sizeof digest);
    mote_sha256_end(&s, digest);
    for (unsigned i = 0; i < TAG; i++) { /* in constant time: how much is right is not told by when it is refused */
        different |= (uint8_t)(digest[i] ^ m->proof[i]);
    }
    return different == 0 ? MOTE_OK : MOTE_ERR_AUTHENTICATION;
}

int mote_cose_check_sign1(const mote_cose_t *m, const mote_verify_t *verify, const uint8_t key[32], const char *context,
                          size_t context_size)
{
    uint8_t structure[STRUCTURE];
    size_t size = m->kind == MOTE_COSE_SIGN1 ? write_structure(structure, m, context, context_size) : 0;
    if (size == 0 || verify->verify == NULL) {
        return MOTE_ERR_AUTHENTICATION;
    }
    int error = verify->verify(verify->context, key, m->proof, structure, size, m->payload, m->payload_size);
    return error == MOTE_OK ? MOTE_OK : MOTE_ERR_AUTHENTICATION;
}
