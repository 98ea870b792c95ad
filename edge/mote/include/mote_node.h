/* A fleet device without any I/O of its own: messages in, messages out, one training sample a step.
 *
 * The owner (firmware behind a UART or lwIP, a host process with an MQTT client, a test) hands over every message with
 * mote_node_receive, calls mote_node_step while it returns 1, and sends whatever mote_node_poll gives. Nothing blocks,
 * nothing is allocated, and every message may be lost, repeated, reordered, cut or hostile.
 *
 * What the messages are: edge/wire/protocol.cddl.
 */
#ifndef MOTE_NODE_H
#define MOTE_NODE_H

#include "mote.h"
#include "mote_cose.h"
#include "mote_store.h"

#ifdef __cplusplus
extern "C" {
#endif

#define MOTE_CHUNK 1024u      /* bytes of every chunk of weights or program but the last */
#define MOTE_MAX_CHUNKS 1024u /* so at most 1 MiB of either */
#define MOTE_TOPIC 128u       /* bytes of the longest topic, with its NUL */
#define MOTE_MAX_PHASES 4u
#define MOTE_OUT 256u /* the least room for one outgoing payload */
#define MOTE_GROUPS 4u
#define MOTE_MAX_INLINE 2048u /* bytes of the largest weights in a command */
#define MOTE_KEY 32u
#define MOTE_NONCE 8u

/* Where samples come from. open starts the task of this seed (a sensor may ignore it); next fills x and y (mote_inputs
 * and mote_targets floats) and returns 1, or returns 0 if no sample is there yet, or an error, which ends
 * the task. query asks for samples that are never learned from. */
typedef struct {
    void *context;
    int (*open)(void *context, uint32_t seed); /* MOTE_OK or an error */
    int (*next)(void *context, int query, float *x, float *y);
} mote_source_t;

/* Another engine that learns in mote's place, TensorFlow Lite's for example; all NULL: mote learns. The node still
 * loads every program into its arena, whose parameters mirror the other engine's, so that what it does with parameters
 * is the same: it sets them before learning and gets them after. Each returns MOTE_OK or an error. */
typedef struct {
    void *context;
    /* This program runs from now on; its parameters are set before it learns. NULL: always the same program, and then
     * the node takes none over the air. */
    int (*load)(void *context, const void *program, size_t size);
    int (*set)(void *context, const float *parameters, size_t count);
    int (*get)(void *context, float *parameters, size_t count);
    /* As mote_learn, with the layers of this mask training. */
    int (*learn)(void *context, const float *x, const float *y, float rate, uint32_t layers, float *loss);
    /* The loss on a sample that is not learned from, and whether its class is right, 1 or 0; 0 where there are none. */
    int (*score)(void *context, const float *x, const float *y, float *loss, int *correct);
} mote_learner_t;

/* The time, Unix time in milliseconds; 0: not known (yet). */
typedef struct {
    void *context;
    uint64_t (*now)(void *context);
} mote_clock_t;

/* Whom the device obeys. */
typedef struct {
    uint8_t command[MOTE_KEY]; /* its own, shared with the server: of train tasks */
    uint8_t current[MOTE_KEY]; /* the fleet's public keys: of all other commands */
    uint8_t next[MOTE_KEY];    /* zeros: none */
    uint8_t root[MOTE_KEY];    /* the public key that changes of the two before are signed with */
    uint32_t version;          /* of those two, at least 1 */
} mote_keys_t;

typedef struct {
    const char *fleet; /* as in the topics tinyfleet/{fleet}/devices/{id}/... */
    const char *id;
    const char *td; /* the Thing Description, JSON, td_size bytes */
    size_t td_size;
    const void *program; /* the built-in model, and the first 8 bytes of its SHA-256 */
    size_t program_size;
    uint8_t model[8];
    void *arena;
    size_t arena_size;
    float *base;       /* room for a copy of the weights, or NULL: then none of what needs it: sparse replies or other
                          changes, clipping, a proximal_mu towards the round's weights */
    size_t base_count; /* floats */
    float *sample;     /* room for one input and one target */
    size_t sample_count;
    uint8_t *model_slot[2]; /* room for programs over the air, aligned to 4 bytes: an update is written to the one that
                               is not in use. One or both may be NULL: with one, the built-in program runs while the
                               next one arrives; without any, it stays. */
    size_t model_slot_size; /* bytes of each */
    uint8_t *out;           /* room for one outgoing payload, at least MOTE_OUT bytes; larger updates go in parts */
    size_t out_size;
    mote_source_t source;
    mote_learner_t learner;
    const mote_keys_t *keys; /* NULL: it obeys anyone who can publish */
    mote_verify_t verify;    /* checks signatures; mote_ed25519_verify, or the platform's hardware. With keys, needed */
    mote_clock_t clock;      /* now: NULL: the time comes from the server, signed */
    mote_keep_t keep;        /* what survives a reset; get: NULL: nothing does */
    uint32_t keep_every;     /* the weights are kept after every so many train tasks; 0: they are not */
    const char *groups[MOTE_GROUPS]; /* whose commands it obeys, too: names, or NULL */
    uint8_t nonce[MOTE_NONCE];       /* random, another at every start; where a platform has nothing random, zeros: with
                                        keys and a store it is made from them */
    uint32_t reset;                  /* why it started, as in the status */
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
    uint32_t stale;     /* repeated, reordered or of a round that is over */
    uint32_t samples;   /* learned from, since the start; the owner may add those that it learned from by itself */
    uint32_t refused;   /* commands that were not authentic, not fresh or not allowed */
} mote_counters_t;

typedef struct {
    uint32_t layers, steps;
    float rate, proximal_mu;
} mote_phase_t;

/* A topic with commands: its last counter, and up to which one it is stored as used. */
typedef struct {
    uint64_t last, ceiling;
} mote_counter_t;

/* A program over the air, as its manifest says. */
typedef struct {
    uint8_t hash[32];
    uint32_t size, version, arena, inputs, outputs, tested, probation;
    float max_loss;
} mote_manifest_t;

/* The owner keeps one of these, zeroed or not; what is in it is the node's own. */
typedef struct {
    mote_node_config_t config;
    mote_t mote;
    uint8_t model[8];      /* of the program that runs, */
    uint32_t program_size; /* and its bytes */
    mote_counters_t counters;
    uint32_t rounds;      /* rounds whose parameters have arrived, since the start */
    float battery, drift; /* of the status */
    uint32_t pending;     /* what poll has to give, one bit each */
    uint32_t subscribed;  /* how many of the topics with commands have been subscribed to */
    char topic[MOTE_TOPIC];

    /* Whom it obeys, and when. */
    mote_keys_t keys;
    mote_counter_t counter[1 + MOTE_GROUPS]; /* of its own topic, and of each group's */
    uint64_t now;                            /* the latest time that it was told */
    uint8_t nonce[MOTE_NONCE];
    uint32_t boots;

    /* The command in hand, or the last one done. It is known by the hash of its bytes, so that a repeated one is. */
    uint32_t state;
    uint8_t hash[32];
    uint64_t expires;
    uint32_t id;
    uint32_t has_round; /* whether run and round are those of a command */
    uint32_t run, round, seed, query;
    uint32_t phases;
    mote_phase_t phase[MOTE_MAX_PHASES];
    uint32_t based;                /* whether it needs a copy of the weights */
    uint32_t update, shared, half; /* whether an update goes back, of which layers, as f16 */
    float density;
    uint32_t since; /* the phase whose beginning is the base; 0: the round's weights */
    float clip;     /* the largest norm of the changes, or 0 */

    /* What is being received: the round's weights, or a program. */
    uint8_t wanted_hash[32];
    uint32_t wanted_size, missing; /* bytes, chunks */
    uint32_t received[MOTE_MAX_CHUNKS / 32];
    uint32_t left; /* what to unsubscribe from: the state in which it was wanted, and */
    uint32_t left_run, left_round;
    uint8_t left_model[8];

    /* Programs over the air: which slot holds the one that runs, 0 the built-in one, else slot - 1. */
    uint32_t slot, previous, target;
    mote_manifest_t manifest[2]; /* of what the slots hold */
    uint32_t newest;             /* the highest version ever confirmed */
    uint32_t trial;              /* as in the status */
    uint32_t probation;          /* samples that the program on trial has been tried on so far, */
    float probation_loss;        /* and the sum of their losses */
    uint32_t tasks;              /* train tasks since the weights were kept */

    /* How far the train task is. */
    uint32_t at_phase, at_step;
    uint32_t learned, queried, correct;
    float loss, query_loss; /* sums */

    /* The reply. */
    uint32_t error;
    int32_t detail;
    uint32_t measured;          /* whether metrics are in it */
    uint32_t part, parts, next; /* next: the parameter where the next part begins */
    uint32_t threshold, ties;   /* of a sparse reply: the bits of the smallest change sent, and how many such are */
    uint32_t ties_left;
    uint32_t rejected_id, rejected_error; /* a command that was rejected at once, */
    int32_t rejected_detail;
    uint32_t has_rejected; /* which it is known by, if there was one */
    uint8_t rejected_hash[32];
} mote_node_t;

/* Checks the configuration and loads the built-in program. All that the configuration points to must stay there.
 * MOTE_ERR_ARGUMENT: a name that is not 1..32 of A-Z a-z 0-9 . _ -, or a buffer that is missing or too small, or keys
 * without what checks signatures, or without a clock, a store or a nonce; else the program's error. */
int mote_node_init(mote_node_t *n, const mote_node_config_t *config);

/* To be called whenever the session with the broker is new: the node announces itself and subscribes again. */
void mote_node_connected(mote_node_t *n);

/* What the status says besides the node's own figures, each 0..1, or negative: not known, as it is at first. The status
 * is sent again where drift begins or ends; the battery's level goes with the next one. */
void mote_node_set_drift(mote_node_t *n, float drift);
void mote_node_set_battery(mote_node_t *n, float battery);

/* What the session must leave as its will, retained: topic and payload of the status "offline". */
void mote_node_will(mote_node_t *n, mote_out_t *out);

/* A message has arrived; the topic need not be NUL-terminated. */
void mote_node_receive(mote_node_t *n, const char *topic, size_t topic_size, const uint8_t *payload, size_t size);

/* The owner has learned from, or scored, a sample by itself, with this loss: it counts for the trial of a program. Not
 * MOTE_OK: the program has failed on trial, and the one before runs. */
int mote_node_observe(mote_node_t *n, float loss);

/* Keeps the weights as they are now, for the next start. MOTE_OK, or the store's error. */
int mote_node_keep_weights(mote_node_t *n);

/* Learns from, or scores, one sample. 1: call again; 0: nothing more to do until a message or a sample arrives. */
int mote_node_step(mote_node_t *n);

/* The next thing to send: 1 and *out, or 0 if there is none. To be called until 0 after each of the calls above. */
int mote_node_poll(mote_node_t *n, mote_out_t *out);

#ifdef __cplusplus
}
#endif

#endif
