/* Messages on a serial line: COBS frames with a CRC-32.
 *
 * A frame is COBS(kind u8, topic size u8, topic, payload, CRC-32 of all these u32 little-endian) between two zero
 * bytes; so a reader that has lost its place finds the next frame, and a damaged one is dropped. COBS: Cheshire and
 * Baker 1999, "Consistent overhead byte stuffing".
 *
 * The device speaks first: HELLO carries the topic and payload of its will. The gateway opens a session with that will
 * and answers CONNECTED; then the device announces itself. A gateway that has just started asks with an empty HELLO. One
 * that has keys for the device answers a first HELLO with KEYS, and the device takes them and says HELLO again.
 * Otherwise the device sends what mote_node_poll gives, and the gateway what arrives from the broker.
 */
#ifndef MOTE_FRAME_H
#define MOTE_FRAME_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Besides MOTE_PUBLISH ... MOTE_UNSUBSCRIBE of mote_node.h. */
enum { MOTE_FRAME_HELLO = 16, MOTE_FRAME_CONNECTED = 17, MOTE_FRAME_MESSAGE = 18, MOTE_FRAME_KEYS = 19 };

/* The payload of KEYS: the command key, the fleet's current and next key (zeros: none) and its root key, 32 bytes each;
 * their version, u32 little-endian; and 8 random bytes, for boards that have nothing random. */
#define MOTE_FRAME_KEYS_SIZE 140u

typedef struct {
    int kind;
    const char *topic; /* not NUL-terminated */
    size_t topic_size;
    const uint8_t *payload;
    size_t size;
} mote_frame_t;

/* Where the bytes go: size is 1..255. */
typedef void (*mote_frame_put_t)(void *context, const uint8_t *bytes, size_t size);

/* Writes one frame. The topic is NUL-terminated and at most 255 bytes; nothing is written for a longer one. */
void mote_frame_write(mote_frame_put_t put, void *context, int kind, const char *topic, const uint8_t *payload,
                      size_t size);

typedef struct {
    uint8_t *buffer; /* the owner's; as large as the largest frame, decoded */
    size_t capacity;
    size_t size;
    uint32_t block;   /* bytes left of the COBS block */
    uint32_t zero;    /* whether a zero follows the block */
    uint32_t broken;  /* the frame is dropped: wait for the next zero */
    uint32_t dropped; /* frames that were damaged or too large */
} mote_frame_reader_t;

void mote_frame_reader_init(mote_frame_reader_t *r, uint8_t *buffer, size_t capacity);

/* Takes one byte. 1: *frame is whole, and valid until the next call. */
int mote_frame_read(mote_frame_reader_t *r, uint8_t byte, mote_frame_t *frame);

#ifdef __cplusplus
}
#endif

#endif
