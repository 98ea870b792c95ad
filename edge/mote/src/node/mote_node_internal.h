/* What the node's files share.
 *
 *     mote_node.c          the public functions: what goes out, and in which order
 *     mote_node_receive.c  what comes in: commands, and the chunks of parameters and programs
 *     mote_node_train.c    one sample a step, on mote or on the learner that the owner supplies
 *     mote_node_reply.c    the answer to a command
 *     mote_node_topics.c   topics and filters
 *     mote_update.c        what of the learned parameters goes into a reply
 *
 * Parameters are received straight into the model's, and programs straight into the buffer for them, chunk by chunk in any
 * order. Replies are encoded when they are polled, from the parameters as they are, so that a part that was lost can be
 * sent again.
 */
#ifndef MOTE_NODE_INTERNAL_H
#define MOTE_NODE_INTERNAL_H

#include "mote_internal.h"
#include "mote_node.h"

/* n->state: what the node is doing. A command that is done keeps its reply until the next one. */
enum { IDLE, WANT_PARAMETERS, WANT_PROGRAM, TRAIN, QUERY, DONE };

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
enum { NO_ERROR, WRONG_MODEL, BAD_PROGRAM, NO_CAPACITY, NO_SAMPLES, ENGINE, DIVERGED };

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
const char *mote_node_chunk_filter(mote_node_t *n, uint32_t state, uint32_t run, uint32_t round, const uint8_t model[8]);

/* Loads a program into the arena and, if there is one, the learner. */
int mote_node_load(const mote_node_t *n, mote_t *m, const void *program, size_t size);
int mote_node_load_builtin(mote_node_t *n);

/* A command has arrived; a chunk of what is wanted has, whose number is this text. */
void mote_node_receive_command(mote_node_t *n, const uint8_t *payload, size_t size);
void mote_node_receive_chunk(mote_node_t *n, const char *number, size_t number_size, const uint8_t *payload, size_t size);

/* All parameters of the round are there. */
void mote_node_start_training(mote_node_t *n);

/* Ends the command in hand, with an ErrorCode or NO_ERROR, and sends its reply from the first part on. */
void mote_node_finish(mote_node_t *n, uint32_t error, int32_t detail);
void mote_node_send_reply(mote_node_t *n);

/* Answers a command that is not begun. */
void mote_node_reject(mote_node_t *n, uint32_t id, uint32_t error, int32_t detail);

/* Encode into n->config.out; return the size. A part moves on to the next one. */
size_t mote_node_encode_failure(mote_node_t *n, uint32_t id, uint32_t error, int32_t detail);
size_t mote_node_encode_part(mote_node_t *n);

#endif
