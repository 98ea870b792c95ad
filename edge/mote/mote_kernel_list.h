/* The kernels that mote_kernels.c names. mote_internal.h says what each of their four functions does. */
#ifndef MOTE_KERNEL_LIST_H
#define MOTE_KERNEL_LIST_H

#include "mote_internal.h"

#define MOTE_CHECKS(kernel) int mote_##kernel##_check(const mote_t *m, const mote_op_t *op)
#define MOTE_RUNS(kernel) void mote_##kernel(const mote_t *m, const mote_op_t *op)
#define MOTE_GOES_BACK(kernel) void mote_##kernel##_back(mote_t *m, const mote_op_t *op)
#define MOTE_HAS_NORM(kernel) float mote_##kernel##_norm(const mote_t *m, const mote_op_t *op)

MOTE_CHECKS(quantize);
MOTE_RUNS(quantize);
MOTE_CHECKS(dequantize);
MOTE_RUNS(dequantize);
MOTE_CHECKS(int8_dense);
MOTE_RUNS(int8_dense);
MOTE_CHECKS(int8_conv2d);
MOTE_RUNS(int8_conv2d);
MOTE_CHECKS(int8_depthwise);
MOTE_RUNS(int8_depthwise);
MOTE_CHECKS(int8_avgpool);
MOTE_RUNS(int8_avgpool);
MOTE_CHECKS(int8_maxpool);
MOTE_RUNS(int8_maxpool);
MOTE_CHECKS(int8_add);
MOTE_RUNS(int8_add);
MOTE_CHECKS(int8_mul);
MOTE_RUNS(int8_mul);
MOTE_CHECKS(int8_mean);
MOTE_RUNS(int8_mean);
MOTE_CHECKS(int8_softmax);
MOTE_RUNS(int8_softmax);
MOTE_CHECKS(int8_table);
MOTE_RUNS(int8_table);

#endif
