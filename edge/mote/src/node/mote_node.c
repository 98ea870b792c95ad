/* The device node: what the messages of edge/wire/protocol.cddl make a device do. mote_node.h says how it is used. */
#include "mote_node.h"

#include <string.h>

#include "mote_node_internal.h"
#include "protocol_encode.h"

enum { NAME = 32 }; /* bytes of the longest name of a fleet or a device, so that every topic fits MOTE_TOPIC */

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

static int has_buffers(const mote_node_config_t *c)
{
    return c->td != NULL && c->sample != NULL && c->out != NULL && c->out_size >= MOTE_OUT &&
           c->out_size <= MOTE_CHUNK * MOTE_MAX_CHUNKS && (c->base != NULL || c->base_count == 0);
}

static int has_callbacks(const mote_node_config_t *c)
{
    const mote_learner_t *l = &c->learner;
    return c->source.open != NULL && c->source.next != NULL &&
           (l->learn == NULL || (l->set != NULL && l->get != NULL && l->score != NULL));
}

static int has_authority(const mote_node_config_t *c)
{
    for (uint32_t i = 0; i < MOTE_GROUPS; i++) {
        if (c->groups[i] != NULL && !is_name(c->groups[i])) {
            return 0;
        }
    }
    return (c->keys == NULL || c->verify.verify != NULL) && (c->keep.get == NULL) == (c->keep.set == NULL);
}

int mote_node_init(mote_node_t *n, const mote_node_config_t *c)
{
    if (n == NULL || c == NULL || !is_name(c->fleet) || !is_name(c->id) || !has_buffers(c) || !has_callbacks(c) ||
        !has_authority(c)) {
        return MOTE_ERR_ARGUMENT;
    }
    memset(n, 0, sizeof *n);
    n->config = *c;
    n->battery = n->drift = -1.0f;
    memcpy(n->model, c->model, sizeof n->model);
    n->program_size = (uint32_t)c->program_size;
    int error = mote_node_load(n, &n->mote, c->program, c->program_size);
    if (error != MOTE_OK) {
        return error;
    }
    mote_node_restore(n);
    error = mote_node_start_authority(n);
    if (error != MOTE_OK) {
        return error;
    }
    /* Not numbers: what a source leaves out makes the engine reject the sample. */
    memset(c->sample, 0xff, c->sample_count * sizeof *c->sample);
    return mote_inputs(&n->mote) + mote_targets(&n->mote) <= c->sample_count ? MOTE_OK : MOTE_ERR_ARGUMENT;
}

void mote_node_connected(mote_node_t *n)
{
    n->subscribed = 0;
    n->pending |= SUBSCRIBE_COMMANDS | SEND_TD | SEND_STATUS;
    n->pending &= ~(uint32_t)UNSUBSCRIBE_CHUNKS;
    if (mote_node_wants_chunks(n)) {
        n->pending |= SUBSCRIBE_CHUNKS;
    }
}

void mote_node_set_drift(mote_node_t *n, float drift)
{
    if ((n->drift > 0.0f) != (drift > 0.0f)) {
        n->pending |= SEND_STATUS;
    }
    n->drift = drift;
}

void mote_node_set_battery(mote_node_t *n, float battery)
{
    n->battery = battery;
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

static int is_topic(const mote_node_message_t *m, const char *topic)
{
    return m->topic_size == strlen(topic) && memcmp(m->topic, topic, m->topic_size) == 0;
}

/* Whether a message is on one of the topics with commands, and on which. */
static int find_source(mote_node_t *n, mote_node_message_t *m)
{
    if (is_topic(m, mote_node_device_topic(n, "/command"))) {
        m->source = 0;
        return 1;
    }
    for (uint32_t i = 0; i < MOTE_GROUPS; i++) {
        if (n->config.groups[i] != NULL && is_topic(m, mote_node_group_topic(n, i))) {
            m->source = 1 + i;
            return 1;
        }
    }
    return 0;
}

void mote_node_receive(mote_node_t *n, const char *topic, size_t topic_size, const uint8_t *payload, size_t size)
{
    mote_node_message_t message = {topic, topic_size, payload, size, 0};
    if (find_source(n, &message)) {
        mote_node_receive_command(n, &message);
        return;
    }
    if (is_topic(&message, mote_node_time_topic(n))) {
        mote_node_receive_time(n, &message);
        return;
    }
    if (mote_node_wants_chunks(n)) {
        const char *filter = mote_node_chunk_filter(n, n->state, n->run, n->round, n->wanted_hash);
        const char *number = match_filter(filter, topic, &topic_size);
        if (number != NULL) {
            mote_node_receive_chunk(n, number, topic_size, payload, size);
            return;
        }
    }
    n->counters.stale++; /* of something that the node has unsubscribed from in the meantime */
}

/* ----------------------------------------------------------------------------------------------------- output */

static int give(mote_out_t *out, int kind, const char *topic, const uint8_t *payload, size_t size)
{
    out->kind = kind;
    out->topic = topic;
    out->payload = payload;
    out->size = size;
    return 1;
}

static int give_status(mote_node_t *n, int online, mote_out_t *out)
{
    static const char engine[] = MOTE_VERSION;
    struct status status;
    size_t size = 0;
    memset(&status, 0, sizeof status);
    status.status_online = online != 0;
    status.status_model.value = n->model;
    status.status_model.len = sizeof n->model;
    status.status_samples = n->counters.samples;
    status.status_malformed = n->counters.malformed;
    status.status_stale = n->counters.stale;
    status.status_battery_choice = n->battery >= 0.0f ? status_battery_float32_c : status_battery_nil_c;
    status.status_battery_float32 = n->battery;
    status.status_drift_choice = n->drift >= 0.0f ? status_drift_float32_c : status_drift_nil_c;
    status.status_drift_float32 = n->drift;
    status.status_program_format = MOTE_FORMAT_VERSION;
    status.status_engine.value = (const uint8_t *)engine;
    status.status_engine.len = sizeof engine - 1;
    status.status_trial = n->trial;
    status.status_refused = n->counters.refused;
    status.status_boots = n->boots;
    status.status_reset = n->config.reset;
    status.status_ceiling = n->counter[0].last;
    status.status_nonce_choice = mote_node_now(n) == 0 ? status_nonce_fresh_m_c : status_nonce_nil_c;
    status.status_nonce_fresh_m.value = n->nonce;
    status.status_nonce_fresh_m.len = sizeof n->nonce;
    status.status_keys = n->config.keys != NULL ? n->keys.version : 0;
    (void)cbor_encode_status(n->config.out, n->config.out_size, &status, &size); /* it fits MOTE_OUT */
    return give(out, MOTE_PUBLISH_RETAINED, mote_node_device_topic(n, "/status"), n->config.out, size);
}

void mote_node_will(mote_node_t *n, mote_out_t *out)
{
    (void)give_status(n, 0, out);
}

static int give_part(mote_node_t *n, mote_out_t *out)
{
    size_t size =
        n->error != NO_ERROR ? mote_node_encode_failure(n, n->id, n->error, n->detail) : mote_node_encode_part(n);
    if (n->error == NO_ERROR && n->part < n->parts) {
        n->pending |= SEND_REPLY;
    }
    return give(out, MOTE_PUBLISH, mote_node_device_topic(n, "/reply"), n->config.out, size);
}

/* The time comes first: commands are judged by it. */
static int give_subscription(mote_node_t *n, mote_out_t *out)
{
    uint32_t i = n->subscribed++;
    uint32_t group = 0, left = i < 2 ? 0 : i - 2;
    while (group < MOTE_GROUPS && (n->config.groups[group] == NULL || left > 0)) {
        left -= n->config.groups[group] != NULL;
        group++;
    }
    uint32_t groups = 0;
    for (uint32_t g = 0; g < MOTE_GROUPS; g++) {
        groups += n->config.groups[g] != NULL;
    }
    if (i < 1 + groups) {
        n->pending |= SUBSCRIBE_COMMANDS;
    }
    const char *topic = i == 0   ? mote_node_time_topic(n)
                        : i == 1 ? mote_node_device_topic(n, "/command")
                                 : mote_node_group_topic(n, group);
    return give(out, MOTE_SUBSCRIBE, topic, NULL, 0);
}

int mote_node_poll(mote_node_t *n, mote_out_t *out)
{
    uint32_t first = n->pending & (~n->pending + 1); /* the lowest bit */
    n->pending &= ~first;
    switch (first) {
    case SUBSCRIBE_COMMANDS:
        return give_subscription(n, out);
    case SEND_TD:
        return give(out, MOTE_PUBLISH_RETAINED, mote_node_device_topic(n, "/td"), (const uint8_t *)n->config.td,
                    n->config.td_size);
    case SEND_STATUS:
        return give_status(n, 1, out);
    case SUBSCRIBE_CHUNKS:
        return give(out, MOTE_SUBSCRIBE, mote_node_chunk_filter(n, n->state, n->run, n->round, n->wanted_hash), NULL,
                    0);
    case UNSUBSCRIBE_CHUNKS:
        return give(out, MOTE_UNSUBSCRIBE,
                    mote_node_chunk_filter(n, n->left, n->left_run, n->left_round, n->left_model), NULL, 0);
    case SEND_REJECTION: {
        size_t size = mote_node_encode_rejection(n);
        return give(out, MOTE_PUBLISH, mote_node_device_topic(n, "/reply"), n->config.out, size);
    }
    case SEND_REPLY:
        return give_part(n, out);
    case REBOOT:
        return give(out, MOTE_REBOOT, "", NULL, 0);
    default:
        return 0;
    }
}
