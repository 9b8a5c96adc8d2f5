"""Every operation against float64, on every backend that runs here: values, formats, errors."""

from __future__ import annotations

import pytest
import torch
from cases import CONVS, FORMATS, MAPS, Conv, batch_norm, conv_weight, doubled, normal
from tolerances import DTYPES, assert_as_exact_as_pytorch, error

import fused_resnet as fr
from fused_resnet import _C, ops, reference

BACKENDS = ("reference", "cpu")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
formats = pytest.mark.parametrize("fmt", FORMATS)
convs = pytest.mark.parametrize("case", CONVS, ids=str)
maps = pytest.mark.parametrize("shape", MAPS.values(), ids=MAPS)
extras = pytest.mark.parametrize(
    ("relu", "residual"), [(True, True), (True, False), (False, True), (False, False)]
)


def keeps_format(y: torch.Tensor, fmt: str) -> bool:
    return y.is_contiguous(memory_format=FORMATS[fmt])


# bn_add_relu


@dtypes
@formats
@maps
@extras
def test_bn_add_relu(dtype, fmt, shape, relu, residual):
    x = normal(*shape, dtype=dtype, shift=0.5).contiguous(memory_format=FORMATS[fmt])
    r = normal(*shape, dtype=dtype).contiguous(memory_format=FORMATS[fmt]) if residual else None
    bn = batch_norm(shape[1], dtype)
    truth = reference.bn_add_relu(
        doubled(x), *doubled(bn), None if r is None else doubled(r), relu=relu
    )
    eager = reference.bn_add_relu(x, *bn, r, relu=relu)
    result = ops.bn_add_relu(x, *bn, r, relu=relu)
    assert_as_exact_as_pytorch(result, eager, truth)
    assert keeps_format(result, fmt)


@dtypes
@formats
@maps
def test_bn_add_relu_training(dtype, fmt, shape):
    x = normal(*shape, dtype=dtype, shift=3.0).contiguous(memory_format=FORMATS[fmt])
    r = normal(*shape, dtype=dtype)
    bn, eager_bn = batch_norm(shape[1], dtype), None
    eager_bn = tuple(t.clone() for t in bn)
    truth_bn = doubled(bn)
    truth = reference.bn_add_relu(doubled(x), *truth_bn, doubled(r), training=True, momentum=0.3)
    eager = reference.bn_add_relu(x, *eager_bn, r, training=True, momentum=0.3)
    result = ops.bn_add_relu(x, *bn, r, training=True, momentum=0.3)
    assert_as_exact_as_pytorch(result, eager, truth)
    # Running statistics: float32 rounding, whatever the storage type of x.
    limit = 1e-12 if dtype is torch.float64 else 2e-6
    assert error(bn[2], truth_bn[2]) < limit
    assert error(bn[3], truth_bn[3]) < limit


@maps
@formats
def test_statistics_survive_a_large_mean(shape, fmt):
    """A mean a thousand times the deviation: sums of squares would lose every digit."""
    x = normal(*shape, dtype=torch.float32, shift=1000.0).contiguous(memory_format=FORMATS[fmt])
    mean, var = torch.zeros(2, shape[1])
    truth_mean, truth_var = torch.zeros(2, shape[1], dtype=torch.float64)
    ops.bn_add_relu(x, None, None, mean, var, training=True, momentum=1.0)
    reference.bn_add_relu(
        doubled(x), None, None, truth_mean, truth_var, training=True, momentum=1.0
    )
    assert error(mean, truth_mean) < 1e-6
    assert error(var, truth_var) < 1e-5


def test_no_affine_no_statistics():
    x = normal(2, 8, 5, 5, dtype=torch.float32)
    result = ops.bn_add_relu(x, None, None, None, None, training=True)
    truth = reference.bn_add_relu(doubled(x), None, None, None, None, training=True)
    torch.testing.assert_close(result.double(), truth, rtol=1e-5, atol=1e-5)


# conv_bn_add_relu


def run_conv(case: Conv, dtype: torch.dtype, fmt: str, op: str, *, r: bool, **extra):
    """The result, PyTorch's own and the truth of one convolution case."""
    x = normal(*case.x, dtype=dtype).contiguous(memory_format=FORMATS[fmt])
    w = conv_weight(case, dtype)
    bn = batch_norm(case.k, dtype)
    arguments = {**case.args, **extra}
    fused, plain = getattr(ops, op), getattr(reference, op)
    added: list[torch.Tensor] = []
    if r:
        shape = plain(x, w, *bn, **case.args).shape
        added = [normal(*shape, dtype=dtype).contiguous(memory_format=FORMATS[fmt])]
    truth = plain(doubled(x), doubled(w), *doubled(bn), *doubled(added), **arguments)
    eager = plain(x, w, *bn, *added, **arguments)
    return fused(x, w, *bn, *added, **arguments), eager, truth


@dtypes
@formats
@convs
def test_conv_bn_add_relu(dtype, fmt, case):
    result, eager, truth = run_conv(case, dtype, fmt, "conv_bn_add_relu", r=True)
    assert_as_exact_as_pytorch(result, eager, truth)
    assert keeps_format(result, fmt)


@formats
@extras
@pytest.mark.parametrize("case", CONVS[3:5], ids=str)
def test_conv_bn_add_relu_parts(fmt, relu, residual, case):
    result, eager, truth = run_conv(
        case, torch.float32, fmt, "conv_bn_add_relu", r=residual, relu=relu
    )
    assert_as_exact_as_pytorch(result, eager, truth)
    assert relu == bool((result >= 0).all())


@dtypes
def test_conv_bias_and_eps(dtype):
    case = CONVS[3]
    bias = normal(case.k, dtype=dtype)
    x, w, bn = normal(*case.x, dtype=dtype), conv_weight(case, dtype), batch_norm(case.k, dtype)
    truth = reference.conv_bn_add_relu(
        doubled(x), doubled(w), *doubled(bn), conv_bias=doubled(bias), padding=1, eps=1e-1
    )
    eager = reference.conv_bn_add_relu(x, w, *bn, conv_bias=bias, padding=1, eps=1e-1)
    result = ops.conv_bn_add_relu(x, w, *bn, conv_bias=bias, padding=1, eps=1e-1)
    assert_as_exact_as_pytorch(result, eager, truth)


@formats
def test_conv_in_training_moves_the_statistics(fmt):
    case = CONVS[3]
    x = normal(*case.x, dtype=torch.float64).contiguous(memory_format=FORMATS[fmt])
    w = conv_weight(case, torch.float64)
    bn, truth_bn = (batch_norm(case.k, torch.float64),) * 2
    truth_bn = doubled(bn)
    truth = reference.conv_bn_add_relu(x, w, *truth_bn, training=True, **case.args)
    result = ops.conv_bn_add_relu(x, w, *bn, training=True, **case.args)
    torch.testing.assert_close(result, truth, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(bn, truth_bn, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_weight_in_either_memory_format(weight_format):
    case = CONVS[3]
    x, w = normal(*case.x, dtype=torch.float32), conv_weight(case, torch.float32)
    bn = batch_norm(case.k, torch.float32)
    expected = ops.conv_bn_add_relu(x, w, *bn, **case.args)
    w = w.contiguous(memory_format=FORMATS[weight_format])
    assert torch.equal(ops.conv_bn_add_relu(x, w, *bn, **case.args), expected)


# conv_bn_relu_maxpool

STEMS = [
    Conv("resnet", (2, 3, 64, 64), 64, (7, 7), {"stride": 2, "padding": 3}),
    Conv("odd", (1, 3, 45, 37), 24, (7, 7), {"stride": 2, "padding": 3}),
    Conv("deep-stem", (1, 32, 19, 19), 33, (3, 3), {"stride": 1, "padding": 1}),
    Conv("many-bands", (1, 3, 224, 112), 64, (7, 7), {"stride": 2, "padding": 3}),
]
POOLS = [
    {},
    {"pool_kernel": 2, "pool_stride": 2, "pool_padding": 0},
    {"pool_kernel": (3, 2), "pool_stride": (1, 2), "pool_padding": (1, 0)},
    {"pool_kernel": 2, "pool_stride": 3, "pool_padding": 1},
]


@dtypes
@formats
@pytest.mark.parametrize("case", STEMS, ids=str)
def test_conv_bn_relu_maxpool(dtype, fmt, case):
    result, eager, truth = run_conv(case, dtype, fmt, "conv_bn_relu_maxpool", r=False)
    assert_as_exact_as_pytorch(result, eager, truth)
    assert keeps_format(result, fmt)


@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_maxpool_windows(pool):
    result, eager, truth = run_conv(
        STEMS[1], torch.float32, "channels_last", "conv_bn_relu_maxpool", r=False, **pool
    )
    assert_as_exact_as_pytorch(result, eager, truth)


# Packed weights


@convs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packing_is_lossless(case, dtype):
    w, groups = conv_weight(case, dtype), case.args.get("groups", 1)
    packed = ops.pack_conv_weight(w, groups)
    assert torch.equal(ops.unpack_conv_weight(packed, tuple(w.shape), groups), w)


@dtypes
@convs
def test_packed_equals_live(case, dtype):
    """The same kernel runs behind both, so the bits agree."""
    x = normal(*case.x, dtype=dtype).contiguous(memory_format=torch.channels_last)
    w, bn = conv_weight(case, dtype), batch_norm(case.k, dtype)
    live = ops.conv_bn_add_relu(x, w, *bn, **case.args)
    weight, bias, mean, var = doubled(bn)
    scale = weight / torch.sqrt(var + 1e-5)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    packed = ops.conv_bn_add_relu_packed(
        x,
        ops.pack_conv_weight(w, case.args.get("groups", 1)),
        scale.to(wide),
        (bias - mean * scale).to(wide),
        weight_shape=tuple(w.shape),
        **case.args,
    )
    rtol = {torch.float64: 1e-13, torch.float32: 1e-5}.get(dtype, torch.finfo(dtype).eps * 2)
    torch.testing.assert_close(packed, live, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("channels", [4, 8])
@pytest.mark.parametrize("dilation", [1, 2])
def test_what_a_group_holds_stays_in_it(channels, dilation):
    """Groups that lie side by side in a vector too: not even NaN comes across."""
    x = normal(1, 64, 9, 9, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    w = normal(64, channels, 3, 3, dtype=torch.float32)
    geometry = {"padding": dilation, "dilation": dilation, "groups": 64 // channels}
    x[:, 2 * channels + 1] = torch.nan
    y = ops.conv_bn_add_relu(x, w, *batch_norm(64, torch.float32), relu=False, **geometry)
    inside = torch.arange(64) // channels == 2
    assert y[:, inside].isnan().all()
    assert not y[:, ~inside].isnan().any()


@pytest.mark.parametrize("case", STEMS, ids=str)
def test_packed_stem_equals_live(case):
    x = normal(*case.x, dtype=torch.float32)
    w, bn = conv_weight(case, torch.float32), batch_norm(case.k, torch.float32)
    live = ops.conv_bn_relu_maxpool(x, w, *bn, **case.args)
    weight, bias, mean, var = doubled(bn)
    scale = weight / torch.sqrt(var + 1e-5)
    packed = ops.conv_bn_relu_maxpool_packed(
        x,
        ops.pack_conv_weight(w),
        scale.float(),
        (bias - mean * scale).float(),
        weight_shape=tuple(w.shape),
        **case.args,
    )
    torch.testing.assert_close(packed, live, rtol=1e-5, atol=1e-5)


# Inputs that are not plain


def views(shape, dtype):
    n, c, h, w = shape
    big = normal(n + 1, c + 3, h + 2, w * 2, dtype=dtype)
    yield "sliced", big[1:, 2:-1, 1:-1, ::2]
    yield "transposed", normal(n, c, w, h, dtype=dtype).transpose(2, 3)
    yield "expanded", normal(1, c, h, w, dtype=dtype).expand(n, c, h, w)
    yield (
        "batch-sliced channels_last",
        normal(2 * n, c, h, w, dtype=dtype).contiguous(memory_format=torch.channels_last)[::2],
    )


@pytest.mark.parametrize("which", range(4), ids=["sliced", "transposed", "expanded", "batch"])
def test_views_give_what_their_copies_give(which):
    shape = (2, 12, 6, 5)
    _, x = list(views(shape, torch.float32))[which]
    _, r = list(views(shape, torch.float32))[which]
    w, bn = normal(12, 12, 3, 3, dtype=torch.float32), batch_norm(12, torch.float32)
    assert not x.is_contiguous()
    before = x.clone()
    pairs = [
        (ops.bn_add_relu(x, *bn, r), reference.bn_add_relu(x.clone(), *bn, r.clone())),
        (
            ops.conv_bn_add_relu(x, w, *bn, r, padding=1),
            reference.conv_bn_add_relu(x.clone(), w, *bn, r.clone(), padding=1),
        ),
    ]
    for result, expected in pairs:
        torch.testing.assert_close(result, expected, rtol=2e-5, atol=2e-5)
    assert torch.equal(x, before)


def test_nothing_is_written_beside_the_result():
    """Inputs lie inside a larger buffer of sentinels, odd in every size; all of it stays."""
    buffer = torch.full((3, 9, 11, 21), 7.0).contiguous(memory_format=torch.channels_last)
    x = buffer[1:2, :, 1:10, 3:18]
    w, bn = normal(33, 9, 3, 3, dtype=torch.float32), batch_norm(33, torch.float32)
    y = ops.conv_bn_add_relu(x, w, *bn, padding=1)
    assert torch.equal(buffer, torch.full_like(buffer, 7.0))
    assert y.shape == (1, 33, 9, 15)


@formats
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_values_pass_through(fmt, value):
    """A value that is not finite reaches the outputs that PyTorch lets it reach, and no other."""
    x = normal(2, 16, 9, 9, dtype=torch.float32)
    x[1, 3, 4, 5] = value
    x = x.contiguous(memory_format=FORMATS[fmt])
    w, bn = normal(20, 16, 3, 3, dtype=torch.float32), batch_norm(20, torch.float32)
    bn16 = batch_norm(16, torch.float32)
    pairs = [
        (ops.bn_add_relu(x, *bn16), reference.bn_add_relu(x, *bn16)),
        (
            ops.bn_add_relu(x, *bn16, training=True),
            reference.bn_add_relu(x, *bn16, training=True),
        ),
        (
            ops.conv_bn_add_relu(x, w, *bn, padding=1),
            reference.conv_bn_add_relu(x, w, *bn, padding=1),
        ),
        (
            ops.conv_bn_relu_maxpool(x, w, *bn, padding=1),
            reference.conv_bn_relu_maxpool(x, w, *bn, padding=1),
        ),
    ]
    for result, expected in pairs:
        torch.testing.assert_close(result, expected, rtol=2e-5, atol=5e-5, equal_nan=True)


@formats
def test_empty_batch(fmt):
    x = torch.empty(0, 8, 6, 6).contiguous(memory_format=FORMATS[fmt])
    w, bn8, bn12 = torch.randn(12, 8, 3, 3), batch_norm(8, torch.float32), batch_norm(12, x.dtype)
    assert ops.bn_add_relu(x, *bn8).shape == (0, 8, 6, 6)
    assert ops.conv_bn_add_relu(x, w, *bn12, padding=1).shape == (0, 12, 6, 6)
    assert ops.conv_bn_relu_maxpool(x, w, *bn12, padding=1).shape == (0, 12, 2, 2)


# Determinism


@dtypes
def test_same_bits_on_any_number_of_threads(dtype):
    x = normal(3, 40, 33, 31, dtype=dtype).contiguous(memory_format=torch.channels_last)
    w, bn = normal(72, 40, 3, 3, dtype=dtype), batch_norm(72, dtype)
    bn40 = batch_norm(40, dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            running = [t.clone() for t in bn40]
            results.append(
                [
                    ops.conv_bn_add_relu(x, w, *bn, padding=1),
                    ops.conv_bn_relu_maxpool(x, w, *bn, padding=1),
                    ops.bn_add_relu(x, *running, training=True),
                    *running,
                ]
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


# Backends


@pytest.mark.parametrize("name", BACKENDS)
def test_each_backend_by_name(name):
    x, bn = normal(2, 8, 5, 5, dtype=torch.float32), batch_norm(8, torch.float32)
    with fr.use_backend(name):
        result = ops.bn_add_relu(x, *bn)
    torch.testing.assert_close(result, reference.bn_add_relu(x, *bn), rtol=1e-5, atol=1e-5)


def test_backends_say_why_not():
    status = fr.backends()
    assert list(status) == ["reference", "cpu", "cuda", "triton", "library"]
    assert status["cpu"]
    assert status["reference"]
    assert status["library"]
    for name in ("cuda", "triton"):
        if status[name]:
            continue
        with pytest.raises(fr.BackendUnavailable, match=name), fr.use_backend(name):
            pass
    with pytest.raises(ValueError, match="nonsense"), fr.use_backend("nonsense"):
        pass


def test_the_choice_is_private_to_a_thread():
    from concurrent.futures import ThreadPoolExecutor

    from fused_resnet.backends.availability import current_backend

    with ThreadPoolExecutor(1) as pool, fr.use_backend("reference"):
        assert pool.submit(current_backend).result() == "auto"
        assert current_backend() == "reference"
    assert current_backend() == "auto"


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_the_convolution_only(backend):
    x, w = normal(2, 8, 6, 6, dtype=torch.float32), normal(8, 8, 3, 3, dtype=torch.float32)
    bn = batch_norm(8, torch.float32)
    with torch.autocast("cpu", torch.bfloat16), fr.use_backend(backend):
        result = ops.conv_bn_add_relu(x, w, *bn, padding=1)
        expected = reference.conv_bn_add_relu(x, w, *bn, padding=1)
    assert result.dtype is expected.dtype is torch.bfloat16
    torch.testing.assert_close(result, expected, rtol=3e-2, atol=3e-2)


# Errors: the operation, the argument, what was expected and what came


def conv_arguments(**changes):
    bn = dict(
        zip(
            ("bn_weight", "bn_bias", "running_mean", "running_var"),
            batch_norm(6, torch.float32),
            strict=True,
        )
    )
    return {"x": torch.randn(2, 4, 5, 5), "conv_weight": torch.randn(6, 4, 3, 3), **bn, **changes}


BAD = [
    ({"x": torch.randn(4, 5, 5)}, ValueError, "x: expected 4 dimensions"),
    ({"x": torch.randn(2, 5, 5, 5)}, ValueError, "x: expected 4 channels"),
    ({"x": torch.ones(2, 4, 5, 5, dtype=torch.int64)}, TypeError, "x: expected dtype"),
    ({"x": "image"}, TypeError, "x: expected a Tensor, got str"),
    ({"x": torch.randn(2, 4, 2, 5)}, ValueError, "x: expected a feature map at least as large"),
    ({"conv_weight": torch.randn(6, 4, 3)}, ValueError, "conv_weight: expected 4 dimensions"),
    ({"conv_weight": torch.randn(6, 4, 3, 3).double()}, TypeError, "conv_weight: expected dtype"),
    ({"conv_weight": torch.randn(6, 4, 3, 3, device="meta")}, ValueError, "expected device cpu"),
    ({"conv_bias": torch.randn(5)}, ValueError, r"conv_bias: expected shape \(6,\)"),
    ({"bn_weight": torch.randn(5)}, ValueError, r"bn_weight: expected shape \(6,\)"),
    ({"bn_bias": torch.randn(6).long()}, TypeError, "bn_bias: expected dtype"),
    ({"running_mean": torch.randn(6).half()}, TypeError, "running_mean: expected dtype"),
    ({"running_mean": None}, ValueError, "expected both or neither"),
    ({"running_mean": None, "running_var": None}, ValueError, "when training=False"),
    ({"residual": torch.randn(2, 6, 5, 5)}, ValueError, "residual: expected shape"),
    ({"residual": torch.randn(2, 6, 3, 3).bfloat16()}, TypeError, "residual: expected dtype"),
    ({"residual": torch.randn(2, 6, 3, 3, device="meta")}, ValueError, "residual: expected device"),
    ({"groups": 4}, ValueError, "groups: expected a divisor"),
    ({"groups": 0}, ValueError, "groups: expected a divisor"),
    ({"stride": 0}, ValueError, "stride: expected an int >= 1"),
    ({"stride": (1, 2, 3)}, ValueError, "stride"),
    ({"padding": -1}, ValueError, "padding: expected an int >= 0"),
    ({"dilation": "2"}, ValueError, "dilation"),
    (
        {"x": torch.randn(1, 4, 3, 3), "training": True},
        ValueError,
        "more than 1 value per channel when training",
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("changes", "kind", "message"), BAD, ids=[b[2] for b in BAD])
def test_wrong_arguments_are_named(backend, changes, kind, message):
    with fr.use_backend(backend), pytest.raises(kind, match=message) as caught:
        ops.conv_bn_add_relu(**conv_arguments(**changes))
    assert "conv_bn_add_relu: " in str(caught.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_pixel_in_training_is_an_error(backend):
    bn = batch_norm(4, torch.float32)
    with fr.use_backend(backend), pytest.raises(ValueError, match="more than 1 value per channel"):
        ops.bn_add_relu(torch.randn(1, 4, 1, 1), *bn, training=True)


def test_wrong_pool_arguments_are_named():
    arguments = conv_arguments(padding=1)
    with pytest.raises(ValueError, match="pool_padding: expected at most half"):
        ops.conv_bn_relu_maxpool(**arguments, pool_kernel=2, pool_padding=2)
    with pytest.raises(ValueError, match="pool_kernel: expected at most the padded map"):
        ops.conv_bn_relu_maxpool(**arguments, pool_kernel=9, pool_padding=0)


def test_bare_operators_check_for_themselves():
    """``torch.ops`` and ``_C`` go past the Python checks: the compiled code must refuse too."""
    x, w = torch.randn(1, 4, 5, 5), torch.randn(6, 4, 3, 3)
    one, geometry = torch.ones(6), ([1, 1], [0, 0], [1, 1], 1)
    short = torch.ones(5)
    bad_calls = [
        lambda: _C.conv_bn_add_relu(
            x, w, None, None, None, short, one, None, *geometry, 1e-5, True
        ),
        lambda: _C.conv_bn_add_relu(
            x[0], w, None, None, None, one, one, None, *geometry, 1e-5, True
        ),
        lambda: _C.conv_bn_add_relu(x, w, None, None, None, one, one, x, *geometry, 1e-5, True),
        lambda: _C.conv_bn_add_relu(
            x, w, None, None, None, one, one, None, [0, 1], [0, 0], [1, 1], 1, 1e-5, True
        ),
        lambda: _C.conv_bn_add_relu_packed(x, one, one, one, None, [6, 4, 3, 3], *geometry, True),
        lambda: _C.unpack_conv_weight(one, [6, 4, 3, 3], 1),
        lambda: _C.bn_add_relu(x, one, None, None, None, None, True, 1e-5, True),
        lambda: _C.bn_add_relu(x, None, None, None, None, None, False, 1e-5, True),
        lambda: _C.bn_add_relu_backward(
            x, x, None, None, one[:4], one[:4], True, 1e-5, True, False
        ),
        lambda: _C.conv_bn_relu_maxpool(
            x, w, None, None, None, one, one, *geometry, 1e-5, [2, 2], [1, 1], [2, 2]
        ),
    ]
    for call in bad_calls:
        with pytest.raises((ValueError, TypeError)):
            call()


# Winograd's algorithm

WINOGRADS = [
    Conv("56x56", (1, 64, 56, 56), 64, args={"padding": 1}),
    Conv("28x28-batch", (3, 128, 28, 28), 96, args={"padding": 1}),
    Conv("14x14", (1, 256, 14, 14), 256, args={"padding": 1}),
    Conv("7x7-batch", (5, 64, 7, 7), 64, args={"padding": 1}),
    Conv("odd-valid", (2, 32, 19, 23), 64),
    Conv("wide-padding", (1, 32, 13, 18), 32, args={"padding": (2, 0)}),
    # Weights are transformed for 128 channels at a time, the last of them for 16.
    Conv("two-passes-and-a-rest", (1, 272, 17, 17), 64, args={"padding": 1}),
    # Panels of output channels are two vectors wide; the last one of these is a single vector.
    Conv("narrow-panel", (3, 16, 16, 16), 16, args={"padding": 1}),
    Conv("narrow-last-panel", (2, 32, 16, 16), 48, args={"padding": 1}),
]

# Tiles of 2x2: a small map, odd and padded on one side only, batches, panels and passes as above.
SMALL_WINOGRADS = [
    Conv("10x10", (1, 64, 10, 10), 64, args={"padding": 1}),
    Conv("7x7", (1, 256, 7, 7), 256, args={"padding": 1}),
    Conv("odd-valid-2x2", (1, 128, 9, 11), 96),
    Conv("wide-padding-2x2", (2, 64, 5, 8), 64, args={"padding": (2, 0)}),
    Conv("two-passes-2x2", (1, 272, 9, 9), 48, args={"padding": 1}),
]

# On two threads one has a tile fewer than the other, and takes them in one group instead of two:
# groups are of 14 tiles at most by vectors of 64 bytes, else of 18.
UNEVEN_WINOGRADS = [
    Conv("15-and-14-tiles", (1, 16, 4, 116), 16, args={"padding": 1}),
    Conv("19-and-18-tiles", (1, 16, 4, 148), 16, args={"padding": 1}),
]


def winograd_operands(case, dtype=torch.float32):
    """What ``ops.conv_bn_add_relu_packed`` takes and the result in float64."""
    x = normal(*case.x, dtype=dtype).contiguous(memory_format=torch.channels_last)
    w, bn = conv_weight(case, dtype), batch_norm(case.k, torch.float32)
    weight, bias, mean, var = doubled(bn)
    scale = weight / torch.sqrt(var + 1e-5)
    operands = (x, ops.pack_conv_weight(w), scale.float(), (bias - mean * scale).float())
    return operands, lambda r, relu: reference.conv_bn_add_relu(
        doubled(x), doubled(w), *doubled(bn), None if r is None else doubled(r), relu=relu,
        **case.args,
    ), {"weight_shape": tuple(w.shape), **case.args}  # fmt: skip


@pytest.mark.parametrize("case", WINOGRADS + SMALL_WINOGRADS, ids=str)
@extras
def test_winograd(case, relu, residual):
    """Within 2e-6 of float64, and not the direct sum in disguise."""
    operands, truth_of, options = winograd_operands(case)
    r = normal(*truth_of(None, relu).shape, dtype=torch.float32) if residual else None
    truth = truth_of(r, relu)
    result = ops.conv_bn_add_relu_packed(*operands, r, winograd=True, relu=relu, **options)
    direct = ops.conv_bn_add_relu_packed(*operands, r, relu=relu, **options)
    assert error(result, truth) < 2e-6
    assert not torch.equal(result, direct)


# Where AVX512-BF16's direct sum, of twice the speed, is the slower way too; AMX's is not.
NARROW_WINOGRADS = [
    *WINOGRADS[:2],
    Conv("14x14-batch", (4, 256, 14, 14), 256, args={"padding": 1}),
    Conv("odd-valid-narrow", (2, 128, 29, 35), 128),
    Conv("two-passes-and-a-rest-narrow", (1, 272, 34, 35), 144, args={"padding": (2, 1)}),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", NARROW_WINOGRADS, ids=str)
@extras
def test_winograd_in_float_over_narrow_maps(case, dtype, relu, residual):
    """Beside the result's rounding the algorithm's error is not to be seen."""
    operands, truth_of, options = winograd_operands(case, dtype)
    r = normal(*truth_of(None, relu).shape, dtype=dtype) if residual else None
    truth = truth_of(r, relu)
    result = ops.conv_bn_add_relu_packed(*operands, r, winograd=True, relu=relu, **options)
    geometry = {"padding": 0, **case.args}
    assert result.dtype is dtype
    assert error(result, truth) < 1.01 * error(truth.to(dtype), truth)
    by_tiles = dtype is torch.bfloat16 and fr.build_info()["isa"].startswith("amx")
    name = "direct" if by_tiles else "winograd 4x4"
    assert algorithm(case.x, options["weight_shape"], **geometry, dtype=dtype) == name
    direct = ops.conv_bn_add_relu_packed(*operands, r, relu=relu, **options)
    assert torch.equal(result, direct) is by_tiles


@pytest.mark.parametrize("case", WINOGRADS[:4] + SMALL_WINOGRADS[:2] + UNEVEN_WINOGRADS, ids=str)
def test_winograd_has_the_same_bits_on_any_number_of_threads(case):
    """Whether threads share out the tiles, the panels of output channels or both."""
    operands, _, options = winograd_operands(case)
    geometry = {"padding": 0, **case.args}
    assert algorithm(case.x, options["weight_shape"], **geometry).startswith("winograd")
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(ops.conv_bn_add_relu_packed(*operands, winograd=True, **options))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def algorithm(x, w, stride=1, padding=1, dilation=1, groups=1, winograd=True, dtype=torch.float32):
    """The chooser's answer for an input and a weight of these sizes."""
    pairs = ([v, v] if isinstance(v, int) else list(v) for v in (stride, padding, dilation))
    return _C.conv_algorithm(list(x), list(w), *pairs, groups, dtype, winograd)


@pytest.mark.parametrize(
    "other",
    [{"stride": 2}, {"dilation": 2}, {"groups": 2, "w": (64, 32, 3, 3)}, {"w": (64, 64, 1, 1)},
     {"w": (64, 62, 3, 3), "x": (8, 62, 56, 56)}, {"w": (33, 64, 3, 3)}, {"winograd": False},
     {"x": (1, 64, 4, 4)}],
    ids=str,
)  # fmt: skip
def test_winograd_is_for_plain_3x3_convolutions_with_some_tiles(other):
    """A 4x4 map has four tiles of 2x2: transforming the weight for them does not pay."""
    case = {"x": (8, 64, 56, 56), "w": (64, 64, 3, 3)}
    assert algorithm(**case) == "winograd 4x4"
    assert algorithm(**{**case, **other}) == "direct"


@pytest.mark.parametrize("side", ["4x4", "2x2"])
def test_winograd_has_larger_tiles_for_larger_maps(side):
    for case in WINOGRADS if side == "4x4" else SMALL_WINOGRADS:
        geometry = {"padding": 0, **case.args}
        assert algorithm(case.x, (case.k, case.x[1], 3, 3), **geometry) == f"winograd {side}"


def test_float64_takes_the_direct_sum():
    x, w = normal(1, 64, 16, 16, dtype=torch.float64), normal(64, 64, 3, 3, dtype=torch.float64)
    one = torch.ones(64, dtype=torch.float64)
    arguments = (x, ops.pack_conv_weight(w), one, one)
    options = {"weight_shape": tuple(w.shape), "padding": 1}
    result = ops.conv_bn_add_relu_packed(*arguments, winograd=True, **options)
    assert torch.equal(result, ops.conv_bn_add_relu_packed(*arguments, **options))
