"""Bugs to plant in what an activation takes; those in kernels for a GPU are with the kernels'."""

from __future__ import annotations

from mutant import Mutant

KERNELS = "csrc/cpu/kernels/activation.h"
DRIVER = "csrc/cpu/conv_driver.cpp"
KINDS = "fused_resnet/nn/module_kinds.py"
BN = "tests/conformance/test_bn_add_relu.py"
CONV = "tests/conformance/test_conv_bn_add_relu.py"
STEM = "tests/conformance/test_conv_bn_relu_maxpool.py"
PRIMITIVES = "tests/training/test_primitives.py"
NETWORKS = "tests/test_activations.py"

MUTANTS = [
    Mutant(
        "LeakyReLU lets negative numbers pass",
        KERNELS,
        "operator()(Vec<A> v) const { return v < 0 ? v * A(kLeakySlope) : v; }",
        "operator()(Vec<A> v) const { return v; }",
        BN,
    ),
    Mutant(
        "LeakyReLU's gradient is ReLU's",
        KERNELS,
        "(Vec<A> g, Vec<A> at) const { return at > 0 ? g : g * A(kLeakySlope); }",
        "(Vec<A> g, Vec<A> at) const { return at > 0 ? g : g * A(0); }",
        BN,
    ),
    Mutant(
        "a convolution without the activation that its kernels lack",
        DRIVER,
        "if (f.activation == part.activation) return;",
        "return;",
        CONV,
    ),
    Mutant(
        "a stem without the activation that its kernels lack",
        DRIVER,
        "k.activate(f.activation, p.y, p.row0 * line, p.row1 * line);",
        "k.activate(f.activation, p.y, p.row0 * line, p.row0 * line);",
        STEM,
    ),
    Mutant(
        "the kernels' prologue is ReLU's whatever the activation",
        "csrc/cpu/training/conv_forward.cpp",
        "if (x_scale && activation != Activation::kReLU) {",
        "if (x_scale && activation == Activation::kNone) {",
        PRIMITIVES,
    ),
    Mutant(
        "the kernels' mask is ReLU's whatever the activation",
        "csrc/cpu/training/conv_backward.cpp",
        "const bool apart = x_scale && activation != Activation::kReLU;",
        "const bool apart = x_scale && activation == Activation::kNone;",
        PRIMITIVES,
    ),
    Mutant(
        "a step's activation is ReLU's",
        "csrc/cpu/program_check.cpp",
        "f.activation = step.activation;",
        "f.activation = at(kActivation) ? Activation::kReLU : Activation::kNone;",
        NETWORKS,
    ),
    Mutant(
        "a LeakyReLU of any slope is fused",
        KINDS,
        "and act.negative_slope != LEAKY_SLOPE:",
        "and False:",
        NETWORKS,
    ),
    Mutant(
        "leaky_relu as a function of any slope is fused",
        "fused_resnet/fusion/trace/patterns.py",
        "if slope == LEAKY_SLOPE else",
        "if slope else",
        NETWORKS,
    ),
    Mutant(
        "a block whose activations differ is one unit",
        "fused_resnet/nn/groups.py",
        "if i and activation_of(kind) is not activation:",
        "if False:",
        NETWORKS,
    ),
    Mutant(
        "a program's block has ReLU",
        "fused_resnet/inference/step_blocks.py",
        "        steps[block.last].activation,\n",
        "        Activation.RELU,\n",
        NETWORKS,
    ),
    Mutant(
        "a unit's flat form forgets which activation it has",
        "fused_resnet/ops/training_spec.py",
        "*unit.zeros, int(unit.activation)]",
        "*unit.zeros, int(unit.activation > 0)]",
        "tests/training/test_units.py",
    ),
]
