/* What the node's files share.
 *
 *     mote_node.c          the public functions: what goes out, and in which order
 *     mote_node_authority.c  which commands it obeys, and when
 *     mote_node_receive.c  what comes in: commands, and the chunks of parameters and programs
 *     mote_node_model.c    programs over the air: slots and trials
 *     mote_node_keep.c     what it keeps through a reset
 *     mote_node_train.c    one sample a step, on mote or on the learner that the owner supplies
 *     mote_node_reply.c    the answer to a command
 *     mote_node_topics.c   topics and filters
 *     mote_update.c        what of the learned parameters goes into a reply
 *
 * Parameters are received straight into the model's, and programs straight into the buffer for them, chunk by chunk in
 * any order. Replies are encoded when they are polled, from the parameters as they are, so that a part that was lost
 * can be sent again.
 */
#ifndef MOTE_NODE_INTERNAL_H
#define MOTE_NODE_INTERNAL_H

#include "mote_internal.h"
#include "mote_node.h"

/* n->state: what the node is doing. A command that is done keeps its reply until the next one. */
enum { IDLE, WANT_PARAMETERS, WANT_PROGRAM, TRAIN, QUERY, TEST, DONE };

/* n->pending: what poll has to give, in this order. */
enum {
    SUBSCRIBE_COMMANDS = 1,
    SEND_TD = 2,
    SEND_STATUS = 4,
    UNSUBSCRIBE_CHUNKS = 8, /* before the next one: both may be of one round */
    SUBSCRIBE_CHUNKS = 16,
    SEND_REJECTION = 32,
    SEND_REPLY = 64,
    REBOOT = 128
};

/* As ErrorCode in edge/wire/messages.py. */
enum {
    NO_ERROR,
    WRONG_MODEL,
    BAD_PROGRAM,
    NO_CAPACITY,
    NO_SAMPLES,
    ENGINE,
    DIVERGED,
    DOWNGRADE,
    FAILED_TRIAL,
    STORE,
    DAMAGED,
    EXPIRED
};

/* As Trial there. */
enum { BUILT_IN, ON_TRIAL, CONFIRMED, ROLLED_BACK };

/* A message with a command, or with the time: the topic that it came on, and which of the node's that is, 0 its own,
 * else group - 1. */
typedef struct {
    const char *topic;
    size_t topic_size;
    const uint8_t *payload;
    size_t size;
    uint32_t source;
} mote_node_message_t;

struct command;
struct new_keys;
struct update_model;

static inline int mote_node_wants_chunks(const mote_node_t *n)
{
    return n->state == WANT_PARAMETERS || n->state == WANT_PROGRAM;
}

static inline int mote_node_has_learner(const mote_node_t *n)
{
    return n->config.learner.learn != NULL;
}

/* Topics, each in n->topic until the next one. Names are checked by mote_node_init, so that every topic fits. */
const char *mote_node_device_topic(mote_node_t *n, const char *kind);
const char *mote_node_chunk_filter(mote_node_t *n, uint32_t state, uint32_t run, uint32_t round,
                                   const uint8_t model[8]);

const char *mote_node_group_topic(mote_node_t *n, uint32_t group);
const char *mote_node_time_topic(mote_node_t *n);

/* ---- mote_node_authority.c */

/* The time that the node knows, or 0. */
uint64_t mote_node_now(const mote_node_t *n);
/* MOTE_ERR_ARGUMENT if old commands could not be told from new ones. */
int mote_node_start_authority(mote_node_t *n);
/* Decodes a command and tells whether to obey it; what is not is counted. It is not kept that it was. */
int mote_node_accept(mote_node_t *n, const mote_node_message_t *m, struct command *command);
/* Keeps that commands up to the last one of this source were obeyed. */
int mote_node_keep_counter(mote_node_t *n, uint32_t source);
void mote_node_receive_time(mote_node_t *n, const mote_node_message_t *m);
void mote_node_set_keys(mote_node_t *n, const struct new_keys *keys);

/* ---- mote_node_keep.c: each returns MOTE_OK, also without a store, or the store's error */

int mote_node_keep_counters(const mote_node_t *n);
int mote_node_keep_keys(const mote_node_t *n);
int mote_node_keep_model(mote_node_t *n); /* the program that runs */
int mote_node_forget(mote_node_t *n);
void mote_node_restore(mote_node_t *n); /* all of it, at the start */

/* ---- mote_node_model.c */

/* Loads a program into the arena and, if there is one, the learner. */
int mote_node_load(const mote_node_t *n, mote_t *m, const void *program, size_t size);
/* Loads the program that runs again, with its own initial parameters. */
int mote_node_reload(mote_node_t *n);
/* Runs the program of this manifest in the first slot, or if it is not that the built-in one. */
void mote_node_restore_program(mote_node_t *n, const mote_manifest_t *manifest);
void mote_node_begin_update(mote_node_t *n, const uint8_t hash[32], const struct update_model *command);
void mote_node_start_program(mote_node_t *n);       /* all chunks are there */
void mote_node_end_test(mote_node_t *n, int error); /* it has been scored, or that failed */
void mote_node_stop_test(mote_node_t *n);           /* for another command: the program on test is not yet the one that
                                                       runs */
void mote_node_forget_all(mote_node_t *n, const uint8_t hash[32], uint32_t id);

/* ---- mote_node_receive.c */

void mote_node_hash(const void *bytes, size_t size, uint8_t hash[32]);
int mote_node_has_hash(const void *bytes, size_t size, const uint8_t hash[32]);
/* Drops what the node was doing, and begins the command of these bytes. */
void mote_node_begin(mote_node_t *n, const uint8_t hash[32], uint32_t id, uint32_t state);
void mote_node_want_chunks(mote_node_t *n, uint32_t size);

/* A command has arrived; a chunk of what is wanted has, whose number is this text. */
void mote_node_receive_command(mote_node_t *n, const mote_node_message_t *m);
void mote_node_receive_chunk(mote_node_t *n, const char *number, size_t number_size, const uint8_t *payload,
                             size_t size);

/* All parameters of the round are there. */
void mote_node_start_training(mote_node_t *n);

/* Ends the command in hand, with an ErrorCode or NO_ERROR, and sends its reply from the first part on. */
void mote_node_finish(mote_node_t *n, uint32_t error, int32_t detail);
void mote_node_send_reply(mote_node_t *n);

/* Answers a command that is not begun, with NO_ERROR also one that was done at once. */
void mote_node_reject(mote_node_t *n, uint32_t id, uint32_t error, int32_t detail);

/* Encode into n->config.out; return the size. A part moves on to the next one. */
size_t mote_node_encode_failure(mote_node_t *n, uint32_t id, uint32_t error, int32_t detail);
size_t mote_node_encode_part(mote_node_t *n);
size_t mote_node_encode_rejection(mote_node_t *n);

#endif
