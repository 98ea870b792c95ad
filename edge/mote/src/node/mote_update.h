/* An update as mote_node.c sends it: what of the learned parameters goes back, cut into parts that fit a message.
 *
 * Which: the layers n->shared; as f16 if n->half; and with n->density < 1 only the largest changes since n->config.base.
 */
#ifndef MOTE_UPDATE_H
#define MOTE_UPDATE_H

#include "mote_node.h"

/* The most that a reply takes besides its update's gaps and values. */
#define MOTE_REPLY_HEAD 72u

/* Parameters from, ..., next - 1. */
typedef struct {
    uint32_t from, next;
    uint32_t count; /* numbers */
    uint32_t gaps;  /* bytes of gaps before them; 0 unless sparse */
    uint32_t ties;  /* changes equal to the threshold that are left for the parts behind it */
} mote_part_t;

static inline uint32_t mote_number_size(const mote_node_t *n)
{
    return n->half ? 2 : 4;
}

static inline int mote_is_sparse(const mote_node_t *n)
{
    return n->density < 1.0f;
}

/* Whether changes are sent, not values. */
static inline int mote_sends_changes(const mote_node_t *n)
{
    return mote_is_sparse(n) || n->since > 0;
}

/* 1 unless a value to be sent is not finite as it would travel. */
int mote_update_is_finite(const mote_node_t *n);

/* Scales the changes of the shared layers down to a norm of at most n->clip. To be called once. 0, and nothing is
 * scaled, if the norm is beyond the range of floats. */
int mote_update_clip(mote_node_t *n);

/* Chooses the changes of a sparse update (n->threshold, n->ties), and returns in how many parts the update goes. */
uint32_t mote_update_choose(mote_node_t *n);

/* The part that begins with parameter `from`: as much as fits a message. 0 if there is nothing left. */
int mote_update_next_part(const mote_node_t *n, uint32_t from, uint32_t ties, mote_part_t *part);

/* Writes a part's gaps, and behind them its numbers: part->gaps + part->count * mote_number_size(n) bytes. ties: as the
 * part was planned with. */
void mote_update_write(const mote_node_t *n, const mote_part_t *part, uint32_t ties, uint8_t *gaps);

#endif
