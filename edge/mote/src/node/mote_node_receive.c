/* What comes in: commands, and the chunks of the parameters or the program that a command wants. */
#include <string.h>

#include "mote_node_internal.h"
#include "protocol_decode.h"

/* --------------------------------------------------------------------------------------------------- commands */

/* Wants no more chunks: the node unsubscribes from them. */
static void leave_chunks(mote_node_t *n)
{
    if (mote_node_wants_chunks(n)) {
        n->left = n->state;
        n->left_run = n->run;
        n->left_round = n->round;
        memcpy(n->left_model, n->wanted_hash, sizeof n->left_model);
        n->pending |= UNSUBSCRIBE_CHUNKS;
    }
    n->pending &= ~(uint32_t)SUBSCRIBE_CHUNKS;
}

/* Drops what the node was doing, and begins another command. */
void mote_node_begin(mote_node_t *n, const uint8_t hash[32], uint32_t id, uint32_t state)
{
    leave_chunks(n);
    n->pending &= ~(uint32_t)SEND_REPLY;
    memcpy(n->hash, hash, sizeof n->hash);
    n->state = state;
    n->id = id;
    n->measured = 0;
    n->update = 0;
}

void mote_node_want_chunks(mote_node_t *n, uint32_t size)
{
    memset(n->received, 0, sizeof n->received);
    n->wanted_size = size;
    n->missing = size / MOTE_CHUNK + (size % MOTE_CHUNK != 0);
    n->pending |= SUBSCRIBE_CHUNKS;
}

/* A train task as the node keeps it: what the message may leave out is 0. */
typedef struct {
    uint32_t phases;
    mote_phase_t phase[MOTE_MAX_PHASES]; /* layers as in the message: UINT32_MAX is all */
    uint32_t update, shared, half, since;
    float density, clip;
    uint32_t proximal; /* whether a phase has a proximal term */
    uint32_t based;    /* whether a copy of the round's parameters is needed */
} task_t;

static void read_phases(task_t *t, const struct train_task *task)
{
    t->phases = (uint32_t)task->train_task_phases_phase_m_count;
    for (uint32_t i = 0; i < t->phases; i++) {
        const struct phase *phase = &task->train_task_phases_phase_m[i];
        t->phase[i].layers = phase->phase_layers;
        t->phase[i].steps = phase->phase_steps;
        t->phase[i].rate = phase->phase_rate;
        t->phase[i].proximal_mu = phase->phase_proximal_mu_present ? phase->phase_proximal_mu : 0.0f;
        t->proximal |= t->phase[i].proximal_mu != 0.0f;
    }
}

static void read_task(task_t *t, const struct train_task *task)
{
    memset(t, 0, sizeof *t);
    t->density = 1.0f;
    read_phases(t, task);
    if (task->train_task_update_choice == train_task_update_update_format_m_c) {
        const struct update_format *format = &task->train_task_update_update_format_m;
        t->update = task->train_task_kind_choice == train_task_kind_train_m_c;
        t->shared = format->update_format_shared;
        t->half = format->update_format_half;
        t->density = format->update_format_density;
        if (format->update_format_change_options_m_present) {
            t->since = format->update_format_change_options_m.change_options_since;
            t->clip = format->update_format_change_options_m.change_options_clip;
        }
    }
    t->based = t->proximal || (t->update && (t->density < 1.0f || t->since > 0 || t->clip > 0.0f));
}

/* Whether the numbers of a task can be used together. Written so that a NaN cannot. */
static int is_consistent(const task_t *t)
{
    for (uint32_t i = 0; i < t->phases; i++) {
        float mu = t->phase[i].proximal_mu;
        if (!(mu >= 0.0f && (mu == 0.0f || t->phase[i].rate * mu < 1.0f))) {
            return 0;
        }
    }
    return !t->update || (t->clip >= 0.0f && (t->since == 0 || (t->since < t->phases && !t->proximal)));
}

void mote_node_hash(const void *bytes, size_t size, uint8_t hash[32])
{
    mote_sha256_t s;
    mote_sha256_init(&s);
    mote_sha256_add(&s, bytes, size);
    mote_sha256_end(&s, hash);
}

int mote_node_has_hash(const void *bytes, size_t size, const uint8_t hash[32])
{
    uint8_t digest[32];
    mote_node_hash(bytes, size, digest);
    return memcmp(digest, hash, sizeof digest) == 0;
}

/* All parameters of the round are there: those that the command named, or others. */
static void take_parameters(mote_node_t *n)
{
    if (mote_node_has_hash(n->mote.arena, mote_header(&n->mote)->params, n->wanted_hash)) {
        mote_node_start_training(n);
    } else {
        mote_node_finish(n, DAMAGED, 0);
    }
}

static int trains_frozen_layers(const mote_node_t *n, const task_t *t)
{
    for (uint32_t i = 0; i < t->phases; i++) {
        uint32_t layers = t->phase[i].layers;
        if (layers != UINT32_MAX && (layers & ~n->mote.trainable) != 0) {
            return 1;
        }
    }
    return 0;
}

/* The reason to reject this task at once, or NO_ERROR. */
static uint32_t check_task(const mote_node_t *n, const task_t *t, const uint8_t *model, int32_t *detail)
{
    uint32_t params = mote_header(&n->mote)->params;
    *detail = 0;
    if (memcmp(model, n->model, sizeof n->model) != 0) {
        return WRONG_MODEL;
    }
    if (params > MOTE_CHUNK * MOTE_MAX_CHUNKS) {
        return NO_CAPACITY;
    }
    if (t->based && (n->config.base == NULL || n->config.base_count < params / sizeof(float))) {
        return NO_CAPACITY;
    }
    if (!is_consistent(t)) {
        *detail = MOTE_ERR_ARGUMENT;
        return ENGINE;
    }
    if (trains_frozen_layers(n, t)) {
        *detail = MOTE_ERR_FROZEN;
        return ENGINE;
    }
    return NO_ERROR;
}

static void begin_task(mote_node_t *n, const uint8_t hash[32], const struct train_task *task)
{
    const struct zcbor_string *weights = &task->train_task_weights_inline_weights_m;
    int is_inline = task->train_task_weights_choice == train_task_weights_inline_weights_m_c;
    task_t t;
    int32_t detail;
    read_task(&t, task);
    if (!(t.density > 0.0f && t.density <= 1.0f)) {
        n->counters.malformed++;
        return;
    }
    if (n->has_round && task->train_task_run == n->run && task->train_task_round < n->round) {
        n->counters.stale++;
        return;
    }
    uint32_t error = check_task(n, &t, task->train_task_model.value, &detail);
    if (error == NO_ERROR && is_inline && weights->len != mote_header(&n->mote)->params) {
        error = ENGINE;
        detail = MOTE_ERR_ARGUMENT;
    }
    if (error != NO_ERROR) {
        mote_node_reject(n, task->train_task_id, error, detail);
        return;
    }
    mote_node_begin(n, hash, task->train_task_id, WANT_PARAMETERS);
    n->has_round = 1;
    n->run = task->train_task_run;
    n->round = task->train_task_round;
    n->seed = task->train_task_seed;
    n->query = task->train_task_query;
    n->phases = t.phases;
    for (uint32_t i = 0; i < t.phases; i++) {
        n->phase[i] = t.phase[i];
        n->phase[i].layers = t.phase[i].layers == UINT32_MAX ? n->mote.trainable : t.phase[i].layers;
    }
    n->based = t.based;
    n->update = t.update;
    n->shared = t.shared;
    n->half = t.half;
    n->density = t.density;
    n->since = t.update ? t.since : 0;
    n->clip = t.clip;
    if (is_inline) {
        memcpy(n->mote.arena, weights->value, weights->len);
        mote_node_start_training(n);
        return;
    }
    memcpy(n->wanted_hash, task->train_task_weights_sha256_m.value, sizeof n->wanted_hash);
    mote_node_want_chunks(n, mote_header(&n->mote)->params);
    if (n->missing == 0) {
        leave_chunks(n);
        take_parameters(n);
    }
}

static void repeat(mote_node_t *n)
{
    if (mote_node_wants_chunks(n)) {
        n->pending |= SUBSCRIBE_CHUNKS; /* the retained chunks come again, with them those that were lost */
    } else if (n->state == DONE) {
        mote_node_send_reply(n);
    } else {
        n->counters.stale++;
    }
}

static void obey(mote_node_t *n, const uint8_t hash[32], const struct action_r *action)
{
    switch (action->action_choice) {
    case action_train_task_m_c:
        begin_task(n, hash, &action->action_train_task_m);
        break;
    case action_update_model_m_c:
        mote_node_begin_update(n, hash, &action->action_update_model_m);
        break;
    case action_new_keys_m_c:
        mote_node_set_keys(n, &action->action_new_keys_m);
        break;
    case action_forget_m_c:
        mote_node_forget_all(n, hash, action->action_forget_m.forget_id);
        break;
    default:
        mote_node_begin(n, hash, action->action_reboot_m.reboot_id, DONE);
        mote_node_finish(n, NO_ERROR, 0);
        n->pending |= REBOOT;
    }
}

static uint32_t id_of(const struct action_r *action)
{
    switch (action->action_choice) {
    case action_train_task_m_c:
        return action->action_train_task_m.train_task_id;
    case action_update_model_m_c:
        return action->action_update_model_m.update_model_id;
    case action_new_keys_m_c:
        return action->action_new_keys_m.new_keys_id;
    case action_forget_m_c:
        return action->action_forget_m.forget_id;
    default:
        return action->action_reboot_m.reboot_id;
    }
}

void mote_node_receive_command(mote_node_t *n, const mote_node_message_t *m)
{
    struct command command;
    uint8_t hash[32];
    if (m->size == 0) { /* cleared */
        return;
    }
    if (m->payload == NULL) {
        n->counters.malformed++;
        return;
    }
    mote_node_hash(m->payload, m->size, hash);
    if (n->state != IDLE && memcmp(n->hash, hash, sizeof hash) == 0) {
        repeat(n);
        return;
    }
    if (n->has_rejected && memcmp(n->rejected_hash, hash, sizeof hash) == 0) {
        n->pending |= SEND_REJECTION;
        return;
    }
    if (!mote_node_accept(n, m, &command)) {
        return;
    }
    memcpy(n->rejected_hash, hash, sizeof hash); /* if it is rejected */
    n->has_rejected = 0;
    int error = mote_node_keep_counter(n, m->source);
    if (error != MOTE_OK) { /* obeyed, it could be obeyed again after a reset */
        mote_node_reject(n, id_of(&command.command_action_m), STORE, error);
        return;
    }
    mote_node_stop_test(n);
    obey(n, hash, &command.command_action_m);
    if (memcmp(n->hash, hash, sizeof hash) == 0) { /* it was begun */
        n->expires = command.command_expires;
    }
}

/* ----------------------------------------------------------------------------------------------------- chunks */

/* A chunk's number, less than MOTE_MAX_CHUNKS; MOTE_MAX_CHUNKS if the text is not a number that a chunk can have. */
static uint32_t chunk_number(const char *text, size_t size)
{
    uint32_t value = 0;
    if (size == 0 || size > 4 || (size > 1 && text[0] == '0')) {
        return MOTE_MAX_CHUNKS;
    }
    for (size_t i = 0; i < size; i++) {
        if (text[i] < '0' || text[i] > '9') {
            return MOTE_MAX_CHUNKS;
        }
        value = value * 10 + (uint32_t)(text[i] - '0');
    }
    return value < MOTE_MAX_CHUNKS ? value : MOTE_MAX_CHUNKS;
}

/* Whether this is the chunk of that number of what is wanted, and undamaged. */
static int is_wanted(const mote_node_t *n, uint32_t number, const struct chunk *chunk)
{
    if (number >= MOTE_MAX_CHUNKS || chunk->chunk_offset != number * MOTE_CHUNK ||
        chunk->chunk_offset >= n->wanted_size) {
        return 0;
    }
    uint32_t left = n->wanted_size - chunk->chunk_offset;
    return chunk->chunk_data.len == (left < MOTE_CHUNK ? left : MOTE_CHUNK) &&
           mote_crc32(0, chunk->chunk_data.value, chunk->chunk_data.len) == chunk->chunk_crc;
}

void mote_node_receive_chunk(mote_node_t *n, const char *text, size_t text_size, const uint8_t *payload, size_t size)
{
    struct chunk chunk;
    size_t read = 0;
    uint32_t number = chunk_number(text, text_size);
    if (size == 0) { /* cleared: the round is over */
        n->counters.stale++;
        return;
    }
    if (payload == NULL || cbor_decode_chunk(payload, size, &chunk, &read) != ZCBOR_SUCCESS || read != size ||
        !is_wanted(n, number, &chunk)) {
        n->counters.malformed++;
        return;
    }
    uint32_t bit = 1u << (number % 32);
    if (n->received[number / 32] & bit) {
        n->counters.stale++;
        return;
    }
    n->received[number / 32] |= bit;
    uint8_t *to = n->state == WANT_PARAMETERS ? n->mote.arena : n->config.model_slot[n->target - 1];
    memcpy(to + chunk.chunk_offset, chunk.chunk_data.value, chunk.chunk_data.len);
    if (--n->missing > 0) {
        return;
    }
    uint32_t state = n->state;
    leave_chunks(n);
    if (state == WANT_PARAMETERS) {
        take_parameters(n);
    } else {
        mote_node_start_program(n);
    }
}
