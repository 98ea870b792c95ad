/* The kernels that mote_kernels.c names. mote_internal.h says what each of their four functions does. */
#ifndef MOTE_KERNEL_LIST_H
#define MOTE_KERNEL_LIST_H

#include "mote_internal.h"

#define MOTE_CHECKS(kernel) int mote_##kernel##_check(const mote_t *m, const mote_op_t *op)
#define MOTE_RUNS(kernel) void mote_##kernel(const mote_t *m, const mote_op_t *op)
#define MOTE_GOES_BACK(kernel) void mote_##kernel##_back(mote_t *m, const mote_op_t *op)
#define MOTE_HAS_NORM(kernel) float mote_##kernel##_norm(const mote_t *m, const mote_op_t *op)

#endif
