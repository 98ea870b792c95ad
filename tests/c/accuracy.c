/* Prints the largest relative error of the engine's expf, logf and tanhf, against the C library's double precision, and
 * whether its sqrtf is correctly rounded. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "mote_internal.h"

/* Over every 997th float from `first` to `last`, which have the same sign. */
static double worst(float (*ours)(float), double (*theirs)(double), float first, float last)
{
    uint32_t from, to;
    double most = 0.0;
    memcpy(&from, &first, sizeof from);
    memcpy(&to, &last, sizeof to);
    for (uint32_t bits = from; bits <= to; bits += 997) {
        float x;
        memcpy(&x, &bits, sizeof x);
        double exact = theirs((double)x);
        double error = fabs((double)ours(x) - exact) / fabs(exact);
        most = error > most ? error : most;
    }
    return most;
}

/* Over every 997th float that is not negative; the square root of a double, rounded, is right (Figueroa 1995, "When is
 * double rounding innocuous?"). */
static int roots_are_right(void)
{
    for (uint32_t bits = 0; bits <= 0x7f800000u; bits += 997) {
        float x;
        memcpy(&x, &bits, sizeof x);
        if (mote_sqrtf(x) != (float)sqrt((double)x)) {
            return 0;
        }
    }
    return isinf(mote_sqrtf(INFINITY)) && isnan(mote_sqrtf(NAN)) && mote_sqrtf(1e-45f) == (float)sqrt((double)1e-45f);
}

int main(void)
{
    printf("expf %g\n", fmax(worst(mote_expf, exp, 1e-30f, 88.0f), worst(mote_expf, exp, -1e-30f, -87.0f)));
    /* Near 1 the logarithm is near 0; there what counts is the error beside the loss that it is part of. */
    printf("logf %g\n", fmax(worst(mote_logf, log, 1.2e-38f, 0.9999f), worst(mote_logf, log, 1.0001f, 3e38f)));
    printf("tanhf %g\n", fmax(worst(mote_tanhf, tanh, 1e-18f, 30.0f), worst(mote_tanhf, tanh, -1e-18f, -30.0f)));
    int edges = mote_expf(-88.0f) == 0.0f && mote_expf(-INFINITY) == 0.0f && mote_expf(0.0f) == 1.0f &&
                isnan(mote_expf(NAN)) && mote_logf(1.0f) == 0.0f && isinf(mote_logf(INFINITY)) &&
                isnan(mote_logf(NAN)) && mote_tanhf(0.0f) == 0.0f && mote_tanhf(100.0f) == 1.0f &&
                mote_tanhf(-INFINITY) == -1.0f && isnan(mote_tanhf(NAN));
    printf("edges %s\n", edges && roots_are_right() ? "right" : "wrong");
    return 0;
}
