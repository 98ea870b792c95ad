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
MOTE_CHECKS(conv2d);
MOTE_RUNS(conv2d);
MOTE_GOES_BACK(conv2d);
MOTE_HAS_NORM(conv2d);
MOTE_CHECKS(depthwise);
MOTE_RUNS(depthwise);
MOTE_GOES_BACK(depthwise);
MOTE_HAS_NORM(depthwise);
MOTE_CHECKS(avgpool);
MOTE_RUNS(avgpool);
MOTE_GOES_BACK(avgpool);
MOTE_CHECKS(maxpool);
MOTE_RUNS(maxpool);
MOTE_GOES_BACK(maxpool);
MOTE_CHECKS(layernorm);
MOTE_RUNS(layernorm);
MOTE_GOES_BACK(layernorm);
MOTE_HAS_NORM(layernorm);
MOTE_CHECKS(add);
MOTE_RUNS(add);
MOTE_GOES_BACK(add);
MOTE_CHECKS(relu);
MOTE_RUNS(relu);
MOTE_GOES_BACK(relu);
MOTE_CHECKS(relu6);
MOTE_RUNS(relu6);
MOTE_GOES_BACK(relu6);
MOTE_CHECKS(leaky_relu);
MOTE_RUNS(leaky_relu);
MOTE_GOES_BACK(leaky_relu);
MOTE_CHECKS(tanh);
MOTE_RUNS(tanh);
MOTE_GOES_BACK(tanh);
MOTE_CHECKS(sigmoid);
MOTE_RUNS(sigmoid);
MOTE_GOES_BACK(sigmoid);
MOTE_CHECKS(softmax);
MOTE_RUNS(softmax);
MOTE_GOES_BACK(softmax);
MOTE_CHECKS(place);
MOTE_RUNS(place);
MOTE_GOES_BACK(place);
MOTE_CHECKS(slice);
MOTE_RUNS(slice);
MOTE_CHECKS(quantize);
MOTE_RUNS(quantize);
MOTE_CHECKS(dequantize);
MOTE_RUNS(dequantize);
MOTE_GOES_BACK(dequantize);
MOTE_CHECKS(int8_dense);
MOTE_RUNS(int8_dense);
MOTE_CHECKS(int8_conv2d);
MOTE_RUNS(int8_conv2d);
MOTE_CHECKS(int8_depthwise);
MOTE_RUNS(int8_depthwise);
MOTE_CHECKS(int8_avgpool);
MOTE_RUNS(int8_avgpool);
MOTE_GOES_BACK(int8_avgpool);
MOTE_CHECKS(int8_maxpool);
MOTE_RUNS(int8_maxpool);
MOTE_GOES_BACK(int8_maxpool);
MOTE_CHECKS(int8_add);
MOTE_RUNS(int8_add);
MOTE_GOES_BACK(int8_add);
MOTE_CHECKS(int8_mul);
MOTE_RUNS(int8_mul);
MOTE_CHECKS(int8_mean);
MOTE_RUNS(int8_mean);
MOTE_GOES_BACK(int8_mean);
MOTE_CHECKS(int8_softmax);
MOTE_RUNS(int8_softmax);
MOTE_CHECKS(int8_table);
MOTE_RUNS(int8_table);
MOTE_CHECKS(trained_int8_dense);
MOTE_RUNS(trained_int8_dense);
MOTE_GOES_BACK(trained_int8_dense);
MOTE_CHECKS(trained_int8_conv2d);
MOTE_RUNS(trained_int8_conv2d);
MOTE_GOES_BACK(trained_int8_conv2d);
MOTE_CHECKS(trained_int8_depthwise);
MOTE_RUNS(trained_int8_depthwise);
MOTE_GOES_BACK(trained_int8_depthwise);

MOTE_IS_LOSS(cross_entropy);
MOTE_IS_LOSS(squared_error);
MOTE_IS_LOSS(binary_entropy);
MOTE_IS_LOSS(huber);

#endif
