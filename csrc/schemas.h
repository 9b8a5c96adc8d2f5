// Every operator's schema. All are functional: none writes to an argument. Running statistics are
// moved by fused_resnet/ops/functional.py from the batch statistics that bn_add_relu returns, as autograd
// wants it.
#pragma once

namespace fr {

inline constexpr const char* kSchemas[] = {
    // y, and in training the batch's mean and biased variance (else empty).
    "bn_add_relu(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, "
    "Tensor? running_var, Tensor? residual, bool training, float eps, bool relu) "
    "-> (Tensor, Tensor, Tensor)",

    // bn_add_relu in training, by the batch's mean and biased variance, which are there already.
    "bn_add_relu_given(Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, "
    "Tensor? residual, float eps, bool relu) -> Tensor",

    // Gradients of x, weight, bias, residual; y is needed with relu only.
    "bn_add_relu_backward(Tensor grad, Tensor x, Tensor? y, Tensor? weight, Tensor mean, "
    "Tensor var, bool training, float eps, bool relu, bool need_residual) "
    "-> (Tensor, Tensor, Tensor, Tensor)",

    "conv_bn_add_relu(Tensor x, Tensor weight, Tensor? conv_bias, Tensor? bn_weight, "
    "Tensor? bn_bias, Tensor mean, Tensor var, Tensor? residual, int[2] stride, int[2] padding, "
    "int[2] dilation, int groups, float eps, bool relu) -> Tensor",

    "conv_bn_relu_maxpool(Tensor x, Tensor weight, Tensor? conv_bias, Tensor? bn_weight, "
    "Tensor? bn_bias, Tensor mean, Tensor var, int[2] stride, int[2] padding, int[2] dilation, "
    "int groups, float eps, int[2] pool_kernel, int[2] pool_stride, int[2] pool_padding) "
    "-> Tensor",

    "pack_conv_weight(Tensor weight, int groups) -> Tensor",
    "unpack_conv_weight(Tensor packed, int[] weight_shape, int groups) -> Tensor",

    // winograd: on the CPU that algorithm may run, where it is the faster way.
    "conv_bn_add_relu_packed(Tensor x, Tensor packed, Tensor scale, Tensor shift, "
    "Tensor? residual, int[] weight_shape, int[2] stride, int[2] padding, int[2] dilation, "
    "int groups, bool relu, bool winograd=False) -> Tensor",

    "conv_bn_relu_maxpool_packed(Tensor x, Tensor packed, Tensor scale, Tensor shift, "
    "int[] weight_shape, int[2] stride, int[2] padding, int[2] dilation, int groups, "
    "int[2] pool_kernel, int[2] pool_stride, int[2] pool_padding) -> Tensor",

    // A convolution, and of its rounded result the mean and the biased variance of each channel.
    "conv_statistics(Tensor x, Tensor weight, Tensor? conv_bias, int[2] stride, int[2] padding, "
    "int[2] dilation, int groups) -> (Tensor, Tensor, Tensor)",

    // conv_bn_add_relu_packed whose residual is a map r before its own batch norm:
    // relu(conv(x, w) * scale + shift + r * residual_scale + residual_shift); and by a given plan:
    // tile is an index of the CUDA kernel's table, -1 for the host's own choice, split_k likewise.
    "conv_bn_add_relu_planned(Tensor x, Tensor packed, Tensor scale, Tensor shift, "
    "Tensor? residual, Tensor? residual_scale, Tensor? residual_shift, int[] weight_shape, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups, bool relu, int tile, int split_k) "
    "-> Tensor",

    // Two convolutions that meet, as one sum: relu(conv(x, w) + conv_1x1(x2, w2) + shift). The
    // 1x1's
    // stride is stride2; `packed` holds, filter by filter, w and then w2, both times their scales.
    "conv_conv_add_relu_packed(Tensor x, Tensor x2, Tensor packed, Tensor shift, "
    "int[] weight_shape, int[2] stride, int[2] padding, int[2] dilation, int[2] stride2, bool "
    "relu) "
    "-> Tensor",

    // A frozen basic block, or bottleneck with the stride on its 3x3. The lists hold the block's
    // convolutions in order and then, if there is one more, the shortcut's 1x1. `joined` is the
    // last convolution and the shortcut's as conv_conv_add_relu_packed takes them, for those who
    // can. `winograd` is whether the CPU may run 3x3s by that algorithm.
    "residual_block(Tensor x, Tensor[] packed, Tensor[] scale, Tensor[] shift, Tensor? joined, "
    "Tensor? joined_shift, bool bottleneck, int stride, int dilation, int groups, bool winograd) "
    "-> Tensor",

    // Blocks one after another, on the CPU. The lists of tensors hold all blocks' in order, the
    // others an element for each block: how many convolutions are its own, whether a 1x1 is its
    // shortcut's, and how many channels of zeros a shortcut without parameters adds on each side.
    "residual_row(Tensor x, Tensor[] packed, Tensor[] scale, Tensor[] shift, int[] convs, "
    "bool[] projected, int[] padding, int[] stride, int[] dilation, int[] groups, bool[] winograd) "
    "-> Tensor",
};

}  // namespace fr
