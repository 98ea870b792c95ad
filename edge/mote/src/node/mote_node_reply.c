/* The answer to a command. */
#include <string.h>

#include "mote_node_internal.h"
#include "mote_update.h"
#include "protocol_encode.h"

size_t mote_node_encode_failure(mote_node_t *n, uint32_t id, uint32_t error, int32_t detail)
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

/* The update's next part. The values are written MOTE_REPLY_HEAD into out; encoding moves them down to where they
 * belong. They fit as planned. */
static void set_update(mote_node_t *n, struct success *success)
{
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

size_t mote_node_encode_part(mote_node_t *n)
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
        set_update(n, success);
    }
    n->part++;
    (void)cbor_encode_reply(n->config.out, n->config.out_size, &reply, &size);
    return size;
}

size_t mote_node_encode_rejection(mote_node_t *n)
{
    struct reply_r reply;
    size_t size = 0;
    if (n->rejected_error != NO_ERROR) {
        return mote_node_encode_failure(n, n->rejected_id, n->rejected_error, n->rejected_detail);
    }
    memset(&reply, 0, sizeof reply);
    reply.reply_choice = reply_success_m_c;
    reply.reply_success_m.success_id = n->rejected_id;
    reply.reply_success_m.success_parts = 1;
    reply.reply_success_m.success_measured_choice = success_measured_nil_c;
    reply.reply_success_m.success_update_choice = success_update_nil_c;
    (void)cbor_encode_reply(n->config.out, n->config.out_size, &reply, &size);
    return size;
}

void mote_node_send_reply(mote_node_t *n)
{
    n->part = 0;
    n->next = 0;
    n->ties_left = n->ties;
    n->pending |= SEND_REPLY;
}

void mote_node_finish(mote_node_t *n, uint32_t error, int32_t detail)
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
    mote_node_send_reply(n);
}

void mote_node_reject(mote_node_t *n, uint32_t id, uint32_t error, int32_t detail)
{
    n->has_rejected = 1;
    n->rejected_id = id;
    n->rejected_error = error;
    n->rejected_detail = detail;
    n->pending |= SEND_REJECTION;
}
