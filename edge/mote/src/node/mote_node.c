/* The device node: what the messages of ../protocol.cddl make a device do. mote_node.h says how it is used.
 *
 * Weights are received straight into the model's parameters and programs straight into the buffer for them, chunk by
 * chunk in any order. Replies are encoded when they are polled, from the parameters as they are, so that a part that
 * was lost can be had again.
 */
#include "mote_node.h"

#include <string.h>

#include "mote_internal.h"
#include "mote_update.h"
#include "protocol_decode.h"
#include "protocol_encode.h"

/* What the node is doing; a command that is done keeps its reply until the next one. */
enum { IDLE, WANT_WEIGHTS, WANT_PROGRAM, LEARN, QUERY, DONE };

/* What poll has to give, in this order. */
enum {
    SUBSCRIBE_DO = 1,
    SEND_TD = 2,
    SEND_STATUS = 4,
    UNSUBSCRIBE_CHUNKS = 8, /* before the next line: both may be of one round */
    SUBSCRIBE_CHUNKS = 16,
    SEND_REJECTION = 32,
    SEND_REPLY = 64,
    REBOOT = 128
};

/* As ErrorCode in ../protocol.py. */
enum { NO_ERROR, WRONG_MODEL, BAD_PROGRAM, NO_CAPACITY, NO_SAMPLES, ENGINE, DIVERGED };

enum { NAME = 32 };

static const char ROOT[] = "tinyfleet/";

/* ---------------------------------------------------------------------------------------------------------- topics */

static void add_text(mote_node_t *n, size_t *at, const char *text)
{
    size_t size = strlen(text);
    memcpy(n->topic + *at, text, size + 1);
    *at += size;
}

static void add_number(mote_node_t *n, size_t *at, uint32_t value)
{
    char digits[11];
    size_t i = sizeof digits - 1;
    digits[i] = 0;
    do {
        digits[--i] = (char)('0' + value % 10);
        value /= 10;
    } while (value > 0);
    add_text(n, at, digits + i);
}

static void add_hash(mote_node_t *n, size_t *at, const uint8_t model[8])
{
    static const char hex[] = "0123456789abcdef";
    for (size_t i = 0; i < 8; i++) {
        n->topic[(*at)++] = hex[model[i] >> 4];
        n->topic[(*at)++] = hex[model[i] & 15];
    }
    n->topic[*at] = 0;
}

/* Names are at most NAME long (mote_node_init), so every topic fits MOTE_TOPIC. */
static size_t begin_topic(mote_node_t *n)
{
    size_t at = 0;
    add_text(n, &at, ROOT);
    add_text(n, &at, n->config.fleet);
    return at;
}

static const char *device_topic(mote_node_t *n, const char *what)
{
    size_t at = begin_topic(n);
    add_text(n, &at, "/devices/");
    add_text(n, &at, n->config.id);
    add_text(n, &at, what);
    return n->topic;
}

static const char *weights_filter(mote_node_t *n, uint32_t run, uint32_t round)
{
    size_t at = begin_topic(n);
    add_text(n, &at, "/runs/");
    add_number(n, &at, run);
    add_text(n, &at, "/");
    add_number(n, &at, round);
    add_text(n, &at, "/+");
    return n->topic;
}

static const char *program_filter(mote_node_t *n, const uint8_t model[8])
{
    size_t at = begin_topic(n);
    add_text(n, &at, "/models/");
    add_hash(n, &at, model);
    add_text(n, &at, "/+");
    return n->topic;
}

/* The topic's rest if it begins as this filter does, up to its '+'; else NULL. */
static const char *match_filter(const char *filter, const char *topic, size_t *size)
{
    size_t prefix = strlen(filter) - 1;
    if (*size < prefix || memcmp(topic, filter, prefix) != 0) {
        return NULL;
    }
    *size -= prefix;
    return topic + prefix;
}

/* A chunk's number, less than MOTE_MAX_CHUNKS; or MOTE_MAX_CHUNKS if the text is none. */
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

/* --------------------------------------------------------------------------------------------------------- replies */

static size_t encode_failed(mote_node_t *n, uint32_t id, uint32_t error, int32_t detail)
{
    struct reply_r reply;
    size_t size = 0;
    memset(&reply, 0, sizeof reply);
    reply.reply_choice = reply_failure_m_c;
    reply.reply_failure_m.failure_id = id;
    reply.reply_failure_m.failure_error = error;
    reply.reply_failure_m.failure_detail = detail;
    (void)cbor_encode_reply(n->config.out, n->config.out_size, &reply, &size); /* it fits MOTE_OUT */
    return size;
}

static void set_metrics(const mote_node_t *n, struct metrics *m)
{
    m->metrics_samples = n->learned;
    m->metrics_loss = n->learned > 0 ? n->loss / (float)n->learned : 0.0f;
    m->metrics_queried = n->queried;
    m->metrics_correct = n->correct;
    m->metrics_query_loss = n->queried > 0 ? n->query_loss / (float)n->queried : 0.0f;
    m->metrics_arena_bytes = (uint32_t)mote_arena_bytes(n->mote.program, mote_header(&n->mote)->total_size);
}

static void set_numbers(const mote_node_t *n, struct numbers_r *numbers, const uint8_t *values, uint32_t count)
{
    struct zcbor_string bytes = {values, (size_t)count * mote_number_size(n)};
    if (n->half) {
        numbers->numbers_choice = numbers_float16s_m_c;
        numbers->numbers_float16s_m = bytes;
    } else {
        numbers->numbers_choice = numbers_float32s_m_c;
        numbers->numbers_float32s_m = bytes;
    }
}

/* Encodes the reply's next part and moves on to the one behind it. */
static size_t encode_part(mote_node_t *n)
{
    struct reply_r reply;
    struct success *success = &reply.reply_success_m;
    size_t size = 0;
    memset(&reply, 0, sizeof reply);
    reply.reply_choice = reply_success_m_c;
    success->success_id = n->id;
    success->success_part = n->part;
    success->success_parts = n->parts;
    success->success_measured_choice = success_measured_nil_c;
    success->success_update_choice = success_update_nil_c;
    if (n->part == 0 && n->measured) {
        success->success_measured_choice = success_measured_metrics_m_c;
        set_metrics(n, &success->success_measured_metrics_m);
    }
    if (n->update) {
        uint8_t *gaps = n->config.out + MOTE_REPLY_HEAD;
        mote_part_t part;
        (void)mote_update_next_part(n, n->next, n->ties_left, &part); /* an empty update is one empty part */
        mote_update_write(n, &part, n->ties_left, gaps);
        if (mote_is_sparse(n)) {
            struct zcbor_string bytes = {gaps, part.gaps};
            success->success_update_choice = success_update_sparse_m_c;
            success->success_update_sparse_m.sparse_gaps = bytes;
            set_numbers(n, &success->success_update_sparse_m.sparse_changes, gaps + part.gaps, part.count);
        } else if (mote_sends_changes(n)) {
            success->success_update_choice = success_update_change_m_c;
            success->success_update_change_m.change_offset = part.from;
            set_numbers(n, &success->success_update_change_m.change_by, gaps, part.count);
        } else {
            success->success_update_choice = success_update_dense_m_c;
            success->success_update_dense_m.dense_offset = part.from;
            set_numbers(n, &success->success_update_dense_m.dense_values, gaps, part.count);
        }
        n->next = part.next;
        n->ties_left = part.ties;
    }
    n->part++;
    /* Encoding moves the values, which lie MOTE_REPLY_HEAD into out, down to where they belong. They fit as planned. */
    (void)cbor_encode_reply(n->config.out, n->config.out_size, &reply, &size);
    return size;
}

/* Sends the reply from its first part on. */
static void reply(mote_node_t *n)
{
    n->part = 0;
    n->next = 0;
    n->ties_left = n->ties;
    n->pending |= SEND_REPLY;
}

static void finish(mote_node_t *n, uint32_t error, int32_t detail)
{
    n->state = DONE;
    n->error = error;
    n->detail = detail;
    n->parts = 1;
    if (error != NO_ERROR) {
        n->update = 0;
    } else if (n->update) {
        uint32_t parts = mote_update_choose(n);
        n->parts = parts > 0 ? parts : 1;
    }
    n->pending |= SEND_STATUS;
    reply(n);
}

static void reject(mote_node_t *n, uint32_t id, uint32_t error, int32_t detail)
{
    n->rejected_id = id;
    n->rejected_error = error;
    n->rejected_detail = detail;
    n->pending |= SEND_REJECTION;
}

/* ---------------------------------------------------------------------------------------------------------- orders */

/* A fleet's samples, and the parameters that it exchanges, are floats. */
static int load(const mote_node_t *n, mote_t *m, const void *program, size_t size)
{
    int error = mote_load(m, program, size, n->config.arena, n->config.arena_size);
    if (error == MOTE_OK && (mote_input_type(m) != MOTE_FLOAT32 || mote_parameters(m, NULL) == NULL ||
                             mote_header(m)->loss == MOTE_NO_LOSS)) {
        return MOTE_ERR_UNSUPPORTED;
    }
    return error;
}

static int load_builtin(mote_node_t *n)
{
    memcpy(n->model, n->config.model, sizeof n->model);
    return load(n, &n->mote, n->config.program, n->config.program_size);
}

/* Wants no more chunks: what was subscribed to is left. */
static void leave_chunks(mote_node_t *n)
{
    if (n->state == WANT_WEIGHTS || n->state == WANT_PROGRAM) {
        n->left = n->state;
        n->left_run = n->run;
        n->left_round = n->round;
        memcpy(n->left_model, n->wanted_model, sizeof n->left_model);
        n->pending |= UNSUBSCRIBE_CHUNKS;
    }
    n->pending &= ~(uint32_t)SUBSCRIBE_CHUNKS;
}

/* Drops what the node was at, and begins another command. */
static void begin(mote_node_t *n, uint32_t command_crc, uint32_t id, uint32_t state)
{
    leave_chunks(n);
    n->pending &= ~(uint32_t)SEND_REPLY;
    memmove(n->recent + 1, n->recent, sizeof n->recent - sizeof n->recent[0]);
    n->recent[0] = command_crc;
    n->state = state;
    n->id = id;
    n->measured = 0;
    n->update = 0;
}

static void want_chunks(mote_node_t *n, uint32_t size)
{
    memset(n->received, 0, sizeof n->received);
    n->wanted_size = size;
    n->missing = size / MOTE_CHUNK + (size % MOTE_CHUNK != 0);
    n->pending |= SUBSCRIBE_CHUNKS;
}

/* How strongly a phase draws the weights back; 0: it doesn't. */
static float proximal_mu_of(const struct phase *phase)
{
    return phase->phase_proximal_mu_present ? phase->phase_proximal_mu : 0.0f;
}

/* What of the learned parameters a command wants; NULL: nothing. */
static const struct update_format *format_of(const struct train_task *task)
{
    return task->train_task_kind_choice == train_task_kind_train_m_c && task->train_task_update_choice == train_task_update_update_format_m_c
               ? &task->train_task_update_update_format_m
               : NULL;
}

/* The phase whose beginning is the base of an update's changes, and what they are clipped to; each 0 if not said. */
static uint32_t since_of(const struct update_format *format)
{
    return format->update_format_change_options_m_present ? format->update_format_change_options_m.change_options_since : 0;
}

static float clip_of(const struct update_format *format)
{
    return format->update_format_change_options_m_present ? format->update_format_change_options_m.change_options_clip : 0.0f;
}

/* Whether a command needs a copy of the weights beside those that learn; *fits: whether its numbers make sense. */
static int needs_base(const struct train_task *task, int *fits)
{
    const struct update_format *format = format_of(task);
    size_t phases = task->train_task_phases_phase_m_count;
    int has_proximal_term = 0;
    *fits = 1;
    for (size_t i = 0; i < phases; i++) {
        const struct phase *phase = &task->train_task_phases_phase_m[i];
        float proximal_mu = proximal_mu_of(phase);
        has_proximal_term |= proximal_mu != 0.0f;
        *fits &= proximal_mu >= 0.0f && (proximal_mu == 0.0f || phase->phase_rate * proximal_mu < 1.0f);
    }
    if (format == NULL) {
        return has_proximal_term;
    }
    *fits &= clip_of(format) >= 0.0f && (since_of(format) == 0 || (since_of(format) < phases && !has_proximal_term));
    return has_proximal_term || format->update_format_density < 1.0f || since_of(format) > 0 || clip_of(format) > 0.0f;
}

/* The reason to turn this task down at once, or NO_ERROR. */
static uint32_t check_train_task(const mote_node_t *n, const struct train_task *task, int32_t *detail)
{
    uint32_t params = mote_header(&n->mote)->params;
    int fits;
    *detail = 0;
    if (memcmp(task->train_task_model.value, n->model, sizeof n->model) != 0) {
        return WRONG_MODEL;
    }
    if (params > MOTE_CHUNK * MOTE_MAX_CHUNKS) {
        return NO_CAPACITY;
    }
    if (needs_base(task, &fits) && (n->config.base == NULL || n->config.base_count < params / sizeof(float))) {
        return NO_CAPACITY;
    }
    if (!fits) {
        *detail = MOTE_ERR_ARGUMENT;
        return ENGINE;
    }
    for (size_t i = 0; i < task->train_task_phases_phase_m_count; i++) {
        uint32_t layers = task->train_task_phases_phase_m[i].phase_layers;
        if (layers != UINT32_MAX && (layers & ~n->mote.trainable) != 0) {
            *detail = MOTE_ERR_FROZEN;
            return ENGINE;
        }
    }
    return NO_ERROR;
}

static void start_learning(mote_node_t *n);

static void begin_train_task(mote_node_t *n, uint32_t command_crc, const struct train_task *task)
{
    int32_t detail;
    uint32_t error = check_train_task(n, task, &detail);
    if (task->train_task_update_choice == train_task_update_update_format_m_c) {
        float density = task->train_task_update_update_format_m.update_format_density;
        if (!(density > 0.0f && density <= 1.0f)) {
            n->counters.malformed++;
            return;
        }
    }
    if (n->has_round && task->train_task_run == n->run && task->train_task_round < n->round) {
        n->counters.stale++;
        return;
    }
    if (error != NO_ERROR) {
        reject(n, task->train_task_id, error, detail);
        return;
    }
    begin(n, command_crc, task->train_task_id, WANT_WEIGHTS);
    n->has_round = 1;
    n->run = task->train_task_run;
    n->round = task->train_task_round;
    n->seed = task->train_task_seed;
    n->query = task->train_task_query;
    n->phases = (uint32_t)task->train_task_phases_phase_m_count;
    for (uint32_t i = 0; i < n->phases; i++) {
        const struct phase *phase = &task->train_task_phases_phase_m[i];
        n->phase[i].layers = phase->phase_layers == UINT32_MAX ? n->mote.trainable : phase->phase_layers;
        n->phase[i].steps = phase->phase_steps;
        n->phase[i].rate = phase->phase_rate;
        n->phase[i].proximal_mu = proximal_mu_of(phase);
    }
    int fits;
    n->based = (uint32_t)needs_base(task, &fits);
    n->since = 0;
    const struct update_format *format = format_of(task);
    if (format != NULL) {
        n->update = 1;
        n->shared = format->update_format_shared;
        n->half = format->update_format_half;
        n->density = format->update_format_density;
        n->since = since_of(format);
        n->clip = clip_of(format);
    }
    want_chunks(n, mote_header(&n->mote)->params);
    if (n->missing == 0) {
        start_learning(n);
    }
}

static void begin_model_update(mote_node_t *n, uint32_t command_crc, const struct update_model *command)
{
    if (memcmp(command->update_model_model.value, n->model, sizeof n->model) == 0) {
        begin(n, command_crc, command->update_model_id, DONE);
        finish(n, NO_ERROR, 0);
        return;
    }
    if (n->config.model_slot == NULL || command->update_model_size == 0 || command->update_model_size > n->config.model_slot_size ||
        command->update_model_size > MOTE_CHUNK * MOTE_MAX_CHUNKS) {
        reject(n, command->update_model_id, NO_CAPACITY, 0);
        return;
    }
    begin(n, command_crc, command->update_model_id, WANT_PROGRAM);
    if (n->mote.program == n->config.model_slot) { /* the new program will overwrite the one that runs */
        (void)load_builtin(n);                  /* it loaded before */
        n->pending |= SEND_STATUS;
    }
    memcpy(n->wanted_model, command->update_model_model.value, sizeof n->wanted_model);
    n->wanted_crc = command->update_model_crc;
    want_chunks(n, command->update_model_size);
}

static void take_again(mote_node_t *n)
{
    if (n->state == WANT_WEIGHTS || n->state == WANT_PROGRAM) {
        n->pending |= SUBSCRIBE_CHUNKS; /* the retained chunks come again, with them those that were lost */
    } else if (n->state == DONE) {
        reply(n);
    } else {
        n->counters.stale++;
    }
}

static void receive_do(mote_node_t *n, const uint8_t *payload, size_t size)
{
    struct command_r command;
    size_t read = 0;
    if (payload == NULL || cbor_decode_command(payload, size, &command, &read) != ZCBOR_SUCCESS || read != size) {
        n->counters.malformed++;
        return;
    }
    uint32_t crc = mote_crc32(0, payload, size);
    if (n->state != IDLE && n->recent[0] == crc) {
        take_again(n);
        return;
    }
    for (uint32_t i = 0; i < MOTE_RECENT; i++) {
        if (n->recent[i] == crc) {
            n->counters.stale++;
            return;
        }
    }
    if (command.command_choice == command_train_task_m_c) {
        begin_train_task(n, crc, &command.command_train_task_m);
    } else if (command.command_choice == command_update_model_m_c) {
        begin_model_update(n, crc, &command.command_update_model_m);
    } else {
        begin(n, crc, command.command_reboot_m.reboot_id, DONE);
        finish(n, NO_ERROR, 0);
        n->pending |= REBOOT;
    }
}

/* ---------------------------------------------------------------------------------------------------------- chunks */

/* All weights are there. */
static void start_learning(mote_node_t *n)
{
    uint32_t params = mote_header(&n->mote)->params;
    const float *w = mote_parameters(&n->mote, NULL);
    leave_chunks(n);
    n->measured = 1;
    n->at_phase = n->at_step = 0;
    n->learned = n->queried = n->correct = 0;
    n->loss = n->query_loss = 0.0f;
    if (n->based) {
        memcpy(n->config.base, w, params);
    }
    if (!mote_all_finite(w, params / sizeof(float))) {
        finish(n, DIVERGED, 0);
        return;
    }
    n->state = LEARN;
    int error = n->config.source.open(n->config.source.context, n->seed);
    if (error != MOTE_OK) {
        finish(n, NO_SAMPLES, error);
    }
}

/* The whole program is there. */
static void start_program(mote_node_t *n)
{
    const mote_node_config_t *c = &n->config;
    mote_t candidate;
    leave_chunks(n);
    int error = mote_crc32(0, c->model_slot, n->wanted_size) == n->wanted_crc ? MOTE_OK : MOTE_ERR_CRC;
    if (error == MOTE_OK) {
        size_t inputs = mote_inputs(&n->mote), targets = mote_targets(&n->mote);
        error = load(n, &candidate, c->model_slot, n->wanted_size);
        if (error == MOTE_OK && (mote_inputs(&candidate) != inputs || mote_targets(&candidate) != targets)) {
            error = MOTE_ERR_ARGUMENT; /* not for the samples of this device */
        }
        if (error == MOTE_OK) {
            n->mote = candidate;
            memcpy(n->model, n->wanted_model, sizeof n->model);
        } else {
            (void)load_builtin(n); /* its parameters may be gone, but it runs */
        }
    }
    finish(n, error == MOTE_OK ? NO_ERROR : BAD_PROGRAM, error);
}

static void receive_chunk(mote_node_t *n, uint32_t number, const uint8_t *payload, size_t size)
{
    struct chunk chunk;
    size_t read = 0;
    if (size == 0) { /* cleared: the round is over */
        n->counters.stale++;
        return;
    }
    if (payload == NULL || cbor_decode_chunk(payload, size, &chunk, &read) != ZCBOR_SUCCESS || read != size ||
        number >= MOTE_MAX_CHUNKS || chunk.chunk_offset != number * MOTE_CHUNK ||
        chunk.chunk_offset >= n->wanted_size) {
        n->counters.malformed++;
        return;
    }
    uint32_t left = n->wanted_size - chunk.chunk_offset;
    size_t count = chunk.chunk_data.len;
    if (count != (left < MOTE_CHUNK ? left : MOTE_CHUNK) ||
        mote_crc32(0, chunk.chunk_data.value, count) != chunk.chunk_crc) {
        n->counters.malformed++;
        return;
    }
    uint32_t bit = 1u << (number % 32);
    if (n->received[number / 32] & bit) {
        n->counters.stale++;
        return;
    }
    n->received[number / 32] |= bit;
    uint8_t *to = n->state == WANT_WEIGHTS ? n->mote.arena : n->config.model_slot;
    memcpy(to + chunk.chunk_offset, chunk.chunk_data.value, count);
    if (--n->missing > 0) {
        return;
    }
    if (n->state == WANT_WEIGHTS) {
        start_learning(n);
    } else {
        start_program(n);
    }
}

/* ---------------------------------------------------------------------------------------------------------- public */

static int is_name(const char *name)
{
    size_t size = 0;
    if (name == NULL) {
        return 0;
    }
    for (; name[size] != 0; size++) {
        char c = name[size];
        int good = (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '.' || c == '_' ||
                   c == '-';
        if (!good || size == NAME) {
            return 0;
        }
    }
    return size > 0;
}

int mote_node_init(mote_node_t *n, const mote_node_config_t *c)
{
    if (n == NULL || c == NULL || !is_name(c->fleet) || !is_name(c->id) || c->td == NULL || c->sample == NULL ||
        c->out == NULL || c->out_size < MOTE_OUT || c->source.open == NULL || c->source.next == NULL ||
        (c->base == NULL && c->base_count > 0) || c->out_size > MOTE_CHUNK * MOTE_MAX_CHUNKS) {
        return MOTE_ERR_ARGUMENT;
    }
    memset(n, 0, sizeof *n);
    n->config = *c;
    int error = load_builtin(n);
    if (error != MOTE_OK) {
        return error;
    }
    /* Not numbers: what a source leaves out makes the engine refuse the sample. */
    memset(c->sample, 0xff, c->sample_count * sizeof *c->sample);
    return mote_inputs(&n->mote) + mote_targets(&n->mote) <= c->sample_count ? MOTE_OK : MOTE_ERR_ARGUMENT;
}

void mote_node_connected(mote_node_t *n)
{
    n->pending |= SUBSCRIBE_DO | SEND_TD | SEND_STATUS;
    n->pending &= ~(uint32_t)UNSUBSCRIBE_CHUNKS;
    if (n->state == WANT_WEIGHTS || n->state == WANT_PROGRAM) {
        n->pending |= SUBSCRIBE_CHUNKS;
    }
}

static void give(mote_out_t *out, int kind, const char *topic, const uint8_t *payload, size_t size)
{
    out->kind = kind;
    out->topic = topic;
    out->payload = payload;
    out->size = size;
}

static void give_status(mote_node_t *n, int online, mote_out_t *out)
{
    struct status status;
    size_t size = 0;
    memset(&status, 0, sizeof status);
    status.status_online = online != 0;
    status.status_model.value = n->model;
    status.status_model.len = sizeof n->model;
    status.status_samples = n->counters.samples;
    status.status_malformed = n->counters.malformed;
    status.status_stale = n->counters.stale;
    status.status_battery_choice = status_battery_nil_c;
    status.status_drift_choice = status_drift_nil_c;
    (void)cbor_encode_status(n->config.out, n->config.out_size, &status, &size); /* it fits MOTE_OUT */
    give(out, MOTE_PUBLISH_RETAINED, device_topic(n, "/status"), n->config.out, size);
}

void mote_node_will(mote_node_t *n, mote_out_t *out)
{
    give_status(n, 0, out);
}

void mote_node_receive(mote_node_t *n, const char *topic, size_t topic_size, const uint8_t *payload, size_t size)
{
    const char *filter = device_topic(n, "/command");
    if (topic_size == strlen(filter) && memcmp(topic, filter, topic_size) == 0) {
        receive_do(n, payload, size);
        return;
    }
    if (n->state == WANT_WEIGHTS || n->state == WANT_PROGRAM) {
        filter = n->state == WANT_WEIGHTS ? weights_filter(n, n->run, n->round) : program_filter(n, n->wanted_model);
        const char *number = match_filter(filter, topic, &topic_size);
        if (number != NULL) {
            receive_chunk(n, chunk_number(number, topic_size), payload, size);
            return;
        }
    }
    n->counters.stale++; /* of something that was left in the meantime */
}

/* 1: *x and *y are a sample; 0: there is none yet. */
static int next_sample(mote_node_t *n, int query, float **x, float **y)
{
    *x = n->config.sample;
    *y = n->config.sample + mote_inputs(&n->mote);
    return n->config.source.next(n->config.source.context, query, *x, *y);
}

static void fail_engine(mote_node_t *n, int error)
{
    if (error == MOTE_ERR_DIVERGED) {
        finish(n, DIVERGED, 0);
    } else {
        finish(n, ENGINE, error);
    }
}

/* w = base + kept * (w - base), of the layers that train. */
static void pull_back(mote_node_t *n, uint32_t layers, float kept)
{
    float *w = mote_parameters(&n->mote, NULL);
    const float *base = n->config.base;
    for (uint32_t layer = 0; layer < n->mote.layers; layer++) {
        size_t first = 0, count = 0;
        (void)mote_layer(&n->mote, layer, &first, &count);
        for (size_t i = first; (layers >> layer & 1u) && i < first + count; i++) {
            w[i] = base[i] + kept * (w[i] - base[i]);
        }
    }
}

/* With a proximal_mu, FedProx's step: w - rate * (g + proximal_mu * (w - base)) = base + kept * (w - rate / kept * g - base). */
static void learn_one(mote_node_t *n, const mote_phase_t *phase, const float *x, const float *y)
{
    float loss = 0.0f, kept = 1.0f - phase->rate * phase->proximal_mu;
    (void)mote_train_mask(&n->mote, phase->layers, 0); /* check_train_task looked at it, and that kept > 0 */
    int error = mote_learn(&n->mote, x, y, phase->proximal_mu > 0.0f ? phase->rate / kept : phase->rate, &loss);
    if (error != MOTE_OK) {
        fail_engine(n, error);
    } else {
        if (phase->proximal_mu > 0.0f) {
            pull_back(n, phase->layers, kept);
        }
        n->loss += loss;
        n->learned++;
        n->counters.samples++;
        n->at_step++;
    }
}

static void score_one(mote_node_t *n, const float *x, const float *target)
{
    const void *output = NULL;
    float loss = 0.0f;
    int error = mote_loss(&n->mote, x, target, &loss, &output);
    if (error != MOTE_OK) {
        fail_engine(n, error);
        return;
    }
    n->query_loss += loss;
    n->queried++;
    if (mote_header(&n->mote)->loss == MOTE_CROSS_ENTROPY) {
        const float *y = output;
        size_t best = 0;
        for (size_t i = 1; i < mote_outputs(&n->mote); i++) {
            best = y[i] > y[best] ? i : best;
        }
        n->correct += (float)best == *target;
    }
}

int mote_node_step(mote_node_t *n)
{
    float *x, *y;
    while (n->state == LEARN && n->at_phase < n->phases && n->at_step >= n->phase[n->at_phase].steps) {
        n->at_phase++;
        n->at_step = 0;
        if (n->since > 0 && n->at_phase == n->since) {
            memcpy(n->config.base, n->mote.arena, mote_header(&n->mote)->params);
        }
    }
    if (n->state == LEARN && n->at_phase == n->phases) {
        n->state = QUERY;
    }
    if (n->state == LEARN) {
        if (!next_sample(n, 0, &x, &y)) {
            return 0;
        }
        learn_one(n, &n->phase[n->at_phase], x, y);
    } else if (n->state == QUERY && n->queried < n->query) {
        if (!next_sample(n, 1, &x, &y)) {
            return 0;
        }
        score_one(n, x, y);
    } else if (n->state == QUERY) {
        int diverged = n->update && !(mote_update_is_finite(n) && (n->clip <= 0.0f || mote_update_clip(n)));
        finish(n, diverged ? DIVERGED : NO_ERROR, 0);
    }
    return n->state == LEARN || n->state == QUERY;
}

int mote_node_poll(mote_node_t *n, mote_out_t *out)
{
    uint32_t first = n->pending & (~n->pending + 1); /* the lowest bit */
    n->pending &= ~first;
    switch (first) {
    case SUBSCRIBE_DO:
        give(out, MOTE_SUBSCRIBE, device_topic(n, "/command"), NULL, 0);
        return 1;
    case SEND_TD:
        give(out, MOTE_PUBLISH_RETAINED, device_topic(n, "/td"), (const uint8_t *)n->config.td, n->config.td_size);
        return 1;
    case SEND_STATUS:
        give_status(n, 1, out);
        return 1;
    case SUBSCRIBE_CHUNKS:
    case UNSUBSCRIBE_CHUNKS: {
        int leave = first == UNSUBSCRIBE_CHUNKS;
        const char *filter = (leave ? n->left : n->state) == WANT_WEIGHTS
                                 ? weights_filter(n, leave ? n->left_run : n->run, leave ? n->left_round : n->round)
                                 : program_filter(n, leave ? n->left_model : n->wanted_model);
        give(out, leave ? MOTE_UNSUBSCRIBE : MOTE_SUBSCRIBE, filter, NULL, 0);
        return 1;
    }
    case SEND_REJECTION: {
        size_t size = encode_failed(n, n->rejected_id, n->rejected_error, n->rejected_detail);
        give(out, MOTE_PUBLISH, device_topic(n, "/reply"), n->config.out, size);
        return 1;
    }
    case SEND_REPLY: {
        size_t size = n->error != NO_ERROR ? encode_failed(n, n->id, n->error, n->detail) : encode_part(n);
        if (n->error == NO_ERROR && n->part < n->parts) {
            n->pending |= SEND_REPLY;
        }
        give(out, MOTE_PUBLISH, device_topic(n, "/reply"), n->config.out, size);
        return 1;
    }
    case REBOOT:
        give(out, MOTE_REBOOT, "", NULL, 0);
        return 1;
    default:
        return 0;
    }
}
