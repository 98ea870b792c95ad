/* Programs over the air: fetched into the slot that is not in use, tried, and confirmed or rolled back. */
#include <string.h>

#include "mote_node_internal.h"
#include "protocol_decode.h"

int mote_node_load(const mote_node_t *n, mote_t *m, const void *program, size_t size)
{
    int error = mote_load(m, program, size, n->config.arena, n->config.arena_size);
    /* A fleet's samples, and the parameters that it exchanges, are floats. */
    if (error == MOTE_OK && (mote_input_type(m) != MOTE_FLOAT32 || mote_parameters(m, NULL) == NULL ||
                             mote_header(m)->loss == MOTE_NO_LOSS)) {
        return MOTE_ERR_UNSUPPORTED;
    }
    if (error == MOTE_OK && n->config.learner.load != NULL) {
        error = n->config.learner.load(n->config.learner.context, program, size);
    }
    return error;
}

/* From now on the program in this slot runs; 0 is the built-in one. It loaded before, or its caller checks. */
static int run_slot(mote_node_t *n, uint32_t slot)
{
    const mote_node_config_t *c = &n->config;
    const mote_manifest_t *manifest = slot > 0 ? &n->manifest[slot - 1] : NULL;
    mote_t loaded;
    int error = slot > 0 ? mote_node_load(n, &loaded, c->model_slot[slot - 1], manifest->size)
                         : mote_node_load(n, &loaded, c->program, c->program_size);
    if (error == MOTE_OK) {
        n->mote = loaded;
        n->slot = slot;
        n->program_size = slot > 0 ? manifest->size : (uint32_t)c->program_size;
        memcpy(n->model, slot > 0 ? manifest->hash : c->model, sizeof n->model);
    }
    return error;
}

int mote_node_reload(mote_node_t *n)
{
    return run_slot(n, n->slot);
}

static uint32_t trial_of(const mote_node_t *n)
{
    return n->slot > 0 ? CONFIRMED : BUILT_IN;
}

static void go_back(mote_node_t *n)
{
    if (run_slot(n, n->previous) != MOTE_OK) {
        (void)run_slot(n, 0); /* it loaded before */
    }
    n->trial = ROLLED_BACK;
    n->pending |= SEND_STATUS;
}

/* What the manifest says of the program in the slot is true, and it is for the samples of this device. */
static int check_program(mote_node_t *n, uint32_t slot, const mote_manifest_t *manifest, mote_t *loaded)
{
    size_t inputs = mote_inputs(&n->mote), outputs = mote_outputs(&n->mote), targets = mote_targets(&n->mote);
    const uint8_t *bytes = n->config.model_slot[slot - 1];
    if (!mote_node_has_hash(bytes, manifest->size, manifest->hash)) {
        return MOTE_ERR_AUTHENTICATION;
    }
    int error = mote_node_load(n, loaded, bytes, manifest->size);
    if (error == MOTE_OK &&
        (mote_inputs(loaded) != inputs || mote_targets(loaded) != targets || mote_inputs(loaded) != manifest->inputs ||
         mote_outputs(loaded) != manifest->outputs || (targets > 1 && mote_outputs(loaded) != outputs))) {
        error = MOTE_ERR_ARGUMENT;
    }
    return error;
}

void mote_node_restore_program(mote_node_t *n, const mote_manifest_t *manifest)
{
    mote_t loaded;
    if (check_program(n, 1, manifest, &loaded) == MOTE_OK) {
        n->manifest[0] = *manifest;
        (void)run_slot(n, 1);
    } else {
        (void)run_slot(n, 0);
    }
    n->trial = trial_of(n);
}

/* -------------------------------------------------------------------------------------------------- the command */

/* Whether there is memory for a program over the air, and somebody who can run it. */
static int takes_program(const mote_node_t *n, const mote_manifest_t *m)
{
    const mote_node_config_t *c = &n->config;
    return c->model_slot[0] != NULL && m->size > 0 && m->size <= c->model_slot_size &&
           m->size <= MOTE_CHUNK * MOTE_MAX_CHUNKS && m->arena <= c->arena_size &&
           (!mote_node_has_learner(n) || c->learner.load != NULL);
}

static void read_manifest(mote_manifest_t *to, const struct manifest *from)
{
    memcpy(to->hash, from->manifest_hash.value, sizeof to->hash);
    to->size = from->manifest_size;
    to->version = from->manifest_version;
    to->arena = from->manifest_arena;
    to->inputs = from->manifest_inputs;
    to->outputs = from->manifest_outputs;
    to->tested = from->manifest_tested;
    to->probation = from->manifest_probation;
    to->max_loss = from->manifest_max_loss;
}

/* The slot to write to. Neither the program that runs nor the one to go back to is overwritten, if there are two. */
static uint32_t free_slot(mote_node_t *n)
{
    if (n->trial == ON_TRIAL) {
        go_back(n);
    }
    if (n->slot == 1 && n->config.model_slot[1] != NULL) {
        return 2;
    }
    if (n->slot == 1) {
        (void)run_slot(n, 0);
        n->trial = BUILT_IN;
        n->pending |= SEND_STATUS;
    }
    return 1;
}

void mote_node_begin_update(mote_node_t *n, const uint8_t hash[32], const struct update_model *command)
{
    mote_manifest_t manifest;
    uint32_t id = command->update_model_id;
    read_manifest(&manifest, &command->update_model_manifest_m);
    if (memcmp(manifest.hash, n->model, sizeof n->model) == 0) {
        mote_node_begin(n, hash, id, DONE);
        mote_node_finish(n, NO_ERROR, 0);
        return;
    }
    if (!(manifest.max_loss >= 0.0f)) {
        mote_node_reject(n, id, ENGINE, MOTE_ERR_ARGUMENT);
    } else if (manifest.version <= n->newest) {
        mote_node_reject(n, id, DOWNGRADE, 0);
    } else if (!takes_program(n, &manifest)) {
        mote_node_reject(n, id, NO_CAPACITY, 0);
    } else {
        mote_node_begin(n, hash, id, WANT_PROGRAM);
        n->target = free_slot(n);
        n->manifest[n->target - 1] = manifest;
        memcpy(n->wanted_hash, manifest.hash, sizeof n->wanted_hash);
        mote_node_want_chunks(n, manifest.size);
    }
}

/* ----------------------------------------------------------------------------------------------------- the trial */

/* The one that ran still runs; its parameters may be gone. */
static void reject_program(mote_node_t *n, uint32_t error, int32_t detail)
{
    if (mote_node_reload(n) != MOTE_OK) {
        (void)run_slot(n, 0);
        n->trial = BUILT_IN;
    }
    if (error == FAILED_TRIAL) {
        n->trial = ROLLED_BACK;
    }
    mote_node_finish(n, error, detail);
}

static int is_good(const mote_manifest_t *m, float sum, uint32_t count)
{
    float mean = count > 0 ? sum / (float)count : 0.0f;
    return mote_finite(mean) && (m->max_loss == 0.0f || mean <= m->max_loss);
}

/* Kept first, then confirmed: the version that this device will not go below is that of the program that it keeps. */
static int confirm(mote_node_t *n)
{
    int error = mote_node_keep_model(n);
    if (error == MOTE_OK) {
        n->newest = n->manifest[n->slot - 1].version;
        n->trial = CONFIRMED;
        n->pending |= SEND_STATUS;
    }
    return error;
}

static void run_target(mote_node_t *n)
{
    const mote_manifest_t *manifest = &n->manifest[n->target - 1];
    n->previous = n->slot;
    int error = run_slot(n, n->target);
    if (error != MOTE_OK) {
        reject_program(n, BAD_PROGRAM, error);
        return;
    }
    n->trial = ON_TRIAL;
    n->probation = 0;
    n->probation_loss = 0.0f;
    n->measured = 0;
    if (manifest->probation == 0) {
        error = confirm(n);
    }
    if (error != MOTE_OK) {
        go_back(n);
        mote_node_finish(n, STORE, error);
        return;
    }
    mote_node_finish(n, NO_ERROR, 0);
}

void mote_node_start_program(mote_node_t *n)
{
    mote_t candidate;
    const mote_manifest_t *manifest = &n->manifest[n->target - 1];
    int error = check_program(n, n->target, manifest, &candidate);
    if (error != MOTE_OK) {
        reject_program(n, BAD_PROGRAM, error);
        return;
    }
    if (manifest->tested == 0) {
        run_target(n);
        return;
    }
    n->mote = candidate; /* reloaded, whatever comes of the test */
    n->queried = n->correct = n->learned = 0;
    n->loss = n->query_loss = 0.0f;
    n->state = TEST;
    error = n->config.source.open(n->config.source.context, n->id);
    if (error != MOTE_OK) {
        reject_program(n, NO_SAMPLES, error);
    }
}

void mote_node_end_test(mote_node_t *n, int error)
{
    const mote_manifest_t *manifest = &n->manifest[n->target - 1];
    if (error != MOTE_OK) {
        reject_program(n, FAILED_TRIAL, error);
    } else if (!is_good(manifest, n->query_loss, n->queried)) {
        reject_program(n, FAILED_TRIAL, 0);
    } else {
        run_target(n);
    }
}

void mote_node_stop_test(mote_node_t *n)
{
    if (n->state == TEST) {
        reject_program(n, EXPIRED, 0);
    }
}

int mote_node_observe(mote_node_t *n, float loss)
{
    const mote_manifest_t *manifest = n->slot > 0 ? &n->manifest[n->slot - 1] : NULL;
    if (n->trial != ON_TRIAL || manifest == NULL) {
        return MOTE_OK;
    }
    n->probation++;
    n->probation_loss += loss;
    if (mote_finite(n->probation_loss) && n->probation < manifest->probation) {
        return MOTE_OK;
    }
    if (is_good(manifest, n->probation_loss, n->probation) && confirm(n) == MOTE_OK) {
        return MOTE_OK;
    }
    go_back(n);
    return MOTE_ERR_DIVERGED;
}

void mote_node_forget_all(mote_node_t *n, const uint8_t hash[32], uint32_t id)
{
    mote_node_begin(n, hash, id, DONE);
    int error = mote_node_forget(n);
    if (error == MOTE_OK) {
        (void)run_slot(n, 0);
        n->trial = BUILT_IN;
    }
    mote_node_finish(n, error == MOTE_OK ? NO_ERROR : STORE, error);
}
