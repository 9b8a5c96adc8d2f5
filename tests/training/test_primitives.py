"""The training primitives of every backend against ``reference_training`` in float64."""

from __future__ import annotations

import pytest
import torch
import training_cases as cases
from networks import image
from tolerances import error
from torch import Tensor
from training_cases import TRAINED, coarse, widened

import fused_resnet as fr
from fused_resnet.backends import reference_training as reference
from fused_resnet.backends.activation import Activation
from fused_resnet.ops import training
from fused_resnet.ops.registry import primitives_of

backends = pytest.mark.parametrize("backend", ["cpu", "library"])
activations = pytest.mark.parametrize("activation", Activation, ids=lambda a: a.name.lower())
#: Direct and Winograd's, in one pass and in two, with strides.
OWN_KERNELS = ("cifar-3x3", "3x3-panels", "1x1-pairs", "3x3-stride2-even", "1x1-stride2-odd")
GEOMETRIES = {
    "3x3": ((6, 5, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "strided": ((6, 5, 3, 3), (2, 2), (1, 1), (1, 1), 1),
    "1x1": ((7, 5, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    "1x1 strided": ((7, 5, 1, 1), (2, 2), (0, 0), (1, 1), 1),
    "dilated, oblong": ((6, 5, 3, 2), (2, 1), (2, 1), (2, 1), 1),
    "depthwise": ((5, 1, 3, 3), (1, 1), (1, 1), (1, 1), 5),
}


def vectors(channels: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, shift and mean."""
    g = torch.Generator().manual_seed(seed)
    scale, shift, mean = torch.rand(3, channels, generator=g, dtype=torch.float64)
    return scale + 0.5, shift - 0.5, mean


def same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for ours, truth in zip(got, expected, strict=True):
        assert ours.numel() == truth.numel()
        if truth.numel():
            torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)


@backends
@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("prologue", [*Activation, None])
def test_convolutions(name, prologue, backend) -> None:
    """``prologue`` is the activation of the batch norm in front; None for no such batch norm."""
    activation = Activation.RELU if prologue is None else prologue
    prologue = prologue is not None
    size, *geometry = GEOMETRIES[name]
    p = primitives_of(backend)
    x, w = image(2, 5, 8, 7), image(*size, seed=9)
    scale, shift, mean = vectors(5, 1) if prologue else (None, None, None)
    for statistics in (True, False):
        arguments = (x, scale, shift, w, *geometry, statistics, False, activation)
        same(p.conv_forward(*arguments), reference.conv_forward(*arguments))
    z = reference.conv_forward(x, scale, shift, w, *geometry, False, False, activation)[0]
    g = image(*z.shape, seed=4)
    a, b, c = vectors(z.shape[1], 2)
    add = None if prologue else image(*x.shape, seed=5)
    for w_ in (w, w.contiguous(memory_format=torch.channels_last)):
        for batch in ((z, a, b, c), (None, a, None, None)):
            for need in ((True, True), (True, False), (False, True)):
                arguments = (
                    g, *batch, x, scale, shift, mean, w_, add, *geometry, *need, prologue, False,
                    activation,
                )  # fmt: skip
                found = p.conv_backward(*arguments)
                same(found, reference.conv_backward(*arguments))
                if need[1]:
                    assert found[1].stride() == torch.empty_like(w_).stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("winograd", [True, False])
@pytest.mark.parametrize("activation", Activation, ids=lambda a: a.name.lower())
@pytest.mark.parametrize("case", [t for t in TRAINED if str(t) in OWN_KERNELS], ids=str)
def test_kernels_of_every_activation(case, activation, winograd, dtype) -> None:
    """As near to float64 as PyTorch's convolutions: forward, both gradients and their sums."""
    arguments = list(cases.geometry(case).values())

    def last(*shape: int) -> Tensor:
        return coarse(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)

    def near(ours: tuple[Tensor, ...], eager: tuple[Tensor, ...], truth: tuple[Tensor, ...]):
        for each in zip(ours, eager, truth, strict=True):
            assert error(each[0], each[2]) <= max(1.5 * error(each[1], each[2]), 5e-6)

    p, library = primitives_of("cpu"), primitives_of("library")
    x, w = last(*case.x), cases.weight_of(case, dtype)
    bn, (a, b, c) = cases.affine(case.x[1], dtype), cases.affine(case.k, dtype)
    forward = (x, *bn[:2], w, *arguments, True, winograd, activation)
    ours, eager = p.conv_forward(*forward), library.conv_forward(*forward)
    near(ours, eager, reference.conv_forward(*widened(forward)))
    g, z = last(*ours[0].shape), last(*ours[0].shape)
    backward = (g, z, a, b / 4, c / 4, x, *bn, w, None, *arguments, True, True, True, winograd)
    backward = (*backward, activation)
    truth = reference.conv_backward(*widened(backward))
    near(p.conv_backward(*backward), library.conv_backward(*backward), truth)


@backends
@pytest.mark.parametrize("side", ["nothing", "map", "projection"])
@activations
def test_block_end(side, activation, backend) -> None:
    p = primitives_of(backend)
    z, dy = image(2, 5, 4, 3), image(2, 5, 4, 3, seed=3)
    scale, shift, mean = vectors(5, 1)
    s_scale, s_shift, s_mean = vectors(5, 2) if side == "projection" else (None, None, None)
    shortcut = None if side == "nothing" else image(2, 5, 4, 3, seed=8)
    arguments = (z, scale, shift, shortcut, s_scale, s_shift, activation)
    y = reference.block_end(*arguments)
    same((p.block_end(*arguments),), (y,))
    last = (shortcut, s_mean) if side == "projection" else (None, None)
    for sums in (True, False):
        backward = (dy, y if activation else None, z, mean, *last, sums, activation)
        same(p.block_end_backward(*backward), reference.block_end_backward(*backward))


@backends
def test_not_a_number_lets_the_gradient_pass(backend) -> None:
    """As PyTorch's ReLU: only what is known to be at most zero is masked."""
    p = primitives_of(backend)
    y = torch.tensor([float("nan"), -1.0, 2.0, 0.0], dtype=torch.float64).view(1, 1, 2, 2)
    dy = torch.full_like(y, 3.0)
    g = p.block_end_backward(dy, y, y, torch.zeros(1).double(), None, None, False)[0]
    assert g.flatten().tolist() == [3.0, 0.0, 3.0, 0.0]


@backends
@pytest.mark.parametrize(
    "pool", [((3, 3), (2, 2), (1, 1)), ((2, 3), (1, 2), (1, 0)), ((1, 1), (1, 1), (0, 0))], ids=str
)
@activations
def test_stem_end(pool, activation, backend) -> None:
    p = primitives_of(backend)
    z = (image(2, 5, 9, 8) * 2).round() / 2  # with ties
    scale, shift, mean = vectors(5, 1)
    y, index = reference.stem_end(z, scale, shift, *pool, activation)
    same(p.stem_end(z, scale, shift, *pool, activation), (y, index))
    dy = image(*y.shape, seed=3)
    for sums in (True, False):
        arguments = (dy, index, z, scale, shift, mean, *pool, sums, activation)
        same(p.stem_end_backward(*arguments), reference.stem_end_backward(*arguments))


@backends
@pytest.mark.parametrize("affine", [True, False])
def test_coefficients_and_running_statistics(affine, backend) -> None:
    p = primitives_of(backend)
    var, bias, mean = vectors(5, 1)
    weight = vectors(5, 2)[1] if affine else None
    bias = bias if affine else None
    same(
        p.bn_coefficients(mean, var, weight, bias, 1e-3),
        reference.bn_coefficients(mean, var, weight, bias, 1e-3),
    )
    arguments = (*vectors(5, 3)[:2], mean, var, weight, 1e-3, 21)
    same(p.bn_backward_coefficients(*arguments), reference.bn_backward_coefficients(*arguments))
    for count in (21, 0):
        ours, truth = ([t.clone() for t in vectors(5, 4)[:2]] for _ in range(2))
        versions = [t._version for t in ours]
        p.bn_update_running(mean, var, *ours, 0.3, count)
        reference.bn_update_running(mean, var, *truth, 0.3, count)
        same(tuple(ours), tuple(truth))
        assert [t._version for t in ours] == versions


def test_the_reference_is_the_gradient_of_its_own_forward() -> None:
    """conv, batch norm and ReLU by autograd: the formulas with the sums say the same."""
    x, w = image(2, 3, 5, 4).requires_grad_(), image(4, 3, 3, 3, seed=9).requires_grad_()
    weight, bias, _ = (t.requires_grad_() for t in vectors(4, 1))
    geometry = ((1, 1), (1, 1), (1, 1), 1)
    z, mean, var = reference.conv_forward(x, None, None, w, *geometry, True, False)
    bn = torch.nn.functional.batch_norm(z, None, None, weight, bias, True, 0.0, 1e-3)
    y = torch.relu(bn)
    dy = image(*y.shape, seed=3)
    expected = torch.autograd.grad(y, (x, w, weight, bias), dy)
    with torch.no_grad():
        scale, shift = reference.bn_coefficients(mean, var, weight, bias, 1e-3)
        same((reference.block_end(z, scale, shift, None, None, None, True),), (y,))
        g, *sums, _ = reference.block_end_backward(dy, y, z, mean, None, None, True)
        a, b, c, dweight, dbias = reference.bn_backward_coefficients(
            *sums, mean, var, weight, 1e-3, 2 * 5 * 4
        )
        dx, dw, _, _ = reference.conv_backward(
            g, z, a, b, c, x, None, None, None, w, None, *geometry, True, True, False, False
        )
    same((dx, dw, dweight, dbias), expected)


def test_primitives_as_functions() -> None:
    """They choose a backend like every operation, and name what is wrong."""
    x, w = image(2, 5, 8, 7), image(6, 5, 3, 3, seed=9).requires_grad_()
    arguments = (x, None, None, w, (1, 1), (1, 1), (1, 1), 1, True, False)
    expected = reference.conv_forward(*arguments)
    for backend in ("auto", "cpu", "library", "reference"):
        with fr.use_backend(backend):
            found = training.conv_forward(*arguments)
        assert not found[0].requires_grad
        same(found, tuple(t.detach() for t in expected))
    with pytest.raises(ValueError, match="block_end: z: expected 4 dimensions"):
        training.block_end(x[0], x[0, 0], x[0, 0], None, None, None, True)
    with pytest.raises(ValueError, match="bn_coefficients: var: expected device cpu"):
        training.bn_coefficients(x[0, :, 0, 0], x[0, :, 0, 0].to("meta"), None, None, 1e-5)


@backends
def test_results_that_are_not_wanted_are_empty_and_apart(backend) -> None:
    """Compilers take two results of an operator for two tensors."""
    p = primitives_of(backend)
    x, w = image(2, 5, 6, 6), image(5, 5, 3, 3, seed=9)
    scale, shift, mean = vectors(5, 1)
    geometry = ((1, 1), (1, 1), (1, 1), 1)
    backward = (x, None, scale, None, None, x, scale, shift, mean, w, None, *geometry)
    for found, empty in (
        (p.conv_forward(x, None, None, w, *geometry, False, False)[1:], 2),
        (p.conv_backward(*backward, True, True, False, False)[2:], 2),
        (p.conv_backward(*backward, False, False, False, False), 4),
        (p.block_end_backward(x, x, x, mean, None, None, False)[1:], 3),
    ):
        assert [t.numel() for t in found] == [0] * empty
        aliased = {t.untyped_storage()._cdata for t in found}
        assert len(aliased) == empty
