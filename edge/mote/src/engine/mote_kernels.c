/* Every operator and loss that the engine has, one line each. A build for known models holds only the lines that they
 * need, and the linker leaves out the rest. */
#include "mote_kernel_list.h"

const mote_kernel_t mote_kernels[] = {
    {MOTE_DENSE, mote_dense_check, mote_dense, mote_dense_back, mote_dense_norm},
    {MOTE_CONV2D, mote_conv2d_check, mote_conv2d, mote_conv2d_back, mote_conv2d_norm},
    {MOTE_DEPTHWISE, mote_depthwise_check, mote_depthwise, mote_depthwise_back, mote_depthwise_norm},
    {MOTE_AVGPOOL, mote_avgpool_check, mote_avgpool, mote_avgpool_back, NULL},
    {MOTE_MAXPOOL, mote_maxpool_check, mote_maxpool, mote_maxpool_back, NULL},
    {MOTE_LAYERNORM, mote_layernorm_check, mote_layernorm, mote_layernorm_back, mote_layernorm_norm},
    {MOTE_ADD, mote_add_check, mote_add, mote_add_back, NULL},
    {MOTE_RELU, mote_relu_check, mote_relu, mote_relu_back, NULL},
    {MOTE_RELU6, mote_relu6_check, mote_relu6, mote_relu6_back, NULL},
    {MOTE_LEAKY_RELU, mote_leaky_relu_check, mote_leaky_relu, mote_leaky_relu_back, NULL},
    {MOTE_TANH, mote_tanh_check, mote_tanh, mote_tanh_back, NULL},
    {MOTE_SIGMOID, mote_sigmoid_check, mote_sigmoid, mote_sigmoid_back, NULL},
    {MOTE_SOFTMAX, mote_softmax_check, mote_softmax, mote_softmax_back, NULL},
    {MOTE_PLACE, mote_place_check, mote_place, mote_place_back, NULL},
    {MOTE_SLICE, mote_slice_check, mote_slice, NULL, NULL},
    {MOTE_QUANTIZE, mote_quantize_check, mote_quantize, NULL, NULL},
    {MOTE_DEQUANTIZE, mote_dequantize_check, mote_dequantize, mote_dequantize_back, NULL},
    {MOTE_INT8_DENSE, mote_int8_dense_check, mote_int8_dense, NULL, NULL},
    {MOTE_INT8_CONV2D, mote_int8_conv2d_check, mote_int8_conv2d, NULL, NULL},
    {MOTE_INT8_DEPTHWISE, mote_int8_depthwise_check, mote_int8_depthwise, NULL, NULL},
    {MOTE_INT8_AVGPOOL, mote_int8_avgpool_check, mote_int8_avgpool, mote_int8_avgpool_back, NULL},
    {MOTE_INT8_MAXPOOL, mote_int8_maxpool_check, mote_int8_maxpool, mote_int8_maxpool_back, NULL},
    {MOTE_INT8_ADD, mote_int8_add_check, mote_int8_add, mote_int8_add_back, NULL},
    {MOTE_INT8_MUL, mote_int8_mul_check, mote_int8_mul, NULL, NULL},
    {MOTE_INT8_MEAN, mote_int8_mean_check, mote_int8_mean, mote_int8_mean_back, NULL},
    {MOTE_INT8_SOFTMAX, mote_int8_softmax_check, mote_int8_softmax, NULL, NULL},
    {MOTE_INT8_TABLE, mote_int8_table_check, mote_int8_table, NULL, NULL},
    {MOTE_TRAINED_INT8_DENSE, mote_trained_int8_dense_check, mote_trained_int8_dense, mote_trained_int8_dense_back,
     NULL},
    {MOTE_TRAINED_INT8_CONV2D, mote_trained_int8_conv2d_check, mote_trained_int8_conv2d, mote_trained_int8_conv2d_back,
     NULL},
    {MOTE_TRAINED_INT8_DEPTHWISE, mote_trained_int8_depthwise_check, mote_trained_int8_depthwise,
     mote_trained_int8_depthwise_back, NULL},
    {0, NULL, NULL, NULL, NULL},
};

const mote_loss_t mote_losses[] = {
    {MOTE_CROSS_ENTROPY, mote_cross_entropy_fits, mote_cross_entropy, mote_cross_entropy_gradient},
    {MOTE_SQUARED_ERROR, mote_squared_error_fits, mote_squared_error, mote_squared_error_gradient},
    {MOTE_BINARY_CROSS_ENTROPY, mote_binary_entropy_fits, mote_binary_entropy, mote_binary_entropy_gradient},
    {MOTE_HUBER, mote_huber_fits, mote_huber, mote_huber_gradient},
    {0, NULL, NULL, NULL},
};
