/* A fleet device on a serial line: the node behind COBS frames, learning from samples held in flash. */
#include <string.h>

#include "board.h"
#include "device.h"
#include "mote_frame.h"
#include "mote_node.h"
#include "mote_stream.h"
#include "uart.h"

enum {
    FRAME = 2 + 255 + MOTE_MAX_INLINE + 320 + 4, /* head, topic, a command with weights in it, CRC */
    OUT = MOTE_CHUNK + 128,
    TARGETS = DEVICE_OUTPUTS, /* at most: one of them under softmax cross-entropy */
};

float mote_arena[DEVICE_ARENA_BYTES / sizeof(float)];
static float base[DEVICE_PARAMETERS];
static float sample[DEVICE_INPUTS + TARGETS];
static uint8_t out[OUT];
static uint8_t frame_buffer[FRAME];
#if DEVICE_MODEL_SLOT_BYTES > 0
static union {
    uint8_t bytes[DEVICE_MODEL_SLOT_BYTES];
    uint32_t aligned;
} model_slot[2];
#endif

static mote_node_t node;
static mote_node_config_t config;
static mote_keys_t keys;
static mote_stream_t stream;
static mote_frame_reader_t reader;

void board_fault(void)
{
    board_reset();
}

static int open_stream(void *context, uint32_t seed)
{
    (void)context;
    if (mote_outputs(&node.mote) < DEVICE_WAYS) {
        return MOTE_ERR_ARGUMENT; /* a program over the air of too few classes */
    }
    return mote_stream_open(&stream, seed);
}

static void put(void *context, const uint8_t *bytes, size_t size)
{
    (void)context;
    uart_write(bytes, size);
}

static void send(int kind, const char *topic, const uint8_t *payload, size_t size)
{
    mote_frame_write(put, NULL, kind, topic, payload, size);
}

/* The will goes first: with it the gateway opens the session. */
static void hello(void)
{
    mote_out_t will;
    mote_node_will(&node, &will);
    send(MOTE_FRAME_HELLO, will.topic, will.payload, will.size);
}

static void send_all(void)
{
    mote_out_t message;
    while (mote_node_poll(&node, &message)) {
        if (message.kind == MOTE_REBOOT) {
            board_reset();
        }
        send(message.kind, message.topic, message.payload, message.size);
    }
}

static void start_node(void)
{
    if (mote_node_init(&node, &config) != MOTE_OK) {
        board_fault();
    }
}

/* Who is at the other end of the line says whom to obey, and could write another firmware as well. */
static void take_keys(const uint8_t *bytes)
{
    uint8_t *to[4] = {keys.command, keys.current, keys.next, keys.root};
    for (int i = 0; i < 4; i++, bytes += MOTE_KEY) {
        memcpy(to[i], bytes, MOTE_KEY);
    }
    keys.version = bytes[0] | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[2] << 16 | (uint32_t)bytes[3] << 24;
    memcpy(config.nonce, bytes + 4, sizeof config.nonce);
    config.keys = &keys;
    config.verify.verify = mote_ed25519_verify;
    start_node();
}

static void take(const mote_frame_t *frame)
{
    if (frame->kind == MOTE_FRAME_KEYS && frame->size == MOTE_FRAME_KEYS_SIZE) {
        take_keys(frame->payload);
        hello();
    } else if (frame->kind == MOTE_FRAME_HELLO) {
        hello();
    } else if (frame->kind == MOTE_FRAME_CONNECTED) {
        mote_node_connected(&node);
    } else if (frame->kind == MOTE_FRAME_MESSAGE) {
        mote_node_receive(&node, frame->topic, frame->topic_size, frame->payload, frame->size);
    }
    send_all();
}

static void start(void)
{
#if DEVICE_FLOAT_FEATURES
    stream.values = (const float *)(const void *)device_features; /* aligned by the build */
#else
    stream.features = device_features;
#endif
#if DEVICE_TARGET_OUTPUTS > 0
    stream.targets = (const float *)(const void *)device_targets;
    stream.outputs = DEVICE_TARGET_OUTPUTS;
#endif
    stream.starts = (const uint32_t *)(const void *)device_starts;
    stream.classes = DEVICE_CLASSES;
    stream.size = DEVICE_INPUTS;
    stream.scale = DEVICE_SCALE;
    stream.ways = DEVICE_WAYS;
    stream.fixed = DEVICE_FIXED;

    config.fleet = DEVICE_FLEET;
    config.id = DEVICE_ID;
    config.td = (const char *)device_td;
    config.td_size = DEVICE_TD_BYTES;
    config.program = device_program;
    config.program_size = DEVICE_PROGRAM_BYTES;
    memcpy(config.model, device_model, sizeof config.model);
    config.arena = mote_arena;
    config.arena_size = sizeof mote_arena;
    config.base = base;
    config.base_count = DEVICE_PARAMETERS;
    config.sample = sample;
    config.sample_count = DEVICE_INPUTS + TARGETS;
#if DEVICE_MODEL_SLOT_BYTES > 0
    config.model_slot[0] = model_slot[0].bytes;
    config.model_slot[1] = model_slot[1].bytes;
    config.model_slot_size = DEVICE_MODEL_SLOT_BYTES;
#endif
    config.out = out;
    config.out_size = sizeof out;
    config.source = mote_stream_source(&stream);
    config.source.open = open_stream;
    config.groups[0] = "all";
    config.groups[1] = "keys";
    config.groups[2] = DEVICE_BOARD;
    start_node();
    mote_frame_reader_init(&reader, frame_buffer, sizeof frame_buffer);
}

int main(void)
{
    start();
    uart_open();
    hello();
    for (;;) {
        uint8_t byte;
        mote_frame_t frame;
        int received = 0;
        while (uart_read(&byte, 1)) {
            received = 1;
            if (mote_frame_read(&reader, byte, &frame)) {
                take(&frame);
                break; /* and a sample, so that a busy line cannot starve learning */
            }
        }
        const int more = mote_node_step(&node);
        send_all();
        if (!more && !received) {
            board_mask();
            if (!uart_ready()) {
                board_sleep();
            }
            board_unmask();
        }
    }
}
