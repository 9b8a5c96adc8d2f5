"""Bugs to plant in what the host decides before a launch; see :mod:`triton_mutants`."""

from __future__ import annotations

from mutant_of_triton import Mutant

PLAN = "tests/triton_kernels/test_triton_conv_plan.py::"
TILES = "tests/triton_kernels/test_triton_conv_bn_add_relu.py::test_every_configuration"
GROUPS = "tests/conformance/test_conv_bn_add_relu.py::test_awkward_shapes"

MUTANTS = [
    Mutant(
        "the depth is divided by the channels of all groups",
        "_conv_plan.py",
        "return s.group_c if s.kh * s.kw > 1 else 0",
        "return s.c if s.kh * s.kw > 1 else 0",
        GROUPS + "[interpreter-float16-groups-of-packs]",
    ),
    Mutant(
        "each number of channels compiles a 1x1 convolution",
        "_conv_plan.py",
        "return s.group_c if s.kh * s.kw > 1 else 0",
        "return s.group_c",
        PLAN + "test_convolutions_of_one_tap_share_a_kernel",
    ),
    Mutant(
        "a block of channels is counted from the filters' beginning",
        "_implicit_gemm.py",
        "block = step - tap * BLOCKS",
        "block = step",
        TILES + "[taps-bfloat16-128x128x64]",
    ),
]
