/* Drives a node with whatever messages the fuzzer makes up, under AddressSanitizer and UBSan.
 *
 * Every input is taken twice: by a node whose own engine learns, and by one with a learner that fails now and then.
 *
 * The input is a list of actions: one byte that says what, and for messages two bytes of size and the bytes. A chunk's
 * CRC is computed here, so that the fuzzer gets behind it. Everything that the node sends is read, byte by byte. */
#include <stdlib.h>
#include <string.h>

#include "mote_frame.h"
#include "mote_node.h"
#include "protocol_decode.h"
#include "protocol_encode.h"

enum { INPUTS = 6, ARENA = 2048, BASE = 200, ADOPTED = 2048 };

/* The built-in program, written by the test: static const uint32_t program[] = {...}; */
#include "fuzz_program.h"

static uint32_t state = 1;

static int open_source(void *context, uint32_t seed)
{
    (void)context;
    state = seed | 1;
    return seed % 16 == 5 ? MOTE_ERR_ARGUMENT : MOTE_OK;
}

static int next_sample(void *context, int query, float *x, float *y)
{
    (void)context;
    (void)query;
    for (int i = 0; i < INPUTS; i++) {
        state = state * 1664525u + 1013904223u;
        x[i] = (float)(state >> 8) / 16777216.0f;
    }
    *y = (float)(state >> 30);
    return state >> 16 & 31 ? 1 : 0;
}

/* A learner of its own memory, which fails or gives garbage now and then; zeroed while no program is loaded. */
static mote_t learner;
static uint8_t *learner_arena;

static uint32_t fails(uint32_t once_in)
{
    state = state * 1664525u + 1013904223u;
    return (state >> 8) % once_in == 0;
}

static int learner_load(void *context, const void *bytes, size_t size)
{
    (void)context;
    memset(&learner, 0, sizeof learner);
    return fails(8) ? -77 : mote_load(&learner, bytes, size, learner_arena, ARENA);
}

static int learner_set(void *context, const float *parameters, size_t count)
{
    size_t own = 0;
    float *w = mote_parameters(&learner, &own);
    (void)context;
    if (fails(16) || own != count) {
        return MOTE_ERR_ARGUMENT;
    }
    memcpy(w, parameters, count * sizeof *w);
    return MOTE_OK;
}

static int learner_get(void *context, float *parameters, size_t count)
{
    size_t own = 0;
    const float *w = mote_parameters(&learner, &own);
    (void)context;
    if (fails(16) || own != count) {
        return MOTE_ERR_ARGUMENT;
    }
    memcpy(parameters, w, count * sizeof *w);
    if (fails(16)) {
        memset(parameters, 0xff, count * sizeof *w); /* none is a number */
    }
    return MOTE_OK;
}

static int learner_learn(void *context, const float *x, const float *y, float rate, uint32_t layers, float *loss)
{
    int error = mote_train_mask(&learner, layers, 0);
    (void)context;
    if (fails(64)) {
        memset(loss, 0xff, sizeof *loss);
        return MOTE_OK;
    }
    return error == MOTE_OK ? mote_learn(&learner, x, y, rate, loss) : error;
}

static int learner_score(void *context, const float *x, const float *y, float *loss, int *correct)
{
    const void *output;
    (void)context;
    *correct = (int)(state >> 4) - 1000;
    return fails(32) ? (int)(state >> 3) : mote_loss(&learner, x, y, loss, &output);
}

static volatile uint32_t seen;

static void look(const void *bytes, size_t size)
{
    for (size_t i = 0; i < size; i++) {
        seen += ((const uint8_t *)bytes)[i];
    }
}

/* What a server refuses must not be sent. */
static void check_reply(const uint8_t *payload, size_t size)
{
    struct reply_r reply;
    size_t read = 0;
    if (cbor_decode_reply(payload, size, &reply, &read) != ZCBOR_SUCCESS || read != size) {
        abort();
    }
    const struct success *success = &reply.reply_success_m;
    if (reply.reply_choice == reply_success_m_c && success->success_measured_choice == success_measured_metrics_m_c) {
        const struct metrics *m = &success->success_measured_metrics_m;
        if (m->metrics_correct > m->metrics_queried || m->metrics_loss - m->metrics_loss != 0.0f ||
            m->metrics_query_loss - m->metrics_query_loss != 0.0f) {
            abort();
        }
    }
}

static void send_all(mote_node_t *n)
{
    mote_out_t out;
    for (int i = 0; i < 10000; i++) {
        if (!mote_node_poll(n, &out)) {
            return;
        }
        look(out.topic, strlen(out.topic));
        if (out.payload != NULL) {
            look(out.payload, out.size);
        }
        if (strcmp(out.topic, "tinyfleet/home/devices/one/reply") == 0) {
            check_reply(out.payload, out.size);
        }
    }
    abort(); /* it talks without end */
}

/* Every message is a copy of its own size, so that a read behind its end is seen. */
static void receive(mote_node_t *n, const char *topic, const uint8_t *bytes, size_t size)
{
    uint8_t *payload = malloc(size > 0 ? size : 1);
    char *name = malloc(strlen(topic) + 1);
    memcpy(payload, bytes, size);
    memcpy(name, topic, strlen(topic));
    mote_node_receive(n, name, strlen(topic), payload, size);
    free(name);
    free(payload);
}

static void receive_chunk(mote_node_t *n, const char *topic, uint32_t offset, const uint8_t *bytes, size_t size)
{
    uint8_t payload[1200];
    size_t written = 0;
    struct chunk chunk = {offset, mote_crc32(0, bytes, size), {bytes, size}};
    if (size > 0 && cbor_encode_chunk(payload, sizeof payload, &chunk, &written) == ZCBOR_SUCCESS) {
        receive(n, topic, payload, written);
    }
}

/* Exactly as large as promised, so that a write behind the end is seen. */
static void *room(size_t size)
{
    return memset(malloc(size), 0x55, size);
}

static void discard(void *context, const uint8_t *bytes, size_t size)
{
    (void)context;
    look(bytes, size);
}

/* The input as a serial line brings it. */
static void read_frames(const uint8_t *data, size_t size)
{
    enum { CAPACITY = 300 };
    mote_frame_reader_t reader;
    mote_frame_t frame;
    uint8_t *buffer = room(CAPACITY);
    mote_frame_reader_init(&reader, buffer, CAPACITY);
    for (size_t i = 0; i < size; i++) {
        if (mote_frame_read(&reader, data[i], &frame)) {
            look(frame.topic, frame.topic_size);
            look(frame.payload, frame.size);
        }
    }
    mote_frame_write(discard, NULL, 1, "topic", data, size);
    free(buffer);
}

static const mote_keys_t keys = {{0}, {1}, {2}, {3}, 1};

static uint64_t now(void *context)
{
    (void)context;
    return 1000;
}

/* The fuzzer's bytes as the action of the next command, sealed for a node with keys: it could not make these. */
static void receive_action(mote_node_t *n, const uint8_t *action, size_t size)
{
    static uint64_t counter;
    counter = n->counter[0].last + 1;
    uint8_t bytes[4096 + 64] = {0x84, 0x1b};
    size_t at = 2;
    for (int i = 0; i < 8; i++) {
        bytes[at++] = (uint8_t)(counter >> (56 - 8 * i));
    }
    if (counter < 0x100000000u) { /* in its shortest form */
        bytes[1] = counter < 0x10000u ? 0x19 : 0x1a;
        size_t width = counter < 0x10000u ? 2 : 4;
        memmove(bytes + 2, bytes + 10 - width, width);
        at = 2 + width;
    }
    memcpy(bytes + at, "\x19\x0f\xa0\xf6", 4); /* expires at 4000, no nonce */
    at += 4;
    memcpy(bytes + at, action, size);
    receive(n, "tinyfleet/home/devices/one/command", bytes, at + size);
}

static void run(const uint8_t *data, size_t size, int has_learner)
{
    mote_node_config_t config;
    memset(&config, 0, sizeof config);
    config.fleet = "home";
    config.id = "one";
    config.td = "{}";
    config.td_size = 2;
    config.program = program;
    config.program_size = sizeof program;
    memcpy(config.model, "\0\0\0\0\0\0\0\1", 8);
    config.arena = room(ARENA);
    config.arena_size = ARENA;
    config.base = room(BASE * sizeof(float));
    config.base_count = BASE;
    config.sample = room((INPUTS + 1) * sizeof(float));
    config.sample_count = INPUTS + 1;
    config.model_slot[0] = room(ADOPTED);
    config.model_slot[1] = room(ADOPTED);
    config.clock.now = now;
    config.groups[1] = "all";
    config.keys = has_learner ? &keys : NULL;
    config.verify.verify = mote_ed25519_verify;
    config.model_slot_size = ADOPTED;
    config.out = room(MOTE_OUT);
    config.out_size = MOTE_OUT;
    config.source.open = open_source;
    config.source.next = next_sample;
    if (has_learner) {
        mote_learner_t callbacks = {NULL, learner_load, learner_set, learner_get, learner_learn, learner_score};
        config.learner = callbacks;
    }
    learner_arena = room(ARENA);
    mote_node_t *n = room(sizeof *n);
    while (mote_node_init(n, &config) != MOTE_OK) {
        if (!has_learner) {
            abort();
        }
    }
    while (size > 0) {
        uint8_t what = *data++;
        size_t length = 0;
        size--;
        if (what >= 0x80 && size >= 2) {
            length = data[0] | (size_t)data[1] << 8;
            data += 2;
            size -= 2;
            length = length < size ? length : size;
        }
        uint32_t number = what & 3;
        char topic[MOTE_TOPIC];
        if (what < 0x40) {
            for (int i = 0; i <= what && mote_node_step(n); i++) {
            }
        } else if (what < 0x80) {
            mote_out_t will;
            mote_node_connected(n);
            mote_node_will(n, &will);
            look(will.payload, will.size);
        } else if (what < 0x90) {
            static const char *const topics[] = {"tinyfleet/home/devices/one/command", "tinyfleet/home/time",
                                                 "tinyfleet/home/groups/all/command"};
            receive(n, topics[number % 3], data, length);
        } else if (what < 0xa0) {
            const mote_keys_t *with = n->config.keys;
            n->config.keys = NULL;
            receive_action(n, data, length);
            n->config.keys = with;
        } else if (what < 0xc0) {
            strcpy(topic, "tinyfleet/home/runs/5/1/0");
            topic[24] = (char)('0' + number);
            receive_chunk(n, topic, number * MOTE_CHUNK, data, length < MOTE_CHUNK ? length : MOTE_CHUNK);
        } else if (what < 0xe0) {
            strcpy(topic, MODEL_TOPIC);
            topic[39] = (char)('0' + number);
            receive_chunk(n, topic, number * MOTE_CHUNK, data, length < MOTE_CHUNK ? length : MOTE_CHUNK);
        } else if (what < 0xf0) {
            receive(n, "tinyfleet/home/runs/5/1/0", data, length);
        } else {
            size_t name = length < sizeof topic - 1 ? length : sizeof topic - 1;
            memcpy(topic, data, name);
            topic[name] = 0;
            receive(n, topic, data, length);
        }
        data += length;
        size -= length;
        send_all(n);
    }
    free(config.arena);
    free(config.base);
    free(config.sample);
    free(config.model_slot[0]);
    free(config.model_slot[1]);
    free(config.out);
    free(learner_arena);
    free(n);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    state = mote_crc32(0, data, size);
    run(data, size, 0);
    run(data, size, 1);
    read_frames(data, size);
    return 0;
}
