/* The kernels that mote_kernels.c names. mote_internal.h says what each of their four functions does. */
#ifndef MOTE_KERNEL_LIST_H
#define MOTE_KERNEL_LIST_H

#include "mote_internal.h"

#define MOTE_CHECKS(kernel) int mote_##kernel##_check(const mote_t *m, const mote_op_t *op)
#define MOTE_RUNS(kernel) void mote_##kernel(const mote_t *m, const mote_op_t *op)
#define MOTE_GOES_BACK(kernel) void mote_##kernel##_back(mote_t *m, const mote_op_t *op)
#define MOTE_HAS_NORM(kernel) float mote_##kernel##_norm(const mote_t *m, const mote_op_t *op)

#define MOTE_IS_LOSS(loss)                                                                                             \
    int mote_##loss##_fits(uint32_t n, const float *target);                                                           \
    float mote_##loss(const mote_t *m, uint32_t n, const float *logits, const float *target, float *y);                \
    void mote_##loss##_gradient(const mote_t *m, uint32_t n, const float *y, const float *target, float *dlogits)

MOTE_CHECKS(dense);
MOTE_RUNS(dense);
MOTE_GOES_BACK(dense);
MOTE_HAS_NORM(dense);
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

MOTE_IS_LOSS(cross_entropy);
MOTE_IS_LOSS(squared_error);
MOTE_IS_LOSS(binary_entropy);
MOTE_IS_LOSS(huber);

#endif
