/* COBS frames with a CRC-32: written in blocks of at most 255 bytes, read byte by byte. */
#include "mote_frame.h"

#include <string.h>

#include "mote.h"

enum { BLOCK = 254, HEAD = 2, CRC = 4 };

typedef struct {
    mote_frame_put_t put;
    void *context;
    uint32_t crc;
    uint8_t block[1 + BLOCK]; /* its code, then bytes that are not zero */
    size_t size;
} writer_t;

static void flush(writer_t *w)
{
    w->block[0] = (uint8_t)(w->size + 1);
    w->put(w->context, w->block, w->size + 1);
    w->size = 0;
}

static void write_bytes(writer_t *w, const uint8_t *bytes, size_t size)
{
    for (size_t i = 0; i < size; i++) {
        if (w->size == BLOCK) {
            flush(w);
        }
        if (bytes[i] == 0) {
            flush(w);
        } else {
            w->block[1 + w->size++] = bytes[i];
        }
    }
}

static void write_checked(writer_t *w, const uint8_t *bytes, size_t size)
{
    w->crc = mote_crc32(w->crc, bytes, size);
    write_bytes(w, bytes, size);
}

void mote_frame_write(mote_frame_put_t put, void *context, int kind, const char *topic, const uint8_t *payload,
                      size_t size)
{
    static const uint8_t delimiter = 0;
    size_t topic_size = strlen(topic);
    if (topic_size > UINT8_MAX) {
        return;
    }
    writer_t w;
    w.put = put;
    w.context = context;
    w.crc = 0;
    w.size = 0;
    uint8_t head[HEAD] = {(uint8_t)kind, (uint8_t)topic_size};
    put(context, &delimiter, 1);
    write_checked(&w, head, HEAD);
    write_checked(&w, (const uint8_t *)topic, topic_size);
    if (size > 0) {
        write_checked(&w, payload, size);
    }
    uint32_t crc = w.crc;
    uint8_t tail[CRC] = {(uint8_t)crc, (uint8_t)(crc >> 8), (uint8_t)(crc >> 16), (uint8_t)(crc >> 24)};
    write_bytes(&w, tail, CRC);
    flush(&w); /* a block is always begun: one that is full is written when the next byte comes */
    put(context, &delimiter, 1);
}

static void restart(mote_frame_reader_t *r)
{
    r->size = 0;
    r->block = 0;
    r->zero = 0;
    r->broken = 0;
}

void mote_frame_reader_init(mote_frame_reader_t *r, uint8_t *buffer, size_t capacity)
{
    r->buffer = buffer;
    r->capacity = capacity;
    r->dropped = 0;
    restart(r);
}

static void store(mote_frame_reader_t *r, uint8_t byte)
{
    if (r->size == r->capacity) {
        r->broken = 1;
    } else {
        r->buffer[r->size++] = byte;
    }
}

/* The bytes between two zeros are read: a frame, or nothing. */
static int finish(const mote_frame_reader_t *r, mote_frame_t *frame)
{
    if (r->broken || r->block > 0 || r->size < HEAD + CRC) {
        return 0;
    }
    size_t topic_size = r->buffer[1];
    size_t size = r->size - CRC;
    const uint8_t *tail = r->buffer + size;
    uint32_t crc = tail[0] | (uint32_t)tail[1] << 8 | (uint32_t)tail[2] << 16 | (uint32_t)tail[3] << 24;
    if (topic_size > size - HEAD || mote_crc32(0, r->buffer, size) != crc) {
        return 0;
    }
    frame->kind = r->buffer[0];
    frame->topic = (const char *)r->buffer + HEAD;
    frame->topic_size = topic_size;
    frame->payload = r->buffer + HEAD + topic_size;
    frame->size = size - HEAD - topic_size;
    return 1;
}

int mote_frame_read(mote_frame_reader_t *r, uint8_t byte, mote_frame_t *frame)
{
    if (byte == 0) {
        int something = r->size > 0 || r->block > 0 || r->zero;
        int whole = finish(r, frame);
        if (something && !whole) {
            r->dropped++;
        }
        restart(r);
        return whole;
    }
    if (r->broken) {
        return 0;
    }
    if (r->block > 0) {
        store(r, byte);
        r->block--;
        return 0;
    }
    if (r->zero) {
        store(r, 0);
    }
    r->block = byte - 1u;
    r->zero = byte != 0xff;
    return 0;
}
