"""``save_frozen``: the network's name is found and proved; labels and preprocessing come along."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks import randomize
from torch import nn

import fused_resnet as fr
from fused_resnet.inference import preprocessing
from fused_resnet.inference.archive import read_frozen

torchvision = pytest.importorskip("torchvision", reason="its networks and transforms")
Image = pytest.importorskip("PIL.Image", reason="photographs")
v1 = torchvision.transforms
v2 = pytest.importorskip("torchvision.transforms.v2")


def resnet18() -> nn.Module:
    torch.manual_seed(0)
    return randomize(torchvision.models.resnet18(num_classes=3))


def photograph() -> object:
    g = torch.Generator().manual_seed(0)
    small = torch.randint(0, 256, (3, 30, 40), generator=g, dtype=torch.uint8)
    return v2.functional.to_pil_image(small).resize((400, 300))


NETWORKS = {
    "resnet18": resnet18,
    "cifar_resnet20": lambda: fr.cifar_resnet(20),
    "resnet34": lambda: fr.resnet34(num_classes=4),
}


# What wraps a network is taken off before its name is looked for: one is enough for each.
@pytest.mark.parametrize(
    ("name", "wrap"),
    [("resnet18", wrap) for wrap in ("plain", "fused", "parallel", "training")]
    + [("cifar_resnet20", "plain"), ("resnet34", "fused")],
)
def test_the_network_is_found(tmp_path: Path, name: str, wrap: str) -> None:
    model = NETWORKS[name]().train(wrap == "training")
    given = {"fused": fr.fuse, "parallel": nn.DataParallel}.get(wrap, lambda m: m)(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    file = fr.save_frozen(given, tmp_path / "f.safetensors")
    assert (file.network, file.dtype) == (name, torch.float32)
    assert model.training == (wrap == "training")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    x = torch.randn(2, 3, 64, 64)
    loaded = fr.load_frozen(tmp_path / "f.safetensors")
    with torch.no_grad():
        expected = model.eval()(x)
    assert (loaded(x) - expected).norm() < 1e-5 * expected.norm()
    assert loaded.labels is None
    assert loaded.preprocessing is None


def changed(model: nn.Module) -> nn.Module:
    model.layer1[0].relu = nn.GELU()
    return model


def dilated() -> nn.Module:
    blocks, depths = torchvision.models.resnet.Bottleneck, [3, 4, 6, 3]
    return torchvision.models.ResNet(
        blocks, depths, replace_stride_with_dilation=[False, True, True], num_classes=3
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: changed(resnet18()), "has the weights of resnet18 but computes something else"),
        (dilated, "has the weights of resnet50 but computes something else"),
        (lambda: fr.cifar_resnet(20, residual=False), "the weights of cifar_resnet20 but computes"),
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 1)), "is none of the networks that fused-resnet"),
        (lambda: torchvision.models.vgg11(), "is none of the networks"),
        (lambda: fr.freeze(resnet18()), "is frozen already; give the model that was frozen"),
    ],
)
def test_what_the_file_could_not_serve_is_refused(tmp_path: Path, make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fr.save_frozen(make(), tmp_path / "f.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    with pytest.raises(TypeError, match="model: expected a module, got dict"):
        fr.save_frozen({}, path)
    with pytest.raises(ValueError, match="labels: expected 3 strings, one a class, got 2"):
        fr.save_frozen(resnet18(), path, labels=["cat", "dog"])
    with pytest.raises(ValueError, match=r"resnet34: weights .* do not fit"):
        fr.save_frozen(resnet18(), path, network="resnet34")
    with pytest.raises(ValueError, match="did you mean resnet18"):
        fr.save_frozen(resnet18(), path, network="resnet81")
    assert list(tmp_path.iterdir()) == []


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COMPOSE = v1.Compose(
    [
        v1.Resize(72, v1.InterpolationMode.BICUBIC),
        v1.CenterCrop(64),
        v1.ToTensor(),
        v1.Normalize(MEAN, STD),
    ]
)
TRANSFORMS = {
    "weights": torchvision.models.ResNet50_Weights.IMAGENET1K_V2.transforms(),
    "compose": COMPOSE,
    "v2": v2.Compose(
        [
            v2.ToImage(),
            v2.Resize(72, antialias=True),
            v2.CenterCrop(64),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    ),
    "none of it": v1.ToTensor and v1.Compose([v1.ToTensor()]),
}


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_the_loaded_network_prepares_images_as_the_transform_does(
    tmp_path: Path, kind: str
) -> None:
    transform, labels = TRANSFORMS[kind], ["cat", "dog", "a \"quoted\" 'ñandú'"]
    fr.save_frozen(resnet18(), tmp_path / "f.safetensors", labels=labels, transform=transform)
    loaded = fr.load_frozen(tmp_path / "f.safetensors")
    assert list(loaded.labels) == labels
    got, expected = loaded.preprocessing(photograph()), transform(photograph())
    # To a step of a byte: Pillow and torchvision round an interpolated pixel differently.
    torch.testing.assert_close(
        got, torch.as_tensor(expected), rtol=0, atol=0.01 + (kind == "v2") * 0.03
    )
    assert got.dtype == torch.float32
    again = read_frozen(tmp_path / "f.safetensors").preprocessing
    assert preprocessing.of(again) == again == preprocessing.of(transform)


TIMM = {"input_size": (3, 288, 288), "interpolation": "bicubic", "mean": MEAN, "std": STD}


def test_timms_configuration() -> None:
    found = preprocessing.of(TIMM | {"crop_pct": 0.95, "crop_mode": "center"})
    assert found == (303, 288, "bicubic", MEAN, STD)
    with pytest.raises(ValueError, match="crop_mode center, got 'squash'"):
        preprocessing.of(TIMM | {"crop_mode": "squash"})


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (
            v1.Compose([v1.RandomResizedCrop(64), v1.ToTensor()]),
            "ResizedCrop can't be stored",
        ),
        (v1.Compose([v1.Resize((64, 64)), v1.ToTensor()]), r"Resize to \(64, 64\) distorts images"),
        (v1.Compose([v1.CenterCrop(64), v1.Resize(32)]), "in this order"),
        (lambda image: image, "expected torchvision's or timm's transform"),
        ({"resize": 1}, "its preprocessing is not"),
        ({"resize": 0, "crop": 0, "interpolation": "x", "mean": [0], "std": [1]}, "is not resize"),
        ({"resize": 0, "crop": 0, "interpolation": "nearest", "mean": [0], "std": [0]}, "is not"),
    ],
)
def test_other_transforms_are_refused(transform: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preprocessing.of(transform)
