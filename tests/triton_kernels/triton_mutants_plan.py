"""Bugs to plant in what the host decides before a launch; see :mod:`triton_mutants`."""

from __future__ import annotations

from mutant_of_triton import Mutant

PLAN = "tests/triton_kernels/test_triton_conv_plan.py::"
TILES = "tests/triton_kernels/test_triton_conv_bn_add_relu.py::test_every_configuration"
PERSISTENT = "tests/triton_kernels/test_triton_conv_persistent.py::"
TRAINING = "tests/triton_kernels/test_triton_aot_training.py::"
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
        "a tile that spills is offered for any number of filters",
        "_conv_plan.py",
        "s.group_k % 16 == 0 or not config.sixteens",
        "True",
        PLAN + "test_tiles_of_8_warps_and_few_channels_take_filters_in_sixteens[80]",
    ),
    Mutant(
        "a tile that spills may add a second convolution",
        "_conv_plan.py",
        "second == 0 or device.arch not in config.second_spills",
        "True",
        PLAN + "test_a_second_convolution_has_no_tile_that_spills_on_sm_120[120]",
    ),
    Mutant(
        "a stem takes a tile that spills",
        "conv_bn_relu_maxpool.py",
        "if arch not in c.spills",
        "if arch",
        "tests/triton_kernels/test_triton_aot.py::test_a_stem_takes_no_tile_that_spills[86-64]",
    ),
    Mutant(
        "a data gradient's tile that spills is taken for any number of channels",
        "_gradient_plan.py",
        " and not (rough and c.sixteens)",
        "",
        TRAINING + "test_float32_takes_narrow_tiles_for_odd_channels",
    ),
    Mutant(
        "a weight gradient's tile that spills is taken for any number of channels",
        "_gradient_plan.py",
        "if not (rough and c.sixteens)]",
        "]",
        TRAINING + "test_weight_gradients_take_short_steps_for_odd_channels",
    ),
    Mutant(
        "the stem's backward spills",
        "stem_end.py",
        "registers=REGISTERS,",
        "registers=128,",
        TRAINING + "test_the_stems_backward_has_all_registers",
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
    Mutant(
        "persistent programs leave out the tiles of a turn that is not whole",
        "_conv_kernels.py",
        "tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(group_k, BLOCK_N)",
        "tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(group_k, BLOCK_N) // tl.num_programs(0) * "
        "tl.num_programs(0)",
        PERSISTENT + "test_a_residual[18-True-bfloat16]",
        quick=True,
    ),
    Mutant(
        "a persistent program's sums begin at 0 in its first tile alone",
        "_conv_tile.py",
        "tl.zeros((BLOCK_M, BLOCK_N), tl.float32),",
        "tl.zeros((BLOCK_M, BLOCK_N), tl.float32) + tile // tl.num_programs(0),",
        PERSISTENT + "test_a_residual[16-False-float16]",
    ),
    Mutant(
        "the statistics of a persistent program's tiles are stored at its first's place",
        "_conv_tile.py",
        "columns < group_k, split, tile_m, M, K,",
        "columns < group_k, split, swizzle(tl.program_id(0), tl.cdiv(M, BLOCK_M), "
        "tl.cdiv(group_k, BLOCK_N), GROUP_M)[0], M, K,",
        PERSISTENT + "test_statistics[18-False-bfloat16]",
    ),
    Mutant(
        "persistent programs go on with their neighbour's tile",
        "_conv_kernels.py",
        "tiles, tl.num_programs(0), flatten=True",
        "tiles, 1, flatten=True",
        PERSISTENT + "test_a_residual[16-False-float16]",
    ),
    Mutant(
        "more programs persist than there are tiles",
        "_conv_plan.py",
        "return min(tiles, device.processors * resident(config, device, precision, prologue))",
        "return device.processors * resident(config, device, precision, prologue)",
        PLAN + "test_never_more_programs_than_tiles",
    ),
    Mutant(
        "a multiprocessor is given one persistent program",
        "_conv_plan.py",
        "device.processors * resident(config, device, precision, prologue))",
        "device.processors)",
        PLAN + "test_persistent_programs_are_those_that_the_gpu_holds",
    ),
    Mutant(
        "programs persist with a second convolution",
        "_conv_plan.py",
        "config.persistent and config.split_k == 1 and second == 0 and",
        "config.persistent and config.split_k == 1 and",
        PLAN + "test_a_tile_has_a_program_where_there_is_more_than_a_matrix",
    ),
    Mutant(
        "programs persist over taps",
        "_conv_plan.py",
        'return mode_of(s, config) == "pointwise" and s.groups == 1',
        "return s.groups == 1",
        PLAN + "test_a_tile_has_a_program_where_there_is_more_than_a_matrix",
    ),
    Mutant(
        "persistent programs are offered where there are few tiles",
        "_conv_plan.py",
        "if programs_of(s, config, precision, device) < tiles_of(s, config)",
        "if is_matrix(s, config)",
        PLAN + "test_persistent_programs_are_offered_and_not_chosen",
    ),
]
