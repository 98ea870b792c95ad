/* A fleet device without any I/O of its own: messages in, messages out, one training sample a step.
 *
 * The owner (firmware behind a UART or lwIP, a host process with an MQTT client, a test) hands over every message with
 * mote_node_receive, calls mote_node_step while it returns 1, and sends whatever mote_node_poll gives. Nothing blocks,
 * nothing is allocated, and every message may be lost, doubled, reordered, cut or hostile.
 *
 * What the messages are: ../protocol.cddl.
 */
#ifndef MOTE_NODE_H
#define MOTE_NODE_H

#include "mote.h"

#define MOTE_CHUNK 1024u        /* bytes of every chunk of weights or program but the last */
#define MOTE_MAX_CHUNKS 1024u   /* so at most 1 MiB of either */
#define MOTE_TOPIC 128u         /* bytes of the longest topic, with its NUL */
#define MOTE_MAX_PHASES 4u

/* Where samples come from. open starts the task of this seed (a sensor may ignore it); next fills x and y and returns
 * 1, or returns 0 if no sample is there yet. query asks for samples that are never learned from. */
typedef struct {
    void *context;
    int (*open)(void *context, uint32_t seed); /* MOTE_OK or an error */
    int (*next)(void *context, int query, float *x, float *y);
} mote_source_t;

typedef struct {
    const char *fleet; /* as in the topics tinyfleet/{fleet}/devices/{id}/... */
    const char *id;
    const char *td;    /* the Thing Description, JSON, td_size bytes */
    size_t td_size;
    const void *program; /* the built-in model, and the first 8 bytes of its SHA-256 */
    size_t program_size;
    uint8_t model[8];
    void *arena;
    size_t arena_size;
    float *base;       /* room for a copy of the round's weights, or NULL: then no sparse replies */
    size_t base_count; /* floats */
    float *sample;     /* room for one input and one target */
    size_t sample_count;
    uint8_t *adopted; /* room for a program received over the air, or NULL: then the built-in one stays */
    size_t adopted_size;
    uint8_t *out; /* room for one outgoing payload */
    size_t out_size;
    mote_source_t source;
} mote_node_config_t;

enum { MOTE_PUBLISH = 1, MOTE_PUBLISH_RETAINED = 2, MOTE_SUBSCRIBE = 3, MOTE_UNSUBSCRIBE = 4, MOTE_REBOOT = 5 };

typedef struct {
    int kind;
    const char *topic;      /* or topic filter, NUL-terminated; valid until the next call on the node */
    const uint8_t *payload; /* NULL unless something is published; valid until the next call on the node */
    size_t size;
} mote_out_t;

typedef struct {
    uint32_t malformed; /* messages that did not decode, or did not fit */
    uint32_t stale;     /* doubled, reordered or of a round that is over */
    uint32_t samples;   /* learned from, since the start */
} mote_counters_t;

