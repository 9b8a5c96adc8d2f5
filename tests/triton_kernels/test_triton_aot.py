"""Every configuration that may be chosen, compiled for cards that are not here, under a gate.

No register may spill, shared memory must suffice, and products must be made by the tensor cores'
own instruction of each architecture: mma.sync, wgmma and tcgen05.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ahead_of_time
import pytest
from ahead_of_time import ARCHITECTURES, DEVICES, TENSOR_CORES, Code, compiled, full, recorded
from precisions import PRECISIONS, Precision
from rich.console import Console

from fused_resnet.backends import triton as kernels
from fused_resnet.backends.triton import _conv_plan
from fused_resnet.backends.triton._bn_map import CONFIGS as BN_CONFIGS
from fused_resnet.backends.triton._conv_shape import conv_shape
from fused_resnet.backends.triton.conv_bn_relu_maxpool import CONFIGS as STEM_CONFIGS
from fused_resnet.backends.triton.residual_block import CONFIGS as BLOCK_CONFIGS

FLOAT16, BFLOAT16, TF32, FLOAT32 = PRECISIONS
EPS = 1e-5
KINDS = {FLOAT16: "half", BFLOAT16: "half", TF32: "tf32", FLOAT32: "ieee"}
CODES: list[tuple[str, Code]] = []


@dataclass(frozen=True)
class Case:
    """A call that launches what is to be compiled; quick ones are, in every `make test`."""

    what: str
    precision: Precision
    run: Callable[[], Any]
    tensor_cores: bool = True
    quick: bool = False
    architectures: tuple[int, ...] = tuple(DEVICES)
    config: Any = None  # of a convolution

    def __str__(self) -> str:
        return f"{self.what}-{self.precision}"


# Convolutions: (channels, filters, kernel, stride, size of the map)

LAYERS = {
    "1x1": (256, 256, 1, 1, 56),
    "1x1 stride 2": (256, 512, 1, 2, 56),
    "3x3": (256, 256, 3, 1, 14),
    "few channels": (24, 72, 3, 1, 28),
    "odd channels": (17, 23, 3, 1, 7),
    "7x7": (3, 64, 7, 2, 224),
    "ones": (1, 1, 1, 1, 1),
}


def convolution(
    precision: Precision, layer: str, config: Any, kind: str = "plain", n: int = 32
) -> Callable[[], Any]:
    """A call of one kind, with every option that this kind of epilogue or prologue has."""
    c, k, size, stride, hw = LAYERS[layer]
    n = 1 if layer == "ones" else n
    x, w = (full(*s, dtype=precision.dtype) for s in ((n, c, hw, hw), (k, c, size, size)))
    out = (hw + 2 * (size // 2) - size) // stride + 1
    v, in_v = full(k), full(c)
    r = full(n, k, out, out, dtype=precision.dtype)
    geometry = ((stride, stride), (size // 2, size // 2), (1, 1))
    folded = (x, w.reshape(-1), v, v)
    before = (x, in_v, in_v, w, *geometry, 1)
    live = (x, w, v, v, v, v, v, r, *geometry, 1, EPS, True)

    def call(config: Any) -> Any:
        calls = {
            "plain": lambda: kernels.conv_bn_add_relu(*live, config=config),
            "split": lambda: kernels.conv_bn_add_relu(*live, config=config._replace(split_k=4)),
            "prologue": lambda: kernels.conv_forward(*before, False, False, config=config),
            "statistics": lambda: kernels.conv_statistics(x, w, v, *geometry, 1, config=config),
            "all training": lambda: kernels.conv_forward(*before, True, False, config=config),
            "affine residual": lambda: kernels.conv_bn_add_relu_packed(
                *folded, r, list(w.shape), *geometry, 1, True,
                residual_scale=v, residual_shift=v, config=config,
            ),
            "second": lambda: kernels.conv_conv_add_relu_packed(
                x, full(n, 64, 2 * out, 2 * out, dtype=precision.dtype),
                full(k * (c * size * size + 64), dtype=precision.dtype), v, list(w.shape),
                *geometry, (2, 2), True, config=config,
            ),
        }  # fmt: skip
        return calls[kind]()

    def run() -> Any:
        # As the plan does: descriptors wherever the architecture has them.
        descriptors = _conv_plan.device_of(x).arch >= 90
        with precision.set():
            return call(config and config._replace(descriptors=descriptors))

    return run


def tile(config: Any) -> str:
    """A tile of the tables as a word: its sizes, and its stages, in which alone some differ."""
    word = "x".join(map(str, (*config[:3], config.stages)))
    return f"{word}-persistent" if getattr(config, "persistent", False) else word


def may(arch: int, precision: Precision, layer: str, config: Any, second: bool = False) -> bool:
    """Whether that configuration may be chosen for the layer, on that architecture.

    Args:
        arch: Architecture.
        precision: Precision of the products.
        layer: A key of :data:`LAYERS`.
        config: The tile.
        second: Whether a convolution is added.
    """
    if second and arch in config.second_spills:
        return False
    c, k, size, stride, hw = LAYERS[layer]
    x = full(32, c, hw, hw, dtype=precision.dtype)
    pairs = ((stride, stride), (size // 2, size // 2), (1, 1))
    found: list[Any] = []

    def run() -> None:
        shape = conv_shape("", x, (k, c, size, size), *pairs, 1)
        found.extend((*c[:5], c.persistent) for c in _conv_plan.candidates(shape, x))

    with precision.set():
        recorded(run, arch)
    return (*config[:5], config.persistent) in found


def convolutions() -> Iterator[Case]:
    quick = {
        (BFLOAT16, "1x1", "plain", 1), (FLOAT16, "3x3", "plain", 0), (BFLOAT16, "3x3", "split", 4),
        (BFLOAT16, "3x3", "all training", 1), (BFLOAT16, "7x7", "plain", 5),
        (BFLOAT16, "ones", "plain", 4), (TF32, "3x3", "plain", 0), (TF32, "7x7", "plain", 1),
        (BFLOAT16, "3x3", "second", 3), (FLOAT32, "3x3", "plain", 0),
        (BFLOAT16, "few channels", "plain", 6),  # not to be offered: ptxas would spill
    }  # fmt: skip
    for precision, kind in KINDS.items():
        for i, config in enumerate(_conv_plan.CONFIGS[kind]):
            for layer in LAYERS:
                kinds = ["plain"]
                if precision is not FLOAT16 and layer == "3x3":
                    kinds += ["split", "prologue", "statistics", "all training", "second"]
                    kinds += ["affine residual"]
                elif precision is FLOAT16 and layer != "3x3":
                    continue  # as bfloat16
                elif layer == "1x1":
                    kinds += ["split", "all training"]
                elif layer in ("7x7", "few channels"):  # over (ky, kx, c) as one axis
                    kinds += ["split", "statistics"]
                for what in kinds:
                    second = what == "second"
                    yield Case(
                        f"{layer} {what} {tile(config)}",
                        precision,
                        convolution(precision, layer, config, what),
                        kind != "ieee",
                        (precision, layer, what, i) in quick,
                        tuple(a for a in DEVICES if may(a, precision, layer, config, second)),
                        config,
                    )
        for config in _conv_plan.PERSISTENT[kind] if precision is not FLOAT16 else ():
            architectures = tuple(a for a in DEVICES if may(a, precision, "1x1", config))
            for what in ("plain", "all training"):
                yield Case(
                    f"1x1 {what} {tile(config)}",
                    precision,
                    convolution(precision, "1x1", config, what),
                    True,
                    (precision, what, config.block_n) == (BFLOAT16, "plain", 128),
                    architectures,
                    config,
                )


#: Images, channels, filters, kernel, stride, map: with a patch in chunks of 16 bytes, with rows of
#: no whole chunks, and with what would be too large a patch.
STEMS = {
    "resnet": (256, 3, 64, 7, 2, 224),
    "odd": (2, 5, 23, 3, 1, 37),
    "deep": (256, 32, 64, 3, 1, 112),
}


def stem(precision: Precision, config: Any, case: tuple[int, ...]) -> Callable[[], Any]:
    n, c, k, size, stride, hw = case
    x, w = (full(*s, dtype=precision.dtype) for s in ((n, c, hw, hw), (k, c, size, size)))
    v = full(k)

    def run() -> Any:
        with precision.set():
            return kernels.conv_bn_relu_maxpool(
                x, w, v, v, v, v, v, (stride, stride), (size // 2, size // 2), (1, 1), 1, EPS,
                (3, 3), (2, 2), (1, 1), config=config,
            )  # fmt: skip

    return run


def stems() -> Iterator[Case]:
    for precision, kind in KINDS.items():
        for config in STEM_CONFIGS[kind]:
            for what, sizes in STEMS.items():
                quick = what == "resnet" and precision in (BFLOAT16, TF32) and config.block_m > 64
                name = f"stem {what} {'x'.join(map(str, config[:3]))}"
                run = stem(precision, config, sizes)
                some = tuple(arch for arch in DEVICES if arch not in config.spills)
                yield Case(name, precision, run, kind != "ieee", quick, some)


def block(precision: Precision, middle: int, stride: int) -> Callable[[], Any]:
    sizes = [(middle, 4 * middle, 1), (middle, middle, 3), (4 * middle, middle, 1)]
    packed = [full(k * c * s * s, dtype=precision.dtype) for k, c, s in sizes]
    vectors = [full(k) for k, _, _ in sizes]
    x = full(32, 4 * middle, 56, 56, dtype=precision.dtype)
    if stride != 1:  # with a shortcut, which is then a convolution of its own
        packed.append(full(16 * middle * middle, dtype=precision.dtype))
        vectors.append(full(4 * middle))
    return lambda: kernels.residual_block(
        x, packed, vectors, vectors, None, None, True, stride, 1, 1, False
    )


def blocks() -> Iterator[Case]:
    for precision in (FLOAT16, BFLOAT16):
        for middle in BLOCK_CONFIGS:
            for stride in (1, 2):
                quick = precision is BFLOAT16 and stride == 1
                name = f"bottleneck {middle} stride {stride}"
                yield Case(name, precision, block(precision, middle, stride), True, quick)


def batch_norm(precision: Precision, shape: tuple[int, ...], last: bool, config: Any):
    x, v = full(*shape, dtype=precision.dtype, last=last), full(shape[1])

    def run() -> None:
        kernels.bn_add_relu(x, v, v, v, v, x, False, EPS, True, config=config)
        kernels.bn_add_relu(x, v, v, None, None, None, True, EPS, False, config=config)
        for training, residual in ((True, True), (False, False)):
            kernels.bn_add_relu_backward(
                x, x, x, v, v, v, training, EPS, True, residual, config=config
            )

    return run


def batch_norms() -> Iterator[Case]:
    for precision in (BFLOAT16, FLOAT32):
        for i, config in enumerate(BN_CONFIGS):
            for what, shape in (
                ("", (32, 256, 56, 56)),
                (" odd", (3, 37, 5, 7)),
                (" one", (1,) * 4),
            ):
                for last in (True, False):
                    quick = precision is BFLOAT16 and (what, i, last) in (
                        ("", 6, True), ("", 0, False), (" odd", 3, True), (" one", 0, False),
                    )  # fmt: skip
                    name = f"bn{what} {'NHWC' if last else 'NCHW'} {config[0]}x{config[1]}"
                    run = batch_norm(precision, shape, last, config)
                    yield Case(name, precision, run, False, quick)


CASES = [*convolutions(), *stems(), *blocks(), *batch_norms()]
PRODUCTS = ("conv_bn_add_relu_kernel", "conv_bn_relu_maxpool_kernel", "residual_block_kernel")


def architectures() -> Iterator[tuple[Case, tuple[int, ...]]]:
    """Each quick case with the architectures that `make test` compiles it for.

    All of them where products are plain, since each multiplies by instructions of its own; one, in
    turn, for each other case.
    """
    chosen = [case for case in CASES if case.quick and case.architectures]
    for turn, case in enumerate(chosen):
        plain = case.what.startswith(("1x1 plain", "3x3 plain"))
        some = tuple(arch for arch in case.architectures if arch in ARCHITECTURES)
        yield case, some if plain else (some[turn % len(some)],)


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
        for arch in c.architectures
    ],
)
def test_the_gate(case: Case, arch: int) -> None:
    for launch in recorded(case.run, arch):
        code = compiled(launch, arch)
        CODES.append((str(case), code))
        assert not code.problems(), f"{code}: {code.problems()}"
        if case.tensor_cores and launch.name in PRODUCTS:
            assert code.instructions.get(TENSOR_CORES[arch]), code
        if launch.name in PRODUCTS:
            descriptors = any("DESCRIPTOR" in k and v for k, v in launch.arguments.items())
            assert bool(code.instructions.get("cp.async.bulk.tensor")) == descriptors, code
        if case.what.startswith("stem resnet"):
            # A patch for the first tile, one for the next: a thread's share of each, by 16 bytes.
            chunks = launch.arguments["PATCH_H"] * launch.arguments["PATCH_W"]
            chunks //= 16 // case.precision.dtype.itemsize * 32 * code.warps
            assert code.instructions.get("ld.global.v4", 0) >= 2 * chunks, code
            assert not code.instructions.get("ld.global.b16"), code
            assert code.instructions.get("cp.async.cg"), code
        if case.config and launch.name == "conv_bn_add_relu_kernel":
            assert launch.arguments["PERSISTENT"] == case.config.persistent
            prologue = launch.arguments["in_scale_ptr"] is not None
            kind = KINDS[case.precision]
            planned = _conv_plan.resident(case.config, DEVICES[arch], kind, prologue)
            assert code.resident >= planned, f"{code}: {code.resident} a multiprocessor"


def test_what_is_here_covers_the_tables() -> None:
    """No configuration that the plans may choose is missing above, on any architecture."""
    tiles: dict[tuple[str, str, int], set[str]] = {}
    for case in CASES:
        kernel, name = case.what.partition(" ")[0], case.what.rpartition(" ")[2]
        kernel = kernel if kernel in ("stem", "bn") else "conv"
        for arch in case.architectures:
            tiles.setdefault((kernel, KINDS[case.precision], arch), set()).add(name)
    for arch, device in DEVICES.items():
        for kind, size in (("half", 2), ("tf32", 4), ("ieee", 4)):
            fitting = {
                tile(c)
                for c in (*_conv_plan.CONFIGS[kind], *_conv_plan.PERSISTENT[kind])
                if c.since <= arch
                and c.stages * (c.block_m + c.block_n) * c.block_k * size <= device.shared
            }
            assert fitting <= tiles["conv", kind, arch]
    for arch in DEVICES:
        for kind in _conv_plan.CONFIGS:
            configs = [config for config in STEM_CONFIGS[kind] if arch not in config.spills]
            stems = {"x".join(map(str, config[:3])) for config in configs}
            assert stems == tiles["stem", kind, arch]
        for kind in ("half", "ieee"):
            assert {f"{r}x{c}" for r, c, *_ in BN_CONFIGS} == tiles["bn", kind, arch]
        bottlenecks = {int(c.what.split()[1]) for c in CASES if c.what.startswith("bottleneck")}
        assert bottlenecks == set(BLOCK_CONFIGS)


def test_descriptors_are_used_where_they_are_natural() -> None:
    config = _conv_plan.CONFIGS["half"][1]._replace(descriptors=True)
    for layer, x, w in (("1x1", True, True), ("3x3", False, True), ("few channels", False, False)):
        (launch,) = recorded(convolution(BFLOAT16, layer, config), 90)
        assert launch.arguments["X_DESCRIPTOR"] is x, layer
        assert launch.arguments["W_DESCRIPTOR"] is w, layer


@pytest.mark.parametrize(("arch", "rows"), [(80, 128), (86, 64), (89, 64), (90, 128), (120, 64)])
def test_a_stem_takes_no_tile_that_spills(arch: int, rows: int) -> None:
    """In tf32, where patches take twice the registers: 8 to 32 bytes of stack with 128 rows."""
    (launch,) = recorded(stem(TF32, None, STEMS["resnet"]), arch)
    assert launch.arguments["BLOCK_M"] == rows


def test_the_gate_sees_spills() -> None:
    """Gate, tested: a tile that no registers hold."""
    config = _conv_plan.ConvConfig(128, 256, 64, 4, 3)
    (launch,) = recorded(convolution(BFLOAT16, "3x3", config), 80)
    assert any("spill" in p for p in compiled(launch, 80).problems())
    config = _conv_plan.ConvConfig(128, 128, 64, 8, 7)
    (launch,) = recorded(convolution(BFLOAT16, "3x3", config), 80)
    assert compiled(launch, 80).problems()


@pytest.fixture(scope="module", autouse=True)
def _print_table(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if not CODES:
        return
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print()
        Console(width=180).print(ahead_of_time.table(CODES))
