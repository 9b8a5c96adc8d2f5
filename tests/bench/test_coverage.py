"""``fused-resnet coverage``: the counts, the networks, and the reasons of the rest."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch import Tensor, nn

from fused_resnet.bench import zoo
from fused_resnet.bench.coverage import Coverage, count, total
from fused_resnet.cli import main
from fused_resnet.models import hub
from fused_resnet.models.optional import MissingPackageError, install_line
from fused_resnet.models.sources import UnknownNetworkError


class Doubled(nn.BatchNorm2d):
    """A subclass that the package does not know."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Printing(nn.Module):
    """A forward that cannot be traced, around two batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(4, 4, 1), *map(nn.BatchNorm2d, (4, 4))

    def forward(self, x: Tensor) -> Tensor:
        print("called")
        return self.second(self.first(self.conv(x)))


class Bare(nn.Module):
    """A batch norm with nothing before it and nothing behind."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) * 2


def test_every_batch_norm_is_counted_once_and_has_a_reason() -> None:
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 4, 3), Doubled(4), nn.ReLU()),
        nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()),
        Printing(),
        Bare(),
    ).eval()
    counts = count(model)
    assert (counts.groups, counts.fused) == (6, 2)
    assert counts.operations == {"conv_bn_add_relu": 1, "bn_add_relu": 1}
    assert sorted(counts.left.items(), key=lambda item: item[0].lower()) == [
        ("Doubled is not a plain BatchNorm2d", 1),
        ("forward uses print", 2),
        ("no convolution before it, and no ReLU or addition after it", 1),
    ]


def test_an_unfused_convolution_hides_no_batch_norm() -> None:
    """The batch norm behind a reflecting convolution still runs with its ReLU."""
    conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
    counts = count(nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU()).eval())
    assert counts == Coverage(1, 1, {}, {"bn_add_relu": 1})


def test_total() -> None:
    one, other = Coverage(3, 2, {"a": 1}, {"x": 2}), Coverage(9, 4, {"b": 4, "a": 1}, {"y": 4})
    assert total([one, other]) == Coverage(12, 6, {"b": 4, "a": 2}, {"y": 4, "x": 2})


@pytest.mark.parametrize("name", ["torchvision:resnet18", "torchvision:resnet18/fpn"])
def test_without_memory_the_counts_are_the_same(name: str) -> None:
    meta = zoo.build_without_memory(name)
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    assert (
        count(meta)
        == count(zoo.build(name))
        == Coverage(20, 20, {}, count(zoo.build(name)).operations)
    )


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["coverage", "--json", "torchvision:resnet50"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["command"] == "fused-resnet coverage --json torchvision:resnet50"
    assert document["versions"]["torch"] == torch.__version__
    (row,) = document["networks"]
    assert row["network"] == "torchvision:resnet50"
    assert row["family"] == "torchvision, classification"
    assert (row["groups"], row["fused"], row["left"]) == (53, 53, {})
    assert row["operations"] == {"conv_bn_relu_maxpool": 1, "conv_bn_add_relu": 52}


def test_families_and_missing_libraries(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missing library is reported once, with the command that installs it."""
    for name in ("timm", "transformers", "segmentation_models_pytorch"):
        monkeypatch.setitem(sys.modules, name, None)
    small = zoo.Family("torchvision, small", "torchvision", lambda _: ["resnet18", "mnasnet0_5"])
    others = [family for family in zoo.FAMILIES if family.source != "torchvision"]
    monkeypatch.setattr(zoo, "FAMILIES", (small, *others))
    assert main(["coverage"]) == 0
    out = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines()]
    assert ["torchvision, small", "2", "72", "72", ""] in cells
    for name in ("timm", "transformers", "segmentation_models_pytorch"):
        line = f"skipped: {name} is not installed; run: {install_line('models')}"
        assert out.splitlines().count(line) == 1


@pytest.mark.parametrize("name", ["resnet18", "torchvision:resnet5", "torchvision:resnet18/fpm"])
def test_unknown_networks(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnknownNetworkError):
        zoo.build(name)
    assert main(["coverage", name]) == 2
    assert f"unknown network '{name}'" in capsys.readouterr().err


def test_no_network_is_in_two_families_and_each_has_batch_norms() -> None:
    seen: set[str] = set()
    for family in zoo.FAMILIES:
        try:
            names = family.names()
        except MissingPackageError:
            continue
        assert names
        assert len(set(names)) == len(names)
        assert not seen & set(names)
        seen |= set(names)
    assert {"torchvision:resnet50", "torchvision:fcn_resnet50", "torchvision:resnet50/fpn"} <= seen
    assert not {"torchvision:vgg16", "torchvision:vit_b_16", "torchvision:ssd300_vgg16"} & seen
    assert {f"torchvision:{name}" for name in ("vgg16_bn", "inception_v3", "maxvit_t")} <= seen


def test_kinds_of_timms_resnets() -> None:
    pytest.importorskip("timm", reason="timm's networks are counted where timm is")
    kinds = {
        "resnet50d": "resnet", "resnetrs50": "resnet", "resnext50_32x4d": "resnext",
        "wide_resnet50_2": "wide", "seresnext26t_32x4d": "senet", "senet154": "senet",
        "ecaresnet50t": "eca", "resnetblur50": "blur", "resnetaa50d": "blur",
        "seresnetaa50d": "blur", "seresnextaa101d_32x8d": "blur",
    }  # fmt: skip
    by_title = {family.title: family.names() for family in zoo.FAMILIES if family.source == "timm"}
    for name, kind in kinds.items():
        (title,) = [t for t, names in by_title.items() if f"timm:{name}" in names]
        words = {"resnet": "(c, d", "resnext": "ResNeXt", "wide": "wide", "senet": "SE-",
                 "eca": "ECA", "blur": "blurred"}  # fmt: skip
        assert words[kind] in title, name


@pytest.mark.parametrize("name", hub.REGNETS)
def test_the_hubs_regnets_have_timms_sizes(name: str) -> None:
    """Timm computes depths and widths by the paper's formula; here they are a table."""
    transformers = pytest.importorskip("transformers", reason="the networks are transformers'")
    timm = pytest.importorskip("timm", reason="they are held against timm's")
    _, letter, size, *_ = name.split("-")
    with torch.device("meta"):
        model = hub.build(transformers, name)
        theirs = timm.create_model(f"regnet{letter}_{size}")
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in theirs.parameters())
