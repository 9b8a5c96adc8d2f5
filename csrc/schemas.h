// Every operator's schema. All but bn_update_running are functional: they write to no argument.
// `activation` is a number of activation.h; its default is ReLU.
// bn_add_relu returns the batch's statistics, from which fused_resnet/ops updates the running ones.
#pragma once

namespace fr {

inline constexpr const char* kSchemas[] = {
    // Returns y, and in training the mean and biased variance of the batch (else empty tensors).
    "bn_add_relu(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, "
    "Tensor? running_var, Tensor? residual, bool training, float eps, int activation) "
    "-> (Tensor, Tensor, Tensor)",

    // bn_add_relu in training, with the mean and biased variance of the batch computed before.
    "bn_add_relu_apply(Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, "
    "Tensor? residual, float eps, int activation) -> Tensor",

    // Returns the gradients of x, weight, bias and residual; y is read with an activation only.
    "bn_add_relu_backward(Tensor grad, Tensor x, Tensor? y, Tensor? weight, Tensor mean, "
    "Tensor var, bool training, float eps, int activation, bool need_residual) "
    "-> (Tensor, Tensor, Tensor, Tensor)",

    "conv_bn_add_relu(Tensor x, Tensor weight, Tensor? conv_bias, Tensor? bn_weight, "
    "Tensor? bn_bias, Tensor mean, Tensor var, Tensor? residual, int[2] stride, int[2] padding, "
    "int[2] dilation, int groups, float eps, int activation) -> Tensor",

    "conv_bn_relu_maxpool(Tensor x, Tensor weight, Tensor? conv_bias, Tensor? bn_weight, "
    "Tensor? bn_bias, Tensor mean, Tensor var, int[2] stride, int[2] padding, int[2] dilation, "
    "int groups, float eps, int[2] pool_kernel, int[2] pool_stride, int[2] pool_padding, "
    "int activation=1) -> Tensor",

    "pack_conv_weight(Tensor weight, int groups) -> Tensor",
    "unpack_conv_weight(Tensor packed, int[] weight_shape, int groups) -> Tensor",

    // winograd: whether the CPU may run Winograd's algorithm where it is faster.
    "conv_bn_add_relu_packed(Tensor x, Tensor packed, Tensor scale, Tensor shift, "
    "Tensor? residual, int[] weight_shape, int[2] stride, int[2] padding, int[2] dilation, "
    "int groups, int activation, bool winograd=False) -> Tensor",

    "conv_bn_relu_maxpool_packed(Tensor x, Tensor packed, Tensor scale, Tensor shift, "
    "int[] weight_shape, int[2] stride, int[2] padding, int[2] dilation, int groups, "
    "int[2] pool_kernel, int[2] pool_stride, int[2] pool_padding, int activation=1) -> Tensor",

    // Returns a convolution, and the mean and biased variance of each channel of its rounded
    // result.
    "conv_statistics(Tensor x, Tensor weight, Tensor? conv_bias, int[2] stride, int[2] padding, "
    "int[2] dilation, int groups) -> (Tensor, Tensor, Tensor)",

    // conv_bn_add_relu_packed with an affine step on the residual:
    // relu(conv(x, w) * scale + shift + residual * residual_scale + residual_shift). tile is an
    // index into the CUDA kernels' table of tiles, split_k the number of parts of the sum; -1
    // leaves the choice to the host function.
    "conv_bn_add_relu_planned(Tensor x, Tensor packed, Tensor scale, Tensor shift, "
    "Tensor? residual, Tensor? residual_scale, Tensor? residual_shift, int[] weight_shape, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups, int activation, int tile, "
    "int split_k) "
    "-> Tensor",

    // Two convolutions in one sum: relu(conv(x, w) + conv_1x1(x2, w2) + shift), where the 1x1 has
    // stride stride2. `packed` holds for each filter w and then w2, both multiplied by their
    // scales.
    "conv_conv_add_relu_packed(Tensor x, Tensor x2, Tensor packed, Tensor shift, "
    "int[] weight_shape, int[2] stride, int[2] padding, int[2] dilation, int[2] stride2, "
    "int activation) -> Tensor",

    // A frozen basic block, or a bottleneck with the stride on its 3x3. The lists hold the block's
    // convolutions in order, then the 1x1 of a projection shortcut if there is one. `concatenated`
    // holds the weights of the last convolution and of the shortcut as conv_conv_add_relu_packed
    // takes them; the CPU ignores it. `winograd`: whether the CPU may run Winograd's algorithm.
    "residual_block(Tensor x, Tensor[] packed, Tensor[] scale, Tensor[] shift, "
    "Tensor? concatenated, Tensor? concatenated_shift, bool bottleneck, int stride, int dilation, "
    "int groups, bool winograd, int activation=1) -> Tensor",

    // A program of a frozen network: steps of kNumFields ints (program.h), their tensors, and the
    // values that are returned.
    "run_program(Tensor x, Tensor[] tensors, int[] steps, int[] outputs) -> Tensor[]",

    // The primitives of a training step; fused_resnet/backends/reference_training.py has the
    // meaning of each. Vectors per channel are float64 for float64 maps, else float32.

    // z = conv(p(x), weight) with p(x) = activation(x * x_scale + x_shift) where these are given,
    // and the mean and the biased variance of each channel of z, or nothing.
    "conv_forward(Tensor x, Tensor? x_scale, Tensor? x_shift, Tensor weight, int[2] stride, "
    "int[2] padding, int[2] dilation, int groups, bool statistics, bool winograd, "
    "int activation=1) -> (Tensor, Tensor, Tensor)",

    // With dz = a * g + b * z + c, or a * g: the gradient of x, through the activation of p or plus
    // `add`; that of weight; and the sums of the first alone and times x - x_mean.
    "conv_backward(Tensor g, Tensor? z, Tensor a, Tensor? b, Tensor? c, Tensor x, Tensor? x_scale, "
    "Tensor? x_shift, Tensor? x_mean, Tensor weight, Tensor? add, int[2] stride, int[2] padding, "
    "int[2] dilation, int groups, bool need_input, bool need_weight, bool sums, bool winograd, "
    "int activation=1) "
    "-> (Tensor, Tensor, Tensor, Tensor)",

    // activation(z * scale + shift + the shortcut, alone or by its own scale and shift).
    "block_end(Tensor z, Tensor scale, Tensor shift, Tensor? shortcut, Tensor? shortcut_scale, "
    "Tensor? shortcut_shift, int activation) -> Tensor",

    // g, dy through the activation whose result is y, or nothing without y; its sums alone, times
    // z - mean, and times shortcut - shortcut_mean.
    "block_end_backward(Tensor dy, Tensor? y, Tensor z, Tensor mean, Tensor? shortcut, "
    "Tensor? shortcut_mean, bool sums, int activation=1) -> (Tensor, Tensor, Tensor, Tensor)",

    // Scale and shift of a batch norm; weight / sqrt(var + eps) and bias - mean * that.
    "bn_coefficients(Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps) "
    "-> (Tensor, Tensor)",
    "bn_update_running(Tensor mean, Tensor var, Tensor(a!) running_mean, Tensor(b!) running_var, "
    "float momentum, SymInt count) -> ()",

    // a, b and c of conv_backward, and the gradients of batch norm's weight and bias.
    "bn_backward_coefficients(Tensor sum_g, Tensor sum_g_xc, Tensor mean, Tensor var, "
    "Tensor? weight, float eps, SymInt count) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",

    // maxpool(activation(z * scale + shift)), and for each element of it where in its window the
    // first largest lies, row-major, in a byte.
    "stem_end(Tensor z, Tensor scale, Tensor shift, int[2] kernel, int[2] stride, int[2] padding, "
    "int activation=1) -> (Tensor, Tensor)",
    "stem_end_backward(Tensor dy, Tensor index, Tensor z, Tensor scale, Tensor shift, Tensor mean, "
    "int[2] kernel, int[2] stride, int[2] padding, bool sums, int activation=1) "
    "-> (Tensor, Tensor, Tensor)",
};

// Operators of the CPU alone that take what these take, and leave the convolution to PyTorch
// between the same passes; their names end in "_library". The tuner chooses between the two.
inline constexpr const char* kAroundLibrary[] = {"conv_forward", "conv_backward"};

// run_program for a program that is kept in the library (program.h), by its number.
inline constexpr const char* kKeptProgramSchemas[] = {
    "keep_program(Tensor[] tensors, int[] steps, int[] outputs) -> int",
    "run_program.kept(Tensor x, int program) -> Tensor[]",
};

}  // namespace fr
