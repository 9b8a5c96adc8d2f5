"""What a frozen model promises where Winograd's algorithm runs: extreme values, NaN, images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet import _C

C, SIZE = 32, 33

#: As the docstring of freeze says.
RELATIVE, LARGEST = 2e-6, 1e33


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    """A convolution and its batch norm, whose filters and scale are of the order of 1."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(C, C, 3, padding=1, bias=False), nn.BatchNorm2d(C)).eval()
    model[1].running_var.uniform_(0.5, 2)
    model[1].running_mean.normal_()
    return model


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(3, C, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def truth(plain: nn.Module, x: Tensor) -> Tensor:
    weight, bn = plain[0].weight.double(), plain[1]
    z = nn.functional.conv2d(x.double(), weight, padding=1)
    statistics = (t.double() for t in (bn.running_mean, bn.running_var, bn.weight, bn.bias))
    return nn.functional.batch_norm(z, *statistics, eps=bn.eps)


def gain(plain: nn.Module) -> Tensor:
    """The sum of the absolute filter, times the batch norm's scale: ``(K, 1, 1)``."""
    bn = plain[1]
    scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    return (plain[0].weight.abs().sum((1, 2, 3)) * scale.abs()).double().view(-1, 1, 1)


def tile(x: Tensor) -> int:
    """Side of the tiles of results: Winograd's algorithm runs."""
    name = _C.conv_algorithm(list(x.shape), [C, C, 3, 3], [1, 1], [1, 1], [1, 1], 1, x.dtype, True)
    if not name.startswith("winograd"):
        pytest.skip(f"this machine's kernels run {name} here")
    return int(name[-1])


def reached(row: int, column: int, side: int) -> Tensor:
    """The results whose tile reads a pixel: ``(H, W)``."""

    def along(at: int) -> Tensor:
        first = torch.arange(SIZE) // side * side - 1  # of the window, beyond the padding
        return (first <= at) & (at < first + side + 2)

    return along(row)[:, None] & along(column)[None, :]


@pytest.mark.parametrize("large", [1.0, 1e4, 1e30])
@pytest.mark.parametrize("place", [(13, 13), (12, 15), (0, 32)], ids=str)
def test_the_error_is_relative_to_the_largest_value_of_the_tile(
    plain: nn.Module, images: Tensor, large: float, place: tuple[int, int]
) -> None:
    x = images.clone()
    x[0, :, place[0], place[1]] = large
    y, direct = fr.freeze(plain)(x), fr.freeze(plain, winograd=False)(x)
    error = (y.double() - truth(plain, x)).abs() / gain(plain)
    near = reached(*place, tile(x))
    ordinary = images.abs().max().item()
    assert error[0][:, near].max() < RELATIVE * max(large, ordinary)
    assert error[0][:, ~near].max() < RELATIVE * ordinary
    if large == 1e4:  # beside the pixel, where only Winograd's algorithm mixes it in
        touched = torch.zeros(SIZE, SIZE, dtype=torch.bool)
        touched[max(place[0] - 1, 0) : place[0] + 2, max(place[1] - 1, 0) : place[1] + 2] = True
        beside = near & ~touched
        worse = (direct.double() - truth(plain, x)).abs() / gain(plain)
        assert worse[0][:, beside].max() < RELATIVE * ordinary < error[0][:, beside].max() * 1e3
    assert torch.equal(y[1:], fr.freeze(plain)(images)[1:])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [(13, 13), (12, 15), (0, 32)], ids=str)
def test_what_is_not_finite_stays_in_the_tiles_that_read_it(
    plain: nn.Module, images: Tensor, value: float, place: tuple[int, int]
) -> None:
    x = images.clone()
    x[0, 3, place[0], place[1]] = value
    y, eager = fr.freeze(plain)(x), plain(x)
    near = reached(*place, tile(x))
    assert near.sum() <= 8 * 8
    finite = y[0].isfinite()
    assert (finite[:, ~near]).all()
    assert not finite[~eager[0].isfinite()].any()  # nothing that eager loses is invented
    clean = fr.freeze(plain)(images)
    assert torch.equal(y[0][:, ~near], clean[0][:, ~near])
    assert torch.equal(y[1:], clean[1:])
    direct = fr.freeze(plain, winograd=False)(x)
    assert torch.equal(direct.isfinite(), eager.isfinite())


def test_values_up_to_the_bound_do_not_overflow(plain: nn.Module, images: Tensor) -> None:
    tile(images)
    x = images / images.abs().max() * (LARGEST / gain(plain).max().item())
    y = fr.freeze(plain)(x)
    assert y.isfinite().all()
    assert ((y.double() - truth(plain, x)).abs() <= RELATIVE * LARGEST).all()
    huge = images.clone()
    huge[0] *= 1e37  # beyond it the algorithm may overflow, and an image spoils no other
    y, direct = fr.freeze(plain)(huge), fr.freeze(plain, winograd=False)(huge)
    assert plain(huge).isfinite().all()
    assert direct.isfinite().all()
    assert torch.equal(y[1:], fr.freeze(plain)(images)[1:])


@pytest.mark.parametrize("name", ["resnet18", "cifar_resnet"])
@pytest.mark.parametrize("winograd", [True, False])
def test_an_image_does_not_see_the_others(name: str, winograd: bool) -> None:
    """Of a whole network: NaN, infinity and 1e37 in one image leave the bits of the others."""
    torch.manual_seed(0)
    model = fr.resnet18(num_classes=5) if name == "resnet18" else fr.cifar_resnet(20)
    frozen = fr.freeze(model.eval(), winograd=winograd)
    x = torch.randn(4, 3, 32, 32)
    clean = frozen(x)
    for value in (float("nan"), float("inf"), 1e37):
        spoiled = x.clone()
        spoiled[2, :, 5, 7] = value
        y = frozen(spoiled)
        assert torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]])
        assert value == 1e37 or not y[2].isfinite().all()


@pytest.mark.parametrize("name", ["resnet18", "cifar_resnet"])
@pytest.mark.parametrize(
    ("dtype", "winograd", "limit"),
    [
        (torch.float32, True, 2e-6),
        (torch.float32, False, 0),
        (torch.bfloat16, False, 0),
        (torch.bfloat16, True, 1e-2),
    ],
    ids=["float32", "float32 direct", "bfloat16 direct", "bfloat16"],
)
def test_an_image_alone_and_in_a_batch(
    name: str, dtype: torch.dtype, winograd: bool, limit: float
) -> None:
    """The bounds that the docstring of freeze gives; the same batch gives the same bits."""
    torch.manual_seed(0)
    model = fr.resnet18(num_classes=5) if name == "resnet18" else fr.cifar_resnet(20)
    frozen = fr.freeze(model.eval(), dtype, winograd=winograd)
    x = torch.randn(16, 3, 48, 48)
    together = frozen(x)
    alone = torch.cat([frozen(image[None]) for image in x[:4]])
    assert (alone - together[:4]).norm() <= limit * together[:4].norm()
    assert winograd or torch.equal(alone, together[:4])
    assert torch.equal(frozen(x), together)
