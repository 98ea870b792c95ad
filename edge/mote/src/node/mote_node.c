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

int mote_node_init(mote_node_t *n, const mote_node_config_t *c)
{
    if (n == NULL || c == NULL || !is_name(c->fleet) || !is_name(c->id) || !has_buffers(c) || !has_callbacks(c)) {
        return MOTE_ERR_ARGUMENT;
    }
    memset(n, 0, sizeof *n);
    n->config = *c;
    n->battery = n->drift = -1.0f;
    int error = mote_node_load_builtin(n);
    if (error != MOTE_OK) {
        return error;
    }
    /* Not numbers: what a source leaves out makes the engine reject the sample. */
    memset(c->sample, 0xff, c->sample_count * sizeof *c->sample);
    return mote_inputs(&n->mote) + mote_targets(&n->mote) <= c->sample_count ? MOTE_OK : MOTE_ERR_ARGUMENT;
}

void mote_node_connected(mote_node_t *n)
{
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

void mote_node_receive(mote_node_t *n, const char *topic, size_t topic_size, const uint8_t *payload, size_t size)
{
    const char *commands = mote_node_device_topic(n, "/command");
    if (topic_size == strlen(commands) && memcmp(topic, commands, topic_size) == 0) {
        mote_node_receive_command(n, payload, size);
        return;
    }
    if (mote_node_wants_chunks(n)) {
        const char *filter = mote_node_chunk_filter(n, n->state, n->run, n->round, n->wanted_model);
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
    (void)cbor_encode_status(n->config.out, n->config.out_size, &status, &size); /* it fits MOTE_OUT */
    return give(out, MOTE_PUBLISH_RETAINED, mote_node_device_topic(n, "/status"), n->config.out, size);
}

void mote_node_will(mote_node_t *n, mote_out_t *out)
{
    (void)give_status(n, 0, out);
}

static int give_part(mote_node_t *n, mote_out_t *out)
{
    size_t size = n->error != NO_ERROR ? mote_node_encode_failure(n, n->id, n->error, n->detail)
                                       : mote_node_encode_part(n);
    if (n->error == NO_ERROR && n->part < n->parts) {
        n->pending |= SEND_REPLY;
    }
    return give(out, MOTE_PUBLISH, mote_node_device_topic(n, "/reply"), n->config.out, size);
}

int mote_node_poll(mote_node_t *n, mote_out_t *out)
{
    uint32_t first = n->pending & (~n->pending + 1); /* the lowest bit */
    n->pending &= ~first;
    switch (first) {
    case SUBSCRIBE_COMMANDS:
        return give(out, MOTE_SUBSCRIBE, mote_node_device_topic(n, "/command"), NULL, 0);
    case SEND_TD:
        return give(out, MOTE_PUBLISH_RETAINED, mote_node_device_topic(n, "/td"), (const uint8_t *)n->config.td,
                    n->config.td_size);
    case SEND_STATUS:
        return give_status(n, 1, out);
    case SUBSCRIBE_CHUNKS:
        return give(out, MOTE_SUBSCRIBE, mote_node_chunk_filter(n, n->state, n->run, n->round, n->wanted_model), NULL,
                    0);
    case UNSUBSCRIBE_CHUNKS:
        return give(out, MOTE_UNSUBSCRIBE,
                    mote_node_chunk_filter(n, n->left, n->left_run, n->left_round, n->left_model), NULL, 0);
    case SEND_REJECTION: {
        size_t size = mote_node_encode_failure(n, n->rejected_id, n->rejected_error, n->rejected_detail);
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
