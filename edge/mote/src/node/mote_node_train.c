/* One sample a step: training through the phases of a train task, then scoring its query samples.
 *
 * Either mote does it, or the learner that the owner supplies, whose parameters the node's own mirror.
 */
#include <string.h>

#include "mote_node_internal.h"
#include "mote_update.h"

/* The learner's parameters become the node's, and the other way round; where mote learns, they are the same. */
static int get_parameters(mote_node_t *n)
{
    size_t count = 0;
    float *w = mote_parameters(&n->mote, &count);
    return mote_node_has_learner(n) ? n->config.learner.get(n->config.learner.context, w, count) : MOTE_OK;
}

static int set_parameters(mote_node_t *n)
{
    size_t count = 0;
    const float *w = mote_parameters(&n->mote, &count);
    return mote_node_has_learner(n) ? n->config.learner.set(n->config.learner.context, w, count) : MOTE_OK;
}

static void copy_to_base(mote_node_t *n)
{
    memcpy(n->config.base, mote_parameters(&n->mote, NULL), mote_header(&n->mote)->params);
}

static void fail(mote_node_t *n, int error)
{
    int diverged = error == MOTE_ERR_DIVERGED;
    mote_node_finish(n, diverged ? DIVERGED : ENGINE, diverged ? 0 : error);
}

void mote_node_start_training(mote_node_t *n)
{
    size_t count = 0;
    const float *w = mote_parameters(&n->mote, &count);
    n->measured = 1;
    n->at_phase = n->at_step = 0;
    n->learned = n->queried = n->correct = 0;
    n->loss = n->query_loss = 0.0f;
    if (n->based) {
        copy_to_base(n);
    }
    if (!mote_all_finite(w, count)) {
        mote_node_finish(n, DIVERGED, 0);
        return;
    }
    int error = set_parameters(n);
    if (error != MOTE_OK) {
        fail(n, error);
        return;
    }
    n->rounds++;
    n->state = TRAIN;
    error = n->config.source.open(n->config.source.context, n->seed);
    if (error != MOTE_OK) {
        mote_node_finish(n, NO_SAMPLES, error);
    }
}

static int learn(mote_node_t *n, uint32_t layers, const float *x, const float *y, float rate, float *loss)
{
    if (mote_node_has_learner(n)) {
        return n->config.learner.learn(n->config.learner.context, x, y, rate, layers, loss);
    }
    (void)mote_train_mask(&n->mote, layers, 0); /* the layers were checked when the command came */
    return mote_learn(&n->mote, x, y, rate, loss);
}

/* w = base + kept * (w - base), of the layers that train. */
static void draw_back(mote_node_t *n, uint32_t layers, float kept)
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

/* FedProx's step, w - rate * (g + proximal_mu * (w - base)) = base + kept * (w - rate / kept * g - base). That kept > 0
 * was checked when the command came. */
static int learn_near_base(mote_node_t *n, const mote_phase_t *phase, const float *x, const float *y, float *loss)
{
    float kept = 1.0f - phase->rate * phase->proximal_mu;
    int error = learn(n, phase->layers, x, y, phase->rate / kept, loss);
    if (error == MOTE_OK) {
        error = get_parameters(n);
    }
    if (error == MOTE_OK) {
        draw_back(n, phase->layers, kept);
        error = set_parameters(n);
    }
    return error;
}

/* A reply holds finite numbers alone: a sum of losses that is not, because it overflowed or because a learner gave no
 * number, is an error. */
static int check_sum(float sum)
{
    return mote_finite(sum) ? MOTE_OK : MOTE_ERR_DIVERGED;
}

static int train_one(mote_node_t *n, const float *x, const float *y)
{
    const mote_phase_t *phase = &n->phase[n->at_phase];
    float loss = 0.0f;
    int error = phase->proximal_mu > 0.0f ? learn_near_base(n, phase, x, y, &loss)
                                          : learn(n, phase->layers, x, y, phase->rate, &loss);
    if (error == MOTE_OK) {
        n->loss += loss;
        error = check_sum(n->loss);
    }
    if (error == MOTE_OK) {
        error = mote_node_observe(n, loss);
    }
    if (error == MOTE_OK) {
        n->learned++;
        n->counters.samples++;
        n->at_step++;
    }
    return error;
}

static int is_correct(const mote_node_t *n, const float *output, float target)
{
    size_t best = 0;
    if (mote_header(&n->mote)->loss != MOTE_CROSS_ENTROPY) {
        return 0;
    }
    for (size_t i = 1; i < mote_outputs(&n->mote); i++) {
        best = output[i] > output[best] ? i : best;
    }
    return (float)best == target;
}

static int score_one(mote_node_t *n, const float *x, const float *y)
{
    float loss = 0.0f;
    int correct = 0, error;
    if (mote_node_has_learner(n)) {
        error = n->config.learner.score(n->config.learner.context, x, y, &loss, &correct);
    } else {
        const void *output = NULL;
        error = mote_loss(&n->mote, x, y, &loss, &output);
        correct = error == MOTE_OK && is_correct(n, output, *y);
    }
    if (error == MOTE_OK) {
        n->query_loss += loss;
        error = check_sum(n->query_loss);
    }
    if (error == MOTE_OK && n->state == QUERY) {
        error = mote_node_observe(n, loss);
    }
    if (error == MOTE_OK) {
        n->queried++;
        n->correct += correct != 0;
    }
    return error;
}

/* Goes on to the phase of the next step, and behind the last one to the queries. */
static int next_phase(mote_node_t *n)
{
    int error = MOTE_OK;
    while (error == MOTE_OK && n->at_phase < n->phases && n->at_step >= n->phase[n->at_phase].steps) {
        n->at_phase++;
        n->at_step = 0;
        if (n->since > 0 && n->at_phase == n->since) {
            error = get_parameters(n);
            copy_to_base(n);
        }
    }
    if (error == MOTE_OK && n->at_phase == n->phases) {
        n->state = QUERY;
        error = get_parameters(n);
    }
    return error;
}

static void finish_training(mote_node_t *n)
{
    int diverged = n->update && !(mote_update_is_finite(n) && (n->clip <= 0.0f || mote_update_clip(n)));
    if (!diverged && n->learned > 0 && n->config.keep_every > 0 && ++n->tasks >= n->config.keep_every) {
        n->tasks = 0;
        (void)mote_node_keep_weights(n); /* those kept before stay, if it fails */
    }
    mote_node_finish(n, diverged ? DIVERGED : NO_ERROR, 0);
}

static int is_busy(const mote_node_t *n)
{
    return n->state == TRAIN || n->state == QUERY || n->state == TEST;
}

/* The next sample, learned from or scored. 0: none is there yet. */
static int step_once(mote_node_t *n)
{
    float *x = n->config.sample, *y = x + mote_inputs(&n->mote);
    int got = n->config.source.next(n->config.source.context, n->state != TRAIN, x, y);
    if (got == 0) {
        return 0;
    }
    if (got < 0) {
        if (n->state == TEST) {
            mote_node_end_test(n, got);
        } else {
            mote_node_finish(n, NO_SAMPLES, got);
        }
        return 0;
    }
    uint32_t before = n->trial;
    int error = n->state == TRAIN ? train_one(n, x, y) : score_one(n, x, y);
    if (error == MOTE_OK) {
        return 1;
    }
    if (n->state == TEST) {
        mote_node_end_test(n, error);
    } else if (before == ON_TRIAL && n->trial == ROLLED_BACK) {
        mote_node_finish(n, FAILED_TRIAL, 0);
    } else {
        fail(n, error);
    }
    return is_busy(n);
}

int mote_node_step(mote_node_t *n)
{
    if (!is_busy(n)) {
        return 0;
    }
    uint64_t now = mote_node_now(n);
    if (now != 0 && now >= n->expires) {
        mote_node_stop_test(n);
        if (is_busy(n)) {
            mote_node_finish(n, EXPIRED, 0);
        }
        return 0;
    }
    int error = n->state == TRAIN ? next_phase(n) : MOTE_OK;
    if (error != MOTE_OK) {
        fail(n, error);
        return 0;
    }
    if (n->state == QUERY && n->queried == n->query) {
        finish_training(n);
        return 0;
    }
    if (n->state == TEST && n->queried == n->manifest[n->target - 1].tested) {
        mote_node_end_test(n, MOTE_OK);
        return 0;
    }
    return step_once(n);
}
