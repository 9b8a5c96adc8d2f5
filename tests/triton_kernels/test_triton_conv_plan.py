"""What the host decides before a launch of the convolution: its kernel, and its tile."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from ahead_of_time import DEVICES, Recorded, full, recorded
from precisions import BFLOAT16

from fused_resnet.backends import triton as kernels
from fused_resnet.backends.triton import _conv_plan as plan
from fused_resnet.backends.triton import _device
from fused_resnet.backends.triton._conv_plan import CONFIGS
from fused_resnet.backends.triton._conv_shape import ConvShape, conv_shape
from fused_resnet.bench.gpu.plans import config_name


def launch(
    c: int,
    kernel: int,
    groups: int = 1,
    arch: int = 90,
    config: Any = None,
    prologue: bool = False,
) -> Recorded:
    """The launch of a convolution of ``c`` channels on a card, by an H100's default."""
    dtype, pair = BFLOAT16.dtype, (kernel // 2, kernel // 2)
    x, w = full(256, c, 28, 28, dtype=dtype), full(256, c // groups, kernel, kernel, dtype=dtype)
    v, geometry = full(256), ((1, 1), pair, (1, 1), groups)

    def run() -> None:
        if prologue:
            kernels.conv_forward(x, full(c), full(c), w, *geometry, False, False, config=config)
        else:
            kernels.conv_bn_add_relu(
                x, w, None, v, v, v, v, None, *geometry, 1e-5, 1, config=config
            )

    (found,) = recorded(run, arch)
    return found


def constants(c: int, kernel: int, groups: int = 1) -> dict[str, Any]:
    """The compile-time arguments of one tile."""
    config = next(tile for tile in CONFIGS["half"] if tile[:3] == (64, 64, 64))
    found = launch(c, kernel, groups, config=config)
    return {p.name: found.arguments[p.name] for p in found.kernel.params if p.is_constexpr}


# Compilations


@pytest.mark.parametrize("c", [128, 192, 512, 2048])
def test_convolutions_of_one_tap_share_a_kernel(c: int) -> None:
    """They divide by nothing, so another number of channels compiles nothing."""
    assert constants(c, 1) == constants(64, 1)


def test_each_width_of_a_3x3_has_a_kernel() -> None:
    found = {c: constants(c, 3) for c in (64, 128, 256, 512)}
    assert [f["TAP_C"] for f in found.values()] == [64, 128, 256, 512]
    assert all(f | {"TAP_C": 64} == found[64] for f in found.values())
    assert found[64]["KH"] == found[64]["KW"] == 3


def test_the_width_is_that_of_a_group() -> None:
    assert constants(512, 3, groups=8)["TAP_C"] == 64


# The tile


@pytest.mark.parametrize("arch", DEVICES)
def test_tiles_of_8_warps_and_few_channels_take_filters_in_sixteens(arch: int) -> None:
    """With 72 filters ptxas spills what addresses them: the gate found 200 bytes of stack."""

    def tiles(filters: int) -> set[tuple[int, ...]]:
        s = conv_shape("", full(32, 24, 28, 28), (filters, 24, 3, 3), (1, 1), (1, 1), (1, 1), 1)
        return {tuple(c[:4]) for c in plan._candidates(s, "half", DEVICES[arch], False, 0)}

    assert tiles(64) - tiles(72) == {(128, 64, 32, 8)}
    assert (64, 64, 32, 4) in tiles(72)


@pytest.mark.parametrize("arch", DEVICES)
def test_a_second_convolution_has_no_tile_that_spills_on_sm_120(arch: int) -> None:
    """There, with TMA and mma.sync, 128 x 64 by four warps take 16 to 32 bytes of stack."""

    def tiles(second: int) -> set[tuple[int, ...]]:
        s = conv_shape("", full(32, 64, 28, 28), (64, 64, 3, 3), (1, 1), (1, 1), (1, 1), 1)
        found = plan._candidates(s, "half", DEVICES[arch], False, second)
        return {tuple(c[:5]) for c in found}

    spilling = {(128, 64, 64, 4, 4), (128, 64, 64, 4, 3)}
    assert tiles(0) - tiles(64) == (spilling if arch == 120 else set())


#: ResNet-50's convolutions in bfloat16 at batch 256 on an H100, which makes 132 * 2048 products and
#: moves 3350 / 1.98 = 1692 bytes in a clock cycle: channels, filters, kernel, stride, map, whether
#: there is a residual; thousands of cycles of products and of DRAM; tile, stages, programs of a
#: multiprocessor.
RESNET50 = [
    ((64, 64, 1, 1, 56, False), 12, 121, (128, 64, 64, 4, 2)),
    ((64, 64, 3, 1, 56, False), 109, 122, (128, 64, 64, 4, 2)),
    ((64, 256, 1, 1, 56, True), 49, 547, (128, 128, 64, 3, 2)),
    ((256, 64, 1, 1, 56, False), 49, 304, (128, 64, 64, 4, 2)),
    ((256, 128, 1, 1, 56, False), 97, 364, (128, 128, 64, 3, 2)),
    ((128, 128, 3, 2, 56, False), 109, 152, (128, 128, 64, 3, 2)),
    ((128, 512, 1, 1, 28, True), 49, 273, (128, 128, 64, 3, 2)),
    ((256, 512, 1, 2, 56, False), 97, 182, (128, 128, 64, 3, 2)),
    ((512, 128, 1, 1, 28, False), 49, 152, (128, 128, 64, 3, 2)),
    ((512, 256, 1, 1, 28, False), 97, 182, (128, 128, 64, 3, 2)),
    ((256, 1024, 1, 1, 14, True), 49, 137, (128, 128, 64, 3, 2)),
    # Bound by products and loads, of which the largest tile makes the most in a cycle.
    ((256, 256, 3, 2, 28, False), 109, 77, (128, 256, 64, 3, 1)),
    ((256, 256, 3, 1, 14, False), 109, 31, (128, 256, 64, 3, 1)),
    ((1024, 512, 1, 1, 14, False), 97, 92, (128, 256, 64, 3, 1)),
    ((1024, 2048, 1, 2, 14, False), 97, 48, (128, 256, 64, 3, 1)),
    ((512, 2048, 1, 1, 7, True), 49, 70, (128, 256, 64, 3, 1)),
    # 49 rows of tiles and 2 columns of the largest would leave 34 multiprocessors idle.
    ((2048, 512, 1, 1, 7, False), 49, 39, (128, 128, 64, 3, 2)),
]
H100 = DEVICES[90]


def shape_of(layer: tuple[int, int, int, int, int, bool], n: int = 256) -> ConvShape:
    c, k, size, stride, hw, _ = layer
    pairs = (stride, stride), (size // 2, size // 2), (1, 1)
    return ConvShape(n, hw, hw, c, k, size, size, *pairs, 1)


@pytest.mark.parametrize(
    ("layer", "computing", "moving", "chosen"), RESNET50, ids=[str(row[0][:5]) for row in RESNET50]
)
def test_resnet50_on_an_h100(layer, computing, moving, chosen) -> None:
    c, k, size, stride, hw, residual = layer
    rows = 256 * (hw // stride) ** 2
    products = rows * size * size * c * k
    # A strided 1x1 reads the pixels that it needs; a strided 3x3 reads all of them.
    read = rows if size == 1 else 256 * hw * hw
    moved = 2 * (read * c + k * c * size * size + rows * k * (2 if residual else 1))
    assert round(products / (132 * 2048) / 1000) == computing
    assert round(moved / (3350 / 1.98) / 1000) == moving
    s = shape_of(layer)
    assert plan.traffic(s, 2, 0, residual) == moved
    config = plan.choose(s, "half", H100, 0, residual)
    found = (*config[:3], config.stages, plan.resident(config, H100, "half"))
    assert found == chosen
    if moving > 1.5 * computing:
        assert found[-1] >= 2


def test_the_cost_of_a_layer_that_memory_bounds() -> None:
    """64 to 256 channels by 1x1 with a residual, whose depth is one step: the arithmetic.

    802,816 pixels are 6272 rows of tiles, 48 of them on the busiest of 132 multiprocessors. DRAM
    takes 546.6 thousand cycles, 11.5 thousand for each of 48 tiles of 128 x 256, behind each of
    which a program by itself fills and drains its pipeline for 2 thousand. Two programs with half
    the tile hide that behind each other's loads.
    """
    s = shape_of((64, 256, 1, 1, 56, True))
    moving = 2 * (802_816 * (64 + 256 + 256) + 64 * 256) / H100.bandwidth
    wide, narrow = (
        plan.ConvConfig(128, n, 64, 8, 3, registers=r) for n, r in ((256, 255), (128, 128))
    )
    assert [plan.resident(c, H100, "half") for c in (wide, narrow)] == [1, 2]
    alone = moving * 132 / 6272 + 2000
    assert plan.cost(s, wide, "half", H100, 0, True) == pytest.approx(48 * alone)
    # 96 tiles of 128 x 128 on the busiest: 512 cycles of products and 256 of loads by 128 bytes.
    computing = 96 * (128 * 128 * 64 / 2048 + 256 * 64 * 2 / 128)
    together = moving + computing / 10 + 2000
    assert plan.cost(s, narrow, "half", H100, 0, True) == pytest.approx(together)


def test_a_faster_memory_changes_the_bound() -> None:
    """An H200 is an H100 with 4.8 TB/s: its share of the time, where memory is the bound."""
    h200 = H100._replace(bandwidth=4800 / 1.98)
    layer = (256, 64, 1, 1, 56, False)
    costs = [plan.cost(shape_of(layer), CONFIGS["half"][2], "half", d) for d in (H100, h200)]
    assert costs[1] / costs[0] == pytest.approx(3350 / 4800, rel=0.05)


@pytest.mark.parametrize("arch", DEVICES)
def test_layers_bound_by_memory_share_multiprocessors_everywhere(arch: int) -> None:
    device, found = DEVICES[arch], 0
    for layer, *_ in RESNET50:
        s = shape_of(layer)
        computing = s.rows * s.depth * s.k / (device.processors * device.products("half"))
        if plan.traffic(s, 2, 0, layer[-1]) / device.bandwidth > 2 * computing:
            config = plan.choose(s, "half", device, 0, layer[-1])
            assert plan.resident(config, device, "half") >= 2, (layer, config)
            found += 1
    assert found >= 3


def test_small_batches_fill_the_multiprocessors() -> None:
    """At batch 1 the deep layers have fewer tiles than multiprocessors: small tiles, and splits."""
    config = plan.choose(shape_of((512, 512, 3, 1, 7, False), 1), "half", H100)
    assert config.block_m == 64
    assert config.split_k > 1


def test_programs_of_a_multiprocessor() -> None:
    """By registers, of 65536; by threads, of 2048; by shared memory, of 228 KiB and 1 a program."""
    assert H100.resident(8, 255, 1024) == 1
    assert H100.resident(8, 128, 1024) == 2
    assert H100.resident(4, 168, 1024) == 3
    assert H100.resident(4, 169, 1024) == 2
    assert H100.resident(8, 16, 1024) == 8
    assert H100.resident(4, 128, 75 * 1024) == 3
    assert H100.resident(4, 128, 76 * 1024) == 2
    assert H100.resident(4, 128, 227 * 1024) == 1


def test_a_prologue_stores_pixels_once_more() -> None:
    """As compiled for sm_86: three stages of 16 KiB in shared memory, of which two programs fit.

    Behind a prologue 64 x 32 pixels of 4 bytes come on top, 8 KiB, and one program is left.
    """
    tile = plan.ConvConfig(64, 64, 32, 4, 4)
    assert plan.resident(tile, DEVICES[86], "tf32") == 2
    assert plan.resident(tile, DEVICES[86], "tf32", prologue=True) == 1


def test_registers_are_limited_where_operands_pass_by_them() -> None:
    config = next(tile for tile in CONFIGS["half"] if tile[:3] == (128, 128, 64))
    assert launch(256, 3, config=config).options["maxnreg"] == 128
    assert launch(256, 3, config=config, prologue=True).options["maxnreg"] == 255
    assert launch(256, 3, arch=80, config=config).options["maxnreg"] == 255


# Persistent programs


def offered(layer: tuple[int, int, int, int, int, bool], arch: int, n: int = 256) -> list[Any]:
    """What those who time configurations get."""
    c, k, size, stride, hw, _ = layer
    x, found = full(n, c, hw, hw, dtype=BFLOAT16.dtype), []
    pairs = (stride, stride), (size // 2, size // 2), (1, 1)

    def run() -> None:
        found.extend(plan.candidates(conv_shape("", x, (k, c, size, size), *pairs, 1), x))

    recorded(run, arch)
    return found


def test_persistent_programs_are_those_that_the_gpu_holds() -> None:
    """64 to 256 channels of 802,816 pixels: 6272 rows of tiles; on an H100, and on an A100.

    Of 65536 registers two programs have all, by 8 warps one. On an A100 a stage less is in shared
    memory, and on both it would admit two and one as well.
    """
    s = shape_of((64, 256, 1, 1, 56, True))
    widest, wide, narrow = plan.PERSISTENT["half"]
    for tile, tiles, h100, a100 in (
        (widest, 6272, 132, 108),
        (wide, 6272 * 2, 132, 108),
        (narrow, 6272 * 4, 264, 216),
    ):
        assert plan.tiles_of(s, tile) == tiles
        assert plan.programs_of(s, tile, "half", H100) == h100
        assert plan.programs_of(s, tile, "half", DEVICES[80]) == a100
        assert plan.programs_of(s, tile._replace(persistent=False), "half", H100) == tiles
    # Behind a prologue both operands are once more in shared memory: 120 KiB, of 228.
    assert plan.programs_of(s, narrow, "half", H100, prologue=True) == 132


@pytest.mark.parametrize("arch", DEVICES)
@pytest.mark.parametrize("n", [1, 16, 256])
def test_never_more_programs_than_tiles(arch: int, n: int) -> None:
    device = DEVICES[arch]
    for kind, tiles in plan.PERSISTENT.items():
        for tile in tiles:
            for layer, *_ in RESNET50:
                s = shape_of(layer, n)
                found = plan.programs_of(s, tile, kind, device)
                held = device.processors * plan.resident(tile, device, kind)
                assert 1 <= found <= plan.tiles_of(s, tile)
                assert found == plan.tiles_of(s, tile) or (found == held and s.pointwise)


def test_a_tile_has_a_program_where_there_is_more_than_a_matrix() -> None:
    """Taps, groups, a split, a second convolution, a stride."""
    tile = plan.PERSISTENT["half"][-1]
    assert launch(256, 1, config=tile).arguments["PERSISTENT"] is True
    assert launch(256, 1, config=tile, prologue=True).arguments["PERSISTENT"] is True
    assert launch(256, 3, config=tile).arguments["PERSISTENT"] is False
    assert launch(256, 1, groups=2, config=tile).arguments["PERSISTENT"] is False
    s, strided = (shape_of((256, 256, 1, stride, 56, False)) for stride in (1, 2))
    tiles, fewer = plan.tiles_of(s, tile), plan.tiles_of(strided, tile)
    assert plan.programs_of(s, tile, "half", H100) == 264 < fewer < tiles
    assert plan.programs_of(strided, tile, "half", H100) == fewer
    assert plan.programs_of(s, tile, "half", H100, second=64) == tiles
    assert plan.programs_of(s, tile._replace(split_k=2), "half", H100) == tiles


@pytest.mark.parametrize("arch", DEVICES)
def test_persistent_programs_are_offered_and_not_chosen(arch: int) -> None:
    """To be timed; until then the choice is what it is without them."""
    device, most = DEVICES[arch], 0
    for layer, *_ in RESNET50:
        s, found = shape_of(layer), offered(layer, arch)
        persistent = [config for config in found if config.persistent]
        most = max(most, len(persistent))
        assert bool(persistent) == s.pointwise
        assert all(config.split_k == 1 for config in persistent)
        assert all(config.descriptors == (arch >= 90) for config in persistent)
        assert len({config_name(config) for config in found}) == len(found)
        assert not plan.choose(s, "half", device, 0, layer[-1]).persistent
    # The largest tile is not for sm_80, and its 144 KiB are too much shared memory elsewhere.
    assert most == (3 if 90 <= arch < 120 else 2)
    # An image of 7 x 7 has a row of tiles.
    assert not any(config.persistent for config in offered((512, 2048, 1, 1, 7, True), arch, 1))


# The device


@pytest.mark.parametrize(
    ("memory", "bus", "clock", "bytes_a_cycle"),
    [
        (2_619_000, 5120, 1_980_000, 3350 / 1.980),  # H100: 3.35 TB/s
        (1_593_000, 5120, 1_410_000, 2039 / 1.410),  # A100: 2,039 GB/s
        (0, 5120, 1_410_000, 108 * 13.0),  # a driver that does not say
    ],
)
def test_bandwidth_is_the_drivers(memory, bus, clock, bytes_a_cycle) -> None:
    facts = {"mem_clock_rate": memory, "mem_bus_width": bus, "sm_clock_rate": clock}
    facts["max_shared_mem"] = 166_912
    utils = SimpleNamespace(get_device_properties=lambda index: facts)
    driver = SimpleNamespace(active=SimpleNamespace(utils=utils))
    properties = SimpleNamespace(
        shared_memory_per_multiprocessor=167_936, max_threads_per_multi_processor=2048
    )
    with (
        mock.patch.object(triton.runtime, "driver", driver),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
    ):
        device = _device._gpu.__wrapped__(0, 80, 108)
    assert device[:5] == (80, 108, 166_912, 167_936, 2048)
    assert device.bandwidth == pytest.approx(bytes_a_cycle, rel=2e-3)
