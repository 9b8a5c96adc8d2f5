"""The networks against torchvision's, and the CIFAR networks against paper and trained weights."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import assert_same, image, randomize, results
from torch import Tensor, nn

import fused_resnet as fr

NAMES = [
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]


@pytest.fixture(scope="module")
def torchvision_models():
    return pytest.importorskip("torchvision.models", reason="torchvision's networks are the truth")


@pytest.mark.parametrize("name", NAMES)
def test_keys_shapes_and_settings_are_torchvisions(torchvision_models, name: str) -> None:
    with torch.device("meta"):
        ours, theirs = getattr(fr, name)(), getattr(torchvision_models, name)()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for (path, a), (other, b) in zip(
        [(n, m) for n, m in ours.named_modules() if not list(m.children())],
        [(n, m) for n, m in theirs.named_modules() if not list(m.children())],
        strict=True,
    ):
        assert (path, repr(a)) == (other, repr(b))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("resnet18", {}),
        ("resnet18", {"zero_init_residual": True, "num_classes": 7}),
        ("resnet50", {"replace_stride_with_dilation": [False, True, True], "num_classes": 7}),
        ("resnet18", {"norm_layer": lambda c: nn.BatchNorm2d(c, eps=1e-3)}),
    ],
    ids=["18", "18 zero init", "50 dilated", "18 norm layer"],
)
def test_same_seed_same_network(torchvision_models, name: str, arguments: dict) -> None:
    """Parameters bit by bit; then loss, gradients and statistics of a training step in float64."""
    torch.manual_seed(11)
    ours = getattr(fr, name)(**arguments)
    torch.manual_seed(11)
    theirs = getattr(torchvision_models, name)(**arguments)
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    randomize(ours), theirs.load_state_dict(ours.state_dict())
    ours.double(), theirs.double()
    x = image(2, 3, 33, 33)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-9, atol=1e-9)
    assert_same(results(ours.train(), x), results(theirs.train(), x), 1e-9)
    ours.load_state_dict(theirs.state_dict())


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="replace_stride_with_dilation: expected None or 3 boolea"):
        fr.resnet50(replace_stride_with_dilation=[True])
    with pytest.raises(ValueError, match="resnext50_32x4d: groups: expected 32, got 4"):
        fr.resnext50_32x4d(groups=4)
    with pytest.raises(TypeError):
        fr.resnet18(no_such_argument=1)
    with pytest.raises(ValueError, match="depth: expected one of"):
        fr.cifar_resnet(21)
    with pytest.raises(ValueError, match="shortcut: expected 'A' or 'B', got 'C'"):
        fr.cifar_resnet(20, shortcut="C")


# CIFAR


@pytest.mark.parametrize(
    ("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)]
)
def test_cifar_parameters_are_the_papers(depth: int, millions: float) -> None:
    """Table 6 of He et al., 2015."""
    model, plain = fr.cifar_resnet(depth), fr.cifar_resnet(depth, residual=False)
    count = sum(p.numel() for p in model.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.05 if depth == 110 else 0.006)
    assert list(model.state_dict()) == list(plain.state_dict())
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth


def plain_cifar(model: fr.CifarResNet, x: Tensor, residual: bool, option: str) -> Tensor:
    """The network in functions of PyTorch."""

    def conv_bn(x: Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> Tensor:
        z = F.conv2d(x, conv.weight, None, conv.stride, conv.kernel_size[0] // 2)
        return F.batch_norm(z, bn.running_mean, bn.running_var, bn.weight, bn.bias)

    x = F.relu(conv_bn(x, model.conv1, model.bn1))
    for stage in (model.layer1, model.layer2, model.layer3):
        for block in stage:
            y = F.relu(conv_bn(x, block.conv1, block.bn1))
            y = conv_bn(y, block.conv2, block.bn2)
            if residual and y.shape == x.shape:
                y = y + x
            elif residual and option == "A":
                half = (y.shape[1] - x.shape[1]) // 2
                zeros = torch.zeros_like(y[:, :half])
                y = y + torch.cat([zeros, x[:, :, ::2, ::2], zeros], 1)
            elif residual:
                y = y + conv_bn(x, *block.shortcut)
            x = F.relu(y)
    return F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), model.linear.weight, model.linear.bias)


@pytest.mark.parametrize(
    ("residual", "option"), [(True, "A"), (True, "B"), (False, "A")], ids=["A", "B", "plain"]
)
def test_cifar_networks_equal_the_papers_formula(residual: bool, option: str) -> None:
    model = randomize(fr.cifar_resnet(20, residual, option)).double().eval()
    x = image(2, 3, 32, 30)
    torch.testing.assert_close(model(x), plain_cifar(model, x, residual, option))
    torch.testing.assert_close(fr.freeze(model)(x), model(x))


def test_option_b_has_projections() -> None:
    extra = fr.cifar_resnet(20, shortcut="B").state_dict().keys()
    assert {k for k in extra if "shortcut" in k} == {
        f"layer{i}.0.shortcut.{k}"
        for i in (2, 3)
        for k in ("0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var")
    } | {f"layer{i}.0.shortcut.1.num_batches_tracked" for i in (2, 3)}


@pytest.fixture(scope="module")
def cifar_test_set(test_data: Path) -> tuple[Tensor, Tensor]:
    """2,000 images, normalised as the trained networks expect, and their labels."""
    pil = pytest.importorskip("PIL.Image", reason="the images are JPEG")
    with np.load(test_data / "cifar10_slice.npz") as data:
        jpeg, offsets, labels = (data[f"test_{k}"] for k in ("jpeg", "offsets", "labels"))
    pixels = np.stack(
        [
            np.asarray(pil.open(io.BytesIO(jpeg[a:b].tobytes())).convert("RGB"))
            for a, b in itertools.pairwise(offsets)
        ]
    )
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    return x.contiguous(memory_format=torch.channels_last), torch.from_numpy(labels).long()


@pytest.mark.thorough
@pytest.mark.parametrize(("depth", "accuracy"), [(20, 0.81), (56, 0.832)])
def test_trained_weights_keep_accuracy_and_every_prediction(
    test_data: Path, cifar_test_set: tuple[Tensor, Tensor], depth: int, accuracy: float
) -> None:
    x, labels = cifar_test_set
    model = fr.cifar_resnet(depth, weights=test_data / f"cifar_resnet{depth}.pth").eval()
    with torch.inference_mode():
        with fr.use_backend("reference"):
            expected = model(x).argmax(1)
        fused, frozen = model(x).argmax(1), fr.freeze(model)(x).argmax(1)
    assert (expected == labels).float().mean() == pytest.approx(accuracy, abs=0.02)
    assert torch.equal(fused, expected)
    assert torch.equal(frozen, expected)
