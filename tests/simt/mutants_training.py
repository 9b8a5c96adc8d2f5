"""Bugs planted in the training primitives in CUDA C++."""

from __future__ import annotations

from planting import Mutant

END = "csrc/cuda/kernels/block_end.cuh"
NUMBERS = "csrc/cuda/kernels/bn_coefficients.cuh"
BACKWARD = "csrc/cuda/kernels/bn_add_relu_backward.cuh"
HOST = "csrc/cuda/host"

_END = "tests/simt/test_cuda_block_end.py"
_FORWARD = "tests/simt/test_cuda_conv_forward.py"
_GRADIENTS = "tests/simt/test_cuda_conv_backward.py"
_STRIDE_1 = f"{_GRADIENTS}::test_stride_1"

MUTANTS = [
    Mutant(
        "block end: the shortcut's shift is left out",
        END,
        "shift[e] += side[e];",
        "shift[e] += 0.0f;",
        tests=f"{_END}::test_block_end",
    ),
    Mutant(
        "block end: the shortcut is not scaled",
        END,
        "walk.per_channel(side, p.shortcut_scale, 1.0f);",
        "walk.per_channel(side, nullptr, 1.0f);",
        tests=f"{_END}::test_block_end",
    ),
    Mutant(
        "block end: the shortcut is added behind the activation",
        END,
        "if (shortcut) v = fmaf(added[j].get(e), side[e], v);\n"
        "          items[j].set(e, activate(v));",
        "v = activate(v);\n"
        "          items[j].set(e, shortcut ? fmaf(added[j].get(e), side[e], v) : v);",
        tests=f"{_END}::test_block_end",
    ),
    Mutant(
        "block end: a step's second item is read from the first one's place",
        END,
        "const int64_t at = walk.backwards(i + j);",
        "const int64_t at = walk.backwards(i);",
        tests=f"{_END}::test_block_end",
    ),
    Mutant(
        "block end: the projection's sum is that of dy, not of its masked gradient",
        f"{HOST}/block_end.cpp",
        "const Tensor& g = y ? found.g : dy;",
        "const Tensor& g = dy;",
        tests=f"{_END}::test_block_end_backward",
    ),
    Mutant(
        "sums: divided by a deviation that is not given",
        BACKWARD,
        "p.var ? 1.0 / sqrt(p.var[c] + p.eps) : 1.0;",
        "p.var ? 1.0 / sqrt(p.var[c] + p.eps) : 1.0 / sqrt(p.values);",
        tests=f"{_END}::test_block_end_backward",
    ),
    Mutant(
        "coefficients: eps is outside of the root",
        NUMBERS,
        "(p.weight ? p.weight[c] : 1.0) / sqrt(p.var[c] + p.eps);",
        "(p.weight ? p.weight[c] : 1.0) / (sqrt(p.var[c]) + p.eps);",
        tests=f"{_END}::test_coefficients",
    ),
    Mutant(
        "coefficients: c lacks the mean",
        NUMBERS,
        "-a * g / p.count - b * p.mean[i]",
        "-a * g / p.count",
        tests=f"{_END}::test_coefficients",
    ),
    Mutant(
        "coefficients: arithmetic in float32",
        NUMBERS,
        "const double invstd = 1.0 / sqrt(p.var[i] + p.eps);",
        "const float invstd = 1.0f / sqrtf(p.var[i] + static_cast<float>(p.eps));",
        tests=f"{_END}::test_coefficients",
    ),
    Mutant(
        "running statistics: the variance is the biased one",
        NUMBERS,
        "p.var[c] * p.unbiased - var",
        "p.var[c] - var",
        tests=f"{_END}::test_running_statistics",
    ),
    Mutant(
        "running statistics: the mean's steps are the variance's",
        f"{HOST}/bn_coefficients.cpp",
        "p.mean_step = running_mean.stride(0);",
        "p.mean_step = 1;",
        tests=f"{_END}::test_running_statistics",
    ),
    Mutant(
        "coefficients: threads past the last channel go on",
        NUMBERS,
        "  if (i >= p.channels) return;\n",
        "",
        tests=f"{_END}::test_coefficients",
        variants=("asan",),
    ),
    Mutant(
        "conv_forward: the prologue has ReLU only",
        f"{HOST}/conv_forward.cpp",
        "normalized(op, x, *x_scale, *x_shift, activation) : x;",
        "normalized(op, x, *x_scale, *x_shift, Activation::kReLU) : x;",
        tests=f"{_FORWARD}::test_the_activation_of_the_prologue",
    ),
    Mutant(
        "conv_forward: the convolution reads the map without its prologue",
        f"{HOST}/conv_forward.cpp",
        "ConvCall call(op, p, weight.sizes()",
        "ConvCall call(op, x, weight.sizes()",
        tests=f"{_FORWARD}::test_forward",
    ),
    Mutant(
        "data gradient: windows begin where the forward's do",
        f"{HOST}/conv_backward.cpp",
        "back.pad_h = -s.pad_h;",
        "back.pad_h = s.pad_h;",
        tests=_STRIDE_1,
    ),
    Mutant(
        "data gradient: rows go backwards, columns forwards",
        f"{HOST}/conv_backward.cpp",
        "back.dilation_w = -s.dilation_w;",
        "back.dilation_w = s.dilation_w;",
        tests=_STRIDE_1,
    ),
    Mutant(
        "data gradient: filters of another group",
        f"{HOST}/conv_backward.cpp",
        "permute(apart, {0, 2, 3, 4, 1})",
        "permute(apart, {2, 0, 3, 4, 1})",
        tests=_STRIDE_1,
    ),
    Mutant(
        "data gradient: the shortcut's is left out",
        f"{HOST}/conv_backward.cpp",
        "call.set_residual(add, {}, {});",
        "",
        tests=_STRIDE_1,
    ),
    Mutant(
        "data gradient: the shortcut's is left out with a stride",
        f"{HOST}/conv_backward.cpp",
        "g_x = add ? added(op, found.input, *add) : found.input;",
        "g_x = found.input;",
        tests=f"{_GRADIENTS}::test_strides_by_pytorch",
    ),
    Mutant(
        "data gradient: the mask is that of the map before its batch norm",
        f"{HOST}/conv_backward.cpp",
        "masked ? OptionalTensor(p) : OptionalTensor();",
        "masked ? OptionalTensor(x) : OptionalTensor();",
        tests=_STRIDE_1,
    ),
    Mutant(
        "weight gradient: the input has no prologue",
        f"{HOST}/conv_backward.cpp",
        "by_pytorch(dz, p, weight,",
        "by_pytorch(dz, x, weight,",
        tests=_STRIDE_1,
    ),
    Mutant(
        "weight gradient: in the strides that PyTorch gives it",
        f"{HOST}/conv_backward.cpp",
        "    if (!dw.strides().equals(strided.strides())) dw = strided.copy_(dw);\n",
        "",
        tests=f"{_GRADIENTS}::test_any_memory_format",
    ),
    Mutant(
        "dz: the constant is left out",
        f"{HOST}/conv_backward.cpp",
        "p.c = call.vector(c);",
        "p.c = nullptr;",
        tests=_STRIDE_1,
    ),
]
