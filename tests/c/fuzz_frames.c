/* Reads whatever the fuzzer makes up as a serial line, under AddressSanitizer and UBSan. Every frame that is found, and
 * one of the input itself, is written, and must be read again as it was. */
#include <stdlib.h>
#include <string.h>

#include "mote_frame.h"

enum { CAPACITY = 600 };

typedef struct {
    mote_frame_reader_t reader;
    mote_frame_t frame;
    int found;
} line_t;

static void expect(int holds)
{
    if (!holds) {
        abort();
    }
}

static void put(void *context, const uint8_t *bytes, size_t size)
{
    line_t *line = context;
    expect(size >= 1 && size <= 255);
    for (size_t i = 0; i < size; i++) {
        line->found += mote_frame_read(&line->reader, bytes[i], &line->frame);
    }
}

/* Writes a frame and reads it. */
static void there_and_back(int kind, const char *topic, const uint8_t *payload, size_t size)
{
    const size_t topic_size = strlen(topic);
    uint8_t *buffer = malloc(CAPACITY);
    line_t line;
    memset(&line, 0, sizeof line);
    mote_frame_reader_init(&line.reader, buffer, CAPACITY);
    mote_frame_write(put, &line, kind, topic, payload, size);
    if (topic_size <= 255 && 2 + topic_size + size + 4 <= CAPACITY) {
        expect(line.found == 1 && line.reader.dropped == 0 && line.frame.kind == kind);
        expect(line.frame.topic_size == topic_size && memcmp(line.frame.topic, topic, topic_size) == 0);
        expect(line.frame.size == size && (size == 0 || memcmp(line.frame.payload, payload, size) == 0));
    } else {
        expect(line.found == 0);
    }
    free(buffer);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    uint8_t *buffer = malloc(CAPACITY);
    mote_frame_reader_t reader;
    mote_frame_t frame;
    mote_frame_reader_init(&reader, buffer, CAPACITY);
    for (size_t i = 0; i < size; i++) {
        if (mote_frame_read(&reader, data[i], &frame)) {
            char topic[256] = {0};
            expect(frame.topic_size < sizeof topic && frame.topic_size + frame.size + 2 <= CAPACITY);
            memcpy(topic, frame.topic, frame.topic_size);
            there_and_back(frame.kind, topic, frame.payload, frame.size);
        }
    }
    free(buffer);
    if (size >= 2) {
        char topic[300] = {0};
        const size_t length = data[1] < size - 2 ? data[1] : size - 2;
        memcpy(topic, data + 2, length);
        there_and_back(data[0], topic, data + 2 + length, size - 2 - length);
    }
    return 0;
}
