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
        TILES + "[taps-bfloat16-128x128x64x3]",
    ),
    Mutant(
        "the residual's bytes are not counted",
        "_conv_plan.py",
        "s.k * (2 if residual else 1)",
        "s.k",
        PLAN + "test_resnet50_on_an_h100",
    ),
    Mutant(
        "a strided 1x1 counts the pixels that it leaves out",
        "_conv_plan.py",
        "pixels = min(s.n * s.h * s.w, s.rows * s.kh * s.kw)",
        "pixels = s.n * s.h * s.w",
        PLAN + "test_resnet50_on_an_h100",
    ),
    Mutant(
        "a program by itself waits for nothing",
        "_conv_plan.py",
        "rounds = cdiv(busiest, resident(config, device, precision, prologue))",
        "rounds = 1",
        PLAN + "test_the_cost_of_a_layer_that_memory_bounds",
        quick=True,
    ),
    Mutant(
        "registers are limited where operands pass through them",
        "_conv_plan.py",
        "config.more_registers if through else config.registers",
        "config.registers",
        PLAN + "test_registers_are_limited_where_operands_pass_by_them",
    ),
    Mutant(
        "shared memory admits any number of programs",
        "_device.py",
        "self.shared_of_all // (shared + RESERVED)",
        "self.shared_of_all // RESERVED",
        PLAN + "test_programs_of_a_multiprocessor",
    ),
    Mutant(
        "pixels behind a prologue take no shared memory",
        "_conv_plan.py",
        "shared += config.block_m * config.block_k * SIZES[precision]",
        "shared += 0",
        PLAN + "test_a_prologue_stores_pixels_once_more",
    ),
    Mutant(
        "memory moves data once in a cycle",
        "_device.py",
        '2 * cycles * facts["mem_bus_width"] / 8',
        'cycles * facts["mem_bus_width"] / 8',
        PLAN + "test_bandwidth_is_the_drivers",
    ),
]
