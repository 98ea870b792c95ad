/* What a caller gets wrong is an error with a name, and spoils nothing. */
#include <math.h>
#include <string.h>

#include "check.h"
#include "mote.h"
#include "mote_host.h"

static uint32_t arena[MODEL_ARENA_BYTES / 4];

static void a_damaged_program_is_not_loaded(void)
{
    static uint32_t damaged[sizeof model / 4 + 1];
    mote_t m;
    memcpy(damaged, model, sizeof model);
    CHECK(mote_load(&m, damaged, sizeof model, arena, sizeof arena) == MOTE_OK);
    CHECK(mote_load(&m, damaged, sizeof model - 4, arena, sizeof arena) == MOTE_ERR_FORMAT);
    CHECK(mote_load(&m, damaged, sizeof model, arena, sizeof arena - 4) == MOTE_ERR_ARENA);
    CHECK(mote_load(&m, (uint8_t *)damaged + 1, sizeof model, arena, sizeof arena) == MOTE_ERR_ARGUMENT);
    CHECK(mote_load(NULL, damaged, sizeof model, arena, sizeof arena) == MOTE_ERR_ARGUMENT);
    damaged[sizeof model / 4 - 1] ^= 1;
    CHECK(mote_load(&m, damaged, sizeof model, arena, sizeof arena) == MOTE_ERR_CRC);
    damaged[0] ^= 1;
    CHECK(mote_load(&m, damaged, sizeof model, arena, sizeof arena) == MOTE_ERR_FORMAT);
    CHECK(mote_arena_bytes(damaged, sizeof model) == 0);
}

static void without_a_program_nothing_works(void)
{
    mote_t zeroed, *devices[] = {NULL, NULL};
    float x[MODEL_INPUTS] = {0}, label = 0, loss[2], value = 1.0f;
    int errors[2];
    const void *y;
    size_t first, count = 1;
    const mote_sgd_t how = {0.1f, 0.0f, 0.0f, 0.0f};
    memset(&zeroed, 0, sizeof zeroed);
    devices[0] = &zeroed;
    for (int i = 0; i < 2; i++) {
        mote_t *m = devices[i];
        CHECK(mote_inputs(m) == 0 && mote_outputs(m) == 0 && mote_targets(m) == 0);
        CHECK(mote_input_type(m) == MOTE_ERR_ARGUMENT && mote_output_type(m) == MOTE_ERR_ARGUMENT);
        CHECK(mote_parameters(m, &count) == NULL && count == 0);
        CHECK(mote_layer(m, 0, &first, &count) == MOTE_ERR_ARGUMENT);
        CHECK(mote_train_mask(m, 0, 0) == MOTE_ERR_ARGUMENT);
        CHECK(mote_grow(m) == MOTE_ERR_ARGUMENT);
        CHECK(mote_infer(m, x, &y) == MOTE_ERR_ARGUMENT);
        CHECK(mote_loss(m, x, &label, loss, &y) == MOTE_ERR_ARGUMENT);
        CHECK(mote_learn(m, x, &label, 0.1f, loss) == MOTE_ERR_ARGUMENT);
        CHECK(mote_learn_with(m, x, &label, &how, loss) == MOTE_ERR_ARGUMENT);
        CHECK(mote_get_real(m, &value) == 0);
        mote_set_real(m, &value);
    }
    mote_learn_many(devices, 2, 1, x, &label, 0.1f, loss, errors);
    CHECK(errors[0] == MOTE_ERR_ARGUMENT && errors[1] == MOTE_ERR_ARGUMENT);
}

static void a_step_that_fails_changes_nothing(void)
{
    static uint8_t before[sizeof arena];
    mote_t m;
    float x[MODEL_INPUTS] = {0}, label = 0, outside = MODEL_OUTPUTS, loss;
    const float rates[] = {-0.1f, NAN, INFINITY, -INFINITY, 1e7f};
    const void *y;
    size_t count;
    CHECK(mote_load(&m, model, sizeof model, arena, sizeof arena) == MOTE_OK);
    float *parameters = mote_parameters(&m, &count);
    memcpy(before, parameters, count * sizeof *parameters);
    for (size_t i = 0; i < sizeof rates / sizeof *rates; i++) {
        mote_sgd_t how = {rates[i], 0.0f, 0.0f, 0.0f};
        CHECK(mote_learn(&m, x, &label, rates[i], &loss) == MOTE_ERR_ARGUMENT);
        CHECK(mote_learn_with(&m, x, &label, &how, &loss) == MOTE_ERR_ARGUMENT);
    }
    CHECK(mote_learn(&m, x, &outside, 0.1f, &loss) == MOTE_ERR_TARGET);
    x[3] = NAN;
    CHECK(mote_learn(&m, x, &label, 0.1f, &loss) == MOTE_ERR_ARGUMENT);
    CHECK(mote_infer(&m, x, &y) == MOTE_ERR_ARGUMENT);
    x[3] = 3e38f; /* finite, but the outputs are not */
    CHECK(mote_learn(&m, x, &label, 0.1f, &loss) == MOTE_ERR_DIVERGED);
    CHECK(memcmp(before, parameters, count * sizeof *parameters) == 0);
    x[3] = 1.0f;
    CHECK(mote_infer(&m, x, &y) == MOTE_OK);
    CHECK(mote_learn(&m, x, &label, 0.1f, &loss) == MOTE_OK);
}

static void an_output_that_is_not_finite_is_an_error(void)
{
    mote_t m;
    float x[MODEL_INPUTS];
    const void *y;
    size_t count;
    CHECK(mote_load(&m, model, sizeof model, arena, sizeof arena) == MOTE_OK);
    float *parameters = mote_parameters(&m, &count);
    for (size_t i = 0; i < MODEL_INPUTS; i++) {
        x[i] = 1.0f;
    }
    for (size_t i = 0; i < count; i++) {
        parameters[i] = 1e30f;
    }
    CHECK(mote_infer(&m, x, &y) == MOTE_ERR_DIVERGED);
}

static void every_error_has_a_name(void)
{
    for (int error = MOTE_OK; error >= MOTE_ERR_UNSUPPORTED; error--) {
        CHECK(strncmp(mote_error_name(error), "MOTE_", 5) == 0);
    }
    CHECK(strcmp(mote_error_name(MOTE_OK), "MOTE_OK") == 0);
    CHECK(strcmp(mote_error_name(MOTE_ERR_CRC), "MOTE_ERR_CRC") == 0);
    CHECK(strcmp(mote_error_name(MOTE_ERR_UNSUPPORTED), "MOTE_ERR_UNSUPPORTED") == 0);
    CHECK(strcmp(mote_error_name(MOTE_ERR_STORE - 1), mote_error_name(1)) == 0);
}

int main(void)
{
    a_damaged_program_is_not_loaded();
    without_a_program_nothing_works();
    a_step_that_fails_changes_nothing();
    an_output_that_is_not_finite_is_an_error();
    every_error_has_a_name();
    return 0;
}
