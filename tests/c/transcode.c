/* Reads a message with the generated decoder and writes it with the generated encoder: proof that C and Python mean the
 * same bytes. Returns the size written, or -1. */
#include "protocol_decode.h"
#include "protocol_encode.h"

#define TRANSCODE(name, type)                                                                                          \
    int transcode_##name(const uint8_t *in, size_t size, uint8_t *out, size_t capacity)                                \
    {                                                                                                                  \
        struct type message;                                                                                           \
        size_t read = 0, written = 0;                                                                                  \
        if (cbor_decode_##name(in, size, &message, &read) != ZCBOR_SUCCESS || read != size ||                          \
            cbor_encode_##name(out, capacity, &message, &written) != ZCBOR_SUCCESS) {                                  \
            return -1;                                                                                                 \
        }                                                                                                              \
        return (int)written;                                                                                           \
    }

TRANSCODE(command, command)
TRANSCODE(reply, reply_r)
TRANSCODE(status, status)
TRANSCODE(chunk, chunk)
