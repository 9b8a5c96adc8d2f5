"""The training primitives' kernels, compiled for cards that are not here, under the gate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ahead_of_time
import pytest
import torch
from ahead_of_time import ARCHITECTURES, DEVICES, TENSOR_CORES, Code, compiled, full, recorded
from precisions import BFLOAT16, FLOAT16, FLOAT32, TF32, Precision
from rich.console import Console

from fused_resnet.backends import triton as kernels
from fused_resnet.backends.triton import _gradient_plan as plans
from fused_resnet.backends.triton._bn_map import CONFIGS as BN_CONFIGS
from fused_resnet.backends.triton._conv_shape import ConvShape, conv_shape
from fused_resnet.backends.triton.block_end_backward import Recomputed

KINDS = {BFLOAT16: "half", FLOAT16: "half", TF32: "tf32", FLOAT32: "ieee"}
CODES: list[tuple[str, Code]] = []
PRODUCTS = ("conv_data_gradient_kernel", "conv_weight_gradient_kernel")


@dataclass(frozen=True)
class Case:
    """A call whose kernels are to be compiled; quick ones are, in every `make test`."""

    what: str
    precision: Precision
    run: Callable[[], Any]
    quick: bool = False

    def __str__(self) -> str:
        return f"{self.what}-{self.precision}"


#: (channels, filters, kernel, stride, size of the map)
LAYERS = {
    "1x1": (256, 64, 1, 1, 56),
    "1x1 stride 2": (256, 512, 1, 2, 56),
    "3x3": (256, 256, 3, 1, 14),
    "3x3 stride 2": (128, 128, 3, 2, 56),
    "odd channels": (17, 23, 3, 1, 7),
}


def shape_of(layer: str) -> ConvShape:
    return shape(*LAYERS[layer])


def shape(c: int, k: int, size: int, stride: int, hw: int) -> ConvShape:
    pairs = ((stride, stride), (size // 2, size // 2), (1, 1))
    return conv_shape("", full(32, c, hw, hw), (k, c, size, size), *pairs, 1)


def backward(
    precision: Precision, layer: str, kind: str, need: tuple[bool, bool], **configs: Any
) -> Callable[[], Any]:
    """A call of conv_backward: ``prologue`` with all that it has, ``add``, or ``frozen``."""
    c, k, size, stride, hw = LAYERS[layer]
    out = (hw + 2 * (size // 2) - size) // stride + 1
    dtype = precision.dtype
    x, w, g = (
        full(*shape, dtype=dtype)
        for shape in ((32, c, hw, hw), (k, c, size, size), (32, k, out, out))
    )
    v, in_v = full(k), full(c)
    batch = (None, v, None, None) if kind == "frozen" else (g, v, v, v)
    source = (x, *((in_v,) * 3 if kind == "prologue" else (None,) * 3))
    add = x if kind == "add" else None
    geometry = ((stride, stride), (size // 2, size // 2), (1, 1), 1)

    def run() -> Any:
        with precision.set():
            return kernels.conv_backward(
                g, *batch, *source, w, add, *geometry, *need, kind == "prologue", False, **configs
            )

    return run


def gradients() -> Iterator[Case]:
    quick = {
        ("data", BFLOAT16, "3x3", "prologue", 0), ("data", BFLOAT16, "1x1", "add", 1),
        ("data", FLOAT16, "3x3 stride 2", "frozen", 1), ("data", TF32, "3x3", "prologue", 0),
        ("weight", BFLOAT16, "3x3", "prologue", 0), ("weight", BFLOAT16, "1x1", "frozen", 1),
        ("weight", TF32, "3x3", "prologue", 0),
    }  # fmt: skip
    tables = {
        "data": (plans.DATA_CONFIGS, plans.fitting_data),
        "weight": (plans.WEIGHT_CONFIGS, plans.fitting_weight),
    }
    for which, (table, fitting) in tables.items():
        for precision, name in KINDS.items():
            for i, config in enumerate(table[name]):
                for layer in LAYERS:
                    if config not in fitting(shape_of(layer), name):
                        continue  # no plan takes it
                    kinds = ["prologue", "add", "frozen"] if which == "data" else ["prologue"]
                    if precision is FLOAT16:  # as bfloat16
                        kinds = ["frozen"]
                    for kind in kinds:
                        need = (which == "data", which == "weight")
                        run = backward(precision, layer, kind, need, **{f"{which}_config": config})
                        tile = "x".join(map(str, config[:3]))
                        is_quick = (which, precision, layer, kind, i) in quick
                        yield Case(f"{which} {layer} {kind} {tile}", precision, run, is_quick)


def passes(precision: Precision, channels: int, config: Any) -> Callable[[], Any]:
    """Every pass over maps with every operand that it may have, and then with the fewest."""
    x, v = full(32, channels, 56, 56, dtype=precision.dtype), full(channels)
    index = full(32, channels, 28, 28, dtype=torch.uint8)
    pooled = full(32, channels, 28, 28, dtype=precision.dtype)
    pool = ((3, 3), (2, 2), (1, 1))

    def run() -> None:
        kernels.block_end(x, v, v, x, v, v, True, config=config)
        kernels.block_end(x, v, v, None, None, None, False, config=config)
        affine = Recomputed(v, v, v, v)
        kernels.block_end_backward(x, x, x, v, None, None, True, config=config)
        kernels.block_end_backward(x, x, x, v, x, v, True, config=config)
        kernels.block_end_backward(x, None, x, v, x, v, True, recomputed=affine, config=config)
        kernels.block_end_backward(x, x, x, v, None, None, False, config=config)
        kernels.stem_end(x, v, v, *pool, config=config)
        kernels.stem_end_backward(pooled, index, x, v, v, v, *pool, True, config=config)
        kernels.stem_end_backward(pooled, index, x, v, v, v, *pool, False, config=config)

    return run


def around_pytorch(precision: Precision) -> Callable[[], Any]:
    run = backward(precision, "3x3", "prologue", (True, True), pytorch=True)
    frozen = backward(precision, "1x1", "frozen", (True, True), pytorch=True)
    return lambda: (run(), frozen())


def numbers(precision: Precision) -> Callable[[], Any]:
    """Batch norm's numbers, and a convolution whose statistics take two launches."""
    v, x = full(64), full(32, 64, 56, 56, dtype=precision.dtype)
    w = full(64, 64, 3, 3, dtype=precision.dtype)
    half, batches = full(64, dtype=torch.bfloat16), full(1, dtype=torch.int64)
    geometry = ((1, 1), (1, 1), (1, 1), 1)

    def run() -> None:
        kernels.bn_coefficients(v, v, half, v, 1e-5)
        kernels.bn_coefficients(v, v, None, None, 1e-5)
        kernels.bn_update_running(v, v, v, half, 0.1, 21)
        kernels.bn_backward_coefficients(v, v, v, v, half, 1e-5, 21)
        kernels.conv_bn_forward(x, v, v, w, v, v, v, v, batches, *geometry, 0.1, 1e-5, False)
        kernels.conv_bn_forward(
            x, None, None, w, half, None, None, None, None, *geometry, 0.1, 1e-5, False
        )

    return run


def others() -> Iterator[Case]:
    for precision in (BFLOAT16, FLOAT32):
        for config in BN_CONFIGS:
            name = f"passes {config[0]}x{config[1]}"
            # Rows of as many channels as the tile has, and one with a tile that is not full.
            for channels in (config.block_c, 37):
                quick = precision is BFLOAT16 and channels == 64
                what = f"{name} {channels} channels"
                yield Case(what, precision, passes(precision, channels, config), quick)
        yield Case("around PyTorch", precision, around_pytorch(precision), precision is BFLOAT16)
        yield Case("numbers", precision, numbers(precision), precision is BFLOAT16)


CASES = [*gradients(), *others()]


def architectures() -> Iterator[tuple[Case, tuple[int, ...]]]:
    """Each quick case with the architectures that `make test` compiles it for.

    All of them for a gradient with its prologue in bfloat16, since each multiplies by instructions
    of its own; one, in turn, for each other product, and one for what multiplies nothing.
    """
    for turn, case in enumerate(case for case in CASES if case.quick):
        if case.what.partition(" ")[0] not in ("data", "weight"):
            yield case, (90,)
        elif " prologue " in case.what and case.precision is BFLOAT16:
            yield case, ARCHITECTURES
        else:
            yield case, (ARCHITECTURES[turn % len(ARCHITECTURES)],)


QUICK = dict(architectures())


@pytest.mark.parametrize(
    ("case", "arch"),
    [
        pytest.param(
            c,
            arch,
            id=f"{c}-sm_{arch}",
            marks=() if arch in QUICK.get(c, ()) else pytest.mark.slow,
        )
        for c in CASES
        for arch in DEVICES
    ],
)
def test_the_gate_of_training(case: Case, arch: int) -> None:
    launches = recorded(case.run, arch)
    assert launches
    for launch in launches:
        code = compiled(launch, arch)
        CODES.append((str(case), code))
        assert not code.problems(), f"{code}: {code.problems()}"
        if launch.name in PRODUCTS and case.precision is not FLOAT32:
            assert code.instructions.get(TENSOR_CORES[arch]), code


def test_all_tiles_are_here() -> None:
    """No configuration that the plans may choose is missing above."""
    for which, table in (("data", plans.DATA_CONFIGS), ("weight", plans.WEIGHT_CONFIGS)):
        for precision, name in KINDS.items():
            tiles = {"x".join(map(str, config[:3])) for config in table[name]}
            found = {
                case.what.rpartition(" ")[2]
                for case in CASES
                if case.what.startswith(which) and case.precision is precision
            }
            assert tiles == found


def test_float32_takes_narrow_tiles_for_odd_channels() -> None:
    """64 x 32 x 16 spills with them on sm_120."""
    sizes = {c: plans.fitting_data(shape_of(c), "ieee") for c in ("odd channels", "3x3")}
    assert [tile.block_n for tile in sizes["odd channels"]] == [16]
    assert [tile.block_n for tile in sizes["3x3"]] == [32, 16]


def test_large_tiles_take_multiples_of_16() -> None:
    """With 17 channels and 23 filters they spilled 8 to 408 bytes."""
    s = shape(136, 136, 3, 1, 14)
    data = (plans.fitting_data(s, precision) for precision in ("half", "tf32"))
    found = [*data, plans.fitting_weight(s, "half")]
    sizes = [[(tile[:2], tile.warps) for tile in tiles] for tiles in found]
    assert sizes == [[((64, 64), 4)], [((64, 64), 8)], [((64, 64), 4)]]


def test_weight_gradients_take_short_steps_for_odd_channels() -> None:
    """Steps of 64 pixels spill with them on sm_86."""
    sizes = {c: plans.fitting_weight(shape_of(c), "half") for c in ("odd channels", "1x1")}
    assert [tile.block_r for tile in sizes["odd channels"]] == [32]
    assert [tile.block_r for tile in sizes["1x1"]] == [64, 32]


def test_the_stems_backward_has_all_registers() -> None:
    """At the 128 of other passes it spills 8 to 104 bytes, on every architecture."""
    x, v = full(32, 64, 56, 56, dtype=torch.bfloat16), full(64)
    index = full(32, 64, 28, 28, dtype=torch.uint8)
    pooled = full(32, 64, 28, 28, dtype=torch.bfloat16)
    pool = ((3, 3), (2, 2), (1, 1))
    launches = recorded(
        lambda: kernels.stem_end_backward(pooled, index, x, v, v, v, *pool, True), 90
    )
    assert launches[0].options["maxnreg"] == 255


@pytest.fixture(scope="module", autouse=True)
def _print_table(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if not CODES:
        return
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print()
        Console(width=180).print(ahead_of_time.table(CODES))
