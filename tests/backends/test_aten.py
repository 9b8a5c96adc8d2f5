"""The library backend: PyTorch's own fused convolutions, with batch norm and a gradient."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import CONVS, FORMATS, Conv, batch_norm, conv_weight, doubled, normal
from tolerances import DTYPES, assert_as_exact_as_pytorch
from torch import Tensor

import fused_resnet as fr
from fused_resnet import ops, reference
from fused_resnet.backends import aten as library

pytestmark = pytest.mark.skipif(library.reason() != "", reason=library.reason())
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
formats = pytest.mark.parametrize("fmt", FORMATS)
extras = pytest.mark.parametrize(
    ("relu", "residual"), [(True, True), (True, False), (False, True), (False, False)]
)


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    """From two threads on PyTorch runs its own convolutions by oneDNN too, whatever the batch.

    On one it does not for small batches, and oneDNN's sums over many channels are then less exact.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def onednn_calls(monkeypatch) -> list[bool]:
    """Whether each call of oneDNN's fused convolution had a residual."""
    calls: list[bool] = []
    fused = library._onednn

    def record(x, weight, bias, residual, *geometry):
        calls.append(residual is not None)
        return fused(x, weight, bias, residual, *geometry)

    monkeypatch.setattr(library, "_onednn", record)
    return calls


def operands(case: Conv, dtype: torch.dtype, fmt: str) -> tuple[Tensor, Tensor, tuple, Tensor]:
    x = normal(*case.x, dtype=dtype).contiguous(memory_format=FORMATS[fmt])
    w, bn = conv_weight(case, dtype), batch_norm(case.k, dtype)
    shape = reference.conv_bn_add_relu(x, w, *bn, **case.args).shape
    return x, w, bn, normal(*shape, dtype=dtype).contiguous(memory_format=FORMATS[fmt])


def check(case: Conv, dtype: torch.dtype, fmt: str, relu: bool, residual: bool) -> None:
    x, w, bn, r = operands(case, dtype, fmt)
    added = [r] if residual else []
    options = {**case.args, "relu": relu}
    truth = reference.conv_bn_add_relu(
        doubled(x), doubled(w), *doubled(bn), *doubled(added), **options
    )
    eager = reference.conv_bn_add_relu(x, w, *bn, *added, **options)
    with fr.use_backend("library"):
        result = ops.conv_bn_add_relu(x, w, *bn, *added, **options)
    assert_as_exact_as_pytorch(result, eager, truth)


@dtypes
@formats
@pytest.mark.parametrize("case", CONVS, ids=str)
def test_conv_bn_add_relu(dtype, fmt, case):
    check(case, dtype, fmt, relu=True, residual=True)


@dtypes
@extras
def test_flags(dtype, relu, residual):
    check(CONVS[3], dtype, "channels_last", relu, residual)


@pytest.mark.parametrize("residual", [True, False])
def test_onednn_runs_where_it_can(residual, onednn_calls):
    x, w, bn, r = operands(CONVS[3], torch.float32, "channels_last")
    with fr.use_backend("library"):
        ops.conv_bn_add_relu(x, w, *bn, *([r] if residual else []), padding=1)
        assert onednn_calls == [residual]
        ops.conv_bn_add_relu(x.double(), w.double(), *doubled(bn), padding=1)
    assert len(onednn_calls) == 1


@pytest.mark.parametrize("training", [True, False])
def test_gradients(training):
    case = CONVS[4]
    x, w, bn, r = operands(case, torch.float64, "channels_last")

    def gradients(function):
        leaves = [t.detach().clone().requires_grad_() for t in (x, w, *bn[:2], r)]
        running = [t.clone() for t in bn[2:]]
        y = function(*leaves[:4], *running, leaves[4], training=training, **case.args)
        torch.manual_seed(3)
        return torch.autograd.grad(y, leaves, normal(*y.shape, dtype=y.dtype))

    expected = gradients(reference.conv_bn_add_relu)
    with fr.use_backend("library"):
        found = gradients(ops.conv_bn_add_relu)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_whole_network_and_compiled(onednn_calls):
    torch.manual_seed(0)
    model = fr.resnet18(num_classes=10).eval().to(memory_format=torch.channels_last)
    # Large enough that no map has a single pixel, which is contiguous in both memory formats.
    x = normal(1, 3, 64, 64, dtype=torch.float32).to(memory_format=torch.channels_last)
    with torch.no_grad():
        with fr.use_backend("reference"):
            expected = model(x)
        with fr.use_backend("library"):
            result = model(x)
        # The last convolution of each of the eight blocks has the residual; the three shortcuts'
        # have no ReLU.
        assert (len(onednn_calls), sum(onednn_calls)) == (17, 8)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
        with fr.use_backend("library"):
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)


def test_frozen_networks_run_on_the_library_backend():
    torch.manual_seed(0)
    model = fr.resnet18(num_classes=10).eval()
    x = normal(1, 3, 32, 32, dtype=torch.float32)
    with torch.no_grad(), fr.use_backend("library"):
        torch.testing.assert_close(fr.freeze(model)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "dtype", "taken"),
    [
        ((64, 64, 3, 3), torch.float16, True),
        ((64, 64, 1, 1), torch.float32, True),
        ((64, 3, 7, 7), torch.float16, False),  # slow: pytorch issue 68506
        ((64, 64, 5, 5), torch.float16, False),
        ((1, 1, 1, 1), torch.float32, False),  # not supported: pytorch issue 62926
        ((64, 4, 3, 3), torch.float16, False),
        ((64, 4, 3, 3), torch.float32, True),
        ((20, 64, 3, 3), torch.bfloat16, False),
        ((64, 64, 3, 3), torch.float64, False),
    ],
    ids=str,
)
def test_which_filters_cudnn_runs(shape, dtype, taken, monkeypatch):
    """The decision only, without a GPU; tests/gpu runs the convolutions."""
    monkeypatch.setattr(library, "_has_cudnn", lambda: True)
    assert library._cudnn_supports(torch.empty(shape, dtype=dtype)) is taken
